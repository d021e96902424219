"""What all tests share: markers, seeds and the settings of the property tests."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

# Tests are many tiny tensors: threads would only wait for each other, NumPy's under Triton's interpreter, too.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Before Triton is imported: its interpreter then runs kernels on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What is faster on a machine is no business of a test's.
os.environ["MODA_KERNELS_CPU_ROUTE"] = "own"

from moda_kernels.testing import interpreter

interpreter.prepare()

try:
    from hypothesis import settings
except ModuleNotFoundError:  # the property tests ask for it themselves, the others run without it
    pass
else:
    # No deadline: a first call may compile a kernel. A gate has to give the same answer twice.
    settings.register_profile("moda", deadline=None, max_examples=50, print_blob=True, derandomize="CI" in os.environ)
    settings.load_profile("moda")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "exhaustive" not in config.getoption("markexpr"):
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def two() -> Iterator[Any]:
    """Two processes with gloo between them, for all tests that want some."""
    yield from _ranks(2)


@pytest.fixture(scope="session")
def four() -> Iterator[Any]:
    yield from _ranks(4)


def _ranks(size: int) -> Iterator[Any]:
    from ranks import Ranks

    started = Ranks(size)
    yield started
    started.close()


@pytest.fixture
def refused() -> Callable[..., None]:
    """Checks that a call raises, and that the message has the named parts, what was expected and what came."""

    def check(call: Callable[[], object], kind: type[Exception], parts: Iterable[str]) -> None:
        with pytest.raises(kind) as error:
            call()
        message = str(error.value)
        for part in (*parts, "expected", "got"):
            assert part in message, message

    return check
