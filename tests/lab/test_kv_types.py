"""Types of keys and values for each layer: the choice agrees with brute force; the table, and running with it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
from test_allocate import TEXT

import edgemoe
from edgemoe.cli.main import main
from edgemoe.errors import FormatError
from edgemoe.file.append import add_sections
from edgemoe.file.reader import open_moe
from edgemoe.lab.bits import kv_types, rules
from edgemoe.model import KvTable, KvTypes, state_bytes
from edgemoe.ops import kv_bytes

IDS = np.random.default_rng(4).integers(0, 256, 90)
MIXED = (("q4_0", "q8_0"), ("f16", "q2_0"))
AUTO = {"cache_type_k": "auto", "cache_type_v": "auto"}


def table(moe, layers=MIXED):
    return KvTable(of=KvTable.identity(open_moe(moe)), layers=layers)


def test_sizes_may_be_each_cell_s_own():
    rng = np.random.default_rng(3)
    for _ in range(20):
        sizes = np.cumsum(rng.integers(1, 9, (4, 3)), 1)
        cost, total = rng.random((4, 3)), int(rng.integers(sizes[:, 0].sum(), sizes[:, -1].sum()))
        every = np.arange(4)
        found = rules.cheapest(cost, sizes, total)
        assert sizes[every, found].sum() <= total
        least = min(
            cost[every, choice].sum()
            for choice in itertools.product(range(3), repeat=4)
            if sizes[every, choice].sum() <= total
        )
        assert cost[every, found].sum() == pytest.approx(least)


def test_json_round_trip(tiny_moe):
    given = KvTable(
        of={"family": "a", "fingerprint": "b"}, layers=(*MIXED, None), settings={"x": 1}
    )
    assert KvTable.from_json(given.to_json(), "it") == given


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"edgemoe_kv_types": 2}, "x.json: KV types of version 2; expected 1"),
        ({"layers": [["f16", "q5_1"], ["f16", "f16"]]}, "no table of KV types"),
        ({"layers": [["f16"], ["f16", "f16"]]}, "no table of KV types"),
        ({"layers": 3}, "no table of KV types"),
        ({"layers": [["f16", "f16"]]}, "KV types of 1 layers; the model has 2"),
        (
            {"layers": [None, ["f16", "f16"]]},
            "layer 0 of the model has keys and values, which have no types",
        ),
        (
            {"of": {"family": "x"}},
            "KV types of another model: family is 'x', this model's is",
        ),
    ],
)
def test_what_is_no_table_of_the_model_is_said(tiny_moe, tmp_path, change, said):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(json.loads(table(tiny_moe).to_json()) | change))
    with pytest.raises(FormatError, match=said):
        edgemoe.load(tiny_moe, kv_table=path, **AUTO)


def test_a_table_is_asked_for_and_found(tiny_moe, tmp_path):
    with pytest.raises(ValueError, match="has none; edgemoe allocate --kv makes it"):
        edgemoe.load(tiny_moe, **AUTO)
    with pytest.raises(ValueError, match="kv_table: expected a cache type to be auto"):
        edgemoe.load(tiny_moe, kv_table=table(tiny_moe))
    stored = shutil.copy(tiny_moe, tmp_path / "x.moe")
    add_sections(stored, {"kv_types": table(tiny_moe).to_json()})
    with edgemoe.load(tiny_moe, kv_table=table(tiny_moe), **AUTO) as engine:
        expected = engine.logits(IDS)
    with edgemoe.load(stored, **AUTO) as engine:
        assert np.array_equal(engine.logits(IDS), expected)


def test_each_layer_has_its_own_types(tiny_moe):
    """Chunks do not change the bits; the budget and the notes are those of the layers' types."""
    options = {"kv_table": table(tiny_moe), "context": 512, **AUTO}
    with edgemoe.load(tiny_moe, **options) as engine:
        whole = engine.logits(IDS)
        spec = engine.config.mixers[0]
        taken = [
            kv_bytes(kind, spec.num_kv_heads, 512, spec.head_dim) for row in MIXED for kind in row
        ]
        assert engine.budget.kv == sum(taken)
        assert engine.kv_bytes(256) == sum(taken) // 2
        assert engine.notes == (
            "lossy: keys of the KV cache at 10.00 of 16 bits",
            "lossy: values of the KV cache at 5.00 of 16 bits",
        )
        engine.logits(IDS[:30])
        for n in range(31, 91):
            assert np.array_equal(engine.extend(IDS[n - 1 : n]), whole[n - 1 : n])
    with edgemoe.load(tiny_moe, **{**options, "cache_type_v": "f32"}) as engine:
        assert engine.budget.kv < sum(taken) + 2 * kv_bytes(
            "f32", spec.num_kv_heads, 512, spec.head_dim
        )
        mixed = engine.logits(IDS)
    for kinds in (("f16", "f32"), ("q4_0", "f32")):  # the types of layer 1, and of layer 0
        with edgemoe.load(tiny_moe, cache_type_k=kinds[0], cache_type_v=kinds[1]) as engine:
            assert not np.array_equal(engine.logits(IDS), mixed)


