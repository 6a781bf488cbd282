"""Profiles carry what was learned from run to run; answers stay the same, and experts are in memory sooner."""

from __future__ import annotations

import os
import shutil
import sys

import numpy as np
import pytest
from engines import begin
from safetensors.numpy import load_file, save_file
from tiny import tiny_checkpoint, tiny_paths

import edgemoe
from edgemoe.cli.run import main
from edgemoe.convert.convert import convert
from edgemoe.errors import FormatError
from edgemoe.experts import Observer
from edgemoe.file.reader import open_moe
from edgemoe.plan import Priorities, Routing
from edgemoe.runtime.profile import Profile, identity, read_profile, write_profile
from edgemoe.scheduler import SCHEDULERS, Setting
from edgemoe.scheduler.evict import EVICTIONS
from edgemoe.store import ExpertStore, expert_bytes

L, E, K = 2, 8, 2
SETTING = Setting(
    num_layers=L, num_experts=E, experts_per_token=K, bits=8, level_bits=(2, 8),
    level_bytes=(4096, 8192), slots_bytes=8 * 8192, sections={"paths": tiny_paths(2, 8)},
)  # fmt: skip
IDS = [5, 9, 200, 31, 77, 5, 120, 33] * 3


@pytest.fixture(autouse=True)
def no_stdin(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)


@pytest.fixture
def half(tiny_moe):
    """A function that loads the tiny model with slots for half of its experts."""
    moe = open_moe(tiny_moe)
    room = L * E // 2 * expert_bytes(moe, len(moe.ladder))

    def load(path=tiny_moe, **options):
        return edgemoe.load(path, slots=room, threads=1, context=128, **options)

    return load


@pytest.fixture
def learned(half, tmp_path):
    """The profile of a run of IDS."""
    path = tmp_path / "tiny.profile"
    with half(profile=path) as engine:
        decode(engine, IDS)
    return path


def decode(engine, ids):
    """Returns the logits after each token, and the hits of the first four tokens."""
    first = engine.logits(ids[:1])
    hits = engine.stats.hits
    rows = [first[-1]]
    for i, token in enumerate(ids[1:], 1):
        rows.append(engine.extend([token])[0].copy())
        hits += engine.stats.hits if i < 4 else 0
    return np.array(rows), hits


def routings(seed=0, tokens=6):
    rng = np.random.default_rng(seed)
    for _ in range(tokens):
        for layer in range(L):
            chosen, ahead = (rng.permutation(E)[:K].astype(np.int32)[None] for _ in range(2))
            gates = np.full((1, K), 0.5, np.float32)
            scores = rng.random((1, E), np.float32)
            later = (ahead[None], gates[None]) if layer < L - 1 else (None, None)
            yield Routing(layer, chosen, gates, *later, scores)


def run(scheduler, seed=0):
    plans = []
    for routing in routings(seed):
        plans.append(scheduler.plan(routing, np.zeros((L, E), np.int8)))
        if routing.layer == L - 1:
            scheduler.passed(1, 0.1)
    return plans


def test_warm_experts_are_hits_and_logits_stay(half, learned):
    with half() as engine:
        expected, cold = decode(engine, IDS)
    with half(profile=learned) as engine:
        read = engine.warm()
        store = engine.model.store
        assert read == store.stats["resident_bytes"] == store.stats["budget_bytes"]
        assert (store.residency > 0).sum() == L * E // 2
        assert store.stats["evictions"] == 0
        store.cache.check_integrity()
        resident, uses = store.residency > 0, store.uses
        assert uses[resident].min() >= uses[~resident].max()
        got, warm = decode(engine, IDS)
    np.testing.assert_array_equal(got, expected)
    assert warm > cold


