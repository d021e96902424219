"""What tiled kernels need to know of a mask: how long it takes to make, and how large it is, by length.

    python -m benchmarks.tiles [--device cuda] [--out FILE] [--note TEXT]

Ours from a segmented layout, with the native extension and without it: intervals and what query tiles walk ("forward"),
and what key tiles walk beside it ("all"); both walks alone, from intervals that are there ("walks"). FlexAttention's
``create_block_mask`` for the same mask, as it is and compiled (its compilation not counted), as far as its L x L
intermediates allow. Contestants take turns. Before anything is timed ours is compared with ours, and the block mask's
counts with it. FILE gets one JSON line a contestant and length: median, p10 and p90 in milliseconds, bytes kept, and
the machine.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask

from moda_kernels.commands.bench import results
from moda_kernels.commands.bench.layouts import LAYOUTS, TILE, Workload, make_workload
from moda_kernels.runtime import native
from moda_kernels.tokens.intervals import mask_intervals
from moda_kernels.tokens.mask import ModularMask
from moda_kernels.tokens.tiles import mask_tiles
from moda_kernels.tokens.walks import key_walk, query_walk

LENGTHS = (8192, 32768, 131072, 1048576)
#: Longest sequence for which FlexAttention is asked: eager it holds L x L tensors, compiled it visits every pair.
EAGER_LIMIT, COMPILED_LIMIT = 8192, 32768
Call = Callable[[], Any]


@contextmanager
def without_extension() -> Iterator[None]:
    kept = native.runs_on
    native.runs_on = lambda device: False
    try:
        yield
    finally:
        native.runs_on = kept


def tensors(made: Any) -> list[torch.Tensor]:
    if isinstance(made, torch.Tensor):
        return [made]
    return [t for part in made if part is not None for t in tensors(part)]


def ours(workload: Workload, mask: ModularMask, part: str, extension: bool) -> Call:
    """Part: "walks" alone, from intervals that are there, or "forward" or "all" with them."""
    layout = workload.layout
    queries = layout.queries()
    limits, positions = mask_intervals(layout, queries, mask)
    bounds = (queries.cu_seqlens, layout.cu_seqlens, queries.shape, tuple(layout.modality.shape), *TILE)
    real = layout.modality.flatten() >= 0

    def make() -> Any:
        if part == "walks":
            affine = len(positions) == 1
            return query_walk(limits, positions, real, *bounds, affine), key_walk(limits, positions, *bounds)
        rows = dataclasses.replace(queries)  # remembers nothing
        return mask_tiles(layout, mask, *TILE, rows, of_keys=part == "all")

    def make_without() -> Any:
        with without_extension():
            return make()

    return make if extension else make_without


def flex(workload: Workload, compiled: bool, device: str) -> Call:
    """A block mask of one sequence: causal, or of the same image."""
    segment, ids, length = workload.layout.segment[0], workload.ids[0], workload.length

    def seen(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) | ((segment[q] == segment[k]) & (ids[q] == 1))

    create = torch.compile(create_block_mask) if compiled else create_block_mask
    return lambda: create(seen, None, None, length, length, device=device, BLOCK_SIZE=128)


def contestants(workload: Workload, device: str) -> dict[str, Call]:
    length = workload.length
    video = ModularMask([[1, 1], [8, 10]])  # images see their segment and earlier steps: two passes, two intervals
    made: dict[str, Call] = {}
    for extension in (True, False):
        if extension and native.why_not(device):
            continue
        code = "native" if extension else "PyTorch"
        for part in ("walks", "forward", "all"):
            made[f"{part}, {code}"] = ours(workload, workload.mask, part, extension)
            if part != "forward":
                made[f"{part}, two passes with two intervals, {code}"] = ours(workload, video, part, extension)
    if not workload.packed and length <= EAGER_LIMIT:
        made["create_block_mask"] = flex(workload, False, device)
    if not workload.packed and length <= COMPILED_LIMIT:
        made["create_block_mask, compiled"] = flex(workload, True, device)
    return made


def compare(calls: dict[str, Call], workload: Workload) -> None:
    for name in [n for n in calls if n.endswith("native")]:
        one, two = tensors(calls[name]()), tensors(calls[name.replace("native", "PyTorch")]())
        if not all(map(torch.equal, one, two)):
            raise SystemExit(f"{name}: the native extension and PyTorch disagree")
    runs = mask_tiles(workload.layout, workload.mask, 128, 128, of_keys=False).queries.runs[0].long()  # type: ignore[union-attr]
    lengths = runs[:, 1::2] - runs[:, ::2]
    expected = [int(lengths[:, 1:].sum()), int(lengths[:, 0].sum())]
    for name in [n for n in calls if n.startswith("create")]:
        block_mask = calls[name]()
        found = [int(block_mask.kv_num_blocks.sum()), int(block_mask.full_kv_num_blocks.sum())]
        if found != expected:
            raise SystemExit(f"{name}: {found} partial and full tiles, ours are {expected}")


def seconds(call: Call, device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(calls: dict[str, Call], runs: int, budget: float, device: str) -> dict[str, list[float]]:
    """Seconds of each call, in turns after a first one of each: `runs` of them, or what `budget` seconds allow, and 3
    at least."""
    first = {}
    for who, call in calls.items():
        call()
        first[who] = seconds(call, device)
    times: dict[str, list[float]] = {who: [] for who in calls}
    for _ in range(runs):
        for who, call in calls.items():
            if sum(times[who]) + first[who] < budget or len(times[who]) < 3:
                times[who].append(seconds(call, device))
    return times


def described(
    benchmark: str, workload: Workload, tiles: list[int], who: str, times: list[float], note: str, environment: Any
) -> dict[str, Any]:
    """A line of a result file."""
    return {
        "schema": results.SCHEMA,
        "benchmark": benchmark,
        "layout": workload.name,
        "length": workload.length,
        "tiles": tiles,
        "contestant": who,
        "ms": results.spread(times),
        "note": note,
        "environment": environment,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--runs", type=int, default=20, help="of each, at least 5 (default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=["interleaved", "packed"])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each contestant and length, at most about")
    parser.add_argument("--note", default="", help="what else the machine does, for the result file")
    parser.add_argument("--out", type=Path, help="file to append JSON lines to")
    options = parser.parse_args()
    if options.runs < 5:
        parser.error(f"argument --runs: expected at least 5, got {options.runs}")
    torch.manual_seed(0)
    environment = results.environment(options.device)
    shown = ("device", "threads", "torch", "load_average")
    print(", ".join(f"{key} {environment[key]}" for key in shown))
    print(f"{'':62}{'ms (p10-p90)':>28}{'ns/token':>10}{'KB':>9}")
    for name in options.layouts:
        for length in options.lengths:
            workload = make_workload(name, length, device=options.device)
            calls = contestants(workload, options.device)
            compare(calls, workload)
            times = interleaved(calls, options.runs, options.seconds, options.device)
            records = []
            for who, call in calls.items():
                record = described("tiles", workload, list(TILE), who, times[who], options.note, environment)
                ms = record["ms"]
                if not who.startswith("create"):
                    record["bytes"] = sum(t.nbytes for t in tensors(call()))
                records.append(record)
                spread = "{median:.2f} ({p10:.2f}-{p90:.2f})".format(**ms)
                size = f"{record['bytes'] / 1024:.0f}" if "bytes" in record else ""
                title = f"{name}, {length}, {who}"
                print(f"{title:62}{spread:>28}{ms['median'] / length * 1e6:10.1f}{size:>9}", flush=True)
            if options.out is not None:
                results.append(options.out, records)


if __name__ == "__main__":
    main()
