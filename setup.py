"""The build of the native core with CMake, and of the manual pages; pyproject.toml has the rest of the package."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """The command `build_ext`, which runs CMake for the one extension, `edgemoe._core`."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        out = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        # One build folder per interpreter, so that building twice from one tree works.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        # A stale cache would refer to the tools of a build environment that no longer exists.
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
                "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DEDGEMOE_OUTPUT_DIR={out}",
                f"-DEDGEMOE_CUDA={cuda}",
                f"-DEDGEMOE_CUDA_ARCHS={archs}",
                *shlex.split(os.environ.get("CMAKE_ARGS", "")),
            ]
        )  # fmt: skip
        subprocess.check_call([*cmake, "--build", str(build)])


class WithPages(build_py):
    """The command `build_py`, which also makes the manual pages that are installed with the programs."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        if not _has_module("argparse_manpage"):
            print("edgemoe: built without manual pages, which argparse-manpage makes")
            return
        pages = Path("build") / "man"
        subprocess.check_call([sys.executable, "scripts/man-pages", str(pages)], cwd=ROOT)
        self.distribution.data_files = [
            ("share/man/man1", sorted(str(page) for page in pages.glob("*.1")))
        ]


def _has_module(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


setup(
    ext_modules=[Extension("edgemoe._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": WithPages},
)
