"""Mixers that the host runs because the device lacks kernels for them. Input and output are copied for each call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

from edgemoe.model.batch import Batch
from edgemoe.model.kv import KvTypes
from edgemoe.model.mixer import Mixer, MixerLayer, mixer_class
from edgemoe.model.rope import Rope
from edgemoe.model.scratch import Scratch
from edgemoe.model.setup import Setup
from edgemoe.model.state import State
from edgemoe.ops import Array, Ops
from edgemoe.specs import MixerSpec
from edgemoe.store import Weight

__all__ = ["make_mixers"]


class _Hosted:
    """A mixer that runs on the host. Implements `Mixer`."""

    def __init__(
        self, inner: Mixer, ropes: list[Rope], ops: Ops, host: Ops, rows: tuple[Array, Array]
    ) -> None:
        """Args:
        inner: the mixer, made for the host's operations.
        ropes: the rotations that its layers use, in the host's memory.
        ops: the device's operations.
        host: the host's operations.
        rows: two arrays [max tokens, D] in the host's memory, for the mixer's input and output.
        """
        self._inner, self._ropes, self._host = inner, ropes, host
        self.ops, self.rows = ops, rows

    def make_state(self) -> State:
        """See `Mixer.make_state`."""
        return self._inner.make_state()

    def start(self, batch: Batch) -> None:
        """See `Mixer.start`. Returns None, as a device cannot repeat work of the host."""
        for rope in self._ropes:
            rope.start(batch)
        self._inner.start(batch)

    def layer(self, index: int, weights: Mapping[str, Weight]) -> _HostedLayer:
        """See `Mixer.layer`. Copies the layer's norm to the host, where the mixer may need it."""
        norm: Any = weights["attn_norm"]
        here = self._host.empty(*norm.shape)
        self.ops.download(norm, here)
        return _HostedLayer(self, self._inner.layer(index, {**weights, "attn_norm": here}))


class _HostedLayer:
    """The mixer of one layer, run on the host. Implements `MixerLayer`."""

    def __init__(self, shared: _Hosted, inner: MixerLayer) -> None:
        self._shared, self._inner = shared, inner

    def forward(self, normed: Array, batch: Batch, out: Array) -> None:
        """See `MixerLayer.forward`."""
        ops, (before, after) = self._shared.ops, self._shared.rows
        before, after = before[: len(normed)], after[: len(normed)]
        ops.download(normed, before)
        self._inner.forward(before, batch, after)
        ops.upload(after, out)


def make_mixers(
    setup: Setup, weights: Mapping[str, Weight], kinds: Iterable[tuple[MixerSpec, KvTypes]]
) -> dict[tuple[MixerSpec, KvTypes], Mixer]:
    """Returns a mixer of each kind. It runs by the operations of the setup, or on the host where these cannot run it.

    Args:
        setup: shared by all mixers; the types of each kind replace those of the setup.
        weights: all tensors of the model, for the frequencies of RoPE.
        kinds: each mixer's spec, and the types of its keys and values.
    """
    out: dict[tuple[MixerSpec, KvTypes], Mixer] = {}
    beside: Setup | None = None
    rows = None
    for spec, types in kinds:
        if (host := setup.ops.beside(spec, types.keys, types.values)) is None:
            out[spec, types] = mixer_class(spec)(spec, replace(setup, types=types))
            continue
        if beside is None:
            d, n = setup.config.hidden_size, setup.chunk
            rows = host.empty(n, d), host.empty(n, d)
            beside = replace(setup, ops=host, ropes={}, scratch=Scratch(host, n))
        ropes = {rope: Rope(rope, host, weights, setup.chunk) for rope in spec.ropes}
        inner = mixer_class(spec)(spec, replace(beside, types=types, ropes=ropes))
        turned = list(ropes.values())
        hosted = _Hosted(inner, turned, setup.ops, host, cast("tuple[Array, Array]", rows))
        out[spec, types] = cast(Mixer, hosted)
    return out
