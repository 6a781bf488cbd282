"""`edgemoe bench`: which tests it runs, at which depths, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from simulated import plug_in

import edgemoe
import edgemoe.runtime.bench
from edgemoe import _core, hardware
from edgemoe.cli.bench import main
from edgemoe.file.reader import open_moe
from edgemoe.quant import Allocation
from edgemoe.runtime.bench import Roof, measure, roof
from edgemoe.store import disk_rate, expert_bytes


@pytest.fixture
def no_roof(monkeypatch):
    """Skips the measurement of memory and disk."""
    monkeypatch.setattr(edgemoe.runtime.bench, "roof", lambda *_, **__: Roof(memory=1e9, disk=1e9))


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
        # Keys and values of two layers and two heads, whose 24 columns are stored as 32 float16.
        assert deep - shallow == 40 * 2 * 2 * 32 * 2 * 2
        with pytest.raises(ValueError, match="9 tokens at depth 71 does not fit a context of 80"):
            list(measure(engine, prompts=[9], generations=[], depths=[71]))


@pytest.mark.parametrize("slots", [None, 9 * 20480])
def test_what_fits_as_a_whole_is_there_before(tiny_moe, slots):
    with edgemoe.load(tiny_moe, context=80, threads=1, slots=slots) as engine:
        (result,) = measure(engine, prompts=[], generations=[16], repetitions=2)
        if slots is None:
            assert (result.hit_rate, result.read_per_token, result.wait_share) == (1.0, 0.0, 0.0)
            assert engine.stats.misses == 0
        else:
            assert result.hit_rate < 1
            assert result.read_per_token > 0


def test_the_command_takes_llama_benchs_flags(tiny_moe, no_roof, capsys):
    command = [str(tiny_moe), "-p", "0", "-n", "2", "-d", "0,20", "-r", "1", "-t", "1", "--json"]
    assert main([*command, "-ctk", "q8_0", "--cache-type-v", "f16"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [r["test"] for r in report["results"]] == ["tg2", "tg2 @ d20"]
    # Before and after each test, and the whole run.
    assert all(
        len(r["memory_roofs"]) == 2 and min(r["memory_roofs"]) > 0 for r in report["results"]
    )
    assert report["roofs"] == [{"memory": 1e9, "disk": 1e9}] * 2
    assert report["cache_types"] == {"keys": "q8_0", "values": "f16", "layers": []}
    assert main([*command, "-ctv", "q5_1"]) == 1
    assert capsys.readouterr().err == (
        "edgemoe bench: cache_type_v: expected f16, f32, q8_0, q4_0, q3_0 or q2_0, got q5_1\n"
    )


def test_an_allocation_reads_what_its_experts_have(tiny_moe, tmp_path, no_roof, capsys):
    bits = np.full((2, 8), 2, np.int8)
    bits[:, ::2] = 4
    path = tmp_path / "bits.json"
    path.write_bytes(Allocation(method="test", layers=(0, 1), bits=bits).to_json())
    flags = ["-p", "0", "-n", "4", "-r", "1", "--json", "--dense-bits", "8", "--bits"]

    def used(*more):
        assert main([str(tiny_moe), *flags, *more]) == 0
        return json.loads(capsys.readouterr().out)["results"][0]["used_per_token"]

    assert used("auto", "--allocation", str(path)) == pytest.approx(
        (used("2") + used("4")) / 2, abs=1
    )


def test_the_average_bits_are_of_all_repetitions(tiny_moe, tmp_path, monkeypatch):
    bits = np.full((2, 8), 2, np.int8)
    bits[:, ::2] = 4
    path, of_calls, extend = tmp_path / "bits.json", [], edgemoe.Engine.extend
    path.write_bytes(Allocation(method="test", layers=(0, 1), bits=bits).to_json())

    def noted(engine, tokens):
        extend(engine, tokens)
        of_calls.append(engine.stats.average_bits)

    monkeypatch.setattr(edgemoe.Engine, "extend", noted)
    with edgemoe.load(tiny_moe, context=80, bits="auto", allocation=path) as engine:
        (result,) = measure(engine, prompts=[], generations=[6], repetitions=2)
    counted = of_calls[6:]  # without the first repetition
    assert result.average_bits == pytest.approx(np.mean(counted))
    assert result.average_bits != pytest.approx(counted[-1])


def test_the_roof_is_measured_inside_the_budget(tiny_moe, monkeypatch):
    asked = []
    monkeypatch.setattr(
        edgemoe.runtime.bench.hardware._core,
        "memory_rate",
        lambda size, threads: asked.append(size) or 1e9,
    )
    taken = hardware.process_bytes()
    roof(tiny_moe, bits=None, threads=1, ram=taken + (80 << 20), seconds=0.01)
    roof(tiny_moe, bits=None, threads=1, ram=taken + (8 << 30), seconds=0.01)
    assert 32 << 20 < asked[0] < 80 << 20
    assert asked[1] == 256 << 20


def test_the_disk_is_measured_with_what_fits(tiny_moe):
    moe = open_moe(tiny_moe)
    length = expert_bytes(moe, moe.level(None))
    asked = []
    rate = _core.disk_rate
    for room in (0, 64 * length):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                _core,
                "disk_rate",
                lambda file, offsets, size, readers: (
                    asked.append(size) or rate(file, offsets, size, readers)
                ),
            )
            assert disk_rate(moe, moe.level(None), seconds=0.0, room=room) > 0
    assert asked == [4096, length]


def test_the_peak_counts_from_when_it_is_forgotten():
    spike = np.ones(64 << 20, np.uint8)
    del spike
    before = hardware.peak_bytes()
    hardware.forget_peak()
    assert hardware.peak_bytes() < before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-p", "x"], "argument -p/--n-prompt: expected a whole number from 0, got 'x'"),
        (["-n", "4,-1"], "argument -n/--n-gen: expected a whole number from 0, got '-1'"),
        (["-d", ""], "argument -d/--n-depth: expected a whole number from 0, got ''"),
        (["-r", "0"], "argument -r/--repetitions: expected a whole number from 1, got '0'"),
        (["--seed", "-1"], "argument --seed: expected a whole number from 0, got '-1'"),
        (["--ram", "0"], "argument --ram: expected a size like 4GiB or 50%, got '0'"),
        (["--ram", "101%"], "argument --ram: expected a size like 4GiB or 50%, got '101%'"),
    ],
)
def test_wrong_numbers_are_wrong_usage(flags, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["nothing.moe", *flags])
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"edgemoe bench: {message}; edgemoe bench --help lists the flags\n"


def test_ram_may_be_a_share(tiny_moe, no_roof, capsys):
    assert main([str(tiny_moe), "-p", "0", "-n", "2", "-r", "1", "-t", "1", "--ram", "50%"]) == 0
    assert "| tg2 |" in capsys.readouterr().out


def test_a_device_has_roofs_of_its_own(tiny_moe, monkeypatch, capsys):
    path = Path(plug_in())
    monkeypatch.setattr("edgemoe.devices.plug_ins", lambda: [path])
    monkeypatch.setattr(hardware, "memory_rate", lambda *_, **__: 1e9)
    monkeypatch.setattr(edgemoe.runtime.bench, "disk_rate", lambda *_, **__: 1e9)
    monkeypatch.setattr(edgemoe.runtime.bench, "_DEVICE_BYTES", 4 << 20)
    assert roof(tiny_moe, bits=None, threads=1).link == 0
    flags = [str(tiny_moe), "-p", "4", "-n", "1", "-r", "1", "--vram", "8MiB"]
    assert main([*flags, "--device", "cuda", "--json"]) == 0
    for found in json.loads(capsys.readouterr().out)["roofs"]:
        assert found["vram"] > 0
        assert found["link"] > 0
    roofs = Roof(memory=1e9, disk=1e9, vram=2e11, link=1.2e10)
    monkeypatch.setattr(edgemoe.runtime.bench, "roof", lambda *_, **__: roofs)
    assert main([*flags, "--device", "cuda"]) == 0
    assert "disk 1.00 GB/s, device memory 200 GB/s, link 12.0 GB/s; " in capsys.readouterr().err
