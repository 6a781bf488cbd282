"""A Hugging Face directory is read exactly, in every dtype and layout; a broken one is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edgemoe.convert.hf import HFCheckpoint
from edgemoe.errors import FormatError

_INDEX = "model.safetensors.index.json"


def write(path: Path, tensors: dict[str, torch.Tensor], *, file: str = "model.safetensors") -> Path:
    save_file(tensors, path / file)
    (path / "config.json").write_text('{"model_type": "mixtral"}')
    return path / file


def write_index(path: Path, weight_map: object) -> None:
    (path / _INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reads_every_value_of_a_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype) if dtype.itemsize == 2 else torch.randn(1 << 16)
    values = values.reshape(256, 256)
    write(tmp_path, {"before": torch.ones(3, dtype=dtype), "w": values})
    checkpoint = HFCheckpoint(tmp_path)
    got = checkpoint.tensor("w")
    assert checkpoint.shapes == {"before": (3,), "w": (256, 256)}
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    assert got.flags.writeable
    np.testing.assert_array_equal(got, values.float().numpy())


def test_presents_a_stack_as_matrices(tmp_path: Path) -> None:
    stack = torch.randn(3, 4, 5).to(torch.bfloat16)
    write(tmp_path, {"stack": stack})
    checkpoint = HFCheckpoint(tmp_path)
    assert checkpoint.shapes == {f"stack.{i}": (4, 5) for i in range(3)}
    for i in range(3):
        np.testing.assert_array_equal(checkpoint.tensor(f"stack.{i}"), stack[i].float().numpy())


def test_reads_shards_by_their_index(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.zeros(2), "forgotten": torch.ones(1)}, file="1.safetensors")
    write(tmp_path, {"b": torch.ones(3)}, file="2.safetensors")
    write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    checkpoint = HFCheckpoint(tmp_path)
    assert checkpoint.shapes == {"a": (2,), "b": (3,), "forgotten": (1,)}
    np.testing.assert_array_equal(checkpoint.tensor("b"), np.ones(3))


def test_collects_the_files_that_a_chat_needs(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.zeros(2)})
    for name in ("tokenizer.json", "special_tokens_map.json", "chat_template.jinja", "README.md"):
        (tmp_path / name).write_text(name)
    checkpoint = HFCheckpoint(tmp_path)
    assert checkpoint.name == tmp_path.name
    assert checkpoint.config == {"model_type": "mixtral"}
    assert checkpoint.files == {
        "tokenizer.json": b"tokenizer.json",
        "special_tokens_map.json": b"special_tokens_map.json",
        "chat_template.jinja": b"chat_template.jinja",
    }


def refused(path: Path) -> str:
    with pytest.raises(FormatError) as error:
        HFCheckpoint(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    assert "no such directory" in refused(tmp_path / "absent")
    (tmp_path / "file").touch()
    assert "is not a directory" in refused(tmp_path / "file")
    assert "config.json: no such file" in refused(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "config.json: expected a JSON object, got list" in refused(tmp_path)
    for text in ("{", "\xff", "[" * 100_000):
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
        assert "config.json: not valid JSON" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    assert "only safetensors are supported" in refused(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "weight_map must be an object"),
        ({"a": "absent.safetensors"}, "absent.safetensors: no such file"),
        ({"b": "1.safetensors"}, "1.safetensors: no tensor b"),
        ({"a": 1}, "a: expected a file name, got 1"),
        ({"a": "../1.safetensors"}, "a: expected a file name, got '../1.safetensors'"),
    ],
)
def test_refuses_a_wrong_index(weight_map: object, message: str, tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.zeros(2)}, file="1.safetensors")
    write_index(tmp_path, weight_map)
    assert message in refused(tmp_path)


def test_refuses_a_file_cut_anywhere(tmp_path: Path) -> None:
    file = write(tmp_path, {"a": torch.zeros(2), "b": torch.zeros(3)})
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        assert f"{file}: truncated or not a safetensors file" in refused(tmp_path)


def test_never_crashes_on_a_flipped_header_byte(tmp_path: Path) -> None:
    file = write(tmp_path, {"a": torch.zeros(2), "b": torch.zeros(3)})
    whole = file.read_bytes()
    for at in range(len(whole) - 20):
        for value in (0, 0x39, 0xFF):
            file.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            try:
                checkpoint = HFCheckpoint(tmp_path)
            except FormatError:
                continue
            for name in checkpoint.shapes:
                checkpoint.tensor(name)


def test_refuses_other_dtypes_and_empty_tensors(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.zeros(2, dtype=torch.float8_e4m3fn)})
    assert "a: dtype F8_E4M3 is not supported; supported: F32, F16, BF16" in refused(tmp_path)
    write(tmp_path, {"a": torch.zeros(2, dtype=torch.int64)})
    assert "a: dtype I64 is not supported" in refused(tmp_path)
    write(tmp_path, {"a": torch.zeros(2, 0)})
    assert "a: is empty, shape [2, 0]" in refused(tmp_path)


def test_refuses_an_unknown_tensor(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.zeros(2)})
    with pytest.raises(FormatError, match=f"{tmp_path.name}: no tensor b"):
        HFCheckpoint(tmp_path).tensor("b")


def test_notices_a_file_that_was_cut_after_opening(tmp_path: Path) -> None:
    file = write(tmp_path, {"a": torch.zeros(2), "b": torch.ones(3)})
    checkpoint = HFCheckpoint(tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FormatError, match="b: file is truncated; expected 3 values, got 2"):
        checkpoint.tensor("b")


def test_names_a_shard_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.zeros(2)}, file="1.safetensors")
    (tmp_path / "2.safetensors").mkdir()
    write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    assert "2.safetensors: cannot be read: " in refused(tmp_path)
