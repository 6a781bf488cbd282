"""Builds the native core with CMake; everything else about the package is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """Runs CMake for the one extension, `edgemoe._core`."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        root = Path(__file__).parent.resolve()
        out = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        # One build folder per interpreter, so that building twice from one tree works.
        build = root / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        # A stale cache would remember the tools of a build environment that is gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        cmake = [sys.executable, "-m", "cmake"] if _has_module("cmake") else ["cmake"]
        # The plug-in for NVIDIA devices takes nvcc, and minutes.
        cuda = os.environ.get("EDGEMOE_CUDA", "0")
        archs = os.environ.get("EDGEMOE_CUDA_ARCHS", "")
        if cuda == "0":
            print("edgemoe: built without the plug-in for NVIDIA devices; EDGEMOE_CUDA=1 builds it")
        subprocess.check_call(
            [
                *cmake,
                "-S", str(root), "-B", str(build), "-G", "Ninja",
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DEDGEMOE_OUTPUT_DIR={out}",
                f"-DEDGEMOE_CUDA={cuda}",
                f"-DEDGEMOE_CUDA_ARCHS={archs}",
            ]
        )  # fmt: skip
        subprocess.check_call([*cmake, "--build", str(build)])


def _has_module(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


setup(
    ext_modules=[Extension("edgemoe._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
