"""Compares experts that were released in MXFP4, stored as they are, with nested codes of them at each level.

    python benchmarks/float4.py path/to/mini-moe rounded/          # makes a checkpoint whose experts are MXFP4
    python benchmarks/reference_logprobs.py rounded/ held_out.txt rounded.kld --chunk 256 --chunks 32
    python benchmarks/float4.py rounded/ rounded.kld               # converts it both ways, and measures

The last command prints the KL divergence from the float model and the bytes of all experts. All other matrices are at 8
bits in both.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from edgemoe.convert.convert import convert
from edgemoe.convert.open import open_checkpoint
from edgemoe.file.reader import open_moe
from edgemoe.lab.quality.logprobs import LogProbs
from edgemoe.lab.quality.quality import Sample, Trial, first_token, measure
from edgemoe.lab.report.levels import levels
from edgemoe.quant import SCHEMES
from edgemoe.text.tokenizer import Tokenizer

HALVES = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float32)


def rounded(w: np.ndarray) -> np.ndarray:
    """Rounds to MXFP4 as OCP specifies it: the largest magnitude of 32 columns lies between 4 and 8 scales."""
    groups = w.astype(np.float32).reshape(len(w), -1, 32)
    top = np.abs(groups).max(-1, keepdims=True)
    steps = np.ldexp(np.float32(1), np.where(top > 0, np.frexp(top)[1] - 4, 0))  # halves
    nearest = np.abs(np.abs(groups / steps)[..., None] - HALVES).argmin(-1)
    return (np.sign(groups) * HALVES[nearest] * steps).reshape(w.shape)


def make(source: Path, out: Path) -> None:
    """Copies a checkpoint; its experts become values of MXFP4, in float32."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    for name, w in tensors.items():
        if ".experts." in name and w.ndim == 2:
            tensors[name] = rounded(w)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def compare(checkpoint: Path, reference: Path, threads: int) -> None:
    """Converts both ways and prints a row per level."""
    print("| experts | bits per weight | bytes | KL |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as work, LogProbs(reference) as true:
        for scheme in ("mxfp4", "nested"):
            out = Path(work) / f"{scheme}.moe"
            convert(open_checkpoint(checkpoint), out, scheme=SCHEMES[scheme])
            moe = open_moe(out)
            sample = Sample(true.windows, first_token(Tokenizer.from_files(moe.sections)))
            for level in levels(moe):
                trial = Trial(bits=level.bits, dense_bits=8, threads=threads)
                quality = measure(out, trial, sample, reference=true)
                of_weight = 8 * level.expert_bytes / level.expert_weights
                print(
                    f"| {scheme} {level.bits} bits | {of_weight:.2f} | {level.expert_bytes} | {quality.kl:.6f} |",
                    flush=True,
                )


def main() -> None:
    """Parses the command line, and makes a checkpoint or measures one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("other", type=Path, help="a folder to make, or predictions to compare with")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.other.is_file():
        compare(args.checkpoint, args.other, args.threads)
    else:
        make(args.checkpoint, args.other)


if __name__ == "__main__":
    main()
