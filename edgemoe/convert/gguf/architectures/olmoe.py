"""`olmoe`."""

from __future__ import annotations

from typing import Any

from edgemoe.convert.gguf.architecture import ATTENTION, NAMED_EXPERTS, QK_NORM, Architecture
from edgemoe.convert.gguf.meta import Meta

__all__ = ["ARCHITECTURE"]


def _config(meta: Meta) -> dict[str, Any]:
    # llama.cpp, too, supports it only without renormalised gates.
    out: dict[str, Any] = {
        "norm_topk_prob": False,
        "intermediate_size": meta.rows("ffn_gate_exps.weight"),
    }
    if meta.get("attention.clamp_kqv"):
        out["clip_qkv"] = meta.positive("attention.clamp_kqv")
    return out


ARCHITECTURE = Architecture(
    model_type="olmoe", config=_config, layer={**ATTENTION, **QK_NORM, **NAMED_EXPERTS}
)
