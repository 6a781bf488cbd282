"""The recording of traces while a model runs; `edgemoe.runtime.trace` describes the format."""

from __future__ import annotations

import io
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgemoe.experts import Observer
from edgemoe.file.whole import locked, named, sync_directory
from edgemoe.model import Batch
from edgemoe.plan import Plan, Routing
from edgemoe.runtime.trace import MAGIC, NO_EXPERT, TraceHeader, record

__all__ = ["TraceWriter"]

_ROWS = 1024  # records that are gathered before they are written

_clock = time.perf_counter


class TraceWriter(Observer):
    """An observer that writes a trace as layers run. An earlier trace of that name is replaced.

    In a layer of a single token it only copies a few bytes. They are turned into records later, for many tokens at
    once.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        header: TraceHeader,
        *,
        ran_there: NDArray[np.uint8] | None = None,
    ) -> None:
        """Opens the file and writes the header.

        Args:
            path: the trace file.
            header: the model and the settings.
            ran_there: [layers, E], a live view: 1 for each expert that ran on a device the last time, see
                `ExpertStore.watch`; None without a device.

        Raises:
            ValueError: the file exists and is not a trace; it is left as it is.
            OSError: the file cannot be written, or another process is recording it.
        """
        self.header = header
        self._path = str(path)
        self._dtype = record(header.experts_per_token, header.look_ahead)
        self._file = _emptied(Path(path))
        self._file.write(json.dumps(asdict(header)).encode() + b"\n")
        self._own = header.own_bits()
        self._positions: NDArray[np.int64] = np.zeros(1, np.int64)
        self._ids: NDArray[np.int32] = np.empty(0, np.int32)
        self._blocks: list[NDArray[Any]] = []
        self._num_rows = 0
        self._single: list[tuple[Any, ...]] = []
        self._times: list[tuple[float, float, float, int, bytes]] = []
        self._ran_there = ran_there
        self._nowhere = bytes(header.num_experts)
        self._layer = 0
        self._planned: float | None = None
        self._last = _clock()
        self._tail = 0.0
        self._bytes_read, self._wait_s = 0, 0.0

    def begin(self, batch: Batch) -> None:
        """See `Observer.begin`."""
        self._positions, self._ids = batch.positions, batch.ids
        self._last = _clock() - self._tail
        self._tail = 0.0

    def end(self) -> None:
        """See `Observer.end`."""
        self._tail = _clock() - self._last

    def planned(self, routing: Routing, plan: Plan, residency: NDArray[np.int8]) -> None:
        """Copies what was routed, planned and resident; see `Observer.planned`."""
        if self._planned is not None:  # an error or Ctrl-C ended the last layer before `done`
            self._times.append((0.0, 0.0, 0.0, 0, self._nowhere))
        self._layer = routing.layer
        if len(routing.experts) == 1 and routing.ahead_experts is None:
            self._single.append(
                (
                    self._positions[0], self._ids[0], routing.layer, routing.experts.tobytes(), routing.gates.tobytes(),
                    plan.bits.tobytes(), plan.rows.tobytes(), residency[routing.layer].tobytes(),
                )
            )  # fmt: skip
        else:
            self._settle()
            self._blocks.append(self._block(routing, plan, residency))
            self._num_rows += len(routing.experts)
        self._planned = _clock()

    def done(self, bytes_read: int, wait_s: float) -> None:
        """Notes what the layer took, as differences of the totals; see `Observer.done`."""
        now, planned = _clock(), self._planned
        assert planned is not None
        there = self._nowhere if self._ran_there is None else self._ran_there[self._layer].tobytes()
        self._times.append(
            (planned - self._last, now - planned, wait_s - self._wait_s, bytes_read - self._bytes_read, there)
        )  # fmt: skip
        self._bytes_read, self._wait_s = bytes_read, wait_s
        self._last, self._planned = now, None
        if len(self._single) + self._num_rows >= _ROWS:
            self._flush()

    def close(self) -> None:
        """Writes what is left and closes the file; see `Observer.close`."""
        with named(self._path), self._file:
            self._flush()
            self._file.flush()
            if os.path.isfile(self._path):
                os.fsync(self._file.fileno())
                sync_directory(Path(os.path.realpath(self._path)))

    def _settle(self) -> None:
        """Turns the single tokens that were gathered into a block of records."""
        if not self._single:
            return
        position, ids, layer, experts, gates, bits, order, resident = zip(
            *self._single, strict=True
        )
        n, K, E = len(position), self.header.experts_per_token, self.header.num_experts
        rows = np.zeros(n, self._dtype)
        rows["token"], rows["id"], rows["layer"] = position, ids, layer
        rows["tokens"] = rows["sequences"] = 1
        rows["experts"] = chosen = np.frombuffer(b"".join(experts), np.int32).reshape(n, K)
        rows["gates"] = np.frombuffer(b"".join(gates), np.float32).reshape(n, K)
        levels = np.frombuffer(b"".join(resident), np.int8).reshape(n, E)
        rows["resident"] = np.take_along_axis(levels, chosen, axis=1)
        # For a single token, every use of the plan has one part, so that the plan's rows are positions of uses.
        at = np.frombuffer(b"".join(order), np.int32).reshape(n, K)
        starts = np.cumsum([0, *map(len, bits)])[:-1]
        ran = np.frombuffer(b"".join(bits), np.uint8)
        rows["bits"] = np.where(at < 0, 0, ran[np.where(at < 0, 0, at + starts[:, None])])
        if self.header.look_ahead:
            rows["ahead_experts"] = NO_EXPERT
        self._blocks.append(rows)
        self._num_rows += n
        self._single.clear()

    def _block(self, routing: Routing, plan: Plan, residency: NDArray[np.int8]) -> NDArray[Any]:
        """Returns the records of a batch, or of a token with look-ahead."""
        T = len(routing.experts)
        rows = np.zeros(T, self._dtype)
        rows["token"] = self._positions
        rows["id"] = self._ids
        rows["layer"] = routing.layer
        rows["tokens"][0], rows["sequences"][0] = T, routing.sequences
        rows["experts"] = routing.experts
        rows["gates"] = routing.gates
        rows["resident"] = residency[routing.layer][routing.experts]
        use = np.searchsorted(plan.offsets, plan.rows, side="right") - 1
        rows["bits"] = np.where(plan.rows < 0, 0, plan.bits[use])
        if self.header.look_ahead:
            rows["ahead_experts"] = NO_EXPERT
            if routing.ahead_experts is not None and routing.ahead_gates is not None:
                n = min(len(routing.ahead_experts), self.header.look_ahead)
                rows["ahead_experts"][:, :n] = routing.ahead_experts[:n].swapaxes(0, 1)
                rows["ahead_gates"][:, :n] = routing.ahead_gates[:n].swapaxes(0, 1)
        return rows

    def _flush(self) -> None:
        self._settle()
        if not self._blocks:
            return
        if self._planned is not None:
            self._times.append((0.0, 0.0, 0.0, 0, self._nowhere))
            self._planned = None
        rows = np.concatenate(self._blocks)
        if self._own is not None:  # a plan may ask for more bits than an expert has
            own = self._own[rows["layer"].astype(int)[:, None], rows["experts"]]
            rows["bits"] = np.minimum(rows["bits"], own)
        first = np.flatnonzero(rows["tokens"])
        before, experts, wait, bytes_read, there = zip(*self._times, strict=True)
        rows["before_us"][first] = np.array(before) * 1e6
        rows["experts_us"][first] = np.array(experts) * 1e6
        rows["wait_us"][first] = np.array(wait) * 1e6
        rows["bytes_read"][first] = bytes_read
        if self._ran_there is not None:
            of_layers = np.frombuffer(b"".join(there), np.uint8).reshape(len(first), -1)
            of_rows = np.repeat(np.arange(len(first)), rows["tokens"][first])[:, None]
            rows["device"] = of_layers[of_rows, rows["experts"]] * (rows["bits"] > 0)
        self._blocks.clear()
        self._times.clear()
        self._num_rows = 0
        with named(self._path):
            self._file.write(rows.data)


def _emptied(path: Path) -> BinaryIO:
    """Opens and empties a trace file for writing; anything but a regular file, such as a pipe, is just opened."""
    if path.exists() and not path.is_file():
        return open(path, "wb")
    file = locked(path, create=True, busy="another process is recording it")
    head = os.pread(file.fileno(), len(MAGIC), 0)
    if head and head != MAGIC:
        file.close()
        raise ValueError(f"{path}: exists and is not a trace; it is left as it is")
    file.truncate(0)
    return io.BufferedWriter(file)
