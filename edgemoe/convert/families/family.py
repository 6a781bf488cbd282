"""Model families: how their config.json and tensor names map to edgemoe's.

The reference for what a config.json means is transformers. A key that its model class does not read has no effect
here either; a key that it does read is honoured or refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import MATRICES, ModelConfig, dense_tensors
from edgemoe.convert.checkpoint import Checkpoint
from edgemoe.convert.settings import Settings
from edgemoe.specs import RopeSpec

__all__ = [
    "FUSED_EXPERTS",
    "NAMED_EXPERTS",
    "Family",
    "Fold",
    "Source",
    "as_ours",
    "choosing",
    "further_layers",
]


Fold = Callable[[Any, Any], NDArray[Any]]
"""Makes a canonical tensor from a stored one, or from a list of them, and the spec of its layer's mixer: picks rows,
transposes, adds 1. May return views."""


@dataclass(frozen=True, slots=True)
class Source:
    """The origin of a canonical tensor: a stored tensor, or half of its rows.

    A name may contain `{expert}`. Inside a layer it is relative to `layers.I.` of the root; see `Family.roots`.
    """

    name: str
    half: int | None = None
    """0 or 1: the first or second half of the rows, if gate and up are stored as one tensor."""
    interleaved: bool = False
    """The stored tensor has RoPE pairs in adjacent rows of each head; in ours a pair is half the rotated rows apart."""
    fold: Fold | None = None
    """Makes the canonical tensor from the stored one."""
    moved: Callable[[tuple[int, ...], Any], tuple[int, ...]] | None = None
    """Set if `fold` only moves values: returns the stored shape from the canonical shape and the spec of the layer's
    mixer. An export moves the values back."""
    more: tuple[str, ...] = ()
    """Further stored tensors; `fold` then gets a list of all, the first one first."""
    row: bool = False
    """A vector is stored as a matrix of one row."""
    other: str = ""
    """An alternative to `name`; "" for none."""
    times: str = ""
    """A stored tensor of factors for the canonical tensor, [1], or [E] for experts; "" for none."""


NAMED_EXPERTS: Mapping[str, Source] = {
    "router": Source("mlp.gate.weight"),
    "gate": Source("mlp.experts.{expert}.gate_proj.weight"),
    "up": Source("mlp.experts.{expert}.up_proj.weight"),
    "down": Source("mlp.experts.{expert}.down_proj.weight"),
}
"""The usual names in checkpoints."""

FUSED_EXPERTS: Mapping[str, Source] = {
    "router": Source("mlp.gate.weight"),
    "gate": Source("mlp.experts.gate_up_proj.{expert}", half=0),
    "up": Source("mlp.experts.gate_up_proj.{expert}", half=1),
    "down": Source("mlp.experts.down_proj.{expert}"),
}
"""The in-memory names of transformers 5, which it also writes with save_original_format=False.

