"""Flags of other programs, such as llama.cpp, that people paste from recipes, and the answer to each."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["without_foreign"]

_ALREADY_SO = {
    "-cnv": "chatting is what happens without -p and -f",
    "--conversation": "chatting is what happens without -p and -f",
    "--jinja": "the model's chat template is used anyway",
    "--no-display-prompt": "the prompt is never repeated",
    "--mmap": "weights are read from the file as they are needed anyway",
    "--log-disable": "stdout has the reply alone anyway; --stats off ends the rest",
}
"""Flags for what edgemoe does anyway: they are dropped, with a note."""

_QUANT = "-hf user/repo:QUANT says which of a repository's GGUF files; leave it out"
_BUDGET = "there is one budget for all memory, --ram"
_LORA = "edgemoe convert LORA OUT.moea --base MODEL --checkpoint DIR makes an adapter of it, which --adapter takes"
_REFUSED = {
    "--lora": _LORA, "--lora-scaled": _LORA,
    "-hff": _QUANT, "--hf-file": _QUANT,
    "-ngl": _BUDGET, "--n-gpu-layers": _BUDGET, "--gpu-layers": _BUDGET,
    "-ncmoe": _BUDGET, "--n-cpu-moe": _BUDGET, "-cmoe": _BUDGET, "--cpu-moe": _BUDGET,
    "-ot": _BUDGET, "--override-tensor": _BUDGET, "--no-mmap": _BUDGET, "--mlock": _BUDGET,
    "-fa": "attention has one form here; leave it out",
    "--flash-attn": "attention has one form here; leave it out",
    "-b": "the budget decides how much of a prompt is computed at once; leave it out",
    "-ub": "the budget decides how much of a prompt is computed at once; leave it out",
    "--batch-size": "the budget decides how much of a prompt is computed at once; leave it out",
    "--ubatch-size": "the budget decides how much of a prompt is computed at once; leave it out",
    "-i": "chatting is what happens without -p and -f; leave it out",
    "--interactive": "chatting is what happens without -p and -f; leave it out",
    "--chat-template": "the model's own template is used, or none with --raw",
    "--prompt-cache": "/save and /load keep a conversation",
    "-q": "--stats off leaves out the line after a reply",
    "--quiet": "--stats off leaves out the line after a reply",
    "--verbose-prompt": "--stats full counts the prompt's tokens",
    "-e": "write $'a\\nb' in the shell, or use -f FILE",
    "--escape": "write $'a\\nb' in the shell, or use -f FILE",
}  # fmt: skip
"""Flags that cannot be honoured, and what to do instead."""


def without_foreign(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the arguments without flags for what edgemoe does anyway, and a note for each such flag.

    Raises:
        ValueError: a flag cannot be honoured; says what to do instead.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    kept: list[str] = []
    notes: list[str] = []
    for i, argument in enumerate(argv):
        flag = argument.partition("=")[0] if argument.startswith("--") else argument
        if i < end and flag in _REFUSED:
            raise ValueError(f"{flag}: {_REFUSED[flag]}")
        if i < end and argument in _ALREADY_SO:
            notes.append(f"{argument}: {_ALREADY_SO[argument]}")
        else:
            kept.append(argument)
    return kept, notes
