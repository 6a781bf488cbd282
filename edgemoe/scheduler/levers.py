"""Levers that trade exactness for speed, usable with any scheduler and off by default.

Each is a function of values: it turns a routing into another before the scheduler plans, or a plan into another after.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from edgemoe.plan import Plan, Routing
from edgemoe.scheduler.base import Setting
from edgemoe.scheduler.options import check, option
from edgemoe.scheduler.plans import add_ahead, keep_first, keep_slots

__all__ = ["CachePrior", "Levers", "low_bits_first", "skip_small", "small_gates", "without_misses"]

_TINY = 1e-30  # added to probabilities so that their logarithms are finite


@dataclass(frozen=True, slots=True)
class Levers:
    """The lossy options that every scheduler takes."""

    cache_prior: float = option(
        0.0, "add this times the range of a layer's logits to those of resident experts before the "
        "best are chosen; while decoding only (Cache-Prior, arXiv 2412.00099); 0 is off"
    )  # fmt: skip
    protect: int = option(1, "the router's best so many experts that cache_prior leaves alone")
    admit: bool = option(
        False, "with cache_prior: read what was displaced in the background, or it is displaced again whenever it "
        "is chosen; without, fewer bytes are read"
    )  # fmt: skip
    top_p: float = option(
        1.0, "run only the best experts whose gates together pass this share of all gates "
        "(dynamic top-p routing); 1 is off"
    )  # fmt: skip
    skip_below: float = option(
        0.0, "skip experts with a gate below this times the token's largest; 0 is off"
    )
    renormalise: bool = option(False, "scale the other gates up when top_p or skip_below skips")
    miss_bits: int = option(
        0, "run an expert that is not resident at its bits with what is resident of it, at least these "
        "bits, and read the rest later; 0 is off"
    )  # fmt: skip

    stand_ins: str = option(
        "file", "what takes the place of experts that are left out: file for the maps of edgemoe stand-ins if the file "
        "has some, none; not with cache_prior", choices=("file", "none"),
    )  # fmt: skip
    stand_in_below: float = option(
        0.0, "do not wait for an expert that is not resident if its share of the token's gates is below this: its "
        "stand-in runs; while decoding only; 0 is off"
    )  # fmt: skip
    spare: str = option(
        "file", "experts that nothing lossy touches: file for the Super Experts that its allocation protects, none, "
        "or LAYER.EXPERT,…"
    )  # fmt: skip

    def __post_init__(self) -> None:
        check("cache_prior", self.cache_prior, 0, 10)
        check("protect", self.protect, 0, 1024)
        check("top_p", self.top_p, 0, 1)
        check("skip_below", self.skip_below, 0, 1)
        check("stand_in_below", self.stand_in_below, 0, 1)

    @property
    def leaves_out(self) -> bool:
        """Whether the levers may leave experts out."""
        return self.top_p < 1 or self.skip_below > 0 or self.stand_in_below > 0

    @property
    def reads_ahead(self) -> bool:
        """Whether the levers may read experts ahead, or what they lack."""
        return self.miss_bits > 0 or (self.cache_prior > 0 and self.admit)

    @property
    def notes(self) -> tuple[str, ...]:
        """The levers that are on, one line each."""
        lines = []
        if self.cache_prior:
            lines.append(
                f"lossy: routing prefers resident experts (cache_prior {self.cache_prior:g})"
            )
        if self.top_p < 1:
            lines.append(f"lossy: experts beyond {self.top_p:g} of a token's gates are skipped")
        if self.skip_below:
            lines.append(
                f"lossy: experts below {self.skip_below:g} of the largest gate are skipped"
            )
        if self.stand_in_below:
            lines.append(
                f"lossy: experts that are not resident are not waited for below {self.stand_in_below:g} of the gates"
            )
        if self.miss_bits:
            lines.append(
                f"lossy: experts that are not resident run at {self.miss_bits} bits or more"
            )
        return tuple(lines)


class CachePrior:
    """A second choice of experts that favours resident ones (Cache-Prior, arXiv 2412.00099).

    strength * D is added to the logit of a resident expert, where D is the running mean of the layer's range of logits.
    The router's first `protect` experts always stay. Gates are the router's probabilities of the experts chosen now,
    scaled to the sum that the gates had before.
    """

    def __init__(
        self,
        setting: Setting,
        strength: float,
        protect: int,
        spared: NDArray[np.bool_] | None = None,
    ) -> None:
        """Args:
        spared: [num_layers, num_experts], experts that stay whenever the router has chosen them; None for none.
        """
        self._strength, self._protect, self._spared = strength, protect, spared
        self._range = [0.0] * setting.num_layers
        self._logits = np.empty(setting.num_experts)
        self._tokens = [0] * setting.num_layers
        self.substituted = 0
        """How many experts have been chosen in place of the router's so far."""

    def choose(
        self, routing: Routing, resident: NDArray[np.bool_]
    ) -> tuple[Routing, NDArray[np.int32]]:
        """Returns the new routing of decoding tokens, best first, and the displaced experts, which no token has now.

        Args:
            resident: [E], whether each of the layer's experts is in memory at the bits that will be planned.

        Raises:
            ValueError: the routing has no scores.
        """
        if routing.scores is None:
            raise ValueError("cache_prior: needs the router's scores, which a trace does not have")
        if len(routing.experts) == 1:
            return self._choose_one(routing, resident)
        layer, scores = routing.layer, routing.scores
        chosen = [
            self._choose_one(Routing(layer, e[None], g[None], scores=s[None]), resident)[0]
            for e, g, s in zip(routing.experts, routing.gates, scores, strict=True)
        ]
        experts, gates = (
            np.concatenate([getattr(one, name) for one in chosen]) for name in ("experts", "gates")
        )
        return Routing(
            layer, experts, gates, routing.ahead_experts, routing.ahead_gates, scores,
            sequences=routing.sequences,
        ), np.setdiff1d(routing.experts, experts)  # fmt: skip

    def _choose_one(
        self, routing: Routing, resident: NDArray[np.bool_]
    ) -> tuple[Routing, NDArray[np.int32]]:
        """Does what `choose` does, for one token."""
        assert routing.scores is not None
        layer, scores, logits = routing.layer, routing.scores[0], self._logits
        chosen = routing.experts[0].astype(np.intp)  # numpy converts other indices at every use
        logits[...] = scores
        logits += _TINY
        np.log(logits, logits)
        self._tokens[layer] += 1
        spread = float(logits[chosen[0]] - np.minimum.reduce(logits))
        self._range[layer] += (spread - self._range[layer]) / self._tokens[layer]
        if False not in resident.take(chosen).tolist():
            return routing, routing.experts[0, :0]
        logits[resident.nonzero()[0]] += self._strength * self._range[layer]
        logits[chosen[: self._protect]] = np.inf
        if self._spared is not None:
            logits[chosen[self._spared[layer].take(chosen)]] = np.inf
        E, K = len(logits), len(chosen)
        best = logits.argpartition(E - K)[E - K :] if E > K else chosen
        is_best = np.zeros(E, bool)
        is_best[best] = True
        displaced = routing.experts[0].compress(~is_best.take(chosen))
        if len(displaced) == 0:
            return routing, displaced
        self.substituted += len(displaced)
        probabilities = scores.take(best)
        order = (-probabilities).argsort(kind="stable")
        gates = probabilities.take(order)
        gates *= np.add.reduce(routing.gates[0]) / np.add.reduce(gates)
        experts = best.take(order).astype(np.int32)[None]
        return Routing(
            layer, experts, gates[None], routing.ahead_experts, routing.ahead_gates, routing.scores
        ), displaced


