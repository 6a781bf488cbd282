"""`edgemoe allocate --method search`: bits for experts, other matrices, keys and values within one number of bytes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.cli.allocated import check_target, show
from edgemoe.cli.console import check_output, decode_text, note, say
from edgemoe.cli.names import model_path
from edgemoe.cli.progress import Progress
from edgemoe.file.whole import write_whole

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgemoe.lab.bits.everything import Found

__all__ = ["goes_on", "kept", "search"]

_PROG = "edgemoe allocate"
_CONTEXT, _WINDOW, _WINDOWS, _GENERATIONS = 4096, 256, 16, 40


def kept(args: argparse.Namespace) -> Path:
    """Returns the file that holds the state of an unfinished search."""
    path: Path = args.out or args.model
    return path.with_suffix(".search")


def goes_on(args: argparse.Namespace) -> str:
    """Returns what a line says about going on with a search that has not ended."""
    same = "the same command without --overwrite" if args.overwrite else "the same command"
    return f"{same} goes on from {kept(args)}"


def search(args: argparse.Namespace) -> int:
    """Searches, writes what it found, and prints it.

    Returns:
        The exit code: 130 where Ctrl-C ended it, else 0.

    Raises:
        ValueError: a flag is missing, or one does not apply to a search.
    """
    for name in ("avg_bits", "levels"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: search takes --bytes alone")
    if args.per_layer:
        raise ValueError("--per-layer: search takes --bytes alone")
    if args.bytes is None:
        raise ValueError("--method search: expected --bytes")
    if args.calibration is None:
        raise ValueError("--method search: expected --calibration; edgemoe calibrate makes it")
    args.model = model_path(str(args.model))
    out: Path = args.out or args.model.with_suffix(".allocation.json")
    _check_targets(args, out)
    import numpy as np

    from edgemoe.file.reader import open_moe
    from edgemoe.lab.bits.calibrate import default_text as calibration_text
    from edgemoe.lab.bits.calibrate import windows_of
    from edgemoe.lab.bits.everything import search_everything
    from edgemoe.lab.bits.measuring import TimeIsOver
    from edgemoe.lab.bits.search import Rounds
    from edgemoe.lab.quality.text import default_text
    from edgemoe.quant import Calibration

    moe, calibration = open_moe(args.model), Calibration(args.calibration)
    if calibration.note:
        note(f"{_PROG}: {calibration.note}")
    most = moe.config.context_length
    context = min(_CONTEXT, most) if args.context is None else args.context
    if context > most:
        raise ValueError(f"--context: expected at most {most} (the model's), got {context}")
    count = _WINDOWS if args.chunks is None else args.chunks
    if count < 1:
        raise ValueError(f"chunks: expected at least 1, got {count}")

    def cut(path: Path | None, default: str) -> NDArray[np.int32]:
        """Returns windows [N, T], spread evenly over a text and shuffled with a fixed seed."""
        text = default if path is None else decode_text(path.read_bytes(), path)
        window = _WINDOW if args.window is None else args.window
        every = windows_of(moe, text, window=window, count=None)
        which = np.linspace(0, len(every) - 1, min(count, len(every))).round().astype(int)
        return every[np.random.default_rng(0).permutation(which)]

    tokens, held_out = cut(args.text, calibration_text()), cut(args.held_out, default_text())
    few = max(len(tokens) // 8, 1)
    rounds = Rounds(
        generations=_GENERATIONS if args.generations is None else args.generations, seed=args.seed or 0,
        alone=-(-len(tokens) // 2), windows=(few, min(2 * few, len(tokens)), len(tokens)),
    )  # fmt: skip
    seconds = None if args.minutes is None else 60 * args.minutes
    try:
        with Progress("searching", unit="layer") as progress:
            found = search_everything(
                args.model, calibration, tokens, args.bytes, kept(args), context=context, rounds=rounds,
                held_out=held_out, protect=not args.no_protect, is_new=args.overwrite, seconds=seconds,
                progress=progress, ram=args.ram, threads=args.threads,
            )  # fmt: skip
    except TimeIsOver as error:
        raise TimeIsOver(f"{error}; {goes_on(args)}") from None
    _write(args, found, out)
    show(found.allocation)
    _show_rest(found, context)
    if found.generation < rounds.generations or found.is_interrupted:
        note(
            f"{_PROG}: {'interrupted' if found.is_interrupted else 'time is over'} after "
            f"{found.generation} of {rounds.generations} generations; {goes_on(args)}"
        )
    else:
        kept(args).unlink(missing_ok=True)
    return 130 if found.is_interrupted else 0


def _check_targets(args: argparse.Namespace, out: Path) -> None:
    """Checks that every output can be written, and that none is also an input or another output."""
    search = kept(args)
    check_output(search, args.model, args.calibration, args.text, args.held_out)
    check_target(args, out)
    if args.store:
        return
    check_target(args, _table_path(out))
    for path in (out, _table_path(out)):
        if os.path.realpath(path) == os.path.realpath(search):
            raise ValueError(
                f"-o: {path} is where the search lies while it is under way; expected another name"
            )


def _table_path(out: Path) -> Path:
    """Returns the file for the table of KV cache types."""
    stem = out.name.removesuffix(".json").removesuffix(".allocation")
    return out.with_name(f"{stem}.kv.json")


def _write(args: argparse.Namespace, found: Found, out: Path) -> None:
    """Writes the allocation and, if there is one, the table of KV cache types."""
    if args.store:
        from edgemoe.file.append import add_sections

        sections = {"allocation": found.allocation.to_json()}
        if found.table is not None:
            sections["kv_types"] = found.table.to_json()
        add_sections(args.model, sections)  # in one step, so that neither is stored alone
        note(f"{_PROG}: stored in {args.model}")
        return
    write_whole(out, found.allocation.to_json())
    if found.table is not None:
        write_whole(_table_path(out), found.table.to_json())
    both = f"{out} and {_table_path(out)}" if found.table is not None else f"{out}"
    note(f"{_PROG}: wrote {both}")


def _show_rest(found: Found, context: int) -> None:
    """Prints the bits of everything but the experts, and what the choice costs."""
    say("", "| matrices | bits |", "|---|---|")
    for name, bits in found.allocation.dense.items():
        say(f"| {name} | {bits} |")
    if found.table is not None:
        say("", "| layer | keys | values |", "|---|---|---|")
        for layer, row in enumerate(found.table.layers):
            say(f"| {layer} | {' | '.join(row or ('–', '–'))} |")
    say(
        "",
        f"{found.bytes / 2**20:.2f} MiB with keys and values of {context} tokens; KL {found.loss:.5f}, "
        f"{found.start_loss:.5f} where it began; {found.kept} generations were better than the one before",
    )
    if found.held_out is not None:
        before, now, error = found.held_out
        say(
            f"on held-out text: KL {now:.5f}, {before:.5f} where it began ({now - before:+.5f} ± {error:.5f})"
        )
