"""Fuzzers of safetensors files: checkpoints, with their index and configuration, profiles, calibrations."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

import edgemoe
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.convert.source import SourceModel
from edgemoe.convert.text import check_text
from edgemoe.errors import FormatError
from edgemoe.quant import Calibration, quantize
from edgemoe.quant.calibration import write_calibration
from edgemoe.runtime.profile import _crc as profile_sum
from edgemoe.runtime.profile import identity
from edgemoe.scheduler import SCHEDULERS
from fuzz.models import checkpoint_files, model, model_path
from fuzz.mutate import NUMBERS, TEXTS, change_bytes, change_json, change_value, json_bytes
from fuzz.target import Case, Target

Tensors = dict[str, NDArray[Any]]


def change_tensors(rng: Random, data: bytes) -> bytes:
    """Changes a safetensors file: mostly its header, otherwise its length, its numbers or any byte."""
    size = int.from_bytes(data[:8], "little")
    how = rng.random()
    try:
        header = json.loads(data[8 : 8 + size])
    except (ValueError, RecursionError):
        how = 0.0
    if how < 0.25:
        return change_bytes(rng, data)
    body = data[8 + size :]
    if how < 0.35:
        return data[: 8 + size] + change_bytes(rng, body)
    text = json_bytes(rng, change_value(rng, header))
    length = (
        len(text) if rng.random() < 0.9 else rng.choice((0, 1, 1 << 31, 1 << 63, len(text) + 1))
    )
    return length.to_bytes(8, "little") + text + body


def change_arrays(rng: Random, tensors: Tensors) -> Tensors:
    """Changes named arrays: a number, a shape, a type or a name."""
    out = {name: array.copy() for name, array in tensors.items()}
    for _ in range(rng.choice((1, 1, 2, 4))):
        name = rng.choice(list(out))
        array, how = out[name], rng.randrange(7)
        if how < 3 and array.size:
            with np.errstate(all="ignore"):
                array.reshape(-1)[rng.randrange(array.size)] = np.float64(
                    rng.choice(NUMBERS)
                ).astype(array.dtype)
        elif how == 3:
            out[name] = array.reshape(-1)[: rng.choice((0, 1, max(array.size - 1, 0)))]
        elif how == 4:
            with np.errstate(all="ignore"):
                out[name] = array.astype(rng.choice(("f2", "f4", "f8", "i8", "u1", "?")))
        elif how == 5:
            del out[name]
            out[
                rng.choice(
                    (
                        *(t for t in TEXTS if t.isprintable()),
                        name + "x",
                        "experts.count",
                        "experts.9.count",
                    )
                )
            ] = array
        elif how == 6:
            other = rng.choice(list(out))
            out[name], out[other] = out[other], out[name]
        if not out:
            break
    return out


def _read_checkpoint(folder: Path) -> None:
    found = HFCheckpoint(folder)
    for name in list(found.shapes)[:60]:
        found.tensor(name)


def _change_checkpoint(rng: Random, case: Case) -> Case:
    return {**case, "model.safetensors": change_tensors(rng, case["model.safetensors"])}


def _stacks() -> list[Case]:
    stack = {
        "a": np.ones((3, 2, 4), np.float16),
        "b": np.zeros((1, 2, 2), np.float32),
        "c": np.arange(5, dtype="f4"),
    }
    return [{"model.safetensors": save(stack), "config.json": b"{}"}]


def _shards() -> list[Case]:
    parts = {
        "one.safetensors": {"a": np.ones((2, 3), np.float32)},
        "two.safetensors": {"b": np.ones(3, np.float16)},
    }
    index = {
        "metadata": {"total_size": 30},
        "weight_map": {"a": "one.safetensors", "b": "two.safetensors"},
    }
    files = {name: save(tensors) for name, tensors in parts.items()}
    return [
        {**files, "model.safetensors.index.json": json.dumps(index).encode(), "config.json": b"{}"}
    ]


def _change_index(rng: Random, case: Case) -> Case:
    name = "model.safetensors.index.json"
    try:
        return {**case, name: change_json(rng, case[name])}
    except (ValueError, RecursionError):
        return {**case, name: change_bytes(rng, case[name])}


_FAMILIES = (
    "mixtral",
    "olmoe",
    "granitemoe",
    "granitemoeshared",
    "qwen3_moe",
    "qwen2_moe",
    "llama",
    "mistral",
)
_SCALINGS = (
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, {"type": "linear", "factor": 2},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
    {"rope_type": "longrope", "short_factor": [1.0] * 12, "long_factor": [2.0] * 12}, {"rope_type": "dynamic"},
)  # fmt: skip


def _change_config(rng: Random, case: Case) -> Case:
    name = rng.choice(("config.json",) * 4 + ("tokenizer_config.json", "tokenizer.json"))
    try:
        value = json.loads(case[name])
        if name == "config.json" and isinstance(value, dict):
            if rng.random() < 0.2:
                value["model_type"] = rng.choice(_FAMILIES)
            if rng.random() < 0.2:
                value["rope_scaling"] = rng.choice(_SCALINGS)
        return {**case, name: json_bytes(rng, change_value(rng, value))}
    except (ValueError, RecursionError):
        return {**case, name: change_bytes(rng, case[name])}


def _read_config(folder: Path) -> None:
    found = HFCheckpoint(folder)
    made = SourceModel(found)
    assert all(isinstance(note, str) for note in made.notes)
    check_text(found, made.config.vocab_size)


def _profiles() -> list[Case]:
    of = identity(model())
    L, E, K = 1, 4, 2
    shapes = {
        "uses": (L, E), "look_ahead.right": (K,), "look_ahead.seen": (K,), "next_use.weights": (5,),
        "next_use.curvature": (5, 5), "next_use.frequency": (L, E), "frequency.values": (L, E), "frequent.uses": (L, E),
        "hobbit.thresholds": (5,), "transitions.pairs": (L, E, E), "transitions.totals": (L, E),
        "transitions.keys": (3, 1 + 2 * K), "transitions.followers": (3, E),
    }  # fmt: skip
    rng = np.random.default_rng(3)
    tensors: Tensors = {name: rng.random(shape) for name, shape in shapes.items()}
    for name in ("transitions.pairs", "transitions.totals"):
        tensors[name] = tensors[name].astype(np.float32)
    return [{"profile": _profile(tensors, of)}]


def _profile(tensors: Tensors, meta: dict[str, str]) -> bytes:
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return save(tensors, {"edgemoe_profile": "1", **meta, "crc": profile_sum(tensors)})


def _change_profile(rng: Random, case: Case) -> Case:
    data = case["profile"]
    if rng.random() < 0.2:
        return {"profile": change_bytes(rng, data)}
    try:
        tensors, size = load(data), int.from_bytes(data[:8], "little")
        meta = {k: str(v) for k, v in json.loads(data[8 : 8 + size])["__metadata__"].items()}
        if rng.random() < 0.1:
            meta = {k: str(v) for k, v in change_value(rng, meta).items()}
        return {"profile": _profile(change_arrays(rng, tensors), meta)}
    except Exception:  # after earlier changes it may be no such file
        return {"profile": change_bytes(rng, data)}


def _use_profile(folder: Path) -> None:
    path = folder / "profile"
    names = sorted(SCHEDULERS)
    name = names[len(path.read_bytes()) % len(names)]
    options: dict[str, Any] = {
        "ram": "48MiB",
        "context": 32,
        "threads": 1,
        "verify": False,
        "profile": path,
    }
    with edgemoe.load(model_path(), scheduler=name, **options) as engine:
        list(engine.generate([1, 2, 3], edgemoe.SamplingParams(temperature=0, max_tokens=2)))


def _calibrations() -> list[Case]:
    rng = np.random.default_rng(4)
    d, h, E = 96, 16, 4
    chosen = np.sort(rng.integers(0, E + 1, (30, 2)), axis=1)
    tensors: Tensors = {"experts.0.count": np.bincount(chosen.ravel(), minlength=E + 1)[:E]}
    for port, width in (("in", d), ("hidden", h)):
        tensors[f"experts.0.{port}.squares"] = (900 * rng.random((E, width))).astype(np.float32)
    x = rng.normal(size=(E, 40, h)).astype(np.float32)
    tensors["experts.0.in.rows"] = rng.normal(size=(30, d)).astype(np.float32)
    tensors["experts.0.in.chosen"] = chosen
    tensors["experts.0.hidden.products"] = x.swapaxes(1, 2) @ x
    for name, width in (("q", d), ("o", d), ("shared.gate", d), ("shared.down", 80)):
        tensors[f"dense.layers.0.{name}.count"] = np.array([1600], np.int64)
        tensors[f"dense.layers.0.{name}.squares"] = (1600 * rng.random(width)).astype(np.float32)
    for what, shape in (
        ("gates", (E,)),
        ("gates2", (E,)),
        ("output2", (E,)),
        ("error", (E, 5)),
        ("error2", (E, 5)),
    ):
        tensors[f"experts.0.{what}"] = rng.random(shape)
    return [{"calibration": _calibration(tensors, {"bits": "2 3 4 6 8", "tokens": "1600"})}]


def _calibration(tensors: Tensors, meta: dict[str, str]) -> bytes:
    from fuzz.models import _FOLDER

    path = Path(_FOLDER.name) / "calibration"
    write_calibration(path, tensors, meta)
    return path.read_bytes()


def _change_calibration(rng: Random, case: Case) -> Case:
    data = case["calibration"]
    if rng.random() < 0.3:
        return {"calibration": change_tensors(rng, data)}
    try:
        meta = {
            "bits": rng.choice(("2 3 4 6 8", "", "x", "1 " * 5000, "-1")),
            "tokens": str(rng.choice(NUMBERS)),
        }
        return {"calibration": _calibration(change_arrays(rng, load(data)), meta)}
    except Exception:  # after earlier changes it may be no such file; some types cannot be written
        return {"calibration": change_bytes(rng, data)}


def _use_calibration(folder: Path) -> None:
    found = Calibration(folder / "calibration")
    found.check(model().config)
    rng = np.random.default_rng(1)
    of = {width: rng.normal(size=(16, width)).astype(np.float32) for width in (16, 96)}
    for index in range(4):
        for part in ("gate", "up", "down"):
            name = f"experts.0.{index}.{part}"
            found.diagonal(name)
            found.count(name)
            moments = found.matrix(name) if found.is_full else None
            if moments is not None:
                quantize(of[len(moments)], second_moments=moments, threads=1)
    for name in ("layers.0.q", "layers.0.o", "layers.0.shared.down", "head"):
        squares = found.diagonal(name)
        if squares is not None and squares.shape == (16,):
            quantize(of[16], second_moments=squares, threads=1)
    for what in ("gates", "gates2", "output2", "error", "error2"):
        if found.has(what):
            found.layer(0, what)


TARGETS = [
    Target(
        "safetensors", lambda: [*_stacks(), {k: checkpoint_files()[k] for k in ("model.safetensors", "config.json")}],
        _change_checkpoint, _read_checkpoint,
    ),
    Target("index", _shards, _change_index, _read_checkpoint),
    Target("config", lambda: [checkpoint_files()], _change_config, _read_config),
    Target("profile", _profiles, _change_profile, _use_profile),
    Target("calibration", _calibrations, _change_calibration, _use_calibration, (FormatError, OSError, ValueError)),
]  # fmt: skip
