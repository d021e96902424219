"""What every kernel is launched with and how, and how tables of configurations are read.

A kernel kind has a frozen dataclass (a `Launch` with its block sizes) and a table: architecture → bits of the numbers
that its dots multiply → the largest head size that an entry is for → entry.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

C = TypeVar("C")

#: Architectures with a table of their own; any other GPU takes the entries of the last one that isn't newer.
ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Launch:
    """What every kernel is launched with."""

    num_warps: int
    num_stages: int


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **named: Any) -> Any:
    """Launch a Triton kernel on the device of its tensors, whichever device is current: the one place that launches.

    Returns:
        What the launch returns: the compiled kernel (the interpreter: None).
    """
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return kernel[grid](*arguments, **named)
    with torch.cuda.device(device):
        return kernel[grid](*arguments, **named)


def architecture(device: torch.device) -> int:
    """The table to look in for a device; the interpreter, which has no limits, takes sm_90's."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return max((a for a in ARCHITECTURES if a <= 10 * major + minor and major < 12), default=ARCHITECTURES[0])


def float32_dots() -> str:
    """`input_precision` of float32 products: IEEE unless torch's own switch allows TF32."""
    matmul = torch.backends.cuda.matmul
    # Since torch 2.9 there are two interfaces, and after the newer one has been used the older one raises.
    precision = getattr(matmul, "fp32_precision", None)
    if precision == "none":
        precision = getattr(torch.backends, "fp32_precision", "none")
    allowed = matmul.allow_tf32 if precision is None else precision == "tf32"
    return "tf32" if allowed else "ieee"


def padded(size: int) -> int:
    """A head size as `tl.dot` takes it: a power of two of at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def find(table: Mapping[int, Mapping[int, Mapping[int, C]]], capability: int, bits: int, size: int) -> C:
    """The entry for an architecture, the bits of a number and a head size."""
    rows = table[capability][bits]
    return rows[min(limit for limit in rows if limit >= size)]
