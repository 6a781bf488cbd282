"""RoPE frequencies equal those of transformers for every scaling; wrong parameters are refused."""

from __future__ import annotations

import families  # noqa: F401  (sets the hub offline before transformers is imported)
import numpy as np
import pytest
from transformers import MixtralConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

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
        ({"type": "mrope"}, "'mrope' is not supported"),
        ({"rope_type": 3}, "rope_type: expected a string"),
        ({"rope_type": "linear"}, "factor: is missing"),
        ({"rope_type": "linear", "factor": 0}, "factor: must be positive"),
        ({"rope_type": "linear", "factor": "2"}, "factor: expected a finite number"),
        ({"rope_theta": 0.5}, "rope_theta: must be above 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: must be 1"),
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
