"""Latent attention is near plain numpy for every type of cache, and its bits depend on nothing else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import reference
import reference_latent

import edgemoe
from edgemoe import _core
from edgemoe.quant import plane_widths, quantize

TYPES = ("f16", "f32", "q8_0", "q4_0", "q3_0", "q2_0")


@dataclasses.dataclass
class Case:
    """Random queries and keys of T positions, for some shape."""

    heads: int = 5
    nope: int = 24
    rope: int = 16
    latent: int = 32
    T: int = 300
    grow_every: int = 0

    def __post_init__(self):
        rng = np.random.default_rng(self.T + self.latent)
        self.width = self.latent + self.rope

        def random(*shape, gain=1.0):
            return (rng.standard_normal((self.T, *shape)) * gain).astype(np.float32)

        self.q = random(self.heads, self.nope + self.rope)
        self.absorbed = random(self.heads, self.width)
        self.absorbed[:, :, self.latent :] = np.nan  # to be written
        self.keys = random(self.width, gain=3)
        self.keys[:, 0] *= 8  # an outlier channel
        self.norm = (1 + 0.2 * rng.standard_normal(self.latent)).astype(np.float32)
        angles = np.arange(self.T)[:, None] * 0.7 ** np.arange(self.rope // 2)
        self.cos, self.sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        self.scale = float(np.float32(self.width**-0.5))

    def layer(self, **given):
        values = {
            "index": 5, "num_heads": self.heads, "nope_dim": self.nope, "rope_dim": self.rope,
            "latent_dim": self.latent, "scale": self.scale, "rotates": True,
            "grow_every": self.grow_every, "growth": 0.3 if self.grow_every else 0.0,
            "norm": self.norm, "norm_eps": 1e-6,
        }  # fmt: skip
        return _core.LatentLayer(**{**values, **given})

    def cache(self, kind, capacity):
        return _core.KvLayer.latents(
            type=kind, capacity=capacity, head_dim=self.width, value_dim=self.latent
        )

    def workspace(self, threads, capacity):
        return _core.Workspace(threads, self.T, 64, 64, capacity, self.width, self.heads)

    def run(self, kind, chunks, *, threads=2, capacity=None, call=_core.latent_attention):
        """Returns the outputs [T, heads, latent], the queries and keys as changed by the call, and the cache."""
        capacity = capacity or self.T
        ws, kv, layer = self.workspace(threads, capacity), self.cache(kind, capacity), self.layer()
        out = np.empty((self.T, self.heads * self.latent), np.float32)
        absorbed, keys = self.absorbed.reshape(self.T, -1).copy(), self.keys.copy()
        q, pos = self.q.reshape(self.T, -1), 0
        for n in chunks:
            i = slice(pos, pos + n)
            call(ws, layer, q[i], absorbed[i], keys[i], pos, self.cos[i], self.sin[i], kv, out[i])
            pos += n
        assert pos == self.T
        return out.reshape(self.T, self.heads, -1), absorbed, keys, kv

    def prepared(self):
        """Returns queries and keys, normed and rotated, in float64."""
        latents, turned = np.split(self.keys.astype(float), [self.latent], 1)
        latents = reference.rms_norm(latents, self.norm.astype(float), 1e-6)
        queries = self.absorbed.astype(float)
        queries[:, :, self.latent :] = self.turned(self.q[:, :, self.nope :])
        keys = np.concatenate([latents, self.turned(turned[:, None])[:, 0]], 1)
        if self.grow_every:
            grown = 1 + 0.3 * np.log(1 + np.arange(self.T) // self.grow_every)
            queries *= grown[:, None, None]
        return queries, keys

    def turned(self, x):
        a, b = np.split(x.astype(float), 2, -1)
        cos, sin = self.cos[:, None].astype(float), self.sin[:, None].astype(float)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


SHAPES = [
    Case(),
    Case(heads=20, nope=40, rope=16, latent=96, T=60),
    Case(heads=3, latent=48, rope=6, T=290),
    Case(heads=1, latent=16, rope=2, T=17),
    Case(heads=4, latent=512, rope=64, T=40),
    Case(grow_every=100),
]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_latent_attention_is_what_numpy_says(case, kind):
    got, absorbed, keys, _ = case.run(kind, [case.T])
    expected = case.prepared()
    np.testing.assert_allclose(absorbed.reshape(expected[0].shape), expected[0], atol=1e-5)
    np.testing.assert_allclose(keys, expected[1], atol=2e-5)
    q = reference.as_stored(
        absorbed.reshape(expected[0].shape), "f32" if kind.startswith("f") else "q8_0"
    )
    stored = reference.as_stored(keys[:, None], kind)[:, 0]
    out = reference_latent.attend(q, stored, stored[:, : case.latent], case.scale)
    np.testing.assert_allclose(got, out, atol=5e-5)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_chunks_threads_and_capacity_do_not_change_a_bit(case, kind):
    expected, *_, kv = case.run(kind, [case.T])
    one_by_one, *_, same = case.run(kind, [1] * case.T, threads=3)
    assert np.array_equal(one_by_one.view(np.int32), expected.view(np.int32))
    assert np.array_equal(same.content, kv.content)
    rng = np.random.default_rng(5)
    chunks = []
    while sum(chunks) < case.T:
        chunks.append(int(min(rng.choice([1, 2, 5, 16, 31, 64]), case.T - sum(chunks))))
    for threads, capacity in ((1, case.T + 1), (3, 900)):
        got, *_ = case.run(kind, chunks, threads=threads, capacity=capacity)
        assert np.array_equal(got.view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("case", [SHAPES[0], SHAPES[2], SHAPES[4]], ids=str)
def test_instruction_sets_are_bit_identical(case, kind, isas):
    ran = []
    for isa in isas:
        _core.use_isa(isa)
        ran.append(case.run(kind, [case.T - 9, 9 - 1, 1]))
    (expected, *_, same), *others = ran
    for got, *_, kv in others:
        assert np.array_equal(got.view(np.int32), expected.view(np.int32))
        assert np.array_equal(kv.content, same.content)


@pytest.mark.parametrize("chunks", [[20], [1] * 20], ids=["prompt", "tokens"])
@pytest.mark.parametrize("kind", TYPES)
def test_what_does_not_fit_is_refused_and_leaves_nothing(kind, chunks, isa):
    """Values that are not seen are multiplied by 0. So an infinity left behind by a refused key would spread to all."""
    case = Case(T=20)
    bad = {"f16": 65520.0, "q8_0": 8.4e6, "f32": np.inf}.get(kind, 9.9e5)
    refused = []

    def fail_first(ws, layer, q, absorbed, keys, pos, cos, sin, kv, out):
        """Runs every chunk with a number that cannot be stored, which is refused, and then as it is."""
        for value, said in ((bad, "a key"), (np.nan, "a key is not a finite number")):
            worse = keys.copy()
            worse[-1, -1] = value
            with pytest.raises(edgemoe.RangeError, match=f"^layer 5: {said}"):
                _core.latent_attention(
                    ws, layer, q, absorbed.copy(), worse, pos, cos, sin, kv, out.copy()
                )
        refused.append(pos)
        _core.latent_attention(ws, layer, q, absorbed, keys, pos, cos, sin, kv, out)

    case.sin[:] = 0  # so that the last column stays what it is
    case.cos[:] = 1
    expected, *_ = case.run(kind, chunks)
    got, *_, same = case.run(kind, chunks, call=fail_first, capacity=33)
    assert len(refused) == len(chunks)
    assert np.array_equal(got, expected)
    assert np.array_equal(case.run(kind, chunks, capacity=33)[3].content, same.content)


# ---------------------------------------------------------------- a matrix for each head


def matrix(rows, cols, seed):
    w = np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)
    ladder = (2, 3, 4, 6, 8)
    return w, _core.Nested.from_rungs(quantize(w, ladder), rows, cols, plane_widths(ladder))


def rows_of(nested):
    out = np.empty((nested.rows, nested.cols), np.float32)
    nested.decode_rows(np.arange(nested.rows, dtype=np.int32), out)
    return out


@pytest.mark.parametrize("T", [1, 7])
@pytest.mark.parametrize("extra", [0, 8])
def test_each_head_has_its_matrix(T, extra, isa):
    heads, rows, cols = 3, 48, 40
    w, stacked = matrix(heads * rows, cols, 0)
    x = np.random.default_rng(1).standard_normal((T, heads, cols + extra)).astype(np.float32)
    out = np.full((T, heads, rows + extra), np.nan, np.float32)
    ws = _core.Workspace(2, 8, 128, 64, 1, 16)
    _core.linear_heads(ws, x.reshape(T, -1), stacked, heads, out.reshape(T, -1))
    assert np.isnan(out[:, :, rows:]).all()
    ladder = (2, 3, 4, 6, 8)
    for h in range(heads):
        part = w[h * rows : (h + 1) * rows]
        alone = _core.Nested.from_rungs(quantize(part, ladder), rows, cols, plane_widths(ladder))
        expected = np.empty((T, rows), np.float32)
        _core.linear(ws, np.ascontiguousarray(x[:, h, :cols]), [alone], [expected])
        assert np.array_equal(out[:, h, :rows], expected)


def test_the_absorbed_form_is_the_papers():
    """From projections to the heads' outputs, against the form in which every head has its own keys and values."""
    case, value = Case(heads=6, nope=40, latent=64, T=50), 48
    k_b, v_b = (matrix(case.heads * n, m, n)[1] for n, m in ((64, 40), (value, 64)))
    ws = _core.Workspace(2, case.T, 64 * case.heads, 64, case.T, case.width, case.heads)
    kv = case.cache("f32", case.T)
    out = np.empty((case.T, case.heads * case.latent), np.float32)
    got = np.empty((case.T, case.heads * value), np.float32)
    q, absorbed = case.q.reshape(case.T, -1), case.absorbed.reshape(case.T, -1).copy()
    keys = case.keys.copy()
    _core.linear_heads(ws, q, k_b, case.heads, absorbed)
    _core.latent_attention(ws, case.layer(), q, absorbed, keys, 0, case.cos, case.sin, kv, out)
    _core.linear_heads(ws, out, v_b, case.heads, got)

    whole = case.q.astype(float)
    whole[:, :, case.nope :] = case.turned(whole[:, :, case.nope :])
    latents, turned = np.split(case.prepared()[1], [case.latent], 1)
    matrices = (rows_of(m).astype(float).reshape(case.heads, -1, m.cols) for m in (k_b, v_b))
    parts = (whole, latents, turned, *matrices, case.scale)
    expected = reference_latent.naive(*parts)
    np.testing.assert_allclose(reference_latent.absorbed(*parts), expected, atol=1e-10)
    error = got.reshape(expected.shape) - expected
    assert np.sqrt(np.square(error).mean() / np.square(expected).mean()) < 0.02  # 8 bits, twice
    assert (
        abs((got.reshape(expected.shape) * expected).sum() / np.square(expected).sum() - 1) < 2e-3
    )


