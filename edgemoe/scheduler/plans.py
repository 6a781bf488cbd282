"""Functions that make plans from the bits of every routed slot, or from another plan. They change no plan in place."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from edgemoe.plan import Plan, Routing

__all__ = [
    "add_ahead",
    "keep_first",
    "keep_slots",
    "look_ahead",
    "plan_slots",
    "plan_token",
    "plan_whole",
    "prompt_ahead",
    "slot_bits",
    "with_ahead",
]

_ONE_TOKEN = np.zeros(1024, np.int32)
_COUNT = np.arange(1025, dtype=np.int32)
_SKIPPED = np.full(1024, -1, np.int32)
_PROMPT_AHEAD = 4  # experts of the next layer
_BITS_PER_CODE = 16  # more than any precision, so that expert * 16 + bits sorts by both


def plan_slots(
    routing: Routing,
    bits: NDArray[np.int8],
    *,
    gates: NDArray[np.float32] | None = None,
    hottest_first: bool = False,
    resident_bits: NDArray[np.int8] | None = None,
) -> Plan:
    """Plans every routed slot at its own bits.

    A single token's experts always keep the order of the routing. A prompt's experts are in the order of the file and,
    for each expert, of ascending bits. With `hottest_first` they are in the order of demand instead: the planes that
    most tokens use come first, where a token that uses a plane uses all planes below it too (D2MoE 3.4, hottest expert
    bit first; its greedy walk over queues of non-increasing demand is a sort). Resident planes come before all others.

    Args:
        bits: [T, K]; 0 skips the slot.
        gates: [T, K], used in place of the routing's.
        resident_bits: [E], the bits of this layer's experts that are in memory; for `hottest_first`.
    """
    gates = routing.gates if gates is None else gates
    T, K = routing.experts.shape
    if T == 1:
        return plan_token(routing, bits[0], gates)
    flat_bits = bits.reshape(-1)
    slots = np.flatnonzero(flat_bits)
    codes = routing.experts.reshape(-1)[slots] * _BITS_PER_CODE + flat_bits[slots]
    groups, group_of, counts = np.unique(codes, return_inverse=True, return_counts=True)
    experts, levels = np.divmod(groups.astype(np.int32), np.int32(_BITS_PER_CODE))
    if hottest_first and len(groups):
        demand = _demand(experts, counts)
        if resident_bits is not None:
            demand[resident_bits[experts] >= levels] = T * K + 1
        order = np.lexsort((groups, -demand))
        rank = np.empty(len(order), np.intp)
        rank[order] = np.arange(len(order))
        group_of, experts, levels, counts = (
            rank[group_of], experts[order], levels[order], counts[order],
        )  # fmt: skip
    offsets = np.zeros(len(groups) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    slots = slots[np.argsort(group_of, kind="stable")]
    rows = np.full(T * K, -1, np.int32)
    rows[slots] = np.arange(len(slots), dtype=np.int32)
    return Plan(
        routing.layer, experts, levels.astype(np.int8), offsets,
        (slots // K).astype(np.int32), rows.reshape(T, K), gates,
    )  # fmt: skip


def plan_token(
    routing: Routing,
    bits: NDArray[np.int8],
    gates: NDArray[np.float32] | None = None,
    ahead: NDArray[np.int32] | None = None,
    ahead_bits: NDArray[np.int8] | None = None,
) -> Plan:
    """Plans a single token's slots in the order of the routing. It runs for every layer and token while decoding.

    Args:
        bits: [K]; 0 skips the slot.
        gates: [1, K], used in place of the routing's.
        ahead: see `Plan.ahead`.
        ahead_bits: see `Plan.ahead_bits`.
    """
    experts = routing.experts[0]
    K = len(experts)
    offsets, tokens, rows = _whole(K)
    if 0 in bits.tolist():  # faster than `all` for so few values
        kept = bits.nonzero()[0]
        offsets, tokens, _ = _whole(len(kept))
        rows = _SKIPPED[:K].copy().reshape(1, K)
        rows[0, kept] = _COUNT[: len(kept)]
        experts, bits = experts.take(kept), bits.take(kept)
    return Plan(
        routing.layer, experts, bits, offsets, tokens, rows,
        routing.gates if gates is None else gates, ahead, ahead_bits,
    )  # fmt: skip


def plan_whole(
    routing: Routing,
    bits: NDArray[np.int8],
    ahead: NDArray[np.int32] | None = None,
    ahead_bits: NDArray[np.int8] | None = None,
) -> Plan:
    """Returns what `plan_token` does, for bits [K] of which none is 0."""
    offsets, tokens, rows = _whole(len(bits))
    return Plan(
        routing.layer, routing.experts[0], bits, offsets, tokens, rows, routing.gates, ahead, ahead_bits,
    )  # fmt: skip


@cache
def _whole(K: int) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Returns the offsets, tokens and rows of a plan for one token that skips none of its K slots."""
    return _COUNT[: K + 1], _ONE_TOKEN[:K], _COUNT[:K].reshape(1, K)


