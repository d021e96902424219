"""Builds the native extension `moda_kernels._native` with CMake; everything else is in pyproject.toml.

The package works without the extension (PyTorch twins take its place), so a build that fails doesn't fail the
installation: first the CUDA half is left out, then the whole, and either way the reason is printed.

Environment:
    MODA_KERNELS_NO_EXTENSION=1         don't build it.
    MODA_KERNELS_NO_CUDA=1              build the CPU half only.
    MODA_KERNELS_REQUIRE_EXTENSION=1    let a failing build fail the installation (for CI).
    MODA_KERNELS_CUDA_ARCHITECTURES     as CMake names them, for example "90" or "80;90". Default: 80, 90 and 100 in
                                        machine code, the newest as PTX too.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).resolve().parent


def enabled(variable: str) -> bool:
    return os.environ.get(variable, "0").lower() not in ("", "0", "false", "no", "off")


def say(text: str) -> None:
    print(f"moda_kernels: {text}", file=sys.stderr, flush=True)


def tool(package: str, attribute: str) -> str | None:
    """A build tool: that of its Python package (an isolated build has one), else the one on PATH."""
    try:
        directory = getattr(__import__(package), attribute)
    except (ImportError, AttributeError):
        return shutil.which(package)
    return shutil.which(package, path=os.fspath(directory)) or shutil.which(package)


class BuildError(Exception):
    """The native extension could not be built; the message says why."""


class BuildWithCMake(build_ext):
    def run(self) -> None:
        try:
            super().run()
        except BuildError as failure:
            if enabled("MODA_KERNELS_REQUIRE_EXTENSION"):
                raise SystemExit(f"moda_kernels: {failure} (MODA_KERNELS_REQUIRE_EXTENSION is set)") from None
            say(f"{failure}. Going on without the native extension; PyTorch code takes its place, only slower.")

    def build_extension(self, ext: Extension) -> None:
        if enabled("MODA_KERNELS_NO_CUDA"):
            return self.build_half(ext, cuda=False)
        try:
            self.build_half(ext, cuda=True)
        except BuildError as failure:
            if enabled("MODA_KERNELS_REQUIRE_EXTENSION"):
                raise
            say(f"{failure}. Trying again without CUDA.")
            self.build_half(ext, cuda=False)

    def build_half(self, ext: Extension, *, cuda: bool) -> None:
        try:
            import pybind11
        except ImportError:
            raise BuildError("the native extension needs pybind11, which is not installed") from None
        cmake, ninja = tool("cmake", "CMAKE_BIN_DIR"), tool("ninja", "BIN_DIR")
        if cmake is None:
            raise BuildError("the native extension needs CMake, which was not found")

        # A folder each, so that a change of mind is no change of a configured build.
        folder = Path(self.build_temp).resolve() / ("cuda" if cuda else "cpu")
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = [
            cmake, "-S", os.fspath(SOURCE), "-B", os.fspath(folder),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMODA_KERNELS_CUDA={'ON' if cuda else 'OFF'}",
            f"-DMODA_KERNELS_CUDA_ARCHITECTURES={os.environ.get('MODA_KERNELS_CUDA_ARCHITECTURES', '')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
        ]  # fmt: skip
        if ninja is not None:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        folder.mkdir(parents=True, exist_ok=True)
        for step, command in (("configured", configure), ("compiled", [cmake, "--build", os.fspath(folder)])):
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            done = subprocess.run(command, **pipes, encoding="utf-8", errors="replace")
            if done.returncode or self.verbose:
                print(done.stdout, flush=True)
            if done.returncode:
                half = "with CUDA" if cuda else "without CUDA"
                raise BuildError(f"the native extension ({half}) could not be {step}: {reason(done.stdout)}")


def reason(log: str) -> str:
    """What a build log says went wrong: its first compiler error, else the message of its first CMake error."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for line in lines:
        if re.search(r"\berror:|nvcc fatal", line):
            return line.rstrip(".")
    for i, line in enumerate(lines):
        if line.startswith("CMake Error"):
            message = itertools.takewhile(lambda line: not line.startswith("Call Stack"), lines[i + 1 : i + 4])
            return " ".join(message).rstrip(".") or line
    return lines[-1] if lines else "no output"


extensions = [Extension("moda_kernels._native", sources=[], optional=True)]
if enabled("MODA_KERNELS_NO_EXTENSION"):
    say("MODA_KERNELS_NO_EXTENSION is set: installing without the native extension.")
    extensions = []
setup(ext_modules=extensions, cmdclass={"build_ext": BuildWithCMake})
