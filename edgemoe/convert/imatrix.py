"""Converts an importance matrix (imatrix) of llama.cpp, in GGUF or the older `.dat` format, to a calibration file.

For each matrix an imatrix holds the sum of squares of each input column, and in GGUF how many tokens each expert saw
(llama.cpp, tools/imatrix/imatrix.cpp). The older format holds only means. From it every expert gets the same count,
in chunks of 512 tokens as llama.cpp itself assumes, so `Calibration`'s rule for rarely used experts has no effect.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import ModelConfig
from edgemoe.convert.families import FAMILIES
from edgemoe.convert.gguf import BROKEN, open_gguf
from edgemoe.convert.gguf.architectures.qwen3next import grouped
from edgemoe.errors import FormatError, shortened
from edgemoe.file.reader import open_moe
from edgemoe.quant import write_calibration
from edgemoe.quant.calibration import input_name
from edgemoe.specs import DeltaSpec, TensorSpec

__all__ = ["convert_imatrix", "read_imatrix"]

Entry = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Sums of squares [matrices, cols], and the number of tokens that each matrix saw [matrices]."""

_MIXER = {
    "q": ("attn_q", "attn_k", "attn_v"),
    "qkv": ("attn_qkv", "attn_q"),
    "xbc": ("ssm_in",),
    "u": ("shortconv.in_proj",),
    "kv_a": ("attn_kv_a_mqa", "attn_q_a", "attn_q"),
    "q_b": ("attn_q_b",),
    "z_out": ("ssm_g_b",),
    "o": ("attn_output", "ssm_out", "shortconv.out_proj"),
}
_FFN = {
    "shared.gate": ("ffn_gate_shexp", "ffn_up_shexp", "ffn_gate", "ffn_up"),
    "shared.down": ("ffn_down_shexp", "ffn_down"),
}
_EXPERTS = {
    "in": ("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps"),
    "hidden": ("ffn_down_exps",),
}
_CHUNK = 512  # tokens of a call in the `.dat` format
_LONGEST_NAME, _MOST_VALUES, _MOST_TOKENS = 1 << 10, 1 << 28, 1 << 53


def convert_imatrix(model: str | os.PathLike[str], imatrix: Path, out: Path) -> tuple[str, ...]:
    """Writes the statistics that an imatrix has for a model to a calibration file.

    Args:
        model: the model's `.moe` file.
        imatrix: the imatrix to read.
        out: the calibration file to write.

    Returns:
        The names of the model's inputs, as in a calibration file, that the imatrix lacks.

    Raises:
        FormatError: not an imatrix, or one of another model.
        ImportError: the imatrix is a GGUF file, and the package gguf is not installed.
    """
    moe = open_moe(model)
    entries = read_imatrix(imatrix)
    tensors, missing = _tensors(moe.config, entries, imatrix)
    if not tensors:
        raise FormatError(f"{imatrix}: has nothing that {moe.path} has")
    # Dense matrices see every token. Experts see fewer each, and more together: every token has several.
    tokens = max(int(counts.max()) for _, counts in entries.values())
    name = str(moe.source.get("name", moe.path.name))
    meta = {"source": "imatrix", "model": name, "tokens": str(tokens), "window": "0", "bits": ""}
    write_calibration(out, tensors, meta)
    return tuple(missing)


