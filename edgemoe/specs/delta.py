"""The gated delta rule: a linear recurrence whose state is a matrix for each head, which each token corrects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from edgemoe.errors import quoted
from edgemoe.specs.mixer import MOST_TAPS, MixerSpec, need, need_numbers, need_sizes
from edgemoe.specs.tensor import TensorSpec

__all__ = ["DeltaSpec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaSpec(MixerSpec):
    """Gated DeltaNet (arXiv 2412.06464): a short convolution, the delta rule, and a gated norm.

    With a decay for each channel of the keys it is Kimi Delta Attention (arXiv 2510.26692).
    """

    kind: ClassVar[str] = "delta"

    key_heads: int
    """Heads of queries and keys. Each is shared by value_heads / key_heads consecutive value heads."""
    value_heads: int
    key_dim: int
    """Columns of a head's queries and keys."""
    value_dim: int
    """Columns of a head's values, a multiple of 16."""
    taps: int
    """The length of the convolution in tokens, at most `MOST_TAPS`."""
    norm_eps: float
    """The epsilon of the norm of the heads' outputs."""
    gate: Literal["silu", "sigmoid"] = "silu"
    """The activation of the gate that multiplies the normed outputs."""
    channel_decay: bool = False
    """Whether each channel of a head's keys has a decay of its own, instead of one decay for the head."""
    bounded: bool = False
    """Whether a decay is exp(-5 * sigmoid(rate * (x + bias))) instead of exp(-rate * softplus(x + bias))."""
    decay_rank: int = 0
    """The rank of a low-rank projection that gives the decays of channels; 0 for a full one."""
    gate_rank: int = 0
    """The rank of a low-rank projection that gives the gate; 0 for a full one."""

    def __post_init__(self) -> None:
        need_sizes(self, "key_heads", "value_heads", "key_dim", "value_dim", "taps")
        need_sizes(self, "decay_rank", "gate_rank", least=0)
        need(self.channel_decay or not self.decay_rank, "decay_rank is of decays of channels")
        need_numbers(self, "norm_eps")
        need(self.taps <= MOST_TAPS, f"a convolution of {self.taps} taps is not supported")
        need(
            self.value_heads % self.key_heads == 0,
            f"value_heads {self.value_heads} is not a multiple of key_heads {self.key_heads}",
        )
        need(self.value_dim % 16 == 0, f"value_dim must be a multiple of 16, got {self.value_dim}")
        need(self.gate in ("silu", "sigmoid"), f"unknown gate {quoted(self.gate)}")
        need_sizes(self, "channels", "decays")
        need(self.value_heads * self.key_dim * self.value_dim < 1 << 30, "a state is too large")

    @property
    def inputs(self) -> tuple[str, ...]:
        """See `MixerSpec.inputs`."""
        return ("qkv", "z", "z_in", "decay_in" if self.decay_rank else "decay", "beta")

    def __str__(self) -> str:
        """Returns a description for people."""
        heads = f"{self.value_heads} heads of {self.key_dim} x {self.value_dim}"
        decay = ", a decay for each channel" if self.channel_decay else ""
        return f"gated delta rule: {heads} ({self.key_heads} for queries and keys){decay}"

    @property
    def state_pieces(self) -> int:
        """See `MixerSpec.state_pieces`: its state does not grow."""
        return 0

    @property
    def key_width(self) -> int:
        """Columns of the queries, and of the keys."""
        return self.key_heads * self.key_dim

    @property
    def value_width(self) -> int:
        """Columns of the values, and of the heads' outputs."""
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Columns of queries, keys and values together: what is convolved."""
        return 2 * self.key_width + self.value_width

    @property
    def decays(self) -> int:
        """The number of decays of a token."""
        return self.value_heads * (self.key_dim if self.channel_decay else 1)

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of the convolution's last inputs and of the heads' matrices."""
        return (self.taps - 1, self.channels), (self.value_heads, self.key_dim, self.value_dim)

    @property
    def scratch_widths(self) -> tuple[int, ...]:
        """See `Mixer.scratch_widths`.

        The arrays are queries, keys and values together; decays; betas; the gate; the heads' outputs; the low-rank
        inputs of the decays and of the gate.
        """
        widths = self.channels, self.decays, self.value_heads, self.value_width, self.value_width
        return (*widths, self.decay_rank, self.gate_rank)

    def tensors(self, hidden_size: int) -> dict[str, TensorSpec]:
        """See `MixerSpec.tensors`."""
        f32, nested = TensorSpec.f32, TensorSpec.nested
        d, v, h = hidden_size, self.value_width, self.value_heads
        out = {"qkv": nested(self.channels, d)}
        if self.gate_rank:
            out |= {"z_in": nested(self.gate_rank, d), "z_out": nested(v, self.gate_rank)}
        else:
            out["z"] = nested(v, d)
        out["o"] = nested(d, v)
        if self.decay_rank:
            out |= {"decay_in": f32(self.decay_rank, d), "decay": f32(self.decays, self.decay_rank)}
        else:  # the matrix for decays of channels is as large as the other projections, so it is quantised too
            out["decay"] = (nested if self.channel_decay else f32)(self.decays, d)
        return out | {
            "beta": f32(h, d), "conv": f32(self.taps, self.channels), "decay_rate": f32(h),
            "decay_bias": f32(self.decays), "head_norm": f32(self.value_dim),
        }  # fmt: skip
