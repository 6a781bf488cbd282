"""The trained predictor of routing paths: its arithmetic, its training, and how schedulers use it."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load, save
from tiny import tiny_paths

import edgemoe
from edgemoe.cli.main import main
from edgemoe.errors import FormatError
from edgemoe.file.append import add_sections
from edgemoe.file.reader import open_moe
from edgemoe.lab.routing import paths
from edgemoe.plan import Routing
from edgemoe.runtime.trace import read
from edgemoe.scheduler import SCHEDULERS, Setting
from edgemoe.scheduler.expertflow import ExpertFlow
from edgemoe.scheduler.paths import PathPredictor, PathUse, hashed
from edgemoe.store import expert_bytes

L, E, K = 2, 8, 2


def setting(section=None):
    return Setting(
        num_layers=L, num_experts=E, experts_per_token=K, bits=8, level_bits=(8,),
        level_bytes=(4096,), slots_bytes=4 * 4096,
        sections={} if section is None else {"paths": section},
    )  # fmt: skip


def routing(layer, experts):
    rest = [e for e in range(E) if e not in experts]
    scores = np.zeros((1, E), np.float32)
    scores[0, experts], scores[0, rest] = [0.5, 0.3], 0.2 / len(rest)
    return Routing(
        layer, np.array([experts], np.int32), np.array([[0.6, 0.4]], np.float32), scores=scores
    )


def best(logits):
    return np.sort(np.argsort(-logits, axis=-1)[..., :K])


def test_the_arithmetic_is_that_of_torch():
    torch = pytest.importorskip("torch")
    section = tiny_paths(width=8, rows=16)
    t = {name: torch.from_numpy(array.copy()) for name, array in load(section).items()}
    for name in ("now", "next", "w_input", "w_state"):  # which are kept in 4 bits
        scale = t[name].abs().amax(dim=1, keepdim=True) / 7.5
        t[name] = ((t[name] / scale).floor().clamp(-8, 7) + 0.5) * scale
    unit = torch.nn.GRU(8, 8, batch_first=True)
    for mine, theirs in [("w_input", "weight_ih_l0"), ("w_state", "weight_hh_l0"),
                         ("b_input", "bias_ih_l0"), ("b_state", "bias_hh_l0")]:  # fmt: skip
        getattr(unit, theirs).data = t[mine]
    ids = np.array([3, 200, 17, 17, 4, 99], np.int32)
    x = t["embedding"][torch.from_numpy(hashed(ids, 16))].float()
    state, _ = unit(x[None])
    state = state.detach()
    now = torch.cat([state[0], x], dim=1) @ t["now"].T + t["now_bias"]
    after = state[0] @ t["next"].T + t["next_bias"]
    near = 0.04 * float(now.std())  # inputs are rounded to 8 bits, in every step
    whole, single = (PathPredictor.from_section(section, L, E) for _ in range(2))
    for i in range(len(ids)):
        single.follow(ids[i : i + 1])
        np.testing.assert_allclose(single.now.ravel(), now[i], atol=near)
        np.testing.assert_allclose(single.next.ravel(), after[i], atol=near)
    whole.follow(ids)
    np.testing.assert_allclose(whole.now, single.now, rtol=1e-4, atol=1e-4)
    whole.begin()
    whole.follow(ids[:1])
    np.testing.assert_allclose(whole.now.ravel(), now[0], atol=near)


def test_tokens_spread_over_the_rows():
    rows = hashed(np.arange(5000), 64)
    assert rows.min() == 0
    assert rows.max() == 63
    assert np.bincount(rows).max() < 2 * 5000 / 64


def text(n, length, seed=0):
    """Returns texts in which each token is the one before plus 1, mod 7, and determines its experts."""
    ids = (np.random.default_rng(seed).integers(0, 7, (n, 1)) + np.arange(length)) % 7
    table = np.random.default_rng(9).permuted(np.tile(np.arange(E), (7, L, 1)), axis=2)[:, :, :K]
    uses = np.zeros((n, length, L, E), np.uint8)
    np.put_along_axis(uses, table[ids], 1, axis=3)
    return ids, uses, table


def test_training_finds_what_tokens_say():
    pytest.importorskip("torch")
    ids, uses, table = text(32, 12)
    calls = []
    section = paths.train(
        ids, uses, width=32, rows=64, epochs=60, progress=lambda done, total: calls.append((done, total))
    )  # fmt: skip
    assert calls[-1] == (120, 120)
    again = [paths.train(ids, uses, width=8, rows=64, epochs=1) for _ in range(2)]
    assert again[0] == again[1]
    predictor = PathPredictor.from_section(section, L, E)
    predictor.follow(np.array([2, 3, 4]))
    for token in (5, 6, 0, 1):
        assert (best(predictor.next) == np.sort(table[token])).all()
        predictor.follow(np.array([token]))
        assert (best(predictor.now) == np.sort(table[token])).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rows": 100}, "power of two"), ({"width": 4}, "width"), ({"epochs": 0}, "epochs")],
)
def test_wrong_sizes_are_refused(options, message):
    ids, uses, _ = text(16, 16)
    with pytest.raises(ValueError, match=message):
        paths.train(ids, uses, **options)


def test_a_damaged_section_is_named():
    good = load(tiny_paths())
    for damage, what in [
        (b"x", "not a path predictor"),
        (save({n: a for n, a in good.items() if n != "now"}), "now"),
        (save({**good, "embedding": good["embedding"][:7]}), "power of two"),
        (save({**good, "next": np.full_like(good["next"], np.nan)}), "no numbers"),
    ]:
        with pytest.raises(FormatError, match=what):
            PathPredictor.from_section(damage, L, E)
    with pytest.raises(FormatError, match="train it again"):
        PathPredictor.from_section(tiny_paths(), L, E + 1)
    with pytest.raises(ValueError, match="profile train"):
        PathUse(setting())
    with pytest.raises(ValueError, match="profile train"):
        SCHEDULERS["expertflow"](setting(), predictor="trained")


def test_habit_and_text_are_weighed_by_what_is_right():
    """The routing follows the predictor in layer 0 and never in layer 1; frequencies are uninformative."""
    use = PathUse(setting(tiny_paths()))
    rng = np.random.default_rng(1)
    use.begin()
    right = [0, 0]
    for t in range(300):
        use.tokens(np.array([rng.integers(0, 500)], np.int32))
        odds = use.path()
        assert (odds is None) == (t == 0)
        first = np.argsort(-use._path.now[0])[:K]
        for layer, chosen in enumerate((first, rng.permutation(E)[:K])):
            if odds is not None and t >= 200:
                right[layer] += np.isin(np.argsort(odds[layer])[:K], chosen).sum()
            use.update(routing(layer, chosen.tolist()))
        use.learn()
    # Both layers share one pair of weights, and chance is a quarter.
    assert right[0] > 0.6 * 100 * K
    assert right[1] < 0.4 * 100 * K


def test_expertflow_keeps_and_reads_the_path_of_the_token_that_came():
    flow = ExpertFlow(setting(tiny_paths()))
    assert ExpertFlow(setting(tiny_paths()), predictor="habit")._is_trained is False
    flow.begin()
    empty = np.zeros((L, E), np.int8)
    for token in (5, 6):
        flow.tokens(np.array([token], np.int32))
        before = flow.priorities.scores.copy()
        plans = [flow.plan(routing(layer, [0, 1]), empty) for layer in range(L)]
        flow.passed(1, 0.01)
    predicted = np.sort(np.argsort(-before, axis=1)[:, :K])
    assert plans[0].ahead is not None
    assert set(plans[0].ahead.tolist()) == set((predicted[1] + E).tolist())
    assert before[0].max() > before[1].max()  # layer 0 runs sooner
    assert flow.report().startswith("trained path")


@pytest.fixture(scope="module")
def trained(tiny_moe, tmp_path_factory):
    """The tiny model with a predictor that the commands made, and its trace."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("paths")
    model, trace = folder / "x.moe", folder / "x.trace"
    shutil.copy(tiny_moe, model)
    source = folder / "text.txt"
    source.write_text("The sea, the sea! " * 70, encoding="utf-8")
    command = ["profile", "trace", str(model), "--text", str(source), "-o", str(trace), "-t", "1"]
    assert main([*command, "--pieces", "300"]) == 0
    command = ["profile", "train", str(model), str(trace)]
    assert main([*command, "--width", "8", "--rows", "64", "--epochs", "3"]) == 0
    return model, trace


