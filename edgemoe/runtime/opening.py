"""The opening of a model from a file and options: checks both, divides the memory, and assembles the parts."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgemoe import _core, hardware
from edgemoe.config import ModelConfig
from edgemoe.experts import Experts
from edgemoe.file.format import MoeFile
from edgemoe.file.reader import open_moe
from edgemoe.model import Decoder
from edgemoe.ops import Ops, OpsShape
from edgemoe.ops.cpu import CpuOps
from edgemoe.ops.cuda.placement import Both
from edgemoe.runtime.adapters import Adapters, named_adapters
from edgemoe.runtime.budget import Budget, default_ram, parse_size
from edgemoe.runtime.model import Model
from edgemoe.runtime.notes import notes_of
from edgemoe.runtime.on_device import OnDevice
from edgemoe.runtime.options import EngineOptions
from edgemoe.runtime.precisions import Bits, bits_of, dense_level, with_dense_bits, with_kv_table
from edgemoe.runtime.profile import ProfileFile
from edgemoe.runtime.room import Room
from edgemoe.runtime.vram import Vram
from edgemoe.scheduler import SCHEDULERS, SECTIONS, Setting
from edgemoe.store import ExpertStore, Told, level_bytes, load_dense, nobody, num_there
from edgemoe.text.sampler import SamplingParams
from edgemoe.text.settings import FILE, model_sampling
from edgemoe.text.tokenizer import Tokenizer

__all__ = [
    "Opened", "Text", "model_setting", "open_model", "room_for_experts", "with_experts",
]  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Text:
    """What a file has for text: the tokenizer, how replies are sampled, and which tokens end them."""

    tokenizer: Tokenizer | None
    sampling: SamplingParams
    eos_ids: frozenset[int]
    notes: tuple[str, ...]
    """The file's sampling settings that are not honoured, one line each."""

    @classmethod
    def of(cls, moe: MoeFile) -> Text:
        """Reads it from a file's sections, and keeps no reference to them."""
        files = moe.sections
        tokenizer = Tokenizer.from_files(files) if "tokenizer.json" in files else None
        eos = frozenset(moe.config.eos_ids)
        if tokenizer is not None:  # a file may name only the base model's end token
            eos |= frozenset(tokenizer.eos_ids)
        c = moe.config
        sampling, notes = model_sampling(
            files.get(FILE), vocab_size=c.vocab_size, context=c.context_length
        )
        return cls(tokenizer, sampling, eos, notes)


@dataclass(frozen=True, slots=True)
class Opened:
    """A model that is ready to run, what it needs for text, and its profile if it has one."""

    model: Model
    text: Text
    profile: ProfileFile | None


def open_model(
    path: str | os.PathLike[str], options: EngineOptions, *, told: Told = nobody
) -> Opened:
    """Opens a `.moe` file. Errors in the file's index or the options are found before anything large is read.

    Args:
        path: the file.
        options: how it is run.
        told: is called with the share of the weights that has been read, 0 to 1.

    Raises:
        ValueError: an option does not fit the file.
        FormatError: the file is not a sound `.moe` file.
        OutOfBudget: the model does not fit; says the smallest budget that works.
        ReadError: the disk failed.
    """
    hardware.trim()  # memory that is already freed must not count as the process's
    before, peak_before = hardware.process_bytes(), hardware.peak_bytes()
    moe = open_moe(path)
    given = moe.config
    # Adapters are matched with the file itself, before options change its config.
    moe, adapters = Adapters.open(moe, named_adapters(options.adapters))
    moe = with_experts(moe, options.experts)
    options = with_kv_table(moe, options)
    moe = with_dense_bits(moe, options)
    bits = bits_of(moe, options)
    profile = None if options.profile is None else ProfileFile.open(Path(options.profile), moe)
    rungs = dense_level(moe, options)
    if options.context is not None and not 1 <= options.context <= moe.config.context_length:
        raise ValueError(
            f"context: expected 1 to {moe.config.context_length} (the model's), got {options.context}"
        )
    text = Text.of(moe)
    # Each part keeps what it needs of the sections; their full text must not count against the experts.
    sections = {name: moe.sections[name] for name in SECTIONS if name in moe.sections}
    sections_bytes = sum(map(len, moe.sections.values())) if sections else 0
    sections = adapters.told(sections)
    moe = replace(moe, sections={})
    hardware.trim()
    peak = hardware.peak_bytes()
    opening = peak if peak > peak_before and options.whole_process else 0
    model = _assembled(moe, given, options, bits, rungs, sections, before, opening, told, adapters)
    model.sections_bytes = sections_bytes
    model.notes = notes_of(moe, given, bits.noted, options) + model.scheduler.notes
    if profile is not None:
        profile.restore(model.store, model.scheduler)
    if options.trace is not None:
        model.record(options.trace)
    logger.info(
        "%s: %s, %d tokens of context, chunks of %d, %.0f of %.0f MiB of experts, %s, %d threads",
        moe.path, moe.config.family, model.budget.context, model.budget.chunk, model.budget.slots / 2**20,
        model.budget.experts / 2**20, _core.isa(), model.threads,
    )  # fmt: skip
    budget = model.budget
    logger.info(
        "%.0f MiB of memory: %s; %.0f MiB for experts for certain, %.0f MiB as long as nothing else takes it",
        budget.ram / 2**20, budget.parts(), budget.slots / 2**20, budget.most_slots / 2**20,
    )  # fmt: skip
    return Opened(model, text, profile)


