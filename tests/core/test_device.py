"""A device's kernels give the CPU's bits; on a simulated device."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from simulated import configured, plug_in

from edgemoe import _core
from edgemoe.errors import DeviceError, OutOfBudget, RangeError
from edgemoe.quant import mwq, plane_widths, quantize

ROOM = 1 << 26
LADDERS = [(2, 3, 4, 6, 8), (3, 8), (1, 5, 7), (6,)]
TYPES = list(itertools.product(("f16", "f32", "q8_0"), repeat=2))
WEIRD = (np.nan, np.inf, -np.inf, 1e-38, -0.0)


@pytest.fixture(scope="module")
def device():
    return _core.Device(plug_in(), 0, ROOM)


def test_what_fails_while_it_is_opened_leaves_nothing():
    """Whichever of its streams, buffers and events cannot be created."""
    counts = (b"pinned", b"streams")
    with configured(may_make=-1) as simulator:
        before = [simulator.cudasim_configure(name, 0) for name in counts]
        space = _core.Device(plug_in(), 0, ROOM)
        now = [simulator.cudasim_configure(name, 0) for name in counts]
        assert all(a < b for a, b in zip(before, now, strict=True))
        del space
        for count in itertools.count():
            simulator.cudasim_configure(b"may_make", count)
            try:
                _core.Device(plug_in(), 0, ROOM)
            except (DeviceError, OutOfBudget):
                pass
            else:
                break
            assert [simulator.cudasim_configure(name, 0) for name in counts] == before
        assert count > 10  # streams, four buffers with an event each, and a mailbox


@dataclasses.dataclass
class Both:
    """Workspaces of a device and of the CPU; methods run an operation on both, and compare."""

    device: _core.Device
    rows: int = 70
    cols: int = 512
    context: int = 640
    head_dim: int = 80
    heads: int = 8

    def __post_init__(self):
        shape = (self.rows, self.cols, self.cols, self.context, self.head_dim, self.heads)
        self.cpu = _core.Workspace(2, *shape)
        self.ws = _core.DeviceWorkspace(self.device, *shape, self.rows * 4)

    def put(self, array):
        out = _core.DeviceArray(self.device, array.shape)
        out.upload(np.ascontiguousarray(array))
        return out

    def linear(self, x, matrices):
        outs = [np.empty((len(x), m.rows), np.float32) for m in matrices]
        _core.linear(self.cpu, x, matrices, outs)
        there = [_core.DeviceArray(self.device, o.shape) for o in outs]
        moved = [_core.DeviceMatrix(self.device, m) for m in matrices]
        assert [m.bits for m in moved] == [m.bits for m in matrices]
        _core.device_linear(self.ws, self.put(x), moved, there)
        for mine, theirs in zip(there, outs, strict=True):
            same(mine.numpy(), theirs)


@pytest.fixture(scope="module")
def both(device):
    return Both(device)


def same(mine, theirs):
    """Checks that two arrays have the same bits; NaNs may differ in theirs."""
    assert mine.shape == theirs.shape
    nan = np.isnan(theirs)
    assert np.array_equal(np.isnan(mine), nan)
    assert np.array_equal(mine[~nan].view(np.uint32), theirs[~nan].view(np.uint32))


def normal(*shape, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * rng.uniform(0.01, 4, (*shape[:-1], 1))
    return x.astype(np.float32)


def nested(w, ladder, level):
    """Returns a matrix. Its width decides which of its rungs have row scales, so that kernels see every case."""
    row_scales = [(1,), (1, 1), (1, 0, 1)][w.shape[1] % 3]
    rungs, widths = quantize(w, ladder, row_scales=row_scales), plane_widths(ladder)
    return _core.Nested.from_rungs(rungs[:level], *w.shape, widths[:level], row_scales=row_scales)


def mwq_of(w, ladder, level):
    rungs, widths = mwq.quantize(w, ladder=ladder), plane_widths(ladder)
    return _core.Nested.from_rungs(rungs[:level], *w.shape, widths[:level], "mwq")


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
@pytest.mark.parametrize(("rows", "cols"), [(5, 7), (33, 130), (16, 448)])
@pytest.mark.parametrize("T", [1, 4, 5])
def test_products_of_nested_matrices(both, ladder, rows, cols, T):
    w = normal(rows, cols, seed=rows)
    matrices = [nested(w, ladder, level) for level in range(1, len(ladder) + 1)]
    both.linear(normal(T, cols, seed=1), matrices)


@pytest.mark.parametrize("ladder", mwq.LADDERS, ids=str)
@pytest.mark.parametrize("T", [1, 6])
def test_products_of_mwq(both, ladder, T):
    for rows, cols in ((20, 70), (48, 450)):
        w = normal(rows, cols, seed=rows)
        matrices = [mwq_of(w, ladder, level) for level in range(1, len(ladder) + 1)]
        both.linear(normal(T, cols, seed=2), matrices)


def test_long_rows_are_summed_in_segments(device):
    wide = Both(device, rows=4, cols=64 * 66)
    w = normal(17, 64 * 65 + 3)
    wide.linear(normal(2, w.shape[1], seed=1), [nested(w, (4,), 1), nested(w, (2, 3), 2)])


def test_many_products_at_once(both):
    w = normal(16, 64)
    both.linear(normal(3, 64, seed=1), [nested(w[: i + 1], (2,), 1) for i in range(16)] * 2)


def test_activations_that_are_no_numbers_or_tiny(both):
    x = normal(6, 130, seed=3)
    for t, value in enumerate(WEIRD):
        x[t, 40] = value
    x[5, :64] = 1e-31
    x[4] = np.arange(130) % 64 - 31.5  # halfway between two codes where the largest value is 127
    x[4, ::32] = 127
    both.linear(
        x, [nested(normal(20, 130), (2, 3, 4, 6, 8), 3), mwq_of(normal(20, 130), (2, 3, 4), 2)]
    )


@pytest.mark.parametrize("cols", [512, 100, 7])
def test_norms_sums_and_scales(both, cols):
    T = 5
    x, added, weight = normal(T, cols), normal(T, cols, seed=1), normal(cols, seed=2)
    out = np.empty_like(x)
    _core.rms_norm(both.cpu, x, weight, 1e-5, out)
    there, dx, dw = both.put(out), both.put(x), both.put(weight)
    _core.device_add_norm(both.ws, None, 0.0, dx, dw, 1e-5, there)
    same(there.numpy(), out)
    _core.add_norm(both.cpu, added, 0.7, x, weight, 1e-5, out)
    da = both.put(added)
    _core.device_add_norm(both.ws, da, 0.7, dx, dw, 1e-5, there)
    same(there.numpy(), out)
    same(dx.numpy(), x)
    for gate in (None, weight):
        _core.add_rows(both.cpu, added, 0.3, gate, x if gate is not None else None, out)
        _core.device_add_rows(
            both.ws, da, 0.3, *((dw, dx) if gate is not None else (None, None)), there
        )
        same(there.numpy(), out)
    _core.device_add_bias(both.ws, dw, there)
    _core.device_scale(both.ws, 1 / 3, there)
    same(there.numpy(), (out + weight) * np.float32(1 / 3))


def test_router_logits_are_those_that_the_cpu_chooses_by(both):
    T, E, K, D = 3, 21, 4, 100
    x, router = normal(T, D), normal(E, D, seed=1)
    rule = _core.RouteRule(num_experts=E, top_k=K, scoring="sigmoid", renormalise=True)
    bias = normal(E, seed=4)
    results = []
    for on_device in (False, True):
        scores, experts = np.empty((T, E), np.float32), np.empty((T, K), np.int32)
        gates = np.empty((T, K), np.float32)
        if on_device:
            logits = _core.DeviceArray(both.device, (T, E))
            _core.device_matmul(both.ws, both.put(x), both.put(router), logits)
            _core.device_download(both.ws, [logits], [scores])
            _core.choose(both.cpu, None, bias, rule, scores, experts, gates)
        else:
            _core.route(both.cpu, x, router, None, bias, rule, scores, experts, gates)
        results.append((scores, experts, gates))
    for theirs, mine in zip(*results, strict=True):
        assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("T", [1, 300])
def test_ffns(device, T):
    big = Both(device, rows=T, cols=100)
    h, d = 40, 100
    host = [
        nested(normal(*s, seed=i), (2, 3, 4), 3) for i, s in enumerate([(h, d), (h, d), (d, h)])
    ]
    x, out = normal(T, d, seed=9), np.empty((T, d), np.float32)
    _core.ffn(big.cpu, x, *host, out)
    there = big.put(out)
    _core.device_ffn(big.ws, big.put(x), *(_core.DeviceMatrix(device, m) for m in host), there)
    same(there.numpy(), out)


@pytest.mark.parametrize("seed", range(1, 4))
def test_no_order_of_threads_blocks_and_copies_matters(both, seed):
    with configured(seed=seed):
        both.linear(normal(5, 130, seed=seed), [nested(normal(33, 130), (2, 3, 4), 3)])
        run_attention(both, ("q8_0", "f16"), (5, 1), rope_dim=16)
        test_norms_sums_and_scales(both, 100)


def test_parts_are_added_in_the_order_of_a_plan(both):
    parts, gates = normal(7, 90), normal(3, 2, seed=1)
    rows = np.array([[0, 6], [-1, 3], [2, 2]], np.int32)
    out = np.empty((3, 90), np.float32)
    _core.combine(both.cpu, parts, rows, gates, out)
    there = both.put(out)
    _core.device_combine(both.ws, both.put(parts), rows, gates, there)
    same(there.numpy(), out)


def run_attention(
    both, types, pieces, *, window=0, heads=6, kv_heads=2, head_dim=18, seed=0, gain=1.0, **more
):
    """Runs attention piece by piece, on both. A negative piece skips positions, which stay as in a new cache."""
    rng = np.random.default_rng(seed)
    T, q, kv = sum(map(abs, pieces)), heads * head_dim, kv_heads * head_dim
    rope_dim, is_ring = more.pop("rope_dim", 0), more.pop("is_ring", False)
    extra = dict.fromkeys(("q_bias", "k_bias", "v_bias", "q_norm", "k_norm", "sinks"))
    if more.pop("sinks", False):
        extra["sinks"] = normal(heads, seed=7)
    per_head = more.setdefault("norm_per_head", False)
    if more.pop("biases", False):
        extra |= {n: normal(s, seed=s) for n, s in (("q_bias", q), ("k_bias", kv), ("v_bias", kv))}
    if more.pop("norms", False):
        extra |= {
            "q_norm": normal(head_dim if per_head else q),
            "k_norm": normal(head_dim if per_head else kv),
        }
    given = {
        "index": 3, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim, "window": window,
        "scale": 0.3, "norm_eps": 1e-6, "clip": 0.0, "rope_dim": rope_dim, "norm_after_rope": False,
    } | more  # fmt: skip
    v_norm = more.get("v_norm", False)
    layer = _core.AttentionLayer(**given, **extra)
    given["v_norm"] = both.put(np.ones(head_dim, np.float32)) if v_norm else None
    there = _core.DeviceAttention(
        **given, **{n: a if a is None else both.put(a) for n, a in extra.items()}
    )
    sizes = {
        "key_type": types[0],
        "value_type": types[1],
        "num_heads": kv_heads,
        "capacity": _core.KvLayer.ring(window, max(pieces)) if is_ring else T,
        "head_dim": head_dim,
    }
    host_kv, device_kv = _core.KvLayer(**sizes), _core.DeviceKvLayer(device=both.device, **sizes)
    pos = 0
    for n in pieces:
        if n < 0:
            pos -= n
            continue
        arrays = [rng.standard_normal((n, w)).astype(np.float32) * gain for w in (q, kv, kv)]
        angle = rng.uniform(-3, 3, (n, rope_dim // 2))
        turns = [np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)]
        out = np.empty((n, q), np.float32)
        moved, moved_turns, moved_out = (
            [both.put(a) for a in arrays],
            [both.put(a) for a in turns],
            both.put(out),
        )
        _core.device_attention(both.ws, there, *moved, pos, *moved_turns, device_kv, moved_out)
        mine = np.empty_like(out)
        _core.attention(both.cpu, layer, *arrays, pos, *turns, None, host_kv, out)
        _core.device_download(both.ws, [moved_out], [mine])
        same(mine, out)
        for a, b in zip(moved, arrays, strict=True):
            same(a.numpy(), b)
        pos += n
    assert np.array_equal(device_kv.content, host_kv.content)
    return host_kv, device_kv


@pytest.mark.parametrize("types", TYPES, ids="-".join)
def test_attention_of_every_type(both, types):
    run_attention(both, types, (20, 1, -220, 20, 1, 1), rope_dim=16)


def test_values_below_what_a_half_can_scale_are_clamped(both):
    run_attention(both, ("q8_0", "q8_0"), (40, 1), gain=4e-6)


def test_what_rounds_to_a_negative_zero_is_padded_to_a_positive_one(both):
    x, w = np.full((2, 18), -1e-30, np.float32), np.full((3, 18), 1e-30, np.float32)
    out = np.empty((2, 3), np.float32)
    _core.linear_f32(both.cpu, x, w, out)
    there = both.put(out)
    _core.device_matmul(both.ws, both.put(x), both.put(w), there)
    same(there.numpy(), out)


@pytest.mark.parametrize("types", [("f16", "f16"), ("q8_0", "q8_0")], ids="-".join)
def test_attention_sees_a_window(both, types):
    run_attention(both, types, (80, -170, 50, 1, 9), window=37)
    run_attention(both, types, (20, -230, 7, 1), window=256)


@pytest.mark.parametrize("types", [("f16", "f32"), ("q8_0", "q8_0")], ids="-".join)
def test_rings_are_written_over_and_copied_from(both, types):
    sizes = {"heads": 2, "kv_heads": 2, "head_dim": 18}
    layers = run_attention(both, types, (200, 60, 1, 217, 1), window=40, is_ring=True, **sizes)
    kinds = {"key_type": types[0], "value_type": types[1], "num_heads": 2, "head_dim": 18}
    away = [
        _core.KvLayer(capacity=64, **kinds),
        _core.DeviceKvLayer(device=both.device, capacity=64, **kinds),
    ]
    for source, target in zip(layers, away, strict=True):
        target.take(source, 500, 530)  # around the end of the ring's second lap
    assert away[1].content.any()
    assert np.array_equal(away[1].content, away[0].content)
    for source, target in zip(away, layers, strict=True):
        target.take(source, 500, 530)
    assert np.array_equal(layers[1].content, layers[0].content)
    with pytest.raises(ValueError, match="do not fit"):
        layers[1].take(away[1], 500, 600)


def test_attention_of_wide_heads_and_many_queries(device):
    wide = Both(device, heads=20, head_dim=256, cols=20 * 256)
    run_attention(wide, ("f16", "q8_0"), (6, 1), heads=20, kv_heads=1, head_dim=256)
    run_attention(wide, ("q8_0", "f16"), (3, 1), heads=20, kv_heads=20, head_dim=80)


@pytest.mark.parametrize(
    "more",
    [
        {"biases": True, "rope_dim": 18},
        {"biases": True, "norms": True, "rope_dim": 8},
        {"norms": True, "norm_per_head": True, "rope_dim": 18, "clip": 0.4},
        {
            "biases": True,
            "norms": True,
            "norm_per_head": True,
            "norm_after_rope": True,
            "rope_dim": 6,
        },
    ],
    ids=str,
)
def test_what_comes_before_attention(both, more):
    run_attention(both, ("f16", "q8_0"), (30, 1, 1), **more)


@pytest.mark.parametrize(
    "more",
    [
        {"sinks": True}, {"sinks": True, "window": 7, "biases": True}, {"chunk": 6}, {"chunk": 300, "window": 40},
        {"growth": 0.2, "grow_every": 4, "rope_dim": 8}, {"v_norm": True, "biases": True},
        {"v_norm": True, "clip": 0.5, "norms": True, "norm_per_head": True, "norm_after_rope": True},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("types", [("f16", "f32"), ("f32", "q8_0")], ids="-".join)
def test_sinks_chunks_growth_and_norms_of_values(both, types, more):
    run_attention(both, types, (30, -220, 20, 1, 9, 30), **more)


@pytest.mark.parametrize("types", [("f16", "f16"), ("q8_0", "q8_0")], ids="-".join)
def test_attention_of_the_widest_heads(device, types):
    wide = Both(device, head_dim=512, heads=10)
    run_attention(wide, types, (5, 1), head_dim=512, heads=10, kv_heads=1, rope_dim=128)


def test_attention_in_parts_that_scratch_has_room_for(device):
    tight = Both(device, rows=80, heads=256, head_dim=16, cols=4096)
    run_attention(tight, ("f16", "f16"), (75,), heads=256, kv_heads=4, head_dim=16)


@pytest.mark.parametrize("types", [("f16", "f32"), ("f32", "q8_0"), ("q8_0", "f16")], ids="-".join)
@pytest.mark.parametrize("gain", [1e9, np.inf])
def test_what_no_cache_can_hold_is_said_as_the_cpu_says_it(both, types, gain):
    with pytest.raises(RangeError) as theirs:
        run_cpu_only(both, types, gain)
    with pytest.raises(RangeError) as mine:
        run_device_only(both, types, gain)
    assert str(mine.value) == str(theirs.value)
    one, out = both.put(np.ones((1, 4), np.float32)), np.empty((1, 4), np.float32)
    _core.device_download(both.ws, [one], [out])  # the error is raised only once


@pytest.mark.parametrize("first", [0, 15])
def test_a_score_that_is_no_number_leaves_no_number_in_the_result(both, isa, first):
    """Products with an infinite query are NaN or infinite: from token `first` on, nothing can be weighed."""
    T = 21
    rng = np.random.default_rng(36)
    q, k, v = np.zeros((T, 16), np.float32), np.zeros((T, 16), np.float32), normal(T, 16)
    q[first:, 5] = np.inf
    k[:, 5] = rng.integers(-1, 2, T)  # times infinity; 0 gives NaN
    kinds = {"key_type": "f32", "value_type": "f32", "num_heads": 1, "capacity": T, "head_dim": 16}
    host, there = _core.KvLayer(**kinds), _core.DeviceKvLayer(device=both.device, **kinds)
    none, out = np.empty((T, 0), np.float32), np.empty((T, 16), np.float32)
    moved, moved_out, nothing = [both.put(a) for a in (q, k, v)], both.put(out), both.put(none)
    layer = _core.DeviceAttention(**GIVEN)
    _core.device_attention(both.ws, layer, *moved, 0, nothing, nothing, there, moved_out)
    _core.attention(
        both.cpu, _core.AttentionLayer(**GIVEN), q, k, v, 0, none, none, None, host, out
    )
    same(moved_out.numpy(), out)
    assert np.isnan(out[first:]).all()
    assert np.isfinite(out[:first]).all()


@pytest.mark.parametrize("index", [-1, 1 << 12])
def test_a_layer_that_errors_cannot_name_is_refused(both, index):
    layer = _core.DeviceAttention(**GIVEN | {"index": index})
    kv = _core.DeviceKvLayer(
        device=both.device, key_type="f32", value_type="f32", num_heads=1, capacity=3, head_dim=16
    )
    x, none = both.put(np.zeros((3, 16), np.float32)), both.put(np.empty((3, 0), np.float32))
    with pytest.raises(ValueError, match=f"layer: expected 0 to 4095, got {index}"):
        _core.device_attention(both.ws, layer, x, x, x, 0, none, none, kv, x)


def misfits(gain):
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal((3, w)).astype(np.float32) for w in (16, 16, 16)]
    arrays[2][2, 3] *= np.float32(gain)
    arrays[1][1, 7] *= np.float32(gain)
    return arrays


GIVEN = {
    "index": 3, "num_heads": 1, "num_kv_heads": 1, "head_dim": 16, "window": 0, "scale": 0.3, "norm_eps": 1e-6,
    "clip": 0.0, "rope_dim": 0, "norm_after_rope": False, "norm_per_head": False, "q_bias": None, "k_bias": None,
    "v_bias": None, "q_norm": None, "k_norm": None,
}  # fmt: skip


def run_cpu_only(both, types, gain):
    kv = _core.KvLayer(key_type=types[0], value_type=types[1], num_heads=1, capacity=3, head_dim=16)
    none = np.empty((3, 0), np.float32)
    out = np.empty((3, 16), np.float32)
    _core.attention(
        both.cpu, _core.AttentionLayer(**GIVEN), *misfits(gain), 0, none, none, None, kv, out
    )


def run_device_only(both, types, gain):
    kv = _core.DeviceKvLayer(
        device=both.device,
        key_type=types[0],
        value_type=types[1],
        num_heads=1,
        capacity=3,
        head_dim=16,
    )
    none, out = both.put(np.empty((3, 0), np.float32)), both.put(np.empty((3, 16), np.float32))
    layer = _core.DeviceAttention(**GIVEN)
    _core.device_attention(both.ws, layer, *map(both.put, misfits(gain)), 0, none, none, kv, out)
    _core.device_download(both.ws, [out], [np.empty((3, 16), np.float32)])


def test_small_arrays_come_through_a_mailbox():
    device = _core.Device(plug_in(), 0, ROOM)
    small, large = normal(3, 50), normal(3, 20000, seed=1)
    arrays = [_core.DeviceArray(device, a.shape) for a in (small, large)]
    for there, array in zip(arrays, (small, large), strict=True):
        there.upload(array)
    shape = (4, 64, 64, 32, 16, 2)
    ws = _core.DeviceWorkspace(device, *shape, 8)
    for yes in (True, False, True):
        device.use_mailbox(yes)
        for count in (1, 2):
            outs = [np.zeros_like(a) for a in (small, large)][:count]
            _core.device_download(ws, arrays[:count], outs)
            for out, array in zip(outs, (small, large), strict=False):
                assert np.array_equal(out, array)
    assert device.stats["bytes_out"] == 3 * (2 * small.nbytes + large.nbytes + 2 * 8)


def test_no_more_is_taken_than_the_budget():
    small = _core.Device(plug_in(), 0, 4096)
    kept = _core.DeviceArray(small, (512,))
    with pytest.raises(OutOfBudget, match="2048 bytes left, and 2560 are needed"):
        _core.DeviceArray(small, (513,))
    assert small.stats["used_bytes"] == small.stats["peak_bytes"] == 2048
    del kept
    assert small.stats["used_bytes"] == 0


def test_what_cannot_be_opened_says_why(tmp_path, device):
    with pytest.raises(DeviceError, match="cannot open shared object"):
        _core.Device(str(tmp_path / "none.so"), 0, ROOM)
    (tmp_path / "text.so").write_text("not a library")
    with pytest.raises(DeviceError, match="plug-in"):
        _core.Device(str(tmp_path / "text.so"), 0, ROOM)
    with pytest.raises(DeviceError, match="has no function edgemoe_backend_probe"):
        _core.Device("libm.so.6", 0, ROOM)
    with pytest.raises(DeviceError, match="cuda:7: there is one device, counted from 0"):
        _core.Device(plug_in(), 7, ROOM)
    assert _core.probe_device(plug_in())["num_devices"] == 1
    assert "cannot open" in _core.probe_device(str(tmp_path / "none.so"))["why_not"]
