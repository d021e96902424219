"""`python -m moda_kernels.testing`: random calls of `moda_attention` on a backend, as many as asked for.

Each fault is one line that repeats it. The exit code is 0 only where there is none.
"""

import argparse
import contextlib
import os
import sys
import time

import torch

from moda_kernels.backends import BACKENDS
from moda_kernels.testing import eager_flex, fuzz


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moda_kernels.testing", description=__doc__)
    parser.add_argument("--backend", choices=[*fuzz.DTYPES], default="cpu", help="default: cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the first call; the next ones count up from it")
    parser.add_argument("--calls", type=int, default=500, help="default: 500")
    given = parser.parse_args(arguments)
    on_gpu = given.backend == "triton" and torch.cuda.is_available()
    if given.backend == "triton" and not on_gpu and "TRITON_INTERPRET" not in os.environ:
        # It has to be there before Triton is imported, and that was done already.
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "moda_kernels.testing", *(arguments or sys.argv[1:])])
    absent = BACKENDS[given.backend].why_absent()
    if absent:
        parser.error(f"{given.backend}: {'; '.join(absent)}")
    torch.set_num_threads(1)  # many tiny tensors: threads would only wait for each other
    start = time.perf_counter()
    device = "cuda" if given.backend == "triton" and torch.cuda.is_available() else "cpu"
    with eager_flex() if given.backend == "flex" else contextlib.nullcontext():
        faults, refused = fuzz.trials(
            given.seed, given.calls, given.backend, device, told=lambda line: print(line, flush=True)
        )
    took = time.perf_counter() - start
    print(f"{given.calls} calls on {given.backend!r} in {took:.0f} s: {len(faults)} wrong, {refused} refused")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