def _assembled(
    moe: MoeFile,
    given: ModelConfig,
    options: EngineOptions,
    bits: Bits,
    dense_level: int,
    sections: dict[str, bytes],
    before: int,
    opening: int,
    told: Told,
    adapters: Adapters,
) -> Model:
    """Returns a model that fits its budget, and that of a device if it has one.

    Args:
        moe: the file, as the options change it.
        given: the file's own config.
        options: how it is run.
        bits: the bits of its experts.
        dense_level: how many rungs of matrices outside the experts are used.
        sections: those that schedulers use; what this scheduler does not need is removed.
        before: bytes that the process took before the file was opened.
        opening: its peak since then, in bytes; 0 where that does not count.
        told: is called with the share of the weights that has been read.
        adapters: the open adapters.
    """
    config, level = moe.config, moe.level(bits.most)
    threads = hardware.num_threads() if options.threads is None else options.threads
    shape = OpsShape.of(config, threads)
    divide = _divider(moe, options, level, dense_level, shape, before, opening, adapters)

    def spare(least: Vram) -> int:
        budget = divide(hardware.process_bytes(), least)
        return budget.room - budget.expert

    # All of these raise their errors before anything large is read.
    there = OnDevice.open(moe, options, dense_level, shape, spare)
    vram = None if there is None else there.vram
    estimate = divide(hardware.process_bytes(), vram)
    make = partial(SCHEDULERS[options.scheduler], **bits.told(options))
    first = make(model_setting(moe, bits.most, estimate.slots, sections))
    if first.stand_ins is None:  # not needed: these megabytes are for the slots
        sections.pop("stand-ins", None)
    del first
    weights, others = _loaded(moe, options, dense_level, there, adapters, told)
    hardware.trim()
    # The slots are sized last, from what the process really takes by now.
    budget = divide(max(hardware.process_bytes() - _dense_bytes(weights, *others), 0), vram)
    setting = model_setting(moe, bits.most, budget.slots, sections)
    scheduler = make(setting)
    shape = replace(shape, max_tokens=budget.chunk, max_context=budget.context)
    ops: Ops = CpuOps(shape) if there is None else there.ops(shape)
    store = ExpertStore.open(
        moe, bits=bits.most, budget_bytes=budget.slots, most_bytes=budget.most_slots,
        verify=options.verify, policy=scheduler.policy, device=None if there is None else there.lender,
    )  # fmt: skip
    store.cache.keep(scheduler.keep_level)
    slots = store.cache
    if there is not None:
        store = there.over(store, bits.each)
    parts = ops.empty(budget.chunk * config.experts_per_token, config.hidden_size)
    experts = Experts(scheduler, store, ops, parts=parts, observer=options.observer)
    return Model(
        moe=moe, options=options, bits=bits.most, top_bits=bits.each.reshape(-1), threads=threads,
        budget=budget, room=Room(
            budget, slots, is_measured=options.whole_process,
            is_steady=options.steady or budget.fixed_slots is not None or budget.is_shared,
        ), setting=replace(setting, sections={}), store=store, experts=experts,
        ops=ops, device=None if there is None else there.device, decoder=Decoder(
            config, weights, ops, experts, max_tokens=budget.chunk, context=budget.context,
            types=options.kv_types, others=others, places=adapters.places,
        ),
        weights=weights, adapters=adapters, given=given, most_bits=bits.most, most_experts=config.experts_per_token,
        sections_bytes=0,
    )  # fmt: skip


