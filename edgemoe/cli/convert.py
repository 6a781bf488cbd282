"""`edgemoe convert`: makes a `.moe` file from a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.cli.console import note, run_command
from edgemoe.cli.names import model_path
from edgemoe.cli.parser import Parser
from edgemoe.cli.progress import Progress
from edgemoe.cli.values import share
from edgemoe.errors import size_text

if TYPE_CHECKING:
    from edgemoe.convert.checkpoint import Checkpoint
    from edgemoe.quant import Calibration

__all__ = ["main"]

_PROG = "edgemoe convert"

_EPILOG = """\
SOURCE is a Hugging Face checkpoint directory with safetensors (in floats, or
quantised as released) or a .gguf file (of a split model, the first part).
`edgemoe families` lists what can be read. With --carve, SOURCE is a dense model
of the Llama architecture, whose FFNs are cut into experts.

With --base, SOURCE is a fine-tune of that model: a checkpoint of the same kind
or, with --checkpoint, a LoRA of peft or a folder with some of the tensors.

An interrupted conversion leaves OUT.moe.part, and the same command continues
it. An interrupted conversion to an adapter starts again.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments after `edgemoe convert`; None for those of the process.

    Returns:
        The exit code: 0, 1 for an error (one line on stderr), 2 for wrong usage, 130 for Ctrl-C.
    """
    args = _parser().parse_args(argv)
    return run_command(
        _PROG,
        lambda: _convert(args),
        verbose=args.verbose,
        blames_arguments=True,
        interrupted=lambda: (
            "interrupted; the same command goes on where it stopped"
            if args.base is None
            else "interrupted; nothing was written"
        ),
    )


def _convert(args: argparse.Namespace) -> None:
    out: Path = args.out
    _check_target(out, overwrite=args.overwrite)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent}: no such directory")
    from edgemoe.convert.convert import convert
    from edgemoe.convert.ranks import check_rank
    from edgemoe.quant import SCHEMES, Allocation, Calibration

    scheme = SCHEMES.get(args.scheme)
    if scheme is None:
        raise ValueError(f"--scheme: expected one of {', '.join(SCHEMES)}, got {args.scheme}")
    # The writer checks this too, but only after the minutes that carving takes.
    scheme.favoured(args.bits, args.favour, ("--bits", "--favour"))
    correction = _rank(args.correction)
    calibration = None if args.calibration is None else Calibration(args.calibration)
    if args.thorough:
        scheme = scheme.thorough("--thorough")
        if calibration is not None and calibration.is_full:
            note(
                f"{_PROG}: --thorough changes nothing: with the matrices of {args.calibration} the search is full"
            )
    if args.no_column_scales and args.base is None and calibration is None:
        note(f"{_PROG}: --no-column-scales changes nothing: only with a calibration are there any")
    allocation = None
    if args.allocation is not None:
        allocation = Allocation.from_json(args.allocation.read_bytes(), str(args.allocation))
    if correction is not None:
        check_rank(correction, scheme, calibration)
    if args.base is None and out.suffix == ".moea":
        raise ValueError(f"{out}: is the name of an adapter; expected --base BASE.moe too")
    if args.base is not None or args.checkpoint is not None:
        _convert_adapter(args, calibration)
        return
    source = _carved(args.source) if args.carve else _checkpoint(args.source)
    if "tokenizer.json" not in source.files:
        note(f"{_PROG}: {source.name}: {_without_tokenizer(args.source)}")
    with (
        Progress(f"reading {args.calibration and args.calibration.name}", unit="‰") as reading,
        Progress(f"writing {out.name}", unit="B") as progress,
    ):

        def writing(done: int, total: int) -> None:
            reading.close()  # otherwise its bar would move below the other one
            progress(done, total)

        convert(
            source, out, bits=args.bits, scheme=scheme, calibration=calibration,
            allocation=allocation, favour=args.favour, correction=correction,
            scale_columns=not args.no_column_scales, prune=args.prune, progress=writing, reading=reading,
            say=lambda text: note(f"{_PROG}: {source.name}: {text}"),
        )  # fmt: skip
    note(f"{_PROG}: wrote {out}: {size_text(out.stat().st_size)}")


_OF_BASE = ("bits", "allocation", "favour", "prune", "thorough", "carve", "no_column_scales")
"""Flags that an adapter may not set: its base decides them."""


def _convert_adapter(args: argparse.Namespace, calibration: Calibration | None) -> None:
    """Writes the adapter of a fine-tune."""
    from edgemoe.convert.adapter import convert_adapter
    from edgemoe.file.reader import open_moe

    if args.base is None:
        raise ValueError("--checkpoint: is what --base was made of; expected --base too")
    given = [
        f"--{name.replace('_', '-')}"
        for name in _OF_BASE
        if getattr(args, name) not in (None, False)
    ]
    given += ["--scheme"] if args.scheme != "nested" else []
    given += ["--correction"] if args.correction != "auto" else []
    if given:
        raise ValueError(f"{given[0]}: with --base all is made as the base was; leave it out")
    base = open_moe(model_path(args.base))
    if args.out.exists() and args.out.samefile(base.path):
        raise ValueError(f"{args.out}: is the base itself; expected another file for the adapter")
    original = None if args.checkpoint is None else _checkpoint(args.checkpoint)
    source = _tuned(args.source, original)
    with Progress(f"comparing {source.name}", unit="B") as progress:
        found = convert_adapter(
            source, args.out, base, original=original, calibration=calibration, progress=progress,
            say=lambda text: note(f"{_PROG}: {source.name}: {text}"),
        )  # fmt: skip
    size = args.out.stat().st_size
    if found.experts == found.of_experts:
        note(
            f"{_PROG}: every expert differs: either all were trained, or {base.path.name} was made of another "
            "checkpoint than the one that was tuned, such as a quantised one, or by another version of edgemoe"
        )
    note(
        f"{_PROG}: wrote {args.out}: {size_text(size)}, {100 * size / base.file_bytes:.1f}% of the base; {found}"
    )


def _tuned(path: Path, original: Checkpoint | None) -> Checkpoint:
    """Opens a fine-tune: a whole checkpoint, or changed tensors in place of those of `original`."""
    from edgemoe.convert.patched import is_partial, patched

    if not is_partial(path):
        return _checkpoint(path)
    if original is None:
        raise ValueError(
            f"{path}: has only what was changed; --checkpoint takes what --base was made of"
        )
    return patched(path, original)


def _rank(text: str) -> int | None:
    """Returns the rank that `--correction` asks for, as `convert` takes it: None for auto, 0 for none."""
    if text in ("auto", "none"):
        return {"auto": None, "none": 0}[text]
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"--correction: expected auto, none or a rank, got {text}")
    return int(text)


def _without_tokenizer(path: Path) -> str:
    from edgemoe.convert.folder import other_tokenizer

    text = "no tokenizer.json; the file will take and give token ids only"
    found = other_tokenizer(path)
    if found:
        text += (
            f"; transformers makes one of its {found}: "
            "AutoTokenizer.from_pretrained(SOURCE).save_pretrained(SOURCE)"
        )
    return text


def _check_target(out: Path, *, overwrite: bool) -> None:
    """Refuses to replace anything but a `.moe` file, such as a file of the source or a device."""
    from edgemoe.file.format import MAGIC

    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise FileExistsError(f"{out}: exists; --overwrite replaces it")
    if not out.is_file() or out.is_symlink():
        raise FileExistsError(f"{out}: is not a regular file; --overwrite replaces .moe files only")
    with open(out, "rb") as old:
        if old.read(len(MAGIC)) != MAGIC:
            raise FileExistsError(f"{out}: is not a .moe file; --overwrite replaces only those")


def _checkpoint(path: Path) -> Checkpoint:
    """Opens a checkpoint of a Mixture of Experts."""
    from edgemoe.convert.open import open_checkpoint

    _expect_here(path)
    checkpoint = open_checkpoint(path)
    if checkpoint.config.get("model_type") == "llama":
        raise ValueError(f"{path}: is a dense model; --carve cuts it into experts")
    return checkpoint


def _expect_here(path: Path) -> None:
    """Raises FileNotFoundError for a path that does not exist; one that may be a hub's name gets a hint."""
    if path.exists() or path.is_symlink():
        return
    is_file = path.suffix == ".gguf" or path.is_absolute() or path.parts[:1] == ("..",)
    if len(path.parts) == 2 and not is_file:
        raise FileNotFoundError(
            f"{path}: no such folder or file; edgemoe pull {path} fetches and converts that model of the hub"
        )
    what = "file" if is_file else "folder or file; expected a checkpoint or a GGUF file"
    raise FileNotFoundError(f"{path}: no such {what}")


