"""The differentiable choice of each slot's bits by trainable routers, in one forward pass of `bit_router.Routed`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from edgemoe.lab.bits.bit_router import Routed

__all__ = ["Choosing", "ffn", "keep_within"]


class Choosing:
    """The choice of every slot's bits in one forward pass, with counts of what was chosen.

    Each slot runs at one precision, drawn by its probability. Its gradient is that of the mixture of all precisions,
    each with its own output (a straight-through estimator). So a router learns how other precisions would change the
    loss, which the output of the chosen one alone does not show, while training still runs what inference will run.

    A level of 0 bits does not run the expert at all. With it the routers also prune online, as OTP does (MC#, arXiv
    2510.10962). A token's best expert never takes it.
    """

    def __init__(
        self, model: Routed, capacities: Sequence[float] | None, generator: torch.Generator
    ) -> None:
        self._model = model
        self._capacities = capacities
        self._generator = generator
        self._sums: list[Tensor] = []
        self._count = 0
        self.expected: list[Tensor] = []
        """Per layer, the mean over its slots of the expected bits."""
        self.bits = 0.0
        """The sum of the chosen bits over all slots."""
        self.slots = self.dropped = 0
        """How many slots there were, and how many exceeded a capacity."""

    def __call__(
        self,
        layer: int,
        expert: int,
        x: Tensor,
        gates: Tensor,
        is_best: Tensor,
        levels: Sequence[tuple[Tensor, ...] | None],
    ) -> Tensor:
        """Returns an expert's output [n, D] on x [n, D], each row at the bits that the router chooses for it.

        Args:
            layer: the position among the layers with routed experts.
            gates: [n], of the slots.
            is_best: bool [n], whether the expert is the token's first choice.
            levels: the expert's matrices gate, up and down at each precision; None for 0 bits.
        """
        m = self._model
        # Detached: earlier layers must not learn to please this router.
        scores = x.detach() @ m.weight[layer, expert].T + m.bias[layer, expert]
        scores = scores + gates[:, None] * m.gate_weight[layer, expert]
        if levels[0] is None:
            never = is_best[:, None] & (m.bits == 0)
            scores = scores.masked_fill(never, -torch.inf)
        p = scores.softmax(-1)
        choice = p.detach().multinomial(1, generator=self._generator)[:, 0]
        self._sums.append((p @ m.bits).sum())
        self._count += len(x)
        self.bits += float(m.bits[choice].sum())
        self.slots += len(x)
        out = torch.zeros_like(x)
        for k, matrices in enumerate(levels):
            if matrices is None:
                continue  # 0 bits: no output
            mine = choice == k
            here, others = mine.nonzero()[:, 0], (~mine).nonzero()[:, 0]
            ran = ffn(x[here], *matrices)
            with torch.no_grad():
                each = torch.empty_like(x)
                each[here], each[others] = ran, ffn(x[others], *matrices)
            out = out.index_add(0, here, ran) + (p[:, k] - p[:, k].detach())[:, None] * each
        if self._capacities is not None:
            kept = keep_within(choice, self._capacities, self._generator)
            self.dropped += int((~kept).sum())
            out = out * kept[:, None]
        return out

    def end_layer(self) -> None:
        """Called after all experts of a layer have run."""
        self.expected.append(torch.stack(self._sums).sum() / self._count)
        self._sums, self._count = [], 0


def keep_within(choice: Tensor, capacities: Sequence[float], generator: torch.Generator) -> Tensor:
    """Drops random tokens of one expert that exceed the capacity of their precision.

    Args:
        choice: int64 [n], the index of the precision of each of the expert's tokens.
        capacities: the share of the n tokens that may use each precision, rounded up to whole tokens.

    Returns:
        bool [n], which tokens are kept.
    """
    n = len(choice)
    order = torch.randperm(n, generator=generator)
    mixed = functional.one_hot(choice[order], len(capacities))
    before = (mixed.cumsum(0) * mixed).sum(1) - 1  # of the same precision, earlier in the order
    most = torch.tensor([int(np.ceil(round(c * n, 6))) for c in capacities])
    kept = torch.empty(n, dtype=torch.bool)
    kept[order] = before < most[choice[order]]
    return kept


def ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Returns the output [n, D] of a SwiGLU expert on x [n, D]."""
    return (functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
