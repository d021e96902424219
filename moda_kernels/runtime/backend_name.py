"""Which backend has been asked for, by `use_backend` or the environment. At the bottom of the house, because kernels
below the backends want to know it too."""

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch

#: Names a backend for the whole process, as `use_backend` does for a block.
ENVIRONMENT = "MODA_KERNELS_BACKEND"

Options = tuple[tuple[str, Any], ...]

#: The innermost block's name, and the options that were given with it, checked and sorted.
_in_block: ContextVar[tuple[str, Options] | None] = ContextVar("moda_kernels_backend", default=None)
#: The same for code that is being compiled, which can't read context variables: those of all threads, newest last.
_blocks: list[tuple[str, Options]] = []


@contextlib.contextmanager
def block(name: str, options: Options = ()) -> Iterator[None]:
    """Within it, `name()` is this one, with these options."""
    token = _in_block.set((name, options))
    _blocks.append((name, options))
    try:
        yield
    finally:
        del _blocks[len(_blocks) - 1 - _blocks[::-1].index((name, options))]
        _in_block.reset(token)


def _innermost() -> tuple[str, Options] | None:
    return (_blocks[-1] if _blocks else None) if torch.compiler.is_compiling() else _in_block.get()


def name() -> str:
    """The name asked for, not checked; "auto" where none was."""
    inner = _innermost()
    return (inner[0] if inner is not None else None) or os.environ.get(ENVIRONMENT) or "auto"


def options(backend: str) -> Options:
    """The options that the innermost block gave with this backend's name; none where it gave none or names another."""
    inner = _innermost()
    return inner[1] if inner is not None and inner[0] == backend else ()
