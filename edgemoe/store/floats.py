"""A file's weights dequantised to float32, for training and export. Inference does not use them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.config import MATRICES
from edgemoe.errors import FormatError
from edgemoe.file.columns import column_scales
from edgemoe.file.format import MoeFile
from edgemoe.quant import plane_widths
from edgemoe.quant.correction import SHARED
from edgemoe.store import load_dense, read_dense

__all__ = ["checkpoint_weights", "dense_floats", "dense_weights", "expert_floats"]

Array = NDArray[np.float32]


def dense_floats(moe: MoeFile) -> dict[str, Array]:
    """Returns every dense tensor at its highest level, by name.

    Raises:
        FormatError: a checksum does not match.
        ReadError: the disk failed.
    """
    weights = load_dense(moe, len(moe.dense_ladder), verify=True)
    tensors = {name: weights[name] for name in moe.tensors}
    return {name: _decode(w) if isinstance(w, _core.Nested) else w for name, w in tensors.items()}


def dense_weights(moe: MoeFile, level: int) -> Iterator[tuple[str, Array]]:
    """Yields every dense tensor's name and values at a level, one at a time.

    An embedding that is not also the head is given at its highest level, as in inference.

    Raises:
        FormatError: a checksum does not match.
        ReadError: the disk failed.
    """
    for name, tensor in moe.tensors.items():
        is_looked_up = name == "embed" and not moe.config.tied
        own = len(tensor.lengths) if is_looked_up else level
        for _, weight in read_dense(moe, (name,), own, verify=True):
            yield name, _decode(weight) if isinstance(weight, _core.Nested) else weight


def checkpoint_weights(
    moe: MoeFile, level: int, dense_level: int
) -> Iterator[tuple[str, int, Array]]:
    """Yields all weights, one tensor at a time. If the file's columns were scaled, the scales are undone.

    Args:
        level: of the experts, in rungs.
        dense_level: of the dense tensors.

    Yields:
        The name, which is "experts.LAYER.INDEX.gate" and the like or that of a dense tensor; INDEX, or 0 for a dense
        tensor; and the float32 values.

    Raises:
        FormatError: a checksum does not match, or the record is cut short.
        OSError: the disk failed.
    """
    config, scales = moe.config, column_scales(moe)
    for name, values in dense_weights(moe, dense_level):
        yield name, 0, values if scales is None else scales.unfolded(name, values)
    for row in range(len(moe.experts.offsets)):
        layer, index = divmod(row, config.num_experts)
        for part, values in zip(MATRICES, expert_floats(moe, row, level), strict=True):
            name = f"experts.{config.moe_layers[layer]}.{index}.{part}"
            if len(values):  # experts may have no gate
                yield name, index, values if scales is None else scales.unfolded(name, values)


def expert_floats(moe: MoeFile, row: int, level: int) -> tuple[Array, Array, Array]:
    """Returns an expert's w_gate [H, D], w_up [H, D] and w_down [D, H]; w_gate has no rows if experts have no gate.

    Args:
        row: layer_index * num_experts + expert, as in `ExpertTable`.
        level: how many rungs to use, or all of them if the expert has fewer.

    Raises:
        FormatError: the record is cut short, or a checksum does not match.
        OSError: the disk failed.
    """
    level = min(level, int(moe.experts.rungs[row]))
    config, ladder = moe.config, moe.ladder[:level]
    shapes = config.expert_shapes
    ladders = list(zip(*ladder, strict=True))
    scheme = moe.scheme
    # Sizes as in the file, whatever `level` is: the first rung holds the basis for the highest rank of all rungs.
    names = [f"experts.{part}" for part in MATRICES]
    sizes = [
        scheme.rung_bytes(*shape, bits, part)
        for part, shape, bits in zip(names, shapes, ladders, strict=True)
    ]
    rungs: tuple[list[NDArray[np.uint8]], ...] = ([], [], [])
    offset = int(moe.experts.offsets[row])
    for rung, (start, end) in enumerate(pairwise((0, *moe.experts.ends[:level]))):
        content = os.pread(moe.file.fileno(), end - start, offset + start)
        if len(content) != end - start or _core.crc32c(content) != moe.experts.crcs[row, rung]:
            raise FormatError(f"{moe.path}: checksum of expert record {row} does not match")
        whole = np.frombuffer(content, np.uint8)
        ends = accumulate((of[rung] for of in sizes), initial=0)
        for part, (a, b) in zip(rungs, pairwise(ends), strict=True):
            part.append(whole[a:b])
    basis = None if moe.bases is None else moe.bases[row // config.num_experts]
    gate, up, down = (
        _decode(
            _core.Nested.from_rungs(
                part, *shape, plane_widths(bits), scheme.name, scheme.row_scales,
                scheme.ranks(name), basis if name in SHARED else None,
            )
        )
        if shape[0] else np.empty(shape, np.float32)
        for name, part, shape, bits in zip(names, rungs, shapes, ladders, strict=True)
    )  # fmt: skip
    return gate, up, down


def _decode(matrix: _core.Nested) -> Array:
    out = np.empty((matrix.rows, matrix.cols), np.float32)
    matrix.decode_rows(np.arange(matrix.rows, dtype=np.int32), out)
    return out
