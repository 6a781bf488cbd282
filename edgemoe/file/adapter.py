"""Adapters (`.moea`): the weights in which a fine-tune differs from its base model, in the container of a `.moe` file.

The index has one field more, `base`, which identifies the base model by a hash of its weights. It lists only the
tensors and experts that differ. docs/format.md specifies the format.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.config import ModelConfig
from edgemoe.errors import FormatError, quoted
from edgemoe.file.format import ExpertTable, MoeFile, Outline, Tensor
from edgemoe.file.reader import Reader
from edgemoe.places import Places
from edgemoe.quant import Scheme

__all__ = [
    "MOST_ADAPTERS",
    "AdapterFile",
    "differing_field",
    "meaning",
    "open_adapter",
    "open_either",
    "turning_tensors",
    "weights_sum",
    "with_adapters",
]

MOST_ADAPTERS = 64
"""How many adapters may be loaded with one model."""
_SUM = 64  # hexadecimal digits
_ENTRY = np.dtype([("layer", "<u4"), ("expert", "<u4")])
_OF_TEXT = ("eos_ids", "context_length", "family")
"""Fields of a config that do not affect what the weights compute."""


def turning_tensors(config: ModelConfig) -> set[str]:
    """Returns the names of the RoPE frequency tensors. All sequences share one set, so no adapter may replace them."""
    return {name for rope in config.ropes for name in rope.tensors()}


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An opened, validated adapter: everything but the weights."""

    path: Path
    file: _core.File
    base: str
    """The `weights_sum` of the model that the adapter is for."""
    config: ModelConfig
    """The config of the fine-tune."""
    scheme: Scheme
    ladder: tuple[tuple[int, int, int], ...]
    dense_ladder: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    """The dense tensors that differ from the model's."""
    which: NDArray[np.int64]
    """[n, 2]: for each expert that differs, the position of its layer among the layers with experts, and its number."""
    experts: ExpertTable
    """The records of these experts, [n]."""
    source: Mapping[str, Any]
    file_bytes: int

    def expert_at(self, row: int) -> tuple[int, int]:
        """Returns the model layer and the number of the expert in a row of the table."""
        layer, expert = self.which[row].tolist()
        return self.config.moe_layers[layer], expert

    def digest(self) -> str:
        """Returns a SHA-256 that identifies the adapter's weights, in hexadecimal."""
        sums = [[name, list(tensor.crcs)] for name, tensor in sorted(self.tensors.items())]
        said = json.dumps([self.base, self.which.tolist(), self.experts.crcs.tolist(), sums])
        return hashlib.sha256(said.encode()).hexdigest()

    @property
    def dense(self) -> Mapping[str, Tensor]:
        """The tensors outside the experts; the others are biases of individual experts."""
        return {name: t for name, t in self.tensors.items() if ".expert_bias." not in name}


def open_adapter(path: str | os.PathLike[str]) -> AdapterFile:
    """Opens an adapter, validates its index and checks the checksum of every section.

    Raises:
        FormatError: the file is missing, truncated, damaged or not an adapter; the message is one line that says where.
    """
    reader = _Reader(Path(path))
    return reader.parse_adapter(reader.index())


def open_either(path: str | os.PathLike[str]) -> MoeFile | AdapterFile:
    """Opens a model or an adapter; see `open_adapter` and `edgemoe.file.reader.open_moe`."""
    reader = _Reader(Path(path))
    index = reader.index()
    if isinstance(index, dict) and "base" in index:
        return reader.parse_adapter(index)
    return reader.parse(index)


