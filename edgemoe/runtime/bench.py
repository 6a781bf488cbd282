"""Speed, measured as llama-bench does: prompts and single tokens, repeated, each beside the machine's bandwidths."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgemoe import hardware
from edgemoe.devices import DeviceName, open_device
from edgemoe.file.reader import open_moe
from edgemoe.runtime.budget import default_ram
from edgemoe.runtime.engine import Engine
from edgemoe.store import disk_rate

__all__ = ["Result", "Roof", "measure", "roof"]

_DEVICE_BYTES = 256 << 20  # copied to measure a device
_MARGIN_BYTES = 16 << 20  # stacks of the threads that read, page tables


@dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    """The bandwidths that bound speed: of memory, of the disk, and of a device if there is one, in bytes per second."""

    memory: float
    disk: float
    vram: float = 0.0
    """Reads and writes within a device's memory; 0 without a device."""
    link: float = 0.0
    """Copies from pinned host memory to a device; 0 without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The figures of one test over all its repetitions."""

    test: str
    """The name, as in llama-bench: "pp512" for a prompt of 512 tokens, "tg128" for 128 single tokens; with "@ d1024"
    after it when 1,024 tokens were in the context before."""
    rates: tuple[float, ...]
    """Tokens per second of each repetition."""
    hit_rate: float
    read_per_token: float
    """Bytes read from disk for each token."""
    read_rate: float
    """Bytes per second while at least one read was in flight."""
    memory_roofs: tuple[float, float]
    """Bytes per second at which the same threads read the experts in memory, just before the test and just after."""
    used_per_token: float
    """Bytes of weights, keys and values that computing one token reads from memory; 0 for prompts, where it depends on
    the batch."""
    wait_share: float
    """Share of the time in which computing stalled on reads."""
    average_bits: float
    """The mean of the experts that ran."""
    peak_bytes: int
    """The process's highest resident memory."""
    logits_hash: str
    """CRC-32C of the last logits; see `Stats.logits_hash`."""

    @property
    def rate(self) -> float:
        """The median of the rates, in tokens per second."""
        return statistics.median(self.rates)

    @property
    def deviation(self) -> float:
        """The standard deviation of the rates; 0 for a single repetition."""
        return statistics.stdev(self.rates) if len(self.rates) > 1 else 0.0


def roof(
    path: str | os.PathLike[str],
    *,
    bits: int | None,
    threads: int | None,
    ram: int | None = None,
    device: str = "cpu",
    plug_in: str | os.PathLike[str] | None = None,
    seconds: float = 1.0,
) -> Roof:
    """Measures the bandwidths of memory, disk and device. To be called before an engine is opened.

    Args:
        path: the `.moe` file. The disk is measured with reads of its experts, like the cache's.
        bits: the level whose experts are read; None for the highest.
        threads: that read memory; None for the machine's cores.
        ram: bytes that the process will have, which the measurement keeps to; None for what is free.
        device: as in `EngineOptions`.
        plug_in: likewise.
        seconds: about how long the disk is measured.
    """
    moe = open_moe(path)
    total = default_ram() if ram is None else ram
    room = max(total - hardware.process_bytes() - _MARGIN_BYTES, 1 << 20)
    link, vram = _device_rates(DeviceName.parse(device), plug_in)
    best = Roof(
        link=link,
        vram=vram,
        memory=hardware.memory_rate(threads or hardware.num_threads(), room=room),
        disk=disk_rate(moe, moe.level(bits), seconds=seconds, room=room),
    )
    hardware.trim()
    hardware.forget_peak()  # the peak that is reported later is the engine's alone
    return best


