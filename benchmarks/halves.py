"""Windows of a text, and a torch model's predictions for their second halves, for benchmarks that change the model and
measure what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.file.format import MoeFile
from edgemoe.lab.bits.calibrate import windows_of


def cut(moe: MoeFile, window: int, path: Path, count: int) -> NDArray[np.int32]:
    """Returns the first pieces of a text, [count, window]; see `windows_of`."""
    return windows_of(moe, path.read_text(encoding="utf-8"), window=window, count=count)


def log_probs(model: Any, windows: NDArray[np.int32]) -> NDArray[np.float64]:
    """Returns the log-probabilities that predict each token of the windows' second halves, [N, T - T // 2, V].

    Args:
        model: its `logits` takes windows [1, T] and returns [1, T, V].
        windows: [N, T].
    """
    half = windows.shape[1] // 2
    z = np.stack([model.logits(w[None])[0, half - 1 : -1].astype(np.float64) for w in windows])
    z -= z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def divergences(reference: NDArray[np.float64], found: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the KL divergence of each prediction from its reference, in nats; both are results of `log_probs`."""
    out: NDArray[np.float64] = (np.exp(reference) * (reference - found)).sum(-1).reshape(-1)
    return out
