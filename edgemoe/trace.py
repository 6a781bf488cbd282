"""Records what the router asked for and what was in memory, token by token, in a compact file.

A trace is one line of JSON, then fixed-size little-endian records (numpy dtype `record(K)`), one per token and
layer with experts, in the order of computing:

    token     u4        position in its sequence
    layer     u2        position among the layers with routed experts
    experts   u2 [K]    chosen, best first
    gates     f2 [K]
    resident  u1 [K]    rungs of each in memory when the layer was planned; 0 = absent

The header has the fields of `TraceHeader`. `read` gives both back.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.errors import FormatError
from edgemoe.experts import Observer
from edgemoe.plan import Plan, Routing

__all__ = ["TraceHeader", "TraceWriter", "read", "record"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceHeader:
    """Says which model and settings a trace is of."""

    edgemoe_trace: int = 1
    """Version of the format."""
    model: str
    num_experts: int
    experts_per_token: int
    num_layers: int
    """Layers with routed experts."""
    bits: int
    slots_bytes: int
    """Memory for experts."""
    expert_bytes: int


def record(experts_per_token: int) -> np.dtype[Any]:
    """Returns the dtype of a trace's records."""
    K = experts_per_token
    return np.dtype(
        [
            ("token", "<u4"), ("layer", "<u2"), ("experts", "<u2", K), ("gates", "<f2", K),
            ("resident", "u1", K),
        ]
    )  # fmt: skip


class TraceWriter(Observer):
    """Writes a trace as layers are planned; an earlier trace of that name is replaced."""

    def __init__(self, path: str | os.PathLike[str], header: TraceHeader) -> None:
        """Opens the file and writes the header.

        Raises:
            ValueError: there is a file that is not a trace; it is left alone.
            OSError: the file cannot be written.
        """
        target = Path(path)
        if target.is_file() and target.stat().st_size:
            with open(target, "rb") as old:
                if not old.read(32).startswith(b'{"edgemoe_trace"'):
                    raise ValueError(f"{path}: exists and is not a trace; it is left as it is")
        self._dtype = record(header.experts_per_token)
        self._file = open(path, "wb")  # noqa: SIM115 (closed by `close`)
        self._file.write(json.dumps(asdict(header)).encode() + b"\n")
        self.position = 0
        """Of the first token of the next chunk; the engine sets it."""

    def planned(self, routing: Routing, plan: Plan, residency: NDArray[np.int8]) -> None:
        """Writes one record per token."""
        T = len(routing.experts)
        rows = np.empty(T, self._dtype)
        rows["token"] = np.arange(self.position, self.position + T)
        rows["layer"] = routing.layer
        rows["experts"] = routing.experts
        rows["gates"] = routing.gates
        rows["resident"] = residency[routing.layer][routing.experts]
        self._file.write(rows.data)

    def close(self) -> None:
        """Ends the file."""
        self._file.close()


def read(path: str | os.PathLike[str]) -> tuple[TraceHeader, NDArray[Any]]:
    """Returns a trace's header and its records.

    Raises:
        FormatError: not a trace. A last record that was cut off is left out.
    """
    data = Path(path).read_bytes()
    line, _, body = data.partition(b"\n")
    try:
        header = TraceHeader(**json.loads(line))
        dtype = record(header.experts_per_token)
    except (ValueError, TypeError):
        raise FormatError(f"{path}: not a trace of edgemoe") from None
    if header.edgemoe_trace != 1:
        raise FormatError(f"{path}: trace version {header.edgemoe_trace}; expected 1")
    return header, np.frombuffer(body[: len(body) // dtype.itemsize * dtype.itemsize], dtype)