def read_imatrix(path: Path) -> dict[str, Entry]:
    """Returns the entries of an imatrix, by llama.cpp's tensor names.

    Raises:
        FormatError: not an imatrix.
        ImportError: the imatrix is a GGUF file, and the package gguf is not installed.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    entries = _read_gguf(path) if magic == b"GGUF" else _read_dat(path)
    for name, (sums, counts) in entries.items():
        # A model that was run in half precision may have overflowed.
        if not (np.isfinite(sums).all() and (sums >= 0).all() and (counts >= 0).all()):
            raise FormatError(
                f"{path}: {shortened(name)} holds a value that is not a sum of squares"
            )
    return entries


def _tensors(
    config: ModelConfig, entries: Mapping[str, Entry], path: Path
) -> tuple[dict[str, NDArray[Any]], list[str]]:
    tensors: dict[str, NDArray[Any]] = {}
    missing: list[str] = []

    def take(names: tuple[str, ...], ours: str, shape: tuple[int, int]) -> Entry | None:
        entry = next((entries[n] for n in names if n in entries), None)
        if entry is None:
            missing.append(ours)
            return None
        sums, counts = entry
        if len(counts) == 1 and sums.size == shape[0] * shape[1]:  # the older format is flat
            return sums.reshape(shape), np.repeat(counts, shape[0])
        if sums.shape != shape:
            raise FormatError(f"{path}: {names[0]} is {list(sums.shape)}; expected {list(shape)}")
        return entry

    def dense(ours: str, names: tuple[str, ...], cols: int) -> None:
        entry = take(names, ours, (1, cols))
        if entry is not None:
            tensors[f"dense.{ours}.count"] = entry[1]
            tensors[f"dense.{ours}.squares"] = entry[0][0]

    d, E = config.hidden_size, config.num_experts
    for i, (mixer, ffn) in enumerate(_blocks(config)):
        for specs, known, block in (
            (config.mixer(i).tensors(d), _MIXER, mixer),
            (config.ffn(i).tensors(d), _FFN, ffn),
        ):
            for role, cols in _inputs(specs).items():
                names = tuple(f"blk.{block}.{n}.weight" for n in known.get(role, ()))
                dense(f"layers.{i}.{role}", names, cols)
        _regroup(config, i, tensors)
        if i not in config.moe_layers:
            continue
        for port, width in (("in", d), ("hidden", config.expert_hidden)):
            ours = f"experts.{i}.{port}"
            entry = take(tuple(f"blk.{ffn}.{n}.weight" for n in _EXPERTS[port]), ours, (E, width))
            if entry is not None:
                counts = tensors.setdefault(f"experts.{i}.count", entry[1])
                if not np.array_equal(counts, entry[1]):
                    raise FormatError(f"{path}: matrices of layer {i}'s experts differ in tokens")
                tensors[f"{ours}.squares"] = entry[0]
    dense("embed" if config.tied else "head", ("output.weight",), d)
    return tensors, missing


def _blocks(config: ModelConfig) -> Iterator[tuple[int, int]]:
    """Yields for each layer the GGUF block (`blk.N`) that holds its mixer, and the one that holds its FFN."""
    family, block = FAMILIES.get(config.family), 0
    for i in range(config.num_layers):
        last = block + int(family is not None and family.apart and config.ffn(i).exists)
        yield block, last
        block = last + 1


def _inputs(specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Returns the width of each input of a layer part's quantised matrices, by the calibration's name for the input."""
    inputs = {}
    for name, spec in specs.items():
        if spec.kind == "nested":
            inputs[input_name(name)] = spec.shape[1]
    return inputs


def _regroup(config: ModelConfig, layer: int, tensors: dict[str, NDArray[Any]]) -> None:
    """Reorders the outputs of Qwen3.5's value heads from llama.cpp's order to that of checkpoints."""
    spec, name = config.mixer(layer), f"dense.layers.{layer}.o.squares"
    if config.family == "qwen3_5_moe" and isinstance(spec, DeltaSpec) and name in tensors:
        tensors[name] = grouped(tensors[name], spec.key_heads, spec.value_dim)


def _read_gguf(path: Path) -> dict[str, Entry]:
    reader = open_gguf(path)
    try:
        tensors = {t.name: np.array(t.data) for t in reader.tensors}
        out = {}
        for name, sums in tensors.items():
            base, dot, kind = name.rpartition(".")
            if kind == "in_sum2":
                counts = tensors[f"{base}{dot}counts"].reshape(-1).astype(np.float64)
                if not (np.abs(counts) < _MOST_TOKENS).all():  # also catches NaN
                    raise ValueError(f"{base} has counts that no text gives")
                tokens = counts.astype(np.int64)
                with np.errstate(all="ignore"):  # `read_imatrix` refuses what is not finite
                    out[base] = (sums.reshape(len(tokens), -1).astype(np.float32), tokens)
    except BROKEN as error:
        raise FormatError(f"{path}: broken GGUF imatrix: {error}") from error
    if not out:
        raise FormatError(f"{path}: is a GGUF file, but not an imatrix")
    return out


def _read_dat(path: Path) -> dict[str, Entry]:
    """Reads the `.dat` format.

    It has i32 number of entries, then per entry i32 length of the name, the name, i32 calls, i32 number of values, and
    as many float32 mean squares, each times the calls.
    """
    data, at, out = path.read_bytes(), 0, {}

    def number() -> int:
        nonlocal at
        at += 4
        return int(struct.unpack_from("<i", data, at - 4)[0])

    try:
        for _ in range(number()):
            length = number()
            if not 0 < length <= _LONGEST_NAME:
                raise ValueError(f"a name of {length} bytes")
            name = data[at : at + length].decode()
            at += length
            calls, values = number(), number()
            if calls < 1 or not 0 < values <= _MOST_VALUES:
                raise ValueError(f"{name} has {values} values of {calls} calls")
            with np.errstate(all="ignore"):
                sums = np.frombuffer(data, "<f4", values, at) * np.float32(_CHUNK)
            at += 4 * values
            out[name] = (sums[None], np.array([calls * _CHUNK], np.int64))
    except (struct.error, ValueError) as error:
        raise FormatError(f"{path}: not an imatrix: {error}") from None
    if not out:
        raise FormatError(f"{path}: not an imatrix: it has no entries")
    return out
