"""What a layer is made of: values that say how a mixer or an FFN computes, and which tensors it has.

A model has few distinct ones, and each layer has one of them: `ModelConfig.mixer` and `.ffn`. Whoever needs a size or a
tensor asks them, so that a further kind of mixer is a further class here, a line in `MIXERS`, and its code in
`edgemoe.model`.
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
"""The kinds of mixers, by their names in a file."""
