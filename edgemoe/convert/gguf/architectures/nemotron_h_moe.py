"""`nemotron_h_moe`: each layer is Mamba-2, attention or experts; experts have no gate matrix."""

from __future__ import annotations

from typing import Any

from edgemoe.convert.gguf.architecture import HALVES, Architecture
from edgemoe.convert.gguf.architectures.mamba2 import mamba2, sizes
from edgemoe.convert.gguf.meta import Meta

__all__ = ["ARCHITECTURE"]


def _config(meta: Meta) -> dict[str, Any]:
    mamba = sizes(meta)
    attention, experts = (
        set(meta.layers_with(f"{name}.weight")) for name in ("attn_q", "ffn_gate_inp")
    )
    kinds = {**dict.fromkeys(attention, "attention"), **dict.fromkeys(experts, "moe")}
    return {
        "layers_block_type": [kinds.get(i, "mamba") for i in range(meta.layers)],
        "layer_norm_epsilon": meta.positive(
            "attention.layer_norm_rms_epsilon", meta.get("attention.layer_norm_epsilon")
        ),
        "mamba_num_heads": mamba["heads"],
        "mamba_head_dim": mamba["head_dim"],
        "ssm_state_size": mamba["states"],
        "n_groups": mamba["groups"],
        "conv_kernel": mamba["taps"],
        "use_conv_bias": meta.has("ssm_conv1d.bias"),
        "mamba_proj_bias": meta.has("ssm_in.bias"),
        "attention_bias": meta.has("attn_q.bias"),
        "mlp_hidden_act": "relu2",
        "n_routed_experts": meta.whole("expert_count"),
        "n_shared_experts": meta.whole("expert_shared_count", 1),
        "moe_intermediate_size": meta.rows("ffn_up_exps.weight"),
        "moe_shared_expert_intermediate_size": meta.rows("ffn_up_shexp.weight"),
        "n_group": meta.whole("expert_group_count", 1),
        "topk_group": meta.whole("expert_group_used_count", 1),
        "norm_topk_prob": meta.flag("expert_weights_norm", False),
        "routed_scaling_factor": meta.positive("expert_weights_scale", 1.0),
    }


ARCHITECTURE = Architecture(
    model_type="nemotron_h",
    config=_config,
    prefix="backbone.layers.",
    whole={
        "token_embd.weight": "backbone.embeddings.weight",
        "output_norm.weight": "backbone.norm_f.weight",
    },
    layer={
        "attn_norm": "norm",
        **{f"attn_{x}": f"mixer.{x}_proj" for x in "qkv"},
        "attn_output": "mixer.o_proj",
        "ssm_in": "mixer.in_proj",
        "ssm_conv1d": "mixer.conv1d",
        "ssm_dt.bias": "mixer.dt_bias",
        "ssm_out": "mixer.out_proj",
        "ffn_gate_inp": "mixer.gate",
        "exp_probs_b.bias": "mixer.gate.e_score_correction_bias",
        **{
            f"ffn_{x}_exps.weight": f"mixer.experts.{{expert}}.{x}_proj.weight"
            for x in ("up", "down")
        },
        **{f"ffn_{x}_shexp": f"mixer.shared_experts.{x}_proj" for x in ("up", "down")},
    },
    made=mamba2("mixer."),
    halves=HALVES,  # llama.cpp permutes their rows although there is no RoPE
)
