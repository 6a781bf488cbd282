"""The forward pass layer by layer, for versions of one model that differ in the bits of some of its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from edgemoe.model.batch import Batch
from edgemoe.model.decoder import Decoder, Layer
from edgemoe.model.hosted import make_mixers
from edgemoe.model.kv import KvTypes
from edgemoe.model.mixer import Mixer
from edgemoe.model.state import SequenceState
from edgemoe.ops import Array, Ids, Matrix
from edgemoe.store import Weight

__all__ = ["Layered", "Version"]


class Version(NamedTuple):
    """Is a layer with tensors and types of its own."""

    number: int
    mixer: Mixer
    layer: Layer


class Layered(Decoder):
    """A decoder whose caller keeps what goes from one layer to the next, so that versions share what they have alike.

    A version of a layer has tensors, and types of keys and values, of its own; scratch is the decoder's. Layers run on
    whole sequences, so that all of one kind share a state for each sequence of a batch.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        """Args as those of `Decoder`."""
        super().__init__(*args, **options)
        self._states: dict[Mixer, list[SequenceState]] = {}

    def version(self, i: int, tensors: Mapping[str, Weight], types: KvTypes) -> Version:
        """Returns layer `i` with other tensors, by their names within the layer, and types of keys and values."""
        spec = self.config.mixer(i)
        kind = spec, types if spec.cached_heads[0] else KvTypes()
        if kind not in self._mixers:
            self._mixers |= make_mixers(self._setup, {}, [kind])
        # The norm after the layer is left to the next one, with which this one's own agrees in shape alone.
        norm = cast(Array, tensors["attn_norm"])
        return Version(i, self._mixers[kind], self._layer(i, kind, tensors, norm))

    def run(self, version: Version, windows: Sequence[Ids], xs: Sequence[Array]) -> None:
        """Runs a layer on whole sequences of T tokens; each x [T, D] becomes what enters the next layer.

        Args:
            windows: the sequences' tokens, at most `max_tokens` sequences.
        """
        if version.mixer not in self._states:  # of one kind at a time, not of all that ever ran
            self._states = {version.mixer: []}
        states = self._states[version.mixer]
        while len(states) < len(windows):
            one = version.mixer.make_state()
            states.append(SequenceState([one] * self.config.num_layers, self.context))
        length, step = len(windows[0]), self.max_tokens // len(windows)
        for state in states:
            state.rewind(0)
            state.turned = length
        for first in range(0, length, step):
            pieces = [window[first : first + step] for window in windows]
            batch = Batch.of(*zip(states, pieces, strict=False))
            self._run_version(version, batch, [x[first : first + step] for x in xs])
            for state, piece in zip(states, pieces, strict=False):
                state.commit(piece.tolist())

    def _run_version(self, version: Version, batch: Batch, xs: Sequence[Array]) -> None:
        """Runs a layer on a batch; xs are the rows of each of its sequences."""
        index, mixer, layer = version
        x, *_ = self._rows.first(len(batch))
        for part, own in zip(batch.slices, xs, strict=True):
            self._ops.upload(own, x[part.start : part.stop])
        self._run_alone(index, mixer, layer, layer.next_norm, batch, x)
        for part, own in zip(batch.slices, xs, strict=True):
            self._ops.download(x[part.start : part.stop], own)

    def head(self, x: Array, head: Weight, out: Array) -> None:
        """out [T, V] = the logits of x [T, D], what leaves the last layer."""
        norm, bias = self._stacks[0].layers[-1].next_norm, self._stacks[0].head_bias
        for first in range(0, len(x), self.max_tokens):
            some = slice(first, min(first + self.max_tokens, len(x)))
            _, normed, _ = self._rows.first(some.stop - first)
            self._ops.norm(x[some], norm, self.config.norm_eps, normed)
            self._logits(normed, cast(Matrix, head), bias, out[some])
