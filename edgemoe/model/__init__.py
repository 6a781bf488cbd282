"""The one decoder that every family runs on."""

from edgemoe.model.decoder import Decoder
from edgemoe.model.kv import KV_TYPES, KvCache, KvTypes

__all__ = ["KV_TYPES", "Decoder", "KvCache", "KvTypes"]
