"""`gpt-oss`: experts with biases; every second layer has a sliding window, which is not in the metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgemoe.convert.gguf.architecture import ATTENTION_POST, Architecture, Array, Made
from edgemoe.convert.gguf.meta import Meta

__all__ = ["ARCHITECTURE"]


def _config(meta: Meta) -> dict[str, Any]:
    return {
        "num_local_experts": meta.whole("expert_count"),
        "intermediate_size": meta.rows("ffn_gate_exps.weight"),
        "sliding_window": meta.whole("attention.sliding_window"),
        "layer_types": [
            "full_attention" if i % 2 else "sliding_attention" for i in range(meta.layers)
        ],
        "swiglu_limit": 7.0,
    }


def _turns(values: Sequence[Array], axis: int) -> Array:
    """Interleaves gate and up along the last axis; matrices (`axis` 1) are transposed first."""
    pair = np.stack([x.T if axis else x for x in values], axis=-1)
    return pair.reshape(*pair.shape[:-2], -1)


def _gate_up(config: Mapping[str, Any], values: Sequence[Array]) -> Array:
    return _turns(values, 1)


def _gate_up_bias(config: Mapping[str, Any], values: Sequence[Array]) -> Array:
    return _turns(values, 0)


ARCHITECTURE = Architecture(
    model_type="gpt_oss",
    config=_config,
    layer={
        **ATTENTION_POST,
        "attn_sinks.weight": "self_attn.sinks",
        "ffn_gate_inp": "mlp.router",
        "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
    },
    made={
        "mlp.experts.gate_up_proj.{expert}": Made(
            ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
            _gate_up,
            lambda config, shapes: (shapes[0][1], shapes[0][0] + shapes[1][0]),
        ),
        "mlp.experts.gate_up_proj_bias": Made(
            ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
            _gate_up_bias,
            lambda config, shapes: (shapes[0][0], shapes[0][1] + shapes[1][1]),
        ),
        "mlp.experts.down_proj.{expert}": Made(
            ("ffn_down_exps.weight",),
            lambda config, values: values[0].T,
            lambda config, shapes: (shapes[0][1], shapes[0][0]),
        ),
    },
    rope={"truncate": False},
)
