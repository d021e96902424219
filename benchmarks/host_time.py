"""What a call on the Triton kernels costs the host: checks, plan, allocations, everything up to the kernel.

    python -m benchmarks.host_time [--runs 400] [--out FILE] [--note TEXT]

No GPU is needed: tensors are on the CPU, whose allocations take about what CUDA's cached ones do, and the backend takes
them for a GPU's; in place of Triton's compiler and of a compiled kernel's launch stands nothing. So the numbers have
all that this package, torch and Triton's launcher do in Python, and not the driver's few microseconds per launch. One
layout for all calls, as layers share it, four query heads on two key heads, bfloat16. FILE gets one JSON line a case:
median, p10 and p90 in milliseconds, and the machine.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import torch
import triton.compiler
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import moda_kernels as mk
from moda_kernels.backends.triton import launch_decode
from moda_kernels.commands.bench import results
from moda_kernels.products import kernels as products
from moda_kernels.runtime import checks, gpu

LENGTH, KEYS, DIM = 256, 1024, 64


class _Driver:
    """Triton's driver, of a GPU that isn't there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _Kernel:
    """A compiled kernel that does nothing."""

    function = 0
    packed_metadata = ()

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        return None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.run


def as_on_a_gpu() -> None:
    """The backend takes tensors on the CPU for a GPU's, and launches nothing. Not to be undone."""
    driver.set_active(_Driver())
    compiled = _Kernel()
    triton.compiler.compile = lambda *_, **__: compiled
    nothing: Any = lambda *_: None  # noqa: E731
    gpu.why_absent, gpu.why_not_on = lambda: (), nothing  # type: ignore[assignment]
    gpu.interpreted = products.interpreted = lambda: False  # type: ignore[assignment]
    gpu.runs_on = lambda device: True
    checks.looks_at_values = lambda device: False
    launch_decode._programs = lambda device: 264  # type: ignore[assignment]


def cases() -> dict[str, Callable[[], Any]]:
    def normal(heads: int, length: int, grad: bool = False) -> Tensor:
        return torch.randn(1, heads, length, DIM, dtype=torch.bfloat16, requires_grad=grad)

    def segmented(length: int) -> mk.ModalityLayout:
        ids = (torch.arange(length) // 64 % 2)[None]
        return mk.segment_modalities(ids, num_modalities=2, max_segments=length // 64)

    layout, cached = segmented(LENGTH), segmented(KEYS)
    mask, pseudo = mk.ModularMask.bidirectional_within(2, [1]), mk.PseudoAttention()
    q, k, v = normal(4, LENGTH, True), normal(2, LENGTH, True), normal(2, LENGTH, True)
    new, old = normal(4, 1), (normal(2, KEYS), normal(2, KEYS))

    def forward(**more: Any) -> Tensor:
        return mk.moda_attention(q, k, v, layout=layout, enable_gqa=True, backend="triton", **more)

    def without_gradients(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad():
                return call()

        return run

    out = forward(mask=mask)
    upstream = torch.randn_like(out)

    def decode() -> Tensor:
        return mk.moda_attention(new, *old, layout=cached, mask=mask, enable_gqa=True, backend="triton")

    return {
        "forward": without_gradients(lambda: forward(mask=mask)),
        "forward, is_causal": without_gradients(lambda: forward(is_causal=True)),
        "forward, pseudo scores": without_gradients(lambda: forward(mask=mask, pseudo=pseudo)),
        "forward, for a backward": lambda: forward(mask=mask),
        "backward": lambda: torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True),
        "decode, one row": without_gradients(decode),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=400, help="of each, at least 20 (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="file to append JSON lines to")
    parser.add_argument("--note", default="", help="goes into the file")
    options = parser.parse_args()
    if options.runs < 20:
        parser.error(f"argument --runs: expected at least 20, got {options.runs}")
    torch.set_num_threads(1)
    as_on_a_gpu()
    environment = results.environment()
    shown = ("device", "torch", "triton", "commit", "load_average")
    print(", ".join(f"{key} {environment[key]}" for key in shown))
    print(f"{'':28}{'µs before the kernel (p10-p90)':>36}")
    made = cases()
    times: dict[str, list[float]] = {name: [] for name in made}
    for run in range(options.runs + 20):
        for name, call in made.items():
            start = time.perf_counter()
            call()
            if run >= 20:  # the first ones compile and warm caches
                times[name].append(time.perf_counter() - start)
    for name, took in times.items():
        ms = results.spread(took)
        print(f"{name:28}{1e3 * ms['median']:16.1f} ({1e3 * ms['p10']:.1f}-{1e3 * ms['p90']:.1f})")
        if options.out is not None:
            record = {"schema": results.SCHEMA, "benchmark": "host_time", "case": name, "device": "cpu", "ms": ms}
            results.append(options.out, [record | {"note": options.note, "environment": environment}])


if __name__ == "__main__":
    main()
