"""Compares the quality of our levels with llama.cpp's quantisations: same text, tokens, positions and reference.

    python benchmarks/quality_llama_cpp.py CHECKPOINT --llama-cpp BUILD/bin --text HELD_OUT --calibration OTHER_TEXT \\
        [--moe FILE.moe …] [--gguf F32.gguf] [--chunk 256] [--chunks 32] [--json FILE]

The checkpoint's widths should be multiples of 256, or llama.cpp falls back to larger types. Its float32 GGUF is the
reference: `llama-perplexity --kl-divergence-base` saves its predictions, `--kl-divergence` compares each quantisation
(`--pure`: all matrices at one type, routers in float), and the engine compares each level with the same file. Both
sides compute with 8-bit activations of their own. The imatrix is of the calibration text. A tied head is stored a
second time for llama.cpp, since its imatrix would leave it out otherwise. Sizes are counted from the files.

BUILD is a build of llama.cpp with llama-quantize, llama-imatrix and llama-perplexity. The GGUF is made here for Mixtral
checkpoints with a tokenizer of their own; for others make it with convert_hf_to_gguf.py --outtype f32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
from mixtral_gguf import write_gguf

from edgemoe.convert.convert import convert
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.file.reader import open_moe
from edgemoe.lab.quality.logprobs import LogProbs
from edgemoe.lab.quality.quality import Sample, Trial, first_token, measure
from edgemoe.lab.report.levels import levels
from edgemoe.text.tokenizer import Tokenizer

_EMBEDDING = ("--token-embedding-type", "iq2_s")
"""IQ2_XS cannot be had without an imatrix, which no embedding has."""

# What llama-quantize calls them, the tensors' type with --pure, more arguments, whether an imatrix is needed.
_TYPES = (
    ("IQ2_XS", "IQ2_XS", _EMBEDDING, True),
    ("IQ2_M", "IQ2_S", (), True),
    ("Q2_K", "Q2_K", (), False),
    ("IQ3_XXS", "IQ3_XXS", ("--token-embedding-type", "iq3_s"), True),
    ("Q3_K_S", "Q3_K", (), False),
    ("IQ3_S", "IQ3_S", (), False),
    ("IQ4_XS", "IQ4_XS", (), False),
    ("Q4_0", "Q4_0", (), False),
    ("Q4_K_S", "Q4_K", (), False),
    ("Q5_K_S", "Q5_K", (), False),
    ("Q6_K", "Q6_K", (), False),
    ("Q8_0", "Q8_0", (), False),
)

_FIGURES = {
    "kl": r"Mean +KLD: +([\d.]+)",
    "kl_error": r"Mean +KLD:.*± +([\d.]+)",
    "kl_99": r"99.0% +KLD: +([\d.]+)",
    "same_top": r"Same top p: +([\d.]+)",
    "perplexity": r"Mean PPL\(Q\) +: +([\d.]+)",
}

_SAME_SIZE = 1.05
"""How much larger theirs may be, to stand beside one of our levels: 2.625 bits per weight beside 2.5."""


def run(*command: object) -> str:
    """Returns what a program printed, on either stream."""
    done = subprocess.run(
        [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"{command[0]} ended with {done.returncode}: {done.stdout[-400:]}")
    return done.stdout


def gguf_bits_per_weight(path: Path) -> float:
    """Returns the average over all matrices but the routers, counted from the file."""
    matrices = [
        t
        for t in gguf.GGUFReader(path).tensors
        if len(t.shape) > 1 and "ffn_gate_inp" not in t.name
    ]
    total = sum(int(t.n_elements) for t in matrices)
    return 8 * sum(int(t.n_bytes) for t in matrices) / total


def theirs(args: argparse.Namespace, work: Path, source: Path, base: Path) -> list[dict[str, Any]]:
    """Returns a row per type, without and with imatrix, and prints it."""
    imatrix, quantised = work / "imatrix.gguf", work / "quantised.gguf"
    run(
        args.llama_cpp / "llama-imatrix", "-m", source, "-f", args.calibration, "-o", imatrix,
        *_context(args), "--process-output", "--no-ppl",
    )  # fmt: skip
    rows = []
    for kind, name, more, needs_imatrix in _TYPES:
        for with_imatrix in (True,) if needs_imatrix else (False, True):
            run(
                args.llama_cpp / "llama-quantize", "--pure", *more,
                *(("--imatrix", imatrix) if with_imatrix else ()), source, quantised, kind,
                args.threads,
            )  # fmt: skip
            figures = divergence(args, quantised, base)
            rows.append(
                {
                    "name": f"{name}{' + imatrix' * with_imatrix}",
                    "bits_per_weight": gguf_bits_per_weight(quantised),
                    **figures,
                }
            )
            show(rows[-1])
    quantised.unlink()
    return rows


def divergence(args: argparse.Namespace, model: Path, base: Path) -> dict[str, float]:
    """Returns what llama-perplexity says about a model."""
    for _ in range(3):  # it ends now and then before its last lines are written
        out = run(
            args.llama_cpp / "llama-perplexity", "-m", model, *_context(args),
            "--kl-divergence", "--kl-divergence-base", base,
        )  # fmt: skip
        found = {name: re.search(pattern, out) for name, pattern in _FIGURES.items()}
        if all(found.values()):
            figures = {name: float(match[1]) for name, match in found.items() if match}
            return {**figures, "same_top": figures["same_top"] / 100}
    sys.exit(f"llama-perplexity: not all figures in its output: {out[-400:]}")


def ours(args: argparse.Namespace, moe: Path, base: Path) -> list[dict[str, Any]]:
    """Returns a row per level of a file, and prints it."""
    rows = []
    opened = open_moe(moe)
    with LogProbs(base) as reference:
        sample = Sample(reference.windows, first_token(Tokenizer.from_files(opened.sections)))
        for level in levels(opened):
            trial = Trial(bits=level.bits, dense_bits=level.dense_bits, threads=args.threads)
            quality = dataclasses.asdict(measure(moe, trial, sample, reference=reference))
            name = f"{moe.stem}, {level.bits} bits"
            rows.append({"name": name, "bits_per_weight": level.bits_per_weight, **quality})
            show(rows[-1])
    return rows


def show(row: dict[str, Any]) -> None:
    print(
        f"| {row['name']} | {row['bits_per_weight']:.3f} | {row['kl']:.6f} ± {row['kl_error']:.6f} "
        f"| {row['kl_99']:.5f} | {100 * row['same_top']:.2f}% | {row['perplexity']:.3f} |",
        flush=True,
    )


def compare(mine: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """Prints each of our levels beside the best of theirs that is no larger than 5% more."""
    print(
        "\n| ours | bits/weight | KL | the best of theirs at that size | bits/weight | KL | ratio |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in mine:
        size = row["bits_per_weight"]
        near = [o for o in others if o["bits_per_weight"] <= _SAME_SIZE * size]
        if near:
            best = min(near, key=lambda o: o["kl"])
            print(
                f"| {row['name']} | {size:.3f} | {row['kl']:.6f} | {best['name']} "
                f"| {best['bits_per_weight']:.3f} | {best['kl']:.6f} | {row['kl'] / best['kl']:.2f} |"
            )


def _context(args: argparse.Namespace) -> tuple[object, ...]:
    return "-c", args.chunk, "-b", args.chunk, "-t", args.threads


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--llama-cpp", type=Path, required=True, metavar="BIN")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--moe", type=Path, nargs="+", default=[])
    parser.add_argument("--gguf", type=Path, help="the checkpoint in float32")
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        source = args.gguf or work / "float32.gguf"
        if args.gguf is None:
            write_gguf(args.checkpoint, source, untied=True)
        files = args.moe or [work / "edgemoe.moe"]
        if not args.moe:
            convert(HFCheckpoint(args.checkpoint), files[0])
        base = work / "base"
        run(
            args.llama_cpp / "llama-perplexity", "-m", source, "-f", args.text, *_context(args),
            "--chunks", args.chunks, "--kl-divergence-base", base,
        )  # fmt: skip
        print("| model | bits/weight | KL | KL 99% | same top | perplexity |")
        print("|---|---|---|---|---|---|")
        others = theirs(args, work, source, base)
        mine = [row for moe in files for row in ours(args, moe, base)]
    compare(mine, others)
    if args.json:
        head = {"command": sys.argv, "machine": platform.platform()}
        args.json.write_text(json.dumps({**head, "theirs": others, "ours": mine}, indent=1) + "\n")


if __name__ == "__main__":
    main()
