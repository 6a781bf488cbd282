"""The engine: one open model, one sequence, one budget."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core, hardware
from edgemoe.config import ModelConfig
from edgemoe.experts import Experts, Observer
from edgemoe.file.format import MoeFile, open_moe
from edgemoe.model import MOST_AHEAD, Decoder, KvCache, KvTypes
from edgemoe.ops import CpuOps, OpsShape
from edgemoe.quant import Allocation
from edgemoe.runtime.budget import Budget, default_ram, parse_size
from edgemoe.runtime.meter import Meter, Stats
from edgemoe.runtime.profile import Profile, identity, read_profile, write_profile
from edgemoe.runtime.trace import TraceHeader, TraceWriter
from edgemoe.scheduler import SCHEDULERS, SECTIONS, Setting
from edgemoe.scheduler.watched import Watched
from edgemoe.store import ExpertStore, level_bytes, load_dense
from edgemoe.text.sampler import Sampler, SamplingParams
from edgemoe.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgemoe.runtime.chat import Chat

__all__ = ["Engine", "load", "model_setting", "room_for_experts"]

logger = logging.getLogger(__name__)


def load(
    path: str | os.PathLike[str],
    *,
    ram: int | str | None = None,
    bits: int | Literal["auto"] | None = None,
    allocation: str | os.PathLike[str] | None = None,
    dense_bits: int | None = None,
    experts: int | None = None,
    context: int | None = None,
    cache_type_k: str = "f16",
    cache_type_v: str = "f16",
    threads: int | None = None,
    scheduler: str = "on-demand",
    options: Mapping[str, Any] | None = None,
    verify: bool = True,
    trace: str | os.PathLike[str] | None = None,
    profile: str | os.PathLike[str] | None = None,
    observer: Observer | None = None,
    whole_process: bool = False,
) -> Engine:
    """Opens a model.

    Args:
        path: a `.moe` file.
        ram: what the engine may add to this process's memory, as bytes or "4GiB"; None for what is free,
            less a margin.
        bits: most precision of routed experts, one of the file's levels; None for all that the file has of each,
            "auto" for each expert's own.
        allocation: a file that says each expert's bits (`edgemoe allocate`); None for the model file's own.
        dense_bits: the same for all other matrices.
        experts: routed experts per token; None for the model's own number. Another number is another model.
        context: tokens of prompt and reply together; None for what fits well.
        cache_type_k: how the KV cache holds keys, "f16" or "q8_0": 8 bits, half the memory, not exact.
        cache_type_v: the same for values.
        threads: None for the machine's cores.
        scheduler: a name of `edgemoe.scheduler.SCHEDULERS`.
        options: the scheduler's own.
        verify: check the sum of everything that is read.
        trace: a file that records the routing; see `edgemoe.runtime.trace`.
        profile: a file of what was learned about this model's use: loaded if there is one, and saved at `close`;
            see `edgemoe.runtime.profile` and `Engine.warm`.
        observer: is told of every layer; not together with `trace`.
        whole_process: `ram` bounds the whole process, not only what the engine adds.

    Raises:
        ValueError: an argument is out of range.
        FormatError: the file is not a sound `.moe` file.
        OutOfBudget: says the smallest budget that works.
        ReadError: the disk failed.
    """
    return Engine(
        path, ram=ram, bits=bits, allocation=allocation, dense_bits=dense_bits,
        experts=experts, context=context,
        cache_type_k=cache_type_k, cache_type_v=cache_type_v, threads=threads, scheduler=scheduler,
        options=options or {}, verify=verify, trace=trace, profile=profile, observer=observer,
        whole_process=whole_process,
    )  # fmt: skip


def room_for_experts(
    moe: MoeFile,
    *,
    ram: int | str | None,
    dense_bits: int | None = None,
    context: int | None = None,
    cache_type_k: str = "f16",
    cache_type_v: str = "f16",
    threads: int | None = None,
) -> int:
    """Returns about how many bytes of experts would fit beside all else, with `ram` for the whole process.

    The arguments are those of `load`.

    Raises:
        ValueError: an argument is out of range.
        OutOfBudget: not one expert at its fewest bits fits.
    """
    return Budget.divide(
        moe, ram=default_ram() if ram is None else parse_size(ram),
        process=hardware.process_bytes(), level=1, dense_level=moe.dense_level(dense_bits),
        context=context, kv_types=KvTypes(cache_type_k, cache_type_v),
        ops=OpsShape.of(moe.config, hardware.num_threads() if threads is None else threads),
    ).room  # fmt: skip


class Engine:
    """Runs one model inside one budget. One thread at a time; several engines can live in one process.

    Also a context manager. The arguments are those of `load`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        ram: int | str | None,
        bits: int | Literal["auto"] | None,
        allocation: str | os.PathLike[str] | None,
        dense_bits: int | None,
        experts: int | None,
        context: int | None,
        cache_type_k: str,
        cache_type_v: str,
        threads: int | None,
        scheduler: str,
        options: Mapping[str, Any],
        verify: bool,
        trace: str | os.PathLike[str] | None,
        profile: str | os.PathLike[str] | None,
        observer: Observer | None,
        whole_process: bool,
    ) -> None:
        before = hardware.process_bytes()
        moe = open_moe(path)
        given = moe.config
        moe = _with_experts(moe, experts)
        self.config = config = moe.config
        each = noted = moe.expert_bits
        if bits == "auto":
            if scheduler != "on-demand":
                raise ValueError(f"bits: auto is for the scheduler on-demand, not {scheduler}")
            each = _allocation(moe, allocation)
            bits = int(each.max())
            if (each != noted).any():  # the scheduler has a note of its own
                options = {**options, "bits": each}
        elif allocation is not None:
            raise ValueError("allocation: expected bits to be auto")
        else:
            bits = moe.ladder[-1][0] if bits is None else bits
            moe.level(bits)  # or it says which there are
            each = noted = np.minimum(each, np.int8(bits))
        self.bits = bits
        self._profile_path = None if profile is None else Path(profile)
        if self._profile_path is not None and not self._profile_path.absolute().parent.is_dir():
            raise ValueError(f"profile: no such folder: {self._profile_path.parent}")
        if self._profile_path is not None and not os.access(
            self._profile_path.absolute().parent, os.W_OK
        ):  # before anything is learned that could not be kept
            raise PermissionError(f"profile: {self._profile_path} cannot be written")
        self._profile: Profile | None = None
        if self._profile_path is not None:
            self._profile = read_profile(self._profile_path, identity(moe))
        level, dense_level = moe.level(self.bits), moe.dense_level(dense_bits)
        self.threads = threads = hardware.num_threads() if threads is None else threads
        if not 1 <= threads <= 1024:
            raise ValueError(f"threads: expected 1 to 1024, got {threads}")
        if context is not None and not 1 <= context <= config.context_length:
            raise ValueError(
                f"context: expected 1 to {config.context_length} (the model's), got {context}"
            )
        self.kv_types = kv_types = KvTypes(cache_type_k, cache_type_v)
        if scheduler not in SCHEDULERS:
            raise ValueError(f"scheduler: expected one of {', '.join(SCHEDULERS)}, got {scheduler}")
        if trace is not None and observer is not None:
            raise ValueError("trace and observer: expected one of them")
        has_tokenizer = "tokenizer.json" in moe.sections
        self.tokenizer = Tokenizer.from_files(moe.sections) if has_tokenizer else None
        self._eos = frozenset(config.eos_ids)
        if self.tokenizer is not None:  # a file may name only the base model's end token
            self._eos |= frozenset(self.tokenizer.eos_ids)
        self.sampling = SamplingParams.of_model(moe.sections.get("generation_config.json"))
        # The tokenizer keeps what it needs; the files' text must not count against the experts.
        sections = {name: moe.sections[name] for name in SECTIONS if name in moe.sections}
        self._moe: MoeFile | None = (moe := replace(moe, sections={}))
        hardware.trim()
        self.notes = _notes(moe, given, noted, dense_bits, kv_types)

        total = default_ram() if ram is None else parse_size(ram)
        if ram is not None and not whole_process:
            total += before
        ops = OpsShape.of(config, threads)
        outside = 0 if whole_process or ram is None else before

        def divide(process: int) -> Budget:
            return Budget.divide(
                moe, ram=total, process=process, level=level, dense_level=dense_level,
                context=context, kv_types=kv_types, ops=ops, outside=outside,
            )  # fmt: skip

        # Both refuse what is wrong before anything large is read.
        estimate = divide(hardware.process_bytes())
        SCHEDULERS[scheduler](model_setting(moe, self.bits, estimate.slots, sections), **options)
        weights = load_dense(moe, dense_level, verify=verify)
        hardware.trim()
        # Slots are sized last, from what the process really has by now.
        dense = sum(w.bytes if isinstance(w, _core.Nested) else w.nbytes for w in weights.values())
        self.budget = budget = divide(max(hardware.process_bytes() - dense, 0))
        setting = model_setting(moe, self.bits, budget.slots, sections)
        self.scheduler_name = scheduler
        self.scheduler = SCHEDULERS[scheduler](setting, **options)
        self._setting = replace(setting, sections={})
        self._top_bits = each.reshape(-1)
        self._rungs = np.minimum(moe.experts.rungs, level)
        del sections, setting
        self.notes += self.scheduler.notes
        self._ops = CpuOps(replace(ops, max_tokens=budget.chunk, max_context=budget.context))
        self._store = ExpertStore.open(
            moe, bits=self.bits, budget_bytes=budget.slots, verify=verify,
            policy="lfu" if self.scheduler.priorities is None else self.scheduler.priorities,
        )  # fmt: skip
        if self._profile is not None:
            self._store.uses = self._profile.uses
            self.scheduler.restore(self._profile.state)
        self._experts = Experts(
            self.scheduler,
            self._store,
            self._ops,
            parts=np.empty(
                (budget.chunk * config.experts_per_token, config.hidden_size), np.float32
            ),
            observer=observer,
        )
        self._trace: TraceWriter | None = None
        self._decoder = Decoder(config, weights, self._ops, self._experts, max_tokens=budget.chunk)
        self._kv = KvCache(config, budget.context, kv_types)
        self._ids: list[int] = []  # what the KV cache holds
        self._logits = np.empty((1, config.vocab_size), np.float32)
        self._call = 0
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._meter = Meter(self._experts, budget.kv)
        if trace is not None:
            self.record(trace)
        logger.info(
            "%s: %s, %d tokens of context, chunks of %d, %d of %d bytes of experts, %s, %d threads",
            moe.path, config.family, budget.context, budget.chunk, budget.slots,
            budget.experts, _core.isa(), threads,
        )  # fmt: skip

    sampling: SamplingParams
    """How replies are sampled unless said otherwise: the model's own settings, or the defaults."""
    notes: tuple[str, ...]
    """What the user chose that changes the answer, one line each; empty when exact."""

    @property
    def context(self) -> int:
        """Tokens of prompt and reply together."""
        return self.budget.context

    @property
    def expert_bits(self) -> NDArray[np.int8]:
        """The most bits that each expert may run at, [layers with experts, E]."""
        return self._top_bits.reshape(-1, self.config.num_experts)

    @property
    def isa(self) -> str:
        """The instruction set of the kernels in use."""
        return _core.isa()

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that computing one token reads from memory, at the bits in use."""
        c, every = self.config, np.arange(len(self._top_bits), dtype=np.int32)
        expert = float(self._store.sizes(every, self._top_bits).mean())
        return self.budget.active_dense + int(len(c.moe_layers) * c.experts_per_token * expert)

    def kv_bytes(self, length: int) -> int:
        """Returns the bytes of keys and values that attention reads for a token after `length` others."""
        return KvCache.read_bytes(self.config, length, self.kv_types)

    @property
    def stats(self) -> Stats:
        """What the last call of `generate` or `logits` did."""
        return self._meter.stats()

    @property
    def source(self) -> Mapping[str, Any]:
        """Where the weights came from, as the file says."""
        return self._open().source

    def logits(
        self, ids: Sequence[int] | NDArray[np.integer[Any]], *, last_only: bool = False
    ) -> NDArray[np.float32]:
        """Computes a new sequence from its start.

        Args:
            ids: [T] tokens, T from 1 to `context`.
            last_only: return the last position alone.

        Returns:
            float32 [T, V], or [1, V]; the caller's own.

        Raises:
            ValueError: too many tokens, none, or one outside the vocabulary.
            ReadError: the disk failed; the engine stays usable.
        """
        with self._alone():
            tokens = self._begin(ids, keep_prefix=False)
            out = np.empty((1 if last_only else len(tokens), self.config.vocab_size), np.float32)
            start = time.perf_counter()
            self._evaluate(tokens, out)
            self._meter.prompt(len(tokens), 0, time.perf_counter() - start)
            self._meter.hash(out[-1].copy())
        return out

    def extend(
        self, ids: Sequence[int] | NDArray[np.integer[Any]], *, last_only: bool = True
    ) -> NDArray[np.float32]:
        """Adds tokens to the sequence of the last call and returns the logits of the last, float32 [1, V].

        For decoding loops of one's own. The result is scratch, valid until the next call.

        Args:
            ids: [T] tokens, at least one.
            last_only: False for the logits of all of them, float32 [T, V]; the caller's own.

        Raises:
            ValueError: too many tokens, none, or one outside the vocabulary.
            ReadError: the disk failed; the engine stays usable.
        """
        with self._alone():
            known = len(self._ids)
            tokens = self._checked(ids, self.context - known)
            self._kv.length = known  # Ctrl-C may have come between the two
            self._call += 1
            self._meter.start()
            out = self._logits
            if not last_only:
                out = np.empty((len(tokens), self.config.vocab_size), np.float32)
            start = time.perf_counter()
            self._evaluate(tokens, out)
            self._meter.prompt(len(tokens), known, time.perf_counter() - start)
            self._meter.hash(out[-1] if last_only else out[-1].copy())
        return out

    def generate(self, ids: Sequence[int], params: SamplingParams | None = None) -> Iterator[int]:
        """Yields tokens as they are made, until an end token, `max_tokens` or the end of the context.

        What the sequence shares with the one before is not computed again; the result is the same, bit for bit.

        Args:
            ids: [T] the prompt, T from 1 to `context` - 1.
            params: how to sample; None for `sampling`.

        Raises:
            ValueError: too many tokens, none, or one outside the vocabulary.
            ReadError: the disk failed; the engine stays usable.
        """
        params = params or self.sampling
        if len(ids) >= self.context:
            raise ValueError(
                f"a prompt of {len(ids)} tokens does not fit a context of {self.context} with a reply"
            )
        with self._alone():
            tokens = self._begin(ids, keep_prefix=True)
        return self._generate(tokens, params, self._call)

    def _generate(
        self, tokens: NDArray[np.int32], params: SamplingParams, call: int
    ) -> Iterator[int]:
        meter = self._meter
        sampler = Sampler(params)
        history = tokens.tolist()
        limit = self.context - len(history)
        if params.max_tokens >= 0:
            limit = min(limit, params.max_tokens)
        eos = frozenset() if params.ignore_eos else self._eos
        row = self._logits
        start = time.perf_counter()
        with self._alone(call):
            cached = self._kv.length
            self._evaluate(tokens[cached:], row)
        now = time.perf_counter()
        meter.prompt(len(tokens) - cached, cached, now - start)
        for _ in range(limit):
            meter.hash(row[0])
            token = sampler.sample(row[0], history)
            meter.token(time.perf_counter() - start)
            if token in eos:
                return
            history.append(token)
            yield token
            if len(history) - len(tokens) >= limit:
                return
            with self._alone(call):
                self._evaluate(np.array([token], np.int32), row)

    @contextlib.contextmanager
    def _alone(self, call: int | None = None) -> Iterator[None]:
        """Keeps other threads out, and a generator of an earlier call."""
        self._open()
        if os.getpid() != self._pid:
            raise RuntimeError("the engine belongs to the process that opened it")
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("the engine is in use by another thread")
        try:
            if call not in (None, self._call):
                raise RuntimeError("generate: the engine was used for something else meanwhile")
            yield
        finally:
            self._lock.release()

    def _checked(self, ids: Sequence[int] | NDArray[Any], room: int) -> NDArray[np.int32]:
        """Returns tokens as an array, of which there may be at most `room`."""
        tokens = np.asarray(ids)
        if tokens.ndim != 1 or len(tokens) == 0 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError("ids: expected a list of at least one token")
        if len(tokens) > room:
            have = f" with {self.context - room} tokens in it" if room < self.context else ""
            raise ValueError(f"{len(tokens)} tokens do not fit a context of {self.context}{have}")
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise ValueError(f"ids: expected tokens from 0 to {self.config.vocab_size - 1}")
        return tokens.astype(np.int32)

    def _begin(self, ids: Sequence[int] | NDArray[Any], *, keep_prefix: bool) -> NDArray[np.int32]:
        """Checks a sequence and takes the KV cache back to what it shares with the last one."""
        tokens = self._checked(ids, self.context)
        self._call += 1
        shared = 0
        if keep_prefix:  # the last token is always computed, for its logits
            for mine, theirs in zip(self._ids, tokens[:-1].tolist(), strict=False):
                if mine != theirs:
                    break
                shared += 1
        self._kv.length = shared
        del self._ids[shared:]
        self._meter.start()
        return tokens

    def _evaluate(self, tokens: NDArray[np.int32], out: NDArray[np.float32]) -> None:
        """Appends tokens to the sequence; logits of the last ones go to `out` [1 or len(tokens), V]."""
        chunk = self.budget.chunk
        for first in range(0, len(tokens), chunk):
            part = tokens[first : first + chunk]
            if self._trace is not None:
                self._trace.begin(self._kv.length, part)
            if self._kv.length == 0:
                self.scheduler.begin()
            start = time.perf_counter()
            self.scheduler.tokens(part)
            hidden = self._decoder.forward(part, self._kv)
            self.scheduler.passed(len(part), time.perf_counter() - start)
            self._ids.extend(part.tolist())
            if len(out) == len(tokens):
                self._decoder.logits(hidden, out[first : first + len(part)])
            elif first + chunk >= len(tokens):
                self._decoder.logits(hidden[-1:], out)
            if self._trace is not None:
                self._trace.end()

    def record(self, path: str | os.PathLike[str], *, look_ahead: int = 0) -> None:
        """Records from now on what is routed, resident and waited for; see `edgemoe.runtime.trace`.

        Args:
            look_ahead: for the record, how many of the next layers' routers are asked for each layer's input; at
                least as many as the scheduler asks for.

        Raises:
            ValueError: the engine has an observer or a trace already, or there is a file that is not a trace.
            OSError: the file cannot be written.
        """
        moe = self._open()
        if self._experts.observer is not None:
            raise ValueError("record: the engine is observed already")
        if not 0 <= look_ahead <= MOST_AHEAD:
            raise ValueError(f"look-ahead: expected 0 to {MOST_AHEAD} layers, got {look_ahead}")
        reads_ahead = self.scheduler.look_ahead > 0
        if look_ahead > self.scheduler.look_ahead:
            self._experts.scheduler = self.scheduler = Watched(self.scheduler, look_ahead)
        setting, slot_bytes = self._setting, self._store.cache.slot_bytes
        header = TraceHeader(
            model=str(moe.source.get("name", moe.path.name)),
            num_experts=setting.num_experts,
            experts_per_token=setting.experts_per_token,
            num_layers=setting.num_layers,
            bits=setting.bits,
            level_bits=setting.level_bits,
            level_bytes=tuple(map(slot_bytes, range(1, len(setting.level_bits) + 1))),
            rungs=() if (self._rungs == self._rungs.max()).all() else tuple(self._rungs.tolist()),
            slots_bytes=setting.slots_bytes,
            scheduler=self.scheduler_name,
            look_ahead=self.scheduler.look_ahead,
            reads_ahead=reads_ahead,
            threads=self.threads,
        )
        self._trace = self._experts.observer = TraceWriter(path, header)

    def warm(self) -> int:
        """Loads the experts that were used most, until the slots are full; changes no answer.

        They are loaded at the highest bits that they may run at, the most used first; Ctrl-C leaves those that came.

        Returns:
            The bytes read: 0 when the profile knows of no use yet, or all is there.

        Raises:
            ValueError: the engine has no profile.
            ReadError: the disk failed; the engine stays usable.
        """
        if self._profile_path is None:
            raise ValueError("warm: expected an engine with a profile")
        with self._alone():
            uses, store = self._store.uses.reshape(-1), self._store
            order = np.argsort(-uses, kind="stable")[: np.count_nonzero(uses)].astype(np.int32)
            bits = self._top_bits[order]
            total = np.cumsum(store.sizes(order, bits))
            fit = int(np.searchsorted(total, self._setting.slots_bytes, side="right"))
            before = int(store.stats["bytes_read"])
            store.load(order[:fit], bits[:fit])
            return int(store.stats["bytes_read"]) - before

    def _learned(self) -> Profile | None:
        """Returns what to save: what other schedulers learned is kept. None when nothing has run."""
        uses = self._store.uses
        before = {} if self._profile is None else self._profile.state
        return Profile(uses, {**before, **self.scheduler.state()}) if uses.any() else None

    def chat(self, *, system: str | None = None, params: SamplingParams | None = None) -> Chat:
        """Opens a conversation.

        Raises:
            FormatError: the file has no tokenizer.
        """
        from edgemoe.runtime.chat import Chat

        return Chat(self, system=system, params=params or self.sampling)

    def close(self) -> None:
        """Saves the profile and gives all memory back; the engine cannot be used afterwards.

        Raises:
            OSError: the profile cannot be written; what was there stays, and the engine is closed.
        """
        self._call += 1
        if self._moe is None:
            return
        learned, of = None, identity(self._moe)
        if self._profile_path is not None and os.getpid() == self._pid:
            learned = self._learned()
        self._meter.freeze()
        self._moe = None
        if self._trace is not None:
            self._trace.close()
        del self._decoder, self._experts, self._store, self._ops, self._kv
        if self._profile_path is not None and learned is not None:
            write_profile(self._profile_path, learned, of)

    def _open(self) -> MoeFile:
        if self._moe is None:
            raise ValueError("the engine is closed")
        return self._moe

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _with_experts(moe: MoeFile, experts: int | None) -> MoeFile:
    if experts is None:
        return moe
    if not 1 <= experts <= moe.config.num_experts:
        raise ValueError(f"experts: expected 1 to {moe.config.num_experts}, got {experts}")
    return replace(moe, config=replace(moe.config, experts_per_token=experts))


def _allocation(moe: MoeFile, path: str | os.PathLike[str] | None) -> NDArray[np.int8]:
    """Returns each expert's bits [L, E]: a file's, the model's section, or what is there where experts differ."""
    if path is not None:
        content, where = Path(path).read_bytes(), str(path)
    elif "allocation" in moe.sections:
        content, where = moe.sections["allocation"], f"{moe.path}: section allocation"
    elif (moe.experts.rungs != len(moe.ladder)).any():
        return moe.expert_bits
    else:
        raise ValueError(
            f"bits: auto takes an allocation, and {moe.path} has none; edgemoe allocate makes it"
        )
    found = Allocation.from_json(content, where)
    found.check(moe.config, tuple(rung[0] for rung in moe.ladder), where, most=moe.expert_bits)
    return found.bits


