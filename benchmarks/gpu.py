"""Everything that has to be done on a GPU machine, in one command of less than nine minutes, without a network:

    python3 benchmarks/gpu.py FOLDER [--commit HASH] [--minutes 8.6]

Builds the extension, runs the tests marked `gpu`, `verify`, compute-sanitizer over a part of it and the native
segmentation against PyTorch, all at once; then, with the GPU to itself, the benchmarks. Each step has a time limit of
its own and its log in FOLDER/logs.txt, and none stops the others. The end of the output says it all in short: steps,
targets, table. FOLDER gets at most eight files.

`--cpu-dry-run` walks the same way in small on a machine without a GPU: what can't run there is reported, not run.
Standard library only, so that it can report even that torch is missing.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Seconds kept back for the report and for giving the files back.
RESERVE = 15.0
#: Of all logs together, and of one step's in the report.
LOG_BYTES, TAIL_LINES, TAIL_CHARACTERS = 8 * 2**20, 12, 1200
#: Of the report: a longer one would be cut at its beginning by whoever shows the end only.
REPORT_CHARACTERS = 11000


@dataclass
class Step:
    """One command.

    Attributes:
        limit: seconds. missing: why it can't be run here; it then isn't.
        outcome: in words once it is done. good: it did what it should.
    """

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    missing: str = ""
    outcome: str = "not run"
    good: bool = False
    seconds: float = 0.0
    log: str = ""

    def run(self, deadline: float) -> None:
        """Run it, and end it with all its children when its time or the whole script's is over."""
        if self.missing:
            self.outcome = f"missing: {self.missing}"
            return
        limit = min(self.limit, deadline - time.monotonic())
        if limit <= 1:
            self.outcome = "no time left"
            return
        begin = time.monotonic()
        print(f"{self.name}: {' '.join(self.command)} (at most {limit:.0f} s)", flush=True)
        process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env=os.environ | self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            self.log, _ = process.communicate(timeout=limit)
            self.good = process.returncode == 0
            self.outcome = "ok" if self.good else f"FAILED with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            self.log, _ = process.communicate()
            self.outcome = f"FAILED: not done after {limit:.0f} s"
        self.seconds = time.monotonic() - begin
        print(f"{self.name}: {self.outcome} ({self.seconds:.0f} s)", flush=True)


def phases(folder: Path, dry: bool, commit: str | None, seconds: float) -> list[list[Step]]:
    """The steps: those of one phase run at the same time."""
    python = sys.executable
    package = [python, "-m", "moda_kernels"]
    device = "cpu" if dry else "cuda"
    build_options = ["--build-lib", str(folder / "build"), "--build-temp", str(folder / "build")] if dry else []
    build = Step(
        "build",
        [python, "setup.py", "--quiet", "build_ext", *(build_options or ["--inplace"])],
        120,
        # Nobody waits here for architectures that the machine hasn't got.
        {"MODA_KERNELS_NO_CUDA": "1"}
        if dry
        else {"MODA_KERNELS_REQUIRE_EXTENSION": "1", "MODA_KERNELS_CUDA_ARCHITECTURES": "90"},
    )
    tests = ["tests/test_native.py"] if dry else ["tests"]
    sanitizer = shutil.which("compute-sanitizer")
    checked = [*package, "verify", "--quick", "--seconds", "45", "--dtypes", "bfloat16,float32", "--device", "cuda"]
    # Without torch's cache every tensor is an allocation of its own, whose bounds can be checked.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "2"}
    missing = "needs a CUDA GPU" if dry else "" if sanitizer else "compute-sanitizer is not on PATH"
    quick = ["--quick", "--backends", "cpu", "--dtypes", "float32", "--features", "masks;split"] if dry else []
    checks = [
        Step("doctor", [*package, "doctor"], 60),
        Step("gpu tests", [python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *tests], 170),
        Step(
            "verify",
            [*package, "verify", "--device", device, "--seconds", "110", *quick, "--out", str(folder / "verify.jsonl")],
            150,
        ),
        *(
            Step(
                tool,
                [str(sanitizer), "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", *checked],
                150,
                uncached,
                missing,
            )
            for tool in ("memcheck", "racecheck")
        ),
        Step(
            "segmentation",
            [python, "-m", "benchmarks.segmentation", "--device", device, "--runs", "20"]
            + ["--out", str(folder / "segmentation.jsonl")],
            90,
        ),
    ]
    bench = [*package, "bench", "--out", str(folder / "attention.jsonl")]
    bench += ["--tiny"] if dry else ["--device", "cuda"]
    bench += ["--commit", commit] if commit else []
    # It stops by itself before its time is over, and then has tables and a picture; the checks take 3 minutes.
    own = seconds - 45 - 170
    return [[build], checks, [Step("bench", [*bench, "--limit", f"{own - 30:.0f}"], own + 60)]]


