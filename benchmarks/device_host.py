"""The host's own work for each layer and token beside a device, with one that does nothing.

    python benchmarks/device_host.py MODEL.moe [--tokens 200]

Kernels and copies take no time there, so that what a token takes is the host's: Python, the queueing of kernels, the
choice of experts and the plan. All experts are on the device. The model's shape matters little, its layers much:
`synth.py tiny` writes one that does.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import edgemoe
from edgemoe.file.format import open_moe

ROOT = Path(__file__).resolve().parents[1]


def plug_in(folder: Path) -> str:
    """Returns the path of the plug-in whose device does nothing, built there."""
    out = folder / "libedgemoe_idle.so"
    subprocess.run(
        ["c++", "-std=c++17", "-O2", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}", str(ROOT / "tests/cudasim/idle.cpp"),
         "-o", str(out)], check=True,
    )  # fmt: skip
    return str(out)


def main() -> None:
    """Prints microseconds per layer and token: the median, and the quickest of ten parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    layers = open_moe(args.model).config.num_layers
    params = edgemoe.SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        edgemoe.load(
            args.model, device="cuda", plug_in=plug_in(Path(folder)), vram="6GiB", context=512
        ) as engine,
    ):
        parts = []
        for _ in range(10):
            at, stamps = time.perf_counter(), []
            for _ in engine.generate([1, 2, 3], params):
                stamps.append(time.perf_counter() - at)
                at = time.perf_counter()
            parts.append(statistics.median(stamps[1:]) * 1e6 / layers)
        stats = engine.stats
    print(
        f"{args.model}: {layers} layers, {statistics.median(parts):.1f} us per layer and token, "
        f"{min(parts):.1f} at least; {stats.device_hits} of {stats.hits + stats.misses} experts on the device",
        file=sys.stdout,
    )


if __name__ == "__main__":
    main()
