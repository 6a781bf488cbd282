"""A mixer that the host runs beside a device: what goes in and what comes out are copied."""

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
    """Is the mixer of one spec. See `Mixer`."""

    def __init__(
        self, inner: Mixer, ropes: list[Rope], ops: Ops, host: Ops, rows: tuple[Array, Array]
    ) -> None:
        """Args:
        ropes: the host's, which its layers use.
        ops: the device's.
        rows: [max tokens, D], the host's: what goes in, what comes out.
        """
        self._inner, self._ropes, self._host = inner, ropes, host
        self.ops, self.rows = ops, rows

    def make_state(self) -> State:
        """See `Mixer.make_state`."""
        return self._inner.make_state()

    def start(self, batch: Batch) -> None:
        """See `Mixer.start`: the host's work is never repeated by a device."""
        for rope in self._ropes:
            rope.start(batch)
        self._inner.start(batch)

    def layer(self, index: int, weights: Mapping[str, Weight]) -> _HostedLayer:
        """See `Mixer.layer`; its norm, which is the device's, may be wanted too."""
        norm: Any = weights["attn_norm"]
        here = self._host.empty(*norm.shape)
        self.ops.download(norm, here)
        return _HostedLayer(self, self._inner.layer(index, {**weights, "attn_norm": here}))


class _HostedLayer:
    """Is the mixer of one layer. See `MixerLayer`."""

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
    """Returns a mixer of each kind, run by the operations of the setup or beside them.

    Args:
        setup: for all; the types are those of a kind.
        weights: all of the model's, for the frequencies of RoPE.
        kinds: what layers mix with, and how they store it.
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
