"""What an engine owns until it is closed: a model, its one sequence, and the lock on both."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from edgemoe.runtime.alone import Alone
from edgemoe.runtime.model import Model
from edgemoe.runtime.opening import Opened
from edgemoe.runtime.sequence import Sequence

__all__ = ["Held"]


class Held:
    """The owner of a model and its sequence, which it lends to one caller at a time. Any thread may call it."""

    def __init__(self, opened: Opened) -> None:
        self._model: Model | None = opened.model
        self._profile = opened.profile
        self._turn = Alone()
        self.sequence: Sequence | None = Sequence(opened.model)
        """None once the engine is closed. To compute with it, take it from `alone`."""
        self.sequence.state.use(min(len(opened.model.adapters.names), 1))
        self.meter = self.sequence.meter
        """The sequence's meter, which outlives it."""

    @property
    def model(self) -> Model:
        """The model: weights, expert store, scheduler.

        Raises:
            ValueError: the engine is closed.
        """
        if self._model is None:
            raise ValueError("the engine is closed")
        return self._model

    @contextlib.contextmanager
    def alone(self, call: int | None = None) -> Iterator[Sequence]:
        """Lends the sequence within a `with` block, while other threads are refused.

        Args:
            call: the number of the call that goes on, as a generator does; None for a new call.

        Raises:
            ValueError: the engine is closed.
            RuntimeError: another thread is computing, or another call has begun since `call`.
        """
        _ = self.model  # raises if the engine is closed
        with self._turn.hold():
            sequence = self.sequence
            if sequence is None:
                raise ValueError("the engine is closed")
            if call not in (None, sequence.call):
                raise RuntimeError("generate: the engine was used for something else meanwhile")
            yield sequence

    def warm(self) -> int:
        """See `Engine.warm`."""
        if self._profile is None:
            raise ValueError("warm: expected an engine with a profile")
        with self.alone():
            return self.model.warm()

    def close(self) -> None:
        """See `Engine.close`."""
        if self._turn.is_foreign:  # a forked child drops what it cannot use
            self._model = self.sequence = None
            return
        with self._turn.last():
            model, profile, self.sequence = self._model, self._profile, None
            if model is None:
                return
            learned = None if profile is None else profile.learned(model.store, model.scheduler)
            self.meter.freeze()
            self._model = None
        try:
            if model.experts.observer is not None:
                model.experts.observer.close()
        finally:
            if profile is not None and learned is not None:
                profile.write(learned)
