"""Estimates what a token costs on a device, without one: the host's own work, and what the device would have to do.

    python benchmarks/device_host.py olmoe qwen3-30b [--tokens 100]

Runs a model of a published shape, whose weights are holes in a file, on a device that does nothing but count. So the
measured time of a token is the host's: Python, the queueing of kernels, the choice of experts and the plan. Kernels and
bytes are counted. The time on a card is then estimated as bytes divided by its bandwidth, plus a gap for every kernel,
plus the host's time where the device waits for it. No card was measured.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from synth import SHAPES, attention

import edgemoe
from edgemoe.config import ModelConfig
from edgemoe.file.hollow import write_hollow
from edgemoe.quant import SCHEMES

ROOT = Path(__file__).resolve().parents[1]
SHAPES_TOO = {
    # Qwen/Qwen3-30B-A3B
    "qwen3-30b": ModelConfig(
        family="qwen3_moe", vocab_size=151936, hidden_size=2048, context_length=8192,
        **attention(48, 32, 4, 128, qk_norm="head"), num_experts=128, experts_per_token=8, expert_hidden=768,
        moe_layers=tuple(range(48)), renormalise=True, tied=False, norm_eps=1e-6,
    ),
}  # fmt: skip
CARDS = {
    "272 GB/s, 8 GiB (4060)": (272e9, 8),
    "360 GB/s, 12 GiB (3060)": (360e9, 12),
    "1008 GB/s, 24 GiB (4090)": (1008e9, 24),
    "102 GB/s, 8 GiB (Orin Nano)": (102e9, 8),
}
REACHED = 0.75  # share of a card's bandwidth that kernels are assumed to reach
BETWEEN_US = 2.5  # assumed gap from one kernel's end to the next one's start, in a full queue
POSITION = 1024  # of the token that is predicted
STAGES = {  # whether work is repeated, and whether layers run ahead
    "each kernel is queued by the host": (False, False),
    "what stands between two choices is repeated": (True, False),
    "the device chooses": (True, True),
}


class Counts(ctypes.Structure):
    """The counters of tests/cudasim/idle.cpp."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("launches", "weights", "states", "copies_in", "copies_out")
    ]


def plug_in(folder: Path) -> str:
    """Builds the plug-in whose device does nothing in a folder, and returns its path."""
    out = folder / "libedgemoe_idle.so"
    command = ["c++", "-std=c++17", "-O2", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(ROOT / "tests/cudasim/idle.cpp"), "-o", str(out)], check=True)
    return str(out)


def one(name: str, config: ModelConfig, library: str, folder: Path, tokens: int) -> None:
    """Prints what a token costs if the device holds all experts, in stages that need the host less and less."""
    path = folder / f"{name}.moe"
    write_hollow(path, config, bits=6, scheme=SCHEMES["nested"], sections={})
    with edgemoe.load(
        path, device="cuda", plug_in=library, vram="40GiB", context=POSITION + tokens, bits=4, verify=False,
    ) as engine:  # fmt: skip
        ops: Any = engine.model.ops
        for stage, (ops.repeats, ops.runs_ahead) in STAGES.items():
            print(f"{name}: {stage}")
            stage_of(engine, config, library, tokens, waits=not ops.runs_ahead)
    path.unlink()


def stage_of(
    engine: edgemoe.Engine, config: ModelConfig, library: str, tokens: int, *, waits: bool
) -> None:
    """Prints the cost for one stage.

    Args:
        waits: the device waits for the host in every layer.
    """
    params = edgemoe.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    count = ctypes.CDLL(library).edgemoe_idle_counts
    before, after, times = Counts(), Counts(), []
    for _ in range(5):
        at, stamps = time.perf_counter(), []
        for _ in engine.generate([1, 2, 3], params):
            stamps.append(time.perf_counter() - at)
            at = time.perf_counter()
            count(ctypes.byref(before if len(stamps) == tokens // 2 else after))
        times.append(statistics.median(stamps[1:]))
    n, layers, host = tokens - tokens // 2, config.num_layers, statistics.median(times)
    each = {key: (getattr(after, key) - getattr(before, key)) / n for key, _ in Counts._fields_}
    print(
        f"    host {host * 1e6 / layers:.1f} us per layer and token ({min(times) * 1e6 / layers:.1f} at least), "
        f"{host * 1e6:.0f} us a token; {each['launches']:.0f} kernels, {each['weights'] / 1e9:.3f} GB of weights, "
        f"{each['copies_in']:.0f} copies in, {each['copies_out']:.0f} out"
    )
    states = each["states"] * POSITION / (tokens * 3 / 4 + 3)  # grow with the position
    size = engine.model.device.stats["used_bytes"] / 2**30
    rates = []
    for card, (bandwidth, memory) in CARDS.items():
        read = (each["weights"] + states) / (REACHED * bandwidth)
        gaps = each["launches"] * BETWEEN_US * 1e-6
        rate = f"{1 / (read + gaps + (host if waits else 0)):.0f}"
        rates.append(f"{rate if size < memory else 'too large'} on {card}")
    print(f"    tok/s: {'; '.join(rates)}")


def main() -> None:
    """Prints the costs for each shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    shapes = {**SHAPES, **SHAPES_TOO}
    parser.add_argument("shapes", nargs="+", choices=shapes)
    parser.add_argument("--tokens", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        library = plug_in(Path(folder))
        for name in args.shapes:
            one(name, shapes[name], library, Path(folder), args.tokens)


if __name__ == "__main__":
    main()
