"""Tensors that outlive the call that made them: layouts, and what is remembered on them.

Whoever uses a layout first may do so in inference mode, and whoever uses it next may train on it. What inference mode
makes can't be saved for a backward, ever, so such tensors are made outside of it.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def lasting(make: Callable[P, T]) -> Callable[P, T]:
    """A function that does its work outside of inference mode, wherever it is called."""

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> T:
        # While a compiler traces, nothing is remembered (and it can't tell the mode).
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return make(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():  # the first alone would ask for gradients
            return make(*args, **kwargs)

    return made
