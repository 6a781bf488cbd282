"""Running a checkpoint converts it once; the next start uses the converted file."""

from __future__ import annotations

import os
from pathlib import Path

import families
import gguf_models
import pytest

import edgemoe
from edgemoe.cli.converted import converted, is_source


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "edgemoe" / "models"


def test_a_gguf_file_is_converted_once(cache: Path, tmp_path: Path, capfd) -> None:
    path = families.make("olmoe", tmp_path / "hf")
    file = gguf_models.save(path, tmp_path / "tiny.gguf")
    assert is_source(file)
    out = converted(file)
    assert out.parent == cache
    assert out.name.startswith("tiny-")
    assert "# tiny.gguf is converted once, to " in capfd.readouterr().err
    with edgemoe.load(out) as engine:
        assert engine.logits([1, 2]).shape == (2, 160)
    before = out.stat()
    assert converted(file) == out
    assert out.stat().st_mtime_ns == before.st_mtime_ns
    assert capfd.readouterr().err == ""
    os.utime(file, ns=(1, 1))
    assert converted(file).name != out.name


def test_a_directory_is_one_as_well(cache: Path, tmp_path: Path) -> None:
    path = families.make("olmoe", tmp_path / "OLMoE-tiny")
    assert is_source(path)
    assert not is_source(tmp_path)
    assert not is_source(tmp_path / "absent.gguf")
    assert converted(path).name.startswith("OLMoE-tiny-")


def test_what_cannot_be_converted_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    path = families.make("olmoe", tmp_path / "hf")
    file = gguf_models.save(path, tmp_path / "tiny.gguf", changes={"expert_used_count": 99})
    with pytest.raises(SystemExit) as end:
        converted(file)
    assert end.value.code == 1
    assert not list(cache.glob("*.moe"))
