"""Measures schedulers and levers on a model with room for a share of its experts: quality, reads and speed.

    python benchmarks/levers.py MODEL.moe OUT.json --chunks 32 --room 0.25
    python benchmarks/levers.py MODEL.moe OUT.json --rounds 3 --run on-demand bits=4 --run hobbit t1=0.4 t2=0.8
    python benchmarks/levers.py MODEL.moe OUT.json --plot OUT.png

OUT.json keeps a row for every run, and later calls add to it. `--chunks` measures quality, which takes long and needs
no quiet machine; `--rounds` measures speed. Without `--run` the list RUNS below is measured. Slots are the given share
of all experts at the file's highest level, whatever the run's bits are. Besides a scheduler's options, a run may have
`bits`, which is a level or the file of an allocation, and `dense_bits`: the memory that fewer dense bits free is added
to the slots, as under one `--ram`.

Quality is measured as by `edgemoe quality`, on the same chunks of a text: KL from the exact run, and the change of the
mean loss over pairs of the same tokens. Settings that act only on single tokens are scored token by token. Speed is
that of decoding the text. In every round all runs take turns, and each is compared with the exact run of that round;
the table has medians over all rounds, and the bytes read per token in the last one. A model without a tokenizer, such
as benchmarks/synth.py makes, decodes random tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import edgemoe
from edgemoe.file.reader import open_moe
from edgemoe.lab.quality.logprobs import LogProbs, LogProbsWriter
from edgemoe.lab.quality.quality import Sample, score
from edgemoe.lab.quality.text import default_text
from edgemoe.runtime.engine import Engine
from edgemoe.store import all_expert_bytes, dense_bytes
from edgemoe.text.tokenizer import Tokenizer

EXACT = ["on-demand", "eviction=next-use"]
RUNS = [
    EXACT, ["on-demand"], ["on-demand", "bits=6", "eviction=next-use"],
    ["on-demand", "bits=4", "eviction=next-use"], ["on-demand", "bits=3", "eviction=next-use"],
    ["on-demand", "bits=2", "eviction=next-use"],
    ["hobbit"], ["hobbit", "look_ahead=0"], ["d2moe", "eviction=next-use"],
    ["mc", "eviction=next-use"], ["mc", "beta=0.3", "layers=99", "eviction=next-use"],
    ["on-demand", "miss_bits=4", "eviction=next-use"], ["on-demand", "miss_bits=6", "eviction=next-use"],
    ["on-demand", "cache_prior=0.1", "eviction=next-use"], ["on-demand", "cache_prior=0.3", "eviction=next-use"],
    ["on-demand", "top_p=0.9", "eviction=next-use"], ["on-demand", "top_p=0.8", "eviction=next-use"],
    ["on-demand", "skip_below=0.3", "eviction=next-use"],
]  # fmt: skip
_WARM = 40  # decoded tokens that are not counted


def load(args: argparse.Namespace, run: Sequence[str], context: int) -> Engine:
    """Opens the model with room for exactly the share of experts, whatever else the process takes."""
    options = dict(text.split("=", 1) for text in run[1:])
    bits, dense = options.pop("bits", None), options.pop("dense_bits", None)
    allocation = bits if bits is not None and not bits.isdecimal() else None
    moe = open_moe(args.model)
    room = int(args.room * all_expert_bytes(moe, len(moe.ladder)))
    if dense is not None:  # what it frees of the same memory
        top = len(moe.dense_ladder)
        room += dense_bytes(moe, top) - dense_bytes(moe, moe.dense_level(int(dense)))
    return edgemoe.load(
        args.model, slots=room, scheduler=run[0], options=options, experts=args.experts, context=context,
        threads=args.threads, bits="auto" if allocation else None if bits is None else int(bits),
        allocation=allocation, dense_bits=None if dense is None else int(dense),
    )  # fmt: skip


def is_fixed(engine: Engine) -> bool:
    """Returns whether answers are independent of what is resident, so that many tokens can be scored at once."""
    ours = ("dense weights", "experts at", "experts beyond", "experts below")
    starts = tuple(f"lossy: {what}" for what in ours)
    return engine.options.scheduler == "on-demand" and all(
        n.startswith(starts) for n in engine.notes
    )


def quality(args: argparse.Namespace, runs: Sequence[Sequence[str]], sample: Sample) -> None:
    """Scores every run against the exact one."""
    path = args.out.with_suffix(".logprobs")
    context = sample.windows.shape[1]
    try:
        with load(args, EXACT, context) as engine, open(path, "wb") as file:
            record = LogProbsWriter(file, sample.windows, engine.config.vocab_size)
            keep(args, EXACT, score(engine, sample, record=record), {})
        with LogProbs(path) as reference:
            reference.losses = record.losses
            for run in runs:
                if run == EXACT:
                    continue
                with load(args, run, context) as engine:
                    step = None if is_fixed(engine) else 1
                    found = score(engine, sample, reference=reference, step=step)
                    keep(args, run, found, shares(engine))
    finally:
        path.unlink(missing_ok=True)


def speed(args: argparse.Namespace, runs: Sequence[Sequence[str]], ids: list[int]) -> None:
    """Decodes with every run in turn, several times."""
    for _ in range(args.rounds):
        first = 0.0
        for run in runs:
            with load(args, run, len(ids) + 1) as engine:
                engine.logits(ids[: args.prompt], last_only=True)
                for i, token in enumerate(ids[args.prompt :]):
                    if i == _WARM:
                        base, start = engine.model.store.stats, time.perf_counter()
                    engine.extend([token])
                seconds, now = time.perf_counter() - start, engine.model.store.stats
                d = {k: now[k] - base[k] for k in ("hits", "misses", "bytes_read", "bits", "wait_s")}  # fmt: skip
                count = len(ids) - args.prompt - _WARM
                uses, rate = d["hits"] + d["misses"], count / seconds
                first = first or rate
                before = rows_of(args.out).get(" ".join(run), {})
                found = {
                    "rates": [*before.get("rates", []), rate],
                    "ratios": [*before.get("ratios", []), rate / first],
                    "hit_rate": d["hits"] / uses,
                    "read_per_token": d["bytes_read"] / count, "decoded_bits": d["bits"] / uses,
                    "wait_share": d["wait_s"] / seconds, "room": args.room,
                }  # fmt: skip
                keep(args, run, None, {**found, **shares(engine)})


def shares(engine: Engine) -> dict[str, float]:
    """Returns the shares of the router's choices that were skipped and substituted."""
    e = engine.model.experts
    return {
        "skipped": e.skipped / e.routed,
        "substituted": e.scheduler.substituted / e.routed,
    }


