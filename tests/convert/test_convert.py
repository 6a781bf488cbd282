"""Conversion writes every tensor once, nearly exactly, and resumes after an interruption."""

from __future__ import annotations

from pathlib import Path

import families
import numpy as np
import pytest
import reference
import torch
from decoded import Decoded
from safetensors.torch import save_file
from tiny import tiny_checkpoint
from tokenizers import Tokenizer, models

from edgemoe.convert.convert import convert
from edgemoe.convert.families import FAMILIES
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.errors import FormatError
from edgemoe.file.writer import Writer

TOKENIZER = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])).to_str().encode()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a dense layer, shared experts and some of a tokenizer's files."""
    path = families.make("qwen2_moe-mlp-only", tmp_path_factory.mktemp("tiny-qwen2"))
    (path / "tokenizer.json").write_bytes(TOKENIZER)
    return path


def with_stacks(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undoes what `HFCheckpoint` does to stacks: `name.0`, `name.1`, … become `name` again."""
    out = {name: values for name, values in tensors.items() if not name[-1].isdigit()}
    for stack in {name.rsplit(".", 1)[0] for name in tensors.keys() - out.keys()}:
        count = sum(name.rsplit(".", 1)[0] == stack for name in tensors.keys() - out.keys())
        out[stack] = torch.stack([tensors[f"{stack}.{i}"] for i in range(count)])
    return out


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe-mlp-only", "granitemoeshared"])
def test_decoded_weights_work_in_transformers(name: str, tmp_path: Path) -> None:
    path = families.make(name, tmp_path / "source")
    convert(HFCheckpoint(path), tmp_path / "x.moe", bits=4)
    decoded = Decoded(tmp_path / "x.moe")
    checkpoint = HFCheckpoint(path)
    stored = {}
    for ours, source in FAMILIES[checkpoint.config["model_type"]].sources(
        decoded.config, checkpoint.shapes
    ):
        if ours.startswith("experts."):
            _, layer, index, part = ours.split(".")
            values = decoded.expert(int(layer), int(index))[("gate", "up", "down").index(part)]
        else:
            values = decoded.tensors[ours]
        stored.setdefault(source.name, {})[source.half] = values
    tensors: dict[str, torch.Tensor] = {}
    for stored_name, halves in stored.items():
        values = halves[None] if None in halves else np.concatenate([halves[0], halves[1]])
        values = values.reshape(checkpoint.shapes[stored_name]).astype(np.float32)
        tensors[stored_name] = torch.from_numpy(values)
    renamed = tmp_path / "decoded"
    renamed.mkdir()
    (renamed / "config.json").symlink_to(path / "config.json")
    save_file(with_stacks(tensors), renamed / "model.safetensors")
    ids = families.random_ids(24)
    expected, _ = families.oracle(renamed, ids)
    got, _ = reference.logits(decoded.config, decoded.tensors, decoded.expert, ids)
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


class Stop(Exception):
    """Raised to interrupt a conversion."""


@pytest.mark.parametrize("after", [0, 1, 9, 25])
def test_goes_on_where_it_was_interrupted(after: int, checkpoint: Path, tmp_path: Path) -> None:
    def interrupt(written: int, total: int) -> None:
        calls.append(written)
        if len(calls) == after + 1:
            raise Stop

    calls: list[int] = []
    convert(HFCheckpoint(checkpoint), tmp_path / "whole.moe")
    out = tmp_path / "x.moe"
    with pytest.raises(Stop):
        convert(HFCheckpoint(checkpoint), out, progress=interrupt)
    assert not out.exists()
    reports: list[tuple[int, int]] = []
    convert(HFCheckpoint(checkpoint), out, progress=lambda *r: reports.append(r))
    assert reports[0][0] == calls[-1]
    assert out.read_bytes() == (tmp_path / "whole.moe").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["whole.moe", "x.moe"]


def test_does_not_go_on_with_other_weights(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    def fail(self: Writer) -> None:
        raise Stop

    other = families.make("qwen2_moe-mlp-only", tmp_path / checkpoint.name, seed=1)
    (other / "tokenizer.json").write_bytes(TOKENIZER)
    out = tmp_path / "x.moe"
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "finish", fail)
        with pytest.raises(Stop):
            convert(HFCheckpoint(other), out)
    convert(HFCheckpoint(checkpoint), out)
    convert(HFCheckpoint(checkpoint), tmp_path / "whole.moe")
    assert out.read_bytes() == (tmp_path / "whole.moe").read_bytes()


def test_a_broken_checkpoint_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    source = HFCheckpoint(checkpoint)
    source.config = {**source.config, "num_hidden_layers": 2}
    with pytest.raises(FormatError):
        convert(source, tmp_path / "x.moe")
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_numpy_make_the_same_file(tiny_moe: Path, tmp_path: Path) -> None:
    plain = {"bits": 4, "favour": 3, "down_bits": [2, 3, 4], "correction": 0}
    of_numpy = {
        "bits": np.int64(4), "favour": np.uint8(3), "down_bits": np.array([2, 3, 4]), "correction": np.int8(0),
    }  # fmt: skip
    files = []
    for name, arguments in (("a.moe", plain), ("b.moe", of_numpy)):
        convert(tiny_checkpoint(), str(tmp_path / name), **arguments)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("value", [2.0, b"2", True, [2.0], np.float32(2), object()])
@pytest.mark.parametrize("name", ["bits", "favour", "correction", "down_bits", "out"])
def test_what_is_no_number_is_refused_before_anything_is_read(
    name: str, value: object, tmp_path: Path
) -> None:
    arguments = {"out": tmp_path / "x.moe", name: value}
    expected = f"^{name}: expected (a whole number|a list of whole numbers|a path), got"
    with pytest.raises(ValueError, match=expected):
        convert(None, **arguments)
    assert not list(tmp_path.iterdir())