def test_pieces_are_of_one_text_each(trained):
    _, path = trained
    trace = read(path)
    _, tokens = trace.passes()
    assert tokens.tolist() == [300, 300, 300, 300, 60]
    ids, uses = paths.pieces([trace, trace])
    assert ids.shape == (2 * 4 * 2, 128)
    assert uses.shape == (16, 128, L, E)
    assert (uses.sum(axis=3) == K).all()
    assert ids[2].tolist() == trace.by_token("id")[300:428, 0].tolist()
    experts = trace.by_token("experts")[428]
    assert sorted(np.flatnonzero(uses[3, 0, 1])) == sorted(experts[1])
    with pytest.raises(ValueError, match="at least 256 tokens"):
        paths.pieces([trace], 5000)


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [("expertflow", {}), ("expertflow", {"prefetch": 0}), ("on-demand", {"eviction": "next-path"})],
)
def test_answers_do_not_change(trained, scheduler, options):
    model, _ = trained
    moe = open_moe(model)
    slots = L * E // 2 * expert_bytes(moe, len(moe.ladder))
    ids = [5, 9, 200, 31, 77, 5, 120, 33] * 3
    rows = []
    for arguments in ({}, {"scheduler": scheduler, "options": options}):
        with edgemoe.load(model, slots=slots, threads=1, context=64, **arguments) as engine:
            engine.logits(ids[:4])
            rows.append([engine.extend([t]).copy() for t in ids[4:]])
            report = engine.stats.scheduler
    np.testing.assert_array_equal(*rows)
    assert ("trained path" in report) == (scheduler == "expertflow")


