"""The workflow that other people's machines run: its form, and that what it calls and builds is what the project has.

(actionlint and `cibuildwheel --print-build-identifiers` say more, for those who change these files.)
"""

import fnmatch
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
FILE = ROOT / ".github" / "workflows" / "ci.yml"
if not FILE.exists():
    pytest.skip("the tests stand alone, without the source tree", allow_module_level=True)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def workflow() -> dict[Any, Any]:
    class Strict(yaml.SafeLoader):  # type: ignore[misc]
        """A key that is there twice is an error: YAML itself takes the last one."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            assert len(keys) == len(set(keys)), f"twice in {node.start_mark}: {keys}"
            return super().construct_mapping(node, deep)

    loaded: dict[Any, Any] = yaml.load(FILE.read_text(), Strict)
    return loaded


def steps(workflow: dict[Any, Any], job: str) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = workflow["jobs"][job]["steps"]
    return made


def test_form(workflow: dict[Any, Any]) -> None:
    # A bare `on` is a truth value in YAML 1.1, which the parser speaks.
    assert set(workflow) == {"name", True, "permissions", "concurrency", "jobs"}
    assert workflow["permissions"] == {"contents": "read"}
    assert set(workflow[True]) == {"push", "pull_request", "workflow_dispatch"}
    for name, job in workflow["jobs"].items():
        assert set(job) <= {"runs-on", "timeout-minutes", "strategy", "steps"}, name
        assert isinstance(job["timeout-minutes"], int)
        for step in job["steps"]:
            assert set(step) <= {"name", "uses", "with", "run", "env"}, step
            assert ("uses" in step) != ("run" in step), step
            if "uses" in step:
                action, _, version = step["uses"].partition("@")
                assert action.startswith("actions/") and version.startswith("v"), step


def test_the_gate_runs_on_two_pythons_from_the_oldest(workflow: dict[Any, Any]) -> None:
    pythons = workflow["jobs"]["gate"]["strategy"]["matrix"]["python"]
    assert all(isinstance(python, str) for python in pythons), "3.10 without quotes is 3.1"
    assert PROJECT["project"]["requires-python"] == f">={pythons[0]}" and len(pythons) == 2
    (gate,) = (step for step in steps(workflow, "gate") if step.get("run") == ".ci/run")
    assert gate["env"] == {"PYTHON": "python"}
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "PYTHON ?=" in (ROOT / "Makefile").read_text(), "what the gate starts from"


def test_wheels(workflow: dict[Any, Any]) -> None:
    """Of each promised Python for Linux with glibc, the CPU half; tried by tests that there are."""
    commands = [step["run"] for step in steps(workflow, "wheels") if "run" in step]
    assert [command for command in commands if command.startswith("cibuildwheel")]
    assert [command for command in commands if "--sdist" in command], "it builds the CUDA half elsewhere"
    built = PROJECT["tool"]["cibuildwheel"]
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=").replace(".", "")
    assert fnmatch.fnmatch(f"cp{oldest}-manylinux_x86_64", built["build"])
    assert not fnmatch.fnmatch(f"cp{oldest}-musllinux_x86_64", built["build"])
    assert not fnmatch.fnmatch("cp310-manylinux_x86_64", built["build"])
    assert built["environment"]["MODA_KERNELS_NO_CUDA"] == built["environment"]["MODA_KERNELS_REQUIRE_EXTENSION"] == "1"
    tests = [word for word in built["test-command"].split() if word.endswith(".py")]
    assert tests and all((ROOT / name).exists() for name in tests)
    for source in built["test-sources"]:
        assert (ROOT / source).exists()
