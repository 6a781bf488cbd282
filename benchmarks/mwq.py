"""Compares D2MoE's Matryoshka quantisation (MWQ) with our nested codes: bytes, KL divergence and speed by level.

    edgemoe convert path/to/mini-moe mini.moe
    edgemoe calibrate mini.moe --full --text calibration.txt
    python benchmarks/reference_logprobs.py path/to/mini-moe held_out.txt float.logprobs --chunk 256 --chunks 32
    python benchmarks/mwq.py path/to/mini-moe mini.calib float.logprobs

Every scheme becomes a file, and every level of it runs in the engine, with all matrices at that level, against the
float model's predictions. MWQ (arXiv 2504.15299, section 3.3) starts at 2 bits (version 1) or at 5 (version 2). With a
calibration it is made in three ways:

    as published   rung after rung over the whole matrix, each compensating its own error: what convert writes
    for 4 or 8     all rungs of a group before the next group; the last level's error is compensated
    for its base   the same, but the base's error is compensated

and once without a calibration. Bytes are those of the matrices. --speed measures single tokens with everything in
memory, all files in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import results

import edgemoe
from edgemoe.convert.convert import convert
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.file.reader import open_moe
from edgemoe.lab.quality.logprobs import LogProbs
from edgemoe.lab.quality.quality import Sample, Trial, first_token, measure
from edgemoe.lab.report.levels import levels
from edgemoe.quant import SCHEMES, Calibration, Scheme, mwq
from edgemoe.runtime import bench
from edgemoe.text.tokenizer import Tokenizer


def candidates() -> Iterator[tuple[str, Scheme, int, bool]]:
    """Yields a label, a scheme, the last level and whether a calibration is used."""
    yield "nested", SCHEMES["nested"], 8, True
    yield "nested, not calibrated", SCHEMES["nested"], 8, False

    def order(compensated: int) -> Scheme:
        def quantize(w: Any, ladder: Any, *, second_moments: Any, **_: Any) -> Any:
            return mwq.quantize(w, ladder, second_moments=second_moments, compensated=compensated)

        return dataclasses.replace(SCHEMES["mwq"], quantize=quantize)

    for bits in (4, 8):
        yield f"MWQ to {bits} bits, as published", SCHEMES["mwq"], bits, True
        yield f"MWQ to {bits} bits, for {bits}", order(-1), bits, True
        yield f"MWQ to {bits} bits, for its base", order(0), bits, True
        yield f"MWQ to {bits} bits, not calibrated", SCHEMES["mwq"], bits, False


def tokens_per_second(path: Path, bits: int, threads: int) -> float:
    """Returns the median rate of 64 single tokens."""
    with edgemoe.load(path, bits=bits, dense_bits=bits, threads=threads) as engine:
        (result,) = bench.measure(engine, prompts=[], generations=[64], repetitions=5)
        return result.rate


def written(model: Path, calibration: Calibration, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields each candidate's label and its file, which is made unless it is there."""
    for label, scheme, bits, calibrated in candidates():
        path = folder / f"{label.replace(' ', '-').replace(',', '')}.moe"
        if not path.exists():
            convert(
                HFCheckpoint(model), path, bits=bits, scheme=scheme,
                calibration=calibration if calibrated else None,
            )  # fmt: skip
        yield label, path


def divergences(
    files: Iterable[tuple[str, Path]], reference: LogProbs, threads: int
) -> list[dict[str, object]]:
    """Measures every level of every file."""
    rows: list[dict[str, object]] = []
    print("| scheme | bits | bits per weight | MB | KL |\n|---|---|---|---|---|")
    for label, path in files:
        moe = open_moe(path)
        sample = Sample(reference.windows, first_token(Tokenizer.from_files(dict(moe.sections))))
        for level in levels(moe):
            trial = Trial(bits=level.bits, dense_bits=level.bits, threads=threads)
            kl = measure(path, trial, sample, reference=reference).kl
            rows.append({"scheme": label, "kl": kl, "bytes": level.bytes,
                         "bits": level.bits, "bits_per_weight": level.bits_per_weight})  # fmt: skip
            print(
                f"| {label} | {level.bits} | {level.bits_per_weight:.3f} "
                f"| {level.bytes / 1e6:.2f} | {kl:.6f} |",
                flush=True,
            )
    return rows


def speeds(files: list[tuple[str, Path]], rounds: int, threads: int) -> list[dict[str, object]]:
    """Times one file of each scheme and version, in turns, so that what disturbs the machine disturbs all alike."""
    tests = [
        (label, path, level.bits)
        for label, path in files
        if label == "nested" or label.endswith("as published")
        for level in levels(open_moe(path))
    ]
    rates: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for label, path, bits in tests:
            rates.setdefault((label, bits), []).append(tokens_per_second(path, bits, threads))
    print("\n| scheme | bits | tokens/s |\n|---|---|---|")
    for (label, bits), found in rates.items():
        print(f"| {label} | {bits} | {statistics.median(found):.0f} |")
    return [{"scheme": s, "bits": b, "rates": found} for (s, b), found in rates.items()]


def main() -> None:
    """Parses the command line, measures, prints and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a checkpoint")
    parser.add_argument("calibration", type=Path, help="of edgemoe calibrate --full")
    parser.add_argument("reference", type=Path, help="the float model's predictions")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--speed", type=int, metavar="ROUNDS", help="time in so many rounds, and nothing else"
    )
    parser.add_argument("--keep", type=Path, help="where files lie, to use them again")
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        files = written(args.model, Calibration(args.calibration), args.keep or Path(scratch))
        if args.speed:
            rows = speeds(list(files), args.speed, args.threads)
        else:
            with LogProbs(args.reference) as reference:
                rows = divergences(files, reference, args.threads)
    if args.json:
        results.write(args.json, rows)


if __name__ == "__main__":
    main()
