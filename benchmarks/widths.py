"""Runs a family of each kind of mixer at its published width, two layers deep, in memory and with few experts resident.

    python benchmarks/widths.py [--only gemma] [--threads 2] [--keep DIR]

Weights are random, as in the tests, and go through the converter. There are fewer layers, experts and tokens in the
vocabulary than in the release; everything else has its true size. A row has the time per decoded token of a layer's
mixer and FFN, and of the mixer's own part, without its products with matrices: the recurrence, its convolution, gates
and norms. Shares are of the time that all layers of the release would take at these speeds; the head is left out, so
the shares are too large. "Same bits" compares the logits of a prompt and of every decoded token with those of an engine
that has room for a quarter of the experts, and evicts and reads all the time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

_ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(_ROOT / "tests"), str(_ROOT / "tests/convert")]

import families  # noqa: E402
import transformers  # noqa: E402
from test_published import PUBLISHED, Shapes  # noqa: E402

import edgemoe  # noqa: E402
from edgemoe.convert.convert import convert  # noqa: E402
from edgemoe.ops.cpu import CpuOps  # noqa: E402

_SLIDING = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Shape:
    """How a release is cut down."""

    mixers: tuple[int, int]
    """The number of the release's layers with the mixer of the first layer here, and with that of the second."""
    changes: dict[str, Any]


SHAPES = {
    "Qwen3.6-35B-A3B": Shape(
        (30, 10), {"layer_types": ["linear_attention", "full_attention"], "num_experts": 24}
    ),
    "Granite-4.0-H-Tiny": Shape(
        (36, 4), {"layer_types": ["mamba", "attention"], "num_local_experts": 24}
    ),
    "LFM2-8B-A1B": Shape(
        (18, 6),
        {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0, "num_experts": 8},
    ),
    "GLM-4.7-Flash": Shape(
        (1, 46), {"mlp_layer_types": ["dense", "sparse"], "n_routed_experts": 12}
    ),
    "gpt-oss-20b": Shape((12, 12), {"layer_types": _SLIDING, "num_local_experts": 8}),
    "Gemma-4-26B-A4B": Shape((25, 5), {"layer_types": _SLIDING, "num_experts": 16}),
}
_FEWER = {"num_hidden_layers": 2, "vocab_size": 4096, "pad_token_id": None}
_PROMPT, _TOKENS = 96, 64
_VERBS = (
    "short_conv", "delta_rule", "mamba2", "gated_norm", "gate_heads", "multiply", "attention", "latent_attention",
)  # fmt: skip
"""The operations of a mixer besides its products with matrices."""


class RandomCheckpoint(Shapes):
    """A checkpoint of random weights, each made when it is read."""

    def __init__(self, name: str) -> None:
        self.kind = transformers.AutoConfig.for_model(
            **{**PUBLISHED[name].settings, **_FEWER, **SHAPES[name].changes}
        )
        super().__init__(self.kind)

    def tensor(self, name: str) -> np.ndarray:
        """Returns a random tensor; see `Checkpoint.tensor`."""
        shape = self.shapes[name]
        rng = np.random.Generator(np.random.SFC64(zlib.crc32(name.encode())))
        noise = rng.standard_normal(shape, np.float32)
        if len(shape) == 1 or name.endswith("bias"):
            middle = 0.0 if name.endswith(("bias", "A_log", "sinks")) else 1.0
            noise = np.abs(noise) if name.endswith("A_log") else np.float32(0.2) * noise
            return noise + np.float32(middle)
        gain = families._gain(name, self.kind)
        return noise * np.float32(gain / shape[-1] ** 0.5)


