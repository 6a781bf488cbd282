"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from edgemoe.errors import quoted
from edgemoe.specs.attention import RopeSpec
from edgemoe.specs.mixer import LIMIT, MixerSpec, need, need_numbers, need_sizes
from edgemoe.specs.tensor import TensorSpec

__all__ = ["MlaSpec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaSpec(MixerSpec):
    """Latent attention, whose cache has for each position one latent and one rotated key part, shared by all heads.

    A head's own keys and values are linear in the latent. They are never computed, as their matrices are absorbed: the
    key matrix is applied to the head's query instead, and the value matrix to the head's output.
    """

    kind: ClassVar[str] = "mla"

    num_heads: int
    q_rank: int
    """The rank of a low-rank projection, with a norm in between, that gives the queries; 0 for a full one."""
    latent_dim: int
    """Columns of the latent, a multiple of 16."""
    nope_dim: int
    """Columns of a head's query that are not rotated; they attend to the latent."""
    rope_dim: int
    """Columns of a head's query after those, which are rotated; all heads share their part of the key."""
    value_dim: int
    """Columns of a head's values, a multiple of 16."""
    scale: float
    """Multiplies q · k."""
    rope: RopeSpec | None
    """How the columns of `rope_dim` are rotated; None: they are not."""
    norm_eps: float = 1e-6
    """The epsilon of the norms of the low-rank queries and of the latents."""
    growth: float = 0.0
    """Queries at position p are multiplied by 1 + growth * log(1 + floor(p / grow_every))."""
    grow_every: int = 0
    """In positions; see `growth`."""
    gate: Literal["none", "sigmoid_head"] = "none"
    """The heads' outputs are multiplied by this function of a projection of the input, which has a gate per head."""

    def __post_init__(self) -> None:
        need_sizes(self, "num_heads", "latent_dim", "nope_dim", "rope_dim", "value_dim")
        need_sizes(self, "q_rank", "grow_every", least=0)
        need_numbers(self, "scale", "norm_eps")
        for name in ("latent_dim", "value_dim"):
            value = getattr(self, name)
            need(value % 16 == 0, f"{name} must be a multiple of 16, got {value}")
        need(self.rope_dim % 2 == 0, f"rope_dim must be even, got {self.rope_dim}")
        need(
            self.num_heads * max(self.key_dim, self.nope_dim, self.value_dim) < LIMIT,
            f"{self.num_heads} heads of {self.key_dim} are too many",
        )
        need(
            self.rope is None or self.rope.dim == self.rope_dim,
            f"expected RoPE of {self.rope_dim} columns, got {self.rope and self.rope.dim}",
        )
        need(self.gate in ("none", "sigmoid_head"), f"unknown gate {quoted(self.gate)}")
        if self.growth:
            need_numbers(self, "growth")
            need_sizes(self, "grow_every")

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """See `MixerSpec.ropes`."""
        return () if self.rope is None else (self.rope,)

    @property
    def heads(self) -> tuple[int, int]:
        """See `MixerSpec.heads`."""
        return self.num_heads, self.key_dim

    @property
    def cached_heads(self) -> tuple[int, int]:
        """See `MixerSpec.cached_heads`."""
        return 1, self.key_dim

    @property
    def values_are_keys(self) -> bool:
        """See `MixerSpec.values_are_keys`."""
        return True

    @property
    def key_dim(self) -> int:
        """Columns of a position's key in the cache: the latent and the rotated part."""
        return self.latent_dim + self.rope_dim

    @property
    def head_dim(self) -> int:
        """Columns of a head's query as the projection gives it."""
        return self.nope_dim + self.rope_dim

    @property
    def q_width(self) -> int:
        """Columns of all heads' queries as the projection gives them."""
        return self.num_heads * self.head_dim

    @property
    def inputs(self) -> tuple[str, ...]:
        """See `MixerSpec.inputs`."""
        return ("kv_a", "q_a", "q_direct", "q_gate")

    def __str__(self) -> str:
        """Returns a description for people."""
        return f"latent attention: {self.num_heads} heads on latents of {self.latent_dim} + {self.rope_dim} columns"

    def tensors(self, hidden_size: int) -> dict[str, TensorSpec]:
        """See `MixerSpec.tensors`.

        `kv_a` gives the latents and the rotated part of keys. `q_a` and `q_b`, or `q_direct`, give the queries. `k_b`
        and `v_b` hold a matrix for each head, one after the other: [latent, nope] and [value, latent].
        """
        f32, nested = TensorSpec.f32, TensorSpec.nested
        d, h = hidden_size, self.num_heads
        out = {"kv_a": nested(self.key_dim, d), "kv_a_norm": f32(self.latent_dim)}
        if self.q_rank:
            out |= {"q_a": nested(self.q_rank, d), "q_a_norm": f32(self.q_rank)}
            out["q_b"] = nested(self.q_width, self.q_rank)
        else:
            out["q_direct"] = nested(self.q_width, d)
        out |= {
            "k_b": nested(h * self.latent_dim, self.nope_dim),
            "v_b": nested(h * self.value_dim, self.latent_dim),
        }
        if self.gate != "none":
            out["q_gate"] = f32(h, d)
        out["o"] = nested(d, h * self.value_dim)
        return out

    def widest_input(self, hidden_size: int) -> int:
        """See `MixerSpec.widest_input`: the inputs of `k_b` and `v_b` are those of all heads together."""
        widest = max(t.shape[1] for t in self.tensors(hidden_size).values() if t.kind == "nested")
        return max(widest, self.num_heads * _padded(max(self.nope_dim, self.latent_dim)))


def _padded(columns: int) -> int:
    """Returns a number of columns rounded up to whole tiles of 64."""
    return -(-columns // 64) * 64
