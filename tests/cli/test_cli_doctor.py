"""`edgemoe doctor` finds faults and names their cure; a report for others contains nothing private."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from simulated import configured, plug_in

from edgemoe import devices, doctor, hardware
from edgemoe.cli.main import main
from edgemoe.file.reader import open_moe


@pytest.fixture
def models(tmp_path: Path, tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one valid model."""
    folder = tmp_path / "secret-folder"
    folder.mkdir()
    monkeypatch.setenv("EDGEMOE_MODELS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "_RATE_BYTES", 1 << 20)
    shutil.copy(tiny_moe, folder / "my-plan.moe")
    return folder


def report(capfd: pytest.CaptureFixture[str], *flags: str, code: int = 0) -> list[dict[str, str]]:
    assert main(["doctor", *flags, "--json"]) == code
    return json.loads(capfd.readouterr().out)


def size(folder: Path) -> str:
    return f"{(folder / 'my-plan.moe').stat().st_size >> 10} KiB"


def of(found: list[dict[str, str]], subject: str) -> list[dict[str, str]]:
    return [f for f in found if f["subject"] == subject]


def test_a_sound_machine_has_no_problem(models: Path, capfd) -> None:
    found = report(capfd)
    assert {f["kind"] for f in found} <= {"ok", "note"}
    assert of(found, "processor")[0]["text"] == f"{hardware.num_threads()} cores, {hardware.isa()}"
    (model,) = of(found, "model")
    assert model["text"].startswith(
        f"my-plan: {size(models)}, qwen2_moe, sound as far as looked at"
    )
    assert model["cure"] == "edgemoe quality my-plan --store"
    assert "GB/s at 64 KiB" in of(found, "disk")[0]["text"]
    assert "every checksum matches" in of(report(capfd, "--verify"), "model")[0]["text"]
    assert main(["doctor"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) < 40
    assert lines[-1] == "no problems"


def test_a_broken_model_is_a_problem_with_its_cure(models: Path, capfd) -> None:
    path = models / "my-plan.moe"
    offset = int(open_moe(path).experts.offsets[0])
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"\xff\xff\xff\xff")
    shutil.copy(path, models / "half.moe")
    with open(models / "half.moe", "r+b") as file:
        file.truncate(10_000)
    half, changed = of(report(capfd, code=1), "model")
    assert half["kind"] == changed["kind"] == "problem"
    assert half["text"].startswith("half: ")
    assert str(models) not in half["text"]
    assert half["cure"] == "edgemoe rm half, and pull or convert it again"
    assert changed["text"].startswith("my-plan: expert 0 of layer 0, rung 0, bytes ")
    assert changed["text"].endswith(": the sum does not match")


def test_variables_that_mean_nothing_are_problems(models: Path, capfd, monkeypatch) -> None:
    monkeypatch.setenv("EDGEMOE_RAMM", "1GiB")
    monkeypatch.setenv("EDGEMOE_BITS", "4")
    monkeypatch.setenv("EDGEMOE_API_KEY", "hush")
    texts = {f["text"]: f["kind"] for f in of(report(capfd, code=1), "environment")}
    assert texts["EDGEMOE_BITS=4"] == "ok"
    assert texts["EDGEMOE_API_KEY=(set)"] == "ok"
    wrong = "EDGEMOE_RAMM in the environment means nothing; did you mean EDGEMOE_RAM?"
    assert texts[wrong] == "problem"


def test_what_limits_is_a_note(models: Path, capfd, monkeypatch) -> None:
    monkeypatch.setattr(hardware, "available_bytes", lambda: 64 << 20)
    monkeypatch.setattr(doctor, "_file_system", lambda path: "nfs4")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = report(capfd)
    assert any("a control group allows 64 MiB" in f["text"] for f in of(found, "memory"))
    assert "comes over it" in of(found, "models")[0]["text"]
    assert of(found, "hub")[0]["cure"] == "unset HF_HUB_OFFLINE"
    monkeypatch.setenv("HF_ENDPOINT", "")
    assert of(report(capfd, code=1), "hub")[0]["cure"] == "unset HF_ENDPOINT"


def test_a_bundle_has_nothing_private(models: Path, tmp_path: Path, capfd, monkeypatch) -> None:
    monkeypatch.setenv("EDGEMOE_SYSTEM_PROMPT", "I am unwell")
    monkeypatch.setenv("EDGEMOE_API_KEY", "hush")
    monkeypatch.setenv("EDGEMOE_RAM", "4GiB")
    monkeypatch.setenv("HF_TOKEN", "hf_hush")
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.corp:80/x")
    out = tmp_path / "out.txt"
    assert main(["doctor", "--bundle", str(out)]) == 0
    assert capfd.readouterr().out == ""
    text = out.read_text()
    for word in ("hush", "unwell", "secret-folder", "my-plan", "mirror", str(tmp_path), "pytest"):
        assert word not in text
    for word in (
        f"model 1: {size(models)}",
        "EDGEMOE_RAM=4GiB",
        "EDGEMOE_SYSTEM_PROMPT=(set)",
        "a token",
    ):
        assert word in text
    broken = tmp_path / "our secret-folder" / "half.moe"
    broken.parent.mkdir(exist_ok=True)
    broken.write_bytes(b"no model")
    monkeypatch.chdir(tmp_path)
    path = str(broken.relative_to(tmp_path))
    assert main(["doctor", path, "--bundle", str(out)]) == 1
    text = out.read_text()
    assert "model 2: not a .moe file" in text
    for word in ("half", "secret", "our"):
        assert word not in text.replace("yours", "")
    assert main(["doctor", "--bundle", str(tmp_path / "no/x.txt")]) == 1
    assert "no such directory" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("setting", "kind", "text", "cure"),
    [
        ({}, "note", "cuda:0  simulated device (8.7), 1.0 of 1.0 GiB free, link ", "--device cuda:0 uses it"),
        ({"others": 700 << 20}, "note", "0.3 of 1.0 GiB free, link", "nvidia-smi names the programs"),
        ({"others": 1 << 30}, "problem", "0.0 of 1.0 GiB free", "nvidia-smi names the programs"),
        ({"integrated": 1}, "note", "memory shared with the processor", "--device cuda:0 uses it"),
        ({"driver": 0}, "problem", "no CUDA device: no NVIDIA driver", "install NVIDIA's driver"),
        ({"driver": 12020}, "problem", "it is for CUDA 12.2, this plug-in for 13.0", "a newer driver"),
        ({"devices": 0}, "problem", "no CUDA device: no device", "CUDA_VISIBLE_DEVICES"),
    ],
    ids=str,
)  # fmt: skip
def test_devices_and_why_there_is_none(monkeypatch, setting, kind, text, cure) -> None:
    path = Path(plug_in())
    monkeypatch.setattr(devices, "plug_ins", lambda: [path])
    with configured(**setting):
        *first, found = doctor._devices()
    assert (found.kind, text in found.text, cure in found.cure) == (kind, True, True), found
    if not text.startswith("no CUDA") and "driver" not in setting:
        assert first[0].text == f"{path.name} for CUDA 13.0, driver for CUDA 13.0"


def test_without_a_plug_in_no_device_is_no_problem(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(devices, "plug_ins", list)
    (found,) = doctor._devices()
    assert (found.kind, "no plug-in in this install" in found.text) == ("ok", True)
    assert "EDGEMOE_CUDA=1" in found.cure
    assert "EDGEMOE_CUDA=1" not in found.text  # said once
    monkeypatch.setattr(devices, "plug_ins", lambda: [tmp_path / "gone.so"])
    (found,) = doctor._devices()
    assert (found.kind, "cannot open" in found.text) == ("problem", True)
    assert "builds both together" in found.cure