def _divider(
    moe: MoeFile,
    options: EngineOptions,
    level: int,
    dense_level: int,
    shape: OpsShape,
    before: int,
    opening: int,
    adapters: Adapters,
) -> Callable[[int, Vram | None], Budget]:
    """Returns a function that divides the memory, given the bytes of the process and the division of a device."""
    total = default_ram() if options.ram is None else parse_size(options.ram)
    is_added = options.ram is not None and not options.whole_process

    def divide(process: int, vram: Vram | None) -> Budget:
        return Budget.divide(
            moe, ram=total + before if is_added else total, process=process, level=level,
            dense_level=dense_level, context=options.context, kv_types=options.kv_types, ops=shape,
            sequences=options.sequences, slots=options.slots, opening=opening,
            outside=before if is_added else 0, vram=vram,
            beside=adapters.beside(dense_level, moe.config.hidden_size),
        )  # fmt: skip

    return divide


def _loaded(
    moe: MoeFile,
    options: EngineOptions,
    dense_level: int,
    there: OnDevice | None,
    adapters: Adapters,
    told: Told,
) -> tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]:
    """Returns the model's weights outside the routed experts, and those of adapters (see `Adapters.load`)."""
    weights: Mapping[str, Any]
    if there is None:
        weights = own = load_dense(moe, dense_level, verify=options.verify, told=told)
        adapters.widen_biases(own, verify=options.verify)
    else:
        weights = there.load(dense_level, verify=options.verify, told=told)
    return weights, adapters.load(weights, dense_level, verify=options.verify)


def _dense_bytes(*weights: Mapping[str, Any]) -> int:
    """Returns the bytes of this process's memory that sets of weights take; shared tensors count once."""
    every = {id(weight): weight for of in weights for weight in of.values()}
    return sum(map(_host_bytes, every.values()))


def _host_bytes(weight: object) -> int:
    """Returns the bytes of this process's memory that a tensor takes; 0 for one on a device."""
    if isinstance(weight, Both):
        weight = weight.host
    if isinstance(weight, _core.Nested | _core.StoredRows):
        return weight.bytes
    return weight.nbytes if isinstance(weight, np.ndarray) else 0


def room_for_experts(moe: MoeFile, options: EngineOptions) -> int:
    """Returns about how many bytes of experts would fit besides everything else, with `ram` for the whole process.

    Raises:
        ValueError: an option does not fit the file.
        OutOfBudget: not even one expert at the lowest level fits.
    """
    threads = hardware.num_threads() if options.threads is None else options.threads
    options = with_kv_table(moe, options)
    moe = with_dense_bits(moe, options)
    return Budget.divide(
        moe, ram=default_ram() if options.ram is None else parse_size(options.ram),
        process=hardware.process_bytes(), level=1, dense_level=dense_level(moe, options),
        context=options.context, kv_types=options.kv_types, ops=OpsShape.of(moe.config, threads),
        sequences=options.sequences,
    ).room  # fmt: skip


def model_setting(
    moe: MoeFile, bits: int, slots: int, sections: Mapping[str, bytes] | None = None
) -> Setting:
    """Returns what a scheduler knows of a model whose experts run at up to `bits`, in `slots` bytes of memory."""
    config, levels = moe.config, range(1, moe.level(bits) + 1)
    return Setting(
        num_layers=len(config.moe_layers),
        num_experts=moe.places,
        num_there=num_there(moe),
        experts_per_token=config.experts_per_token,
        bits=bits,
        level_bits=tuple(moe.ladder[level - 1][0] for level in levels),
        level_bytes=level_bytes(moe, len(levels)),
        slots_bytes=slots,
        layers=config.moe_layers,
        sections=sections or {},
    )


def with_experts(moe: MoeFile, experts: int | None) -> MoeFile:
    """Returns a file with another number of experts per token; None keeps the file's own.

    Raises:
        ValueError: the model has fewer experts, or `experts` is less than 1.
    """
    if experts is None:
        return moe
    if not 1 <= experts <= moe.config.num_experts:
        raise ValueError(f"experts: expected 1 to {moe.config.num_experts}, got {experts}")
    return replace(moe, config=replace(moe.config, experts_per_token=experts))
