"""Converts some layers of a published model under a kernel-enforced limit, and estimates the time for all layers.

    python benchmarks/conversion_memory.py Qwen3-30B-A3B|Qwen3.6-35B-A3B [--layers 2] [--bits 8] [--limit 2GiB]
        [--work DIR] [--out DIR]

The checkpoint has random weights in bfloat16 and the whole vocabulary, so its largest tensors are as in the release.
For Qwen3 it has three tensors per expert, for Qwen3.6 the experts of a layer are stacked. The time for all layers is in
proportion to the weights, with embedding and head counted once. Needs root. On a file system that shares blocks between
files (btrfs, xfs), a checkpoint of any number of layers takes 40 MB: name a folder there with `--work`. `--out` is the
folder for the converted file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import limits
import numpy as np

_ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(_ROOT / "tests"), str(_ROOT / "tests/convert")]

import families  # noqa: E402, F401 (keeps transformers off the net)
import transformers  # noqa: E402
from test_published import PUBLISHED, Shapes  # noqa: E402

from edgemoe.runtime.budget import parse_size  # noqa: E402

SETTINGS: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_experts": 128,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768,
        "num_experts_per_tok": 8, "vocab_size": 151936, "norm_topk_prob": True,
    },
    "Qwen3.6-35B-A3B": dict(PUBLISHED["Qwen3.6-35B-A3B"].settings),
}  # fmt: skip
_STACK = re.compile(r"(.*\.experts\.)(gate_up_proj|down_proj)\.(\d+)")


def stored(name: str, layers: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], int]:
    """Returns the config, the shapes of the tensors as the release stores them, and its number of layers."""
    whole = transformers.AutoConfig.for_model(**SETTINGS[name]).num_hidden_layers
    changes: dict[str, Any] = {"num_hidden_layers": layers}
    if "Qwen3.6" in name:
        kinds = ["linear_attention"] * layers
        changes["layer_types"] = [*kinds[1:], "full_attention"]
    shapes = Shapes(transformers.AutoConfig.for_model(**{**SETTINGS[name], **changes}))
    out: dict[str, tuple[int, ...]] = {}
    for tensor, shape in shapes.shapes.items():
        match = _STACK.fullmatch(tensor)
        if match is None:
            out[tensor] = shape
        elif "Qwen3.6" in name:
            stack = f"{match[1]}{match[2]}"
            out[stack] = (out.get(stack, (0,))[0] + 1, *shape)
        elif match[2] == "down_proj":
            out[f"{match[1]}{match[3]}.down_proj.weight"] = shape
        else:
            for part in ("gate_proj", "up_proj"):
                out[f"{match[1]}{match[3]}.{part}.weight"] = (shape[0] // 2, shape[1])
    return shapes.config, out, whole


def write(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> int:
    """Writes a checkpoint of random weights and returns the number of weights."""
    rng = np.random.Generator(np.random.SFC64(1))
    block = (rng.standard_normal(1 << 24, np.float32) * np.float32(0.02)).view(np.uint16)[1::2]
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 4096)  # so that the weights are whole blocks of the disk
    (folder / "config.json").write_text(json.dumps(config))
    noise = block.tobytes()
    with (folder / "model.safetensors").open("w+b") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.write(noise[:at])
        file.flush()
        begin, end = 8 + len(text), 8 + len(text) + at
        to = begin + len(noise)
        while to < end:
            size = min(len(noise), end - to)
            to += os.copy_file_range(file.fileno(), file.fileno(), size, begin, to)
    return at // 2


def main() -> None:
    """Prints a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=SETTINGS)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--limit", type=parse_size, default=2 << 30)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--work", type=Path, help="where the checkpoint is meanwhile")
    parser.add_argument("--out", type=Path, help="where the file is meanwhile; default: beside it")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=args.work) as scratch,
        tempfile.TemporaryDirectory(dir=args.out or scratch) as out,
    ):
        folder = Path(scratch) / "checkpoint"
        folder.mkdir()
        config, shapes, layers = stored(args.model, args.layers)
        count = write(folder, config, shapes)
        limits.drop_caches()
        done = limits.run(
            [
                sys.executable, "-m", "edgemoe", "convert", str(folder), f"{out}/m.moe", "--bits", str(args.bits),
            ],
            limit=args.limit, timeout=6 * 3600,
        )  # fmt: skip
        if done.code:
            sys.exit(f"edgemoe convert: {done.err[-500:]}")
        size = Path(out, "m.moe").stat().st_size
    once = sum(int(np.prod(s)) for n, s in shapes.items() if "layers." not in n)
    whole = once + (count - once) * layers // args.layers
    print(
        f"| {args.model} | {args.layers} of {layers} layers | {count / 1e9:.2f} G weights, {done.seconds:.0f} s, "
        f"{size / 1e9:.2f} GB | {whole / 1e9:.1f} G: {done.seconds * whole / count / 60:.0f} min | "
        f"limit {args.limit / 2**30:.2f} GiB, with page cache {done.group_peak / 2**30:.2f}, "
        f"without {done.anon_peak / 2**30:.2f}, swapped {done.swapped} |"
    )


if __name__ == "__main__":
    main()
