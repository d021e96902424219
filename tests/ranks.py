"""Processes with gloo between them, started once and used by many tests.

They are forked from a server that has imported everything and done nothing yet. A job is a function of a test module
and its arguments; what it returns or raises on each rank comes back.
"""

import contextlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from moda_kernels.runtime import collectives

#: Imported once, by the server; what is missing here is left out.
PRELOADED = [
    "moda_kernels.distributed", "moda_kernels.testing", "moda_kernels.commands.bench.layouts",
    "torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint",
    "transformers.models.llava.modeling_llava", "transformers.models.gemma3.modeling_gemma3",
    "transformers.models.qwen2_vl.modeling_qwen2_vl",
]  # fmt: skip
#: Seconds; a job that takes longer has lost a rank.
PATIENCE = 400
#: Seconds that a rank waits for another.
TIMEOUT = 120


def _serve(rank: int, size: int, file: str, pipe: Connection) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(file, size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT))
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            os._exit(0)
        function, arguments = job
        try:
            torch.manual_seed(0)
            pipe.send((True, function(*arguments)))
        except Exception as error:
            pipe.send((False, (type(error).__name__, str(error), traceback.format_exc())))


class Ranks:
    """`size` processes; to be closed."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._folder = tempfile.TemporaryDirectory()
        file = str(Path(self._folder.name) / "store")
        self.size = size
        self._pipes: list[Connection] = []
        self._processes = []
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            for rank in range(size):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(rank, size, file, theirs), daemon=True)
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)
        finally:
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = threads

    def answers(self, function: Callable[..., Any], *arguments: Any) -> list[tuple[bool, Any]]:
        """Of every rank, whether it returned, and what; or its error's type, message and traceback."""
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.send((function, arguments))
        found: list[tuple[bool, Any]] = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(PATIENCE):
                raise AssertionError(f"rank {rank} of {self.size} hangs in {function.__name__}")
            try:
                found.append(pipe.recv())
            except (EOFError, ConnectionResetError):
                found.append((False, ("died", "", "")))
        return found

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What every rank returned; raises where one raised."""
        found = self.answers(function, *arguments)
        errors = [f"rank {rank}: {value[2]}" for rank, (good, value) in enumerate(found) if not good]
        assert not errors, "\n".join(errors)
        return [value for _, value in found]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


# What jobs need


def world() -> Any:
    import torch.distributed as dist

    return dist.group.WORLD


def alone() -> Any:
    """A group of this process alone; every rank has to ask."""
    import torch.distributed as dist

    made = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return made[dist.get_rank()]


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Nothing is sent within the block, or it is an error."""

    def refuse(name: str, *arguments: Any, **more: Any) -> None:
        raise AssertionError(f"{name} within silence")

    with mock.patch.object(collectives, "_run", refuse):
        yield
