"""Shows how speed grows or falls with context, threads, experts and memory, as one figure and a JSON file.

    python benchmarks/scaling.py OUT.png --context MODEL.moe --experts-of MODEL.moe --capped MODEL.moe [--json FILE]

    context    `--context`: prompts and single tokens at depths up to 8192, keys and values in 16 and in 8 bits
    threads    `--experts-of`, 1 thread to twice the cores
    experts    `--experts-of` with 1 to all experts per token; and files made for this with 8 to 128 experts a layer, 8
               of them per token, everything else the same
    memory     `--capped` under control groups of 100 to 10% of what fits all (needs root), beside the bound: the larger
               of bytes read ÷ disk rate and bytes used ÷ memory rate

Every point is the median of `-r` repetitions of `edgemoe bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import limits
import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import synth

DEPTHS = (0, 1024, 2048, 4096, 7680)
SHARES = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1)


def bench(model: str | Path, *flags: str, limit: int = 0) -> dict:
    command = [sys.executable, "-m", "edgemoe.cli.bench", str(model), "--json", *flags]
    if limit:
        command += ["--ram", str(limit)]
        limits.drop_caches()
    done = limits.run(command, limit=limit)
    if done.code:
        raise RuntimeError(f"{' '.join(command)}: {done.err.strip()}")
    return json.loads(done.out)


def rates(report: dict) -> dict[str, float]:
    return {r["test"].split(" ")[0]: r["rate"] for r in report["results"]}


def by_context(args: argparse.Namespace) -> list[dict]:
    rows = []
    for kind in ("f16", "q8_0"):
        for depth in DEPTHS:
            report = bench(
                args.context, "-p", "256", "-n", "32", "-d", str(depth), "-r", str(args.r),
                "-ctk", kind, "-ctv", kind,
            )  # fmt: skip
            rows.append({"kv": kind, "depth": depth, **rates(report)})
            print(rows[-1], flush=True)
    return rows


def by_threads(args: argparse.Namespace) -> list[dict]:
    rows = []
    for threads in range(1, 2 * (os.cpu_count() or 1) + 1):
        report = bench(
            args.experts_of,
            "-p",
            "256",
            "-n",
            "48",
            "-t",
            str(threads),
            "-r",
            str(args.r),
            *args.bits,
        )
        rows.append({"threads": threads, **rates(report)})
        print(rows[-1], flush=True)
    return rows


def by_active(args: argparse.Namespace) -> list[dict]:
    rows = []
    for k in (1, 2, 4, 8, 16, 32):
        try:
            report = bench(
                args.experts_of,
                "-p",
                "256",
                "-n",
                "48",
                "--experts",
                str(k),
                "-r",
                str(args.r),
                *args.bits,
            )
        except RuntimeError:  # the model has fewer
            break
        rows.append({"active": k, **rates(report)})
        print(rows[-1], flush=True)
    return rows


def by_experts(args: argparse.Namespace) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
        for count in (8, 16, 32, 64, 128):
            path = Path(folder) / "model.moe"
            shape = replace(
                synth.SHAPES["granite"], num_experts=count, num_layers=8, moe_layers=tuple(range(8))
            )
            synth.write(path, shape, bits=4, embedding=1.0, name=f"{count} experts")
            report = bench(path, "-p", "512", "-n", "64", "-r", str(args.r))
            rows.append({"experts": count, **rates(report)})
            print(rows[-1], flush=True)
            path.unlink()
    return rows


def by_memory(args: argparse.Namespace) -> list[dict]:
    whole = bench(args.capped, "-p", "0", "-n", "8", "-r", "1", *args.bits)["budget"]
    full = sum(whole[k] for k in ("process", "dense", "kv", "scratch", "experts")) + (64 << 20)
    rows = []
    for share in SHARES:
        try:
            report = bench(
                args.capped,
                "-p",
                "0",
                "-n",
                "32",
                "-r",
                str(args.r),
                *args.bits,
                limit=int(share * full),
            )
        except RuntimeError as error:
            print(f"{share}: {error}", flush=True)
            continue
        result = report["results"][0]
        disk = max(roof["disk"] for roof in report["roofs"])
        memory = max(*result["memory_roofs"], *(roof["memory"] for roof in report["roofs"]))
        bound = max(result["read_per_token"] / disk, result["used_per_token"] / memory)
        rows.append(
            {"share": share, "tg": result["rate"], "bound": 1 / bound, "hit_rate": result["hit_rate"],
             "read_per_token": result["read_per_token"]}
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def draw(rows: dict[str, list[dict]], out: Path) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), constrained_layout=True)

    def panel(at: tuple[int, int], title: str, x: str, y: str) -> plt.Axes:
        axis = axes[at]
        axis.set(title=title, xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
        return axis

    prompt = panel((0, 0), "prompt of 256 at depth", "tokens before", "tokens/s")
    single = panel((0, 1), "single tokens at depth", "tokens before", "tokens/s")
    for kind, style in (("f16", "o-"), ("q8_0", "s--")):
        some = [r for r in rows["context"] if r["kv"] == kind]
        for axis, test in ((prompt, "pp256"), (single, "tg32")):
            axis.plot(
                [r["depth"] for r in some], [r[test] for r in some], style, label=f"KV {kind}"
            )
    threads = panel((0, 2), "threads", "threads", "tokens/s relative to one")
    for test, style in (("pp256", "o-"), ("tg48", "s--")):
        some = rows["threads"]
        threads.plot(
            [r["threads"] for r in some], [r[test] / some[0][test] for r in some], style, label=test
        )
    active = panel((1, 0), "experts per token", "experts", "ms per token")
    active.plot(
        [r["active"] for r in rows["active"]],
        [1e3 / r["tg48"] for r in rows["active"]],
        "o-",
        label="tg48",
    )
    total = panel((1, 1), "experts per layer, 8 per token", "experts", "tokens/s")
    for test, style in (("pp512", "o-"), ("tg64", "s--")):
        total.plot(
            [r["experts"] for r in rows["experts"]],
            [r[test] for r in rows["experts"]],
            style,
            label=test,
        )
    total.set_xscale("log", base=2)
    memory = panel((1, 2), "memory", "% of what fits everything", "tokens/s")
    shares = [100 * r["share"] for r in rows["memory"]]
    memory.plot(shares, [r["tg"] for r in rows["memory"]], "o-", label="measured")
    memory.plot(shares, [r["bound"] for r in rows["memory"]], "k:", label="bound")
    memory.set_yscale("log")
    for axis in axes.flat:
        axis.set_ylim(bottom=None if axis is memory else 0)
        axis.legend()
    figure.savefig(out, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--context", required=True)
    parser.add_argument("--experts-of", required=True)
    parser.add_argument("--capped", required=True)
    parser.add_argument("--bits", nargs="*", default=["--bits", "4", "--dense-bits", "4"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tmp", type=Path, help="where files of 1 GB may lie for a while")
    parser.add_argument("-r", type=int, default=3)
    parser.add_argument("--from-json", action="store_true", help="draw what --json holds")
    args = parser.parse_args()
    if args.from_json:
        rows = json.loads(args.json.read_text())["rows"]
    else:
        rows = {
            "context": by_context(args), "threads": by_threads(args), "active": by_active(args),
            "experts": by_experts(args), "memory": by_memory(args),
        }  # fmt: skip
        if args.json:
            args.json.write_text(json.dumps({"command": sys.argv, "rows": rows}, indent=1) + "\n")
    draw(rows, args.out)


if __name__ == "__main__":
    main()
