"""Compares real runs at several budgets with replays of one trace: hits exactly, tokens/s by the timing model.

    python benchmarks/replay.py MODEL.moe --text FILE [-n TOKENS] [--shares 25 50 75] [--base 50] [--json FILE]

Every budget is run and traced, reading on demand. "predicted" replays the trace of the base budget at each budget,
with the times fitted to that one trace. "own times" fits them to the run's own trace.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import edgemoe
from edgemoe.budget import Budget
from edgemoe.lab.record import follow
from edgemoe.lab.replay import Replay, Tape, make_scheduler, replay
from edgemoe.lab.timing import Timing, fit
from edgemoe.trace import Trace, read

PLAIN = {"look_ahead": False}


def opened(args: argparse.Namespace, share: float) -> edgemoe.Engine:
    """Opens the model with room for exactly that share of its experts, however much the process takes."""
    divide = Budget.divide

    def fixed(moe: Any, **rest: Any) -> Budget:
        budget = divide(moe, **rest)
        return dataclasses.replace(budget, ram=budget.fixed + int(share * budget.experts))

    Budget.divide = fixed  # type: ignore[method-assign]
    try:
        return edgemoe.load(args.model, context=args.n + 1, bits=args.bits, options=PLAIN)
    finally:
        Budget.divide = divide  # type: ignore[method-assign]


def run(args: argparse.Namespace, ids: list[int], share: float, path: Path) -> dict[str, float]:
    with opened(args, share) as engine:
        engine.record(path)
        marks = []
        follow(
            engine, ids, prompt=args.prompt, progress=lambda *_: marks.append(time.perf_counter())
        )
        stats = engine._store.stats
        return {
            "rate": (len(marks) - 1) / (marks[-1] - marks[0]), "hits": stats["hits"],
            "misses": stats["misses"], "slots": engine.budget.slots,
        }  # fmt: skip


def replayed(trace: Trace, slots: int, timing: Timing) -> Replay:
    tape = Tape(trace)
    scheduler = make_scheduler(tape, "on-demand", budget_bytes=slots, options=PLAIN)
    return replay(tape, scheduler, budget_bytes=slots, timing=timing)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("-n", type=int, default=320)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--bits", type=int)
    parser.add_argument("--shares", type=float, nargs="+", default=[25, 50, 75])
    parser.add_argument("--base", type=float, default=50)
    parser.add_argument("-r", "--repetitions", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with edgemoe.load(args.model, context=64) as engine:
        assert engine.tokenizer is not None
        ids = engine.tokenizer.encode(args.text.read_text())[: args.n]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = {
            s: [Path(folder) / f"{s}-{i}" for i in range(args.repetitions)] for s in args.shares
        }
        real = {s: [] for s in args.shares}
        for i in range(args.repetitions):  # one after the other, so that noise hits all alike
            for s in args.shares:
                real[s].append(run(args, ids, s / 100, paths[s][i]))
        bases = [read(p) for p in paths[args.base]]
        for s in args.shares:
            slots = int(real[s][0]["slots"])
            predicted = [replayed(base, slots, fit(base)) for base in bases]
            own = [replayed(t, slots, fit(t)) for t in map(read, paths[s])]
            hits = replayed(read(paths[s][0]), slots, fit(bases[0]))
            rows.append(
                {
                    "share": s, "slots": slots, "hits": real[s][0]["hits"], "misses": real[s][0]["misses"],
                    "replayed_hits": hits.hits + hits.prompt_hits,
                    "rate": statistics.median(r["rate"] for r in real[s]),
                    "rates": [r["rate"] for r in real[s]],
                    "predicted": statistics.median(r.rate for r in predicted),
                    "own_times": statistics.median(r.rate for r in own),
                }
            )  # fmt: skip
    print(
        "| experts that fit | hits, real | hits, replayed | tok/s, real (each run) | "
        f"predicted from {args.base:.0f}% | error | from its own times | error |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['share']:.0f}% | {r['hits']} | {r['replayed_hits']} | {r['rate']:.1f} "
            f"({', '.join(f'{x:.1f}' for x in r['rates'])}) | {r['predicted']:.1f} | "
            f"{100 * (r['predicted'] / r['rate'] - 1):+.0f}% | {r['own_times']:.1f} | "
            f"{100 * (r['own_times'] / r['rate'] - 1):+.0f}% |"
        )
    if args.json:
        head = {"command": sys.argv, "machine": platform.platform(), "cpu": platform.processor()}
        args.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    if any(r["hits"] != r["replayed_hits"] for r in rows):
        sys.exit("a replay has other hits than its run")


if __name__ == "__main__":
    main()
