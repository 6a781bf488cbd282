"""A Hugging Face checkpoint directory: config.json, safetensors files and a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.convert.checkpoint import Bytes, file_identity
from edgemoe.convert.folder import exists, missing, read_file
from edgemoe.convert.quantised import Tensor, as_floats, without_quantisation
from edgemoe.convert.safetensors_file import StoredTensor, read_header, require_floats
from edgemoe.errors import FormatError, quoted, shortened
from edgemoe.file.parse import parse_object

__all__ = ["HFCheckpoint"]

_CONFIG = "config.json"
_MODELOPT = "hf_quant_config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MOST_INDEX = 64 << 20
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
)
_LONGEST_NUMBER = 8  # digits of an index into a stack


class HFCheckpoint:
    """A checkpoint directory; implements `StoredCheckpoint`.

    A stack of matrices `name` [N, R, C], in which some families store their experts, is presented as N matrices
    `name.0`, `name.1`, …, so that one expert can be read without the others. The weights of a depthwise convolution,
    [C, 1, taps], are presented as a matrix [C, taps].
    Quantised weights are presented as floats, under the names that a float checkpoint has for them. `config` is
    config.json without its quantisation settings. Opening reads no weights. Immutable.
    """

    def __init__(self, path: Path | str) -> None:
        """Opens a directory.

        Raises:
            FormatError: it is not a checkpoint, or a file in it is missing, truncated or malformed.
        """
        path = Path(path)
        if not path.is_dir():
            what = "is not a directory" if path.exists() else "no such directory"
            raise FormatError(f"{path}: {what}; expected a Hugging Face checkpoint")
        self.name: str = path.resolve().name
        config = _with_quantisation(path, _read_json(path, _CONFIG))
        self.config: Mapping[str, Any] = without_quantisation(config)
        found = {name: read_file(path, name) for name in _FILES}
        self.files: Mapping[str, bytes] = {n: data for n, data in found.items() if data is not None}
        stored = {name: _as_matrix(t) for name, t in _stored_tensors(path).items()}
        self.identity: str = file_identity(sorted({tensor.path for tensor in stored.values()}))
        self._tensors = _Tensors(_floats(path, config, stored))
        self.shapes: Mapping[str, tuple[int, ...]] = _Shapes(self._tensors)

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Reads one tensor as float32, C-contiguous.

        Raises:
            FormatError: there is no such tensor, or its file is truncated.
        """
        return self._tensor(name).read()

    def places(self, name: str) -> Iterator[Bytes]:
        """Yields the byte ranges that `tensor` reads. Raises FormatError when there is no such tensor."""
        return self._tensor(name).places()

    def _tensor(self, name: str) -> Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise FormatError(f"{self.name}: no tensor {name}") from None


def _as_matrix(tensor: StoredTensor) -> StoredTensor:
    shape = tensor.shape
    if len(shape) == 3 and shape[1] == 1 and tensor.name.endswith(("conv.weight", "conv1d.weight")):
        return replace(tensor, shape=(shape[0], shape[2]))
    return tensor


class _Tensors(Mapping[str, Tensor]):
    """Stored tensors by name. The matrices of a stack are created on access, as a stack may have millions."""

    def __init__(self, stored: Mapping[str, Tensor]) -> None:
        self._stored = stored
        for name, tensor in stored.items():
            if self._part(name) is not None:
                raise FormatError(f"{tensor.path}: {name} is stored, and a stack that has it too")

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._stored.get(name)
        if tensor is None or len(tensor.shape) == 3:
            tensor = self._part(name)
        if tensor is None:
            raise KeyError(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        for name, tensor in self._stored.items():
            if len(tensor.shape) == 3:
                yield from (f"{name}.{i}" for i in range(tensor.shape[0]))
            else:
                yield name

    def __len__(self) -> int:
        return sum(t.shape[0] if len(t.shape) == 3 else 1 for t in self._stored.values())

    def _part(self, name: str) -> Tensor | None:
        stack, _, number = name.rpartition(".")
        tensor = self._stored.get(stack)
        if tensor is None or len(tensor.shape) != 3 or len(number) > _LONGEST_NUMBER:
            return None
        if not number.isdecimal() or number != str(int(number)) or int(number) >= tensor.shape[0]:
            return None
        return tensor.part(int(number))


class _Shapes(Mapping[str, tuple[int, ...]]):
    def __init__(self, tensors: _Tensors) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _with_quantisation(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Adds the quantisation settings that older releases of ModelOpt write to a separate file."""
    key, content = "quantization_config", read_file(path, _MODELOPT, is_copied=False)
    if content is None or config.get(key):
        return config
    values = parse_object(content, str(path / _MODELOPT)).get("quantization")
    if not isinstance(values, dict):
        raise FormatError(
            f"{path / _MODELOPT}: quantization must be an object, got {quoted(values)}"
        )
    return {**config, key: {**values, "quant_method": "modelopt"}}


def _floats(
    path: Path, config: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> Mapping[str, Tensor]:
    """Returns the tensors, quantised ones presented as floats.

    Raises:
        FormatError: a tensor's type or quantisation is not supported.
    """
    tensors = as_floats(config, stored, where=str(path / _CONFIG))
    for tensor in tensors.values():
        if isinstance(tensor, StoredTensor):
            require_floats(tensor)
    return tensors


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Returns all tensors of a single or sharded checkpoint."""
    # If a directory has both, the single file is used, as in transformers.
    if exists(path / _SINGLE):
        return read_header(path / _SINGLE)
    if not exists(path / _INDEX):
        raise _without_index(path)
    weight_map = _read_json(path, _INDEX, most=_MOST_INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise FormatError(
            f"{path / _INDEX}: weight_map must be an object, got {quoted(weight_map)}"
        )
    shards: dict[str, dict[str, StoredTensor]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or (shard not in shards and Path(shard).name != shard):
            raise FormatError(
                f"{path / _INDEX}: {shortened(name)}: expected a file name, got {quoted(shard)}"
            )
        if shard not in shards:
            shards[shard] = read_header(path / shard)
        if name not in shards[shard]:
            raise FormatError(
                f"{path / shard}: no tensor {shortened(name)}, which {_INDEX} places there"
            )
    # Tensors that the index omits count too, so that they are reported as unknown rather than dropped.
    tensors = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    return tensors | {name: shards[shard][name] for name, shard in weight_map.items()}


def _without_index(path: Path) -> FormatError:
    found = sorted(p.name for p in path.glob("*.safetensors"))
    if not found:
        return FormatError(f"{path}: no {_SINGLE} and no {_INDEX}; only safetensors are supported")
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return FormatError(
        f"{path}: has {found[0]}{more}, but no {_INDEX}, which says what is in which file, and no {_SINGLE}"
    )


def _read_json(path: Path, name: str, *, most: int = 16 << 20) -> dict[str, Any]:
    content = read_file(path, name, is_copied=False)
    if content is None:
        raise missing(path / name)
    return parse_object(content, str(path / name), most=most)