def report(folder: Path, steps: Sequence[Step], dry: bool) -> str:
    """What matters, shortest last."""
    parts = []
    for step in steps:
        if not step.good and step.log:
            tail = "\n".join(step.log.strip().splitlines()[-TAIL_LINES:])[-TAIL_CHARACTERS:]
            parts.append(f"--- the end of the log of {step.name} ---\n{tail}")
    figures = folder / "attention.jsonl"
    if figures.exists() and figures.stat().st_size:
        code = "import sys; from benchmarks.gpu import figures; print(figures(sys.argv[1], sys.argv[2] == 'dry'))"
        done = subprocess.run(
            [sys.executable, "-c", code, str(figures), "dry" if dry else "real"],
            cwd=ROOT, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        parts.append(done.stdout.strip() if done.returncode == 0 else f"no figures:\n{done.stderr[-TAIL_CHARACTERS:]}")
    width = max(len(step.name) for step in steps)
    lines = [f"{step.name:{width}}  {step.seconds:4.0f} s  {step.outcome}" for step in steps]
    parts.append("--- steps ---\n" + "\n".join(lines))
    text = "\n\n".join(parts)
    return text if len(text) <= REPORT_CHARACTERS else "[cut]\n" + text[-REPORT_CHARACTERS:]


def figures(path: str, dry: bool) -> str:
    """Targets and a table of a result file; imports torch, so it runs in a process of its own."""
    from benchmarks import targets
    from moda_kernels.bench import results, tables

    records = results.read(Path(path))
    ours = "moda-cpu" if dry else targets.OURS
    lines = [str(target) for target in targets.targets(records, ours, 0 if dry else targets.SHORTEST)]
    found = [*tables.overview(records), "", *tables.peaks(records), *(f"absent: {m}" for m in tables.missing(records))]
    return "\n".join(["--- results ---", *found, "", "--- targets ---", *lines])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for results and logs")
    parser.add_argument("--commit", help="of the code, where its folder has no git")
    parser.add_argument("--minutes", type=float, default=8.6, help="for all of it (default: %(default)s)")
    parser.add_argument("--cpu-dry-run", action="store_true", help="every step in small, without a GPU")
    asked = parser.parse_args(arguments)
    begin = time.monotonic()
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    seconds = 60 * asked.minutes - RESERVE
    steps: list[Step] = []
    for phase in phases(folder, asked.cpu_dry_run, asked.commit, seconds):
        steps += phase
        with ThreadPoolExecutor(len(phase)) as pool:
            list(pool.map(lambda step: step.run(begin + seconds), phase))
    shutil.rmtree(folder / "build", ignore_errors=True)
    logs = "\n".join(f"=== {step.name}: {step.outcome} ===\n{step.log}" for step in steps)
    (folder / "logs.txt").write_text(logs[-LOG_BYTES:], encoding="utf-8")
    text = report(folder, steps, asked.cpu_dry_run)
    (folder / "summary.txt").write_text(text + "\n", encoding="utf-8")
    print("\n" + text)
    return 0 if all(step.good or (asked.cpu_dry_run and step.missing) for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
