"""The tables of docs/does-it-help.md, made from the result file alone."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiments.plans import EXPERIMENTS, Experiment
from moda_kernels.commands.demo.intervals import Estimate, estimate, paired
from moda_kernels.commands.demo.tasks import TASKS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "experiments-cpu.jsonl"
PAGE = ROOT / "docs" / "does-it-help.md"

Record = dict[str, Any]


def read(path: Path = RESULTS) -> list[Record]:
    """The lines of a result file; none where there is no file yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rates(records: Sequence[Record], experiment: Experiment) -> dict[str, dict[int, float]]:
    """By variant and seed."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        if record["experiment"] == experiment.name:
            found.setdefault(record["variant"], {})[record["seed"]] = record["rate"]
    return found


def difference(found: dict[str, dict[int, float]], a: str, b: str) -> Estimate:
    """a - b, paired over the seeds that both have."""
    shared = sorted(found[a].keys() & found[b].keys())
    return paired([found[a][seed] for seed in shared], [found[b][seed] for seed in shared])


def table(records: Sequence[Record], experiment: Experiment) -> str:
    """Markdown: a row per variant."""
    found = rates(records, experiment)
    base, other = experiment.variants[0].name, experiment.against and experiment.against.name
    kind = TASKS[experiment.task].kinds[0]
    head = ["variant", f"{kind} correct", f"against {base}"] + [f"against {other}"] * bool(other)
    asked = TASKS[experiment.task].name == "which"
    head += ["asked / other"] * asked + ["‖k'‖ / ‖k‖", "disparity text, image", "loss"]
    rows = [head, ["---", *["--:"] * (len(head) - 1)]]
    for variant in experiment.variants:
        if variant.name not in found:
            continue
        own = [r for r in records if r["experiment"] == experiment.name and r["variant"] == variant.name]
        mean = estimate(list(found[variant.name].values()))
        spread = "" if math.isnan(mean.half) else f" ± {100 * mean.half:.1f}"
        row = [variant.name, f"{100 * mean.mean:.1f}{spread} %"]
        for name in (base, other):
            if name is not None:
                same = variant.name == name or name not in found
                row.append("" if same else _said(difference(found, variant.name, name)))
        if asked:
            row.append(" / ".join(f"{np.mean([r['asked'][-1][i] for r in own]):.0%}" for i in (0, 1)))
        row.append(f"{np.mean([r['length'] for r in own]):.2f}" if variant.gram else "")
        row.append(", ".join(f"{np.mean([r['disparity'] for r in own], (0, 1))[m]:.0%}" for m in (0, 1)))
        row.append(f"{np.mean([r['loss'] for r in own]):.2f}")
        rows.append(row)
    said = "; ".join(f"*{v.name}*: {v.label}" for v in experiment.variants if v.name in found)
    lines = "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n\n"
    return f"{lines}{_note(records, experiment)} {said}." if said else _note(records, experiment)


def _said(found: Estimate) -> str:
    return f"**{found.points()}**" if found.clear and not math.isnan(found.half) else found.points()


def _note(records: Sequence[Record], experiment: Experiment) -> str:
    own = [r for r in records if r["experiment"] == experiment.name]
    if not own:
        return "Not measured yet."
    counts = {len({r["seed"] for r in own if r["variant"] == name}) for name in {r["variant"] for r in own}}
    seeds = " to ".join(str(n) for n in sorted({min(counts), max(counts)}))
    answers = next(iter(own[0]["accuracy"].values()))["answers"]
    first = f", after {experiment.before[1]} steps on the task “{experiment.before[0]}”" if experiment.before else ""
    layers = f"{experiment.layers} layer{'s' * (experiment.layers > 1)}"
    return f"{layers}, {experiment.steps} steps{first}, {seeds} seeds, {answers} held-out answers per seed."


def machine(records: Sequence[Record]) -> str:
    """What the numbers were made on."""
    said = {}
    for record in records:
        e = record["environment"]
        said[f"{e['cpu']}, {e['cores']} cores, torch {e['torch']}, backend {record['backend']}, {e['date'][:10]}"] = (
            None
        )
    return "Machine: " + "; ".join(said) + "."


def updated(text: str, records: Sequence[Record]) -> str:
    """The page with what stands between its markers made anew."""

    def made(match: re.Match[str]) -> str:
        name = match[1]
        new = machine(records) if name == "machine" else table(records, EXPERIMENTS[name])
        return f"<!-- {name}:begin -->\n{new}\n<!-- {name}:end -->"

    return re.sub(r"<!-- ([\w-]+):begin -->\n.*?\n?<!-- \1:end -->", made, text, flags=re.DOTALL)
