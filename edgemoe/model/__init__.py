"""The one decoder that every family runs on."""

from edgemoe.model.decoder import Decoder
from edgemoe.model.kv import KvCache

__all__ = ["Decoder", "KvCache"]
