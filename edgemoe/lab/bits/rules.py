"""Rules that turn statistics of experts into bits: pure functions of arrays, one per paper.

Shapes: L layers, E experts per layer, B candidate levels, ascending. An allocation here is int64 [L, E], of indices
into the levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["by_rank", "cheapest", "outlier_score", "pmq_cost", "super_experts"]

Floats = NDArray[np.float64]
Levels = NDArray[np.int64]

_INFINITY = math.inf


def cheapest(
    cost: Floats,
    sizes: Sequence[int] | NDArray[np.int64],
    total: int,
    *,
    at_least_one: Sequence[int] = (),
) -> Levels:
    """Chooses one level per expert, so that the sum of costs is least and the sum of sizes is at most `total`.

    It is an exact dynamic programme over (expert, size used), in O(experts * budget * levels).

    Args:
        cost: [n, B]; infinite where a level is not allowed.
        sizes: [B], ascending, or [n, B] for each expert's own; bits, or any other unit.
        total: the budget, in the same unit.
        at_least_one: levels (indices) each of which at least one expert must have, as in PMQ.

    Returns:
        [n], levels. Of equally good choices, the one with smaller sizes for the later experts.

    Raises:
        ValueError: not even the lowest levels fit, or a level of `at_least_one` does not.
    """
    table = np.broadcast_to(np.asarray(sizes, np.int64), cost.shape)
    lowest = int(table[:, 0].sum())
    extra = table - table[:, :1]
    unit = math.gcd(*extra.reshape(-1).tolist()) or 1
    steps = (extra // unit).tolist()
    room = (total - lowest) // unit
    if room < 0:
        raise ValueError(
            f"total: expected at least {lowest}, which the lowest levels take, got {total}"
        )
    room = min(room, sum(own[-1] for own in steps))
    flags = {level: 1 << i for i, level in enumerate(at_least_one)}
    every = (1 << len(flags)) - 1
    best = np.full((every + 1, room + 1), _INFINITY)
    best[0, 0] = 0
    # How each state was reached: previous flag * levels + level of this expert.
    came = np.zeros((len(cost), every + 1, room + 1), np.int16)
    for i, row in enumerate(cost):
        new = np.full_like(best, _INFINITY)
        for flag in range(every + 1):
            for level, step in enumerate(steps[i]):
                if step > room or row[level] == _INFINITY:
                    continue
                after = flag | flags.get(level, 0)
                value = best[flag, : room + 1 - step] + row[level]
                better = value < new[after, step:]
                new[after, step:][better] = value[better]
                came[i, after, step:][better] = flag * cost.shape[1] + level
        best = new
    used = int(np.argmin(best[every]))
    if best[every, used] == _INFINITY:
        raise ValueError(f"total: {total} does not suffice for the levels that must be among them")
    out = np.empty(len(cost), np.int64)
    flag = every
    for i in range(len(cost) - 1, -1, -1):
        flag_before, level = divmod(int(came[i, flag, used]), cost.shape[1])
        out[i] = level
        used -= steps[i][level]
        flag = flag_before
    return out


def pmq_cost(
    count: Floats, gates: Floats, error: Floats, exponents: tuple[float, float, float]
) -> Floats:
    """Returns the cost of each level of each expert of a layer, phi^alpha * w^beta * eps^gamma, [E, B].

    This is the cost in MC-MoE (arXiv 2410.06270). The exponents alpha, beta, gamma are 1, 1, 2 as published; the
    released solver computes 1, 1.5, 1.

    Args:
        count: [E], how often an expert was chosen.
        gates: [E], the sum of its gates.
        error: [E, B], the change of the layer's output when only this expert runs at a level, as a sum of Frobenius
            norms.
        exponents: alpha, beta, gamma.
    """
    alpha, beta, gamma = exponents
    phi = count / max(count.sum(), 1)
    w = gates / max(gates.sum(), 1e-30)
    out: Floats = (phi**alpha * w**beta)[:, None] * error**gamma
    return out


def by_rank(scores: Floats, bits: Sequence[int], average_bits: float, *, per_layer: bool) -> Levels:
    """Returns an allocation [L, E] in which as many experts as the average allows have the higher of two levels.

    These are the experts with the highest scores. QuantMoE-Bench (arXiv 2406.08155) ranks by frequency, by position and
    by outliers; EdgeMoE ranks by measured loss. Of equal scores, the earlier expert comes first.

    Args:
        scores: [L, E]
        bits: the bits of the two levels.
        average_bits: the most bits on average.
        per_layer: every layer has this average; otherwise the model as a whole.

    Raises:
        ValueError: the average is outside the levels.
    """
    low, high = bits
    if not low <= average_bits <= high:
        raise ValueError(f"average bits: expected {low} to {high}, got {average_bits:g}")
    rows = scores if per_layer else scores.reshape(1, -1)
    # The small addend corrects rounding: without it 0.1 * 30 would give 2.
    count = int((average_bits - low) / (high - low) * rows.shape[1] + 1e-9)
    out = np.zeros(rows.shape, np.int64)
    order = np.argsort(-rows, axis=1, kind="stable")[:, :count]
    np.put_along_axis(out, order, 1, axis=1)
    return out.reshape(scores.shape)


def outlier_score(w: NDArray[np.float32]) -> float:
    """Returns QuantMoE-Bench's outlier score of a matrix: the maximum over columns of max |w| / mean |w|.

    Args:
        w: [rows, cols]
    """
    size = np.abs(w)
    return float((size.max(0) / np.maximum(size.mean(0), 1e-30)).max())


def super_experts(output_max: Floats) -> list[tuple[int, int]]:
    """Returns the Super Experts (arXiv 2507.23279), whose outputs are extreme, as (layer position, expert) in order.

    They are in the first three quarters of the layers. Their largest |output| lies above the 99.5th percentile of all
    experts there, and above a tenth of the largest there.

    Args:
        output_max: [L, E], the largest |value| of each expert's output.
    """
    early = output_max[: max(1, int(0.75 * len(output_max)))]
    found = (early > np.percentile(early, 99.5)) & (early > early.max() / 10)
    return [(int(layer), int(expert)) for layer, expert in np.argwhere(found)]
