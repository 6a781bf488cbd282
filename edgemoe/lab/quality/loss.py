"""The loss of fewer bits: the mean KL divergence from a level of the same file on some text."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.runtime.engine import load

__all__ = ["Loss", "half_log_softmax", "log_softmax_rows", "standard_error"]


class Loss:
    """An open model that measures one map of bits after another on the same tokens. A context manager.

    The second half of each window counts. The reference's log-probabilities stay in memory: N * T/2 * V float32.
    """

    def __init__(
        self, path: str | os.PathLike[str], windows: NDArray[np.int32], *, reference: int
    ) -> None:
        """Args:
        windows: [N, T], tokens; each row is a sequence of its own.
        reference: the bits of a level of the file. Losses are measured against it, and no map may have more bits.
        """
        self._windows = windows
        self._bits: NDArray[np.int8] | None = None
        with load(path, context=windows.shape[1], bits=reference) as engine:
            config = engine.config
            self._reference = [half_log_softmax(engine.logits(w)) for w in windows]
        self._bits = np.full((len(config.moe_layers), config.num_experts), reference, np.int8)
        # The scheduler reads the array of bits at every plan, so it can be changed in place.
        self._engine = load(
            path, context=windows.shape[1], bits=reference, options={"bits": self._bits}
        )

    def __call__(self, bits: NDArray[np.int8]) -> float:
        """Returns the mean over tokens of KL(reference ‖ model at `bits` [L, E]), in nats."""
        assert self._bits is not None
        self._bits[:] = bits
        divergences = []
        for window, p in zip(self._windows, self._reference, strict=True):
            q = half_log_softmax(self._engine.logits(window))
            divergences.append((np.exp(p) * (p - q)).sum(1))
        return float(np.mean(divergences))

    def __enter__(self) -> Loss:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()


def standard_error(values: NDArray[np.floating[Any]], chunks: int) -> float:
    """Returns the standard error of the mean of values [chunks * n], n for the tokens of each chunk of a text.

    Tokens of one chunk are alike, so the means of chunks differ more than those of independent tokens would. If they
    happen to differ less, as those of few chunks may, it is the error of independent tokens.
    """
    alone = values.std() / len(values) ** 0.5
    means = values.reshape(chunks, -1).mean(1)
    together = means.std(ddof=1) / chunks**0.5 if chunks > 1 else 0.0
    return float(max(alone, together))


def half_log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the log-probabilities of the second half of a window, [T - T // 2, V], from its logits [T, V]."""
    return log_softmax_rows(logits[len(logits) // 2 :])


def log_softmax_rows(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the log-probabilities for logits [T, V], in float32."""
    shifted = logits - logits.max(1, keepdims=True)
    out: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return out