class _Reader(Reader):
    def parse_adapter(self, index: Any) -> AdapterFile:
        self.need(
            isinstance(index, dict) and "base" in index,
            "is a whole model; expected an adapter, which edgemoe convert --base makes",
        )
        of = self.outline(index, "base")
        base = index["base"]
        self.need(
            isinstance(base, str) and len(base) == _SUM and not set(base) - set("0123456789abcdef"),
            f"base {quoted(base)}; expected {_SUM} hexadecimal digits",
        )
        value = index["tensors"]
        self.need(isinstance(value, dict), "tensors must be an object")
        specs = {name: spec for name, spec in of.specs.items() if name in value}
        tensors = self.tensors(value, specs, of.scheme, of.dense_ladder)
        sections = self.sections(index["sections"])
        which = self.which(sections.get("which", b""), of.config)
        table = sections.get("experts", b"")
        if len(which):
            experts = self.experts(table, len(which), of.config, of.scheme, of.ladder)
        else:
            self.need(not table, "section experts: there is no section which says of whom")
            experts = _no_experts(of)
        self.need(bool(len(which) or tensors), "nothing differs from the model")
        self.check_overlaps()
        return AdapterFile(
            self.path, self.file, base, of.config, of.scheme, of.ladder, of.dense_ladder, tensors,
            which, experts, index["source"], self.file_bytes,
        )  # fmt: skip

    def which(self, data: bytes, config: ModelConfig) -> NDArray[np.int64]:
        """Returns the experts that the section `which` lists, [n, 2]; see `AdapterFile.which`."""
        self.need(len(data) % _ENTRY.itemsize == 0, "section which is cut short")
        table = np.frombuffer(data, _ENTRY)
        layers = np.array(config.moe_layers, np.int64)
        at = np.searchsorted(layers, table["layer"])
        known = (at < len(layers)) & (layers[np.minimum(at, len(layers) - 1)] == table["layer"])
        wrong = np.flatnonzero(~known | (table["expert"] >= config.num_experts))
        self.need(
            wrong.size == 0, f"section which: entry {wrong[:1]} is not an expert of the model"
        )
        flat = at * config.num_experts + table["expert"].astype(np.int64)
        self.need(bool((np.diff(flat) > 0).all()), "section which: entries do not ascend")
        return np.stack([at, table["expert"].astype(np.int64)], 1)


def _no_experts(of: Outline) -> ExpertTable:
    rungs = len(of.ladder)
    return ExpertTable(
        np.empty(0, np.uint64), (0,) * rungs, np.empty((0, rungs), np.uint32), np.empty(0, np.uint8)
    )


def weights_sum(moe: MoeFile) -> str:
    """Returns the SHA-256 by which adapters identify their model. It depends on the weights, not on where they lie.

    The hash is over the JSON text of a list: the scheme, ladders, row scales and corrections of the index; the name,
    kind, shape and rung checksums of each tensor, ordered by name; and the rung checksums of each expert, in order.
    """
    experts = moe.experts
    sums = [
        of[:count].tolist() for of, count in zip(experts.crcs, experts.rungs.tolist(), strict=True)
    ]
    tensors = [
        [name, t.spec.kind, list(t.spec.shape), list(t.crcs)]
        for name, t in sorted(moe.tensors.items())
    ]
    said = json.dumps([*meaning(moe), tensors, sums], separators=(",", ":"))
    return hashlib.sha256(said.encode()).hexdigest()


def meaning(of: MoeFile | AdapterFile) -> list[Any]:
    """Returns the fields of the index that define how rungs are decoded, as JSON values.

    They are: scheme name, ladder, dense ladder, row scales without trailing zeros, corrections.
    """
    scheme, count = of.scheme, max(len(of.ladder), len(of.dense_ladder))
    scales = list(scheme.row_scales[:count])
    while len(scales) > 1 and not scales[-1]:
        scales.pop()
    correction = {kind: list(ranks) for kind, ranks in sorted(scheme.correction.items())}
    return [scheme.name, [list(rung) for rung in of.ladder], list(of.dense_ladder), scales, correction]  # fmt: skip


def differing_field(mine: ModelConfig, theirs: ModelConfig) -> tuple[str, Any, Any] | None:
    """Returns the first config field that makes two models compute differently, and both its values; else None."""
    for name in mine.__dataclass_fields__:
        a, b = getattr(mine, name), getattr(theirs, name)
        if name not in _OF_TEXT and a != b:
            return name, a, b
    return None


