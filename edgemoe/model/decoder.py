"""The forward pass: one decoder for all model families. It runs prompts in chunks as well as single tokens.

A token's arithmetic never depends on which other tokens are in the batch. So a prompt gives the same bits in one chunk,
in many chunks, token by token, and in a batch with other sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

from edgemoe.config import ModelConfig
from edgemoe.experts import Experts
from edgemoe.model.batch import Batch
from edgemoe.model.ffn import BranchedFfn, ClosedFfn, DenseFfn, Ffn, RoutedFfn
from edgemoe.model.hosted import make_mixers
from edgemoe.model.kv import KV_BITS, KvTypes
from edgemoe.model.mixer import ClosedMixer, Mixer, MixerLayer, mixer_class
from edgemoe.model.rope import Rope
from edgemoe.model.router import Routers
from edgemoe.model.scratch import Rows, Scratch
from edgemoe.model.setup import Setup
from edgemoe.model.state import SequenceState
from edgemoe.ops import Array, Ids, Matrix, Ops, RowTable, rope_bytes
from edgemoe.places import Places
from edgemoe.specs import MixerSpec
from edgemoe.store import EMBED_ROWS, Weight

__all__ = [
    "Decoder", "Kind", "Layer", "kept_rope_bytes", "layer_state_bytes", "read_bytes", "scratch_bytes", "state_bytes",
    "state_pieces",
]  # fmt: skip


Kind = tuple[MixerSpec, KvTypes]
"""The spec of a layer's mixer, and the types of its keys and values. Layers of one kind share a `Mixer`."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: a mixer and, usually, an FFN."""

    mixer: MixerLayer
    ffn_norm: Array | None
    """[D], the weight of the norm before the FFN."""
    ffn: Ffn | None
    """None for a layer that is only a mixer."""
    next_norm: Array
    """[D], the weight of the norm before the next layer's mixer, or before the head."""


@dataclass(frozen=True, slots=True)
class _Stack:
    """One set of weights of the whole model."""

    embed: RowTable
    head: Matrix
    head_bias: Array | None
    first_norm: Array
    layers: list[Layer]


