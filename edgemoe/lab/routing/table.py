"""EdgeMoE's table of which experts follow which (arXiv 2308.14352), counted offline on traces of several texts."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from safetensors.numpy import save

from edgemoe.runtime.trace import Trace
from edgemoe.scheduler.transitions import Transitions

__all__ = ["count_paths"]


def count_paths(traces: Iterable[Trace], shape: tuple[int, int, int]) -> tuple[bytes, int]:
    """Counts the paths of all tokens in traces of one model.

    Args:
        shape: the number of layers with routed experts, experts per layer, experts per token.

    Returns:
        The section "transitions" for the model's file, and how many tokens were counted.

    Raises:
        ValueError: a trace is of a model with another shape, or there are no tokens.
    """
    table, tokens = Transitions(*shape), 0
    for trace in traces:
        h = trace.header
        mine = (h.num_layers, h.num_experts, h.experts_per_token)
        if mine != shape:
            raise ValueError(
                f"expected traces of {shape[0]} layers of {shape[1]} experts, {shape[2]} per token; "
                f"got one of {mine[0]} of {mine[1]}, {mine[2]} per token"
            )
        for path in trace.by_token("experts").astype(np.int32):
            table.count(path)
            tokens += 1
    if not tokens:
        raise ValueError("expected traces with tokens")
    return save({name: np.ascontiguousarray(a) for name, a in table.state().items()}), tokens
