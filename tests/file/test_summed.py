"""A file with checksums reads back as it was written; damage to any row, or to the header, is an error."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgemoe.errors import FormatError
from edgemoe.file.summed import SummedFile, write_summed

TENSORS = {
    "a": np.arange(5, dtype=np.float64),
    "b": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "c": np.array([7], np.int64),
    "d": np.arange(6, dtype=np.float64).reshape(3, 2),
}
META = {"kind": "test", "ü": "\n"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_summed(tmp_path / "x", TENSORS, META)
    return tmp_path / "x"


def opened(path: Path) -> SummedFile:
    return SummedFile(path, "a test")


def read_all(path: Path) -> SummedFile:
    file = opened(path)
    file.verify()
    return file


def is_noticed(path: Path) -> bool:
    """Returns whether damage raises an error, or makes it a file without checksums, which a caller may refuse."""
    try:
        return not read_all(path).is_summed
    except FormatError as error:
        assert str(error).startswith(f"{path}: ")
        return True


def test_what_is_written_comes_back(path: Path) -> None:
    file = read_all(path)
    assert file.is_summed
    assert file.meta == META
    assert dict(file.shapes) == {name: array.shape for name, array in TENSORS.items()}
    for name, array in TENSORS.items():
        assert file.dtypes[name] == array.dtype
        np.testing.assert_array_equal(file.tensor(name), array)
        np.testing.assert_array_equal(
            np.concatenate([rows.reshape(-1) for rows in file.rows(name)]), array.reshape(-1)
        )
    np.testing.assert_array_equal(file.row("b", 1), TENSORS["b"][1])
    np.testing.assert_array_equal(file.row("d", 2), TENSORS["d"][2])


def test_the_library_reads_it_too(path: Path) -> None:
    found = load_file(path)
    assert found.pop("checksums").shape == (1 + 1 + 2 + 1 + 3 + 1,)
    for name, array in found.items():
        np.testing.assert_array_equal(array, TENSORS[name])


def test_every_flipped_byte_is_noticed(path: Path) -> None:
    whole = path.read_bytes()
    for at in range(len(whole)):
        broken = bytearray(whole)
        broken[at] ^= 1 << at % 8
        path.write_bytes(broken)
        assert is_noticed(path), at


def test_damage_is_found_in_the_row_that_has_it(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    at = whole.index(TENSORS["b"][1].tobytes())
    whole[at] ^= 1
    path.write_bytes(whole)
    file = opened(path)
    np.testing.assert_array_equal(file.row("b", 0), TENSORS["b"][0])
    np.testing.assert_array_equal(file.tensor("d"), TENSORS["d"])
    for read in (lambda: file.row("b", 1), lambda: file.tensor("b")):
        with pytest.raises(FormatError, match="x: damaged: checksum of b does not match"):
            read()


def test_a_cut_file_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError, match="/x: not a test: "):
            opened(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(FormatError, match="/x: not a test: expected .* bytes, got"):
        opened(path)


def test_a_file_that_shrinks_while_open_is_an_error(path: Path) -> None:
    file = opened(path)
    os.truncate(path, path.stat().st_size - 200)
    with pytest.raises(FormatError, match="became shorter while it was read"):
        file.verify()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused(path: Path, value: float) -> None:
    array = TENSORS["b"].copy()
    array[1, 2, 3] = value
    write_summed(path, {**TENSORS, "b": array}, META)
    file = opened(path)
    assert file.row("b", 0).shape == (3, 4)
    with pytest.raises(FormatError, match="x: b: holds NaN or infinity"):
        file.row("b", 1)


def test_a_file_without_checksums_is_read(path: Path) -> None:
    first = opened(path).digest()
    save_file(TENSORS, path, META)
    file = read_all(path)
    assert not file.is_summed
    np.testing.assert_array_equal(file.row("b", 1), TENSORS["b"][1])
    second = file.digest()
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    assert len({first, second, opened(path).digest()}) == 3


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    def entry(dtype: object, shape: object, offsets: object) -> dict[str, object]:
        return {"dtype": dtype, "shape": shape, "data_offsets": offsets}

    headers: list[object] = [
        [], 3, {"a": 3}, {"a": {}}, {"a": entry("F32", [1], [0])}, {"a": entry("F32", [1], None)},
        {"a": entry("F32", [2], [0, 4])}, {"a": entry("F32", [-1], [0, -4])}, {"a": entry("F32", "x", [0, 4])},
        {"a": entry("F32", [], [0, 4])}, {"a": entry("F32", [True], [0, 4])}, {"a": entry("F32", [1], [4, 8])},
        {"a": entry("BF16", [2], [0, 4])}, {"a": entry(None, [1], [0, 4])}, {"a": entry([], [1], [0, 4])},
        {"a": entry("F32", [1, 0], [0, 0]), "b": entry("F32", [1], [0, 4])},
        {"a": entry("F32", [1], [0, 4]), "b": entry("F32", [1], [0, 4])},
        {"a": entry("F32", [1 << 62, 1 << 62], [0, 4])}, {"__metadata__": 3}, {"__metadata__": {"a": 1}},
        {"checksums": entry("F32", [1], [0, 4])}, {"checksums": entry("U32", [1], [0, 4])},
    ]  # fmt: skip
    contents = [json.dumps(header).encode() for header in headers] + [b"[" * 100_000, b"\xff"]
    path = tmp_path / "x"
    for text in contents:
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
        with pytest.raises(FormatError, match="/x: not a test: "):
            opened(path)
    with pytest.raises(FormatError, match="absent: no such file"):
        opened(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(FormatError, match="not a test: it is not a regular file"):
            opened(tmp_path / name)


@pytest.mark.parametrize(("kind", "width"), [("U32", 4), ("F64", 8)])
def test_too_many_checksums_are_refused_before_they_are_read(
    path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, width: int
) -> None:
    """A sparse file takes no room on the disk, so that a header alone can make it large."""
    size, most = 1 << 34, 1 << 20
    header = {"checksums": {"dtype": kind, "shape": [size // width], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + size)
    read = SummedFile._bytes

    def some(self: SummedFile, offset: int, count: int) -> bytearray:
        assert count < most
        return read(self, offset, count)

    monkeypatch.setattr(SummedFile, "_bytes", some)
    with pytest.raises(FormatError, match="/x: not a test: checksums does not hold 2 numbers"):
        opened(path)


def test_random_damage_ends_in_one_way(path: Path) -> None:
    whole, rng = path.read_bytes(), random.Random(3)
    for _ in range(500):
        broken = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        path.write_bytes(broken[: rng.randint(1, len(broken))] if rng.random() < 0.2 else broken)
        assert is_noticed(path) or path.read_bytes() == whole
