"""`edgemoe inspect` says what is in a file, and finds every wrong byte of its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgemoe.cli import main as edgemoe_cli
from edgemoe.file.append import add_sections
from edgemoe.file.reader import open_moe
from edgemoe.file.verify import verify
from edgemoe.quant.allocation import Allocation


@pytest.fixture
def path(tiny_moe: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny_moe, tmp_path / "x.moe"))


def run(*argv: object) -> int:
    return edgemoe_cli.main(["inspect", *map(str, argv)])


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_a_sound_file_is_described(path: Path, capsys) -> None:
    assert run(path, "--verify") == 0
    out = capsys.readouterr().out
    assert "x.moe: qwen2_moe" in out
    assert "8 experts of width 48 in 2 layers, 2 per token, and a shared one of 80" in out
    assert "| level | experts | everything else | bits/weight |" in out
    assert "\n| 4 bits | " in out
    assert not {"rung", "code ", "all else"} & set(out.split())
    assert "| 2 × layers.N.router | [8, 96] | f32 | 6 KiB |" in out
    assert "tokenizer.json" in out
    assert "verified: every checksum matches" in out


def test_json_has_everything(path: Path, capsys) -> None:
    moe = open_moe(path)
    assert run(path, "--json", "--verify") == 0
    about = json.loads(capsys.readouterr().out)
    assert about["bytes"] == path.stat().st_size
    assert about["broken"] == []
    assert about["config"]["num_experts"] == 8
    assert set(about["tensors"]) == set(moe.tensors)
    assert about["tensors"]["embed"]["rungs"][0]["crc32c"] == f"{moe.tensors['embed'].crcs[0]:08x}"
    assert [level["bits"] for level in about["levels"]] == [2, 3, 4, 6, 8]


def test_every_rung_of_every_matrix_is_checked(path: Path, capsys) -> None:
    moe = open_moe(path)
    seen: list[tuple[int, int]] = []
    assert verify(moe, progress=lambda *at: seen.append(at)) == []
    weights = sum(sum(t.lengths) for t in moe.tensors.values())
    assert seen[-1] == (weights + 16 * moe.experts.ends[-1],) * 2
    norm, ends = moe.tensors["norm"], moe.experts.ends
    flip(path, norm.offset)
    flip(path, int(moe.experts.offsets[9]) + ends[2])  # rung 3 of expert 1 of the second layer
    assert [what.split(", bytes")[0] for what in verify(open_moe(path))] == [
        "tensor norm, rung 0",
        "expert 1 of layer 1, rung 3",
    ]
    assert run(path, "--verify") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("#")]
    assert len(lines) == 2
    assert lines[0].startswith(f"edgemoe inspect: {path}: tensor norm, rung 0, bytes ")


def test_stored_quality_is_shown(path: Path, capsys) -> None:
    argv = ["quality", path, "--chunk", 24, "--chunks", 2, "--bits", 8, 2, "-t", 1, "--store"]
    assert edgemoe_cli.main([str(a) for a in argv]) == 0
    table = capsys.readouterr().out.strip()
    assert run(path, "--verify") == 0
    out = capsys.readouterr().out
    assert table in out
    assert "no longer holds" not in out
    assert edgemoe_cli.main([*map(str, argv[:-3]), "-t", "1", "--run", "mc", "--store"]) == 0
    add_sections(path, {"bit-routers": b"trained later"})
    assert run(path) == 0
    end = capsys.readouterr().out.splitlines()[-1]
    assert end == (
        "no longer holds, as sections or the look-up of the embedding's rows have changed: mc at 8 and 8 bits, "
        f"mc at 2 and 2 bits; edgemoe quality {path} --store measures again"
    )
    add_sections(path, {"quality": b'{"rows": [1]}'})
    assert run(path) == 0
    assert "quality: stored by another version" in capsys.readouterr().out
    add_sections(path, {"quality": b"no JSON"})
    assert run(path) == 0


def test_a_stored_allocation_is_shown(path: Path, capsys) -> None:
    bits = np.full((2, 8), 3, np.int8)
    bits[0] = 2
    found = Allocation(method="test", layers=(0, 1), bits=bits)
    add_sections(path, {"allocation": found.to_json()})
    assert run(path) == 0
    assert "allocation: test, 2.500 bits per expert's weight on average" in capsys.readouterr().out


def test_errors_are_one_line(tmp_path: Path, capsys) -> None:
    (junk := tmp_path / "x").write_bytes(b"junk")
    assert run(junk) == 1
    assert (
        capsys.readouterr().err
        == f"edgemoe inspect: {junk}: not a .moe file (bad magic at byte 0)\n"
    )
