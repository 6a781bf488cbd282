"""Mamba-2: a linear recurrence whose state is a matrix for each head, which decays and to which each token adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgemoe.specs.mixer import MOST_TAPS, MixerSpec, need, need_numbers, need_sizes
from edgemoe.specs.tensor import TensorSpec

__all__ = ["MambaSpec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaSpec(MixerSpec):
    """Mamba-2 (arXiv 2405.21060): a short convolution, the state space layer, a gate, and then a norm."""

    kind: ClassVar[str] = "mamba"

    num_heads: int
    head_dim: int
    """Columns of a head's inputs and outputs, a multiple of 16."""
    groups: int
    """Groups of consecutive heads that share B and C, in the paper's terms; the norm is by group too."""
    state_dim: int
    """Columns of B and of C: a head's state is [state_dim, head_dim]."""
    taps: int
    """The length of the convolution in tokens, from 2 to `MOST_TAPS`."""
    norm_eps: float
    """The epsilon of the norm of the heads' outputs."""
    conv_bias: bool = True
    """Whether the convolution has a bias."""

    def __post_init__(self) -> None:
        need_sizes(self, "num_heads", "head_dim", "groups", "state_dim", "taps")
        need_numbers(self, "norm_eps")
        need(1 < self.taps <= MOST_TAPS, f"a convolution of {self.taps} taps is not supported")
        need(
            self.num_heads % self.groups == 0,
            f"num_heads {self.num_heads} is not a multiple of groups {self.groups}",
        )
        need(self.head_dim % 16 == 0, f"head_dim must be a multiple of 16, got {self.head_dim}")
        need_sizes(self, "channels")
        need(self.num_heads * self.state_dim * self.head_dim < 1 << 30, "a state is too large")

    @property
    def inputs(self) -> tuple[str, ...]:
        """See `MixerSpec.inputs`."""
        return ("xbc", "x_gate", "step")

    def __str__(self) -> str:
        """Returns a description for people."""
        return f"Mamba-2: {self.num_heads} heads of {self.head_dim} x {self.state_dim} in {self.groups} groups"

    @property
    def width(self) -> int:
        """Columns of the heads' inputs, and of their outputs."""
        return self.num_heads * self.head_dim

    @property
    def channels(self) -> int:
        """Columns of what is convolved: the heads' inputs, and B and C of each group."""
        return self.width + 2 * self.groups * self.state_dim

    @property
    def state_pieces(self) -> int:
        """See `MixerSpec.state_pieces`: its state does not grow."""
        return 0

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the convolution's last inputs and of the heads' matrices."""
        return (self.taps - 1, self.channels), (self.num_heads, self.state_dim, self.head_dim)

    @property
    def scratch_widths(self) -> tuple[int, ...]:
        """See `Mixer.scratch_widths`: what is convolved; steps; decays; the gate; the heads' outputs."""
        return self.channels, self.num_heads, self.num_heads, self.width, self.width

    def tensors(self, hidden_size: int) -> dict[str, TensorSpec]:
        """See `MixerSpec.tensors`."""
        f32, nested = TensorSpec.f32, TensorSpec.nested
        d, w, h = hidden_size, self.width, self.num_heads
        out = {
            "xbc": nested(self.channels, d), "x_gate": nested(w, d), "o": nested(d, w),
            "step": f32(h, d), "conv": f32(self.taps, self.channels), "decay_rate": f32(h),
            "step_bias": f32(h), "skip": f32(h), "head_norm": f32(w),
        }  # fmt: skip
        return out | ({"conv_bias": f32(self.channels)} if self.conv_bias else {})
