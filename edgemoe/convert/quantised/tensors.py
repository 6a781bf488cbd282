"""Tensors that are decoded from several stored ones, and the search for these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgemoe.convert.checkpoint import Bytes
from edgemoe.convert.quantised.numbers import E4M3, E8M0
from edgemoe.convert.safetensors_file import StoredTensor
from edgemoe.convert.settings import Settings
from edgemoe.errors import FormatError, shortened

__all__ = ["Decoded", "Method", "Pieces", "Tensor", "Values", "expect", "expect_dtype"]

Values: TypeAlias = Mapping[str, NDArray[Any]]
"""The input of a decoder, by role: `codes` and integers as stored, all others as floats."""
_CODES = "codes"


class Tensor(Protocol):
    """A tensor of a checkpoint that reads as float32."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def part(self, index: int) -> Tensor:
        """Returns the tensor that an index of the first axis selects, named `name.index`."""

    def places(self) -> Iterator[Bytes]:
        """Yields the byte ranges that `read` reads."""

    def read(self) -> NDArray[np.float32]:
        """Reads the values as float32, C-contiguous. Raises FormatError if they are broken."""


@dataclass(frozen=True, slots=True)
class Method:
    """A way to quantise a checkpoint."""

    title: str
    """What the method reads, in words for people."""
    read: Callable[[Pieces, Settings], None]
    """Finds the quantised tensors among the pieces; the settings are those of `quantization_config`."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """A weight that is decoded from `pieces` when it is read; implements `Tensor`."""

    name: str
    shape: tuple[int, ...]
    pieces: Mapping[str, StoredTensor]
    """By role. One of them is `codes`, whose file errors name."""
    decode: Callable[[Values], NDArray[np.float32]]
    """Makes a matrix whose shape is the last two axes of `shape`."""

    @property
    def path(self) -> Path:
        return self.pieces[_CODES].path

    def part(self, index: int) -> Decoded:
        """Returns one matrix of a stack. Pieces as long as the stack have one entry per matrix; others are shared."""
        count = self.shape[0]
        pieces = {
            role: piece.part(index) if piece.shape and piece.shape[0] == count else piece
            for role, piece in self.pieces.items()
        }
        return replace(
            self, name=f"{self.name}.{index}", shape=self.shape[1:], pieces=pieces
        )  # fmt: skip

    def places(self) -> Iterator[Bytes]:
        """Yields the byte ranges of all pieces."""
        for piece in self.pieces.values():
            yield from piece.places()

    def read(self) -> NDArray[np.float32]:
        """Reads the pieces and decodes them.

        Raises:
            FormatError: a file has become shorter since it was opened, a scale is not finite, or a code is invalid.
        """
        values = {role: self._values(role) for role in self.pieces}
        try:
            with np.errstate(all="ignore"):  # the users of tensors check that values are finite
                out = self.decode(values)
        except ValueError as error:
            raise FormatError(f"{self.path}: {shortened(self.name)}: {error}") from None
        assert out.shape == self.shape
        return out

    def _values(self, role: str) -> NDArray[Any]:
        piece = self.pieces[role]
        raw = piece.raw()
        if role == _CODES or piece.dtype.startswith("I"):
            return raw
        if piece.dtype == "F8_E4M3":
            raw = E4M3[raw]
        elif piece.dtype in ("F8_E8M0", "U8"):
            raw = E8M0[raw]
        if not np.isfinite(raw).all():
            raise FormatError(f"{piece.path}: {shortened(piece.name)}: holds NaN or infinity")
        return raw


class Pieces:
    """The stored tensors of a checkpoint, from which methods claim those that belong together."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self._left = dict(stored)
        self._found: dict[str, Decoded] = {}

    def ending(self, suffix: str, *dtypes: str) -> list[str]:
        """Returns the names that end in `suffix`, without it, of tensors of `dtypes`; without any, of all types."""
        return [
            name.removesuffix(suffix)
            for name, tensor in self._left.items()
            if name.endswith(suffix) and (not dtypes or tensor.dtype in dtypes)
        ]

    def claim(
        self, start: str, *, optional: tuple[str, ...] = (), **suffixes: str
    ) -> dict[str, StoredTensor]:
        """Takes the tensors named `start` plus a suffix, and returns them by role.

        Args:
            optional: roles that may be missing.
            suffixes: the suffix of each role.

        Raises:
            FormatError: a tensor that is not optional is missing.
        """
        found = {}
        for role, suffix in suffixes.items():
            piece = self._left.pop(start + suffix, None)
            if piece is not None:
                found[role] = piece
            elif role not in optional:
                at = next(iter(found.values()))
                raise FormatError(
                    f"{at.path}: {shortened(at.name)}: is quantised, and there is no {shortened(start + suffix)}"
                )
        return found

    def add(
        self,
        name: str,
        shape: tuple[int, ...],
        pieces: Mapping[str, StoredTensor],
        decode: Callable[[Values], NDArray[np.float32]],
    ) -> None:
        """Adds a decoded tensor.

        Raises:
            FormatError: a tensor of this name is stored too.
        """
        if name in self._left or name in self._found:
            raise FormatError(f"{pieces[_CODES].path}: {shortened(name)}: is stored twice")
        self._found[name] = Decoded(name, shape, pieces, decode)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the decoded tensors and, unchanged, the stored ones that were not claimed."""
        return {**self._left, **self._found}


def expect(piece: StoredTensor, *shapes: tuple[int, ...]) -> None:
    """Checks a piece's shape.

    Raises:
        FormatError: it is not one of `shapes`.
    """
    if piece.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise FormatError(
            f"{piece.path}: {shortened(piece.name)}: expected shape {expected}, got {list(piece.shape)}"
        )


def expect_dtype(piece: StoredTensor, *dtypes: str) -> None:
    """Checks a piece's type.

    Raises:
        FormatError: it is not one of `dtypes`.
    """
    if piece.dtype not in dtypes:
        raise FormatError(
            f"{piece.path}: {shortened(piece.name)}: expected {' or '.join(dtypes)}, got {piece.dtype}"
        )
