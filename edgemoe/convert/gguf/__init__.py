"""GGUF files read as if they were Hugging Face checkpoints, one small module an architecture."""

from edgemoe.convert.gguf.checkpoint import GGUFCheckpoint
from edgemoe.convert.gguf.reader import BROKEN, header_end, open_gguf

__all__ = ["BROKEN", "GGUFCheckpoint", "header_end", "open_gguf"]