def _demand(experts: NDArray[np.int32], counts: NDArray[np.intp]) -> NDArray[np.intp]:
    """Returns how many tokens use each group's planes: its own, and those of later groups of the same expert."""
    total = np.cumsum(counts)
    last = np.append(np.flatnonzero(experts[1:] != experts[:-1]), len(experts) - 1)
    ends = total[last][np.searchsorted(last, np.arange(len(experts)))]
    demand: NDArray[np.intp] = ends - total + counts
    return demand


def slot_bits(plan: Plan) -> NDArray[np.int8]:
    """Returns the bits of every routed slot of a plan, int8 [T, K]; 0 where the slot is skipped."""
    of_row = np.append(np.repeat(plan.bits, np.diff(plan.offsets)), np.int8(0))
    bits: NDArray[np.int8] = of_row[plan.rows]
    return bits


def keep_first(plan: Plan, count: int, gates: NDArray[np.float32]) -> Plan:
    """Returns a single token's plan with its best `count` slots only. The plan must be in the order of the routing."""
    rows = plan.rows.copy()
    rows[0, count:] = -1
    n = int(rows.max()) + 1
    return Plan(
        plan.layer, plan.experts[:n], plan.bits[:n], plan.offsets[: n + 1], plan.tokens[:n], rows, gates,
        plan.ahead, plan.ahead_bits, plan.drop, plan.drop_bits,
    )  # fmt: skip


def keep_slots(plan: Plan, keep: NDArray[np.bool_], gates: NDArray[np.float32]) -> Plan:
    """Returns the plan without the slots that are not to be kept; the others keep their order.

    Args:
        keep: [T, K], True for a slot that stays.
        gates: [T, K], of the new plan.
    """
    kept = np.zeros(
        len(plan.tokens) + 1, bool
    )  # the last entry stands for slots that were skipped before, whose row is -1
    kept[plan.rows[keep]] = True
    kept[-1] = False
    new_row = np.append(np.cumsum(kept[:-1], dtype=np.int32) - np.int32(1), np.int32(-1))
    rows = np.where(keep, new_row[plan.rows], np.int32(-1))
    ends = np.append(np.int32(0), np.cumsum(kept[:-1], dtype=np.int32))
    counts = np.diff(ends[plan.offsets])
    used = counts > 0
    offsets = np.zeros(int(used.sum()) + 1, np.int32)
    np.cumsum(counts[used], out=offsets[1:])
    return replace(
        plan, experts=plan.experts[used], bits=plan.bits[used], offsets=offsets,
        tokens=plan.tokens[kept[:-1]], rows=rows, gates=gates,
    )  # fmt: skip


def add_ahead(plan: Plan, experts: NDArray[np.int32], bits: NDArray[np.int8]) -> Plan:
    """Returns the plan with more experts at the end of `Plan.ahead`.

    Args:
        experts: [a], as layer * num_experts + expert.
        bits: [a].
    """
    if len(experts) == 0:
        return plan
    if plan.ahead is not None and plan.ahead_bits is not None:
        experts = np.concatenate([plan.ahead, experts])
        bits = np.concatenate([plan.ahead_bits, bits])
    return with_ahead(plan, experts, bits)


def with_ahead(plan: Plan, experts: NDArray[np.int32], bits: NDArray[np.int8]) -> Plan:
    """Returns the plan with another list in `Plan.ahead`. Several times as fast as `replace`."""
    return Plan(
        plan.layer, plan.experts, plan.bits, plan.offsets, plan.tokens, plan.rows, plan.gates,
        experts, bits, plan.drop, plan.drop_bits,
    )  # fmt: skip


def prompt_ahead(layer: int, residency: NDArray[np.int8]) -> NDArray[np.int32]:
    """Returns the first experts of a layer that are not in memory, as layer * num_experts + expert.

    They are read ahead for a prompt: one that uses all experts of a layer will use nearly all of the next layer's.
    """
    soon = np.flatnonzero(residency[layer] == 0)[:_PROMPT_AHEAD].astype(np.int32)
    soon += np.int32(layer * residency.shape[1])
    return soon


def look_ahead(routing: Routing, num_experts: int) -> NDArray[np.int32]:
    """Returns the experts that the next layers' routers choose, as layer * num_experts + expert.

    Each is listed once, those of the nearest layers first.
    """
    assert routing.ahead_experts is not None
    p, T, _ = routing.ahead_experts.shape
    first = np.arange(routing.layer + 1, routing.layer + 1 + p, dtype=np.int32) * num_experts
    ids = (routing.ahead_experts + first[:, None, None].astype(np.int32)).reshape(-1)
    return ids if T == 1 else np.array(list(dict.fromkeys(ids.tolist())), np.int32)
