"""`results/builds.md`: what the compiler made of every kernel, in every configuration, for every architecture.

    TRITON_INTERPRET=0 python -m moda_kernels.runtime.aot --all --json | python -m benchmarks.builds

Reads the compile report's lines and puts them into the file: builds that are not among them keep their rows (a change
of one kernel needs only `--only`), builds that no longer exist, or not with that configuration, lose theirs. Without
input only the latter. The tests compare the builds that they compile anyway with their rows, if the file's Triton is
the one at hand.
"""

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import triton

from moda_kernels.runtime import aot
from moda_kernels.runtime.architectures import KNOWN

PATH = Path(__file__).parent / "results" / "builds.md"
COLUMNS = ("build", "warps", "stages", "tile", "registers", "stack", "shared", "spills", "wgmma serialised")
#: Of a configuration, what `tile` is made of.
TILE = ("block_t", "block_q", "block_k", "block_d", "block_e", "part")


class Row(NamedTuple):
    """Of one build; all as they stand in the file."""

    build: str
    warps: str
    stages: str
    tile: str
    registers: str
    stack: str
    shared: str
    spills: str
    serialised: str


#: By target and name.
Rows = dict[tuple[str, str], Row]


def launch_of(config: dict[str, Any]) -> tuple[str, str, str]:
    """Warps, stages and tile of a configuration, or of a line of the compile report."""
    tile = " × ".join(str(config[name]) for name in TILE if name in config)
    return str(config["num_warps"]), str(config["num_stages"]), tile


def row_of(report: dict[str, Any]) -> Row:
    """Of one line of the compile report."""
    spills = f"{report['spill_stores']}/{report['spill_loads']}"
    serialised = "yes" if report["serialized"] else "no" if report["wgmma"] else ""
    used = (str(report[name]) for name in ("registers", "stack", "shared"))
    return Row(report["name"], *launch_of(report), *used, spills, serialised)


def read(text: str) -> tuple[str, Rows]:
    """The file's Triton release, and its rows."""
    rows: Rows = {}
    target = ""
    for line in text.splitlines():
        if line.startswith("## "):
            target = line[3:].split(",")[0].removeprefix("sm_")
        elif line.startswith("| ") and not line.startswith(f"| {COLUMNS[0]} "):
            row = Row(*(cell.strip() for cell in line.strip("|").split("|")))
            rows[target, row.build] = row
    found = re.search(r"Triton (\S+):", text)
    return found[1] if found else "", rows


def written(rows: Rows, version: str) -> str:
    """The file with these rows, in the order of the builds."""
    launches = {(str(build.target), build.name): launch_of(asdict(build.config)) for build in aot.builds()}
    rows = {build: row for build, row in rows.items() if row[1:4] == launches.get(build)}
    builds = list(launches)
    missing = sum(build not in rows for build in builds)
    lines = [
        "# What the compiler makes of the kernels",
        "",
        f"By Triton {version}: registers and bytes of stack a thread, bytes of shared memory a block, instructions",
        "that store to and load from the stack, and whether ptxas makes each wgmma wait for the one before. None ran.",
        "Made by `benchmarks/builds.py`; `moda_kernels/runtime/aot.py` says what is a fault.",
    ]
    if missing:
        lines += ["", f"{missing} of {len(builds)} builds are not in it."]
    for target, known in KNOWN.items():
        lines += [
            "",
            f"## {aot.name_of(target)}, up to {known.shared:,} bytes of shared memory",
            "",
            f"| {' | '.join(COLUMNS)} |",
            f"|{'---|' * len(COLUMNS)}",
            *(f"| {' | '.join(rows[build])} |" for build in builds if build[0] == str(target) and build in rows),
        ]
    return "\n".join(lines) + "\n"


def main(report: Iterable[str]) -> None:
    """Put the lines of a compile report into the file."""
    version, rows = read(PATH.read_text()) if PATH.exists() else ("", {})
    if version != triton.__version__:
        rows = {}
    for line in report:
        of = json.loads(line)
        rows[str(of["target"]), of["name"]] = row_of(of)
    PATH.write_text(written(rows, triton.__version__))


if __name__ == "__main__":
    main(() if sys.stdin.isatty() else sys.stdin)
