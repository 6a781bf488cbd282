"""Qwen3-VL-MoE's text: Qwen3-MoE with experts stored in stacks, inputs first; the vision tower is left out."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import ModelConfig
from edgemoe.convert.families import qwen3_moe
from edgemoe.convert.families.family import FUSED_EXPERTS, NAMED_EXPERTS, Family, Source
from edgemoe.convert.settings import Settings

__all__ = ["FAMILY", "transposed", "transposed_gate", "transposed_up"]


def _config(settings: Settings) -> ModelConfig:
    """Returns the config of Qwen3-MoE, but with gates renormalised whatever `norm_topk_prob` says."""
    config = qwen3_moe.FAMILY.config(settings)
    return dataclasses.replace(config, family="qwen3_vl_moe", renormalise=True)


def transposed(stored: NDArray[Any], _: object) -> NDArray[Any]:
    """Returns a matrix that is stored with its inputs first, [cols, rows]."""
    return np.asarray(stored.T)


def transposed_gate(stored: NDArray[Any], _: object) -> NDArray[Any]:
    """Returns the first of two matrices that are stored together with their inputs first, [cols, 2 rows]."""
    return np.asarray(stored[:, : stored.shape[1] // 2].T)


def transposed_up(stored: NDArray[Any], _: object) -> NDArray[Any]:
    """Returns the second of two matrices that are stored together with their inputs first, [cols, 2 rows]."""
    return np.asarray(stored[:, stored.shape[1] // 2 :].T)


def _left_out(config: ModelConfig, name: str) -> str:
    return "the vision tower" if name.startswith(("model.visual.", "visual.")) else ""


FAMILY = Family(
    config=_config,
    default_theta=5_000_000.0,
    roots=("model.language_model.", "model."),
    experts=(  # as released; as written by transformers 5; as in quantised releases
        {
            **FUSED_EXPERTS,
            "gate": Source("mlp.experts.gate_up_proj.{expert}", fold=transposed_gate),
            "up": Source("mlp.experts.gate_up_proj.{expert}", fold=transposed_up),
            "down": Source("mlp.experts.down_proj.{expert}", fold=transposed),
        },
        FUSED_EXPERTS,
        NAMED_EXPERTS,
    ),
    left_out=_left_out,
)
