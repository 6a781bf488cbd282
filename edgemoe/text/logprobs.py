"""Logits to log-probabilities."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["log_softmax"]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Returns log-probabilities [T, V] of logits [T, V]."""
    out: NDArray[np.float64] = logits - logits.max(axis=1, keepdims=True).astype(np.float64)
    out -= np.log(np.exp(out).sum(axis=1, keepdims=True))
    return out
