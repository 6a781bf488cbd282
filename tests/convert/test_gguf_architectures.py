"""A GGUF file of every architecture gives the model of the checkpoint it was made from, bit for bit."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import families
import gguf
import gguf_models
import numpy as np
import pytest
import torch

import edgemoe
from edgemoe.cli import main as edgemoe_cli
from edgemoe.config import dense_tensors
from edgemoe.convert.convert import convert
from edgemoe.convert.gguf import GGUFCheckpoint
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.convert.source import SourceModel
from edgemoe.errors import FormatError
from edgemoe.file.reader import open_moe

# llama.cpp supports Qwen2-MoE and OLMoE only without renormalised gates, Qwen3-MoE only with them, and no windows here.
NORMED = {"norm_topk_prob": True}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {}),
    ("mixtral-mha-top4", {}),
    ("qwen2_moe", {}),
    ("qwen2_moe", {"tie_word_embeddings": True, "qkv_bias": False}),
    ("qwen3_moe", NORMED),
    ("qwen3_moe", {**NORMED, "tie_word_embeddings": True, "attention_bias": True}),
    ("qwen3_moe-yarn", {}),
    ("olmoe", {}),
    ("granitemoe", {}),
    ("granitemoeshared", {}),
    ("glm4_moe", {}),
    ("glm4_moe-groups-norm", {}),
    ("ernie4_5_moe", {}),
    ("ernie4_5_moe-step", {}),
    ("minimax_m2", {}),
    ("hunyuan_v1_moe-tied-bias", {}),
    ("deepseek_v2", {}),
    ("deepseek_v3", {}),
    ("deepseek_v3-one-group", {"norm_topk_prob": False}),
    ("mistral4", {}),
    ("mistral4-groups-dense", {}),
    ("bailing_moe", {}),
    ("bailing_moe-one-group-eps", {}),
]


def opened(path: Path) -> SourceModel:
    return SourceModel(GGUFCheckpoint(path) if path.is_file() else HFCheckpoint(path))


def assert_same(ours: SourceModel, theirs: SourceModel) -> None:
    eos = ours.config.eos_ids  # there is no tokenizer
    assert dataclasses.replace(theirs.config, eos_ids=eos) == ours.config
    for name in dense_tensors(ours.config):
        np.testing.assert_array_equal(theirs.tensor(name), ours.tensor(name), err_msg=name)
    for layer in ours.config.moe_layers:
        for index in range(ours.config.num_experts):
            pairs = zip(ours.expert(layer, index), theirs.expert(layer, index), strict=True)
            assert all(np.array_equal(a, b) for a, b in pairs), (layer, index)


@pytest.mark.parametrize(("name", "changes"), SETTINGS)
def test_is_the_same_model(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    path = families.make(name, tmp_path / "hf", changes=changes)
    assert_same(opened(path), opened(gguf_models.save(path, tmp_path / "x.gguf")))


def test_a_file_without_a_gating_key_is_glm_4_7_flash_by_its_size(tmp_path: Path) -> None:
    """The first files named no gating function of the router, or softmax; it is sigmoid all the same."""
    size = {
        "vocab_size": 154880,
        "hidden_size": 16,
        "num_hidden_layers": 47,
        "moe_intermediate_size": 16,
    }
    small = {"intermediate_size": 16, "kv_lora_rank": 16, "q_lora_rank": 16, "n_routed_experts": 4}
    path = families.make("glm4_moe_lite", tmp_path / "hf", changes={**size, **small})
    for said in (None, 1, 2):
        file = gguf_models.save(
            path, tmp_path / f"{said}.gguf", changes={"expert_gating_func": said}
        )
        ours, theirs = opened(path).config, opened(file).config
        assert dataclasses.replace(theirs, eos_ids=ours.eos_ids) == ours
        assert theirs.scoring == "sigmoid"
    path = families.make("deepseek_v3", tmp_path / "other")
    file = gguf_models.save(path, tmp_path / "x.gguf", changes={"expert_gating_func": 1})
    with pytest.raises(FormatError, match="norm_topk_prob: true is not supported"):
        opened(file)


def test_keys_and_values_of_older_files_are_one_matrix(tmp_path: Path) -> None:
    path = families.make("deepseek_v2", tmp_path / "hf")
    checkpoint, tensors = HFCheckpoint(path), {}
    for i in range(3):
        stored = checkpoint.tensor(f"model.layers.{i}.self_attn.kv_b_proj.weight")
        tensors |= {f"blk.{i}.attn_kv_b.weight": stored}
    file = gguf_models.save(path, tmp_path / "x.gguf", tensors=tensors, without="attn_[kv]_b")
    assert_same(opened(path), opened(file))


def test_converts_to_the_same_logits(tmp_path: Path) -> None:
    path = families.make("glm4_moe", tmp_path / "hf", dtype=torch.bfloat16)
    file = gguf_models.save(path, tmp_path / "x.gguf", quant="BF16")
    logits = []
    for source in (HFCheckpoint(path), GGUFCheckpoint(file)):
        out = tmp_path / f"{source.name}.moe"
        convert(source, out, bits=4)
        with edgemoe.load(out, bits=4) as engine:
            logits.append(engine.logits(families.random_ids(12)).copy())
    np.testing.assert_array_equal(*logits)


def test_the_command_converts_a_file_as_it_does_the_directory(tmp_path: Path) -> None:
    path = families.make("olmoe", tmp_path / "hf")
    file = gguf_models.save(path, tmp_path / "x.gguf")
    outs = [tmp_path / "hf.moe", tmp_path / "x.moe"]
    for source, out in zip((path, file), outs, strict=True):
        assert edgemoe_cli.main(["convert", str(source), str(out), "--bits", "3"]) == 0
    a, b = map(open_moe, outs)
    assert (b.source["name"], b.source["family"]) == ("x.gguf", "olmoe")
    assert dataclasses.replace(b.config, eos_ids=a.config.eos_ids) == a.config
    logits = []
    for out in outs:
        with edgemoe.load(out, bits=3) as engine:
            logits.append(engine.logits([5, 6, 7]))
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize(
    "kind", [kind.name for kind in gguf.quants._type_traits if kind.name not in ("F32", "F16")]
)
def test_every_type_that_the_package_decodes(kind: str, tmp_path: Path) -> None:
    """Random bytes decode to the same values. With a type's scales some of them may be NaN."""
    path = families.make("mixtral", tmp_path / "hf", changes={"intermediate_size": 256})
    quant = gguf.GGMLQuantizationType[kind]
    size, octets = gguf.GGML_QUANT_SIZES[quant]
    rng = np.random.default_rng(0)
    shape = (8, 64, 256 // size * octets)
    raw = rng.integers(0, 256, shape, dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for key, value in gguf_models.metadata(HFCheckpoint(path).config).items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"llama.{key}", value)
    for name, values in gguf_models.named(path, HFCheckpoint(path).config, "llama").items():
        if name != "blk.1.ffn_down_exps.weight":
            writer.add_tensor(name, values)
    writer.add_tensor("blk.1.ffn_down_exps.weight", raw, raw_dtype=quant)
    scales = rng.random(8).astype(np.float32)
    if kind == "NVFP4":
        writer.add_tensor("blk.1.ffn_down_exps.scale", scales)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = GGUFCheckpoint(tmp_path / "x.gguf")
    for i in (0, 7):
        got = checkpoint.tensor(f"model.layers.1.block_sparse_moe.experts.{i}.w2.weight")
        with np.errstate(all="ignore"):
            expected = gguf.dequantize(raw[i], quant) * (scales[i] if kind == "NVFP4" else 1)
        assert got.shape == (64, 256)
        np.testing.assert_array_equal(got, expected)


def test_layers_that_predict_several_tokens_are_left_out_in_words(tmp_path: Path) -> None:
    path = families.make("glm4_moe", tmp_path / "hf")
    extra = {"blk.3.nextn.eh_proj.weight": np.ones((4, 8), np.float32)}
    changes = {"block_count": 4, "nextn_predict_layers": 1}
    model = opened(gguf_models.save(path, tmp_path / "x.gguf", changes=changes, tensors=extra))
    assert model.config.num_layers == 3
    assert model.notes == ("left out: layers that predict several tokens (1 tensors)",)
    assert_same(opened(path), model)


def test_factors_of_frequencies_divide_them(tmp_path: Path) -> None:
    path = families.make("mixtral", tmp_path / "hf")
    factors = np.array([1, 1, 1, 1.5, 2, 4, 8, 8], np.float32)
    extra = {"rope_freqs.weight": factors}
    model = opened(gguf_models.save(path, tmp_path / "x.gguf", tensors=extra))
    np.testing.assert_array_equal(
        model.tensor("rope"),
        (opened(path).tensor("rope").astype(np.float64) / factors).astype("f4"),
    )


def test_the_parts_of_a_split_file_are_found_by_the_first(tmp_path: Path) -> None:
    path = families.make("mixtral", tmp_path / "hf")
    first, second, third = gguf_models.split(path, tmp_path, 3)
    assert_same(opened(path), opened(first))
    with pytest.raises(FormatError, match=r"is part 1 of a split GGUF file, counted from 0; expec"):
        GGUFCheckpoint(second)
    third.rename(tmp_path / "away")
    with pytest.raises(FormatError, match=r"m-00003-of-00003\.gguf: no such file"):
        GGUFCheckpoint(first)
    (tmp_path / "away").rename(third)
    first.rename(tmp_path / "m.gguf")
    with pytest.raises(FormatError, match="expected the name NAME-00001-of-00003"):
        GGUFCheckpoint(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").rename(first)
    third.write_bytes(second.read_bytes())
    with pytest.raises(FormatError, match=r"m-00001-of-00003\.gguf: holds '.*' twice"):
        GGUFCheckpoint(first)


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({"expert_gating_func": 1}, {}, "glm4moe.expert_gating_func must be 2 (sigmoid), got 1"),
        (
            {"nextn_predict_layers": 3},
            {},
            "glm4moe.nextn_predict_layers must be less than 3 blocks",
        ),
        ({"attention.value_length": 8}, {}, "glm4moe.attention.value_length must be the head's 24"),
        ({}, {"blk.1.attn_sinks.weight": np.ones(4, "f4")}, "'blk.1.attn_sinks.weight' is not a"),
        ({}, {"blk.1.ffn_up_exps.weight": np.ones(4, "f4")}, "must be stacks of as many experts"),
        (
            {},
            {"v.patch.weight": np.ones(4, "f4")},
            "'v.patch.weight' is not a tensor of a glm4_moe",
        ),
    ],
)
def test_what_is_not_known_is_named(
    changes: dict[str, Any], tensors: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = families.make("glm4_moe", tmp_path / "hf")
    file = gguf_models.save(path, tmp_path / "x.gguf", changes=changes, tensors=tensors)
    with pytest.raises(FormatError, match=re.escape(message)) as error:
        GGUFCheckpoint(file)
    assert "\n" not in str(error.value)


def test_a_missing_stack_is_named_as_a_tensor_of_the_family(tmp_path: Path) -> None:
    path = families.make("glm4_moe", tmp_path / "hf")
    file = gguf_models.save(path, tmp_path / "x.gguf", changes={"expert_count": 9})
    with pytest.raises(FormatError, match=r"x\.gguf: "):
        opened(file)
