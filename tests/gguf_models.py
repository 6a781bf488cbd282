"""Writes checkpoints of tests/families.py as GGUF files.

Names are mapped by the gguf package. Values have the layout of llama.cpp's converter, and metadata are written key by
key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

Array = NDArray[Any]

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)\.weight")
_ARCHITECTURES = {
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
    "granitemoe": "granitemoe",
    "granitemoeshared": "granitemoe",
    "glm4_moe": "glm4moe",
    "ernie4_5_moe": "ernie4_5-moe",
    "minimax_m2": "minimax-m2",
    "hunyuan_v1_moe": "hunyuan-moe",
    "glm4_moe_lite": "deepseek2",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "mistral4": "mistral4",
    "bailing_moe": "bailingmoe2",
}


def save(
    path: Path,
    out: Path,
    *,
    quant: str = "F32",
    changes: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Array] | None = None,
    without: str = "$^",
) -> Path:
    """Writes a checkpoint directory as a GGUF file without a tokenizer.

    Args:
        path: the checkpoint directory.
        out: the file to write.
        quant: the type of the matrices.
        changes: metadata to add or replace, with keys without the architecture's name; None leaves a key out.
        tensors: tensors to add or replace, by their names in the file.
        without: a pattern; tensors whose names match are left out.
    """
    config = json.loads((path / "config.json").read_text())
    arch = _ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(out, arch)
    for key, value in {**metadata(config), **(changes or {})}.items():
        name = key if key.startswith(("split.", "tokenizer.")) else f"{arch}.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value)
    kind = gguf.GGMLQuantizationType[quant]
    for name, array in {**named(path, config, arch), **(tensors or {})}.items():
        if re.search(without, name):
            continue
        if array.ndim == 1 or array.dtype != np.float32 or quant == "F32":
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def split(path: Path, out: Path, count: int) -> list[Path]:
    """Writes a checkpoint as several GGUF files: metadata in the first, tensors distributed in turn."""
    config = json.loads((path / "config.json").read_text())
    tensors = list(named(path, config, "llama").items())
    parts = []
    for number in range(count):
        part = out / f"m-{number + 1:05}-of-{count:05}.gguf"
        writer = gguf.GGUFWriter(part, "llama")
        for key, value in metadata(config).items() if number == 0 else ():
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(
                f"llama.{key}", value
            )
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(tensors))
        for name, values in tensors[number::count]:
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        parts.append(part)
    return parts


def named(path: Path, config: Mapping[str, Any], arch: str) -> dict[str, Array]:
    """Returns a checkpoint's tensors with the names and values of a GGUF file."""
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    out: dict[str, Array] = {}
    stacks: dict[str, dict[int, Array]] = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        values = tensor.float().numpy()
        if match := _EXPERT.fullmatch(name):
            stacks.setdefault(f"{match[1]}.{match[3]}.weight", {})[int(match[2])] = values
            continue
        for part, array in _laid_out(name, values, config, arch):
            out[_name(part, names)] = np.ascontiguousarray(array)
    for name, found in stacks.items():
        name = name.replace("model.layers", "layers").replace("block_sparse_moe", "feed_forward")
        if "feed_forward" not in name:
            name = f"model.{name}"
        out[_name(name, names)] = np.stack([found[i] for i in range(len(found))])
    return out


