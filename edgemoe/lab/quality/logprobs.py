"""A reference model's log-probabilities as a file in the format of `llama-perplexity --kl-divergence-base` (llama.cpp).

One format serves for levels of our own files, for checkpoints in other runtimes, and for comparisons with llama.cpp on
exactly the same tokens. All numbers are little-endian:

    "_logits_", i32 tokens per chunk C, i32 vocabulary V, i32 chunks N, i32 tokens [N, C]
    then for each chunk, for each position p from C // 2 to C - 2, the distribution of token p + 1 given those before:
    f32 scale, f32 minimum, u16 [V] of values q, and one unused u16 if V is odd

The log-probability of a token is scale * q + minimum, in nats. The range of q is the 16 nats below the likeliest token;
lower log-probabilities are clipped to it. Rounding changes the KL divergence at a position by up to 1e-5 either way,
and its mean over 1,000 positions by 3e-7 (measured: a model with a vocabulary of 4,096 against itself). If a tokenizer
has a first token, the models saw it in place of each chunk's first token.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import LIMIT
from edgemoe.errors import FormatError

__all__ = ["MAGIC", "LogProbs", "LogProbsWriter"]

MAGIC = b"_logits_"
_HEAD = struct.Struct("<iii")
_RANGE = 16.0
_STEPS = 65535


class LogProbs:
    """A file of log-probabilities, read a few rows at a time. Also a context manager."""

    windows: NDArray[np.int32]
    """[N, C]: the tokens of each chunk."""
    vocab_size: int
    losses: NDArray[np.float64] | None = None
    """[N * scored positions of a chunk]: the writer's exact -log p of actual tokens, if known; the file clips it."""
    routes: list[NDArray[np.int32]] | None = None
    """For each layer with routed experts [N * scored positions of a chunk, K]: the writer's routing, if known."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens a file and checks that it is complete.

        Raises:
            FormatError: it is not such a file, or is incomplete or damaged.
            OSError: it cannot be read.
        """
        self._path = Path(path)
        self._file: BinaryIO = open(path, "rb")  # noqa: SIM115 (closed by `close`)
        try:
            self._read_head()
        except BaseException:
            self._file.close()
            raise

    def _read_head(self) -> None:
        def need(ok: bool, what: str) -> None:
            if not ok:
                raise FormatError(f"{self._path}: {what}")

        head = self._file.read(len(MAGIC) + _HEAD.size)
        need(head[: len(MAGIC)] == MAGIC, "not a file of log-probabilities (bad magic at byte 0)")
        need(len(head) == len(MAGIC) + _HEAD.size, "truncated inside its head")
        chunk, self.vocab_size, count = _HEAD.unpack(head[len(MAGIC) :])
        need(chunk >= 3 and 1 <= self.vocab_size < LIMIT and count >= 1, "its head makes no sense")
        self._row = _row_type(self.vocab_size)
        self._start = len(head) + 4 * chunk * count
        expected = self._start + count * _scored(chunk) * self._row.itemsize
        size = os.fstat(self._file.fileno()).st_size
        need(size == expected, f"expected {expected} bytes, got {size}")
        tokens = np.frombuffer(self._file.read(4 * chunk * count), "<i4")
        need(
            int(tokens.min()) >= 0 and int(tokens.max()) < self.vocab_size,
            f"holds tokens outside a vocabulary of {self.vocab_size}",
        )
        self.windows = tokens.reshape(count, chunk).astype(np.int32)

    def rows(self, window: int, first: int, count: int) -> NDArray[np.float64]:
        """Returns the log-probabilities [count, V] at a chunk's scored positions, from position `first` on.

        Raises:
            FormatError: the file is damaged.
        """
        scored = _scored(self.windows.shape[1])
        self._file.seek(self._start + (window * scored + first) * self._row.itemsize)
        data = self._file.read(count * self._row.itemsize)
        if len(data) < count * self._row.itemsize:
            raise FormatError(f"{self._path}: became shorter while it was read")
        table = np.frombuffer(data, self._row)
        if not (np.isfinite(table["scale"]).all() and np.isfinite(table["minimum"]).all()):
            raise FormatError(f"{self._path}: holds what is no log-probability")
        out = table["q"][:, : self.vocab_size].astype(np.float64)
        out *= table["scale"][:, None]
        out += table["minimum"][:, None]
        return out

    def loss(self, window: int, first: int, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns -log p [count] of the actual tokens at some scored positions.

        Args:
            rows: from the method `rows`, with the same window and first.
        """
        tokens = self.windows[window]
        if self.losses is not None:
            at = window * _scored(len(tokens)) + first
            return self.losses[at : at + len(rows)]
        came = tokens[len(tokens) // 2 + 1 + first :][: len(rows)]
        out: NDArray[np.float64] = -rows[np.arange(len(rows)), came]
        return out

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> LogProbs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LogProbsWriter:
    """A writer of such a file, chunk by chunk in order. The caller opens and closes the file."""

    def __init__(self, file: IO[bytes], windows: NDArray[np.int32], vocab_size: int) -> None:
        """Writes the head.

        Args:
            windows: [N, C], the tokens of each chunk.
        """
        count, chunk = windows.shape
        self._file = file
        self._row = _row_type(vocab_size)
        self._vocab_size = vocab_size
        self._came = windows[:, chunk // 2 + 1 :].reshape(-1)
        self._losses: list[float] = []
        self.routes: list[NDArray[np.int32]] | None = None
        """The routing, see `LogProbs.routes`; set by the code that measures."""
        file.write(MAGIC + _HEAD.pack(chunk, vocab_size, count))
        file.write(np.ascontiguousarray(windows, "<i4").tobytes())

    def add(self, log_probs: NDArray[np.float64]) -> None:
        """Writes the log-probabilities [T, V] of the next T positions.

        Raises:
            OSError: the disk is full.
        """
        came = self._came[len(self._losses) :][: len(log_probs)]
        self._losses += (-log_probs[np.arange(len(log_probs)), came]).tolist()
        low, high = log_probs.min(axis=1), log_probs.max(axis=1)
        low = np.maximum(low, high - _RANGE)
        scale = ((high - low) / _STEPS).astype(np.float32)
        steps = np.where(scale > 0, scale, np.float32(1))[:, None]
        table = np.zeros(len(log_probs), self._row)
        table["scale"], table["minimum"] = scale, low
        q = np.rint((log_probs - low[:, None]) / steps)
        table["q"][:, : self._vocab_size] = q.clip(0, _STEPS)
        try:
            self._file.write(table.tobytes())
            self._file.flush()
        except OSError as e:
            raise OSError(e.errno, e.strerror, self._file.name) from None

    @property
    def losses(self) -> NDArray[np.float64]:
        """The exact -log p of the actual tokens, at all positions so far."""
        return np.array(self._losses)


def _row_type(vocab_size: int) -> np.dtype[np.void]:
    return np.dtype(
        [("scale", "<f4"), ("minimum", "<f4"), ("q", "<u2", (vocab_size + vocab_size % 2,))]
    )


def _scored(chunk: int) -> int:
    """Returns how many positions of a chunk are scored: those of its second half that have a next token."""
    return chunk - 1 - chunk // 2
