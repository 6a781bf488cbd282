"""Compares real runs at several budgets with replays of one trace: hits exactly, tokens/s by the timing model.

    python benchmarks/replay.py MODEL.moe --text FILE [-n TOKENS] [--shares 25 50 75 --base 50] [--json FILE]

Every budget is run and traced, side by side, reading on demand. "Predicted" replays the trace of the base budget at
each budget, with the times fitted to that one trace; "from its own times" fits them to the run's own. The fit is to
medians and predicts an undisturbed machine, so that errors are against the faster half of the tokens.
"""

from __future__ import annotations

import argparse
import contextlib
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
from edgemoe.lab.replay import Replay, Tape, make_scheduler, replay
from edgemoe.lab.timing import Timing, fit
from edgemoe.trace import Trace, read

PLAIN = {"look_ahead": False}
BLOCK = 4  # tokens


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


def run(
    args: argparse.Namespace, ids: list[int], shares: list[float], folder: Path
) -> dict[float, dict[str, float]]:
    """Runs all budgets side by side, a few tokens of each in turn: what disturbs the machine disturbs all alike."""
    spent: dict[float, list[float]] = {s: [] for s in shares}
    with contextlib.ExitStack() as stack:
        engines = {s: stack.enter_context(opened(args, s / 100)) for s in shares}
        for s, engine in engines.items():
            engine.record(folder / f"{s}")
            engine.logits(ids[: args.prompt], last_only=True)
        for first in range(args.prompt, len(ids), BLOCK):
            for s, engine in engines.items():
                for i in range(first, min(first + BLOCK, len(ids))):
                    start = time.perf_counter()
                    engine.extend(ids[i : i + 1])
                    spent[s].append(time.perf_counter() - start)
        return {
            s: {
                "rate": 1 / statistics.mean(spent[s]),
                "quiet_rate": 1 / statistics.mean(sorted(spent[s])[: len(spent[s]) // 2]),
                "slots": engine.budget.slots,
                **{k: engine._store.stats[k] for k in ("hits", "misses", "bytes_read")},
            }
            for s, engine in engines.items()
        }


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
    parser.add_argument("-n", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--bits", type=int)
    parser.add_argument("--shares", type=float, nargs="+", default=[25, 50, 75])
    parser.add_argument("--base", type=float, default=50)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with edgemoe.load(args.model, context=64) as engine:
        assert engine.tokenizer is not None
        ids = engine.tokenizer.encode(args.text.read_text())[: args.n]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        real = run(args, ids, args.shares, Path(folder))
        base = read(Path(folder) / f"{args.base}")
        for s, r in real.items():
            slots, own = int(r["slots"]), read(Path(folder) / f"{s}")
            predicted = replayed(base, slots, fit(base))
            rows.append(
                {
                    **r, "share": s, "replayed_hits": predicted.hits + predicted.prompt_hits,
                    "predicted": predicted.rate, "own_times": replayed(own, slots, fit(own)).rate,
                    "timing": dataclasses.asdict(fit(own)),
                }
            )  # fmt: skip
    print(
        "| experts that fit | hits, real | hits, replayed | tok/s, all | tok/s, faster half | "
        f"predicted from {args.base:.0f}% | error | from its own times | error |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        errors = [f"{100 * (r[k] / r['quiet_rate'] - 1):+.0f}%" for k in ("predicted", "own_times")]
        print(
            f"| {r['share']:.0f}% | {r['hits']} | {r['replayed_hits']} | {r['rate']:.1f} | {r['quiet_rate']:.1f} | "
            f"{r['predicted']:.1f} | {errors[0]} | {r['own_times']:.1f} | {errors[1]} |"
        )
    if args.json:
        head = {"command": sys.argv, "machine": platform.platform(), "cpu": platform.processor()}
        args.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    if any(r["hits"] != r["replayed_hits"] for r in rows):
        sys.exit("a replay has other hits than its run")


if __name__ == "__main__":
    main()
