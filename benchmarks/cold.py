"""Decodes with no expert in memory, then again with what is loaded, and prints the speed of each stretch of tokens.

    python benchmarks/cold.py MODEL.moe [--bits 4] [--threads 2] [--drop]

`--drop` empties the page cache first (needs root). Tokens are random, so that every stretch chooses new experts.
"""

from __future__ import annotations

import argparse
import time

import limits
import numpy as np

import edgemoe

_STRETCH, _STRETCHES = 64, 4


def rates(engine: edgemoe.Engine, ids: np.ndarray) -> list[float]:
    """Returns the tokens per second of each stretch."""
    engine.logits(ids[:1])
    out = []
    for stretch in ids[1:].reshape(_STRETCHES, _STRETCH):
        start = time.perf_counter()
        for token in stretch:
            engine.extend(np.array([token]))
        out.append(_STRETCH / (time.perf_counter() - start))
    return out


def main() -> None:
    """Prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--drop", action="store_true", help="empty the page cache first")
    args = parser.parse_args()
    if args.drop:
        limits.drop_caches()
    options = {"threads": args.threads, "bits": args.bits, "dense_bits": args.bits, "context": 512}
    with edgemoe.load(args.model, **options) as engine:
        rng = np.random.default_rng(3)
        ids = rng.integers(0, engine.config.vocab_size, 1 + _STRETCH * _STRETCHES)
        for name in ("cold", "warm", "again"):
            row = rates(engine, ids)
            print(f"| {name} | {' | '.join(f'{rate:.1f}' for rate in row)} |", flush=True)


if __name__ == "__main__":
    main()
