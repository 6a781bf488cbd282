"""Measures what recording a trace costs a decoding engine, in blocks of tokens with and without it, in turns.

python benchmarks/trace.py MODEL.moe [--share 50] [--bits N] [-n TOKENS]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from replay import opened

BLOCK = 16  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--share", type=float, default=50)
    parser.add_argument("--bits", type=int)
    parser.add_argument("-n", type=int, default=1024)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, opened(args, args.share / 100) as engine:
        path = Path(folder) / "x.trace"
        engine.record(path)
        writer = engine.model.experts.observer
        ids = np.random.default_rng(1).integers(0, engine.config.vocab_size, args.n)
        engine.logits(ids[:64], last_only=True)
        times: dict[bool, list[float]] = {False: [], True: []}
        ratios = []
        for first in range(64, args.n - 2 * BLOCK, 2 * BLOCK):
            spent = {}
            # Which comes first alternates too: a longer context is slower.
            order = (False, True) if first // (2 * BLOCK) % 2 else (True, False)
            for half, is_on in enumerate(order):
                engine.model.experts.observer = writer if is_on else None
                start = time.perf_counter()
                for i in range(BLOCK):
                    at = first + half * BLOCK + i
                    mark = time.perf_counter()
                    engine.extend(ids[at : at + 1])
                    times[is_on].append(time.perf_counter() - mark)
                spent[is_on] = time.perf_counter() - start
            ratios.append(spent[True] / spent[False])
        engine.model.experts.observer = writer
        fits = engine.budget.slots / engine.budget.experts
        engine.close()
        size = path.stat().st_size / (64 + len(times[True]))
    low, middle, high = (100 * (float(np.percentile(ratios, q)) - 1) for q in (25, 50, 75))
    without, with_ = (1e3 * statistics.median(times[is_on]) for is_on in (False, True))
    print(
        f"{100 * fits:.0f}% of the experts fit; median token {without:.2f} ms without, {with_:.2f} ms with; pairs of "
        f"blocks {middle:+.1f}% (quartiles {low:+.1f}%, {high:+.1f}%, {len(ratios)} pairs); {size:.0f} bytes per token"
    )


if __name__ == "__main__":
    sys.exit(main())
