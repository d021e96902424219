"""`python -m benchmarks`: as `python -m moda_kernels bench`, but the result file and the picture of a whole plan go
where the README's table is made from. Then: `python -m benchmarks.readme`."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.readme import RESULTS
from moda_kernels.commands import bench


def result_file(device: str | None) -> Path:
    """One for the CPU, and one for each GPU model: numbers of two GPUs never meet in a file."""
    if device == "cpu" or not torch.cuda.is_available():
        return RESULTS / "attention-cpu.jsonl"
    model = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower().removeprefix("nvidia")).strip("-")
    return RESULTS / f"attention-{model}.jsonl"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; the exit code of `bench`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    bench.add_arguments(parser)
    elsewhere = parser.get_default("out")
    parser.set_defaults(out=None)
    asked = parser.parse_args(arguments)
    if asked.out is None:
        chosen = (asked.quick, asked.tiny, asked.read, asked.layouts, asked.lengths, asked.dtypes, asked.modes)
        # A part must not take the place of the whole.
        asked.out = elsewhere if any(chosen) or asked.contestants else result_file(asked.device)
    return bench.run(asked)


if __name__ == "__main__":
    sys.exit(main())
