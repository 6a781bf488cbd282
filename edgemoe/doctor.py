"""Checks of this machine and this installation: findings, each with its remedy."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

import edgemoe
from edgemoe import devices, hardware, library
from edgemoe.errors import EdgemoeError, size_text
from edgemoe.file.format import MoeFile
from edgemoe.file.reader import open_moe
from edgemoe.store import read_rate

__all__ = ["Finding", "findings", "private"]

_EXTRAS = {
    "serve": ("starlette", "uvicorn", "sse_starlette", "msgspec", "llguidance"),
    "demo": ("gguf", "scipy"),
    "lab": ("matplotlib",),
}
_RATE_SIZES = (64 << 10, 512 << 10, 4 << 20)
_RATE_BYTES = 64 << 20  # read at each size
_SAMPLE = 64  # rungs of a model whose checksums are checked
_SLOW_DISK = 400e6  # bytes per second
_LITTLE_DISK = 5 << 30
_REMOTE = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "9p",
    "drvfs",
    "fuse",
    "fuseblk",
    "fuse.sshfs",
    "virtiofs",
}
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD")
_PORT = 8080


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    kind: str
    """"ok", "note" or "problem"."""
    subject: str
    text: str
    cure: str = ""
    """What repairs it; "" where nothing needs repair."""


def findings(
    model: Path | None = None,
    *,
    unknown_variables: Sequence[str] = (),
    verify: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Finding]:
    """Yields the findings, the most general first. Reads up to 192 MiB of one model to measure the disk.

    Args:
        model: a model to check besides the kept ones, with which the disk is measured; None for no other: the disk is
            measured with the largest kept one.
        unknown_variables: lines about EDGEMOE_ variables that no program reads.
        verify: check every checksum of every model, not a sample.
        progress: is told how many bytes of a model have been verified, and the total.
    """
    yield from _install()
    yield from _processor()
    yield from _memory()
    yield from _devices()
    yield from _settings(unknown_variables)
    yield from _hub()
    yield from _terminal()
    yield from _port()
    yield from _folders()
    opened: list[MoeFile] = []
    for name, path in _paths(model):
        finding, moe = _model(name, path, verify, progress)
        yield finding
        if moe is not None:
            opened.append(moe)
    for unfinished in library.unfinished():
        yield Finding(
            "note", "model", f"{unfinished.name} is unfinished, {size_text(unfinished.size)} on the disk",
            f"the command that made it goes on; edgemoe rm {unfinished.name} removes it",
        )  # fmt: skip
    measured = [m for m in opened if m.path == model] or opened
    if measured:
        yield from _disk(max(measured, key=lambda m: m.file_bytes))


def private(text: str) -> str:
    """Returns a text without paths outside edgemoe's cache, addresses of other hubs and texts of EDGEMOE_ variables."""
    text = re.sub(r"(EDGEMOE_\w+=)(?![0-9.]+[A-Za-z%]{0,3}$).*", r"\1(set)", text)
    text = re.sub(r"https?://(?!huggingface\.co\b)[^\s,;]+", "(another hub)", text)
    with contextlib.suppress(FileNotFoundError):
        text = text.replace(str(library.cache_dir()), "CACHE")
    for folder in _model_folders():
        text = text.replace(str(folder), "MODELS")
    return re.sub(r"(?<![\w.:/])~?/(?!/)[^\s:;,()]+", "(a path)", text)


def _install() -> Iterator[Finding]:
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    yield Finding(
        "ok", "edgemoe", f"{edgemoe.__version__}, Python {platform.python_version()}, {system}"
    )
    missing = [
        name
        for name, modules in _EXTRAS.items()
        if any(importlib.util.find_spec(module) is None for module in modules)
    ]
    have = [name for name in _EXTRAS if name not in missing]
    if missing:
        what = {"serve": "edgemoe serve", "demo": "the demo and GGUF files", "lab": "plots"}
        yield Finding(
            "note", "extras", f"{', '.join(have) or 'none'}; without {', '.join(what[m] for m in missing)}",
            f'pip install "edgemoe[{",".join(missing)}]"',
        )  # fmt: skip
    else:
        yield Finding("ok", "extras", ", ".join(have))