class Decoder:
    """The model's forward pass, from tokens to hidden states and logits. Owns the activations, not the weights.

    There may be several sets of dense weights: first the model's own, then those of adapters. `Batch.variant` says
    which set a batch runs with.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Weight],
        ops: Ops,
        experts: Experts,
        *,
        max_tokens: int,
        context: int,
        types: KvTypes,
        others: Sequence[Mapping[str, Weight]] = (),
        places: Places | None = None,
    ) -> None:
        """Builds the layers and allocates the activations.

        Args:
            weights: the model's dense tensors, by name.
            max_tokens: the most tokens of a batch.
            context: the most tokens of a sequence.
            types: how keys and values are stored.
            others: further sets of weights.
            places: see `Routers`.
        """
        self.config, self.max_tokens, self.context, self._ops = config, max_tokens, context, ops
        self._experts = experts
        self._stops = [
            next((j for j in config.moe_layers if j >= i), config.num_layers)
            for i in range(config.num_layers + 1)
        ]  # for each layer, the first one from there on that has experts
        behind = config.mixer_by_layer[max(config.moe_layers, default=-1) + 1 :]
        # A device reports a key or value that its cache cannot store when the host next waits for it, as it does to
        # choose experts. If attention follows the last choice, the pass has to wait once more at its end.
        self._stores_last = any(spec.cached_heads[0] for spec in behind)
        d = config.hidden_size
        self._rows = Rows(*(ops.empty(max_tokens, d) for _ in range(3)))  # x, normed, added
        self._shared = Rows(ops.empty(max_tokens, d))
        self._ropes = {spec: Rope(spec, ops, weights, max_tokens) for spec in config.ropes}
        self._setup = Setup(
            config, ops, self._ropes, Scratch(ops, max_tokens), context, max_tokens, types
        )
        self._kinds = _kinds(config, types)
        self._mixers = make_mixers(self._setup, weights, dict.fromkeys(self._kinds))
        sets = [_by_layer(of, config.num_layers) for of in (weights, *others)]
        self._routers = Routers(
            config, ops, experts, [[of[i] for i in config.moe_layers] for of in sets],
            max_tokens=max_tokens, places=places,
        )  # fmt: skip
        self._stacks = [
            self._stack(of, tensors) for of, tensors in zip((weights, *others), sets, strict=True)
        ]

    def _stack(
        self, weights: Mapping[str, Weight], tensors: Sequence[Mapping[str, Weight]]
    ) -> _Stack:
        """Builds the layers of one set of weights.

        Args:
            weights: all tensors, by their names in the file.
            tensors: those of each layer, by their names within the layer.
        """
        config = self.config
        norms = [cast(Array, t["attn_norm"]) for t in tensors] + [cast(Array, weights["norm"])]
        layers = [
            self._layer(i, self._kinds[i], tensors[i], norms[i + 1])
            for i in range(config.num_layers)
        ]
        embed = cast(RowTable, weights[EMBED_ROWS if EMBED_ROWS in weights else "embed"])
        head = cast(Matrix, weights["embed" if config.tied else "head"])
        return _Stack(embed, head, cast("Array | None", weights.get("head_bias")), norms[0], layers)

    def _layer(self, i: int, kind: Kind, tensors: Mapping[str, Weight], next_norm: Array) -> Layer:
        """Builds layer `i` from its tensors, which are given by their names within the layer."""
        mixer, norm = self._mixers[kind].layer(i, tensors), tensors.get("ffn_norm")
        if self.config.out_norms:
            out_norm = cast(Array, tensors["attn_out_norm"])
            mixer = ClosedMixer(mixer, self._ops, out_norm, self.config.norm_eps)
        return Layer(mixer, cast("Array | None", norm), self._ffn(i, tensors), next_norm)

    def _ffn(self, i: int, tensors: Mapping[str, Weight]) -> Ffn | None:
        """Builds the FFN of layer `i`, if it has one."""
        config, ops, index = self.config, self._ops, self.config.moe_index(i)
        if not config.ffn(i).exists:
            return None
        if index < 0:
            inner: Ffn = DenseFfn(ops, tensors, config.activation)
        else:
            routed = BranchedFfn if config.branch_norms else RoutedFfn
            inner = routed(index, ops, self._routers, self._experts, tensors, config, self._shared)
        return ClosedFfn(inner, ops, tensors, config.norm_eps) if config.out_norms else inner

    def change(self, config: ModelConfig) -> None:
        """Switches to another number of experts per token and to the present scheduler; see `Routers.change`."""
        self._routers.change(config)
        self._ops.forget_work()
        self.config = config

    def make_state(self) -> SequenceState:
        """Returns the state of a new sequence."""
        layers = [self._mixers[kind].make_state() for kind in self._kinds]
        return SequenceState(layers, self.context)

    def forward(self, batch: Batch) -> Array:
        """Runs a batch through all layers. The caller then commits the tokens to their sequences.

        Layers run in stretches. A stretch ends at a layer whose experts the host has to choose; layers that are "ahead"
        (see `Ops.ahead`) choose and run their experts without the host, and do not end a stretch.

        Args:
            batch: T tokens, at most `max_tokens`.

        Returns:
            The hidden states [T, D] after the last norm; scratch, valid until the next call.

        Raises:
            Cancelled: the caller no longer wants the result; see `Batch.is_cancelled`.
        """
        config, ops, after, stack = self.config, self._ops, -1, self._stacks[batch.variant]
        x, normed, added = rows = self._rows.first(len(batch.ids))
        ops.embed(stack.embed, batch.ids, config.embedding_multiplier, x)
        for rope in self._ropes.values():
            rope.start(batch)
        parts = [mixer.start(batch) for mixer in self._mixers.values()]
        is_alike = len(batch.ids) == 1 and None not in parts
        work = (batch.slices[0].state.number, batch.variant, *parts) if is_alike else None
        ahead = self._routers.ahead(is_start=True) if is_alike else frozenset()
        ran: list[int] = []
        ops.norm(x, stack.first_norm, config.norm_eps, normed)
        while after < config.num_layers:
            if after + 1 < config.num_layers:
                batch.check()
            stop, before = self._stops[after + 1], len(ran)
            while stop < config.num_layers and (index := config.moe_index(stop)) in ahead:
                ran.append(index)
                stop = self._stops[stop + 1]
            key = None if work is None else (after, stop, work)
            ops.repeat(key, partial(self._run, stack.layers, after, stop, batch, rows))
            self._experts.routed += (len(ran) - before) * config.experts_per_token
            if stop < config.num_layers and (ffn := stack.layers[stop].ffn) is not None:
                ffn.run_experts(x, normed, batch, added)
                ahead = ahead and self._routers.ahead(is_start=False)
            after = stop
        if ran:
            self._experts.count(ran)
        elif self._stores_last:
            ops.settle()
        return cast(Array, normed)

    def embed(self, ids: Ids, out: Array) -> None:
        """out [T, D] = the embeddings of T tokens, which are the first layer's input; T may exceed `max_tokens`."""
        for first in range(0, len(ids), self.max_tokens):
            part = slice(first, first + self.max_tokens)
            factor = self.config.embedding_multiplier
            self._ops.embed(self._stacks[0].embed, ids[part], factor, out[part])

    def run_layer(self, index: int, batch: Batch, x: Array) -> Array:
        """Runs a single layer, so that a whole text can pass one layer before it enters the next.

        Args:
            index: the layer's number. Only this layer's part of the sequences' states is used.
            batch: T tokens, at most `max_tokens`.
            x: [T, D], the residual as `embed` or the layer before left it; becomes the input of the next layer.

        Returns:
            [T, D], x after the next layer's norm; scratch, valid until the next call.
        """
        stack, mixer = self._stacks[batch.variant], self._mixers[self._kinds[index]]
        norm = stack.layers[index - 1].next_norm if index else stack.first_norm
        return self._run_alone(index, mixer, stack.layers[index], norm, batch, x)

    def _run_alone(
        self, index: int, mixer: Mixer, layer: Layer, norm: Array, batch: Batch, x: Array
    ) -> Array:
        """Runs a single layer, whose mixer has the norm `norm`; see `run_layer`."""
        _, normed, added = self._rows.first(len(batch))
        rows = x, normed, added
        for rope in self._ropes.values():
            rope.start(batch)
        mixer.start(batch)
        self._ops.norm(x, norm, self.config.norm_eps, normed)
        is_routed = self.config.moe_index(index) >= 0
        self._enter(layer, batch, rows, stops=is_routed)
        if is_routed and layer.ffn is not None:
            layer.ffn.run_experts(x, normed, batch, added)
        self._leave(layer, rows)
        return cast(Array, normed)

    def _run(
        self,
        layers: Sequence[Layer],
        after: int,
        stop: int,
        batch: Batch,
        rows: tuple[Array, Array, Array],
    ) -> None:
        """Runs one stretch: from after the experts of layer `after` to where the experts of layer `stop` are chosen.

        Args:
            after: -1 for the start of the pass.
            stop: the number of layers for the end of the pass.
            rows: x, normed and added, each [T, D].
        """
        for i in range(max(after, 0), min(stop + 1, len(layers))):
            if i > after:
                self._enter(layers[i], batch, rows, stops=i == stop)
            if i < stop:
                self._leave(layers[i], rows)

    def _enter(
        self, layer: Layer, batch: Batch, rows: tuple[Array, Array, Array], *, stops: bool
    ) -> None:
        """Runs the first part of a layer: all but `_leave`, or, with `stops`, only until its experts are chosen."""
        x, normed, added = rows
        layer.mixer.forward(normed, batch, added)
        if layer.ffn is not None and layer.ffn_norm is not None:
            self._add_norm(added, x, layer.ffn_norm, normed)
            part = layer.ffn.begin if stops else layer.ffn.run
            part(x, normed, batch, added)

    def _leave(self, layer: Layer, rows: tuple[Array, Array, Array]) -> None:
        """Runs the end of a layer's FFN, the addition to the residual, and the norm before the next layer."""
        x, normed, added = rows
        if layer.ffn is not None:
            layer.ffn.end(x, normed, added)
        self._add_norm(added, x, layer.next_norm, normed)

    def _add_norm(self, added: Array, x: Array, norm: Array, normed: Array) -> None:
        config = self.config
        self._ops.add_norm(added, config.residual_multiplier, x, norm, config.norm_eps, normed)

    def logits(self, hidden: Array, out: Array, variant: int = 0) -> None:
        """out [T, V] = the logits of hidden [T, D], with the head of the set of weights `variant`."""
        stack = self._stacks[variant]
        self._logits(hidden, stack.head, stack.head_bias, out)

    def _logits(self, hidden: Array, head: Matrix, bias: Array | None, out: Array) -> None:
        self._ops.linear(hidden, (head,), (out,))
        if bias is not None:
            self._ops.add_bias(bias, out)
        if self.config.logits_divisor != 1.0:
            self._ops.scale(1.0 / self.config.logits_divisor, out)
        if self.config.soft_cap is not None:
            self._ops.soft_cap(self.config.soft_cap, out)


