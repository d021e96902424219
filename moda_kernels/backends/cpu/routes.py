"""How numbers of 16 bits are computed: as they are, or made float32 first, whichever is faster here.

ATen's kernel takes bfloat16 and float16, but what it makes of them depends on the CPU (and on how many rows a call
has): without instructions for them its backward takes up to ten times as long as that of float32. So both routes are
timed, once per machine and torch, and what was found is kept in the user's cache folder; what is close is decided by
the CPU's features.
"""

import functools
import json
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moda_kernels.backends.cpu import kernel
from moda_kernels.runtime import checks

#: "measure" (the default), "features" (by those of the CPU, nothing is timed), or one route for all.
ENVIRONMENT = "MODA_KERNELS_CPU_ROUTE"
OWN, FLOAT32 = "own", "float32"
DTYPES = (torch.bfloat16, torch.float16)
#: Kinds of calls: their pass, and the mean rows up to which their plans have it.
KINDS = {
    "forward, few rows": kernel.FEW_ROWS, "forward, short": 512, "forward, long": None,
    "backward, short": 512, "backward, long": None,
}  # fmt: skip
#: Query heads, rows and keys of what is timed, one key head each.
_SIZES = {"few rows": (4, 1, 4096), "short": (4, 128, 128), "long": (2, 768, 768)}
_ROUNDS = 3
#: A route is faster if it takes less than this part of the other's time.
_CLEARLY = 0.87


class Choice(NamedTuple):
    """The route of each of `KINDS`, and in words why."""

    routes: dict[str, str]
    why: str


def widens(dtype: torch.dtype, backward: bool, rows: int) -> bool:
    """Whether numbers of a dtype are made float32 first.

    Args:
        rows: of a call, on average.
    """
    if dtype.itemsize > 2:
        return False
    routes = choice(dtype, os.environ.get(ENVIRONMENT) or "measure").routes
    wanted = "backward" if backward else "forward"
    kind = next(k for k, most in KINDS.items() if k.startswith(wanted) and (most is None or rows <= most))
    return routes[kind] == FLOAT32


@functools.cache
def choice(dtype: torch.dtype, mode: str) -> Choice:
    """The routes of a dtype; the same as long as the process lasts.

    Args:
        mode: as `ENVIRONMENT` says.

    Raises:
        ValueError: another mode.
    """
    checks.choice(ENVIRONMENT, mode, ("measure", "features", OWN, FLOAT32))
    if mode in (OWN, FLOAT32):
        return Choice(dict.fromkeys(KINDS, mode), f"{ENVIRONMENT}={mode}")
    expected, feature = _by_features(dtype)
    if mode == "features":
        return Choice(expected, feature)
    kept = _read(dtype)
    told = "measured here before" if kept is not None else "measured now"
    if kept is None:
        try:
            with ThreadPoolExecutor(1) as thread:  # without the modes and transforms that stand around the call
                kept = thread.submit(_measure, dtype).result()
        except Exception as error:  # the kernel may not take a dtype at all
            return Choice(expected, f"{feature} (not measured: {type(error).__name__}: {error})")
        _write(dtype, kept)
    routes = {}
    for kind, (own, wide) in kept.items():
        routes[kind] = FLOAT32 if wide < _CLEARLY * own else OWN if own < _CLEARLY * wide else expected[kind]
    times = "; ".join(f"{kind} {own:.2f} or {wide:.2f} ms" for kind, (own, wide) in kept.items())
    return Choice(routes, f"{told}, as it is or in float32: {times}; what is close by features: {feature}")


def _by_features(dtype: torch.dtype) -> tuple[dict[str, str], str]:
    """What is likely, and the reason."""
    name = str(dtype).removeprefix("torch.")
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if dtype == torch.float16:
        names = ("_is_avx512_fp16_supported", "_is_amx_fp16_supported")
    if not any(getattr(torch.cpu, each, bool)() for each in names):
        return dict.fromkeys(KINDS, FLOAT32), f"the CPU has no products in {name}"
    return dict.fromkeys(KINDS, OWN) | {"backward, short": FLOAT32}, f"the CPU has products in {name}"


def _measure(dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Milliseconds of each kind, as it is and in float32; of one core's time, since others may be busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for this thread
    try:
        return _times(dtype)
    finally:
        torch.set_num_threads(threads)


def _times(dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    found = {}
    g = torch.Generator().manual_seed(0)
    for kind in KINDS:
        heads, rows, keys = _SIZES[kind.partition(", ")[2]]
        q, k, v = (torch.randn(1, h, n, 64, generator=g) for h, n in ((heads, rows), (1, keys), (1, keys)))
        out, lse = kernel.forward(q, k, v, False, None, 0.125)
        given = [x.to(dtype) for x in (out, q, k, v, out)]
        run = functools.partial(_run, given, lse, kind.startswith("backward"))
        found[kind] = _fastest(functools.partial(run, False), functools.partial(run, True))
    return found


def _run(given: list[Tensor], lse: Tensor, backward: bool, wide: bool) -> None:
    dout, q, k, v, out = (x.float() for x in given) if wide else given
    if backward:
        made: tuple[Tensor, ...] = kernel.backward(dout, q, k, v, out, lse, False, None, 0.125)
    else:
        made = kernel.forward(q, k, v, False, None, 0.125)[:1]
    if wide:
        for x in made:
            x.to(given[0].dtype)


def _fastest(*runs: Callable[[], None]) -> tuple[float, float]:
    """Of each the least time of some, taken in turns, in milliseconds."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(_ROUNDS + 1):
        for run, of_run in zip(runs, times, strict=True):
            begin = time.thread_time()
            run()
            if turn:
                of_run.append(1000 * (time.thread_time() - begin))
    return min(times[0]), min(times[1])


# What is kept


def cache_file() -> Path:
    """Where times are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "moda_kernels" / "cpu-routes.json"


def _key(dtype: torch.dtype) -> str:
    """What times depend on: the CPU and torch."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    marks = ("model name", "stepping")
    cpu = [line.partition(":")[2].strip() for mark in marks for line in lines if line.startswith(mark)][: len(marks)]
    model = " ".join(cpu) or platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{dtype} {model} {capability}, torch {torch.__version__}"


def _all() -> dict[str, Any]:
    try:
        found = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read(dtype: torch.dtype) -> dict[str, tuple[float, float]] | None:
    """Times that were kept; None where there are none, or others than these."""
    found = _all().get(_key(dtype))
    if not isinstance(found, dict) or set(found) != set(KINDS):
        return None
    try:
        times = {kind: (float(own), float(wide)) for kind, (own, wide) in found.items()}
    except (TypeError, ValueError):
        return None
    return times if all(t > 0 for pair in times.values() for t in pair) else None


def _write(dtype: torch.dtype, times: dict[str, tuple[float, float]]) -> None:
    file = cache_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(_all() | {_key(dtype): times}, indent=1))
        new.replace(file)
    except OSError:
        return  # another process will measure again
