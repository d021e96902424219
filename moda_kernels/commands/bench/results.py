"""What is written down: the machine, and one JSON object per case, pass and contestant."""

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
from moda_kernels.commands import doctor
from moda_kernels.runtime import native

#: Of the JSON objects. Raise it when a field changes its meaning or goes. 1 had no device, peaks, pieces and decoding.
SCHEMA = 2
ROOT = Path(__file__).parents[3]

Record = dict[str, Any]
#: What two records have to share to be the same measurement at two times.
Key = tuple[str, int, str, str, int, int, int, str]


def environment(device: str = "cpu", commit: str | None = None) -> Record:
    """Where and with what the numbers were made; part of every record.

    Args:
        device: that the numbers are from.
        commit: of the code, where its folder doesn't know.
    """
    cuda = device == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if cuda else doctor.cpu_model(),
        "driver": doctor.driver() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "cpu": doctor.cpu_model(),
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
        "native_extension": native.why_not(device) is None,
        "commit": _git("rev-parse", "HEAD") or commit,
        "dirty": _dirty(),
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


def read(path: Path) -> list[Record]:
    """The records of a result file, of any schema so far, with the fields that every later one has.

    Raises:
        ValueError: a file of something else.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            if record["schema"] > SCHEMA or "environment" not in record:
                raise KeyError("schema")
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(
                f"{path}, line {number}: expected a JSON object of schema 1 to {SCHEMA}, got {line[:60]!r}"
            ) from None
        record.setdefault("device", "cpu")
        record.setdefault("run", None)
        record["environment"].setdefault("device", record["environment"]["cpu"])
        records.append(record)
    return records


def key(record: Record) -> Key:
    """Which measurement this is."""
    w = record["workload"]
    heads = (record["query_heads"], record["key_heads"], record["head_dim"])
    return (w["name"], w["length"], record["dtype"], record["pass"], *heads, record["contestant"])


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _dirty() -> bool | None:
    """Whether the code differs from the commit; None where git doesn't know."""
    if _git("rev-parse", "HEAD") is None:
        return None
    changed = _git("status", "--porcelain", "--", "moda_kernels", "csrc", "benchmarks", ":!benchmarks/results")
    return changed != ""


def _git(*arguments: str) -> str | None:
    """What git says of the source tree; None where there is none (an installed package may lie in another's tree)."""
    if not (ROOT / "csrc").is_dir():
        return None
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
