"""Arguments that the bindings refuse: those that the core would index by, divide by or cast, and crash or be wrong."""

from __future__ import annotations

import numpy as np
import pytest

from edgemoe import _core
from edgemoe.errors import FormatError
from edgemoe.file.reader import open_moe
from edgemoe.plan import Plan
from edgemoe.store import ExpertStore

WIDTHS = [2, 1, 1, 2, 2]
BAD = [float("nan"), float("inf"), -1.0]


def f32(*shape):
    return np.zeros(shape, np.float32)


def quantize(
    *,
    weights=(0, 1, 4, 16, 0, 64, 0, 256),
    squares=None,
    moments=None,
    w=None,
    threads=1,
    row_scales=(1,),
):
    w = np.eye(16, 32, dtype=np.float32) if w is None else w
    cols = w.shape[1]
    squares = np.ones(cols, np.float32) if squares is None else squares
    return _core.quantize(
        w, WIDTHS, row_scales, np.array(weights, np.float32), squares, moments, 2, False, threads
    )


@pytest.fixture(scope="module")
def matrix():
    return _core.Nested.from_rungs(quantize(), 16, 32, WIDTHS)


@pytest.mark.parametrize("row_scales", [(), (0,), (0, 1), (1, 2), (1,) * 9])
def test_row_scales_that_are_none_are_refused(row_scales):
    with pytest.raises(ValueError, match="row_scales: expected 1, and then 1 or 0 for each rung"):
        quantize(row_scales=row_scales)
    with pytest.raises(ValueError, match="row_scales: expected 1, and then 1 or 0 for each rung"):
        _core.Nested.from_rungs(quantize(), 16, 32, WIDTHS, row_scales=row_scales)


def test_later_row_scales_are_of_nested_codes_alone():
    with pytest.raises(ValueError, match="for each rung of nested codes"):
        _core.Nested.from_rungs([np.zeros(0, np.uint8)], 16, 32, [2], "mwq", [1, 1])


@pytest.mark.parametrize("weights", [[0] * 8, *([1, x, 1, 1, 1, 1, 1, 1] for x in BAD)])
def test_level_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="level_weights: expected numbers that are finite"):
        quantize(weights=weights)


@pytest.mark.parametrize("bad", [*BAD, 0.0])
@pytest.mark.parametrize("at", [(3, 3), (2, 5)])
def test_moments_that_are_none_are_refused(bad, at):
    moments = np.full((32, 32), 0.5, np.float32) + np.eye(32, dtype=np.float32)
    quantize(moments=moments)
    moments[at] = bad
    if at == (2, 5) and bad in (-1.0, 0.0):  # off the diagonal it may be so
        quantize(moments=moments)
        return
    with pytest.raises(ValueError, match="second moments: expected finite numbers"):
        quantize(moments=moments)


@pytest.mark.parametrize("bad", [*BAD, 0.0])
def test_squares_that_are_none_are_refused(bad):
    squares = np.ones(32, np.float32)
    squares[7] = bad
    with pytest.raises(ValueError, match="second moments"):
        quantize(squares=squares)


@pytest.mark.parametrize(("shape", "what"), [((0, 32), "rows"), ((16, 0), "cols")])
def test_an_empty_matrix_is_refused(shape, what):
    with pytest.raises(ValueError, match=f"nested {what}: expected 1 to"):
        quantize(w=f32(*shape))


def test_arrays_are_lent_as_they_are(matrix):
    """A wrong dtype, a strided array and a misaligned one are errors; none is copied."""
    ws = _core.Workspace(1, 4, 32, 32, 1, 16)
    out = f32(2, 16)
    _core.linear(ws, f32(2, 32), [matrix], [out])
    for x in (np.zeros((2, 32)), f32(32, 2).T, f32(2, 64)[:, ::2]):
        with pytest.raises(TypeError):
            _core.linear(ws, x, [matrix], [out])
    odd = np.zeros(2 * 32 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(2, 32)
    with pytest.raises(ValueError, match="linear x: expected an aligned array"):
        _core.linear(ws, odd, [matrix], [out])
    router, norm = f32(4, 32), np.ones(32, np.float32)
    chosen = f32(1, 1, 32), f32(1, 1, 4), np.zeros((1, 1, 2), np.int32), f32(1, 1, 2)
    rule = _core.RouteRule(num_experts=4, top_k=2, scoring="softmax", renormalise=False)
    _core.look_ahead(ws, f32(1, 32), [norm], [router], [None], [None], 1e-5, rule, *chosen)
    with pytest.raises(TypeError):
        _core.look_ahead(
            ws, f32(1, 32), [norm], [router.astype("f8")], [None], [None], 1e-5, rule, *chosen
        )
    with pytest.raises(TypeError):
        _core.look_ahead(
            ws, f32(1, 32), [norm], [router], [None], [np.zeros(4)], 1e-5, rule, *chosen
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 5}, "expected 1 to 4 experts"),
        ({"top_k": 0}, "expected 1 to 4 experts"),
        ({"groups": 3}, "groups of as many experts each"),
        ({"groups": 4, "used_groups": 1}, "enough of them"),
        ({"groups": 0, "used_groups": 0}, "groups of as many experts each"),
        ({"scoring": "tanh"}, "expected softmax, softmax_topk, sigmoid or sparsemixer, got tanh"),
        ({"scoring": "softmax_topk", "groups": 2, "used_groups": 2}, "not for groups"),
    ],
)
def test_a_rule_of_routing_that_cannot_be_is_refused(changes, message):
    rule = {"num_experts": 4, "top_k": 2, "scoring": "softmax", "renormalise": False}
    with pytest.raises(ValueError, match=message):
        _core.RouteRule(**{**rule, **changes})


