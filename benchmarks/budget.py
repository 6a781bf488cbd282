"""Runs one model at budgets from a tenth of its experts to all of them, each enforced by the kernel.

    python benchmarks/budget.py MODEL.moe [--json FILE]

Each row is `edgemoe-run MODEL --ram SIZE` in a control group of the same SIZE, with no swap: the text must be the
same, and nothing may be killed. The second run of a row has no control group, and its memory must stay below SIZE by
itself; "in use" is its peak memory as a share of SIZE. Needs root.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import limits

SHARES = (0.10, 0.25, 0.50, 0.75, 1.00)
QUESTION = "What is the capital of France? Then describe the city in a few sentences."
_PROBE = """
import sys, edgemoe
with edgemoe.load(sys.argv[1], context=int(sys.argv[2]), bits=int(sys.argv[3]) or None) as engine:
    print(engine.budget.experts, engine.budget.expert)
"""


def command(args: argparse.Namespace, ram: int) -> list[str]:
    return [
        sys.executable, "-m", "edgemoe.cli.run", str(args.model), "--stats", "full", "-p", QUESTION, "--temp", "0",
        "-n", str(args.n), "-c", str(args.context), "--ram", str(ram), "-v",
        *(["--bits", str(args.bits)] if args.bits else []),
    ]  # fmt: skip


def slots(err: str) -> int:
    """Returns the bytes for experts that a run had, from its own messages."""
    match = re.search(r"room: (\d+) of \d+ bytes for experts", err)
    return int(match[1]) if match else 0


def ram_for(args: argparse.Namespace, wanted: int) -> int:
    """Returns the budget that leaves about `wanted` bytes for experts."""
    least = smallest(args)
    ram = least + wanted
    for _ in range(3):
        quick = argparse.Namespace(**{**vars(args), "n": 1})
        got = slots(limits.run(command(quick, ram), stdin=" ").err)
        if got == 0 or abs(got - wanted) < 1 << 19:
            break
        ram = max(ram + wanted - got, least)
    return ram


def smallest(args: argparse.Namespace) -> int:
    """Returns the smallest budget in bytes that works, as the program itself says."""
    err = limits.run(command(args, 1 << 20), stdin=" ").err
    match = re.search(r"smallest that works is (\d+) MiB", err)
    if match is None:
        sys.exit(f"no smallest budget in: {err}")
    return (int(match[1]) + 1) << 20


def row(args: argparse.Namespace, share: float, ram: int) -> dict[str, object]:
    limits.drop_caches()
    capped = limits.run(command(args, ram), limit=ram, stdin=" ")
    free = limits.run(command(args, ram), stdin=" ")
    line = capped.err.strip().splitlines()[-1]

    def figure(pattern: str) -> float:
        match = re.search(pattern, line)
        return float(match[1]) if match else 0.0

    return {
        "share": share, "ram": ram, "code": capped.code,
        "slots": slots(capped.err),
        "same_text_without_limit": capped.out == free.out, "text": capped.out,
        "decode": figure(r", ([\d.]+) tok/s"), "prompt": figure(r"([\d.]+) prompt tok/s"),
        "hit": figure(r"hit ([\d.]+)%"), "read_gb": figure(r"read ([\d.]+) GB"),
        "evictions": figure(r"dropped (\d+)"), "hash": line.rsplit("#", 1)[-1],
        "group_peak": capped.group_peak, "anon_peak": free.anon_peak, "peak": free.peak, "swapped": capped.swapped,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("-c", "--context", type=int, default=512)
    parser.add_argument("--bits", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    probe = subprocess.run(
        [sys.executable, "-c", _PROBE, args.model, str(args.context), str(args.bits)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    experts, expert = map(int, probe.stdout.split())
    rows = []
    for share in SHARES:
        # The last row gets a little more, so that "all" does not depend on a single page.
        wanted = max(int(share * experts), expert) + ((4 << 20) if share == 1 else 0)
        rows.append(row(args, share, ram_for(args, wanted)))
    print(
        "| experts that fit | slots | --ram | tok/s | hit | read | evictions | "
        "peak, limited | anonymous, free | peak, free | in use | text |"
    )
    print("|---" * 12 + "|")
    good = True
    for r in rows:
        is_same = r["text"] == rows[-1]["text"] and r["same_text_without_limit"] and r["text"]
        is_kept = r["group_peak"] <= r["ram"] and r["peak"] <= r["ram"] and not r["swapped"]
        # Only the smallest share must evict: at others all may fit, while nothing else needs the room.
        is_evicting = (
            r["evictions"] > 0 if r["share"] == SHARES[0] else r["share"] < 1 or not r["evictions"]
        )
        good &= bool(r["code"] == 0 and is_same and is_kept and is_evicting)
        print(
            f"| {100 * r['share']:.0f}% | {r['slots'] / 2**20:.1f} MiB | {r['ram'] >> 20} MiB | "
            f"{r['decode']} | {r['hit']}% | {r['read_gb']} GB | {r['evictions']:.0f} | {r['group_peak'] >> 20} MiB | "
            f"{r['anon_peak'] >> 20} MiB | {r['peak'] >> 20} MiB | {r['peak'] / r['ram']:.3f} | "
            f"{'same' if is_same else 'DIFFERENT'} #{r['hash']} |"
        )
    if args.json:
        head = {"command": sys.argv, "machine": platform.platform(), "cpu": platform.processor()}
        args.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    if not good:
        sys.exit("a row broke its limit, lost its text or did not evict as it must")


if __name__ == "__main__":
    main()
