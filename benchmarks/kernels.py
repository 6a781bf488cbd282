"""Measures the speed of the matrix kernels at every level, compared with the memory roof.

    python benchmarks/kernels.py [--threads 1 2] [--isa avx512 avx2] [--tokens 1 64] [--scheme nested mwq mxfp4]

Weights of 1 GiB at 8 bits are read in turn, so that nothing comes from a cache; with `--small`, one matrix that fits
in the second-level cache, which shows what the instructions alone cost. GB/s are of planes and scales.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from float4 import rounded

from edgemoe import _core
from edgemoe.quant import SCHEMES, plane_widths


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--isa", nargs="+", default=_core.usable_isas().split()[:1])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1])
    parser.add_argument("--cols", type=int, default=2048)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--scheme", nargs="+", default=["nested"], choices=list(SCHEMES))
    args = parser.parse_args()
    rows, cols = (256 if args.small else 16384), args.cols
    count = 1 if args.small else max(1, (1 << 30) // (rows * cols))
    rng = np.random.default_rng(0)
    w = rng.standard_normal((rows, cols), np.float32)
    near = rounded(w)  # values that schemes of 4-bit floats can hold
    stored = [
        (
            scheme,
            ladder,
            scheme.quantize(
                w if scheme.dense is None else near, ladder, second_moments=None, threads=2
            ),
        )
        for scheme in map(SCHEMES.__getitem__, args.scheme)
        for ladder in scheme.ladders
    ]
    print("| isa | threads | tokens | scheme | bits | Gweights/s | GB/s | of roof |")
    print("|---|---|---|---|---|---|---|---|")
    for isa in args.isa:
        _core.use_isa(isa)
        for threads in args.threads:
            roof = _core.memory_rate(1 << 30, threads)
            for tokens in args.tokens:
                ws = _core.Workspace(threads, tokens, cols, 64, 1, 16)
                x = rng.standard_normal((tokens, cols), np.float32)
                out = np.empty((tokens, rows), np.float32)
                levels = [
                    (scheme, ladder[: n + 1], rungs[: n + 1])
                    for scheme, ladder, rungs in stored
                    for n in range(len(ladder))
                ]
                for scheme, ladder, rungs in levels:
                    matrices = [
                        _core.Nested.from_rungs(
                            rungs,
                            rows,
                            cols,
                            plane_widths(ladder),
                            scheme.name,
                            scheme.row_scales,
                        )
                        for _ in range(count)
                    ]
                    passes = 300 if args.small else 3
                    times = []
                    for _ in range(5):
                        start = time.perf_counter()
                        for _ in range(passes):
                            for m in matrices:
                                _core.linear(ws, x, [m], [out])
                        times.append((time.perf_counter() - start) / passes / count)
                    seconds = statistics.median(times)
                    size = sum(scheme.rung_bytes(rows, cols, ladder))
                    print(
                        f"| {isa} | {threads} | {tokens} | {scheme.name} | {ladder[-1]} "
                        f"| {rows * cols * tokens / seconds / 1e9:.1f} "
                        f"| {size / seconds / 1e9:.1f} | {100 * size / seconds / roof:.0f}% |"
                    )


if __name__ == "__main__":
    main()
