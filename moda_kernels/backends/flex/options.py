"""What FlexAttention's users may tell it, in one place: `use_backend("flex", …)` or `MODA_KERNELS_FLEX_OPTIONS`.

Names are those of its `kernel_options` (also with "fwd_" or "bwd_" before them), and BLOCK_SIZE, of the block mask's
tiles.
"""

import functools
import json
import os
from collections.abc import Mapping
from typing import Any

import torch

from moda_kernels.runtime import backend_name, checks

#: A JSON object of options, for the whole process.
ENVIRONMENT = "MODA_KERNELS_FLEX_OPTIONS"
BLOCK_SIZE = "BLOCK_SIZE"


def current() -> tuple[tuple[str, Any], ...]:
    """The options in force, sorted; those of the innermost `use_backend` that gave any, else the environment's.

    Raises:
        ValueError, TypeError: the environment's are no JSON object, or as `check`.
    """
    return backend_name.options("flex") or _from_environment(os.environ.get(ENVIRONMENT))


@functools.cache
def _from_environment(text: str | None) -> tuple[tuple[str, Any], ...]:
    if not text:
        return ()
    try:
        given = json.loads(text)
    except json.JSONDecodeError:
        given = None
    if not isinstance(given, dict):
        raise checks.wrong_value(ENVIRONMENT, 'a JSON object, as {"BACKEND": "FLASH"}', text)
    return check(ENVIRONMENT, given)


def check(argument: str, given: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Options, checked and sorted.

    Raises:
        ValueError: an unknown name. TypeError: a value that is no bool, int, float or str (BLOCK_SIZE: no positive int
            or pair of them).
    """
    made: dict[str, Any] = {}
    for name, value in given.items():
        if name == BLOCK_SIZE:
            sizes = value if isinstance(value, tuple | list) else (value, value)
            if len(sizes) != 2:
                raise checks.wrong_value(f"{argument}: {name}", "an int or (queries, keys)", value)
            made[name] = tuple(checks.integer(f"{argument}: {name}", size, 1) for size in sizes)
            continue
        if name.removeprefix("fwd_").removeprefix("bwd_") not in _names():
            raise checks.wrong_value(argument, f"names of {', '.join((BLOCK_SIZE, *_names()))}", name)
        if not isinstance(value, bool | int | float | str):
            raise checks.wrong_type(f"{argument}: {name}", "a bool, int, float or str", value)
        made[name] = value
    return tuple(sorted(made.items()))


@functools.cache
def _names() -> tuple[str, ...]:
    from torch.nn.attention.flex_attention import FlexKernelOptions

    return tuple(sorted(FlexKernelOptions.__annotations__))


def is_flash(options: tuple[tuple[str, Any], ...]) -> bool:
    return ("BACKEND", "FLASH") in options


def block_size(options: tuple[tuple[str, Any], ...], device: torch.device) -> tuple[int, int]:
    """Queries and keys of a tile of the block mask: what was asked for, else what the engine wants."""
    chosen: tuple[int, int] | None = dict(options).get(BLOCK_SIZE)
    if chosen is not None:
        return chosen
    return (256, 128) if is_flash(options) and is_blackwell(device) else (128, 128)


def is_blackwell(device: torch.device) -> bool:
    return (
        device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (10, 11)
    )


def for_kernels(options: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, value) for name, value in options if name != BLOCK_SIZE)
