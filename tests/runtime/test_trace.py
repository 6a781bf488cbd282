"""What a trace records, and that it reads back as written."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from engines import with_slots

import edgemoe
from edgemoe.lab.routing.replay import Tape
from edgemoe.model import Batch, SequenceState
from edgemoe.plan import Plan, Routing
from edgemoe.runtime.trace import NO_EXPERT, NO_TOKEN, TraceHeader, read, record
from edgemoe.runtime.trace_writer import TraceWriter
from edgemoe.scheduler.plans import plan_slots

IDS = np.random.default_rng(1).integers(0, 256, 40)


def header(**fields):
    return TraceHeader(
        **{
            "model": "x", "num_experts": 6, "experts_per_token": 2, "num_layers": 2, "bits": 4,
            "level_bits": (2, 4), "level_bytes": (100, 200), "slots_bytes": 1000,
            "scheduler": "on-demand", "threads": 1, **fields,
        }
    )  # fmt: skip


def batch(position, *ids):
    """Returns a batch of tokens that follow `position` others in a sequence without layers."""
    state = SequenceState([], 1 << 20)
    state.commit([0] * position)
    return Batch.of((state, np.array(ids, np.int32)))


def single(layer, experts, bits, rows, ahead=None):
    """Returns one token's routing, and a plan for it."""
    experts = np.array([experts], np.int32)
    routing = Routing(
        layer, experts, np.array([[0.75, 0.25]], np.float32),
        None if ahead is None else np.array(ahead, np.int32)[:, None],
        None if ahead is None else np.full(np.shape(ahead), 0.5, np.float32)[:, None],
    )  # fmt: skip
    n = len(bits)
    plan = Plan(
        layer, np.zeros(n, np.int32), np.array(bits, np.int8), np.arange(n + 1, dtype=np.int32),
        np.zeros(n, np.int32), np.array([rows], np.int32), routing.gates,
    )  # fmt: skip
    return routing, plan


def test_what_a_run_routed_and_found_in_memory_comes_back(tiny_moe, tmp_path):
    path = tmp_path / "x.trace"
    with edgemoe.load(tiny_moe, trace=path, bits=4) as engine:
        engine.logits(IDS[:30])
        engine.extend(IDS[30:31])
        stats, total = engine.stats, engine.model.store.stats
    trace = read(path)
    rows = trace.rows
    assert (trace.header.num_experts, trace.header.experts_per_token) == (8, 2)
    assert (trace.header.num_layers, trace.header.bits) == (2, 4)
    assert trace.header.level_bits == (2, 3, 4)
    assert trace.header.scheduler == "on-demand"
    assert rows["token"].tolist() == [*range(30), *range(30), 30, 30]
    assert rows["id"].tolist() == [*IDS[:30], *IDS[:30], IDS[30], IDS[30]]
    assert rows["layer"].tolist() == [0] * 30 + [1] * 30 + [0, 1]
    assert rows["tokens"].tolist() == [30, *[0] * 29, 30, *[0] * 29, 1, 1]
    assert not rows["resident"][:60].any()
    assert (rows["resident"][60:] == 3).sum() == stats.hits
    assert (rows["bits"] == 4).all()
    np.testing.assert_allclose(rows["gates"].sum(1), 1, atol=2e-3)  # this model renormalises
    assert rows["bytes_read"].sum() == total["bytes_read"] > 0
    assert rows["wait_us"].sum() == pytest.approx(1e6 * total["wait_s"], rel=1e-4, abs=1)
    first = rows["tokens"] > 0
    assert (rows["experts_us"][first] >= rows["wait_us"][first]).all()
    assert (rows["before_us"][first] > 0).all()
    assert not rows["experts_us"][~first].any()
    starts, tokens = trace.passes()
    assert (starts.tolist(), tokens.tolist()) == ([0, 60], [30, 1])
    assert trace.by_token("token").tolist() == [[i, i] for i in range(31)]
    assert trace.by_token("layer", single=True).tolist() == [[0, 1]]


