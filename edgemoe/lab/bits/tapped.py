"""A model that shows a `Tap` what flows through it, a layer at a time; without the engine's conversation, sampling and
statistics.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgemoe import hardware
from edgemoe.experts import Experts
from edgemoe.file.format import MoeFile
from edgemoe.model import Batch, Decoder, KvTypes
from edgemoe.ops import Array, OpsShape
from edgemoe.ops.tap import Tap, TapOps
from edgemoe.runtime.budget import Budget
from edgemoe.runtime.opening import model_setting
from edgemoe.scheduler import OnDemand
from edgemoe.store import ExpertStore, load_dense

__all__ = ["TappedModel"]


class TappedModel:
    """Runs windows of tokens, each as a sequence of its own. Also a context manager, which frees the memory."""

    def __init__(
        self,
        moe: MoeFile,
        *,
        ram: int,
        process: int,
        beside: int,
        window: int,
        threads: int | None,
    ) -> None:
        """Args:
        ram: memory for the whole process.
        process: what it took before there was anything of this.
        beside: what taps take, and who runs the layers.
        window: the most tokens of a sequence.
        """
        config, level, kv_types = moe.config, len(moe.ladder), KvTypes()
        bits = moe.ladder[-1][0]
        shape = OpsShape.of(config, hardware.num_threads() if threads is None else threads)
        # Beside the engine's own: what the experts give at fewer bits, and what flows inside them.
        widths = config.hidden_size + config.expert_hidden
        beside += 4 * window * config.experts_per_token * widths
        # For each token of a chunk: what flows inside an FFN, or a copy of an input, and either once more in float64.
        copies = 12 * max(shape.max_cols, shape.max_hidden)
        budget = Budget.divide(
            moe, ram=ram, process=process + beside, level=level,
            dense_level=len(moe.dense_ladder), context=window, kv_types=kv_types, ops=shape,
            beside=(0, copies),
        )  # fmt: skip
        weights = load_dense(moe, len(moe.dense_ladder), verify=True)
        max_parts = budget.chunk * config.experts_per_token
        self._ops = TapOps(
            replace(shape, max_tokens=budget.chunk, max_context=window),
            {id(w): name for name, w in weights.items()},
            max_parts=max_parts, hidden=config.expert_hidden,
        )  # fmt: skip
        setting = model_setting(moe, bits, budget.slots)
        self._store = ExpertStore.open(moe, bits=bits, budget_bytes=budget.slots, verify=True)
        parts = self._ops.empty(max_parts, config.hidden_size)
        # A layer is run for all windows before the next one's experts are wanted.
        experts = Experts(OnDemand(setting, look_ahead=False), self._store, self._ops, parts=parts)
        self._decoder = Decoder(
            config, weights, self._ops, experts,
            max_tokens=budget.chunk, context=window, types=kv_types,
        )  # fmt: skip
        self._state = self._decoder.make_state()
        self._chunk = budget.chunk
        self.num_layers = config.num_layers
        self._head = "embed" if config.tied else "head"

    def embed(self, ids: NDArray[np.int32], x: Array) -> None:
        """x [T, D] = what the first layer takes of tokens."""
        self._decoder.embed(ids, x)

    def run_layer(
        self, index: int, ids: NDArray[np.int32], x: Array, tap: Tap, *, first: int = 0
    ) -> None:
        """Runs a layer for a window; x [T, D] is what it takes, and becomes what the next one takes.

        Args:
            index: the layer's; the last one also shows what the head takes.
            first: is added to the window's positions in what `Tap.begin` is told.
        """
        state, ops = self._state, self._ops
        ops.tap = tap
        state.rewind(0)
        state.turned = len(ids)
        for start in range(0, len(ids), self._chunk):
            part = slice(start, min(start + self._chunk, len(ids)))
            state.begin(part.stop - start)
            tap.begin(first + start)
            normed = self._decoder.run_layer(index, Batch.of((state, ids[part])), x[part])
            state.commit(ids[part].tolist())
            if index == self.num_layers - 1:
                tap.dense(self._head, normed)

    def __enter__(self) -> TappedModel:
        return self

    def __exit__(self, *_: object) -> None:
        del self._decoder, self._store, self._state
