"""RoPE frequencies equal those of transformers for every scaling; wrong parameters are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from transformers import MixtralConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextRotaryEmbedding

import edgemoe
from edgemoe.convert.convert import convert
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.convert.rope import rope
from edgemoe.convert.settings import Settings
from edgemoe.errors import FormatError

_LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 10 for i in range(16)],
    "long_factor": [2.0 + i for i in range(16)],
}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def compute(parameters: dict, *, context_length: int = 4096, **top):
    settings = Settings(
        {"max_position_embeddings": context_length, "rope_parameters": parameters, **top}
    )
    return rope(settings, head_dim=32, default_theta=10_000.0)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 1.0},
        {"rope_type": "yarn", "factor": 32.0, "beta_fast": 8.0, "beta_slow": 2.0},
        {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
        {"rope_type": "yarn", "factor": 40.0, "attention_factor": 1.25},
        {"rope_type": "yarn", "factor": 40.0, "truncate": False},
        {**_LONG, "original_max_position_embeddings": 1024},
        {**_LONG, "original_max_position_embeddings": 1024, "factor": 8.0},
        {**_LONG, "original_max_position_embeddings": 1024, "attention_factor": 1.5},
        {**_LONG, "original_max_position_embeddings": 4096},
        {**_LLAMA3, "original_max_position_embeddings": 1024},
    ],
    ids=lambda p: "-".join(
        f"{k}={v}" if k != "rope_type" else v
        for k, v in p.items()
        if not k.endswith(("short_factor", "long_factor"))
    ),
)
def test_equals_transformers(parameters: dict) -> None:
    parameters = {"rope_theta": 50_000.0, **parameters}
    config = MixtralConfig(
        head_dim=32, max_position_embeddings=4096, rope_parameters=dict(parameters)
    )
    expected, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, seq_len=4096)
    got = compute(parameters)
    assert got.frequencies.dtype == np.float32
    np.testing.assert_allclose(got.frequencies, expected.numpy(), rtol=2e-6)
    assert got.scale == pytest.approx(scale)


@pytest.mark.parametrize("length", [2, 1024, 1025, 4096, 16384])
@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        {**_LLAMA3, "original_max_position_embeddings": 1024},
    ],
    ids=lambda p: p["rope_type"],
)
def test_one_set_of_frequencies_is_right_at_every_length(parameters: dict, length: int) -> None:
    config = MixtralConfig(
        head_dim=32,
        max_position_embeddings=4096,
        rope_parameters={"rope_theta": 10_000.0, **parameters},
    )
    expected, _ = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, seq_len=length)
    np.testing.assert_allclose(compute(parameters).frequencies, expected.numpy(), rtol=2e-6)


@pytest.mark.parametrize(
    ("max_positions", "parameters", "expected"),
    [
        # vLLM's pull request 4930, by Qwen's team: YaRN is added, and the maximum stays.
        (32768, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (160, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        (4096, {"rope_type": "yarn", "factor": 4.0}, 16384),
        # The maximum says it already, or says more.
        (131072, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (163840, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 163840),
        (163840, {"rope_type": "yarn", "original_max_position_embeddings": 4096}, 163840),
        (8192, {**_LLAMA3, "original_max_position_embeddings": 8192}, 65536),
        (131072, {**_LLAMA3, "original_max_position_embeddings": 8192}, 131072),
        (4096, {"rope_type": "linear", "factor": 2.5}, 10240),
        (4096, {"rope_type": "linear", "factor": 0.5}, 4096),
        (8192, {"rope_type": "linear", "factor": 2, "original_max_position_embeddings": 4096}, 8192),
        (4096, {"rope_type": "dynamic", "factor": 4.0}, 4096),
        (4096, {}, 4096),
    ],
)  # fmt: skip
def test_what_a_scaling_is_for_can_be_used(
    max_positions: int, parameters: dict, expected: int
) -> None:
    assert compute(parameters, context_length=max_positions).context_length == expected


def test_dynamic_says_where_it_ends_and_the_others_have_nothing_to_say() -> None:
    assert "of up to 4096 tokens" in compute({"rope_type": "dynamic", "factor": 4.0}).note
    for parameters in ({}, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "yarn"}):
        assert compute(parameters).note == ""


def test_text_in_mrope_is_turned_as_without() -> None:
    """Its three positions of a token are the same; by a class of transformers that has it."""
    parameters = {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [4, 6, 6]}
    config = Qwen3VLMoeTextConfig(head_dim=32, rope_parameters=dict(parameters))
    positions = torch.arange(50)
    expected, _ = Qwen3VLMoeTextRotaryEmbedding(config)(torch.zeros(1), positions.expand(3, 1, 50))
    for kind in ("default", "mrope"):
        got = compute({**parameters, "rope_type": kind})
        angles = np.outer(positions, got.frequencies)
        np.testing.assert_allclose(np.cos(angles), expected[0, :, :16], atol=2e-5)


def test_default_and_where_theta_is_found() -> None:
    exponents = np.arange(0, 32, 2) / 32
    for parameters, top, theta in (
        ({}, {}, 10_000.0),
        ({}, {"rope_theta": 500.0}, 500.0),
        ({"rope_theta": 700.0}, {"rope_theta": 500.0}, 700.0),
    ):
        got = compute(parameters, **top)
        np.testing.assert_allclose(got.frequencies, theta**-exponents, rtol=1e-6)
        assert got.scale == 1.0


def test_original_length_beside_the_parameters_wins() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    top = compute(yarn, original_max_position_embeddings=64)
    inside = compute(yarn | {"original_max_position_embeddings": 64})
    np.testing.assert_array_equal(top.frequencies, inside.frequencies)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "proportional"}, "rope_type: 'proportional' is not supported; supported:"),
        ({"type": "su"}, "'su' is not supported"),
        (
            {"rope_type": "linear", "factor": 4096.0},
            "factor: 1.67772e\\+07 positions are more than",
        ),
        ({"rope_type": "yarn", "factor": 1e300}, "factor: .* positions are more than the 16777215"),
        ({"rope_type": 3}, "rope_type: expected a string"),
        ({"rope_type": "linear"}, "factor: is missing"),
        ({"rope_type": "linear", "factor": 0}, "factor: must be positive"),
        ({"rope_type": "linear", "factor": "2"}, "factor: expected a finite number"),
        ({"rope_theta": 0.5}, "rope_theta: must be above 1"),
        (
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor: expected 1 for this family, got 0.5",
        ),
        ({"full_attention": {"rope_theta": 1e4}}, "differs by layer"),
        ({**_LONG, "long_factor": [1.0]}, "long_factor: expected 16 numbers, got 1"),
        (
            {**_LONG, "short_factor": [0.0] * 16},
            "short_factor: expected a list of positive numbers",
        ),
        ({"rope_type": "yarn", "beta_fast": -1.0}, "beta_fast: must be positive"),
        ({"rope_type": "yarn", "beta_fast": 1e-320}, "beta_fast: is beyond"),
        ({"rope_type": "yarn", "beta_slow": 1e308}, "beta_slow: is beyond"),
        ({"rope_type": "linear", "factor": 1e-320}, "rope_type: linear gives frequencies that are"),
        ({"rope_type": "yarn", "factor": 10**400}, "factor: expected a finite number"),
        ({"rope_type": "yarn", "original_max_position_embeddings": 10**400}, "whole number from 2"),
        ({**_LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor: must be below"),
        ({**_LLAMA3, "low_freq_factor": None}, "low_freq_factor: is missing"),
        ({"rope_type": "yarn", "original_max_position_embeddings": 1}, "whole number from 2"),
    ],
)
def test_refuses_wrong_parameters(parameters: dict, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        compute(parameters)


# ---------------------------------------------------------------- in the engine


def make(path: Path, **changes: Any) -> Path:
    """Writes a Mixtral of which each token takes all experts, so that logits can be compared to the last one.

    Args:
        changes: keys of config.json, as users and recipes add them.
    """
    families.make(
        "mixtral", path, changes={"num_local_experts": 2, "head_dim": 16, "vocab_size": 160}
    )
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    return path


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of logits, in standard deviations of the true ones."""
    return float(np.abs(got - expected).max() / expected.std())


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {**_LLAMA3, "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "linear", "factor": 4.0},
    ],
    ids=lambda p: p["rope_type"],
)
def test_a_recipe_that_leaves_the_maximum_gives_the_longer_context(
    scaling: dict, tmp_path: Path
) -> None:
    path = make(tmp_path / "source", rope_parameters={"rope_theta": 1e4, **scaling})
    convert(HFCheckpoint(path), tmp_path / "x.moe")
    with pytest.raises(ValueError, match=r"context: expected 1 to 256 \(the model's\), got 257"):
        edgemoe.load(tmp_path / "x.moe", context=257)
    ids = families.random_ids(256)
    expected, _ = families.oracle(path, ids)
    with edgemoe.load(tmp_path / "x.moe", context=256) as engine:
        got = engine.logits(ids)
    assert distance(got, expected) < 0.1  # 0.2 to 0.4 without the scaling
