"""Which backend has been asked for, by `use_backend` or the environment. At the bottom of the house, because kernels
below the backends want to know it too."""

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar

import torch

#: Names a backend for the whole process, as `use_backend` does for a block.
ENVIRONMENT = "MODA_KERNELS_BACKEND"

name_in_block: ContextVar[str | None] = ContextVar("moda_kernels_backend", default=None)
#: The same for code that is being compiled, which can't read context variables: those of all threads, newest last.
_blocks: list[str] = []


@contextlib.contextmanager
def block(name: str) -> Iterator[None]:
    """Within it, `name()` is this one."""
    token = name_in_block.set(name)
    _blocks.append(name)
    try:
        yield
    finally:
        del _blocks[len(_blocks) - 1 - _blocks[::-1].index(name)]
        name_in_block.reset(token)


def name() -> str:
    """The name asked for, not checked; "auto" where none was."""
    inner = (_blocks[-1] if _blocks else None) if torch.compiler.is_compiling() else name_in_block.get()
    return inner or os.environ.get(ENVIRONMENT) or "auto"
