"""A toy on real data: small decoders learn to answer questions about scanned digits, with plain causal attention, with
a modular mask, and with MODA (mask and duplex alignment). Prints results, attention shares and writes a picture."""

import argparse
import importlib.util
import sys
import time
from pathlib import Path

import torch

from moda_kernels import backends
from moda_kernels.commands.demo import report
from moda_kernels.commands.demo.train import train_all

STEPS, QUICK_STEPS = 800, 12
NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
FORMATS = (".png", ".pdf", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `demo`."""
    parser.add_argument("--steps", type=_positive, help=f"training steps per variant (default: {STEPS})")
    parser.add_argument("--seed", type=int, default=0, help="of weights, split and order (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("moda-demo.png"), help="the picture (default: %(default)s)")
    parser.add_argument("--backend", help="run attention on this backend (default: the first that can)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default: cpu)")
    parser.add_argument("--threads", type=_positive, default=1, help="of torch; the tensors are tiny (default: 1)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps, few tests: does it run?")


def run(arguments: argparse.Namespace) -> int:
    """Train, print, draw. Exit code 0, or 2 with a message where something is missing."""
    began = time.perf_counter()
    problem = _problem(arguments)
    if problem:
        print(problem, file=sys.stderr)
        return 2
    steps = arguments.steps or (QUICK_STEPS if arguments.quick else STEPS)
    print(report.explanation() + "\n", flush=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        runs, material = train_all(arguments.seed, steps, arguments.backend, arguments.device, arguments.quick)
    except NotImplementedError as error:  # a named backend that can't run this
        print(f"\nThe demo can't run so: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    print("\n" + report.results_table(runs, material))
    print("\n" + report.SHARES_EXPLAINED + "\n")
    print(report.shares_table(runs, material))
    print("\n" + report.conclusion(runs))
    report.draw(runs, material, arguments.out)
    print(f"\nPicture: {arguments.out} ({time.perf_counter() - began:.0f} s in all)")
    return 0


def _problem(arguments: argparse.Namespace) -> str | None:
    """What would stop the demo after a minute of training; None if nothing."""
    missing = [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        return f"The demo needs {' and '.join(missing)}: pip install {' '.join(missing)}"
    if arguments.out.suffix not in FORMATS or not arguments.out.parent.is_dir():
        return f"--out: expected a {', '.join(FORMATS)} file in a folder that exists, got {arguments.out}"
    if arguments.device == "cuda" and not torch.cuda.is_available():
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
