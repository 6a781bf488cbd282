"""The forward pass: one decoder for all families, for prompts in chunks and for single tokens alike.

A token's arithmetic never depends on the tokens beside it, so one chunk, many chunks, token by token, and a batch with
other sequences give the same bits.
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
"""What a layer mixes tokens with, and how it stores their keys and values."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One block."""

    mixer: MixerLayer
    ffn_norm: Array | None
    ffn: Ffn | None
    """None: the layer is a mixer alone."""
    next_norm: Array
    """Of the next layer's mixer, or of the head."""


@dataclass(frozen=True, slots=True)
class _Stack:
    """One set of weights."""

    embed: RowTable
    head: Matrix
    head_bias: Array | None
    first_norm: Array
    layers: list[Layer]


class Decoder:
    """Turns tokens into hidden states and logits. Owns the activations, not the weights.

    It may have several sets of weights of one model, the first of which is the model's; a batch says which it is for.
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
        """Takes the parts.

        Args:
            max_tokens: of a batch.
            context: the most of a sequence.
            types: how keys and values are stored.
            others: further sets of weights.
            places: see `Routers`.
        """
        self.config, self.max_tokens, self.context, self._ops = config, max_tokens, context, ops
        self._experts = experts
        self._stops = [
            next((j for j in config.moe_layers if j >= i), config.num_layers)
            for i in range(config.num_layers + 1)
        ]  # of each layer, the next one with experts
        behind = config.mixer_by_layer[max(config.moe_layers, default=-1) + 1 :]
        # To choose experts the host waits, and is told what earlier layers could not store.
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
        """Returns what computes with one set of weights, which are those of layers too, by their names within one."""
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
        """Returns layer `i` with tensors by their names within it."""
        mixer, norm = self._mixers[kind].layer(i, tensors), tensors.get("ffn_norm")
        if self.config.out_norms:
            out_norm = cast(Array, tensors["attn_out_norm"])
            mixer = ClosedMixer(mixer, self._ops, out_norm, self.config.norm_eps)
        return Layer(mixer, cast("Array | None", norm), self._ffn(i, tensors), next_norm)

    def _ffn(self, i: int, tensors: Mapping[str, Weight]) -> Ffn | None:
        """Returns that of layer `i`, if it has one."""
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
        """Takes another number of experts per token, and another scheduler; see `Routers.change`."""
        self._routers.change(config)
        self._ops.forget_work()
        self.config = config

    def make_state(self) -> SequenceState:
        """Returns the state of a new sequence."""
        layers = [self._mixers[kind].make_state() for kind in self._kinds]
        return SequenceState(layers, self.context)

    def forward(self, batch: Batch) -> Array:
        """Runs a batch and returns its hidden states. What its sequences count is left to the caller.

        Args:
            batch: T tokens, at most `max_tokens`.

        Returns:
            [T, D], normed; scratch, valid until the next call.
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
        """out [T, D] = what the first layer takes of T tokens."""
        for first in range(0, len(ids), self.max_tokens):
            part = slice(first, first + self.max_tokens)
            factor = self.config.embedding_multiplier
            self._ops.embed(self._stacks[0].embed, ids[part], factor, out[part])

    def run_layer(self, index: int, batch: Batch, x: Array) -> Array:
        """Runs one layer alone: for all of a text before the next one is.

        Args:
            index: the layer's; its part of the states is all that this call looks at.
            batch: T tokens, at most `max_tokens`.
            x: [T, D], what it takes, as `embed` or the layer before gave it; becomes what the next one takes.

        Returns:
            [T, D], normed for what comes next; scratch, valid until the next call.
        """
        stack, mixer = self._stacks[batch.variant], self._mixers[self._kinds[index]]
        norm = stack.layers[index - 1].next_norm if index else stack.first_norm
        return self._run_alone(index, mixer, stack.layers[index], norm, batch, x)

    def _run_alone(
        self, index: int, mixer: Mixer, layer: Layer, norm: Array, batch: Batch, x: Array
    ) -> Array:
        """Runs a layer that no other is run with, on what `norm` makes of x; see `run_layer`."""
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
        """Runs from the experts of layer `after`, -1 for the start, to the choice of those of layer `stop`."""
        for i in range(max(after, 0), min(stop + 1, len(layers))):
            if i > after:
                self._enter(layers[i], batch, rows, stops=i == stop)
            if i < stop:
                self._leave(layers[i], rows)

    def _enter(
        self, layer: Layer, batch: Batch, rows: tuple[Array, Array, Array], *, stops: bool
    ) -> None:
        """Runs a layer up to its end, or to the choice of its experts if it stops there."""
        x, normed, added = rows
        layer.mixer.forward(normed, batch, added)
        if layer.ffn is not None and layer.ffn_norm is not None:
            self._add_norm(added, x, layer.ffn_norm, normed)
            part = layer.ffn.begin if stops else layer.ffn.run
            part(x, normed, batch, added)

    def _leave(self, layer: Layer, rows: tuple[Array, Array, Array]) -> None:
        """Runs the end of a layer, and the norm of the next one."""
        x, normed, added = rows
        if layer.ffn is not None:
            layer.ffn.end(x, normed, added)
        self._add_norm(added, x, layer.next_norm, normed)

    def _add_norm(self, added: Array, x: Array, norm: Array, normed: Array) -> None:
        config = self.config
        self._ops.add_norm(added, config.residual_multiplier, x, norm, config.norm_eps, normed)

    def logits(self, hidden: Array, out: Array, variant: int = 0) -> None:
        """out [T, V] = the head on hidden [T, D] of a batch of this variant."""
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
    """Returns the memory of a decoder's and its experts' activations for batches of `max_tokens`."""
    d, k = config.hidden_size, config.experts_per_token
    mixers = {mixer_class(spec).scratch_widths(spec) for spec in config.mixers}
    rotations = sum(2 * (rope.dim // 2) for rope in config.ropes)
    per_token = (4 + k) * d + rotations + sum(map(sum, mixers))  # the experts' parts too
    routers = Routers.scratch_bytes(config, max_tokens, max_sequences)
    return 4 * (per_token * max_tokens + config.vocab_size * max_sequences) + routers


def state_bytes(config: ModelConfig, context: int, types: KvTypes, chunk: int = 512) -> int:
    """Returns the memory of a sequence's state for `context` tokens; see `Mixer.state_bytes`.

    Args:
        chunk: tokens of the longest pass.
    """
    return sum(layer_state_bytes(config, context, types, chunk))


def layer_state_bytes(config: ModelConfig, context: int, types: KvTypes, chunk: int) -> list[int]:
    """Returns the same for each layer."""
    kinds = _kinds(config, types)
    sizes = {
        (spec, kind): mixer_class(spec).state_bytes(spec, context, kind, chunk)
        for spec, kind in dict.fromkeys(kinds)
    }
    return [sizes[kind] for kind in kinds]


def state_pieces(config: ModelConfig) -> int:
    """Returns in how many places a sequence's state grows, each of which may fill a page in part."""
    return sum(spec.state_pieces for spec in config.mixer_by_layer)


def kept_rope_bytes(config: ModelConfig, context: int, types: KvTypes) -> int:
    """Returns the memory of what turned the positions of a context, where keys may leave out their biases."""
    ropes = {
        rope
        for mixer, kinds in _kinds(config, types)
        if mixer.has_constant_keys and KV_BITS[kinds.keys] < 16
        for rope in mixer.ropes
    }
    return sum(rope_bytes(rope.dim, context) for rope in ropes for _ in rope.tensors())


def read_bytes(config: ModelConfig, length: int, types: KvTypes) -> int:
    """Returns the bytes of its state that computing a token after `length` others reads."""
    layers = _kinds(config, types)
    return sum(mixer_class(spec).read_bytes(spec, length, kinds) for spec, kinds in layers)


def _kinds(config: ModelConfig, types: KvTypes) -> list[Kind]:
    """Returns each layer's; layers alike share scratch."""
    return [
        (spec, types.of(i) if spec.cached_heads[0] else KvTypes())
        for i, spec in enumerate(config.mixer_by_layer)
    ]


def _by_layer(weights: Mapping[str, Weight], num_layers: int) -> list[dict[str, Weight]]:
    """Returns each layer's tensors, by their names within it."""
    layers: list[dict[str, Weight]] = [{} for _ in range(num_layers)]
    for name, weight in weights.items():
        if name.startswith("layers."):
            _, i, rest = name.split(".", 2)
            layers[int(i)][rest] = weight
    return layers
