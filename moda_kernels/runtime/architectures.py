"""GPU architectures: how much shared memory a block can have, and whose table of configurations each one takes."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

#: An NVIDIA GPU's compute capability, as 90 for 9.0, or an AMD GPU's name, as "gfx942".
Target = int | str


class Architecture(NamedTuple):
    """table: the target whose configurations are launched; shared: bytes that a block can have."""

    table: Target
    shared: int


_KB = 1024
#: What kernels are compiled and checked for without a GPU. Shared memory: CUDA C++ programming guide, compute
#: capabilities (of 100 KB on a multiprocessor a block of sm_86, 89 and 120 can have 99); AMD CDNA 2 to 4, local data
#: share.
KNOWN: Mapping[Target, Architecture] = {
    80: Architecture(80, 163 * _KB),
    86: Architecture(86, 99 * _KB),
    89: Architecture(86, 99 * _KB),
    90: Architecture(90, 227 * _KB),
    100: Architecture(100, 227 * _KB),
    103: Architecture(100, 227 * _KB),
    120: Architecture(120, 99 * _KB),
    "gfx90a": Architecture("gfx942", 64 * _KB),
    "gfx942": Architecture("gfx942", 64 * _KB),
    "gfx950": Architecture("gfx942", 160 * _KB),
}
#: Those with a table of their own.
TABLES: tuple[Target, ...] = tuple(dict.fromkeys(known.table for known in KNOWN.values()))


def table_of(target: Target) -> Target:
    """The table for a GPU. One that is not known takes the table of the last known one that is not newer, which is
    never one with more shared memory (8.7: 8.6's; 12.1: 12.0's); of an AMD GPU the one for the least."""
    if isinstance(target, str):
        return KNOWN[target if target in KNOWN else "gfx942"].table
    return KNOWN[max((k for k in KNOWN if isinstance(k, int) and k <= target), default=80)].table


def architecture(device: torch.device) -> Target:
    """The table to look in for a device; the interpreter, which has no limits, takes sm_90's."""
    if device.type != "cuda":
        return 90
    if torch.version.hip is not None:
        return table_of(gcn_name(device))
    major, minor = torch.cuda.get_device_capability(device)
    return table_of(10 * major + minor)


def gcn_name(device: torch.device | int) -> str:
    """An AMD GPU's name, without its features: "gfx942"."""
    return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
