"""Tiny random checkpoints of every family, made by transformers, and their true logits."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # Before transformers is imported, which reads it once.

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaMLP

from edgemoe.config import ModelConfig
from edgemoe.convert.families import FAMILIES
from edgemoe.convert.settings import Settings

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)  # The models are too small for more to pay off.

_BASE = {
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": None,
}
_MIXTRAL = {"model_type": "mixtral", "num_local_experts": 8, "intermediate_size": 48}
_QWEN2 = {
    "model_type": "qwen2_moe",
    "num_experts": 8,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 80,
}
_QWEN3 = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "intermediate_size": 96,
    "moe_intermediate_size": 40,
    "head_dim": 24,
}
_OLMOE = {"model_type": "olmoe", "num_experts": 8, "intermediate_size": 48}
_GRANITE = {
    "model_type": "granitemoe",
    "num_local_experts": 8,
    "intermediate_size": 48,
    "attention_multiplier": 0.2,
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 3.0,
}
_GLM4 = {
    "model_type": "glm4_moe",
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_hidden_layers": 3,
    "num_experts_per_tok": 3,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "head_dim": 24,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "attention_bias": True,
}
_ERNIE = {
    "model_type": "ernie4_5_moe",
    "moe_num_experts": 8,
    "moe_k": 3,
    "moe_num_shared_experts": 2,
    "num_hidden_layers": 3,
    "moe_layer_start_index": 1,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "head_dim": 24,
}
_MINIMAX = {
    "model_type": "minimax_m2",
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "intermediate_size": 32,
    "head_dim": 24,
}
_HUNYUAN = {
    "model_type": "hunyuan_v1_moe",
    "num_experts": 8,
    "moe_topk": 3,
    "intermediate_size": 48,
    "head_dim": 24,
}
_QWEN3_NEXT = {
    "model_type": "qwen3_next",
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_experts": 8,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 24,
    "linear_value_head_dim": 16,
}
_QWEN3_5 = {**_QWEN3_NEXT, "model_type": "qwen3_5_moe_text"}
_GPT_OSS = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "intermediate_size": 32,
    "head_dim": 24,
    "sliding_window": 8,
}
_GEMMA4 = {
    "model_type": "gemma4_text",
    "num_hidden_layers": 6,
    "num_experts": 8,
    "top_k_experts": 3,
    "enable_moe_block": True,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 160,
    "sliding_window": 8,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}
_LAGUNA = {
    "model_type": "laguna",
    "num_hidden_layers": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "head_dim": 24,
    "sliding_window": 8,
    "layer_types": ["full_attention", *["sliding_attention"] * 3],
    "num_attention_heads_per_layer": [4, 8, 8, 8],
    "gating": "per-head",
    "moe_routed_scaling_factor": 2.5,
}
_MLA = {
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "num_experts_per_tok": 3,
    "n_routed_experts": 8,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "kv_lora_rank": 32,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
_GLM4_LITE = {**_MLA, "model_type": "glm4_moe_lite", "routed_scaling_factor": 1.8}
_DEEPSEEK2 = {
    **_MLA,
    "model_type": "deepseek_v2",
    "q_lora_rank": None,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
_DEEPSEEK3 = {**_MLA, "model_type": "deepseek_v3", "first_k_dense_replace": 1}
_MISTRAL4 = {**_MLA, "model_type": "mistral4", "num_hidden_layers": 2}
_LFM2 = {
    "model_type": "lfm2_moe",
    "num_hidden_layers": 4,
    "layer_types": ["conv", "conv", "full_attention", "conv"],
    "num_dense_layers": 1,
    "num_experts": 8,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
}
_GRANITE_H = {
    **_GRANITE,
    "model_type": "granitemoehybrid",
    "num_hidden_layers": 3,
    "layer_types": ["mamba", "attention", "mamba"],
    "position_embedding_type": "nope",
    "shared_intermediate_size": 56,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 24,
    "mamba_chunk_size": 8,
    "tie_word_embeddings": True,
}
_NEMOTRON = {
    "model_type": "nemotron_h",
    "layers_block_type": ["linear_attention", "moe", "linear_attention", "full_attention", "moe"],
    "n_routed_experts": 8,
    "intermediate_size": 72,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
    "routed_scaling_factor": 1.5,
    "head_dim": 24,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 24,
    "n_groups": 2,
    "chunk_size": 8,
    "time_step_min": 1e-9,  # transformers cuts steps in prompts, and not in single tokens
}
_LLAMA4 = {
    "model_type": "llama4_text",
    "num_hidden_layers": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 1,
    "intermediate_size": 32,
    "intermediate_size_mlp": 96,
    "interleave_moe_layer_step": 2,
    "head_dim": 24,
    "attention_chunk_size": 8,
    "floor_scale": 4,
    "attn_scale": 0.5,
}
_PHI = {
    "model_type": "phimoe",
    "num_local_experts": 8,
    "intermediate_size": 48,
    "head_dim": 16,
    "attention_bias": True,
    "lm_head_bias": True,
}
_KDA_LATENT = {
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "routed_scaling_factor": 1.5,
}
_KIMI = {
    **_KDA_LATENT,
    "model_type": "kimi_linear",
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
}
_LING3 = {
    **_KDA_LATENT,
    "model_type": "bailing_hybrid",
    "head_dim": 16,
    "layer_group_size": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
_LING2 = {
    "model_type": "bailing_moe",
    "num_experts": 8,
    "num_shared_experts": 2,
    "num_hidden_layers": 3,
    "num_experts_per_tok": 3,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "head_dim": 24,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "score_function": "sigmoid",
    "use_qk_norm": True,
    "num_nextn_predict_layers": 0,
}
_LARGE_EPS = {"rms_norm_eps": 0.3}
"""An epsilon as large as the mean squares that it is added to, so that a norm with the wrong epsilon is noticed."""


class _DenseGraniteConfig(transformers.GraniteMoeConfig):
    model_type = "granitemoe_dense"


class _DenseGranite(transformers.GraniteMoeForCausalLM):
    """GraniteMoe whose layers `dense_layers` have a single SwiGLU FFN in place of experts.

    No published family has both dense layers and all of Granite's multipliers; the decoder must be right for one that
    does.
    """

    config_class = _DenseGraniteConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        dense = transformers.LlamaConfig(
            hidden_size=config.hidden_size, intermediate_size=config.dense_size, hidden_act="silu"
        )
        for i in config.dense_layers:
            layer = self.model.layers[i]
            del layer.block_sparse_moe
            layer.mlp = LlamaMLP(dense)
            layer.__dict__["block_sparse_moe"] = layer.mlp  # is called so, and stored as mlp


def _dense_granite_config(settings: Settings) -> ModelConfig:
    config = FAMILIES["granitemoe"].config(settings)
    dense = settings.integers("dense_layers")
    width = settings.integer("dense_size")
    layers = range(config.num_layers)
    return replace(
        config,
        moe_layers=tuple(i for i in layers if i not in dense),
        shared_hidden=tuple(width if i in dense else 0 for i in layers),
    )


class _Ling2Config(transformers.Glm4MoeConfig):
    model_type = "bailing_moe"


class _Ling2(transformers.Glm4MoeForCausalLM):
    """Ling-2.0, which transformers lacks: GLM-4.5's layers, stored under other names; see `as_ling2`."""

    config_class = _Ling2Config

    def __init__(self, config: Any) -> None:
        config.n_routed_experts = config.num_experts
        config.n_shared_experts = config.num_shared_experts
        super().__init__(config)


