"""Export of a `.moe` file to a Hugging Face directory: bfloat16 safetensors, config.json and tokenizer files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import MATRICES, ModelConfig, dense_tensors
from edgemoe.convert.families import FAMILIES
from edgemoe.convert.families.family import Family, Fold, Source
from edgemoe.errors import FormatError, quoted
from edgemoe.file.format import MoeFile
from edgemoe.file.parse import parse_object
from edgemoe.file.whole import new_folder
from edgemoe.store.floats import checkpoint_weights

__all__ = ["CONFIG", "Piece", "checkpoint_config", "export_hf", "pieces"]

Array = NDArray[np.float32]
CONFIG = "config.json"
"""The section that holds the checkpoint's config.json."""
_PLAIN = Family(config=lambda settings: None)  # type: ignore[arg-type, return-value]
_WIDE = {"BF16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class Piece:
    """The place of a canonical tensor in a checkpoint."""

    name: str
    """The name of the stored tensor."""
    shape: tuple[int, ...]
    """The shape of the stored tensor."""
    first: int
    """How many values of the stored tensor come before this piece."""
    pairs: int
    """How many leading rows of each head are stored in adjacent RoPE pairs; 0 for none."""
    kind: str
    """The type in which it is stored, by safetensors' name."""
    order: Callable[[], NDArray[np.int32]] | None = None
    """Returns the position of each value relative to `first`; None if the values are contiguous."""


def checkpoint_config(moe: MoeFile) -> dict[str, Any]:
    """Returns the config.json of the checkpoint that a file was converted from.

    Raises:
        FormatError: the file has none, its experts were pruned, or its model_type is not known.
    """
    if CONFIG not in moe.sections:
        raise FormatError(
            f"{moe.path}: holds no config.json: it was converted by an earlier edgemoe, or without a checkpoint; "
            "convert it again to export it"
        )
    if "pruned" in moe.source:
        raise FormatError(
            f"{moe.path}: its experts were pruned, so that its config.json does not fit; GGUF files can be made of it"
        )
    values = parse_object(moe.sections[CONFIG], CONFIG)
    if values.get("model_type") not in FAMILIES:
        raise FormatError(f"{moe.path}: model_type {quoted(values.get('model_type'))} is not known")
    return values


def pieces(moe: MoeFile, model_type: str) -> dict[str, Piece]:
    """Returns the place of each canonical tensor, by name. RoPE tensors have none, as they follow from config.json.

    Raises:
        FormatError: the family stores tensors in a form that cannot be restored.
    """
    family, config = FAMILIES[model_type], moe.config

    def refused(what: str) -> FormatError:
        return FormatError(
            f"{moe.path}: models of {model_type} cannot be exported: the conversion of {what} cannot be reversed"
        )

    if family.view is not _PLAIN.view:
        raise refused("LayerNorms")
    shapes = {name: spec.shape for name, spec in dense_tensors(config).items()}
    experts = dict(zip(MATRICES, config.expert_shapes, strict=True))
    sources = dict(family.sources(config, {}))
    for source in sources.values():
        is_lost = source.fold is not None and source.moved is None
        if is_lost or source.times or source.more:
            raise refused(source.name)
    out = {}
    for name, source in sources.items():
        shape = shapes.get(name) or experts[name.rpartition(".")[2]]
        out[name] = _piece(name, source, shape, config)
    return out


def _piece(name: str, source: Source, shape: tuple[int, ...], config: ModelConfig) -> Piece:
    count = int(np.prod(shape))
    stored, first, whole = source.name, 0, shape
    order = None
    if source.half is not None:
        first, whole = source.half * count, (2 * shape[0], *shape[1:])
    if source.fold is not None and source.moved is not None:
        spec = config.mixer(int(name.split(".")[1]))
        whole = source.moved(shape, spec)
        order = partial(_order, source.fold, whole, spec)
    stack, _, number = stored.rpartition(".")
    if number.isdecimal():  # one matrix of a stack
        first += int(number) * int(np.prod(whole))
        stored, whole = stack, (config.num_experts, *whole)
    if source.row:
        whole = (1, *whole)
    pairs = 0
    if source.interleaved:
        pairs = config.mixer(int(name.split(".")[1])).ropes[0].dim
    kind = "F32" if name.endswith("choice_bias") else "BF16"
    return Piece(stored, whole, first, pairs, kind, order)


@lru_cache(maxsize=4)
def _order(fold: Fold, stored: tuple[int, ...], spec: Any) -> NDArray[np.int32]:
    """Returns the position in the stored tensor of each value of a folded one, found by folding positions."""
    places = np.arange(int(np.prod(stored)), dtype=np.int32).reshape(stored)
    return np.ascontiguousarray(fold(places, spec), np.int32).reshape(-1)


def export_hf(
    moe: MoeFile,
    out: Path,
    *,
    bits: int | None = None,
    dense_bits: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a directory, which appears under its name only when it is complete.

    Args:
        moe: the model.
        out: the directory to make.
        bits: level of the experts; None for the highest.
        dense_bits: level of all other matrices; None for the highest.
        progress: called with the bytes written and the total.

    Raises:
        FormatError: the file or its family cannot be exported, or the file is broken.
        FileExistsError: `out`, or `out` with `.part` appended, exists.
        OSError: the disk is full, or failed.
    """
    config = checkpoint_config(moe)
    if "text_config" in config:
        raise FormatError(
            f"{moe.path}: models of {config['model_type']} cannot be exported: only their text is in the file"
        )
    places = pieces(moe, config["model_type"])
    level, dense_level = moe.level(bits), moe.dense_level(dense_bits)
    with new_folder(out) as part:
        for name, content in moe.sections.items():
            is_text = name.endswith((".json", ".jinja", "LICENSE"))
            if is_text and name != CONFIG and Path(name).name == name:
                (part / name).write_bytes(content)
        config |= {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
        (part / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False))
        with open(part / "model.safetensors", "w+b") as file:
            _write(file, moe, places, checkpoint_weights(moe, level, dense_level), progress)


def _write(
    file: BinaryIO,
    moe: MoeFile,
    places: Mapping[str, Piece],
    weights: Iterator[tuple[str, int, Array]],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Writes a safetensors file, with each tensor at its place."""
    starts, total = _write_header(file, places)
    done = 0
    for name, _, values in weights:
        place = places.get(name)
        if place is None:  # a RoPE tensor
            continue
        data, wide = _stored(values, place, moe.config, name), _WIDE[place.kind]
        start = starts[place.name] + place.first * wide
        if place.order is None:
            file.seek(start)
            file.write(data)
        else:
            _scatter(file, start, np.frombuffer(data, f"<u{wide}"), place.order())
        done += len(data)
        if progress is not None:
            progress(done, total)
    file.flush()
    os.fsync(file.fileno())


def _scatter(file: BinaryIO, start: int, values: NDArray[Any], order: NDArray[np.int32]) -> None:
    """Writes values to their positions relative to `start`, and leaves the bytes between them unchanged."""
    file.seek(start)
    count = int(order.max()) + 1
    kept = np.frombuffer(file.read(count * values.itemsize), values.dtype)
    out = np.zeros(count, values.dtype)
    out[: len(kept)] = kept
    out[order] = values
    file.seek(start)
    file.write(out.tobytes())


def _write_header(file: BinaryIO, places: Mapping[str, Piece]) -> tuple[dict[str, int], int]:
    """Writes the header of a safetensors file; returns the offset of each tensor, and the bytes of all tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, at = {}, 0
    for place in {p.name: p for p in places.values()}.values():
        length = int(np.prod(place.shape)) * _WIDE[place.kind]
        header[place.name] = {
            "dtype": place.kind, "shape": list(place.shape), "data_offsets": [at, at + length],
        }  # fmt: skip
        starts[place.name] = at
        at += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    return {name: 8 + len(text) + start for name, start in starts.items()}, at


def _stored(values: Array, place: Piece, config: ModelConfig, name: str) -> bytes:
    """Returns the bytes of a tensor as they are stored: bfloat16 rounded to nearest, ties to even, or float32."""
    if place.pairs:
        _, width = config.mixer(int(name.split(".")[1])).heads
        values = _in_pairs(values, width, place.pairs)
    if place.kind == "F32":
        return values.astype("<f4").tobytes()
    codes = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = codes + np.uint32(0x7FFF) + ((codes >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype("<u2").tobytes()


def _in_pairs(values: Array, width: int, turned: int) -> Array:
    """Reorders the first `turned` rows of each head of q or k from halves to adjacent RoPE pairs."""
    heads = values.reshape(-1, width, *values.shape[1:]).copy()
    halves = heads[:, :turned].copy()
    heads[:, 0:turned:2], heads[:, 1:turned:2] = np.split(halves, 2, axis=1)
    return np.asarray(heads.reshape(values.shape))