def scratch_bytes(config: ModelConfig, max_tokens: int, max_sequences: int = 1) -> int:
    """Returns the bytes of a decoder's activations, those of its experts included, for batches of `max_tokens`."""
    d, k = config.hidden_size, config.experts_per_token
    mixers = {mixer_class(spec).scratch_widths(spec) for spec in config.mixers}
    rotations = sum(2 * (rope.dim // 2) for rope in config.ropes)
    per_token = (4 + k) * d + rotations + sum(map(sum, mixers))  # k * d for the experts' outputs
    routers = Routers.scratch_bytes(config, max_tokens, max_sequences)
    return 4 * (per_token * max_tokens + config.vocab_size * max_sequences) + routers


def state_bytes(config: ModelConfig, context: int, types: KvTypes, chunk: int = 512) -> int:
    """Returns the bytes of a sequence's state for `context` tokens; see `Mixer.state_bytes`.

    Args:
        chunk: the most tokens of a pass.
    """
    return sum(layer_state_bytes(config, context, types, chunk))


def layer_state_bytes(config: ModelConfig, context: int, types: KvTypes, chunk: int) -> list[int]:
    """Returns the bytes of a sequence's state in each layer; see `state_bytes`."""
    kinds = _kinds(config, types)
    sizes = {
        (spec, kind): mixer_class(spec).state_bytes(spec, context, kind, chunk)
        for spec, kind in dict.fromkeys(kinds)
    }
    return [sizes[kind] for kind in kinds]


def state_pieces(config: ModelConfig) -> int:
    """Returns at how many separate places in memory a sequence's state grows; each may end in a partly used page."""
    return sum(spec.state_pieces for spec in config.mixer_by_layer)


def kept_rope_bytes(config: ModelConfig, context: int, types: KvTypes) -> int:
    """Returns the bytes of the rotations that are kept for all positions of a context; 0 if none are needed.

    Attention needs them where the cache stores keys in 8 bits or fewer without their biases; see `Rope.keep`.
    """
    ropes = {
        rope
        for mixer, kinds in _kinds(config, types)
        if mixer.has_constant_keys and KV_BITS[kinds.keys] < 16
        for rope in mixer.ropes
    }
    return sum(rope_bytes(rope.dim, context) for rope in ropes for _ in rope.tensors())


def read_bytes(config: ModelConfig, length: int, types: KvTypes) -> int:
    """Returns how many bytes of a sequence's state are read to compute one token after `length` others."""
    layers = _kinds(config, types)
    return sum(mixer_class(spec).read_bytes(spec, length, kinds) for spec, kinds in layers)


def _kinds(config: ModelConfig, types: KvTypes) -> list[Kind]:
    """Returns the kind of each layer. Layers of equal kinds share scratch."""
    return [
        (spec, types.of(i) if spec.cached_heads[0] else KvTypes())
        for i, spec in enumerate(config.mixer_by_layer)
    ]


def _by_layer(weights: Mapping[str, Weight], num_layers: int) -> list[dict[str, Weight]]:
    """Returns the tensors of each layer, by their names within the layer."""
    layers: list[dict[str, Weight]] = [{} for _ in range(num_layers)]
    for name, weight in weights.items():
        if name.startswith("layers."):
            _, i, rest = name.split(".", 2)
            layers[int(i)][rest] = weight
    return layers
