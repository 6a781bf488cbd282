"""Files beside the weights are bounded in size and must belong to the checkpoint; missing ones are named."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edgemoe.convert import folder
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.errors import FormatError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint directory."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, path / "model.safetensors")
    return path


def refused(path: Path) -> str:
    with pytest.raises(FormatError) as error:
        HFCheckpoint(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", INDEX, "tokenizer.json", "LICENSE"]
)
def test_git_lfs_pointers_are_named(name: str, path: Path) -> None:
    if name == INDEX:
        (path / "model.safetensors").unlink()
    (path / name).write_bytes(POINTER)
    assert refused(path) == (
        f"{path / name}: is a git-lfs pointer, not the file; git lfs pull fetches that"
    )


def test_a_shard_that_is_a_pointer_is_named(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "1.safetensors").write_bytes(POINTER)
    (path / INDEX).write_text(json.dumps({"weight_map": {"a": "1.safetensors"}}))
    assert "1.safetensors: is a git-lfs pointer" in refused(path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_links_to_nothing_are_named(name: str, path: Path) -> None:
    (path / name).unlink(missing_ok=True)
    (path / name).symlink_to("../../blobs/0123")
    assert refused(path) == (
        f"{path / name}: is a link to ../../blobs/0123, which does not exist; download it again"
    )


def test_shards_without_their_index_are_named(path: Path) -> None:
    (path / "model.safetensors").rename(path / "model-00001-of-00003.safetensors")
    (path / "model-00002-of-00003.safetensors").touch()
    assert refused(path) == (
        f"{path}: has model-00001-of-00003.safetensors and 1 more, but no {INDEX}, which says what is in which file, "
        "and no model.safetensors"
    )


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "config.json", "model.safetensors"])
def test_what_is_no_regular_file_is_refused_at_once(name: str, path: Path) -> None:
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)
    assert f"{name}: expected a regular file" in refused(path)


def test_files_from_elsewhere_are_not_copied(path: Path, tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text("secret")
    (path / "LICENSE").symlink_to(tmp_path / "id_rsa")
    assert refused(path) == (
        f"{path / 'LICENSE'}: is a link to {tmp_path / 'id_rsa'}, outside of the checkpoint; "
        "expected a file of its own"
    )
    (path / "LICENSE").unlink()
    (path / "inside").mkdir()
    (path / "inside" / "text").write_text("free")
    (path / "LICENSE").symlink_to("inside/text")
    assert HFCheckpoint(path).files == {"LICENSE": b"free"}


def test_a_snapshot_of_the_hugging_face_cache_is_links_into_its_blobs(
    path: Path, tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "123"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (path / "LICENSE").write_text("free")
    for i, file in enumerate(path.iterdir()):
        file.rename(tmp_path / "models--a--b" / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    (tmp_path / "link").symlink_to(snapshot)
    for way in (snapshot, tmp_path / "link"):
        checkpoint = HFCheckpoint(way)
        assert checkpoint.files == {"LICENSE": b"free"}
        assert checkpoint.shapes == {"a": (2,)}
    (tmp_path / "models--a--b" / "config").write_text("secret")
    (snapshot / "tokenizer.json").symlink_to("../../config")
    assert "outside of the checkpoint" in refused(snapshot)


def test_files_are_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder._MOST_BYTES == 64 << 20
    monkeypatch.setattr(folder, "_MOST_BYTES", 1 << 20)
    (path / "LICENSE").write_bytes(b"x" * (1 << 20))
    assert len(HFCheckpoint(path).files["LICENSE"]) == 1 << 20
    with open(path / "LICENSE", "ab") as file:
        file.truncate(1 << 40)  # sparse: it must not be read to its end
    assert refused(path) == f"{path / 'LICENSE'}: expected at most 1 MiB"


def sparse_stack(path: Path, count: int) -> None:
    """Writes a stack of `count` float16 values as a sparse file, which takes no room on the disk."""
    entry = {"dtype": "F16", "shape": [count, 1, 1], "data_offsets": [0, 2 * count]}
    header = json.dumps({"s": entry}).encode()
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * count)


def test_a_sparse_stack_of_a_million_stays_a_stack(path: Path) -> None:
    sparse_stack(path, 1_000_000)
    HFCheckpoint(path)  # so that imports and caches are not counted
    tracemalloc.start()
    try:
        checkpoint = HFCheckpoint(path)
        assert len(checkpoint.shapes) == 1_000_000
        assert checkpoint.shapes["s.999999"] == (1, 1)
        np.testing.assert_array_equal(checkpoint.tensor("s.999999"), [[0]])
        for name in ("s", "s.1000000", "s.-1", "s.01", "s.²", "s.", "s." + "9" * 5000, "t.0"):
            assert name not in checkpoint.shapes
        assert sum(1 for _ in checkpoint.shapes) == 1_000_000
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_matrix_that_a_stack_has_too_is_refused(path: Path) -> None:
    save_file({"s": torch.zeros(2, 3, 4), "s.1": torch.zeros(3, 4)}, path / "model.safetensors")
    assert refused(path).endswith("model.safetensors: s.1 is stored, and a stack that has it too")
    save_file({"s": torch.zeros(2, 3, 4), "s.2": torch.zeros(3, 4)}, path / "model.safetensors")
    assert list(HFCheckpoint(path).shapes) == ["s.0", "s.1", "s.2"]
