"""Opens a `.moe` file: validates its index, as docs/format.md specifies it."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import MATRICES, ModelConfig, dense_tensors
from edgemoe.errors import FormatError, quoted
from edgemoe.file.container import ContainerReader
from edgemoe.file.format import (
    ALIGNMENT,
    ExpertTable,
    MoeFile,
    Outline,
    Tensor,
    expert_rung_bytes,
    tensor_bytes,
)
from edgemoe.quant import SCHEMES, Scheme
from edgemoe.quant.correction import is_rank, kind_of, unpack_basis
from edgemoe.specs import TensorSpec

__all__ = ["Reader", "look_into", "open_moe"]

_MOST_APART = 1 << 14  # contiguous runs of expert records


class Reader(ContainerReader):
    """A reader that validates the index, too."""

    def open(self) -> MoeFile:
        """Opens a model; see `open_moe`."""
        index = self.index()
        self.need(
            not isinstance(index, dict) or "base" not in index,
            "is an adapter; expected the model that it is for, beside which --adapter takes it",
        )
        return self.parse(index)

    def outline(self, index: Any, *more: str) -> Outline:
        """Validates the fields that are read first. The index must have the fields of a model's index, and `more`."""
        keys = {"config", "ladder", "dense_ladder", "group", "tensors", "sections", "source", *more}
        self.need(
            isinstance(index, dict) and set(index) - {"scheme", "row_scales", "correction"} == keys,
            "the index has other fields",
        )
        try:
            config = ModelConfig.from_json(index["config"])
            specs = dense_tensors(config)
        except FormatError as e:
            raise self.fail(str(e)) from None
        name = index.get("scheme", "nested")
        self.need(isinstance(name, str) and name in SCHEMES, f"scheme {quoted(name)} is not known")
        scheme = replace(SCHEMES[name], row_scales=self.row_scales(index, name))
        self.need(
            index["group"] == scheme.group,
            f"groups of {quoted(index['group'])}; expected {scheme.group}",
        )
        ladder = self.ladder(index["ladder"], scheme)
        dense_ladder = tuple(
            r[0]
            for r in self.ladder([[b] * 3 for b in _list(index["dense_ladder"])], scheme.of(""))
        )
        scheme = replace(
            scheme,
            correction=self.correction(
                index.get("correction", {}), name, config, specs, len(ladder), len(dense_ladder)
            ),
        )
        self.need(isinstance(index["source"], dict), "source must be an object")
        return Outline(config, specs, scheme, ladder, dense_ladder)

    def parse(self, index: Any) -> MoeFile:
        """Validates the index of a model, and reads its sections."""
        of = self.outline(index)
        config, scheme = of.config, of.scheme
        tensors = self.tensors(index["tensors"], of.specs, scheme, of.dense_ladder)
        sections = self.sections(index["sections"])
        bases = None
        if self._wanted is None:
            bases = self.bases(sections.get("basis"), config, scheme)
        self.need("experts" in sections, "the section experts is missing")
        count = len(config.moe_layers) * config.num_experts
        experts = self.experts(sections.pop("experts"), count, config, scheme, of.ladder)
        self.check_overlaps()
        return MoeFile(
            self.path, self.file, config, scheme, of.ladder, of.dense_ladder,
            tensors, sections, experts, index["source"], self.file_bytes, bases,
        )  # fmt: skip

    def row_scales(self, index: dict[str, Any], scheme: str) -> tuple[int, ...]:
        """Returns for each rung whether it begins with row scales, 1 or 0; without the field only the first does."""
        value = index.get("row_scales", [1])
        most = max(len(_list(index["ladder"])), len(_list(index["dense_ladder"])))
        self.need(
            isinstance(value, list) and all(type(v) is int and v in (0, 1) for v in value)
            and value[:1] == [1] and len(value) <= most and (scheme == "nested" or value == [1]),
            f"row_scales {quoted(value)}; expected 1, and then 1 or 0 for each rung of nested codes",
        )  # fmt: skip
        return tuple(value)

    def correction(
        self,
        value: Any,
        scheme: str,
        config: ModelConfig,
        specs: Mapping[str, TensorSpec],
        rungs: int,
        dense_rungs: int,
    ) -> dict[str, tuple[int, ...]]:
        """Returns the rank of each rung's correction, by kind of matrix."""
        self.need(isinstance(value, dict), "correction must be an object")
        self.need(
            not value or scheme == "nested", f"correction: matrices of scheme {scheme} have none"
        )
        narrowest: dict[str, int] = {}
        for name, spec in specs.items():
            if spec.kind == "nested":
                kind = kind_of(name)
                narrowest[kind] = min(narrowest.get(kind, spec.shape[1]), *spec.shape)
        for part, shape in zip(MATRICES, config.expert_shapes, strict=True):
            if shape[0]:
                narrowest[f"experts.{part}"] = min(shape)
        for kind, ranks in value.items():
            self.need(
                kind in narrowest, f"correction: the model has no matrices of kind {quoted(kind)}"
            )
            count = rungs if kind.startswith("experts.") else dense_rungs
            self.need(
                isinstance(ranks, list) and len(ranks) == count and all(map(is_rank, ranks))
                and any(ranks),
                f"correction of {kind}: ranks {quoted(ranks)}; expected one for each of {count} rungs, "
                "0, 8, 16, 24 or 32 and not all 0",
            )  # fmt: skip
            self.need(
                max(ranks) <= narrowest[kind],
                f"correction of {kind}: rank {max(ranks)} of a matrix with {narrowest[kind]} rows or columns",
            )
        return {kind: tuple(ranks) for kind, ranks in value.items()}

    def bases(
        self, data: bytes | None, config: ModelConfig, scheme: Scheme
    ) -> NDArray[np.int8] | None:
        """Returns the bases V that the gates and ups of each layer's experts share, as in `MoeFile.bases`."""
        rank = scheme.shared_rank
        if not rank:
            self.need(data is None, "section basis: the index has no correction that it is for")
            return None
        if data is None:
            raise self.fail("the section basis is missing; experts have corrections")
        try:
            return unpack_basis(data, len(config.moe_layers), rank, config.hidden_size)
        except ValueError as e:
            raise self.fail(f"section basis is of another model: {e}") from None

    def ladder(self, value: Any, scheme: Scheme) -> tuple[tuple[int, int, int], ...]:
        """Returns the bits of w_gate, w_up and w_down after each rung; they must be a ladder of the scheme."""
        rungs = _list(value)
        self.need(0 < len(rungs) <= 8, "a ladder has 1 to 8 rungs")
        last = (0, 0, 0)
        out = []
        for rung in rungs:
            self.need(
                isinstance(rung, list) and len(rung) == 3 and all(type(b) is int for b in rung)
                and all(a < b <= 8 for a, b in zip(last, rung, strict=True)),
                f"ladder {quoted(value)} does not climb from 1 to at most 8 bits",
            )  # fmt: skip
            last = (rung[0], rung[1], rung[2])
            out.append(last)
        self.need(
            all(scheme.is_ladder(bits) for bits in zip(*out, strict=True)),
            f"ladder {quoted(value)} is not one of scheme {scheme.name}",
        )
        return tuple(out)

    def tensors(
        self, value: Any, specs: Mapping[str, TensorSpec], scheme: Scheme, ladder: Sequence[int]
    ) -> dict[str, Tensor]:
        """Returns the dense tensors by name; they must be those of `specs`, and sized as the ladder says."""
        self.need(isinstance(value, dict), "tensors must be an object")
        missing, extra = sorted(set(specs) - set(value)), sorted(set(value) - set(specs))
        self.need(not missing, f"tensor {missing[0] if missing else ''} is missing")
        self.need(not extra, f"tensor {quoted(extra[0] if extra else '')} is not part of the model")
        out = {}
        for name, spec in specs.items():
            entry = value[name]
            self.need(isinstance(entry, list) and len(entry) == 4, f"tensor {name} is malformed")
            kind, shape, offset, rungs = entry
            self.need(
                kind == spec.kind and shape == list(spec.shape),
                f"tensor {name} is {kind} {shape}; expected {spec.kind} {list(spec.shape)}",
            )
            expected = tensor_bytes(spec, scheme, ladder, name)
            self.need(
                isinstance(rungs, list)
                and all(isinstance(r, list) and len(r) == 2 and type(r[0]) is int
                        and type(r[1]) is int and 0 <= r[1] < 1 << 32 for r in rungs)
                and [r[0] for r in rungs] == expected,
                f"tensor {name} has rungs {rungs}; expected {expected} bytes",
            )  # fmt: skip
            self.claim(f"tensor {name}", offset, sum(expected))
            out[name] = Tensor(name, spec, offset, tuple(expected), tuple(r[1] for r in rungs))
        return out

    def experts(
        self,
        data: bytes,
        n: int,
        config: ModelConfig,
        scheme: Scheme,
        ladder: Sequence[Sequence[int]],
    ) -> ExpertTable:
        """Returns the table of `n` experts in the section `experts`, after checking rungs, places and overlaps."""
        row = np.dtype(
            [("offset", "<u8"), ("rungs", [("end", "<u4"), ("crc", "<u4")], len(ladder))]
        )
        self.need(len(data) == n * row.itemsize, f"section experts does not hold {n} records")
        table = np.frombuffer(data, row)
        ends = np.cumsum(expert_rung_bytes(config, scheme, ladder))
        offsets = table["offset"].astype(np.uint64)
        self.need(int(ends[-1]) < 1 << 32, "an expert is larger than 4 GiB")
        rungs = np.maximum((table["rungs"]["end"] == ends).cumprod(1).sum(1), 1)
        kept = np.minimum(np.arange(len(ends)), rungs[:, None] - 1)  # where absent: the last one
        lacks = np.arange(len(ends)) >= rungs[:, None]
        bad = np.flatnonzero(
            (table["rungs"]["end"] != ends[kept]).any(1)
            | (lacks & (table["rungs"]["crc"] != 0)).any(1)
        )
        self.need(bad.size == 0, f"expert record {bad[:1]} has rungs of another size")
        sizes = ends[rungs - 1].astype(np.uint64)
        bad = np.flatnonzero(
            (offsets % ALIGNMENT != 0) | (offsets < ALIGNMENT)
            | (sizes > self.file_bytes) | (offsets > self.file_bytes - np.minimum(sizes, self.file_bytes))
        )  # fmt: skip
        self.need(bad.size == 0, f"expert record {bad[:1]} lies outside the file")
        order = np.argsort(offsets)
        starts, stops = offsets[order], offsets[order] + sizes[order]
        room = -(-stops[:-1].astype(np.int64) // ALIGNMENT) * ALIGNMENT
        gaps = starts[1:].astype(np.int64) - room
        self.need(bool((gaps >= 0).all()), "expert records overlap")
        # Records may lie anywhere. Adjacent ones are claimed as one range: all of them, in files that edgemoe writes.
        apart = np.flatnonzero(gaps)
        self.need(
            self._wanted is None or len(apart) < _MOST_APART,
            f"expert records lie in {len(apart) + 1} runs; {_MOST_APART} are looked through here at most",
        )
        starts, stops = starts[np.append(0, apart + 1)], stops[np.append(apart, -1)]
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            self.claim("the experts" if not apart.size else "expert records", start, stop - start)
        return ExpertTable(
            offsets,
            tuple(int(e) for e in ends),
            np.ascontiguousarray(table["rungs"]["crc"], np.uint32),
            rungs.astype(np.uint8),
        )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def open_moe(path: str | os.PathLike[str]) -> MoeFile:
    """Opens a `.moe` file, validates its index and checks the checksum of every section.

    Raises:
        FormatError: the file is missing, truncated, of another version or inconsistent; the message is one line that
            says where.
    """
    return Reader(Path(path)).open()


def look_into(path: str | os.PathLike[str], sections: Container[str] = ()) -> MoeFile:
    """Opens a file as `open_moe` does, but skips the bases and all sections but a few, so that it takes a few MiB.

    A hostile file can make it take about 30 MiB: an index of 1 MiB whose JSON values are as small as possible.

    Args:
        sections: names of the sections to read and check; `experts` always is.

    Raises:
        FormatError: as `open_moe`; or the index or these sections exceed the limits, which are lower here.
    """
    return Reader(Path(path), sections).open()
