"""`benchmarks/gpu.py`, without a GPU: time limits, reports, and the dry run that walks the same way in small. And that
the microbenchmarks are collected when they are asked for, and only then."""

import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

gpu = pytest.importorskip("benchmarks.gpu", reason="the tests stand alone, without the source tree")

ROOT = Path(__file__).parents[1]


def step(name: str, code: str, limit: float = 60) -> "gpu.Step":
    return gpu.Step(name, [sys.executable, "-c", code], limit)


def test_a_step_says_how_it_ended() -> None:
    good, bad = step("good", "print('done')"), step("bad", "import sys; print('why'); sys.exit(3)")
    for each in (good, bad):
        each.run(time.monotonic() + 60)
    assert good.good and good.outcome == "ok" and good.log == "done\n"
    assert not bad.good and bad.outcome == "FAILED with exit code 3" and bad.log == "why\n"


def test_a_step_and_its_children_end_with_its_time() -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    slow = step("slow", f"print('begun', flush=True)\n{child}", limit=3)
    begin = time.monotonic()
    slow.run(begin + 60)
    # Its output is waited for: had the child lived on, that would be open for a minute.
    assert time.monotonic() - begin < 30
    assert slow.outcome == "FAILED: not done after 3 s" and slow.log == "begun\n"


def test_the_deadline_of_all_is_every_steps() -> None:
    late, missing = step("late", "print(1)"), step("missing", "print(1)")
    late.run(time.monotonic() + 0.5)
    assert late.outcome == "no time left" and not late.good
    missing.missing = "no such tool"
    missing.run(time.monotonic() + 60)
    assert missing.outcome == "missing: no such tool" and not missing.log


def test_a_command_can_know_its_time() -> None:
    own = gpu.Step("own", [sys.executable, "-c", "import sys; print(sys.argv[1])", gpu.OWN_LIMIT], 100)
    own.run(time.monotonic() + 1000)
    assert own.log == f"{100 - gpu.WIND_UP:.0f}\n"


def test_the_steps_of_a_real_run_are_those_that_a_gpu_needs(tmp_path: Path) -> None:
    build, checks, bench = gpu.phases(tmp_path, False, "abc")
    assert build[0].environment["MODA_KERNELS_REQUIRE_EXTENSION"] == "1" and "--inplace" in build[0].command
    assert [s.name for s in checks] == ["doctor", "gpu tests", "verify", "memcheck", "racecheck", "segmentation"]
    assert max(s.limit for s in build) + max(s.limit for s in checks) < 8.6 * 60 - 150, (
        "time is left for the benchmarks"
    )
    (last,) = bench
    assert last.command[-2:] == ["--limit", gpu.OWN_LIMIT] and "abc" in last.command and "cuda" in last.command


def test_reports_are_short_and_files_have_the_rest(tmp_path: Path) -> None:
    loud = step("loud", "print('x' * 5000); raise SystemExit(1)")
    others = [step(f"other{i}", "print('y' * 5000); raise SystemExit(1)") for i in range(3)]
    for each in (loud, *others):
        each.run(time.monotonic() + 60)
    full, short = gpu.report(tmp_path, [loud, *others], True)
    assert len(short) < gpu.SHOWN["logs"] + 1000 and "x" * 5000 in full
    assert short.endswith("FAILED with exit code 1") and "--- loud, end of its log ---" in full


@pytest.mark.slow
def test_the_dry_run_walks_the_whole_way(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", str(tmp_path), "--cpu-dry-run", "--commit", "abc"]
    # The build is tested elsewhere, and takes a third of the time.
    quick = os.environ | {"MODA_KERNELS_NO_EXTENSION": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        command, cwd=ROOT, env=quick, capture_output=True, text=True, timeout=1200, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.partition("--- results")[2]) < 11000
    names = {path.name for path in tmp_path.iterdir()}
    assert names <= {
        "attention.jsonl", "attention.png", "logs.txt", "segmentation.jsonl", "summary.txt", "verify.jsonl",
    }  # fmt: skip
    assert {"attention.jsonl", "logs.txt", "summary.txt", "verify.jsonl"} <= names
    steps = (tmp_path / "summary.txt").read_text().partition("--- steps ---\n")[2].splitlines()
    assert len([line for line in steps if line.endswith(" ok")]) == 6
    assert len([line for line in steps if line.endswith("missing: needs a CUDA GPU")]) == 2


@pytest.mark.slow
def test_microbenchmarks_are_collected_only_when_asked_for() -> None:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--collect-only", "-q"]
    # In a worker of pytest-xdist the plugin would switch itself off.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True, timeout=900,
        stdin=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "benchmarks/test_attention.py::test_attention[llava-next-forward-moda-cpu]" in done.stdout
    assert "benchmarks/test_attention.py::test_piece[packed-tiles]" in done.stdout
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    assert settings["testpaths"] == ["tests"]
