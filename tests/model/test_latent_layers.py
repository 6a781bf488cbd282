"""Models with latent attention, in a real file and engine, and the traps of their configurations."""

from __future__ import annotations

import json
from itertools import pairwise

import families
import numpy as np
import pytest
from engines import with_slots
from safetensors.torch import load_file, save_file

import edgemoe
from edgemoe import _core
from edgemoe.config import dense_tensors
from edgemoe.convert.convert import convert
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.convert.source import SourceModel
from edgemoe.errors import FormatError
from edgemoe.file.reader import open_moe
from edgemoe.lab.bits.bit_router import Routed
from edgemoe.lab.bits.moments import SumForm, sum_forms
from edgemoe.model import Batch, KvTypes, state_bytes
from edgemoe.specs import MlaSpec, RopeSpec

IDS = families.random_ids(330)
"""More than a block of positions."""
GREEDY = edgemoe.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
LONG = {"max_position_embeddings": 400}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Checkpoints by their setting; tests must not change them."""
    return {
        name: families.make(name, tmp_path_factory.mktemp(name), changes=LONG)
        for name in ("glm4_moe_lite", "deepseek_v2", "deepseek_v3", "mistral4")
    }


@pytest.fixture(scope="module", params=["glm4_moe_lite", "deepseek_v2", "mistral4"])
def model(request, sources, tmp_path_factory):
    path = tmp_path_factory.mktemp("latent") / "x.moe"
    convert(HFCheckpoint(sources[request.param]), path)
    return path


@pytest.fixture(scope="module")
def whole(model):
    """By type of the cache, the logits of all positions, computed at once."""
    out = {}
    for kind in ("f16", "q8_0", "q4_0"):
        with edgemoe.load(model, cache_type_k=kind, cache_type_v=kind) as engine:
            out[kind] = engine.logits(IDS)
    return out


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("isa", _core.usable_isas().split())
def test_chunks_threads_and_instruction_sets_do_not_matter(model, whole, kind, isa):
    before = _core.isa()
    _core.use_isa(isa)
    try:
        cuts = (1, 9, 10, 11, 60) if isa == "scalar" else (1, 9, 10, 11, 60, 250, 262, 330)
        with edgemoe.load(model, threads=3, cache_type_k=kind, cache_type_v=kind) as engine:
            engine.logits(IDS[:1])
            for first, last in pairwise(cuts):
                got = engine.extend(IDS[first:last], last_only=False)
                assert np.array_equal(got, whole[kind][first:last])
    finally:
        _core.use_isa(before)


def test_a_budget_does_not_matter(model, whole, monkeypatch):
    moe = open_moe(model)
    with_slots(monkeypatch, 3 * int(moe.experts.sizes(len(moe.ladder)).max()) + (1 << 14), chunk=40)
    with edgemoe.load(model) as engine:
        assert np.array_equal(engine.logits(IDS[:100]), whole["f16"][:100])


def test_several_sequences_run_together(model, whole):
    with edgemoe.load(model, sequences=3) as engine:
        states = [engine.model.make_state() for _ in range(2)]
        for step in ({0: 9, 1: 5}, {0: 1, 1: 1}, {1: 7, 0: 1}, {0: 4}, {1: 1, 0: 1}):
            parts = [
                (states[i], np.array(IDS[states[i].length :][:n], np.int32))
                for i, n in step.items()
            ]
            batch = Batch.of(*parts)
            hidden = engine.model.forward(batch)
            out = np.empty((len(batch), engine.config.vocab_size), np.float32)
            engine.model.logits(hidden, out, states[0])
            for s in batch.slices:
                got = out[s.start : s.stop]
                assert np.array_equal(got, whole["f16"][s.state.length - s.count : s.state.length])


def test_a_sequence_goes_back_to_any_length(model):
    with edgemoe.load(model) as engine:
        made = list(engine.generate(IDS[:300], GREEDY))
        other = [*IDS[:261], 5, *IDS[262:280]]
        got = list(engine.generate(other, GREEDY)), engine.stats.logits_hash
        assert engine.stats.cached_tokens == 261
        assert list(engine.generate(IDS[:300], GREEDY)) == made
    with edgemoe.load(model) as engine:
        assert (list(engine.generate(other, GREEDY)), engine.stats.logits_hash) == got


@pytest.mark.parametrize("kind", ["f16", "f32", "q8_0"])
def test_the_budget_counts_every_byte_of_the_latents(model, kind):
    types = {"cache_type_k": kind, "cache_type_v": kind}
    with edgemoe.load(model, context=100, sequences=2, **types) as engine:
        layers = engine.model.make_state().layers
        held = sum(layer.layer.content.nbytes for layer in layers)
        assert held == engine.budget.kv // 2 == state_bytes(engine.config, 100, KvTypes(kind, kind))
        (spec,) = engine.config.mixers
        # One key for all heads and no separate values; tiles of 32 positions, or of 16 with a scale per 32 columns.
        tiles = {
            "f16": 128 * 2 * spec.key_dim,
            "f32": 128 * 4 * spec.key_dim,
            "q8_0": 112 * (48 + 4),
        }
        assert spec.key_dim == 48
        assert held == len(layers) * tiles[kind]
        assert engine.kv_bytes(32) == len(layers) * tiles[kind] * 32 // (
            112 if kind == "q8_0" else 128
        )


def test_values_have_no_type_of_their_own_and_it_is_said(model, whole):
    for types, notes in (
        (("f16", "f16"), 0),
        (("q8_0", "q8_0"), 1),
        (("f16", "q8_0"), 1),
        (("q8_0", "f16"), 2),
    ):
        with edgemoe.load(model, cache_type_k=types[0], cache_type_v=types[1]) as engine:
            assert len(engine.notes) == notes
            assert ("held as" in " ".join(engine.notes)) == (types[0] != types[1])
            assert "lossy: keys and" not in " ".join(engine.notes)
            assert np.array_equal(engine.logits(IDS[:40]), whole[types[0]][:40])


def test_a_latent_that_does_not_fit_is_refused_and_leaves_the_sequence(sources, tmp_path):
    tensors = load_file(sources["deepseek_v3"] / "model.safetensors")
    tensors["model.layers.1.self_attn.kv_a_layernorm.weight"][3] = 1e6
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((sources["deepseek_v3"] / "config.json").read_text())
    convert(HFCheckpoint(tmp_path), tmp_path / "x.moe")
    for _ in range(2):
        with (
            edgemoe.load(tmp_path / "x.moe") as engine,
            pytest.raises(edgemoe.RangeError, match="layer 1: a key of .* does not fit the KV"),
        ):
            engine.logits(IDS[:20])
    with edgemoe.load(tmp_path / "x.moe", cache_type_k="f32", cache_type_v="f32") as engine:
        assert np.isfinite(engine.logits(IDS[:20])).all()


# ---------------------------------------------------------------- what reads such files


def test_bit_routers_refuse_latent_attention_in_words(model):
    with pytest.raises(FormatError, match="bit routers cannot be trained for models of family"):
        Routed(open_moe(model), (2, 8), rate=0.01)


def test_what_flows_into_every_matrix_is_seen(model):
    config = open_moe(model).config
    form = SumForm(level_bits=(2, 8), tokens=1, products="none")
    spec = config.mixers[0]
    inputs = {"kv_a", "k_b", "v_b", "o", *(["q_b"] if spec.q_rank else [])}
    for i in range(config.num_layers):
        sums = sum_forms(config, i, form, is_filed=False)
        found = {name.split(".")[3] for name in sums if name.startswith(f"dense.layers.{i}.")}
        assert found == inputs | {"shared"}
        assert sums[f"dense.layers.{i}.v_b.squares"][1] == (spec.latent_dim,)


# ---------------------------------------------------------------- traps of configurations


def changed(source, tmp_path, **changes):
    """Returns a checkpoint with keys of config.json set, or dropped where they are `...`."""
    config = json.loads((source / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    return HFCheckpoint(tmp_path)


def test_the_gating_function_of_glm_4_7_flash_is_sigmoid_whatever_the_file_says(sources, tmp_path):
    """Released files name none; a reader that then assumed softmax was wrong for weeks."""
    checkpoint = changed(sources["glm4_moe_lite"], tmp_path, scoring_func=..., topk_method=...)
    config = SourceModel(checkpoint).config
    assert (config.scoring, config.choice_bias, config.gate_scale) == ("sigmoid", True, 1.8)


def test_inner_norms_have_an_eps_of_1e_6_whatever_config_json_says(sources, tmp_path):
    checkpoint = changed(sources["glm4_moe_lite"], tmp_path, rms_norm_eps=1e-5)
    config = SourceModel(checkpoint).config
    assert config.norm_eps == 1e-5
    assert {mixer.norm_eps for mixer in config.mixers} == {1e-6}


def test_yarns_mscale_all_dim_scales_scores_and_their_quotient_the_turns(sources):
    (spec,) = SourceModel(HFCheckpoint(sources["deepseek_v2"])).config.mixers
    gain = 0.1 * 0.707 * np.log(4) + 1
    assert spec.scale == pytest.approx(40**-0.5 * gain**2)
    assert spec.rope.scale == 1


def test_keys_are_absorbed_transposed_and_turned_columns_are_halves_apart(sources):
    model = SourceModel(HFCheckpoint(sources["deepseek_v3"]))
    (spec,) = model.config.mixers
    stored = {
        name.removeprefix("model.layers.0.self_attn."): t.numpy()
        for name, t in load_file(sources["deepseek_v3"] / "model.safetensors").items()
    }
    kv_b = stored["kv_b_proj.weight"].reshape(spec.num_heads, -1, spec.latent_dim)
    k_b = model.tensor("layers.0.k_b").reshape(spec.num_heads, spec.latent_dim, spec.nope_dim)
    v_b = model.tensor("layers.0.v_b").reshape(spec.num_heads, spec.value_dim, spec.latent_dim)
    np.testing.assert_array_equal(np.swapaxes(k_b, 1, 2), kv_b[:, : spec.nope_dim])
    np.testing.assert_array_equal(v_b, kv_b[:, spec.nope_dim :])
    kv_a, theirs = model.tensor("layers.0.kv_a"), stored["kv_a_proj_with_mqa.weight"]
    half = spec.rope_dim // 2
    np.testing.assert_array_equal(kv_a[: spec.latent_dim], theirs[: spec.latent_dim])
    np.testing.assert_array_equal(kv_a[-2 * half : -half], theirs[spec.latent_dim :: 2])
    np.testing.assert_array_equal(kv_a[-half:], theirs[spec.latent_dim + 1 :: 2])


def test_layers_that_predict_several_tokens_are_left_out_in_words(sources, tmp_path):
    tensors = load_file(sources["deepseek_v3"] / "model.safetensors")
    more = {
        name.replace("layers.2.", "layers.3."): t.clone()
        for name, t in tensors.items()
        if ".layers.2." in name
    }
    more["model.layers.3.eh_proj.weight"] = tensors["model.norm.weight"].clone()
    save_file({**tensors, **more}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((sources["deepseek_v3"] / "config.json").read_text())
    model, plain = (SourceModel(HFCheckpoint(p)) for p in (tmp_path, sources["deepseek_v3"]))
    assert model.notes == (f"left out: layers that predict several tokens ({len(more)} tensors)",)
    assert list(dense_tensors(model.config)) == list(dense_tensors(plain.config))


def test_kimi_k2_is_deepseek_v3(sources, tmp_path):
    checkpoint = changed(sources["deepseek_v3"], tmp_path, model_type="kimi_k2")
    assert (
        SourceModel(checkpoint).config == SourceModel(HFCheckpoint(sources["deepseek_v3"])).config
    )


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("model.language_model.", "lm_head."),
        ("language_model.model.", "language_model.lm_head."),
    ],
)
def test_the_text_of_mistral_3_is_mistral_4_and_its_tower_is_left_out(
    prefix, head, sources, tmp_path
):
    tensors = {
        name.replace("model.", prefix, 1).replace("lm_head.", head): t
        for name, t in load_file(sources["mistral4"] / "model.safetensors").items()
    }
    tensors["vision_tower.patch_conv.weight"] = tensors["multi_modal_projector.norm.weight"] = (
        tensors[f"{prefix}norm.weight"].clone()
    )
    save_file({n: t.clone() for n, t in tensors.items()}, tmp_path / "model.safetensors")
    plain = SourceModel(HFCheckpoint(sources["mistral4"]))
    config = {
        "model_type": "mistral3",
        "text_config": json.loads((sources["mistral4"] / "config.json").read_text()),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = SourceModel(HFCheckpoint(tmp_path))
    assert model.config == plain.config
    assert model.notes == ("left out: the vision tower (2 tensors)",)
    for name in dense_tensors(model.config):
        np.testing.assert_array_equal(model.tensor(name), plain.tensor(name))
    config["text_config"]["model_type"] = "mistral"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="model_type: 'mistral' is not supported; supported: mis"):
        SourceModel(HFCheckpoint(tmp_path))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "'sigmoid' is not supported; supported: softmax"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "supported: greedy, group_limited_greedy"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob: true is not supported"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": ...}, "n_group: is missing"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "'softmax' is not supported; supported: sigmoid"),
        ("deepseek_v3", {"topk_method": "greedy"}, "'greedy' is not supported; supported: noaux_tc"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq: only 1 is supported"),
        ("deepseek_v3", {"n_group": 3}, "2 of 3 groups of 8 experts do not hold 3"),
        ("deepseek_v3", {"kv_lora_rank": 40}, "latent_dim must be a multiple of 16, got 40"),
        ("deepseek_v3", {"kv_lora_rank": 16}, "kv_a_proj_with_mqa.weight: a tensor of shape [48, 64] does"),
        ("deepseek_v3", {"v_head_dim": 48}, "kv_b_proj.weight: a tensor of shape [224, 32] does not make"),
        ("deepseek_v3", {"q_lora_rank": None}, "missing tensors model.layers.0.self_attn.q_proj.weight"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias: true is not supported"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave: false is not supported"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads: expected 4, as"),
        ("deepseek_v3", {"qk_rope_head_dim": 15}, "columns that are rotated must be even, got 15"),
        ("glm4_moe_lite", {"mlp_layer_types": ["moe"] * 3}, 'expected 3 of "dense" and "sparse"'),
        ("mistral4", {"n_shared_experts": ...}, "n_shared_experts: is missing"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(family, changes, message, sources, tmp_path):
    with pytest.raises(FormatError) as error:
        SourceModel(changed(sources[family], tmp_path, **changes))
    assert message in str(error.value), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_dim": 40}, "latent_dim must be a multiple of 16, got 40"),
        ({"value_dim": 8}, "value_dim must be a multiple of 16, got 8"),
        ({"rope_dim": 5, "rope": None}, "rope_dim must be even, got 5"),
        ({"rope_dim": 8}, "expected RoPE of 8 columns, got 16"),
        ({"growth": 0.1}, "grow_every must be a whole number from 1"),
        ({"growth": -0.1, "grow_every": 4}, "growth must be a positive number"),
        ({"num_heads": 1 << 19}, "524288 heads of 48 are too many"),
        ({"scale": float("nan")}, "scale must be a positive number"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message):
    values = {
        "num_heads": 4, "q_rank": 0, "latent_dim": 32, "nope_dim": 24, "rope_dim": 16, "value_dim": 32,
        "scale": 0.1, "rope": RopeSpec(dim=16),
    }  # fmt: skip
    MlaSpec(**values)
    with pytest.raises(FormatError, match=message):
        MlaSpec(**{**values, **changes})
