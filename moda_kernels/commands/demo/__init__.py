"""What alignment is good for, in a minute: small decoders learn to answer questions about scanned digits, with plain
attention, with MODA, and with MODA whose Gram matrix is another document's. Prints results with intervals over seeds,
who attends to whom, and writes a picture."""

import argparse
import importlib.util
import sys
import time
from dataclasses import replace
from pathlib import Path

from moda_kernels import backends
from moda_kernels.commands.demo import picture, report
from moda_kernels.commands.demo.model import CONTROL, MASK_ALONE, MASK_AND_MODA, MODA, PLAIN
from moda_kernels.commands.demo.runs import train_all
from moda_kernels.commands.demo.tasks import TASKS
from moda_kernels.commands.demo.train import QUICK_STEPS, Plan, material_of

SEEDS = 3
NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
FORMATS = (".png", ".pdf", ".svg")
VARIANTS = {"naming": (PLAIN, MASK_ALONE, MASK_AND_MODA)}
#: Keys are normed here (QK-norm), so aligned ones keep their lengths. It also makes seeds differ less.
ALIGNED = (
    PLAIN,
    replace(MODA, label=f"{MODA.label}; each key keeps its length", renorm=True),
    replace(CONTROL, renorm=True),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `demo`."""
    tasks = "; ".join(f"{name}: {task.summary}" for name, task in TASKS.items())
    parser.add_argument("--task", choices=TASKS, default="which", help=f"default: which. {tasks}")
    parser.add_argument("--layers", type=_positive, help="of each decoder (default: the task's; which: 1)")
    parser.add_argument("--seeds", type=_positive, help=f"how many (default: {SEEDS}; --quick: 1)")
    parser.add_argument("--seed", type=int, default=0, help="the first, of weights, split and order (default: 0)")
    parser.add_argument("--steps", type=_positive, help="of training per model (default: the task's; which: 400)")
    parser.add_argument("--out", type=Path, default=Path("moda-demo.png"), help="the picture (default: %(default)s)")
    parser.add_argument("--jobs", type=_positive, help="processes (default: one per core)")
    parser.add_argument("--backend", help="run attention on this backend (default: the first that can)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default: cpu)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps, one seed, few tests: does it run?")


def run(arguments: argparse.Namespace) -> int:
    """Train, print, draw. Exit code 0, or 2 with a message where something is missing."""
    began = time.perf_counter()
    problem = _problem(arguments)
    if problem:
        print(problem, file=sys.stderr)
        return 2
    task, variants = TASKS[arguments.task], VARIANTS.get(arguments.task, ALIGNED)
    steps = arguments.steps or (QUICK_STEPS if arguments.quick else task.steps)
    layers = arguments.layers or task.layers
    seeds = range(arguments.seed, arguments.seed + (arguments.seeds or (1 if arguments.quick else SEEDS)))
    labels = [(variant.name, variant.label) for variant in variants]
    print(report.explanation(len(seeds), task.name, layers, steps, labels) + "\n", flush=True)
    common = {"backend": arguments.backend, "device": arguments.device, "quick": arguments.quick}
    plans = [Plan(task.name, v, seed, layers, steps, **common) for seed in seeds for v in variants]
    try:
        runs = train_all(plans, arguments.jobs)
    except NotImplementedError as error:  # a named backend that can't run this
        print(f"\nThe demo can't run so: {error}", file=sys.stderr)
        return 2
    material = material_of(task.name, seeds[0], 1, arguments.device, arguments.quick)
    print("\n" + report.results_table(runs, material))
    print("\n" + report.difference_table(runs, task.name))
    print("\n" + report.SHARES_EXPLAINED + "\n")
    print(report.shares_table(runs, material))
    print("\n" + report.conclusion(runs, task.name))
    picture.draw(runs, material, arguments.out)
    print(f"\nPicture: {arguments.out} ({time.perf_counter() - began:.0f} s in all)")
    return 0


def _problem(arguments: argparse.Namespace) -> str | None:
    """What would stop the demo after a minute of training; None if nothing."""
    missing = [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        return f"The demo needs {' and '.join(missing)}: pip install {' '.join(missing)}"
    if arguments.out.suffix not in FORMATS or not arguments.out.parent.is_dir():
        return f"--out: expected a {', '.join(FORMATS)} file in a folder that exists, got {arguments.out}"
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            return "--device cuda: torch finds no CUDA device (see python -m moda_kernels doctor)"
    try:
        backends.named_backend(arguments.backend)
    except ValueError as error:
        return str(error)
    return None


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, got {text}")
    return number
