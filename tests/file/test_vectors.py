"""The test vectors of docs/format.md: bytes of small matrices, and what they mean at each level."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import reference_correction
from decoded import REFERENCES

from edgemoe import _core

VECTORS = Path(__file__).parent / "vectors"


@pytest.mark.parametrize(
    "name",
    ["nested", "nested-row-scales", "correction", "correction-shared", "mwq", "mxfp4", "nvfp4"],
)
def test_bytes_mean_the_same_as_on_the_day_the_format_was_written(name):
    vector = json.loads((VECTORS / f"{name}.json").read_text())
    scheme, row_scales = vector["scheme"], vector.get("row_scales", [1])
    ranks = vector.get("ranks", [])
    basis = np.frombuffer(bytes.fromhex(vector["basis"]), np.uint8) if "basis" in vector else None
    rows, cols, columns = vector["rows"], vector["cols"], vector["columns"]
    rungs = [np.frombuffer(bytes.fromhex(r["hex"]), np.uint8) for r in vector["rungs"]]
    for rung, entry in zip(rungs, vector["rungs"], strict=True):
        assert f"{_core.crc32c(rung):08x}" == entry["crc32c"]
    widths = [b - a for a, b in pairwise((0, *vector["ladder"]))]
    for level, bits in enumerate(vector["ladder"], 1):
        expected = np.array(
            [[float.fromhex(x) for x in row] for row in vector["weights"][str(bits)]]
        )
        parts = rungs[:level], widths[:level], rows, cols
        if ranks:
            slow = reference_correction.decode_rungs(*parts, ranks, row_scales, basis)
        else:
            slow = REFERENCES[scheme].decode_rungs(*parts, row_scales)
        np.testing.assert_array_equal(slow[:, columns].astype(np.float32), expected)
        shared = None if basis is None else basis.view(np.int8).reshape(max(ranks), -1)
        matrix = _core.Nested.from_rungs(
            rungs[:level], rows, cols, widths[:level], scheme, row_scales, ranks, shared
        )
        out = np.empty((rows, cols), np.float32)
        matrix.decode_rows(np.arange(rows, dtype=np.int32), out)
        np.testing.assert_allclose(out[:, columns], expected, rtol=1e-6)
