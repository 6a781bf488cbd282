"""Finds, before hours of conversion, the faults that would make the file useless for text."""

from __future__ import annotations

from edgemoe.convert.checkpoint import Checkpoint
from edgemoe.convert.settings import eos_ids
from edgemoe.errors import FormatError
from edgemoe.text.tokenizer import Tokenizer

__all__ = ["check_text"]


def check_text(checkpoint: Checkpoint, vocab_size: int) -> None:
    """Checks a checkpoint's tokenizer, chat template and end tokens, if it has them.

    Args:
        vocab_size: rows of the embedding.

    Raises:
        FormatError: one of them is wrong; the message names the checkpoint, the file and the fault.
    """
    try:
        eos_ids(checkpoint, vocab_size)
        if "tokenizer.json" in checkpoint.files:
            tokenizer = Tokenizer.from_files(checkpoint.files)
            tokenizer.check_vocabulary(vocab_size)
            tokenizer.read_templates()
    except FormatError as error:
        raise FormatError(f"{checkpoint.name}: {error}") from None
