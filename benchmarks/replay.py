"""Compares real runs at several budgets with replays of one trace: hits exactly, tokens/s by the timing model.

    python benchmarks/replay.py MODEL.moe --text FILE [-n TOKENS] [--shares 25 50 75 --base 50] [--rounds 4]

All budgets run and are traced side by side, reading on demand. "Predicted" replays the trace of the base budget at each
budget, with times fitted to that one trace; "from its own times" uses times fitted to the run's own trace. The fit is
to the quiet half of the tokens and so predicts an undisturbed machine. Therefore speeds are those of the tokens that
were quiet in the run, and replays are compared on the same tokens. Every round opens all models anew and in another
order, since engines of one budget differ in speed from one opening to the next. Errors are medians over rounds, with
the least and the largest.
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

import numpy as np
from numpy.typing import NDArray

import edgemoe
from edgemoe.file.reader import open_moe
from edgemoe.lab.routing.replay import Replay, Tape, make_scheduler, replay
from edgemoe.lab.routing.timing import Timing, fit, quiet_tokens
from edgemoe.runtime.trace import Trace, read
from edgemoe.store import all_expert_bytes

PLAIN = {"look_ahead": False}
BLOCK = 4  # tokens


def opened(args: argparse.Namespace, share: float) -> edgemoe.Engine:
    """Opens the model with room for exactly that share of its experts, however much the process takes."""
    moe = open_moe(args.model)
    slots = int(share * all_expert_bytes(moe, moe.level(args.bits)))
    return edgemoe.load(args.model, slots=slots, context=args.n + 1, bits=args.bits, options=PLAIN)


def run(
    args: argparse.Namespace, ids: list[int], shares: list[float], folder: Path
) -> dict[float, dict[str, Any]]:
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
                "seconds": np.array(spent[s]),
                "slots": engine.budget.slots,
                **{k: engine.model.store.stats[k] for k in ("hits", "misses", "bytes_read")},
            }
            for s, engine in engines.items()
        }


def replayed(trace: Trace, slots: int, timing: Timing) -> tuple[Replay, NDArray[np.float64]]:
    """Returns a replay, and the seconds of each of its single tokens."""
    tape = Tape(trace)
    scheduler = make_scheduler(tape, "on-demand", budget_bytes=slots, options=PLAIN)
    seconds: list[float] = []

    def passed(tokens: int, took: float, sequences: int = 1) -> None:
        if tokens == 1:
            seconds.append(took)

    scheduler.passed = passed  # type: ignore[method-assign]
    return replay(tape, scheduler, budget_bytes=slots, timing=timing), np.array(seconds)


def compared(folder: Path, real: dict[float, dict[str, Any]], base: float) -> list[dict[str, Any]]:
    """Returns a row for each budget of one round."""
    rows = []
    source = read(folder / f"{base}")
    timing = fit(source)
    for s, r in real.items():
        own = read(folder / f"{s}")
        quiet, own_timing = quiet_tokens(own), fit(own)
        predicted, seconds = replayed(source, r["slots"], timing)
        _, own_seconds = replayed(own, r["slots"], own_timing)
        took = r["seconds"][quiet].mean()
        rows.append(
            {
                "share": s, "hits": r["hits"], "replayed_hits": predicted.hits + predicted.prompt_hits,
                "rate": 1 / r["seconds"].mean(), "quiet_rate": 1 / took,
                "predicted": 1 / seconds[quiet].mean(), "own_times": 1 / own_seconds[quiet].mean(),
                "timing": dataclasses.asdict(own_timing),
            }
        )  # fmt: skip
    return rows


def _median(rates: list[float]) -> str:
    return f"{statistics.median(rates):.1f}"


def _errors(predicted: list[float], real: list[float]) -> str:
    errors = [100 * (p / r - 1) for p, r in zip(predicted, real, strict=True)]
    return f"{statistics.median(errors):+.0f}% ({min(errors):+.0f} to {max(errors):+.0f})"


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
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with edgemoe.load(args.model, context=64) as engine:
        assert engine.tokenizer is not None
        ids = engine.tokenizer.encode(args.text.read_text())[: args.n]
    rounds = []
    for i in range(args.rounds):
        part = len(ids) // args.rounds
        order = [*args.shares[i % len(args.shares) :], *args.shares[: i % len(args.shares)]]
        with tempfile.TemporaryDirectory() as folder:
            real = run(args, ids[i * part : (i + 1) * part], order, Path(folder))
            rounds.append(compared(Path(folder), real, args.base))
    print(
        "| experts that fit | hits, real | hits, replayed | tok/s, all | quiet tokens | "
        f"predicted from {args.base:.0f}% | error | from its own times | error |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for share in args.shares:
        rows = [r for rows in rounds for r in rows if r["share"] == share]
        rates, quiet, predicted, own = (
            [r[k] for r in rows] for k in ("rate", "quiet_rate", "predicted", "own_times")
        )
        print(
            f"| {share:.0f}% | {sum(r['hits'] for r in rows)} | {sum(r['replayed_hits'] for r in rows)} | "
            f"{_median(rates)} | {_median(quiet)} | {_median(predicted)} | {_errors(predicted, quiet)} | "
            f"{_median(own)} | {_errors(own, quiet)} |"
        )
    if args.json:
        head = {"command": sys.argv, "machine": platform.platform(), "cpu": platform.processor()}
        args.json.write_text(json.dumps({**head, "rounds": rounds}, indent=1) + "\n")
    if any(r["hits"] != r["replayed_hits"] for rows in rounds for r in rows):
        sys.exit("a replay has other hits than its run")


if __name__ == "__main__":
    main()
