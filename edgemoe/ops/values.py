"""What verbs are told besides arrays: weights, rules, and how large all gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.config import ModelConfig
from edgemoe.specs import Activation

__all__ = [
    "Array", "AttentionMatrices", "AttentionWeights", "Basis", "Beside", "DeltaRule", "ExpertLayer", "Ids",
    "KvLayer", "LatentMatrices", "LatentWeights", "MambaRule", "Matrix", "OpsShape", "RopeTable", "RouteRule",
    "RouterWeights", "RowTable",
]  # fmt: skip

Array = NDArray[np.float32]
"""Activations and small weights."""
Basis = NDArray[np.int8]
"""V of corrections, rows in 8 bits."""
Ids = NDArray[np.int32]
Matrix = _core.Nested
"""A resident matrix [rows, cols] as the file has it."""
RowTable = _core.Nested | _core.StoredRows
"""What rows are looked up in: a matrix that is resident, or is so in part."""
RouteRule = _core.RouteRule
"""How a router's logits become a choice."""
AttentionWeights = _core.AttentionLayer
"""Biases and norms of one layer's attention, and how it computes."""
LatentWeights = _core.LatentLayer
"""The norm of one layer's latents, and how it computes."""
RopeTable = _core.Rope
"""Frequencies that turn queries and keys by their positions."""
KvLayer = _core.KvLayer
"""Keys and values of one layer and sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaRule:
    """What one layer's delta rule has besides its matrices."""

    key_heads: int
    rate: Array
    """[value_heads]: a step's decay is exp(-rate * softplus(x + bias)), or exp(-5 * sigmoid(rate * (x + bias)))."""
    bias: Array
    """[value_heads] or [value_heads * key_dim], as the decays are."""
    bounded: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaRule:
    """What one layer's Mamba-2 has besides its matrices; all [heads]."""

    groups: int
    rate: Array
    """A step's decay is exp(-rate * step)."""
    step_bias: Array
    """A step is softplus(x + bias)."""
    skip: Array
    """How much of its input passes by the state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterWeights:
    """One layer's router."""

    norm: Array
    """[D], of the residual before it."""
    weight: Array
    """[E, D]"""
    bias: Array | None
    """[E], of the logits."""
    choice_bias: Array | None
    """[E], of the scores, for choosing alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayer:
    """What the experts of one layer have beside their matrices."""

    activation: Activation
    biases: tuple[Array, Array, Array] | None = None
    """Of all experts' gates [E, H], ups [E, H] and downs [E, D]."""
    basis: Basis | None = None
    """[rank, D padded to 64]: V of all experts' gates and ups, where these have corrections."""


class AttentionMatrices(NamedTuple):
    """Are a layer's projections."""

    qkv: tuple[Matrix, Matrix, Matrix]
    out: Matrix


class LatentMatrices(NamedTuple):
    """Are a layer's projections with latent attention."""

    heads: int
    kv_a: Matrix
    q_a: Matrix
    """Gives queries, where there is no q_b."""
    q_norm: Array | None
    """[q_rank], of what q_a gives, where there is a q_b."""
    q_b: Matrix | None
    k_b: Matrix
    v_b: Matrix
    out: Matrix


class Beside(NamedTuple):
    """Is an FFN that every token takes, beside a layer's experts."""

    matrices: tuple[Matrix | None, Matrix, Matrix]
    """Gate, up and down."""
    out: Array
    """[T, D]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpsShape:
    """Says how large an engine's operations get."""

    threads: int
    max_tokens: int
    """Of a batch."""
    max_cols: int
    """The widest input of a matrix."""
    max_hidden: int
    """The widest FFN."""
    max_context: int
    """Positions that attention sees."""
    head_dim: int
    num_heads: int
    """Of queries."""

    @classmethod
    def of(cls, config: ModelConfig, threads: int) -> OpsShape:
        """Returns what a model needs for one token of one position; batches and contexts are made of it."""
        d = config.hidden_size
        heads, widths = zip(*(m.heads for m in config.mixers), strict=True)
        return cls(
            threads=threads, max_tokens=1,
            max_cols=max(d, *(m.widest_input(d) for m in config.mixers)),
            max_hidden=max(config.expert_hidden, *config.shared_hidden, 0), max_context=1,
            head_dim=max(2, *widths), num_heads=max(1, *heads),
        )  # fmt: skip
