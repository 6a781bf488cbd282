"""`llama4`: attention in chunks of 8192 tokens in three of four layers, which is not in the metadata."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgemoe.convert.gguf.architecture import ATTENTION, Architecture, Made
from edgemoe.convert.gguf.meta import Meta

__all__ = ["ARCHITECTURE"]

_CHUNK, _EVERY = 8192, 4


def _config(meta: Meta) -> dict[str, Any]:
    count, sparse = meta.layers, meta.layers_with("ffn_gate_inp.weight")
    turns = [(i + 1) % _EVERY != 0 for i in range(count)]
    return {
        "num_local_experts": meta.whole("expert_count"),
        "intermediate_size": meta.rows("ffn_gate_exps.weight"),
        "intermediate_size_mlp": meta.whole("feed_forward_length"),
        "interleave_moe_layer_step": meta.whole("interleave_moe_layer_step", 1),
        "moe_layers": sparse,
        "no_rope_layers": [int(turn) for turn in turns],
        "layer_types": ["chunked_attention" if turn else "full_attention" for turn in turns],
        "attention_chunk_size": _CHUNK,
        "floor_scale": _CHUNK,
        "attn_scale": 0.1,
        "attn_temperature_tuning": True,
        # Maverick, which has 128 experts, does not normalise queries and keys.
        "use_qk_norm": meta.whole("expert_count") != 128,
    }


ARCHITECTURE = Architecture(
    model_type="llama4_text",
    config=_config,
    layer={
        **ATTENTION,
        **{f"ffn_{x}": f"feed_forward.{x}_proj" for x in ("gate", "up", "down")},
        **{
            f"ffn_{x}_shexp": f"feed_forward.shared_expert.{x}_proj" for x in ("gate", "up", "down")
        },
        "ffn_gate_inp": "feed_forward.router",
    },
    made={
        "feed_forward.experts.gate_up_proj.{expert}": Made(
            ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
            lambda config, values: np.concatenate(values).T,
            lambda config, shapes: (shapes[0][1], shapes[0][0] + shapes[1][0]),
        ),
        "feed_forward.experts.down_proj.{expert}": Made(
            ("ffn_down_exps.weight",),
            lambda config, values: values[0].T,
            lambda config, shapes: (shapes[0][1], shapes[0][0]),
        ),
    },
)
