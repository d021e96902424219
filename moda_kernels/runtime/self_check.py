"""Kernels are tried once before they are trusted, on architectures on which they were never proven.

The first use of each kind of kernel (what it does, dtype, head sizes) is preceded by a trial: the kernel against
another engine on small inputs. What fails it (a wrong number, NaN, an exception) is told once, with what to report, and
that kind is not used again in this process. Whoever has kernels says what a trial is; this file knows when there is
one.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from moda_kernels.runtime import checks
from moda_kernels.runtime.architectures import gcn_name

log = logging.getLogger("moda_kernels")

#: 1 tries kernels on every device, 0 on none. Default: on architectures that are not `PROVEN`.
ENVIRONMENT = "MODA_KERNELS_SELF_CHECK"
#: Where the parity suite has passed on hardware (`benchmarks/gpu.py` runs it), as `architecture` names them.
PROVEN: frozenset[str] = frozenset()
#: Beside the error of the same maths in PyTorch, which may be four times as large: units in the last place of the
#: largest number, and, since GPUs may multiply float32 in TensorFloat-32, more there.
ULPS, TF32 = 8, 5e-3

#: Architecture and kind, and why it is not trusted; None where it is.
_found: dict[tuple[str, ...], str | None] = {}


def why_not(kind: tuple[str, ...], device: torch.device, trial: Callable[[], str | None]) -> str | None:
    """Why kernels of a kind are not trusted on a device; None where they are. Tries them where that is not yet known.

    Args:
        kind: in words; the first says what kind of kernel.
        trial: runs it; returns what is wrong, None if nothing. What it raises is wrong, too.
    """
    if not wanted(device):
        return None
    key = (architecture(device), *kind)
    if torch.compiler.is_compiling():
        known: str | None = _known(key)
        return known
    if key not in _found:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return _unknown(key)
        _found[key] = None  # a trial may come by here
        try:
            fault = _alone(trial, device)
        except Exception as error:  # a launch may fail in any way
            fault = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if fault is not None:
            _found[key] = f"{' '.join(kind)} failed its self-check on {key[0]} ({fault})"
            _tell(key, fault, device)
    return _found[key]


def _alone(trial: Callable[[], str | None], device: torch.device) -> str | None:
    """In a thread of its own: what stands around the call (modes, autocast, torch.func) is none of its business."""

    def run() -> str | None:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return trial()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def wanted(device: torch.device) -> bool:
    """Whether kernels are tried on a device.

    Raises:
        ValueError: the environment says neither 0 nor 1.
    """
    chosen = os.environ.get(ENVIRONMENT) or None
    if chosen is None:
        return device.type != "cpu" and architecture(device) not in PROVEN
    return checks.choice(ENVIRONMENT, chosen, ("0", "1")) == "1"


def architecture(device: torch.device) -> str:
    """As `PROVEN` has it: "sm_90", "gfx942", or the device's type."""
    if device.type != "cuda":
        return device.type
    name: str = _gpu(torch.cuda.current_device() if device.index is None else device.index)
    return name


@functools.cache
@torch.compiler.assume_constant_result
def _gpu(index: int) -> str:
    if torch.version.hip is not None:
        return gcn_name(index)
    return "sm_{}{}".format(*torch.cuda.get_device_capability(index))


@torch.compiler.assume_constant_result
def _known(key: tuple[str, ...]) -> str | None:
    return _found.get(key, _unknown(key))


def _unknown(key: tuple[str, ...]) -> str:
    kind = " ".join(key[1:])
    return f"{kind} has not passed its self-check on {key[0]} yet: call it once outside torch.compile and graphs"


def _tell(key: tuple[str, ...], fault: str, device: torch.device) -> None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    log.warning(
        "Triton kernels (%s) failed their self-check on %s (%s) and are not used in this process: %s. Please report "
        "this line together with the output of `python -m moda_kernels doctor` and `python -m moda_kernels verify`. "
        "(%s=0 switches the check off.)",
        " ".join(key[1:]), name, key[0], fault, ENVIRONMENT,
    )  # fmt: skip


def difference(name: str, got: Tensor, usual: Tensor, exact: Tensor) -> str | None:
    """What is wrong with a kernel's tensor, None if nothing.

    Args:
        usual, exact: the same from PyTorch, in the kernel's dtype and in float64.
    """
    if got.shape != exact.shape:
        return f"{name} has shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    special = ~torch.isfinite(exact)
    if not torch.equal(torch.isfinite(got), ~special):
        return f"{name} has NaN or infinities that it should not have, or lacks some"
    if bool(special.all()):
        return None
    error, of_usual = (float((x.double() - exact)[~special].abs().max()) for x in (got, usual))
    largest = float(exact[~special].abs().max())
    share = ULPS * torch.finfo(got.dtype).eps
    if got.dtype == torch.float32 and got.device.type == "cuda":
        share = max(share, TF32)
    allowed = 4 * of_usual + share * largest
    return None if error <= allowed else f"{name} is off by {error:.2g}, allowed {allowed:.2g}"
