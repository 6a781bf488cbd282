"""`edgemoe inspect`: what a `.moe` file holds, and whether it is sound."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from edgemoe.cli.console import note, run_command, say, say_json
from edgemoe.cli.names import add_model, model_path
from edgemoe.cli.parser import Parser
from edgemoe.cli.progress import Progress
from edgemoe.cli.table import QUALITY_HEAD, quality_line, run_name
from edgemoe.errors import shortened, size_text

if TYPE_CHECKING:
    from edgemoe.file.adapter import AdapterFile
    from edgemoe.file.format import MoeFile

__all__ = ["main"]

_LONGEST_LINE = 1000  # characters; names in a file may be longer


def main(argv: Sequence[str] | None = None, *, prog: str = "edgemoe inspect") -> int:
    """Runs the command.

    Args:
        argv: the arguments; None for those of the process.
        prog: what the command was called.

    Returns:
        The exit code: 0; 1 for an error or a wrong checksum, each of which is one line on stderr; 130 after Ctrl-C.

    Raises:
        SystemExit: with code 2 at wrong usage.
    """
    args = _parser(prog).parse_args(argv)
    return run_command(prog, lambda: _run(args, prog), verbose=args.verbose)


def _run(args: argparse.Namespace, prog: str) -> int:
    from edgemoe.file.adapter import AdapterFile, open_either
    from edgemoe.lab.report.summary import adapter_summary, summary

    moe = open_either(model_path(args.model))
    about = adapter_summary(moe) if isinstance(moe, AdapterFile) else summary(moe)
    broken: list[str] = []
    if args.verify:
        from edgemoe.file.verify import verify

        with Progress(f"verifying {moe.path.name}", unit="B") as progress:
            broken = verify(moe, progress=progress)
        about["broken"] = broken
    if args.json:
        say_json(about)
    else:
        lines = _adapter_lines(moe) if isinstance(moe, AdapterFile) else _lines(moe, about)
        say(*(shortened(line, _LONGEST_LINE) for line in lines))
        if args.verify and not broken:
            say("", "verified: every checksum matches")
    for what in broken:
        note(f"{prog}: {moe.path}: {what}: the sum does not match")
    return 1 if broken else 0


def _level_name(level: dict[str, Any]) -> str:
    """Returns a level's bits, and those of the matrices that differ from it."""
    (gate, up, down), dense, bits = level["ladder"], level["dense_bits"], level["bits"]
    others = [] if gate == up == down else [f"gate {gate}, up {up}, down {down}"]
    others += [] if dense == bits else [f"everything else {dense}"]
    return f"{bits} bits" + (f" ({'; '.join(others)})" if others else "")


