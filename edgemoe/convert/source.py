"""A checkpoint mapped by its family: a `ModelConfig` and canonical tensors, one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import MATRICES, ModelConfig, dense_tensors
from edgemoe.convert.checkpoint import HEAD, Checkpoint, listed, refuse_unused
from edgemoe.convert.families import FAMILIES
from edgemoe.convert.families.family import Family, Source
from edgemoe.convert.missing import missing
from edgemoe.convert.rope import Rope, rope
from edgemoe.convert.settings import eos_ids, text_settings
from edgemoe.errors import FormatError, quoted
from edgemoe.specs import MixerSpec, RopeSpec

__all__ = ["SourceModel"]

Array = NDArray[np.float32]


class SourceModel:
    """A checkpoint's tensors under the names of `edgemoe.config.dense_tensors`.

    Opening checks that every tensor exists with its shape and that none is left over, so that a long conversion does
    not fail near its end. Holds no tensors in memory except the RoPE frequencies. Immutable.
    """

    config: ModelConfig
    notes: tuple[str, ...]
    """Lines for the user about parts of the checkpoint that are not used."""

    def __init__(self, checkpoint: Checkpoint, *, are_there: bool = True) -> None:
        """Maps a checkpoint.

        Args:
            are_there: whether the weights can be read now; if not, the caller must check `tied` once they can.

        Raises:
            FormatError: the family is unsupported, config.json asks for something that the runtime cannot do, or a
                tensor is missing, unknown or of another shape.
        """
        self._checkpoint = checkpoint
        self._are_there = are_there
        try:
            family = _family(checkpoint)
            settings = text_settings(checkpoint.config)
            config = family.config(settings)
            turns = {
                spec: rope(
                    family.rope(settings, spec), dim=spec.dim, default_theta=family.default_theta
                )
                for spec in config.ropes
            }
            self._frequencies = {
                name: frequencies
                for spec, angles in turns.items()
                for name, frequencies in angles.tensors(spec.name).items()
            }
            self.config = dataclasses.replace(
                config,
                mixers=tuple(_with_turns(m, turns) for m in config.mixers),
                context_length=min(
                    (t.context_length for t in turns.values()), default=config.context_length
                ),
                eos_ids=eos_ids(checkpoint, config.vocab_size),
            )
            self._checkpoint = family.view(checkpoint, config)
            self._sources, left_out = self._checked_sources(family)
            notes = dict.fromkeys(t.note for t in turns.values())
            self.notes = tuple(note for note in (*notes, *left_out) if note)
        except FormatError as error:
            raise FormatError(f"{checkpoint.name}: {error}") from error

    def tensor(self, name: str) -> Array:
        """Reads one tensor of `dense_tensors(config)` as float32, in the shape given there.

        Raises:
            FormatError: the tensor is broken or not finite.
        """
        if name in self._frequencies:
            return self._frequencies[name]
        return self._read(name).reshape(dense_tensors(self.config)[name].shape)

    def expert(self, layer: int, index: int) -> tuple[Array, Array, Array]:
        """Reads one expert as float32: gate [H, D], up [H, D] and down [D, H]; gate [0, D] if experts have no gate.

        Raises:
            FormatError: a tensor is broken or not finite.
        """
        gate, up, down = (
            self._read(f"experts.{layer}.{index}.{name}") if shape[0] else np.empty(shape, np.float32)
            for name, shape in zip(MATRICES, self.config.expert_shapes, strict=True)
        )  # fmt: skip
        return gate, up, down

    def needs(self, name: str) -> Iterator[str]:
        """Yields the names of the checkpoint's tensors that a record is made from; `Writer.is_done` names records."""
        if name in self._frequencies:
            return
        names = [name]
        if name.startswith("experts."):
            shapes = zip(MATRICES, self.config.expert_shapes, strict=True)
            names = [f"{name}.{matrix}" for matrix, shape in shapes if shape[0]]
        for source in map(self._sources.__getitem__, names):
            yield source.name
            if source.times:
                yield source.times

    @property
    def tied(self) -> tuple[str, str] | None:
        """The names of the stored head and of the embedding, if the head must be a copy of it; None otherwise."""
        embed = self._sources["embed"].name
        has_copy = self.config.tied and HEAD in self._checkpoint.shapes
        return (HEAD, embed) if has_copy and embed != HEAD else None

    def _read(self, name: str) -> Array:
        source = self._sources[name]
        values, *more = [self._finite(part) for part in (source.name, *source.more)]
        if source.half is not None:
            rows = len(values) // 2
            values = values[source.half * rows : (source.half + 1) * rows]
        if source.interleaved:
            values = _in_halves(values, self.config.mixer(int(name.split(".")[1])))
        if source.fold is not None:
            values = source.fold([values, *more] if more else values, _mixer_of(name, self.config))
        if source.times:
            factors = self._checkpoint.tensor(source.times)
            values = values * factors[int(name.split(".")[2]) if name.startswith("experts.") else 0]
        return np.ascontiguousarray(values, np.float32)

    def _finite(self, name: str) -> Array:
        values = self._checkpoint.tensor(name)
        if not np.isfinite(values).all():
            raise FormatError(f"{self._checkpoint.name}: {name}: holds NaN or infinity")
        return values

    def _checked_sources(self, family: Family) -> tuple[dict[str, Source], list[str]]:
        config, stored = self.config, self._checkpoint.shapes
        if config.num_layers + len(config.moe_layers) * config.num_experts > len(stored):
            raise FormatError(
                f"config.json describes {config.num_layers} layers with {config.num_experts} "
                f"experts, but there are only {len(stored)} tensors"
            )
        shapes = {name: spec.shape for name, spec in dense_tensors(config).items()}
        expert = dict(zip(MATRICES, config.expert_shapes, strict=True))
        sources = dict(family.sources(config, stored))
        missing = []
        for name, source in sources.items():
            shape = shapes.get(name) or expert[name.rsplit(".", 1)[1]]
            if source.half is not None:
                shape = (2 * shape[0], *shape[1:])
            gone = [part for part in (source.name, *source.more) if part not in stored]
            if gone:
                missing += gone
            elif source.fold is not None:
                _check_fold(name, source, stored, shape, config)
            elif stored[source.name] != shape and stored[source.name] != (
                1,
                *shape,
            ):  # a vector may be stored as a matrix of one row
                raise FormatError(
                    f"{source.name}: expected shape {list(shape)}, got {list(stored[source.name])}"
                )
        if missing:
            # Each name once: several canonical tensors may be made from one stored tensor.
            raise FormatError(f"missing {listed(dict.fromkeys(missing))}")
        for name, source in sources.items():
            count = config.num_experts if name.startswith("experts.") else 1
            if source.times and stored.get(source.times) != (count,):
                raise FormatError(f"{source.times}: expected a tensor of shape [{count}]")
        used = {n for s in sources.values() for n in (s.name, *s.more, s.times)}
        embed = sources["embed"].name
        without = {name: what for name in stored if (what := family.left_out(config, name))}
        refuse_unused(
            self._checkpoint, used | without.keys(), family=config.family, tied=config.tied,
            embed=embed, are_there=self._are_there,
        )  # fmt: skip
        notes = [
            f"left out: {what} ({list(without.values()).count(what)} tensors)"
            for what in dict.fromkeys(without.values())
        ]
        return sources, notes


