"""What the methods of `edgemoe allocate` share: the text to measure on, where the result goes, how it is shown."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.cli.console import check_output, decode_text, say
from edgemoe.file.whole import write_whole

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgemoe.quant import Allocation

__all__ = ["check_target", "keep", "show", "windows"]


def check_target(args: argparse.Namespace, out: Path) -> None:
    """Checks that the result can be written, before hours are spent on it."""
    if not args.store:
        check_output(out, args.model, args.calibration, args.text, args.held_out)
    elif args.model.exists() and not os.access(args.model, os.W_OK):
        raise PermissionError(f"--store: {args.model} cannot be written")


def windows(args: argparse.Namespace) -> NDArray[np.int32]:
    """Returns the tokens that losses are measured on, as windows [N, T]."""
    from edgemoe.file.reader import open_moe
    from edgemoe.lab.bits.calibrate import default_text, windows_of

    text = default_text() if args.text is None else decode_text(args.text.read_bytes(), args.text)
    return windows_of(
        open_moe(args.model), text,
        window=256 if args.window is None else args.window,
        count=8 if args.chunks is None else args.chunks,
    )  # fmt: skip


def keep(args: argparse.Namespace, out: Path, name: str, content: bytes) -> None:
    """Writes a result into the model file, as a section, or to a file of its own."""
    if args.store:
        from edgemoe.file.append import add_sections

        add_sections(args.model, {name: content})
    else:
        write_whole(out, content)


def show(found: Allocation) -> None:
    """Prints, for each layer, how many experts got each number of bits."""
    given = sorted(set(found.bits.reshape(-1).tolist()))
    say(
        "| layer | average |" + "".join(f" {b} bits |" for b in given),
        "|---|---|" + "---|" * len(given),
    )
    for layer, row in zip(found.layers, found.bits, strict=True):
        counts = "".join(f" {int((row == b).sum())} |" for b in given)
        say(f"| {layer} | {row.mean():.2f} |{counts}")
    counts = "".join(f" {int((found.bits == b).sum())} |" for b in given)
    say(f"| all | {found.average:.2f} |{counts}")
    if found.protected:
        which = ", ".join(f"{layer}.{expert}" for layer, expert in found.protected)
        say("", f"Super Experts (layer.expert), protected: {which}")
