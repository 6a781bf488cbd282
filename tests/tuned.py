"""Fine-tunes of the tiny checkpoint."""

from __future__ import annotations

import numpy as np
from tiny import tiny_checkpoint

EXPERTS = ("0.mlp.experts.3", "1.mlp.experts.0", "1.mlp.experts.5")
"""The experts that `tune` changes by default."""
DENSE = (
    "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.o_proj.weight",
    "model.layers.1.mlp.gate.weight", "model.layers.0.post_attention_layernorm.weight",
    "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.shared_expert.up_proj.weight",
)  # fmt: skip


def tune(changed=EXPERTS, dense=(), *, seed=1, **options):
    """Returns the tiny checkpoint with different weights in some experts and dense tensors."""
    checkpoint, rng = tiny_checkpoint(**options), np.random.default_rng(seed)
    names = [f"model.layers.{e}.{part}_proj.weight" for e in changed for part in ("gate", "down")]
    for name in (*names, *dense):
        array = checkpoint.tensor(name)
        array += rng.normal(0, 0.3 * np.abs(array).mean(), array.shape).astype(np.float32)
    return checkpoint
