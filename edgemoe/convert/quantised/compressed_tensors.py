"""The formats of compressed-tensors (llm-compressor, vLLM) that hold all weights, that is, no sparse ones.

Names, types and shapes of tensors tell which are quantised and how, because groups of modules may differ in that.
config.json is only checked for unsupported settings.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from edgemoe.convert.quantised.fp8 import claim_scaled
from edgemoe.convert.quantised.numbers import E4M3, affine, fours, scaled, unpacked
from edgemoe.convert.quantised.nvfp4 import claim_fours, claim_nvfp4
from edgemoe.convert.quantised.tensors import Method, Pieces, Values, expect, expect_dtype
from edgemoe.convert.safetensors_file import StoredTensor
from edgemoe.convert.settings import Settings
from edgemoe.errors import FormatError, quoted, shortened

__all__ = ["METHOD"]

Array = NDArray[np.float32]

_BITS = (2, 4, 8)
_MX_GROUP = 32
_KINDS = {"int": _BITS, "float": (4, 8)}
_FORMATS = (
    "dense",
    "float-quantized",
    "int-quantized",
    "mixed-precision",
    "mxfp4-pack-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "pack-quantized",
)


def _read(pieces: Pieces, settings: Settings) -> None:
    groups = _groups(settings)
    sparsity, transforms = (settings.section(f"{x}_config") for x in ("sparsity", "transform"))
    if sparsity is not None and sparsity.text("format", "dense") != "dense":
        raise sparsity.error("format", f"{quoted(sparsity.get('format'))} is not supported")
    if transforms is not None and transforms.get("config_groups"):
        raise transforms.error("config_groups", "weights that were rotated are not supported")
    for section in (settings, *groups):
        name = section.text("format", "dense")
        if name not in _FORMATS:
            raise section.error(
                "format", f"{quoted(name)} is not supported; supported: {', '.join(_FORMATS)}"
            )
    _read_nvfp4(pieces)
    _read_mxfp4(pieces)
    widths = sorted({bits for group in groups if (bits := _width(group))})
    _read_packed(pieces, widths, all_zeros=not any(_is_symmetric(group) for group in groups))
    blocks = {block for group in groups if (block := _block(group))}
    if len(blocks) > 1:
        raise settings.error("config_groups", "several block_structures are not supported")
    _read_plain(pieces, next(iter(blocks), None))


def _groups(settings: Settings) -> list[Settings]:
    """Returns the groups of modules, after checking the type and width of each group's weights."""
    section = settings.section("config_groups")
    if section is None:
        raise settings.error("config_groups", "is missing")
    found = [section.section(key) for key in settings.get("config_groups")]
    groups = [group for group in found if group is not None]
    for group in groups:
        weights = group.section("weights")
        if weights is None:
            continue
        kind, bits = weights.text("type", "int"), weights.integer("num_bits", 8)
        if kind not in _KINDS:
            raise weights.error("type", f"{quoted(kind)} is not supported; supported: int, float")
        if bits not in _KINDS[kind]:
            supported = ", ".join(map(str, _KINDS[kind]))
            raise weights.error(
                "num_bits", f"{bits} of {kind} is not supported; supported: {supported}"
            )
    return groups


def _read_packed(pieces: Pieces, widths: list[int], *, all_zeros: bool) -> None:
    """Reads `weight_packed` [R, C * bits / 32], `weight_scale` [R, G] and `weight_zero_point` [R * bits / 32, G]."""
    for name in pieces.ending(".weight_packed", "I32"):
        found = pieces.claim(
            name,
            optional=("groups",) if all_zeros else ("zeros", "groups"),
            codes=".weight_packed",
            size=".weight_shape",
            scale=".weight_scale",
            zeros=".weight_zero_point",
            groups=".weight_g_idx",
        )
        _add_packed(pieces, name, found, widths)


