"""MC-MoE: bits per expert fixed offline, and experts with small gates left out while decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.plan import Plan, Routing
from edgemoe.scheduler.allocation import allocated_bits
from edgemoe.scheduler.base import Scheduler, Setting
from edgemoe.scheduler.options import check, option, read_options
from edgemoe.scheduler.plans import add_ahead, look_ahead, plan_slots

__all__ = ["Mc"]


@dataclass(frozen=True, slots=True)
class McOptions:
    """The options of mc."""

    prune: bool = option(True, "leave experts out while decoding")
    beta: float = option(
        -1.0, "leave out experts with a gate below this times the largest; -1 takes each layer's median of "
        "the last chosen expert's gate over the largest, learned on the way"
    )  # fmt: skip
    most: int = option(
        1, "leave out at most so many of a token's experts; the paper has two and keeps one"
    )
    renormalise: bool = option(
        False,
        "the other gates take over the share of what is left out, as published; that costs more than it gains",
    )
    layers: int = option(10, "prune in so many layers, the deepest")
    prune_in: str = option(
        "", "instead: prune in these layers of the model, as 3,7,9: best those that lose least by it, which "
        "`edgemoe quality --run mc prune_in=N` measures one by one"
    )  # fmt: skip
    allocation: bool = option(
        True,
        "run every expert at the bits that the file's section `allocation` gives it, if it has one",
    )
    look_ahead: int = option(
        0,
        "read what the routers of the next so many layers choose for this layer's input, while computing",
    )

    def __post_init__(self) -> None:
        if self.beta != -1:
            check("beta", self.beta, 0, 1)
        check("most", self.most, 1, 1 << 16)
        check("layers", self.layers, 0, 1 << 16)
        check("look_ahead", self.look_ahead, 0, 4)


class Mc(Scheduler):
    """Runs each expert at bits fixed beforehand and prunes a token's experts by the ratio of its gates. Lossy.

    This is the paper's online dynamic pruning, as its code has it: in some layers, an expert is left out if its gate is
    below beta times the token's largest. In the paper the other gates take over its share; here only `renormalise` does
    that, because it made answers worse where it was measured. The paper has two experts per token and takes the median
    over a calibration text as beta; here only a token's last experts go (one, unless `most` says more), and beta is the
    running median, found by fixed steps. Prompts are not pruned: the paper protects their important tokens by attention
    mass, which schedulers do not see. The paper ranks layers by measured loss; here the user measures and names them.
    """

    Options = McOptions
    paper = "MC-MoE, ICLR 2025 (code Aaronhuang-778/MC-MoE); allocation: `edgemoe allocate`"

    _STEP = 0.02

    def __init__(self, setting: Setting, **options: Any) -> None:
        self.options = o = read_options(McOptions, options)
        L = setting.num_layers
        bits = allocated_bits(setting) if o.allocation else None
        notes = []
        if bits is None:
            bits = np.full((L, setting.num_experts), setting.bits, np.int8)
        elif (bits < setting.bits).any():
            notes.append(f"lossy: experts at {bits.mean():.2f} bits on average, by allocation")
        self._where = _layers_of(o, setting) if o.prune and setting.experts_per_token > 1 else []
        self._prunes = bool(self._where)
        self.leaves_out = self._prunes
        if self._prunes:
            notes.append(
                f"lossy: experts with small gates are left out in {len(self._where)} of {L} layers"
            )
        self.notes = tuple(notes)
        self.look_ahead = o.look_ahead
        self.reads_ahead = o.look_ahead > 0
        self._bits, self._num_experts = bits, setting.num_experts
        self.fixed_bits = bits
        self.betas = [0.5 if o.beta < 0 else o.beta] * L
        """The threshold of each layer, as a share of a token's largest gate."""

    def plan(self, routing: Routing, residency: NDArray[np.int8]) -> Plan:
        """See `Scheduler.plan`."""
        layer, gates = routing.layer, routing.gates
        bits = self._bits[layer][routing.experts]
        if self._prunes and routing.is_decoding and layer in self._where:
            gates = self._pruned(layer, gates, bits)
        plan = plan_slots(routing, bits, gates=gates)
        if routing.ahead_experts is None:
            return plan
        ahead = look_ahead(routing, self._num_experts)
        return add_ahead(plan, ahead, self._bits.reshape(-1)[ahead])

    def _pruned(
        self, layer: int, gates: NDArray[np.float32], bits: NDArray[np.int8]
    ) -> NDArray[np.float32]:
        """Sets the bits [T, K] of slots that are left out to 0, in place, and returns the gates [T, K] to use."""
        for t, shares in enumerate(gates.tolist()):
            least = self.betas[layer] * shares[0]
            if self.options.beta < 0:  # steps of one size, up or down, find the median
                step = self._STEP if shares[-1] > least else -self._STEP
                self.betas[layer] = min(max(self.betas[layer] + step, 0.0), 1.0)
            if shares[-1] < least:
                kept = sum(g >= least for g in shares)
                count = max(kept, len(shares) - self.options.most)
                bits[t, count:] = 0
                if self.options.renormalise:
                    gates = gates.copy()
                    gates[t] *= np.float32(sum(shares) / sum(shares[:count]))
        return gates

    def report(self) -> str:
        """Returns the median of the thresholds of the layers that are pruned."""
        if not self._prunes:
            return ""
        return f"beta {float(np.median([self.betas[layer] for layer in self._where])):.2f}"


def _layers_of(o: McOptions, setting: Setting) -> list[int]:
    """Returns the layers that are pruned, as positions among the layers with routed experts.

    Raises:
        ValueError: `prune_in` names a layer that does not exist or has no routed experts.
    """
    if not o.prune_in:
        return list(range(setting.num_layers))[max(setting.num_layers - o.layers, 0) :]
    known, where = setting.layers or tuple(range(setting.num_layers)), []
    for text in o.prune_in.split(","):
        if not text.strip().isdecimal() or int(text) not in known:
            raise ValueError(
                f"prune_in: the model has no layer {text.strip()!r} with routed experts"
            )
        where.append(known.index(int(text)))
    return sorted(set(where))
