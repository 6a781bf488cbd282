"""A decoder allocates for activations exactly what the budget counts."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import tiny_checkpoint

import edgemoe
from edgemoe.convert.convert import convert
from edgemoe.model import MOST_AHEAD, scratch_bytes
from edgemoe.ops.cpu import CpuOps


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """A model with two kinds of attention: its second layer has a window."""
    source = tiny_checkpoint()
    source.config |= {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}
    path = tmp_path_factory.mktemp("windows") / "windows.moe"
    convert(source, path)
    return path


@pytest.fixture
def taken(monkeypatch):
    """The bytes of all arrays that operations have allocated."""
    sizes = []

    def counting(make):
        def counted(self, *shape, **given):
            array = make(self, *shape, **given)
            sizes.append(array.nbytes)
            return array

        return counted

    for name in ("empty", "host"):
        monkeypatch.setattr(CpuOps, name, counting(getattr(CpuOps, name)))
    return sizes


@pytest.mark.parametrize("sequences", [1, 3])
def test_the_budget_counts_all_activations(tiny_moe, windows, taken, sequences):
    for path in (tiny_moe, windows):
        taken.clear()
        with edgemoe.load(path, sequences=sequences, context=128) as engine:
            c, chunk = engine.config, engine.budget.chunk
            assert len(set(c.mixers)) == (2 if path == windows else 1)
            ahead = 4 * MOST_AHEAD * (c.hidden_size + c.num_experts + 2 * c.experts_per_token)
            rows = 4 * c.vocab_size  # of logits, the sequences' own
            assert sum(taken) == scratch_bytes(c, chunk, sequences) - sequences * (ahead + rows)


def test_layers_with_windows_beside_others_have_the_same_bits_in_any_batch(windows):
    ids = np.random.default_rng(0).integers(0, 264, 90)
    with edgemoe.load(windows, context=128) as engine:
        whole = engine.logits(ids)
        rows = [engine.logits(ids[:50])[-1]]
        rows += [engine.extend(ids[i : i + 1])[0].copy() for i in range(50, 90)]
        assert np.array_equal(np.array(rows), whole[49:])
