"""Small valid models and files, from which cases are made."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from safetensors.numpy import save
from tiny import MemoryCheckpoint, tiny_checkpoint, tiny_paths

from edgemoe.convert.convert import convert
from edgemoe.file.append import add_sections
from edgemoe.file.format import MoeFile
from edgemoe.file.reader import open_moe

_FOLDER = tempfile.TemporaryDirectory(prefix="edgemoe-fuzz-")


@cache
def checkpoint() -> MemoryCheckpoint:
    """Returns a checkpoint with one layer of four experts, of 12 thousand weights each."""
    return tiny_checkpoint(layers=1, experts=4, width=16)


@cache
def checkpoint_files() -> dict[str, bytes]:
    """Returns the same checkpoint as the files of a folder."""
    import json

    source = checkpoint()
    tensors = save({name: source.tensor(name) for name in source.shapes}, {"format": "pt"})
    config = json.dumps(source.config).encode()
    return {"model.safetensors": tensors, "config.json": config, **source.files}


@cache
def model_path() -> Path:
    """Returns the path of the model, which has the sections that schedulers use."""
    path = Path(_FOLDER.name) / "tiny.moe"
    convert(checkpoint(), path)
    allocation = b'{"edgemoe_allocation": 1, "method": "dp", "settings": {}, "layers": [0], "bits": [[2, 4, 8, 8]], "protected": []}'
    generation = b'{"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05, "eos_token_id": [258]}'
    sections = {
        "allocation": allocation,
        "paths": tiny_paths(1, 4),
        "generation_config.json": generation,
    }
    add_sections(path, sections)
    return path


@cache
def model() -> MoeFile:
    """Returns the model, opened."""
    return open_moe(model_path())
