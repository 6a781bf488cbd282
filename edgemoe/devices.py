"""The devices of this machine beside its processor, and the plug-in that knows them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from edgemoe import _core
from edgemoe.errors import DeviceError

__all__ = ["DeviceName", "found", "open_device", "plug_ins"]

_FOLDER = Path(__file__).parent / "backends"


@dataclass(frozen=True, slots=True)
class DeviceName:
    """Is "cpu", or "cuda:N" for a device by its number."""

    ordinal: int | None
    """None: the processor."""

    @classmethod
    def parse(cls, text: object) -> DeviceName:
        """Reads a name; "cuda" is the first device.

        Raises:
            ValueError: it is none.
        """
        if text == "cpu":
            return cls(None)
        match = re.fullmatch(r"cuda(?::([0-9]{1,3}))?", text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"device: expected cpu, cuda or cuda:N, got {text!r}")
        return cls(int(match[1] or 0))

    def __str__(self) -> str:
        return "cpu" if self.ordinal is None else f"cuda:{self.ordinal}"


def plug_ins() -> list[Path]:
    """Returns the plug-ins of this install, those for the newest CUDA first."""
    return sorted(_FOLDER.glob("libedgemoe_cuda*.so"), reverse=True)


def open_device(
    name: DeviceName, budget_bytes: int | None, plug_in: str | os.PathLike[str] | None = None
) -> _core.Device:
    """Opens a device.

    Args:
        budget_bytes: what may be taken of it; None for all that is free.
        plug_in: which to ask; None for those of this install.

    Raises:
        DeviceError: there is none; says why.
    """
    assert name.ordinal is not None
    why = "no plug-in in this install: it was built without one (EDGEMOE_CUDA=1 pip install .)"
    for path in plug_ins() if plug_in is None else [Path(plug_in)]:
        probe = _core.probe_device(str(path))
        if not probe["why_not"]:
            free = (1 << 62) if budget_bytes is None else budget_bytes
            return _core.Device(str(path), name.ordinal, free)
        why = probe["why_not"]
    raise DeviceError(f"{name}: {why}")


def found(plug_in: str | os.PathLike[str] | None = None) -> list[str]:
    """Returns a line for each device, or one that says why there is none."""
    lines = []
    for path in plug_ins() if plug_in is None else [Path(plug_in)]:
        probe = _core.probe_device(str(path))
        for i in range(probe["num_devices"]):
            lines.append(_line(path, i))
        if lines:
            return lines
        lines.append(f"no CUDA device: {probe['why_not']}")
    return lines[:1] or [
        "no CUDA device: no plug-in in this install (EDGEMOE_CUDA=1 pip install . builds it)"
    ]


def _line(path: Path, ordinal: int) -> str:
    try:
        info = _core.Device(str(path), ordinal, 0).info
    except DeviceError as error:
        return str(error)
    major, minor = info["capability"]
    free, total = info["free_bytes"] / 2**30, info["total_bytes"] / 2**30
    shared = ", memory shared with the processor" if info["is_unified"] else ""
    return f"cuda:{ordinal}  {info['name']} ({major}.{minor}), {free:.1f} of {total:.1f} GiB free{shared}"
