"""Triton kernels and their launchers. This file: whether they can run here; it imports Triton only to look.

The other files import Triton and are themselves imported only where `runs_on` says yes. They know tensors and sizes,
nothing of layouts, masks or autograd.
"""

import functools
import re

import torch

from moda_kernels.runtime import backend_name

#: The oldest release that the kernels are compiled with in the tests.
OLDEST = (3, 6)
#: Compute capability: the first with bfloat16 and asynchronous copies.
OLDEST_GPU = (8, 0)


@functools.cache
@torch.compiler.assume_constant_result
def why_absent() -> tuple[str, ...]:
    """Every reason why no kernel can run in this process; empty if some device can."""
    try:
        import triton
    except ImportError as error:
        return (f"Triton cannot be imported ({error}); it comes with PyTorch for CUDA, or: pip install triton",)
    version = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
    if version < OLDEST:
        return (f"it needs Triton {OLDEST[0]}.{OLDEST[1]} or newer, got {triton.__version__}",)
    if interpreted():
        return ()
    if torch.version.hip is not None:
        return (f"PyTorch is built for ROCm {torch.version.hip}, where its kernels were only compiled, never run",)
    if not torch.cuda.is_available():
        other = ", and on XPU its kernels were never run" if torch.xpu.is_available() else ""
        return (
            f"PyTorch finds no CUDA device{other} (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests)",
        )
    return ()


@functools.cache
@torch.compiler.assume_constant_result
def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter in this process (TRITON_INTERPRET=1 before it was imported)."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)


def why_not_on(device: torch.device) -> str | None:
    """Why kernels don't run on a device; None where they do."""
    if interpreted():
        return None if device.type == "cpu" else f"in Triton's interpreter tensors must be on the CPU, not {device}"
    if device.type != "cuda":
        return f"it runs on CUDA devices, the tensors are on {device}"
    reason: str | None = _why_not_on_gpu(torch.cuda.current_device() if device.index is None else device.index)
    return reason


@functools.cache
@torch.compiler.assume_constant_result
def _why_not_on_gpu(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_GPU:
        needed = "{}.{}".format(*OLDEST_GPU)
        return f"it needs compute capability {needed} or newer, cuda:{index} has {capability[0]}.{capability[1]}"
    return None


def runs_on(device: torch.device) -> bool:
    """Whether an operator that is no backend's own should use its kernel: on a GPU wherever it can, in the interpreter
    only where the backend "triton" has been asked for."""
    if why_absent() or why_not_on(device):
        return False
    return not interpreted() or backend_name.name() == "triton"
