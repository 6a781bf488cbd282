"""Running each layer on a whole text before the next gives the bits of ordinary passes, for layers of every kind."""

from __future__ import annotations

import tracemalloc

import families
import numpy as np
import pytest

from edgemoe.convert.convert import convert
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.file.reader import open_moe
from edgemoe.lab.bits import tapped
from edgemoe.lab.bits.moments import Counts, LayerSums, SumForm, sum_bytes, sum_forms
from edgemoe.model import Batch

IDS = np.array(families.random_ids(60), np.int32).reshape(3, 20)


class Heads(Counts):
    """A tap that keeps the inputs of the head."""

    def __init__(self, config):
        super().__init__(config)
        self.seen = []

    def dense(self, name, x):
        if name in ("head", "embed"):
            self.seen.append(x.copy())


# Recurrent layers, windows, layers without an FFN, norms around branches, gates on inputs, latent attention.
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


# Latents of all heads at once, with a shared FFN; the last family has no shared FFN.
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe"])
def test_what_sums_take_for_a_moment_is_counted(name, tmp_path, monkeypatch):
    """All memory that a layer allocates while it runs is in the budget, except for small objects."""
    convert(HFCheckpoint(families.make(name, tmp_path / "hf")), tmp_path / "x.moe")
    moe = open_moe(tmp_path / "x.moe")
    config, counted = moe.config, []
    divide = tapped.Budget.divide

    def seen(*args, **given):
        counted.append(given.get("beside", (0, 0))[1])
        return divide(*args, **given)

    monkeypatch.setattr(tapped.Budget, "divide", seen)
    ids = np.array(families.random_ids(60), np.int32)
    form = SumForm([rung[0] for rung in moe.ladder], 2 * len(ids), "none")
    with tapped.TappedModel(
        moe, ram=1 << 30, process=1 << 28, beside=0, window=len(ids), threads=1
    ) as model:
        x = np.empty((len(ids), config.hidden_size), np.float32)
        for layer in range(config.num_layers):
            sums = LayerSums(config, layer, form)
            model.embed(ids, x)
            model.run_layer(layer, ids, x, sums)  # allocates what stays
            tracemalloc.start()
            model.run_layer(layer, ids, x, sums, first=len(ids))
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak <= counted[0] * len(ids) + (16 << 10)


@pytest.mark.parametrize("products", ["none", "layers", "full"])
def test_a_product_is_counted_before_it_is_added(tiny_moe, products):
    config = open_moe(tiny_moe).config
    form = SumForm([8], 1, products)
    sums, forms = LayerSums(config, 1, form), sum_forms(config, 1, form, is_filed=False)
    made = sum_bytes(forms) - sum(array.nbytes for array in sums.sums.values())
    names = [n[6:-8] for n in forms if n.startswith("dense.") and n.endswith(".squares")]
    tracemalloc.start()
    for name in names:
        sums.dense(name, np.ones((1, *forms[f"dense.{name}.squares"][1]), np.float32))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert made == (0 if products == "none" else 4 * 96 * 96)
    assert peak <= made + (8 << 10)
