"""`qwen3moe`, and `qwen3vlmoe`, whose text part is the same."""

from __future__ import annotations

from typing import Any

from edgemoe.convert.gguf.architecture import (
    ATTENTION,
    NAMED_EXPERTS,
    QK_NORM,
    Architecture,
)
from edgemoe.convert.gguf.meta import Meta

__all__ = ["ARCHITECTURE"]


def _config(meta: Meta) -> dict[str, Any]:
    return {
        "norm_topk_prob": True,  # the only setting in llama.cpp
        "use_sliding_window": False,
    }


ARCHITECTURE = Architecture(
    model_type="qwen3_moe",
    config=_config,
    layer={**ATTENTION, **QK_NORM, **NAMED_EXPERTS},
)