transformers.AutoConfig.register("bailing_moe", _Ling2Config)
transformers.AutoModelForCausalLM.register(_Ling2Config, _Ling2)
transformers.AutoConfig.register("granitemoe_dense", _DenseGraniteConfig)
transformers.AutoModelForCausalLM.register(_DenseGraniteConfig, _DenseGranite)
transformers.AutoModelForCausalLM.register(  # transformers loads it as a part of Mistral 3 only
    transformers.Mistral4Config, transformers.Mistral4ForCausalLM, exist_ok=True
)
assert isinstance(FAMILIES, dict)
FAMILIES["granitemoe_dense"] = replace(FAMILIES["granitemoe"], config=_dense_granite_config)


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **parameters}}


SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "mixtral": _MIXTRAL,
    "mixtral-window": {**_MIXTRAL, "sliding_window": 5, "tie_word_embeddings": True},
    "mixtral-mha-top4": {
        **_MIXTRAL,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "num_experts_per_tok": 4,
    },
    "mixtral-longrope": {
        **_MIXTRAL,
        "head_dim": 16,  # transformers needs it spelt out for this scaling.
        **_rope(
            "longrope",
            short_factor=[1.0] * 8,
            long_factor=[1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.1, 3.8],
            original_max_position_embeddings=16,
            factor=4.0,
        ),
    },
    "qwen2_moe": _QWEN2,
    "qwen2_moe-sparse-step": {
        **_QWEN2,
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
        "norm_topk_prob": True,
        "qkv_bias": False,
    },
    "qwen2_moe-mlp-only": {
        **_QWEN2,
        "num_hidden_layers": 3,
        "mlp_only_layers": [0, 2],
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
    },
    "qwen2_moe-window": {
        **_QWEN2,
        "num_hidden_layers": 4,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 3,
        **_rope("linear", factor=2.0),
    },
    "qwen3_moe": _QWEN3,
    "qwen3_moe-norm-tied": {
        **_QWEN3,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
        "mlp_only_layers": [1],
        "num_hidden_layers": 3,
    },
    "qwen3_moe-bias-window": {
        **_QWEN3,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 7,
        "num_experts_per_tok": 3,
    },
    "qwen3_moe-yarn": {
        **_QWEN3,
        "norm_topk_prob": True,
        **_rope("yarn", factor=4.0, original_max_position_embeddings=16),
    },
    "olmoe": {**_OLMOE, "num_key_value_heads": 4},
    "olmoe-clip-norm": {**_OLMOE, "clip_qkv": 0.8, "norm_topk_prob": True},
    "olmoe-bias-dynamic": {**_OLMOE, "attention_bias": True, **_rope("dynamic", factor=2.0)},
    "granitemoe": _GRANITE,
    "granitemoe-tied-llama3": {
        **_GRANITE,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "num_experts_per_tok": 4,
        **_rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    },
    "granitemoeshared": {
        **_GRANITE,
        "model_type": "granitemoeshared",
        "shared_intermediate_size": 56,
        "num_key_value_heads": 4,
    },
    "granitemoe-dense-eps": {
        **_GRANITE,
        "model_type": "granitemoe_dense",
        "num_hidden_layers": 3,
        "dense_layers": [1],
        "dense_size": 72,
        **_LARGE_EPS,
    },
    "glm4_moe": {**_GLM4, **_rope("default", partial_rotary_factor=0.5)},
    "glm4_moe-groups-norm": {
        **_GLM4,
        "n_group": 4,
        "topk_group": 2,
        "use_qk_norm": True,
        "norm_topk_prob": False,
        "attention_bias": False,
        **_rope("default", partial_rotary_factor=0.25),
    },
    "ernie4_5_moe": _ERNIE,
    "ernie4_5_moe-step": {**_ERNIE, "moe_layer_interval": 2, "tie_word_embeddings": False},
    "minimax_m2": {**_MINIMAX, **_rope("default", partial_rotary_factor=0.5)},
    "hunyuan_v1_moe": _HUNYUAN,
    "hunyuan_v1_moe-tied-bias": {**_HUNYUAN, "tie_word_embeddings": True, "attention_bias": True},
    "qwen3_next": {**_QWEN3_NEXT, **_rope("default", partial_rotary_factor=0.25)},
    "qwen3_next-dense-tied": {
        **_QWEN3_NEXT,
        "mlp_only_layers": [1],
        "tie_word_embeddings": True,
        "norm_topk_prob": False,
        "layer_types": ["full_attention"] + ["linear_attention"] * 2,
        "linear_num_value_heads": 2,
        "linear_conv_kernel_dim": 3,
    },
    "qwen3_5_moe": {**_QWEN3_5, **_rope("default", partial_rotary_factor=0.5)},
    "qwen3_5_moe-eps": {**_QWEN3_5, **_LARGE_EPS},
    "gpt_oss": {
        **_GPT_OSS,
        **_rope("yarn", factor=4.0, original_max_position_embeddings=16, truncate=False),
    },
    "gpt_oss-truncate": {
        **_GPT_OSS,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        **_rope("yarn", factor=4.0, original_max_position_embeddings=16),
    },
    "gemma4_text": _GEMMA4,
    "laguna": _LAGUNA,
    "glm4_moe_lite": {**_GLM4_LITE, "n_shared_experts": 2},
    "glm4_moe_lite-eps-dense": {
        **_GLM4_LITE,
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
        **_LARGE_EPS,
    },
    "deepseek_v2": {
        **_DEEPSEEK2,
        **_rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            mscale=0.707,
            mscale_all_dim=0.707,
        ),
    },
    "deepseek_v2-groups": {
        **_DEEPSEEK2,
        "q_lora_rank": 40,
        "v_head_dim": 16,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
        **_rope(
            "yarn", factor=8.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.5
        ),
    },
    "deepseek_v3": {
        **_DEEPSEEK3,
        "n_group": 4,
        "topk_group": 2,
        **_rope(
            "yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0
        ),
    },
    "deepseek_v3-one-group": {**_DEEPSEEK3, "n_group": 1, "topk_group": 1, "kv_lora_rank": 48},
    "mistral4": {
        **_MISTRAL4,
        **_rope(
            "yarn",
            factor=16.0,
            original_max_position_embeddings=8,
            mscale=1.0,
            mscale_all_dim=1.0,
            llama_4_scaling_beta=0.3,
        ),
    },
    "mistral4-groups-dense": {
        **_MISTRAL4,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "kv_lora_rank": 16,
    },
    "lfm2_moe": _LFM2,
    "lfm2_moe-eps-untied": {
        **_LFM2,
        "norm_eps": 0.3,
        "tie_word_embeddings": False,
        "routed_scaling_factor": 1.5,
        "norm_topk_prob": False,
        "conv_L_cache": 4,
    },
    "granitemoehybrid": _GRANITE_H,
    "granitemoehybrid-rope-groups-eps": {
        **_GRANITE_H,
        "position_embedding_type": "rope",
        "mamba_n_groups": 2,
        "mamba_conv_bias": False,
        "tie_word_embeddings": False,
        **_LARGE_EPS,
    },
    "nemotron_h": _NEMOTRON,
    "nemotron_h-mlp-eps": {
        **_NEMOTRON,
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"],
        "layer_norm_epsilon": 0.3,
        "n_group": 4,
        "topk_group": 2,
    },
    "llama4_text": _LLAMA4,
    "llama4_text-scout-eps": {
        **_LLAMA4,
        "interleave_moe_layer_step": 1,
        "no_rope_layers": [0, 1, 1, 0],
        "tie_word_embeddings": True,
        "attention_bias": True,
        **_LARGE_EPS,
        **_rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    },
    "phimoe": {
        **_PHI,
        **_rope(
            "longrope",
            short_factor=[1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2],
            long_factor=[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
            original_max_position_embeddings=32,
            short_mscale=1.2,
            long_mscale=1.2,
        ),
    },
    "phimoe-no-bias-window-eps": {
        **_PHI,
        "attention_bias": False,
        "lm_head_bias": False,
        "sliding_window": 7,
        **_LARGE_EPS,
    },
    "kimi_linear": _KIMI,
    "kimi_linear-eps-rank-dense": {
        **_KIMI,
        "q_lora_rank": 40,
        "linear_num_heads": 2,
        "linear_conv_kernel_dim": 3,
        "mlp_layer_types": ["sparse", "dense", "sparse", "dense"],
        "norm_topk_prob": False,
        **_LARGE_EPS,
    },
    "bailing_moe": {**_LING2, **_rope("default", partial_rotary_factor=0.5)},
    "bailing_moe-one-group-eps": {
        **_LING2,
        "n_group": 1,
        "topk_group": 1,
        "num_shared_experts": 1,
        **_LARGE_EPS,
    },
    "bailing_hybrid": _LING3,
    "bailing_hybrid-softplus-rank": {
        **_LING3,
        "kda_safe_gate": False,
        "q_lora_rank": 40,
        "n_group": 1,
        "topk_group": 1,
        **_rope("yarn", factor=4.0, original_max_position_embeddings=16),
    },
    "olmoe-eps": {**_OLMOE, **_LARGE_EPS},
    "qwen3_moe-eps": {**_QWEN3, **_LARGE_EPS},
}
"""The contents of config.json, by a name that tests are parametrised with."""


