"""Every family, as `convert` maps it, computes what transformers computes; other models are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import reference
import torch
from safetensors.torch import load_file, save_file

from edgemoe.config import dense_tensors
from edgemoe.convert.families import FAMILIES
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.convert.settings import Settings
from edgemoe.convert.source import SourceModel
from edgemoe.errors import FormatError


def open_model(path: Path) -> SourceModel:
    return SourceModel(HFCheckpoint(path))


def assert_same_function(path: Path) -> None:
    """Checks that a checkpoint, read by our code and run by the reference, computes what transformers computes."""
    ids = families.random_ids(24)
    expected, expected_chosen = families.oracle(path, ids)
    model = open_model(path)
    tensors = {name: model.tensor(name) for name in dense_tensors(model.config)}
    got, chosen = reference.logits(model.config, tensors, model.expert, ids)
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
    # Compared in order, as layers have other numbers in families whose mixers and FFNs are separate layers.
    for mine, theirs in zip(chosen.values(), expected_chosen.values(), strict=True):
        np.testing.assert_array_equal(np.sort(mine), theirs)


@pytest.mark.parametrize("name", families.SETTINGS)
def test_maps_exactly(name: str, tmp_path: Path) -> None:
    path = families.make(name, tmp_path)
    assert_same_function(path)
    model = open_model(path)
    for tensor, spec in dense_tensors(model.config).items():
        values = model.tensor(tensor)
        assert values.dtype == np.float32
        assert values.shape == spec.shape
        assert values.flags.c_contiguous


@pytest.mark.parametrize(
    "name",
    [
        "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "granitemoeshared", "qwen3_next",
        "qwen3_5_moe",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "save",
    [
        {"max_shard_size": "40KB"},
        {"save_original_format": False},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
    ],
    ids=["sharded", "fused", "bf16", "f16"],
)
def test_maps_every_way_to_save(name: str, save: dict[str, Any], tmp_path: Path) -> None:
    assert_same_function(families.make(name, tmp_path, **save))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint per family, not to be changed."""
    return {
        name: families.make(name, tmp_path_factory.mktemp(name))
        for name in (
            "mixtral",
            "qwen2_moe",
            "qwen2_moe-window",
            "qwen3_moe",
            "olmoe",
            "granitemoe",
            "qwen3_next",
        )
    }


