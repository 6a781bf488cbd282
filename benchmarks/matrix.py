"""Compares every family, from each kind of source, with the program that the source is made for.

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 && tar xf llama_cpp_python-*.tar.gz
    cd llama_cpp_python-0.3.36/vendor/llama.cpp && cmake -B build -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF \\
        && cmake --build build -j2 --target llama llama-quantize && cd -
    python benchmarks/matrix.py llama_cpp_python-0.3.36/vendor/llama.cpp

Tiny random checkpoints in bfloat16, 256 columns wide, are converted at 8 bits: from the Hugging Face directory, with
transformers on the same weights in float32 as the oracle, and from GGUF files that llama.cpp's own converter and
llama-quantize make of it, with llama.cpp on the same file. For "exported GGUF", `edgemoe export` made the file of the
converted checkpoint, and llama.cpp runs it. A row has the worst cosine of a position's logits, the share of positions
and layers where the same experts were chosen, the largest difference in standard deviations of the logits, and a number
of positions. Cosine and difference cover that many positions: those before the first where a router chose otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(_ROOT / "tests"), str(_ROOT / "benchmarks")]

import families  # noqa: E402
from gguf_sources import as_released, converted  # noqa: E402

import edgemoe  # noqa: E402
from edgemoe.convert.convert import convert  # noqa: E402
from edgemoe.convert.export.gguf_file import TYPES, export_gguf  # noqa: E402
from edgemoe.convert.gguf import GGUFCheckpoint  # noqa: E402
from edgemoe.convert.hf import HFCheckpoint  # noqa: E402
from edgemoe.errors import FormatError  # noqa: E402
from edgemoe.experts import Observer  # noqa: E402
from edgemoe.file.reader import open_moe  # noqa: E402

_TOKENS, _TEXTS = 24, 4
Run = tuple[np.ndarray, list[np.ndarray]]
"""Logits [T, V] of a text, and each layer's experts [T, K]."""
_WIDTHS = (
    "hidden_size", "intermediate_size", "moe_intermediate_size", "intermediate_size_mlp",
    "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size",
)  # fmt: skip
"""Widths that are set to 256, as Q4_K needs."""

_DELTA: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": [*["linear_attention"] * 3, "full_attention"],
    "full_attention_interval": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
# Settings that llama.cpp takes for granted, or that its formats cannot hold.
_CHANGES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"norm_topk_prob": False},
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_next": _DELTA,
    "qwen3_5_moe": {  # files without sections for positions in pictures do not load
        **_DELTA,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 2, 2],
        },
    },
    # llama.cpp rounds YaRN's range, which the released model does not: here it ends at 1.9996 and 2.
    "gpt_oss": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 273.0, "factor": 4.0,
            "original_max_position_embeddings": 16, "truncate": False,
        }
    },
    "deepseek_v2": {"q_lora_rank": 40},  # llama.cpp knows V2-Lite, which has none, by its 27 layers
    # The converter leaves out the growth of queries, which begins at this position.
    "mistral4": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 32,
            "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3,
        }
    },
    "granitemoehybrid": {"mamba_d_head": 64},
    # The heads together are as wide as their input, and one expert is shared, as in Ling-mini and -flash.
    "bailing_moe": {"head_dim": 64, "num_shared_experts": 1},
    "llama4_text": {"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1},
    "ernie4_5_moe": {"moe_num_shared_experts": 1, "intermediate_size": 512},
    "hunyuan_v1_moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 11158840.0}},
}  # fmt: skip

# Tensors that get a factor. In llama.cpp a sum of gates below 2**-14 counts as 2**-14, and ERNIE's bias can choose
# experts with such small gates.
_FACTORS: dict[str, tuple[str, float]] = {"ernie4_5_moe": ("mlp.gate.weight", 0.25)}

_OTHERS = ("phimoe",)
"""Families that llama.cpp computes differently: its router for Phi is a plain softmax."""

_KINDS = {"F16": "F16", "Q8_0": "Q8_0", "Q4_K": "Q4_K_S", "MXFP4": "MXFP4_MOE"}
"""Types of tensors, and the names that llama-quantize has for them."""


def _choice(experts: np.ndarray, gates: np.ndarray, name: str) -> np.ndarray:
    """Returns a router's choices in ascending order; for SparseMixer, with whether each gate is below 0.75."""
    return np.sort(2 * experts + (gates < 0.75) if name == "phimoe" else experts)


class Chosen(Observer):
    """An observer that keeps the choices of each layer."""

    def __init__(self) -> None:
        self.layers: dict[int, list[np.ndarray]] = {}
        self.family = ""

    def planned(self, routing: Any, plan: Any, residency: Any) -> None:
        """See `Observer.planned`."""
        choice = _choice(routing.experts, routing.gates, self.family)
        self.layers.setdefault(routing.layer, []).append(choice)


def ours(source: Any, texts: list[list[int]], out: Path) -> list[Run]:
    """Converts a source and runs the engine on texts."""
    seen, runs = Chosen(), []
    convert(source, out)
    with edgemoe.load(out, ram="2GiB", threads=1, observer=seen) as engine:
        seen.family = engine.config.family
        for ids in texts:
            seen.layers.clear()
            logits = engine.logits(ids)
            runs.append((logits, [np.concatenate(seen.layers[i]) for i in sorted(seen.layers)]))
    out.unlink()
    return runs


def transformers_on(name: str, path: Path, ids: list[int]) -> Run:
    """Runs transformers in float32."""
    gates: dict[int, np.ndarray] = {}
    logits, chosen = families.oracle(path, ids, gates if name == "phimoe" else None)
    return logits, [_choice(chosen[i], gates.get(i, np.ones(1)), name) for i in sorted(chosen)]


