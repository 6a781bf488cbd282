"""The demo model is built once, from a package whose contents are checked, whatever goes wrong on the way."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import subprocess
import sys
import threading
import time
import venv
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_llama import save_gguf, tiny_llama

from edgemoe import library
from edgemoe.convert import demo
from edgemoe.errors import FormatError
from edgemoe.file.reader import open_moe

_FAKE_PIP = """\
import pathlib, shutil, sys, time
open({log!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
time.sleep({delay})
if {fails!r}:
    print("Looking in indexes: somewhere")
    sys.exit("ERROR: No matching distribution found for tiny==1.0")
shutil.copy({wheel!r}, sys.argv[sys.argv.index("--dest") + 1])
"""


def sum_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclasses.dataclass
class World:
    """A tiny package, an interpreter path with a fake pip that serves it, and an empty cache."""

    root: Path
    monkeypatch: pytest.MonkeyPatch

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def work(self) -> Path:
        return self.cache / "smollm2-moe-v4.build"

    @property
    def downloads(self) -> int:
        log = self.root / "pip.log"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def write_pip(self, *, delay: float = 0, fails: bool = False) -> None:
        source = _FAKE_PIP.format(
            log=str(self.root / "pip.log"),
            wheel=str(self.root / "tiny-1.0-py3-none-any.whl"),
            delay=delay,
            fails=fails,
        )
        (self.root / "path" / "pip").mkdir(parents=True, exist_ok=True)
        (self.root / "path" / "pip" / "__init__.py").touch()
        (self.root / "path" / "pip" / "__main__.py").write_text(source)

    def change_package(self, **changes: Any) -> None:
        package = dataclasses.replace(demo._PACKAGE, **changes)
        self.monkeypatch.setattr(demo, "_PACKAGE", package)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path, monkeypatch)
    model = save_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(model, "tiny/tiny.gguf")
        archive.writestr("tiny/LICENSE", "the licence of tiny")
    data = tmp_path / "data"
    data.mkdir()
    write_update(data / "smollm2-moe-update.safetensors")
    write_sketch(data / "smollm2-moe-calibration.safetensors")
    (data / "NOTICE.md").write_text("what we changed")
    monkeypatch.setattr(demo, "_DATA", data)
    made.change_package(
        requirement="tiny==1.0",
        wheel=wheel.name,
        wheel_bytes=wheel.stat().st_size,
        wheel_sum=sum_of(wheel),
        model="tiny/tiny.gguf",
        model_sum=sum_of(model),
        licence="tiny/LICENSE",
        room_bytes=1000,
    )
    made.write_pip()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    return made


def write_update(path: Path) -> None:
    rng = np.random.default_rng(5)
    tensors = {"norm": np.ones(64, np.float32)}
    for p in ("layers.0.", "layers.1."):
        labels = np.repeat(np.arange(5), [32, 16, 16, 16, 16]).astype(np.uint8)
        tensors[p + "assign"] = rng.permutation(labels)
        tensors[p + "router"] = rng.normal(0, 1e-3, (4, 64)).astype(np.float32)
        tensors[p + "input_norm"] = tensors[p + "post_norm"] = np.ones(64, np.float32)
        for matrix, (rows, columns) in {"gate": (96, 64), "up": (96, 64), "down": (64, 96)}.items():
            tensors[f"{p}{matrix}.A"] = np.zeros((2, columns), np.float16)
            tensors[f"{p}{matrix}.B"] = np.zeros((rows, 2), np.float16)
    save_file(tensors, path, metadata={"experts": "4", "shared": "32"})


def write_sketch(path: Path) -> None:
    rng = np.random.default_rng(6)
    tensors = {}
    widths = {"q": 64, "o": 64, "shared.gate": 64, "shared.down": 32}
    inputs = {f"layers.{i}.{name}": cols for i in (0, 1) for name, cols in widths.items()}
    for name, cols in {**inputs, "embed": 64}.items():
        tensors[f"{name}.squares"] = rng.uniform(0.5, 2, cols).astype(np.float16)
        tensors[f"{name}.codes"] = rng.integers(-127, 128, (16, cols), np.int8)
        tensors[f"{name}.steps"] = np.full(16, 0.001, np.float16)
    for layer in (0, 1):
        tensors[f"experts.{layer}.count"] = np.full(4, 100, np.int32)
        tensors[f"experts.{layer}.hidden"] = rng.uniform(0.5, 2, (4, 16)).astype(np.float16)
    save_file(tensors, path, metadata={"model": "tiny", "tokens": "1000", "window": "100"})


def test_builds_once_and_says_what_it_does(world: World) -> None:
    said: list[str] = []
    tasks: list[tuple[str, int, int]] = []
    path = demo.demo_model(
        cache_dir=world.cache,
        say=said.append,
        progress=lambda task, done, total: tasks.append((task, done, total)),
    )
    assert path == world.cache / "smollm2-moe-v4.moe"
    assert "from PyPI (tiny==1.0, 0 MB, Apache-2.0)" in said[0]
    assert "building the demo model" in said[1]
    assert {task for task, _, _ in tasks} == {"download", "convert"}
    assert all(0 <= done <= total for _, done, total in tasks)
    assert tasks[-1][1] == tasks[-1][2]
    assert sorted(p.name for p in world.cache.iterdir()) == [
        "smollm2-moe-v4.lock",
        "smollm2-moe-v4.moe",
    ]
    written = path.stat().st_mtime_ns
    assert demo.demo_model(cache_dir=world.cache, say=said.append) == path
    assert (len(said), world.downloads, path.stat().st_mtime_ns) == (2, 1, written)


def test_keeps_licence_and_notice_in_the_file(world: World) -> None:
    file = open_moe(demo.demo_model(cache_dir=world.cache))
    licence = file.sections["LICENSE"]
    assert licence.startswith(b"the licence of tiny")
    assert licence.endswith(b"what we changed")
    assert file.config.num_experts == 4
    assert file.source["calibration"]["tokens"] == "1000"


def test_a_wrong_download_is_removed(world: World) -> None:
    world.change_package(wheel_sum="0" * 64)
    with pytest.raises(FormatError, match=r"whl: SHA-256 must be 0+, got [0-9a-f]{64}; removed"):
        demo.demo_model(cache_dir=world.cache)
    assert list(world.work.iterdir()) == []


def test_a_wrong_model_in_it_is_removed(world: World) -> None:
    world.change_package(model_sum="1" * 64)
    with pytest.raises(FormatError, match=r"tiny\.gguf: SHA-256 must be 1+, got"):
        demo.demo_model(cache_dir=world.cache)
    assert not list(world.work.glob("*gguf*"))
    assert not list(world.work.glob("*.part"))


def test_a_damaged_earlier_download_is_fetched_again(world: World) -> None:
    world.work.mkdir(parents=True)
    (world.work / "tiny-1.0-py3-none-any.whl").write_bytes(b"half of it")
    assert demo.demo_model(cache_dir=world.cache).is_file()


def test_a_damaged_model_of_an_earlier_run_is_made_again(world: World) -> None:
    world.work.mkdir(parents=True)
    (world.work / "tiny.gguf").write_bytes(b"half of it")
    assert demo.demo_model(cache_dir=world.cache).is_file()


def test_goes_on_after_an_interruption(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(task: str, done: int, total: int) -> None:
        if task == "convert" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.demo_model(cache_dir=world.cache, progress=interrupt)
    assert not (world.cache / "smollm2-moe-v4.moe").exists()
    world.write_pip(fails=True)  # nothing is downloaded again
    assert demo.demo_model(cache_dir=world.cache).is_file()
    assert not world.work.exists()


def test_tells_why_pip_failed(world: World) -> None:
    world.write_pip(fails=True)
    expected = r"could not download tiny==1\.0: No matching distribution found for tiny==1\.0; it comes from PyPI"
    with pytest.raises(ConnectionError, match=expected):
        demo.demo_model(cache_dir=world.cache)


def test_an_interrupted_download_leaves_no_pip_behind(world: World) -> None:
    world.write_pip(delay=60)

    def interrupt(task: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        demo.demo_model(cache_dir=world.cache, progress=interrupt)
    assert time.monotonic() - start < 30


def test_tells_that_pip_is_missing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH")
    venv.create(world.root / "venv", with_pip=False, symlinks=True)
    monkeypatch.setattr(sys, "executable", str(world.root / "venv" / "bin" / "python"))
    with pytest.raises(ImportError, match=r"downloaded by pip, which .* does not have"):
        demo.demo_model(cache_dir=world.cache)


def test_tells_that_the_extra_is_missing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs the package gguf: pip install 'edgemoe\[demo\]'"):
        demo.demo_model(cache_dir=world.cache)
    assert not world.cache.exists()


def test_tells_that_the_disk_is_too_small(world: World) -> None:
    world.change_package(room_bytes=10**18)
    with pytest.raises(OSError, match="needs 1000000000000 MB") as caught:
        demo.demo_model(cache_dir=world.cache)
    assert str(world.cache) in str(caught.value)
    assert world.downloads == 0


def test_tells_that_the_cache_cannot_be_written(world: World) -> None:
    (world.root / "file").touch()
    with pytest.raises(NotADirectoryError):
        demo.demo_model(cache_dir=world.root / "file" / "cache")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_tells_that_the_cache_is_read_only(world: World) -> None:
    world.cache.mkdir(mode=0o500)
    with pytest.raises(PermissionError, match=r"smollm2-moe-v4\.lock"):
        demo.demo_model(cache_dir=world.cache)


def test_a_built_model_needs_no_writable_cache(world: World) -> None:
    path = demo.demo_model(cache_dir=world.cache)
    world.cache.chmod(0o500)
    try:
        assert demo.demo_model(cache_dir=world.cache) == path
    finally:
        world.cache.chmod(0o700)


def test_two_builders_download_once(world: World) -> None:
    world.write_pip(delay=1)
    said: list[str] = []
    built: list[Path] = []
    threads = [
        threading.Thread(
            target=lambda: built.append(demo.demo_model(cache_dir=world.cache, say=said.append))
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(built)) == 1
    assert len(built) == 2
    assert world.downloads == 1
    assert "another process is building the demo model; waiting for it" in said


def test_a_killed_builder_leaves_no_lock(world: World) -> None:
    world.cache.mkdir()
    lock = world.cache / "smollm2-moe-v4.lock"
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX);"
            "print(flush=True); time.sleep(60)",
            str(lock),
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert demo.demo_model(cache_dir=world.cache).is_file()


def test_follows_the_xdg_specification(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for value, expected in {
        "/var/cache": "/var/cache/edgemoe",
        "relative": "/home/me/.cache/edgemoe",
        "": "/home/me/.cache/edgemoe",
    }.items():
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert library.cache_dir() == Path(expected)


def test_what_ships_fits_the_recipe() -> None:
    from edgemoe.convert.carve.llama import LlamaShape
    from edgemoe.convert.carve.update import read_update
    from edgemoe.convert.rope import Rope

    shape = LlamaShape(
        num_layers=30, hidden_size=576, intermediate_size=1536, vocab_size=49152, num_heads=9,
        num_kv_heads=3, head_dim=64, context_length=8192, norm_eps=1e-5, tied=True,
        rope=Rope(np.ones(32, np.float32), 1.0, 8192),
    )  # fmt: skip
    update = read_update(demo._DATA / "smollm2-moe-update.safetensors", shape)
    assert (update.num_experts, update.shared) == (16, 512)
    assert b"HuggingFaceTB" in (demo._DATA / "NOTICE.md").read_bytes()
