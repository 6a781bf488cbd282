"""A model's own sampling settings are honoured, or named if they are not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import GenerationConfig

from edgemoe.text.sampler import SamplingParams
from edgemoe.text.settings import model_sampling


def read(said: Any) -> tuple[SamplingParams, tuple[str, ...]]:
    content = said if said is None or isinstance(said, bytes) else json.dumps(said).encode()
    return model_sampling(content, vocab_size=100, context=512)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (None, {}),
        ({"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True},
         {"temperature": 0.6, "top_k": 20, "top_p": 0.95}),
        ({"temperature": 1, "min_p": 0.1, "typical_p": 0.9},
         {"temperature": 1.0, "min_p": 0.1, "typical_p": 0.9}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"repetition_penalty": 1.05}, {"repeat_penalty": 1.05, "repeat_last_n": -1}),
        ({"repetition_penalty": 1.0}, {}),
        ({"repetition_penalty": 1.05, "repeat_last_n": 32}, {"repeat_penalty": 1.05, "repeat_last_n": 32}),
        ({"presence_penalty": 1.5, "frequency_penalty": 0.5}, {"presence_penalty": 1.5, "frequency_penalty": 0.5}),
        ({"max_new_tokens": 2048}, {"max_tokens": 2048}),
        ({"stop_strings": "<|end|>"}, {"stop": ("<|end|>",)}),
        ({"stop_strings": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"suppress_tokens": [3], "begin_suppress_tokens": [4, 5]},
         {"suppress_tokens": (3,), "begin_suppress_tokens": (4, 5)}),
        ({"bad_words_ids": [[1, 2], [3]]}, {"bad_words_ids": ((1, 2), (3,))}),
        ({"no_repeat_ngram_size": 3}, {"no_repeat_ngram_size": 3}),
        ({"eos_token_id": [1, 2], "bos_token_id": 0, "pad_token_id": 0, "transformers_version": "5.0"}, {}),
        ({"num_beams": 1, "length_penalty": 2.0, "max_length": 512, "use_cache": True, "guidance_scale": None}, {}),
    ],
)  # fmt: skip
def test_what_is_said_is_honoured(said: Any, expected: dict[str, Any]) -> None:
    assert read(said) == (SamplingParams(**expected), ())


@pytest.mark.parametrize(
    ("said", "expected", "note"),
    [
        ({"num_beams": 4, "forced_eos_token_id": 2, "new_thing": [1]}, {},
         "not used here: num_beams 4, forced_eos_token_id 2, new_thing [1]"),
        ({"max_length": 20, "encoder_repetition_penalty": 1.2}, {},
         "not used here: max_length 20, encoder_repetition_penalty 1.2"),
        ({"do_sample": "no", "watermarking_config": {"bias": 1}}, {},
         "not used here: watermarking_config {'bias': 1}, do_sample 'no'"),
        ({"mirostat": 2, "mirostat_tau": 5.0, "xtc_probability": 0.5}, {},
         "not used here: mirostat 2, xtc_probability 0.5"),
        ({"temperature": -1, "top_p": 0.5}, {"top_p": 0.5},
         "'temperature' is not used: temperature: expected 0 or more, got -1.0"),
        ({"top_k": "many", "min_p": 0.1}, {"min_p": 0.1},
         "'top_k' is not used: top_k: expected a whole number, got 'many'"),
        ({"suppress_tokens": [3, 100]}, {}, "'suppress_tokens' is not used: expected tokens from 0 to 99, got 100"),
        ({"bad_words_ids": [[1, -1]]}, {}, "'bad_words_ids' is not used: expected tokens from 0 to 99, got -1"),
        ({"stop_strings": 3}, {}, "'stop_strings' is not used: stop: expected a list of texts, got 3"),
        (b"{", {}, "not valid JSON"),
        (b"[1]", {}, "expected an object; its settings are not used"),
        (b"[" * 100_000, {}, "its settings are not used"),
        (b'{"temperature": 1' + b"0" * 400 + b', "top_k": 7}', {"top_k": 7}, "'temperature' is not used"),
        ({"a" * 5000: "b" * 5000}, {}, "not used here: aaa"),
    ],
)  # fmt: skip
def test_what_is_not_honoured_is_named(said: Any, expected: dict[str, Any], note: str) -> None:
    params, notes = read(said)
    assert params == SamplingParams(**expected)
    (line,) = notes
    assert line.startswith("generation_config.json: ")
    assert note in line
    assert "\n" not in line


def test_every_setting_of_transformers_is_honoured_named_or_without_effect() -> None:
    """Values of a default configuration are ignored; any other value has an effect or is named."""
    config = GenerationConfig()
    fields = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    assert len(fields) > 40
    assert read({k: v for k, v in fields.items() if v is not None}) == (SamplingParams(), ())
    changed: dict[str, Any] = {
        "max_length": 20, "max_new_tokens": 5, "min_length": 3, "min_new_tokens": 3, "stop_strings": ["x"],
        "max_time": 3.0, "do_sample": False, "num_beams": 2, "temperature": 0.3, "top_k": 3, "top_p": 0.3,
        "min_p": 0.3, "top_h": 0.3, "typical_p": 0.3, "epsilon_cutoff": 0.3, "eta_cutoff": 0.3,
        "repetition_penalty": 1.3, "encoder_repetition_penalty": 1.3, "no_repeat_ngram_size": 3,
        "encoder_no_repeat_ngram_size": 3, "bad_words_ids": [[3]], "forced_bos_token_id": 3,
        "forced_eos_token_id": 3, "remove_invalid_values": True, "exponential_decay_length_penalty": [3, 1.1],
        "suppress_tokens": [3], "begin_suppress_tokens": [3], "sequence_bias": [[[3], 1.0]],
        "token_healing": True, "guidance_scale": 3.0, "watermarking_config": {"bias": 2.0},
        "num_return_sequences": 3, "penalty_alpha": 0.3, "dola_layers": "low",
    }  # fmt: skip
    for name, value in changed.items():
        params, notes = read({name: value})
        assert (params != SamplingParams()) != bool(notes), name
