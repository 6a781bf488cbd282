"""Traces: what the router asked for, what was in memory, and what each layer took, in a compact file.

A trace is one line of JSON, the fields of `TraceHeader`, then fixed-size little-endian records (numpy dtype
`record(K, p)`). There is one record per token and layer with experts, in the order in which they were computed: a chunk
of T tokens is T records of layer 0, then T of layer 1, and so on. K is the experts per token, p the look-ahead.

    token          u4         position in its sequence, from 0
    id             u4         the token itself; 4294967295 if it is not known. Not in version 2
    layer          u2         position among the layers with routed experts
    tokens         u2         T in the first record of each layer of a chunk, 0 in the others
    sequences      u2         how many sequences the T tokens belong to, likewise; T while decoding. Not in versions 2
                              and 3
    experts        u2 [K]     the experts that the router chose, best first
    gates          f2 [K]     their gates
    resident       u1 [K]     the level of each in memory when the layer was planned, 0 = absent; the highest level of
                              the file if all that the file has of the expert was in memory
    bits           u1 [K]     the bits that each ran at, 0 = skipped
    device         u1 [K]     1 if a device ran it, else 0. An expert that the processor ran was in memory if `resident`
                              has its level, else it was read from the file. Not in versions 2 to 4
    ahead_experts  u2 [p, K]  what the routers of the next p layers chose for this layer's input, best first;
                              65535 if they were not asked. Absent if p is 0
    ahead_gates    f2 [p, K]  likewise

The following fields describe the chunk's layer as a whole. They are in its first record, and 0 in the others:

    bytes_read     u8         bytes that arrived since the layer before
    before_us      f4         microseconds since the experts of the layer before were done: head, embedding, attention,
                              router and scheduler, but not what the caller did between tokens
    experts_us     f4         microseconds from the plan to the sum of the experts' outputs
    wait_us        f4         the part of experts_us for which computing stalled on reads

`read` also reads versions 2 to 4.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import MOST_EXPERTS, MOST_LAYERS
from edgemoe.errors import FormatError, quoted
from edgemoe.file.parse import parse_object

__all__ = ["MAGIC", "NO_EXPERT", "NO_TOKEN", "Trace", "TraceHeader", "read", "record"]

_VERSION = 5
_LACKS: Mapping[int, Sequence[str]] = {
    2: ("id", "sequences", "device"), 3: ("sequences", "device"), 4: ("device",), _VERSION: (),
}  # fmt: skip
"""The versions that `read` knows, and the fields that their records lack."""
MAGIC = b'{"edgemoe_trace"'
"""The first bytes of every trace."""
_MOST_BYTES = 1 << 53  # of memory or a read; above this, floats skip whole numbers

NO_EXPERT = 0xFFFF
"""The value of `ahead_experts` where no router was asked."""

NO_TOKEN = 0xFFFFFFFF
"""The value of `id` where the token is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceHeader:
    """The model and the settings that a trace was recorded with."""

    edgemoe_trace: int = _VERSION
    """Version of the format."""
    model: str
    num_experts: int
    experts_per_token: int
    num_layers: int
    """Layers with routed experts."""
    bits: int
    """The highest precision that may be planned."""
    level_bits: tuple[int, ...]
    """The bits of each level, ascending; `bits` is the last."""
    level_bytes: tuple[int, ...]
    """Bytes of an expert at each level that it has, in memory and to be read."""
    rungs: tuple[int, ...] = ()
    """How many of the levels each expert has, layer by layer; empty if all have all."""
    slots_bytes: int
    """Memory for experts, in bytes."""
    scheduler: str
    look_ahead: int = 0
    """p of the records."""
    reads_ahead: bool = False
    """Whether the scheduler may have read ahead, so that a layer's reads and waits are not for this layer alone."""
    threads: int

    @property
    def mean_bytes(self) -> tuple[int, ...]:
        """The mean bytes of an expert at each level, rounded down; experts that lack a level count at their highest."""
        if not self.rungs:
            return self.level_bytes
        sizes, rungs = np.array(self.level_bytes), np.array(self.rungs)
        levels = range(1, len(sizes) + 1)
        return tuple(int(sizes[np.minimum(rungs, i) - 1].mean()) for i in levels)

    def own_bits(self) -> NDArray[np.uint8] | None:
        """Returns the most bits that each expert has, [layers, E]; None if all experts have all levels."""
        if not self.rungs:
            return None
        rungs = np.array(self.rungs).reshape(self.num_layers, self.num_experts)
        bits: NDArray[np.uint8] = np.array(self.level_bits, np.uint8)[rungs - 1]
        return bits


