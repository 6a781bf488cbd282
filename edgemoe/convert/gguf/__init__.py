"""GGUF files read as if they were Hugging Face checkpoints."""

from edgemoe.convert.gguf.checkpoint import BROKEN, GGUFCheckpoint, open_gguf

__all__ = ["BROKEN", "GGUFCheckpoint", "open_gguf"]