def test_reports_and_replays_know_it(trained, tmp_path, capsys):
    model, _ = trained
    text = tmp_path / "text.txt"
    text.write_text("The sea, the sea! " * 8, encoding="utf-8")
    trace = tmp_path / "y.trace"
    command = ["profile", "trace", str(model), "--text", str(text), "-o", str(trace), "-t", "1"]
    assert main([*command, "--prompt", "20"]) == 0
    assert main(["profile", "report", str(trace), "--json", "--model", str(model)]) == 0
    report = json.loads(capsys.readouterr().out)
    found = {p["name"]: p["recall"] for p in report["predictors"]}
    assert 0 < found["trained path"] <= 1
    assert found["trained path, token before"] > 0
    assert main(["profile", "report", str(trace), "--model", str(model)]) == 0
    shown = dict(
        re.findall(r"\| (trained[^|]*|token[^|]*|frequency) \| ([^|]*) \|", capsys.readouterr().out)
    )
    assert shown == {
        "token before": "token before", "frequency": "always", "trained path": "token",
        "trained path, token before": "token before",
    }  # fmt: skip
    command = ["profile", "replay", str(trace), "--schedulers", "expertflow", "--budgets", "50%"]
    assert main([*command, "--model", str(model), "--set", "expertflow.predictor=trained"]) == 0
    assert main(["profile", "train", str(model), str(tmp_path / "no.trace")]) == 1
    with open(tmp_path / "z.moe", "wb") as file:
        file.write(model.read_bytes())
    add_sections(tmp_path / "z.moe", {"paths": b"damaged"})
    assert open_moe(tmp_path / "z.moe").sections["paths"] == b"damaged"
    with pytest.raises(FormatError, match="not a path predictor"):
        edgemoe.load(tmp_path / "z.moe", scheduler="expertflow")
    with edgemoe.load(tmp_path / "z.moe", context=16) as engine:  # does not read the section
        engine.logits([1])
