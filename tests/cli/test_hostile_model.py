"""What a model file may do to its host: nothing to its memory beyond the budget, nothing to its terminal."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import MemoryCheckpoint, tiny_checkpoint

from edgemoe.convert.convert import convert

# Not the parent's view of it, which begins with the parent's own memory.
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
    config = json.loads(base.files["tokenizer_config.json"]) | {"chat_template": template}
    files = {**base.files, "tokenizer_config.json": json.dumps(config).encode()}
    tensors = {name: base.tensor(name) for name in base.shapes}
    convert(MemoryCheckpoint(base.config, tensors, files), path)
    return path


def smallest_budget(path: Path) -> int:
    """Returns the smallest --ram in MiB, which the error of too small a one names."""
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
