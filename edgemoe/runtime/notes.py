"""Notes on how options change the answer, as they are shown at start."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import ModelConfig
from edgemoe.file.format import MoeFile
from edgemoe.model import KV_BITS, KvTypes
from edgemoe.runtime.on_device import device_notes
from edgemoe.runtime.options import EngineOptions

__all__ = ["notes_of"]


def notes_of(
    moe: MoeFile, given: ModelConfig, bits: NDArray[np.int8], options: EngineOptions
) -> tuple[str, ...]:
    """Returns how the options change the answer, one line each; none if they do not.

    Args:
        moe: the file as it runs.
        given: the file's own config.
        bits: [L, E]: the bits of each expert, apart from those that a scheduler's own notes name.
        options: as they are in use.
    """
    notes, have, dense = [], moe.expert_bits, moe.dense_ladder[-1]
    if (bits < have).any():
        notes.append(f"lossy: experts at {_mean_bits(bits)} of the file's {_mean_bits(have)} bits")
    if options.dense_bits == "auto":
        matrices = [t for t in moe.tensors.values() if t.spec.kind == "nested"]
        own = [moe.dense_ladder[t.rungs(len(moe.dense_ladder)) - 1] for t in matrices]
        notes.append(f"lossy: dense weights at {min(own)} to {max(own)} of the file's {dense} bits")
    elif options.dense_bits is not None and options.dense_bits < dense:
        notes.append(f"lossy: dense weights at {options.dense_bits} of the file's {dense} bits")
    if moe.config.experts_per_token != given.experts_per_token:
        notes.append(
            f"lossy: {moe.config.experts_per_token} experts per token; "
            f"the model's own number is {given.experts_per_token}"
        )
    return (
        *notes, *_cache_notes(moe.config, options.kv_types), *device_notes(moe.config, options)
    )  # fmt: skip


def _cache_notes(config: ModelConfig, types: KvTypes) -> Iterator[str]:
    """Yields notes on the types of keys and values."""
    layers = [i for i, spec in enumerate(config.mixer_by_layer) if spec.cached_heads[0]]
    has_latents = [config.mixer(i).values_are_keys for i in layers]
    if any(has_latents) and types.keys != types.values:
        yield f"cache_type_v: latents are keys and values at once, and held as {types.keys}"
    rounded: dict[str, list[str]] = {}
    for name in ("keys",) if all(has_latents) else ("keys", "values"):
        bits = [KV_BITS[getattr(types.of(i), name)] for i in layers]
        if any(b < 16 for b in bits):
            mean = np.minimum(bits, 16).mean()
            said = f"{bits[0]}" if len(set(bits)) == 1 else f"{mean:.2f}"
            rounded.setdefault(said, []).append(name)
    for said, which in rounded.items():
        yield f"lossy: {' and '.join(which)} of the KV cache at {said} of 16 bits"


def _mean_bits(bits: NDArray[np.int8]) -> str:
    """Returns the number of bits of experts as text; the mean if they differ."""
    return f"{bits.flat[0]}" if (bits == bits.flat[0]).all() else f"{bits.mean():.2f}"