def _lines(moe: MoeFile, about: dict[str, Any]) -> Iterator[str]:
    from edgemoe.lab.report.summary import groups

    c = moe.config
    yield f"{about['file']}: {c.family}, {size_text(moe.file_bytes)}"
    yield (
        f"  {c.num_layers} layers, width {c.hidden_size}, vocabulary {c.vocab_size}, "
        f"context {c.context_length}"
    )
    for i, mixer in enumerate(c.mixers):
        yield f"  {c.layer_mixers.count(i)} layers mix tokens by {mixer}"
    shared = max(c.shared_hidden, default=0)
    yield (
        f"  {c.num_experts} experts of width {c.expert_hidden} in {len(c.moe_layers)} layers, "
        f"{c.experts_per_token} per token{f', and a shared one of {shared}' if shared else ''}"
    )
    yield f"  made from {about['source'].get('name', 'an unnamed checkpoint')}"
    yield f"  weights {about['weights']}, by which adapters name it"
    yield f"  {about['scheme']}"
    if about["correction"]:
        ranks = (f"{kind} {_ranks(of)}" for kind, of in about["correction"].items())
        yield f"  corrections of low rank, by level: {', '.join(ranks)}"
    held = about["experts"]["with_bits"]
    if len(held) > 1:
        counts = ", ".join(f"{count} of {bits}" for bits, count in held.items())
        yield f"  experts of {about['experts']['average_bits']:.3f} bits on average: {counts}"
    yield ""
    yield "| level | experts | everything else | bits/weight |"
    yield "|---|---|---|---|"
    for level in about["levels"]:
        yield (
            f"| {_level_name(level)} | {size_text(level['expert_bytes'])} | {size_text(level['dense_bytes'])} "
            f"| {level['bits_per_weight']:.3f} |"
        )
    yield ""
    yield "| tensors | shape | kind | bytes |"
    yield "|---|---|---|---|"
    experts = about["experts"]
    yield (
        f"| {experts['count']} × expert | 3 × [{c.expert_hidden}, {c.hidden_size}] | nested "
        f"| {size_text(experts['bytes'])} |"
    )
    for name, kind, shape, count, size in groups(moe):
        times = f"{count} × " if count > 1 else ""
        yield f"| {times}{name} | {list(shape)} | {kind} | {size_text(size)} |"
    yield ""
    sections = (f"{name} {size_text(size)}" for name, size in about["sections"].items())
    yield f"sections: {', '.join(sections) or 'none'}"
    if "allocation" in moe.sections:
        from edgemoe.quant.allocation import Allocation

        found = Allocation.from_json(moe.sections["allocation"], f"{moe.path}: section allocation")
        yield f"allocation: {found.method}, {found.average:.3f} bits per expert's weight on average"
    if about.get("quality"):
        yield ""
        yield from _quality(moe, about["quality"])


def _adapter_lines(adapter: AdapterFile) -> Iterator[str]:
    from edgemoe.lab.report.summary import groups

    c, count = adapter.config, len(adapter.which)
    layers = len(set(adapter.which[:, 0].tolist()))
    yield f"{adapter.path.name}: an adapter, {c.family}, {size_text(adapter.file_bytes)}"
    yield f"  for a model of weights {adapter.base}"
    yield f"  made from {adapter.source.get('name', 'an unnamed checkpoint')}"
    yield (
        f"  {count} of {len(c.moe_layers) * c.num_experts} experts, in {layers} of {len(c.moe_layers)} layers, "
        f"{size_text(int(adapter.experts.sizes(len(adapter.ladder)).sum()))}"
    )
    for name, kind, shape, number, size in groups(adapter):
        times = f"{number} × " if number > 1 else ""
        yield f"  {times}{name} {list(shape)} {kind}, {size_text(size)}"


def _quality(moe: MoeFile, stored: dict[str, Any]) -> Iterator[str]:
    """Yields the table that `edgemoe quality --store` has kept, and which of its rows no longer hold."""
    from edgemoe.lab.quality.choice import applies, reference_sum

    try:
        lines = [quality_line(row) for row in stored["rows"]]
        is_past = stored.get("reference_sections") != reference_sum(moe, stored["reference"])
        stale = [
            f"{run_name(row)} at {row['bits']} and {row['dense_bits']} bits"
            for row in stored["rows"]
            if is_past or not applies(moe, row)
        ]
        yield f"quality, measured on {stored['measured_on']}"
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        yield "quality: stored by another version; --json shows it"
        return
    yield from QUALITY_HEAD.split("\n")
    yield from lines
    if stale:
        which = "all rows" if is_past else ", ".join(dict.fromkeys(stale))
        yield (
            f"no longer holds, as sections or the look-up of the embedding's rows have changed: {which}; "
            f"edgemoe quality {shlex.quote(str(moe.path))} --store measures again"
        )


def _ranks(of: Sequence[int]) -> str:
    return "/".join(map(str, of))


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description="Show what a .moe file holds, and check it.")
    add_model(parser)
    parser.add_argument(
        "--verify", action="store_true", help="read all weights and check their checksums"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    return parser


if __name__ == "__main__":
    sys.exit(main())
