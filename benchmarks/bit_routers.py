"""Compares trained bit routers with other choices of bits: KL divergence from the model's highest level.

    edgemoe train-bit-router MODEL.moe --text calibration.txt -o trained.bit-routers
    python benchmarks/bit_routers.py MODEL.moe trained.bit-routers --text held_out.txt

Everything runs token by token, as in a reply. The other choices are: d2moe's rule with its shares moved to the trained
average, one level for all experts, an allocation (if the model holds one), and bits drawn at random. Where the routers
may leave experts out (level 0), which d2moe's rule cannot, the levers `top_p` and `skip_below` take its place, set to
leave out as many. Bits are averages over all experts that the model's routers chose; one that does not run has 0.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgemoe.file.append import add_sections
from edgemoe.file.reader import open_moe
from edgemoe.lab.quality.quality import Quality, Sample, Trial, measure, recorded
from edgemoe.lab.quality.text import default_text
from edgemoe.quant import BitRouters
from edgemoe.text.tokenizer import Tokenizer


def drawn(like: BitRouters) -> BitRouters:
    """Returns routers with random weights: their choice depends on the token, but means nothing."""
    rng = np.random.default_rng(0)
    return BitRouters(
        levels=like.levels, weight=rng.standard_normal(like.weight.shape).astype(np.float32),
        gate_weight=np.zeros_like(like.bias), bias=np.zeros_like(like.bias),
    )  # fmt: skip


def as_many(
    like: Quality, plain: Trial, of: Callable[[Trial], Quality]
) -> Iterator[tuple[str, Quality]]:
    """Yields each lever that leaves experts out, at the setting that leaves out about as many as `like`."""
    for name, bounds in (("top_p", (1.0, 0.0)), ("skip_below", (0.0, 1.0))):
        none, all_ = bounds
        for _ in range(6):  # bisection
            middle = (none + all_) / 2
            found = of(replace(plain, options={name: middle}))
            if found.skipped_share < like.skipped_share:
                none = middle
            else:
                all_ = middle
        yield f"{plain.bits} bits, {name}={middle:.3f}", found


def main() -> None:
    """Parses the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("routers", type=Path, nargs="+", help="of edgemoe train-bit-router")
    parser.add_argument("--text", type=Path, help="held out (default: the package's)")
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    text = default_text() if args.text is None else args.text.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "x.moe"
        shutil.copy(args.model, model)
        moe = open_moe(model)
        tokenizer = Tokenizer.from_files(moe.sections)
        sample = Sample.of_text(text, tokenizer, chunk=args.chunk, chunks=args.chunks)

        def trial(bits: Any, scheduler: str = "on-demand", **options: Any) -> Trial:
            return Trial(
                bits=bits, dense_bits=moe.dense_ladder[-1], scheduler=scheduler, options=options,
                threads=args.threads, decode=True,
            )  # fmt: skip

        def results(reference: Any) -> Iterator[tuple[str, Quality]]:
            def of(what: Trial) -> Quality:
                return measure(model, what, sample, reference=reference)

            for path in args.routers:
                trained = BitRouters.from_bytes(path.read_bytes(), str(path))
                low, high = trained.levels[0], trained.levels[-1]
                add_sections(model, {"bit-routers": trained.to_bytes()})
                found = of(trial(high, "d2moe"))
                yield f"trained, {path.name}", found
                if low == 0:
                    yield from as_many(found, trial(high), of)
                    continue
                more = (found.average_bits - (low + high) / 2) / (high - low) / 2
                shares = {"low": min(max(0.3 - more, 0), 1), "high": min(max(0.3 + more, 0), 1)}
                n = len(trained.levels)
                yield (
                    f"rule, {shares['low']:.2f} and {shares['high']:.2f}",
                    of(trial(high, "d2moe", router="rule", levels=n, **shares)),
                )
            for level in filter(None, trained.levels):
                yield f"{level} bits for all", of(trial(level))
            if "allocation" in moe.sections:
                yield "allocation", of(trial("auto"))
            add_sections(model, {"bit-routers": drawn(trained).to_bytes()})
            yield "drawn at random", of(trial(high, "d2moe"))

        print(
            "| who chooses | bits per choice | left out | KL | ± | perplexity |\n|---|---|---|---|---|---|"
        )
        with recorded(model, trial(moe.ladder[-1][0]), sample) as (exact, reference):
            print(
                f"| {moe.ladder[-1][0]} bits for all | | | 0 | | {exact.perplexity:.3f} |",
                flush=True,
            )
            for name, q in results(reference):
                bits, left_out = q.average_bits * (1 - q.skipped_share), 100 * q.skipped_share
                print(
                    f"| {name} | {bits:.3f} | {left_out:.1f}% | {q.kl:.6f} | {q.kl_error:.6f} "
                    f"| {q.perplexity:.3f} |", flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    main()
