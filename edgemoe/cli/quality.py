"""`edgemoe quality`: what each level of a file, or each scheduler, costs in quality."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgemoe.cli.console import note, run_command, write_file
from edgemoe.cli.parser import Parser
from edgemoe.cli.progress import Progress
from edgemoe.cli.scheduling import SET_HELP, options_text, read_settings
from edgemoe.cli.table import QUALITY_HEAD, quality_line
from edgemoe.errors import FormatError

if TYPE_CHECKING:
    from edgemoe.format import MoeFile
    from edgemoe.lab.levels import Level
    from edgemoe.lab.logprobs import LogProbs
    from edgemoe.lab.quality import Quality, Sample, Trial

__all__ = ["main"]

_PROG = "edgemoe quality"
_CHUNK = 512  # as in llama-perplexity
_EXACT = "on-demand"

_EPILOG = """\
The text is cut into chunks and the second half of each is scored, as llama.cpp's
llama-perplexity does. KL is the mean divergence from the reference's predictions,
in nats per token, ± its standard error.

--reference is one of
  BITS        a level of the same file (default: the highest)
  FILE.moe    another file, at its highest level
  DIRECTORY   the checkpoint that the file was converted from, in float32; takes
              a pass of plain numpy over it
  FILE        log-probabilities that another program saved, with their tokens:
              llama-perplexity -m MODEL.gguf -f TEXT --kl-divergence-base FILE, or
              benchmarks/reference_logprobs.py CHECKPOINT TEXT FILE
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code: 0; 1 for an error, which is one line on stderr; 130 after Ctrl-C.

    Raises:
        SystemExit: with code 2 at wrong usage.
    """
    args = _parser().parse_args(argv)
    args.scheduler = args.scheduler or [_EXACT]
    return run_command(_PROG, lambda: _run(args), verbose=args.verbose)


def _run(args: argparse.Namespace) -> None:
    from edgemoe.format import open_moe
    from edgemoe.lab.levels import bits_per_weight, levels
    from edgemoe.lab.quality import measure

    if "help" in args.set:
        print("\n\n".join(options_text(name) for name in args.scheduler))
        return
    _check(args)  # before hours are spent
    moe = open_moe(args.model)
    sizes = levels(moe)
    trials = [_trial(args, moe, s, bits) for s in args.scheduler for bits in _bits(args, moe)]
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        sample, about, reference, base, known = _reference(args, moe, stack)
        about += _settings(args)
        print(QUALITY_HEAD, flush=True)
        for trial in trials:
            if known is not None and dataclasses.replace(trial, decode=False) == base:
                quality = known
            else:
                with Progress(f"{trial.bits} bits, {trial.scheduler}", unit="chunk") as progress:
                    quality = measure(
                        args.model, trial, sample, reference=reference, progress=progress
                    )
            size = bits_per_weight(
                sizes, _average_bits(moe, sizes, trial, quality), trial.dense_bits
            )
            rows.append(_row(trial, size, quality))
            print(quality_line(rows[-1]), flush=True)
    note(f"# {about}; {sample.positions} positions")
    report = {"model": args.model.name, "measured_on": about, "rows": rows}
    if args.json is not None:
        text = json.dumps({"command": sys.argv, **report}, indent=1)
        write_file(args.json, f"{text}\n".encode())
    if args.plot is not None:
        from edgemoe.lab.plot import plot_quality

        plot_quality(rows, args.plot, title=f"{args.model.stem}; {about}")
    if args.store:
        from edgemoe.writer import add_sections

        add_sections(args.model, {"quality": json.dumps(report).encode()})
        note(f"# stored in {args.model}; edgemoe inspect shows it")


def _check(args: argparse.Namespace) -> None:
    from edgemoe.model import KvTypes

    KvTypes(args.cache_type_k, args.cache_type_v)
    for path in (args.json, args.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"{path.parent}: no such directory")
    if args.store and args.model.exists() and not os.access(args.model, os.W_OK):
        raise PermissionError(f"--store: {args.model} cannot be written")
    if args.plot is not None:
        from edgemoe.lab.plot import check_plot

        check_plot(args.plot)


def _bits(args: argparse.Namespace, moe: MoeFile) -> list[int | Literal["auto"]]:
    """Returns the levels to measure, highest first, and the allocation last."""
    given = args.bits or [rung[0] for rung in moe.ladder]
    levels = {b for b in given if b != "auto"}
    for b in levels:
        moe.level(b)  # a ValueError names those that there are
    return [*sorted(levels, reverse=True), *(["auto"] if "auto" in given else [])]


def _level_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _trial(
    args: argparse.Namespace, moe: MoeFile, scheduler: str, bits: int | Literal["auto"]
) -> Trial:
    from edgemoe.lab.levels import dense_bits_at
    from edgemoe.lab.quality import Trial
    from edgemoe.scheduler import SCHEDULERS

    if scheduler not in SCHEDULERS:
        raise ValueError(f"--scheduler: expected one of {', '.join(SCHEDULERS)}, got {scheduler}")
    if args.dense_bits is not None:
        moe.dense_level(args.dense_bits)
    differ = (moe.experts.rungs != len(moe.ladder)).any()
    if bits == "auto" and "allocation" not in moe.sections and not differ:
        raise ValueError(f"--bits auto: {moe.path} holds no allocation; edgemoe allocate makes one")
    dense = args.dense_bits or dense_bits_at(moe, None if bits == "auto" else bits)
    return Trial(
        bits=bits, dense_bits=dense, scheduler=scheduler, options=read_settings(args.set),
        cache_type_k=args.cache_type_k, cache_type_v=args.cache_type_v, ram=args.ram,
        threads=args.threads, verify=not args.no_verify, decode=args.decode,
    )  # fmt: skip


# ------------------------------------------------------------ text and reference


def _reference(
    args: argparse.Namespace, moe: MoeFile, stack: ExitStack
) -> tuple[Sample, str, LogProbs, Trial | None, Quality | None]:
    """Returns what is measured on, a line about it, the reference, and what of this file that has measured already."""
    from edgemoe.format import open_moe
    from edgemoe.lab.levels import dense_bits_at
    from edgemoe.lab.logprobs import LogProbs
    from edgemoe.lab.quality import Sample, Trial, first_token, recorded
    from edgemoe.tokenizer import Tokenizer

    given: str | None = args.reference
    if args.chunks is not None and args.chunks < 1:
        raise ValueError(f"--chunks: expected at least 1, got {args.chunks}")
    tokenizer = Tokenizer.from_files(moe.sections) if "tokenizer.json" in moe.sections else None
    if given is not None and not given.isdecimal() and _is_saved(Path(given)):
        if args.text is not None or args.chunk is not None:
            raise ValueError(f"--text and --chunk: {given} brings its own tokens")
        saved = stack.enter_context(LogProbs(given))
        first = None if tokenizer is None else first_token(tokenizer)
        sample = Sample(saved.windows[: args.chunks], first)
        about = f"tokens and reference: {Path(given).name}, {_shape(sample)}"
        return sample, about, saved, None, None
    if tokenizer is None:
        raise FormatError(
            f"{moe.path}: has no tokenizer; a --reference with tokens makes up for it"
        )
    text, name = _text(args.text)
    sample = Sample.of_text(
        text, tokenizer, chunk=_CHUNK if args.chunk is None else args.chunk, chunks=args.chunks
    )
    if given is not None and Path(given).is_dir():
        reference = _checkpoint(Path(given), sample, moe, stack)
        about = f"text: {name}, {_shape(sample)}; reference: {Path(given).resolve().name}, float32"
        return sample, about, reference, None, None
    path, other = args.model, moe
    bits = moe.ladder[-1][0]
    if given is not None and given.isdecimal():
        bits = int(given)
        moe.level(bits)
    elif given is not None:
        path, other = Path(given), open_moe(given)
        if other.config.vocab_size != moe.config.vocab_size:
            raise ValueError(f"--reference: {given} has another vocabulary than {moe.path}")
        bits = other.ladder[-1][0]
    trial = Trial(
        bits=bits, dense_bits=dense_bits_at(other, bits), scheduler=_EXACT, ram=args.ram,
        threads=args.threads, verify=not args.no_verify,
    )  # fmt: skip
    with Progress(f"reference, {bits} bits", unit="chunk") as progress:
        quality, reference = stack.enter_context(recorded(path, trial, sample, progress=progress))
    about = f"text: {name}, {_shape(sample)}; reference: {path.name}, {bits} bits"
    return sample, about, reference, trial, quality if path == args.model else None


def _checkpoint(path: Path, sample: Sample, moe: MoeFile, stack: ExitStack) -> LogProbs:
    from edgemoe.convert.hf import HFCheckpoint
    from edgemoe.convert.source import SourceModel
    from edgemoe.lab.checkpoint import recorded_checkpoint

    model = SourceModel(HFCheckpoint(path))
    if model.config.vocab_size != moe.config.vocab_size:
        raise ValueError(f"--reference: {path} has another vocabulary than {moe.path}")
    with Progress("reference, float32", unit="layer") as progress:
        return stack.enter_context(recorded_checkpoint(model, sample, progress=progress))


def _is_saved(path: Path) -> bool:
    from edgemoe.lab.logprobs import MAGIC

    if path.is_dir():
        return False
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _text(path: Path | None) -> tuple[str, str]:
    """Returns a text and what it is called; for None the one that comes with the package."""
    from edgemoe.lab.text import default_text

    if path is None:
        return default_text(), "the package's own (Moby-Dick, speeches)"
    try:
        return path.read_bytes().decode(), path.name
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected UTF-8 text, got another byte at offset {error.start}"
        ) from None


def _settings(args: argparse.Namespace) -> str:
    """Returns what was not as usual and has no column in the table."""
    parts = [
        f"; {what} of the KV cache in {kind}"
        for what, kind in (("keys", args.cache_type_k), ("values", args.cache_type_v))
        if kind != "f16"
    ]
    return "".join([*parts, *(f"; {text}" for text in args.set)])


def _shape(sample: Sample) -> str:
    count, chunk = sample.windows.shape
    return f"{count} chunks of {chunk} tokens"


# ------------------------------------------------------------ results


def _average_bits(moe: MoeFile, sizes: list[Level], trial: Trial, quality: Quality) -> float:
    """Returns the mean bits of an expert: of all alike where they are known, else of those that ran."""
    if trial.scheduler == _EXACT and (trial.bits != "auto" or "allocation" not in moe.sections):
        return next(
            size.average_bits for size in reversed(sizes) if trial.bits in ("auto", size.bits)
        )
    return quality.average_bits


def _row(trial: Trial, size: float, quality: Quality) -> dict[str, Any]:
    return {
        "scheduler": trial.scheduler,
        "bits": trial.bits,
        "dense_bits": trial.dense_bits,
        "cache_types": [trial.cache_type_k, trial.cache_type_v],
        "bits_per_weight": size,
        **dataclasses.asdict(quality),
    }


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=_PROG,
        description="Measure perplexity, and divergence from a reference, per level and scheduler.",
        epilog=_EPILOG,
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a .moe file")
    parser.add_argument("-f", "--text", type=Path, metavar="FILE",
                        help="text to predict (default: 64 KB of Moby-Dick and speeches)")  # fmt: skip
    parser.add_argument("--reference", metavar="SOURCE", help="what to compare with; see below")
    parser.add_argument("--bits", type=_level_or_auto, nargs="+", metavar="N",
                        help="levels to measure, or auto, the file's allocation (default: all levels)")  # fmt: skip
    parser.add_argument("--dense-bits", type=int, metavar="N",
                        help="of all that is no expert (default: as --bits)")  # fmt: skip
    parser.add_argument("--scheduler", action="append", metavar="NAME",
                        help="may be repeated (default: on-demand)")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=SET_HELP)
    parser.add_argument("--decode", action="store_true",
                        help="token by token, as replies are made: some schedulers act then only")  # fmt: skip
    for letter, what in (("k", "keys"), ("v", "values")):
        parser.add_argument(f"-ct{letter}", f"--cache-type-{letter}", default="f16", metavar="TYPE",
                            help=f"how {what} are kept: f16 or q8_0 (default: f16)")  # fmt: skip
    parser.add_argument(
        "--chunk", type=int, metavar="N", help=f"tokens of each (default: {_CHUNK})"
    )
    parser.add_argument("--chunks", type=int, metavar="N", help="how many (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE.png",
                        help="draw KL over bits per weight (needs the extra `lab`)")  # fmt: skip
    parser.add_argument("--store", action="store_true",
                        help="keep the figures in the .moe file, for `edgemoe inspect`")  # fmt: skip
    parser.add_argument("-t", "--threads", type=int, metavar="N")
    parser.add_argument("--ram", metavar="SIZE", help="memory for the whole process")
    parser.add_argument("--no-verify", action="store_true", help="do not check sums of weights")
    parser.add_argument("-v", "--verbose", action="store_true", help="tracebacks of errors")
    return parser


if __name__ == "__main__":
    sys.exit(main())
