"""Runs edgemoe and llama.cpp side by side: in memory, and under kernel-enforced memory caps.

    python benchmarks/llama_cpp.py --llama-bench PATH --pair MODEL.gguf MODEL.moe BITS [--pair …] \\
        [--memory] [--caps 0.5 0.25] [--first-token 0.5] [--read-ahead 128] [--json FILE]

Both files of a pair hold the same weights (benchmarks/synth_gguf.py). The programs take turns; the table has medians
with the least and the most. `--json` adds a row for each run to FILE, and the table then covers all rows of FILE. Under
a cap, both programs get a control group of that share of the GGUF file's size, and an empty page cache. llama.cpp maps
the file (mmap, no repacking: a repacked copy would not fit), with the disk's read-ahead set to `--read-ahead` KiB.
`--first-token` times a whole process under a cap, from its start with an empty page cache to the logits after a prompt
of 128 tokens. Caps need root.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import limits
import results


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
    """Returns tokens per second: the second of two repetitions, as `edgemoe bench` has an unmeasured one, too."""
    command = [
        args.llama_bench, "-m", gguf, "-t", str(args.threads), "-r", "2", "-o", "json", *tests,
        *(["--repack", "0", "--load-mode", "mmap"] if limit else []),
    ]  # fmt: skip
    done = limits.run(command, limit=limit, timeout=args.timeout)
    if done.code:
        print(f"# llama-bench ended with {done.code}: {done.err[-200:]}", file=sys.stderr)
        return {}
    return {
        f"pp{r['n_prompt']}" if r["n_prompt"] else f"tg{r['n_gen']}": r["samples_ts"][-1]
        for r in json.loads(done.out)
    }


def in_memory(args: argparse.Namespace, pair: Sequence[str]) -> list[dict]:
    gguf, moe, bits = pair
    tests = ["-p", "512", "-n", "128"]
    other = theirs(args, gguf, tests, 0)
    return [
        {
            "model": Path(moe).stem, "bits": bits, "test": result["test"],
            "ours": result["rate"], "theirs": other.get(result["test"]),
            "memory_roofs": result["memory_roofs"], "used_per_token": result["used_per_token"],
        }
        for result in ours(args, moe, bits, tests, 0)["results"]
    ]  # fmt: skip


def over_bounds(report: dict) -> tuple[float, float]:
    """Returns the time per token divided by the least that disk and memory allow: by the slowest and by the fastest of
    the roofs measured before and after the test. If the first is below 1, the machine was faster during the test.
    """
    result = report["results"][0]
    disks = [roof["disk"] for roof in report["roofs"]]
    memories = [*result["memory_roofs"], *(roof["memory"] for roof in report["roofs"])]

    def over(disk: float, memory: float) -> float:
        least = max(result["read_per_token"] / disk, result["used_per_token"] / memory)
        return 1 / result["rate"] / least

    return over(min(disks), min(memories)), over(max(disks), max(memories))


def capped(args: argparse.Namespace, pair: Sequence[str], share: float) -> dict:
    gguf, moe, bits = pair
    limit = int(share * Path(gguf).stat().st_size)
    test = ["-p", "0", "-n", str(args.tokens)]
    limits.drop_caches()
    report = ours(args, moe, bits, test, limit)
    result = report["results"][0]
    row = {
        "model": Path(moe).stem, "bits": bits, "share": share, "limit": limit, "test": f"tg{args.tokens}",
        "ours": result["rate"], "hit_rate": result["hit_rate"], "read_per_token": result["read_per_token"],
        "disk_roofs": [roof["disk"] for roof in report["roofs"]], "over_bounds": over_bounds(report),
        "group_peak": report["group_peak"],
    }  # fmt: skip
    read_aheads = {"theirs": args.read_ahead, "default_read_ahead": None}
    for name in list(read_aheads)[: 1 + args.default_read_ahead]:
        with _read_ahead(gguf, read_aheads[name]):
            limits.drop_caches()
            row[name] = theirs(args, gguf, test, limit).get(row["test"])
    return row


_FIRST = """
import sys, numpy, edgemoe
model, ram, bits, threads = sys.argv[1:]
with edgemoe.load(model, ram=int(ram), whole_process=True, bits=int(bits), dense_bits=int(bits),
                  threads=int(threads), context=256) as engine:
    ids = numpy.random.default_rng(1).integers(0, engine.config.vocab_size, 128)
    engine.logits(ids, last_only=True)
