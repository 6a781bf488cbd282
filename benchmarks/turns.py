"""Compares the speed of two versions of edgemoe, or of two files, in turns: single tokens and prompts.

    python benchmarks/turns.py old=OLD/.venv/bin/python:old.moe new=.venv/bin/python:new.moe --bits 2 4 8

Each NAME=PYTHON:FILE is a process of its own for each level, with everything in memory before anything is timed. A
round runs every test once with each of them, on the same random tokens; rounds go through them forwards and backwards
in turn. The table has the first one's time ÷ that of each other: medians over the rounds with quartiles, by wall-clock
and by processor time. `--words 128` draws tokens from 128 different ones, so that an embedding that is looked up in the
file has been read before anything is timed. `--ask` waits for Enter when all is loaded.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

_WORKER = """
import json, os, sys, time
import numpy as np
import edgemoe
path, bits, threads, context = sys.argv[1], *map(int, sys.argv[2:])
with edgemoe.load(path, bits=bits, dense_bits=bits, threads=threads, context=context) as engine:
    model = engine.model
    if hasattr(model.store, "load"):
        every = np.arange(model.top_bits.size, dtype=np.int32)
        model.store.load(every, model.top_bits[every])
    for line in sys.stdin:
        prompt, count, words, seed = map(int, line.split())
        vocabulary = engine.config.vocab_size
        known = np.random.default_rng(0).permutation(vocabulary)[: words or vocabulary]
        ids = np.random.default_rng(seed).choice(known, prompt + count)
        misses = 0
        if count:
            for i in range(2):
                engine.logits(ids[:1], last_only=True)
            for i in range(4):
                engine.extend(ids[i : i + 1])
        cpu, wall = time.process_time(), time.perf_counter()
        if prompt:
            engine.logits(ids, last_only=True)
            misses += engine.stats.misses
        for i in range(count):
            engine.extend(ids[i : i + 1])
            misses += engine.stats.misses
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps([wall, cpu, misses]), flush=True)
"""
_LOAD, _LOADS = 512, 40  # tokens of a prompt, and the most prompts until no expert is read any more


class Side:
    """One version with one file at one level: a process that runs tests on request."""

    def __init__(self, spec: str, bits: int, args: argparse.Namespace) -> None:
        self.name, _, rest = spec.partition("=")
        python, _, file = rest.rpartition(":")
        context = max(args.prompt or _LOAD, args.tokens + 8) + 2
        self.process = subprocess.Popen(
            [python or sys.executable, "-c", _WORKER, file, *map(str, (bits, args.threads, context))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def run(self, prompt: int, tokens: int, words: int, seed: int) -> tuple[float, float, int]:
        """Returns seconds of wall-clock and of processor time, and how many experts were read."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(prompt, tokens, words, seed, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: ended with {self.process.wait()}")
        wall, cpu, misses = json.loads(line)
        return wall, cpu, misses

    def load(self, args: argparse.Namespace) -> None:
        """Runs prompts until two in a row read no expert."""
        still = 0
        for seed in range(_LOADS):
            still = (
                0 if self.run(args.prompt or _LOAD, 0, args.words, 1000 + seed)[2] else still + 1
            )
            if still == 2:
                return
        print(f"{self.name}: some experts are not in memory", file=sys.stderr)

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def quartiles(values: list[float]) -> str:
    """Returns median and quartiles as text."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.3f} ({low:.3f}, {high:.3f})"


def main() -> None:
    """Parses the command line, measures, prints and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sides", nargs="+", metavar="NAME=PYTHON:FILE")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("-n", "--tokens", type=int, default=32, help="single tokens of a test")
    parser.add_argument("-p", "--prompt", type=int, default=512, help="0 for no prompt")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--words", type=int, default=0, help="distinct tokens (default: all)")
    parser.add_argument("--ask", action="store_true", help="wait for Enter when all is loaded")
    parser.add_argument("--json", type=Path, help="where to write all times")
    args = parser.parse_args()
    levels = {bits: [Side(spec, bits, args) for spec in args.sides] for bits in args.bits}
    tests = {"tg": (0, args.tokens), "pp": (args.prompt, 0)}
    tests = {name: counts for name, counts in tests.items() if any(counts)}
    for sides in levels.values():
        for side in sides:
            side.load(args)
            side.run(0, args.tokens, args.words, 0)
    if args.ask:
        print("loaded", flush=True)
        sys.stdin.readline()
    times: dict[str, list[tuple[float, float, int]]] = {}
    for number in range(args.rounds):
        for bits, sides in levels.items():
            for test, counts in tests.items():
                for side in sides[:: -1 if number % 2 else 1]:
                    found = side.run(*counts, args.words, 10_000 + number)
                    times.setdefault(f"{bits} {test} {side.name}", []).append(found)
    for side in (s for sides in levels.values() for s in sides):
        side.close()
    names = [spec.partition("=")[0] for spec in args.sides]
    report(names, args, tests, times)
    if args.json:
        head: dict[str, Any] = {"command": sys.argv, "machine": platform.platform()}
        args.json.write_text(json.dumps({**head, "times": times}, indent=1) + "\n")


def report(
    names: list[str],
    args: argparse.Namespace,
    tests: dict[str, tuple[int, int]],
    times: dict[str, list[tuple[float, float, int]]],
) -> None:
    """Prints the table."""
    print("| bits | test | tokens/s, each | against | speed | processor | experts read |")
    print("|---|---|---|---|---|---|---|")
    for bits in args.bits:
        for test, counts in tests.items():
            rates = [
                f"{sum(counts) / statistics.median(t[0] for t in times[f'{bits} {test} {n}']):.1f}"
                for n in names
            ]
            first = times[f"{bits} {test} {names[0]}"]
            for name in names[1:]:
                own = times[f"{bits} {test} {name}"]
                by = [
                    quartiles([a[i] / b[i] for a, b in zip(first, own, strict=True)])
                    for i in (0, 1)
                ]
                read = sum(t[2] for t in first + own)
                print(
                    f"| {bits} | {test} | {', '.join(rates)} | {name} | {by[0]} | {by[1]} | {read} |"
                )


if __name__ == "__main__":
    main()
