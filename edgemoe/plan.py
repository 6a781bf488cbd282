"""The vocabulary of deciding: what a scheduler is told, and what it answers. Values only.

A plan is a few flat arrays, not an object per expert: a token passes here once per layer. Nobody changes one; they
are not frozen because that makes making them three times as slow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Plan", "Priorities", "Routing"]


@dataclass(slots=True)
class Routing:
    """Says what the router of one layer chose for T tokens."""

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
    """[T, E]: the router's probabilities of all experts, also where the gates are taken over the chosen only.

    Scratch, valid until the next layer. None where they are not known, as in a trace.
    """
    bit_logits: NDArray[np.float32] | None = None
    """[T, K, B]: what the scheduler's `bit_routers` say of the chosen experts. Scratch, valid until the next layer.

    None for a scheduler without, and in a trace, which does not have what they are computed from.
    """
    sequences: int = 1
    """How many the tokens are of; each sequence's follow one another."""

    @property
    def is_decoding(self) -> bool:
        """Whether every sequence has one token here, as in replies; else there is a prompt among them."""
        return len(self.experts) == self.sequences


@dataclass(slots=True)
class Plan:
    """Says which experts of one layer run, at how many bits, on which tokens, and in which order they are read.

    Row r of the layer's parts is expert i on token tokens[r], for offsets[i] <= r < offsets[i + 1].
    """

    layer: int
    """As in `Routing`."""
    experts: NDArray[np.int32]
    """[n], in the order of reading; an expert may come again later at more bits, for other tokens."""
    bits: NDArray[np.int8]
    """[n]: precision of use."""
    offsets: NDArray[np.int32]
    """[n + 1]"""
    tokens: NDArray[np.int32]
    """[m], grouped by expert."""
    rows: NDArray[np.int32]
    """[T, K]: the part of a token's k-th expert, or -1 when it is skipped. Parts are added in this order."""
    gates: NDArray[np.float32]
    """[T, K]"""
    ahead: NDArray[np.int32] | None = None
    """[a]: experts that later layers will probably want, as layer * num_experts + expert, most urgent first.

    They are read when nothing else is to be read, and kept until the next plan. Each plan gives the whole list:
    reads for an expert that is no longer on it are cancelled unless they have begun. None: no list.
    """
    ahead_bits: NDArray[np.int8] | None = None
    """[a]"""
    drop: NDArray[np.int32] | None = None
    """[d]: experts to lower before anything is read, as layer * num_experts + expert."""
    drop_bits: NDArray[np.int8] | None = None
    """[d]: what to lower them to; 0 evicts."""


@dataclass(frozen=True, slots=True)
class Priorities:
    """Says what the cache drops first: of what may go, the lowest score. A scheduler writes them, the cache reads.

    Expert e of layer l scores scores[l, e] * scale[l] + shift[l], so that what depends on the layer alone, like how far
    it is from running again, costs a number per layer and not one per expert.
    """

    scores: NDArray[np.float64]
    """[num_layers, num_experts]"""
    scale: NDArray[np.float64]
    """[num_layers], above 0"""
    shift: NDArray[np.float64]
    """[num_layers]"""
    version: NDArray[np.uint32]
    """[num_layers]: who changes scores of a layer counts it up; the cache looks at no others again."""
    decides: NDArray[np.uint8]
    """[1]: 0 while the cache shall go by its own count of uses instead; who changes it counts all of `version` up."""

    @classmethod
    def zeros(cls, num_layers: int, num_experts: int) -> Priorities:
        """Returns priorities that decide, and by which all experts are equal."""
        L = num_layers
        return cls(
            np.zeros((L, num_experts)), np.ones(L), np.zeros(L), np.zeros(L, np.uint32), np.ones(1, np.uint8)
        )  # fmt: skip
