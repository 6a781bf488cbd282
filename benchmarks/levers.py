"""Measures schedulers and levers on a model: speed, reads, hits and quality while decoding a text.

    python benchmarks/levers.py MODEL.moe --text FILE --room 0.25
    python benchmarks/levers.py MODEL.moe --text FILE --run hobbit t1=0.4 t2=0.8 --run on-demand miss_bits=4

Every run decodes the same text token by token after the same prompt, with slots for the given share of all experts at
the file's bits; `bits=4` among the options is `--bits 4` with the same memory.
Perplexity and the mean KL divergence are against the exact run, which comes first.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import edgemoe
from edgemoe.budget import Budget
from edgemoe.engine import Engine
from edgemoe.format import open_moe
from edgemoe.store import expert_bytes

_RUNS = [
    ["on-demand", "look_ahead=off"], ["on-demand"], ["on-demand", "look_ahead=off", "eviction=next-use"],
    ["on-demand", "eviction=next-use"], ["expertwise"], ["expertflow"], ["auto"],
    ["on-demand", "bits=6", "eviction=next-use"], ["on-demand", "bits=4", "eviction=next-use"],
    ["hobbit"], ["hobbit", "look_ahead=0"], ["hobbit", "eviction=next-use", "look_ahead=0"],
    ["d2moe"], ["mc"], ["mc", "beta=0.3", "layers=99"],
    ["on-demand", "miss_bits=4", "eviction=next-use"], ["on-demand", "miss_bits=6", "eviction=next-use"],
    ["on-demand", "cache_prior=0.1", "eviction=next-use"], ["on-demand", "cache_prior=0.3", "eviction=next-use"],
    ["on-demand", "top_p=0.9", "eviction=next-use"], ["on-demand", "top_p=0.8", "eviction=next-use"],
    ["on-demand", "skip_below=0.3", "eviction=next-use"],
]  # fmt: skip
_WARM = 40  # decoded tokens that are not counted


def load(args: argparse.Namespace, run: list[str]) -> Engine:
    """Opens the model with room for exactly the share of experts, whatever else the process takes."""
    options = dict(text.split("=", 1) for text in run[1:])
    bits = options.pop("bits", None)
    moe = open_moe(args.model)
    total = moe.config.num_experts * len(moe.config.moe_layers)
    room = int(args.room * total * expert_bytes(moe, len(moe.ladder)))
    Budget.slots = property(lambda b: room)  # type: ignore[assignment,method-assign]
    return edgemoe.load(
        args.model, scheduler=run[0], options=options, experts=args.experts,
        context=args.prompt + args.tokens + 1, threads=args.threads,
        bits=None if bits is None else int(bits),
    )  # fmt: skip


def decode(
    engine: Engine, ids: list[int], prompt: int
) -> tuple[NDArray[np.float32], list[float], edgemoe.Stats, int]:
    """Returns the log-probabilities [T, V] and seconds of each decoded token, counters, and how many are counted."""
    rows, seconds = [], []
    base = engine._store.stats
    rows.append(engine.logits(ids[:prompt], last_only=True)[0])
    for i, token in enumerate(ids[prompt:]):
        if i == _WARM:
            base = engine._store.stats
        start = time.perf_counter()
        row = engine.extend([token])
        seconds.append(time.perf_counter() - start)
        rows.append(row[0].copy())
    now = engine._store.stats
    engine.decoded = {k: now[k] - base[k] for k in ("hits", "misses", "bytes_read", "bits")}  # type: ignore[attr-defined]
    logits = np.array(rows)
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits, seconds[_WARM:], engine.stats, len(seconds) - _WARM


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--room", type=float, default=0.25)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=240)
    parser.add_argument("--experts", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--run", nargs="+", action="append", help="a scheduler and its options")
    args = parser.parse_args()
    print(
        "| run | room | tok/s | hit | MB/token | bits | skipped | subst. | perplexity | KL | report |"
    )
    print(f"|{'---|' * 11}")
    exact = None
    for run in [_RUNS[0], *args.run] if args.run else _RUNS:
        engine = load(args, run)
        with engine:
            assert engine.tokenizer is not None
            ids = engine.tokenizer.encode(args.text.read_text(encoding="utf-8"))
            ids = ids[: args.prompt + args.tokens]
            room = min(engine.budget.slots / engine.budget.experts, 1.0)
            logs, seconds, stats, count = decode(engine, ids, args.prompt)
            d = engine.decoded  # type: ignore[attr-defined]
            skipped, substituted = _shares(engine)
        exact = logs if exact is None else exact
        nll = -float(np.mean(logs[np.arange(len(logs) - 1), ids[args.prompt :]]))
        kl = float(np.mean(np.sum(np.exp(exact) * (exact - logs), axis=1)))
        uses = d["hits"] + d["misses"]
        print(
            f"| {' '.join(run)} | {room:.0%} | {1 / np.median(seconds):.1f} | {d['hits'] / uses:.1%} "
            f"| {d['bytes_read'] / count / 1e6:.2f} | {d['bits'] / uses:.2f} | {skipped:.1%} "
            f"| {substituted:.1%} | {math.exp(nll):.2f} | {kl:.4f} | {stats.scheduler} |", flush=True,
        )  # fmt: skip


def _shares(engine: Engine) -> tuple[float, float]:
    e = engine._experts
    return e.skipped / e.routed, e.scheduler.substituted / e.routed


if __name__ == "__main__":
    main()
