"""Bounds the gain of progressive computation: gate and up run on the planes that are here, while others arrive.

    edgemoe profile trace MODEL.moe [--text FILE] --ram SIZE -o TRACE
    python benchmarks/progressive.py TRACE [--shares 10 25 50 75]

Replays the trace on demand, with the timing model fitted to it. A second replay assumes that two thirds of an expert's
computation (gate and up; down needs both) are done in idle moments before its last byte arrives, at no cost and however
little has arrived by then. No real implementation can gain more. Replays are for the trace's disk, for one twice as
fast, and for one with a fifth of its speed. Another bound comes from the recorded waits: in a layer that waited, the
gain is at most the wait, and at most that share of one expert's computation, since computation hides behind every read
but the last.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np

from edgemoe.lab.routing.replay import Tape, make_scheduler, replay
from edgemoe.lab.routing.timing import Timing, fit
from edgemoe.runtime.trace import Trace, read

SHARE = 2 / 3


def gain(tape: Tape, budget: int, timing: Timing) -> tuple[float, float, float]:
    """Returns tokens/s without and with progressive computation, and the share of time spent waiting without it."""
    rates, waits = [], []
    for progressive in (0.0, SHARE):
        plain = make_scheduler(
            tape, "on-demand", budget_bytes=budget, options={"look_ahead": False}
        )
        r = replay(tape, plain, budget_bytes=budget, timing=timing, progressive=progressive)
        rates.append(r.rate)
        waits.append(r.wait_s / r.seconds)
    return rates[0], rates[1], waits[0]


def recorded(trace: Trace) -> float:
    """Returns the largest share of single tokens' time that could be saved, by the recorded waits."""
    before, experts, wait = (
        trace.by_token(name, single=True)[1:].astype(np.float64)
        for name in ("before_us", "experts_us", "wait_us")
    )
    one = (experts - wait) / trace.header.experts_per_token
    saved = np.minimum(wait, SHARE * one)
    return float(saved.sum() / (before + experts).sum())


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("traces", nargs="+", metavar="TRACE")
    parser.add_argument("--shares", type=float, nargs="+", default=[10, 25, 50, 75])
    args = parser.parse_args()
    print("| trace | experts that fit | disk | tok/s | waiting | progressive, at most | gain |")
    print("|---|---|---|---|---|---|---|")
    for path in args.traces:
        trace = read(path)
        tape, own, h = Tape(trace), fit(trace), trace.header
        everything = h.num_layers * h.num_experts * h.level_bytes[-1]
        for share in args.shares:
            for name, factor in (("this", 1.0), ("twice", 2.0), ("a fifth", 0.2)):
                timing = replace(own, rate=factor * own.rate, latency_us=own.latency_us / factor)
                plain, with_it, waiting = gain(tape, int(share / 100 * everything), timing)
                print(
                    f"| {path} | {share:.0f}% | {name}, {timing.rate_gb_s:.1f} GB/s | {plain:.1f} | "
                    f"{waiting:.0%} | {with_it:.1f} | {100 * (with_it / plain - 1):+.1f}% |",
                    flush=True,
                )
        print(
            f"| {path} | {100 * h.slots_bytes / everything:.0f}%, recorded waits | | | | | "
            f"{100 / (1 - recorded(trace)) - 100:+.1f}% |"
        )


if __name__ == "__main__":
    main()
