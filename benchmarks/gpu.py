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
import math
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
#: In a command: the seconds that it has, less those in which it finishes what it has begun.
OWN_LIMIT, WIND_UP = "{seconds}", 45.0
#: Of all logs together in the file, and of a failed step's in the report.
LOG_BYTES, TAIL_LINES = 8 * 2**20, 20
#: Characters of what is printed at the end: 12,000 are often all that is seen.
SHOWN = {"logs": 2400, "results": 5000, "targets": 3400}
#: Between the two parts that `figures` prints.
BETWEEN = "=== targets ==="


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
        command = [part.replace(OWN_LIMIT, f"{max(limit - WIND_UP, 1):.0f}") for part in self.command]
        print(f"{self.name}: {' '.join(command)} (at most {limit:.0f} s)", flush=True)
        process = subprocess.Popen(
            command,
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


def phases(folder: Path, dry: bool, commit: str | None) -> list[list[Step]]:
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
        {"MODA_KERNELS_NO_CUDA": "1"} if dry else {"MODA_KERNELS_REQUIRE_EXTENSION": "1", **architecture()},
    )
    tests = ["tests/test_native.py"] if dry else ["tests"]
    sanitizer = shutil.which("compute-sanitizer")
    few = "masks;split;pair bias;concat, causal scope;fewer queries;packed documents"
    checked = [*package, "verify", "--quick", "--seconds", "60", "--dtypes", "bfloat16", "--device", "cuda"]
    checked += ["--features", few]
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
            + (["--tokens", "4096"] if dry else [])
            + ["--out", str(folder / "segmentation.jsonl")],
            90,
        ),
    ]
    bench = [*package, "bench", "--out", str(folder / "attention.jsonl")]
    bench += ["--tiny", "--contestants", "moda-cpu,eager-moda,sdpa-bool,sdpa"] if dry else ["--device", "cuda"]
    bench += ["--commit", commit] if commit else []
    # It stops by itself before its time is over, and then has tables and a picture.
    return [[build], checks, [Step("bench", [*bench, "--limit", OWN_LIMIT], math.inf)]]


def architecture() -> dict[str, str]:
    """The build's variable for the GPU that is here; nothing where nvidia-smi doesn't say."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return {}
    query = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL).stdout
    found = sorted({line.strip().replace(".", "") for line in said.splitlines() if line.strip()})
    return {"MODA_KERNELS_CUDA_ARCHITECTURES": ";".join(found)} if found else {}


def report(folder: Path, steps: Sequence[Step], dry: bool) -> tuple[str, str]:
    """All that matters, in full, and short enough to be seen whole."""
    logs = [
        f"--- {step.name}, end of its log ---\n" + "\n".join(step.log.strip().splitlines()[-TAIL_LINES:])
        for step in steps
        if not step.good and step.log
    ]
    found, targets = "", ""
    results = folder / "attention.jsonl"
    if results.exists() and results.stat().st_size:
        code = "import sys; from benchmarks.gpu import figures; figures(sys.argv[1], sys.argv[2] == 'dry')"
        done = subprocess.run(
            [sys.executable, "-c", code, str(results), "dry" if dry else "real"],
            cwd=ROOT, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        found, _, targets = done.stdout.partition(BETWEEN)
        if done.returncode:
            logs.append(f"--- figures ---\n{done.stderr}")
    width = max(len(step.name) for step in steps)
    outcomes = "\n".join(f"{step.name:{width}}  {step.seconds:4.0f} s  {step.outcome}" for step in steps)
    log_share = SHOWN["logs"] // max(len(logs), 1)
    short = [_cut(log, log_share, end=True) for log in logs]
    parts = ["--- steps ---\n" + outcomes]
    if found:
        titles = ("--- results: times over the first's ---\n", "--- targets ---\n")
        parts = [titles[0] + found.strip(), titles[1] + targets.strip(), *parts]
        short += [_cut(parts[0], SHOWN["results"]), _cut(parts[1], SHOWN["targets"])]
    return "\n\n".join([*logs, *parts]), "\n\n".join([*short, parts[-1]])


def _cut(text: str, characters: int, end: bool = False) -> str:
    if len(text) <= characters:
        return text
    return "[…]\n" + text[-characters:] if end else text[:characters] + "\n[… summary.txt has the rest]"


def figures(path: str, dry: bool) -> None:
    """Prints a table and the targets of a result file; imports torch, so it runs in a process of its own."""
    from benchmarks import targets
    from moda_kernels.commands.bench import results, tables

    records = results.read(Path(path))
    ours = "moda-cpu" if dry else targets.OURS
    found = [*tables.peaks(records), *tables.overview(records), *(f"absent: {m}" for m in tables.missing(records))]
    print("\n".join(found), BETWEEN, sep="\n")
    for target in targets.targets(records, ours, 0 if dry else targets.SHORTEST):
        print(target)


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
    for phase in phases(folder, asked.cpu_dry_run, asked.commit):
        steps += phase
        with ThreadPoolExecutor(len(phase)) as pool:
            list(pool.map(lambda step: step.run(begin + seconds), phase))
    shutil.rmtree(folder / "build", ignore_errors=True)
    logs = "\n".join(f"=== {step.name}: {step.outcome} ===\n{step.log}" for step in steps)
    (folder / "logs.txt").write_text(logs[-LOG_BYTES:], encoding="utf-8")
    full, short = report(folder, steps, asked.cpu_dry_run)
    (folder / "summary.txt").write_text(full + "\n", encoding="utf-8")
    print("\n" + short)
    return 0 if all(step.good or (asked.cpu_dry_run and step.missing) for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