def _gain(name: str, config: Any) -> float:
    """Returns a matrix's factor, relative to a random matrix that keeps the scale of its input.

    The factors make the model behave as trained ones do: a layer adds less to the residual than is there already,
    attention looks at several positions, and routers have clear choices. Otherwise rounding errors of the weights would
    grow without bounds.
    """
    if "embed_tokens" in name:
        # With a tied head, a larger embedding would only ever predict the token that was read.
        gain = 5.0 if config.tie_word_embeddings else 8.0
        return gain / getattr(config, "embedding_multiplier", 1.0)
    if "router" in name or name.endswith((".gate.weight", ".wg.weight")):
        if config.model_type == "gemma4_text":
            return 6.0 * math.sqrt(config.hidden_size)  # its input is divided by that
        # Sigmoids of larger logits are all 0 or 1, so that the choice of experts would be chance.
        sigmoids = (
            "bailing_moe",
            "glm4_moe",
            "glm4_moe_lite",
            "deepseek_v3",
            "minimax_m2",
            "laguna",
            "lfm2_moe",
            "llama4_text",
            "nemotron_h",
            "kimi_linear",
            "bailing_hybrid",
        )
        return 1.5 if config.model_type in sigmoids else 6.0
    if "q_proj" in name or "k_proj" in name or "q_b_proj" in name:
        return 0.7
    if "conv1d" in name or "conv.conv" in name:
        return 1.5
    if config.model_type in ("kimi_linear", "bailing_hybrid") and "self_attn.o_proj" in name:
        return 0.15  # as in other recurrent layers
    if "mixer.out_proj" in name:
        return 0.04  # its input has a norm over whole groups, which amplifies rounding errors
    if name.endswith(
        (
            "linear_attn.out_proj.weight",
            "conv.out_proj.weight",
            "mamba.out_proj.weight",
        )
    ):
        return 0.15  # its input is sometimes normed noise, or a product of three projections
    if config.model_type == "nemotron_h" and "down_proj" in name:
        return 0.12  # its input is a square
    if "o_proj" in name or "out_proj" in name or "down_proj" in name or "output_linear" in name:
        return 0.5
    return 1.0


