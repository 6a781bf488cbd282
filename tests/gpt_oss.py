"""gpt-oss checkpoints as they are released: experts in MXFP4."""

from __future__ import annotations

import json
from pathlib import Path

import families
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

Tensors = dict[str, torch.Tensor]


def release(path: Path) -> Tensors:
    """Writes a tiny checkpoint to the directory `path`; returns its random experts as transformers decodes them."""
    families.make("gpt_oss", path, dtype=torch.bfloat16)
    packed: Tensors = {}
    plain: Tensors = {}
    rng = np.random.default_rng(0)
    for name, t in load_file(path / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed[name] = t
            continue
        experts, inputs, outputs = t.shape
        codes = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), dtype=np.uint8)
        scales = rng.integers(118, 122, (experts, outputs, inputs // 32), dtype=np.uint8)
        packed[f"{name}_blocks"] = blocks = torch.from_numpy(codes)
        packed[f"{name}_scales"] = powers = torch.from_numpy(scales)
        plain[name] = convert_moe_packed_tensors(blocks, powers, dtype=torch.bfloat16)
        assert plain[name].shape == t.shape
    save_file(packed, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(config))
    return plain
