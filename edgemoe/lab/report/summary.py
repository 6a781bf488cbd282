"""The contents of a `.moe` file as JSON values."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np

from edgemoe.errors import FormatError
from edgemoe.file.adapter import AdapterFile, weights_sum
from edgemoe.file.format import MoeFile
from edgemoe.file.parse import parse_json
from edgemoe.lab.report.levels import levels

__all__ = ["adapter_summary", "groups", "summary"]

_MEASURED = ("quality", "allocation")
"""JSON sections that measurements add after the conversion."""


def summary(moe: MoeFile) -> dict[str, Any]:
    """Returns everything about a file except its weights and texts.

    Keys: file, bytes, config, source, weights (the checksum by which adapters refer to the file), scheme, correction
    (ranks of each kind of matrix), levels (bytes and bits per weight of each), tensors (kind, shape, offset, and bytes
    and checksum of each rung), experts (count, total bytes, end of each rung, mean bits, how many have which bits),
    sections (bytes), and the contents of the sections that measurements have added.
    """
    added = {name: _json(moe.sections[name]) for name in _MEASURED if name in moe.sections}
    return {
        "file": moe.path.name,
        "bytes": moe.file_bytes,
        "config": moe.config.to_json(),
        "source": dict(moe.source),
        "weights": weights_sum(moe),
        "scheme": moe.scheme.about,
        "correction": {kind: list(ranks) for kind, ranks in moe.scheme.correction.items()},
        "levels": [
            {
                **dataclasses.asdict(level),
                "bytes": level.bytes,
                "bits_per_weight": level.bits_per_weight,
            }
            for level in levels(moe)
        ],
        "tensors": {
            name: {
                "kind": tensor.spec.kind,
                "shape": list(tensor.spec.shape),
                "offset": tensor.offset,
                "rungs": [
                    {"bytes": length, "crc32c": f"{crc:08x}"}
                    for length, crc in zip(tensor.lengths, tensor.crcs, strict=True)
                ],
            }
            for name, tensor in moe.tensors.items()
        },
        "experts": {
            "count": len(moe.experts.offsets),
            "bytes": int(moe.experts.sizes(len(moe.ladder)).sum()),
            "rung_ends": list(moe.experts.ends),
            "average_bits": float(moe.expert_bits.mean()),
            "with_bits": {
                str(b): int(n)
                for b, n in zip(*np.unique(moe.expert_bits, return_counts=True), strict=True)
            },
        },
        "sections": {name: len(data) for name, data in sorted(moe.sections.items())},
        **added,
    }


def adapter_summary(adapter: AdapterFile) -> dict[str, Any]:
    """Returns the contents of an adapter's index as JSON values."""
    return {
        "file": adapter.path.name,
        "bytes": adapter.file_bytes,
        "base": adapter.base,
        "config": adapter.config.to_json(),
        "source": dict(adapter.source),
        "experts": [list(adapter.expert_at(row)) for row in range(len(adapter.which))],
        "tensors": {name: sum(tensor.lengths) for name, tensor in adapter.tensors.items()},
    }


def groups(moe: MoeFile | AdapterFile) -> list[tuple[str, str, tuple[int, ...], int, int]]:
    """Returns tensors grouped over layers: name with N for numbers, kind, shape, how many, total bytes."""
    found: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for name, tensor in moe.tensors.items():
        key = (re.sub(r"\d+", "N", name), tensor.spec.kind, tuple(tensor.spec.shape))
        found.setdefault(key, []).append(int(np.sum(tensor.lengths)))
    return [(*key, len(sizes), sum(sizes)) for key, sizes in found.items()]


def _json(data: bytes) -> Any:
    try:
        return parse_json(data, "section")
    except FormatError:
        return None