def keep(args: argparse.Namespace, run: Sequence[str], found: Any, more: dict[str, Any]) -> None:
    """Adds to a run's row in the file of results."""
    rows = rows_of(args.out)
    row = rows.setdefault(" ".join(run), {})
    if found is not None:
        names = ("positions", "perplexity", "kl", "kl_error", "loss_change", "loss_error", "average_bits")  # fmt: skip
        row.update({name: getattr(found, name) for name in names})
    row.update(more)
    args.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(line(" ".join(run), row), flush=True)


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    """Returns what a file of results holds."""
    return json.loads(path.read_text()) if path.exists() else {}  # type: ignore[no-any-return]


HEAD = (
    "| run | perplexity | KL | bits | skipped | subst. | MB/token | hit | waiting | tok/s | × exact |\n"
    f"|{'---|' * 11}"
)  # fmt: skip


def line(name: str, row: dict[str, Any]) -> str:
    """Returns a run's line of the table."""
    cells = [name]
    if row.get("loss_change") is not None:
        change, error = percent(row["loss_change"]), 100 * row["loss_error"]
        cells += [f"{change:+.2f} ± {error:.2f}%", f"{row['kl']:.5f}"]
    else:
        cells += [f"{row['perplexity']:.2f}" if "perplexity" in row else "", "0"]
    cells.append(f"{row.get('decoded_bits', row.get('average_bits', 0)):.2f}")
    cells += [f"{100 * row.get(k, 0.0):.1f}%" for k in ("skipped", "substituted")]
    if "rates" in row:
        rate = statistics.median(row["rates"])
        cells += [
            f"{row['read_per_token'] / 1e6:.2f}", f"{100 * row['hit_rate']:.0f}%",
            f"{100 * row['wait_share']:.0f}%", f"{rate:.1f}",
        ]  # fmt: skip
        cells.append(f"{statistics.median(row['ratios']):.2f}")
    return f"| {' | '.join(cells)} |"


