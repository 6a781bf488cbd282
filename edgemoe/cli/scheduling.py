"""The flags `--scheduler` and `--set`, and `edgemoe schedulers`, which lists their values."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgemoe.cli.console import drop_stdout, error_line, note, say
from edgemoe.cli.parser import Parser

__all__ = ["SET_HELP", "main", "options_text", "read_settings"]

SET_HELP = (
    "an option of the scheduler, or @FILE.toml with several; may be repeated; "
    "`--set help` lists them"
)

_WIDTH = 96


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `edgemoe schedulers`.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code: 0, or 1 when there is no scheduler of that name.

    Raises:
        SystemExit: with code 2 at wrong usage.
    """
    parser = Parser(
        prog="edgemoe schedulers",
        description="Describe the schedulers of --scheduler, and the options that --set gives them.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="describe only this one")
    args = parser.parse_args(argv)
    from edgemoe.scheduler import KINDS

    if args.name is not None and args.name not in KINDS:
        parser.error(f"{args.name}: expected one of {', '.join(KINDS)}")
    names = list(KINDS) if args.name is None else [args.name]
    try:
        parts = [_about(name) for name in names] + [_shared()] * (args.name is None)
        say(*"\n\n".join(parts).split("\n"))
    except BrokenPipeError:
        return 1
    except OSError as error:
        note(f"{parser.prog}: {error_line(error)}")
        return 1
    finally:
        drop_stdout()
    return 0


def options_text(name: str) -> str:
    """Returns what `--set help` prints.

    Raises:
        ValueError: there is no such scheduler.
    """
    from edgemoe.scheduler import KINDS

    if name not in KINDS:
        raise ValueError(f"scheduler: expected one of {', '.join(KINDS)}, got {name}")
    return _about(name) + "\n\n" + _shared()


def read_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Returns the options that the values of `--set` give; a later one replaces an earlier one.

    Raises:
        ValueError: neither KEY=VALUE nor @FILE, or the file is not TOML of plain values.
        OSError: the file cannot be read.
    """
    options: dict[str, Any] = {}
    for text in texts:
        if text.startswith("@"):
            options |= _read_toml(Path(text[1:]))
            continue
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"--set: expected KEY=VALUE or @FILE.toml, got {text!r}")
        options[name.replace("-", "_")] = value
    return options


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    for name, value in table.items():
        if isinstance(value, (dict, list)):
            raise ValueError(f"{path}: {name}: expected one value, got a table or list")
    return {name.replace("-", "_"): value for name, value in table.items()}


def _about(name: str) -> str:
    """Returns a scheduler's paragraph and options."""
    from edgemoe.scheduler import KINDS

    kind = KINDS[name]
    text = inspect.cleandoc(kind.__doc__ or "").replace("`", "")
    if kind.paper:
        text += f"\n\nPaper: {kind.paper}."
    drops = "its own" if kind.drops == "own" else kind.drops
    paragraphs = [textwrap.fill(p, _WIDTH, initial_indent="  ", subsequent_indent="  ")
                  for p in text.split("\n\n")]  # fmt: skip
    return "\n".join([name, *paragraphs, f"  Eviction: {drops}.", *_options(kind.Options)])


def _shared() -> str:
    from edgemoe.scheduler import SHARED

    lines = ["with any of them"]
    for kind in SHARED:
        lines += _options(kind)
    return "\n".join(lines)


def _options(kind: type) -> list[str]:
    from edgemoe.scheduler.options import describe

    lines = []
    for o in describe(kind):
        default = ("off", "on")[o.default] if isinstance(o.default, bool) else o.default
        listed = f"; one of {', '.join(o.choices)}" if o.choices else ""
        lines.append(
            textwrap.fill(
                f"{o.name}={default}  {o.help}{listed}", _WIDTH,
                initial_indent="    ", subsequent_indent="        ",
            )
        )  # fmt: skip
    return lines


if __name__ == "__main__":
    sys.exit(main())
