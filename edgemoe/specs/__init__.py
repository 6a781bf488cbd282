"""Specs: values that say how a mixer or an FFN computes, and which tensors it has.

A model has few distinct specs, and each layer has one for its mixer and one for its FFN: `ModelConfig.mixer` and
`ModelConfig.ffn`. All code that needs a size or a tensor asks the spec. So a new kind of mixer takes a class here, a
line in `MIXERS`, and its code in `edgemoe.model`.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgemoe.specs.attention import AttentionSpec, RopeSpec
from edgemoe.specs.conv import ConvSpec
from edgemoe.specs.delta import DeltaSpec
from edgemoe.specs.ffn import ACTIVATIONS, SCORINGS, Activation, FfnSpec, RouterSpec, Scoring
from edgemoe.specs.mamba import MambaSpec
from edgemoe.specs.mixer import MixerSpec
from edgemoe.specs.mla import MlaSpec
from edgemoe.specs.tensor import TensorSpec

__all__ = [
    "ACTIVATIONS", "MIXERS", "SCORINGS", "Activation", "AttentionSpec", "ConvSpec", "DeltaSpec", "FfnSpec", "MambaSpec",
    "MixerSpec", "MlaSpec", "RopeSpec", "RouterSpec", "Scoring", "TensorSpec",
]  # fmt: skip

MIXERS: Mapping[str, type[MixerSpec]] = {
    s.kind: s for s in (AttentionSpec, ConvSpec, DeltaSpec, MambaSpec, MlaSpec)
}
"""The classes of mixer specs, by their kinds' names in a file."""
