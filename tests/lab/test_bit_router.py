"""D2MoE's trained bit routers: training in torch, their stored form, and the d2moe scheduler that uses them."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import families
import numpy as np
import pytest
import reference
import torch
from decoded import Decoded
from safetensors.numpy import save
from tiny import tiny_checkpoint

import edgemoe.lab.bits
from edgemoe import _core
from edgemoe.cli.main import main
from edgemoe.convert.convert import convert
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.errors import FormatError, OutOfBudget
from edgemoe.experts import Observer
from edgemoe.file.append import add_sections
from edgemoe.file.reader import open_moe
from edgemoe.lab.bits.bit_router import Routed
from edgemoe.lab.bits.choosing import Choosing, ffn, keep_within
from edgemoe.lab.bits.train_bit_router import RouterSettings, train_bit_router
from edgemoe.ops import OpsShape
from edgemoe.ops.cpu import CpuOps
from edgemoe.plan import Routing
from edgemoe.quant import SCHEMES, BitRouters
from edgemoe.scheduler import SCHEDULERS, Setting
from edgemoe.scheduler.d2moe import D2moe
from edgemoe.scheduler.plans import slot_bits
from edgemoe.specs import RopeSpec
from edgemoe.store.floats import dense_floats, expert_floats

TEXT = "The sea is never still, and the whale knows why it is so. " * 12
L, E, K, D = 2, 8, 2, 96  # of the tiny model


def routers(*, seed: int = 0, scale: float = 1.0, levels=(2, 3, 4), shape=(L, E, D)) -> BitRouters:
    rng = np.random.default_rng(seed)
    n = len(levels)
    weight = (scale * rng.standard_normal((shape[0], shape[1], n, shape[2]))).astype(np.float32)
    gate_weight, bias = rng.standard_normal((2, *weight.shape[:3])).astype(np.float32)
    return BitRouters(levels=levels, weight=weight, gate_weight=gate_weight, bias=bias)


def assert_same(a: BitRouters, b: BitRouters) -> None:
    for name in ("weight", "gate_weight", "bias"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.fixture
def copy(tiny_moe, tmp_path) -> Path:
    path = tmp_path / "tiny.moe"
    path.write_bytes(tiny_moe.read_bytes())
    return path


class Gates(Observer):
    """An observer that records the gates of every layer."""

    def __init__(self) -> None:
        self.gates: dict[int, list[np.ndarray]] = {}

    def planned(self, routing, plan, residency) -> None:
        self.gates.setdefault(routing.layer, []).append(routing.gates.copy())


# --- weights as floats, and the model in torch


@pytest.mark.parametrize("scheme", ["nested", "mwq"])
def test_weights_are_what_the_file_means(scheme, tmp_path):
    path = tmp_path / "x.moe"
    convert(tiny_checkpoint(), path, scheme=SCHEMES[scheme])
    moe, decoded = open_moe(path), Decoded(path)
    for name, weight in dense_floats(moe).items():
        np.testing.assert_allclose(weight, decoded.tensors[name], atol=1e-6)
    for level in range(1, len(moe.ladder) + 1):
        mine = expert_floats(moe, E + 1, level)
        for a, b in zip(mine, decoded.expert(1, 1, level), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_broken_expert_is_a_format_error(copy):
    moe = open_moe(copy)
    with open(copy, "r+b") as file:
        file.seek(int(moe.experts.offsets[3]) + 70)
        file.write(b"\x5a\x5a\x5a")
    with pytest.raises(FormatError, match="checksum of expert record 3"):
        expert_floats(moe, 3, 2)


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen2_moe-window", "qwen3_moe", "olmoe", "granitemoeshared"]
)
def test_the_model_in_torch_computes_what_the_reference_does(name, tmp_path):
    convert(HFCheckpoint(families.make(name, tmp_path / "source")), tmp_path / "x.moe")
    decoded, ids = Decoded(tmp_path / "x.moe"), families.random_ids(24)
    expected, _ = reference.logits(decoded.config, decoded.tensors, decoded.expert, ids)
    model = Routed(open_moe(tmp_path / "x.moe"), (2, 8), rate=0.01)
    got = model.logits(np.array([ids, ids], np.int32))
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("mixer", {"gate": "sigmoid"}), ("mixer", {"gate": "softplus_head"}), ("mixer", {"sinks": True}),
        ("mixer", {"v_norm": True}), ("mixer", {"chunk": 8}),
        ("mixer", {"growth": 0.1, "grow_every": 8}), ("mixer", {"qk_norm": "unit"}),
        ("mixer", {"rope": RopeSpec(dim=2)}), ("mixer", {"rope": None}),
        ("config", {"scoring": "sigmoid"}), ("config", {"choice_bias": True}), ("config", {"gate_scale": 2.0}),
        ("config", {"router_bias": True}), ("config", {"activation": "geglu"}), ("config", {"expert_bias": True}),
        ("config", {"out_norms": True}), ("config", {"head_bias": True}), ("config", {"soft_cap": 30.0}),
        ("config", {"groups": 2, "used_groups": 2}),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_model_in_torch_does_not_compute_is_refused_by_name(tiny_moe, where, what):
    moe = open_moe(tiny_moe)
    (mixer,) = moe.config.mixers
    changed = {"mixers": (dataclasses.replace(mixer, **what),)} if where == "mixer" else what
    moe = dataclasses.replace(moe, config=dataclasses.replace(moe.config, **changed))
    name = next(iter(what)).replace("rope", "RoPE")
    with pytest.raises(FormatError, match=f"of family {moe.config.family} yet: {name} "):
        Routed(moe, (2, 8), rate=0.01)


def test_the_model_in_torch_is_nearly_the_engine(tiny_moe):
    ids = families.random_ids(40)
    with edgemoe.load(tiny_moe, ram="1GiB") as engine:
        expected = engine.logits(ids)
    got = Routed(open_moe(tiny_moe), (2, 3), rate=0.01).logits(np.array([ids], np.int32))[0]
    error = np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < 0.02  # the engine's activations have 8 bits


def test_the_routed_models_loss_is_that_of_the_chosen_bits(tiny_moe):
    """If routers always choose one level, the divergence is that of the model at this level."""
    moe = open_moe(tiny_moe)
    model = Routed(moe, (2, 4), rate=0.01)
    ids = np.array([families.random_ids(40)], np.int32)
    model.bias.data[:, :, 1] = 100.0
    _, step = model.loss(ids, alpha=0.0, capacities=None, seed=0)
    logits = {}
    for bits in (4, 8):
        decoded = Decoded(tiny_moe)
        level = moe.level(bits)
        logits[bits], _ = reference.logits(
            decoded.config, decoded.tensors, lambda i, e, d=decoded, n=level: d.expert(i, e, n), ids[0]
        )  # fmt: skip
    log = {bits: np.log(reference.softmax(x)) for bits, x in logits.items()}
    kl = (np.exp(log[8]) * (log[8] - log[4])).sum(1).mean()
    assert step.divergence == pytest.approx(kl, rel=1e-3)
    assert (step.bits, step.dropped) == (4.0, 0.0)


def test_a_level_of_0_leaves_out_all_but_the_best_expert(tiny_moe):
    """If routers always choose 0 bits, each token keeps its best expert, which runs at the next level."""
    moe = open_moe(tiny_moe)
    model = Routed(moe, (0, 8), rate=0.01)
    model.bias.data[:, :, 0] = 100.0
    loss, step = model.loss(
        np.array([families.random_ids(40)], np.int32), alpha=1.0, capacities=None, seed=0
    )
    loss.backward()
    assert (step.bits, step.dropped) == (4.0, 0.0)  # 8 and 0, of two experts
    assert step.divergence > 0
    assert np.isfinite(model.bias.grad.numpy()).all()

    matrices = tuple(map(torch.from_numpy, expert_floats(moe, 3, moe.level(8))))
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(0))
    is_best = torch.tensor([True, False, False, True, False])
    choosing = Choosing(model, None, torch.Generator().manual_seed(0))
    out = choosing(0, 3, x, torch.full((5,), 0.5), is_best, [None, matrices])
    expected = ffn(x, *matrices) * is_best[:, None]
    torch.testing.assert_close(out, expected)
    assert (choosing.bits, choosing.slots) == (16.0, 5)


def test_gradients_tell_how_a_precision_would_change_the_loss(tiny_moe):
    """The derivative for a probability is that of mixing in the output of the other precision."""
    moe = open_moe(tiny_moe)
    ids = np.array([families.random_ids(16)], np.int32)

    def loss(bias: float) -> tuple[float, Routed]:
        model = Routed(moe, (2, 8), rate=0.01)
        model.bias.data[:, :, 0] = 100.0  # always 2 bits
        model.bias.data[1, :, 1] = bias  # in the last layer, so that no other layer changes
        total, _ = model.loss(ids, alpha=0.0, capacities=None, seed=0)
        total.backward()
        return float(total.detach()), model

    _, model = loss(95.0)  # probability 0.0067 of 8 bits: practically never drawn
    assert model.bias.grad is not None
    assert float(model.bias.grad[1, :, 1].sum()) < 0  # more of 8 bits is better
    assert float(model.bias.grad[1].sum(-1).abs().max()) < 1e-7  # probabilities sum to 1


# --- capacities


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_capacities_drop_what_exceeds_them_in_a_random_order(n):
    capacities = (0.3, 0.4, 0.3)
    for seed in range(5):
        choice = torch.randint(3, (n,), generator=torch.Generator().manual_seed(100 + seed))
        kept = keep_within(choice, capacities, torch.Generator().manual_seed(seed))
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
        room = [-(-round(c * 10) * n // 10) for c in capacities]
        expected = [False] * n
        for token in order:
            if room[choice[token]] > 0:
                room[choice[token]] -= 1
                expected[token] = True
        assert kept.tolist() == expected


# --- training


def train(path, out, *, steps=12, text=TEXT, **changes):
    settings = {"levels": (2, 4, 8), "window": 32, "batch": 2, "rate": 0.05} | changes
    return train_bit_router(path, text, out, RouterSettings(**settings), steps=steps, threads=1)


def test_the_loss_falls(tiny_moe, tmp_path):
    found, rows = train(tiny_moe, tmp_path / "x", steps=30, alpha=0.0, rate=0.01)
    assert [row.step for row in rows] == [10, 20, 30]
    assert rows[-1].divergence < 0.5 * rows[0].divergence  # bits cost nothing, so it uses them
    assert rows[-1].bits > rows[0].bits + 1
    assert found.weight.shape == (L, E, 3, D)
    _, rows = train(tiny_moe, tmp_path / "y", steps=30, alpha=100.0, rate=0.1)
    assert rows[-1].bits < 3  # bits are expensive; routers begin at 5 on average


def test_alpha_is_steered_to_the_average(tiny_moe, tmp_path):
    for average in (3.0, 5.0):
        _, rows = train(
            tiny_moe, tmp_path / str(average), steps=30, average_bits=average, rate=0.01
        )
        assert rows[-1].bits == pytest.approx(average, abs=0.4)


def test_routers_begin_as_the_rule_of_gates(tiny_moe, tmp_path):
    """Untrained routers give more bits to larger gates, and use each precision as often as its share says."""
    settings = RouterSettings(levels=(2, 3, 4), window=32)
    assert settings.shares == pytest.approx([0.3, 0.4, 0.3])
    model = Routed(open_moe(tiny_moe), settings.levels, rate=0.01)
    ids = np.random.default_rng(0).integers(0, 256, (4, 64)).astype(np.int32)
    model.begin(ids, settings.shares)
    with edgemoe.load(tiny_moe, ram="1GiB", observer=(seen := Gates())) as engine:
        for window in ids:
            engine.logits(window)
    for layer in range(L):
        gates = np.concatenate(seen.gates[layer]).ravel()
        logits = gates[:, None] * model.gate_weight[layer, 0].detach().numpy()
        level = (logits + model.bias[layer, 0].detach().numpy()).argmax(1)
        assert (np.diff(level[np.argsort(gates)]) >= 0).all()
        np.testing.assert_allclose(np.bincount(level) / len(level), settings.shares, atol=0.02)


@pytest.mark.parametrize(
    ("levels", "average"), [((2, 3, 4), 2.5), ((2, 4), 3.7), ((2, 4, 8), 6.0), ((2, 3, 4, 8), None)]
)
def test_shares_have_the_average(levels, average):
    settings = RouterSettings(levels=levels, average_bits=average)
    assert sum(settings.shares) == pytest.approx(1)
    assert min(settings.shares) >= 0
    assert np.dot(settings.shares, levels) == pytest.approx(settings.target, abs=0.3)


def test_an_interrupted_training_goes_on_where_it_was(tiny_moe, tmp_path):
    whole, rows = train(tiny_moe, tmp_path / "whole", capacities=(0.3, 0.4, 0.3))
    assert 0 < rows[0].dropped < 0.5

    def interrupt(done, total):
        if done == 5:
            raise KeyboardInterrupt

    settings = RouterSettings(
        levels=(2, 4, 8), window=32, batch=2, rate=0.05, capacities=(0.3, 0.4, 0.3)
    )
    part = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        train_bit_router(tiny_moe, TEXT, part, settings, steps=12, threads=1, progress=interrupt)
    found, again = train_bit_router(tiny_moe, TEXT, part, settings, steps=12, threads=1)
    assert_same(found, whole)
    assert again == rows
    assert found.settings["step"] == 12


def test_what_does_not_do_is_one_line(tiny_moe, tmp_path, monkeypatch):
    for changes, message in (
        ({"levels": (2, 5)}, "bits: expected one of 2, 3, 4, 6, 8"),
        ({"levels": (4,)}, "levels: expected two or more"),
        ({"average_bits": 8.0}, "average bits: expected more than 2 and less than 8"),
        ({"average_bits": 3.0, "alpha": 1.0}, "not both"),
        ({"alpha": -1.0}, "alpha: expected a number of at least 0"),
        ({"capacities": (0.5, 0.5)}, "capacities: expected 3 shares that sum to 1"),
        ({"text": "short"}, "expected at least one window"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tiny_moe, tmp_path / "x", **changes)
    with pytest.raises(OutOfBudget, match="training takes [0-9]+ MiB"):
        train_bit_router(tiny_moe, TEXT, tmp_path / "x", RouterSettings(), steps=1, ram="1MiB")
    assert not (tmp_path / "x").exists()
    (tmp_path / "x").write_text("mine")
    with pytest.raises(ValueError, match="exists, and is not of this training"):
        train(tiny_moe, tmp_path / "x")
    assert (tmp_path / "x").read_text() == "mine"
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "edgemoe.lab.bits.bit_router")
    monkeypatch.delattr(edgemoe.lab.bits, "bit_router")
    with pytest.raises(ModuleNotFoundError, match=r'pip install "edgemoe\[train\]"'):
        train(tiny_moe, tmp_path / "y")


def test_the_command_stores_and_d2moe_uses_it(copy, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    arguments = ["train-bit-router", copy, "--text", text, "--steps", 2, "--window", 32, "-t", 1]
    assert main([*map(str, arguments)]) == 0
    assert not capsys.readouterr().out  # too few steps for a line of the table
    kept = copy.with_suffix(".bit-routers")
    trained = BitRouters.from_bytes(kept.read_bytes(), "x")
    assert main([*map(str, arguments), "--store"]) == 0  # nothing is left to train
    assert not kept.exists()
    stored = BitRouters.from_bytes(open_moe(copy).sections["bit-routers"], "x")
    assert_same(stored, trained)
    with edgemoe.load(copy, scheduler="d2moe", ram="1GiB") as engine:
        assert engine.notes == (
            "lossy: each token runs its experts at 2, 3, 4 bits, as trained routers say",
        )


def test_the_command_says_what_is_wrong(copy, tmp_path, capsys):
    for arguments, code, message in (
        (["--levels", "2,5"], 2, "bits: expected one of"),
        (["--text", tmp_path / "none"], 1, "No such file"),
        (["-o", tmp_path / "no" / "x"], 1, "no such directory"),
        (["--ram", "1MiB"], 1, "training takes"),
    ):
        assert main(["train-bit-router", str(copy), *map(str, arguments)]) == code
        err = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("#")]
        assert len(err) == 1
        assert message in err[0]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--levels", "expected a whole number from 0, got 'x'"),
        ("--capacities", "expected shares like"),
    ],
)
def test_lists_that_are_none_are_named(copy, capsys, flag, message):
    with pytest.raises(SystemExit) as left:
        main(["train-bit-router", str(copy), flag, "x"])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


# --- the section


def test_bytes_come_back_as_they_were():
    mine = routers()
    found = BitRouters.from_bytes(mine.to_bytes({"extra": np.ones(2)}), "x")
    assert_same(found, mine)
    assert (found.levels, found.settings) == ((2, 3, 4), {})


def bad_sections():
    good = routers()
    meta = {"edgemoe_bit_routers": "1", "levels": "2 3 4", "settings": "{}"}
    tensors = good.tensors
    nan = good.weight.copy()
    nan[0, 0, 0, 0] = np.nan
    yield "garbage", b"no such thing"
    yield "cut", good.to_bytes()[:-1]
    yield "no metadata", save(tensors)
    yield "version", save(tensors, meta | {"edgemoe_bit_routers": "2"})
    yield "levels", save(tensors, meta | {"levels": "2 3"})
    yield "negative", save(tensors, meta | {"levels": "-1 2 3"})
    yield "order", save(tensors, meta | {"levels": "4 3 2"})
    yield "words", save(tensors, meta | {"levels": "a b c"})
    yield "settings", save(tensors, meta | {"settings": "{"})
    yield "no bias", save({"weight": good.weight}, meta)
    yield "bias", save(tensors | {"bias": good.bias[:, :, :2].copy()}, meta)
    yield "halves", save(tensors | {"weight": good.weight.astype(np.float16)}, meta)
    yield "nan", save(tensors | {"weight": nan}, meta)
    yield "layers", routers(shape=(L + 1, E, D)).to_bytes()
    yield "experts", routers(shape=(L, E - 1, D)).to_bytes()
    yield "inputs", routers(shape=(L, E, D - 1)).to_bytes()
    yield "no such level", routers(levels=(2, 5)).to_bytes()


@pytest.mark.parametrize(("content"), [pytest.param(c, id=n) for n, c in bad_sections()])
def test_a_bad_section_is_one_line(content, copy):
    add_sections(copy, {"bit-routers": content})
    with pytest.raises(FormatError, match="^section bit-routers: ") as error:
        edgemoe.load(copy, scheduler="d2moe", ram="1GiB")
    assert "\n" not in str(error.value)
    with edgemoe.load(copy, scheduler="d2moe", options={"router": "rule"}, ram="1GiB") as engine:
        assert engine.notes[0].endswith("by their gates")


# --- d2moe


def setting(found: BitRouters | None = None, *, bits: int = 8, **changes) -> Setting:
    levels = tuple(b for b in (2, 3, 4, 6, 8) if b <= bits)
    return Setting(
        num_layers=L, num_experts=E, experts_per_token=K, bits=bits, level_bits=levels,
        level_bytes=tuple(b * 4096 for b in levels), slots_bytes=L * E * bits * 4096,
        sections={} if found is None else {"bit-routers": found.to_bytes()}, **changes,
    )  # fmt: skip


def test_the_largest_logit_chooses_up_to_bits():
    rng = np.random.default_rng(0)
    for bits, allowed in ((8, (2, 3, 4)), (3, (2, 3, 3))):
        d = D2moe(setting(routers(), bits=bits))
        assert d.bit_routers is not None
        for T in (1, 5):
            logits = rng.standard_normal((T, K, 3)).astype(np.float32)
            experts = np.array([rng.permutation(E)[:K] for _ in range(T)], np.int32)
            r = Routing(0, experts, np.full((T, K), 0.5, np.float32), bit_logits=logits)
            expected = [[allowed[int(np.argmax(slot))] for slot in token] for token in logits]
            assert d.slot_precisions(r).tolist() == expected
            plan = d.plan(r, np.zeros((L, E), np.int8))
            runs = np.repeat(plan.bits, np.diff(plan.offsets))
            assert runs[plan.rows].tolist() == expected


def test_the_papers_example_of_demand_with_trained_bits():
    """Three requests for an expert, one at 2 bits and two at 3: its base plane is used 3 times, the next one twice."""
    d = D2moe(setting(routers(levels=(2, 3, 4))))
    one = np.eye(3, dtype=np.float32)
    experts = np.array([[2, 5], [2, 5], [2, 6], [6, 7]], np.int32)
    chosen = [[0, 2], [1, 0], [1, 0], [0, 0]]
    r = Routing(
        0, experts, np.full((4, 2), 0.5, np.float32), bit_logits=one[np.array(chosen)]
    )  # fmt: skip
    plan = d.plan(r, np.zeros((L, E), np.int8))
    # Demand for planes: expert 2 has 3 and 2; expert 5 has 2 at 2 bits and 1 up to 4; expert 6 has 2; expert 7 has 1.
    assert list(zip(plan.experts.tolist(), plan.bits.tolist(), strict=True)) == [
        (2, 2), (2, 3), (5, 2), (6, 2), (5, 4), (7, 2),
    ]  # fmt: skip


def test_options_that_do_not_go_together():
    with pytest.raises(ValueError, match="router: the file has no trained ones"):
        D2moe(setting(), router="trained")
    for name in ("levels", "low", "high"):
        with pytest.raises(ValueError, match=f"{name}: of the rule"):
            D2moe(setting(routers()), **{name: "0.2" if name != "levels" else "2"})
    D2moe(setting(routers()), router="rule", low=0.2)
    with pytest.raises(ValueError, match="cache_prior: trained bit routers know only"):
        SCHEDULERS["d2moe"](setting(routers()), cache_prior=0.5)
    made = SCHEDULERS["d2moe"](setting(routers()), eviction="lru")
    assert made.bit_routers is not None


def test_a_replay_says_that_the_rule_decides():
    d = D2moe(setting(routers(), has_inputs=False))
    assert d.bit_routers is None
    assert d.notes[-1].startswith("a trace has no inputs for the trained routers")


# --- in the engine


@pytest.mark.parametrize("isa", _core.usable_isas().split())
def test_slot_scores_are_each_experts_own_linear_layer(isa):
    rng = np.random.default_rng(0)
    T, cols, experts, n = 19, 70, 5, 3
    x = rng.standard_normal((T, cols)).astype(np.float32)
    weight = rng.standard_normal((experts, n, cols)).astype(np.float32)
    gate_weight, bias = rng.standard_normal((2, experts, n)).astype(np.float32)
    layers = (weight, gate_weight, bias)
    gates = rng.random((T, 2)).astype(np.float32)
    chosen = np.array([rng.permutation(experts)[:2] for _ in range(T)], np.int32)
    shape = OpsShape(
        threads=2, max_tokens=T, max_cols=cols, max_hidden=16, max_context=1, head_dim=2, num_heads=1
    )  # fmt: skip
    before = _core.isa()
    try:
        _core.use_isa(isa)
        ops, out, one = (
            CpuOps(shape),
            np.empty((T, 2, n), np.float32),
            np.empty((1, 2, n), np.float32),
        )
        ops.slot_scores(x, layers, chosen, gates, out)
        expected = np.einsum("tkbd,td->tkb", weight[chosen].astype(np.float64), x) + bias[chosen]
        expected += gates[:, :, None] * gate_weight[chosen]
        np.testing.assert_allclose(out, expected, atol=1e-4)
        for t in range(T):  # a token's bits do not depend on its chunk
            ops.slot_scores(x[t : t + 1], layers, chosen[t : t + 1], gates[t : t + 1], one)
            np.testing.assert_array_equal(one[0], out[t])
        with pytest.raises(ValueError, match="there is no such expert"):
            ops.slot_scores(x, layers, chosen + 5, gates, out)
    finally:
        _core.use_isa(before)


class Bits(Observer):
    """An observer that records the bits and logits of every slot, token by token."""

    def __init__(self) -> None:
        self.seen: dict[int, list[np.ndarray]] = {}
        self.logits: dict[int, list[np.ndarray]] = {}

    def planned(self, routing, plan, residency) -> None:
        bits = slot_bits(plan)
        self.seen.setdefault(routing.layer, []).extend(bits)
        self.logits.setdefault(routing.layer, []).extend(routing.bit_logits.copy())


@pytest.mark.parametrize("levels", [(2, 3, 4), (0, 2, 4)], ids=str)
def test_a_prompt_and_its_tokens_one_by_one_take_the_same_bits(copy, levels):
    add_sections(copy, {"bit-routers": routers(scale=0.3, levels=levels).to_bytes()})
    ids = families.random_ids(24)
    found, logits = [], []
    for step in (24, 1):
        seen = Bits()
        with edgemoe.load(copy, scheduler="d2moe", ram="1GiB", observer=seen) as engine:
            engine.logits(ids[:step])
            for i in range(step, 24):
                engine.extend([ids[i]])
            logits.append(engine.stats.logits_hash)
        found.append(seen)
    for layer in range(L):
        many, single = (np.array(seen.seen[layer]) for seen in found)
        np.testing.assert_array_equal(many, single)
        said = np.array(found[0].logits[layer])
        if levels[0] == 0:
            said[:, 0, 0] = -np.inf  # 0 bits are never for a token's best expert
        np.testing.assert_array_equal(many, np.array(levels)[said.argmax(-1)])
        assert len(set(many.ravel().tolist())) == 3
    assert logits[0] == logits[1]


def test_a_trace_is_recorded_and_replayed_by_the_rule(copy, tmp_path, capsys):
    add_sections(copy, {"bit-routers": routers(scale=0.3).to_bytes()})
    trace = str(tmp_path / "x.trace")
    arguments = ["trace", str(copy), "-o", trace, "-n", "12", "--scheduler", "d2moe", "-t", "1"]
    assert main(["profile", *arguments]) == 0
    assert "as trained routers say" in capsys.readouterr().err
    replay = ["replay", trace, "--model", str(copy), "--schedulers", "d2moe", "--budgets", "50%"]
    assert main(["profile", *replay]) == 0
    line = "# a trace has no inputs for the trained routers: d2moe's rule decides"
    assert capsys.readouterr().err.splitlines().count(line) == 1
