"""What the runtime lacks for models that it cannot run yet, in words for an error message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["missing"]

_MAMBA, _INDEXER, _HYPER = "Mamba layers", "a sparse indexer of keys", "hyper-connections"
_BY_NAME: Mapping[str, str] = {
    "afmoe": "norms on both sides of a layer's parts",
    "cohere2_moe": "attention and FFN side by side, and LayerNorm",
    "dbrx": "LayerNorm, and q, k and v in one matrix",
    "deepseek_v32": _INDEXER,
    "deepseek_v4": f"{_HYPER}, and compressed keys and values",
    "glm5_next": _INDEXER,
    "glm_moe_dsa": _INDEXER,
    "jamba": _MAMBA,
    "qwen4_exp": f"{_HYPER}, a sparse indexer and n-gram embeddings",
    "smallthinker": "a router that reads a layer's input",
}
"""By model_type. Only unsupported ones are looked up."""

_BY_KEY: Mapping[str, str] = {
    "hc_mult": _HYPER,
    "index_topk": _INDEXER,
    "mamba_d_state": _MAMBA,
    "ssm_state_size": _MAMBA,
    "is_encoder_decoder": "an encoder",
}
_EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "text_config",
    "ffn_config",
)


def missing(config: Mapping[str, Any]) -> str:
    """Returns what the runtime lacks for a model of an unsupported family; empty if the config does not tell.

    Args:
        config: the content of config.json.
    """
    name = config.get("model_type")
    if isinstance(name, str) and name in _BY_NAME:
        return _BY_NAME[name]
    for key, what in _BY_KEY.items():
        if config.get(key):
            return what
    if isinstance(name, str) and not any(config.get(key) for key in _EXPERTS):
        return "routed experts, as the model is dense"
    return ""
