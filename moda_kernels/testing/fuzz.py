"""Random calls (`random_calls.py`) and their verdict.

`judge` runs a call on a backend and holds it to the error criterion against the reference in float64; the reference
itself is held to the dense oracle (`dense.py`). `python -m moda_kernels.testing` runs as many as one likes.
"""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from moda_kernels import reference
from moda_kernels.backends.cpu import plan as cpu
from moda_kernels.backends.triton import plan
from moda_kernels.testing import dense
from moda_kernels.testing.oracle import compare, eager, oracle, poisoned_memory, run
from moda_kernels.testing.random_calls import DTYPES, Call, draw

__all__ = ["DTYPES", "Call", "draw", "judge", "trial", "trials"]

#: Random roundings in which the dense oracle is tried; the largest error of all is the measure. Most results are under
#: that of a few; of a sum that all but cancels (a parameter's gradient) one draw may be small by luck, the next ten
#: times as large: before a result is called wrong, many are tried.
ROUNDINGS = 3
ALL_ROUNDINGS = 24


def judge(call: Call, backend: str) -> list[str]:
    """What is wrong with a backend's answer to a call; empty if all is right.

    Raises:
        NotImplementedError: it refuses the call.
    """
    inputs = call.inputs()
    device = call.tokens.modality_ids.device
    # Any fused kernel's roundings, beside those of eager PyTorch.
    usual = [call.dense(dense.Rounded(call.dtype, seed)) for seed in range(ROUNDINGS)]
    if backend == "reference":
        # Key maps of the reference, token by token, and the package's own in turn.
        inputs = call.inputs(reference) if call.seed % 2 else inputs
        result, exact = run(inputs, torch.float64, "reference", device=device), call.dense()
    else:
        with poisoned_memory(), _few_keys_will_do(call.seed):
            result = run(inputs, call.dtype, backend, device=device)
        exact = oracle(inputs, call.dtype, device=device)
        usual += [] if call.dtype == torch.float64 else eager(inputs, call.dtype, device=device)
    compared = compare(result, exact, usual, call.dtype)
    if not all(verdict.good for verdict in compared) and call.dtype != torch.float64:
        usual += [call.dense(dense.Rounded(call.dtype, seed)) for seed in range(ROUNDINGS, ALL_ROUNDINGS)]
        compared = compare(result, exact, usual, call.dtype)
    return [str(verdict) for verdict in compared if not verdict.good]


@contextlib.contextmanager
def _few_keys_will_do(seed: int) -> Iterator[None]:
    """For every second seed backends do for few keys what pays for many only: "cpu" cuts masks into small rectangles,
    "triton" folds maps and takes its decode kernels."""
    free = {name: getattr(cpu, name)._replace(call=0, row=0, key=0) for name in ("COSTS", "NARROW_COSTS")}
    with contextlib.ExitStack() as stack:
        if seed % 2:
            stack.enter_context(mock.patch.multiple(cpu, **free))
            stack.enter_context(mock.patch.multiple(plan, FOLD_FROM=0, DECODE_FROM=0))
        yield


def trial(seed: int, backend: str, device: torch.device | str = "cpu") -> str | None:
    """A line that names the fault of a seed's call and repeats it; None where there is none.

    Raises:
        NotImplementedError: the backend refuses the call.
    """
    call = draw(seed, backend, device)
    try:
        wrong = judge(call, backend)
    except NotImplementedError:
        raise
    except Exception as error:
        wrong = [f"{type(error).__name__}: {error}"]
    if not wrong:
        return None
    return f"make fuzz BACKEND={backend} SEED={seed} CALLS=1  # {'; '.join(wrong)} ({call})"


def trials(
    first: int, count: int, backend: str, device: torch.device | str = "cpu", told: Callable[[str], None] | None = None
) -> tuple[list[str], int]:
    """The faults of ``count`` seeds from ``first`` on, and how many calls the backend refused."""
    faults, refused = [], 0
    for seed in range(first, first + count):
        try:
            fault = trial(seed, backend, device)
        except NotImplementedError as reason:
            refused += 1
            fault = None
            if told is not None:
                told(f"# seed {seed} refused: {reason}")
        if fault is not None:
            faults.append(fault)
            if told is not None:
                told(fault)
    return faults, refused
