"""`edgemoe plan`: a plan made from headers agrees with what the engine then does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import families
import pytest
from served import measured_file
from tiny import tokenizer_files

import edgemoe
from edgemoe.cli.main import main
from edgemoe.cli.speeds import rate_text
from edgemoe.convert.convert import convert
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.file.append import add_sections
from edgemoe.file.reader import open_moe
from edgemoe.model import KvTable
from edgemoe.quant import SCHEMES
from edgemoe.runtime import pace as paces
from edgemoe.runtime.forecast import Forecast
from edgemoe.runtime.pace import Pace, disk_pace, pace

MIB = 1 << 20


PACE = Pace(memory=40e9, kernels={2: 10e9, 4: 20e9, 8: 35e9}, layer_s=50e-6)

pytestmark = pytest.mark.usefixtures("small_process")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _measured_once(cache: Path, monkeypatch) -> None:
    """Keeps measurements of this machine apart from the user's own, and shares them between tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture
def half(tiny_moe: Path, monkeypatch) -> tuple[str, ...]:
    """The arguments for a plan in which about half of the experts are in memory."""
    monkeypatch.setattr(Forecast, "lent", lambda self, row: row.resident)
    least = Forecast(tiny_moe, context=64).smallest(8).budget
    ram = least.ram - least.room + least.experts // 2
    return (str(tiny_moe), "--ram", str(ram), "--bits", "8", "-c", "64")


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
    # Besides what is counted, the file has padding to pages for each record, and an index.
    size = planned(capfd, tmp_path / "x.moe", "--ram", "2GiB")["files"]["8"]
    assert 0 <= (tmp_path / "x.moe").stat().st_size - size < 1 * MIB


