"""Models by name: list, rm, show, and every command that takes a model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import families
import hubs
import pytest

from edgemoe import library
from edgemoe.cli.main import main
from edgemoe.cli.names import model_path
from edgemoe.hub.name import HubName

ENTRY = [sys.executable, "-m", "edgemoe"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where models are kept; there is no demo model."""
    monkeypatch.setenv("EDGEMOE_MODELS", f"{tmp_path / 'models'}:{tmp_path / 'more'}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "models"


@pytest.fixture
def kept(folder: Path, tiny_moe: Path) -> Path:
    """Three models: A/one, B/one-4bit, and two in the second folder."""
    for name in ("models/A/one", "models/B/one-4bit", "more/two"):
        path = folder.parent / f"{name}.moe"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny_moe, path)
    return folder


def test_names_of_hubs() -> None:
    for text, kept in {
        "Qwen/Qwen3-30B-A3B": "Qwen/Qwen3-30B-A3B",
        "Qwen/Qwen3-30B-A3B:4": "Qwen/Qwen3-30B-A3B-4bit",
        "u/r@refs/pr/1:Q4_K_M": "u/r@refs-pr-1-Q4_K_M",
        "https://huggingface.co/u/r": "u/r",
        "u/r:q8_0": "u/r-Q8_0",
    }.items():
        assert HubName.parse(text).kept == kept
    for text in ("r", "u/r/x", "../r", "u/..", "u/r:", "/u/r", "u/r@../x", "u /r"):
        with pytest.raises(ValueError, match="expected user/repo"):
            HubName.parse(text)


def test_a_name_is_a_path_or_one_of_the_list(kept: Path, monkeypatch) -> None:
    one = kept / "A/one.moe"
    for text in ("A/one", "one", "one.moe", "A/one.moe", str(one)):
        assert model_path(text) == one
    assert model_path("B/one:4") == kept / "B/one-4bit.moe"
    assert model_path("two") == kept.parent / "more/two.moe"
    for text, message in {
        "tow": "did you mean two?",
        "A/oen": "did you mean A/one?",
        "smolm2-moe-v4": "did you mean smollm2-moe-v4?",
        "demmo": "did you mean demo?",
        "nothing/like-it": "edgemoe pull nothing/like-it gets it",
        "unlike": "edgemoe list shows what is here",
        "Say hi": "a prompt is what edgemoe-run -p takes",
        "./x.moe": "no such file",
    }.items():
        with pytest.raises((FileNotFoundError, ValueError), match=message.replace("?", r"\?")):
            model_path(text)
    (kept / "C").mkdir()
    shutil.copy(one, kept / "C/one.moe")
    with pytest.raises(FileNotFoundError, match="did you mean A/one or"):
        model_path("one")  # ambiguous


def test_list_shows_what_is_there(kept: Path, capfd) -> None:
    (kept / "B/begun.moe.part").write_bytes(bytes(1 << 20))
    (kept / "B/begun.moe.pull").mkdir()
    (kept / "broken.moe").write_bytes(b"not a model")
    assert main(["list"]) == 0
    out, err = capfd.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == [
        "name", "A/one", "B/one-4bit", "broken", "two"
    ]  # fmt: skip
    assert out.splitlines()[1].split()[3:6] == ["2–8", "512", "qwen2_moe"]
    assert "# broken: " in err
    assert "# B/begun: unfinished, 1 MiB on the disk" in err
    assert main(["list", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert [m["name"] for m in found["models"]] == ["A/one", "B/one-4bit", "broken", "two"]
    assert [u["name"] for u in found["unfinished"]] == ["B/begun"]
    before = os.stat(kept / "A/one.moe")
    os.utime(kept / "A/one.moe", ns=(1, before.st_mtime_ns))
    model_path("A/one")
    after = os.stat(kept / "A/one.moe")
    assert after.st_atime > 1
    assert after.st_mtime_ns == before.st_mtime_ns


def test_an_empty_list_says_what_to_do(folder: Path, capfd) -> None:
    assert main(["list"]) == 0
    assert "edgemoe pull user/repo gets one" in capfd.readouterr().err


def test_rm_removes_what_is_named_and_asks(kept: Path, capfd) -> None:
    (kept / "A/one.moe.part").write_bytes(b"x")
    result = subprocess.run([*ENTRY, "rm", "A/one"], stdin=subprocess.DEVNULL, capture_output=True)
    assert result.returncode == 1
    assert b"expected --yes where nobody can be asked" in result.stderr
    assert (kept / "A/one.moe").is_file()
    assert main(["rm", "A/one", "two", "--yes"]) == 0
    assert "freed" in capfd.readouterr().err
    assert [m.name for m in library.models()] == ["B/one-4bit"]
    assert library.unfinished() == []
    assert main(["rm", "B/on-4bit", "-y"]) == 1
    assert "no such model; did you mean B/one-4bit?" in capfd.readouterr().err
    assert main(["rm", "demo", "-y"]) == 1
    assert capfd.readouterr().err == "edgemoe rm: demo: no such model\n"  # which one may mean, too


@pytest.mark.usefixtures("small_process")
def test_show_and_others_take_names(kept: Path, capfd) -> None:
    assert main(["show", "one"]) == 0
    assert capfd.readouterr().out.startswith("one.moe: qwen2_moe")
    assert main(["show", "on"]) == 1
    assert capfd.readouterr().err.startswith(
        "edgemoe show: on: no such file or model; did you mean"
    )
    assert main(["plan", "A/one", "--ram", "1GiB"]) == 0
    assert capfd.readouterr().out.startswith("one.moe: qwen2_moe")
    assert main(["bench", "one", "-p", "4", "-n", "0", "-r", "1", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["family"] == "qwen2_moe"


def test_hf_fetches_once_and_plan_only_looks(tmp_path: Path, folder: Path) -> None:
    families.make("qwen3_moe", tmp_path / "hub/user/tiny", max_shard_size="100KB")
    with hubs.serving(tmp_path / "hub") as hub:
        env = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")
        }  # fmt: skip

        def run(*words: str) -> subprocess.CompletedProcess[bytes]:
            command = [sys.executable, "-m", *words]
            return subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True)

        plan = run("edgemoe", "plan", "user/tiny", "--ram", "1GiB", "--json")
        assert plan.returncode == 0, plan.stderr
        assert b"to fetch; while edgemoe pull converts them" in plan.stderr
        assert json.loads(plan.stdout)["name"] == "user/tiny"
        assert all(sent <= 1 << 14 for name, sent in hub.sent.items() if "-of-" in name)
        assert library.models() == []
        flags = ("-hf", "user/tiny:4", "-p", "Hi", "-n", "2")
        first = run("edgemoe.cli.run", *flags)
        assert b"tokenizer" in first.stderr  # it has none: so it was opened
        assert [m.name for m in library.models()] == ["user/tiny-4bit"]
        hub.requests.clear()
        assert run("edgemoe.cli.run", *flags).returncode == first.returncode
        assert hub.requests == []
        both = run("edgemoe.cli.run", "x.moe", "-hf", "user/tiny")
        assert both.returncode == 2
        assert b"expected one model, got MODEL 'x.moe' and -hf 'user/tiny'" in both.stderr
