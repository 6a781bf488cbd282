"""What a scheduler is told (`Routing`), and what it answers (`Plan`, `Priorities`). Values only.

A plan is a few flat arrays, not an object per expert: one is made for every layer and token. Nobody changes a routing
once a scheduler has it, nor a plan once the scheduler has returned it. They are not frozen, since frozen dataclasses
take three times as long to construct.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Plan", "Priorities", "Routing"]


@dataclass(slots=True)
class Routing:
    """What the router of one layer chose for T tokens."""

    layer: int
    """Position among the layers with routed experts."""
    experts: NDArray[np.int32]
    """[T, K], best first."""
    gates: NDArray[np.float32]
    """[T, K]"""
    ahead_experts: NDArray[np.int32] | None = None
    """[p, T, K]: what the routers of the next p layers with experts choose for this layer's input, best first.

    Only while decoding, and for a scheduler whose `look_ahead` asks for it; None otherwise.
    """
    ahead_gates: NDArray[np.float32] | None = None
    """[p, T, K]"""
    scores: NDArray[np.float32] | None = None
    """[T, E]: the router's probabilities of all experts, even where gates are normalised over the chosen ones only.

    Scratch, valid until the next layer. None where they are not known, as in a trace.
    """
    bit_logits: NDArray[np.float32] | None = None
    """[T, K, B]: the logits of the scheduler's `bit_routers` for the chosen experts. Scratch, valid until the next
    layer.

    None for a scheduler without bit routers, and in a trace, which lacks their inputs.
    """
    sequences: int = 1
    """The number of sequences that the tokens belong to; the tokens of each one are consecutive."""

    @property
    def is_decoding(self) -> bool:
        """Whether every sequence has one token here, as in replies; otherwise there is a prompt among them."""
        return len(self.experts) == self.sequences


@dataclass(slots=True)
class Plan:
    """Which experts of one layer run, at how many bits, on which tokens, and in which order they are read.

    Row r of the layer's parts is the output of expert experts[i] on token tokens[r], for offsets[i] <= r <
    offsets[i + 1].
    """

    layer: int
    """As in `Routing`."""
    experts: NDArray[np.int32]
    """[n], in the order of reading; an expert may occur again later at more bits, for other tokens."""
    bits: NDArray[np.int8]
    """[n]: the bits at which each expert runs."""
    offsets: NDArray[np.int32]
    """[n + 1]"""
    tokens: NDArray[np.int32]
    """[m], grouped by expert."""
    rows: NDArray[np.int32]
    """[T, K]: the row of parts for a token's k-th expert, or -1 if that is skipped. Parts are added in this order."""
    gates: NDArray[np.float32]
    """[T, K]"""
    ahead: NDArray[np.int32] | None = None
    """[a]: experts that later layers will probably want, as layer * num_experts + expert, most urgent first.

    They are read when nothing else has to be read, and kept until the next plan. Each plan gives the whole list: a
    read for an expert that is no longer on it is cancelled unless it has begun. None: no list.
    """
    ahead_bits: NDArray[np.int8] | None = None
    """[a]: the bits at which to read them."""
    drop: NDArray[np.int32] | None = None
    """[d]: experts to lower before anything is read, as layer * num_experts + expert."""
    drop_bits: NDArray[np.int8] | None = None
    """[d]: the bits to lower them to; 0 evicts."""


@dataclass(frozen=True, slots=True)
class Priorities:
    """The order of eviction: of the experts that may be evicted, the cache drops the one of the lowest priority.

    A scheduler writes these arrays and the cache reads them. The priority of expert e in layer l is
    scores[l, e] * scale[l] + shift[l]. So a term that depends only on the layer, such as how soon it runs again, costs
    one update per layer instead of one per expert.
    """

    scores: NDArray[np.float64]
    """[num_layers, num_experts]"""
    scale: NDArray[np.float64]
    """[num_layers], above 0"""
    shift: NDArray[np.float64]
    """[num_layers]"""
    version: NDArray[np.uint32]
    """[num_layers]: a counter per layer, to be incremented after a change of its scores: the cache looks again only at
    layers whose counter has changed."""
    decides: NDArray[np.uint8]
    """[1]: 0 while the cache is to use its own count of uses instead. After a change, increment all of `version`."""

    @classmethod
    def zeros(cls, num_layers: int, num_experts: int) -> Priorities:
        """Returns priorities that are in force (`decides`) and equal for all experts."""
        L = num_layers
        return cls(
            np.zeros((L, num_experts)), np.ones(L), np.zeros(L), np.zeros(L, np.uint32), np.ones(1, np.uint8)
        )  # fmt: skip
