"""HOBBIT: experts that are not in memory are read at fewer bits, or skipped, if they matter less to the token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.plan import Plan, Routing
from edgemoe.scheduler.base import Scheduler, Setting
from edgemoe.scheduler.look_ahead import LookAhead
from edgemoe.scheduler.options import check, option, read_options
from edgemoe.scheduler.plans import plan_slots, plan_token, prompt_ahead

__all__ = ["Hobbit", "fit_thresholds", "unimportance"]

_FIRST_FIT, _LAST_FIT = 16, 512  # tokens


@dataclass(frozen=True, slots=True)
class HobbitOptions:
    """The options of hobbit."""

    t1: float = option(
        -1.0, "a missing expert scoring above this is loaded at low_bits; -1 fits it to the model on the way, "
        "so that `low` and `skip` are the shares of all selections (0.6 where two experts run per token)"
    )  # fmt: skip
    t2: float = option(-1.0, "a missing expert scoring above this is skipped; -1 as for t1 (0.9)")
    low: float = option(0.30, "share of selections for fitting t1, as on Mixtral in the paper")
    skip: float = option(0.03, "share of selections for fitting t2")
    low_bits: int = option(0, "the low precision; 0 is the file's best of at most half the bits")
    strict: bool = option(
        True,
        "an important expert of which only the low bits are in memory is a miss; off uses them",
    )
    renormalise: bool = option(False, "scale the other gates up where an expert is skipped")
    look_ahead: int = option(
        1, "how many layers ahead to predict by their routers; stops at the first one with a miss"
    )
    trials: bool = option(
        True, "read ahead what ranks predict that were right often enough, and nothing where tokens are faster "
        "without; off reads all, as published"
    )  # fmt: skip
    prompt_ahead: bool = option(
        False,
        "in a prompt that wants every expert of a layer, read the next layer's first ones ahead",
    )
    mixed_ahead: bool = option(
        True, "what is predicted is loaded at the precision that its score gives, not all at high"
    )

    def __post_init__(self) -> None:
        for name in ("t1", "t2"):
            if getattr(self, name) != -1:
                check(name, getattr(self, name), 0, 1)
        if (self.t1 == -1) != (self.t2 == -1):
            raise ValueError("t1 and t2: expected both or none")
        if self.t1 > self.t2:
            raise ValueError(f"t1: expected at most t2 = {self.t2:g}, got {self.t1:g}")
        check("low", self.low, 0, 1)
        check("skip", self.skip, 0, 1 - self.low)
        check("look_ahead", self.look_ahead, 0, 4)


def unimportance(gates: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns HOBBIT's scores of unimportance, [T, K]: s_i = g_0 + … + g_(i-1), s_0 = 0 (HOBBIT 3.2).

    Args:
        gates: [T, K], best first; each token's are normalised to sum 1 here.
    """
    total: NDArray[np.float32] = np.cumsum(gates, axis=1, dtype=np.float32)
    scores: NDArray[np.float32] = total - gates
    scores /= np.maximum(total[:, -1:], np.float32(1e-30))
    return scores


def fit_thresholds(scores: NDArray[np.float32], *, low: float, skip: float) -> tuple[float, float]:
    """Returns the thresholds T1 and T2 above which lie shares of `low` + `skip` and of `skip` of the scores."""
    t1, t2 = np.quantile(scores, [1.0 - low - skip, 1.0 - skip])
    return float(t1), float(t2)


