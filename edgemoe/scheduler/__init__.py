"""Schedulers: which experts run, at how many bits, and which are read. Each paper is one file next to `base`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np

from edgemoe.plan import Priorities
from edgemoe.quant import StandIns
from edgemoe.scheduler.auto import Auto
from edgemoe.scheduler.base import SECTIONS, Scheduler, Setting
from edgemoe.scheduler.combined import Combined, Dropping
from edgemoe.scheduler.d2moe import D2moe
from edgemoe.scheduler.evict import CACHE_OWN
from edgemoe.scheduler.expertflow import ExpertFlow
from edgemoe.scheduler.expertwise import Expertwise
from edgemoe.scheduler.hobbit import Hobbit
from edgemoe.scheduler.levers import Levers
from edgemoe.scheduler.mc import Mc
from edgemoe.scheduler.on_demand import OnDemand
from edgemoe.scheduler.options import read_options
from edgemoe.scheduler.spared import spared_experts

__all__ = [
    "KINDS", "SCHEDULERS", "SECTIONS", "SHARED", "OnDemand", "Scheduler", "Setting", "check_options",
]  # fmt: skip

KINDS: Mapping[str, type[Scheduler]] = {
    "on-demand": OnDemand,
    "hobbit": Hobbit,
    "d2moe": D2moe,
    "expertwise": Expertwise,
    "expertflow": ExpertFlow,
    "mc": Mc,
    "auto": Auto,
}
"""The scheduler classes, by the name that `--scheduler` takes."""

SHARED: tuple[type, ...] = (Dropping, Levers)
"""Options that every scheduler takes in addition to its own."""


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Checks the names and types of options for one of `KINDS`, which needs no model.

    Raises:
        ValueError: there is no such option, or a value is of the wrong kind.
    """
    kind = KINDS[name]
    own, shared = _names(kind, options)
    for group, among in [(kind.Options, own), *((c, shared) for c in SHARED)]:
        read_options(group, _of(group, {n: v for n, v in options.items() if n in among}))


def _names(kind: type[Scheduler], options: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """Returns the names of a scheduler's own options and of the shared ones.

    Raises:
        ValueError: an option in `options` is neither.
    """
    own = {f.name for f in fields(kind.Options)}
    shared = {
        f.name for c in SHARED for f in fields(c)
    } - own  # a scheduler's own option takes precedence
    if kind is OnDemand and isinstance(options.get("bits"), np.ndarray):
        own.add("bits")  # set by the engine, not an option for users
    for name in options:
        if name not in own | shared:
            listed = ", ".join([*(f.name for f in fields(kind.Options)), *sorted(shared)])
            raise ValueError(f"option {name}: there is no such; expected one of: {listed}")
    return own, shared


def _make(kind: type[Scheduler], setting: Setting, **options: Any) -> Scheduler:
    own, shared = _names(kind, options)
    made: Callable[..., Scheduler] = kind
    inner = made(setting, **{name: value for name, value in options.items() if name in own})
    given = {name: value for name, value in options.items() if name in shared}
    dropping = read_options(Dropping, _of(Dropping, given))
    levers = read_options(Levers, _of(Levers, given))
    if dropping.eviction == "default":
        dropping = replace(dropping, eviction=kind.drops)
    elif isinstance(inner.policy, Priorities):
        raise ValueError("eviction: this scheduler decides itself what is dropped")
    if dropping.eviction != "hobbit":
        for name in options:
            if name.startswith("w_"):
                raise ValueError(f"{name}: only the eviction hobbit has such weights")
    for name in ("protect", "admit"):
        if name in options and not levers.cache_prior:
            raise ValueError(f"{name}: only with cache_prior")
    if levers.renormalise and not (levers.top_p < 1 or levers.skip_below):
        raise ValueError("renormalise: only with top_p or skip_below")
    if dropping.eviction in CACHE_OWN:
        inner.policy = dropping.eviction
    # Bits that were fixed offline do not make a scheduler lossy here: such an allocation already gives protected
    # experts their bits.
    is_lossy = bool(levers.notes or (inner.notes and kind in (Hobbit, D2moe, Mc, Auto)))
    may_be = (
        isinstance(inner, Auto) and inner.options.lossy
    )  # though it is not where everything fits
    if "spare" in options and not (is_lossy or may_be):
        raise ValueError("spare: only with a lossy option or scheduler")
    named = spared_experts(setting, levers.spare) if is_lossy or may_be else None
    spared = named if is_lossy else None
    if dropping.eviction in ("own", *CACHE_OWN) and not levers.notes and spared is None:
        made_of: Scheduler = inner  # nothing to combine, so no overhead
    else:
        made_of = Combined(inner, setting, dropping=dropping, levers=levers, spared=spared)
    made_of.stand_ins = _stand_ins(setting, levers) if made_of.leaves_out else None
    if made_of.stand_ins is not None:
        rank = made_of.stand_ins.bias.shape[2]
        made_of.notes += (f"maps of rank {rank} stand in for experts that are left out",)
    elif levers.stand_in_below:
        raise ValueError("stand_in_below: the file has no stand-ins; edgemoe stand-ins makes them")
    made_of.keep_level = _level_below(setting, dropping.lower_to)
    return made_of


def _stand_ins(setting: Setting, levers: Levers) -> StandIns | None:
    """Returns the file's stand-ins; None if it has none or the options exclude them.

    Raises:
        FormatError: the section is damaged, or belongs to another model.
    """
    section = setting.sections.get("stand-ins")
    if section is None or levers.stand_ins == "none" or levers.cache_prior:
        return None
    where = "section stand-ins"
    found = StandIns.from_bytes(section, where)
    found.check(setting.num_layers, setting.num_experts, where)
    return found


def _level_below(setting: Setting, bits: int) -> int:
    """Returns the level that has `bits`; 0 for 0.

    Raises:
        ValueError: no level below the highest has `bits`.
    """
    below = setting.level_bits[:-1]
    if bits and bits not in below:
        listed = ", ".join(map(str, below)) or "none"
        raise ValueError(f"lower_to: expected one of {listed}, got {bits}")
    return below.index(bits) + 1 if bits else 0


def _of(kind: type, options: Mapping[str, Any]) -> dict[str, Any]:
    return {f.name: options[f.name] for f in fields(kind) if f.name in options}


SCHEDULERS: Mapping[str, Callable[..., Scheduler]] = {
    name: partial(_make, kind) for name, kind in KINDS.items()
}
"""Makers of schedulers with shared options applied, by the same names as `KINDS`.

Each is called as `make(setting, **options)`. Options may be strings, as they come from a command line.
"""