def _mixer_of(name: str, config: ModelConfig) -> MixerSpec | None:
    """Returns the mixer of the layer that a tensor belongs to; None for tensors outside layers."""
    kind, _, rest = name.partition(".")
    return config.mixer(int(rest.split(".")[0])) if kind in ("layers", "experts") else None


def _check_fold(
    name: str,
    source: Source,
    stored: Mapping[str, tuple[int, ...]],
    shape: tuple[int, ...],
    config: ModelConfig,
) -> None:
    """Checks that a fold of the stored tensors yields `shape`, by folding placeholders of their shapes."""
    assert source.fold is not None
    first, *more = [np.broadcast_to(np.False_, stored[n]) for n in (source.name, *source.more)]
    try:
        got = source.fold([first, *more] if more else first, _mixer_of(name, config)).shape
    except (ValueError, IndexError):
        got = ()
    if got != shape:
        raise FormatError(
            f"{source.name}: a tensor of shape {list(stored[source.name])} does not make the {list(shape)} "
            "that config.json asks for"
        )


def _with_turns(mixer: MixerSpec, turns: Mapping[RopeSpec, Rope]) -> MixerSpec:
    """Returns a mixer whose RoPE spec has the scale and the short length of its frequencies."""
    if not mixer.ropes:
        return mixer
    (spec,) = mixer.ropes
    angles = turns[spec]
    known = dataclasses.replace(spec, scale=angles.scale, short_length=angles.short_length)
    return dataclasses.replace(mixer, rope=known)  # type: ignore[type-var]


def _in_halves(values: Array, mixer: MixerSpec) -> Array:
    """Reorders the rows of q or k [heads * head_dim, D] from interleaved pairs to halves; scores stay the same."""
    if not mixer.ropes:
        return values
    _, width = mixer.heads
    n = mixer.ropes[0].dim
    heads = values.reshape(-1, width, *values.shape[1:])
    out = np.concatenate([heads[:, 0:n:2], heads[:, 1:n:2], heads[:, n:]], axis=1)
    return np.asarray(out.reshape(values.shape))


def _family(checkpoint: Checkpoint) -> Family:
    name = checkpoint.config.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        what = missing(checkpoint.config)
        needs = f" (missing: {what})" if what else ""
        raise FormatError(
            f"model_type {quoted(name)} is not supported{needs}; supported: {', '.join(FAMILIES)}"
        )
    return family
