"""Times `edgemoe convert` without calibration and llama-quantize, on the same float16 GGUF file and threads.

    python benchmarks/conversion_time.py MODEL-f16.gguf path/to/llama-quantize [--rounds 3] [--threads 2]

The commands take turns. Processor time is given beside wall-clock time, since the latter depends on what else runs; the
ratios are of medians. edgemoe's file has all levels from 2 to 8 bits, llama-quantize's only one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONVERT = (sys.executable, "-m", "edgemoe", "convert")


def timed(command: list[str], threads: int) -> tuple[float, float]:
    """Runs a command on `threads` cores; returns seconds of wall-clock and of processor time."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    before, start = os.times(), time.perf_counter()
    run = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=lambda: os.sched_setaffinity(0, cores)
    )
    wall, after = time.perf_counter() - start, os.times()
    if run.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {run.returncode}\n{run.stderr[-2000:]}")
    used = after.children_user + after.children_system
    return wall, used - before.children_user - before.children_system


def main() -> None:
    """Parses the command line, measures, prints and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a float16 GGUF file")
    parser.add_argument("llama_quantize", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--thorough", action="store_true", help="time the full search too")
    parser.add_argument("--work", type=Path, help="where files are written (default: a new folder)")
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        moe, gguf = f"{work}/x.moe", f"{work}/x.gguf"
        source, ours = str(args.source), [*CONVERT, str(args.source), moe, "--overwrite"]
        commands = {
            f"llama-quantize {kind}": [
                str(args.llama_quantize), source, gguf, kind, str(args.threads),
            ]
            for kind in ("Q4_0", "Q4_K_M")
        }  # fmt: skip
        commands["edgemoe convert"] = ours
        if args.thorough:
            commands["edgemoe convert --thorough"] = [*ours, "--thorough"]
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(args.rounds):
            for name, command in commands.items():
                times[name].append(timed(command, args.threads))
    middle = {
        name: tuple(statistics.median(column) for column in zip(*rows, strict=True))
        for name, rows in times.items()
    }
    print("| | wall s | processor s | of Q4_0 | of Q4_K_M |\n|---|---|---|---|---|")
    for name, (wall, used) in middle.items():
        against = [
            f"{wall / middle[f'llama-quantize {k}'][0]:.2f} ({used / middle[f'llama-quantize {k}'][1]:.2f})"
            for k in ("Q4_0", "Q4_K_M")
        ]
        print(f"| {name} | {wall:.1f} | {used:.1f} | {' | '.join(against)} |")
    if args.json:
        head = {"command": sys.argv, "machine": platform.platform()}
        args.json.write_text(json.dumps({**head, "seconds": times}, indent=1) + "\n")


if __name__ == "__main__":
    main()