# ---------------------------------------------------------------- bad input


def test_wrong_shapes_get_one_clear_line():
    case = Case(T=4)
    with pytest.raises(ValueError, match=r"value_dim: expected a multiple of 16 to 48, got 24"):
        _core.KvLayer.latents(type="f16", capacity=4, head_dim=48, value_dim=24)
    with pytest.raises(
        ValueError, match=r"even rope_dim and a latent_dim that is a multiple of 16, got 5 and 32"
    ):
        case.layer(rope_dim=5)
    with pytest.raises(ValueError, match=r"norm: expected shape \[32\], got \[31\]"):
        case.layer(norm=case.norm[:31])
    with pytest.raises(ValueError, match="LatentLayer grow_every"):
        case.layer(growth=0.1)
    with pytest.raises(ValueError, match=r"\[0, 4\) are outside the context of 3"):
        case.run("f16", [4], capacity=3)

    def other_cache(*args):
        kv = _core.KvLayer(key_type="f16", value_type="f16", num_heads=1, capacity=4, head_dim=48)
        _core.latent_attention(*args[:8], kv, args[9])

    with pytest.raises(ValueError, match="the KV cache is of another shape"):
        case.run("f16", [4], call=other_cache)
    ws, (_, w) = case.workspace(1, 4), matrix(48, 24, 0)
    x, out = np.zeros((2, 72), np.float32), np.zeros((2, 48), np.float32)
    _core.linear_heads(ws, x, w, 3, out)
    for heads, message in (
        (2, "expected a multiple of 16 rows for each head, got 48 for 2 heads"),
        (0, "linear_heads heads: "),
    ):
        with pytest.raises(ValueError, match=message):
            _core.linear_heads(ws, x, w, heads, out)
    with pytest.raises(
        ValueError, match="expected at least 24 columns for each of 3 heads, got 69"
    ):
        _core.linear_heads(ws, x[:, :69].copy(), w, 3, out)
    with pytest.raises(
        ValueError, match="expected at least 16 columns for each of 3 heads, got 45"
    ):
        _core.linear_heads(ws, x, w, 3, out[:, :45].copy())
