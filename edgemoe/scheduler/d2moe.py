"""D2MoE: bits for each token and expert, planes read in the order of demand, and high planes dropped first."""

from __future__ import annotations

from dataclasses import dataclass
from operator import mul
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.errors import FormatError
from edgemoe.plan import Plan, Routing
from edgemoe.quant import BitRouters
from edgemoe.scheduler.base import Scheduler, Setting
from edgemoe.scheduler.options import check, option, read_options
from edgemoe.scheduler.plans import plan_slots, plan_token

__all__ = ["D2moe"]


@dataclass(frozen=True, slots=True)
class D2moeOptions:
    """The options of d2moe."""

    router: str = option(
        "default", "who chooses the bits: the file's trained routers (edgemoe train-bit-router), or the rule "
        "by shares of gates; the default is trained where the file has them",
        choices=("default", "trained", "rule"),
    )  # fmt: skip
    levels: int = option(
        3, "of the rule: how many precisions, the highest of the file up to --bits"
    )
    low: float = option(
        0.3, "of the rule: share of selections at the lowest precision (the paper's capacities)"
    )
    high: float = option(0.3, "of the rule: share at the highest; those between divide the rest")
    hottest_first: bool = option(
        True, "read the planes that most tokens use first; off reads in the order of the file"
    )
    frees: str = option(
        "prompts", "when room is made by the high planes of the layer before, then by its low ones; always is the "
        "paper's, and costs single tokens most of their hits",
        choices=("prompts", "always", "off"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        check("levels", self.levels, 1, 8)
        check("low", self.low, 0, 1)
        check("high", self.high, 0, 1 - self.low)


class D2moe(Scheduler):
    """Chooses the bits of every expert for each token, and reads planes by demand. Lossy.

    If the file has trained bit routers, one per expert, they choose the bits. Otherwise a rule does: a slot's share of
    its token's gates is compared with running quantiles of the layer, so that the paper's capacities hold on average.
    The hottest plane is read first (HEBF, hottest expert bit first). Room is made by the paper's memory rule: while a
    layer does not fit, the high planes of the layer before it are dropped, then its base. All this is mostly for
    prompts: a single token asks for each plane only once, so no plane is hotter than another.
    """

    Options = D2moeOptions
    paper = "D2MoE, arXiv 2504.15299 (MobiCom'25), sections 3.2 and 3.4"

    _STEP = 0.02  # how far a quantile moves per token, in units of the mean share 1 / K

    def __init__(self, setting: Setting, **options: Any) -> None:
        self.options = o = read_options(D2moeOptions, options)
        trained = _trained(setting, o.router)
        self.bit_routers = trained if setting.has_inputs else None
        if self.bit_routers is None:
            bits = np.array(setting.level_bits[-o.levels :], np.int8)
        else:
            for name in ("levels", "low", "high"):
                if name in options:
                    raise ValueError(f"{name}: of the rule; the trained routers take router=rule")
            bits = np.minimum(self.bit_routers.levels, setting.bits).astype(np.int8)
        n = len(bits)
        middle = (1.0 - o.low - o.high) / max(n - 2, 1)
        shares = [o.low] + [middle] * (n - 2)
        self._targets = np.cumsum(shares)[: n - 1].tolist() if n > 1 else []
        self._choice = bits
        K = setting.experts_per_token
        # Cuts between precisions, in shares of gates. Gates are skewed; all cuts start at the mean share.
        self.cuts = [[1.0 / K] * (n - 1) for _ in range(setting.num_layers)]
        """[num_layers][precisions - 1]: a share of the gates above cut i takes at least precision i + 1."""
        self._step = self._STEP / K
        self._num_experts = setting.num_experts
        self._level_bits = setting.level_bits
        self._bits_of = np.array([0, *setting.level_bits], np.int8)
        self._level_of = np.zeros(9, np.int8)
        self._level_of[list(setting.level_bits)] = np.arange(1, len(setting.level_bits) + 1)
        self._sizes = [0, *setting.level_bytes]
        self._layer_bytes = [
            0
        ] * setting.num_layers  # resident bytes, when the layer or the next one last ran
        self._is_counted = False  # whether `_layer_bytes` is up to date
        self._slots_bytes = setting.slots_bytes
        self.leaves_out = 0 in bits.tolist()
        if n > 1:
            used = sorted(set(bits.tolist()))
            listed = ", ".join(map(str, filter(None, used)))
            unless = " or not at all" if used[0] == 0 else ""
            who = "by their gates" if self.bit_routers is None else "as trained routers say"
            self.notes = (f"lossy: each token runs its experts at {listed} bits{unless}, {who}",)
        if trained is not None and self.bit_routers is None:
            self.notes += ("a trace has no inputs for the trained routers: d2moe's rule decides",)

    def plan(self, routing: Routing, residency: NDArray[np.int8]) -> Plan:
        """See `Scheduler.plan`."""
        bits = self.slot_precisions(routing)
        if len(bits) == 1:
            plan = plan_token(routing, bits[0])
        else:
            resident = self._bits_of[residency[routing.layer]]
            plan = plan_slots(
                routing, bits, hottest_first=self.options.hottest_first, resident_bits=resident
            )
        if self.options.frees == "always" or (self.options.frees == "prompts" and len(bits) > 1):
            return self._with_drop(plan, residency)
        self._is_counted = False
        return plan

    def slot_precisions(self, routing: Routing) -> NDArray[np.int8]:
        """Returns the bits of each slot, [T, K], by trained routers or by the cuts.

        In the second case it also moves the cuts towards their quantiles.
        """
        if routing.bit_logits is not None:
            index = routing.bit_logits.argmax(axis=2)
            if self._choice[0] == 0:  # a token's best expert is never left out
                index[:, 0] = 1 + routing.bit_logits[:, 0, 1:].argmax(axis=1)
            trained: NDArray[np.int8] = self._choice.take(index)
            return trained
        if len(self._targets) == 0:
            return np.full(routing.experts.shape, self._choice[0], np.int8)
        if len(routing.gates) == 1:
            return self._token_precisions(routing.layer, routing.gates[0].tolist())
        gates = routing.gates
        shares = gates / np.maximum(gates.sum(axis=1, keepdims=True), 1e-30)
        cuts = self.cuts[routing.layer]
        above = shares[:, :, None] > np.array(cuts)
        # A cut is at its quantile if the target share lies below it: step by the difference (Robbins and Monro).
        step = self._step * min(len(gates), 16)
        for i, share in enumerate(above.mean(axis=(0, 1)).tolist()):
            cuts[i] += step * (self._targets[i] - 1.0 + share)
        cuts.sort()
        chosen: NDArray[np.int8] = self._choice[above.sum(axis=2)]
        return chosen

    def _token_precisions(self, layer: int, gates: list[float]) -> NDArray[np.int8]:
        """Does what `slot_precisions` does by cuts, for one token. Plain Python numbers are faster for so few gates."""
        cuts, total = self.cuts[layer], max(sum(gates), 1e-30)
        index = [0] * len(gates)
        for i, cut in enumerate(cuts):
            above = 0
            for k, gate in enumerate(gates):  # best first
                if gate <= cut * total:
                    break
                index[k] += 1
                above += 1
            cuts[i] = cut + self._step * (self._targets[i] - 1.0 + above / len(gates))
        cuts.sort()
        one: NDArray[np.int8] = self._choice.take(index)[None]
        return one

    def _with_drop(self, plan: Plan, residency: NDArray[np.int8]) -> Plan:
        """Returns the plan with planes of the layer before to drop (D2MoE, algorithm 2): highest first, bases last."""
        layer, before = plan.layer, (plan.layer - 1) % len(residency)
        here, sizes = residency[layer], self._sizes
        if len(plan.gates) > 1:
            most = np.zeros(self._num_experts, np.int8)
            np.maximum.at(most, plan.experts, self._level_of[plan.bits])
            has, wanted = here.tolist(), most.tolist()
        else:
            has, wanted = here.take(plan.experts).tolist(), self._level_of.take(plan.bits).tolist()
        need = 0
        for w, h in zip(wanted, has, strict=True):
            if w > h:
                need += sizes[w] - sizes[h]
        if not self._is_counted:  # some passes did not come here
            for i in range(len(residency)):
                self._count(i, residency)
            self._is_counted = True
        counts = self._count(before, residency)
        self._count(layer, residency)
        # What the cache itself has dropped in another layer is noted only when that layer runs, so the sum may be too
        # high; it is capped at what fits.
        missing = need + min(sum(self._layer_bytes), self._slots_bytes) - self._slots_bytes
        if need == 0 or missing <= 0 or before == layer:
            return plan
        # `above` counts the experts of the layer before that are at more than `level`.
        above, level = 0, len(sizes) - 1
        while missing > 0 and level > 0:
            above += counts[level]
            freed = above * (sizes[level] - sizes[level - 1])
            missing -= freed
            self._layer_bytes[before] -= freed
            level -= 1
        if not above:
            return plan
        dropped = np.flatnonzero(residency[before] > level).astype(np.int32)
        dropped += np.int32(before * self._num_experts)
        bits = np.full(len(dropped), self._level_bits[level - 1] if level else 0, np.int8)
        return Plan(
            layer, plan.experts, plan.bits, plan.offsets, plan.tokens, plan.rows, plan.gates,
            plan.ahead, plan.ahead_bits, dropped, bits,
        )  # fmt: skip

    def _count(self, layer: int, residency: NDArray[np.int8]) -> list[int]:
        """Returns how many experts of a layer are at each level, and records the bytes that they take.

        Counting all layers each time would cost more than everything else here. A layer changes mostly when it runs.
        """
        counts: list[int] = np.bincount(residency[layer], minlength=len(self._sizes)).tolist()
        self._layer_bytes[layer] = sum(map(mul, counts, self._sizes))
        return counts


def _trained(setting: Setting, router: str) -> BitRouters | None:
    """Returns the file's trained routers; None if the file has none or the option `router` is "rule".

    Raises:
        ValueError: `router` is "trained" and the file has none.
        FormatError: the section is damaged, or belongs to another model.
    """
    section = setting.sections.get("bit-routers")
    if router == "rule":
        return None
    if section is None:
        if router == "trained":
            raise ValueError(
                "router: the file has no trained ones; edgemoe train-bit-router --store"
            )
        return None
    where = "section bit-routers"
    found = BitRouters.from_bytes(section, where)
    if found.weight.shape[:2] != (setting.num_layers, setting.num_experts):
        L, E = found.weight.shape[:2]
        raise FormatError(
            f"{where}: is for {L} layers of {E} experts; "
            f"the model has {setting.num_layers} of {setting.num_experts}"
        )
    unknown = [b for b in found.levels if 0 < b < setting.bits and b not in setting.level_bits]
    if unknown:
        raise FormatError(f"{where}: {unknown[0]} bits are not one of the file's levels")
    return found