def test_uses_go_on_where_they_were(half, learned, tmp_path):
    """Two runs end with the same uses as a single one, which numpy counts from the router's choices."""
    chosen = []

    class Seen(Observer):
        def planned(self, routing, plan, residency):
            chosen.append((routing.layer, routing.experts[0].tolist()))

    with half(profile=learned, observer=Seen()) as engine:
        decode(engine, IDS)
    expected = np.zeros((L, E))
    for n, (layer, experts) in enumerate(chosen * 2):
        expected[layer, experts] += 2.0 ** (n // L / 64)
    expected /= 2.0 ** (2 * len(IDS) / 64)
    np.testing.assert_allclose(load_file(learned)["uses"], expected, rtol=1e-12)


def test_nothing_is_written_where_nothing_ran(half, tmp_path):
    path = tmp_path / "p"
    with half(profile=path) as engine:
        assert engine.warm() == 0
    assert not path.exists()


def test_a_profile_of_another_scheduler_is_kept(half, learned):
    before = load_file(learned)
    with half(profile=learned, scheduler="expertwise", options={"preload": 2}) as engine:
        decode(engine, IDS[:4])
    after = load_file(learned)
    np.testing.assert_array_equal(after["look_ahead.seen"], before["look_ahead.seen"])
    assert after["transitions.totals"].sum() == 4 * L * K


KINDS = [*((name, {}) for name in SCHEDULERS), *(("on-demand", {"eviction": e}) for e in EVICTIONS)]


@pytest.mark.parametrize(("name", "options"), [*KINDS, ("expertwise", {"preload": 2})])
def test_a_scheduler_goes_on_with_what_it_learned(name, options, tmp_path):
    first = SCHEDULERS[name](SETTING, **options)
    run(first)
    of = {"layers": str(L), "experts": str(E), "experts_per_token": str(K)}
    write_profile(tmp_path / "p", Profile(np.ones((L, E)), first.state()), of)
    profile = read_profile(tmp_path / "p", of)
    second = SCHEDULERS[name](SETTING, **options)
    policy = second.policy
    second.restore(profile.state)
    assert second.policy is policy  # the cache reads its arrays
    assert first.state().keys() == second.state().keys() == profile.state.keys()
    for key, array in first.state().items():
        np.testing.assert_allclose(second.state()[key], array, rtol=1e-12)
    if name in ("expertwise", "expertflow") or options.get("eviction") == "next-use":
        assert profile.state
        fresh = SCHEDULERS[name](SETTING, **options)
        run(second, seed=1)
        run(fresh, seed=1)
        key = next(iter(second.state()))
        assert not np.array_equal(second.state()[key], fresh.state()[key])


@pytest.mark.parametrize("policy", ["lfu", "lru", Priorities.zeros(1, 2)])
def test_uses_are_counted_whatever_is_dropped_first(policy):
    """So the profile of any run tells `--warm` what to load."""
    store = ExpertStore.dry(
        num_layers=1, num_experts=2, level_bits=(8,), level_bytes=(4096,), budget_bytes=4096,
        policy=policy,
    )  # fmt: skip
    store.uses = np.array([[0.0, 2.0]])
    begin(store.cache, [0], [1])
    store.cache.close()
    np.testing.assert_allclose(store.uses * 2 ** (1 / 64), [[1, 2]])


# --- files that are not ours


@pytest.fixture(scope="module")
def other_moe(tmp_path_factory):
    path = tmp_path_factory.mktemp("other") / "other.moe"
    convert(tiny_checkpoint(seed=1), path)
    return path


def test_another_models_profile_is_refused_and_left(half, learned, other_moe):
    content = learned.read_bytes()
    with pytest.raises(FormatError, match="profile of another model: fingerprint is"):
        half(other_moe, profile=learned)
    with pytest.raises(FormatError, match="experts_per_token is 2, this model's is 1"):
        half(profile=learned, experts=1)
    assert learned.read_bytes() == content


def test_a_damaged_profile_is_refused_in_one_line(learned, tiny_moe, capsys):
    whole = learned.read_bytes()
    for at in (0, 40, len(whole) // 2, len(whole) - 1):
        learned.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        assert main([str(tiny_moe), "--profile", str(learned), "-p", "Hi"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"edgemoe-run: {learned}: ")
    learned.write_bytes(whole[: len(whole) // 2])
    of = identity(open_moe(tiny_moe))
    for content in (whole[:-3], b"", b"text"):
        learned.write_bytes(content)
        with pytest.raises(FormatError):
            read_profile(learned, of)
    with pytest.raises(FormatError, match="not a profile"):
        read_profile(learned.parent, of)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"uses": np.zeros((L, E + 1))}, r"expected uses to be \[2, 8\]"),
        ({"uses": np.full((L, E), np.nan)}, "finite"),
        ({"uses": np.full((L, E), -1.0)}, "expected uses to be no less than 0"),
        ({"uses": np.full((L, E), 1e300)}, "expected uses to be no less than 0"),
        ({"mine": np.zeros(1)}, "mine is nothing"),
    ],
)
def test_wrong_contents_are_refused(change, message, tiny_moe, tmp_path):
    of = identity(open_moe(tiny_moe))
    tensors = {"uses": np.ones((L, E)), **change}
    write_profile(tmp_path / "p", Profile(tensors.pop("uses"), tensors), of)
    with pytest.raises(FormatError, match=message):
        read_profile(tmp_path / "p", of)
    save_file({"uses": np.ones((L, E))}, tmp_path / "q", {"edgemoe_profile": "2"})
    header = b'{"uses":{"dtype":"%s","shape":[1],"data_offsets":[0,%d]},"__metadata__":{"edgemoe_profile":"1"}}'
    for odd in ((b"BF16", 2), (b"F8_E4M3", 1)):  # numpy has no such types
        text = header % odd
        (tmp_path / "r").write_bytes(len(text).to_bytes(8, "little") + text + bytes(odd[1]))
        with pytest.raises(FormatError, match="not a profile: "):
            read_profile(tmp_path / "r", of)
    with pytest.raises(FormatError, match="not a profile of version 1"):
        read_profile(tmp_path / "q", of)


def test_what_was_there_stays_when_saving_fails(half, learned, monkeypatch):
    content = learned.read_bytes()

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    engine = half(profile=learned)
    decode(engine, IDS[:2])
    with pytest.raises(OSError, match="No space") as failure:
        engine.close()
    assert failure.value.filename == str(learned)
    engine.close()  # closes all the same
    assert learned.read_bytes() == content
    assert os.listdir(learned.parent) == [learned.name]


# --- the command


def test_the_command_learns_and_warms(tiny_moe, tmp_path, capsys):
    moe = tmp_path / "tiny.moe"
    shutil.copy(tiny_moe, moe)
    path = tmp_path / "p"
    flags = [str(moe), "--profile", str(path), "--warm", "-p", "Hi", "--temp", "0", "-n", "8"]
    flags += ["--stats", "full"]
    assert main(flags) == 0
    first = capsys.readouterr()
    assert first.err.startswith(f"# nothing to warm from yet: {path} is written at the end\n")
    assert main(flags) == 0
    second = capsys.readouterr()
    assert second.out == first.out
    assert second.err.startswith("# warm: ")
    assert "; hit 100.0%" in second.err
    assert "; hit 100.0%" not in first.err


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--warm"], 2, "edgemoe-run: --warm: expected --profile FILE, which says what to load;"),
        (["--profile", "absent/p"], 1, "edgemoe-run: profile: no such folder: absent"),
    ],
)
def test_mistakes_get_one_line(flags, code, message, tiny_moe, capsys):
    try:
        got = main([str(tiny_moe), "-p", "Hi", *flags])
    except SystemExit as end:
        got = end.code
    assert got == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)
