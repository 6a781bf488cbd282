"""A model with an adapter computes what the fine-tune computes, bit for bit: alone, in turns, and several in a pass."""

from __future__ import annotations

import json

import families
import numpy as np
import pytest
from corrected import calibrated
from engines import GREEDY, with_slots
from tiny import tiny_checkpoint
from tuned import DENSE, tune

import edgemoe
from edgemoe.cli.main import main as edgemoe_main
from edgemoe.cli.run import main
from edgemoe.convert.adapter import convert_adapter
from edgemoe.convert.convert import convert
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.convert.source import SourceModel
from edgemoe.errors import FormatError
from edgemoe.file.append import add_sections
from edgemoe.file.reader import open_moe
from edgemoe.model import Batch
from edgemoe.quant import Allocation

IDS = np.random.default_rng(0).integers(0, 256, 40).tolist()
OTHERS = ("0.mlp.experts.3", "0.mlp.experts.7", "1.mlp.experts.2")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files by name: the base, and each fine-tune whole and as an adapter. One also has other dense weights."""
    folder = tmp_path_factory.mktemp("adapters")
    convert(tiny_checkpoint(), folder / "base.moe")
    base = open_moe(folder / "base.moe")
    for name, tuned in {"law": tune(), "care": tune(OTHERS, DENSE, seed=2)}.items():
        convert(tuned, folder / f"{name}.moe")
        convert_adapter(tuned, folder / f"{name}.moea", base)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def expected(files):
    """By name, the logits of the base and of each whole fine-tune."""
    return {name: alone(files[f"{name}.moe"]) for name in ("base", "law", "care")}


def alone(path, ids=IDS, **options):
    with edgemoe.load(path, ram="64MiB", **options) as engine:
        return engine.logits(ids)


def same(a, b):
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("name", ["law", "care"])
@pytest.mark.parametrize("share", [1, 0.3])
@pytest.mark.parametrize("options", [{}, {"threads": 1, "bits": 4, "dense_bits": 3}, {"bits": 2}])
def test_logits_are_those_of_the_fine_tune(files, monkeypatch, name, share, options):
    expected = alone(files[f"{name}.moe"], **options)
    assert not same(expected, alone(files["base.moe"], **options))
    with_slots(monkeypatch, lambda budget: int(budget.experts * share), chunk=16)
    assert same(alone(files["base.moe"], adapters=files[f"{name}.moea"], **options), expected)


def test_two_in_turns_and_the_model_alone(files, expected, monkeypatch):
    with_slots(monkeypatch, lambda budget: budget.experts // 2, chunk=16)
    given = {"a": files["law.moea"], "b": files["care.moea"]}
    with edgemoe.load(files["base.moe"], adapters=given, ram="64MiB") as engine:
        assert (engine.adapters, engine.adapter) == (("a", "b"), "a")
        for name, wanted in (
            ("a", "law"),
            (None, "base"),
            ("b", "care"),
            ("a", "law"),
            ("none", "base"),
        ):
            engine.adapter = name
            assert same(engine.logits(IDS), expected[wanted])
        with pytest.raises(ValueError, match=r"adapter: expected one of none, a, b, got 'c'"):
            engine.adapter = "c"
        engine.model.store.cache.check_integrity()


def test_a_reply_does_not_go_on_with_what_another_adapter_computed(files):
    given = [files["law.moea"], files["care.moea"]]
    with edgemoe.load(files["base.moe"], adapters=given, ram="64MiB") as engine:
        first = list(engine.generate(IDS, GREEDY))
        engine.adapter = "care"
        second = list(engine.generate(IDS, GREEDY))
    with edgemoe.load(files["care.moe"], ram="64MiB") as engine:
        assert second == list(engine.generate(IDS, GREEDY)) != first


def test_switching_reads_only_what_is_not_shared(files):
    with edgemoe.load(files["base.moe"], adapters=[files["law.moea"]], ram="64MiB") as engine:
        engine.adapter = None
        engine.logits(IDS)
        counted = engine.model.store.stats
        engine.adapter = "law"
        engine.logits(IDS)
        after, each = engine.model.store.stats, engine.model.store.cache.slot_bytes(5)
    assert counted["evictions"] == after["evictions"] == 0
    read = after["bytes_read"] - counted["bytes_read"]
    # The adapter's three experts, and those that only the fine-tune's routing chooses.
    assert 3 * each <= read < 6 * each


def test_several_in_one_pass_have_the_bits_that_they_have_alone(files, expected, monkeypatch):
    with_slots(monkeypatch, lambda budget: budget.experts // 2, chunk=128)
    given = [files["law.moea"], files["care.moea"]]
    with edgemoe.load(files["base.moe"], adapters=given, ram="64MiB", sequences=4) as engine:
        model, out = engine.model, np.empty((1, engine.config.vocab_size), np.float32)
        states = [model.make_state() for _ in range(3)]
        order = ["care", "base", "law"]
        for state, name in zip(states, order, strict=True):
            state.use(model.adapters.number(None if name == "base" else name))
        done = 0
        for upto in (11, 12, 13, len(IDS)):  # prompts of several tokens, and single ones
            ids = np.array(IDS[done:upto], np.int32)
            batch = Batch.of(*((state, ids) for state in states))
            hidden = model.forward(batch)
            for part, name in zip(batch.slices, order, strict=True):
                model.logits(hidden[part.stop - 1 : part.stop], out, part.state)
                assert same(out[0], expected[name][upto - 1])
            done = upto
        model.store.cache.check_integrity()


def test_bits_change_while_it_runs(files):
    fewer = alone(files["law.moe"], bits=3)
    with edgemoe.load(files["base.moe"], adapters=files["law.moea"], ram="64MiB") as engine:
        engine.logits(IDS)
        engine.change(bits=3)
        assert same(engine.logits(IDS), fewer)
        assert engine.expert_bits.shape == (2, 8)
        with pytest.raises(ValueError, match="adapters: expected the scheduler on-demand"):
            engine.change(scheduler="hobbit")


def test_with_another_number_of_experts(files):
    fewer = alone(files["law.moe"], experts=1)
    assert same(alone(files["base.moe"], adapters=files["law.moea"], experts=1), fewer)


def test_a_models_own_allocation_holds_for_adapters_and_after_a_change(files, tmp_path):
    """An adapter's expert has the bits of the expert it replaces, also after another setting is changed."""
    base, law = (tmp_path / files[name].name for name in ("base.moe", "law.moe"))
    for path in (base, law):
        path.write_bytes(files[path.name].read_bytes())
        moe = open_moe(path)
        levels = [rung[0] for rung in moe.ladder]
        bits = np.random.default_rng(4).choice(levels, (2, 8)).astype(np.int8)
        found = Allocation(method="x", layers=moe.config.moe_layers, bits=bits)
        add_sections(path, {"allocation": found.to_json()})
    wanted, fewer = (alone(law, bits="auto", **more) for more in ({}, {"experts": 1}))
    options = {"adapters": files["law.moea"], "bits": "auto", "ram": "64MiB"}
    with edgemoe.load(base, **options) as engine:
        assert same(engine.logits(IDS), wanted)
        engine.change(experts=1)
        assert same(engine.logits(IDS), fewer)
        content = base.read_bytes()
        base.unlink()
        base.write_bytes(content)
        with pytest.raises(FormatError, match="base.moe: was replaced by another file"):
            engine.change(experts=2)
        assert same(engine.logits(IDS), fewer)