# A program that prints the memory its process had taken when the model was opened.
RUN = """
import sys
import edgemoe.cli.run as program
answer = program._answer
def said(engine, *args, **options):
    sys.stderr.write(f"process {engine.budget.process}\\n")
    return answer(engine, *args, **options)
program._answer = said
sys.exit(program.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("family", ["glm4_moe", "granitemoe"])
def test_a_process_is_as_large_as_planned(family, tmp_path) -> None:
    source = families.make(family, tmp_path / "hf", changes={"vocab_size": 264})
    for name, content in tokenizer_files().items():
        (source / name).write_bytes(content)
    convert(HFCheckpoint(source), tmp_path / "x.moe")
    flags = ["--ram", "200MiB", "-c", "64"]

    def output(*arguments: object) -> tuple[str, str]:
        ended = subprocess.run(
            [sys.executable, *map(str, arguments), *flags], capture_output=True, check=True, text=True,
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
        )  # fmt: skip
        return ended.stdout, ended.stderr

    plan, _ = output("-m", "edgemoe", "plan", source, "--json", "--no-probe")
    _, said = output("-c", RUN, tmp_path / "x.moe", "-p", "a", "-n", 1, "--stats", "off")
    planned = json.loads(plan)["rows"][0]["process"]
    assert planned == pytest.approx(int(said.split()[-1]), rel=0.02)


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


def test_a_band_is_computing_and_reading(tiny_moe: Path, monkeypatch) -> None:
    forecast = Forecast(tiny_moe, context=64)
    whole = forecast.row(1 << 30, 8)
    assert whole.resident == 1
    weights = (whole.used_bytes + whole.budget.active_dense) / 35e9
    layers = forecast.moe.config.num_layers * 50e-6
    band = forecast.band(whole, PACE, None)  # no disk is needed
    assert band is not None
    assert band.high == pytest.approx(2 * band.low)
    assert 1 / band.high == pytest.approx(weights + layers)
    assert band.bound == "layers"

    least = forecast.smallest(8).budget
    half = forecast.row(least.ram - least.room + least.experts // 2, 8)
    # Memory that is reserved for later holds experts until then.
    assert forecast.lent(half) == 1
    monkeypatch.setattr(Forecast, "lent", lambda self, row: row.resident)
    assert forecast.band(half, PACE, None) is None
    reading = (1 - half.resident) ** 1.75 * half.used_bytes / 1.3e6
    read = forecast.band(half, PACE, 1e6)
    assert read is not None
    assert read.bound == "disk"
    assert 1 / read.high == pytest.approx(reading + (weights + layers) / 2, rel=0.01)
    # A hit rate known from a trace replaces the assumed one.
    known = forecast.band(half, PACE, 1e6, 0.0)
    assert known is not None
    assert known.low == pytest.approx(band.low, rel=0.01)


def test_what_bounds_a_token(tiny_moe: Path) -> None:
    forecast = Forecast(tiny_moe, context=64)
    row = forecast.row(1 << 30, 8)
    for kernel, memory, bound in ((35e3, 40e3, "memory"), (20e3, 40e3, "computing")):
        band = forecast.band(row, Pace(memory=memory, kernels={8: kernel}, layer_s=1e-6), None)
        assert band is not None
        assert band.bound == bound


def test_the_machine_is_measured_once(cache: Path) -> None:
    scheme = SCHEMES["nested"]
    first = pace(scheme)
    assert set(first.kernels) == {2, 3, 4, 6, 8}
    assert min(first.memory, first.layer_s, *first.kernels.values()) > 0
    assert first.layer_s < 0.1
    assert pace(scheme) == first
    kept = cache / "edgemoe/machine.json"
    for broken in (b"[", b'{"paces": 7, "disks": 3}'):
        kept.write_bytes(broken)
        assert pace(scheme).measured > first.measured
        assert pace(scheme).measured == pace(scheme).measured


def test_a_disk_is_known_by_reads_of_about_its_size(tiny_moe: Path) -> None:
    moe, folder = edgemoe.file.reader.open_moe(tiny_moe), tiny_moe.parent
    assert disk_pace(None, folder, 1 << 40) is None
    rate = disk_pace(moe, folder, 8192)
    assert rate is not None
    assert rate > 0
    assert disk_pace(None, folder, 16384) == rate
    assert disk_pace(None, folder, 8192 << 8) is None


def test_a_cache_that_cannot_be_written_costs_the_measuring_alone(monkeypatch, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert pace(SCHEMES["nested"]).memory > 0


def test_the_table(tiny_moe: Path, capfd) -> None:
    assert main(["plan", str(tiny_moe), "--ram", "1GiB"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("tiny.moe: qwen2_moe, 2 layers, 2 with 8 experts, 2 per token")
    row = lines[4].split()
    assert row[:4] == ["1", "GiB", "8", "512"]
    assert row[5] == "nothing"
    assert (row[7], row[-1]) == ("…", "layers")
    assert float(row[6]) < float(row[8])
    assert lines[6].startswith("  this machine: memory ")
    assert lines[-1].startswith("  smallest that works: --ram ")


def test_without_a_probe_only_what_reads_is_unknown(half, capfd, monkeypatch) -> None:
    monkeypatch.setattr(paces, "_read", dict)  # nothing was measured before
    row = planned(capfd, *half, "--no-probe")["rows"][0]
    assert 0 < row["resident"] < 1
    assert row["tokens_per_s"] is None
    assert main(["plan", *half, "--no-probe"]) == 0
    assert (
        "no speed is known where experts are read; it is without --no-probe"
        in capfd.readouterr().out
    )
    row = planned(capfd, *half)["rows"][0]
    low, high = row["tokens_per_s"]
    assert high == pytest.approx(2 * low)


def test_a_machine_that_cannot_be_measured_has_a_plan(tiny_moe: Path, capfd, monkeypatch) -> None:
    def full(*_):
        raise OSError(28, "No space left on device", "/tmp/x")

    monkeypatch.setattr(paces, "pace", full)
    assert main(["plan", str(tiny_moe), "--ram", "1GiB"]) == 0
    out, err = capfd.readouterr()
    assert (
        err
        == "# this machine cannot be measured now, so that no speed is known: /tmp/x: No space left on device\n"
    )
    assert out.splitlines()[4].split()[-2:] == ["?", "?"]


def test_a_trace_tells_what_is_absent(half, tiny_moe: Path, tmp_path: Path, capfd) -> None:
    trace = tmp_path / "text.trace"
    with edgemoe.load(tiny_moe, context=64, trace=trace) as engine:
        engine.logits([1, 2, 3])
        for token in (5, 5, 5, 6):
            engine.extend([token])
    assumed = planned(capfd, *half)["rows"][0]["tokens_per_s"]
    assert planned(capfd, *half, "--trace", trace)["rows"][0]["tokens_per_s"] != assumed
    families.make("qwen2_moe", tmp_path / "hf", changes={"num_experts": 4})
    assert main(["plan", str(tmp_path / "hf"), "--trace", str(trace)]) == 1
    assert "a trace of another model: expected layers, experts" in capfd.readouterr().err


def test_each_layer_s_own_types_are_the_file_s(tiny_moe: Path, tmp_path: Path, capfd) -> None:
    moe = open_moe(tiny_moe)
    table = KvTable(of=KvTable.identity(moe), layers=(("q8_0", "q4_0"), ("f16", "f16"))).to_json()
    path = tmp_path / "own.moe"
    shutil.copy(tiny_moe, path)
    add_sections(path, {"kv_types": table})
    (tmp_path / "table.json").write_bytes(table)
    ends = ("--ram", "1GiB", "-c", "512")
    f16, own, given = (
        planned(capfd, *arguments, *ends)["rows"][0]["kv"]
        for arguments in (
            (path,),
            (path, "-ctk", "auto", "-ctv", "auto"),
            (tiny_moe, "-ctk", "auto", "-ctv", "auto", "--kv-table", tmp_path / "table.json"),
        )
    )
    assert own == given < f16
    with edgemoe.load(path, context=512, cache_type_k="auto", cache_type_v="auto") as engine:
        assert engine.budget.kv == own


def test_what_levels_were_measured_to_cost_is_in_the_table(tiny_moe: Path, tmp_path, capfd) -> None:
    path = measured_file(tiny_moe, tmp_path / "measured.moe")
    assert planned(capfd, path, "--ram", "1GiB")["loss_change"]["4"] == 0.01
    assert main(["plan", str(path), "--ram", "1GiB"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[3].endswith("perplexity")
    assert lines[4].endswith("reference")
    assert main(["plan", str(path), "--ram", "1GiB", "--bits", "4"]) == 0
    assert capfd.readouterr().out.splitlines()[4].endswith("+1.01 ± 0.10%")
    assert main(["plan", str(path), "--ram", "1GiB", "--bits", "6"]) == 0
    assert capfd.readouterr().out.splitlines()[4].endswith("?")


def test_a_rate_has_the_digits_that_say_something() -> None:
    assert [rate_text(r) for r in (0.123, 1.23, 12.3, 123.4)] == ["0.12", "1.2", "12", "123"]


def test_bad_input_is_one_line(tiny_moe: Path, tmp_path: Path, capfd) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "riddle"}')
    checkpoint = families.make("qwen2_moe", tmp_path / "hf")
    for arguments, code, message in (
        ([tmp_path / "absent"], 1, "absent: no such file"),
        ([tmp_path], 1, ""),
        ([tiny_moe, "--bits", 5], 1, "5"),
        ([tiny_moe, "-c", 999], 1, "context: expected 1 to 512"),
        ([tiny_moe, "--ram", "1MiB"], 3, "the smallest that works is"),
        ([tiny_moe, "-ctk", "auto"], 1, "edgemoe allocate --kv makes it"),
        ([tiny_moe, "-ctk", "q9_0"], 1, "cache_type_k: expected f16"),
        ([checkpoint, "-ctk", "auto"], 1, "a checkpoint has none"),
        ([checkpoint, "--kv-table", "table.json"], 1, "--kv-table: is for a .moe file"),
    ):
        assert main(["plan", *map(str, arguments)]) == code
        error = capfd.readouterr().err
        assert error.startswith("edgemoe plan: ")
        assert error.count("\n") == 1
        assert message in error
