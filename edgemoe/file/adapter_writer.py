"""Writes adapters: the records in the order they arrive, then the sections and the index, and the preamble last."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.config import ModelConfig
from edgemoe.errors import FormatError
from edgemoe.file.adapter import meaning, weights_sum
from edgemoe.file.coder import sums_of
from edgemoe.file.format import ALIGNMENT, MoeFile, align, pack_preamble
from edgemoe.file.whole import whole_file

__all__ = ["AdapterWriter", "adapter_writer"]

Rungs = Sequence[NDArray[np.uint8]]


@contextlib.contextmanager
def adapter_writer(
    path: Path, base: MoeFile, config: ModelConfig, source: Mapping[str, Any]
) -> Iterator[AdapterWriter]:
    """Yields a writer for an adapter. `path` appears when the block ends; after an error nothing has changed on disk.

    Args:
        base: the model that the adapter is for.
        config: the config of the fine-tune.
        source: JSON values that say where the weights came from.

    Raises:
        FormatError: nothing was added.
        OSError: the file cannot be written.
    """
    with whole_file(path) as file:
        writer = AdapterWriter(file, base, config, source)
        yield writer
        writer.finish()


class AdapterWriter:
    """A writer for the records of a fine-tune that differ from its base model's."""

    def __init__(
        self, file: BinaryIO, base: MoeFile, config: ModelConfig, source: Mapping[str, Any]
    ) -> None:
        """See `adapter_writer`."""
        self._file, self._base, self._config, self._source = file, base, config, dict(source)
        self._at = ALIGNMENT
        self._tensors: dict[str, list[Any]] = {}
        self._experts: dict[tuple[int, int], tuple[int, list[int], list[int]]] = {}

    @property
    def counts(self) -> tuple[int, int]:
        """The number of experts added so far, and the number of dense tensors."""
        return len(self._experts), len(self._tensors)

    def add(self, name: str, rungs: Rungs) -> None:
        """Writes a dense tensor, or the expert "experts.LAYER.INDEX"."""
        sizes, crcs = [len(rung) for rung in rungs], sums_of(rungs)
        offset, of = self._append(rungs), self._base.tensors.get(name)
        if of is None:
            _, layer, index = name.split(".")
            self._experts[int(layer), int(index)] = offset, sizes, crcs
        else:
            sums = [list(pair) for pair in zip(sizes, crcs, strict=True)]
            self._tensors[name] = [of.spec.kind, list(of.spec.shape), offset, sums]

    def finish(self) -> None:
        """Writes the sections, the index and the preamble.

        Raises:
            FormatError: nothing was added.
        """
        if not self._tensors and not self._experts:
            raise FormatError("nothing differs from the model that it would be an adapter for")
        sections = {}
        if self._experts:
            which = b"".join(struct.pack("<II", *key) for key in sorted(self._experts))
            for name, data in (("which", which), ("experts", self._table())):
                sections[name] = [
                    self._append([np.frombuffer(data, np.uint8)]),
                    len(data),
                    _core.crc32c(data),
                ]
        scheme_name, ladder, dense_ladder, scales, correction = meaning(self._base)
        index = json.dumps(
            {
                "base": weights_sum(self._base),
                "config": self._config.to_json(),
                "ladder": ladder,
                "dense_ladder": dense_ladder,
                "group": self._base.scheme.group,
                "tensors": self._tensors,
                "sections": sections,
                "source": self._source,
                **({} if scheme_name == "nested" else {"scheme": scheme_name}),
                **({"row_scales": scales} if len(scales) > 1 else {}),
                **({"correction": correction} if correction else {}),
            }
        ).encode()
        self._put(self._at, index)
        self._put(0, pack_preamble(self._at + len(index), self._at, index))

    def _table(self) -> bytes:
        levels = len(self._base.ladder)
        entry, out = struct.Struct(f"<Q{2 * levels}I"), bytearray()
        for key in sorted(self._experts):
            offset, sizes, crcs = self._experts[key]
            ends = list(accumulate(sizes))
            pairs = [*zip(ends, crcs, strict=True), *[(ends[-1], 0)] * (levels - len(ends))]
            out += entry.pack(offset, *chain.from_iterable(pairs))
        return bytes(out)

    def _append(self, rungs: Rungs) -> int:
        """Writes a record at the next aligned offset, and returns that offset."""
        start = at = self._at
        for rung in rungs:
            self._put(at, rung.data)
            at += len(rung)
        self._at = align(at)
        return start

    def _put(self, offset: int, data: bytes | memoryview) -> None:
        self._file.seek(offset)
        self._file.write(data)