def small_gates(
    gates: NDArray[np.float32], *, top_p: float, skip_below: float
) -> NDArray[np.bool_]:
    """Returns which slots stay, [T, K], for gates [T, K], best first. A token's first slot always stays.

    Top-p keeps the shortest prefix of a token's slots whose share of its gates exceeds p, including the slot that
    crosses p.
    """
    counts = [_num_large(token, top_p, skip_below) for token in gates.tolist()]
    keep: NDArray[np.bool_] = np.arange(gates.shape[1]) < np.array(counts)[:, None]
    return keep


def _num_large(gates: list[float], top_p: float, skip_below: float) -> int:
    """Returns how many of one token's gates stay. Plain Python numbers are faster than numpy for about eight gates."""
    least, sums = skip_below * gates[0], list(accumulate(gates))
    most = top_p * sums[-1]
    for i in range(1, len(gates)):
        if gates[i] < least or (top_p < 1 and sums[i - 1] > most):
            return i
    return len(gates)


def skip_small(
    plan: Plan, gates: NDArray[np.float32], *, top_p: float, skip_below: float, renormalise: bool
) -> Plan:
    """Returns the plan without the slots that have small gates.

    Args:
        gates: [T, K], the routing's, best first.
        renormalise: scale a token's other gates so that they sum to what all its gates summed to.
    """
    T, K = gates.shape
    if T == 1:  # the fast path for decoding
        count = _num_large(gates[0].tolist(), top_p, skip_below)
        if count == K:
            return plan
        if not renormalise:
            return keep_first(plan, count, plan.gates)
        keep = np.arange(K)[None] < count
    else:
        keep = small_gates(gates, top_p=top_p, skip_below=skip_below)
        if keep.all():
            return plan
    new = plan.gates
    if renormalise:
        kept = np.where(keep & (plan.rows >= 0), new, np.float32(0)).sum(axis=1, keepdims=True)
        new = (new * (new.sum(axis=1, keepdims=True) / np.maximum(kept, 1e-20))).astype(np.float32)
    return keep_first(plan, count, new) if T == 1 else keep_slots(plan, keep, new)


def without_misses(plan: Plan, routing: Routing, residency: NDArray[np.int8], share: float) -> Plan:
    """Returns the plan without slots of experts that are absent from memory and have a small gate.

    A token's first slot always stays.

    Args:
        residency: [E], levels in memory of the experts of the plan's layer, 0 = absent.
        share: an absent expert stays if it has at least this share of the sum of its token's gates.
    """
    gates = routing.gates
    keep = gates >= share * gates.sum(axis=1, keepdims=True)
    keep |= residency[routing.experts] > 0
    keep[:, 0] = True
    keep &= plan.rows >= 0
    return plan if keep.sum() == len(plan.tokens) else keep_slots(plan, keep, plan.gates)


def low_bits_first(plan: Plan, resident_bits: NDArray[np.int8], least: int, first: int) -> Plan:
    """Returns the plan in which experts run at the bits that are resident, and their missing bits are read ahead.

    It is meant for decoding. In a prompt one read of an expert serves many tokens, so that waiting for it pays.

    Args:
        resident_bits: [E], of the plan's layer; 0 for an absent expert.
        least: bits at which an expert runs at least, but never at more than were planned.
        first: the index of the layer's first expert, layer * num_experts.
    """
    has = resident_bits[plan.experts]
    lacks = has < plan.bits
    if not lacks.any():
        return plan
    bits = np.minimum(np.maximum(has, np.int8(least)), plan.bits)
    later = plan.experts[lacks] + np.int32(first)
    lowered = Plan(
        plan.layer, plan.experts, bits, plan.offsets, plan.tokens, plan.rows, plan.gates,
        plan.ahead, plan.ahead_bits, plan.drop, plan.drop_bits,
    )  # fmt: skip
    return add_ahead(lowered, later, plan.bits[lacks])
