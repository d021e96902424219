"""Which backend has been asked for, by `use_backend` or the environment. At the bottom of the house, because kernels
below the backends want to know it too."""

import os
from contextvars import ContextVar

#: Names a backend for the whole process, as `use_backend` does for a block.
ENVIRONMENT = "MODA_KERNELS_BACKEND"

name_in_block: ContextVar[str | None] = ContextVar("moda_kernels_backend", default=None)


def name() -> str:
    """The name asked for, not checked; "auto" where none was."""
    return name_in_block.get() or os.environ.get(ENVIRONMENT) or "auto"
