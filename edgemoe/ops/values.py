"""The other arguments of verbs: weights, rules, and the sizes that scratch is made for."""

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
"""The matrix V of low-rank corrections, its rows in 8 bits."""
Ids = NDArray[np.int32]
"""Token ids, or numbers of experts."""
Matrix = _core.Nested
"""A resident matrix [rows, cols] in the file's quantised form."""
RowTable = _core.Nested | _core.StoredRows
"""A table to look up rows in: a resident matrix, or one of which some or all rungs stay in the file."""
RouteRule = _core.RouteRule
"""How a router's logits become a choice."""
AttentionWeights = _core.AttentionLayer
"""Biases and norms of one layer's attention, and how it computes."""
LatentWeights = _core.LatentLayer
"""The norm of one layer's latents, and how it computes."""
RopeTable = _core.Rope
"""The RoPE frequencies by which queries and keys are rotated."""
KvLayer = _core.KvLayer
"""The keys and values of one layer and sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaRule:
    """The parameters of one layer's delta rule besides its matrices."""

    key_heads: int
    rate: Array
    """[value_heads]: a step's decay is exp(-rate * softplus(x + bias)), or, if `bounded`,
    exp(-5 * sigmoid(rate * (x + bias)))."""
    bias: Array
    """[value_heads], or [value_heads * key_dim] where each channel of the keys has a decay of its own."""
    bounded: bool
    """Which of the two formulas gives the decay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaRule:
    """The parameters of one layer's Mamba-2 besides its matrices; all arrays are [heads]."""

    groups: int
    rate: Array
    """A step's decay is exp(-rate * step)."""
    step_bias: Array
    """A step is softplus(x + bias)."""
    skip: Array
    """The factor of the input that is added to the output directly, past the state (D in the paper)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterWeights:
    """One layer's router."""

    norm: Array
    """[D], the weight of the norm before the router."""
    weight: Array
    """[E, D]"""
    bias: Array | None
    """[E], added to the logits."""
    choice_bias: Array | None
    """[E], added to the scores for choosing experts, but not for gates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayer:
    """What the experts of one layer have besides their matrices."""

    activation: Activation
    biases: tuple[Array, Array, Array] | None = None
    """Of all experts: for gate [E, H], up [E, H] and down [E, D]."""
    basis: Basis | None = None
    """[rank, D padded to 64]: V of the low-rank corrections of gate and up, which all experts of the layer share."""


class AttentionMatrices(NamedTuple):
    """The projections of an attention layer."""

    qkv: tuple[Matrix, Matrix, Matrix]
    out: Matrix


class LatentMatrices(NamedTuple):
    """The projections of a layer with latent attention."""

    heads: int
    kv_a: Matrix
    q_a: Matrix
    """Projects to the low-rank queries, or, if there is no q_b, directly to the queries."""
    q_norm: Array | None
    """[q_rank], the weight of the norm between q_a and q_b; None if there is no q_b."""
    q_b: Matrix | None
    k_b: Matrix
    v_b: Matrix
    out: Matrix


class Beside(NamedTuple):
    """The FFN that every token takes beside a layer's experts (the shared FFN)."""

    matrices: tuple[Matrix | None, Matrix, Matrix]
    """Gate, up and down."""
    out: Array
    """[T, D]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpsShape:
    """The sizes that the operations of an engine must handle; their scratch is made for these."""

    threads: int
    max_tokens: int
    """The most tokens of a batch."""
    max_cols: int
    """Columns of the widest input of a matrix."""
    max_hidden: int
    """The width of the widest FFN."""
    max_context: int
    """The most positions that attention sees."""
    head_dim: int
    """The columns of the widest query head."""
    num_heads: int
    """The most query heads of a layer."""

    @classmethod
    def of(cls, config: ModelConfig, threads: int) -> OpsShape:
        """Returns the sizes of a model for a single token at a single position; callers replace those two."""
        d = config.hidden_size
        heads, widths = zip(*(m.heads for m in config.mixers), strict=True)
        return cls(
            threads=threads, max_tokens=1,
            max_cols=max(d, *(m.widest_input(d) for m in config.mixers)),
            max_hidden=max(config.expert_hidden, *config.shared_hidden, 0), max_context=1,
            head_dim=max(2, *widths), num_heads=max(1, *heads),
        )  # fmt: skip
