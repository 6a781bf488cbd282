"""`edgemoe quality --tasks`: what a level or a scheduler costs in right answers."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemoe.cli.console import note, say
from edgemoe.cli.progress import Progress
from edgemoe.cli.reference import exact_run, reference_name
from edgemoe.cli.table import run_name
from edgemoe.file.whole import write_whole

if TYPE_CHECKING:
    from edgemoe.file.format import MoeFile
    from edgemoe.lab.quality.quality import Trial
    from edgemoe.lab.quality.tasks import Item, Score

__all__ = ["add_flags", "check_tasks", "run_tasks"]

HEAD = """\
| scheduler | bits | dense bits | task | items | right | change | ln p of the answer | change |
|---|---|---|---|---|---|---|---|---|"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags to `edgemoe quality`."""
    parser.add_argument("--tasks", nargs="+", metavar="FILE.jsonl",
                        help="count right answers instead; built in: arithmetic, copying, needle")  # fmt: skip
    parser.add_argument("--items", type=int, default=100, metavar="N",
                        help="items of each built-in task (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of built-in tasks (default: %(default)s)",
    )


def check_tasks(args: argparse.Namespace) -> None:
    """Raises a ValueError for flags that do not go together."""
    for name in ("text", "chunk", "chunks", "plot"):
        if getattr(args, name) is not None:
            raise ValueError(f"--tasks: expected without --{name}, which is about perplexity")
    if args.store:
        raise ValueError("--tasks: expected without --store, which keeps perplexities")
    if args.items < 1:
        raise ValueError(f"--items: expected at least 1, got {args.items}")


def run_tasks(args: argparse.Namespace, moe: MoeFile, trials: Sequence[Trial]) -> int:
    """Judges the reference and every trial, prints the table, and returns the exit code.

    Raises:
        ValueError: an item is malformed, or the reference is neither a level nor a `.moe` file.
        FormatError: a file is not sound.
    """
    from edgemoe.errors import FormatError
    from edgemoe.lab.quality.tasks import judge, scores
    from edgemoe.text.tokenizer import Tokenizer

    items = _items(args)
    if "tokenizer.json" not in moe.sections:
        raise FormatError(f"{moe.path}: has no tokenizer; --tasks are texts")
    tokenizer = Tokenizer.from_files(moe.sections)
    path, base = _reference(args, moe)
    with Progress(f"reference, {base.bits} bits", unit="item") as bar:
        known = judge(path, base, items, tokenizer, progress=bar)
    rows: list[dict[str, Any]] = []
    say(*HEAD.split("\n"))
    for trial in trials:
        outcomes = None
        if not (path == args.model and trial == base):
            with Progress(f"{trial.bits} bits, {trial.scheduler}", unit="item") as bar:
                outcomes = judge(args.model, trial, items, tokenizer, progress=bar)
        for score in scores(outcomes or known, None if outcomes is None else known):
            rows.append(_row(trial, score))
            say(_line(rows[-1]))
    note(
        f"# {len(items)} items; reference: {reference_name(path, base)}; ± standard errors over items"
    )
    if args.json is not None:
        report: dict[str, Any] = {"command": sys.argv, "model": args.model.name, "rows": rows}
        if args.adapter:
            report["adapter"] = args.adapter[0]
        write_whole(args.json, f"{json.dumps(report, indent=1)}\n".encode())
    return 0


def _items(args: argparse.Namespace) -> list[Item]:
    from edgemoe.lab.quality.made_tasks import MADE, made
    from edgemoe.lab.quality.tasks import read_items

    items: list[Item] = []
    for name in args.tasks:
        items += made([name], args.items, args.seed) if name in MADE else read_items(name)
    return items


def _reference(args: argparse.Namespace, moe: MoeFile) -> tuple[Path, Trial]:
    """Returns the file of the reference, and how to run it."""
    from edgemoe.file.reader import open_moe

    given: str | None = args.reference
    path, other, bits = args.model, moe, moe.ladder[-1][0]
    if given is not None and given.isdecimal():
        bits = int(given)
        moe.level(bits)
    elif given is not None:
        path = Path(given)
        if path.is_dir() or path.suffix != ".moe":
            raise ValueError(
                f"--reference: with --tasks expected a level or a .moe file, got {given}"
            )
        other = open_moe(path)
        bits = other.ladder[-1][0]
    return path, exact_run(args, other, bits)


def _row(trial: Trial, score: Score) -> dict[str, Any]:
    return {
        "scheduler": trial.scheduler,
        "options": dict(trial.options),
        "bits": trial.bits,
        "dense_bits": trial.dense_bits,
        "cache_types": [trial.cache_type_k, trial.cache_type_v],
        **dataclasses.asdict(score),
    }


def _line(row: dict[str, Any]) -> str:
    right = f"{100 * row['right']:.1f} ± {100 * row['right_error']:.1f}%"
    changes = ["reference", "–"]
    if row["right_change"] is not None:
        changes = [
            f"{100 * row['right_change']:+.1f} ± {100 * row['right_change_error']:.1f}%",
            f"{row['logprob_change']:+.4f} ± {row['logprob_change_error']:.4f}",
        ]
    return (
        f"| {run_name(row)} | {row['bits']} | {row['dense_bits']} | {row['task']} | {row['items']} "
        f"| {right} | {changes[0]} | {row['logprob']:.3f} | {changes[1]} |"
    )