def _device_rates(name: DeviceName, plug_in: str | os.PathLike[str] | None) -> tuple[float, float]:
    """Returns the bytes per second of a device's link and of its memory; zeros for the processor."""
    if name.ordinal is None:
        return 0.0, 0.0
    device = open_device(name, None, plug_in)
    # More than the device's caches hold, where there is room for it.
    return device.measure(min(_DEVICE_BYTES, device.info["free_bytes"] // 4))


def measure(
    engine: Engine,
    *,
    prompts: Sequence[int],
    generations: Sequence[int],
    depths: Sequence[int] = (0,),
    repetitions: int = 5,
    seed: int = 1,
) -> Iterator[Result]:
    """Yields a result per test, each after one repetition that is not measured.

    If all experts fit in memory, all are loaded first. Tokens are drawn at random, as in llama-bench.

    Args:
        prompts: lengths of prompts, evaluated in chunks.
        generations: numbers of single tokens, computed one after another.
        depths: tokens that are in the context before a test; each test runs at each depth.
        repetitions: measured runs of each test.
        seed: of the random tokens; the same seed gives the same tokens.

    Raises:
        ValueError: a test does not fit the engine's context, or `repetitions` is less than 1.
    """
    if repetitions < 1:
        raise ValueError(f"repetitions: expected at least 1, got {repetitions}")
    if engine.budget.slots >= engine.budget.experts:
        # Otherwise some experts would be read for the first time during a timed run.
        model = engine.model
        places = model.adapters.places
        every = np.arange(model.top_bits.size, dtype=np.int32)
        if places is not None:  # not every place has an expert
            every = every[places.names.reshape(-1) >= 0]
        model.store.load(every, model.top_bits[every])
    rng = np.random.default_rng(seed)
    tests = [*((True, n) for n in prompts), *((False, n) for n in generations)]
    for depth, (is_prompt, count) in itertools.product(depths, tests):
        if count < 1 or depth < 0 or depth + count + 1 > engine.context:
            raise ValueError(
                f"a test of {count} tokens at depth {depth} does not fit a context of {engine.context}"
            )
        name = f"{'pp' if is_prompt else 'tg'}{count}{f' @ d{depth}' if depth else ''}"
        yield _run(engine, name, is_prompt, count, depth, repetitions, rng)


def _run(
    engine: Engine,
    name: str,
    is_prompt: bool,
    count: int,
    depth: int,
    repetitions: int,
    rng: np.random.Generator,
) -> Result:
    engine.logits(
        rng.integers(0, engine.config.vocab_size, 1), last_only=True
    )  # loads some experts, which `read_rate` reads
    roof_before = engine.model.store.read_rate(engine.threads)
    rates: list[float] = []
    figures = ("hits", "misses", "bits", "bytes_read", "read_s", "wait_s")
    total_s, did = 0.0, dict.fromkeys(figures, 0.0)
    for repetition in range(repetitions + 1):
        ids = rng.integers(0, engine.config.vocab_size, depth + count + 1)
        start_ids = ids[: max(depth, 1)] if not is_prompt or depth else None
        if start_ids is not None:
            engine.logits(start_ids, last_only=True)
        steps: list[np.ndarray] = (
            [ids[depth : depth + count]]
            if is_prompt
            else [ids[max(depth, 1) + i :][:1] for i in range(count)]
        )
        before, start = engine.model.counters.store, time.perf_counter()
        for tokens in steps:
            if start_ids is None:
                engine.logits(tokens, last_only=True)
            else:
                engine.extend(tokens)
        seconds = time.perf_counter() - start
        after = engine.model.counters.store
        if repetition:  # the first warms the caches and is not counted
            rates.append(count / seconds)
            total_s += seconds
            for figure in did:
                did[figure] += after[figure] - before[figure]
    stats, uses = engine.stats, did["hits"] + did["misses"]
    return Result(
        test=name,
        rates=tuple(rates),
        hit_rate=did["hits"] / uses if uses else 1.0,
        read_per_token=did["bytes_read"] / (count * repetitions),
        read_rate=did["bytes_read"] / did["read_s"] if did["read_s"] else 0.0,
        memory_roofs=(roof_before, engine.model.store.read_rate(engine.threads)),
        used_per_token=0.0
        if is_prompt
        else float(engine.bytes_per_token + engine.kv_bytes(depth + count // 2)),
        wait_share=did["wait_s"] / total_s,
        average_bits=did["bits"] / uses if uses else 0.0,
        peak_bytes=stats.peak_bytes,
        logits_hash=stats.logits_hash,
    )
