"""GGUF files presented as Hugging Face checkpoints, with one small module per architecture."""

from edgemoe.convert.gguf.checkpoint import GGUFCheckpoint
from edgemoe.convert.gguf.reader import BROKEN, header_end, open_gguf

__all__ = ["BROKEN", "GGUFCheckpoint", "header_end", "open_gguf"]
