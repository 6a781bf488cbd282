"""What a converter reads: named float tensors, a config, and the tokenizer's files."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgemoe.errors import FormatError, shortened

__all__ = [
    "HEAD",
    "Bytes",
    "Checkpoint",
    "StoredCheckpoint",
    "file_identity",
    "listed",
    "refuse_unused",
    "require_tied",
    "sections",
]


class Checkpoint(Protocol):
    """A model as Hugging Face lays it out, whatever it is stored in. Tensors are read one at a time."""

    @property
    def name(self) -> str:
        """A short name for messages and provenance (a directory's or file's name)."""

    @property
    def identity(self) -> str:
        """Differs when the weights' files do: their names, sizes and times."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of config.json."""

    @property
    def files(self) -> Mapping[str, bytes]:
        """Those that exist of tokenizer.json, tokenizer_config.json, special_tokens_map.json,
        chat_template.jinja, generation_config.json and LICENSE."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's name and shape."""

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Reads one tensor as float32, C-contiguous. Raises FormatError when it is missing or broken."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """Some bytes of a file."""

    path: Path
    start: int
    stop: int


class StoredCheckpoint(Checkpoint, Protocol):
    """A checkpoint that knows where in its files a tensor lies, so that the others need not be there yet."""

    def places(self, name: str) -> Iterator[Bytes]:
        """Yields all bytes that `tensor(name)` reads. Raises FormatError when there is no such tensor."""


def sections(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Returns what a `.moe` file keeps of a checkpoint besides its weights: config.json, and its files."""
    config = json.dumps(dict(checkpoint.config), ensure_ascii=False, separators=(",", ":"))
    return {"config.json": config.encode(), **checkpoint.files}


def file_identity(paths: Sequence[Path]) -> str:
    """Returns names, sizes and times of files as one text."""
    stats = [(p.name, p.stat()) for p in paths]
    return " ".join(f"{name}:{s.st_size}:{s.st_mtime_ns}" for name, s in stats)


def listed(names: Iterable[str]) -> str:
    """Returns the first three names of tensors and how many more there are; empty for none."""
    shown: list[str] = []
    count = 0
    for count, name in enumerate(names, start=1):  # noqa: B007 (a stack may have millions)
        shown = sorted([*shown, name])[:3]
    if not shown:
        return ""
    more = f" and {count - 3} more" if count > 3 else ""
    return f"tensor{'s' * (count > 1)} {', '.join(map(shortened, shown))}{more}"


HEAD = "lm_head.weight"


def require_tied(checkpoint: Checkpoint, embed: str) -> None:
    """Checks that a head which is stored beside a tied embedding is a copy of that.

    Raises:
        FormatError: it is another one.
    """
    if not np.array_equal(checkpoint.tensor(HEAD), checkpoint.tensor(embed)):
        raise FormatError(f"{HEAD}: differs from {embed}, though tie_word_embeddings is true")


def refuse_unused(
    checkpoint: Checkpoint,
    used: Collection[str],
    *,
    family: str,
    tied: bool,
    embed: str = "model.embed_tokens.weight",
    are_there: bool = True,
) -> None:
    """Checks that a model uses all that is stored, so that nothing of it is silently left out.

    Args:
        used: the names of the tensors that it uses.
        family: of the model, for the message.
        tied: the head is the embedding; a copy of it may be stored.
        embed: the name of the embedding.
        are_there: the weights can be read; else whoever waits for them calls `require_tied`.

    Raises:
        FormatError: names the tensors that are left over.
    """
    known = set(used)
    if tied and HEAD in checkpoint.shapes and HEAD not in known:
        if are_there:
            require_tied(checkpoint, embed)
        known.add(HEAD)
    # Old checkpoints store the RoPE frequencies, which config.json determines.
    unused = listed(
        n for n in checkpoint.shapes if n not in known and not n.endswith("rotary_emb.inv_freq")
    )
    if unused:
        raise FormatError(f"not part of a model of family {family}: {unused}")