def test_single_tokens_chunks_skips_and_look_ahead_become_records(tmp_path):
    path = tmp_path / "x.trace"
    writer = TraceWriter(path, header(look_ahead=2))
    residency = np.array([[0, 1, 2, 0, 0, 0], [2, 2, 2, 2, 2, 2]], np.int8)
    chunk = Routing(
        0, np.array([[1, 2], [2, 5]], np.int32), np.full((2, 2), 0.5, np.float32)
    )  # expert 2 runs on both tokens, 1 at 2 bits, 5 is skipped
    plan = Plan(
        0, np.array([1, 2], np.int32), np.array([2, 4], np.int8), np.array([0, 1, 3], np.int32),
        np.array([0, 0, 1], np.int32), np.array([[0, 1], [2, -1]], np.int32), chunk.gates,
    )  # fmt: skip
    writer.begin(batch(0, 7, 8))
    writer.planned(chunk, plan, residency)
    writer.done(500, 0.25)
    writer.end()
    writer.begin(batch(2, 9))
    writer.planned(*single(0, [3, 1], [4, 2], [1, 0]), residency)
    residency[0] = 2  # the writer must have copied it
    writer.done(500, 0.25)
    writer.planned(*single(1, [4, 0], [4], [-1, 0], ahead=[[3, 5]]), residency)  # breaks off
    writer.begin(batch(2, 9))
    writer.planned(*single(0, [0, 5], [2, 4], [0, 1]), residency)
    writer.done(700, 0.5)
    writer.close()
    rows = read(path).rows
    assert rows["token"].tolist() == [0, 1, 2, 2, 2]
    assert rows["id"].tolist() == [7, 8, 9, 9, 9]
    assert rows["tokens"].tolist() == [2, 0, 1, 1, 1]
    assert rows["resident"].tolist() == [[1, 2], [2, 0], [0, 1], [2, 2], [2, 2]]
    assert rows["bits"].tolist() == [[2, 4], [4, 0], [2, 4], [0, 4], [2, 4]]
    assert rows["gates"].tolist() == [[0.5, 0.5]] * 2 + [[0.75, 0.25]] * 3
    assert rows["bytes_read"].tolist() == [500, 0, 0, 0, 200]
    assert rows["wait_us"].tolist() == [250_000, 0, 0, 0, 250_000]
    assert rows["ahead_experts"][3].tolist() == [[3, 5], [NO_EXPERT] * 2]
    assert rows["ahead_gates"][3].tolist() == [[0.5, 0.5], [0, 0]]
    assert (np.delete(rows["ahead_experts"], 3, axis=0) == NO_EXPERT).all()


def test_many_tokens_are_written_in_blocks_and_a_cut_end_is_left_out(tmp_path):
    path = tmp_path / "x.trace"
    writer = TraceWriter(path, header())
    residency = np.zeros((2, 6), np.int8)
    for t in range(1500):
        writer.begin(batch(t, t))
        for layer in range(2):
            writer.planned(*single(layer, [t % 6, (t + 1) % 6], [4, 4], [0, 1]), residency)
            writer.done(t, t / 1000)
    assert path.stat().st_size > 10_000  # written meanwhile, not only at the end
    writer.close()
    trace = read(path)
    assert trace.by_token("experts").tolist() == [[[t % 6, (t + 1) % 6]] * 2 for t in range(1500)]
    assert trace.rows["bytes_read"].sum() == 1499
    assert trace.rows["wait_us"].sum() == pytest.approx(1499e3)
    assert not trace.is_cut
    path.write_bytes(path.read_bytes()[:-5])
    assert read(path).is_cut
    assert len(read(path).rows) == 2999
    assert len(read(path).by_token("experts")) == 1499


