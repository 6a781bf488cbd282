"""The speed of this machine, measured once and kept: memory, kernels, and the overhead of a layer."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

import edgemoe
from edgemoe import _core, hardware, library
from edgemoe.config import ModelConfig
from edgemoe.file.format import ALIGNMENT, MoeFile
from edgemoe.file.hollow import write_hollow
from edgemoe.file.whole import write_whole
from edgemoe.quant import SCHEMES, Scheme, plane_widths
from edgemoe.runtime.engine import Engine
from edgemoe.runtime.options import EngineOptions
from edgemoe.specs import AttentionSpec, RopeSpec
from edgemoe.store import read_rate

__all__ = ["Pace", "disk_pace", "pace"]

_KEPT_S = 7 * 86400  # a machine's speed changes: its kernel, neighbours, firmware
_FILE = "machine.json"
_ROWS, _COLS, _COUNT = 2048, 2048, 12  # matrices of 48 MiB at 8 bits, more than most caches hold
_MEMORY_BYTES = 96 << 20
_ROUNDS, _PASSES = 4, 4
_PARKED_S = 0.001  # until waiting threads have parked, and their processor time is accounted
_SMALL = ModelConfig(
    family="a plan", vocab_size=256, hidden_size=64, context_length=256, num_layers=8,
    mixers=(AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=32, scale=1.0, rope=RopeSpec(dim=32)),),
    layer_mixers=(0,) * 8, num_experts=8, experts_per_token=8, expert_hidden=32,
    moe_layers=tuple(range(8)), tied=True, norm_eps=1e-5,
)  # fmt: skip
"""A model with hardly any weights, so that its time per layer is nearly all overhead."""
_TOKENS = 48
_PROBE_BYTES, _PROBE_LEAST = 192 << 20, 16  # a probe's least: bytes, and number of reads


@dataclass(frozen=True, slots=True)
class Pace:
    """The speed of this machine."""

    memory: float
    """Memory bandwidth: bytes per second that all threads read together."""
    kernels: Mapping[int, float]
    """Bytes of weights per second in the product of matrices with one token, by the bits of a scheme's levels."""
    layer_s: float
    """Overhead of a layer in seconds: its time for one token, apart from weights."""
    measured: float = field(default_factory=time.time)
    """When it was measured, in seconds since 1970."""

    def kernel(self, bits: float) -> float:
        """Returns the kernels' rate at a level, in bytes per second; at the nearest one if it was not measured."""
        return self.kernels[min(self.kernels, key=lambda level: abs(level - bits))]


def pace(scheme: Scheme) -> Pace:
    """Returns the speed of this machine with a quantisation scheme's matrices.

    It is measured, and kept in the cache folder for a week. Measuring takes about a second and 100 MiB.
    """
    key, kept = _machine(scheme), _read()
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
        found = kept["paces"][key]  # type: ignore[index]
        known = Pace(
            memory=float(found["memory"]), layer_s=float(found["layer_s"]), measured=float(found["measured"]),
            kernels={int(bits): float(rate) for bits, rate in found["kernels"].items()},
        )  # fmt: skip
        values = (known.memory, known.layer_s, *known.kernels.values())
        is_fresh = 0 <= time.time() - known.measured < _KEPT_S
        if known.kernels and min(values) > 0 and is_fresh:
            return known
    threads = hardware.num_threads()
    kernels = _kernels(scheme, threads)
    memory = max(_core.memory_rate(_MEMORY_BYTES, threads), *kernels.values())
    measured = Pace(memory=memory, kernels=kernels, layer_s=_layer_s())
    hardware.trim()
    _keep("paces", key, asdict(measured))
    return measured


