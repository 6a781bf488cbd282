"""Runs edgemoe and llama.cpp side by side: in memory, and under kernel-enforced memory caps.

    python benchmarks/llama_cpp.py --llama-bench PATH --pair MODEL.gguf MODEL.moe BITS [--pair …] \\
        [--memory] [--caps 0.75 0.5 0.25] [--first-token 0.5] [--read-ahead 128] [--json FILE]

Both sides of a pair have the same shapes and bits per weight. Runs are interleaved; figures are medians. Under a cap,
both get a control group of that share of the GGUF file's size and an empty page cache. llama.cpp maps the file
(mmap, no repacking: a repacked copy would not fit), with the disk's read-ahead as it is and as `--read-ahead` says.
`--first-token` times a whole process under a cap, from its start with an empty page cache to the logits after a prompt
of 128 tokens. Needs root for the caps.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import limits


def ours(args: argparse.Namespace, moe: str, bits: str, tests: Sequence[str], limit: int) -> dict:
    command = [
        sys.executable, "-m", "edgemoe.cli.bench", moe, "--bits", bits, "--dense-bits", bits,
        "-t", str(args.threads), "-r", "1", "--json", *tests,
        *(["--ram", str(limit)] if limit else []),
    ]  # fmt: skip
    done = limits.run(command, limit=limit)
    if done.code:
        sys.exit(f"edgemoe bench: {done.err}")
    return {**json.loads(done.out), "group_peak": done.group_peak, "swapped": done.swapped}


def theirs(
    args: argparse.Namespace, gguf: str, tests: Sequence[str], limit: int
) -> dict[str, float]:
    command = [
        args.llama_bench, "-m", gguf, "-t", str(args.threads), "-r", "1", "-o", "json", *tests,
        *(["--repack", "0", "--load-mode", "mmap"] if limit else []),
    ]  # fmt: skip
    done = limits.run(command, limit=limit, timeout=args.timeout)
    if done.code:
        print(f"# llama-bench ended with {done.code}: {done.err[-200:]}", file=sys.stderr)
        return {}
    rows = json.loads(done.out)
    return {f"pp{r['n_prompt']}" if r["n_prompt"] else f"tg{r['n_gen']}": r["avg_ts"] for r in rows}


def in_memory(args: argparse.Namespace, pair: Sequence[str]) -> list[dict]:
    gguf, moe, bits = pair
    tests = ["-p", "128,512", "-n", "128"]
    mine: dict[str, list[float]] = {}
    other: dict[str, list[float]] = {}
    roofs = []
    for _ in range(args.repetitions):
        for name, rate in theirs(args, gguf, tests, 0).items():
            other.setdefault(name, []).append(rate)
        report = ours(args, moe, bits, tests, 0)
        for result in report["results"]:
            roofs += result["memory_roofs"]
        for result in report["results"]:
            mine.setdefault(result["test"], []).append(result["rate"])
    rows = []
    for name, rates in mine.items():
        a, b = statistics.median(rates), statistics.median(other.get(name, [float("nan")]))
        rows.append({"model": Path(moe).stem, "bits": bits, "test": name, "ours": a, "theirs": b})
        print(
            f"| {Path(moe).stem} | {bits} | {name} | {a:.1f} | {b:.1f} | {a / b:.2f}× |", flush=True
        )
    low, middle, high = min(roofs) / 1e9, statistics.median(roofs) / 1e9, max(roofs) / 1e9
    print(
        f"# memory roof beside our tests: median {middle:.1f} GB/s, {low:.1f} to {high:.1f}",
        file=sys.stderr,
    )
    return rows


def over_bounds(report: dict) -> tuple[float, float]:
    """Returns the time per token over the least that disk and memory allow, by the slowest and the fastest roofs that
    this run saw on both sides of its test. Where the first is below 1 the machine was faster in between.
    """
    result = report["results"][0]
    disks = [roof["disk"] for roof in report["roofs"]]
    memories = [*result["memory_roofs"], *(roof["memory"] for roof in report["roofs"])]

    def over(disk: float, memory: float) -> float:
        least = max(result["read_per_token"] / disk, result["used_per_token"] / memory)
        return 1 / result["rate"] / least

    return over(min(disks), min(memories)), over(max(disks), max(memories))


def capped(args: argparse.Namespace, pair: Sequence[str], share: float) -> list[dict]:
    gguf, moe, bits = pair
    limit = int(share * Path(gguf).stat().st_size)
    test = ["-p", "0", "-n", str(args.tokens)]
    cells: dict[str, list[float]] = {"ours": []}
    reports = []
    for _ in range(args.repetitions):
        limits.drop_caches()
        report = ours(args, moe, bits, test, limit)
        reports.append(report)
        cells["ours"].append(report["results"][0]["rate"])
        for name, kib in (("default", None), ("best", args.read_ahead)):
            if name == "default" and not args.default_read_ahead:
                continue
            with _read_ahead(gguf, kib):
                limits.drop_caches()
                rates = theirs(args, gguf, test, limit)
            cells.setdefault(name, []).extend(rates.values())
    result = reports[-1]["results"][0]
    mine = statistics.median(cells["ours"])
    bounds = [bound for report in reports for bound in over_bounds(report)]
    disks = [roof["disk"] for report in reports for roof in report["roofs"]]
    row = {
        "model": Path(moe).stem, "bits": bits, "share": share, "limit": limit, "ours": mine,
        **{k: statistics.median(v) if v else None for k, v in cells.items() if k != "ours"},
        "hit_rate": result["hit_rate"], "read_per_token": result["read_per_token"],
        "disk_roofs": disks, "over_bounds": bounds,
        "group_peak": max(r["group_peak"] for r in reports),
    }  # fmt: skip

    def against(name: str) -> str:
        rate = row.get(name)
        return f"{rate:.2f} | {mine / rate:.1f}×" if rate else "– | –"

    print(
        f"| {row['model']} | {bits} | {100 * share:.0f}% | {mine:.2f} | {against('best')} | "
        f"{against('default')} | {100 * row['hit_rate']:.0f}% | {row['read_per_token'] / 1e6:.0f} MB | "
        f"{min(disks) / 1e9:.2f}–{max(disks) / 1e9:.2f} | {min(bounds):.2f}–{max(bounds):.2f} | "
        f"{row['group_peak'] / limit:.2f} |",
        flush=True,
    )
    return [row]


_FIRST = """
import sys, numpy, edgemoe
model, ram, bits, threads = sys.argv[1:]
with edgemoe.load(model, ram=int(ram), whole_process=True, bits=int(bits), dense_bits=int(bits),
                  threads=int(threads), context=256) as engine:
    ids = numpy.random.default_rng(1).integers(0, engine.config.vocab_size, 128)
    engine.logits(ids, last_only=True)
