"""How a model is opened and run: one value, which `load`, the command line, the lab and a server fill alike."""

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
_MOST_SEQUENCES = 16  # as many tokens as the smallest batch holds


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Says how a model is opened and run.

    Checked when it is made, as far as that needs no model; numpy's numbers become Python's.

    Raises:
        ValueError: an option is of the wrong kind or out of range; says which.
    """

    ram: int | str | None = None
    """What the engine may add to this process's memory, as bytes or "4GiB"; None for what is free, less a margin."""
    whole_process: bool = False
    """`ram` bounds the whole process, not only what the engine adds."""
    slots: int | None = None
    """Bytes for experts, whatever else takes room, for measurements; None for what `ram` leaves."""
    steady: bool = False
    """Experts have the same room throughout, so that runs can be compared; else they have what nothing else uses yet.
    Always so with `slots` and while a trace is recorded."""
    bits: int | Literal["auto"] | None = None
    """Most precision of routed experts, one of the file's levels; None for all that the file has of each, "auto" for
    each expert's own."""
    allocation: str | os.PathLike[str] | None = None
    """With bits or dense bits "auto", a file that says each expert's, or each matrix's (`edgemoe allocate`); None for
    the model file's own."""
    adapters: (
        str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
        | Mapping[str, str | os.PathLike[str]] | None
    ) = None  # fmt: skip
    """Files of `edgemoe convert --base`, or such by the names that they shall have; without, a name is the file's. An
    `Engine` begins with the first, see `Engine.adapter`."""
    dense_bits: int | Literal["auto"] | None = None
    """Precision of all other matrices, one of the file's levels; the embedding's rows are looked up at the highest.
    None for all that the file has, "auto" for each matrix's own, which `edgemoe allocate --method search` chose."""
    experts: int | None = None
    """Routed experts per token; None for the model's own number. Another number is another model."""
    context: int | None = None
    """Tokens of prompt and reply together; None for what fits well."""
    cache_type_k: str = "f16"
    """How the KV cache holds keys: "f16" or "f32", or, not exact, "q8_0" in half the memory, "q4_0" in less than a
    third of it, "q3_0" or "q2_0"; "auto" for each layer's own, which `edgemoe allocate --kv` chose."""
    cache_type_v: str = "f16"
    """The same for values."""
    kv_table: str | os.PathLike[str] | KvTable | None = None
    """With a cache type "auto", what says each layer's (`edgemoe allocate --kv`); None for the model file's own."""
    device: str = "cpu"
    """Where the model runs: "cpu", or "cuda" or "cuda:N" for an NVIDIA device. The answer is the same, bit for bit."""
    vram: int | str | None = None
    """What the engine may take of the device's memory; None for what is free, less a margin."""
    plug_in: str | os.PathLike[str] | None = None
    """The library that knows devices; None for the one of this install."""
    sequences: int = 1
    """How many have a context each, inside the budget; an `Engine` needs one, see `Model.make_state` for others."""
    threads: int | None = None
    """None for the machine's cores."""
    scheduler: str = "on-demand"
    """A name of `edgemoe.scheduler.SCHEDULERS`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The scheduler's own."""
    verify: bool = True
    """Check the sum of everything that is read."""
    trace: str | os.PathLike[str] | None = None
    """A file that records the routing; see `edgemoe.runtime.trace`."""
    profile: str | os.PathLike[str] | None = None
    """A file of what was learned about this model's use: loaded if there is one, and saved at `close`; see
    `edgemoe.runtime.profile` and `Engine.warm`."""
    observer: Observer | None = None
    """Is told of every layer; not together with `trace`."""

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
        for name in ("experts", "context"):  # their ranges are the model's
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
        """How the KV cache holds keys and values."""
        layers = self.kv_table.layers if isinstance(self.kv_table, KvTable) else ()
        return KvTypes(self.cache_type_k, self.cache_type_v, layers)
