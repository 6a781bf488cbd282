"""Compares forecasts of `edgemoe plan` with measurements, at budgets for all, a half and a quarter of the experts.

    python benchmarks/forecast.py MODEL.moe[:BITS] ... [-n 64] [-r 3] [--json FILE]

Each row is a run of `edgemoe plan`, which measures the machine and probes the disk, and then one of `edgemoe bench`
with the same budget: single random tokens. A forecast is right if the median of these lies inside its band.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SHARES = (1.0, 0.5, 0.25)
_SPARE = 32 << 20  # so that "all" does not depend on what is kept for later


def run(*arguments: object) -> dict[str, Any]:
    """Returns a command's JSON. It gets a cache folder of its own, so that it measures the machine anew."""
    command = [sys.executable, "-m", "edgemoe", *map(str, arguments), "--json"]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "XDG_CACHE_HOME": cache}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def budget(path: Path, bits: str, context: int, share: float) -> int:
    """Returns the budget in bytes for a share of the experts and everything else; at least the smallest that works."""
    plan = run("plan", path, "--bits", bits, "-c", context, "--ram", "1TiB", "--no-probe")
    ram = smallest = plan["smallest"]["ram"]
    for _ in range(3):
        (row,) = run("plan", path, "--bits", bits, "-c", context, "--ram", ram, "--no-probe")[
            "rows"
        ]
        ram = max(smallest, ram + int((share - row["lent"]) * row["experts"]))
    return int(ram)


def rows(path: Path, bits: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    flags = ["--bits", bits] if bits else []
    plan = run("plan", path, *flags, "-c", args.context, "--ram", "1TiB")
    bits = bits or str(plan["rows"][0]["bits"])
    found = []
    for share in SHARES:
        ram = budget(path, bits, args.context, share) + (_SPARE if share == 1 else 0)
        plan = run("plan", path, "--bits", bits, "-c", args.context, "--ram", ram)
        bench = run(
            "bench",
            path,
            "--bits",
            bits,
            "--ram",
            ram,
            "-p",
            0,
            "-n",
            args.n,
            "-r",
            args.repetitions,
        )
        (row,), (result,) = plan["rows"], bench["results"]
        (disk,) = plan["disk"].values() or (None,)
        low, high = row["tokens_per_s"]
        found.append({
            "model": path.stem, "bits": bits, "ram": ram, "lent": row["lent"], "low": low, "high": high,
            "bound": row["bound"], "measured": result["rate"], "rates": result["rates"],
            "inside": low <= result["rate"] <= high, "hit": result["hit_rate"], "read": result["read_per_token"],
            "wait": result["wait_share"], "disk": disk, "machine": plan["machine"],
        })  # fmt: skip
        print(_line(found[-1]), flush=True)
    return found


def _line(r: dict[str, Any]) -> str:
    disk = f"{r['disk'] / 1e9:.2f}" if r["disk"] else ""
    return (
        f"| {r['model']} | {r['bits']} | {r['ram'] >> 20} MiB | {100 * r['lent']:.0f}% "
        f"| {r['low']:.1f} … {r['high']:.1f} | {r['bound']} | {r['measured']:.1f} | {'yes' if r['inside'] else 'NO'} "
        f"| {100 * r['hit']:.0f}% | {r['read'] / 1e6:.1f} MB | {disk} "
        f"| {r['machine']['kernels'][r['bits']] / 1e9:.1f} | {1e6 * r['machine']['layer_s']:.0f} µs "
        f"| {100 * r['wait']:.0f}% |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL.moe[:BITS]")
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("-c", "--context", type=int, default=512)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print("| model | bits | --ram | resident | forecast | bound by | measured | inside | hit | read/token | disk GB/s "
          "| kernels GB/s | layer | waiting |\n" + "|---" * 14 + "|")  # fmt: skip
    found = []
    for given in args.models:
        name, _, bits = given.partition(":")
        found += rows(Path(name).absolute(), bits, args)
    print(f"\ninside: {sum(r['inside'] for r in found)} of {len(found)}")
    if args.json:
        head = {"command": sys.argv, "machine": platform.platform(), "cpu": platform.processor()}
        args.json.write_text(json.dumps({**head, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
