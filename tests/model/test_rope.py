"""RoPE frequencies equal those of transformers for every scaling; wrong parameters are refused."""

from __future__ import annotations

import contextlib
import dataclasses
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
from edgemoe.config import dense_tensors
from edgemoe.convert.convert import convert
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.convert.rope import _SCALINGS, check_rotated, rope, rotated_columns, score_gain
from edgemoe.convert.settings import Settings
from edgemoe.convert.source import SourceModel
from edgemoe.errors import FormatError
from edgemoe.experts import Observer
from edgemoe.file.reader import open_moe
from edgemoe.lab.quality.checkpoint import final_states
from edgemoe.model import Batch
from edgemoe.runtime.budget import Budget
from edgemoe.specs import RopeSpec

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
    return rope(settings, dim=32, default_theta=10_000.0)


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
        {**_LLAMA3, "high_freq_factor": 1.0, "original_max_position_embeddings": 1024},  # Scout's
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
        # vLLM's pull request 4930, by Qwen's team: YaRN is added, and the maximum stays as it was.
        (32768, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (160, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        (4096, {"rope_type": "yarn", "factor": 4.0}, 16384),
        # The maximum includes the factor already, or is larger.
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


@pytest.mark.parametrize("length", [2, 1024, 1025, 4096, 16384])
def test_longrope_is_that_of_the_sequence_s_length(length: int) -> None:
    parameters = {**_LONG, "original_max_position_embeddings": 1024, "rope_theta": 10_000.0}
    config = MixtralConfig(
        head_dim=32, max_position_embeddings=4096, rope_parameters=dict(parameters)
    )
    expected, scale = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=length)
    got = compute(parameters)
    np.testing.assert_allclose(got.of(length), expected.numpy(), rtol=2e-6)
    assert got.scale == pytest.approx(scale)
    assert (got.short_length, got.context_length) == (1024, 4096)


def test_longrope_reaches_as_far_as_its_factor() -> None:
    parameters = {**_LONG, "original_max_position_embeddings": 4096, "factor": 8.0}
    got = compute(parameters)
    assert (got.short_length, got.context_length) == (4096, 32768)
    assert compute({**_LONG, "original_max_position_embeddings": 4096}).short is None


def test_dynamic_says_where_it_ends_and_the_others_have_nothing_to_say() -> None:
    assert "of up to 4096 tokens" in compute({"rope_type": "dynamic", "factor": 4.0}).note
    for parameters in ({}, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "yarn"}):
        assert compute(parameters).note == ""