def _laid_out(
    name: str, values: Array, config: Mapping[str, Any], arch: str
) -> list[tuple[str, Array]]:
    if arch in ("llama", "granitemoe") and (m := re.search(r"\.([qk])_proj\.", name)):
        heads = config["num_attention_heads" if m[1] == "q" else "num_key_value_heads"]
        halves = values.reshape(heads, 2, -1, *values.shape[1:])
        return [(name, halves.swapaxes(1, 2).reshape(values.shape))]
    if "input_linear" in name:
        gate, up = np.split(values, 2, axis=-2)
        start = name.replace("input_linear.weight", "")
        if "shared_mlp" in start:
            start = start.replace("shared_mlp", "mlp.shared_mlp")
            return [(f"{start}gate_proj.weight", gate), (f"{start}up_proj.weight", up)]
        start = start.replace("block_sparse_moe", "mlp.experts")
        return [(f"{start}gate_proj.weight", gate), (f"{start}up_proj.weight", up)]
    if name.endswith("gate.expert_bias"):
        return [(f"{name}.bias", values)]
    if name.endswith("e_score_correction_bias"):
        return [(name.replace("_bias", ".bias"), values.reshape(-1))]
    if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return [(f"{name}.weight", values)]
    if name.endswith("kv_b_proj.weight"):
        heads = values.reshape(config["num_attention_heads"], -1, config["kv_lora_rank"])
        k_b, v_b = np.split(heads, [config["qk_nope_head_dim"]], axis=1)
        start = name.replace("kv_b_proj.weight", "")
        return [(f"{start}k_b_proj.weight", k_b.swapaxes(1, 2)), (f"{start}v_b_proj.weight", v_b)]
    return [(name, values)]


def _name(name: str, names: Any) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return str(found)


def metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the metadata of a checkpoint; keys are without the architecture's name."""
    kind = config["model_type"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config["rope_parameters"]
    out: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(rope["rope_theta"]),
        "expert_count": next(
            config[key]
            for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
            if config.get(key)
        ),
        "expert_used_count": config.get("moe_topk")
        or config.get("moe_k")
        or config["num_experts_per_tok"],
    }
    if not kind.startswith("granite"):
        out |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if rope["rope_type"] == "yarn":
        out |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope["factor"],
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        }
    if kind in ("glm4_moe", "minimax_m2", "bailing_moe"):
        factor = rope.get("partial_rotary_factor", 1.0)
        out |= {"rope.dimension_count": int(head_dim * factor), "expert_gating_func": 2}
    if kind in ("glm4_moe", "bailing_moe"):
        out |= {
            "expert_shared_count": config["n_shared_experts"],
            "leading_dense_block_count": config["first_k_dense_replace"],
            "expert_weights_scale": config["routed_scaling_factor"],
            "expert_weights_norm": config["norm_topk_prob"],
            "expert_group_count": config["n_group"],
            "expert_group_used_count": config["topk_group"],
        }
    if "kv_lora_rank" in config:
        out |= _latents(config)
    if kind == "ernie4_5_moe":
        out |= {"interleave_moe_layer_step": config["moe_layer_interval"]}
    if kind.startswith("granite"):
        out |= {
            "attention.scale": config["attention_multiplier"],
            "embedding_scale": config["embedding_multiplier"],
            "residual_scale": config["residual_multiplier"],
            "logit_scale": config["logits_scaling"],
        }
    return out


def _latents(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the metadata of latent attention, and of the routers of families that have it."""
    latent, turned = config["kv_lora_rank"], config["qk_rope_head_dim"]
    dense = config.get("mlp_layer_types", []).count("dense")
    out = {
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": config["q_lora_rank"],
        "attention.kv_lora_rank": latent,
        "attention.key_length": latent + turned,
        "attention.value_length": latent,
        "attention.key_length_mla": config["qk_nope_head_dim"] + turned,
        "attention.value_length_mla": config["v_head_dim"],
        "rope.dimension_count": turned,
        "leading_dense_block_count": config.get("first_k_dense_replace", dense),
        "expert_shared_count": config["n_shared_experts"],
        "expert_weights_scale": config["routed_scaling_factor"],
        "expert_weights_norm": config["norm_topk_prob"],
        "expert_group_count": config["n_group"],
        "expert_group_used_count": config["topk_group"],
    }
    if config["model_type"] != "deepseek_v2":
        out["expert_gating_func"] = 1 if config["model_type"] == "mistral4" else 2
    rope = config["rope_parameters"]
    if rope.get("mscale_all_dim"):
        out["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    if rope.get("llama_4_scaling_beta"):
        out["attention.temperature_scale"] = rope["llama_4_scaling_beta"]
    return out