"""


def first_token(args: argparse.Namespace, pair: Sequence[str], share: float) -> dict:
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
    row = {"model": Path(moe).stem, "bits": bits, "share": share, "test": "first token, s"}
    for name, command in commands.items():
        with _read_ahead(gguf, args.read_ahead if name == "theirs" else None):
            limits.drop_caches()
            done = limits.run(command, limit=limit, timeout=args.timeout)
        if done.code:
            sys.exit(f"{name}: {done.err[-500:]}")
        row[name] = done.seconds
    return row


_HEAD = (
    "model", "bits", "memory", "test", "runs", "edgemoe", "llama.cpp", "times as fast",
    "hit", "read/token", "disk GB/s", "over bound", "peak/cap",
)  # fmt: skip


def table(rows: Sequence[dict]) -> Iterator[str]:
    """Yields lines of Markdown: medians of all runs of a cell, with the least and the most."""
    yield f"| {' | '.join(_HEAD)} |"
    yield "|---" * len(_HEAD) + "|"
    cells: dict[tuple, list[dict]] = {}
    for row in rows:
        test = "tg" if "hit_rate" in row else row["test"]  # however many tokens
        cells.setdefault((row["model"], row["bits"], row.get("share"), test), []).append(row)
    for (model, bits, share, test), runs in cells.items():
        pairs = [(r["ours"], r["theirs"]) for r in runs if r.get("theirs")]
        speeds = [_spread([r[x] for r in runs if r.get(x)]) for x in ("ours", "theirs")]
        times = [other / mine if test.endswith(", s") else mine / other for mine, other in pairs]
        memory = f"{share:.0%}" if share else "all"
        cell = [model, bits, memory, test, str(len(runs)), *speeds, _spread(times), *_under(runs)]
        yield f"| {' | '.join(cell)} |"


def _under(runs: Sequence[dict]) -> list[str]:
    """Returns the cells that only runs under a cap have."""
    if "hit_rate" not in runs[0]:
        return [""] * 5
    hit, read = (statistics.median(r[x] for r in runs) for x in ("hit_rate", "read_per_token"))
    disks = [disk / 1e9 for r in runs for disk in r["disk_roofs"]]
    bounds = [bound for r in runs for bound in r["over_bounds"]]
    peak = max(r["group_peak"] / r["limit"] for r in runs)
    return [
        f"{hit:.0%}",
        f"{read / 1e6:.0f} MB",
        _spread(disks, 2),
        _spread(bounds, 2),
        f"{peak:.2f}",
    ]


def _spread(values: Sequence[float], digits: int = 1) -> str:
    if not values:
        return "–"
    middle, low, high = (f"{f(values):.{digits}f}" for f in (statistics.median, min, max))
    return f"{middle} ({low}–{high})"


class _read_ahead:  # noqa: N801 (reads like a function)
    """A context in which the disk that holds a file has a read-ahead of `kib` KiB; None leaves it as it is."""

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
    parser.add_argument("--json", type=Path, metavar="FILE", help="of this and earlier calls")
    args = parser.parse_args()
    rows = json.loads(args.json.read_text())["rows"] if args.json and args.json.exists() else []
    mine = {"commit": results.commit(), "machine": results.machine()}  # earlier calls had their own
    for _ in range(args.repetitions):
        for pair in args.pair:
            new = in_memory(args, pair) if args.memory else []
            new += [capped(args, pair, share) for share in args.caps]
            new += [first_token(args, pair, share) for share in args.first_token]
            rows += [{**row, **mine} for row in new]
            if args.json:
                results.write(args.json, rows)
    print(*table(rows), sep="\n")


if __name__ == "__main__":
    main()
