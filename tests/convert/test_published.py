"""Plans from the configurations of published models, without weights: every tensor fits, and sizes are as known."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import families
import pytest
import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from edgemoe.convert.source import SourceModel
from edgemoe.file.layout import Layout, expert_ladder
from edgemoe.model import KvTypes, state_bytes
from edgemoe.quant import SCHEMES

GIB, MIB = 1 << 30, 1 << 20
_QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


@dataclasses.dataclass(frozen=True)
class Published:
    """A model's config.json, beyond the defaults of its class, and what is known of its sizes."""

    settings: Mapping[str, Any]
    parameters: float
    """All parameters, in billions, as its makers say."""
    expert: float
    """The MiB of one expert at 4 bits."""
    experts: float
    """The GiB of all experts."""
    state: int
    """The bytes of a sequence's state that do not grow with it, without snapshots."""
    position: int
    """The bytes of each position of a sequence."""


PUBLISHED = {
    "Qwen3.6-35B-A3B": Published(
        {"model_type": "qwen3_5_moe_text", "rope_parameters": _QWEN_ROPE},
        34.7, 1.7, 16.9, 30 * (2 * MIB + 96 * 1024), 20 * 1024,
    ),
    "Qwen3-Next-80B-A3B": Published(
        {"model_type": "qwen3_next", "rope_parameters": _QWEN_ROPE},
        79.7, 1.7, 40.5, 36 * (2 * MIB + 96 * 1024), 24 * 1024,
    ),
    "gpt-oss-20b": Published(
        {"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32},
        20.9, 13.4, 10.0, 0, 48 * 1024,
    ),
    "Gemma-4-26B-A4B": Published(
        {
            "model_type": "gemma4_text", "hidden_size": 2816, "intermediate_size": 2112,
            "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2,
            "attention_k_eq_v": True, "enable_moe_block": True, "num_experts": 128,
            "top_k_experts": 8, "moe_intermediate_size": 704, "hidden_size_per_layer_input": 0,
            "sliding_window": 1024, "final_logit_softcapping": 30.0,
        },
        25.2, 3.2, 12.0, 0, 5 * 4096 + 25 * 8192,
    ),
    "Laguna-XS": Published(
        {
            "model_type": "laguna", "moe_routed_scaling_factor": 2.5,
            "layer_types": (["full_attention"] + ["sliding_attention"] * 3) * 10,
            "num_attention_heads_per_layer": [48, 64, 64, 64] * 10,
        },
        33.4, 1.7, 16.5, 0, 40 * 4096,
    ),
    "gpt-oss-120b": Published({"model_type": "gpt_oss"}, 116.8, 13.4, 60.1, 0, 72 * 1024),
    # Latents: 512 + 64 columns a position and layer, in float16.
    "GLM-4.7-Flash": Published(
        {"model_type": "glm4_moe_lite", **_rope(1e6)}, 29.9, 5.1, 14.6, 0, 47 * 2 * 576
    ),
    "DeepSeek-V2-Lite": Published(
        {
            "model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944, "vocab_size": 102400,
            "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16,
            "num_key_value_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
            "first_k_dense_replace": 1, "q_lora_rank": None, **_rope(1e4),
        },
        15.7, 4.6, 7.5, 0, 27 * 2 * 576,
    ),
    "DeepSeek-V3": Published(
        {"model_type": "deepseek_v3", **_rope(1e4)}, 671.0, 23.6, 342.6, 0, 61 * 2 * 576
    ),
    "Mistral-Small-4-119B": Published({"model_type": "mistral4"}, 119.0, 13.5, 60.8, 0, 36 * 2 * 320),
    "Llama-4-Scout": Published(
        {
            "model_type": "llama4_text", "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 5e5, "factor": 16.0, "low_freq_factor": 1.0,
                "high_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            },
        },
        107.8, 67.5, 50.6, 0, 48 * 4096
    ),
    "Phi-3.5-MoE": Published(
        {
            "model_type": "phimoe", "attention_bias": True, "lm_head_bias": True,
            "sliding_window": 131072, "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096,
                "short_factor": [1.0] * 64, "long_factor": [2.0] * 64,
                "short_mscale": 1.243163121016122, "long_mscale": 1.243163121016122,
            },
        },
        41.9, 42.2, 21.1, 0, 32 * 4096,
    ),
    "Kimi-Linear-48B-A3B": Published(
        {
            "model_type": "kimi_linear", "linear_attn_config": {
                "full_attn_layers": [*range(4, 25, 4), 27], "head_dim": 128, "num_heads": 32,
                "kda_layers": [i for i in range(1, 27) if i % 4], "short_conv_kernel_size": 4,
            },
        },
        49.1, 3.8, 24.7, 20 * (2 * MIB + 3 * 3 * 4096 * 4), 7 * 2 * 576,
    ),
    "Ling-3.0-flash": Published(
        {"model_type": "bailing_hybrid"}, 124.4, 3.2, 63.3, 35 * (2 * MIB + 3 * 3 * 4096 * 4), 7 * 2 * 576,
    ),
    "Ling-mini-2.0": Published(
        {
            "model_type": "bailing_moe", "vocab_size": 157184, "hidden_size": 2048, "intermediate_size": 5120,
            "num_hidden_layers": 20, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
            "num_experts": 256, "num_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
            "moe_intermediate_size": 512, "first_k_dense_replace": 1, "score_function": "sigmoid", "use_qk_norm": True,
            "partial_rotary_factor": 0.5, "routed_scaling_factor": 2.5, "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6, **_rope(6e5),
        },
        16.3, 1.7, 8.1, 0, 20 * 2048,
    ),
    "LFM2-8B-A1B": Published(
        {
            "model_type": "lfm2_moe",
            "num_hidden_layers": 24,
            "layer_types": ["full_attention" if i in (2, 6, 10, 14, 18, 21) else "conv" for i in range(24)],
        },
        8.34, 5.9, 4.1, 18 * 16 * 1024, 12 * 1024,
    ),
    "Granite-4.0-H-Tiny": Published(
        {
            "model_type": "granitemoehybrid", "hidden_size": 1536, "intermediate_size": 512,
            "shared_intermediate_size": 1024, "num_hidden_layers": 40, "num_attention_heads": 12,
            "num_key_value_heads": 4, "num_local_experts": 64, "num_experts_per_tok": 6,
            "mamba_n_heads": 48, "mamba_d_head": 64, "mamba_d_state": 128, "tie_word_embeddings": True,
            "vocab_size": 100352, "position_embedding_type": "nope",
            "layer_types": ["attention" if i in (5, 15, 25, 35) else "mamba" for i in range(40)],
        },
        6.94, 1.27, 3.2, 36 * (48 * 64 * 128 * 4 + 3 * (48 * 64 + 256) * 4), 8 * 1024,
    ),
    "Nemotron-3-Nano-30B-A3B": Published(
        {
            "model_type": "nemotron_h", "hidden_size": 2688, "num_key_value_heads": 2,
            "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            "mamba_num_heads": 64, "n_routed_experts": 128, "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712, "num_experts_per_tok": 6,
        },
        31.6, 5.3, 15.4, 23 * (2 * 1024 * 1024 + 3 * 6144 * 4), 6 * 1024,
    ),
}  # fmt: skip