def _vector(key: str, weight: Any, noise: Any, config: Any) -> Any:
    """Returns random values of a bias or a norm; those of norms are near their initial value, 0 or 1."""
    if key.endswith("bias"):
        return 0.3 * noise
    if key.endswith("A_log"):
        return noise.abs()
    if key.endswith("sinks"):
        return noise
    if config.model_type == "gemma4_text" and ("post_" in key or "q_norm" in key):
        return 0.4 * (1 + 0.2 * noise)  # the last additions, and what decides attention
    return weight.mean() + 0.2 * noise


def make(
    name: str,
    out: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    changes: Mapping[str, Any] | None = None,
    **save: Any,
) -> Path:
    """Writes a checkpoint of `SETTINGS[name]` to the directory `out` and returns it.

    Every tensor is random, norms and biases included, so that none can be swapped or forgotten.

    Args:
        changes: keys of config.json to add or replace.
        save: arguments of save_pretrained, such as max_shard_size.
    """
    values = {**_BASE, **SETTINGS[name], **(changes or {})}
    config = transformers.AutoConfig.for_model(**values)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        tensors = [*model.named_parameters(), *model.named_buffers()]
        for key, weight in tensors:
            if key.endswith(("inv_freq", "embed_scale")):
                continue
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1 or key.endswith("bias"):
                weight.copy_(_vector(key, weight, noise, config))
            else:
                weight.copy_(noise * _gain(key, config) / math.sqrt(weight.shape[-1]))
    model.to(dtype).save_pretrained(out, **save)
    if config.model_type == "kimi_linear":
        _as_released(out / "model.safetensors")
    if config.model_type == "bailing_moe":
        tensors = load_file(out / "model.safetensors")
        save_file(as_ling2(tensors), out / "model.safetensors", {"format": "pt"})
    return out


