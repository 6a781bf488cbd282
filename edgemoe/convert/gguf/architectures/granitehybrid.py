"""`granitehybrid`: Granite-4.0-H, with Mamba-2 layers."""

from __future__ import annotations

from typing import Any

from edgemoe.convert.gguf.architecture import ATTENTION, HALVES, Architecture
from edgemoe.convert.gguf.architectures.granitemoe import EXPERTS, SHARED, multipliers
from edgemoe.convert.gguf.architectures.mamba2 import mamba2, sizes
from edgemoe.convert.gguf.meta import Meta

__all__ = ["ARCHITECTURE"]


def _config(meta: Meta) -> dict[str, Any]:
    mamba, attention = sizes(meta), set(meta.layers_with("attn_q.weight"))
    turns = meta.flag("rope.scaling.finetuned", False)
    return {
        **multipliers(meta),
        "num_local_experts": meta.whole("expert_count"),
        "intermediate_size": meta.rows("ffn_gate_exps.weight"),
        "shared_intermediate_size": meta.rows("ffn_gate_shexp.weight"),
        "layer_types": ["attention" if i in attention else "mamba" for i in range(meta.layers)],
        "position_embedding_type": "rope" if turns else "nope",
        "mamba_n_heads": mamba["heads"],
        "mamba_d_head": mamba["head_dim"],
        "mamba_d_state": mamba["states"],
        "mamba_n_groups": mamba["groups"],
        "mamba_d_conv": mamba["taps"],
        "mamba_expand": mamba["heads"] * mamba["head_dim"] // meta.whole("embedding_length"),
        "mamba_conv_bias": meta.has("ssm_conv1d.bias"),
        "mamba_proj_bias": meta.has("ssm_in.bias"),
        "attention_bias": meta.has("attn_q.bias"),
    }


ARCHITECTURE = Architecture(
    model_type="granitemoehybrid",
    config=_config,
    layer={
        **ATTENTION,
        **EXPERTS,
        "ssm_in": "mamba.in_proj",
        "ssm_conv1d": "mamba.conv1d",
        "ssm_dt.bias": "mamba.dt_bias",
        "ssm_out": "mamba.out_proj",
    },
    made={**SHARED, **mamba2("mamba.")},
    halves=HALVES,
)
