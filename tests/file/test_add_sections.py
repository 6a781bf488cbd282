"""Sections are appended atomically: whatever interrupts it, the file is the old one or the new one."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest

import edgemoe
from edgemoe.errors import FormatError
from edgemoe.file import append
from edgemoe.file.append import add_sections
from edgemoe.file.format import PREAMBLE
from edgemoe.file.reader import open_moe


@pytest.fixture
def path(tiny_moe: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny_moe, tmp_path / "x.moe"))


def test_sections_are_added_and_replaced(path: Path) -> None:
    before, raw = open_moe(path), path.read_bytes()
    add_sections(path, {"quality": b"first", "b": b"\0" * 5000})
    add_sections(path, {"quality": b"second"})
    after = open_moe(path)
    assert after.sections == {**before.sections, "quality": b"second", "b": b"\0" * 5000}
    assert after.file_bytes == path.stat().st_size
    # Nothing but the preamble has moved or changed.
    assert path.read_bytes()[PREAMBLE.size : len(raw)] == raw[PREAMBLE.size :]


def test_the_model_stays_the_same(path: Path, tiny_moe: Path) -> None:
    add_sections(path, {"a": b"x"})
    hashes = []
    for file in (path, tiny_moe):
        with edgemoe.load(file, context=16, threads=1) as engine:
            engine.logits([1, 2, 3], last_only=True)
            hashes.append(engine.stats.logits_hash)
    assert hashes[0] == hashes[1]


def test_every_interrupted_state_is_the_old_file(path: Path) -> None:
    old, sections = path.read_bytes(), open_moe(path).sections
    add_sections(path, {"a": b"x" * 5000})
    new = path.read_bytes()
    # Before the preamble is rewritten, any part of what lies after the old end may have reached the disk.
    for end in (len(old), len(old) + 1, 4096 * 3 + len(old), len(new) - 1, len(new)):
        path.write_bytes(old + new[len(old) : end])
        assert open_moe(path).sections == sections
    add_sections(path, {"b": b"y"})  # the next addition starts from there
    assert open_moe(path).sections == {**sections, "b": b"y"}


@pytest.mark.parametrize("step", [0, 1])
def test_a_failing_disk_leaves_a_sound_file(path: Path, monkeypatch, step: int) -> None:
    sections = open_moe(path).sections
    calls = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > step:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(append.os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left") as error:
        add_sections(path, {"a": b"x"})
    assert error.value.filename == str(path)
    expected = sections if step == 0 else {**sections, "a": b"x"}
    assert open_moe(path).sections == expected
    if step == 0:
        assert open_moe(path).file_bytes == path.stat().st_size


def test_what_cannot_be_added_is_refused(path: Path, monkeypatch, tmp_path: Path) -> None:
    raw = path.read_bytes()
    with pytest.raises(ValueError, match="section 'experts': expected another name"):
        add_sections(path, {"experts": b"x"})
    with pytest.raises(ValueError, match="section 'a': expected another name and at least one"):
        add_sections(path, {"a": b""})
    monkeypatch.setattr(append, "MAX_SECTIONS", 1000)
    with pytest.raises(ValueError, match="expected at most 1000 in a file"):
        add_sections(path, {"a": b"x" * 1001})
    with open(path, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match="another process is adding to it"):
            add_sections(path, {"a": b"x"})
    assert path.read_bytes() == raw
    junk = tmp_path / "junk"
    junk.write_bytes(b"junk")
    with pytest.raises(FormatError, match="not a .moe file"):
        add_sections(junk, {"a": b"x"})
    assert junk.read_bytes() == b"junk"
    with pytest.raises(FileNotFoundError):
        add_sections(tmp_path / "absent.moe", {"a": b"x"})
    assert not os.path.exists(tmp_path / "absent.moe")


def test_what_was_added_to_a_file_that_was_replaced_is_said_to_be_lost(
    path: Path, tmp_path: Path, monkeypatch
) -> None:
    real, other = append._append, Path(shutil.copy(path, tmp_path / "other.moe"))

    def appending(*arguments) -> None:
        real(*arguments)
        os.replace(other, path)  # as another conversion would

    monkeypatch.setattr(append, "_append", appending)
    content = path.read_bytes()
    with pytest.raises(
        OSError, match="another process has replaced it; the sections went to the old file"
    ):
        add_sections(path, {"a": b"x"})
    assert path.read_bytes() == content
