"""What `edgemoe quality` measures on and compares with: a text's tokens, and the reference's predictions."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.cli.engine import one_adapter
from edgemoe.cli.progress import Progress
from edgemoe.errors import FormatError

if TYPE_CHECKING:
    from edgemoe.file.format import MoeFile
    from edgemoe.lab.quality.logprobs import LogProbs
    from edgemoe.lab.quality.quality import Quality, Sample, Trial

__all__ = ["CHUNK", "EXACT", "exact_run", "reference", "reference_name"]

CHUNK = 512
"""Tokens, as in llama-perplexity."""
EXACT = "on-demand"
"""The reference's scheduler."""


def reference(
    args: argparse.Namespace, moe: MoeFile, stack: ExitStack
) -> tuple[Sample, str, LogProbs, Trial | None, Quality | None]:
    """Returns the sample to measure on, a line about it, and the reference's log-probabilities.

    The last two items are the run of a `.moe` file that made the reference, and that run's quality. Both are None where
    the reference came from a checkpoint or another program; the quality is None, too, where the run was of another
    file.

    Args:
        args: the arguments of `edgemoe quality`.
        stack: closes what is opened.

    Raises:
        ValueError: a number is out of range, or the text and the flags do not go together.
        FormatError: the file or the reference is not sound.
        OSError: something cannot be read, or the disk is full.
    """
    from edgemoe.file.reader import open_moe
    from edgemoe.lab.quality.logprobs import LogProbs
    from edgemoe.lab.quality.quality import Sample, first_token, recorded
    from edgemoe.text.tokenizer import Tokenizer

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
        text, tokenizer, chunk=CHUNK if args.chunk is None else args.chunk, chunks=args.chunks
    )
    if given is not None and _is_source(Path(given)):
        log_probs = _checkpoint(Path(given), sample, moe, stack)
        about = f"text: {name}, {_shape(sample)}; reference: {Path(given).resolve().name}, float32"
        return sample, about, log_probs, None, None
    path, other = args.model, moe
    bits = moe.ladder[-1][0]
    if given is not None and given.isdecimal():
        bits = int(given)
        moe.level(bits)
    elif given is not None:
        path = Path(given)
        try:
            other = open_moe(path)
        except FormatError as error:
            raise FormatError(f"--reference: {error}; see edgemoe quality --help") from None
        if other.config.vocab_size != moe.config.vocab_size:
            raise ValueError(f"--reference: {given} has another vocabulary than {moe.path}")
        bits = other.ladder[-1][0]
    trial = exact_run(args, other, bits)
    with Progress(f"reference, {bits} bits", unit="chunk") as progress:
        quality, log_probs = stack.enter_context(recorded(path, trial, sample, progress=progress))
    about = f"text: {name}, {_shape(sample)}; reference: {reference_name(path, trial)}"
    return sample, about, log_probs, trial, quality if path == args.model else None


def exact_run(args: argparse.Namespace, moe: MoeFile, bits: int) -> Trial:
    """Returns the run that makes a reference: a level of the measured model with its adapter, or another file alone."""
    from edgemoe.lab.quality.quality import Trial
    from edgemoe.lab.report.levels import dense_bits_at

    is_other = args.reference is not None and not args.reference.isdecimal()
    return Trial(
        bits=bits, dense_bits=dense_bits_at(moe, bits), scheduler=EXACT, ram=args.ram,
        threads=args.threads, verify=not args.no_verify,
        adapters=None if is_other else one_adapter(args),
    )  # fmt: skip


def reference_name(path: Path, trial: Trial) -> str:
    """Returns the name of the run that makes the reference."""
    from edgemoe.runtime.adapters import named_adapters

    beside = "".join(f" with {name}" for name in named_adapters(trial.adapters))
    return f"{path.name}{beside}, {trial.bits} bits"


def _checkpoint(path: Path, sample: Sample, moe: MoeFile, stack: ExitStack) -> LogProbs:
    from edgemoe.convert.open import open_checkpoint
    from edgemoe.convert.source import SourceModel
    from edgemoe.lab.quality.checkpoint import recorded_checkpoint

    model = SourceModel(open_checkpoint(path))
    if model.config.vocab_size != moe.config.vocab_size:
        raise ValueError(f"--reference: {path} has another vocabulary than {moe.path}")
    with Progress("reference, float32", unit="layer") as progress:
        return stack.enter_context(recorded_checkpoint(model, sample, progress=progress))


def _is_source(path: Path) -> bool:
    """Returns whether a path is a checkpoint's directory or a GGUF file."""
    from edgemoe.convert.open import is_gguf

    return path.is_dir() or is_gguf(path)


def _is_saved(path: Path) -> bool:
    from edgemoe.lab.quality.logprobs import MAGIC

    if path.is_dir():
        return False
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _text(path: Path | None) -> tuple[str, str]:
    """Returns a text and its name; for None the text that comes with the package."""
    from edgemoe.lab.quality.text import default_text

    if path is None:
        return default_text(), "the package's own (Moby-Dick, speeches)"
    try:
        return path.read_bytes().decode(), path.name
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected UTF-8 text, got another byte at offset {error.start}"
        ) from None


def _shape(sample: Sample) -> str:
    count, chunk = sample.windows.shape
    return f"{count} chunk{'' if count == 1 else 's'} of {chunk} tokens"