def with_adapters(
    moe: MoeFile, adapters: Sequence[AdapterFile], apart: Sequence[NDArray[np.bool_]] | None = None
) -> tuple[MoeFile, Places]:
    """Returns a model whose expert table includes the adapters' experts, and the place of each expert.

    Args:
        apart: [layers, E] for each adapter: True for experts that need a place of their own although their matrices
            are the model's, because their biases differ. None if there are none.

    Raises:
        FormatError: an adapter does not fit the model.
    """
    named = weights_sum(moe)
    for adapter in adapters:
        _check(adapter, moe, named)
    L, E = len(moe.config.moe_layers), moe.config.num_experts
    rows = [np.full((L, E), -1) for _ in adapters]  # in each adapter's table; -1: not there
    own = []
    for i, adapter in enumerate(adapters):
        rows[i][adapter.which[:, 0], adapter.which[:, 1]] = np.arange(len(adapter.which))
        own.append((rows[i] >= 0) | (False if apart is None else apart[i]))
    further = max((sum(int(o[at].sum()) for o in own) for at in range(L)), default=0)
    P = E + further
    tables = np.tile(np.arange(E, dtype=np.int32), (len(adapters) + 1, L, 1))
    owner = np.zeros((L, further), np.int32)
    names = np.full((L, P), -1, np.int32)
    names[:, :E] = np.arange(E)
    for at in range(L):
        place = E
        for i, mine in enumerate(own):
            for e in np.flatnonzero(mine[at]).tolist():
                tables[i + 1, at, e], names[at, place], owner[at, place - E] = place, e, i + 1
                place += 1
    experts = _joined(moe.experts, adapters, rows, names, owner)
    return replace(moe, experts=experts), Places(tables, names, owner)


def _joined(
    base: ExpertTable,
    adapters: Sequence[AdapterFile],
    rows: Sequence[NDArray[np.int64]],
    names: NDArray[np.int32],
    owner: NDArray[np.int32],
) -> ExpertTable:
    """Returns the expert table of all places, of the model and of its adapters."""
    L, P = names.shape
    E = P - owner.shape[1]
    offsets, rungs = np.zeros((L, P), np.uint64), np.zeros((L, P), np.uint8)
    crcs = np.zeros((L, P, base.crcs.shape[1]), np.uint32)
    file_of = np.zeros((L, P), np.uint8)
    offsets[:, :E] = base.offsets.reshape(L, E)
    rungs[:, :E] = base.rungs.reshape(L, E)
    crcs[:, :E] = base.crcs.reshape(L, E, -1)
    for at, j in np.argwhere(owner > 0).tolist():
        place, i, e = E + j, int(owner[at, j]), int(names[at, E + j])
        row = int(rows[i - 1][at, e])
        if row < 0:  # only its biases differ: a second place for the model's own record
            offsets[at, place], rungs[at, place], crcs[at, place] = (
                offsets[at, e],
                rungs[at, e],
                crcs[at, e],
            )
            continue
        of = adapters[i - 1].experts
        offsets[at, place], rungs[at, place], crcs[at, place] = (
            of.offsets[row],
            of.rungs[row],
            of.crcs[row],
        )
        file_of[at, place] = i
    return replace(
        base, offsets=offsets.reshape(-1), rungs=rungs.reshape(-1), crcs=crcs.reshape(L * P, -1),
        others=tuple(a.file for a in adapters), file_of=file_of.reshape(-1), names=names.reshape(-1),
    )  # fmt: skip


def _check(adapter: AdapterFile, moe: MoeFile, named: str) -> None:
    """Raises FormatError if an adapter does not fit the model."""
    if adapter.base != named:
        raise FormatError(
            f"{adapter.path}: is for a model of weights {adapter.base[:12]}…; {moe.path} has {named[:12]}…"
        )
    found = differing_field(adapter.config, moe.config)
    if found is not None:
        name, mine, theirs = found
        raise FormatError(
            f"{adapter.path}: {name} is {quoted(mine)}; {moe.path} has {quoted(theirs)}"
        )
    if turning := turning_tensors(moe.config) & set(adapter.tensors):
        raise FormatError(f"{adapter.path}: has a tensor {min(turning)}, which no adapter can have")
    if meaning(adapter) != meaning(moe):
        raise FormatError(f"{adapter.path}: its codes mean something else than those of {moe.path}")
    flat = adapter.which[:, 0] * moe.config.num_experts + adapter.which[:, 1]
    if (adapter.experts.rungs != moe.experts.rungs[flat]).any():
        raise FormatError(f"{adapter.path}: has experts of other levels than {moe.path}")