def test_nothing_is_no_file_and_no_matrix(tiny_moe):
    ws = _core.Workspace(1, 4, 32, 32, 1, 16)
    with pytest.raises(TypeError, match="expected matrices, got None"):
        _core.linear(ws, f32(1, 32), [None], [f32(1, 16)])
    for call in (
        lambda: _core.read_f32(None, 0, [1], 0, True, "x"),
        lambda: _core.disk_rate(None, [0], 4096, 1),
        lambda: _core.Nested.from_file(None, 0, [64], [0], 1, 1, [8], True, "x"),
    ):
        with pytest.raises(TypeError):
            call()


@pytest.mark.parametrize("verify", [True, False])
def test_floats_of_a_file_are_finite(tmp_path, verify):
    """An expert whose router has such a value would not be chosen, and nothing would show it."""
    values = np.zeros(2048, np.float32)
    for bad in (np.nan, np.inf, -np.inf):
        values[1500] = bad
        (tmp_path / "floats").write_bytes(values.tobytes())
        file = _core.File(str(tmp_path / "floats"))
        crc = _core.crc32c(values)
        with pytest.raises(FormatError, match="tensor router has a value that is not finite"):
            _core.read_f32(file, 0, [4, 512], crc, verify, "router")
    values[1500] = 1
    (tmp_path / "floats").write_bytes(values.tobytes())
    file = _core.File(str(tmp_path / "floats"))
    assert np.array_equal(
        _core.read_f32(file, 0, [2048], _core.crc32c(values), verify, "x"), values
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _core.Workspace(0, 1, 1, 1, 1, 16), "threads: expected 1 to 1024, got 0"),
        (lambda: _core.Workspace(1, -1, 1, 1, 1, 16), "max_rows"),
        (lambda: _core.Workspace(1, 1, 1 << 25, 1, 1, 16), "max_cols"),
        (lambda: _core.Workspace.bytes(1, 1, 1, 1, 1 << 30, 16, 1 << 12), "blocks of attention"),
        (lambda: kv(num_heads=0), "num_heads: expected 1 to 4096, got 0"),
        (lambda: kv(capacity=-5), "capacity"),
        (lambda: kv(head_dim=1 << 20), "head_dim"),
        (lambda: kv(key_type="q4"), "expected f16, f32, q8_0, q4_0, q3_0 or q2_0, got q4"),
        (lambda: _core.KvLayer.bytes("f16", 1, 0, 16), "capacity"),
        (lambda: attention_layer(num_heads=-4), "num_heads"),
        (lambda: attention_layer(num_kv_heads=0), "multiple of the kv heads"),
        (lambda: attention_layer(head_dim=1 << 30), "head_dim"),
        (lambda: _core.memory_rate(1 << 62, 1), "memory_rate bytes"),
        (lambda: _core.memory_rate(1 << 20, 0), "1 to 1024 threads, got 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def kv(**changes):
    sizes = {"key_type": "f16", "value_type": "f16", "num_heads": 2, "capacity": 4, "head_dim": 16}
    return _core.KvLayer(**{**sizes, **changes})


def attention_layer(**changes):
    none = dict.fromkeys(("q_bias", "k_bias", "v_bias", "q_norm", "k_norm"))
    sizes = {
        "index": 0,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "window": 0,
        "scale": 0.25,
    }
    rest = {"norm_per_head": False, "norm_eps": 1e-5, "clip": 0.0}
    return _core.AttentionLayer(**{**sizes, **none, **rest, **changes})


def test_reads_of_the_disk_that_cannot_be_are_refused(tiny_moe):
    file = _core.File(str(tiny_moe))
    for length, readers in ((4096, 0), (4096, -1), (4095, 1), (0, 1), (1 << 40, 1)):
        with pytest.raises(ValueError, match="disk_rate"):
            _core.disk_rate(file, [0], length, readers)


def cache(moe, **changes):
    widths = [[2] * 3, [1] * 3, [1] * 3, [2] * 3, [2] * 3]
    parts = {
        "file": moe.file, "num_experts": moe.config.num_experts, "hidden": moe.config.hidden_size,
        "expert_hidden": moe.config.expert_hidden, "rung_widths": widths, "ends": list(moe.experts.ends),
        "offsets": moe.experts.offsets, "crcs": moe.experts.crcs, "rungs": moe.experts.rungs,
        "layers": list(moe.config.moe_layers), "max_level": 5, "budget_bytes": 1 << 24, "verify": True,
        "num_readers": 1, "policy": "lru", "row_scales": moe.scheme.row_scales,
    }  # fmt: skip
    return _core.Cache(**{**parts, **changes})


def test_rungs_that_end_elsewhere_are_refused(tiny_moe):
    moe = open_moe(tiny_moe)
    cache(moe)
    ends = list(moe.experts.ends)
    for wrong in (
        [0, *ends[1:]],
        [64] * 5,
        [*ends[:-1], ends[-1] + 4096],
        ends[::-1],
        [e * 2 for e in ends],
    ):
        with pytest.raises(ValueError, match=r"Cache: rung \d ends at \d+; expected"):
            cache(moe, ends=wrong)
        if wrong[0] == 0 or wrong == ends[::-1]:
            with pytest.raises(ValueError, match=r"Cache: rung \d ends at \d+; expected"):
                cache(moe, ends=wrong, file=None)
    for name in ("hidden", "expert_hidden"):
        with pytest.raises(ValueError, match=f"Cache {name}"):
            cache(moe, **{name: 0})
    for policy in (np.zeros(3), np.zeros(16, np.float32), "fifo", None):
        with pytest.raises((ValueError, TypeError), match="policy: expected"):
            cache(moe, policy=policy)


def test_uses_are_numbers(tiny_moe):
    moe = open_moe(tiny_moe)
    store = ExpertStore.open(moe, bits=8, budget_bytes=1 << 24, verify=True)
    for bad in (*BAD, 1e300):
        uses = store.uses.copy()
        uses[0, 0] = bad
        with pytest.raises(ValueError, match="policy: expected uses that are finite"):
            store.uses = uses


@pytest.mark.parametrize("bits", [-1, 1, 5, 127])
def test_bits_that_no_level_has_are_refused(bits):
    store = ExpertStore.dry(
        num_layers=1, num_experts=2, level_bits=[4, 8], level_bytes=[4096, 8192], budget_bytes=8192
    )
    wrong = np.array([0, bits], np.int8)
    experts, unused = np.arange(2, dtype=np.int32), np.zeros(0, np.int32)
    dropping = Plan(
        layer=0, experts=unused, bits=wrong[:0], offsets=np.zeros(1, np.int32), tokens=unused,
        rows=np.zeros((0, 1), np.int32), gates=np.zeros((0, 1), np.float32), drop=experts, drop_bits=wrong,
    )  # fmt: skip
    for use in (
        lambda: store.levels(wrong), lambda: store.sizes(experts, wrong), lambda: store.lower(wrong),
        lambda: store.load(experts, wrong), lambda: store.request(dropping),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"bits: expected one of 0, 4, 8, got {bits}"):
            use()
    assert store.levels(np.array([[0, 4, 8]], np.int8)).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("tokens", [1, 64, 60_000, 65_536, 1_000_000])
def test_uses_after_passes_of_any_length(tokens):
    """Later uses weigh more, and nothing overflows."""
    store = ExpertStore.dry(
        num_layers=1, num_experts=4, level_bits=[8], level_bytes=[4096], budget_bytes=8192
    )
    for expert in (0, 1, 2):
        plan = Plan(
            layer=0, experts=np.array([expert], np.int32), bits=np.array([8], np.int8),
            offsets=np.array([0, tokens], np.int32), tokens=np.arange(tokens, dtype=np.int32),
            rows=np.arange(tokens, dtype=np.int32).reshape(-1, 1), gates=np.ones((tokens, 1), np.float32),
        )  # fmt: skip
        store.request(plan)
        assert list(store.ready_groups()) == [[0]]
    expected = [tokens * 0.5 ** (tokens / 64 * ago) for ago in (3, 2, 1)]
    np.testing.assert_allclose(store.uses[0], [*expected, 0], rtol=1e-12)
    if tokens <= 60_000:
        assert list(store.cache.residency) == [0, 1, 1, 0]  # the first was dropped for the third
