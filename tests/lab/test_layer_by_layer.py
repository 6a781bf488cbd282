"""A layer for all of a text before the next one gives what whole passes give, bit for bit, in layers of every kind."""

from __future__ import annotations

import families
import numpy as np
import pytest

from edgemoe.convert.convert import convert
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.file.format import open_moe
from edgemoe.lab.bits import tapped
from edgemoe.lab.bits.moments import Counts
from edgemoe.model import Batch

IDS = np.array(families.random_ids(60), np.int32).reshape(3, 20)


class Heads(Counts):
    """Keeps what the head takes."""

    def __init__(self, config):
        super().__init__(config)
        self.seen = []

    def dense(self, name, x):
        if name in ("head", "embed"):
            self.seen.append(x.copy())


# Recurrent layers, rings of keys, layers without an FFN, norms of branches, gates on inputs, latent attention.
@pytest.mark.parametrize(
    "name",
    ["qwen3_5_moe", "gemma4_text", "nemotron_h", "llama4_text", "deepseek_v3", "granitemoehybrid"],
)
def test_layers_in_turn(name, tmp_path, monkeypatch):
    convert(HFCheckpoint(families.make(name, tmp_path / "hf")), tmp_path / "x.moe")
    moe = open_moe(tmp_path / "x.moe")
    config, tap = moe.config, Heads(moe.config)
    divide = tapped.Budget.divide

    def small(*args, **given):
        return tapped.replace(divide(*args, **given), chunk=8)

    monkeypatch.setattr(tapped.Budget, "divide", small)
    with tapped.TappedModel(
        moe, ram=1 << 30, process=1 << 28, beside=0, window=20, threads=2
    ) as model:
        x = np.empty((3, 20, config.hidden_size), np.float32)
        for ids, to in zip(IDS, x, strict=True):
            model.embed(ids, to)
        for layer in range(config.num_layers):
            for ids, to in zip(IDS, x, strict=True):
                model.run_layer(layer, ids, to, tap)
        counts, in_turn = tap.counts.copy(), np.concatenate(tap.seen)
        tap.counts[:], whole = 0, []
        for ids in IDS:
            model._state.rewind(0)
            for part in np.split(ids, [8, 16]):
                model._state.begin(len(part))
                whole.append(model._decoder.forward(Batch.of((model._state, part))).copy())
                model._state.commit(part.tolist())
    assert np.array_equal(in_turn, np.concatenate(whole))
    assert np.array_equal(counts, tap.counts)
    assert counts.sum() == IDS.size * config.experts_per_token * len(config.moe_layers)
