"""MODA_KERNELS_AUTOTUNE=1: on the first call of each kind, try configurations on the call itself and keep the fastest.

Tile sizes belong to walks of tiles, which are made before a launch, so Triton's own tuner cannot try them. What is
found lasts as long as the process; `log` says what it was, for the table in `configs.py`.
"""

import functools
import logging
import os
from collections.abc import Callable, Hashable

import torch

from moda_kernels.backends.triton.configs import CANDIDATES

log = logging.getLogger("moda_kernels")

ENVIRONMENT = "MODA_KERNELS_AUTOTUNE"

#: Blocks of queries and keys, warps and stages.
Config = tuple[int, ...]
Configs = tuple[Config, ...]

_found: dict[Hashable, Configs] = {}


def wanted(device: torch.device) -> bool:
    """Whether configurations are searched for: asked for, on a GPU, and not while a graph is traced or captured."""
    if os.environ.get(ENVIRONMENT) != "1" or device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return not torch.cuda.is_current_stream_capturing()


def tuned(key: Hashable, start: Configs, differentiable: bool, run: Callable[[Configs, bool], object]) -> Configs:
    """The fastest configurations of forward, query's backward and keys' backward for calls with this key.

    Args:
        start: from the table; one of the three is changed at a time.
        run: runs the call with such configurations, the flag says whether with its backward. One that a GPU has no
            room for may raise.
    """
    key = (key, differentiable)
    if key not in _found:
        chosen = list(start)
        for i, kind in enumerate(("forward", "query", "keys")[: 3 if differentiable else 1]):
            times = {}
            for config in dict.fromkeys((start[i], *(tuple(c.numbers()) for c in CANDIDATES[kind]))):
                trial = (*chosen[:i], config, *chosen[i + 1 :])
                try:
                    times[config] = milliseconds(functools.partial(run, trial, i > 0))
                except Exception as error:  # no room, or it does not compile: not a candidate here
                    log.info("%s: %s left out: %s", kind, config, error)
            if times:
                chosen[i] = min(times, key=times.__getitem__)
                log.info("%s: %s for %s: %s", ENVIRONMENT, kind, key, {c: round(t, 4) for c, t in times.items()})
        _found[key] = tuple(chosen)
    return _found[key]


def milliseconds(run: Callable[[], object]) -> float:
    """The median time of a run on the GPU."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=40, return_mode="median"))
