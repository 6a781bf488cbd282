"""Changes to an open model, between two passes: bits, experts per token, the scheduler and its options.

Fewer bits free memory at once. With more bits, only the missing part of an expert is read, when the expert is wanted.
Sequences keep their tokens. If the change affects answers, the layers' states are computed again, so that each further
token is the one that a model opened with the new options would give for the text before it.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from edgemoe.config import ModelConfig
from edgemoe.errors import FormatError
from edgemoe.file.reader import open_moe
from edgemoe.runtime.model import Model
from edgemoe.runtime.notes import notes_of
from edgemoe.runtime.opening import model_setting, with_experts
from edgemoe.runtime.options import EngineOptions
from edgemoe.runtime.precisions import bits_of
from edgemoe.scheduler import SCHEDULERS, SECTIONS, Scheduler

__all__ = ["CHANGEABLE", "change"]

CHANGEABLE = ("bits", "experts", "scheduler", "options")
"""The fields of `EngineOptions` that can be changed."""


def change(model: Model, **wanted: Any) -> bool:
    """Changes a model. To be called on the model's thread, and not during a pass.

    Args:
        wanted: new values of fields of `EngineOptions`, named in CHANGEABLE. The other options stay.

    Returns:
        Whether answers may differ from now on. If so, what sequences hold is computed again.

    Raises:
        ValueError: the option cannot be changed, or not to this value; the model is as it was.
        FormatError: a section of the file does not fit the scheduler, or the file was replaced; likewise.
        OutOfBudget: there is no room to read them; likewise.
    """
    for name in wanted:
        if name not in CHANGEABLE:
            raise ValueError(
                f"{name}: cannot be changed while the model runs; expected one of {', '.join(CHANGEABLE)}"
            )
    if model.experts.observer is not None:
        raise ValueError("change: a trace is recorded, or somebody else observes")
    if wanted.get("scheduler", model.options.scheduler) != model.options.scheduler:
        wanted.setdefault("options", {})  # the options of one scheduler mean nothing to another
    options: EngineOptions = replace(model.options, **wanted)
    sections = _sections(model)
    file = replace(model.moe, config=model.given, sections=sections)
    bits = bits_of(file, options)
    if bits.most > model.most_bits:
        raise _too_much("bits", bits.most, model.most_bits)
    moe = with_experts(replace(file, sections={}), options.experts)
    if moe.config.experts_per_token > model.most_experts:
        raise _too_much("experts", moe.config.experts_per_token, model.most_experts)
    told = model.adapters.told(sections)
    setting = model_setting(moe, bits.most, model.budget.slots, told)
    scheduler = SCHEDULERS[options.scheduler](setting, **bits.told(options))
    before = model.experts.scheduler
    scheduler.restore(before.state())
    _exchange(model, scheduler, moe.config)

    top_bits, notes = bits.each.reshape(-1), notes_of(moe, model.given, bits.noted, options)
    is_same = (
        moe.config.experts_per_token == model.config.experts_per_token
        and bool((top_bits == model.top_bits).all())
        and not before.notes
        and not scheduler.notes
    )
    model.moe, model.options, model.bits, model.top_bits = moe, options, bits.most, top_bits
    model.setting, model.notes = replace(setting, sections={}), notes + scheduler.notes
    model.store.lower(top_bits)
    if not is_same:
        for state in model.room.states:
            state.rewind(0)
    model.count()
    return not is_same


def _sections(model: Model) -> dict[str, bytes]:
    """Returns the sections of the file that schedulers use. Experts make room while it is read.

    Raises:
        FormatError: another file has its name now.
        OutOfBudget: there is no room for them.
    """
    if not model.sections_bytes:
        return {}
    model.room.lend(2 * model.sections_bytes)
    found = open_moe(model.moe.path)
    if not os.path.sameopenfile(found.file.fileno(), model.moe.file.fileno()):
        raise FormatError(
            f"{found.path}: was replaced by another file; expected the one that is open"
        )
    return {name: found.sections[name] for name in SECTIONS if name in found.sections}


def _too_much(name: str, got: int, most: int) -> ValueError:
    return ValueError(f"{name}: the model was opened for at most {most}, got {got}")


def _exchange(model: Model, scheduler: Scheduler, config: ModelConfig) -> None:
    """Replaces the scheduler, and the config with its experts per token; an error changes nothing."""
    before, cache = model.experts.scheduler, model.store.cache
    model.experts.scheduler = scheduler
    try:
        model.decoder.change(config)
    except FormatError:
        model.experts.scheduler = before
        model.decoder.change(model.config)
        raise
    cache.close()  # a request that Ctrl-C may have left open
    if not (isinstance(scheduler.policy, str) and scheduler.policy == before.policy):
        cache.set_policy(scheduler.policy)
    cache.keep(scheduler.keep_level)
