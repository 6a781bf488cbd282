"""Caches in 8 bits or fewer leave out large key biases, and attention adds them: as exact as without biases."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from tiny import tiny_checkpoint

import edgemoe
from edgemoe import _core
from edgemoe.convert.convert import convert
from edgemoe.model import KvTypes, kept_rope_bytes
from edgemoe.quant import plane_widths, quantize

Q8 = ("q8_0", "q8_0")


def nested(rows, cols, gain=1.0):
    """Returns a random matrix whose rows have about the length `gain`."""
    w = np.random.default_rng(1).standard_normal((rows, cols)) * gain / np.sqrt(cols)
    return _core.Nested.from_rungs(
        quantize(w.astype(np.float32), (8,)), rows, cols, plane_widths((8,))
    )


@dataclasses.dataclass
class Case:
    """Random projections of T positions, and biases to add, some of them large."""

    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 40
    window: int = 0
    T: int = 300
    large: tuple[int, ...] = (3, 17, 25)  # columns of each head's keys

    def __post_init__(self):
        rng = np.random.default_rng(self.T + self.head_dim)
        heads = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}
        self.x = {
            name: rng.standard_normal((self.T, n, self.head_dim)).astype(np.float32)
            for name, n in heads.items()
        }
        self.bias = {
            name: (0.3 * rng.standard_normal((n, self.head_dim))).astype(np.float32)
            for name, n in heads.items()
        }
        for h, c in np.ndindex(self.kv_heads, len(self.large)):
            self.bias["k"][h, self.large[c]] += 40 * (h + 1) * (-1) ** c
        self.bias["v"][:, 5] += 100
        self.frequencies = (1e4 ** -np.linspace(0, 1, self.head_dim // 2)).astype(np.float32)

    def turned(self, x):
        """Returns x [T, heads, head_dim] rotated by its positions; float32 as in kernels, if x is float32."""
        angles = (np.arange(self.T, dtype=np.float32)[:, None] * self.frequencies).astype(float)
        cos, sin = (
            f(angles).astype(np.float32)[:, None] * np.float32(1.5) for f in (np.cos, np.sin)
        )
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def constants(self):
        """Returns the biases that stored keys leave out, [kv_heads, head_dim]: those of pairs with a large bias."""
        out = self.bias["k"].astype(float)
        half = self.head_dim // 2
        length = np.hypot(out[:, :half], out[:, half:])
        return np.where(np.concatenate([length, length], 1) > 2, out, 0)

    def layer(self, **changes):
        rows = self.kv_heads * self.head_dim
        parts = {
            "index": 0, "num_heads": self.heads, "num_kv_heads": self.kv_heads, "head_dim": self.head_dim,
            "window": self.window, "scale": self.head_dim**-0.5,
            **{f"{n}_bias": b.reshape(-1) for n, b in self.bias.items()}, "q_norm": None, "k_norm": None,
            "norm_per_head": False, "norm_eps": 1e-6, "clip": 0.0, "k": nested(rows, 64),
            "input_norm": np.ones(64, np.float32),
        }  # fmt: skip
        return _core.AttentionLayer(**{**parts, **changes})

    def run(self, types, chunks, *, threads=2, capacity=None, ring=None, **changes):
        """Returns the outputs [T, heads, head_dim] and the cache."""
        capacity = capacity or self.T
        ws = _core.Workspace(threads, self.T, 64, 64, capacity, self.head_dim, self.heads)
        kv = _core.KvLayer(
            key_type=types[0], value_type=types[1], num_heads=self.kv_heads, capacity=ring or capacity,
            head_dim=self.head_dim,
        )  # fmt: skip
        rope = _core.Rope(self.frequencies, 1.5)
        rope.keep(capacity)
        layer = self.layer(**changes)
        out = np.empty((self.T, self.heads * self.head_dim), np.float32)
        pos = 0
        for n in chunks:
            rows = slice(pos, pos + n)
            q, k, v = (self.x[name][rows].reshape(n, -1).copy() for name in "qkv")
            cos, sin = np.empty((2, n, self.head_dim // 2), np.float32)
            rope.angles(pos, cos, sin)
            _core.attention(ws, layer, q, k, v, pos, cos, sin, rope, kv, out[rows])
            pos += n
        assert pos == self.T
        return out.reshape(self.T, self.heads, self.head_dim), kv

    def expected(self, types, constants):
        """Returns the outputs in float64, from stored keys and the biases they leave out, one query at a time."""
        left = constants if types[0].startswith("q") else np.zeros_like(constants)
        late = self.bias["v"] if types[1].startswith("q") else np.zeros_like(self.bias["v"])
        k = self.turned(self.x["k"] + (self.bias["k"] - left.astype(np.float32)))
        k = reference.as_stored(k, types[0])
        v = reference.as_stored(self.x["v"] + (self.bias["v"] - late), types[1]) + late
        q = self.turned(self.x["q"] + self.bias["q"])
        rounded = reference.as_stored(q, "f32" if types[0].startswith("f") else "q8_0")
        extra = self.turned(np.broadcast_to(left, self.x["k"].shape))
        out = np.empty(q.shape)
        for t, h in np.ndindex(self.T, self.heads):
            group = h * self.kv_heads // self.heads
            seen = slice(max(0, t + 1 - self.window) if self.window else 0, t + 1)
            scores = k[seen, group] @ rounded[t, h] + extra[seen, group] @ q[t, h].astype(float)
            scores *= self.head_dim**-0.5
            weights = np.exp(scores - scores.max())
            out[t, h] = weights @ v[seen, group] / weights.sum()
        return out


SHAPES = [
    Case(),
    Case(heads=9, kv_heads=3, head_dim=64, T=290, large=tuple(range(20, 44))),
    Case(heads=4, kv_heads=4, head_dim=18, window=7, T=60, large=(0, 9)),
    Case(heads=5, kv_heads=1, head_dim=32, window=100, T=420, large=(31,)),
]


@pytest.mark.parametrize(
    "types", [Q8, ("q8_0", "f16"), ("f16", "q8_0"), ("f32", "f32"), ("q4_0", "q4_0")], ids="-".join
)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_attention_is_what_numpy_says(case, types, isa):
    constants = case.constants()
    assert 2 * case.layer().num_constants == np.count_nonzero(constants)
    got, _ = case.run(types, [case.T])
    expected = case.expected(types, constants)
    if types[0] == "q4_0":  # rotated keys may be rounded the other way, by a wide step
        assert np.sqrt(np.square(got - expected).mean()) < 0.01 * expected.std()
    else:
        np.testing.assert_allclose(got, expected, atol=2e-4)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_chunks_threads_and_instruction_sets_do_not_change_a_bit(case, isa):
    expected, kv = case.run(Q8, [case.T])
    chunks = list(itertools.islice(itertools.cycle((1, 16, 5, 31)), 100))
    chunks = chunks[: np.searchsorted(np.cumsum(chunks), case.T)]
    chunks.append(case.T - sum(chunks))
    for given, threads, capacity in (([1] * case.T, 3, case.T), (chunks, 1, 900)):
        assert np.array_equal(case.run(Q8, given, threads=threads, capacity=capacity)[0], expected)
    _core.use_isa("scalar")
    again, same = case.run(Q8, [case.T])
    assert np.array_equal(again, expected)
    assert np.array_equal(same.content, kv.content)


def test_a_ring_that_is_written_over_does_not_change_a_bit(isa):
    case = Case(heads=2, kv_heads=1, head_dim=18, window=40, T=700, large=(1, 8))
    expected, _ = case.run(Q8, [case.T])
    chunks = [100, 1, 150, *[1] * 49, 200, 200]
    assert np.array_equal(case.run(Q8, chunks, ring=256)[0], expected)


def test_only_large_biases_of_plain_keys_are_left_out():
    case = Case(large=())
    case.bias["k"][:] = 0
    assert case.layer().num_constants == 0
    case.bias["k"][1, 7] = 1.9  # columns have a spread of about 1
    case.bias["k"][1, 8] = 2.1
    assert case.layer().num_constants == 1
    assert case.layer(k=nested(80, 64, gain=0.5)).num_constants == 2
    assert case.layer(input_norm=np.full(64, 2.0, np.float32)).num_constants == 0
    # A clip or norm after the bias makes it no constant any more.
    assert case.layer(clip=3.0).num_constants == 0
    assert case.layer(k_norm=np.ones(80, np.float32)).num_constants == 0
    assert case.layer(k=None).num_constants == 0


def test_float_caches_are_as_they_were():
    for types in itertools.product(("f16", "f32"), repeat=2):
        plain, cache = Case().run(types, [300], k=None)
        got, same = Case().run(types, [300])
        assert np.array_equal(got, plain)
        assert np.array_equal(same.content, cache.content)


def test_positions_that_are_not_kept_are_refused():
    case = Case(T=4)
    rope, layer = _core.Rope(case.frequencies, 1.5), case.layer()
    ws = _core.Workspace(1, 4, 64, 64, 4, case.head_dim, case.heads)
    kv = _core.KvLayer(key_type="q8_0", value_type="f16", num_heads=2, capacity=4, head_dim=40)
    q, k, v = (case.x[name].reshape(4, -1).copy() for name in "qkv")
    cos, sin = np.empty((2, 4, 20), np.float32)
    unseen = _core.Rope(case.frequencies, 1.5)
    unseen.keep(8)
    for given in (None, rope, unseen):
        with pytest.raises(ValueError, match="need a Rope that keeps positions"):
            _core.attention(ws, layer, q, k, v, 0, cos, sin, given, kv, q.copy())
    with pytest.raises(ValueError, match=r"\[5, 9\) are outside the 8 that are kept"):
        unseen.angles(5, cos, sin)
    with pytest.raises(ValueError, match="expected positions from 1, got 0"):
        unseen.keep(0)
    other = _core.Rope(np.ones(4, np.float32), 1.0)
    with pytest.raises(ValueError, match="of another head"):
        _core.attention(ws, layer, q, k, v, 0, cos, sin, other, kv, q.copy())


# ---------------------------------------------------------------- in the engine


def biased(path: Path, bias: float, **config: Any) -> Path:
    """Returns a model with a bias in one key channel of every head."""
    source = tiny_checkpoint(experts=2)
    source.config = {**source.config, **config}
    for layer in range(2):
        source.tensor(f"model.layers.{layer}.self_attn.k_proj.bias").reshape(2, 24)[:, 9] = bias
    convert(source, path)
    return path


def divergence(got, expected):
    """Returns the mean KL divergence of the predictions."""
    p, q = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (expected, got))
    return float((np.exp(p) * (p - q)).sum(1).mean())


@pytest.mark.parametrize("bias", [0, 100, 400])
def test_a_large_bias_costs_nothing(bias, tmp_path):
    path = biased(tmp_path / "x.moe", bias)
    ids = np.random.default_rng(2).integers(0, 256, 280)
    results = {}
    for kind in ("f32", "q8_0"):
        with edgemoe.load(path, cache_type_k=kind) as engine:
            results[kind] = engine.logits(ids)
    assert divergence(results["q8_0"], results["f32"]) < 1e-3


def test_they_are_turned_by_the_frequencies_of_the_sequence_s_length(tmp_path):
    scaling = {
        "rope_type": "longrope", "original_max_position_embeddings": 64, "factor": 8.0,
        "short_factor": [1.0 + i / 10 for i in range(12)], "long_factor": [3.0 + i for i in range(12)],
    }  # fmt: skip
    path = biased(tmp_path / "x.moe", 400, rope_scaling=scaling)
    ids = np.random.default_rng(2).integers(0, 256, 100)
    with edgemoe.load(path, cache_type_k="q8_0") as engine:
        whole = {n: engine.logits(ids[:n])[-1:] for n in (64, 65, 100)}
        engine.logits(ids[:60])
        for n in range(61, 101):
            got = engine.extend(ids[n - 1 : n])
            assert n not in whole or np.array_equal(got, whole[n])
    with edgemoe.load(path, cache_type_k="f32") as engine:
        for n, got in whole.items():
            assert divergence(got, engine.logits(ids[:n])[-1:]) < 1e-2


def test_the_budget_knows_of_kept_positions(tmp_path):
    with edgemoe.load(biased(tmp_path / "x.moe", 100)) as engine:
        config = engine.config
    kept = kept_rope_bytes(config, 512, KvTypes("q8_0", "f16"))
    mixer = dataclasses.replace(config.mixers[0], qkv_bias=False)
    without = dataclasses.replace(config, mixers=(mixer,))
    assert kept == 512 * 4 * config.mixers[0].head_dim
    for changed, types in (
        (config, KvTypes("f16", "q8_0")),
        (without, KvTypes("q8_0")),
    ):
        assert kept_rope_bytes(changed, 512, types) == 0