def test_text_in_mrope_is_turned_as_without() -> None:
    """In text the three positions of a token are equal; compared with a class of transformers that has M-RoPE."""
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
        ({"rope_type": "spiral"}, "rope_type: 'spiral' is not supported; supported:"),
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
        ({**_LLAMA3, "low_freq_factor": 4.1}, "low_freq_factor: must be at most"),
        ({**_LLAMA3, "low_freq_factor": None}, "low_freq_factor: is missing"),
        ({"rope_type": "yarn", "original_max_position_embeddings": 1}, "whole number from 2"),
    ],
)
def test_refuses_wrong_parameters(parameters: dict, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        compute(parameters)


_SMALL, _LARGE = 5e-324, 1.7e308
_NUMBERS = (
    "factor", "rope_theta", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor", "alpha", "mscale",
    "mscale_all_dim", "attention_factor", "partial_rotary_factor", "llama_4_scaling_beta",
)  # fmt: skip


@pytest.mark.parametrize("kind", [*_SCALINGS, "longrope"])
def test_any_number_gives_finite_frequencies_or_a_refusal(kind: str) -> None:
    usual = {**_LLAMA3, **_LONG, "rope_type": kind}
    changes = [{key: v} for key in _NUMBERS for v in (_SMALL, 1 + 2e-16, _LARGE)]
    changes += [{"mscale": a, "mscale_all_dim": b} for a in (1, _LARGE) for b in (_SMALL, _LARGE)]
    for change in changes:
        settings = Settings({"max_position_embeddings": 4096, "rope_parameters": usual | change})
        for dim in (2, 4, 32):
            for read in (
                lambda s, d: rope(s, dim=d, default_theta=1e4).frequencies,
                lambda s, d: score_gain(s),
                rotated_columns,
                lambda s, d: check_rotated(s, d, d),
            ):
                with contextlib.suppress(FormatError):
                    found = read(settings, dim)
                    assert found is None or np.isfinite(found).all(), change


@pytest.mark.parametrize(("alpha", "dim"), [(1e307, 32), (_LARGE, 32), (2.0, 2), (1e-320, 4)])
def test_an_alpha_without_a_base_is_refused(alpha: float, dim: int) -> None:
    parameters = {"rope_type": "dynamic", "alpha": alpha}
    settings = Settings({"max_position_embeddings": 4096, "rope_parameters": parameters})
    with pytest.raises(FormatError, match=f"alpha: .* base above 1 for {dim} columns"):
        rope(settings, dim=dim, default_theta=1e4)


# ---------------------------------------------------------------- in the engine


def make(path: Path, **changes: Any) -> Path:
    """Writes a Mixtral in which each token uses all experts, so that logits can be compared at every position.

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
    """Returns the largest difference of logits, in standard deviations of the true ones."""
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


# ---------------------------------------------------------------- frequencies by length

SHORT, LONG = 64, 200


@pytest.fixture(scope="module")
def longrope(tmp_path_factory):
    """A model whose frequencies change after 64 tokens: the checkpoint and the file."""
    path = tmp_path_factory.mktemp("longrope")
    scaling = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": SHORT, "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.3],
        "long_factor": [3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0],
    }  # fmt: skip
    make(path / "source", max_position_embeddings=4 * SHORT, rope_parameters=scaling)
    convert(HFCheckpoint(path / "source"), path / "x.moe")
    return path / "source", path / "x.moe"


IDS = families.random_ids(LONG)


@pytest.fixture(scope="module")
def fresh(longrope):
    """By n, the logits of the last of the first n tokens, computed as a new sequence."""
    with edgemoe.load(longrope[1]) as engine:
        return {n: engine.logits(IDS[:n])[-1] for n in (1, 30, *range(SHORT - 4, SHORT + 6), LONG)}


@pytest.mark.parametrize("length", [40, SHORT, SHORT + 1, LONG])
def test_a_sequence_has_the_frequencies_of_its_length(longrope, length: int) -> None:
    expected, _ = families.oracle(longrope[0], IDS[:length])
    other = IDS[:40] if length > SHORT else IDS[: SHORT + 1]
    wrong, _ = families.oracle(longrope[0], other)
    with edgemoe.load(longrope[1]) as engine:
        got = engine.logits(IDS[:length])
    assert distance(got, expected) < 0.1
    n = min(length, len(other))
    assert distance(wrong[:n], expected[:n]) > 0.3  # the other frequencies are far off


def test_growing_past_the_original_length_gives_the_bits_of_a_fresh_sequence(
    longrope, fresh, monkeypatch
) -> None:
    real = Budget.divide.__func__
    for chunk, step in ((512, 1), (16, 1), (7, 5), (1, 3)):

        def divide(cls, moe, _chunk=chunk, **kwargs):
            return dataclasses.replace(real(cls, moe, **kwargs), chunk=_chunk)

        with monkeypatch.context() as patch:
            patch.setattr(Budget, "divide", classmethod(divide))
            with edgemoe.load(longrope[1]) as engine:
                n = SHORT - 4
                assert np.array_equal(engine.logits(IDS[:n])[-1], fresh[n])
                while n + step < SHORT + 6:
                    n += step
                    got = engine.extend(IDS[n - step : n])[-1]
                    assert np.array_equal(got, fresh[n]), (chunk, n)
                assert np.array_equal(engine.extend(IDS[n:])[-1], fresh[LONG])
                assert np.array_equal(engine.logits(IDS[:30])[-1], fresh[30])  # and back


def test_replies_and_edits_of_a_chat_take_the_frequencies_of_their_length(longrope) -> None:
    greedy = edgemoe.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with edgemoe.load(longrope[1]) as engine:
        made = list(engine.generate(IDS[: SHORT - 3], greedy))
        grown = [*IDS[: SHORT - 3], *made]
        assert engine.stats.cached_tokens == 0
        again = list(engine.generate([*grown, 5], greedy))  # a longer one reuses everything
        assert engine.stats.cached_tokens == len(grown) - 1
        list(engine.generate(IDS[:30], greedy))  # a shorter one has other frequencies
        assert engine.stats.cached_tokens == 0
        list(engine.generate(IDS[:31], greedy))
        assert engine.stats.cached_tokens == 30
        for prompt, reply in ((IDS[: SHORT - 3], made), ([*grown, 5], again)):
            for i, token in enumerate(reply):
                assert engine.logits([*prompt, *reply[:i]])[-1].argmax() == token


class StopsIn(Observer):
    """An observer that raises KeyboardInterrupt in the given call of a layer."""

    def __init__(self) -> None:
        self.left = -1

    def planned(self, routing, plan, residency) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("calls", [1, 2, 3, 6])
def test_what_ends_while_a_sequence_is_computed_again_costs_nothing(
    longrope, fresh, calls, monkeypatch
) -> None:
    real = Budget.divide.__func__

    def divide(cls, moe, **kwargs):
        return dataclasses.replace(real(cls, moe, **kwargs), chunk=16)

    monkeypatch.setattr(Budget, "divide", classmethod(divide))
    observer = StopsIn()
    with edgemoe.load(longrope[1], observer=observer) as engine:
        engine.logits(IDS[:SHORT])
        observer.left = calls
        with pytest.raises(KeyboardInterrupt):
            engine.extend(IDS[SHORT : SHORT + 1])
        assert np.array_equal(engine.extend(IDS[SHORT : SHORT + 1])[-1], fresh[SHORT + 1])
        # The same in a prompt that crosses the length, followed by a short prompt.
        engine.logits(IDS[:30])
        observer.left = calls
        with pytest.raises(KeyboardInterrupt):
            engine.extend(IDS[30:])
        observer.left = -1
        engine.logits(IDS[:1])
        assert np.array_equal(engine.extend(IDS[1:30])[-1], fresh[30])


def test_sequences_of_different_lengths_go_together(longrope, fresh) -> None:
    with edgemoe.load(longrope[1], sequences=3) as engine:
        model, (short, long) = engine.model, (engine.model.make_state() for _ in range(2))
        model.forward(Batch.of((short, np.array(IDS[:29], np.int32))))
        model.forward(Batch.of((long, np.array(IDS[:SHORT], np.int32))))
        parts = [(short, IDS[29:30]), (long, IDS[SHORT : SHORT + 1])]
        hidden = model.forward(Batch.of(*((s, np.array(ids, np.int32)) for s, ids in parts)))
        out = np.empty((2, 160), np.float32)
        model.logits(hidden, out, short)
        assert np.array_equal(out[0], fresh[30])
        assert np.array_equal(out[1], fresh[SHORT + 1])


@pytest.mark.parametrize("length", [40, 100])
def test_the_lab_s_own_forward_pass_has_them_too(longrope, length: int) -> None:
    model = SourceModel(HFCheckpoint(longrope[0]))
    expected, _ = families.oracle(longrope[0], IDS[:length])
    states = final_states(model, np.array([IDS[:length]], np.int32))[0]
    assert distance(states @ model.tensor("head").T, expected) < 1e-3


def test_files_without_it_are_as_they_were(tiny_moe) -> None:
    config = open_moe(tiny_moe).config
    assert "short_length" not in str(config.to_json())
    assert [name for name in dense_tensors(config) if name.startswith("rope")] == ["rope"]
    with pytest.raises(FormatError, match="short_length must be a whole number"):
        RopeSpec(dim=32, short_length=-1)


@pytest.mark.parametrize("where", [{}, {"rope_parameters": {}}, {"rope_scaling": {}}])
def test_another_share_of_a_head_is_refused(where: dict) -> None:
    inner = next(iter(where), None)
    values = {"partial_rotary_factor": 0.5}
    settings = Settings(values if inner is None else {inner: values})
    assert rotated_columns(settings, 32) == 16
    check_rotated(settings, 32, 16)
    with pytest.raises(FormatError, match="expected 1 for this family, got 0.5"):
        check_rotated(settings, 32, 32)
