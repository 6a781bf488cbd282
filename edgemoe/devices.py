"""The devices of this machine besides its processor, and the plug-ins that drive them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from edgemoe import _core
from edgemoe.errors import DeviceError, OutOfBudget

__all__ = ["DeviceName", "Seen", "found", "looked_at", "open_device", "plug_ins"]

_FOLDER = Path(__file__).parent / "backends"
_LINK_BYTES = 16 << 20  # copied to measure a link
_SLOW_LINK = 5e9  # bytes per second: four lanes of PCIe 3, or a slot that runs at an older generation's speed
_LITTLE_FREE = 0.5  # share of a device's memory
_NO_PLUG_IN = "no plug-in in this install"
_AGAIN = "EDGEMOE_CUDA=1 pip install --force-reinstall --no-deps . builds both together"
_CURES = (
    ("no plug-in", "EDGEMOE_CUDA=1 pip install . builds one, where nvcc is"),
    ("no NVIDIA driver", "install NVIDIA's driver; nvidia-smi then lists the device"),
    ("the driver is too old", "a newer driver, or a plug-in that was built with the driver's CUDA"),
    (
        "no device",
        "nvidia-smi says what the driver sees; CUDA_VISIBLE_DEVICES hides some; in a container, --gpus all",
    ),
    ("has compute capability", "--device cpu runs every model"),
    ("plug-in", _AGAIN),
)  # the first whose left side occurs in a reason applies


@dataclass(frozen=True, slots=True)
class DeviceName:
    """The name of a device: "cpu", or "cuda:N" for device number N."""

    ordinal: int | None
    """The device's number; None for the processor."""

    @classmethod
    def parse(cls, text: object) -> DeviceName:
        """Reads a name; "cuda" is the first device.

        Raises:
            ValueError: it is no name of a device.
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
    """Returns the plug-ins of this installation, those for the newest CUDA first."""
    return sorted(_FOLDER.glob("libedgemoe_cuda*.so"), reverse=True)


def open_device(
    name: DeviceName, budget_bytes: int | None, plug_in: str | os.PathLike[str] | None = None
) -> _core.Device:
    """Opens a device.

    Args:
        name: a device other than the processor.
        budget_bytes: the most bytes of its memory to use; None for all that is free.
        plug_in: the plug-in to use; None for those of this installation.

    Raises:
        DeviceError: the device cannot be had; says why.
    """
    assert name.ordinal is not None
    why = f"{_NO_PLUG_IN}: it was built without one (EDGEMOE_CUDA=1 pip install .)"
    for path in plug_ins() if plug_in is None else [Path(plug_in)]:
        probe = _core.probe_device(str(path))
        if not probe["why_not"]:
            free = (1 << 62) if budget_bytes is None else budget_bytes
            return _core.Device(str(path), name.ordinal, free)
        why = probe["why_not"]
    raise DeviceError(f"{name}: {why}")


def found(plug_in: str | os.PathLike[str] | None = None) -> list[str]:
    """Returns a line for each device, or one that says why there is none."""
    reasons = []
    for path in plug_ins() if plug_in is None else [Path(plug_in)]:
        probe = _core.probe_device(str(path))
        if count := probe["num_devices"]:
            return [_line(path, i) for i in range(count)]
        reasons.append(probe["why_not"])
    why = reasons[0] if reasons else f"{_NO_PLUG_IN} (EDGEMOE_CUDA=1 pip install . builds it)"
    return [f"no CUDA device: {why}"]


@dataclass(frozen=True, slots=True)
class Seen:
    """A line about a device, or about why there is none, and what helps."""

    text: str
    is_device: bool
    cure: str = ""


def looked_at() -> list[Seen]:
    """Returns lines about this machine's devices: the plug-in and driver, then each device with its link's speed."""
    out = []
    paths = plug_ins()
    if not paths:
        return [Seen(f"no CUDA device: {_NO_PLUG_IN}", False, _cure(_NO_PLUG_IN))]
    for path in paths:
        probe = _core.probe_device(str(path))
        if why := probe["why_not"]:
            out.append(Seen(f"no CUDA device: {why}", False, _cure(why)))
            continue
        driver, runtime = (
            f"{v // 1000}.{v % 1000 // 10}" for v in (probe["driver"], probe["runtime"])
        )
        out = [Seen(f"{path.name} for CUDA {runtime}, driver for CUDA {driver}", False)]
        return out + [_seen(path, i) for i in range(probe["num_devices"])]
    return out


def _seen(path: Path, ordinal: int) -> Seen:
    line = _line(path, ordinal)
    try:
        device = _core.Device(str(path), ordinal, 4 * _LINK_BYTES)
        info = device.info
        link, _ = device.measure(_LINK_BYTES)
    except (DeviceError, OutOfBudget) as error:
        return Seen(
            line, False, _cure(str(error)) or "nvidia-smi names the programs that have its memory"
        )
    cure = f"--device cuda:{ordinal} uses it; the answer is the same"
    if info["is_unified"]:
        return Seen(line, True, cure)
    line = f"{line}, link {link / 1e9:.1f} GB/s"
    if info["free_bytes"] < _LITTLE_FREE * info["total_bytes"]:
        cure = f"nvidia-smi names the programs that have the rest; {cure}"
    if link < _SLOW_LINK:
        cure = f"a slot with more lanes makes the link faster (nvidia-smi -q says which it has); {cure}"
    return Seen(line, True, cure)


def _cure(why: str) -> str:
    return next((cure for part, cure in _CURES if part in why), "")


def _line(path: Path, ordinal: int) -> str:
    try:
        info = _core.Device(str(path), ordinal, 0).info
    except DeviceError as error:
        return str(error)
    major, minor = info["capability"]
    free, total = info["free_bytes"] / 2**30, info["total_bytes"] / 2**30
    shared = ", memory shared with the processor" if info["is_unified"] else ""
    return f"cuda:{ordinal}  {info['name']} ({major}.{minor}), {free:.1f} of {total:.1f} GiB free{shared}"
