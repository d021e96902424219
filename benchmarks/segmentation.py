"""Segmentation: the native extension against its PyTorch twins. (Tiles: `benchmarks.tiles`.)

    python -m benchmarks.segmentation [--device cuda] [--out FILE]

Results are compared before anything is timed. The two are then called in turn, so that a change of the machine's load
meets both. On CUDA the native calls are replayed from a graph, as in a captured training step; the twins wait for the
device and cannot be. FILE gets one JSON line a case: median, p10 and p90 in milliseconds, and the machine.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moda_kernels.commands.bench import results
from moda_kernels.runtime import native
from moda_kernels.tokens.segments import segment_table_torch, segment_tokens_torch

Call = Callable[[], tuple[Tensor, ...]]
MODALITIES = 3


def token_runs(total: int) -> Tensor:
    """Modalities and padding in runs of 1 to 400 tokens."""
    runs = total // 50
    ids = torch.randint(-1, MODALITIES, (runs,)).repeat_interleave(torch.randint(1, 401, (runs,)))
    return ids[:total].int()


def segmentation(bounds: Tensor, with_items: bool, device: str) -> tuple[Call, Call]:
    total = int(bounds[-1])
    ids, bounds = token_runs(total).to(device), bounds.int().to(device)
    items = torch.arange(total, device=device) // 100 if with_items else None
    segments = int(segment_tokens_torch(ids, items, bounds, MODALITIES)[-1])

    def call(tokens: Callable[..., tuple[Tensor, ...]], table: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        made = tokens(ids, items, bounds, MODALITIES)
        return *made, table(ids, made[0], made[2], segments)

    return (
        lambda: call(native.segment_tokens, native.segment_table),
        lambda: call(segment_tokens_torch, segment_table_torch),
    )


def replayed(call: Call) -> Call:
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = call()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return made

    return replay


def seconds(call: Call, device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--runs", type=int, default=30, help="of each, at least 20 (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1 << 20, help="default: 2^20")
    parser.add_argument("--out", type=Path, help="file to append JSON lines to")
    options = parser.parse_args()
    if options.runs < 20:
        parser.error(f"argument --runs: expected at least 20, got {options.runs}")
    if options.tokens < 1024 or options.tokens & (options.tokens - 1):
        parser.error(f"argument --tokens: expected a power of two, at least 1024, got {options.tokens}")
    if reason := native.why_not(options.device):
        parser.error(f"the native extension does not run on {options.device}: {reason}")

    torch.manual_seed(0)
    total, device = options.tokens, options.device
    named = f"2^{total.bit_length() - 1} tokens"
    documents = torch.cat((torch.randint(1, total, (255,)).sort().values, torch.tensor([total])))
    documents = torch.cat((torch.zeros(1, dtype=torch.int64), documents))
    cases = {
        f"segmentation, {named}, batch of 256": segmentation(torch.arange(257) * (total // 256), False, device),
        f"segmentation, {named}, 256 packed documents, items": segmentation(documents, True, device),
    }
    environment = results.environment(device)
    shown = ("device", "threads", "torch", "load_average")
    print(", ".join(f"{key} {environment[key]}" for key in shown if key in environment))
    print(f"{'':56}{'native, ms (p10-p90)':>28}{'PyTorch, ms (p10-p90)':>30}{'ratio':>9}")
    for name, (extension, twin) in cases.items():
        if not all(map(torch.equal, extension(), twin())):
            raise SystemExit(f"{name}: the native extension and PyTorch disagree")
        calls = {"native": replayed(extension) if device == "cuda" else extension, "torch": twin}
        times: dict[str, list[float]] = {which: [] for which in calls}
        for run in range(options.runs + 3):
            for which, call in calls.items():
                took = seconds(call, device)
                if run >= 3:  # the first ones warm caches and the allocator
                    times[which].append(took)
        ms = {which: results.spread(of) for which, of in times.items()}
        columns = ["{median:.3f} ({p10:.3f}-{p90:.3f})".format(**of) for of in ms.values()]
        ratio = ms["torch"]["median"] / ms["native"]["median"]
        print(f"{name:56}{columns[0]:>28}{columns[1]:>30}{ratio:8.1f}x")
        if options.out is not None:
            record = {"schema": results.SCHEMA, "benchmark": "segmentation", "case": name, "device": device, "ms": ms}
            results.append(options.out, [record | {"environment": environment}])


if __name__ == "__main__":
    main()
