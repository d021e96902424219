"""Training many models: in processes of one thread each, because the tensors are tiny, under one line of progress."""

import contextlib
import os
import queue
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from moda_kernels.commands.demo.train import Plan, Run, train

_queue: Any = None  # of a worker: where its steps are told


class Progress:
    """One line on stderr: how far all models are, what is left, the newest loss. No terminal: one at the end."""

    def __init__(self, total: int, width: int = 24) -> None:
        self.total, self.width, self.done, self.note = total, width, 0, ""
        self.began = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()
        self.longest = 0

    def step(self, note: str) -> None:
        self.done, self.note = self.done + 1, note
        now = time.monotonic()
        if self.live and now - self.shown > 0.2:
            self.shown = now
            self._write("\r")

    def end(self) -> None:
        self._write("\r" if self.live else "")
        sys.stderr.write("\n")

    def _write(self, start: str) -> None:
        bar = "#" * (self.width * self.done // max(self.total, 1))
        seconds = time.monotonic() - self.began
        left = seconds * (self.total - self.done) / max(self.done, 1)
        line = (
            f"[{bar:<{self.width}}] {self.done:,}/{self.total:,} steps, {seconds:.0f} s, {left:.0f} s left  {self.note}"
        )
        with contextlib.suppress(OSError):
            line = line[: os.get_terminal_size(sys.stderr.fileno()).columns - 1]
        self.longest = max(self.longest, len(line))
        sys.stderr.write(f"{start}{line.ljust(self.longest)}")
        sys.stderr.flush()


def jobs_here(plans: Sequence[Plan]) -> int:
    """Processes that are worth it: one per core, and one alone for a GPU or a few steps."""
    if any(plan.device != "cpu" for plan in plans) or sum(plan.all_steps for plan in plans) < 400:
        return 1
    return max(1, min(len(plans), len(os.sched_getaffinity(0))))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train_all(
    plans: Sequence[Plan], jobs: int | None = None, ended: Callable[[Run], None] = lambda run: None
) -> list[Run]:
    """Train all models; the runs, in the order of their plans. Results don't depend on the number of processes.

    Args:
        ended: is called with each run as soon as it is there.

    Raises:
        NotImplementedError: a named backend that can't run this.
    """
    jobs = jobs_here(plans) if jobs is None else min(jobs, len(plans))
    progress = Progress(sum(plan.all_steps for plan in plans))
    try:
        if jobs > 1:
            return _in_processes(plans, jobs, progress, ended)
        runs = []
        with one_thread():
            for plan in plans:
                runs.append(train(plan, _teller(plan, progress.step)))
                ended(runs[-1])
        return runs
    finally:
        progress.end()


def _teller(plan: Plan, step: Callable[[str], None]) -> Callable[[float], None]:
    return lambda loss: step(f"{plan.variant.name}, seed {plan.seed}: loss {loss:.2f}")


def _in_processes(plans: Sequence[Plan], jobs: int, progress: Progress, ended: Callable[[Run], None]) -> list[Run]:
    context = get_context("spawn")
    told = context.Queue()
    with ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=(told,)) as pool:
        futures = [pool.submit(_work, plan) for plan in plans]
        waiting = dict.fromkeys(futures)
        try:
            while waiting:
                with contextlib.suppress(queue.Empty):
                    progress.step(told.get(timeout=0.2))
                for future in [future for future in waiting if future.done()]:
                    del waiting[future]
                    ended(future.result())  # or raises what it raised
            with contextlib.suppress(queue.Empty):
                while True:
                    progress.step(told.get(timeout=0.05))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def _begin(told: Any) -> None:
    global _queue
    _queue = told
    torch.set_num_threads(1)


def _work(plan: Plan) -> Run:
    return train(plan, _teller(plan, _queue.put))
