"""Files that hold only as many bits of each expert as an allocation says."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
from decoded import Decoded
from engines import GREEDY, begin, with_slots
from safetensors.numpy import load_file
from tiny import tiny_checkpoint

import edgemoe
from edgemoe import _core
from edgemoe import scheduler as schedulers
from edgemoe.cli.main import main
from edgemoe.convert.convert import convert
from edgemoe.convert.source import SourceModel
from edgemoe.errors import FormatError, size_text
from edgemoe.file.format import ALIGNMENT, PREAMBLE, pack_preamble
from edgemoe.file.reader import open_moe
from edgemoe.file.verify import verify
from edgemoe.lab.bits.allocate import Settings, allocate
from edgemoe.lab.bits.calibrate import calibrate
from edgemoe.lab.report.levels import levels
from edgemoe.lab.routing.replay import Tape, replay, setting
from edgemoe.quant import SCHEMES, Allocation, Calibration, quantize
from edgemoe.runtime.forecast import Forecast
from edgemoe.runtime.trace import read
from edgemoe.scheduler import OnDemand
from edgemoe.store import ExpertStore, all_expert_bytes, expert_bytes

BITS = np.array([[2, 3, 4, 6, 2, 2, 3, 4], [4, 2, 6, 2, 3, 2, 2, 6]], np.int8)
RUNGS = {2: 1, 3: 2, 4: 3, 6: 4}
IDS = np.random.default_rng(7).integers(0, 264, 70).astype(np.int32)
SCHEDULERS = ("on-demand", "auto", "expertwise", "expertflow")


def quantize_whole(w, ladder, *, favour, **more):
    return quantize(w, **more)[: len(ladder)]


WHOLE = dataclasses.replace(SCHEMES["nested"], quantize=quantize_whole)


def allocation(bits=BITS) -> Allocation:
    return Allocation(method="random", layers=(0, 1), bits=np.array(bits, np.int8))


@pytest.fixture(scope="module")
def alloc(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("alloc") / "bits.json"
    path.write_bytes(allocation().to_json())
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A file with the same codes as the whole one, so that the two can be compared bit by bit."""
    path = tmp_path_factory.mktemp("small") / "small.moe"
    convert(tiny_checkpoint(), path, scheme=WHOLE, allocation=allocation())
    return path


@pytest.fixture(scope="module")
def expected(tiny_moe, alloc):
    """The logits and the reply of the whole file at the same bits."""
    with edgemoe.load(tiny_moe, bits="auto", allocation=alloc) as engine:
        return engine.logits(IDS), list(engine.generate(list(IDS[:20]), GREEDY))


