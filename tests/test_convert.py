"""Conversion writes every tensor once, nearly exactly, and goes on after a stop."""

from __future__ import annotations

import json
from pathlib import Path

import families
import numpy as np
import pytest
import reference
import torch
from decoded import Decoded
from safetensors.torch import save_file

import edgemoe.convert.convert as module
from edgemoe.config import ModelConfig, dense_tensors
from edgemoe.convert.convert import convert
from edgemoe.convert.families import FAMILIES
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.errors import FormatError
from edgemoe.writer import Writer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a dense layer, shared experts and some of a tokenizer's files."""
    path = families.make("qwen2_moe-mlp-only", tmp_path_factory.mktemp("tiny-qwen2"))
    (path / "tokenizer.json").write_text("{}")
    return path


class Recorder:
    """Stands for `edgemoe.writer.Writer` and remembers what it is given."""

    done: tuple[str, ...] = ()

    def __init__(self, path, config, *, bits, sections, source) -> None:
        self.path, self.config, self.bits = path, config, bits
        self.sections, self.source = dict(sections), source
        self.names: list[str] = []
        self.finished = False
        self.written_bytes, self.total_bytes = 0, 100
        Recorder.last = self

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        pass

    def is_done(self, name: str) -> bool:
        return name in self.done

    def add(self, name: str, values: np.ndarray) -> None:
        assert values.shape == dense_tensors(self.config)[name].shape
        assert values.dtype == np.float32
        self.names.append(name)
        self.written_bytes += 1

    def add_expert(self, layer: int, index: int, gate, up, down) -> None:
        d, h = self.config.hidden_size, self.config.expert_hidden
        assert (gate.shape, up.shape, down.shape) == ((h, d), (h, d), (d, h))
        self.names.append(f"experts.{layer}.{index}")
        self.written_bytes += 2

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setattr(module, "Writer", Recorder)
    monkeypatch.setattr(Recorder, "done", ())
    return Recorder


def every_name(config: ModelConfig) -> list[str]:
    experts = [f"experts.{i}.{j}" for i in config.moe_layers for j in range(config.num_experts)]
    return [*dense_tensors(config), *experts]


def test_gives_the_writer_everything_in_file_order(checkpoint, recorder, tmp_path) -> None:
    reports: list[tuple[int, int]] = []
    convert(
        HFCheckpoint(checkpoint), tmp_path / "x.moe", bits=4, progress=lambda *r: reports.append(r)
    )
    writer = recorder.last
    assert writer.finished
    assert writer.bits == 4
    assert writer.names == every_name(writer.config)
    assert writer.sections.keys() == {"tokenizer.json", "generation_config.json"}
    assert writer.source["name"] == checkpoint.name
    assert writer.source["family"] == "qwen2_moe"
    json.dumps(writer.source)
    assert reports[0] == (0, 100)
    assert reports == sorted(reports)
    assert reports[-1] == (100, 100)
    assert len(reports) == len(writer.names) + 2


def test_leaves_out_what_is_done(checkpoint, recorder, tmp_path, monkeypatch) -> None:
    done = ("embed", "layers.1.router", "experts.1.0")
    monkeypatch.setattr(recorder, "done", done)
    convert(HFCheckpoint(checkpoint), tmp_path / "x.moe")
    writer = recorder.last
    assert writer.names == [name for name in every_name(writer.config) if name not in done]


@pytest.mark.parametrize("name", families.SETTINGS)
def test_eight_bits_are_nearly_the_checkpoint(name: str, tmp_path: Path) -> None:
    path = families.make(name, tmp_path / "source")
    convert(HFCheckpoint(path), tmp_path / "x.moe")
    model = Decoded(tmp_path / "x.moe")
    cosines, same, tops = [], [], []
    for seed in range(4):
        ids = families.random_ids(12, seed=seed)
        expected, expected_chosen = families.oracle(path, ids)
        got, chosen = reference.logits(model.config, model.tensors, model.expert, ids)
        agree = np.array([np.sort(chosen[i]) == np.sort(expected_chosen[i]) for i in chosen])
        same.append(agree.all(-1))
        # A token that took other experts changes those after it through attention.
        clean = np.logical_and.accumulate(same[-1].all(0))
        lengths = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
        cosines += list(((got * expected).sum(1) / lengths)[clean])
        tops += list(got.argmax(1) == expected.argmax(1))
    assert len(cosines) >= 12
    assert min(cosines) > 0.999
    assert np.mean(same) > 0.95  # Random routers have near ties.
    assert np.mean(tops) > 0.9


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


class Stop(Exception):  # noqa: N818
    """Interrupts a conversion."""


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
    (other / "tokenizer.json").write_text("{}")
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
