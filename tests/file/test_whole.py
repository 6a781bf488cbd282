"""Files get their names when complete; a lock is on the file that has the name; foreign links are not followed."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

import pytest

from edgemoe.file import whole
from edgemoe.file.whole import is_at, locked, named, whole_file, write_whole


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with whole_file(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write(b"two")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"one"
    assert names(tmp_path) == ["x"]


def test_data_then_name_then_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def recorded(name: str):
        real = getattr(os, name)

        def call(*args, **kw):
            kind = stat.S_ISDIR(os.fstat(args[0]).st_mode) if name == "fsync" else None
            calls.append((name, kind))
            return real(*args, **kw)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(whole.os, name, recorded(name))
    write_whole(tmp_path / "x", b"1")
    assert calls == [("fsync", False), ("replace", None), ("fsync", True)]


def test_the_mode_of_a_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "x"
    old = os.umask(0o027)
    try:
        write_whole(path, b"1")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o664)
        write_whole(path, b"2")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o664
    assert path.read_bytes() == b"2"


def test_what_is_private_is_so_from_its_first_byte(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a", is_private=True) as file:
        (temporary,) = tmp_path.iterdir()
        assert temporary.stat().st_mode & 0o777 == 0o600
        file.write(b"secret")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    (tmp_path / "a").chmod(0o640)
    write_whole(tmp_path / "a", b"again", is_private=True)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_link_of_the_users_leads_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far/real")
    for content in (b"1", b"2"):
        write_whole(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "far" / "real").read_bytes() == content
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links") as error:
        write_whole(tmp_path / "loop", b"1")
    assert error.value.filename == str(tmp_path / "loop")


def test_a_link_of_others_is_replaced(tmp_path: Path) -> None:
    """A link or special file at a temporary name is replaced; it is neither followed nor written through."""
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / "theirs").chmod(0o666)
    (tmp_path / "link").symlink_to("theirs")
    (tmp_path / "other").hardlink_to(tmp_path / "theirs")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    made = ("link", "other", "loop", "pipe")
    old = os.umask(0o027)
    try:
        for name in made:
            write_whole(tmp_path / name, b"ours", ours=True)
    finally:
        os.umask(old)
    assert (tmp_path / "theirs").read_bytes() == b"theirs"
    for name in made:
        found = (tmp_path / name).lstat()
        assert stat.S_ISREG(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o640
        assert (tmp_path / name).read_bytes() == b"ours"


def test_a_pipe_is_written_as_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_whole(tmp_path / "pipe", b"1")
        assert os.read(reader, 10) == b"1"
    finally:
        os.close(reader)
    write_whole("/dev/null", b"1")
    assert names(tmp_path) == ["pipe"]


def test_errors_name_the_file_that_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "no" / "x"
    with pytest.raises(FileNotFoundError) as error:
        write_whole(path, b"1")
    assert error.value.filename == str(path)
    (tmp_path / "x").write_bytes(b"1")
    with pytest.raises(NotADirectoryError) as error:
        write_whole(tmp_path / "x" / "y", b"1")
    assert error.value.filename == str(tmp_path / "x" / "y")
    with pytest.raises(PermissionError) as error, whole_file(tmp_path / "z"):
        raise PermissionError(1, "of another file", "other")
    assert error.value.filename == "other"
    assert names(tmp_path) == ["x"]
    with pytest.raises(OSError, match="plain") as plain, named("y"):
        raise OSError("plain")
    assert plain.value.filename is None


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    write_whole(tmp_path / ("n" * 255), b"1")
    assert names(tmp_path) == ["n" * 255]


def test_one_process_has_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(FileNotFoundError):
        locked(path, busy="")
    with locked(path, create=True, busy=""):
        with pytest.raises(BlockingIOError, match="somebody has it") as error:
            locked(path, busy="somebody has it")
        assert error.value.filename == str(path)
    waits = []
    first = locked(path, busy="")
    with locked(path, busy="", wait=lambda: (waits.append(1), first.close())):
        assert waits == [1]


def test_what_is_locked_is_what_has_the_name(tmp_path: Path, monkeypatch) -> None:
    """Between opening and locking, another process renames the file: it is then a finished result, not ours to lock."""
    path, moved = tmp_path / "x.part", tmp_path / "x"
    path.write_bytes(b"finished")
    real, calls = fcntl.flock, []

    def flock(file, how):
        if not calls:
            path.rename(moved)
        calls.append(how)
        real(file, how)

    monkeypatch.setattr(whole.fcntl, "flock", flock)
    with locked(path, create=True, ours=True, busy="") as file:
        assert len(calls) == 2
        assert is_at(file, path)
        assert not is_at(file, moved)
        file.write(b"other")
    assert moved.read_bytes() == b"finished"
    assert path.read_bytes() == b"other"


def test_names_that_are_ours_are_no_links(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "link").symlink_to(victim)
    os.link(victim, tmp_path / "hard")
    os.mkfifo(tmp_path / "pipe")
    for name, what in (
        ("link", "a symbolic link"), ("hard", "another name of a file"), ("pipe", "not a regular file"),
    ):  # fmt: skip
        with pytest.raises(FileExistsError, match=f"is {what}; expected none or a file") as error:
            locked(tmp_path / name, create=True, ours=True, busy="")
        assert error.value.filename == str(tmp_path / name)
    assert victim.read_bytes() == b"precious"
    with locked(tmp_path / "link", busy="") as file:  # the user's
        assert is_at(file, victim)
