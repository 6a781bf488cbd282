"""Rows looked up in a file have the bits of the whole matrix at its highest level, however much of it is resident."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from edgemoe import _core
from edgemoe.errors import FormatError, ReadError
from edgemoe.quant import SCHEMES, plane_widths

START = 4096
SCALE = 0.37


class Stored:
    """A matrix of random rungs in a file."""

    def __init__(
        self, path, rows, cols, *, scheme="nested", ladder=(2, 3, 4, 6, 8), scales=(1,), ranks=()
    ):
        correction = {"experts.down": ranks} if any(ranks) else {}
        of = replace(SCHEMES[scheme], row_scales=scales, correction=correction)
        self.path, self.shape, self.widths = path, (rows, cols), plane_widths(ladder)
        self.coding = (scheme, scales, ranks)
        self.lengths = of.rung_bytes(rows, cols, ladder, "experts.down")
        rng = np.random.default_rng(rows)  # bytes of finite float16, so that all scales are finite
        self.rungs = [
            rng.standard_normal(n // 2).astype(np.float16).view(np.uint8) for n in self.lengths
        ]
        path.write_bytes(bytes(START) + b"".join(r.tobytes() for r in self.rungs) + bytes(5000))
        self.crcs = [_core.crc32c(r) for r in self.rungs]
        self.file = _core.File(os.fsencode(path))

    def begin(self, rung):
        return START + sum(self.lengths[:rung])

    def first(self, count):
        """Returns the first rungs as a resident matrix."""
        if not count:
            return None
        return _core.Nested.from_rungs(
            self.rungs[:count], *self.shape, self.widths[:count], *self.coding
        )

    def open(self, resident, *, verify=True, **changes):
        given = {"lengths": self.lengths, "crcs": self.crcs, "widths": self.widths, **changes}
        return _core.StoredRows(
            self.file, START, given["lengths"], given["crcs"], *given.get("shape", self.shape), given["widths"],
            self.first(resident), verify, "x", *self.coding,
        )  # fmt: skip

    def flip(self, at):
        with self.path.open("r+b") as f:
            f.seek(at)
            byte = f.read(1)[0]
            f.seek(at)
            f.write(bytes([byte ^ 8]))


def rows_of(matrix, ids, scale=1.0):
    out = np.full((len(ids), matrix.cols), np.nan, np.float32)
    matrix.decode_rows(np.array(ids, np.int32), out, scale)
    return out.view(np.uint32)


CODINGS = {
    "nested": {},
    "row scales": {"scales": (1, 1, 0, 0, 0)},
    "late row scales": {"scales": (1, 0, 1, 0, 1)},
    "correction": {"ranks": (8, 8, 16, 24, 8), "scales": (1, 1, 0, 0, 0)},
    "correction of lower levels": {"ranks": (16, 8, 8, 0, 0)},
    "correction of the highest": {"ranks": (0, 0, 0, 0, 32)},
    "other widths": {"ladder": (1, 4, 7)},
    "mwq": {"scheme": "mwq", "ladder": (2, 3, 4)},
    "mwq of 5": {"scheme": "mwq", "ladder": (5, 6, 7, 8)},
    "mxfp4": {"scheme": "mxfp4", "ladder": (4,)},
    "nvfp4": {"scheme": "nvfp4", "ladder": (4,)},
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("shape", [(5, 64), (33, 130), (600, 320)], ids=str)
@pytest.mark.parametrize("coding", CODINGS)
def test_rows_are_those_of_the_whole_matrix(tmp_path, coding, shape, verify):
    stored = Stored(tmp_path / "x", *shape, **CODINGS[coding])
    count, rng = len(stored.lengths), np.random.default_rng(0)
    for resident in range(count):
        rows = stored.open(resident, verify=verify)
        assert (rows.rows, rows.cols) == shape
        for n in (1, 700, 1, 40):  # with repeats, in no order
            ids = rng.integers(0, shape[0], n)
            assert np.array_equal(rows_of(rows, ids), rows_of(stored.first(count), ids))
        ids = [shape[0] - 1, 0, shape[0] - 1]
        assert np.array_equal(rows_of(rows, ids, SCALE), rows_of(stored.first(count), ids, SCALE))


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("cols", [64, 1100])
def test_blocks_near_each_other_and_far_apart(tmp_path, cols, verify):
    """Blocks near each other are one read, as far as there is room. Some are skipped; the last ends the matrix."""
    stored = Stored(tmp_path / "x", 16 * 130 - 7, cols, ranks=(0, 8, 8, 0, 8))
    whole = stored.first(5)
    for resident in (0, 3):
        rows = stored.open(resident, verify=verify)
        for step in (1, 2, 5, 6, 7, 30):
            blocks = np.arange(128, -1, -step)
            ids = np.concatenate([16 * blocks + 15, 16 * blocks[::3] + 2, [16 * 129 + 8]])
            assert np.array_equal(rows_of(rows, ids), rows_of(whole, ids))


def test_whatever_instruction_set(tmp_path, isa):
    stored = Stored(tmp_path / "x", 40, 200, ranks=(8, 8, 8, 8, 8))
    ids = list(range(40))
    assert np.array_equal(rows_of(stored.open(2), ids), rows_of(stored.first(5), ids))


@pytest.mark.parametrize("resident", [0, 2])
@pytest.mark.parametrize("coding", ["correction", "mwq"])
def test_damage_is_found_at_the_start(tmp_path, coding, resident):
    """Wherever the damage is in the rungs that are not resident."""
    stored = Stored(tmp_path / "x", 70, 130, **CODINGS[coding])
    for rung, length in enumerate(stored.lengths):
        for at in (0, length // 2, length - 1):
            stored.flip(stored.begin(rung) + at)
            if rung < resident:
                stored.open(resident)
            else:
                with pytest.raises(FormatError, match=rf"checksum of tensor x, rung {rung}, is"):
                    stored.open(resident)
                stored.open(resident, verify=False)
            stored.flip(stored.begin(rung) + at)


def test_damage_is_found_when_its_block_is_read(tmp_path):
    stored = Stored(tmp_path / "x", 160, 128)
    rows, unchecked = stored.open(3), stored.open(3, verify=False)
    block = stored.lengths[4] // 10
    at = stored.begin(4) + 7 * block
    before = rows_of(rows, [117])
    stored.flip(at + block // 2)
    with pytest.raises(
        FormatError, match=rf"x: checksum of tensor x, rung 4, rows 112 to 127 at offset {at}, is"
    ):
        rows_of(rows, [3, 120, 140])
    assert np.array_equal(rows_of(rows, [117, 111, 128]), rows_of(stored.first(5), [117, 111, 128]))
    assert not np.array_equal(
        rows_of(unchecked, range(112, 128)), rows_of(stored.first(5), range(112, 128))
    )
    stored.flip(at + block // 2)
    assert np.array_equal(rows_of(rows, [120]), rows_of(stored.first(5), [120]))
    assert np.array_equal(before, rows_of(stored.first(5), [117]))


def test_a_file_that_is_cut_is_an_error_and_rows_that_were_read_last_are_there(tmp_path):
    stored = Stored(tmp_path / "x", 800, 128)
    rows, content = stored.open(1), stored.path.read_bytes()
    last = rows_of(rows, range(300, 556))  # as many rows as are kept
    os.truncate(stored.path, 8192)
    assert np.array_equal(rows_of(rows, range(300, 556)), last)
    for ids in ([299], list(range(800))):
        with pytest.raises(ReadError, match=r"x: the file ends at offset .* of tensor x"):
            rows_of(rows, ids)
    stored.path.write_bytes(content)
    assert np.array_equal(rows_of(rows, range(800)), rows_of(stored.first(5), range(800)))


def test_several_threads_may_ask(tmp_path):
    stored = Stored(tmp_path / "x", 500, 128)
    rows, whole = stored.open(2), stored.first(5)
    asked = [np.random.default_rng(i).integers(0, 500, 20) for i in range(60)]
    with ThreadPoolExecutor(4) as pool:
        for ids, found in zip(asked, pool.map(lambda ids: rows_of(rows, ids), asked), strict=True):
            assert np.array_equal(found, rows_of(whole, ids))


@pytest.mark.parametrize("coding", CODINGS)
def test_what_it_takes_is_known_before(tmp_path, coding):
    stored = Stored(tmp_path / "x", 1000, 128, **CODINGS[coding])
    for resident in range(len(stored.lengths)):
        size = _core.StoredRows.bytes_for(*stored.shape, stored.widths, resident, *stored.coding)
        assert stored.open(resident).bytes == size


def test_what_cannot_be_is_refused(tmp_path):
    stored = Stored(tmp_path / "x", 40, 128)
    for resident, changes, message in (
        (5, {}, "resident rungs: expected 0 to 4, got 5"),
        (2, {"shape": (39, 128)}, "the resident rungs are of another matrix"),
        (0, {"shape": (60, 128)}, "wrong length"),
        (0, {"crcs": [0]}, "one length and one checksum per rung"),
    ):
        with pytest.raises(ValueError, match=message):
            stored.open(resident, **changes)
    for ids in ([40], [-1]):
        with pytest.raises(ValueError, match=r"row .* is outside \[0, 40\)"):
            rows_of(stored.open(0), ids)