class Hobbit(Scheduler):
    """Reads missing experts at high bits, at low bits or not at all, by the gates of the better experts. Lossy.

    The score of a token's expert is the share of the token's gates that its better experts have: the higher, the less
    important. Only misses are scored; an expert that is in memory runs as it is. In prompts an expert is read once, at
    the highest precision that any of its tokens asks for, and all of them use that. The routers of the next layers,
    applied to this layer's input, predict what to read ahead.
    """

    Options = HobbitOptions
    paper = "HOBBIT, arXiv 2411.01433 (MoE-APEX, ASPLOS'26), sections 3.2 to 3.4"
    drops = "hobbit"

    def __init__(self, setting: Setting, **options: Any) -> None:
        self.options = o = read_options(HobbitOptions, options)
        low = o.low_bits or max(
            (b for b in setting.level_bits if b <= setting.bits // 2), default=setting.level_bits[0]
        )
        if low not in setting.level_bits:
            listed = ", ".join(map(str, setting.level_bits))
            raise ValueError(f"low_bits: expected one of {listed}, got {low}")
        self.look_ahead = o.look_ahead
        self.reads_ahead = o.look_ahead > 0
        self._watch = LookAhead(setting) if o.look_ahead and o.trials and not setting.fits else None
        self.t1, self.t2 = (o.t1, o.t2) if o.t1 >= 0 else (0.6, 0.9)
        self._low, self._high = low, setting.bits
        self._bits_of = np.array([0, *setting.level_bits], np.int8)
        self._rule = _core.PrecisionRule(
            level_bits=setting.level_bits, low=low, high=setting.bits, strict=o.strict
        )
        self._strict, self._mixed_ahead = o.strict, o.mixed_ahead
        self._prompt_ahead = o.prompt_ahead and o.look_ahead > 0 and not setting.fits
        self._last = setting.num_layers - 1
        self.leaves_out = o.skip > 0 or o.t2 >= 0
        self._num_experts = setting.num_experts
        self._fits_itself = o.t1 < 0 and setting.experts_per_token > 2
        self._gates_seen: list[NDArray[np.float32]] = []
        self._tokens, self._next_fit = 0, _FIRST_FIT
        self._fitted_to = 0  # tokens whose scores gave the thresholds; 0 before the first fit
        self.notes = (
            f"lossy: less important experts are read at {low} bits, and the least skipped, when not in memory",
        )

    def plan(self, routing: Routing, residency: NDArray[np.int8]) -> Plan:
        """See `Scheduler.plan`."""
        if self._fits_itself:
            self._gates_seen.append(routing.gates.copy())
        if len(routing.gates) == 1:
            self._rule.t1, self._rule.t2 = self.t1, self.t2
            bits = self._rule.token(routing.gates[0], routing.experts[0], residency[routing.layer])
            gates = self._gates(routing.gates, bits)
            return plan_token(routing, bits, gates, *self._wishes(routing, residency))
        resident = self._bits_of[residency[routing.layer]]
        # One read serves all tokens of an expert, so it is read at the highest bits that any of them asks for.
        scores = unimportance(routing.gates)
        wanted = np.where(scores <= self.t1, self._high, np.where(scores <= self.t2, self._low, 0))
        most = np.zeros(self._num_experts, np.int64)
        np.maximum.at(most, routing.experts, wanted)
        least = most if self._strict else np.minimum(most, self._low)
        bits = np.where((resident > 0) & (resident >= least), resident, most).astype(np.int8)
        slots = bits[routing.experts]
        plan = plan_slots(routing, slots, gates=self._gates(routing.gates, slots))
        if not routing.is_decoding:
            if self._prompt_ahead and most.all() and routing.layer < self._last:
                plan.ahead = prompt_ahead(routing.layer + 1, residency)
                plan.ahead_bits = np.full(len(plan.ahead), self._high, np.int8)
            return plan
        plan.ahead, plan.ahead_bits = self._wishes(routing, residency)
        return plan

    def _gates(self, gates: NDArray[np.float32], bits: NDArray[np.int8]) -> NDArray[np.float32]:
        if not self.options.renormalise or bits.all():
            return gates
        kept = np.where(bits > 0, gates, np.float32(0)).sum(axis=1, keepdims=True)
        scaled: NDArray[np.float32] = gates * (gates.sum(axis=1, keepdims=True) / kept)
        return scaled

    def _wishes(
        self, routing: Routing, residency: NDArray[np.int8]
    ) -> tuple[NDArray[np.int32] | None, NDArray[np.int8] | None]:
        """Returns `Plan.ahead` and `Plan.ahead_bits`: what the next layers' routers choose (HOBBIT 3.3).

        It stops after the first layer with a miss. Predicted experts that are in memory are listed too, at the bits
        that they have, which keeps them from being evicted.
        """
        if self._watch is not None:
            self._watch.note(routing, residency)
        if routing.ahead_experts is None or routing.ahead_gates is None:
            return None, None
        all_ids, all_bits, rule, E = [], [], self._rule, self._num_experts
        rule.t1, rule.t2 = self.t1, self.t2
        ranks = routing.experts.shape[1] if self._watch is None else self._watch.ranks
        for i, tokens in enumerate(routing.ahead_experts[:, :, :ranks]):
            layer = routing.layer + 1 + i
            has, is_missing = residency[layer], False
            for t, experts in enumerate(tokens):
                gates = routing.ahead_gates[i, t] if self._mixed_ahead else None
                ids, bits, lacks = rule.ahead(gates, experts, has, layer * E)
                all_ids.append(ids)
                all_bits.append(bits)
                is_missing = is_missing or lacks
            if is_missing:
                break
        if len(all_ids) == 1:  # nearly always
            return all_ids[0], all_bits[0]
        ids, bits = np.concatenate(all_ids), np.concatenate(all_bits)
        if routing.sequences == 1:
            return ids, bits
        most: dict[int, int] = {}  # one read serves all sequences
        for id, want in zip(ids.tolist(), bits.tolist(), strict=True):
            most[id] = max(want, most.get(id, 0))
        return np.array(list(most), np.int32), np.array(list(most.values()), np.int8)

    def passed(self, tokens: int, seconds: float, sequences: int = 1) -> None:
        """See `Scheduler.passed`. Fits the thresholds to all scores so far each time their number of tokens doubles.

        After `_LAST_FIT` tokens they stay.
        """
        if self._watch is not None:
            self._watch.passed(tokens, seconds, sequences)
            self.look_ahead = self.options.look_ahead if self._watch.is_on else 0
        self._tokens += tokens
        if self._fits_itself and self._tokens >= self._next_fit:
            gates = np.concatenate(self._gates_seen)
            self._gates_seen = [gates]
            scores = unimportance(gates)
            self.t1, self.t2 = fit_thresholds(scores, low=self.options.low, skip=self.options.skip)
            self._fitted_to, self._next_fit = self._tokens, 2 * self._tokens
            if self._tokens >= _LAST_FIT:
                self._fits_itself = False
                self._gates_seen.clear()

    def state(self) -> Mapping[str, NDArray[Any]]:
        """See `Scheduler.state`."""
        o, watched = self.options, self._watch.state() if self._watch is not None else {}
        if not self._fitted_to:
            return watched
        return {
            **watched,
            "hobbit.thresholds": np.array([self.t1, self.t2, o.low, o.skip, self._fitted_to]),
        }

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """See `Scheduler.restore`.

        Thresholds that were fitted to other shares are ignored. This run fits again once it has seen more tokens than
        the restored fit.
        """
        if self._watch is not None:
            self._watch.restore(state)
        found = state.get("hobbit.thresholds")
        if found is None or not self._fits_itself:
            return
        t1, t2, low, skip, tokens = found.tolist()
        if (low, skip) == (self.options.low, self.options.skip) and 0 <= t1 <= t2 <= 1:
            self.t1, self.t2 = t1, t2
            self._fitted_to = int(tokens)
            self._next_fit = max(_FIRST_FIT, self._fitted_to)
            self._fits_itself = self._fitted_to < _LAST_FIT

    def report(self) -> str:
        """Returns the thresholds, and how well look-ahead does."""
        watched = self._watch.report() if self._watch is not None else ""
        return f"T1 {self.t1:.2f}, T2 {self.t2:.2f}" + (f", {watched}" if watched else "")
