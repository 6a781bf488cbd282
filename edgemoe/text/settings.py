"""How a model's files say that replies are sampled: what is honoured here, and what has no effect is named."""

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
"""Settings that are called here what they are called there."""

_NEUTRAL: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "encoder_repetition_penalty",
                     "guidance_scale"), lambda v: v == 1),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "diversity_penalty", "penalty_alpha", "epsilon_cutoff",
                     "eta_cutoff", "min_length", "min_new_tokens", "mirostat", "xtc_probability"), lambda v: v == 0),
    **dict.fromkeys(("remove_invalid_values", "token_healing", "is_assistant"), lambda v: v is False),
    "generation_kwargs": lambda v: v == {},
}  # fmt: skip
"""Settings that are not honoured, and whether a value of theirs has no effect anyway."""

_NO_EFFECT = frozenset({
    "do_sample", "early_stopping", "length_penalty", "renormalize_logits", "low_memory", "use_cache",
    "cache_implementation", "cache_config", "return_legacy_cache", "return_dict_in_generate",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind", "prompt_lookup_num_tokens", "max_matching_ngram_size",
    "disable_compile", "compile_config", "prefill_chunk_size", "transformers_version", "trust_remote_code",
    "mirostat_tau", "mirostat_eta", "xtc_threshold",
})  # fmt: skip
"""What says nothing of which token comes next, or only of beams and the like, which are named themselves."""


def model_sampling(
    content: bytes | None, *, vocab_size: int, context: int
) -> tuple[SamplingParams, tuple[str, ...]]:
    """Returns the defaults, with what a model's generation_config.json says of sampling instead.

    Args:
        content: of the file; None where there is none.
        vocab_size: tokens that there are.
        context: the model's own.

    Returns:
        How replies are sampled, and a line about each kind of setting that is not honoured: a file that others made
        must not stop a chat, nor be ignored without a word.
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
    """Says whether a setting is none of sampling: ids are the tokenizer's, the rest is for the making of the file."""
    is_id = name.endswith("_token_id") and not name.startswith("forced_")
    return name in _NO_EFFECT or name.startswith("_") or is_id


def _ours(name: str, value: Any, vocab_size: int, context: int) -> dict[str, Any] | None:
    """Returns a setting as fields of `SamplingParams`, none where it has no effect; None where it cannot be honoured.

    Raises:
        ValueError: the value is not one of its kind.
    """
    if name in _NEUTRAL:
        return {} if _NEUTRAL[name](value) else None
    if name == "max_length":  # of prompt and reply together
        return {} if type(value) is int and value >= context else None
    if name == "max_new_tokens":
        return {"max_tokens": value}
    if name == "top_k":
        return {"top_k": 0 if value == -1 else value}  # some say all so
    if name == "repetition_penalty":  # there it looks at all tokens, not only at the last
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
    """Refuses tokens that the model has not; what else is wrong `SamplingParams` says."""
    for item in value if isinstance(value, list) else ():
        if isinstance(item, list):
            _check_ids(item, vocab_size)
        elif type(item) is int and not 0 <= item < vocab_size:
            raise ValueError(f"expected tokens from 0 to {vocab_size - 1}, got {item}")
