"""`edgemoe bench`: which tests it runs, at which depths, and how it says so."""

from __future__ import annotations

import json

import pytest

import edgemoe
import edgemoe.bench
from edgemoe.bench import Roof, measure
from edgemoe.cli.bench import main


@pytest.fixture
def no_roof(monkeypatch):
    """Spares a test the measuring of memory and disk."""
    monkeypatch.setattr(edgemoe.bench, "roof", lambda *_, **__: Roof(memory=1e9, disk=1e9))


def test_every_test_is_run_at_every_depth(tiny_moe):
    with edgemoe.load(tiny_moe, context=80, threads=1) as engine:
        results = list(
            measure(engine, prompts=[9, 12], generations=[3], depths=[0, 40], repetitions=2)
        )
        assert [r.test for r in results] == [
            "pp9", "pp12", "tg3", "pp9 @ d40", "pp12 @ d40", "tg3 @ d40",
        ]  # fmt: skip
        assert all(len(r.rates) == 2 and min(r.rates) > 0 for r in results)
        shallow, deep = results[2].used_per_token, results[5].used_per_token
        # Two layers, two heads, 24 values stored as 32 float16, keys and values.
        assert deep - shallow == 40 * 2 * 2 * 32 * 2 * 2
        with pytest.raises(ValueError, match="9 tokens at depth 71 does not fit a context of 80"):
            list(measure(engine, prompts=[9], generations=[], depths=[71]))


def test_the_command_takes_llama_benchs_flags(tiny_moe, no_roof, capsys):
    command = [str(tiny_moe), "-p", "0", "-n", "2", "-d", "0,20", "-r", "1", "-t", "1", "--json"]
    assert main([*command, "-ctk", "q8_0", "--cache-type-v", "f16"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [r["test"] for r in report["results"]] == ["tg2", "tg2 @ d20"]
    assert report["cache_types"] == {"keys": "q8_0", "values": "f16"}
    assert main([*command, "-ctv", "q5_1"]) == 1
    assert capsys.readouterr().err == (
        "edgemoe bench: cache_type_v: expected f16 or q8_0, got q5_1\n"
    )