def disk_pace(moe: MoeFile | None, folder: Path, size: int) -> float | None:
    """Returns the bytes per second of direct reads of `size` bytes at scattered places.

    Args:
        moe: a file to measure with, for some tenths of a second; None to use what was measured earlier.
        folder: is on the disk in question, if `moe` is None.
        size: bytes of one read.

    Returns:
        None if nothing was measured with reads of about this size.
    """
    device = f"{os.stat(folder if moe is None else moe.path).st_dev:x}"
    if moe is not None:
        size = min(size, moe.file_bytes // 2 // ALIGNMENT * ALIGNMENT)
        if not size:
            return None
        rate = read_rate(moe, size, total=max(_PROBE_BYTES, _PROBE_LEAST * size))
        _keep("disks", f"{device}:{size}", [rate, time.time()])
        return rate
    # By how far sizes differ. The range reaches further down, as a larger read is as fast or faster.
    near: dict[float, float] = {}
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
        for key, (rate, when) in _read()["disks"].items():  # type: ignore[attr-defined]
            of, _, length = key.partition(":")
            if (
                of == device
                and 0 <= time.time() - when < _KEPT_S
                and size / 8 <= int(length) <= 2 * size
            ):
                near[max(int(length) / size, size / int(length))] = float(rate)
    return near[min(near)] if near else None


def _kernels(scheme: Scheme, threads: int) -> dict[int, float]:
    """Measures the product of matrices with one token at every level of a scheme; returns bytes per second by bits.

    It uses the processor time of all threads together. On a machine that others use too, elapsed time would show half
    or a quarter of a core's speed.
    """
    scheme = SCHEMES[scheme.name]  # without corrections and row scales: they cost a few per cent
    ladder = scheme.ladders[0]
    sizes = scheme.rung_bytes(_ROWS, _COLS, ladder)
    # The byte 0x11 also makes the scales: small floats, none of them special (NaN, infinite, denormal).
    planes = [np.full(size, 0x11, np.uint8) for size in sizes]
    workspace = _core.Workspace(threads, 1, _COLS, 64, 1, 16)
    x, out = np.ones((1, _COLS), np.float32), np.zeros((1, _ROWS), np.float32)
    rates = {}
    for level, bits in enumerate(ladder, 1):
        matrices = [
            _core.Nested.from_rungs(
                planes[:level], _ROWS, _COLS, plane_widths(ladder)[:level], scheme.name, scheme.row_scales
            )
            for _ in range(_COUNT)
        ]  # fmt: skip
        times = []
        for _ in range(_ROUNDS):
            time.sleep(_PARKED_S)
            start = time.process_time()
            for matrix in matrices * _PASSES:
                _core.linear(workspace, x, [matrix], [out])
            time.sleep(_PARKED_S)
            times.append(time.process_time() - start)
        rates[bits] = _PASSES * _COUNT * sum(sizes[:level]) * threads / min(times)
    return rates


def _layer_s() -> float:
    """Measures the overhead of a layer in seconds, with the engine itself."""
    with tempfile.TemporaryDirectory(prefix="edgemoe-pace-") as folder:
        path = Path(folder) / "pace.moe"
        write_hollow(path, _SMALL, scheme=SCHEMES["nested"], sections={})
        with Engine(path, EngineOptions(context=_TOKENS + 16, verify=False)) as engine:
            engine.logits([1], last_only=True)
            times = []
            for token in range(_TOKENS):
                start = time.perf_counter()
                engine.extend([token])
                times.append(time.perf_counter() - start)
    return sorted(times)[_TOKENS // 4] / _SMALL.num_layers  # a quartile, as others use the machine


def _machine(scheme: Scheme) -> str:
    """Returns the key of kept figures: the processor, threads, instruction set, scheme, version and compiler."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), ""
    )
    return (
        f"{model or platform.machine()}, {hardware.num_threads()} threads, {hardware.isa()}, {scheme.name}, "
        f"edgemoe {edgemoe.__version__}, {_core.compiler()}"
    )


def _read() -> dict[str, object]:
    try:
        content = json.loads((library.cache_dir() / _FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _keep(kind: str, key: str, value: object) -> None:
    """Keeps a figure in the cache folder; if that cannot be written, it is measured again the next time."""
    kept = _read()
    of_kind = kept.get(kind)
    kept[kind] = {**(of_kind if isinstance(of_kind, dict) else {}), key: value}
    with contextlib.suppress(OSError):
        path = library.cache_dir() / _FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(kept, indent=1).encode())
