"""A conversion that is interrupted, raced or tricked destroys nothing: order on the disk, locks and names."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_checkpoint

from edgemoe.convert.convert import convert
from edgemoe.file import append, partial, whole
from edgemoe.file.append import add_sections
from edgemoe.file.layout import Ending, Place
from edgemoe.file.partial import PartialFile
from edgemoe.file.reader import open_moe

PLACES = {"a": Place(4096, (10, 20)), "b": Place(8192, (30,)), "c": Place(12288, (5,))}
RUNGS = {
    name: [np.full(size, i + 1, np.uint8) for size in place.sizes]
    for i, (name, place) in enumerate(PLACES.items())
}
ENDING = Ending(((16384, b"section"), (20480, b"index")), 20485, b"P" * 64)


def opened(path: Path, fingerprint: str = "f") -> PartialFile:
    return PartialFile(path, fingerprint, PLACES, 20485)


def finished(path: Path, fingerprint: str = "f") -> bytes:
    part = opened(path, fingerprint)
    for name, rungs in RUNGS.items():
        part.write(name, rungs)
    part.finish(ENDING)
    return path.read_bytes()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch):
    """Records calls of the operating system, in order."""
    seen: list[tuple[object, ...]] = []

    def what(fd: int) -> str:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            return "directory"
        return Path(os.readlink(f"/proc/self/fd/{fd}")).suffix

    def recorded(name: str, describe):
        real = getattr(os, name)

        def call(*args, **kw):
            seen.append((name, *describe(*args)))
            return real(*args, **kw)

        monkeypatch.setattr(os, name, call)

    def written(fd: int, data: memoryview, at: int) -> tuple[object, ...]:
        return (".log", bytes(data).split(b" ")[0]) if what(fd) == ".log" else (at,)

    recorded("pwrite", written)
    recorded("fsync", lambda fd: (what(fd),))
    recorded("replace", lambda a, b: (Path(a).name, Path(b).name))
    return seen


def test_the_order_in_which_a_file_reaches_the_disk(tmp_path, calls, monkeypatch):
    """Data are synced before the log that lists them, everything before the preamble, the preamble before the rename,
    and the rename before the folder."""
    monkeypatch.setattr(partial, "_SYNC_BYTES", 40)
    part = opened(tmp_path / "x")
    for name, rungs in RUNGS.items():
        part.write(name, rungs)
    part.finish(ENDING)
    assert calls == [
        ("pwrite", ".log", b"f\n"),
        ("pwrite", 4096), ("pwrite", 4106), ("pwrite", 8192),
        ("fsync", ".part"), ("pwrite", ".log", b"a"),
        ("pwrite", 12288),
        ("pwrite", 16384), ("pwrite", 20480),
        ("fsync", ".part"), ("pwrite", 0), ("fsync", ".part"),
        ("replace", "x.part", "x"), ("fsync", "directory"),
    ]  # fmt: skip
    data = (tmp_path / "x").read_bytes()
    assert len(data) == 20485
    assert data[:64] == b"P" * 64
    assert data[4096:4126] == b"\1" * 30
    assert data[12288:12293] == b"\3" * 5
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_the_name_is_given_while_the_lock_is_held(tmp_path, monkeypatch):
    real = os.replace

    def replace(old, new):
        with pytest.raises(BlockingIOError), open(old, "rb") as other:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        real(old, new)

    monkeypatch.setattr(whole.os, "replace", replace)
    finished(tmp_path / "x")
    assert (tmp_path / "x").exists()


@pytest.mark.parametrize("torn", [b"", b"b 1", b"b zz\n", b"c\n", b"\xff\xfe\n", b"nobody 1\n"])
def test_what_the_log_says_is_checked(tmp_path, torn):
    part = opened(tmp_path / "x")
    part.write("a", RUNGS["a"])
    part.write("c", RUNGS["c"])
    part.close()
    with open(tmp_path / "x.part", "r+b") as file:
        file.seek(12288)
        file.write(b"?")
    with open(tmp_path / "x.part.log", "ab") as log:
        log.write(torn)
    again = opened(tmp_path / "x")
    assert list(again.sums) == ["a"]
    assert again.written_bytes == 4096
    again.write("b", RUNGS["b"])
    again.close()
    last = opened(tmp_path / "x")
    assert set(last.sums) == {"a", "b"}
    last.write("c", RUNGS["c"])
    last.finish(ENDING)
    assert (tmp_path / "x").read_bytes() == finished(tmp_path / "y")


def test_another_plan_starts_over(tmp_path):
    part = opened(tmp_path / "x")
    part.write("a", RUNGS["a"])
    part.close()
    other = opened(tmp_path / "x", "g")
    assert other.sums == {}
    assert (tmp_path / "x.part").stat().st_size == 0
    other.close()


def test_what_was_started_over_can_be_resumed(tmp_path):
    """After another plan, after an end before anything was logged, and after both."""
    for before in (["g"], ["f"], ["g", "f"]):
        for fingerprint in before:
            first = opened(tmp_path / "x", fingerprint)
            if fingerprint == "g":
                first.write("a", RUNGS["a"])
            first.close()
        part = opened(tmp_path / "x")
        part.write("a", RUNGS["a"])
        part.close()
        again = opened(tmp_path / "x")
        assert list(again.sums) == ["a"], before
        again.write("b", RUNGS["b"])
        again.close()
        last = opened(tmp_path / "x")
        assert list(last.sums) == ["a", "b"], before
        last.close()
        assert (tmp_path / "x.part.log").read_bytes().splitlines()[0] == b"f"
        for path in tmp_path.iterdir():
            path.unlink()


def test_a_log_without_its_file_starts_over(tmp_path):
    part = opened(tmp_path / "x")
    part.write("a", RUNGS["a"])
    part.close()
    (tmp_path / "x.part").unlink()
    again = opened(tmp_path / "x")
    assert again.sums == {}
    again.close()


def test_room_that_the_partial_file_has_taken_counts_as_free(tmp_path, monkeypatch):
    part = opened(tmp_path / "x")
    for name, rungs in RUNGS.items():
        part.write(name, rungs)
    part.close()
    taken = os.stat(tmp_path / "x.part").st_blocks * 512
    assert taken
    free = 20485 + (1 << 20) - taken
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, free))
    opened(tmp_path / "x").close()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, free - 1))
    with pytest.raises(OSError, match="MB free; the file takes"):
        opened(tmp_path / "x")


# ---------------------------------------------------------------- two processes


def before_first_lock(monkeypatch: pytest.MonkeyPatch, meanwhile) -> None:
    """Lets another process (`meanwhile`) act between opening a file and locking it."""
    real, calls = fcntl.flock, []

    def flock(file, how):
        calls.append(how)
        if len(calls) == 1:
            meanwhile()
        real(file, how)

    monkeypatch.setattr(whole.fcntl, "flock", flock)


def test_who_finishes_first_keeps_the_file(tmp_path, monkeypatch):
    """The second conversion opens the partial file, and the first one finishes it before the second locks it."""
    path, sound = tmp_path / "x", []
    opened(path).close()  # so that both open the same file
    before_first_lock(monkeypatch, lambda: sound.append(finished(path)))
    with pytest.raises(FileExistsError, match="another process has written it meanwhile") as error:
        opened(path, "other")
    assert error.value.filename == str(path)
    assert [path.read_bytes()] == sound
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_second_conversion_does_not_destroy_the_first_ones_model(tmp_path, monkeypatch):
    path, sound = tmp_path / "x.moe", []
    (tmp_path / "x.moe.part").touch()

    def first() -> None:
        convert(tiny_checkpoint(), path)
        sound.append(path.read_bytes())

    before_first_lock(monkeypatch, first)
    with pytest.raises(FileExistsError, match="another process has written it meanwhile"):
        convert(tiny_checkpoint(), path, bits=4)
    assert [path.read_bytes()] == sound
    assert open_moe(path).ladder[-1] == (8, 8, 8)
    assert [p.name for p in tmp_path.iterdir()] == ["x.moe"]


def test_a_file_that_came_while_we_wrote_stays_and_so_does_our_work(tmp_path):
    path = tmp_path / "x"
    part = opened(path)
    for name, rungs in RUNGS.items():
        part.write(name, rungs)
    path.write_bytes(b"somebody's")
    with pytest.raises(FileExistsError, match="another process has written it meanwhile"):
        part.finish(ENDING)
    part.close()
    assert path.read_bytes() == b"somebody's"
    again = opened(path)  # now on purpose
    assert set(again.sums) == set(PLACES)
    again.finish(ENDING)
    assert path.read_bytes() == finished(tmp_path / "y")


@pytest.mark.parametrize("suffix", [".part", ".part.log"])
def test_links_of_others_are_not_followed(tmp_path, suffix):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / f"x.moe{suffix}").symlink_to(victim)
    with pytest.raises(FileExistsError, match="is a symbolic link; expected") as error:
        convert(tiny_checkpoint(), tmp_path / "x.moe")
    assert error.value.filename == str(tmp_path / f"x.moe{suffix}")
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "x.moe").exists()


# ---------------------------------------------------------------- sections


@pytest.fixture
def model(tiny_moe, tmp_path):
    return Path(shutil.copy(tiny_moe, tmp_path / "x.moe"))


def test_sections_go_to_the_file_that_has_the_name(model, tmp_path, monkeypatch):
    """A conversion replaces the model between opening and locking it: the section goes to the new file."""
    other = shutil.copy(model, tmp_path / "new.moe")
    before_first_lock(monkeypatch, lambda: os.replace(other, model))
    add_sections(model, {"a": b"1"})
    assert open_moe(model).sections["a"] == b"1"


@pytest.mark.parametrize("when", ["before", "after"])
def test_sections_that_went_to_a_replaced_file_are_no_success(model, tmp_path, monkeypatch, when):
    other = shutil.copy(model, tmp_path / "new.moe")
    new = Path(other).read_bytes()
    name = {"before": "open_moe", "after": "_append"}[when]
    real = getattr(append, name)

    def replaced(*args):
        if when == "before":
            os.replace(other, model)
        out = real(*args)
        if when == "after":
            os.replace(other, model)
        return out

    monkeypatch.setattr(append, name, replaced)
    old = tmp_path / "old.moe"  # where the file stays that is replaced
    os.link(model, old)
    what = {"before": "nothing was added", "after": "the sections went to the old file, not to"}[
        when
    ]
    with pytest.raises(OSError, match=f"another process has replaced it; {what}") as error:
        add_sections(model, {"a": b"1"})
    assert ("a" in open_moe(old).sections) is (when == "after")
    assert error.value.filename == str(model)
    assert model.read_bytes() == new


def test_sections_are_added_through_a_link_of_the_users(model, tmp_path):
    (tmp_path / "link.moe").symlink_to(model)
    add_sections(tmp_path / "link.moe", {"a": b"1"})
    assert (tmp_path / "link.moe").is_symlink()
    assert open_moe(model).sections["a"] == b"1"
