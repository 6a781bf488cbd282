"""The one decoder that every family runs on."""

from edgemoe.model.decoder import MOST_AHEAD, Decoder
from edgemoe.model.kv import KV_TYPES, KvCache, KvTypes

__all__ = ["KV_TYPES", "MOST_AHEAD", "Decoder", "KvCache", "KvTypes"]
