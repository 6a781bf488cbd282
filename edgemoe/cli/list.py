"""`edgemoe list`: the models that are kept here."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from edgemoe import library
from edgemoe.cli.console import note, run_command, say, say_json
from edgemoe.cli.parser import Parser
from edgemoe.errors import size_text

__all__ = ["main"]

_PROG = "edgemoe list"

_EPILOG = """\
A model is a plain file; its name is its path below the folder. EDGEMOE_MODELS names
other folders, separated by colons; new models go to the first of them.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code: 0; 1 for an error, which is one line on stderr.
    """
    args = _parser().parse_args(argv)
    return run_command(_PROG, lambda: _run(args), verbose=args.verbose)


def _run(args: argparse.Namespace) -> None:
    found = [_about(model) for model in library.models()]
    left = library.unfinished()
    if args.json:
        begun = [{"name": u.name, "bytes": u.size, "paths": [*map(str, u.paths)]} for u in left]
        say_json({"folders": [*map(str, library.folders())], "models": found, "unfinished": begun})
        return
    if found:
        say(*_table(found))
    for model in found:
        if "broken" in model:
            note(f"# {model['name']}: {model['broken']}")
    for unfinished in left:
        note(
            f"# {unfinished.name}: unfinished, {size_text(unfinished.size)} on the disk; "
            f"the command that made it goes on, edgemoe rm {unfinished.name} removes it"
        )
    if not found:
        note(
            f"# no models in {library.folders()[0]}: edgemoe pull user/repo gets one, edgemoe-run a demo"
        )


def _about(model: library.Kept) -> dict[str, Any]:
    from edgemoe.errors import EdgemoeError
    from edgemoe.file.reader import open_moe

    status = model.path.stat()
    about: dict[str, Any] = {
        "name": model.name, "path": str(model.path), "bytes": status.st_size, "last_used": int(status.st_atime),
    }  # fmt: skip
    try:
        moe = open_moe(model.path)
    except (EdgemoeError, OSError) as error:
        return {**about, "broken": str(error)}
    origin = moe.source.get("origin")
    return {
        **about,
        "family": moe.config.family,
        "bits": [bits for bits, _, _ in moe.ladder],
        "context": moe.config.context_length,
        "has_quality": "quality" in moe.sections,
        "hub": origin.get("hub") if isinstance(origin, dict) else None,
    }


def _table(models: Sequence[dict[str, Any]]) -> list[str]:
    rows = [("name", "size", "bits", "context", "family", "quality", "last used")]
    rows += [
        (
            m["name"],
            size_text(m["bytes"]),
            "broken"
            if "broken" in m
            else f"{min(m['bits'])}–{max(m['bits'])}"
            if len(m["bits"]) > 1
            else str(m["bits"][0]),
            str(m.get("context", "")),
            m.get("family", ""),
            "measured" if m.get("has_quality") else "",
            _ago(m["last_used"]),
        )
        for m in models
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _ago(when: int) -> str:
    seconds = max(0, int(time.time()) - when)
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            count = seconds // size
            return f"{count} {unit}{'s' * (count > 1)} ago"
    return "just now"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=_PROG, description="List the models that are here.", epilog=_EPILOG)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