def _processor() -> Iterator[Finding]:
    flags = _cpu_flags()
    used, cores = hardware.isa(), hardware.num_threads()
    text = f"{cores} cores, {used}"
    best = "avx512" if {"avx512f", "avx512bw", "avx512vnni"} <= flags else "avx2"
    if platform.machine() == "x86_64" and "avx2" not in flags:
        yield Finding(
            "note", "processor", f"{text}: it has no AVX2, or an emulator hides it",
            "every answer is the same, slowly; under a virtual machine, pass the host's processor through",
        )  # fmt: skip
    elif used == "scalar" or (best == "avx512" and used == "avx2"):
        yield Finding(
            "problem", "processor", f"{text}, though it has {best}",
            "build with a compiler that knows it: pip install --no-cache-dir --force-reinstall .",
        )  # fmt: skip
    else:
        yield Finding("ok", "processor", text)
    allowed = len(os.sched_getaffinity(0))
    physical = psutil.cpu_count(logical=False) or allowed
    if cores < min(allowed, physical):
        yield Finding(
            "note", "processor", f"a quota leaves {cores} of {min(allowed, physical)} cores",
            "docker --cpus, or CPUQuota= of a systemd unit, raises it",
        )  # fmt: skip
    governor = _first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor == "powersave" and not Path("/sys/devices/system/cpu/intel_pstate").is_dir():
        yield Finding(
            "note", "processor", "the governor powersave keeps it slow",
            "cpupower frequency-set -g performance",
        )  # fmt: skip


def _memory() -> Iterator[Finding]:
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    free = hardware.available_bytes()
    yield Finding("ok", "memory", f"{size_text(free)} of {size_text(memory.total)} can be had")
    if free < 0.8 * memory.available:
        yield Finding(
            "note", "memory", f"a control group allows {size_text(free)}, less than the {size_text(memory.available)} "
            "free",
            "docker -m, or MemoryMax= of a systemd unit, raises it; --ram stays below it by itself",
        )  # fmt: skip
    if swap.used > 256 << 20:
        yield Finding(
            "note", "memory", f"{size_text(swap.used)} are swapped out: this machine has promised too much",
            "a smaller --ram, or fewer other programs",
        )  # fmt: skip
    if _first_line("/proc/sys/vm/overcommit_memory") == "2":
        yield Finding(
            "note", "memory", "the kernel promises no more than it has (vm.overcommit_memory=2)",
            "if a start says that the system refused memory: sysctl vm.overcommit_memory=0",
        )  # fmt: skip
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        yield Finding(
            "note", "memory", f"ulimit -v allows {size_text(limit)} of addresses, which is not memory",
            "ulimit -v unlimited; --ram bounds what is taken",
        )  # fmt: skip


def _devices() -> Iterator[Finding]:
    wanted = bool(devices.plug_ins())  # whoever has built a plug-in expects a device
    for seen in devices.looked_at():
        kind = "note" if seen.is_device else "problem" if wanted and seen.cure else "ok"
        yield Finding(kind, "device", seen.text, seen.cure)


def _settings(unknown: Sequence[str]) -> Iterator[Finding]:
    for name in sorted(os.environ):
        if name.startswith("EDGEMOE_") and not any(line.startswith(f"{name} ") for line in unknown):
            value = "(set)" if _SECRET.search(name) else os.environ[name]
            yield Finding("ok", "environment", f"{name}={value}")
    for line in unknown:
        yield Finding("problem", "environment", line, f"unset {line.split()[0]}")


def _hub() -> Iterator[Finding]:
    cached = os.environ.get("HF_HUB_CACHE") or Path(
        os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface", "hub"
    )
    folder = Path(cached)
    token = bool(os.environ.get("HF_TOKEN")) or folder.parent.joinpath("token").is_file()
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    repos = len(list(folder.glob("models--*"))) if folder.is_dir() else 0
    text = f"{endpoint}, {'a' if token else 'no'} token, {repos} models in Hugging Face's cache"
    if not endpoint.startswith(("http://", "https://")):
        yield Finding("problem", "hub", "HF_ENDPOINT is no address like https://huggingface.co",
                      "unset HF_ENDPOINT")  # fmt: skip
    elif os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        yield Finding("note", "hub", f"{text}; HF_HUB_OFFLINE is set: pull fetches nothing",
                      "unset HF_HUB_OFFLINE")  # fmt: skip
    else:
        yield Finding("ok", "hub", text)


def _terminal() -> Iterator[Finding]:
    encoding = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "")
    if encoding != "utf8":
        yield Finding(
            "problem", "terminal", f"the locale's encoding is {encoding or 'unknown'}: replies show ? for letters",
            "export LC_ALL=C.UTF-8",
        )  # fmt: skip
    else:
        yield Finding("ok", "terminal", f"UTF-8, TERM={os.environ.get('TERM', '')}")


