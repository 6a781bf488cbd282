"""The float32 reference of a checkpoint computes what transformers computes, and `edgemoe quality` compares with it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import families
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny import tiny_checkpoint

from edgemoe.cli.quality import main
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.convert.source import SourceModel
from edgemoe.lab.quality import checkpoint
from edgemoe.lab.quality.logprobs import LogProbsWriter
from edgemoe.lab.quality.quality import Sample


@pytest.mark.parametrize("name", families.SETTINGS)
def test_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    path = families.make(name, tmp_path)
    ids = families.random_ids(24), families.random_ids(24, seed=2)
    model = SourceModel(HFCheckpoint(path))
    states = checkpoint.final_states(model, np.array(ids, np.int32))
    head = model.tensor("embed" if model.config.tied else "head")
    bias = model.tensor("head_bias") if model.config.head_bias else None
    for got, sequence in zip(states, ids, strict=True):
        expected, _ = families.oracle(path, sequence)
        logits = checkpoint.head_logits(model.config, got, head.T, bias)
        assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_long_text_takes_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SourceModel(tiny_checkpoint())
    windows = np.array([families.random_ids(10, seed=i) for i in range(5)], np.int32)

    def recorded() -> tuple[bytes, list[tuple[int, int]]]:
        steps: list[tuple[int, int]] = []
        file = io.BytesIO()
        record = LogProbsWriter(file, windows, model.config.vocab_size)
        checkpoint.record_predictions(
            model, Sample(windows, 1), record, progress=lambda *step: steps.append(step)
        )
        return file.getvalue(), steps

    at_once, steps = recorded()
    assert steps == [(1, 3), (2, 3), (3, 3)]
    monkeypatch.setattr(checkpoint, "_STATES", 4 * 10 * model.config.hidden_size * 2)
    monkeypatch.setattr(checkpoint, "_VALUES", 3 * model.config.vocab_size)
    in_pieces, steps = recorded()
    assert steps[-1] == (9, 9)
    assert len(in_pieces) == len(at_once)
    # Results differ only by the order of additions in matrix products, and by the rounding to 16 bits.
    difference = np.abs(np.frombuffer(in_pieces, "<u2") - np.frombuffer(at_once, "<u2").astype(int))
    assert np.percentile(difference, 90) <= 1


def test_quality_compares_with_a_checkpoint(tiny_moe: Path, tmp_path: Path, capsys) -> None:
    source = tiny_checkpoint()
    directory, out = tmp_path / "source", tmp_path / "x.json"
    directory.mkdir()
    save_file(
        {name: source.tensor(name) for name in source.shapes}, directory / "model.safetensors"
    )
    (directory / "config.json").write_text(json.dumps(source.config))
    (text := tmp_path / "text.txt").write_text("It is a truth universally acknowledged. " * 8)
    argv = ["--text", text, "--chunk", 64, "--bits", 8, 2, "-t", 1, "--json", out]
    assert main([str(a) for a in (tiny_moe, *argv, "--reference", directory)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert 0 < rows[0]["kl"] < rows[1]["kl"] / 10
    assert "reference: source, float32" in capsys.readouterr().err
    (directory / "model.safetensors").unlink()
    assert main([str(a) for a in (tiny_moe, *argv, "--reference", directory)]) == 1
    assert "no model.safetensors" in capsys.readouterr().err