def record(experts_per_token: int, look_ahead: int = 0) -> np.dtype[Any]:
    """Returns the dtype of a trace's records."""
    K, p = experts_per_token, look_ahead
    ahead = [("ahead_experts", "<u2", (p, K)), ("ahead_gates", "<f2", (p, K))] if p else []
    return np.dtype(
        [
            ("token", "<u4"), ("id", "<u4"), ("layer", "<u2"), ("tokens", "<u2"), ("sequences", "<u2"),
            ("experts", "<u2", (K,)), ("gates", "<f2", (K,)), ("resident", "u1", (K,)), ("bits", "u1", (K,)),
            ("device", "u1", (K,)), *ahead,
            ("bytes_read", "<u8"), ("before_us", "<f4"), ("experts_us", "<f4"), ("wait_us", "<f4"),
        ]
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace in memory."""

    header: TraceHeader
    rows: NDArray[Any]
    """[n], of the dtype `record`."""
    is_cut: bool = False
    """Whether the last record was cut off, as when the recording was killed; it is left out."""

    def passes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the passes through all layers: the index of each one's first record [P], and its tokens [P].

        The record of token t in layer l is at first + l * tokens + t. A pass that was interrupted is left out.
        """
        L = self.header.num_layers
        starts = np.flatnonzero(self.rows["tokens"])
        layers, tokens = self.rows["layer"][starts], self.rows["tokens"][starts].astype(np.int64)
        if len(starts) < L:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        windows = np.lib.stride_tricks.sliding_window_view
        whole = (windows(layers, L) == np.arange(L)).all(axis=1)
        whole &= (windows(tokens, L) == tokens[: len(tokens) - L + 1, None]).all(axis=1)
        whole &= starts[: len(whole)] + L * tokens[: len(whole)] <= len(self.rows)
        at = np.flatnonzero(whole)
        return starts[at].astype(np.int64), tokens[at]

    def by_token(self, field: str, *, single: bool = False) -> NDArray[Any]:
        """Returns a field as [T, L, …], for all tokens of complete passes in their order.

        Args:
            field: its name.
            single: only tokens that were computed one at a time.
        """
        first, tokens = self.passes()
        if single:
            first, tokens = first[tokens == 1], tokens[tokens == 1]
        within = np.arange(tokens.sum()) - np.repeat(np.cumsum(tokens) - tokens, tokens)
        width = np.repeat(tokens, tokens)[:, None]
        index = (np.repeat(first, tokens) + within)[:, None]
        index = index + width * np.arange(self.header.num_layers)
        column: NDArray[Any] = self.rows[field][index]
        return column


def _is_sound(header: TraceHeader) -> bool:
    """Returns whether a header's values have the right types and ranges.

    Raises:
        TypeError: a value has a type that cannot even be compared.
    """
    E, L, bits, sizes = header.num_experts, header.num_layers, header.level_bits, header.level_bytes
    whole = (
        E, L, header.experts_per_token, header.look_ahead, header.slots_bytes, header.threads,
        *bits, *sizes, *header.rungs,
    )  # fmt: skip
    return (
        all(type(n) is int for n in whole)
        and 0 < header.experts_per_token <= E < NO_EXPERT
        and 0 < L < MOST_LAYERS
        and E * L <= MOST_EXPERTS
        and 0 <= header.look_ahead < MOST_LAYERS
        and 0 < header.slots_bytes <= _MOST_BYTES
        and 0 < header.threads < NO_EXPERT
        and 0 < len(bits) == len(sizes)
        and list(bits) == sorted(set(bits))
        and 1 <= bits[0] <= bits[-1] == header.bits <= 8
        and list(sizes) == sorted(sizes)
        and 0 < sizes[0] <= sizes[-1] <= _MOST_BYTES
        and len(header.rungs) in (0, L * E)
        and all(1 <= r <= len(bits) for r in header.rungs)
        and isinstance(header.model, str)
        and isinstance(header.scheduler, str)
        and type(header.reads_ahead) is bool
    )


def _are_inside(rows: NDArray[Any], header: TraceHeader) -> bool:
    """Returns whether all records are possible for the header's model."""
    E, levels = header.num_experts, np.zeros(256, bool)
    levels[[0, *header.level_bits]] = True
    times = [rows[name] for name in ("before_us", "experts_us", "wait_us")]
    ahead = rows["ahead_experts"] if header.look_ahead else np.zeros(1, np.uint16)
    return bool(
        (rows["experts"] < E).all()
        and (rows["layer"] < header.num_layers).all()
        and (rows["sequences"] <= rows["tokens"]).all()
        and ((rows["sequences"] > 0) == (rows["tokens"] > 0)).all()
        and (rows["resident"] <= len(header.level_bits)).all()
        and levels[rows["bits"]].all()
        and (rows["device"] <= 1).all()
        and np.isfinite(rows["gates"]).all()
        and ((ahead < E) | (ahead == NO_EXPERT)).all()
        and (rows["bytes_read"] <= _MOST_BYTES).all()
        and all(np.isfinite(t).all() for t in times)
    )


def read(path: str | os.PathLike[str]) -> Trace:
    """Reads a trace.

    Raises:
        FormatError: the file is not a trace, is of an unknown version, or is damaged.
        OSError: the file cannot be read.
    """
    data = Path(path).read_bytes()
    line, _, body = data.partition(b"\n")
    try:
        fields = parse_object(line, str(path))
        version = fields["edgemoe_trace"]
    except (FormatError, KeyError):
        raise FormatError(f"{path}: not a trace of edgemoe") from None
    if type(version) is not int or version not in _LACKS:
        raise FormatError(
            f"{path}: trace version {quoted(version)}; expected {_VERSION}, record it again"
        )
    try:
        for name in ("level_bits", "level_bytes", "rungs"):
            fields[name] = tuple(fields.get(name, ()))
        header = TraceHeader(**fields)
        is_sound = _is_sound(header)
    except TypeError:
        is_sound = False
    if not is_sound:
        raise FormatError(f"{path}: a trace with a damaged header")
    dtype = record(header.experts_per_token, header.look_ahead)
    rows, is_cut = _as_now(body, dtype, _LACKS[version])
    if not _are_inside(rows, header):
        raise FormatError(f"{path}: a trace with records outside its model")
    return Trace(header, rows, is_cut)


def _as_now(body: bytes, dtype: np.dtype[Any], lacks: Sequence[str]) -> tuple[NDArray[Any], bool]:
    """Returns the records of an earlier version in today's dtype, and whether a cut record follows them.

    Fields that the version lacks get defaults: the token is unknown, a pass is of one sequence, no device ran.
    """
    names = [name for name in dtype.names or () if name not in lacks]
    old = np.dtype([(name, dtype[name]) for name in names])
    count, rest = divmod(len(body), old.itemsize)
    found = np.frombuffer(body[: count * old.itemsize], old)
    if not lacks:
        return found, rest > 0
    rows = np.zeros(len(found), dtype)
    for name in names:
        rows[name] = found[name]
    if "sequences" in lacks:
        rows["sequences"] = rows["tokens"] > 0
    if "id" in lacks:
        rows["id"] = NO_TOKEN
    return rows, rest > 0
