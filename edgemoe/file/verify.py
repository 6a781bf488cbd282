"""Checks every checksum of a `.moe` file, one rung at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from edgemoe import _core
from edgemoe.file.adapter import AdapterFile
from edgemoe.file.format import MoeFile

__all__ = ["verify"]


_SAMPLED = 4 << 20  # bytes of a rung, at most


def verify(
    moe: MoeFile | AdapterFile,
    *,
    progress: Callable[[int, int], None] | None = None,
    sample: int | None = None,
) -> list[str]:
    """Reads all weights in file order and returns which rungs do not match their checksum; empty if all do.

    Sections, index and preamble were checked when the file was opened. Weights of a model's adapters lie in files of
    their own, and are not read here. Memory: one rung.

    Args:
        progress: called with the bytes read so far and the total.
        sample: check only about this many rungs, of at most 4 MiB each and spread over the file; None checks all.

    Raises:
        OSError: the file cannot be read.
    """
    pieces = sorted(_pieces(moe))
    if sample is not None:
        small = [piece for piece in pieces if piece[1] <= _SAMPLED]
        pieces = small[:: max(1, len(small) // sample)]
    total, done, broken = sum(length for _, length, *_ in pieces), 0, []
    for offset, length, crc, name in pieces:
        try:
            data = os.pread(moe.file.fileno(), length, offset)
        except OSError as e:
            raise OSError(e.errno, f"{name}: {e.strerror}", str(moe.path)) from None
        if len(data) != length or _core.crc32c(data) != crc:
            broken.append(f"{name}, bytes {offset} to {offset + length}")
        done += length
        if progress is not None:
            progress(done, total)
    return broken


def _pieces(moe: MoeFile | AdapterFile) -> Iterator[tuple[int, int, int, str]]:
    """Yields offset, length, checksum and name of every rung in the file."""
    for tensor in moe.tensors.values():
        at = tensor.offset
        for rung, (length, crc) in enumerate(zip(tensor.lengths, tensor.crcs, strict=True)):
            yield at, length, crc, f"tensor {tensor.name}, rung {rung}"
            at += length
    starts = (0, *moe.experts.ends)
    for row, offset in enumerate(moe.experts.offsets.tolist()):
        if moe.experts.file_of is not None and moe.experts.file_of[row]:
            continue  # in an adapter's file
        layer, expert = moe.expert_at(row)
        for rung, end in enumerate(moe.experts.ends[: moe.experts.rungs[row]]):
            name = f"expert {expert} of layer {layer}, rung {rung}"
            yield offset + starts[rung], end - starts[rung], int(moe.experts.crcs[row, rung]), name
