"""Compares ways to convert one checkpoint: KL divergence to the float model at every level of the file.

    edgemoe convert path/to/mini-moe mini.moe
    edgemoe calibrate mini.moe --full --text calibration.txt
    python benchmarks/reference_logprobs.py path/to/mini-moe held_out.txt base.kld --chunk 256 --chunks 32
    python benchmarks/conversions.py path/to/mini-moe base.kld --calibration mini.calib

The first table has a row per conversion and a column per level. The conversions are: all levels together, the default;
one level favoured (`edgemoe convert --favour`); and one level alone, without regard to the others. The second table
shows what being nested costs each level. `--down-bits` adds conversions with other bits of w_down. In parentheses are
the bits per weight of a level.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import edgemoe.quant.nested as nested
from edgemoe.convert.convert import convert
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.file.reader import open_moe
from edgemoe.lab.quality.logprobs import LogProbs
from edgemoe.lab.quality.quality import Sample, Trial, first_token, measure
from edgemoe.lab.report.levels import levels
from edgemoe.quant import DEFAULT_LADDER, SCHEMES, Calibration
from edgemoe.text.tokenizer import Tokenizer

ALONE = np.inf


def row(args: argparse.Namespace, label: str, factor: float, **more: Any) -> dict[str, Any]:
    """Converts, measures every level, prints and returns it."""
    nested.FAVOUR = factor
    calibration = None if args.calibration is None else Calibration(args.calibration)
    out = Path(args.work) / "converted.moe"
    convert(HFCheckpoint(args.checkpoint), out, calibration=calibration, **more)
    moe, found = open_moe(out), []
    with LogProbs(args.reference) as reference:
        sample = Sample(
            reference.windows[: args.chunks], first_token(Tokenizer.from_files(moe.sections))
        )
        for level in levels(moe):
            if factor == ALONE and level.bits != more["favour"]:
                continue
            trial = Trial(bits=level.bits, dense_bits=level.dense_bits, threads=args.threads)
            quality = measure(out, trial, sample, reference=reference)
            found.append(
                {
                    "bits": level.bits, "bits_per_weight": level.bits_per_weight,
                    "kl": quality.kl, "kl_error": quality.kl_error,
                }
            )  # fmt: skip
    cells = {f["bits"]: f"{f['kl']:.6f} ({f['bits_per_weight']:.3f})" for f in found}
    print(f"| {label} | " + " | ".join(cells.get(b, "") for b in DEFAULT_LADDER) + " |", flush=True)
    return {"conversion": label, "levels": found}


def main() -> None:
    """Parses the command line, measures, prints and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("reference", type=Path, help="log-probabilities of the float model")
    parser.add_argument(
        "--calibration", type=Path, help="without one there is a row for the full search too"
    )
    parser.add_argument("--favour", type=int, nargs="*", default=list(DEFAULT_LADDER))
    parser.add_argument("--alone", type=int, nargs="*", default=list(DEFAULT_LADDER))
    parser.add_argument("--factor", type=float, default=nested.FAVOUR, help="of a favoured level")
    parser.add_argument("--down-bits", nargs="*", default=[], metavar="N,N,N,N,N")
    parser.add_argument("--chunks", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    print("| conversion | " + " | ".join(f"{b} bits" for b in DEFAULT_LADDER) + " |")
    print("|---|" + "---|" * len(DEFAULT_LADDER), flush=True)
    with tempfile.TemporaryDirectory() as args.work:
        rows = [row(args, "all levels", 1)]
        if args.calibration is None:
            rows.append(row(args, "--thorough", 1, scheme=SCHEMES["nested"].thorough()))
        nested_kl = {f["bits"]: f["kl"] for f in rows[0]["levels"]}
        rows += [row(args, f"{b} favoured", args.factor, favour=b) for b in args.favour]
        alone = [row(args, f"{b} alone", ALONE, favour=b) for b in args.alone]
        for down in args.down_bits:
            bits = [int(b) for b in down.split(",")]
            rows.append(row(args, f"w_down {down}", 1, down_bits=bits))
    print("\n| bits | nested | alone | nested costs |\n|---|---|---|---|")
    for b, single in zip(args.alone, alone, strict=True):
        kl = single["levels"][0]["kl"]
        print(f"| {b} | {nested_kl[b]:.6f} | {kl:.6f} | {100 * (nested_kl[b] / kl - 1):+.0f}% |")
    if args.json:
        head = {"command": sys.argv, "machine": platform.platform()}
        args.json.write_text(json.dumps({**head, "rows": rows + alone}, indent=1) + "\n")


if __name__ == "__main__":
    main()
