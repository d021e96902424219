"""Microbenchmarks for pytest-benchmark: `pytest benchmarks --benchmark-only`, the layouts and contestants of `bench`.

For work on one thing: `-k "moda-cpu and llava-next"`, `--benchmark-compare`. A plain `pytest` doesn't collect them. Who
is wrong isn't timed (the benchmark fails), and who can't run here is skipped with the reason. Contestants aren't
interleaved: for comparisons that are published there is `python -m moda_kernels bench`.
"""

import pytest
import torch

from moda_kernels.commands.bench import pieces, runner
from moda_kernels.commands.bench.cases import MODES, Case, can
from moda_kernels.commands.bench.layouts import LAYOUTS
from moda_kernels.commands.bench.peers import PEERS
from moda_kernels.commands.bench.plans import CPU_SHAPE, CUDA_SHAPE

pytest.importorskip("pytest_benchmark")
from pytest_benchmark.fixture import BenchmarkFixture

ON_GPU = torch.cuda.is_available()
LENGTH = 8192 if ON_GPU else 1024


def case_of(layout: str, mode: str = "forward") -> Case:
    shape, dtype = (CUDA_SHAPE, torch.bfloat16) if ON_GPU else (CPU_SHAPE, torch.float32)
    return Case(layout, LENGTH, dtype, mode, device="cuda" if ON_GPU else "cpu", **shape)


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


@pytest.mark.parametrize("contestant", PEERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention(benchmark: BenchmarkFixture, layout: str, mode: str, contestant: str) -> None:
    if not can(layout, mode):
        pytest.skip("packed documents have no last token to decode")
    case = case_of(layout, mode)
    record, ready = runner._admit(PEERS[contestant], case)
    if record["status"] in ("absent", "control"):
        pytest.skip(record["reason"])
    if ready is None:
        pytest.fail(f"{record['status']}: {record['reason']}", pytrace=False)
    benchmark.group = str(case)
    benchmark.extra_info |= case.workload.describe() | {"useful_flops": case.useful_flops(case.passes[-1])}
    benchmark(lambda: (ready.call(), synchronize()))


@pytest.mark.parametrize("piece", pieces.PIECES)
@pytest.mark.parametrize("layout", ["llava-next", "qwen2-vl-8", "packed"])
def test_piece(benchmark: BenchmarkFixture, layout: str, piece: str) -> None:
    found = pieces.pieces(case_of(layout))[piece]
    fault = found.fault(found.work())
    if fault is not None:
        pytest.fail(fault, pytrace=False)
    benchmark.group = f"{layout}, L = {LENGTH}"
    with torch.no_grad():
        benchmark(lambda: (found.work(), synchronize()))