A checkpoint presents a stack of matrices as one matrix per index.
"""


_HEAD: Mapping[str, Source] = {
    "head": Source("lm_head.weight"),
    "head_bias": Source("lm_head.bias"),
}
_MODEL: Mapping[str, Source] = {
    "embed": Source("embed_tokens.weight"),
    "norm": Source("norm.weight"),
}
_LAYER: Mapping[str, Source] = {
    "attn_norm": Source("input_layernorm.weight"),
    **{x: Source(f"self_attn.{x}_proj.weight") for x in "qkvo"},
    **{f"{x}_bias": Source(f"self_attn.{x}_proj.bias") for x in "qkvo"},
    "q_norm": Source("self_attn.q_norm.weight"),
    "k_norm": Source("self_attn.k_norm.weight"),
    "ffn_norm": Source("post_attention_layernorm.weight"),
}
_DENSE_FFN: Mapping[str, Source] = {f"shared.{x}": Source(f"mlp.{x}_proj.weight") for x in MATRICES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A mapping of one family of checkpoints to a `ModelConfig` and canonical tensors. Immutable."""

    config: Callable[[Settings], ModelConfig]
    """Reads config.json; raises FormatError for what the runtime cannot do."""
    default_theta: float = 10_000.0
    """The RoPE base if config.json names none."""
    experts: tuple[Mapping[str, Source], ...] = (NAMED_EXPERTS, FUSED_EXPERTS)
    """The ways in which router, gate, up and down of a layer may be stored."""
    shared: Mapping[str, Source] = field(default_factory=dict)
    """The `shared.*` tensors of a layer with routed experts."""
    layer: Mapping[str, Source] = field(default_factory=dict)
    """Other tensors of a layer that do not have their usual names."""
    mixers: Mapping[str, Mapping[str, Source]] = field(default_factory=dict)
    """By kind of mixer: the same for layers with such a mixer."""
    model: Mapping[str, Source] = field(default_factory=dict)
    """The embedding and the last norm, relative to the root, if they do not have their usual names."""
    apart: bool = False
    """A layer's mixer and its FFN are stored as two successive layers, each with a norm of its own."""
    roots: tuple[str, ...] = ("model.",)
    """Possible prefixes of all names but the head's; the first one under which there is an embedding is the root."""
    rope: Callable[[Settings, RopeSpec], Settings] = lambda settings, spec: settings
    """Returns config.json with the `rope_parameters` of one RoPE table, for families with several."""
    view: Callable[[Checkpoint, ModelConfig], Checkpoint] = lambda checkpoint, config: checkpoint
    """Returns the checkpoint to read from, for families that compute tensors from several stored ones."""
    left_out: Callable[[ModelConfig, str], str] = lambda config, name: ""
    """Returns what an unused tensor belongs to, such as "layers that predict several tokens"; "" if it is not known."""

    def sources(
        self, config: ModelConfig, stored: Mapping[str, tuple[int, ...]]
    ) -> Iterator[tuple[str, Source]]:
        """Yields every canonical tensor except those of RoPE, with its source.

        Args:
            config: the result of `self.config`.
            stored: the shapes of the checkpoint's tensors; they decide between the ways of storing experts.

        Yields:
            The names of `dense_tensors`, and `experts.I.J.gate .up .down` of layer I, expert J.
        """
        for name, source in self._sources(config, stored):
            is_other = source.other in stored and source.name not in stored
            yield name, replace(source, name=source.other) if is_other else source

    def _sources(
        self, config: ModelConfig, stored: Mapping[str, tuple[int, ...]]
    ) -> Iterator[tuple[str, Source]]:
        """See `sources`."""
        tables = {name for rope in config.ropes for name in rope.tensors()}
        model = {**_MODEL, **self.model}
        embeds = (root for root in self.roots if root + model["embed"].name in stored)
        root = next(embeds, self.roots[0])
        places = self._places(config, root)
        for name in dense_tensors(config):
            if name in _HEAD:  # in a multimodal model it lies next to the root
                own = _within(root.removesuffix("model."), _HEAD[name])
                yield name, own if own.name in stored else _HEAD[name]
            elif name in model:
                yield name, _within(root, model[name])
            elif name not in tables:
                _, number, part = name.split(".", 2)
                layer = int(number)
                place = places[layer][is_of_ffn(config, layer, part)]
                names = self._layer_names(config, layer, places[layer][1], stored)
                yield name, _within(place, names[part])
        for layer in config.moe_layers:
            place = places[layer][1]
            names = self._layer_names(config, layer, place, stored)
            for index in range(config.num_experts):
                for part, (rows, _) in zip(MATRICES, config.expert_shapes, strict=True):
                    if not rows:  # experts without a gate
                        continue
                    yield f"experts.{layer}.{index}.{part}", _within(place, names[part], index)

    def _places(self, config: ModelConfig, root: str) -> list[tuple[str, str]]:
        """Returns for each layer the prefix of its mixer's names, and that of its FFN's."""
        if not self.apart:
            return [(f"{root}layers.{i}.",) * 2 for i in range(config.num_layers)]
        out, at = [], 0
        for i in range(config.num_layers):
            has_ffn = config.ffn(i).exists
            out.append((f"{root}layers.{at}.", f"{root}layers.{at + has_ffn}."))
            at += 1 + has_ffn
        return out

    def _layer_names(
        self, config: ModelConfig, layer: int, place: str, stored: Mapping[str, tuple[int, ...]]
    ) -> Mapping[str, Source]:
        own = {**self.layer, **self.mixers.get(config.mixer(layer).kind, {})}
        if layer not in config.moe_layers:
            return {**_LAYER, **_DENSE_FFN, **own}
        there = [e for e in self.experts if _within(place, e["up"], 0).name in stored]
        fitting = (
            e
            for e in there
            if _fits(e["up"], stored[_within(place, e["up"], 0).name], config.expert_shapes[1])
        )
        # Falls back to the first way, so that missing tensors are reported by their usual names.
        experts = next(fitting, (there or self.experts)[0])
        return {**_LAYER, **own, **self.shared, **experts}


def _fits(source: Source, stored: tuple[int, ...], shape: tuple[int, int]) -> bool:
    """Returns whether a stored matrix, which may hold the gate too, yields one of `shape`."""
    if source.fold is not None:
        return source.fold(np.broadcast_to(np.False_, stored), None).shape == shape
    return stored == (shape if source.half is None else (2 * shape[0], shape[1]))


def is_of_ffn(config: ModelConfig, layer: int, part: str) -> bool:
    """Returns whether a tensor of a layer belongs to its FFN rather than its mixer."""
    return part == "ffn_norm" or part in config.ffn(layer).tensors(config.hidden_size)


def _within(place: str, source: Source, expert: int | None = None) -> Source:
    return replace(
        source,
        name=place + source.name.format(expert=expert),
        more=tuple(place + name for name in source.more),
        other=source.other and place + source.other,
        times=source.times and place + source.times,
    )


def as_ours(shape: tuple[int, ...], spec: Any) -> tuple[int, ...]:
    """Returns the shape unchanged, for folds that keep it; see `Source.moved`."""
    return shape


def choosing(
    experts: Mapping[str, Source], bias: str, *, row: bool = False
) -> Mapping[str, Source]:
    """Returns the sources of experts with that of the bias that is added to scores when choosing them."""
    return {**experts, "choice_bias": Source(bias, row=row)}


def further_layers(config: ModelConfig, name: str) -> str:
    """Recognises layers beyond the last one, which predict further tokens; see `Family.left_out`."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return (
        "layers that predict several tokens" if match and int(match[1]) >= config.num_layers else ""
    )
