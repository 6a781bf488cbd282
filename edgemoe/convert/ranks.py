"""Chooses the ranks of low-rank corrections: each kind of matrix gets one only if it is worth its bytes."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import MATRICES, ModelConfig, dense_tensors
from edgemoe.convert.source import SourceModel
from edgemoe.quant import DEFAULT_LADDER, SCHEMES, Allocation, Calibration, Scheme
from edgemoe.quant.correction import MOST_RANK, RANK_STEP, SHARED, Correction, is_rank, kind_of
from edgemoe.quant.ranks import best_ranks, gains, same_rank

__all__ = ["check_rank", "choose_ranks", "same_ranks"]

Array = NDArray[np.float32]


def check_rank(rank: int, scheme: Scheme, calibration: Calibration | None) -> None:
    """Checks a rank requested for all corrections; 0 for no corrections.

    Raises:
        ValueError: the rank is not valid, the scheme has no corrections, or the calibration has no input products to
            fit them to.
    """
    if not is_rank(rank):
        listed = ", ".join(map(str, range(0, MOST_RANK, RANK_STEP)))
        raise ValueError(f"correction: expected {listed} or {MOST_RANK}, got {rank}")
    if rank and scheme.name != "nested":
        raise ValueError(f"correction: not for the scheme {scheme.name}")
    if rank and (calibration is None or not calibration.is_full):
        raise ValueError("correction: expected a calibration that was made with --full or --layers")


def same_ranks(config: ModelConfig, calibration: Calibration, rank: int) -> Correction:
    """Returns corrections of one rank, at 2, 3 and 4 bits, for each kind of matrix that can have it.

    Raises:
        ValueError: no kind can.
    """
    kinds = [kind for kind, least in _kinds(config, calibration).items() if least >= rank]
    if rank and not kinds:
        raise ValueError(f"correction: no matrix of this model can have rank {rank}")
    return {kind: same_rank(rank) for kind in kinds} if rank else {}


def choose_ranks(
    model: SourceModel,
    calibration: Calibration,
    *,
    bits: int | None = None,
    allocation: Allocation | None = None,
    favour: int | None = None,
) -> Correction:
    """Returns the ranks worth their bytes, for each kind of matrix whose input products the calibration has.

    One matrix represents all of its kind. Gates and ups of experts share a basis, so they are judged together and get
    the same ranks.

    Args:
        bits: the highest level stored; None for all.
        allocation: weighs each level of the experts by the share of experts for which it is the highest; without one,
            all levels count alike.
        favour: bits of the only level that counts; None for no such level.
    """
    levels = [level for level in DEFAULT_LADDER if level <= (bits or 8)]
    uses = [float(favour in (None, level)) for level in levels]
    favoured = SCHEMES["nested"].favoured(bits, favour)
    of_experts = uses
    if allocation is not None and favour is None:
        of_experts = [float((allocation.bits == level).mean()) for level in levels]
    limits = _kinds(model.config, calibration)
    found: dict[tuple[str, ...], NDArray[np.float64]] = {}
    for name, w, moments in _samples(model, calibration, limits):
        kind = kind_of(name)
        kinds = tuple(k for k in SHARED if k in limits) if kind in SHARED else (kind,)
        layer = calibration.layer_matrix(int(name.split(".")[1])) if kind in SHARED else None
        mine = gains(w, moments, layer, favoured)
        found[kinds] = found[kinds] + mine if kinds in found else mine
    out: dict[str, tuple[int, ...]] = {}
    for kinds, of in found.items():
        is_expert = kinds[0].startswith("experts.")
        best = best_ranks(of, of_experts if is_expert else uses, favoured)
        out.update({kind: best for kind in kinds if best and max(best) <= limits[kind]})
    return out


def _kinds(config: ModelConfig, calibration: Calibration) -> dict[str, int]:
    """Returns the highest possible rank of each kind of matrix, if the calibration has input products for all of it."""
    out: dict[str, int] = {}
    unknown = set()
    for name, spec in dense_tensors(config).items():
        if spec.kind == "nested":
            kind = kind_of(name)
            out[kind] = min(out.get(kind, MOST_RANK), *spec.shape)
            if not calibration.knows(name):
                unknown.add(kind)
    for part, shape in zip(MATRICES, config.expert_shapes, strict=True):
        kind = f"experts.{part}"
        if config.moe_layers and shape[0]:  # experts may have no gate
            out[kind] = min(MOST_RANK, *shape)
        if not all(calibration.knows(f"experts.{layer}.0.{part}") for layer in config.moe_layers):
            unknown.add(kind)
    return {kind: least for kind, least in out.items() if kind not in unknown}


def _samples(
    model: SourceModel, calibration: Calibration, kinds: Collection[str]
) -> Iterator[tuple[str, Array, Array]]:
    """Yields one matrix of each kind: its name, its values, and the mean of x xᵀ over its inputs."""
    config, seen = model.config, set()
    for name, spec in dense_tensors(config).items():
        kind = kind_of(name)
        if spec.kind == "nested" and kind in kinds and kind not in seen:
            seen.add(kind)
            moments = calibration.matrix(name)
            assert moments is not None
            yield name, model.tensor(name), moments
    if config.moe_layers:
        layer = config.moe_layers[len(config.moe_layers) // 2]
        index = int(calibration.layer(layer, "count").argmax())
        for part, w in zip(MATRICES, model.expert(layer, index), strict=True):
            name = f"experts.{layer}.{index}.{part}"
            if kind_of(name) in kinds:
                moments = calibration.matrix(name)
                assert moments is not None
                yield name, w, moments
