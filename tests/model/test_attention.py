"""Attention is near plain numpy for every pair of KV cache types, and its bits depend on nothing else."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools

import numpy as np
import pytest
import reference
from decoded import Decoded
from tiny import tiny_checkpoint

import edgemoe
from edgemoe import _core
from edgemoe.cli.main import main
from edgemoe.convert.convert import convert
from edgemoe.quant.nested import quantize
from edgemoe.runtime.budget import Budget

TYPES = [
    *itertools.product(("f16", "f32", "q8_0"), repeat=2),
    ("q4_0", "q4_0"), ("q3_0", "q2_0"), ("q2_0", "q3_0"), ("f16", "q4_0"),
]  # fmt: skip


@dataclasses.dataclass
class Case:
    """Random projections of T positions, for some shape."""

    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 18
    window: int = 0
    chunk: int = 0
    growth: float = 0.0
    T: int = 300
    sinks: bool = False
    v_bias: bool = False
    v_norm: bool = False
    clip: float = 0.0

    def __post_init__(self):
        rng = np.random.default_rng(self.T + self.head_dim)
        self.q, self.k, self.v = (
            (rng.standard_normal((self.T, n, self.head_dim)) * gain).astype(np.float32)
            for n, gain in ((self.heads, 2), (self.kv_heads, 2), (self.kv_heads, 1))
        )
        self.k[:, :, 0] *= 8  # an outlier channel, as keys have
        self.sink = 3 * rng.standard_normal(self.heads).astype(np.float32)
        self.sink[0], self.sink[-1] = (
            -30,
            40,
        )  # one far below the scores, one far above
        self.bias = rng.standard_normal((self.kv_heads, self.head_dim)).astype(np.float32)
        self.scale = float(np.float32(self.head_dim**-0.5))

    def run(self, types, chunks, *, threads=2, capacity=None, ring=None):
        """Returns the outputs [T, heads, head_dim] and the cache."""
        capacity = capacity or self.T
        ws = _core.Workspace(threads, self.T, 64, 64, capacity, self.head_dim, self.heads)
        layer = _core.AttentionLayer(
            index=5, num_heads=self.heads, num_kv_heads=self.kv_heads, head_dim=self.head_dim,
            window=self.window, scale=self.scale, q_bias=None, k_bias=None,
            v_bias=self.bias.ravel() if self.v_bias else None,
            q_norm=None, k_norm=None, norm_per_head=False, norm_eps=1e-6, clip=self.clip,
            sinks=self.sink if self.sinks else None, v_norm=self.v_norm, chunk=self.chunk,
            growth=self.growth, grow_every=50,
        )  # fmt: skip
        kv = _core.KvLayer(
            key_type=types[0], value_type=types[1], num_heads=self.kv_heads, capacity=ring or capacity,
            head_dim=self.head_dim,
        )  # fmt: skip
        out = np.empty((self.T, self.heads * self.head_dim), np.float32)
        pos = 0
        for n in chunks:
            rows = slice(pos, pos + n)
            q, k, v = (x[rows].reshape(n, -1).copy() for x in (self.q, self.k, self.v))
            # Rotations by nothing, so that the stored values are known to the last bit.
            cos = np.ones((n, self.head_dim // 2), np.float32)
            _core.attention(ws, layer, q, k, v, pos, cos, 0 * cos, None, kv, out[rows])
            pos += n
        assert pos == self.T
        return out.reshape(self.T, self.heads, self.head_dim), kv

    def expected(self, types):
        """Returns the outputs in float64, from the keys and values as stored, one query at a time."""
        v, bias = self.v, 0
        if self.v_bias and (types[1].startswith("f") or self.v_norm):
            v = v + self.bias
        elif self.v_bias:
            bias = self.bias  # not stored, but added to the outputs, as weights sum to 1
        if self.v_norm:
            v = v / np.sqrt(np.square(v).mean(2, keepdims=True) + np.float32(1e-6))
        k, v = reference.as_stored(self.k, types[0]), reference.as_stored(v, types[1]) + bias
        grown = 1 + self.growth * np.log1p((np.arange(self.T) + 1) // 50)
        q = (self.q * grown[:, None, None]).astype(np.float32)
        q = reference.as_stored(q, "f32" if types[0].startswith("f") else "q8_0")
        out = np.empty(self.q.shape)
        for t, h in np.ndindex(self.T, self.heads):
            group = h * self.kv_heads // self.heads
            first = max(0, t + 1 - self.window) if self.window else 0
            first = max(first, t - t % self.chunk) if self.chunk else first
            scores = k[first : t + 1, group] @ q[t, h] * self.scale
            top = max(scores.max(), self.sink[h]) if self.sinks else scores.max()
            weights = np.exp(scores - top)
            total = weights.sum() + (np.exp(self.sink[h] - top) if self.sinks else 0)
            out[t, h] = weights @ v[first : t + 1, group] / total
        return out


SHAPES = [
    Case(),
    Case(heads=9, kv_heads=3, head_dim=64, T=290),
    Case(heads=5, kv_heads=1, head_dim=80, T=60),
    Case(heads=4, kv_heads=4, head_dim=96, window=7, T=60),
    Case(window=100, T=420),
    Case(chunk=100, growth=0.4, T=420),
    Case(heads=7, kv_heads=1, head_dim=32, chunk=300, T=650),
    Case(heads=7, kv_heads=1, head_dim=32, window=300, T=560),
    Case(T=270, sinks=True, v_bias=True),
    Case(heads=4, kv_heads=2, head_dim=32, window=8, T=40, sinks=True),
    Case(heads=4, kv_heads=2, head_dim=20, T=40, v_norm=True),
]


@pytest.mark.parametrize("types", TYPES, ids="-".join)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_attention_is_what_numpy_says(case, types):
    got, _ = case.run(types, [case.T])
    expected = case.expected(types)
    # Values that are normed before they are stored may be rounded the other way.
    if case.v_norm and types[1][:2] in ("q2", "q3", "q4"):
        assert np.sqrt(np.square(got - expected).mean()) < 0.01 * expected.std()
    else:
        np.testing.assert_allclose(got, expected, atol=3e-4 if case.v_norm else 5e-5)


@pytest.mark.parametrize("types", TYPES, ids="-".join)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_chunks_threads_and_capacity_do_not_change_a_bit(case, types):
    expected, kv = case.run(types, [case.T])
    one_by_one, same = case.run(types, [1] * case.T, threads=3)
    assert np.array_equal(one_by_one, expected)
    assert np.array_equal(same.content, kv.content)
    rng = np.random.default_rng(5)
    chunks = []
    while sum(chunks) < case.T:
        chunks.append(int(min(rng.choice([1, 2, 5, 16, 31, 64]), case.T - sum(chunks))))
    for threads, capacity in ((1, case.T + 1), (3, 900)):
        assert np.array_equal(
            case.run(types, chunks, threads=threads, capacity=capacity)[0], expected
        )


def test_what_is_projected_is_clipped_at_both_ends():
    case, clamped = Case(T=40, clip=0.7), Case(T=40)
    for name in "qkv":
        x = getattr(clamped, name)
        assert x.min() < -0.7
        assert x.max() > 0.7
        setattr(clamped, name, x.clip(-0.7, 0.7))
    got, kv = case.run(("f32", "f32"), [case.T])
    expected, same = clamped.run(("f32", "f32"), [case.T])
    assert np.array_equal(got, expected)
    assert np.array_equal(kv.content, same.content)


RINGS = [
    Case(heads=4, kv_heads=2, head_dim=20, window=60, T=700, sinks=True),
    Case(heads=2, kv_heads=1, head_dim=16, window=257, T=1200),
    Case(heads=2, kv_heads=2, head_dim=16, window=1, T=600),
]


@pytest.mark.parametrize("chunks", [[300], [299, 1], [1] * 20], ids=["prompt", "last", "tokens"])
def test_one_call_has_the_bits_of_its_steps(chunks):
    D, heads, kv_heads, dim, T = 48, 6, 2, 18, sum(chunks)
    rng = np.random.default_rng(T)
    x = rng.standard_normal((T, D)).astype(np.float32)
    widths = heads * dim, kv_heads * dim, kv_heads * dim

    def matrix(rows, cols):
        w = rng.standard_normal((rows, cols)).astype(np.float32) / 8
        rungs = quantize(w, (2, 3, 4), second_moments=None, threads=1)
        return _core.Nested.from_rungs(rungs, rows, cols, [2, 1, 1])

    qkv, o = tuple(matrix(n, D) for n in widths), matrix(D, heads * dim)
    layer = _core.AttentionLayer(
        index=0, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, window=0, scale=0.2,
        q_bias=rng.standard_normal(heads * dim).astype(np.float32),
        k_bias=rng.standard_normal(kv_heads * dim).astype(np.float32), v_bias=None,
        q_norm=np.ones(dim, np.float32), k_norm=np.ones(dim, np.float32), norm_per_head=True, norm_eps=1e-6,
        clip=0.0,
    )  # fmt: skip
    results = []
    for at_once, threads in [(True, 2), (False, 1), (False, 3)]:
        ws = _core.Workspace(threads, T, heads * dim, 64, T, dim, heads)
        kv = _core.KvLayer(
            key_type="f16", value_type="f16", num_heads=kv_heads, capacity=T, head_dim=dim
        )
        out, pos = np.full((T, D), np.nan, np.float32), 0
        for n in chunks:
            rows = tuple(np.empty((n, width), np.float32) for width in widths)
            into, part = np.empty((n, heads * dim), np.float32), slice(pos, pos + n)
            cos = np.ones((n, dim // 2), np.float32)
            turn = pos, cos, 0 * cos, None, kv
            if at_once:
                _core.attend(ws, layer, x[part], qkv, o, *rows, *turn, into, out[part])
            else:
                _core.linear(ws, x[part], qkv, rows)
                _core.attention(ws, layer, *rows, *turn, into)
                _core.linear(ws, into, [o], [out[part]])
            pos += n
        results.append(out.tobytes())
    assert results[0] == results[1] == results[2]
    assert np.isfinite(out).all()
    with pytest.raises(ValueError, match="attend: the matrices do not fit"):
        _core.attend(ws, layer, x[part], (o, o, o), o, *rows, *turn, into, out[part])


@pytest.mark.parametrize("types", TYPES, ids="-".join)
@pytest.mark.parametrize("case", RINGS, ids=str)
def test_a_ring_that_is_written_over_does_not_change_a_bit(case, types):
    expected, _ = case.run(types, [case.T])
    mixed = itertools.islice(itertools.cycle((1, 17, 200, 1, 1, 255)), 50)
    for chunk in (1, 197, None):
        chunks = []
        while sum(chunks) < case.T:
            chunks.append(min(chunk or next(mixed), case.T - sum(chunks)))
        got, kv = case.run(types, chunks, ring=_core.KvLayer.ring(case.window, max(chunks)))
        assert len(kv.content) < len(case.run(types, [case.T])[1].content)
        assert np.array_equal(got, expected)


def test_a_pass_that_would_write_over_what_it_sees_is_refused():
    case = Case(heads=2, kv_heads=1, head_dim=16, window=100, T=500)
    assert _core.KvLayer.ring(100, 157) == 256 < _core.KvLayer.ring(100, 158) == 512
    with pytest.raises(ValueError, match=r"positions \[314, 472\) are outside the context of 256"):
        case.run(("f16", "f16"), [157, 157, 158, 28], ring=256)
    case.window = 0
    with pytest.raises(ValueError, match=r"positions \[157, 314\) are outside"):
        case.run(("f16", "f16"), [157, 157, 186], ring=256)


@pytest.mark.parametrize("types", TYPES, ids="-".join)
@pytest.mark.parametrize(
    ("begin", "end"), [(0, 30), (250, 280), (505, 530), (512, 543), (700, 700)]
)
def test_positions_are_copied_between_rings(types, begin, end):
    """In a ring's second lap, the positions that are seen from `end` are copied away, overwritten, and copied back."""
    sizes = {"key_type": types[0], "value_type": types[1], "num_heads": 2, "head_dim": 18}
    ring, away = (_core.KvLayer(capacity=n, **sizes) for n in (256, 64))
    content = np.random.default_rng(0).integers(0, 256, len(ring.content), np.uint8)
    writable(ring)[:] = content
    away.take(ring, begin, end)
    writable(ring)[:] = 0
    ring.take(away, begin, end)
    rows = [at % 256 for at in range(begin // 32 * 32, -(-end // 32) * 32)]
    for is_key, kind, start in (
        (True, types[0], 0),
        (False, types[1], _core.KvLayer.bytes(types[0], 2, 256, 18)),
    ):
        size = _core.KvLayer.bytes(kind, 2, 256, 18)
        before, after = (x[start : start + size].reshape(2, 8, -1) for x in (content, ring.content))
        tiles = sorted({row // 32 for row in rows})
        assert np.array_equal(after[:, tiles], before[:, tiles]) or kind.startswith("q")
        # Tiles of codes have half as many positions: only those of [begin, end) need be there.
        halves_before, halves_after = (x.reshape(2, 16, -1) for x in (before, after))
        halves = sorted({at % 256 // 16 for at in range(begin, end)})
        assert np.array_equal(halves_after[:, halves], halves_before[:, halves]), is_key


def writable(kv):
    """Returns the bytes of a layer, writable."""
    view = kv.content
    return np.ctypeslib.as_array((ctypes.c_uint8 * len(view)).from_address(view.ctypes.data))


def test_what_cannot_be_copied_is_refused():
    def layer(**changes):
        return _core.KvLayer(
            **{"key_type": "f16", "value_type": "f16", "num_heads": 2, "capacity": 64, "head_dim": 16, **changes}
        )  # fmt: skip

    for other in (
        layer(key_type="q8_0"), layer(value_type="f32"), layer(num_heads=1), layer(head_dim=32),
        _core.KvLayer.latents(type="f16", capacity=64, head_dim=16, value_dim=16),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            layer().take(other, 0, 3)
    for begin, end in ((-1, 3), (3, 2), (0, 65), (31, 97), (1 << 30, (1 << 30) + 1)):
        with pytest.raises(ValueError, match="do not fit"):
            layer().take(layer(), begin, end)
    with pytest.raises(ValueError, match="do not fit"):
        layer(capacity=70).take(layer(), 70, 71)


@pytest.mark.parametrize("types", TYPES, ids="-".join)
@pytest.mark.parametrize("case", [SHAPES[0], SHAPES[2], SHAPES[3], SHAPES[6], SHAPES[8]], ids=str)
def test_instruction_sets_are_bit_identical(case, types, isas):
    ran = []
    for isa in isas:
        _core.use_isa(isa)
        ran.append(case.run(types, [case.T - 9, 9 - 1, 1]))
    (expected, same), *others = ran
    for got, kv in others:
        assert np.array_equal(got, expected)
        assert np.array_equal(kv.content, same.content)


def test_eight_bits_are_those_of_llama_cpp(isa):
    """The stored codes and scales are those of the gguf package's q8_0, where head_dim is a multiple of 32."""
    from gguf import GGMLQuantizationType, quants

    case = Case(heads=2, kv_heads=2, head_dim=64, T=33)
    _, kv = case.run(("q8_0", "q8_0"), [33])
    theirs = quants.quantize(case.v.reshape(-1, 32), GGMLQuantizationType.Q8_0).reshape(
        33, 2, 2, 34
    )
    tiles = kv.content[kv.content.size // 2 :].reshape(2, 3, 16 * 68)
    codes = tiles[:, :, : 16 * 64].view(np.int8).reshape(2, 48, 2, 32)[:, :33]
    scales = (
        tiles[:, :, 16 * 64 :].reshape(2, 3, 2, 16, 2).transpose(0, 1, 3, 2, 4).reshape(2, 48, 2, 2)
    )
    their_scales, their_codes = theirs[..., :2], theirs[..., 2:].view(np.int8)
    assert np.array_equal(scales[:, :33].transpose(1, 0, 2, 3), their_scales)
    # The package divides by the scale before rounding it to float16.
    difference = codes.transpose(1, 0, 2, 3).astype(int) - their_codes
    assert np.abs(difference).max() <= 1
    assert np.count_nonzero(difference) < 0.05 * difference.size


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q2_0"])
@pytest.mark.parametrize("value", [0.0, 1e-30, 3e-5])
def test_small_values_stay_what_they_are(value, kind, isa):
    case = Case(heads=1, kv_heads=1, head_dim=32, T=20)
    case.v[7] = value
    got, _ = case.run((kind, kind), [20])
    np.testing.assert_allclose(got, case.expected((kind, kind)), atol=1e-5)
    case.v[:] = value
    got, _ = case.run((kind, kind), [20])
    np.testing.assert_allclose(got, value, rtol=0.02 if value > 1e-9 else 0, atol=1e-9)


# For each type the largest number it can store, the first one it cannot, and the error for that.
LIMITS = [
    (
        "f16",
        65504.0,
        65520.0,
        "of 65520 does not fit the KV cache in f16, which ends at 65504; f32",
    ),
    ("q8_0", 127 * 65504.0, 8.4e6, r"of 8.4e\+06 does not fit the KV cache in q8_0, which ends at"),
    (
        "q4_0",
        8 * 65504.0,
        5.3e5,
        "of 530000 does not fit the KV cache in q4_0, which ends at 524032",
    ),
    ("q2_0", 3 * 65504.0, 1.97e5, "of 197000 does not fit the KV cache in q2_0"),
    ("f32", 3e38, np.inf, "is not a finite number"),
]


@pytest.mark.parametrize("chunks", [[20], [1] * 20], ids=["prompt", "tokens"])
@pytest.mark.parametrize(("kind", "most", "more", "message"), LIMITS, ids=lambda x: str(x)[:5])
@pytest.mark.parametrize("name", ["key", "value"])
def test_what_does_not_fit_is_refused_by_layer(name, kind, most, more, message, chunks, isa):
    case = Case(heads=2, kv_heads=2, head_dim=32, T=20)
    rows = case.k if name == "key" else case.v
    types = (kind, "f32") if name == "key" else ("f32", kind)
    rows[7, 1, 3] = -most
    case.q[:, 1, 3] = 0  # scores stay in range
    got, _ = case.run(types, chunks)
    assert np.isfinite(got).all()
    for value, said in ((more, message), (np.nan, "is not a finite number")):
        rows[7, 1, 3] = value
        with pytest.raises(edgemoe.RangeError, match=f"^layer 5: a {name} {said}"):
            case.run(types, chunks)


def test_a_cache_that_refused_keeps_what_was_before(isa):
    case = Case(T=60)
    expected, kv = case.run(("f16", "q8_0"), [40, 20])
    parts = []
    with pytest.MonkeyPatch.context() as patch:
        attention = _core.attention

        def fail_first(*args):
            """Runs every chunk twice; the first time one of its numbers is too large."""
            q, k, v, out = (args[i].copy() for i in (2, 3, 4, 10))
            k[-1, 5] = 1e6
            with pytest.raises(edgemoe.RangeError):
                attention(*args[:2], q, k, v, *args[5:10], out)
            parts.append(args[5])
            attention(*args)

        patch.setattr(_core, "attention", fail_first)
        got, same = case.run(("f16", "q8_0"), [40, 20])
    assert parts == [0, 40]
    assert np.array_equal(got, expected)
    assert np.array_equal(same.content, kv.content)


def test_wrong_caches_get_one_clear_line():
    case = Case(T=20)
    with pytest.raises(ValueError, match="expected f16, f32, q8_0, q4_0, q3_0 or q2_0, got q4"):
        case.run(("q4", "f16"), [20])
    with pytest.raises(ValueError, match="outside the context of 19"):
        case.run(("f16", "q8_0"), [20], capacity=19)
    with pytest.raises(ValueError, match="multiple of the kv heads"):
        Case(heads=7, kv_heads=2, T=2).run(("f16", "f16"), [2])


@pytest.mark.parametrize("pos", [-1, 18, 2**31 - 1])
def test_positions_outside_the_cache_are_refused(pos, monkeypatch):
    case = Case(T=2)
    attention = _core.attention
    monkeypatch.setattr(_core, "attention", lambda *args: attention(*args[:5], pos, *args[6:]))
    with pytest.raises(ValueError, match=rf"\[{pos}, {pos + 2}\) are outside the context of 19"):
        case.run(("f16", "f16"), [2], capacity=19)


# ---------------------------------------------------------------- in the engine

IDS = np.random.default_rng(2).integers(0, 256, 280)


@pytest.mark.parametrize("types", TYPES, ids="-".join)
def test_logits_do_not_depend_on_chunk_budget_threads_or_instruction_set(
    tiny_moe, monkeypatch, types
):
    given = {"cache_type_k": types[0], "cache_type_v": types[1]}
    with edgemoe.load(tiny_moe, **given) as engine:
        expected = engine.logits(IDS)
        assert len(engine.notes) == len({t for t in types if t.startswith("q")})
    with edgemoe.load(tiny_moe) as engine:
        exact = engine.logits(IDS)
        assert np.array_equal(expected, exact) == (types == ("f16", "f16"))
        likeness = np.corrcoef(exact.ravel(), expected.ravel())[0, 1]
        assert likeness > (0.9 if "q2_0" in types else 0.97 if "q4_0" in types else 0.99)
    for isa in _core.usable_isas().split():
        before = _core.isa()
        _core.use_isa(isa)
        try:
            with edgemoe.load(tiny_moe, **given) as engine:
                assert np.array_equal(engine.logits(IDS[:40]), expected[:40])
        finally:
            _core.use_isa(before)
    real = Budget.divide.__func__
    for chunk, threads in ((1, 1), (7, 3), (64, 2)):

        def divide(cls, moe, _chunk=chunk, **kwargs):
            budget = real(cls, moe, **kwargs)
            return dataclasses.replace(budget, fixed_slots=2 * budget.expert, chunk=_chunk)

        with monkeypatch.context() as patch:
            patch.setattr(Budget, "divide", classmethod(divide))
            with edgemoe.load(tiny_moe, threads=threads, **given) as engine:
                assert np.array_equal(engine.logits(IDS), expected)
                assert engine.stats.evictions > 0


def test_eight_bits_make_room_and_say_so(tiny_moe):
    with edgemoe.load(tiny_moe, context=512) as engine:
        full, notes = engine.budget.kv, engine.notes
        assert engine.stats.kv_bytes == full
        assert engine.kv_bytes(256) == full // 2
    with edgemoe.load(tiny_moe, context=512, cache_type_k="q8_0", cache_type_v="q8_0") as engine:
        # 24 values of a head are stored as 32 codes and one scale, instead of 32 float16.
        assert engine.budget.kv == full * 34 // 64
        assert notes == ()
        assert engine.notes == ("lossy: keys and values of the KV cache at 8 of 16 bits",)
    with edgemoe.load(tiny_moe, context=512, cache_type_v="q8_0") as engine:
        assert engine.notes == ("lossy: values of the KV cache at 8 of 16 bits",)
    with edgemoe.load(tiny_moe, context=512, cache_type_k="q8_0", cache_type_v="q4_0") as engine:
        assert engine.budget.kv == full * (34 + 18) // 128
        assert engine.kv_bytes(256) == engine.budget.kv // 2
        assert engine.notes == (
            "lossy: keys of the KV cache at 8 of 16 bits",
            "lossy: values of the KV cache at 4 of 16 bits",
        )


def test_more_context_fits_a_small_budget(tiny_moe):
    from edgemoe.file.reader import open_moe
    from edgemoe.model import KvTypes, state_bytes
    from edgemoe.ops import OpsShape

    moe = open_moe(tiny_moe)
    config = dataclasses.replace(moe.config, context_length=1 << 20)
    moe = dataclasses.replace(moe, config=config)
    ops = OpsShape(
        threads=1, max_tokens=1, max_cols=96, max_hidden=96, max_context=1, head_dim=24, num_heads=4
    )  # fmt: skip

    def context(types):
        budget = Budget.divide(
            moe, ram=31 << 20, process=0, level=5, dense_level=5, context=None, kv_types=types, ops=ops
        )  # fmt: skip
        assert budget.room >= budget.expert
        return budget.context

    assert 256 < context(KvTypes()) < context(KvTypes("q8_0")) < context(KvTypes("q8_0", "q8_0"))
    assert state_bytes(config, 3 * 4096, KvTypes("q4_0", "q4_0")) < state_bytes(
        config, 4096, KvTypes()
    )


@pytest.mark.parametrize("name", ["cache_type_k", "cache_type_v"])
def test_an_unknown_type_gets_one_clear_line(tiny_moe, name):
    with pytest.raises(
        ValueError, match=f"{name}: expected f16, f32, q8_0, q4_0, q3_0 or q2_0, got q4"
    ):
        edgemoe.load(tiny_moe, **{name: "q4"})


def test_an_engine_says_what_holds_its_values_and_goes_on(tmp_path, capsys):
    """Values beyond float16 are refused with an error that names them, and are right in float32."""
    source = tiny_checkpoint(experts=2)  # all of them for each token: no near ties
    source.tensor("model.layers.1.self_attn.v_proj.weight")[:] *= 20_000
    source.tensor("model.layers.1.self_attn.o_proj.weight")[:] /= 20_000
    convert(source, tmp_path / "x.moe")
    decoded = Decoded(tmp_path / "x.moe")
    ids = np.arange(200)
    expected, _ = reference.logits(decoded.config, decoded.tensors, decoded.expert, ids.tolist())
    with edgemoe.load(tmp_path / "x.moe", cache_type_v="f32") as engine:
        assert engine.notes == ()
        right = engine.logits(ids)
    assert np.abs(right - expected).max() < 0.15 * expected.std()
    said = (
        r"^layer 1: a value of .* does not fit the KV cache in f16, .*; f32 holds it \(-ctv f32\)$"
    )
    with edgemoe.load(tmp_path / "x.moe") as engine:
        with pytest.raises(edgemoe.RangeError, match=said):
            engine.logits(ids)
        short = engine.logits(ids[:1])
        with pytest.raises(edgemoe.RangeError, match=said):
            engine.extend(ids[1:])
        assert np.array_equal(engine.logits(ids[:1]), short)
    assert main(["bench", str(tmp_path / "x.moe"), "-p", "64", "-n", "2"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("edgemoe bench: layer 1: a value of")