def test_biases_of_experts(tmp_path):
    for name, seed in (("base", 1), ("tuned", 1)):
        families.make("gpt_oss", tmp_path / name, seed=seed)
    base, tuned = HFCheckpoint(tmp_path / "base"), HFCheckpoint(tmp_path / "tuned")
    real = tuned.tensor

    def tensor(name):
        values = real(name)
        # Only a bias of expert 2 differs: its matrices are those of the base.
        if name.endswith("layers.1.mlp.experts.down_proj_bias"):
            values = values.copy()
            values[2] += 0.5
        return values

    tuned.tensor = tensor
    convert(base, tmp_path / "base.moe")
    convert(tuned, tmp_path / "tuned.moe")
    convert_adapter(tuned, tmp_path / "a.moea", open_moe(tmp_path / "base.moe"))
    ids = families.random_ids(30)
    wanted = alone(tmp_path / "tuned.moe", ids)
    with edgemoe.load(tmp_path / "base.moe", adapters=tmp_path / "a.moea", ram="64MiB") as engine:
        assert engine.model.store.residency.shape[1] == engine.config.num_experts + 1
        assert same(engine.logits(ids), wanted)
        engine.adapter = None
        assert same(engine.logits(ids), alone(tmp_path / "base.moe", ids))
    assert not same(wanted, alone(tmp_path / "base.moe", ids))


def test_with_a_calibration_and_corrections(tmp_path):
    size = {"layers": 1, "experts": 4}
    source = tiny_checkpoint(**size)
    calibration = calibrated(tmp_path / "x.calib", SourceModel(source).config)
    options = {"calibration": calibration, "correction": 8, "bits": 4}
    tuned = tune(("0.mlp.experts.3",), DENSE[:1], **size)
    convert(source, tmp_path / "base.moe", **options)
    convert(tuned, tmp_path / "tuned.moe", **options)
    base = open_moe(tmp_path / "base.moe")
    assert base.scheme.correction
    convert_adapter(tuned, tmp_path / "a.moea", base, calibration=calibration)
    for bits in (2, 4):
        chosen = {"bits": bits, "dense_bits": bits}
        found = alone(tmp_path / "base.moe", adapters=tmp_path / "a.moea", **chosen)
        assert same(found, alone(tmp_path / "tuned.moe", **chosen))