def _port() -> Iterator[Finding]:
    with socket.socket() as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", _PORT))
        except OSError:
            yield Finding(
                "note", "port", f"{_PORT}, the default of edgemoe serve, is taken",
                "edgemoe serve --port 0 takes a free one",
            )  # fmt: skip
        else:
            yield Finding("ok", "port", f"{_PORT} is free")


def _folders() -> Iterator[Finding]:
    for folder in _model_folders():
        there = folder
        while not there.exists():
            there = there.parent
        free, kind = shutil.disk_usage(there).free, _file_system(there)
        text = f"{folder}: {kind}, {size_text(free)} free"
        if not os.access(there, os.W_OK):
            yield Finding("problem", "models", f"{text}; cannot be written",
                          "EDGEMOE_MODELS=FOLDER names another")  # fmt: skip
        elif kind in _REMOTE:
            yield Finding("note", "models", f"{text}; each expert that is not in memory comes over it",
                          "EDGEMOE_MODELS=FOLDER on a disk of this machine")  # fmt: skip
        elif free < _LITTLE_DISK:
            yield Finding("note", "models", text, "edgemoe list and edgemoe rm make room")
        else:
            yield Finding("ok", "models", text)


def _paths(model: Path | None) -> list[tuple[str, Path]]:
    kept = [(m.name, m.path) for m in library.models()]
    known = any(path == model for _, path in kept)
    return kept if model is None or known else [*kept, (model.name, model)]


def _model(
    name: str, path: Path, verify: bool, progress: Callable[[int, int], None] | None
) -> tuple[Finding, MoeFile | None]:
    from edgemoe.file.verify import verify as verified

    try:
        moe = open_moe(path)
        broken = verified(moe, progress=progress, sample=None if verify else _SAMPLE)
    except (EdgemoeError, OSError) as error:
        # Errors begin with the path, which the name replaces: the folder is private.
        why = str(error).removeprefix(f"{path}: ")
        return Finding("problem", "model", f"{name}: {why}", _mended(name, path)), None
    if broken:
        return (
            Finding("problem", "model", f"{name}: {broken[0]}: the sum does not match",
                    f"edgemoe inspect {name} --verify lists all; {_mended(name, path)}"),
            None,
        )  # fmt: skip
    text = (
        f"{name}: {size_text(moe.file_bytes)}, {moe.config.family}, "
        f"{'every checksum matches' if verify else 'sound as far as looked at'}"
    )
    if "quality" not in moe.sections:
        return Finding("note", "model", f"{text}; what fewer bits cost was not measured",
                       f"edgemoe quality {name} --store"), moe  # fmt: skip
    return Finding("ok", "model", text), moe


def _mended(name: str, path: Path) -> str:
    """Returns how to replace a broken model."""
    if any(path == kept.path for kept in library.models()):
        return f"edgemoe rm {name}, and pull or convert it again"
    return "where it should be a model: convert or copy it again"


def _disk(moe: MoeFile) -> Iterator[Finding]:
    rates = [(size, read_rate(moe, size, total=_RATE_BYTES)) for size in _RATE_SIZES
             if 2 * size <= moe.file_bytes]  # fmt: skip
    if not rates:
        return
    text = ", ".join(f"{rate / 1e9:.2f} GB/s at {size_text(size)}" for size, rate in rates)
    if not moe.file.is_direct:
        yield Finding(
            "note", "disk", f"{text}; direct reads do not work on {_file_system(moe.path)}: pages are kept twice",
            "keep models on ext4, xfs or another file system of a disk",
        )  # fmt: skip
    elif rates[-1][1] < _SLOW_DISK:
        yield Finding("note", "disk", f"{text}: slow for models that do not fit in memory",
                      "an SSD, or fewer bits, so that more experts fit")  # fmt: skip
    else:
        yield Finding("ok", "disk", f"{text}, direct reads")


def _model_folders() -> list[Path]:
    try:
        return library.folders()
    except FileNotFoundError:
        return []


def _file_system(path: Path) -> str:
    """Returns the type of the file system that holds a path, such as "ext4"."""
    best, kind = "", "unknown"
    target = os.path.realpath(path)
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, where, name, *_ = line.split()
            where = where.replace("\\040", " ")
            inside = target == where or target.startswith(where.rstrip("/") + "/")
            if inside and len(where) >= len(best):
                best, kind = where, name
    return kind


def _cpu_flags() -> set[str]:
    line = next((t for t in _lines("/proc/cpuinfo") if t.startswith(("flags", "Features"))), "")
    return set(line.partition(":")[2].replace("avx512_vnni", "avx512vnni").split())


def _first_line(path: str) -> str:
    return next(iter(_lines(path)), "").strip()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
