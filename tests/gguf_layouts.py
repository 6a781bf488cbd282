"""Writes checkpoints as GGUF files in the layout of llama.cpp's converter.

Names are mapped by the gguf package. Values are folded, joined, split and reordered as by the converter, and metadata
are written key by key.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Config = dict[str, Any]


def save(arch: str, config: Config, tensors: dict[str, Array], path: Path) -> Path:
    """Writes a checkpoint of the architecture `arch` as a GGUF file."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata(arch, config).items():
        if isinstance(value, list):
            writer.add_array(f"{arch}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{arch}.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"{arch}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{arch}.{key}", value)
    stacks: dict[str, dict[int, Array]] = {}
    for name, values in tensors.items():
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*)\.weight", name):
            stacks.setdefault(f"{match[1]}.{match[3]}.weight", {})[int(match[2])] = values
            continue
        for ours, array in laid_out(arch, config, name, values):
            writer.add_tensor(named(arch, ours), np.ascontiguousarray(array))
    for name, found in stacks.items():
        if "feed_forward" in name:  # the converter's names, once it has joined them
            name = name.removeprefix("model.")
        name = re.sub(r"backbone(\.layers\.\d+\.)mixer", r"model\1mlp", name)
        writer.add_tensor(named(arch, name), np.stack([found[i] for i in range(len(found))]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_LAGUNA = {
    "self_attn.g_proj.weight": "attn_gate.weight",
    "mlp.experts.e_score_correction.bias": "exp_probs_b.bias",
}


def named(arch: str, name: str) -> str:
    if name.startswith("blk."):
        return name
    if arch == "laguna":  # its other names are those of Qwen2-MoE, and norms of q and k
        layer, rest = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.*)", name).groups()
        if rest in _LAGUNA:
            return f"blk.{layer}.{_LAGUNA[rest]}"
        arch = (
            "qwen3moe"
            if "_norm." in rest
            else "deepseek2"
            if "self_attn" not in rest
            else "qwen2moe"
        )
        if "shared_expert" in rest:
            arch = "qwen2moe"
        if rest.startswith("mlp.") and "expert" not in rest and rest != "mlp.gate.weight":
            arch = "llama"
    number = next(n for n, a in gguf.MODEL_ARCH_NAMES.items() if a == arch)
    found = gguf.get_tensor_name_map(number, 8).get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, (arch, name)
    return str(found)


def permuted(values: Array, heads: int) -> Array:
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def tiled(values: Array, config: Config, dim: int, first: int = 0) -> Array:
    """Reorders value heads: those of one key head, which are adjacent, become interleaved with those of the others."""
    keys, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    rest = values[first:].reshape(keys, heads // keys, dim, *values.shape[1:])
    return np.concatenate([values[:first], rest.swapaxes(0, 1).reshape(values[first:].shape)])


def laid_out(arch: str, config: Config, name: str, values: Array) -> Iterator[tuple[str, Array]]:
    """Yields the tensors that a checkpoint's tensor becomes, by names that the gguf package can map."""
    layer = re.search(r"layers\.(\d+)\.", name)
    block = f"blk.{layer[1]}." if layer else ""
    if "e_score_correction_bias" in name:
        name = name.replace("_bias", ".bias")
    if arch in ("qwen35moe", "qwen3next"):
        if name.endswith("norm.weight") and "linear_attn" not in name:
            values = values + np.float32(1)
        if name.endswith("dt_bias"):
            name = name.replace("dt_bias", "dt_proj.bias")
        if name.endswith("A_log"):
            values = -np.exp(values)
        if "conv1d" in name:
            values = values.squeeze()
        yield from _delta(arch, config, name, values, block)
    elif arch == "gpt-oss":
        yield from _gpt_oss(name, values, block)
    elif arch == "kimi-linear" and "_conv1d" in name:
        yield name, values.reshape(1, -1, 1, values.shape[-1])
    elif arch == "kimi-linear" and name.endswith("A_log"):
        yield name, -np.exp(values)
    elif arch == "kimi-linear" and name.endswith("dt_bias"):
        yield name.replace("dt_bias", "dt_proj.bias"), values
    elif "kv_b_proj" in name:
        heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
        both = values.reshape(heads, nope + config["v_head_dim"], -1)
        yield name.replace("kv_b", "k_b"), both[:, :nope].transpose(0, 2, 1)
        yield name.replace("kv_b", "v_b"), both[:, nope:]
    elif arch == "gemma4" and name.endswith("router.scale"):
        yield f"{block}ffn_gate_inp.scale", values
    elif arch == "gemma4" and name.endswith("per_expert_scale"):
        yield f"{block}ffn_down_exps.scale", values
    elif arch in ("granitehybrid", "nemotron_h_moe"):
        yield from _mamba(arch, config, name, values)
    elif arch == "llama4" and name.endswith("gate_up_proj"):
        gate, up = np.split(values.transpose(0, 2, 1), 2, axis=1)
        yield name.replace("gate_up_proj", "gate_proj.weight"), gate
        yield name.replace("gate_up_proj", "up_proj.weight"), up
    elif arch == "llama4" and name.endswith("experts.down_proj"):
        yield f"{name}.weight", values.transpose(0, 2, 1)
    else:
        if "conv.conv" in name:
            values = values.squeeze(1)
        if name.endswith("expert_bias"):
            name += ".bias"
        if name.endswith("layer_scalar") or (
            ".experts." in name and "." not in name.split("experts.")[1]
        ):
            name += ".weight"
        yield name, values


def _delta(
    arch: str, config: Config, name: str, values: Array, block: str
) -> Iterator[tuple[str, Array]]:
    keys, dim, wide = (
        config[f"linear_{x}"] for x in ("num_key_heads", "key_head_dim", "value_head_dim")
    )
    if "in_proj_qkvz" in name:
        ratio = config["linear_num_value_heads"] // keys
        heads = values.reshape(keys, -1, values.shape[1])
        cuts = np.split(heads, np.cumsum([dim, dim, ratio * wide]), axis=1)
        q, k, v, z = (cut.reshape(-1, values.shape[1]) for cut in cuts)
        yield f"{block}attn_qkv.weight", np.concatenate([q, k, v])
        yield f"{block}attn_gate.weight", z
        return
    if arch == "qwen35moe":
        if "in_proj_qkv." in name or "conv1d" in name:
            values = tiled(values, config, wide, 2 * keys * dim)
        elif "in_proj_z" in name:
            values = tiled(values, config, wide)
        elif "linear_attn.out_proj" in name:
            values = tiled(values.T, config, wide).T
        elif any(part in name for part in ("in_proj_a", "in_proj_b", "A_log", "dt_proj")):
            values = tiled(values, config, 1)
    yield name, values


def _gpt_oss(name: str, values: Array, block: str) -> Iterator[tuple[str, Array]]:
    if name.endswith("gate_up_proj_bias"):
        yield f"{block}ffn_gate_exps.bias", values[:, ::2]
        yield f"{block}ffn_up_exps.bias", values[:, 1::2]
    elif name.endswith("gate_up_proj"):
        rows = values.transpose(0, 2, 1)
        yield f"{block}ffn_gate_exps.weight", rows[:, ::2]
        yield f"{block}ffn_up_exps.weight", rows[:, 1::2]
    elif name.endswith("down_proj"):
        yield f"{block}ffn_down_exps.weight", values.transpose(0, 2, 1)
    else:
        name = name.replace("down_proj_bias", "down_proj.bias")
        yield name + ".weight" * name.endswith("sinks"), values


def _mamba(arch: str, config: Config, name: str, values: Array) -> Iterator[tuple[str, Array]]:
    for part, key in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if part in name:
            values = permuted(values, config[key])
    if "input_linear" in name:
        gate, up = np.split(values, 2, axis=-2)
        start = name.replace("input_linear.weight", "").replace("block_sparse_moe", "mlp.experts")
        start = start.replace("shared_mlp", "mlp.shared_mlp")
        yield f"{start}gate_proj.weight", gate
        yield f"{start}up_proj.weight", up
        return
    if "conv1d.weight" in name:
        values = values.squeeze()
    elif name.endswith("A_log"):
        values = -np.exp(values[:, None])
    elif name.endswith(".D"):
        values = values[:, None]
    elif name.endswith(("mamba.norm.weight", "mixer.norm.weight")):
        groups = config.get("mamba_n_groups") or config["n_groups"]
        values = values.reshape(groups, -1)
    yield name.replace("dt_bias", "dt_proj.bias"), values


def metadata(arch: str, config: Config) -> Config:
    """Returns the file's metadata of a checkpoint; keys are without the architecture's name."""
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    out: Config = {
        "block_count": layers,
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config.get("intermediate_size_mlp")
        or config.get("intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 10000.0,
        "expert_count": next(
            config[k]
            for k in ("num_local_experts", "num_experts", "n_routed_experts")
            if config.get(k)
        ),
        "expert_used_count": config["num_experts_per_tok"],
        "attention.key_length": _head_dim(config),
    }
    if "linear_num_key_heads" in config:
        out |= _linear(config)
    if arch in ("gpt-oss", "laguna"):
        out["attention.sliding_window"] = config["sliding_window"]
    return out | _OWN.get(arch, lambda config: {})(config)


def _linear(config: Config) -> Config:
    return {
        "ssm.group_count": config["linear_num_key_heads"],
        "ssm.time_step_rank": config["linear_num_value_heads"],
        "ssm.state_size": config["linear_key_head_dim"],
        "ssm.inner_size": config["linear_value_head_dim"] * config["linear_num_value_heads"],
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "rope.dimension_count": _head_dim(config) // 4,
    }


def _gpt_oss_metadata(config: Config) -> Config:
    rope = config["rope_parameters"]
    return {
        "rope.freq_base": rope["rope_theta"],
        "rope.scaling.type": rope["rope_type"],
        "rope.scaling.factor": rope["factor"],
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
    }


def _laguna(config: Config) -> Config:
    return {
        "attention.head_count": config["num_attention_heads_per_layer"],
        "leading_dense_block_count": 1,
    }


def _deepseek2(config: Config) -> Config:
    return {
        "attention.head_count_kv": 1,
        "attention.key_length": config["kv_lora_rank"] + config["qk_rope_head_dim"],
        "attention.value_length": config["kv_lora_rank"],
        "attention.key_length_mla": config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
        "attention.value_length_mla": config["v_head_dim"],
        "attention.q_lora_rank": config["q_lora_rank"],
        "attention.kv_lora_rank": config["kv_lora_rank"],
        "rope.dimension_count": config["qk_rope_head_dim"],
        "leading_dense_block_count": 1,
        "expert_gating_func": 2,
        "expert_group_count": config["n_group"],
        "expert_group_used_count": config["topk_group"],
    }


def _kimi_linear(config: Config) -> Config:
    return {
        "attention.head_count_kv": [int("full" in kind) for kind in _types(config)],
        "attention.key_length": config["kv_lora_rank"] + config["qk_rope_head_dim"],
        "attention.key_length_mla": config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
        "attention.value_length_mla": config["v_head_dim"],
        "attention.kv_lora_rank": config["kv_lora_rank"],
        "rope.dimension_count": config["qk_rope_head_dim"],
        "leading_dense_block_count": 0,
        "kda.head_dim": config["linear_head_dim"],
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
    }


def _gemma4(config: Config) -> Config:
    slides = [kind == "sliding_attention" for kind in _types(config)]
    return {
        "attention.key_length": config["global_head_dim"],
        "attention.key_length_swa": config["head_dim"],
        "attention.head_count_kv": [2 if slide else 1 for slide in slides],
        "attention.sliding_window_pattern": slides,
        "attention.sliding_window": config["sliding_window"],
        "expert_used_count": config["top_k_experts"],
    }


def _llama4(config: Config) -> Config:
    return {"interleave_moe_layer_step": config["interleave_moe_layer_step"]}


def _lfm2moe(config: Config) -> Config:
    return {
        "attention.head_count_kv": [2 if "attention" in kind else 0 for kind in _types(config)],
        "leading_dense_block_count": 1,
        "shortconv.l_cache": 3,
    }


def _mamba_metadata(
    heads: str, head_dim: str, state: str, groups: str, taps: str
) -> Callable[[Config], Config]:
    """Returns a function that makes the metadata of Mamba layers from a config whose fields have these names."""
    return lambda config: {
        "attention.head_count_kv": [0, 2, 0, 0],
        "ssm.time_step_rank": config[heads],
        "ssm.inner_size": config[heads] * config[head_dim],
        "ssm.state_size": config[state],
        "ssm.group_count": config[groups],
        "ssm.conv_kernel": config[taps],
    }


_OWN: dict[str, Callable[[Config], Config]] = {
    "deepseek2": _deepseek2,
    "gemma4": _gemma4,
    "gpt-oss": _gpt_oss_metadata,
    "kimi-linear": _kimi_linear,
    "laguna": _laguna,
    "lfm2moe": _lfm2moe,
    "llama4": _llama4,
    "granitehybrid": _mamba_metadata(
        "mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups", "mamba_d_conv"
    ),
    "nemotron_h_moe": _mamba_metadata(
        "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel"
    ),
}
"""By architecture, metadata that differ from the common ones or come besides."""


def _head_dim(config: Config) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _types(config: Config) -> list[str]:
    return config.get("layer_types") or []