def llama_cpp_on(program: Path, file: Path, ids: list[int]) -> Run:
    """Runs llama.cpp."""
    out = [file.with_suffix(s) for s in (".logits", ".experts")]
    subprocess.run([program, file, *out, *map(str, ids)], check=True, capture_output=True)
    logits = np.fromfile(out[0], np.float32).reshape(len(ids), -1)
    rest, chosen = np.fromfile(out[1], np.int32), {}
    while len(rest):
        layer, k, tokens = rest[:3]
        chosen[int(layer)] = np.sort(rest[3 : 3 + k * tokens].reshape(tokens, k))
        rest = rest[3 + k * tokens :]
    return logits, [chosen[i] for i in sorted(chosen)]


def compared(mine: list[Run], others: list[Run]) -> str:
    """Returns the figures of a row."""
    same, got, true = [], [], []
    for (a, chosen), (b, expected) in zip(mine, others, strict=True):
        same.append(np.array([(x == y).all(-1) for x, y in zip(chosen, expected, strict=True)]))
        clean = np.logical_and.accumulate(same[-1].all(0))
        got.append(a[clean].astype(np.float64))
        true.append(b[clean].astype(np.float64))
    a, b, share = np.concatenate(got), np.concatenate(true), np.concatenate(same, 1).mean()
    cosine = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return f"{cosine.min():.5f} | {share:.1%} | {np.abs(a - b).max() / b.std():.3f} | {len(a)}"


def rows(name: str, folder: Path, llama_cpp: Path, program: Path) -> Iterator[str]:
    """Yields the rows of one family."""
    setting = {**families.SETTINGS[name], "hidden_size": 256}
    changes = {key: 256 for key in _WIDTHS if key in setting} | _CHANGES.get(name, {})
    import torch
    from safetensors.torch import load_file, save_file

    path, texts = folder / "hf", [families.random_ids(_TOKENS, seed=i) for i in range(_TEXTS)]
    families.make(name, path, dtype=torch.bfloat16, changes=changes)
    if name in _FACTORS:
        (end, factor), file = _FACTORS[name], path / "model.safetensors"
        tensors = load_file(file)
        save_file(
            {n: t * factor if n.endswith(end) else t for n, t in tensors.items()},
            file,
            {"format": "pt"},
        )
    expected = [transformers_on(name, path, ids) for ids in texts]
    got = compared(ours(HFCheckpoint(path), texts, folder / "x.moe"), expected)
    yield f"| {name} | HF bf16 | transformers | {got} |"
    if name in ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe"):
        convert(HFCheckpoint(path), folder / "y.moe")
        for kind in TYPES:
            file = folder / f"exported-{kind}.gguf"
            export_gguf(open_moe(folder / "y.moe"), file, kind=kind)
            mine = ours(HFCheckpoint(path), texts, folder / "x.moe")
            got = compared(mine, [llama_cpp_on(program, file, ids) for ids in texts])
            yield f"| {name} | exported GGUF {kind} | llama.cpp | {got} |"
    if name in _OTHERS:
        return
    try:
        whole = converted(as_released(path, folder / "released"), folder / "f32.gguf")
    except Exception as error:
        yield f"| {name} | GGUF | llama.cpp | {str(error).splitlines()[0][:80]} ||||"
        return
    for kind, asked in _KINDS.items():
        file = folder / f"{kind}.gguf"
        pure = ["--pure"] if kind == "Q4_K" else []
        command = [llama_cpp / "build/bin/llama-quantize", *pure, whole, file, asked, "1"]
        try:
            subprocess.run(command, check=True, capture_output=True)
            mine = ours(GGUFCheckpoint(file), texts, folder / "x.moe")
            result = compared(mine, [llama_cpp_on(program, file, ids) for ids in texts])
        except FormatError as error:
            result = f"refused: {str(error)[:80]} |||"
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode(errors="replace").strip().splitlines()[-1:] or [""]
            result = f"{Path(str(error.cmd[0])).name}: {said[0][:80]} |||"
        yield f"| {name} | GGUF {kind} | llama.cpp | {result} |"


def built(llama_cpp: Path, out: Path) -> Path:
    """Returns the program that prints llama.cpp's logits."""
    build, program = llama_cpp / "build", out / "llama_logits"
    libraries = [
        "src/libllama.a", "ggml/src/libggml.a", "ggml/src/libggml-cpu.a", "ggml/src/libggml-base.a"
    ]  # fmt: skip
    command = [
        os.environ.get("CXX", "g++"), "-O1", "-std=c++17", f"-I{llama_cpp}/include",
        f"-I{llama_cpp}/ggml/include", _ROOT / "benchmarks/llama_logits.cpp",
        *(build / name for name in libraries), "-lpthread", "-ldl", "-fopenmp", "-o", program,
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return program


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("llama_cpp", type=Path, help="a source tree of llama.cpp, built in build/")
    parser.add_argument(
        "--only", default="", help="families whose name contains one of these, by commas"
    )
    args = parser.parse_args()
    sys.path[:0] = [str(args.llama_cpp), str(args.llama_cpp / "gguf-py")]
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        program = built(args.llama_cpp, Path(scratch))
        print(
            "| family | source | oracle | worst cosine | same experts | largest difference | positions |"
        )
        print("|---|---|---|---|---|---|---|")
        for name in families.SETTINGS:
            if "-" in name or not any(part in name for part in args.only.split(",")):
                continue
            folder = Path(scratch) / name
            folder.mkdir()
            with contextlib.redirect_stderr(io.StringIO()):
                for i, row in enumerate(rows(name, folder, args.llama_cpp, program)):
                    # The list of families links to this anchor.
                    print(f'| <a id="{name}"></a>{row[2:]}' if i == 0 else row, flush=True)


if __name__ == "__main__":
    main()
