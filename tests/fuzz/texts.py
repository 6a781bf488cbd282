"""Fuzzers of a model's text files: tokenizers and chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from tiny import tokenizer_files
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from edgemoe.errors import FormatError
from edgemoe.text.settings import model_sampling
from edgemoe.text.template import ChatTemplate
from edgemoe.text.tokenizer import Tokenizer
from fuzz.mutate import TEXTS, change_bytes, change_value, json_bytes
from fuzz.target import Case, Target

_SAID = (
    "Hello world, it's 12 o'clock.",
    "a" * 28 + "!",
    "naïve 🐋\u202e\n\n\t  ",
    "<|im_start|>user\nx<|im_end|>",
    "",
)
_EVIL = (
    "(a+)+$", "(a|aa)+$", "(.*)*x", "(?:x+x+)+y", "((a{1,99}){1,99}){1,99}", "(?<=a+)b", "[", "\\p{Nope}", "(?i)" * 99,
    "", "^", "(?=)", "a{99999}", "(" * 5000,
)  # fmt: skip
_MESSAGES = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>there</b>"},
    {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "12 " * 200},
]  # fmt: skip


def _unigram() -> bytes:
    vocab = [
        ("<unk>", 0.0),
        ("<s>", 0.0),
        ("</s>", 0.0),
        ("▁", -2.0),
        ("▁a", -1.0),
        ("b", -1.5),
        ("ab", -1.0),
    ]
    out = Backend(
        models.Unigram(vocab + [(f"<0x{i:02X}>", -9.0) for i in range(256)], 0, byte_fallback=True)
    )
    out.pre_tokenizer = pre_tokenizers.Metaspace()
    out.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return out.to_str().encode()


def _tokenizers() -> list[Case]:
    files = tokenizer_files()
    generation = {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "eos_token_id": [257, 258],
        "do_sample": True,
    }
    special = {
        "bos_token": {"content": "<|endoftext|>", "special": True},
        "eos_token": "<|im_end|>",
    }
    files |= {
        "generation_config.json": json.dumps(generation).encode(),
        "special_tokens_map.json": json.dumps(special).encode(),
    }
    split = json.loads(files["tokenizer.json"])
    split["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": "\\d{1,3}|\\p{L}+|."},
                "behavior": "Isolated",
                "invert": False,
            },
            split["pre_tokenizer"],
        ],
    }
    return [
        files,
        {**files, "tokenizer.json": _unigram()},
        {**files, "tokenizer.json": json.dumps(split).encode()},
    ]


def _change_tokenizer(rng: Random, case: Case) -> Case:
    name = rng.choice(("tokenizer.json", "tokenizer.json", *case))
    try:
        value = json.loads(case[name])
        if name == "tokenizer.json" and rng.random() < 0.25:
            pattern = {"Regex": rng.choice(_EVIL)}
            split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
            replace = {
                "type": "Replace",
                "pattern": pattern,
                "content": rng.choice(("", "ab" * 30)),
            }
            value[rng.choice(("pre_tokenizer", "normalizer"))] = rng.choice((split, replace))
            return {**case, name: json_bytes(rng, value)}
        return {**case, name: json_bytes(rng, change_value(rng, value))}
    except (ValueError, RecursionError, TypeError):
        return {**case, name: change_bytes(rng, case[name])}


def _use_tokenizer(folder: Path) -> None:
    files = {f.name: f.read_bytes() for f in folder.iterdir()}
    model_sampling(files.get("generation_config.json"), vocab_size=259, context=512)
    made = Tokenizer.from_files(files)
    for text in _SAID:
        try:
            ids = made.encode(text)
        except ValueError:
            continue
        made.decode(ids[:200], skip_special=False)
        stream = made.stream()
        for token in [*ids[:200], made.vocab_size - 1, 0]:
            stream.push(token)
        stream.flush()
    if made.has_chat_template:
        made.read_templates()
        try:
            made.render_chat(_MESSAGES, most_characters=100_000)
        except FormatError:
            raise
        except ValueError:
            pass


_PIECES = (
    "{{ messages }}", "{{ messages[0]['content'] }}", "{% for m in messages %}{{ m.role }}{% endfor %}", "{{ bos_token }}",
    "{% set x = 1 %}", "{% set ns = namespace(a=0) %}{% set ns.a = ns.a + 1 %}", "{% if x %}y{% else %}z{% endif %}",
    "{{ 'a' * 3000000000 }}", "{{ '%2000000000d' % 1 }}", "{{ '{:500000000}'.format(1) }}", "{{ [0] * 99999999 }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}", "{{ range(10**9) | list }}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "{{ 9 ** 9 ** 9 }}", "{{ (1 << 99999) }}",
    "{{ messages | tojson }}", "{{ messages | tojson(indent=9999) }}", "{{ 'x' | center(99999999) }}",
    "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{{ self }}", "{{ loop }}", "{{ lipsum(99999) }}",
    "{{ messages | map(attribute='__class__') | list }}", "{{ raise_exception('\x1b[2J' * 999) }}", "{{ strftime_now('%Y') }}",
    "{% generation %}x{% endgeneration %}", "{% include 'a' %}", "{% extends 'a' %}", "{% block b %}{% endblock %}",
    "{{ 'abc' | replace('', 'x' * 999) }}", "{{ 'ab'.join(['x' * 9999] * 9999) }}", "{{ messages | batch(1, 'x' * 99999) | list }}",
    "{{ messages | sort(attribute='content') | groupby('role') | list }}", "{{ '\\n' | indent(99999999) }}", "{# c #}",
    "{% filter upper %}{{ messages }}{% endfilter %}", "{% call f() %}{% endcall %}", "{{ 'x' | wordwrap(0) }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "{{ dict(a=1).items() | list }}", "{{ 1 / 0 }}",
    "{{ x.y.z }}", "{{ messages[-1:0:-1] | reverse | join(',') }}", "{% raw %}{{{% endraw %}", "{{ 1e999 | int }}",
    "{{ ('a,' * 99999).split(',') | unique | list | length }}", "{{ ' ' | wordcount }}", "{{ 'é' | urlencode | trim }}",
    "{% set a = [1] %}{% for i in range(99) %}{% set a = a + a %}{% endfor %}", "{{ 'a'.translate({97: 'b' * 9999999}) }}",
    "{% set a %}{{ 'x' * 999999 }}{% endset %}{{ a * 999 }}", "{{ namespace(**{'a' * 99999: 1}) }}", "{{ '{0.__class__}'.format(1) }}",
)  # fmt: skip
_CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n' }}"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    "{%- if tools is not none %}{{ tools | tojson(indent=4) }}{% endif %}"
)


def _change_template(rng: Random, case: Case) -> Case:
    text = case["template"].decode("utf-8", "surrogatepass")
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, how = rng.randrange(len(text) + 1), rng.randrange(8)
        if how < 4:
            text = text[:at] + rng.choice(_PIECES) + text[at:]
        elif how == 4:
            piece = rng.choice(_PIECES)
            text = (
                piece[:3]
                + piece[3:-3].replace(rng.choice(("'", "0", " ", "(")), rng.choice(_PIECES), 1)
                + piece[-3:]
            )
        elif how == 5:
            end = at + rng.choice((1, 10, 100))
            text = text[:at] + text[end:]
        elif how == 6:
            text = (
                text[:at]
                + rng.choice(("(", "[", "{", "{%", "-", "not ", "1", "x.", "|upper"))
                * rng.choice((1, 5000))
                + text[at:]
            )
        else:
            text = text[:at] + rng.choice(TEXTS) + text[at:]
    return {"template": text.encode("utf-8", "surrogatepass")}


def _render(folder: Path) -> None:
    text = (folder / "template").read_bytes().decode("utf-8", "replace")
    made = ChatTemplate({"default": text}, {"bos_token": "<s>", "eos_token": "</s>"})
    made.render(_MESSAGES, most_characters=100_000, tools=[{"type": "function", "name": "f"}])


TARGETS = [
    Target("tokenizer", _tokenizers, _change_tokenizer, _use_tokenizer),
    Target(
        "template", lambda: [{"template": _CHATML.encode()}, *({"template": p.encode()} for p in _PIECES)],
        _change_template, _render, (ValueError,), memory=96 << 20,
    ),
]  # fmt: skip
