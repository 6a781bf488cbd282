"""A model that shows a `Tap` what flows through it; without the engine's conversation, sampling and statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgemoe import hardware
from edgemoe.experts import Experts
from edgemoe.file.format import MoeFile
from edgemoe.model import Batch, Decoder, KvTypes
from edgemoe.ops import OpsShape
from edgemoe.ops.tap import Tap, TapOps
from edgemoe.runtime.budget import Budget
from edgemoe.runtime.opening import model_setting
from edgemoe.scheduler import OnDemand
from edgemoe.store import ExpertStore, load_dense

__all__ = ["Sums", "TappedModel"]


class Sums(Tap, Protocol):
    """Is a tap that adds up what it is shown."""

    @property
    def sums(self) -> Mapping[str, NDArray[Any]]:
        """Returns them by name."""

    def end_window(self) -> None:
        """Ends a piece of text."""


class TappedModel:
    """Runs windows of tokens, each as a sequence of its own. Also a context manager, which frees the memory."""

    def __init__(
        self,
        moe: MoeFile,
        tap: Sums,
        *,
        ram: int,
        process: int,
        window: int,
        threads: int | None,
    ) -> None:
        config, level, kv_types = moe.config, len(moe.ladder), KvTypes()
        bits = moe.ladder[-1][0]
        shape = OpsShape.of(config, hardware.num_threads() if threads is None else threads)
        # Beside the engine's own: the sums, what the experts give at fewer bits, and what flows inside them.
        widths = config.hidden_size + config.expert_hidden
        beside = sum(a.nbytes for a in tap.sums.values())
        beside += 4 * window * config.experts_per_token * widths
        budget = Budget.divide(
            moe, ram=ram, process=process + beside, level=level,
            dense_level=len(moe.dense_ladder), context=window, kv_types=kv_types, ops=shape,
        )  # fmt: skip
        weights = load_dense(moe, len(moe.dense_ladder), verify=True)
        max_parts = budget.chunk * config.experts_per_token
        ops = TapOps(
            replace(shape, max_tokens=budget.chunk, max_context=window),
            tap, {id(w): name for name, w in weights.items()},
            max_parts=max_parts, hidden=config.expert_hidden,
        )  # fmt: skip
        setting = model_setting(moe, bits, budget.slots)
        self._store = ExpertStore.open(moe, bits=bits, budget_bytes=budget.slots, verify=True)
        parts = ops.empty(max_parts, config.hidden_size)
        experts = Experts(OnDemand(setting), self._store, ops, parts=parts)
        self._decoder = Decoder(
            config, weights, ops, experts, max_tokens=budget.chunk, context=window, types=kv_types
        )
        self._state = self._decoder.make_state()
        self._chunk = budget.chunk
        self._tap = tap
        self._head = "embed" if config.tied else "head"

    def __call__(self, ids: NDArray[np.int32]) -> None:
        state = self._state
        state.rewind(0)
        state.turned = len(ids)
        for first in range(0, len(ids), self._chunk):
            part = ids[first : first + self._chunk]
            state.begin(len(part))
            hidden = self._decoder.forward(Batch.of((state, part)))
            state.commit(part.tolist())
            self._tap.dense(self._head, hidden)  # what the head would be applied to

    def __enter__(self) -> TappedModel:
        return self

    def __exit__(self, *_: object) -> None:
        del self._decoder, self._store, self._state