def test_the_command_line(files, capsys):
    """The hash of the last logits is that of the fine-tune; the chat's command lists the adapters."""

    def run(model, *flags):
        assert (
            main([str(files[model]), *map(str, flags), "-p", "Hello", "-n", "3", "--temp", "0"])
            == 0
        )
        return capsys.readouterr()

    for name, flags in (
        ("law", ["--adapter", files["law.moea"]]),
        ("care", ["--adapter", f"x={files['care.moea']}", "--adapter", files["law.moea"]]),
    ):
        told, wanted = run("base.moe", *flags), run(f"{name}.moe")
        assert told.out == wanted.out
        assert told.err.rpartition("#")[2] == wanted.err.rpartition("#")[2]
        assert f"# adapter: {'x' if len(flags) > 2 else 'law'}" in told.err
    for flags, message in (
        (
            ["--adapter", files["law.moea"], "--adapter", files["law.moea"]],
            "--adapter: two are called law",
        ),
        (["--adapter", files["law.moe"]], "law.moe: is a whole model; expected an adapter"),
        (["--adapter", "x=nowhere.moea"], "nowhere.moea"),
        (["--adapter", files["law.moea"], "--scheduler", "mc"], "expected the scheduler on-demand"),
    ):
        assert main([str(files["base.moe"]), *map(str, flags), "-p", "Hello"]) == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line
    assert main([str(files["law.moea"]), "-p", "Hello"]) == 1
    assert "law.moea: is an adapter; expected the model that it is for" in capsys.readouterr().err


def test_an_adapter_is_measured_as_the_fine_tune_is(files, capsys, tmp_path):
    def rows(command, model, *flags):
        out = tmp_path / "out.json"
        text = ["--json", str(out)] if command == "quality" else ["--json"]
        assert edgemoe_main([command, str(model), *flags, *text]) == 0, capsys.readouterr().err
        said = capsys.readouterr().out
        report = json.loads(out.read_text() if command == "quality" else said)
        for row in report.get("rows", ()):
            row.pop("slots_bytes", None)  # an adapter's experts need slots too
        return report

    model, adapter, tuned = files["base.moe"], str(files["law.moea"]), files["law.moe"]
    asked = ["--bits", "8", "4", "--chunks", "1", "--chunk", "64"]
    whole = rows("quality", tuned, *asked)
    beside = rows("quality", model, "--adapter", adapter, *asked)
    assert beside["rows"] == whole["rows"]
    assert beside["adapter"] == adapter
    against = rows("quality", model, "--adapter", adapter, "--reference", str(tuned), *asked)
    first = against["rows"][0]
    assert first["loss_change"] == 0
    assert first["same_experts"] == 1
    without = rows("quality", model, "--adapter", adapter, "--reference", str(model), *asked)
    assert without["rows"][0]["loss_change"] != 0
    asked = ["--tasks", "copying", "--items", "2", "--bits", "4"]
    assert (
        rows("quality", model, "--adapter", adapter, *asked)["rows"]
        == rows("quality", tuned, *asked)["rows"]
    )
    measured = rows("bench", model, "--adapter", adapter, "-p", "8", "-n", "2", "-r", "1")
    assert measured["adapter"] == "law"
    assert [r["hit_rate"] for r in measured["results"]] == [1, 1]  # all were in memory before
    for flags, message in (
        (["--store"], "--store: keeps what was measured of the model alone"),
        (["--adapter", adapter], "--adapter: expected one, which is measured, got 2"),
    ):
        assert edgemoe_main(["quality", str(model), "--adapter", adapter, *flags]) == 1
        assert message in capsys.readouterr().err


def test_what_adapters_take_is_counted(files):
    with edgemoe.load(files["base.moe"], ram="64MiB") as engine:
        before = engine.budget
    with edgemoe.load(files["base.moe"], ram="64MiB", adapters=files["law.moea"]) as engine:
        budget, each = engine.budget, engine.model.store.cache.slot_bytes(5)
        assert budget.experts == before.experts + 3 * each
        # Both layers have as many places as the larger one, two: what the cache keeps for each.
        assert 2 * 2 * 100 <= budget.dense - before.dense <= 2 * 2 * 200
    with edgemoe.load(files["base.moe"], ram="64MiB", adapters=files["care.moea"]) as engine:
        adapter = engine.model.adapters.files[0]
        own = sum(sum(t.lengths) for t in adapter.tensors.values())
        assert own <= engine.budget.dense - before.dense <= own + 4096 * (len(adapter.tensors) + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": ["x/a.moea", "y/a.moea"]}, "adapters: two are called a"),
        ({"adapters": {"none": "a.moea"}}, "adapters: expected a name .* not none"),
        ({"adapters": {"a/b": "a.moea"}}, "adapters: expected a name"),
        ({"adapters": 3}, "adapters"),
        ({"adapters": "a.moea", "device": "cuda"}, "adapters: run on the processor alone"),
        ({"adapters": "a.moea", "scheduler": "hobbit"}, "adapters: expected the scheduler on-demand"),
        ({"adapters": "a.moea", "profile": "p"}, "profile: is of a model alone"),
        ({"adapters": "a.moea", "trace": "t"}, "trace: is of a model alone"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        edgemoe.EngineOptions(**options)
