"""What mixes the tokens of a sequence: one file for each kind, found by its spec.

Everything else of a layer treats each row of a batch alone; a mixer sees which rows follow which, and keeps a state.
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
    """Is the mixer of one layer: its weights."""

    def forward(self, normed: Array, batch: Batch, out: Array) -> None:
        """out [T, D] = what the layer adds to the residual for normed [T, D]."""


class ClosedMixer:
    """Is the mixer of one layer whose output is normed."""

    def __init__(self, mixer: MixerLayer, ops: Ops, norm: Array, eps: float) -> None:
        self._mixer, self._ops, self._norm, self._eps = mixer, ops, norm, eps

    def forward(self, normed: Array, batch: Batch, out: Array) -> None:
        """See `MixerLayer.forward`."""
        self._mixer.forward(normed, batch, out)
        self._ops.norm(out, self._norm, self._eps, out)


class Mixer(Protocol):
    """Is what all layers of one spec share: scratch, and what depends on the batch alone.

    A spec is of the class that `_CLASSES` names beside the mixer's.
    """

    def __init__(self, spec: Any, setup: Setup) -> None:
        """Takes its rows of the scratch, and what else its layers share."""

    @staticmethod
    def scratch_widths(spec: Any) -> tuple[int, ...]:
        """Returns the floats of each array of its scratch for a token; mixers with the same ones share them."""

    @staticmethod
    def state_bytes(spec: Any, context: int, types: KvTypes, chunk: int) -> int:
        """Returns the memory of one layer's state for sequences of `context` tokens and passes of `chunk`.

        One of 4 MiB or more is resident as soon as it is made, so that the budget need not count what it grows by; so
        is one that a shorter `chunk` makes smaller.
        """

    @staticmethod
    def read_bytes(spec: Any, length: int, types: KvTypes) -> int:
        """Returns the bytes of one layer's state that computing a token after `length` others reads."""

    def make_state(self) -> State:
        """Returns the state of one layer for a new sequence."""

    def start(self, batch: Batch) -> Hashable | None:
        """All layers will now run for a batch, and their states make way for it.

        Returns:
            For a batch of one token, what tells apart those that are not the same work; None where none is.
        """

    def layer(self, index: int, weights: Mapping[str, Weight]) -> MixerLayer:
        """Returns the mixer of layer `index`, whose tensors are given by their names within the layer."""


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
