"""A GGUF file presented with the names, layouts and config.json of the Hugging Face checkpoint it was made from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.convert.checkpoint import Bytes, file_identity
from edgemoe.convert.folder import read_file
from edgemoe.convert.gguf.architecture import Architecture, Array, Made, settings
from edgemoe.convert.gguf.architectures import ARCHITECTURES
from edgemoe.convert.gguf.meta import Meta
from edgemoe.convert.gguf.reader import BROKEN, READ_AT_ONCE, GGUFFile
from edgemoe.convert.gguf.tokenizer import end_tokens, tokenizer_files
from edgemoe.errors import FormatError, quoted

if TYPE_CHECKING:
    from gguf import ReaderTensor

__all__ = ["GGUFCheckpoint"]

_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = re.compile(r"blk\.(\d{1,8})\.(.+)")


@dataclass(frozen=True, slots=True)
class _Entry:
    """The origin of one tensor of the checkpoint."""

    of: tuple[ReaderTensor, ...]
    shape: tuple[int, ...]
    expert: int | None = None
    """The index of the matrix in the stacks; None if they are not stacks."""
    made: Made | None = None
    heads: str | None = None
    """The key of config.json with the number of heads, if RoPE pairs must be moved half a head apart; else None."""
    scales: ReaderTensor | None = None
    """The factors of a tensor in NVFP4: one for each expert, or one for all."""


class GGUFCheckpoint:
    """A GGUF file, or all parts of a split one, as a Hugging Face checkpoint.

    Tensors are dequantised one at a time, and one matrix at a time from a stack of experts. The file stays mapped while
    the object lives. A file named LICENSE in the same directory is included. Implements `StoredCheckpoint`. Immutable.

    Raises:
        FormatError: the file is not GGUF or truncated, or has an unsupported architecture, value or tokenizer.
        ImportError: the package gguf is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.name = path.name
        file = GGUFFile(path)
        self.identity = file_identity(file.paths)
        self._paths = file.path_of
        shapes = {name: _shape(tensor) for name, tensor in file.tensors.items()}
        factors = file.tensors.get(READ_AT_ONCE)
        meta = Meta(
            file.meta, shapes, self.name,
            None if factors is None else self._dequantised(factors, None).reshape(-1).tolist(),
        )  # fmt: skip
        arch = ARCHITECTURES.get(meta.architecture)
        if arch is None:
            raise FormatError(
                f"{self.name}: architecture {quoted(meta.architecture)} is not supported in GGUF; "
                f"supported: {', '.join(ARCHITECTURES)}"
            )
        self.config: Mapping[str, Any] = self._config(meta, arch, file)
        self._entries = _Entries(self.name, meta, arch, self.config).of(file.tensors)
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: entry.shape for name, entry in self._entries.items()
        }
        files = tokenizer_files(
            file.meta, context_length=self.config["max_position_embeddings"], where=self.name
        )
        licence = read_file(path.parent, "LICENSE")
        if licence is not None:
            files["LICENSE"] = licence
        self.files: Mapping[str, bytes] = files

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Dequantises one tensor, in the layout of a Hugging Face checkpoint.

        Raises:
            FormatError: there is no such tensor, or its type or shape cannot be decoded.
        """
        entry = self._entry(name)
        parts = [self._dequantised(tensor, entry.expert) for tensor in entry.of]
        with np.errstate(all="ignore"):  # the users of tensors check that values are finite
            values = parts[0] if entry.made is None else entry.made.make(self.config, parts)
            if entry.scales is not None:
                scales = self._dequantised(entry.scales, None).reshape(-1)
                values = values * scales[entry.expert if entry.expert and len(scales) > 1 else 0]
        if entry.heads is not None:
            values = _unpermuted(values, self.config[entry.heads])
        # A copy, never a view of the mapped file.
        return np.array(values.reshape(entry.shape), np.float32, order="C")

    def places(self, name: str) -> Iterator[Bytes]:
        """Yields the byte ranges that `tensor` reads. Raises FormatError when there is no such tensor."""
        entry = self._entry(name)
        for tensor in entry.of:
            size, start = int(tensor.n_bytes), int(tensor.data_offset)
            if entry.expert is not None:
                size //= _shape(tensor)[0]
                start += entry.expert * size
            yield Bytes(self._paths[tensor.name], start, start + size)
        if entry.scales is not None:
            start = int(entry.scales.data_offset)
            yield Bytes(self._paths[entry.scales.name], start, start + int(entry.scales.n_bytes))

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise FormatError(f"{self.name}: no tensor {name}")
        return entry

    def _dequantised(self, tensor: ReaderTensor, expert: int | None) -> Array:
        from gguf import dequantize

        shape = _shape(tensor)
        try:
            data = tensor.data if expert is None else tensor.data[expert]
            with np.errstate(all="ignore"):  # the users of tensors check that values are finite
                values = dequantize(data, tensor.tensor_type)
            return np.asarray(values.reshape(shape if expert is None else shape[1:]))
        except BROKEN as error:
            kind = tensor.tensor_type.name
            raise FormatError(
                f"{self.name}: cannot decode {quoted(tensor.name)} ({kind}): {error}"
            ) from error

    def _config(self, meta: Meta, arch: Architecture, file: GGUFFile) -> dict[str, Any]:
        config = {"model_type": arch.model_type, **settings(meta), **arch.config(meta)}
        if config["rope_scaling"] is not None:
            config["rope_scaling"] |= arch.rope
        return config | end_tokens(file.meta)


class _Entries:
    """A search for the origins of a checkpoint's tensors."""

    def __init__(
        self, where: str, meta: Meta, arch: Architecture, config: Mapping[str, Any]
    ) -> None:
        self._where, self._arch, self._config = where, arch, config
        self._layers = meta.layers
        self._heads = {f"{n}{e}": key for n, key in arch.halves.items() for e in _ENDINGS}

    def of(self, tensors: Mapping[str, ReaderTensor]) -> dict[str, _Entry]:
        """Returns the origin of every tensor of the checkpoint, by name."""
        out: dict[str, _Entry] = {}
        blocks: dict[int, dict[str, ReaderTensor]] = {}
        whole = {**_WHOLE, **self._arch.whole}
        made = {made.of[0]: (name, made) for name, made in self._arch.made_whole.items()}
        for name, tensor in tensors.items():
            if match := _BLOCK.fullmatch(name):
                blocks.setdefault(int(match[1]), {})[match[2]] = tensor
            elif name in made:
                out |= dict(self._entries(made[name][0], (tensor,), made[name][1]))
            elif name in whole:
                if whole[name]:
                    out[whole[name]] = _Entry((tensor,), _shape(tensor))
            elif name != READ_AT_ONCE:
                raise self._unknown(name)
        for layer, block in blocks.items():
            prefix = f"{self._arch.prefix}{layer}."
            if layer >= self._layers:  # a layer that predicts further tokens
                out |= {f"{prefix}{n}": _Entry((t,), _shape(t)) for n, t in block.items()}
                continue
            for name, entry in self._of_block(layer, dict(block)):
                out[prefix + name] = entry
        return out

    def _of_block(self, layer: int, block: dict[str, ReaderTensor]) -> list[tuple[str, _Entry]]:
        out: list[tuple[str, _Entry]] = []
        left = dict(block)
        for name, made in self._arch.made.items():
            of = tuple(block[part] for part in made.of if part in block)
            if len(of) == len(made.of):
                out += self._entries(name, of, made)
                for part in made.of:
                    left.pop(part, None)
        names = self._arch.layer
        for part, tensor in list(left.items()):
            stem, dot, ending = part.rpartition(".")
            known = names.get(part)
            if known is None and stem in names and dot + ending in _ENDINGS:
                known = f"{names[stem]}.{ending}"
            if known is None:
                continue
            del left[part]
            scales = None
            if ending == "weight" and tensor.tensor_type.name == "NVFP4":
                scales = left.pop(f"{stem}.scale", None)
            left.pop(f"{stem}.input_scale", None)
            if known:
                out += self._entries(known, (tensor,), None, self._heads.get(part), scales)
        # Checked last, as a scale may come before the tensor that claims it.
        for part in left:
            raise self._unknown(f"blk.{layer}.{part}")
        return out

    def _entries(
        self,
        name: str,
        of: tuple[ReaderTensor, ...],
        made: Made | None,
        heads: str | None = None,
        scales: ReaderTensor | None = None,
    ) -> list[tuple[str, _Entry]]:
        shapes = [_shape(tensor) for tensor in of]
        if "{expert}" not in name:
            return [(name, self._entry(of, shapes, None, made, heads, scales))]
        if len({shape[0] for shape in shapes}) != 1 or any(len(shape) < 2 for shape in shapes):
            listed = " and ".join(
                f"{quoted(t.name)} {list(s)}" for t, s in zip(of, shapes, strict=True)
            )
            raise FormatError(f"{self._where}: {listed} must be stacks of as many experts")
        single = self._entry(of, [shape[1:] for shape in shapes], 0, made, heads, scales)
        return [
            (name.format(expert=i), _Entry(of, single.shape, i, made, heads, scales))
            for i in range(shapes[0][0])
        ]

    def _entry(
        self,
        of: tuple[ReaderTensor, ...],
        shapes: list[tuple[int, ...]],
        expert: int | None,
        made: Made | None,
        heads: str | None,
        scales: ReaderTensor | None,
    ) -> _Entry:
        shape = shapes[0]
        if made is not None:
            try:
                shape = made.shape(self._config, shapes)
            except (ValueError, IndexError, TypeError):
                raise FormatError(
                    f"{self._where}: {quoted(of[0].name)} has shape {list(shapes[0])}, which does not fit"
                ) from None
        if heads is not None and shape[0] % (2 * self._config[heads]):
            raise FormatError(
                f"{self._where}: {quoted(of[0].name)} must have an even number of rows for each of "
                f"{self._config[heads]} heads, got {shape[0]}"
            )
        return _Entry(of, shape, expert, made, heads, scales)

    def _unknown(self, name: str) -> FormatError:
        what = f"{quoted(name)} is not a tensor of a {self._arch.model_type} model"
        return FormatError(f"{self._where}: {what}")


_ENDINGS = (".weight", ".bias")


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape))


def _unpermuted(values: Array, heads: int) -> Array:
    # llama.cpp rotates pairs of adjacent rows, transformers pairs half a head apart.
    split = values.reshape(heads, -1, 2, *values.shape[1:])
    return np.asarray(split.swapaxes(1, 2).reshape(values.shape))
