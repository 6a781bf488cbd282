"""The traps of Llama 4 and Phi-3.5-MoE, with a test for each."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import families
import numpy as np
import pytest
import reference
from safetensors.torch import load_file
from test_families import assert_same_function, open_model

from edgemoe.config import dense_tensors
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.convert.source import SourceModel
from edgemoe.errors import FormatError
from edgemoe.ops import OpsShape
from edgemoe.ops.cpu import CpuOps


@pytest.fixture
def edited(tmp_path: Path):
    """Returns a function that makes a checkpoint and then changes its config.json."""

    def edit(name: str, changes: dict[str, object]) -> HFCheckpoint:
        checkpoint = HFCheckpoint(families.make(name, tmp_path / name))
        checkpoint.config = {**checkpoint.config, **changes}
        return checkpoint

    return edit


def test_the_gate_of_llama_4_weighs_what_its_expert_gets(tmp_path: Path) -> None:
    path = families.make("llama4_text", tmp_path)
    assert_same_function(path)
    model = open_model(path)
    tensors = {name: model.tensor(name) for name in dense_tensors(model.config)}
    ids = families.random_ids(24)
    right, _ = reference.logits(model.config, tensors, model.expert, ids)
    config = dataclasses.replace(model.config, gate_input=False)
    wrong, _ = reference.logits(config, tensors, model.expert, ids)
    assert np.abs(right - wrong).max() > 0.1


def test_layers_without_positions_grow_and_the_others_see_their_chunk(tmp_path: Path) -> None:
    mixers = open_model(families.make("llama4_text", tmp_path)).config.mixer_by_layer
    assert [(m.rope is None, m.chunk, m.growth, m.qk_norm) for m in mixers] == [
        *[(False, 8, 0.0, "unit")] * 3,
        (True, 0, 0.5, "none"),
    ]
    assert all(m.norm_after_rope == (m.rope is not None) for m in mixers)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama4_text", {"num_experts_per_tok": 2}, "gates of inputs are not supported for 2 exp"),
        ("llama4_text", {"no_rope_layers": [1, 0]}, "no_rope_layers: expected a list of 4 numbers"),
        ("llama4_text", {"attn_temperature_tuning": "x"}, "expected true or false, got 'x'"),
        ("llama4_text", {"layer_types": ["mamba"] * 4}, "layer_types: 'mamba' is not supported"),
        ("phimoe", {"router_jitter_noise": 0.1}, "router_jitter_noise: expected 0.01 for this"),
        ("phimoe", {"num_experts_per_tok": 3}, "num_experts_per_tok: expected 2 for this family"),
        ("phimoe", {"tie_word_embeddings": True}, "tie_word_embeddings: true is not supported"),
        ("phimoe", {"num_hidden_layers": 3}, "missing tensors model.layers.2."),
        ("phimoe", {"num_hidden_layers": 1}, "not part of a model of family phimoe: tensors"),
        ("phimoe", {"attention_bias": False}, "not part of a model of family phimoe: tensor"),
    ],
)
def test_refuses_what_llama_4_and_phi_do_not_do_here(
    name: str, changes: dict[str, object], message: str, edited
) -> None:
    with pytest.raises(FormatError) as error:
        SourceModel(edited(name, changes))
    assert message in str(error.value), error.value


def test_phi_takes_one_factor_for_cosines_and_refuses_two(edited) -> None:
    model = SourceModel(edited("phimoe", {}))
    rope = model.config.mixers[0].rope
    assert (rope.scale, rope.short_length) == (1.2, 32)
    parameters = {**edited("phimoe", {}).config["rope_parameters"], "long_mscale": 1.3}
    with pytest.raises(FormatError, match=r"long_mscale: expected 1\.2, as short_mscale, got 1\.3"):
        SourceModel(edited("phimoe", {"rope_parameters": parameters}))


def test_a_residual_without_a_mean_makes_layer_norms_rms_norms(tmp_path: Path) -> None:
    path = families.make("phimoe", tmp_path)
    model = open_model(path)
    assert abs(model.tensor("embed").mean(1)).max() < 1e-7
    assert abs(model.tensor("layers.1.o").mean(0)).max() < 1e-7
    assert abs(model.expert(1, 3)[2].mean(0)).max() < 1e-7
    stored = load_file(path / "model.safetensors")
    place = "model.layers.1.block_sparse_moe.experts.3."
    bias = stored["model.layers.1.post_attention_layernorm.bias"].numpy()
    expected = stored[f"{place}w3.weight"].numpy() @ bias
    np.testing.assert_allclose(model.tensor("layers.1.expert_bias.up")[3], expected, atol=1e-6)


def test_sparsemixer_shares_among_those_near_and_leaves_out_the_first(tmp_path: Path) -> None:
    """By hand: 0.99 is near 1.00, 0.96 is not, nor is it near 0.99."""
    config = open_model(families.make("phimoe", tmp_path)).config
    z = np.array([0.96, 1.0, 0.9, 0.99, 0.5, -1.0, 0.0, 0.3], np.float32)
    (chosen,), (gates,) = reference.route(config, z[None].astype(np.float64))
    assert chosen.tolist() == [1, 3]
    assert gates.tolist() == pytest.approx([1 / (1 + np.exp(-0.01)), 1])
    ops = CpuOps(OpsShape.of(config, 1))
    rule, scores = ops.route_rule(config.router), z[None].copy()
    ids, shares = np.empty((1, 2), np.int32), np.empty((1, 2), np.float32)
    ops.choose_by(None, None, rule, scores, ids, shares)
    assert ids.tolist() == [[1, 3]]
    np.testing.assert_allclose(shares[0], gates, rtol=1e-5)
    np.testing.assert_allclose(scores.sum(), 1, rtol=1e-5)