@pytest.mark.parametrize(
    ("version", "lacks"),
    [(2, ("id", "sequences", "device")), (3, ("sequences", "device")), (4, ("device",))],
)
def test_older_versions_are_read_without_what_they_lack(tiny_moe, tmp_path, version, lacks):
    path = tmp_path / "x.trace"
    with edgemoe.load(tiny_moe, trace=path, bits=4) as engine:
        engine.logits(IDS[:9])
    new = read(path)
    names = [name for name in new.rows.dtype.names if name not in lacks]
    old = np.empty(len(new.rows), [(name, new.rows.dtype[name]) for name in names])
    for name in names:
        old[name] = new.rows[name]
    fields = dataclasses.asdict(new.header) | {"edgemoe_trace": version}
    path.write_bytes(json.dumps(fields).encode() + b"\n" + old.tobytes()[:-3])
    trace = read(path)
    assert len(trace.rows) == len(old) - 1
    assert ((trace.rows["id"] == NO_TOKEN) == ("id" in lacks)).all()
    for name in {*names, "sequences", "device"}:  # there was one sequence, and no device
        np.testing.assert_array_equal(trace.rows[name], new.rows[name][:-1])


def test_decoding_tokens_of_several_sequences_become_records_of_one_pass(tmp_path):
    path = tmp_path / "x.trace"
    writer = TraceWriter(path, header(look_ahead=1))
    states = [SequenceState([], 99), SequenceState([], 99)]
    for state, length in zip(states, (4, 7), strict=True):
        state.commit([0] * length)
    writer.begin(Batch.of(*((state, np.array([i], np.int32)) for i, state in enumerate(states))))
    gates = np.full((2, 2), 0.5, np.float32)
    ahead = np.array([[[3, 5], [1, 0]]], np.int32)
    for layer in range(2):
        routing = Routing(
            layer, np.array([[1, 2], [2, 5]], np.int32), gates, sequences=2,
            ahead_experts=ahead if layer == 0 else None, ahead_gates=gates[None],
        )  # fmt: skip
        plan = plan_slots(routing, np.full((2, 2), 4, np.int8))
        writer.planned(routing, plan, np.zeros((2, 6), np.int8))
        writer.done(layer, 0.0)
    writer.close()
    rows = read(path).rows
    assert rows["token"].tolist() == [4, 7, 4, 7]
    assert rows["id"].tolist() == [0, 1, 0, 1]
    assert rows["tokens"].tolist() == rows["sequences"].tolist() == [2, 0, 2, 0]
    assert rows["ahead_experts"][:, 0].tolist() == [[3, 5], [1, 0], *[[NO_EXPERT] * 2] * 2]
    (layers,) = Tape(read(path)).passes
    assert [r.is_decoding for r in layers] == [True, True]
    assert np.array_equal(layers[0].ahead_experts, ahead)


@pytest.mark.parametrize(
    ("scheduler", "options", "reads_ahead"),
    [
        ("on-demand", {"look_ahead": False}, False), ("on-demand", {}, True), ("d2moe", {}, False),
        ("on-demand", {"look_ahead": False, "miss_bits": 3}, True),
        ("on-demand", {"look_ahead": False, "cache_prior": 0.5}, False),
        ("on-demand", {"look_ahead": False, "cache_prior": 0.5, "admit": True}, True),
        ("expertwise", {}, True), ("expertwise", {"preload": 0}, False),
        ("expertflow", {}, True), ("expertflow", {"prefetch": 0}, False),
        ("hobbit", {}, True), ("hobbit", {"look_ahead": 0}, False),
        ("mc", {}, False), ("mc", {"look_ahead": 1}, True), ("auto", {}, True),
    ],
)  # fmt: skip
def test_a_trace_says_whether_anything_may_be_read_ahead(
    tiny_moe, tmp_path, monkeypatch, scheduler, options, reads_ahead
):
    with_slots(monkeypatch, lambda budget: 8 * budget.expert)
    path = tmp_path / "x.trace"
    with edgemoe.load(tiny_moe, scheduler=scheduler, options=options) as engine:
        engine.record(path, look_ahead=2)  # asking more routers reads nothing
    assert read(path).header.reads_ahead == reads_ahead


