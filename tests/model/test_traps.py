"""What other runtimes got wrong for months, with a test for each: gpt-oss, Gemma 4, Laguna, Qwen3-VL, Ling."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import families
import numpy as np
import pytest
import reference
import torch
import transformers
from gpt_oss import release
from safetensors.torch import load_file, save_file
from test_families import assert_same_function, open_model

import edgemoe
from edgemoe.config import dense_tensors
from edgemoe.convert.convert import convert
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.errors import FormatError
from edgemoe.runtime.budget import Budget


def changed(path: Path, change) -> Path:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def logits(path: Path, **switches):
    """Returns the reference's logits, with some switches of attention changed."""
    model = open_model(path)
    tensors = {name: model.tensor(name) for name in dense_tensors(model.config)}
    mixers = tuple(dataclasses.replace(m, **switches) for m in model.config.mixers)
    config = dataclasses.replace(model.config, mixers=mixers)
    return reference.logits(config, tensors, model.expert, families.random_ids(24))[0]


def test_sinks_are_in_sliding_and_full_layers_alike(tmp_path: Path) -> None:
    path = families.make("gpt_oss", tmp_path)
    windows = [m.window for m in open_model(path).config.mixer_by_layer]
    assert windows == [8, 0, 8, 0]
    for layers in ((0, 2), (1, 3)):

        def only(tensors, layers=layers):
            for name, t in tensors.items():
                if name.endswith("sinks"):
                    t[:] = 2.0 if int(name.split(".")[2]) in layers else -1e4

        assert_same_function(changed(path, only))
        assert np.abs(logits(path) - logits(path, sinks=False)).max() > 0.1


def test_a_window_holds_the_token_itself(tmp_path: Path) -> None:
    path = families.make("gpt_oss", tmp_path)
    assert_same_function(path)  # 24 tokens, windows of 8
    mixers = open_model(path).config.mixers
    assert {m.window for m in mixers} == {0, 8}
    for window in (7, 9):
        wrong = [dataclasses.replace(m, window=m.window and window) for m in mixers]
        model = open_model(path)
        tensors = {name: model.tensor(name) for name in dense_tensors(model.config)}
        config = dataclasses.replace(model.config, mixers=tuple(wrong))
        got, _ = reference.logits(config, tensors, model.expert, families.random_ids(24))
        assert np.abs(got - logits(path)).max() > 0.1


def test_gates_and_ups_are_clamped_before_they_are_multiplied(tmp_path: Path) -> None:
    def larger(tensors):
        for name, t in tensors.items():
            if name.endswith("gate_up_proj"):
                t *= 8

    assert_same_function(changed(families.make("gpt_oss", tmp_path), larger))


def test_the_bias_of_down_is_weighed_as_its_expert_is(tmp_path: Path) -> None:
    def larger(tensors):
        for name, t in tensors.items():
            if name.endswith("down_proj_bias"):
                t *= 10

    assert_same_function(changed(families.make("gpt_oss", tmp_path), larger))


def test_the_range_of_yarn_is_rounded_only_if_config_json_says_so(tmp_path: Path) -> None:
    exact, rounded = (
        open_model(families.make(name, tmp_path / name)).tensor("rope")
        for name in ("gpt_oss", "gpt_oss-truncate")
    )
    assert np.abs(exact - rounded).max() > 1e-3