def test_equal_types_in_all_layers_are_a_type(tiny_moe):
    same = KvTypes("auto", "auto", (("q4_0", "q3_0"), ("q4_0", "q3_0")))
    config = open_moe(tiny_moe).config
    assert state_bytes(config, 64, same) == state_bytes(config, 64, KvTypes("q4_0", "q3_0"))
    with edgemoe.load(tiny_moe, cache_type_k="q4_0", cache_type_v="q3_0") as engine:
        expected = engine.logits(IDS)
    with edgemoe.load(tiny_moe, kv_table=table(tiny_moe, same.layers), **AUTO) as engine:
        assert np.array_equal(engine.logits(IDS), expected)


def test_those_that_cost_least_are_chosen(tiny_moe, monkeypatch):
    """The choice has the least sum of measured losses, found by trying all choices."""
    windows = np.random.default_rng(1).integers(0, 256, (1, 40)).astype(np.int32)
    costs = []
    real = rules.cheapest
    monkeypatch.setattr(kv_types, "cheapest", lambda *a: costs.append(a[:2]) or real(*a))
    kinds = ("q2_0", "q4_0", "f16")
    found = kv_types.choose_kv_types(tiny_moe, windows, average_bits=7, kinds=kinds)
    (cost, sizes), every = costs[0], np.arange(4)
    assert (cost[:, :2] > 0).all()
    assert (cost[:, 2] == 0).all()
    heads = open_moe(tiny_moe).config.mixers[0].cached_heads
    room = 7 * 256 * 4 * heads[0] * heads[1] / 8
    choices = [np.array(c) for c in itertools.product(range(3), repeat=4)]
    least = min(cost[every, c].sum() for c in choices if sizes[every, c].sum() <= room)
    assert found.expected == pytest.approx(least)
    assert found.average_bits <= 7
    assert 0 < found.loss < 10 * found.expected
    most = float(cost[:, 1].sum())
    fewest = kv_types.choose_kv_types(tiny_moe, windows, max_loss=most, kinds=kinds)
    assert fewest.expected <= most
    fits = [sizes[every, c].sum() for c in choices if cost[every, c].sum() <= most]
    assert fewest.average_bits == pytest.approx(min(fits) * 8 / (room * 8 / 7))
    with pytest.raises(
        ValueError, match="average bits: expected at least [0-9.]+, which q2_0 takes, got 1$"
    ):
        kv_types.choose_kv_types(tiny_moe, windows, average_bits=1)


def test_command(tiny_moe, tmp_path, capsys):
    model = shutil.copy(tiny_moe, tmp_path / "x.moe")
    text = tmp_path / "text"
    text.write_text(TEXT)
    run = ["allocate", str(model), "--kv", "--text", str(text), "--window", "32", "--chunks", "1"]
    assert main([*run, "--avg-bits", "6", "--store"]) == 0
    said = capsys.readouterr().out
    assert "| layer | keys | values |" in said
    assert "bits per number with scales; KL from float16" in said
    with edgemoe.load(model, **AUTO) as engine:
        assert any(note.startswith("lossy: ") for note in engine.notes)
    assert main([*run, "--max-loss", "0.01"]) == 0
    written = KvTable.from_json((tmp_path / "x.kv.json").read_bytes(), "it")
    assert written.settings["max_loss"] == 0.01
    assert len(written.layers) == open_moe(model).config.num_layers
    capsys.readouterr()
    for wrong in (["--avg-bits", "6", "--seed", "1"], [], ["--avg-bits", "1"]):
        assert main([*run, *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    for flag in (["--method", "search"], ["--overwrite"], ["--per-layer"], ["--no-protect"]):
        assert main([*run, "--max-loss", "1", *flag]) == 2
        assert f"{flag[0]}: is for experts, not for --kv" in capsys.readouterr().err
    assert main([*run, "--max-loss", "1", "--seed", "0"]) == 2


def test_a_setting_s_rows_are_of_its_table(tiny_moe):
    from edgemoe.lab.quality.choice import sections_sum

    moe = open_moe(tiny_moe)
    with_table = dataclasses.replace(moe, sections={**moe.sections, "kv_types": b"x"})
    how = {"bits": 8, "dense_bits": 8, "scheduler": "on-demand", "options": {}}
    assert sections_sum(with_table, **how, cache_types=("f16", "f16")) is None
    assert sections_sum(with_table, **how, cache_types=("auto", "f16"))
