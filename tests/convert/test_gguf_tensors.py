"""Everything that llama.cpp's converter folds, joins, splits or reorders is undone: a checkpoint's tensors come back.

The converter's direction is in tests/gguf_layouts.py.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path
from typing import Any

import families  # noqa: F401  (which keeps transformers quiet)
import gguf_layouts
import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file

from edgemoe.convert.gguf import GGUFCheckpoint
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.convert.source import SourceModel

Array = NDArray[Any]
Config = dict[str, Any]

_BASE: Config = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
}
_DELTA: Config = {
    "head_dim": 16,
    "num_experts": 4,
    "shared_expert_intermediate_size": 20,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
}
_MLA: Config = {
    "num_key_value_heads": 4,
    "intermediate_size": 40,
    "n_routed_experts": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 20,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 2,
}
SETTINGS: dict[str, tuple[str, Config]] = {
    "qwen35moe": ("qwen3_5_moe_text", _DELTA),
    "qwen3next": ("qwen3_next", {**_DELTA, "intermediate_size": 40}),
    "gpt-oss": ("gpt_oss", {"head_dim": 16, "num_local_experts": 4, "intermediate_size": 24}),
    "deepseek2": ("deepseek_v3", {**_MLA, "q_lora_rank": 28, "n_group": 2, "topk_group": 1}),
    "gemma4": (
        "gemma4_text",
        {
            "num_hidden_layers": 6,
            "head_dim": 8,
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "intermediate_size": 40,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 64,
        },
    ),
    "lfm2moe": (
        "lfm2_moe",
        {
            "intermediate_size": 40,
            "num_experts": 4,
            "num_dense_layers": 1,
            "layer_types": ["conv", "conv", "full_attention", "conv"],
        },
    ),
    "granitehybrid": (
        "granitemoehybrid",
        {
            "num_local_experts": 4,
            "intermediate_size": 24,
            "shared_intermediate_size": 20,
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "layer_types": ["mamba", "attention", "mamba", "mamba"],
            "position_embedding_type": "nope",
        },
    ),
    "nemotron_h_moe": (
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "moe", "attention", "moe"],
            "head_dim": 16,
            "n_routed_experts": 4,
            "moe_shared_expert_intermediate_size": 20,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 16,
            "n_groups": 2,
        },
    ),
    "laguna": (
        "laguna",
        {
            "head_dim": 16,
            "intermediate_size": 40,
            "num_experts": 4,
            "shared_expert_intermediate_size": 20,
            "num_attention_heads_per_layer": [2, 4, 4, 4],
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "layer_types": ["full_attention", *["sliding_attention"] * 3],
            "sliding_window": 8,
        },
    ),
    "kimi-linear": (
        "kimi_linear",
        {
            **{k: v for k, v in _MLA.items() if k != "n_routed_experts"},
            "num_hidden_layers": 3,
            "first_k_dense_replace": 0,
            "num_local_experts": 4,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "linear_conv_kernel_dim": 4,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    "llama4": (
        "llama4_text",
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "intermediate_size": 24,
            "intermediate_size_mlp": 40,
            "interleave_moe_layer_step": 2,
            "num_experts_per_tok": 1,
        },
    ),
}
"""By the architecture of a GGUF file, the model_type of its checkpoint, and its config.json."""


@pytest.fixture(params=SETTINGS)
def made(request, tmp_path: Path) -> tuple[str, Config, dict[str, Array], Path]:
    """The architecture, config.json and tensors of a checkpoint, and its GGUF file."""
    kind, changes = SETTINGS[request.param]
    config = transformers.AutoConfig.for_model(kind, **{**_BASE, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, weight in [*model.named_parameters(), *model.named_buffers()]:
            if weight.is_floating_point():
                weight.copy_(torch.randn(weight.shape, generator=generator).to(torch.bfloat16))
    model.save_pretrained(tmp_path)
    tensors = {n: t.float().numpy() for n, t in load_file(tmp_path / "model.safetensors").items()}
    values = config.to_dict() | {**_BASE, **changes}
    return (
        request.param,
        values,
        tensors,
        gguf_layouts.save(request.param, values, tensors, tmp_path / "x.gguf"),
    )


def test_every_tensor_is_found_again(made: tuple[str, Config, dict[str, Array], Path]) -> None:
    _, _, tensors, path = made
    checkpoint = GGUFCheckpoint(path)
    names = set()
    for name, values in tensors.items():
        parts = {name: values}
        if values.ndim == 3 and "conv" not in name:  # a stack is presented as its matrices
            parts = {f"{name}.{i}": part for i, part in enumerate(values)}
        for part, expected in parts.items():
            got = checkpoint.tensor(part).reshape(expected.shape)
            if "A_log" in part:  # the file has its exponential
                np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6, err_msg=part)
            elif "norm" in part:  # the file may have it less 1, which rounds
                assert np.abs(got - expected).max() <= 2**-24, part
            else:
                np.testing.assert_array_equal(got, expected, err_msg=part)
        names |= parts.keys()
    assert names == set(checkpoint.shapes)


def test_config_has_what_the_tensors_need(
    made: tuple[str, Config, dict[str, Array], Path],
) -> None:
    """Fields that are in both are equal, as far as the metadata written here go."""
    arch, config, _, path = made
    got = GGUFCheckpoint(path).config
    assert got["model_type"] == SETTINGS[arch][0]
    for key in SETTINGS[arch][1].keys() & got.keys():
        assert got[key] == config[key], key


@pytest.mark.parametrize("made", ["gpt-oss"], indirect=True)
def test_gpt_oss_turns_as_its_config_json_says(
    made: tuple[str, Config, dict[str, Array], Path],
) -> None:
    """Its YaRN range is not rounded. A GGUF file does not say so, and llama.cpp rounds it."""
    *_, path = made
    released = SourceModel(HFCheckpoint(path.parent))
    np.testing.assert_array_equal(
        SourceModel(GGUFCheckpoint(path)).tensor("rope"), released.tensor("rope")
    )