def test_it_holds_those_bits_and_no_more(small, tiny_moe):
    moe, whole = open_moe(small), open_moe(tiny_moe)
    assert (moe.expert_bits == BITS).all()
    assert [rung[0] for rung in moe.ladder] == [2, 3, 4, 6]  # no expert has 8
    assert moe.dense_ladder == whole.dense_ladder
    missing = sum(
        -(-whole.experts.ends[-1] // ALIGNMENT) - -(-whole.experts.ends[RUNGS[b] - 1] // ALIGNMENT)
        for b in BITS.reshape(-1).tolist()
    )
    # Apart from padding and from the index, which is a little shorter too.
    saved = tiny_moe.stat().st_size - small.stat().st_size
    assert abs(saved - missing * ALIGNMENT) < 2 * ALIGNMENT
    assert verify(moe) == []
    experts = int((-(-moe.experts.sizes(4) // ALIGNMENT)).mean() * ALIGNMENT) * 16
    dense = sum(sum(t.lengths) for t in moe.tensors.values())  # whole at the top level
    assert Forecast(small).file_bytes(6) == experts + dense


def test_its_weights_are_those_of_the_whole_file(small, tiny_moe):
    """The weights of one file are read with numpy, those of the other with the core."""
    moe = open_moe(tiny_moe)
    cache = ExpertStore.open(moe, bits=8, budget_bytes=1 << 22, verify=True).cache
    decoded = Decoded(small)
    for row, bits in enumerate(BITS.reshape(-1).tolist()):
        for mine, theirs in zip(
            decoded.expert(row // 8, row % 8), cache.decode(row, RUNGS[bits]), strict=True
        ):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("num_experts", [1, 2.5, 4.3, 16])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_it_runs_as_the_whole_file_would(small, expected, monkeypatch, num_experts, scheduler):
    moe = open_moe(small)
    slots = int(num_experts * expert_bytes(moe, 4))
    with_slots(monkeypatch, slots)
    with edgemoe.load(small, scheduler=scheduler) as engine:
        assert np.array_equal(engine.logits(IDS), expected[0])
        assert list(engine.generate(list(IDS[:20]), GREEDY)) == expected[1]
        assert engine.notes == ()
        engine.model.store.cache.check_integrity()
        stats = engine.model.store.stats
        assert stats["peak_bytes"] <= slots
        assert 2 < engine.stats.average_bits < 6
        assert (engine.expert_bits == BITS).all()


@pytest.mark.parametrize("scheduler", sorted(schedulers.SCHEDULERS))
@pytest.mark.parametrize("options", [{}, {"miss_bits": 2}, {"cache_prior": 0.5}], ids=str)
def test_every_scheduler_runs_on_it(small, expected, monkeypatch, scheduler, options):
    with_slots(monkeypatch, int(3.3 * expert_bytes(open_moe(small), 4)))
    if scheduler == "auto":
        options = {}  # it sets the options itself
    with edgemoe.load(small, scheduler=scheduler, options=options) as engine:
        engine.logits(IDS)
        assert len(list(engine.generate(list(IDS[:20]), GREEDY))) > 0
        engine.model.store.cache.check_integrity()
        assert 0 < engine.stats.average_bits <= 6
    # An expert that is whole in memory is never taken for one whose upper bits are missing.
    with_slots(monkeypatch, 1 << 22)
    if scheduler in ("on-demand", "hobbit"):
        with edgemoe.load(small, scheduler=scheduler, options=options) as engine:
            engine.logits(IDS)
            warm = engine.logits(IDS)
            assert engine.stats.misses == 0
            assert np.array_equal(warm, expected[0])


def test_everything_fits_in_what_it_holds(small, expected):
    moe = open_moe(small)
    with edgemoe.load(small) as engine:
        assert engine.budget.experts == all_expert_bytes(moe, 4) < 16 * expert_bytes(moe, 4)
        assert engine.model.setting.fits
        assert np.array_equal(engine.logits(IDS), expected[0])
        stats = engine.model.store.stats
        assert stats["evictions"] == 0
        assert stats["resident_bytes"] <= all_expert_bytes(moe, 4)
        used = np.flatnonzero(engine.model.store.residency.reshape(-1))
        assert (engine.model.store.residency.reshape(-1)[used] == 4).all()  # each is whole
        assert stats["bytes_read"] == sum(
            -(-moe.experts.sizes(4)[e] // 4096) * 4096 for e in used.tolist()
        )


def test_the_average_is_that_of_the_experts_that_ran(small, tmp_path):
    path = tmp_path / "x.trace"
    with edgemoe.load(small, trace=path) as engine:
        engine.logits(IDS)
        used = engine.stats.average_bits
    rows = read(path).rows
    own = BITS[rows["layer"].astype(int)[:, None], rows["experts"]]
    assert (rows["bits"] == own).all()
    ran = {(int(r["layer"]), int(e)) for r in rows for e in r["experts"]}  # one chunk: once each
    assert used == pytest.approx(np.mean([BITS[at] for at in ran]))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fewer_bits_are_at_most_so_many(small, tiny_moe, tmp_path, bits):
    path = tmp_path / "less.json"
    path.write_bytes(allocation(np.minimum(BITS, bits)).to_json())
    with edgemoe.load(tiny_moe, bits="auto", allocation=path) as engine:
        expected = engine.logits(IDS)
    with edgemoe.load(small, bits=bits) as engine:
        assert np.array_equal(engine.logits(IDS), expected)
        mean = np.minimum(BITS, bits).mean()
        mine = f"{mean:.2f}" if bits > 2 else "2"
        assert engine.notes == (f"lossy: experts at {mine} of the file's {BITS.mean():.2f} bits",)
    with pytest.raises(ValueError, match="expected one of 2, 3, 4, 6 .what the file holds., got 8"):
        edgemoe.load(small, bits=8)


def test_auto_is_what_it_has_unless_it_is_told_fewer(small, expected, alloc, tmp_path):
    for more in ({}, {"allocation": alloc}):
        with edgemoe.load(small, bits="auto", **more) as engine:
            assert engine.notes == ()
            assert np.array_equal(engine.logits(IDS), expected[0])
    fewer, path = BITS.copy(), tmp_path / "bits.json"
    fewer[0, 3] = 2
    path.write_bytes(allocation(fewer).to_json())
    with edgemoe.load(small, bits="auto", allocation=path) as engine:
        assert engine.notes == (f"lossy: experts at {fewer.mean():.2f} bits on average, 2 to 6",)
        assert not np.array_equal(engine.logits(IDS), expected[0])
    fewer[1, 1] = 4
    path.write_bytes(allocation(fewer).to_json())
    with pytest.raises(FormatError, match="asks for 4 bits of expert 1 of layer 1; the file has 2"):
        edgemoe.load(small, bits="auto", allocation=path)


# ---------------------------------------------------------------- the cache


class Model:
    """A model of a cache whose experts differ in size: what it must hold after requests for one expert each."""

    def __init__(self, sizes, rungs, top, budget):
        self.sizes, self.rungs, self.top, self.budget = sizes, rungs, top, budget
        self.level, self.used_at, self.now = {}, {}, 0
        self.hits = 0

    def level_of(self, expert, level):
        return self.top if level >= self.rungs[expert] else level

    def pages(self):
        return sum(self.sizes[min(lv, self.rungs[e])] for e, lv in self.level.items())

    def request(self, expert, level):
        self.now += 1
        self.used_at[expert] = self.now
        level = self.level_of(expert, level)
        if self.level.get(expert, 0) >= level:
            self.hits += 1
            return
        self.level.pop(expert, 0)
        need = self.sizes[min(level, self.rungs[expert])]
        while self.pages() + need > self.budget:
            del self.level[min(self.level, key=self.used_at.__getitem__)]
        self.level[expert] = level


@pytest.mark.parametrize("budget", [9, 16, 31, 60])
@pytest.mark.parametrize("top", [2, 3, 4])
def test_single_requests_equal_the_model(small, budget, top):
    moe = open_moe(small)
    bits = moe.ladder[top - 1][0]
    store = ExpertStore.open(moe, bits=bits, budget_bytes=budget * 4096, verify=True, policy="lru")
    cache = store.cache
    sizes = [cache.slot_bytes(i) // 4096 for i in range(top + 1)]
    model = Model(sizes, moe.experts.rungs.tolist(), top, budget)
    rng = np.random.default_rng(budget * 10 + top)
    for _ in range(800):
        expert, level = int(min(rng.geometric(0.15) - 1, 15)), int(rng.integers(1, top + 1))
        if rng.random() < 0.1:
            level = int(rng.integers(0, top + 1))
            assert cache.shrink(expert, level)
            level = model.level_of(expert, level) if level else 0
            if level < model.level.get(expert, 0):
                model.level[expert] = level
                if not level:
                    del model.level[expert]
        else:
            begin(cache, [expert], [level])
            assert cache.next() == [0]
            assert cache.next() == []
            model.request(expert, level)
        cache.check_integrity()
        assert model.level == {e: lv for e, lv in enumerate(cache.residency) if lv}
    assert cache.stats["hits"] == model.hits > 50
    assert cache.stats["peak_bytes"] <= budget * 4096


def test_an_expert_may_be_asked_for_at_levels_that_are_one_to_it(small):
    """A prompt's tokens may want one expert at several precisions, while the file has only the lowest of them."""
    moe = open_moe(small)
    for budget in (expert_bytes(moe, 4), 1 << 22):
        cache = ExpertStore.open(moe, bits=6, budget_bytes=budget, verify=True).cache
        for _ in range(2):
            begin(cache, [0, 0, 0, 1, 1], [1, 2, 4, 1, 4], [4, 8], [2, 4])
            given = []
            while group := cache.next():
                given += group
                cache.check_integrity()
            assert sorted(given) == [0, 1, 2, 3, 4]
        assert cache.stats["bits"] == 2 * (2 + 2 + 2 + 2 + 3)


@pytest.mark.parametrize("num_experts", [2.5, 4.3, 16])
def test_a_real_run_has_exactly_the_hits_of_its_replay(small, tmp_path, monkeypatch, num_experts):
    moe = open_moe(small)
    slots = int(num_experts * expert_bytes(moe, 4))
    with_slots(monkeypatch, slots)
    path = tmp_path / "x.trace"
    with edgemoe.load(small, trace=path, options={"look_ahead": False}) as engine:
        for i, token in enumerate(IDS.tolist()):
            (engine.extend if i else engine.logits)([token])
        real, slots = engine.model.store.stats, engine.budget.slots
    trace = read(path)
    tape = Tape(trace)
    got = replay(tape, OnDemand(setting(tape.header, slots), look_ahead=False), budget_bytes=slots)
    assert (got.hits, got.misses, got.evictions, got.bytes_read, got.bits) == (
        real["hits"], real["misses"], real["evictions"], real["bytes_read"], real["bits"],
    )  # fmt: skip
    assert (got.evictions > 0) == (num_experts < 16)
    top = len(trace.header.level_bits)
    assert set(np.unique(trace.rows["resident"])) <= {0, top}
    assert tape.header.mean_bytes[-1] == all_expert_bytes(moe, 4) // 16


# ---------------------------------------------------------------- the file


def rewritten(path: Path, to: Path, change) -> Path:
    """Copies a file, and changes its table of experts."""
    data = bytearray(path.read_bytes())
    *_, offset, length, _ = PREAMBLE.unpack(data[: PREAMBLE.size])
    index = json.loads(data[offset : offset + length])
    at, size, _ = index["sections"]["experts"]
    table = np.frombuffer(data, np.uint32, size // 4, at).reshape(16, -1).copy()
    change(table)
    data[at : at + size] = table.tobytes()
    index["sections"]["experts"][2] = _core.crc32c(table.tobytes())
    new = json.dumps(index).encode()
    data[offset:] = new
    data[: PREAMBLE.size] = pack_preamble(len(data), offset, new)
    to.write_bytes(data)
    return to


def lower_end(table):
    table[1, 4] -= 64


def gap(table):  # rung 1 is missing, rung 2 is not
    table[3, 4] = table[3, 2]


def no_rung(table):
    table[1, 2::2] = 0


def sum_of_nothing(table):
    table[0, 5] = 1


def more_than_there_is(table):  # the next record begins before this one would end
    table[0, 4::2] = table[3, 4::2]


@pytest.mark.parametrize("change", [lower_end, gap, no_rung, sum_of_nothing, more_than_there_is])
def test_a_wrong_number_of_rungs_is_refused(small, tmp_path, change):
    path = rewritten(small, tmp_path / "bad.moe", change)
    with pytest.raises(FormatError, match="expert record"):
        open_moe(path)
    assert open_moe(rewritten(small, path, lambda table: None)).experts.rungs.tolist() == [
        RUNGS[b] for b in BITS.reshape(-1).tolist()
    ]


def test_an_interrupted_conversion_goes_on_and_another_allocation_starts_over(small, tmp_path):
    path = tmp_path / "x.moe"

    def stop(written, total):
        if written > 0.7 * total:
            raise KeyboardInterrupt

    for bits, kept in ((BITS, True), (np.full((2, 8), 2), False)):
        with pytest.raises(KeyboardInterrupt):
            convert(
                tiny_checkpoint(), path, scheme=WHOLE, allocation=allocation(bits), progress=stop
            )
        seen = []
        convert(
            tiny_checkpoint(), path, scheme=WHOLE, allocation=allocation(),
            progress=lambda written, total, seen=seen: seen.append(written / total),
        )  # fmt: skip
        assert (seen[0] > 0.6) == kept
        assert path.read_bytes() == small.read_bytes()


def test_an_allocation_of_another_model_or_of_more_bits_is_refused(tmp_path):
    for bits, stored, message in (
        (BITS[:, :4], 8, "is for 2 layers of 4 experts; the model has 2 of 8"),
        (BITS, 4, "asks for 6 bits; the file has 2, 3, 4"),
    ):
        with pytest.raises(FormatError, match=message):
            convert(tiny_checkpoint(), tmp_path / "x.moe", bits=stored, allocation=allocation(bits))
    assert list(tmp_path.iterdir()) == []


def errors(path: Path, level: int) -> np.ndarray:
    """Returns the squared error of each expert's weights at a level, [16]."""
    moe, source = open_moe(path), SourceModel(tiny_checkpoint())
    bits = moe.ladder[level - 1][0]
    cache = ExpertStore.open(moe, bits=bits, budget_bytes=1 << 22, verify=True).cache
    return np.array(
        [
            sum(
                np.square(mine - w).sum()
                for mine, w in zip(
                    cache.decode(i, level), source.expert(i // 8, i % 8), strict=True
                )
            )
            for i in range(16)
        ]
    )


def test_what_is_not_stored_does_not_count(tiny_moe, tmp_path):
    path = tmp_path / "x.moe"
    convert(tiny_checkpoint(), path, allocation=allocation())
    own = np.array([errors(path, 4), *(errors(tiny_moe, level) for level in range(1, 5))])
    rungs = np.array([RUNGS[b] for b in BITS.reshape(-1).tolist()])
    whole = own[rungs, range(16)]
    assert (own[0] < whole).all()
    assert (own[0][rungs == 1] < 0.97 * whole[rungs == 1]).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_favoured_level_is_better_and_the_others_are_still_levels(tiny_moe, tmp_path, bits):
    path = tmp_path / "x.moe"
    convert(tiny_checkpoint(), path, favour=bits)
    before = np.array([errors(tiny_moe, level).sum() for level in range(1, 6)])
    after = np.array([errors(path, level).sum() for level in range(1, 6)])
    at = [2, 3, 4, 6, 8].index(bits)
    assert after[at] < before[at]
    assert (np.diff(after) < 0).all()
    assert open_moe(path).source["favour"] == bits


# ---------------------------------------------------------------- the lab


@pytest.fixture(scope="module")
def calib(tiny_moe, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("calib") / "tiny.calib"
    calibrate(tiny_moe, "the quick brown fox. " * 60, path, window=64)
    return path


def test_allocate_gives_no_expert_what_the_file_lacks(small, calib):
    known = Calibration(calib)
    found = allocate(small, "error", Settings(average_bits=2.6), calibration=known)
    assert (found.bits <= BITS).all()
    assert 2.3 < found.average <= 2.6
    most = allocate(small, "error", Settings(average_bits=8), calibration=known)
    assert (most.bits <= BITS).all()
    message = "random: wants 3 bits of expert . of layer ., of which the file has 2; allocate on"
    with pytest.raises(ValueError, match=message):
        allocate(small, "random", Settings(average_bits=2.5))


def test_calibrating_it_finds_no_error_where_nothing_is_lost(small, tmp_path):
    out = tmp_path / "small.calib"
    calibrate(small, "the quick brown fox. " * 60, out, window=64)
    sums = load_file(out)
    for layer in (0, 1):
        error = sums[f"experts.{layer}.error2"]
        seen = sums[f"experts.{layer}.count"] > 0
        lower = np.array([2, 3, 4, 6]) < BITS[layer][:, None]
        assert (error[lower & seen[:, None]] > 0).all()
        assert not error[~lower].any()


def test_levels_count_what_is_there(small):
    moe = open_moe(small)
    found = levels(moe)
    assert [level.bits for level in found] == [2, 3, 4, 6]
    assert [level.dense_bits for level in found] == [2, 3, 4, 8]  # whole, where experts are
    for i, level in enumerate(found, start=1):
        ends = [moe.experts.ends[min(i, RUNGS[b]) - 1] for b in BITS.reshape(-1).tolist()]
        assert level.expert_bytes == sum(ends)
        assert level.average_bits == np.minimum(BITS, level.bits).mean()


def test_commands(small, alloc, tmp_path, capsys):
    import families

    assert main(["inspect", str(small), "--verify"]) == 0
    out = capsys.readouterr().out
    assert "experts of 3.312 bits on average: 7 of 2, 3 of 3, 3 of 4, 3 of 6" in out
    assert "verified: every checksum matches" in out
    size = int(open_moe(small).experts.sizes(4).sum())
    assert f"nested | {size_text(size)} |" in out

    assert main(["quality", str(small), "--chunk", "32", "--chunks", "2", "--bits", "auto", "6", "2"]) == 0  # fmt: skip
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| on-demand")]
    assert len(rows) == 3
    assert rows[0].split("|")[3:6] == rows[2].split("|")[3:6]  # auto means all bits in the file
    assert "| 100.00% |" in rows[2]

    checkpoint, path = families.make("olmoe", tmp_path / "olmoe"), tmp_path / "x.moe"
    assert main(["convert", str(checkpoint), str(path), "--allocation", str(alloc)]) == 0
    moe = open_moe(path)
    assert (moe.expert_bits == BITS).all()
    assert moe.source["allocation"] == {"method": "random"}
    capsys.readouterr()
    alloc = tmp_path / "other.json"
    alloc.write_bytes(allocation(BITS[:, :4]).to_json())
    ask = ["convert", str(checkpoint), str(path), "--allocation", str(alloc), "--overwrite"]
    assert main(ask) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[-1].endswith("is for 2 layers of 4 experts; the model has 2 of 8")
    assert (open_moe(path).expert_bits == BITS).all()


@pytest.mark.parametrize(
    ("flags", "line", "used"),
    [
        ((), "# the file's experts: 3.31 bits on average, 2 to 6\n", None),
        (("--bits", "2"), "# lossy: experts at 2 of the file's 3.31 bits\n", ", 2 bits,"),
    ],
)
def test_a_run_says_how_many_bits_there_are(small, capsys, monkeypatch, flags, line, used):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert main(["run", str(small), "-p", "hi", "-n", "2", "-c", "64", *flags]) == 0
    err = capsys.readouterr().err
    assert line in err
    assert ("on average" in err) == (not flags)
    assert used is None or used in err


# ---------------------------------------------------------------- more bits of w_down


@pytest.mark.parametrize("some", [None, allocation()])
def test_w_down_may_have_more_bits(tmp_path, some):
    path, down = tmp_path / "x.moe", (3, 4, 6, 7, 8)
    convert(tiny_checkpoint(), path, down_bits=down, allocation=some)
    moe, decoded = open_moe(path), Decoded(path)
    levels = 5 if some is None else 4
    assert moe.ladder == tuple(zip((2, 3, 4, 6, 8), (2, 3, 4, 6, 8), down, strict=True))[:levels]
    cache = ExpertStore.open(
        moe, bits=moe.ladder[-1][0], budget_bytes=1 << 22, verify=True
    ).cache  # fmt: skip
    for row in range(16):
        for mine, theirs in zip(
            decoded.expert(row // 8, row % 8), cache.decode(row, levels), strict=True
        ):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-7)
    expected, _ = reference.logits(decoded.config, decoded.tensors, decoded.expert, IDS[:24])
    with edgemoe.load(path) as engine:
        got = engine.logits(IDS[:24])
    cosine = (
        (got * expected).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(expected, axis=1)
    )
    assert np.median(cosine) > 0.999


def test_mwq_may_hold_what_an_allocation_gives(tmp_path):
    whole, path = tmp_path / "whole.moe", tmp_path / "x.moe"
    some, mwq = tmp_path / "bits.json", SCHEMES["mwq"]
    some.write_bytes(allocation(np.minimum(BITS, 4)).to_json())
    convert(tiny_checkpoint(), whole, scheme=mwq)
    convert(tiny_checkpoint(), path, scheme=mwq, allocation=allocation(np.minimum(BITS, 4)))
    with edgemoe.load(whole, bits="auto", allocation=some) as engine:
        expected = engine.logits(IDS)
    with edgemoe.load(path) as engine:
        assert np.array_equal(engine.logits(IDS), expected)
    with pytest.raises(ValueError, match="favour: not for the scheme mwq"):
        convert(tiny_checkpoint(), tmp_path / "y.moe", scheme=mwq, favour=2)


@pytest.mark.parametrize("down", [(3, 4, 6, 8), (3, 4, 6, 8, 9), (2, 2, 3, 4, 6), (0, 1, 2, 3, 4)])
def test_bits_of_w_down_climb(tmp_path, down):
    with pytest.raises(ValueError, match="down bits: expected 5 that climb to at most 8"):
        convert(tiny_checkpoint(), tmp_path / "x.moe", down_bits=down)
    assert list(tmp_path.iterdir()) == []


def test_dense_bits_may_be_what_no_level_of_the_experts_has(small, capsys):
    argv = ["quality", str(small), "--chunk", "32", "--chunks", "2", "--bits", "2", "--dense-bits"]
    sizes = []
    for bits in ("2", "6", "8"):
        assert main([*argv, bits]) == 0
        sizes.append(float(capsys.readouterr().out.splitlines()[2].split("|")[4]))
    assert sizes == sorted(set(sizes))
