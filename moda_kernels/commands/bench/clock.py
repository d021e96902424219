"""Clocks for the CPU and for CUDA, and what a machine can do at best: a matrix product's rate, a copy's bandwidth."""

import functools
import itertools
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

#: Called by the work between its parts.
Mark = Callable[[], None]
#: A GPU is kept busy so long before each sample, so that the host is ahead when the clock starts: what is timed is then
#: the device's work, not the host's launching of it (unless that takes longer still).
HEAD_START = 3e-3
#: Sizes of the matrix product and bytes of the copy: large enough to fill the machine, small enough for a second.
PRODUCT = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
REPEATS = 7


class Clock(Protocol):
    """Times work."""

    def spans(self, work: Callable[[Mark], object]) -> list[float]:
        """Seconds from the start to the first mark, from there to the next, …, to the end."""

    def wall(self, work: Callable[[], object]) -> float:
        """Seconds until all of the work is done, the host's part included."""


class HostClock:
    """For work that is done when the call returns."""

    def spans(self, work: Callable[[Mark], object]) -> list[float]:
        stamps = [time.perf_counter()]
        work(lambda: stamps.append(time.perf_counter()))
        stamps.append(time.perf_counter())
        return [end - begin for begin, end in itertools.pairwise(stamps)]

    def wall(self, work: Callable[[], object]) -> float:
        return self.spans(lambda _: work())[0]


class CudaClock:
    """Device time between events, with the L2 cache overwritten before each sample."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._l2 = torch.empty(2 * properties.L2_cache_size, dtype=torch.uint8, device="cuda")
        torch.cuda._sleep(1000)  # its first launch loads it
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        torch.cuda._sleep(10**7)
        end.record()
        end.synchronize()
        self._cycles = int(10**7 * HEAD_START * 1e3 / begin.elapsed_time(end))

    def spans(self, work: Callable[[Mark], object]) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True)]

        def mark() -> None:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

        self._l2.zero_()
        torch.cuda._sleep(self._cycles)
        events[0].record()
        work(mark)
        mark()
        events[-1].synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in itertools.pairwise(events)]

    def wall(self, work: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - begin


@functools.cache
def clock_for(device: str) -> Clock:
    """The clock of a device, made once."""
    return CudaClock() if device == "cuda" else HostClock()


_PEAKS: dict[tuple[str, torch.dtype], dict[str, float]] = {}


def peaks(device: str, dtype: torch.dtype, reached: Mapping[str, float] | None = None) -> dict[str, float]:
    """What this machine does at best: "gemm_tflops" of a large square product in this dtype, on random numbers, and
    "copy_gb_per_s", bytes read plus bytes written. Measured once a process; and again where something `reached` more,
    as the machine was then busier than it is now. The best of all measurements."""
    key = (device, dtype)
    best = _PEAKS.get(key)
    if best is None or any(best[name] < rate for name, rate in (reached or {}).items()):
        now = _peaks(device, dtype)
        _PEAKS[key] = now if best is None else {name: max(rate, best[name]) for name, rate in now.items()}
    return dict(_PEAKS[key])


def _peaks(device: str, dtype: torch.dtype) -> dict[str, float]:
    clock, n = clock_for(device), PRODUCT[device]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = _fastest(clock, lambda: a @ b)
    source = torch.empty(COPY_BYTES[device], dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = _fastest(clock, lambda: target.copy_(source))
    return {"gemm_tflops": 2 * n**3 / product / 1e12, "copy_gb_per_s": 2 * source.numel() / copy / 1e9}


def _fastest(clock: Clock, work: Callable[[], object]) -> float:
    """Not the median: whatever else the machine does must not make its best look worse than it is."""
    work()
    return min(clock.spans(lambda _: work())[0] for _ in range(REPEATS))


def synchronize(device: str) -> None:
    """Wait for a device."""
    if device == "cuda":
        torch.cuda.synchronize()
