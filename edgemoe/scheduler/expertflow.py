"""ExpertFlow: the next token's path through the experts is predicted, and cache slots are given out by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.plan import Plan, Priorities, Routing
from edgemoe.scheduler.base import Scheduler, Setting
from edgemoe.scheduler.on_demand import OnDemand
from edgemoe.scheduler.options import check, option, read_options
from edgemoe.scheduler.paths import SECTION, PathUse
from edgemoe.scheduler.plans import plan_whole
from edgemoe.scheduler.predict import NextUse

__all__ = ["ExpertFlow"]

_UNUSED = 4.0
"""By how many rounds of all layers the next use of an expert is put off that was predicted and did not run.

So it is evicted before experts that were not predicted.
"""


@dataclass(frozen=True, slots=True)
class ExpertFlowOptions:
    """The options of expertflow."""

    prefetch: int = option(
        1, "read what is predicted for the next so many layers ahead; 0 for none"
    )
    predictor: str = option(
        "default", "what predicts the path: habit, or habit and the file's trained predictor of paths "
        "(edgemoe profile train); the default is the trained one where there is one",
        choices=("default", "trained", "habit"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        check("prefetch", self.prefetch, 0, 64)


class ExpertFlow(Scheduler):
    """Predicts the experts of all layers for the next token and gives slots to layers in the order they run. Exact.

    The paper trains a small encoder and decoder that predict the whole path from the text. Here the path is predicted
    from the routing of the prompt and the reply so far, without training (`edgemoe.scheduler.predict.NextUse`). If the
    file has a trained network, smaller than the paper's (`edgemoe.scheduler.paths`), both predictions are mixed.

    Slots go to predicted experts, those of the layers that run next first (PLEC). Evicted first are experts that were
    predicted and not used, then experts that were used and are not predicted again. An expert that the router wants and
    that is not in memory is read at once. The paper's grouping of tokens into batches is left out: there is one
    sequence here.
    """

    Options = ExpertFlowOptions
    drops = "own"
    paper = "after ExpertFlow, arXiv 2410.17954 (DAC 2026)"

    def __init__(self, setting: Setting, **options: Any) -> None:
        o = read_options(ExpertFlowOptions, options)
        L, E, K = setting.num_layers, setting.num_experts, setting.experts_per_token
        self._exact = OnDemand(setting, look_ahead=False)
        self._is_trained = o.predictor == "trained" or (
            o.predictor == "default" and SECTION in setting.sections
        )
        self._predictor = PathUse(setting) if self._is_trained else NextUse(L, E, K)
        self._K, self._num_layers = K, L
        self._top_level = len(setting.level_bits)
        self._prefetch = o.prefetch
        self.reads_ahead = o.prefetch > 0
        self._bits = np.full(L * E, setting.bits, np.int8)
        self._token_bits = self._bits[:K]
        self._known = 0  # layers that have a prediction
        self._step = 0.0
        self.policy = self.priorities = Priorities.zeros(L, E)
        self._paths = _core.PathRows(
            scores=self.priorities.scores, late=np.zeros((L, E)), paths=np.zeros((L, K), np.int32),
            version=self.priorities.version, penalty=_UNUSED,
        )  # fmt: skip
        self.predicted = self.right = 0
        """How many experts were predicted, and how many of those ran."""

    def plan(self, routing: Routing, residency: NDArray[np.int8]) -> Plan:
        """See `Scheduler.plan`."""
        layer, experts = routing.layer, routing.experts
        self._step += 1.0
        if self._known > layer:
            self.predicted += self._K
        else:
            self._known = layer + 1
        odds = self._predictor.update(routing)
        stop = min(layer + 1 + self._prefetch, self._known)
        right, ahead = self._paths.follow(
            layer, experts, odds, self._step, stop, residency, self._top_level
        )
        self.right += right
        if len(experts) > 1:
            return self._exact.plan(routing, residency)
        if stop == layer + 1:
            return plan_whole(routing, self._token_bits)
        return plan_whole(routing, self._token_bits, ahead, self._bits[: len(ahead)])

    def begin(self) -> None:
        """See `Scheduler.begin`."""
        self._predictor.begin()

    def tokens(self, ids: NDArray[np.int32], sequences: int = 1) -> None:
        """See `Scheduler.tokens`. Now that the token is known, a trained predictor predicts all layers again."""
        self._predictor.tokens(ids, sequences)
        against = self._predictor.path()
        if against is None:
            return
        self._paths.foresee(against, self._step)
        self._known = self._num_layers

    def passed(self, tokens: int, seconds: float, sequences: int = 1) -> None:
        """See `Scheduler.passed`. Learns from the token."""
        self._predictor.learn()

    def state(self) -> Mapping[str, NDArray[Any]]:
        """See `Scheduler.state`."""
        return self._predictor.state()

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """See `Scheduler.restore`."""
        self._predictor.restore(state)

    def report(self) -> str:
        """Returns the share of predicted experts that ran."""
        if not self.predicted:
            return ""
        kind = "trained path" if self._is_trained else "path"
        return f"{kind} {100 * self.right / self.predicted:.0f}% right"