def _notes(
    moe: MoeFile,
    given: ModelConfig,
    bits: NDArray[np.int8],
    dense_bits: int | None,
    kv_types: KvTypes,
) -> tuple[str, ...]:
    notes = []
    have = moe.expert_bits
    if (bits < have).any():
        notes.append(f"lossy: experts at {_mean_bits(bits)} of the file's {_mean_bits(have)} bits")
    if dense_bits is not None and dense_bits < moe.dense_ladder[-1]:
        notes.append(
            f"lossy: dense weights at {dense_bits} of the file's {moe.dense_ladder[-1]} bits"
        )
    if moe.config.experts_per_token != given.experts_per_token:
        notes.append(
            f"lossy: {moe.config.experts_per_token} experts per token; "
            f"the model's own number is {given.experts_per_token}"
        )
    rounded = [n for n in ("keys", "values") if getattr(kv_types, n) == "q8_0"]
    if rounded:
        notes.append(f"lossy: {' and '.join(rounded)} of the KV cache at 8 of 16 bits")
    return tuple(notes)


def _mean_bits(bits: NDArray[np.int8]) -> str:
    """Returns how many bits experts have, the mean where they differ."""
    return f"{bits.flat[0]}" if (bits == bits.flat[0]).all() else f"{bits.mean():.2f}"


def model_setting(
    moe: MoeFile, bits: int, slots: int, sections: Mapping[str, bytes] | None = None
) -> Setting:
    """Returns what a scheduler decides about when `slots` bytes hold experts of at most `bits`."""
    config, levels = moe.config, range(1, moe.level(bits) + 1)
    return Setting(
        num_layers=len(config.moe_layers),
        num_experts=config.num_experts,
        experts_per_token=config.experts_per_token,
        bits=bits,
        level_bits=tuple(moe.ladder[level - 1][0] for level in levels),
        level_bytes=level_bytes(moe, len(levels)),
        slots_bytes=slots,
        sections=sections or {},
    )
