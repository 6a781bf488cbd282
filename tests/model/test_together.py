"""One call of the core gives what several give: for latent attention, and for a shared FFN beside experts."""

from __future__ import annotations

import families
import numpy as np
import pytest
from engines import with_slots

import edgemoe
from edgemoe.convert.convert import convert
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.file.reader import open_moe
from edgemoe.ops import attend_latents_in_steps, run_experts_in_steps
from edgemoe.ops.cpu import CpuOps

IDS = families.random_ids(60)
# Shared experts as wide as routed ones, wider, and with a gate; the second setting has full-rank queries.
SETTINGS = {
    "deepseek_v3": {"n_shared_experts": 1},
    "deepseek_v2": {"q_lora_rank": None},
    "glm4_moe_lite": {},
    "qwen3_next": {"shared_expert_intermediate_size": 32, "moe_intermediate_size": 32},
}


def logits(path):
    with edgemoe.load(path, threads=2) as engine:
        prompt = engine.logits(IDS[:50])
        return np.concatenate([prompt, *(engine.extend(IDS[i : i + 1]) for i in range(50, 60))])


@pytest.mark.parametrize("name", SETTINGS)
def test_one_call_gives_what_several_give(name, tmp_path, monkeypatch):
    path = tmp_path / "x.moe"
    convert(HFCheckpoint(families.make(name, tmp_path, changes=SETTINGS[name])), path)
    together = logits(path)
    with monkeypatch.context() as steps:
        steps.setattr(CpuOps, "attend_latents", attend_latents_in_steps)
        steps.setattr(CpuOps, "run_experts", run_experts_in_steps)
        assert np.array_equal(logits(path), together)
    # With room for few experts, none is in memory when a layer begins.
    moe = open_moe(path)
    with_slots(monkeypatch, 3 * int(moe.experts.sizes(len(moe.ladder)).max()) + (1 << 14), chunk=8)
    assert np.array_equal(logits(path), together)