def test_what_is_no_trace_is_refused_in_a_line(tiny_moe, tmp_path):
    path = tmp_path / "x.trace"
    line = json.dumps({"edgemoe_trace": 1, "model": "x"})
    for content, what in [
        (b"{}", "not a trace"),
        (b"", "not a trace"),
        (b"[1]\n", "not a trace"),
        (line.encode(), "trace version 1; expected 5"),
        (b'{"edgemoe_trace": 5}\n', "damaged header"),
    ]:
        path.write_bytes(content)
        with pytest.raises(edgemoe.FormatError, match=what):
            read(path)
    path.write_bytes(b"precious")
    with pytest.raises(ValueError, match="left as it is"):
        TraceWriter(path, header())
    assert path.read_bytes() == b"precious"
    writer = TraceWriter(tmp_path / "busy.trace", header())
    with pytest.raises(BlockingIOError, match="another process is recording it"):
        TraceWriter(tmp_path / "busy.trace", header())
    writer.close()
    TraceWriter(tmp_path / "busy.trace", header()).close()
    with pytest.raises(ValueError, match="expected one of them"):
        edgemoe.load(tiny_moe, trace=path, observer=object())
    with (
        edgemoe.load(tiny_moe, trace=tmp_path / "z.trace") as engine,
        pytest.raises(ValueError, match="observed already"),
    ):
        engine.record(tmp_path / "w.trace")


def write(path, rows=None, **fields):
    head = json.dumps(dataclasses.asdict(header()) | fields).encode()
    path.write_bytes(head + b"\n" + (b"" if rows is None else rows.tobytes()))
    return path


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": "x"}, {"num_experts": 10**30}, {"num_experts": 0}, {"num_experts": True},
        {"num_experts": 65535}, {"num_experts": 2.0}, {"num_layers": 2**31}, {"num_layers": -1},
        {"num_layers": 4095, "num_experts": 65534}, {"experts_per_token": 0}, {"experts_per_token": 7},
        {"level_bytes": (0, 0)}, {"level_bytes": (200, 100)}, {"level_bytes": (100, 10**30)},
        {"level_bytes": (100,)}, {"level_bytes": 5}, {"level_bits": (2, 300)}, {"level_bits": (4, 2)},
        {"level_bits": (), "level_bytes": ()}, {"bits": 2}, {"slots_bytes": 10**30},
        {"slots_bytes": -1}, {"threads": 10**9}, {"look_ahead": -1}, {"look_ahead": 10**9},
        {"look_ahead": "2"}, {"rungs": (1, 2)}, {"rungs": (3,) * 12}, {"rungs": None},
        {"model": 3}, {"scheduler": None}, {"reads_ahead": 2}, {"unknown": 1},
    ],
)  # fmt: skip
def test_a_damaged_header_is_refused(tmp_path, fields):
    with pytest.raises(edgemoe.FormatError, match=r"x\.trace: a trace with a damaged header"):
        read(write(tmp_path / "x.trace", **fields))


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[" * 200_000, b"[" * 200_000 + b"\n", b"{}", b"[]\n", b"\xff\n", b'{"edgemoe_trace"\n',
        b'{"a": ' * 900 + b"1" + b"}" * 900 + b"\n",
    ],
)  # fmt: skip
def test_what_is_no_trace_is_refused(tmp_path, content):
    (tmp_path / "x.trace").write_bytes(content)
    with pytest.raises(edgemoe.FormatError, match=r"x\.trace: not a trace of edgemoe"):
        read(tmp_path / "x.trace")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("experts", 6), ("layer", 2), ("resident", 3), ("bits", 3), ("bits", 255), ("gates", np.nan),
        ("ahead_experts", 6), ("bytes_read", 2**63), ("before_us", np.inf), ("wait_us", np.nan),
    ],
)  # fmt: skip
def test_records_outside_the_model_are_refused(tmp_path, name, value):
    rows = np.zeros(3, record(2, 1))
    path = tmp_path / "x.trace"
    assert len(read(write(path, rows, look_ahead=1)).rows) == 3
    rows[name][1] = value
    with pytest.raises(edgemoe.FormatError, match="a trace with records outside its model"):
        read(write(path, rows, look_ahead=1))