_RENAMED = ("bailing_hybrid", "kimi_linear", "phimoe")
"""Models that are stored under other names than transformers has in memory."""


class Shapes:
    """A checkpoint that has only names and shapes of tensors."""

    name, identity = "published", ""

    def __init__(self, config: Any) -> None:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        self.config, self.files = json.loads(json.dumps(config.to_dict())), {}  # as it is on disk
        self.shapes = {}
        weights = model.state_dict()
        if config.model_type in _RENAMED:
            weights = revert_weight_conversion(model, weights)
        if config.model_type == "bailing_moe":
            weights = families.as_ling2(weights)
        for name, weight in weights.items():
            if config.model_type == "kimi_linear":  # saved as parts of the experts' module
                name = re.sub(r"block_sparse_moe\.(?=(gate|up|down)_proj)", "mlp.", name)
            shape = tuple(weight.shape)
            if ".experts." in name and len(shape) == 3:  # as `HFCheckpoint` presents a stack
                self.shapes |= {f"{name}.{i}": shape[1:] for i in range(shape[0])}
            else:
                is_conv = len(shape) == 3 and shape[1] == 1
                self.shapes[name] = (shape[0], shape[2]) if is_conv else shape
        if config.tie_word_embeddings:
            del self.shapes["lm_head.weight"]

    def tensor(self, name: str) -> Any:
        raise AssertionError(f"{name} is read")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_plan_of_a_published_configuration(name: str) -> None:
    known = PUBLISHED[name]
    checkpoint = Shapes(transformers.AutoConfig.for_model(**known.settings))
    config = SourceModel(checkpoint).config
    stored = sum(_count(shape) for shape in checkpoint.shapes.values())
    assert stored / 1e9 == pytest.approx(known.parameters, abs=0.1)
    count, scheme = len(config.moe_layers) * config.num_experts, SCHEMES["nested"]
    layout = Layout(config, scheme, (4,), tuple(expert_ladder(scheme, (4,), None)), (1,) * count)
    experts = [p for n, p in layout.places.items() if n.startswith("experts.")]
    assert len(experts) == count
    assert sum(experts[0].sizes) / MIB == pytest.approx(known.expert, rel=0.03)
    assert sum(p.padded_bytes for p in experts) / GIB == pytest.approx(known.experts, rel=0.01)
    fixed = 2 * state_bytes(config, 32, KvTypes()) - state_bytes(config, 64, KvTypes())
    assert fixed == 4 * known.state  # before and after a pass, and two snapshots
    assert state_bytes(config, 4096, KvTypes(), 4096) - fixed == 4096 * known.position


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