def _width(group: Settings) -> int:
    """Returns the bits of a group's weights if they are integers, otherwise 0."""
    weights = group.section("weights")
    if weights is None or weights.text("type", "int") != "int":
        return 0
    return weights.integer("num_bits", 8)


def _is_symmetric(group: Settings) -> bool:
    weights = group.section("weights")
    return weights is None or weights.flag("symmetric", True)


def _add_packed(
    pieces: Pieces, name: str, found: dict[str, StoredTensor], widths: list[int]
) -> None:
    codes, scale, size = found["codes"], found["scale"], found.pop("size")
    expect_dtype(size, "I64", "I32")
    expect(size, (2,))
    rows, columns = (int(n) for n in size.raw())
    if not rows:
        raise FormatError(
            f"{size.path}: {shortened(size.name)}: is 0, as where the weights have not been fetched; shapes of packed "
            "weights lie among these: hf download fetches all, and edgemoe convert takes the folder"
        )
    bits = next((b for b in widths if codes.shape == (rows, -(-columns * b // 32))), 0)
    if bits == 0:
        raise FormatError(
            f"{codes.path}: {shortened(codes.name)}: shape {list(codes.shape)} is not that of {rows} x {columns} "
            f"codes of {' or '.join(map(str, widths))} bits"
        )
    count = scale.shape[1] if len(scale.shape) == 2 else 1
    expect(scale, (rows, count), (1,), ())
    if "groups" in found:
        expect_dtype(found["groups"], "I32")
        expect(found["groups"], (columns,))
    elif columns % count:
        raise FormatError(
            f"{scale.path}: {shortened(scale.name)}: {columns} columns are not in {count} groups"
        )
    if "zeros" in found:
        expect_dtype(found["zeros"], "I32")
        expect(found["zeros"], (-(-rows * bits // 32), count))
    decode = partial(_unpacked, columns=columns, bits=bits)
    pieces.add(f"{name}.weight", (rows, columns), found, decode)


def _unpacked(values: Values, *, columns: int, bits: int) -> Array:
    codes, scale = unpacked(values["codes"], bits)[:, :columns], values["scale"]
    count = scale.shape[1] if scale.ndim == 2 else 1
    zeros: NDArray[np.uint8] | int = 1 << bits - 1
    if "zeros" in values:
        zeros = unpacked(values["zeros"].T, bits)[:, : len(codes)].T
    return affine(
        codes, np.broadcast_to(scale, (len(codes), count)), zeros, values.get("groups")
    )  # fmt: skip


def _read_plain(pieces: Pieces, block: tuple[int, ...] | None) -> None:
    """Reads `weight` with one byte a value, and `weight_scale` for rows, groups, blocks or the whole tensor."""
    for name in pieces.ending(".weight", "F8_E4M3"):
        claim_scaled(pieces, f"{name}.weight", block, lambda codes: E4M3[codes])
    for name in pieces.ending(".weight", "I8"):
        claim_scaled(pieces, f"{name}.weight", block, lambda codes: codes.astype(np.float32))


def _block(group: Settings) -> tuple[int, ...]:
    weights = group.section("weights")
    return () if weights is None else weights.integers("block_structure")


def _read_nvfp4(pieces: Pieces) -> None:
    for name in pieces.ending(".weight_global_scale"):
        claim_nvfp4(
            pieces, name, codes=".weight_packed", tensor_scale=".weight_global_scale", divides=True
        )  # fmt: skip


def _read_mxfp4(pieces: Pieces) -> None:
    for name in pieces.ending(".weight_packed", "U8"):
        found = pieces.claim(name, codes=".weight_packed", scale=".weight_scale")
        expect_dtype(found["scale"], "U8", "F8_E8M0")
        claim_fours(pieces, name, found, _MX_GROUP, _mxfp4)


def _mxfp4(values: Values) -> Array:
    return scaled(fours(values["codes"]), values["scale"], 1, _MX_GROUP)


METHOD = Method("compressed-tensors: whole numbers of 2, 4 and 8 bits, FP8, NVFP4, MXFP4", _read)