@pytest.fixture
def edited(
    checkpoints: dict[str, Path], tmp_path: Path
) -> Callable[[str, dict[str, Any]], HFCheckpoint]:
    """Returns a function that opens a checkpoint with keys of config.json set, or dropped where they are `...`."""

    def edit(name: str, changes: dict[str, Any]) -> HFCheckpoint:
        source = checkpoints[name]
        config = json.loads((source / "config.json").read_text()) | changes
        kept = {key: value for key, value in config.items() if value is not ...}
        (tmp_path / "config.json").write_text(json.dumps(kept))
        (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
        shutil.copy(source / "generation_config.json", tmp_path)
        return HFCheckpoint(tmp_path)

    return edit


def test_reads_configs_from_before_transformers_5(edited) -> None:
    checkpoint = edited(
        "qwen3_moe",
        {
            "rope_parameters": ...,
            "rope_theta": 123.0,
            "rope_scaling": {"type": "linear", "factor": 4.0},
            "num_local_experts": ...,
            "num_experts": 8,
        },
    )
    model = SourceModel(checkpoint)
    assert model.config.num_experts == 8
    expected = 123.0 ** -(np.arange(0, 24, 2) / 24) / 4
    np.testing.assert_allclose(model.tensor("rope"), expected, rtol=1e-6)


@pytest.mark.parametrize(("family", "theta"), [("mixtral", 1e6), ("olmoe", 1e4)])
def test_missing_rope_theta_is_the_family_default(family: str, theta: float, edited) -> None:
    model = SourceModel(edited(family, {"rope_parameters": ...}))
    assert model.tensor("rope")[1] == pytest.approx(theta ** (-2 / model.config.mixers[0].head_dim))


def test_eos_comes_from_generation_config_first(edited, checkpoints: dict[str, Path]) -> None:
    checkpoint = edited("mixtral", {"eos_token_id": 7})
    assert SourceModel(checkpoint).config.eos_ids == (2,)
    for content, ids in (
        (b'{"eos_token_id": [3, 4]}', (3, 4)),
        (b'{"eos_token_id": null}', (7,)),
        (b"{}", (7,)),
    ):
        checkpoint.files = {"generation_config.json": content}
        assert SourceModel(checkpoint).config.eos_ids == ids
    checkpoint.files = {}
    assert SourceModel(checkpoint).config.eos_ids == (7,)
    for broken in (b"{", b"[" * 100_000):
        checkpoint.files = {"generation_config.json": broken}
        with pytest.raises(FormatError, match=r"generation_config\.json: not valid JSON"):
            SourceModel(checkpoint)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mixtral", {"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ("mixtral", {"model_type": ...}, "model_type None is not supported"),
        (
            "mixtral",
            {"model_type": ["mixtral"]},
            "is not supported; supported: bailing_hybrid, bailing_moe, bailing_moe_v2, deepseek_v2",
        ),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported"),
        ("mixtral", {"hidden_size": ...}, "hidden_size: is missing"),
        ("mixtral", {"hidden_size": "64"}, "hidden_size: expected a whole number from 1, got '64'"),
        ("mixtral", {"hidden_size": 1}, "head_dim: expected a whole number from 1, got 0"),
        ("mixtral", {"num_attention_heads": 0}, "num_attention_heads: expected a whole number"),
        ("mixtral", {"num_hidden_layers": 10**9}, "num_hidden_layers: at most 4096"),
        ("mixtral", {"num_hidden_layers": 4000}, "describes 4000 layers with 8 experts, but"),
        ("mixtral", {"num_local_experts": 10**6}, "2 layers of 1000000 experts are too many"),
        ("mixtral", {"num_local_experts": 60000}, "with 60000 experts, but there are only"),
        ("mixtral", {"num_hidden_layers": 3}, "missing tensors model.layers.2.block_sparse_moe."),
        ("mixtral", {"num_hidden_layers": 1}, "not part of a model of family mixtral: tensors"),
        ("mixtral", {"num_local_experts": 7}, "gate.weight: expected shape [7, 64], got [8, 64]"),
        ("mixtral", {"num_experts_per_tok": 9}, "experts_per_token 9 exceeds num_experts 8"),
        ("mixtral", {"vocab_size": 161}, "embed_tokens.weight: expected shape [161, 64], got"),
        ("mixtral", {"tie_word_embeddings": True}, "lm_head.weight: differs from model.embed"),
        ("mixtral", {"tie_word_embeddings": 1}, "tie_word_embeddings: expected true or false"),
        ("mixtral", {"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a finite number"),
        ("mixtral", {"sliding_window": -1}, "sliding_window: expected a whole number from 0"),
        ("mixtral", {"eos_token_id": 5, "vocab_size": 10**9}, "vocab_size must be a whole number"),
        ("qwen2_moe", {"mlp_only_layers": [0, 1]}, "no layer has routed experts"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, "missing tensors model.layers.0.mlp.down_proj"),
        ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step: expected a whole number"),
        ("qwen2_moe", {"qkv_bias": False}, "not part of a model of family qwen2_moe: tensors"),
        ("qwen2_moe", {"layer_types": ["full_attention"]}, "layer_types: expected a list of 2"),
        ("qwen2_moe", {"layer_types": ["full_attention", "mamba"]}, "'mamba' is not supported"),
        ("qwen2_moe", {"layer_types": ["sliding_attention"] * 2}, "sliding_window: is missing"),
        ("qwen2_moe-window", {"sliding_window": None}, "sliding_window: is missing"),
        ("qwen3_moe", {"head_dim": 20}, "q_proj.weight: expected shape [80, 64], got [96"),
        ("qwen3_moe", {"attention_bias": True}, "missing tensors model.layers.0.self_attn.k_proj"),
        ("olmoe", {"clip_qkv": -1.0}, "clip must be positive"),
        ("olmoe", {"clip_qkv": "8"}, "clip_qkv: expected a finite number, got '8'"),
        ("olmoe", {"sliding_window": 8}, "sliding_window: is not supported for OLMoE"),
        ("granitemoe", {"logits_scaling": 0}, "logits_divisor must be a positive number"),
        ("granitemoe", {"embedding_multiplier": "12"}, "embedding_multiplier: expected a finite"),
    ],
)
def test_refuses_what_it_cannot_map(family: str, changes, message: str, edited) -> None:
    checkpoint = edited(family, changes)
    with pytest.raises(FormatError) as error:
        SourceModel(checkpoint)
    text = str(error.value)
    assert message in text, text
    assert text.startswith(f"{checkpoint.name}: ")
    assert "\n" not in text


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("granitemoehybrid", {"mamba_proj_bias": True}, "mamba_proj_bias: true is not supported"),
        ("lfm2_moe", {"conv_bias": True}, "conv_bias: true is not supported"),
        ("nemotron_h", {"mlp_bias": True}, "mlp_bias: true is not supported"),
        ("minimax_m2", {"scoring_func": "x" * 999}, "x{80,90}[.]{3}x{20,30}' is not supported"),
    ],
)
def test_a_value_that_is_refused_is_quoted_as_config_json_has_it(family, changes, message) -> None:
    with pytest.raises(FormatError, match=message):
        FAMILIES[family].config(
            Settings({"rms_norm_eps": 1e-6} | families._BASE | families.SETTINGS[family] | changes)
        )


