"""What every kernel is launched with and how, and how tables of configurations are read.

A kernel kind has a frozen dataclass (a `Launch` with its block sizes) and a table: architecture (of `TABLES` in
`architectures.py`) → bits of the numbers
that its dots multiply → the largest head size that an entry is for → entry.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from moda_kernels.runtime.architectures import Target

C = TypeVar("C")


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


class Ready:
    """A launch with everything but some pointers. The same again costs a fraction of what Triton's launcher takes, as
    that finds out each time which of its compiled variants the arguments are for.

    Whoever keeps one may call it with pointers of the same types only, None where there was None. Which addresses are
    multiples of 16 is looked at: Triton compiles a variant for each such pattern.

    Args:
        grid, device: as of `launch`.
        varying: names of the arguments that a call brings: tensors, or NamedTuples of tensors and None.
        given: all others by name, and more: what the kernel does not take is left out.
        options: warps and stages.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        device: torch.device,
        varying: tuple[str, ...],
        given: Mapping[str, Any],
        **options: int,
    ) -> None:
        self.kernel, self.device, self.varying = kernel, device, varying
        self.grid = (*grid, 1, 1)[:3]
        self.given = {name: given[name] for name in kernel.arg_names if name not in varying}
        self.options = options
        names = list(kernel.arg_names)
        self.row = [self.given.get(name) for name in names]
        self.places = [names.index(name) for name in varying]
        self.compiled: dict[int, Any] = {}

    def __call__(self, *pointers: Any) -> None:
        pattern = _pattern(pointers)
        compiled = self.compiled.get(pattern)
        if compiled is not None:
            row = self.row.copy()
            for place, pointer in zip(self.places, pointers, strict=True):
                row[place] = pointer
            launch(compiled, self.grid, self.device, *row)
            return
        named = dict(zip(self.varying, pointers, strict=True))
        compiled = launch(self.kernel, self.grid, self.device, **named, **self.given, **self.options)
        if compiled is not None:
            self.compiled[pattern] = compiled


def _pattern(pointers: tuple[Any, ...]) -> int:
    """A bit for each tensor: whether it begins beside a multiple of 16 bytes."""
    bits = 1
    for value in pointers:
        for x in value if isinstance(value, tuple) else (value,):
            bits += bits
            if x is not None and x.data_ptr() & 15:
                bits += 1
    return bits


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


def find(table: Mapping[Target, Mapping[int, Mapping[int, C]]], architecture: Target, bits: int, size: int) -> C:
    """The entry for an architecture with a table of its own, the bits of a number and a head size."""
    rows = table[architecture][bits]
    return rows[min(limit for limit in rows if limit >= size)]