def percent(loss_change: float) -> float:
    """Returns the change of the perplexity in percent."""
    return 100 * math.expm1(loss_change)


def plot(rows: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    """Draws the change of perplexity over speed; bars are one standard error, and the middle half of the rounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.add_subplot()
    number = 0
    for name, row in rows.items():
        if "ratios" not in row or "perplexity" not in row:
            continue
        low, speed, high = np.percentile(row["ratios"], [25, 50, 75])
        is_exact = row["loss_change"] is None
        loss = 0.0 if is_exact else percent(row["loss_change"])
        bars = axes.errorbar(
            [speed], [loss], yerr=None if is_exact else [100 * row["loss_error"]],
            xerr=[[speed - low], [high - speed]],
            fmt="*" if is_exact else "o", markersize=14 if is_exact else 5, linewidth=1,
        )  # fmt: skip
        short = name.replace("eviction=next-use", "").replace("on-demand ", "").strip()
        label = f"exact, {statistics.median(row['rates']):.0f} tokens/s" if is_exact else short
        number += 1
        bars.set_label(f"{number}  {label}")
        axes.annotate(str(number), (speed, loss), xytext=(4, 4), textcoords="offset points")
    axes.axhline(1, color="grey", linestyle="--", linewidth=1)
    axes.axvline(1.5, color="grey", linestyle="--", linewidth=1)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_xlabel("tokens/s, times the exact run's")
    axes.set_ylabel("perplexity above the exact run's, %")
    axes.set_title(title, fontsize="small")
    axes.grid(visible=True, alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)


def text_of(args: argparse.Namespace) -> tuple[str, Tokenizer] | None:
    """Returns the text and its tokenizer; None for a model of random weights, which has no tokenizer."""
    sections = open_moe(args.model).sections
    if "tokenizer.json" not in sections:
        return None
    text = default_text() if args.text is None else args.text.read_text(encoding="utf-8")
    return text, Tokenizer.from_files(sections)


def random_tokens(args: argparse.Namespace, count: int) -> NDArray[np.int32]:
    rng = np.random.default_rng(0)
    return rng.integers(open_moe(args.model).config.vocab_size, size=count, dtype=np.int32)


def sample_of(args: argparse.Namespace) -> Sample:
    """Returns the sample to measure quality on."""
    if (found := text_of(args)) is not None:
        return Sample.of_text(*found, chunk=args.chunk, chunks=args.chunks)
    return Sample(random_tokens(args, args.chunks * args.chunk).reshape(args.chunks, -1), None)


def tokens_of(args: argparse.Namespace, count: int) -> list[int]:
    """Returns the tokens to measure speed on."""
    if (found := text_of(args)) is not None:
        return found[1].encode(found[0])[:count]
    return random_tokens(args, count).tolist()  # type: ignore[no-any-return]


def main() -> None:
    """Measures what is asked for, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, help="results, added to")
    parser.add_argument("--text", type=Path, help="default: that of edgemoe quality")
    parser.add_argument("--room", type=float, default=0.25)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=0, help="measure quality on so many")
    parser.add_argument("--rounds", type=int, default=0, help="measure speed so often")
    parser.add_argument("--prompt", type=int, default=64, help="of the measurement of speed")
    parser.add_argument("--tokens", type=int, default=200, help="likewise, decoded")
    parser.add_argument("--experts", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--run", nargs="+", action="append", help="a scheduler and its options")
    parser.add_argument("--plot", type=Path, help="draw all rows of OUT")
    args = parser.parse_args()
    if args.chunks:
        quality(args, args.run or RUNS, sample_of(args))
    if args.rounds:
        ids = tokens_of(args, args.prompt + args.tokens)
        runs = [EXACT, *(r for r in args.run if r != EXACT)] if args.run else RUNS
        speed(args, runs, ids)
    rows = rows_of(args.out)
    print("\n".join([HEAD, *(line(name, row) for name, row in rows.items())]))
    if args.plot is not None:
        share = f"room for {args.room:.0%} of the experts"
        plot(rows, args.plot, f"{args.model.stem}, {share}")


if __name__ == "__main__":
    main()
