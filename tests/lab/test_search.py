"""One search over experts, matrices, keys and values: the choice, going on, what is measured, and running with it."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import tracemalloc
import weakref
from dataclasses import replace

import families
import numpy as np
import pytest
from engines import with_slots
from test_allocate import TEXT
from tiny import tiny_checkpoint

import edgemoe
from edgemoe.cli import allocate_search
from edgemoe.cli.main import main
from edgemoe.cli.progress import Progress
from edgemoe.convert.convert import convert
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.errors import FormatError
from edgemoe.file import append
from edgemoe.file.reader import open_moe
from edgemoe.lab.bits.calibrate import calibrate, windows_of
from edgemoe.lab.bits.everything import search_everything
from edgemoe.lab.bits.kv_types import KINDS
from edgemoe.lab.bits.measuring import Clock, TimeIsOver
from edgemoe.lab.bits.search import MOST_CHANGES, Field, Rounds, Standing, evolve
from edgemoe.lab.bits.units import Units
from edgemoe.lab.quality import mixed_loss
from edgemoe.lab.quality.loss import half_log_softmax
from edgemoe.lab.quality.mixed_loss import MixedLoss
from edgemoe.model import KvTable, KvTypes, layered, state_bytes
from edgemoe.quant import Allocation, Calibration
from edgemoe.store import dense_bytes, expert_bytes, looked_up_bytes

ROUNDS = Rounds(generations=2, offspring=4, survivors=2, alone=1, windows=(1, 1, 2))


# ---------------------------------------------------------------- the search, on arrays


def field(units=6, levels=3, seed=0, share=0.5, **changes):
    """Returns a field with costs that fall by less at each level, so that a price per byte minimises the sum."""
    rng = np.random.default_rng(seed)
    sizes = np.cumsum(rng.integers(1, 9, (units, levels)), 1)
    cost = np.sort(rng.random((units, levels)), 1)[:, ::-1] ** 3
    least, most = int(sizes[:, 0].sum()), int(sizes[:, -1].sum())
    given = {
        "cost": cost, "sizes": sizes, "lowest": np.zeros(units, np.int64),
        "highest": np.full(units, levels - 1), "total": int(least + share * (most - least)),
    }  # fmt: skip
    return Field(**{**given, **changes})


def test_the_start_is_inside_the_bytes_and_near_the_least():
    for seed in range(30):
        f = field(seed=seed, share=seed / 29)
        found = f.least_sum()
        assert f.takes(found) <= f.total
        choices = map(np.array, itertools.product(range(3), repeat=6))
        sums = [f.adds(c) for c in choices if f.takes(c) <= f.total]
        assert f.adds(found) >= min(sums)
        # The distance to the optimum is at most the gain of one unit by one level.
        assert f.adds(found) <= min(sums) + (f.cost[:, :-1] - f.cost[:, 1:]).max()


def test_what_has_one_size_and_falls_evenly_is_solved_exactly():
    cost = np.array([[8.0, 2, 1], [6, 5, 4.5], [9, 5, 2], [3, 1, 0]])
    f = field(units=4, cost=cost, sizes=np.tile([1, 2, 3], (4, 1)), total=8)
    assert f.least_sum().tolist() == [1, 0, 2, 1]  # -6, -4, -3 and -2 are the largest steps


def test_bounds_are_kept_and_too_few_bytes_said():
    f = field(share=0.4)
    low, high = np.array([0, 1, 0, 2, 0, 0]), np.array([2, 2, 0, 2, 1, 2])
    f = replace(f, lowest=low, highest=high)
    parent, rng = f.least_sum(), np.random.default_rng(1)
    for _ in range(200):
        child = f.changed(parent, rng)
        if child is not None:
            assert ((child >= low) & (child <= high)).all()
            assert f.takes(child) <= f.total
            assert (np.abs(child - parent) <= 1).all()
            assert 1 <= (child != parent).sum() <= MOST_CHANGES
            parent = child
    with pytest.raises(ValueError, match=r"3 bytes; the lowest levels take \d+"):
        replace(f, total=3).least_sum()


def test_losses_that_do_not_add_are_found():
    """Two units gain only together, which a sum of losses measured one by one cannot show."""
    f = field(units=8, cost=np.zeros((8, 2)), sizes=np.tile([1, 2], (8, 1)), highest=np.ones(8, int),
              total=10)  # fmt: skip

    def measure(choices, count):
        return [10.0 - 9 * (c[3] and c[6]) - 0.1 * c[:3].sum() / count for c in choices]

    begin = Standing(0, np.array([1, 1, 0, 0, 0, 0, 0, 0]), 9.8)
    rounds = Rounds(generations=20, offspring=8, survivors=3, windows=(1, 2, 2))
    seen = []
    found = evolve(replace(begin), measure, f, rounds, done=lambda s: seen.append(replace(s)))
    assert found.parent.tolist() == [0, 0, 0, 1, 0, 0, 1, 0]
    assert found.loss == 1.0
    assert [s.generation for s in seen] == list(range(1, 21))
    assert [s.loss for s in seen] == sorted((s.loss for s in seen), reverse=True)
    # Resumed at any generation, the search is the same.
    again = evolve(replace(seen[3]), measure, f, rounds)
    assert again.parent.tolist() == found.parent.tolist()
    assert (again.loss, again.kept) == (found.loss, found.kept)
    # When the time is over, it stops before the next generation.
    stopped = evolve(replace(seen[3]), measure, f, rounds, is_over=iter([False, True]).__next__)
    assert stopped == seen[4]


# ---------------------------------------------------------------- a model


@pytest.fixture(scope="module")
def calibrated(tiny_moe, tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "tiny.calib"
    calibrate(tiny_moe, TEXT, path, window=96, threads=1)
    return path


@pytest.fixture(scope="module")
def windows(tiny_moe):
    return windows_of(open_moe(tiny_moe), TEXT, window=48, count=2)


def some(units, seed=0):
    """Returns a random choice."""
    return np.random.default_rng(seed).integers(0, units.counts)


def lowered(units, unit):
    """Returns the choice with all units at their highest level except one, at its lowest."""
    choice = units.top
    choice[unit] = 0
    return choice


def written(units, choice, folder):
    """Writes a choice as the two files that engines read; returns their options."""
    moe = units.moe
    allocation = Allocation(
        method="search", layers=moe.config.moe_layers, bits=units.expert_bits(choice),
        dense=units.dense_bits(choice),
    )  # fmt: skip
    (folder / "a.json").write_bytes(allocation.to_json())
    table = KvTable(of=KvTable.identity(moe), layers=units.kv_rows(choice))
    return {
        "bits": "auto", "dense_bits": "auto", "allocation": folder / "a.json", "kv_table": table,
        "cache_type_k": "auto", "cache_type_v": "auto",
    }  # fmt: skip


def divergences(path, windows, **options):
    """Returns the divergences of a choice, from engines opened with and without it."""
    found = []
    for given in ({}, options):
        with edgemoe.load(path, threads=1, **given) as engine:
            found.append([half_log_softmax(engine.logits(w)) for w in windows])
    pairs = zip(*found, strict=True)
    return np.array([(np.exp(p) * (p - q)).sum(1, dtype=np.float64) for p, q in pairs])


def test_bytes_are_those_of_the_file_and_the_cache(tiny_moe):
    moe = open_moe(tiny_moe)
    units = Units(moe, context=256)
    floats = sum(sum(t.lengths) for t in moe.tensors.values() if t.spec.kind == "f32")
    fewest = np.zeros(len(units), np.int64)
    assert not moe.config.tied  # so that at fewer bits the embedding is not resident
    for level, choice, kind in ((5, units.top, "f16"), (1, fewest, "q2_0")):
        there = [t for name, t in moe.tensors.items() if level == 5 or name != "embed"]
        dense = sum(sum(t.lengths[:level]) for t in there) - floats
        held = state_bytes(moe.config, 256, KvTypes(kind, kind))
        assert units.bytes(choice) == int(moe.experts.sizes(level).sum()) + dense + held


def test_a_mixed_model_is_measured_as_it_runs(tiny_moe, windows, tmp_path):
    """The loss is that of an engine opened with the choice as files, also after other choices were measured."""
    units = Units(open_moe(tiny_moe), context=64)
    loss = MixedLoss(tiny_moe, windows, threads=1)

    def measured(choice, which=None):
        (found,) = loss([units.mix(choice)], which)
        return found

    assert not measured(units.top).any()
    for seed in range(3):
        choice = some(units, seed)
        expected = divergences(tiny_moe, windows, **written(units, choice, tmp_path))
        assert np.array_equal(measured(choice), expected)
        assert np.array_equal(measured(choice, range(1, 2)), expected[1:])
    assert measured(some(units)).mean() > 1e-4
    # Other windows replace these, and the reference results.
    loss.take(windows[::-1])
    assert np.array_equal(measured(choice), expected[::-1])
    with pytest.raises(ValueError, match="windows: expected 48 tokens each, got 20"):
        loss.take(windows[:, :20])


# Windows and branch norms, recurrent layers, latents, layers without an FFN, RoPE that depends on the length.
@pytest.mark.parametrize(
    "name", ["gemma4_text", "qwen3_next", "deepseek_v3", "nemotron_h", "phimoe"]
)
def test_layers_one_by_one_give_what_a_pass_gives(name, tmp_path):
    path = tmp_path / "x.moe"
    convert(HFCheckpoint(families.make(name, tmp_path)), path)
    windows = np.array(families.random_ids(3 * 40), np.int32).reshape(3, 40)
    units = Units(open_moe(path), context=64)
    loss = MixedLoss(path, windows, threads=1)
    choices = [some(units, seed) for seed in range(2)]
    for choice, found in zip(choices, loss([units.mix(c) for c in choices]), strict=True):
        expected = divergences(path, windows, **written(units, choice, tmp_path))
        assert np.array_equal(found, expected)


def test_what_choices_have_alike_is_computed_once(tiny_moe, windows, monkeypatch):
    """Experts are read once for all choices, with room for those of one layer; losses are those measured alone."""
    moe = open_moe(tiny_moe)
    units = Units(moe, context=64)
    choices = [units.top]
    for unit in (0, 3, 9, units.num_experts + 2, len(units) - 1, units.num_experts):
        choices.append(choices[-1].copy())
        choices[-1][unit] = 0
    choices += [choices[2], some(units)]
    mixes = [units.mix(choice) for choice in choices]
    alone = [MixedLoss(tiny_moe, windows, threads=1)([mix])[0] for mix in mixes]
    layers = np.array([units.first_layer(lowered(units, unit)) for unit in range(len(units))])
    ran = sum(len({choice[layers <= i].tobytes() for choice in choices}) for i in range(2))
    assert 2 < ran < 2 * len(choices)
    monkeypatch.setattr(mixed_loss, "_TOKENS", 2 * windows.shape[1])
    with_slots(monkeypatch, 9 * expert_bytes(moe, len(moe.ladder)))
    told = []
    loss = MixedLoss(tiny_moe, windows, threads=1, told=told.append)
    loss([units.mix(units.top)])
    assert sum(told) == 2 * 2 * len(windows)  # including the reference
    told.clear()
    store = loss._experts.store
    before = store.stats["bytes_read"]
    assert np.array_equal(loss(mixes), alone)
    assert sum(told) == ran * len(windows)
    assert max(told) == 2
    # An upgrade reads whole pages.
    most = 1.1 * moe.experts.sizes(len(moe.ladder)).sum()
    assert store.stats["bytes_read"] - before <= most
    # Measured a few at a time, they are the same.
    monkeypatch.setattr(mixed_loss, "_STATES", 3 * 4 * windows.shape[1] * moe.config.hidden_size)
    loss = MixedLoss(tiny_moe, windows, threads=1)
    assert loss.most(1) == 3
    assert np.array_equal(loss(mixes), alone)


@pytest.mark.usefixtures("small_process")
def test_what_is_made_of_predictions_is_counted(tmp_path, monkeypatch):
    """Predictions take most of the memory here. The count has them, the engine, and the activations between layers."""
    path = tmp_path / "x.moe"
    convert(HFCheckpoint(families.make("qwen3_moe", tmp_path, changes={"vocab_size": 8000})), path)
    windows = np.array(families.random_ids(3 * 40), np.int32).reshape(3, 40)
    units, counted, opened = Units(open_moe(path), context=64), [], mixed_loss.open_model

    def seen(path, options):
        counted.append((1 << 30) - options.ram)
        return opened(path, options)

    monkeypatch.setattr(mixed_loss, "open_model", seen)
    MixedLoss(path, windows, ram="1GiB", threads=1)([units.mix(units.top)])  # loads code
    loss = MixedLoss(path, windows, ram="1GiB", threads=1)
    one = loss._logits.nbytes
    assert counted == [mixed_loss._STATES // 2 + one * (len(windows) + 3)] * 2
    tracemalloc.start()
    loss([units.mix(some(units)), units.mix(units.top)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The logits were allocated before; sixteen arrays of activations between layers are smaller than one of these.
    assert peak + one <= one * (len(windows) + 3) + one // 2


def test_states_of_one_kind_at_a_time(tiny_moe, windows, monkeypatch):
    units, alive, most = Units(open_moe(tiny_moe), context=64), weakref.WeakSet(), []
    make = layered.SequenceState

    def made(*args):
        state = make(*args)
        alive.add(state)
        most.append(len(alive))
        return state

    monkeypatch.setattr(layered, "SequenceState", made)
    loss = MixedLoss(tiny_moe, windows, threads=1)
    loss([units.mix(some(units, seed)) for seed in range(4)])
    assert len(most) > 2 * len(windows)  # states were made for several kinds
    assert max(most) <= len(windows)  # as many as a batch has sequences


def test_each_matrix_has_its_own_bits(tiny_moe, windows, tmp_path):
    moe = open_moe(tiny_moe)
    units = Units(moe, context=64)
    four = np.full(len(units), 2)
    for choice, plain in ((units.top, {}), (four, {"bits": 4, "dense_bits": 4})):
        options = written(units, choice, tmp_path)
        del options["kv_table"], options["cache_type_k"], options["cache_type_v"]
        with edgemoe.load(tiny_moe, **options) as engine, edgemoe.load(tiny_moe, **plain) as other:
            assert np.array_equal(engine.logits(windows[0]), other.logits(windows[0]))
            assert engine.budget.dense == other.budget.dense
            assert engine.budget.active_dense == other.budget.active_dense
    choice = some(units)
    options = written(units, choice, tmp_path)
    logits = []
    for room in ({}, {"slots": 3 * expert_bytes(moe, len(moe.ladder))}):
        with edgemoe.load(tiny_moe, **options, **room) as engine:
            logits.append(engine.logits(windows[0]))
            fewest, most = (dense_bytes(moe, n) - looked_up_bytes(moe, n) for n in (1, 5))
            assert fewest < engine.budget.active_dense < most
            assert engine.notes[0] == "lossy: dense weights at 2 to 8 of the file's 8 bits"
            for n in range(24, 26):
                engine.logits(windows[0][:n])
                assert np.array_equal(engine.extend(windows[0][n : n + 1]), logits[0][n : n + 1])
    assert np.array_equal(*logits)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dense": {}}, "says nothing of matrices outside the experts; edgemoe allocate"),
        ({"dense": {"embed": 4}}, "says nothing of the matrix"),
        ({"dense": {"embed": 5}}, "says nothing of the matrix"),
        ({"dense": 3}, "not an allocation"),
        ({"edgemoe_allocation": 3}, "allocation version 3; expected 1 or 2"),
        ({"more": "x", "bits_of": 5}, "asks for 5 bits of embed; the file has 2, 3, 4, 6, 8"),
        ({"more": "y", "bits_of": 4}, "is for a model with the matrix 'y'"),
    ],
)
def test_what_says_nothing_of_the_matrices_is_refused(tiny_moe, tmp_path, change, said):
    units = Units(open_moe(tiny_moe), context=64)
    options = written(units, units.top, tmp_path)
    value = json.loads(options["allocation"].read_text())
    if "more" in change:
        value["dense"]["y" if change["more"] == "y" else "embed"] = change["bits_of"]
    options["allocation"].write_text(json.dumps(value | change))
    with pytest.raises(FormatError, match=said):
        edgemoe.load(tiny_moe, **options)


def test_an_allocation_is_asked_for(tiny_moe, tmp_path):
    with pytest.raises(
        ValueError, match=r"dense_bits: auto takes an allocation, .* --method search makes it"
    ):
        edgemoe.load(tiny_moe, dense_bits="auto")
    # An allocation without matrices stays readable by older versions.
    old = Allocation(method="error", layers=(0,), bits=np.full((1, 2), 4, np.int8))
    assert json.loads(old.to_json())["edgemoe_allocation"] == 1
    new = replace(old, dense={"embed": 3})
    assert json.loads(new.to_json())["edgemoe_allocation"] == 2
    assert Allocation.from_json(new.to_json(), "x").dense == {"embed": 3}


# ---------------------------------------------------------------- a search of a model


def searched(moe, calibrated, windows, keep, **changes):
    units = Units(open_moe(moe), context=64)
    middle = (units.bytes(units.top) + units.bytes(units.top * 0)) // 2
    given = {"context": 64, "rounds": ROUNDS, "threads": 1, **changes}
    total = given.pop("total", middle)
    return search_everything(moe, Calibration(calibrated), windows, total, keep, **given)


def choice_of(units, found):
    """Returns the choice that an allocation and a KV table express."""
    levels = [rung[0] for rung in units.moe.ladder]
    experts = [levels.index(b) for b in found.allocation.bits.reshape(-1).tolist()]
    dense = [units.moe.dense_ladder.index(found.allocation.dense[name]) for name in units.matrices]
    kv = [KINDS.index(found.table.layers[cell.layer][cell.side]) for cell in units.cells]
    return np.array([*experts, *dense, *kv])


def same(found, whole):
    """Returns whether two searches found the same."""
    return (
        found.allocation.to_json() == whole.allocation.to_json()
        and found.table.to_json() == whole.table.to_json()
        and (found.start_loss, found.loss, found.kept) == (whole.start_loss, whole.loss, whole.kept)
    )


def interrupted(at):
    """Returns a progress callback that interrupts once `at` is done; a negative `at` counts from the end."""

    def progress(done, total):
        assert 0 <= done <= total
        if done >= at % total:
            raise KeyboardInterrupt

    return progress


def test_ctrl_c_ends_with_the_best_so_far(tiny_moe, calibrated, windows, tmp_path):
    """Whenever it comes, nothing is lost, and the same call goes on."""
    whole = searched(tiny_moe, calibrated, windows, tmp_path / "whole")
    assert (whole.generation, whole.is_interrupted) == (ROUNDS.generations, False)
    each = 2 * ROUNDS.measured  # layers
    for generation, at in ((None, 200), (0, 1 - 2 * each), (1, 1 - each)):
        keep = tmp_path / f"{at}"
        if generation is None:  # before there is any choice
            with pytest.raises(KeyboardInterrupt):
                searched(tiny_moe, calibrated, windows, keep, progress=interrupted(at))
            assert len(json.loads(keep.read_bytes())["costs"]) >= 16
        else:
            found = searched(tiny_moe, calibrated, windows, keep, progress=interrupted(at))
            assert (found.generation, found.is_interrupted) == (generation, True)
            assert found.loss == json.loads(keep.read_bytes())["state"]["loss"]
        assert same(searched(tiny_moe, calibrated, windows, keep), whole)


def test_time_that_is_over(tiny_moe, calibrated, windows, tmp_path):
    """It ends what costs alone are measured for, as it ends generations; each call gets on."""
    keep, calls = tmp_path / "a", 0
    while True:
        try:
            found = searched(tiny_moe, calibrated, windows, keep, seconds=0, held_out=windows)
        except TimeIsOver as error:
            calls += 1
            known = len(json.loads(keep.read_bytes())["costs"])
            assert str(error).startswith(f"the time is over, with {known} of ")
            assert known == 16 * calls
        else:
            break
    assert calls > 1
    assert (found.generation, found.is_interrupted) == (0, False)
    assert found.loss == found.start_loss
    assert found.held_out[:2] == (found.loss, found.loss)
    whole = searched(tiny_moe, calibrated, windows, tmp_path / "b")
    assert same(searched(tiny_moe, calibrated, windows, keep, seconds=1000), whole)


def test_a_search_that_ends_early_lets_go_of_the_model(
    tiny_moe, calibrated, windows, tmp_path, monkeypatch
):
    open_model, made = mixed_loss.open_model, []

    def opened(path, options):
        found = open_model(path, options)
        made.append(weakref.ref(found.model.experts))
        return found

    monkeypatch.setattr(mixed_loss, "open_model", opened)
    with pytest.raises(TimeIsOver) as error:
        searched(tiny_moe, calibrated, windows, tmp_path / "a", seconds=0)
    assert error.tb is not None  # its frames know the loss
    assert [experts() for experts in made] == [None]


def test_a_search_goes_on_where_it_was(tiny_moe, calibrated, windows, tmp_path):
    whole = searched(tiny_moe, calibrated, windows, tmp_path / "a")
    assert whole.loss <= whole.start_loss
    units = Units(open_moe(tiny_moe), context=64)
    assert whole.bytes == units.bytes(choice_of(units, whole))
    assert whole.bytes <= whole.allocation.settings["bytes"]
    ((layer, expert),) = whole.allocation.protected
    assert whole.allocation.bits[layer, expert] == 8
    count = len(json.loads((tmp_path / "a").read_bytes())["costs"])
    assert count == 2 * 4 + 4 * (len(units) - 16)
    # A search that has ended measures nothing again.
    told = []
    again = searched(
        tiny_moe, calibrated, windows, tmp_path / "a", progress=lambda *at: told.append(at)
    )
    assert same(again, whole)
    assert len(told) < 10
    assert told[-1][0] == told[-1][1]
    with pytest.raises(
        FormatError, match="with other settings: context is 64, not 32; --overwrite"
    ):
        searched(tiny_moe, calibrated, windows, tmp_path / "a", context=32)
    # Converted with a calibration, the same checkpoint has other codes.
    anew = tmp_path / "anew.moe"
    convert(tiny_checkpoint(), anew, calibration=Calibration(calibrated))
    with pytest.raises(FormatError, match=r"with other settings: weights is \d+, not \d+; --over"):
        searched(anew, calibrated, windows, tmp_path / "a")
    (tmp_path / "b").write_text(json.dumps({"edgemoe_search": 1}))
    with pytest.raises(FormatError, match="a search of version 1, not 2; --overwrite begins anew"):
        searched(tiny_moe, calibrated, windows, tmp_path / "b")
    (tmp_path / "b").write_text("{}")
    with pytest.raises(FormatError, match="no search of edgemoe; --overwrite begins anew"):
        searched(tiny_moe, calibrated, windows, tmp_path / "b")
    damaged = json.loads((tmp_path / "a").read_bytes())
    for level in (-1, 5, 1 << 70):
        damaged["state"]["parent"][3] = level
        (tmp_path / "b").write_text(json.dumps(damaged))
        with pytest.raises(FormatError, match="no search of edgemoe; --overwrite begins anew"):
            searched(tiny_moe, calibrated, windows, tmp_path / "b")
    with pytest.raises(ValueError, match=r"bytes: expected at least \d+, .*, got 1000$"):
        searched(tiny_moe, calibrated, windows, tmp_path / "c", total=1000)
    assert not (tmp_path / "c").exists()


def test_command(tiny_moe, calibrated, tmp_path, capsys, monkeypatch):
    model = shutil.copy(tiny_moe, tmp_path / "m.moe")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = [
        "allocate", str(model), "--method", "search", "--text", str(text), "--held-out", str(text),
        "--chunks", "2", "--window", "32", "--generations", "1", "--context", "64",
    ]  # fmt: skip
    sized = [*command, "--calibration", str(calibrated), "--bytes", "300KiB"]
    assert main([*sized, "-o", str(tmp_path / "x.json")]) == 0
    said = capsys.readouterr()
    assert "MiB with keys and values of 64 tokens; KL" in said.out
    assert "on held-out text: KL" in said.out
    assert "wrote" in said.err
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"m.moe", "text.txt", "x.json", "x.kv.json"}
    options = {"bits": "auto", "dense_bits": "auto", "cache_type_k": "auto", "cache_type_v": "auto"}
    files = {"allocation": tmp_path / "x.json", "kv_table": tmp_path / "x.kv.json"}
    with edgemoe.load(model, **options, **files) as engine:
        expected = engine.logits([1, 2, 3])
    real, stored = append.add_sections, []
    monkeypatch.setattr(append, "add_sections", lambda *to: (stored.append(list(to[1])), real(*to)))
    assert main([*sized, "--store"]) == 0
    assert stored == [["allocation", "kv_types"]]  # in one go
    with edgemoe.load(model, **options) as engine:
        assert np.array_equal(engine.logits([1, 2, 3]), expected)
    quality = [
        "quality",
        str(model),
        "--bits",
        "auto",
        "--dense-bits",
        "auto",
        "-ctk",
        "auto",
        "-ctv",
        "auto",
    ]
    assert main([*quality, "--text", str(text), "--chunk", "32", "--chunks", "1"]) == 0
    assert "| auto |" in capsys.readouterr().out
    for more, what in (
        ([*quality, "--store"], "--store: keeps no figures of --dense-bits auto"),
        (command, "expected --bytes"),
        ([*command, "--bytes", "1MiB"], "expected --calibration; edgemoe calibrate makes it"),
        ([*sized, "--avg-bits", "3"], "--avg-bits: search takes --bytes alone"),
        ([*sized, "--per-layer"], "--per-layer: search takes --bytes alone"),
        ([*sized, "--context", "1000"], "--context: expected at most 512"),
        ([*sized, "--window", "0"], "window: expected 1 to 512 (the model's), got 0"),
        (
            ["allocate", str(model), "--avg-bits", "3", "--bytes", "1MiB"],
            "--bytes: for --method search only",
        ),
        (
            ["allocate", str(model), "--avg-bits", "3", "--minutes", "5"],
            "--minutes: for --method search only",
        ),
        (
            ["allocate", str(model), "--avg-bits", "3", "--overwrite"],
            "--overwrite: for --method search only",
        ),
    ):
        assert main(more) == (1 if more[0] == "quality" else 2)
        assert what in capsys.readouterr().err


@pytest.mark.usefixtures("small_process")
def test_command_that_is_interrupted(tiny_moe, calibrated, tmp_path, capsys, monkeypatch):
    text, out = tmp_path / "text.txt", tmp_path / "x.json"
    text.write_text(TEXT)
    command = [
        "allocate", str(tiny_moe), "--method", "search", "--text", str(text), "--held-out", str(text),
        "--chunks", "2", "--window", "32", "--generations", "2", "--context", "64", "--bytes", "300KiB",
        "--calibration", str(calibrated), "-o", str(out), "--ram", "2GiB", "-t", "1", "--minutes", "60",
    ]  # fmt: skip

    class Interrupted(Progress):
        def __call__(self, done, total):
            if done >= share * total:
                raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Clock, "is_over", lambda self: True)
        assert main(command) == 1
    assert re.search(
        rf"the time is over, with 16 of \d+ costs measured; the same command goes on from {tmp_path / 'x.search'}$",
        capsys.readouterr().err.strip(),
    )
    assert not out.exists()
    monkeypatch.setattr(allocate_search, "Progress", Interrupted)
    share = 0.5  # while each is measured alone
    assert main(command) == 130
    assert (
        f"interrupted; the same command goes on from {tmp_path / 'x.search'}"
        in capsys.readouterr().err
    )
    assert not out.exists()
    share = 0.85
    assert main(command) == 130
    said = capsys.readouterr()
    assert f"wrote {out} and {tmp_path / 'x.kv.json'}" in said.err
    assert " of 2 generations; the same command goes on from" in said.err
    assert "KL" in said.out
    assert Allocation.from_json(out.read_bytes(), "x").dense
    monkeypatch.undo()
    assert main(command) == 0
    assert not (tmp_path / "x.search").exists()


def test_the_search_itself_lies_beside_what_is_read_and_written(tiny_moe, tmp_path, capsys):
    """The state of the search is removed at the end: neither the result nor a file of the user may have its name."""
    link = tmp_path / "link.json"
    link.symlink_to("link.search")
    text = tmp_path / "notes.search"
    text.write_text(TEXT)
    model = shutil.copy(tiny_moe, tmp_path / "m.search")
    command = ["--method", "search", "--calibration", str(text), "--bytes", "300KiB", "--overwrite"]
    for where, out, code, said in (
        (tiny_moe, "best.search", 2, "best.search is where the search lies while it is under way"),
        (tiny_moe, "link.json", 2, "link.json is where the search lies while it is under way"),
        (tiny_moe, "notes.json", 1, "notes.search: is read by this command"),
        (model, "m.json", 1, "m.search: is read by this command"),
    ):
        found = main(["allocate", str(where), *command, "-o", str(tmp_path / out)])
        err = capsys.readouterr().err
        assert said in err
        assert found == code
    assert text.read_text() == TEXT
    assert {path.name for path in tmp_path.iterdir()} == {"link.json", "notes.search", "m.search"}
