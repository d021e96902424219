"""`python -m benchmarks.experiments`: train what is missing from the result file, then make the page's tables.

Each model is a line of the file, written as soon as it is trained: stop and go on as you like. A model that is there
already is not trained again; to begin anew, delete the file."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.experiments import page
from benchmarks.experiments.plans import EXPERIMENTS, Experiment
from moda_kernels.commands.bench.results import environment
from moda_kernels.commands.demo.runs import train_all
from moda_kernels.commands.demo.train import Plan, Run


def record(experiment: Experiment, run: Run, where: dict[str, object]) -> dict[str, object]:
    """One model as a line of the result file."""
    plan = run.plan
    return {
        "experiment": experiment.name,
        "task": plan.task,
        "layers": plan.layers,
        "steps": plan.steps,
        "seed": plan.seed,
        "variant": plan.variant.name,
        "backend": run.backend,
        "accuracy": {kind: vars(found) for kind, found in run.held_out.accuracy.items()},
        "rate": run.rate,
        "loss": run.held_out.loss,
        "train_loss": sum(run.losses[-20:]) / len(run.losses[-20:]),
        "checks": run.checks,
        **vars(run.shares),
        "seconds": round(run.seconds, 2),
        "environment": where,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write, make the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--seeds", type=int, help="of each experiment (default: its own number)")
    parser.add_argument("--jobs", type=int, help="processes (default: one per core)")
    parser.add_argument("--out", type=Path, default=page.RESULTS, help="result file (default: %(default)s)")
    parser.add_argument("--page", action="store_true", help="train nothing: make the page from the result file")
    asked = parser.parse_args(arguments)
    unknown = [name for name in asked.names if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"unknown experiment {', '.join(unknown)}; known: {', '.join(EXPERIMENTS)}")
    if not asked.page:
        for name in asked.names or EXPERIMENTS:
            _run(EXPERIMENTS[name], asked.seeds, asked.jobs, asked.out)
    if asked.out == page.RESULTS:
        text = page.PAGE.read_text(encoding="utf-8")
        page.PAGE.write_text(page.updated(text, page.read(asked.out)), encoding="utf-8")
    return 0


def _run(experiment: Experiment, seeds: int | None, jobs: int | None, out: Path) -> None:
    """What is missing, each model written down as it ends."""
    there = {(r["variant"], r["seed"]) for r in page.read(out) if r["experiment"] == experiment.name}
    plans: list[Plan] = [p for p in experiment.plans(seeds) if (p.variant.name, p.seed) not in there]
    where = environment()

    def write(run: Run) -> None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record(experiment, run, where), ensure_ascii=False) + "\n")

    if plans:
        print(f"{experiment.name}: {len(plans)} models", flush=True)
        train_all(plans, jobs, write)


if __name__ == "__main__":
    sys.exit(main())