def test_unsupported_family_lists_the_supported(edited) -> None:
    with pytest.raises(FormatError) as error:
        SourceModel(edited("mixtral", {"model_type": "dbrx"}))
    assert all(name in str(error.value) for name in ("dbrx", *FAMILIES))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "missing tensor model.norm.weight"),
        (
            lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight"),
            "missing tensor model.layers.1.mlp.experts.3.up_proj.weight",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.sinks": torch.ones(4)}),
            "not part of a model of family olmoe: tensor model.layers.0.self_attn.sinks",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(63)}),
            "model.norm.weight: expected shape [64], got [63]",
        ),
    ],
    ids=["missing", "missing-expert", "extra", "shape"],
)
def test_refuses_other_tensors(
    edit, message: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    tensors = load_file(checkpoints["olmoe"] / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").symlink_to(checkpoints["olmoe"] / "config.json")
    with pytest.raises(FormatError) as error:
        open_model(tmp_path)
    assert message in str(error.value)


def test_a_floor_of_the_sum_of_gates_is_refused(tmp_path: Path) -> None:
    """llama.cpp has one for all models; ERNIE's config.json can ask for one."""
    path = families.make("ernie4_5_moe", tmp_path) / "config.json"
    config = json.loads(path.read_text())
    assert config["moe_norm_min"] == 1e-12
    path.write_text(json.dumps(config | {"moe_norm_min": 2.0**-14}))
    with pytest.raises(FormatError, match="moe_norm_min: expected at most 1e-12, got 6.1"):
        open_model(tmp_path)


def test_what_several_tensors_are_made_of_is_named_once(tmp_path: Path) -> None:
    path = families.make("glm4_moe_lite", tmp_path) / "model.safetensors"
    tensors = load_file(path)
    gone = "model.layers.0.self_attn.kv_b_proj.weight"
    del tensors[gone]
    save_file(tensors, path)
    with pytest.raises(FormatError, match=f"missing tensor {gone}$"):
        open_model(tmp_path)


def test_accepts_harmless_extra_tensors(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(checkpoints["olmoe"] / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((checkpoints["olmoe"] / "config.json").read_text())
    config["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_model(tmp_path).config.tied


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_weights_that_are_not_finite(
    value: float, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    tensors = load_file(checkpoints["olmoe"] / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[name][5, 5] = value
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").symlink_to(checkpoints["olmoe"] / "config.json")
    model = open_model(tmp_path)
    model.expert(1, 2)
    with pytest.raises(FormatError, match=f"{name}: holds NaN or infinity"):
        model.expert(1, 3)


def test_layers_that_predict_several_tokens_are_left_out_in_words(tmp_path: Path) -> None:
    path = families.make("glm4_moe", tmp_path)
    tensors = load_file(path / "model.safetensors")
    more = {
        name.replace("layers.2.", "layers.3."): t.clone()
        for name, t in tensors.items()
        if ".layers.2." in name
    }
    save_file({**tensors, **more}, path / "model.safetensors", {"format": "pt"})
    model = open_model(path)
    assert model.notes == (f"left out: layers that predict several tokens ({len(more)} tensors)",)
    assert_same_function(path)


def test_experts_are_chosen_with_the_bias_and_weighed_without_it(tmp_path: Path) -> None:
    """The trap of sigmoid routers: even a bias that decides the choice alone must leave the gates as they are."""
    path = families.make("glm4_moe", tmp_path)
    tensors = load_file(path / "model.safetensors")
    for name, t in tensors.items():
        if name.endswith("e_score_correction_bias"):
            t[:] = torch.tensor([9.0, 0, 9, 0, 0, 9, 0, 0])
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    assert_same_function(path)
    _, chosen = families.oracle(path, families.random_ids(8))
    assert all((rows == [0, 2, 5]).all() for rows in chosen.values())


def test_the_text_of_a_model_that_sees_too_is_read_and_the_rest_is_left_out_in_words(
    tmp_path: Path,
) -> None:
    path = families.make("qwen3_5_moe", tmp_path / "text")
    config = json.loads((path / "config.json").read_text())
    tensors = {
        name.replace("model.", "model.language_model.", 1): t
        for name, t in load_file(path / "model.safetensors").items()
    }
    others = {
        "model.visual.patch_embed.proj.weight": torch.ones(4, 3),
        "mtp.layers.0.mlp.gate.weight": torch.ones(8, 64),
        "mtp.norm.weight": torch.ones(64),
    }
    (whole := tmp_path / "whole").mkdir()
    save_file({**tensors, **others}, whole / "model.safetensors")
    (whole / "config.json").write_text(
        json.dumps(
            {"model_type": "qwen3_5_moe", "text_config": config, "tie_word_embeddings": False}
        )
    )
    model, plain = open_model(whole), open_model(path)
    assert model.config == plain.config
    assert sorted(model.notes) == [
        "left out: layers that predict several tokens (2 tensors)",
        "left out: the vision tower (1 tensors)",
    ]
    for name in dense_tensors(model.config):
        np.testing.assert_array_equal(model.tensor(name), plain.tensor(name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear_num_key_heads": 4}, "in_proj_qkvz.weight: a tensor of shape [224, 64] does not"),
        ({"linear_conv_kernel_dim": 3}, "conv1d.weight: a tensor of shape [160, 4] does not make"),
        ({"num_attention_heads": 8}, "q_proj.weight: a tensor of shape [192, 64] does not make"),
        ({"attn_output_gate": False}, "attn_output_gate: false is not supported"),
        ({"attention_bias": True}, "attention_bias: true is not supported"),
        ({"layer_types": ["linear_attention"] * 2}, "layer_types: expected a list of 3 names"),
        ({"layer_types": ["mamba"] * 3}, "layer_types: 'mamba' is not supported"),
        ({"linear_value_head_dim": 24}, "value_dim must be a multiple of 16, got 24"),
        ({"linear_num_value_heads": ...}, "linear_num_value_heads: is missing"),
    ],
)
def test_refuses_what_a_folded_tensor_cannot_make(
    changes: dict[str, Any], message: str, edited
) -> None:
    with pytest.raises(FormatError) as error:
        SourceModel(edited("qwen3_next", changes))
    assert message in str(error.value), error.value


def test_a_layer_is_attention_by_its_interval_where_no_list_says_so(edited) -> None:
    checkpoint = edited("qwen3_next", {"layer_types": ..., "full_attention_interval": 2})
    assert SourceModel(checkpoint).config.layer_mixers == (0, 1, 0)
