"""Layers whose attention differs in more than its window: in heads, in RoPE frequencies, or in having no RoPE."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import reference
from decoded import Decoded

import edgemoe
from edgemoe.config import ModelConfig, dense_tensors
from edgemoe.errors import FormatError
from edgemoe.file.writer import Writer
from edgemoe.specs import AttentionSpec, RopeSpec

GLOBAL = AttentionSpec(
    num_heads=4, num_kv_heads=2, head_dim=24, scale=0.2, rope=RopeSpec(dim=24, scale=1.1)
)
LOCAL = AttentionSpec(
    num_heads=6, num_kv_heads=3, head_dim=16, scale=0.25, window=5, qk_norm="head",
    rope=RopeSpec(name="rope_local", dim=8),
)  # fmt: skip
NOWHERE = AttentionSpec(
    num_heads=2, num_kv_heads=1, head_dim=32, scale=0.18, rope=None, o_bias=True
)
SIZES = {
    "family": "mixed", "vocab_size": 80, "hidden_size": 64, "num_layers": 4, "context_length": 64,
    "norm_eps": 1e-5, "tied": True, "num_experts": 4, "experts_per_token": 2, "expert_hidden": 32,
    "moe_layers": (0, 1, 2, 3),
}  # fmt: skip
CONFIG = ModelConfig(**SIZES, mixers=(GLOBAL, LOCAL, NOWHERE), layer_mixers=(0, 1, 2, 1))
IDS = np.random.default_rng(3).integers(0, 80, 24).tolist()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    rng = np.random.default_rng(5)
    path = tmp_path_factory.mktemp("mixed") / "mixed.moe"
    with Writer(path, CONFIG, sections={}, source={}) as writer:
        for name, spec in dense_tensors(CONFIG).items():
            value = rng.standard_normal(spec.shape).astype(np.float32) * 0.15
            if name.startswith("rope"):
                value = (100.0 ** -np.linspace(0, 1, spec.shape[0])).astype(np.float32)
            elif "norm" in name:
                value = 1 + value
            writer.add(name, value)
        for layer in range(4):
            for e in range(4):
                shapes = ((32, 64), (32, 64), (64, 32))
                parts = [rng.standard_normal(s).astype(np.float32) * 0.2 for s in shapes]
                writer.add_expert(layer, e, *parts)
        writer.finish()
    return path


def test_each_layer_s_attention_is_its_own(mixed):
    decoded = Decoded(mixed)
    with edgemoe.load(mixed, cache_type_k="f32", cache_type_v="f32") as engine:
        assert engine.config == CONFIG
        got = engine.logits(IDS)

    def error(*mixers: AttentionSpec) -> float:
        config = dataclasses.replace(CONFIG, mixers=mixers)
        true, _ = reference.logits(config, decoded.tensors, decoded.expert, IDS)
        return float(np.median(np.abs(got - true).max(1) / true.std()))

    assert error(GLOBAL, LOCAL, NOWHERE) < 0.08  # inputs are rounded to 8 bits
    for wrong in (
        (dataclasses.replace(GLOBAL, rope=RopeSpec(dim=24)), LOCAL, NOWHERE),
        (dataclasses.replace(GLOBAL, rope=LOCAL.rope), LOCAL, NOWHERE),
        (GLOBAL, dataclasses.replace(LOCAL, window=0), NOWHERE),
        (GLOBAL, LOCAL, dataclasses.replace(NOWHERE, rope=GLOBAL.rope)),
    ):
        assert error(*wrong) > 0.3


def test_chunks_and_threads_do_not_matter(mixed):
    with edgemoe.load(mixed, threads=1) as engine:
        whole = engine.logits(IDS).copy()
        engine.logits(IDS[:1])
        for ids in IDS[1:9], IDS[9:10], IDS[10:]:
            part = engine.extend(ids).copy()
        assert np.array_equal(part[-1], whole[-1])
    with edgemoe.load(mixed, threads=3) as engine:
        assert np.array_equal(engine.logits(IDS), whole)


def test_every_layer_has_one_of_the_mixers():
    for mixers, layers in (
        ((GLOBAL, LOCAL), (0, 0, 0, 0)),
        ((GLOBAL,), (0, 0, 0)),
        ((GLOBAL, LOCAL), (1, 0, 0, 0)),
        ((GLOBAL, GLOBAL), (0, 1, 0, 1)),
        ((GLOBAL, LOCAL), (0, 1, 2, 0)),
    ):
        with pytest.raises(FormatError, match="layer_mixers must say"):
            ModelConfig(**SIZES, mixers=mixers, layer_mixers=layers)


def test_a_name_is_of_one_table():
    other = AttentionSpec(
        num_heads=4, num_kv_heads=2, head_dim=24, scale=0.2, rope=RopeSpec(dim=12)
    )
    with pytest.raises(FormatError, match="two kinds of RoPE have the name rope"):
        ModelConfig(**SIZES, mixers=(GLOBAL, other), layer_mixers=(0, 1, 0, 1))
