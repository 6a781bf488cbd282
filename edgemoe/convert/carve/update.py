"""Updates: files with the results of training for one carved checkpoint, which make its calibration unnecessary.

An update is a safetensors file whose metadata gives `experts` (E) and `shared`. For each layer i it has:

    layers.i.assign               uint8 [I]      the expert of each neuron; 0: shared, 1 … E: routed
    layers.i.router               float [E, D]   logits = router @ x, as in `carve`
    layers.i.{gate,up,down}.A     [R, in]        W becomes W + (B * scale) @ A before it is divided;
    layers.i.{gate,up,down}.B     [out, R]       float, or int8 codes
    layers.i.{gate,up,down}.scale float [R]      absent: 1
    layers.i.input_norm .post_norm, norm  float [D]   replace the dense ones
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from edgemoe.config import MATRICES
from edgemoe.convert.carve.llama import Array, LlamaShape
from edgemoe.convert.carve.partition import Partition
from edgemoe.errors import FormatError, quoted

__all__ = ["CarveUpdate", "read_update"]


@dataclass(frozen=True, slots=True)
class CarveUpdate:
    """Everything in which a carved model differs from its dense one."""

    num_experts: int
    shared: int
    partitions: tuple[Partition, ...]
    """One per layer."""
    norms: Mapping[str, Array]
    """Replacements for norms, by tensor name."""
    corrections: Mapping[tuple[int, str], tuple[Array, Array]]
    """By layer and matrix, such as "gate": B [out, R] and A [R, in], to be added as B @ A."""


def read_update(path: Path, shape: LlamaShape) -> CarveUpdate:
    """Reads an update for a checkpoint of the given shape.

    Raises:
        FormatError: the file is not an update, or one for another model.
        OSError: the file cannot be read.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        num_experts, shared = int(metadata["experts"]), int(metadata["shared"])
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        # safetensors raises the latter two for types that numpy does not have.
        raise FormatError(f"{path.name}: not a carving update: {error}") from error
    d, i = shape.hidden_size, shape.intermediate_size
    if not (0 < num_experts <= i and 0 <= shared <= i):
        raise FormatError(
            f"{path.name}: {quoted(num_experts)} experts and {quoted(shared)} shared neurons are "
            f"not of the model's {i}"
        )

    def take(name: str, *size: int) -> Array:
        found = tensors.get(name)
        if found is None or found.shape != size:
            got = "none" if found is None else found.shape
            raise FormatError(f"{path.name}: {name} must be {size}, got {got}")
        if found.dtype.kind not in "fiu":
            raise FormatError(f"{path.name}: {name} must hold real numbers, got {found.dtype}")
        with np.errstate(over="ignore"):
            values: Array = found.astype(np.float32)
        if not np.isfinite(values).all():
            raise FormatError(f"{path.name}: {name} holds NaN or infinity")
        return values

    sizes = {"gate": (i, d), "up": (i, d), "down": (d, i)}
    partitions, corrections = [], {}
    norms = {"model.norm.weight": take("norm", d)}
    for layer in range(shape.num_layers):
        p = f"layers.{layer}."
        found = take(p + "assign", i)
        labels = np.clip(found, 0, num_experts).astype(np.int64)
        counts = np.bincount(labels, minlength=num_experts + 1)
        if (labels != found).any() or counts[0] != shared or len(set(counts[1:])) != 1:
            raise FormatError(f"{path.name}: {p}assign does not give every expert its neurons")
        partitions.append(Partition(labels, take(p + "router", num_experts, d)))
        norms[f"model.{p}input_layernorm.weight"] = take(p + "input_norm", d)
        norms[f"model.{p}post_attention_layernorm.weight"] = take(p + "post_norm", d)
        for matrix in MATRICES:
            rows, columns = sizes[matrix]
            first = tensors.get(f"{p}{matrix}.A")
            rank = 0 if first is None or first.ndim != 2 else len(first)
            a = take(f"{p}{matrix}.A", rank, columns)
            b = take(f"{p}{matrix}.B", rows, rank)
            if f"{p}{matrix}.scale" in tensors:
                b *= take(f"{p}{matrix}.scale", rank)
            corrections[layer, matrix] = (b, a)
    return CarveUpdate(num_experts, shared, tuple(partitions), norms, corrections)