"""


def first_token(args: argparse.Namespace, pair: Sequence[str], share: float) -> list[dict]:
    gguf, moe, bits = pair
    limit = int(share * Path(gguf).stat().st_size)
    threads = str(args.threads)
    commands = {
        "ours": [sys.executable, "-c", _FIRST, moe, str(limit), bits, threads],
        "theirs": [
            args.llama_bench, "-m", gguf, "-t", threads, "-r", "1", "-p", "128", "-n", "0", "--no-warmup",
            "--repack", "0", "--load-mode", "mmap",
        ],
    }  # fmt: skip
    seconds: dict[str, list[float]] = {}
    for _ in range(args.repetitions):
        for name, command in commands.items():
            with _read_ahead(gguf, args.read_ahead if name == "theirs" else None):
                limits.drop_caches()
                done = limits.run(command, limit=limit, timeout=args.timeout)
            if done.code:
                sys.exit(f"{name}: {done.err[-500:]}")
            seconds.setdefault(name, []).append(done.seconds)
    row = {"model": Path(moe).stem, "bits": bits, "share": share, "test": "first token", **seconds}
    a, b = statistics.median(seconds["ours"]), statistics.median(seconds["theirs"])
    print(
        f"| {row['model']} | {bits} | {100 * share:.0f}% | {a:.2f} | {b:.2f} | {b / a:.1f}× |",
        flush=True,
    )
    return [row]


class _read_ahead:  # noqa: N801 (reads like a function)
    """Sets the read-ahead of the disk that holds a file for a while; None leaves it."""

    def __init__(self, path: str, kib: int | None) -> None:
        device = Path(path).stat().st_dev
        name = Path(f"/sys/dev/block/{device >> 8}:{device & 255}").resolve()
        self._file = next(
            p / "queue/read_ahead_kb" for p in (name, name.parent) if (p / "queue").is_dir()
        )
        self._kib = kib

    def __enter__(self) -> None:
        self._before = self._file.read_text()
        if self._kib is not None:
            self._file.write_text(str(self._kib))

    def __exit__(self, *_: object) -> None:
        self._file.write_text(self._before)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--llama-bench", required=True)
    parser.add_argument(
        "--pair", nargs=3, action="append", required=True, metavar=("GGUF", "MOE", "BITS")
    )
    parser.add_argument("--memory", action="store_true", help="run in memory")
    parser.add_argument("--caps", type=float, nargs="*", default=[], help="shares of the GGUF file")
    parser.add_argument("--first-token", type=float, nargs="*", default=[], help="likewise")
    parser.add_argument("--read-ahead", type=int, default=128, metavar="KIB")
    parser.add_argument("--default-read-ahead", action="store_true", help="measure that, too")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=400)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    if args.memory:
        print("| model | bits | test | edgemoe | llama.cpp | ratio |\n|---|---|---|---|---|---|")
        for pair in args.pair:
            rows += in_memory(args, pair)
    if args.caps:
        print(
            "| model | bits | cap | edgemoe t/s | llama.cpp, best read-ahead | ratio | "
            "default read-ahead | ratio | hit | read/token | disk roof GB/s | over bound | peak/cap |\n"
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
        )
        for pair in args.pair:
            for share in args.caps:
                rows += capped(args, pair, share)
    if args.first_token:
        print(
            "| model | bits | cap | edgemoe s | llama.cpp s | faster |\n|---|---|---|---|---|---|"
        )
        for pair in args.pair:
            for share in args.first_token:
                rows += first_token(args, pair, share)
    if args.json:
        head = {"command": sys.argv, "machine": platform.platform()}
        args.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