class Clock:
    """A clock that adds up the time that methods of objects take, by layer."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.within = ""

    def time(self, owner: Any, method: str, label: str = "") -> None:
        """Times a method from now on, under a label, or under the label of the method that calls it and its name."""
        inner = getattr(owner, method)

        def timed(*args: Any, **named: Any) -> Any:
            outer, self.within = self.within, label or self.within
            start = time.perf_counter()
            try:
                return inner(*args, **named)
            finally:
                name = label or f"{outer} {method}"
                self.seconds[name] += time.perf_counter() - start
                self.within = outer

        setattr(owner, method, timed)


def decoded(engine: edgemoe.Engine) -> Iterator[np.ndarray]:
    """Yields the logits of a prompt, and of tokens after it; the same ones for every engine."""
    rng = np.random.default_rng(7)
    yield engine.logits(rng.integers(0, engine.config.vocab_size, _PROMPT))
    for _ in range(_TOKENS):
        yield engine.extend(rng.integers(0, engine.config.vocab_size, 1))


def hashed(engine: edgemoe.Engine) -> str:
    """Returns a hash of all the logits of `decoded`."""
    crc = 0
    for row in decoded(engine):
        crc = zlib.crc32(np.ascontiguousarray(row), crc)
    return f"{crc:08x}"


def milliseconds(engine: edgemoe.Engine) -> dict[str, float]:
    """Returns the median times of a decoded token's parts, in ms."""
    clock, model = Clock(), engine.model
    cast(CpuOps, model.ops).repeats = False  # otherwise the timed methods are not called
    for verb in _VERBS:
        clock.time(model.ops, verb)
    for i, layer in enumerate(model.decoder._stacks[0].layers):
        clock.time(layer.mixer, "forward", f"mixer {i}")
        for part in () if layer.ffn is None else ("begin", "run_experts", "run", "end"):
            clock.time(layer.ffn, part, f"ffn {i}")
    tokens = []
    for _ in decoded(engine):
        tokens.append(dict(clock.seconds))
        clock.seconds.clear()
    names = dict.fromkeys(name for token in tokens[1:] for name in token)
    return {n: 1e3 * statistics.median(t.get(n, 0.0) for t in tokens[1:]) for n in names}


def measured(name: str, out: Path, threads: int) -> dict[str, Any]:
    """Converts a shape and runs it with all experts in memory, and with a quarter of them."""
    if not out.exists():
        convert(RandomCheckpoint(name), out, bits=4)
    options: dict[str, Any] = {"threads": threads, "context": 256, "bits": 4, "dense_bits": 4}
    with edgemoe.load(out, ram="4GiB", **options) as engine:
        whole, parts = hashed(engine), milliseconds(engine)
        kinds = [type(engine.config.mixer(i)).kind for i in range(2)]
        quarter = engine.budget.experts // 4
    with edgemoe.load(out, ram="4GiB", slots=quarter, **options) as engine:
        capped, share = hashed(engine), engine.budget.slots / engine.budget.experts
        evictions = engine.stats.evictions
    return {
        "name": name, "kinds": kinds, "ms": parts, "hash": whole, "same": whole == capped, "resident": share,
        "evicts": evictions > 0, "bytes": out.stat().st_size,
    }  # fmt: skip


def row(found: dict[str, Any]) -> Iterator[str]:
    """Yields a line of the table for each layer."""
    ms, counts = found["ms"], SHAPES[found["name"]].mixers
    token = sum(n * (ms[f"mixer {i}"] + ms[f"ffn {i}"]) for i, n in enumerate(counts))
    for i, (kind, count) in enumerate(zip(found["kinds"], counts, strict=True)):
        own = sum(t for n, t in ms.items() if n.startswith(f"mixer {i} "))
        # Plain attention of one token is one call with its products.
        parts = (f"{own:.2f}", f"{count * own / token:.1%}") if own else ("-", "-")
        yield (
            f"| {found['name']} | {kind}, {count} layers | {ms[f'mixer {i}']:.2f} | {parts[0]} | "
            f"{ms[f'ffn {i}']:.2f} | {parts[1]} | {count * ms[f'mixer {i}'] / token:.1%} | "
            f"{'yes' if found['same'] else 'NO'}, {found['resident']:.0%} |"
        )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="where files stay, and are taken from")
    args = parser.parse_args()
    print(
        "| model | mixer | ms a layer | its own part | FFN ms | own part of a token | mixer of a token "
        "| same bits, resident |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for name in SHAPES:
            if args.only.lower() not in name.lower():
                continue
            out = (args.keep or Path(scratch)) / f"{name}.moe"
            for line in row(measured(name, out, args.threads)):
                print(line, flush=True)
            if not args.keep:
                out.unlink()


if __name__ == "__main__":
    main()
