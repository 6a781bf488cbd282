"""Options are written once, checked when they are made, and take numbers of any library."""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
import pytest

import edgemoe
from edgemoe.cli.engine import engine_flags
from edgemoe.runtime.options import EngineOptions


def test_numpys_numbers_become_pythons():
    options = EngineOptions(
        ram=np.int64(1 << 30), bits=np.int8(4), dense_bits=np.uint8(8), experts=np.int16(2),
        context=np.int32(64), threads=np.int64(2), verify=np.bool_(False),
    )  # fmt: skip
    plain = EngineOptions(
        ram="1GiB", bits=4, dense_bits=8, experts=2, context=64, threads=2, verify=False
    )
    assert options == plain
    given = (options.ram, options.bits, options.dense_bits, options.experts, options.context)
    assert {type(value) for value in (*given, options.threads)} == {int}
    assert type(options.verify) is bool


@pytest.mark.parametrize("name", ["bits", "dense_bits", "experts", "context", "threads"])
@pytest.mark.parametrize("value", [2.0, np.float32(2), "2", True, [2]])
def test_what_is_no_whole_number_is_refused_alike(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected a whole number, got") as error:
        EngineOptions(**{name: value})
    assert type(error.value) is ValueError
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"threads": 0}, "threads: expected 1 to 1024, got 0"),
        ({"threads": 1025}, "threads: expected 1 to 1024, got 1025"),
        ({"ram": -1}, "size"),
        ({"verify": 1}, "verify: expected True or False, got 1"),
        (
            {"cache_type_v": "q4"},
            "cache_type_v: expected f16, f32, q8_0, q4_0, q3_0 or q2_0, got q4",
        ),
        ({"scheduler": "magic"}, "scheduler: expected one of on-demand"),
        ({"bits": "auto", "scheduler": "mc"}, "bits: auto is for the scheduler on-demand"),
        ({"bits": 4, "allocation": "a.json"}, "allocation: expected bits to be auto"),
        ({"trace": "t", "observer": object()}, "trace and observer: expected one of them"),
    ],
)
def test_what_needs_no_model_is_checked_without_one(arguments, match):
    with pytest.raises(ValueError, match=match):
        EngineOptions(**arguments)


def test_load_takes_what_options_take(tiny_moe):
    with pytest.raises(TypeError, match="rams"):
        edgemoe.load(tiny_moe, rams="1GiB")
    with edgemoe.load(tiny_moe, experts=np.int64(1), context=np.int64(32)) as engine:
        assert engine.options == EngineOptions(experts=1, context=32)
        assert (engine.config.experts_per_token, engine.context) == (1, 32)
        rows = [engine.logits(ids) for ids in ([1, 2], (1, 2), np.array([1, 2], np.uint8))]
        assert all(np.array_equal(rows[0], other) for other in rows)


def test_every_flag_of_the_command_line_has_an_option():
    from edgemoe.cli.options import run_parser

    said = engine_flags(run_parser().parse_args([]))
    fields = {f.name for f in dataclasses.fields(EngineOptions)}
    assert set(said) <= fields
    # What is left: what edgemoe-run adds itself, and what only a program can give.
    assert fields - set(said) == {
        "context", "trace", "profile", "observer", "plug_in", "sequences", "slots", "steady",
    }  # fmt: skip
    assert EngineOptions(**said) == EngineOptions(whole_process=True)
    assert engine_flags(argparse.Namespace(bits=4), ram=1 << 30) == {
        "whole_process": True, "bits": 4, "ram": 1 << 30,
    }  # fmt: skip
