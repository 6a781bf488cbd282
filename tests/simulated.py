"""A simulated device: the CUDA kernels, compiled for the CPU by the machine's own compiler. See tests/cudasim."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgemoe.runtime.vram import Vram
from edgemoe.store import expert_bytes

ROOT = Path(__file__).parent.parent


@functools.cache
def plug_in() -> str:
    """Returns the path of the plug-in, which is built on first use; $EDGEMOE_CUDASIM names one already built."""
    if given := os.environ.get("EDGEMOE_CUDASIM"):
        return given
    build = ROOT / "build" / "cudasim"
    cmake = [sys.executable, "-m", "cmake"]
    if importlib.util.find_spec("cmake") is None:
        cmake = [shutil.which("cmake") or "cmake"]
    options = ["-DEDGEMOE_PYTHON=OFF", "-DEDGEMOE_CUDASIM=ON", "-DCMAKE_BUILD_TYPE=Release"]
    if shutil.which("ninja"):
        options += ["-G", "Ninja"]
    for step in (
        ["-S", str(ROOT), "-B", str(build), *options],
        ["--build", str(build), "--target", "edgemoe_cudasim"],
    ):
        done = subprocess.run([*cmake, *step], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return str(build / "libedgemoe_cudasim.so")


@contextlib.contextmanager
def configured(**values: int):
    """Configures the simulated device; see cudasim_configure in tests/cudasim/runtime.cpp."""
    library = ctypes.CDLL(plug_in())
    if not hasattr(library, "cudasim_configure"):
        pytest.skip("a real device")
    before = {
        name: library.cudasim_configure(name.encode(), value) for name, value in values.items()
    }
    try:
        yield library
    finally:
        for name, value in before.items():
            library.cudasim_configure(name.encode(), value)


def on_device() -> dict[str, str]:
    """Returns the options that load a model on the simulated device."""
    return {"device": "cuda:0", "plug_in": plug_in()}


def with_vram(monkeypatch, experts, moe):
    """Gives the device room for exactly so many experts besides everything else."""
    real = Vram.divide.__func__

    def divide(cls, moe, **kwargs):
        v = real(cls, moe, **kwargs)
        room = experts * expert_bytes(moe, len(moe.ladder)) + 512
        return dataclasses.replace(v, total=v.dense + v.kv + v.scratch + room)

    monkeypatch.setattr(Vram, "divide", classmethod(divide))


def small_moe(name, folder, **changes):
    """Converts a small random model of a family in `folder`; returns its path."""
    import families  # here, as it imports transformers

    from edgemoe.convert.convert import convert
    from edgemoe.convert.hf import HFCheckpoint

    path = folder / f"{name}.moe"
    convert(HFCheckpoint(families.make(name, folder / name, **changes)), path)
    return path