def test_gpt_oss_as_released_in_mxfp4_is_its_decoded_weights(tmp_path: Path) -> None:
    path = families.make("gpt_oss", tmp_path / "a", dtype=torch.bfloat16)
    decoded = release(tmp_path / "b")
    changed(path, lambda tensors: tensors.update(decoded))
    assert_same_function(path)
    expected, got = open_model(path), open_model(tmp_path / "b")
    for name in dense_tensors(expected.config):
        np.testing.assert_array_equal(got.tensor(name), expected.tensor(name), err_msg=name)
    for ours, theirs in zip(got.expert(2, 5), expected.expert(2, 5), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("swiglu_limit", 5.0, "swiglu_limit: expected 7 for this family, got 5"),
        ("swiglu_alpha", 1.0, "swiglu_alpha: expected 1.702 for this family, got 1"),
        ("hidden_act", "gelu", "hidden_act: 'gelu' is not supported; supported: silu"),
        ("layer_types", ["full_attention"] * 3, "layer_types: expected a list of 4 names"),
    ],
)
def test_values_that_gpt_oss_does_not_have_are_named(key, value, message, tmp_path: Path) -> None:
    path = families.make("gpt_oss", tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(FormatError, match=message):
        open_model(path)


def test_the_full_layers_of_gemma_have_sizes_of_their_own_and_no_values(tmp_path: Path) -> None:
    path = families.make("gemma4_text", tmp_path)
    config = open_model(path).config
    sliding, full = (config.mixer(i) for i in (0, 5))
    assert config.layer_mixers == (0, 0, 0, 0, 0, 1)
    assert (sliding.head_dim, sliding.num_kv_heads, sliding.window) == (16, 2, 8)
    assert (full.head_dim, full.num_kv_heads, full.window) == (32, 1, 0)
    assert "layers.5.v" not in dense_tensors(config)
    assert sliding.scale == full.scale == 1.0
    # In released files the sizes have keys of their own.
    said = json.loads((path / "config.json").read_text())
    del said["per_layer_config"]
    released = {**said, "global_head_dim": 32, "num_global_key_value_heads": 1}
    (path / "config.json").write_text(json.dumps(released))
    assert open_model(path).config == config
    assert np.abs(logits(path) - logits(path, v_norm=False)).max() > 0.1


def test_a_quarter_of_the_pairs_of_all_columns_turns(tmp_path: Path) -> None:
    model = open_model(families.make("gemma4_text", tmp_path))
    expected = 1e6 ** -(np.arange(0, 32, 2) / 32) * (np.arange(16) < 4)
    np.testing.assert_allclose(model.tensor("rope_full"), expected, rtol=1e-6)
    np.testing.assert_allclose(model.tensor("rope"), 1e4 ** -(np.arange(0, 16, 2) / 16), rtol=1e-6)


def test_scales_of_layers_experts_and_routers_are_folded(tmp_path: Path) -> None:
    def wide(tensors):
        generator = torch.Generator().manual_seed(3)
        for name, t in tensors.items():
            if name.endswith(("layer_scalar", "per_expert_scale", "router.scale")):
                t[:] = 0.2 + 2 * torch.rand(t.shape, generator=generator)

    path = changed(families.make("gemma4_text", tmp_path), wide)
    assert_same_function(path)
    stored, model = load_file(path / "model.safetensors"), open_model(path)
    layer = "model.layers.3."
    scale = stored[layer + "router.per_expert_scale"][5] * stored[layer + "experts.down_proj"][5]
    np.testing.assert_array_equal(model.expert(3, 5)[2], scale.numpy())


def test_the_soft_cap_bounds_the_logits(tmp_path: Path) -> None:
    def larger(tensors):
        tensors["model.norm.weight"] *= 20

    path = changed(families.make("gemma4_text", tmp_path / "source"), larger)
    assert_same_function(path)
    convert(HFCheckpoint(path), tmp_path / "x.moe")
    with edgemoe.load(tmp_path / "x.moe", ram="1GiB") as engine:
        got = np.abs(engine.logits(families.random_ids(8)))
    assert 29 < got.max() <= 30


def test_what_sees_and_hears_is_left_out_in_words(tmp_path: Path) -> None:
    path = families.make("gemma4_text", tmp_path)
    config = json.loads((path / "config.json").read_text())
    tensors = {
        name.replace("model.", "model.language_model."): t
        for name, t in load_file(path / "model.safetensors").items()
    }
    tensors |= {"model.vision_tower.x": torch.ones(2), "model.audio_tower.y": torch.ones(3)}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    whole = {"model_type": "gemma4", "text_config": config, "tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(whole))
    model = open_model(path)
    towers = ("vision", "audio")
    assert set(model.notes) == {f"left out: the {t} tower (1 tensors)" for t in towers}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("enable_moe_block", False, "enable_moe_block: false is not supported"),
        ("attention_k_eq_v", False, "attention_k_eq_v: false is not supported"),
        ("hidden_size_per_layer_input", 256, "hidden_size_per_layer_input: only 0 is supported"),
        ("num_kv_shared_layers", 2, "num_kv_shared_layers: only 0 is supported, got 2"),
        ("hidden_activation", "silu", "hidden_activation: 'silu' is not supported"),
    ],
)
def test_values_that_gemma_does_not_have_are_named(key, value, message, tmp_path: Path) -> None:
    path = families.make("gemma4_text", tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(FormatError, match=message):
        open_model(path)


def test_layers_of_laguna_have_heads_and_tables_of_their_own(tmp_path: Path) -> None:
    model = open_model(families.make("laguna", tmp_path))
    full, sliding = (model.config.mixer(i) for i in (0, 1))
    assert (full.num_heads, full.rope_dim, full.window) == (4, 12, 0)
    assert (sliding.num_heads, sliding.rope_dim, sliding.window) == (8, 24, 8)
    assert model.tensor("rope_full")[1] == pytest.approx(5e5 ** (-2 / 12))
    assert model.tensor("rope")[1] == pytest.approx(1e4 ** (-2 / 24))
    assert full.gate == sliding.gate == "softplus_head"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("gating", "per-element", "gating: 'per-element' is not supported"),
        ("moe_router_logit_softcapping", 30.0, "a cap of logits is not supported"),
        ("num_attention_heads_per_layer", [4, 8], "num_attention_heads_per_layer: expected 4"),
        ("mlp_layer_types", ["dense"], "mlp_layer_types: expected 4 of dense and sparse"),
    ],
)
def test_values_that_laguna_does_not_have_are_named(key, value, message, tmp_path: Path) -> None:
    path = families.make("laguna", tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(FormatError, match=message):
        open_model(path)


@pytest.mark.parametrize("name", ["gpt_oss", "gemma4_text", "laguna"])
def test_chunks_and_threads_do_not_change_a_bit(name, tmp_path: Path, monkeypatch) -> None:
    convert(HFCheckpoint(families.make(name, tmp_path / "source")), tmp_path / "x.moe")
    ids, real, seen = families.random_ids(24), Budget.divide.__func__, []
    for chunk, threads in ((16, 2), (5, 1), (1, 3)):

        def divide(cls, moe, _chunk=chunk, **kwargs):
            return dataclasses.replace(real(cls, moe, **kwargs), chunk=_chunk)

        monkeypatch.setattr(Budget, "divide", classmethod(divide))
        with edgemoe.load(tmp_path / "x.moe", ram="1GiB", threads=threads) as engine:
            seen.append(engine.logits(ids))
    assert np.array_equal(seen[0], seen[1])
    assert np.array_equal(seen[0], seen[2])


@pytest.mark.parametrize("is_released", [True, False])
def test_the_experts_of_qwen3_vl_are_released_with_inputs_first(is_released, tmp_path) -> None:
    rope = {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [4, 4, 4]}
    text = {
        **families._BASE, **families._QWEN3, "decoder_sparse_step": 1, "rope_parameters": rope,
    }  # fmt: skip
    sight = {
        "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16,
        "out_hidden_size": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    whole = transformers.AutoConfig.for_model(
        "qwen3_vl_moe", text_config=text, vision_config=sight, image_token_id=150,
        video_token_id=151, vision_start_token_id=152, vision_end_token_id=153,
    )  # fmt: skip
    whole._attn_implementation = "eager"
    model = transformers.Qwen3VLMoeForConditionalGeneration(whole).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(1 + 0.2 * noise)
            else:
                weight.copy_(noise * families._gain(name, whole) / weight.shape[-1] ** 0.5)
        ids = families.random_ids(24)
        expected = model(torch.tensor([[i % 150 for i in ids]]), use_cache=False).logits[0].numpy()
    whole.save_pretrained(tmp_path)
    weights = {name: t.contiguous() for name, t in model.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    if is_released:

        def transposed(tensors):
            for name in tensors:
                if ".experts." in name:
                    tensors[name] = tensors[name].transpose(1, 2).contiguous()

        changed(tmp_path, transposed)
    ours = open_model(tmp_path)
    assert ours.notes[0].startswith("left out: the vision tower")
    tensors = {name: ours.tensor(name) for name in dense_tensors(ours.config)}
    got, _ = reference.logits(ours.config, tensors, ours.expert, [i % 150 for i in ids])
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


def test_ling_says_what_turns_as_a_share_or_in_columns(tmp_path: Path) -> None:
    """Ling-2.0 mini and flash have `partial_rotary_factor`; 1T has `rotary_dim` instead."""
    share, columns = (families.make("bailing_moe", tmp_path / name) for name in ("mini", "1t"))
    config = json.loads((columns / "config.json").read_text())
    del config["rope_parameters"]["partial_rotary_factor"]
    (columns / "config.json").write_text(json.dumps(config | {"rotary_dim": 12}))
    assert open_model(columns).config == open_model(share).config
    assert_same_function(share)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("architectures", ["BailingMoeForCausalLM"], r"architectures: Ling-1 \(Bailing"),
        ("score_function", "softmax", "score_function: 'softmax' is not supported"),
        ("norm_topk_prob", False, "norm_topk_prob: false is not supported"),
        ("moe_router_enable_expert_bias", False, "moe_router_enable_expert_bias: false is not"),
        ("rotary_dim", 16, "partial_rotary_factor: expected 0.666667 for this family, got 0.5"),
    ],
)
def test_values_that_ling_does_not_have_are_named(key, value, message, tmp_path: Path) -> None:
    path = families.make("bailing_moe", tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(FormatError, match=message):
        open_model(path)
