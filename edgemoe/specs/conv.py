"""The gated short convolution over time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgemoe.specs.mixer import MOST_TAPS, MixerSpec, need, need_sizes
from edgemoe.specs.tensor import TensorSpec

__all__ = ["ConvSpec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvSpec(MixerSpec):
    """LFM2's gated short convolution: o (c * conv(b * u)), where u, b and c are projections of the input."""

    kind: ClassVar[str] = "conv"

    width: int
    """Channels, each convolved by itself."""
    taps: int
    """The length of the convolution in tokens, from 2 to `MOST_TAPS`."""

    def __post_init__(self) -> None:
        need_sizes(self, "width", "taps")
        need(1 < self.taps <= MOST_TAPS, f"a convolution of {self.taps} taps is not supported")

    @property
    def inputs(self) -> tuple[str, ...]:
        """See `MixerSpec.inputs`."""
        return ("u", "b", "c")

    def __str__(self) -> str:
        """Returns a description for people."""
        return f"short convolution: {self.taps} taps, {self.width} channels"

    @property
    def state_pieces(self) -> int:
        """See `MixerSpec.state_pieces`: its state does not grow."""
        return 0

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of the convolution's last inputs."""
        return ((self.taps - 1, self.width),)

    @property
    def scratch_widths(self) -> tuple[int, ...]:
        """See `Mixer.scratch_widths`: u, b and c."""
        return (self.width,) * 3

    def tensors(self, hidden_size: int) -> dict[str, TensorSpec]:
        """See `MixerSpec.tensors`."""
        f32, nested = TensorSpec.f32, TensorSpec.nested
        d, w = hidden_size, self.width
        return {
            "u": nested(w, d), "b": nested(w, d), "c": nested(w, d), "o": nested(d, w),
            "conv": f32(self.taps, w),
        }  # fmt: skip