def _as_released(path: Path) -> None:
    """Renames Kimi's dense FFNs, which transformers saves as parts of the experts' module."""
    dense = re.compile(r"block_sparse_moe\.(?=(gate|up|down)_proj)")
    tensors = {dense.sub("mlp.", name): t for name, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


_LING2_NAMES = {
    "self_attn.q_norm": "attention.query_layernorm",
    "self_attn.k_norm": "attention.key_layernorm",
    "self_attn.o_proj": "attention.dense",
    "mlp.gate.e_score_correction_bias": "mlp.gate.expert_bias",
    "model.embed_tokens": "model.word_embeddings",
}


def as_ling2(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Converts GLM-4.5's tensors to those of Ling-2.0: queries, keys and values in one, every expert by itself."""
    out = {}
    for name, tensor in tensors.items():
        for theirs, ours in _LING2_NAMES.items():
            name = name.replace(theirs, ours)
        if name.endswith("experts.down_proj"):
            out |= {f"{name[:-10]}.{i}.down_proj.weight": x.clone() for i, x in enumerate(tensor)}
        elif name.endswith("experts.gate_up_proj"):
            for i, both in enumerate(tensor):
                for half, x in zip(("gate", "up"), both.chunk(2), strict=True):
                    out[f"{name[:-13]}.{i}.{half}_proj.weight"] = x.clone()
        elif match := re.fullmatch(r"(.*)self_attn\.([qkv])_proj\.weight", name):
            if match[2] == "q":
                parts = [tensors[f"{match[1]}self_attn.{x}_proj.weight"] for x in "qkv"]
                out[f"{match[1]}attention.query_key_value.weight"] = torch.cat(parts)
        else:
            out[name] = tensor
    return out


def _of_ling2(path: Path, config: Any) -> dict[str, Any]:
    """Undoes `as_ling2`."""
    stored, out = load_file(path / "model.safetensors"), {}
    rows = [
        n * config.head_dim for n in (config.num_attention_heads, *[config.num_key_value_heads] * 2)
    ]
    for name, tensor in stored.items():
        for theirs, ours in _LING2_NAMES.items():
            name = name.replace(ours, theirs)
        if match := re.fullmatch(r"(.*)attention\.query_key_value\.weight", name):
            for x, part in zip("qkv", tensor.split(rows), strict=True):
                out[f"{match[1]}self_attn.{x}_proj.weight"] = part
        elif match := re.fullmatch(r"(.*experts)\.0\.(gate|down)_proj\.weight", name):

            def stack(x: str, of: str = match[1]) -> Any:
                return torch.stack(
                    [stored[f"{of}.{i}.{x}_proj.weight"] for i in range(config.num_experts)]
                )

            if match[2] == "down":
                out[f"{match[1]}.down_proj"] = stack("down")
            else:
                out[f"{match[1]}.gate_up_proj"] = torch.cat([stack("gate"), stack("up")], 1)
        elif ".experts." not in name:
            out[name] = tensor
    return out


def oracle(
    path: Path, ids: list[int], gates: dict[int, NDArray[Any]] | None = None
) -> tuple[NDArray[np.float32], dict[int, NDArray[np.int64]]]:
    """Runs a checkpoint with transformers in float32.

    Args:
        gates: a dict that gets the gates of each layer, [T, K], in ascending order of their experts.

    Returns:
        The logits [T, V], and for each layer with experts those chosen, [T, K], ascending.
    """
    config, place, given = transformers.AutoConfig.from_pretrained(path), path, {}
    if config.model_type == "bailing_moe":
        place, given = None, {"config": config, "state_dict": _of_ling2(path, config)}
    model = (
        type(transformers.AutoModelForCausalLM.from_config(config))
        .from_pretrained(place, attn_implementation="eager", dtype=torch.float32, **given)
        .eval()
    )
    chosen: dict[int, NDArray[np.int64]] = {}

    def watch(layer: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            if len(args) == 1:  # Llama 4 runs all experts, and those not chosen on zeros
                weighed = args[0].view(module.num_experts, len(ids), -1).abs().sum(-1)
                chosen[layer] = weighed.argmax(0)[:, None].numpy()
                return
            if gates is not None:
                gates[layer] = args[2].gather(1, args[1].argsort(1)).numpy()
            chosen[layer] = np.sort(args[1].numpy())  # arguments of the module that runs experts

        return hook

    for i, layer in enumerate(model.model.layers):
        for name, module in layer.named_modules():
            if f".{name}".endswith(".experts"):
                module.register_forward_pre_hook(watch(i))
    with torch.no_grad():
        out = model(torch.tensor([ids]), use_cache=False)
    return out.logits[0].numpy(), chosen


def random_ids(count: int, *, seed: int = 1) -> list[int]:
    """Returns random tokens of the settings' vocabulary."""
    return [int(i) for i in np.random.default_rng(seed).integers(0, _BASE["vocab_size"], count)]
