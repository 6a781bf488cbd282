"""A decoder in torch whose routed experts choose their bits by trainable routers: D2MoE's dual routing, for training.

Each expert has one linear layer, from the MoE layer's normed input and the slot's gate to one logit per precision. The
paper (D2MoE, arXiv 2504.15299, section 3.2) does not describe the architecture; its reported cost is that of one linear
layer, and the gate as an input is ours. Only these linear layers are trained. The forward pass is that of
`edgemoe.model`, without 8-bit activations. This module needs torch, so it is imported only when training starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from edgemoe.config import ModelConfig
from edgemoe.errors import FormatError
from edgemoe.file.format import MoeFile
from edgemoe.lab.bits.choosing import Choosing, ffn
from edgemoe.specs import AttentionSpec
from edgemoe.store.floats import dense_floats, expert_floats

__all__ = ["Routed", "Step", "model_bytes", "use_threads"]


@dataclass(frozen=True, slots=True)
class Step:
    """The figures of one forward pass."""

    divergence: float
    """Mean KL divergence of the routed model from the full one, in nats per token."""
    bits: float
    """The average of the chosen precisions, including dropped slots."""
    dropped: float
    """The share of slots that exceeded a capacity."""


def model_bytes(moe: MoeFile, levels: Sequence[int]) -> int:
    """Returns the bytes of the weights as float32, at the precisions `levels` and at the highest."""
    c = moe.config
    dense = sum(int(np.prod(t.spec.shape)) for t in moe.tensors.values())
    expert = 3 * c.hidden_size * c.expert_hidden
    copies = len({*levels, moe.ladder[-1][0]} - {0})
    return 4 * (dense + copies * expert * len(moe.experts.offsets))


def use_threads(count: int) -> None:
    """Lets torch compute on `count` threads."""
    torch.set_num_threads(count)


# The fields that `Routed` computes. A model is refused if others are not at their defaults.
_CONFIG = frozenset(
    ("family", "vocab_size", "hidden_size", "num_layers", "context_length", "norm_eps", "tied", "mixers",
     "layer_mixers", "num_experts", "experts_per_token", "expert_hidden", "moe_layers", "scoring", "renormalise",
     "shared_hidden", "shared_sigmoid", "embedding_multiplier", "residual_multiplier", "logits_divisor", "eos_ids")
)  # fmt: skip
_ATTENTION = frozenset(
    ("num_heads", "num_kv_heads", "head_dim", "scale", "rope", "window", "qkv_bias", "o_bias", "qk_norm", "norm_eps",
     "clip")
)  # fmt: skip

_SHARPNESS = 3.0
"""Of the initial rule: the difference of logits at one standard deviation of gates from a cut."""
_FEW_RATE = 10.0  # factor for `gate_weight` and `bias`: they have one input, `weight` has D


class Routed:
    """A model that runs at its full bits or, with the same weights, with each slot's bits chosen by routers."""

    def __init__(self, moe: MoeFile, levels: Sequence[int], *, rate: float) -> None:
        """Args:
        levels: precisions of the file to choose from, ascending; the first may be 0, which does not run the expert.
        rate: the learning rate of Adam.

        Raises:
            FormatError: a checksum does not match, or the model has parts that this decoder does not support.
        """
        self.config = c = moe.config
        if (what := _unknown(c)) is not None:
            raise FormatError(
                f"bit routers cannot be trained for models of family {c.family} yet: {what}"
            )
        self.bits = torch.tensor(levels, dtype=torch.float32)
        self._levels = tuple(levels)
        self._dense = {name: torch.from_numpy(w) for name, w in dense_floats(moe).items()}
        self._full = moe.ladder[-1][0]
        self._experts = {
            bits: [
                tuple(map(torch.from_numpy, expert_floats(moe, row, moe.level(bits))))
                for row in range(len(moe.experts.offsets))
            ]
            for bits in sorted({*levels, self._full} - {0})
        }
        L, E, n = len(c.moe_layers), c.num_experts, len(levels)
        self.weight = torch.zeros(L, E, n, c.hidden_size, requires_grad=True)
        """[L, E, levels, D]"""
        self.gate_weight = torch.zeros(L, E, n, requires_grad=True)
        """[L, E, levels]"""
        self.bias = torch.zeros(L, E, n, requires_grad=True)
        """[L, E, levels]"""
        groups: list[dict[str, Any]] = [
            {"params": [self.weight]},
            {"params": [self.gate_weight, self.bias], "lr": _FEW_RATE * rate},
        ]
        self._adam = torch.optim.Adam(groups, lr=rate)
        self._gates: list[Tensor] | None = None

    def begin(self, ids: NDArray[np.int32], shares: Sequence[float]) -> None:
        """Initialises the routers to D2MoE's untrained rule: a larger gate gets more bits.

        Args:
            ids: [N, T], sequences whose gates determine each layer's cuts between precisions.
            shares: the share of slots at each precision.
        """
        self._gates = []
        self.logits(ids)
        at = torch.tensor(shares).cumsum(0)[:-1].clamp(0, 1)
        for layer, gates in enumerate(self._gates):
            slope = _SHARPNESS / float(gates.std().clamp(min=1e-6))
            cuts = torch.cat([torch.zeros(1), gates.flatten().quantile(at)])
            # Logit k is slope * sum over i <= k of (gate - cut i), so it is the largest between cuts k and k + 1.
            self.gate_weight.data[layer] = slope * torch.arange(len(shares))
            self.bias.data[layer] = -slope * cuts.cumsum(0)
        self._gates = None

    def learn(
        self,
        ids: NDArray[np.int32],
        *,
        alpha: float,
        capacities: Sequence[float] | None,
        seed: int,
    ) -> Step:
        """Does one step of Adam on the loss of sequences [N, T]; arguments are those of `loss`."""
        loss, step = self.loss(ids, alpha=alpha, capacities=capacities, seed=seed)
        self._adam.zero_grad()
        loss.backward()
        self._adam.step()
        return step

    def loss(
        self,
        ids: NDArray[np.int32],
        *,
        alpha: float,
        capacities: Sequence[float] | None,
        seed: int,
    ) -> tuple[Tensor, Step]:
        """Returns the paper's loss: distillation plus alpha times the expected bits, as a mean over layers.

        Args:
            ids: [N, T], tokens.
            alpha: the price of a bit, in nats.
            capacities: see `keep_within`; None drops nothing.
            seed: of the random choices.
        """
        tokens = torch.from_numpy(ids).long()
        with torch.no_grad():
            teacher = functional.log_softmax(self._forward(tokens, None), -1)
        choosing = Choosing(self, capacities, torch.Generator().manual_seed(seed))
        student = functional.log_softmax(self._forward(tokens, choosing), -1)
        # The cross-entropy less the teacher's entropy, which does not depend on the routers.
        divergence = (
            functional.kl_div(student, teacher, reduction="sum", log_target=True) / tokens.numel()
        )
        expected = torch.stack(choosing.expected).mean()
        slots = choosing.slots
        step = Step(float(divergence.detach()), choosing.bits / slots, choosing.dropped / slots)
        return divergence + alpha * expected, step

    def logits(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Returns the full model's logits [N, T, V] of sequences [N, T]."""
        with torch.no_grad():
            out: NDArray[np.float32] = self._forward(torch.from_numpy(ids).long(), None).numpy()
        return out

    @property
    def _trained(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "gate_weight": self.gate_weight, "bias": self.bias}

    def state(self) -> dict[str, NDArray[Any]]:
        """Returns copies of the routers and of the state of Adam, by name."""
        out = {}
        for name, tensor in self._trained.items():
            out[name] = tensor.detach().numpy().copy()
            for key, value in self._adam.state[tensor].items():
                out[f"{name}.{key}"] = value.numpy().copy()
        return out

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Restores what `state` returned for the same model.

        Raises:
            KeyError: an array is missing.
        """
        for name, tensor in self._trained.items():
            tensor.data = torch.tensor(state[name])
            self._adam.state[tensor] = {
                key: torch.tensor(state[f"{name}.{key}"])
                for key in ("step", "exp_avg", "exp_avg_sq")
            }

    def _forward(self, ids: Tensor, choosing: Choosing | None) -> Tensor:
        c, w = self.config, self._dense
        x = w["embed"][ids] * c.embedding_multiplier
        for i in range(c.num_layers):
            p = f"layers.{i}."
            h = _norm(x, w[p + "attn_norm"], c.norm_eps)
            cos, sin = self._rope(i, ids.shape[1])
            x = x + self._attention(i, h, cos, sin) * c.residual_multiplier
            h = _norm(x, w[p + "ffn_norm"], c.norm_eps)
            out = torch.zeros_like(x)
            if c.shared_width(i):
                gate, up, down = (w[f"{p}shared.{m}"] for m in ("gate", "up", "down"))
                out = ffn(h, gate, up, down)
                if p + "shared.sigmoid" in w:
                    out = out * torch.sigmoid(h @ w[p + "shared.sigmoid"])[..., None]
            if i in c.moe_layers:
                flat = h.reshape(-1, c.hidden_size)
                out = out + self._moe(c.moe_layers.index(i), flat, choosing).reshape(x.shape)
            x = x + out * c.residual_multiplier
        x = _norm(x, w["norm"], c.norm_eps)
        return x @ w["embed" if c.tied else "head"].T / c.logits_divisor

    def _moe(self, layer: int, x: Tensor, choosing: Choosing | None) -> Tensor:
        """Returns the gated sum [T, D] of a layer's experts on x [T, D]."""
        c = self.config
        scores = x @ self._dense[f"layers.{c.moe_layers[layer]}.router"].T
        top, chosen = scores.topk(c.experts_per_token)
        if c.scoring == "softmax_topk":
            gates = top.softmax(-1)
        else:
            gates = scores.softmax(-1).gather(1, chosen)
            if c.renormalise:
                gates = gates / gates.sum(-1, keepdim=True)
        if self._gates is not None:
            self._gates.append(gates)
        out = torch.zeros_like(x)
        for e in range(c.num_experts):
            token, place = (chosen == e).nonzero(as_tuple=True)
            if len(token) == 0:
                continue
            row, of = layer * c.num_experts + e, x[token]
            if choosing is None:
                part = ffn(of, *self._experts[self._full][row])
            else:
                matrices = [self._experts[b][row] if b else None for b in self._levels]
                weights = gates[token, place].detach()
                part = choosing(layer, e, of, weights, place == 0, matrices)
            out = out.index_add(0, token, gates[token, place, None] * part)
        if choosing is not None:
            choosing.end_layer()
        return out

    def _attention(self, i: int, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        w, p, c = self._dense, f"layers.{i}.", self.config.mixer(i)
        assert isinstance(c, AttentionSpec)
        N, T, _ = x.shape
        q, k, v = (x @ w[p + m].T + w.get(f"{p}{m}_bias", 0) for m in "qkv")
        if c.qk_norm == "full":
            q, k = (_norm(a, w[f"{p}{m}_norm"], c.norm_eps) for a, m in ((q, "q"), (k, "k")))
        if c.clip is not None:
            q, k, v = (a.clamp(-c.clip, c.clip) for a in (q, k, v))
        q, k, v = (a.reshape(N, T, -1, c.head_dim) for a in (q, k, v))
        if c.qk_norm == "head":
            q, k = (_norm(a, w[f"{p}{m}_norm"], c.norm_eps) for a, m in ((q, "q"), (k, "k")))
        q, k = (_rotate(a, cos, sin) for a in (q, k))
        distance = torch.arange(T)[:, None] - torch.arange(T)
        seen = distance >= 0
        if c.window:
            seen &= distance < c.window
        k, v = (a.repeat_interleave(c.num_heads // c.num_kv_heads, 2) for a in (k, v))
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=c.scale)
        return out.transpose(1, 2).reshape(N, T, -1) @ w[p + "o"].T + w.get(p + "o_bias", 0)

    def _rope(self, layer: int, T: int) -> tuple[Tensor, Tensor]:
        (spec,) = self.config.mixer(layer).ropes
        angles = torch.arange(T)[:, None, None] * self._dense[spec.frequencies(T)]
        return angles.cos() * spec.scale, angles.sin() * spec.scale


def _unknown(config: ModelConfig) -> str | None:
    """Returns what of a model `Routed` does not compute; None if it computes everything."""
    for mixer in config.mixers:
        if not isinstance(mixer, AttentionSpec):
            return f"a mixer of the kind {mixer.kind}"
        if mixer.rope_dim != mixer.head_dim:
            return f"RoPE on {mixer.rope_dim} of {mixer.head_dim} columns"
        if mixer.qk_norm == "unit":
            return "qk_norm unit"
    if config.scoring not in ("softmax", "softmax_topk"):
        return f"scoring {config.scoring}"
    if not all(config.ffn(i).exists for i in range(config.num_layers)):
        return "a layer without an FFN"
    parts: list[tuple[Any, frozenset[str]]] = [(mixer, _ATTENTION) for mixer in config.mixers]
    for part, known in ((config, _CONFIG), *parts):
        for field in fields(part):
            if field.name not in known and getattr(part, field.name) != field.default:
                return f"{field.name} {getattr(part, field.name)}"
    return None


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
