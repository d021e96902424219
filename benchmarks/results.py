"""What is written down: the machine, one JSON object per case and contestant, and the table for people."""

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy
import torch

import moda_kernels
from moda_kernels import native

#: Of the JSON objects. Raise it when a field changes its meaning or goes.
SCHEMA = 1
ROOT = Path(__file__).parents[1]

Record = dict[str, Any]


def environment() -> Record:
    """Where and with what the numbers were made; part of every record."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "triton": _version("triton"),
        "moda_kernels": moda_kernels.__version__,
        "native_extension": native.why_not("cpu") is None,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": _git("status", "--porcelain", "--", "moda_kernels", "csrc", "benchmarks", ":!benchmarks/results")
        != "",
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def spread(seconds: Sequence[float]) -> Record:
    """Median, 10th and 90th percentile in milliseconds."""
    p10, median, p90 = (float(x) * 1e3 for x in numpy.percentile(numpy.asarray(seconds), [10, 50, 90]))
    return {"median": median, "p10": p10, "p90": p90, "samples": len(seconds)}


def append(path: Path, records: Sequence[Record]) -> None:
    """Add records to a file of JSON lines, so that a run that ends early leaves what it has measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def table(records: Sequence[Record]) -> str:
    """One case as plain text."""
    first = records[0]
    workload = first["workload"]
    title = (
        f"{workload['name']}, L = {workload['length']}, {first['dtype']}, {first['pass']} "
        f"({workload['documents']} documents, {workload['segments']} segments, {workload['images']} images, "
        f"density {workload['density']:.3f}; "
        f"heads {first['query_heads']}/{first['key_heads']}, D = {first['head_dim']})"
    )
    head = ("contestant", "ms", "p10", "p90", "x time", "GFLOP/s", "setup ms", "peak MiB", "")
    rows = [head, *(_row(record) for record in records)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:-1], widths[1:], strict=True)), row[-1]])
        for row in rows
    ]
    return "\n".join([title, *(line.rstrip() for line in lines)])


#: Printed once, below the tables.
LEGEND = (
    "x time: median time divided by that of the first contestant of the table. GFLOP/s: useful ones, visible pairs "
    "only.\nsetup: layout, plan or mask, made once for all layers, not part of ms. peak: memory of setup and call "
    "above the inputs.\nA control computes something else: it is not checked, and has no ratio."
)


def _row(record: Record) -> tuple[str, ...]:
    name = record["contestant"]
    if "ms" not in record:
        return (name, *[""] * 7, f"{record['status']}: {record['reason']}")
    ms, memory, setup = record["ms"], record["memory"] or {}, record["setup"]
    relative = record["relative_time"]
    return (
        name,
        *(f"{ms[key]:.4g}" for key in ("median", "p10", "p90")),
        "" if relative is None else f"{relative:.2f}",
        "" if record["useful_gflops"] is None else f"{record['useful_gflops']:.1f}",
        "" if setup is None else f"{setup['ms']['median']:.4g}",
        f"{memory['call_peak'] / 2**20:.1f}" if "call_peak" in memory else "",
        "control" if record["status"] == "control" else memory.get("error", ""),
    )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _git(*arguments: str) -> str | None:
    """What git says of the source tree; None where there is none."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
