"""A Hugging Face checkpoint directory: config.json, safetensors files and a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.convert.checkpoint import file_identity
from edgemoe.convert.safetensors_file import StoredTensor, read_header
from edgemoe.errors import FormatError, quoted

__all__ = ["HFCheckpoint"]

_CONFIG = "config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
)


class HFCheckpoint:
    """Reads a checkpoint directory; implements `Checkpoint`.

    A stack of matrices `name` [N, R, C], in which some families store their experts, is presented
    as N matrices `name.0`, `name.1`, …, so that one expert can be read without the others.
    Opening reads no tensor. Immutable.
    """

    def __init__(self, path: Path | str) -> None:
        """Opens a directory.

        Raises:
            FormatError: it is no checkpoint, or a file in it is missing, truncated or malformed.
        """
        path = Path(path)
        if not path.is_dir():
            what = "is not a directory" if path.exists() else "no such directory"
            raise FormatError(f"{path}: {what}; expected a Hugging Face checkpoint")
        self.name: str = path.resolve().name
        self.identity: str = file_identity(sorted(path.glob("*.safetensors")))
        self.config: Mapping[str, Any] = _read_json(path / _CONFIG)
        self.files: Mapping[str, bytes] = {
            name: (path / name).read_bytes() for name in _FILES if (path / name).is_file()
        }
        self._tensors: dict[str, StoredTensor] = {}
        for tensor in _stored_tensors(path).values():
            for part in tensor.parts() if len(tensor.shape) == 3 else [tensor]:
                self._tensors[part.name] = part
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tensor.shape for name, tensor in self._tensors.items()
        }

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Reads one tensor as float32, C-contiguous.

        Raises:
            FormatError: there is no such tensor, or its file is truncated.
        """
        if name not in self._tensors:
            raise FormatError(f"{self.name}: no tensor {name}")
        return self._tensors[name].read()


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Returns all tensors of a single or sharded checkpoint."""
    # transformers, too, prefers the single file where a directory has both.
    if (path / _SINGLE).is_file():
        return read_header(path / _SINGLE)
    if not (path / _INDEX).is_file():
        raise FormatError(f"{path}: no {_SINGLE} and no {_INDEX}; only safetensors are supported")
    weight_map = _read_json(path / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise FormatError(
            f"{path / _INDEX}: weight_map must be an object, got {quoted(weight_map)}"
        )
    shards: dict[str, dict[str, StoredTensor]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise FormatError(f"{path / _INDEX}: {name}: expected a file name, got {quoted(shard)}")
        if shard not in shards:
            shards[shard] = read_header(path / shard)
        if name not in shards[shard]:
            raise FormatError(f"{path / shard}: no tensor {name}, which {_INDEX} places there")
    # Those that the index forgot count too, so that they are reported as unknown, not dropped.
    tensors = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    return tensors | {name: shards[shard][name] for name, shard in weight_map.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise FormatError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values
