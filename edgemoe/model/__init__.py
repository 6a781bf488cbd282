"""The one decoder that every family runs on."""

from edgemoe.model.batch import Batch, Slice
from edgemoe.model.decoder import (
    Decoder,
    kept_rope_bytes,
    layer_state_bytes,
    read_bytes,
    scratch_bytes,
    state_bytes,
    state_pieces,
)
from edgemoe.model.kv import KV_BITS, KV_TYPES, KvTypes
from edgemoe.model.kv_table import KvTable
from edgemoe.model.layered import Layered
from edgemoe.model.router import MOST_AHEAD
from edgemoe.model.state import SequenceState, State

__all__ = [
    "KV_BITS", "KV_TYPES", "MOST_AHEAD", "Batch", "Decoder", "KvTable", "KvTypes", "Layered", "SequenceState",
    "Slice", "State", "kept_rope_bytes", "layer_state_bytes", "read_bytes", "scratch_bytes", "state_bytes",
    "state_pieces",
]  # fmt: skip
