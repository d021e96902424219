"""Peak memory of a contestant, above its inputs.

On the CPU resident pages, seen from a fresh process that does nothing else: what it holds before (interpreter, torch,
inputs, compiled code) is taken off, so that what remains is what the setup and the call need. Resident pages count
everything: torch's tensors, the scratch space of kernels and of BLAS. On CUDA it is the count of torch's allocator.
"""

import contextlib
import ctypes
import dataclasses
import gc
import multiprocessing
import re
import resource
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from moda_kernels.commands.bench.cases import Case
from moda_kernels.commands.bench.peers import Contestant, Peer

#: A contestant that doesn't compile is warmed up on so many tokens, so that threads and libraries are in place.
WARM_UP_LENGTH = 256


def measure(peer: Peer, case: Case, timeout: float = 900) -> dict[str, Any]:
    """Bytes above the inputs: "setup_peak", "setup_held" (what the setup leaves behind) and "call_peak" (setup_held
    included); or an "error"."""
    if case.device == "cuda":
        return _on_cuda(peer, case)
    if not sys.platform.startswith("linux"):
        return {"error": "measured on Linux only"}
    # A server that has imported all this, and has no threads yet, forks one fresh process per measurement.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    # A copy: what a case has made of itself so far stays here.
    process = context.Process(target=_child, args=(sender, peer, dataclasses.replace(case), torch.get_num_threads()))
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            return {"error": f"not done after {timeout:.0f} s"}
        answer: dict[str, Any] = receiver.recv()
        return answer
    except EOFError:
        process.join()
        return {"error": f"the process ended with exit code {process.exitcode} (out of memory?)"}
    finally:
        process.kill()
        process.join()


def _on_cuda(peer: Peer, case: Case) -> dict[str, Any]:
    """By torch's allocator: everything that torch allocates, which Triton kernels' tensors are too."""
    try:
        contestant = Contestant(peer, case)
        contestant.setup()
        contestant.call()  # workspaces that stay are in place
        contestant.drop_setup()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        contestant.setup()
        setup_peak, setup_held = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        contestant.call()
        torch.cuda.synchronize()
        call_peak = torch.cuda.max_memory_allocated()
    except Exception as error:  # reported, not raised: the others go on
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    peaks = {"setup_peak": setup_peak, "setup_held": setup_held, "call_peak": call_peak}
    return {name: max(0, peak - before) for name, peak in peaks.items()}


def _child(sender: Connection, peer: Peer, case: Case, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        sender.send(_measured(peer, case))
    except Exception as error:  # reported, not raised: the others go on
        sender.send({"error": f"{type(error).__name__}: {error}".splitlines()[0]})


def _measured(peer: Peer, case: Case) -> dict[str, Any]:
    _return_freed_pages()
    short = dataclasses.replace(case, length=min(case.length, WARM_UP_LENGTH))
    warm = Contestant(peer, case if peer.compiles else short)
    warm.setup()
    warm.call()
    contestant = Contestant(peer, case)
    _ = case.workload.layout
    del warm
    gc.collect()

    before, _ = _peak_of(lambda: None)
    setup_peak, setup_held = _peak_of(contestant.setup)
    results: list[Any] = []
    call_peak, _ = _peak_of(lambda: results.append(contestant.call()))
    return {
        "setup_peak": max(0, setup_peak - before),
        "setup_held": max(0, setup_held - before),
        "call_peak": max(0, call_peak - before),
    }


def _return_freed_pages() -> None:
    """Make malloc give back what is freed at once, so that resident pages are pages in use."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 64 * 1024)
        libc.mallopt(m_trim_threshold, 0)


def _peak_of(work: Callable[[], object]) -> tuple[int, int]:
    """Resident bytes of this process: the most during `work`, and those after it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew; without it, it only rises
    work()
    status = Path("/proc/self/status").read_text()
    held = _field(status, "VmRSS")
    return _field(status, "VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, held


def _field(status: str, name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
