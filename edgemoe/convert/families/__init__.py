"""The supported families, by the `model_type` of config.json."""

from __future__ import annotations

from collections.abc import Mapping

from edgemoe.convert.families import granitemoe, mixtral, olmoe, qwen2_moe, qwen3_moe
from edgemoe.convert.families.family import Family

__all__ = ["FAMILIES"]

FAMILIES: Mapping[str, Family] = {
    "granitemoe": granitemoe.FAMILY,
    "granitemoeshared": granitemoe.FAMILY,
    "mixtral": mixtral.FAMILY,
    "olmoe": olmoe.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
}
