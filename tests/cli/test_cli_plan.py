"""`edgemoe plan`: what is planned from headers is what the engine then does."""

from __future__ import annotations

import json
from pathlib import Path

import families
import pytest

import edgemoe
from edgemoe.cli.main import main
from edgemoe.convert.convert import convert
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.runtime.forecast import Forecast

MIB = 1 << 20


def planned(capfd: pytest.CaptureFixture[str], *arguments: object) -> dict:
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    return json.loads(capfd.readouterr().out)


@pytest.mark.parametrize("family", ["qwen2_moe", "granitemoe", "glm4_moe"])
def test_a_checkpoint_s_plan_is_what_happens(family, tmp_path, capfd) -> None:
    families.make(family, tmp_path / "hf")
    plan = planned(capfd, tmp_path / "hf", "--ram", "200MiB", "-c", 64, "--bits", 4)
    assert plan["name"] == "hf"
    (row,) = plan["rows"]
    convert(HFCheckpoint(tmp_path / "hf"), tmp_path / "x.moe")
    with edgemoe.load(
        tmp_path / "x.moe", ram="200MiB", whole_process=False, context=64, bits=4
    ) as engine:
        budget = engine.budget
    for part in ("dense", "kv", "experts", "expert"):
        assert row[part] == getattr(budget, part), part
    assert row["context"] == 64
    assert row["resident"] == 1
    assert row["token_bytes"] == 0
    # The file has a page for each record and an index beside what is counted.
    size = planned(capfd, tmp_path / "x.moe", "--ram", "2GiB")["files"]["8"]
    assert 0 <= (tmp_path / "x.moe").stat().st_size - size < 1 * MIB


def test_the_smallest_budget_is_the_engine_s(tiny_moe: Path) -> None:
    forecast = Forecast(tiny_moe, context=64)
    for bits in (2, 8):
        row = forecast.smallest(bits)
        assert row.budget.ram % MIB == 0
        with pytest.raises(edgemoe.OutOfBudget, match="the smallest that works is"):
            forecast.row(row.budget.ram - MIB, bits)


def test_fewer_experts_in_memory_are_more_bytes_a_token(tiny_moe: Path) -> None:
    forecast = Forecast(tiny_moe, context=64)
    least = forecast.smallest(8).budget
    small = forecast.row(least.ram - least.room + least.experts // 2, 8)
    config, budget = forecast.moe.config, small.budget
    assert 0 < small.resident < 1
    each = budget.experts // (len(config.moe_layers) * config.num_experts)
    uses = len(config.moe_layers) * config.experts_per_token
    assert small.token_bytes == int((1 - small.resident) * uses * each)


def test_the_table(tiny_moe: Path, capfd) -> None:
    assert main(["plan", str(tiny_moe), "--ram", "1GiB"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("tiny.moe: qwen2_moe, 2 layers, 2 with 8 experts, 2 per token")
    assert lines[4].split()[:4] == ["1.0", "GiB", "8", "512"]
    assert lines[4].split()[-1] == "nothing"
    assert lines[-1].startswith("  smallest that works: --ram ")


def test_bad_input_is_one_line(tiny_moe: Path, tmp_path: Path, capfd) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "riddle"}')
    for arguments, code, message in (
        ([tmp_path / "absent"], 1, "absent: no such file"),
        ([tmp_path], 1, ""),
        ([tiny_moe, "--bits", 5], 1, "5"),
        ([tiny_moe, "-c", 999], 1, "context: expected 1 to 512"),
        ([tiny_moe, "--ram", "1MiB"], 3, "the smallest that works is"),
    ):
        assert main(["plan", *map(str, arguments)]) == code
        error = capfd.readouterr().err
        assert error.startswith("edgemoe plan: ")
        assert error.count("\n") == 1
        assert message in error
