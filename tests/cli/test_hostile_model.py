"""A hostile model file can neither take memory beyond the budget nor control the terminal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edited import edit
from safetensors.numpy import save_file
from tiny import tiny_checkpoint

from edgemoe.convert.convert import convert
from edgemoe.file.append import add_sections

# Printed by the process itself, as its parent's view of the peak includes the parent's own memory.
PEAK = """
import sys
from edgemoe import hardware
from edgemoe.cli.run import main
code = main(sys.argv[2:])
open(sys.argv[1], "w").write(str(hardware.peak_bytes()))
sys.exit(code)
"""
RUN = [sys.executable, "-m", "edgemoe.cli.run"]


def with_template(path: Path, template: str) -> Path:
    """Writes the tiny model with another chat template."""
    base = tiny_checkpoint()
    convert(base, path)
    config = json.loads(base.files["tokenizer_config.json"]) | {"chat_template": template}
    # Not written by a conversion, which refuses templates that do not compile.
    add_sections(path, {"tokenizer_config.json": json.dumps(config).encode()})
    return path


def smallest_budget(path: Path) -> int:
    """Returns the smallest --ram in MiB, which is named by the error for a smaller one."""
    result = subprocess.run(
        [*RUN, str(path), "--ram", "1MiB", "-p", "Hi"], stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = re.search(r"the smallest that works is (\d+) MiB", result.stderr)
    assert found, result.stderr
    return int(found[1])


@pytest.mark.parametrize(
    "template",
    [
        "{% set x = '{:500000000}'.format(1) %}{{ messages[0].content }}",
        "{{ 'a' * 3000000000 }}{{ messages[0].content }}",
        "{% set ns = namespace(a=[]) %}{% for i in range(99) %}{% set ns.a = [ns.a, 'a' * 200000 ~ i] %}{% endfor %}",
        "{% for i in range(99999) %}a word {% endfor %}",
        "{{ '" + "\\n" * 60_000 + "'|length }}{{ messages[0].content }}",
    ],
    ids=["format", "product", "many", "long", "source"],
)
def test_a_template_does_not_take_the_process_over_its_budget(
    template: str, tmp_path: Path
) -> None:
    path = with_template(tmp_path / "hostile.moe", template)
    budget = smallest_budget(path)
    flags = [str(path), "--ram", f"{budget}MiB", "-p", "Hi", "-n", "4"]
    subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "peak"), *flags], stdin=subprocess.DEVNULL,
        capture_output=True, check=False,
    )  # fmt: skip
    peak = int((tmp_path / "peak").read_text())
    assert 10 << 20 < peak <= budget << 20, (peak >> 20, budget)


# --- the terminal

# Sets a title, clears the screen, rings the bell, forges a line, has an 8-bit command, and reverses text.
POISON = "\x1b]0;owned\x07\x1b[2J\a\r\nedgemoe: all is well\x9b2J\x7f\u202egpj.exe\u2066\u2028"
BARE = set(POISON) - {"\n"} - set("]0;owned[2Jedgemoe: all is wellgpj.exe")


def hostile_index(index: dict[str, Any]) -> None:
    index["config"]["family"] = POISON
    index["source"] = {"name": POISON + "long" * 100_000}


def checked(env: dict[str, str], *command: object, code: int) -> str:
    """Runs a command, checks that its output has no control characters but line ends, and returns the output."""
    result = subprocess.run(
        [sys.executable, "-c", ENTRY, *map(str, command)], stdin=subprocess.DEVNULL,
        capture_output=True, env=env, timeout=60, check=False,
    )  # fmt: skip
    text = (result.stdout + result.stderr).decode()
    assert not BARE & set(text), text[:2000]
    assert "edgemoe: all is well" not in text.splitlines()
    assert "--json" in command or max(map(len, text.splitlines()), default=0) < 4200
    assert result.returncode == code, text[:2000]
    return text


ENTRY = """
import sys
from edgemoe.cli.entry import edgemoe
sys.exit(edgemoe())
"""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("EDGEMOE_")}
    return kept | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONIOENCODING": "utf-8"}


def test_names_in_a_model_reach_no_terminal(
    env: dict[str, str], tmp_path: Path, tiny_moe: Path
) -> None:
    path = tmp_path / "hostile.moe"
    path.write_bytes(edit(tiny_moe.read_bytes(), hostile_index))
    row = {
        "scheduler": POISON, "options": {POISON: POISON}, "bits": 4, "dense_bits": 8, "average_bits": 4.0,
        "bits_per_weight": 4.5, "perplexity": 2.0, "kl": None, "read_per_token": None, "slots_bytes": 1,
        "cache_types": ["f16", POISON], "sections": "",
    }  # fmt: skip
    stored = {"measured_on": POISON, "tokens": 1, "reference": [8, 8], "rows": [row]}
    add_sections(path, {POISON[:20]: b"x", "quality": json.dumps(stored).encode()})
    about = checked(env, "inspect", path, "--verify", code=0)
    assert r"\x1b]0;owned\x07" in about
    assert r"\u202e" in about
    checked(env, "inspect", path, "--json", code=0)
    checked(env, "run", path, "-p", "Hi", "-n", "0", "-v", code=0)
    checked(env, "run", path, "-p", "Hi", "-n", "0", "--max-quality-loss", "1%", code=0)
    checked(env, "quality", path, "--text", __file__, "--chunk", "64", "--chunks", "1", code=0)
    checked(env, "bench", path, "-p", "8", "-n", "2", "-r", "1", code=0)
    trace = tmp_path / "x.trace"
    checked(env, "profile", "trace", path, "-n", "32", "-o", trace, code=0)
    assert r"\x1b]0;owned" in checked(env, "profile", "report", trace, code=0)
    checked(env, "profile", "replay", trace, "--budgets", "50%", code=0)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception(messages[1].content) }}", None),
        ("{% if true %}" + POISON.replace("\n", "") + "{% nonsense %}", "nonsense"),
        ("{% set ns = namespace() %}{{ raise_exception('POISON' ~ 'no' * 100000) }}", "owned"),
        ("{{ messages['POISON'].x }}", "owned"),
    ],
)
def test_what_a_template_says_reaches_no_terminal(
    template: str, said: str | None, env: dict[str, str], tmp_path: Path
) -> None:
    escaped = POISON.encode("unicode_escape").decode()
    path = with_template(tmp_path / "x.moe", template.replace("POISON", escaped))
    for flags in ((), ("-v",)):
        text = checked(env, "run", path, "-p", "Hi", *flags, code=1)
        assert said is None or said in text


def test_what_a_checkpoint_holds_reaches_no_terminal(env: dict[str, str], tmp_path: Path) -> None:
    source = tmp_path / "source\x1b[2J\udcff"
    source.mkdir()
    base = tiny_checkpoint()
    tensors = {name: base.tensor(name) for name in base.shapes}
    for config, extra in (
        (base.config | {"model_type": POISON, "architectures": [POISON]}, {}),
        (base.config | {"hidden_act": POISON * 1000}, {}),
        (base.config | {"rope_scaling": {"rope_type": POISON}}, {}),
        (base.config, {POISON: np.zeros(3, np.float32)}),
        (base.config, {}),
    ):
        (source / "config.json").write_text(json.dumps(config))
        save_file(tensors | extra, source / "model.safetensors")
        for name, content in base.files.items():
            (source / name).write_bytes(content)
        code = 0 if config == base.config and not extra else 1
        out = tmp_path / "out\x1b[2J\udcfe.moe"
        text = checked(env, "convert", source, out, code=code)
        assert r"\x1b" in text
