"""Damaged weights end in an error also where no checksum is compared: no sigmoid or softmax makes a number of NaN."""

from __future__ import annotations

import families
import pytest

import edgemoe
from edgemoe.convert.convert import convert
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.errors import RangeError
from edgemoe.file.reader import open_moe

GREEDY = edgemoe.SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model with gates of heads, the gated delta rule, and shared experts with a gate."""
    folder = tmp_path_factory.mktemp("damaged")
    convert(HFCheckpoint(families.make("qwen3_next", folder / "hf")), folder / "x.moe")
    return folder / "x.moe"


def error_of(model, name, tmp_path):
    """Returns the error of a reply of a model with a tensor whose first scales are NaN."""
    content = bytearray(model.read_bytes())
    start = open_moe(model).tensors[name].offset
    content[start : start + 64] = b"\x00\x7e" * 32
    path = tmp_path / "damaged.moe"
    path.write_bytes(content)
    with edgemoe.load(path, verify=False, threads=1) as engine, pytest.raises(RangeError) as said:
        list(engine.generate(range(1, 16), GREEDY))
    return str(said.value)


def test_every_damaged_matrix_is_noticed(model, tmp_path):
    tensors = open_moe(model).tensors.items()
    names = [n for n, t in tensors if t.spec.kind == "nested" and not n.startswith("layers.2")]
    assert len(names) > 15
    for name in names:
        assert "not a finite number" in error_of(model, name, tmp_path)


@pytest.mark.parametrize(
    "name", ["q", "q_gate"]
)  # whose NaN is only seen by a softmax or a sigmoid
def test_every_instruction_set_says_the_same(model, tmp_path, isa, name):
    assert error_of(model, f"layers.1.{name}", tmp_path) == (
        "layer 1: a logit of the router is not a finite number: the model's weights are damaged, "
        "or its numbers left the range of float32"
    )
