"""What a model of torch says of the second halves of windows, for benchmarks that change it and ask what that cost."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def log_probs(model: Any, windows: NDArray[np.int32]) -> NDArray[np.float64]:
    """Returns the log-probabilities of what comes after each token from the middle on, [N, T - T // 2, V].

    Args:
        model: whose `logits` takes windows [1, T] and returns [1, T, V].
        windows: [N, T].
    """
    half = windows.shape[1] // 2
    z = np.stack([model.logits(w[None])[0, half - 1 : -1].astype(np.float64) for w in windows])
    z -= z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def divergences(reference: NDArray[np.float64], found: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the KL divergence of each prediction from a reference, both of `log_probs`."""
    out: NDArray[np.float64] = (np.exp(reference) * (reference - found)).sum(-1).reshape(-1)
    return out
