"""The sampling settings in a model's files: which are honoured here; a note names those that are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from edgemoe.errors import FormatError, quoted
from edgemoe.file.parse import parse_json
from edgemoe.text.sampler import SamplingParams

__all__ = ["FILE", "model_sampling"]

FILE = "generation_config.json"

_SAME = frozenset({
    "temperature", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty", "repeat_last_n",
    "no_repeat_ngram_size", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids",
})  # fmt: skip
"""Settings with the same name here."""

_NEUTRAL: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "encoder_repetition_penalty",
                     "guidance_scale"), lambda v: v == 1),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "diversity_penalty", "penalty_alpha", "epsilon_cutoff",
                     "eta_cutoff", "min_length", "min_new_tokens", "mirostat", "xtc_probability"), lambda v: v == 0),
    **dict.fromkeys(("remove_invalid_values", "token_healing", "is_assistant"), lambda v: v is False),
    "generation_kwargs": lambda v: v == {},
}  # fmt: skip
"""Settings that are not honoured, and for each a test whether a value has no effect anyway."""

_NO_EFFECT = frozenset({
    "do_sample", "early_stopping", "length_penalty", "renormalize_logits", "low_memory", "use_cache",
    "cache_implementation", "cache_config", "return_legacy_cache", "return_dict_in_generate",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind", "prompt_lookup_num_tokens", "max_matching_ngram_size",
    "disable_compile", "compile_config", "prefill_chunk_size", "transformers_version", "trust_remote_code",
    "mirostat_tau", "mirostat_eta", "xtc_threshold",
})  # fmt: skip
"""Settings that do not influence which token comes next, or only with others, such as beams, that get a note."""


def model_sampling(
    content: bytes | None, *, vocab_size: int, context: int
) -> tuple[SamplingParams, tuple[str, ...]]:
    """Returns the sampling settings of a model's generation_config.json, and the defaults for the others.

    Args:
        content: the content of the file; None where there is none.
        vocab_size: the number of tokens of the model.
        context: the model's own context length, in tokens.

    Returns:
        How replies are sampled, and lines about settings that are not honoured. A downloaded file must neither stop a
        chat nor be ignored silently.
    """
    try:
        said = parse_json(content or b"{}", FILE)
    except FormatError as error:
        return SamplingParams(), (f"{error}; its settings are not used",)
    if not isinstance(said, dict):
        return SamplingParams(), (f"{FILE}: expected an object; its settings are not used",)
    params, notes, unknown = SamplingParams(), [], []
    for name, value in said.items():
        if value is None or _is_other(name):
            continue
        try:
            ours = _ours(name, value, vocab_size, context)
            if ours is None:
                unknown.append(f"{name} {quoted(value)}")
            else:
                params = replace(params, **ours)
        except (ValueError, OverflowError) as error:
            reason = str(error).removeprefix("sampling: ")
            notes.append(f"{FILE}: {quoted(name)} is not used: {reason}")
    if said.get("do_sample") is False:
        params = replace(params, temperature=0.0)
    elif said.get("do_sample") not in (None, True):
        unknown.append(f"do_sample {quoted(said['do_sample'])}")
    if unknown:
        notes.append(f"{FILE}: not used here: {', '.join(unknown)}")
    return params, tuple(notes)


def _is_other(name: str) -> bool:
    """Returns whether a setting is not about sampling: a token id, which the tokenizer reads, or one of no effect."""
    is_id = name.endswith("_token_id") and not name.startswith("forced_")
    return name in _NO_EFFECT or name.startswith("_") or is_id


def _ours(name: str, value: Any, vocab_size: int, context: int) -> dict[str, Any] | None:
    """Returns a setting as fields of `SamplingParams`: {} where it has no effect, None where it cannot be honoured.

    Raises:
        ValueError: the value is of the wrong kind.
    """
    if name in _NEUTRAL:
        return {} if _NEUTRAL[name](value) else None
    if name == "max_length":  # of prompt and reply together
        return {} if type(value) is int and value >= context else None
    if name == "max_new_tokens":
        return {"max_tokens": value}
    if name == "top_k":
        return {"top_k": 0 if value == -1 else value}  # some files write -1 for all
    if name == "repetition_penalty":  # in transformers it looks at all tokens
        return (
            {"repeat_penalty": value}
            if value == 1
            else {"repeat_penalty": value, "repeat_last_n": -1}
        )
    if name == "stop_strings":
        return {"stop": [value] if isinstance(value, str) else value}
    if name not in _SAME:
        return None
    if name == "bad_words_ids" or name.endswith("suppress_tokens"):
        _check_ids(value, vocab_size)
    return {name: value}


def _check_ids(value: Any, vocab_size: int) -> None:
    """Refuses tokens that the model does not have; `SamplingParams` checks the rest."""
    for item in value if isinstance(value, list) else ():
        if isinstance(item, list):
            _check_ids(item, vocab_size)
        elif type(item) is int and not 0 <= item < vocab_size:
            raise ValueError(f"expected tokens from 0 to {vocab_size - 1}, got {item}")
