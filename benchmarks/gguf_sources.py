"""Converts tiny checkpoints of every family with llama.cpp's own converter and compares what edgemoe reads from both.

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 && tar xf llama_cpp_python-*.tar.gz
    python benchmarks/gguf_sources.py llama_cpp_python-0.3.36/vendor/llama.cpp

A row says, for one of the settings in tests/families.py, whether the config is the same and how many tensors differ in
any bit. With `--keep DIR` checkpoints and GGUF files stay in DIR.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

_ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(_ROOT / "tests"))

import families  # noqa: E402

from edgemoe.config import dense_tensors  # noqa: E402
from edgemoe.convert.gguf import GGUFCheckpoint  # noqa: E402
from edgemoe.convert.hf import HFCheckpoint  # noqa: E402
from edgemoe.convert.source import SourceModel  # noqa: E402
from edgemoe.errors import FormatError  # noqa: E402

# Keys of released files that transformers 5 leaves out or renames when it saves.
_AS_RELEASED: dict[str, dict[str, Any]] = {
    "minimax_m2": {"scoring_func": "sigmoid"},
    "deepseek_v3": {"scoring_func": "sigmoid"},
    "glm4_moe_lite": {"scoring_func": "sigmoid"},
    "kimi_linear": {"scoring_func": "sigmoid"},
    "bailing_hybrid": {"scoring_func": "sigmoid"},
    "bailing_moe": {"architectures": ["BailingMoeV2ForCausalLM"]},
}

_KIMI = {
    "max_position_embeddings": "model_max_length",
    "norm_topk_prob": "moe_renormalize",
    "n_group": "num_expert_group",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "n_shared_experts": "num_shared_experts",
}


def as_released(path: Path, out: Path) -> Path:
    """Copies a checkpoint with a config.json as the converter expects it; returns `out`."""
    shutil.copytree(path, out)
    file = out / "config.json"
    config = json.loads(file.read_text())
    kind = config["model_type"]
    config |= _AS_RELEASED.get(kind, {})
    if kind == "minimax_m2":
        config["rotary_dim"] = int(
            config["head_dim"] * config["rope_parameters"].get("partial_rotary_factor", 1.0)
        )
    if kind == "glm4_moe_lite":
        config["first_k_dense_replace"] = config["mlp_layer_types"].index("sparse")
    if kind == "hunyuan_v1_moe":
        layers = config["num_hidden_layers"]
        for key in ("moe_intermediate_size", "num_shared_expert", "moe_topk"):
            value = config.get(key) or {"moe_intermediate_size": config["intermediate_size"]}.get(
                key, 1
            )
            config[key] = value if isinstance(value, list) else [value] * layers
    if kind == "granitemoehybrid":
        config["layer_types"] = [
            {"linear_attention": "mamba", "full_attention": "attention"}.get(t, t)
            for t in config["layer_types"]
        ]
    if kind == "kimi_linear":
        full = [i + 1 for i, t in enumerate(config["layer_types"]) if t == "full_attention"]
        config["linear_attn_config"] = {
            "full_attn_layers": full,
            "kda_layers": [i + 1 for i, t in enumerate(config["layer_types"]) if i + 1 not in full],
            "head_dim": config["linear_head_dim"],
            "num_heads": config["linear_num_heads"],
            "short_conv_kernel_size": config["linear_conv_kernel_dim"],
        }
        config["first_k_dense_replace"] = config["mlp_layer_types"].index("sparse")
        for ours, theirs in _KIMI.items():
            config[theirs] = config.get(ours, config.get(theirs))
    if kind == "bailing_hybrid":
        config["head_dim"] = config.get("linear_head_dim") or config["head_dim"]
        config |= {
            "architectures": ["BailingMoeV3ForCausalLM"],
            "model_type": "bailing_moe_v3",  # whose keys transformers would rename
            "no_kda_lora": True,
            "gated_attention_proj_granularity_type": "head_wise",
            "moe_shared_expert_intermediate_size": config["moe_intermediate_size"],
        }
        for ours, theirs in _KIMI.items():
            config[ours] = config.get(ours, config.get(theirs))
            config[theirs] = config[ours]
    if kind == "gemma4_text":  # its converter counts the tokens
        vocabulary = {"vocab": {str(i): i for i in range(config["vocab_size"])}}
        (out / "tokenizer.json").write_text(json.dumps({"model": vocabulary, "added_tokens": []}))
    file.write_text(json.dumps(config))
    return out


def converted(path: Path, out: Path) -> Path:
    """Runs llama.cpp's converter on a checkpoint without a tokenizer."""
    import conversion
    import gguf
    from conversion.base import ModelBase

    arch = ModelBase.load_hparams(path, False)["architectures"][0]
    if arch == "Mistral4ForCausalLM":  # known to the converter only as a part of Mistral 3
        base = conversion.get_model_class("Mistral3ForConditionalGeneration").Mistral4Model
    else:
        base = conversion.get_model_class(arch)

    class Converter(base):  # type: ignore[misc, valid-type]
        model_arch = base.model_arch
        no_mtp = True

        def set_vocab(self) -> None:
            self._set_vocab_none()
            self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    Converter(path, gguf.LlamaFileType.ALL_F32, out).write()
    return out


def differences(ours: SourceModel, theirs: SourceModel) -> list[str]:
    """Returns the differences between two models, in words."""
    found = []
    for field in dataclasses.fields(ours.config):
        a, b = (getattr(m.config, field.name) for m in (ours, theirs))
        if a != b and field.name not in ("context_length", "eos_ids"):  # there is no tokenizer
            found.append(f"{field.name}: {a} and {b}")
    if found:
        return found
    names = [
        n
        for n in dense_tensors(ours.config)
        if not np.array_equal(ours.tensor(n), theirs.tensor(n))
    ]
    for layer in ours.config.moe_layers:
        for index in range(ours.config.num_experts):
            pairs = zip(ours.expert(layer, index), theirs.expert(layer, index), strict=True)
            if not all(np.array_equal(a, b) for a, b in pairs):
                names.append(f"experts.{layer}.{index}")
    return names


def main() -> None:
    """Prints a row for each of the settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("llama_cpp", type=Path, help="a source tree of llama.cpp")
    parser.add_argument("--only", default="", help="settings whose name contains this")
    parser.add_argument("--keep", type=Path, help="where checkpoints and files stay")
    args = parser.parse_args()
    sys.path[:0] = [str(args.llama_cpp), str(args.llama_cpp / "gguf-py")]
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        for name in families.SETTINGS:
            if args.only in name:
                try:
                    row = _row(name, folder / name)
                except Exception as error:  # its row says so, and the others go on
                    row = f"{type(error).__name__}: {error}"
                print(f"{name:32} {row}")


def _row(name: str, path: Path) -> str:
    families.make(name, path)
    file = converted(as_released(path, path / "released"), path / "f32.gguf")
    try:
        theirs = SourceModel(GGUFCheckpoint(file))
    except FormatError as error:
        return f"refused: {error}"
    found = differences(SourceModel(HFCheckpoint(path)), theirs)
    return "the same, bit for bit" if not found else f"{len(found)} differ: {'; '.join(found[:3])}"


if __name__ == "__main__":
    main()
