"""The interface of a checkpoint: named float tensors, a config, and the tokenizer's files."""

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
    """A model in Hugging Face's layout, whatever the file format. Tensors are read one at a time."""

    @property
    def name(self) -> str:
        """A short name for messages and provenance: the name of the directory or file."""

    @property
    def identity(self) -> str:
        """A text that changes when the weights' files do: their names, sizes and modification times."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of config.json."""

    @property
    def files(self) -> Mapping[str, bytes]:
        """The content, by name, of those that exist of tokenizer.json, tokenizer_config.json, special_tokens_map.json,
        chat_template.jinja, generation_config.json and LICENSE."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, by name."""

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Reads one tensor as float32, C-contiguous. Raises FormatError when it is missing or broken."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """A range of bytes in a file, `stop` excluded."""

    path: Path
    start: int
    stop: int


class StoredCheckpoint(Checkpoint, Protocol):
    """A checkpoint that knows where its tensors lie, so that one can be read before all files are downloaded."""

    def places(self, name: str) -> Iterator[Bytes]:
        """Yields all byte ranges that `tensor(name)` reads. Raises FormatError when there is no such tensor."""


def sections(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Returns the sections that a `.moe` file keeps of a checkpoint: config.json and `Checkpoint.files`, by name."""
    config = json.dumps(dict(checkpoint.config), ensure_ascii=False, separators=(",", ":"))
    return {"config.json": config.encode(), **checkpoint.files}


def file_identity(paths: Sequence[Path]) -> str:
    """Returns the names, sizes in bytes and modification times in nanoseconds of files as one text."""
    stats = [(p.name, p.stat()) for p in paths]
    return " ".join(f"{name}:{s.st_size}:{s.st_mtime_ns}" for name, s in stats)


def listed(names: Iterable[str]) -> str:
    """Returns words for a list of tensors: the first three names and how many more there are; empty for none."""
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
    """Checks that a head stored in addition to a tied embedding is a copy of the embedding.

    Raises:
        FormatError: it differs.
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
    """Checks that a model uses every stored tensor, so that none is silently left out.

    Args:
        used: the names of the tensors that the model uses.
        family: the model's family, for the message.
        tied: whether the head is the embedding; a copy of the embedding may then be stored as the head.
        embed: the name of the embedding.
        are_there: whether the weights can be read now; if not, the caller must call `require_tied` once they can.

    Raises:
        FormatError: a tensor is left over; the message names up to three.
    """
    known = set(used)
    if tied and HEAD in checkpoint.shapes and HEAD not in known:
        if are_there:
            require_tied(checkpoint, embed)
        known.add(HEAD)
    # Old checkpoints store the RoPE frequencies too; they follow from config.json.
    unused = listed(
        n for n in checkpoint.shapes if n not in known and not n.endswith("rotary_emb.inv_freq")
    )
    if unused:
        raise FormatError(f"not part of a model of family {family}: {unused}")
