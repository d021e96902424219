"""The wheel itself: what is in it, and that it works installed elsewhere, with the native extension and without."""

import email
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Enough of the suite to show that the installed package works; all of it runs on the source tree anyway.
SUBSET = ["test_layout.py", "test_mask.py", "test_native.py"]
NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++", "PATH": "/nonexistent"}
CASES = {
    "extension": {"MODA_KERNELS_REQUIRE_EXTENSION": "1", "MODA_KERNELS_NO_CUDA": "1"},
    "no-extension": {"MODA_KERNELS_NO_EXTENSION": "1"},
    "no-compiler": NO_COMPILER,
}


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("MODA_KERNELS_")}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=clean | env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )


def succeed(result: subprocess.CompletedProcess[str]) -> str:
    if result.returncode:
        pytest.fail(f"{' '.join(result.args)} exited with {result.returncode}:\n{result.stdout[-6000:]}", pytrace=False)
    return result.stdout


def unavailable(reason: str, details: str = "") -> NoReturn:
    """Skip, except in CI: there a missing tool is a fault that a skip would hide."""
    if "CI" in os.environ:
        pytest.fail(f"{reason}\n{details}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution. All wheels are built from it, so that a file missing there shows."""
    tmp = tmp_path_factory.mktemp("sdist")
    if importlib.util.find_spec("setuptools") is None:
        unavailable("needs setuptools")
    leave = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    tree = shutil.copytree(ROOT, tmp / "tree", ignore=leave)
    succeed(run("-c", f"import setuptools.build_meta as b; b.build_sdist({str(tmp)!r})", cwd=tree))
    (archive,) = tmp.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build requirements as files, fetched once for all isolated builds."""
    tmp = tmp_path_factory.mktemp("wheelhouse")
    if importlib.util.find_spec("pip") is None:
        unavailable("needs pip")
    requires = PROJECT["build-system"]["requires"]
    result = run("-m", "pip", "download", "-q", "-d", tmp, "-c", ROOT / "constraints.txt", *requires, cwd=tmp)
    if result.returncode:
        unavailable("pip cannot fetch the build requirements", result.stdout)
    return tmp


def build(sdist: Path, wheelhouse: Path, to: Path, **env: str) -> subprocess.CompletedProcess[str]:
    options = ["--no-deps", "--no-index", "--find-links", wheelhouse, "--wheel-dir", to]
    return run("-m", "pip", "wheel", *options, sdist, cwd=to, **env)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    if request.param == "extension" and not any(map(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"])):
        unavailable("needs a C++ compiler")
    return request.param


@pytest.fixture(scope="module")
def wheel(case: str, sdist: Path, wheelhouse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("wheel")
    succeed(build(sdist, wheelhouse, tmp, **CASES[case]))
    (path,) = tmp.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    succeed(run("-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=target))
    return target


def test_no_torch_to_build() -> None:
    assert not [name for name in PROJECT["build-system"]["requires"] if name.startswith("torch")]


@pytest.mark.slow
def test_contents(case: str, wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "moda_kernels").rglob("*.py*") if path.suffix != ".pyc"}
    assert package <= set(names)
    assert all(archive.read(name) == (ROOT / name).read_bytes() for name in package)
    assert "moda_kernels/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not [name for name in names if not name.startswith(("moda_kernels/", "moda_kernels-"))]
    assert any(name.endswith((".so", ".pyd")) for name in names) == (case == "extension")


@pytest.mark.slow
def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
    required = metadata.get_all("Requires-Dist", [])
    assert any(line.startswith("torch>=") for line in required)
    assert not [line for line in required if "==" in line.partition(";")[0]], "an exact version belongs in constraints"
    assert metadata["Version"] == PROJECT["project"]["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload(), "the README is the description"


@pytest.mark.slow
def test_imports(installed: Path, tmp_path: Path) -> None:
    script = (
        "import importlib, importlib.metadata, sys, moda_kernels as mk\n"
        "version = importlib.metadata.version('moda_kernels')\n"
        "assert getattr(mk, '__version__', version) == version, (mk.__version__, version)\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(mk.__file__)"
    )
    native = [f"moda_kernels.{path.name.partition('.')[0]}" for path in (installed / "moda_kernels").glob("*.so")]
    printed = succeed(run("-c", script, *native, cwd=tmp_path, PYTHONPATH=str(installed)))
    assert Path(printed.splitlines()[-1]).is_relative_to(installed)


@pytest.mark.slow
def test_suite_passes(case: str, installed: Path, tmp_path: Path) -> None:
    if case == "no-compiler":
        pytest.skip("its files are those of no-extension, as test_contents shows, whose suite is run")
    # The tests move away from the source tree, or they would import that instead of the wheel.
    tests = shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    subset = [path for name in SUBSET if (path := tests / name).exists()]
    if not subset:
        pytest.skip(f"none of {', '.join(SUBSET)} exists")
    arguments = ["-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow and not gpu", *subset]
    succeed(run(*arguments, cwd=tmp_path, PYTHONPATH=str(installed)))


@pytest.mark.slow
def test_required_extension_fails_loudly(sdist: Path, wheelhouse: Path, tmp_path: Path) -> None:
    result = build(sdist, wheelhouse, tmp_path, MODA_KERNELS_REQUIRE_EXTENSION="1", **NO_COMPILER)
    assert result.returncode, "a required extension was left out without an error"
    assert "/nonexistent/c++" in result.stdout
