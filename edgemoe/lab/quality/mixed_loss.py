"""Measures what any choice of bits costs: experts, the other matrices, and keys and values at once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgemoe.file.format import open_moe
from edgemoe.lab.quality.loss import log_softmax_rows
from edgemoe.model import Decoder, KvTypes
from edgemoe.model.kv_table import Row
from edgemoe.runtime.opening import open_model
from edgemoe.runtime.options import EngineOptions
from edgemoe.runtime.sequence import Sequence as Conversation
from edgemoe.store import EMBED_ROWS, load_dense

__all__ = ["MixedLoss"]


class MixedLoss:
    """Keeps a model open and measures one choice after another on the same tokens; nothing is read again.

    The second half of each window counts. The reference, the file's highest level with keys and values in float16, is
    computed window by window when it is first needed, and stays in memory: N * T/2 * V float32.
    """

    def __init__(
        self, path: str | os.PathLike[str], windows: NDArray[np.int32], **options: Any
    ) -> None:
        """Args:
        windows: [N, T] tokens, each a sequence of its own.
        options: of `EngineOptions`: ram, threads.
        """
        moe = open_moe(path)
        self.windows = windows
        self._top = moe.expert_bits
        self._bits = self._top.copy()
        # The scheduler reads the array again at every plan.
        self._model = open_model(
            path, EngineOptions(context=windows.shape[1], options={"bits": self._bits}, **options)
        ).model
        self._weights = load_dense(moe, len(moe.dense_ladder), verify=True)
        self._reference: dict[int, NDArray[np.float32]] = {}

    def __call__(
        self,
        bits: NDArray[np.int8],
        rungs: Mapping[str, int],
        kv_rows: Sequence[Row],
        which: range | None = None,
    ) -> NDArray[np.float64]:
        """Returns KL(reference ‖ model) of each token, in nats.

        Args:
            bits: [L, E] of experts.
            rungs: of each matrix that is no expert's.
            kv_rows: types of each layer's keys and values.
            which: windows to measure on; None for all.
        """
        which = range(len(self.windows)) if which is None else which
        missing = [i for i in which if i not in self._reference]
        if missing:
            plain = tuple(row and ("f16", "f16") for row in kv_rows)
            found = self._log_probs(self._top, {}, plain, missing)
            self._reference.update(zip(missing, found, strict=True))
        out = []
        for i, q in zip(which, self._log_probs(bits, rungs, kv_rows, which), strict=True):
            p = self._reference[i]
            out.append((np.exp(p) * (p - q)).sum(1, dtype=np.float64))
        return np.concatenate(out)

    def _log_probs(
        self,
        bits: NDArray[np.int8],
        rungs: Mapping[str, int],
        kv_rows: Sequence[Row],
        which: Sequence[int],
    ) -> list[NDArray[np.float32]]:
        """Returns the log-probabilities of the second half of some windows, [T - T // 2, V] each."""
        model, budget = self._model, self._model.budget
        self._bits[:] = bits
        model.experts.look_again()
        weights = {
            name: cast(Any, w).first(rungs[name]) if name in rungs else w
            for name, w in self._weights.items()
        }
        weights[EMBED_ROWS] = self._weights["embed"]  # at the highest level, whatever the head has
        model.decoder = Decoder(
            model.config, weights, model.ops, model.experts, max_tokens=budget.chunk,
            context=budget.context, types=KvTypes("auto", "auto", tuple(kv_rows)),
        )  # fmt: skip
        sequence = Conversation(model)
        half = self.windows.shape[1] // 2
        logits = np.empty((self.windows.shape[1] - half, model.config.vocab_size), np.float32)
        out = []
        for i in which:
            window = self.windows[i]
            sequence.begin(window, kept=0)
            if half:
                sequence.prompt(window[:half], sequence.row)
            sequence.prompt(window[half:], logits)
            out.append(log_softmax_rows(logits))
        return out
