"""Mixers, the parts of layers that let tokens of a sequence see each other: attention, convolutions, recurrences.

Everything else in a layer treats each row of a batch by itself. A mixer knows which rows follow which, and keeps a
state for each sequence. Each kind of mixer is a file of its own, and is found by the class of its spec.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Protocol

from edgemoe.model.attention import Attention
from edgemoe.model.batch import Batch
from edgemoe.model.conv import Conv
from edgemoe.model.delta import Delta
from edgemoe.model.kv import KvTypes
from edgemoe.model.mamba import Mamba
from edgemoe.model.mla import Mla
from edgemoe.model.setup import Setup
from edgemoe.model.state import State
from edgemoe.ops import Array, Ops
from edgemoe.specs import AttentionSpec, ConvSpec, DeltaSpec, MambaSpec, MixerSpec, MlaSpec
from edgemoe.store import Weight

__all__ = ["ClosedMixer", "Mixer", "MixerLayer", "mixer_class"]


class MixerLayer(Protocol):
    """The mixer of one layer: its weights, and how they are applied."""

    def forward(self, normed: Array, batch: Batch, out: Array) -> None:
        """out [T, D] = what the mixer adds to the residual, for the normed residual [T, D]."""


class ClosedMixer:
    """The mixer of one layer, followed by a norm of its output."""

    def __init__(self, mixer: MixerLayer, ops: Ops, norm: Array, eps: float) -> None:
        self._mixer, self._ops, self._norm, self._eps = mixer, ops, norm, eps

    def forward(self, normed: Array, batch: Batch, out: Array) -> None:
        """See `MixerLayer.forward`."""
        self._mixer.forward(normed, batch, out)
        self._ops.norm(out, self._norm, self._eps, out)


class Mixer(Protocol):
    """What all layers of one spec share: scratch, and values that depend only on the batch.

    `_CLASSES` maps the class of a spec to that of its mixer.
    """

    def __init__(self, spec: Any, setup: Setup) -> None:
        """Allocates scratch and prepares what its layers share."""

    @staticmethod
    def scratch_widths(spec: Any) -> tuple[int, ...]:
        """Returns the width, in floats per token, of each scratch array. Mixers with the same widths share scratch."""

    @staticmethod
    def state_bytes(spec: Any, context: int, types: KvTypes, chunk: int) -> int:
        """Returns the bytes of one layer's state for sequences of `context` tokens and passes of at most `chunk`.

        The pages of a state become resident as it grows. There are two exceptions, which the budget counts in full from
        the start: a state of 4 MiB or more, and one that a shorter `chunk` makes smaller (a ring).
        """

    @staticmethod
    def read_bytes(spec: Any, length: int, types: KvTypes) -> int:
        """Returns how many bytes of one layer's state are read to compute one token after `length` others."""

    def make_state(self) -> State:
        """Returns the state of one layer for a new sequence."""

    def start(self, batch: Batch) -> Hashable | None:
        """Prepares for a pass of a batch through all layers, and makes room in their states.

        Returns:
            For a batch of one token, a key: passes with equal keys do the same work, which may then be recorded once
            and repeated (see `Ops.repeat`). None if the work is never the same.
        """

    def layer(self, index: int, weights: Mapping[str, Weight]) -> MixerLayer:
        """Returns the mixer of layer `index`; `weights` has its tensors, by their names within the layer."""


_CLASSES: Mapping[type[MixerSpec], type[Mixer]] = {
    AttentionSpec: Attention,
    ConvSpec: Conv,
    DeltaSpec: Delta,
    MlaSpec: Mla,
    MambaSpec: Mamba,
}


def mixer_class(spec: MixerSpec) -> type[Mixer]:
    """Returns the class of a spec's mixer."""
    return _CLASSES[type(spec)]
