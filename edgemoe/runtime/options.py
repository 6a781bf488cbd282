"""The options of opening and running a model: one value that `load`, the command line, the lab and the server share."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from edgemoe.arguments import kind, path_of, switch, whole
from edgemoe.devices import DeviceName
from edgemoe.errors import quoted
from edgemoe.experts import Observer
from edgemoe.model import KvTable, KvTypes
from edgemoe.runtime.adapters import named_adapters
from edgemoe.runtime.budget import parse_size
from edgemoe.scheduler import SCHEDULERS

__all__ = ["EngineOptions"]

_MOST_THREADS = 1024
_MOST_SEQUENCES = 16  # the smallest chunk: a pass must hold one token of each sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How a model is opened and run.

    Options are checked when the value is made, as far as that needs no model. numpy's numbers become Python's.

    Raises:
        ValueError: an option is of the wrong type or out of range; says which.
    """

    ram: int | str | None = None
    """How much memory the engine may add to this process, in bytes or as "4GiB"; None for what is free, less a
    margin."""
    whole_process: bool = False
    """Whether `ram` bounds the whole process, and not only what the engine adds to it."""
    slots: int | None = None
    """Bytes for experts, whatever else takes memory, for measurements; None for what `ram` leaves."""
    steady: bool = False
    """Whether experts have the same room throughout, so that runs can be compared. Otherwise they also use what
    contexts and scratch do not use yet. Always True with `slots` and while a trace is recorded."""
    bits: int | Literal["auto"] | None = None
    """The most bits of routed experts, one of the file's levels; None for all that the file has of each expert, "auto"
    for the bits that an allocation gives each expert."""
    allocation: str | os.PathLike[str] | None = None
    """With `bits` or `dense_bits` "auto": a file that gives the bits of each expert or matrix, as `edgemoe allocate`
    writes it; None for the allocation in the model file."""
    adapters: (
        str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
        | Mapping[str, str | os.PathLike[str]] | None
    ) = None  # fmt: skip
    """Adapter files, as `edgemoe convert --base` writes them, or a mapping of names to such files. Without a mapping, a
    name is the file's, without `.moea`. An `Engine` begins with the first; see `Engine.adapter`."""
    dense_bits: int | Literal["auto"] | None = None
    """Bits of all other matrices, one of the file's levels; rows of the embedding are looked up at the highest. None
    for all that the file has, "auto" for the bits of each matrix that `edgemoe allocate --method search` chose."""
    experts: int | None = None
    """Routed experts per token; None for the model's own number. Another number is, in effect, another model."""
    context: int | None = None
    """The most tokens of a prompt and its reply together; None for as many as fit well."""
    cache_type_k: str = "f16"
    """The type of keys in the KV cache: "f16" or "f32", which are exact; "q8_0" in half the memory of "f16", "q4_0" in
    less than a third of it, "q3_0" or "q2_0", which are not; or "auto" for the type of each layer that `edgemoe
    allocate --kv` chose."""
    cache_type_v: str = "f16"
    """The type of values, likewise."""
    kv_table: str | os.PathLike[str] | KvTable | None = None
    """With a cache type "auto": the table of each layer's types, as `edgemoe allocate --kv` writes it; None for the one
    in the model file."""
    device: str = "cpu"
    """Where the model runs: "cpu", or "cuda" or "cuda:N" for an NVIDIA device. The answer is the same, bit for bit."""
    vram: int | str | None = None
    """How much of the device's memory the engine may take, in bytes or as "4GiB"; None for what is free, less a
    margin."""
    plug_in: str | os.PathLike[str] | None = None
    """The library that drives devices; None for the one of this installation."""
    sequences: int = 1
    """How many sequences, each with a context of its own, the budget is divided for. An `Engine` uses one; see
    `Model.make_state` for more."""
    threads: int | None = None
    """How many threads compute; None for the machine's cores."""
    scheduler: str = "on-demand"
    """One of `edgemoe.scheduler.SCHEDULERS`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The scheduler's own options."""
    verify: bool = True
    """Whether the checksum of everything that is read is checked."""
    trace: str | os.PathLike[str] | None = None
    """A file in which the routing is recorded; see `edgemoe.runtime.trace`."""
    profile: str | os.PathLike[str] | None = None
    """A file of what was learned about this model's use: loaded if it exists, and saved at `close`; see
    `edgemoe.runtime.profile` and `Engine.warm`."""
    observer: Observer | None = None
    """Is called in every layer; not together with `trace`."""

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        if self.ram is not None:
            put("ram", parse_size(self.ram))
        if self.vram is not None:
            put("vram", parse_size(self.vram))
        put("device", str(DeviceName.parse(self.device)))
        if self.device == "cpu" and self.vram is not None:
            raise ValueError("vram: expected a device, as the processor has none of its own")
        for name in ("bits", "dense_bits"):
            if getattr(self, name) not in (None, "auto"):
                put(name, whole(name, getattr(self, name)))
        for name in ("experts", "context"):  # their ranges depend on the model
            if getattr(self, name) is not None:
                put(name, whole(name, getattr(self, name)))
        if self.threads is not None:
            put("threads", whole("threads", self.threads, 1, _MOST_THREADS))
        put("sequences", whole("sequences", self.sequences, 1, _MOST_SEQUENCES))
        if self.slots is not None:
            put("slots", whole("slots", self.slots, 1))
        for name in ("whole_process", "steady", "verify"):
            put(name, switch(name, getattr(self, name)))
        if self.options is not None and not isinstance(self.options, Mapping):
            raise ValueError(f"options: expected names and values, got {quoted(self.options)}")
        put("options", dict(self.options or {}))
        put("adapters", named_adapters(self.adapters))
        for name in ("allocation", "kv_table", "plug_in", "trace", "profile"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, KvTable):
                put(name, path_of(name, value))
        kinds = (self.cache_type_k, self.cache_type_v)
        keys, values = ("f16" if of == "auto" else of for of in kinds)
        KvTypes(keys, values)
        if self.kv_table is not None and "auto" not in kinds:
            raise ValueError("kv_table: expected a cache type to be auto")
        put("scheduler", kind("scheduler", self.scheduler, str))
        if self.scheduler not in SCHEDULERS:
            known = ", ".join(SCHEDULERS)
            raise ValueError(f"scheduler: expected one of {known}, got {self.scheduler}")
        if self.bits == "auto" and self.scheduler != "on-demand":
            raise ValueError(f"bits: auto is for the scheduler on-demand, not {self.scheduler}")
        if self.allocation is not None and "auto" not in (self.bits, self.dense_bits):
            raise ValueError("allocation: expected bits or dense bits to be auto")
        self._check_adapters()
        if self.trace is not None and self.observer is not None:
            raise ValueError("trace and observer: expected one of them")

    def _check_adapters(self) -> None:
        if not self.adapters:
            return
        if self.device != "cpu":
            raise ValueError(
                f"adapters: run on the processor alone; expected device cpu, got {self.device}"
            )
        if self.scheduler != "on-demand" or self.options:
            what = ", ".join([self.scheduler, *self.options])
            raise ValueError(
                f"adapters: expected the scheduler on-demand without options, got {what}"
            )
        if self.dense_bits == "auto":
            raise ValueError("dense_bits: auto is of a model alone; expected no adapters beside it")
        for name in ("trace", "profile"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: is of a model alone; expected no adapters beside it")

    @property
    def kv_types(self) -> KvTypes:
        """The types of keys and values in the KV cache."""
        layers = self.kv_table.layers if isinstance(self.kv_table, KvTable) else ()
        return KvTypes(self.cache_type_k, self.cache_type_v, layers)
