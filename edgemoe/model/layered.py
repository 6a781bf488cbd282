"""The forward pass one layer at a time, for comparing versions of a model that differ in the bits of some parts."""

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
    """One layer with particular tensors and particular types of keys and values."""

    number: int
    """The layer's number in the model."""
    mixer: Mixer
    layer: Layer


class Layered(Decoder):
    """A decoder whose caller keeps the activations between layers.

    So versions of a model that agree up to some layer can share the work up to there. A version of a layer has its own
    tensors, and its own types of keys and values; all versions use the decoder's scratch. A layer always runs on whole
    sequences from their start. Its state is therefore not needed afterwards, and all layers of one kind use the same.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        """Takes the arguments of `Decoder`."""
        super().__init__(*args, **options)
        self._states: dict[Mixer, list[SequenceState]] = {}

    def version(self, i: int, tensors: Mapping[str, Weight], types: KvTypes) -> Version:
        """Returns a version of layer `i`.

        Args:
            tensors: all tensors of the layer, by their names within the layer.
            types: of its keys and values.
        """
        spec = self.config.mixer(i)
        kind = spec, types if spec.cached_heads[0] else KvTypes()
        if kind not in self._mixers:
            self._mixers |= make_mixers(self._setup, {}, [kind])
        # `next_norm` is this layer's own norm here, and `_run_version` applies it to the layer's input. A layer also
        # applies it at its end: that result is not used, as the next version begins with its own norm.
        norm = cast(Array, tensors["attn_norm"])
        return Version(i, self._mixers[kind], self._layer(i, kind, tensors, norm))

    def run(self, version: Version, windows: Sequence[Ids], xs: Sequence[Array]) -> None:
        """Runs a layer on whole sequences of T tokens each.

        Args:
            windows: the tokens of each sequence, all of the same length; at most `max_tokens` sequences.
            xs: [T, D] for each sequence, the layer's input; becomes the input of the next layer.
        """
        if version.mixer not in self._states:  # keeps the states of one kind only, to bound memory
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
        """Runs a layer on a batch; xs [n, D] are the rows of each of its sequences, replaced by the layer's output."""
        index, mixer, layer = version
        x, *_ = self._rows.first(len(batch))
        for part, own in zip(batch.slices, xs, strict=True):
            self._ops.upload(own, x[part.start : part.stop])
        self._run_alone(index, mixer, layer, layer.next_norm, batch, x)
        for part, own in zip(batch.slices, xs, strict=True):
            self._ops.download(x[part.start : part.stop], own)

    def head(self, x: Array, head: Weight, out: Array) -> None:
        """out [T, V] = the logits of x [T, D], the output of the last layer, with the matrix `head`."""
        norm, bias = self._stacks[0].layers[-1].next_norm, self._stacks[0].head_bias
        for first in range(0, len(x), self.max_tokens):
            some = slice(first, min(first + self.max_tokens, len(x)))
            _, normed, _ = self._rows.first(some.stop - first)
            self._ops.norm(x[some], norm, self.config.norm_eps, normed)
            self._logits(normed, cast(Matrix, head), bias, out[some])