def _carved(path: Path) -> Checkpoint:
    """Opens a dense checkpoint and cuts its FFNs into experts."""
    from edgemoe.convert.carve.carve import carve
    from edgemoe.convert.open import open_checkpoint

    _expect_here(path)
    dense = open_checkpoint(path)
    with Progress("calibrating", unit="layer") as progress:
        return carve(dense, progress=progress)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=_PROG,
        description="Make a .moe file from a checkpoint.",
        epilog=_EPILOG,
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT.moe", help="the file to make")
    _add_codes(parser)
    parser.add_argument(
        "--base",
        metavar="BASE.moe",
        help="SOURCE is a fine-tune of this model: write an adapter, OUT.moea, with what differs, for --adapter",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="with --base, the checkpoint that BASE.moe was made from: equal tensors need not be converted again",
    )
    parser.add_argument("--carve", action="store_true", help="cut a dense model into experts")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.moe if it exists")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    return parser


def _add_codes(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how weights are quantised."""
    parser.add_argument(
        "--bits",
        type=int,
        metavar="N",
        help="the most bits per weight that the file can be run at; fewer make a smaller file "
        "(default: 8; with --scheme mwq 4, while 5 to 8 mean its version 2, which starts at 5)",
    )
    parser.add_argument(
        "--scheme",
        default="nested",
        metavar="NAME",
        help="nested: every level is a prefix of one code; mwq: D2MoE's base and planes of signs, to compare with; "
        "mxfp4 or nvfp4: keep experts that were released in these 4-bit floats as they are, at one level; all else is "
        "nested (default: %(default)s)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="a file of `edgemoe calibrate`, made with an earlier conversion of the same checkpoint; if made with "
        "--full, every level comes much closer to the checkpoint",
    )
    parser.add_argument(
        "--allocation",
        type=Path,
        metavar="FILE",
        help="a file of `edgemoe allocate`: store only these bits of each expert, which makes a smaller file",
    )
    parser.add_argument(
        "--favour",
        type=int,
        metavar="N",
        help="make the level of N bits better at the cost of the others (default: none; with --allocation "
        "the bits that each expert gets)",
    )
    parser.add_argument(
        "--thorough",
        action="store_true",
        help="search for scales in full, which takes several times as long and leaves 0.4%% less error; with a "
        "calibration made with --full that is done anyway",
    )
    parser.add_argument(
        "--correction",
        default="auto",
        metavar="RANK",
        help="the rank of the low-rank corrections of 2, 3 and 4 bits: 8, 16, 24, 32, none, or auto: what is worth its "
        "bytes; only with a calibration that has matrices of inputs, as made with --full (default: %(default)s)",
    )
    parser.add_argument(
        "--no-column-scales",
        action="store_true",
        help="leave norms as they are; otherwise, with matrices of inputs, strong channels of a norm's output are "
        "scaled down, and the columns that read them up, where that makes less error",
    )
    parser.add_argument(
        "--prune",
        type=share,
        metavar="X%",
        help="leave out this share of every expert's neurons, those that matter least by the calibration; the others "
        "make up for them, if the calibration was made with --full",
    )
