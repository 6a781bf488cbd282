"""`edgemoe profile trace`: runs a text through a model and records the routing."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemoe.cli.console import decode_text, note, say
from edgemoe.cli.engine import engine_flags
from edgemoe.cli.names import model_path
from edgemoe.cli.profile.common import add_command
from edgemoe.cli.scheduling import SET_HELP, options_text, read_settings
from edgemoe.cli.values import ram_size

if TYPE_CHECKING:
    from edgemoe.runtime.engine import Engine

__all__ = ["add"]

_RANDOM_TOKENS = 512


def add(commands: Any) -> None:
    """Adds the subcommand's parser."""
    # fmt: off
    trace = add_command(commands, "trace", _trace, "run a text through a model and record the routing")
    trace.add_argument("model", metavar="MODEL", help="a .moe file")
    trace.add_argument("--text", metavar="FILE",
                       help="UTF-8 text to follow (default: random tokens, as in edgemoe bench)")
    trace.add_argument("-o", "--output", required=True, metavar="FILE", help="the trace to write")
    trace.add_argument("-n", "--tokens", type=int, metavar="N",
                       help=f"the most tokens (default: the whole text, or {_RANDOM_TOKENS} random tokens)")
    trace.add_argument("--prompt", type=int, default=64, metavar="N",
                       help="tokens computed at once, before single ones (default: %(default)s)")
    trace.add_argument("--pieces", type=int, metavar="N",
                       help="instead of --prompt: cut the text, of any length, into sequences of N tokens, each "
                       "computed at once, which is fast; for edgemoe profile train")
    trace.add_argument("--look-ahead", type=int, default=2, metavar="N",
                       help="also ask the routers of the next N layers (default: %(default)s)")
    trace.add_argument("--ram", type=ram_size, metavar="SIZE", help="memory for the whole process")
    trace.add_argument("--bits", type=int, metavar="N", help="of experts (default: the most that the file has)")
    trace.add_argument("--dense-bits", type=int, metavar="N", help="of all other weights (default: the most)")
    trace.add_argument("--experts", type=int, metavar="K", help="experts per token")
    trace.add_argument("-t", "--threads", type=int, metavar="N", help="threads (default: all cores)")
    trace.add_argument("--scheduler", metavar="NAME",
                       help="(default: on-demand without reading ahead, which predictions of speed need)")
    trace.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=SET_HELP)
    trace.add_argument("--no-verify", action="store_true", help="do not check weights while they are read")
    # fmt: on


def _trace(args: argparse.Namespace) -> None:
    from edgemoe.cli.progress import Progress
    from edgemoe.lab.routing.record import follow, follow_pieces
    from edgemoe.runtime.engine import Engine
    from edgemoe.runtime.options import EngineOptions

    if "help" in args.set:
        say(*options_text(args.scheduler or "on-demand").split("\n"))
        return
    options: Mapping[str, Any] = read_settings(args.set)
    if args.scheduler is None:
        options = {"look_ahead": False, **options}
    # Before the model is loaded.
    text = None if args.text is None else decode_text(Path(args.text).read_bytes(), args.text)
    if args.tokens is not None and args.tokens < 2:
        raise ValueError(f"--tokens: expected at least 2, got {args.tokens}")
    if args.pieces is not None and args.pieces < 1:
        raise ValueError(f"--pieces: expected at least 1 token, got {args.pieces}")
    args.model = model_path(args.model)
    ids = _ids(args.model, text, args.tokens, cut=args.pieces is None)
    given = engine_flags(
        args,
        context=len(ids) if args.pieces is None else args.pieces,
        scheduler=args.scheduler or "on-demand",
        options=options,
    )
    with Engine(args.model, EngineOptions(**given)) as engine:
        for line in engine.notes:
            note(f"# {line}")
        engine.record(args.output, look_ahead=args.look_ahead if args.pieces is None else 0)
        with Progress(f"tracing {Path(args.model).name}", unit="tok") as progress:
            if args.pieces is not None:
                follow_pieces(engine, ids, length=args.pieces, progress=progress)
            else:
                follow(engine, ids, prompt=min(args.prompt, len(ids) - 1), progress=progress)
        _say_traced(engine, args.output, len(ids))


def _say_traced(engine: Engine, path: str, count: int) -> None:
    b = engine.budget
    note(
        f"# {path}: {count} tokens; {b.slots / 2**20:.0f} of {b.experts / 2**20:.0f} MiB of experts fit "
        f"({100 * b.slots / b.experts:.0f}%)"
    )


def _ids(model: str, text: str | None, limit: int | None, *, cut: bool) -> list[int]:
    """Returns the tokens of a text, or random ones; with `cut`, no more than the model's context holds."""
    import numpy as np

    from edgemoe.file.reader import open_moe
    from edgemoe.text.tokenizer import Tokenizer

    moe = open_moe(model)
    if text is None:
        rng = np.random.default_rng(1)
        count = _RANDOM_TOKENS if limit is None else limit
        ids: list[int] = rng.integers(0, moe.config.vocab_size, count).tolist()
    elif "tokenizer.json" in moe.sections:
        ids = Tokenizer.from_files(moe.sections).encode(text)[:limit]
    else:
        raise ValueError(f"{model}: has no tokenizer; without --text random tokens are traced")
    if len(ids) < 2:
        raise ValueError(f"expected a text of at least 2 tokens, got {len(ids)}")
    most = moe.config.context_length
    if not cut:
        return ids
    if len(ids) > most:
        note(f"# the first {most} of {len(ids)} tokens: the model was made for no more")
    return ids[:most]
