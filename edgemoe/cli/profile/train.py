"""`edgemoe profile train`: trains a predictor of routing paths on traces, and stores it in the model's file."""

from __future__ import annotations

import argparse
import os
from typing import Any

from edgemoe.cli.console import note
from edgemoe.cli.names import model_path
from edgemoe.cli.profile.common import add_command
from edgemoe.errors import size_text

__all__ = ["add"]


def add(commands: Any) -> None:
    """Adds the subcommand's parser."""
    # fmt: off
    train = add_command(commands, "train", _train,
                     "train a predictor of routing paths on traces, and store it in the model's file")
    train.add_argument("model", metavar="MODEL", help="the .moe file that was traced")
    train.add_argument("traces", nargs="+", metavar="TRACE", help="of text like yours, best of 100,000 tokens or more")
    train.add_argument("--width", type=int, default=192, metavar="N",
                       help="width of the network (default: %(default)s)")
    train.add_argument("--rows", type=int, default=16384, metavar="N",
                       help="rows of its embedding, a power of two (default: %(default)s)")
    train.add_argument("--epochs", type=int, default=6, metavar="N", help="passes over traces (default: %(default)s)")
    train.add_argument("--table", action="store_true",
                       help="instead, count which experts follow which, for the scheduler expertwise; needs no torch")
    # fmt: on


def _train(args: argparse.Namespace) -> None:
    from edgemoe.cli.progress import Progress
    from edgemoe.file.append import add_sections
    from edgemoe.file.reader import open_moe
    from edgemoe.lab.routing.paths import pieces, train
    from edgemoe.lab.routing.table import count_paths
    from edgemoe.runtime.trace import read
    from edgemoe.scheduler.paths import SECTION

    args.model = model_path(args.model)
    config = open_moe(args.model).config
    if not os.access(args.model, os.W_OK):  # before the minutes of training
        raise PermissionError(f"{args.model} cannot be written")
    if args.table:
        shape = (len(config.moe_layers), config.num_experts, config.experts_per_token)
        section, tokens = count_paths(map(read, args.traces), shape)
        add_sections(args.model, {"transitions": section})
        note(f"# {tokens} tokens")
        note(
            f"# stored in {args.model}: {len(section) / 2**10:.0f} KiB; --scheduler expertwise uses it"
        )
        return
    ids, uses = pieces(read(path) for path in args.traces)
    expected = (len(config.moe_layers), config.num_experts)
    if uses.shape[2:] != expected or ids.max() >= config.vocab_size:
        raise ValueError(
            f"expected traces of {args.model}, which has {expected[0]} layers of {expected[1]} experts"
        )
    note(f"# {ids.size} tokens")
    with Progress("training", unit="step") as progress:
        section = train(
            ids, uses, width=args.width, rows=args.rows, epochs=args.epochs, progress=progress
        )
    add_sections(args.model, {SECTION: section})
    note(f"# stored in {args.model}: {size_text(len(section))}; --scheduler expertflow uses it, "
         "and --set eviction=next-path")  # fmt: skip
