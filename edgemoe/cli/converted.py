"""Converts a checkpoint that is to be run, once, and keeps the `.moe` file with the other models."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path

from edgemoe import library
from edgemoe.cli.apart import run_apart
from edgemoe.cli.console import note
from edgemoe.errors import size_text

__all__ = ["converted", "is_source"]

_BYTES_PER_WEIGHT = 8.5 / 8  # with all 8 bits
_WEIGHTS_PER_SECOND = 4_000_000  # for each core


def is_source(path: Path) -> bool:
    """Returns whether a path is a source of conversions: a checkpoint's directory or a GGUF file."""
    from edgemoe.convert.open import is_gguf

    return (path / "config.json").is_file() or (path.exists() and is_gguf(path))


def converted(path: Path) -> Path:
    """Returns the `.moe` file of a checkpoint, which is converted the first time.

    Conversion takes memory that `--ram` does not account for, so another process does it. An interrupted conversion
    goes on at the next start.

    Raises:
        FormatError: the checkpoint is not sound, or of a kind that is not supported.
        OSError: a file cannot be read, or the folder of models cannot be made.
        SystemExit: the conversion failed, and its process has said why.
    """
    folder = library.folders()[0]
    out = folder / _name(path)
    if not out.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        note(f"# {path.name} is converted once, to {out}: {_effort(path)}")
        code = run_apart("convert", str(path.resolve()), str(out))
        if code:
            raise SystemExit(code)
    return out


def _name(path: Path) -> str:
    """Returns a file name that changes whenever the checkpoint's files change."""
    from edgemoe.convert.checkpoint import file_identity

    files = (
        [path] if path.is_file() else sorted({*path.glob("*.safetensors"), path / "config.json"})
    )
    digest = hashlib.sha256(f"{path.resolve()} {file_identity(files)}".encode()).hexdigest()
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", path.resolve().name.removesuffix(".gguf"))
    return f"{stem[:80]}-{digest[:12]}.moe"


def _effort(path: Path) -> str:
    """Returns the size and the time that a conversion is expected to take, in words."""
    from edgemoe import hardware
    from edgemoe.convert.open import open_checkpoint

    weights = sum(math.prod(shape) for shape in open_checkpoint(path).shapes.values())
    minutes = weights / (_WEIGHTS_PER_SECOND * hardware.num_threads()) / 60
    time = f"about {minutes:.0f} minutes" if minutes >= 2 else "a few minutes at most"
    return f"about {size_text(weights * _BYTES_PER_WEIGHT)}, {time}"
