"""Fuzzers of adapters: our own files, and the LoRA directories from which they are made."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
from safetensors.numpy import save

import edgemoe
from edgemoe.convert.adapter import convert_adapter
from edgemoe.convert.patched import PatchedCheckpoint, patched
from edgemoe.errors import FormatError, OutOfBudget, RangeError, ReadError
from fuzz.model_files import change_model
from fuzz.models import checkpoint, model, model_path
from fuzz.mutate import change_json
from fuzz.target import Case, Target
from fuzz.tensor_files import change_tensors

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.2.up_proj")


@cache
def _adapter() -> bytes:
    """Returns an adapter with two experts and two other tensors."""
    source = checkpoint()
    names = [f"{module}.weight" for module in _MODULES]
    names += ["model.layers.0.mlp.experts.0.down_proj.weight", "model.norm.weight"]
    tuned = PatchedCheckpoint("tuned", source, {name: lambda w: w + 1 for name in names})
    path = model_path().with_name("tiny.moea")
    convert_adapter(tuned, path, model(), original=source)
    return path.read_bytes()


def _change_adapter(rng: Random, case: Case) -> Case:
    return {"x.moea": change_model(rng, {"model.moe": case["x.moea"]})["model.moe"]}


def _run_adapter(folder: Path) -> None:
    given = {
        "adapters": folder / "x.moea",
        "ram": "48MiB",
        "context": 32,
        "threads": 1,
        "verify": False,
    }
    with edgemoe.load(model_path(), **given) as engine:
        list(engine.generate([1, 2, 3], edgemoe.SamplingParams(temperature=0, max_tokens=3)))


def _loras() -> list[Case]:
    rng, tensors = np.random.default_rng(4), {}
    for module in _MODULES:
        rows, cols = checkpoint().shapes[f"{module}.weight"]
        tensors[f"base_model.model.{module}.lora_A.weight"] = rng.normal(0, 1, (2, cols)).astype(
            "f4"
        )
        tensors[f"base_model.model.{module}.lora_B.weight"] = rng.normal(0, 1, (rows, 2)).astype(
            "f4"
        )
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "use_rslora": False,
        "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 1}, "peft_version": "0.21.2",
    }  # fmt: skip
    return [{_CONFIG: json.dumps(config).encode(), _WEIGHTS: save(tensors)}]


def _change_lora(rng: Random, case: Case) -> Case:
    if rng.random() < 0.5:
        return case | {_WEIGHTS: change_tensors(rng, case[_WEIGHTS])}
    return case | {_CONFIG: change_json(rng, case[_CONFIG])}


def _read_lora(folder: Path) -> None:
    found = patched(folder, checkpoint())
    for name in found.patches:
        assert found.tensor(name).shape == found.shapes[name]


TARGETS = [
    Target(
        "adapter", lambda: [{"x.moea": _adapter()}], _change_adapter, _run_adapter,
        (FormatError, OutOfBudget, ReadError, RangeError),
    ),
    Target("lora", _loras, _change_lora, _read_lora),
]  # fmt: skip
