"""The values that every mixer of a model is built from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgemoe.config import ModelConfig
from edgemoe.model.kv import KvTypes
from edgemoe.model.rope import Rope
from edgemoe.model.scratch import Scratch
from edgemoe.ops import Ops
from edgemoe.specs import RopeSpec

__all__ = ["Setup"]


@dataclass(frozen=True, slots=True)
class Setup:
    """What all mixers of a model share."""

    config: ModelConfig
    ops: Ops
    ropes: Mapping[RopeSpec, Rope]
    scratch: Scratch
    context: int
    """The most tokens of a sequence."""
    chunk: int
    """The most tokens of a pass."""
    types: KvTypes
    """How keys and values are stored."""
