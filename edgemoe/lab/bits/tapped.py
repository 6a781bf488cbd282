"""A model that runs a layer at a time and shows its activations to a `Tap`, without the engine's conversation, sampling
and statistics.
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
    """A model that runs windows of tokens, each as a sequence of its own. As a context manager it frees its memory."""

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
        ram: bytes for the whole process.
        process: bytes that the process took before anything of this was allocated.
        beside: bytes that taps and the caller take.
        window: the most tokens of a sequence.
        threads: None for the machine's number.
        """
        config, level, kv_types = moe.config, len(moe.ladder), KvTypes()
        bits = moe.ladder[-1][0]
        shape = OpsShape.of(config, hardware.num_threads() if threads is None else threads)
        # In addition to the engine's memory: outputs of experts at fewer bits, and their hidden activations.
        widths = config.hidden_size + config.expert_hidden
        beside += 4 * window * config.experts_per_token * widths
        # For each token of a chunk: the hidden activations of an FFN or a copy of an input, in float32 and in float64.
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
        # No look-ahead: a layer runs for all windows before any expert of the next layer is needed.
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
        """Writes the embeddings of tokens [T], the input of the first layer, to x [T, D]."""
        self._decoder.embed(ids, x)

    def run_layer(
        self, index: int, ids: NDArray[np.int32], x: Array, tap: Tap, *, first: int = 0
    ) -> None:
        """Runs one layer for a window. x [T, D] is its input, and is replaced by its output.

        Args:
            index: of the layer; the last layer also shows the head's input to the tap.
            ids: [T], the tokens of the window.
            first: added to the positions in the window that `Tap.begin` gets.
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
