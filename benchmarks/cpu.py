"""The CPU backend by parts: what a call costs beside its kernel, what plans cost, and what kernels make of the machine.

    python -m benchmarks.cpu [calls] [padded] [plans] [peak]

`calls`: eight tokens, one layout for all calls, beside SDPA, forward and with its backward, in microseconds. `padded`:
one new row of each sequence of a batch with unequal padding on the left, beside SDPA with a bool mask, too. `plans`:
intervals and rectangles of new layouts, in milliseconds. `peak`: matrix products, large and in the tiles that attention
has, exponentials, and ATen's attention kernel, in billions of operations a second; from the first three what a kernel
would reach that does nothing else, one after the other. Wall time where nothing else runs, all threads.
"""

import argparse
import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import moda_kernels as mk
from moda_kernels.backends.cpu import kernel
from moda_kernels.backends.cpu.plan import make_plan
from moda_kernels.tokens.intervals import mask_intervals

WITHIN, CAUSAL = mk.ModularMask.bidirectional_within(2, [1]), mk.ModularMask.causal(2)


def seconds(*runs: Callable[[], object], rounds: int = 15, calls: int = 1) -> list[float]:
    """The median time of each run, taken in turns."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 2):
        for run, of_run in zip(runs, times, strict=True):
            begin = time.perf_counter()
            for _ in range(calls):
                run()
            if turn > 1:
                of_run.append((time.perf_counter() - begin) / calls)
    return [sorted(of_run)[len(of_run) // 2] for of_run in times]


def calls() -> None:
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0]])
    layout = mk.segment_modalities(ids, num_modalities=2)
    q, k, v = (torch.randn(1, h, 8, 16, requires_grad=True) for h in (4, 2, 2))
    weight = torch.ones(1, 4, 8, 16)

    def sdpa(rows: int, causal: bool) -> Callable[[], Tensor]:
        return lambda: F.scaled_dot_product_attention(q[:, :, :rows], k, v, is_causal=causal, enable_gqa=True)

    def moda(rows: int, mask: mk.ModularMask | None) -> Callable[[], Tensor]:
        return lambda: mk.moda_attention(q[:, :, :rows], k, v, layout=layout, mask=mask, enable_gqa=True)

    def backward(run: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(run(), (q, k, v), weight)

    print("calls, µs                         SDPA   ours")
    for name, theirs, ours in (
        ("causal", sdpa(8, True), moda(8, CAUSAL)),
        ("full", sdpa(8, False), moda(8, None)),
        ("within", sdpa(8, False), moda(8, WITHIN)),
        ("decode, within", sdpa(1, False), moda(1, WITHIN)),
    ):
        with torch.no_grad():
            one, two = seconds(theirs, ours, rounds=30, calls=300)
        print(f"{name + ', forward':30s}{1e6 * one:8.1f}{1e6 * two:7.1f}")
        if not name.startswith("decode"):
            one, two = seconds(backward(theirs), backward(ours), rounds=30, calls=100)
            print(f"{name + ', with backward':30s}{1e6 * one:8.1f}{1e6 * two:7.1f}")


def padded() -> None:
    print("padded, µs            SDPA, bool   ours")
    for dtype in (torch.float32, torch.bfloat16):
        for batch, keys in ((8, 256), (8, 1024), (32, 256)):
            padding = torch.arange(keys) < torch.randint(0, keys // 3, (batch, 1))
            layout = mk.segment_modalities(torch.where(padding, -1, 0), num_modalities=2)
            q, k, v = (torch.randn(batch, h, n, 64, dtype=dtype) for h, n in ((8, 1), (2, keys), (2, keys)))
            options = {"enable_gqa": True, "attn_mask": ~padding[:, None, None]}
            one, two = seconds(
                functools.partial(F.scaled_dot_product_attention, q, k, v, **options),
                functools.partial(mk.moda_attention, q, k, v, layout=layout, mask=CAUSAL, enable_gqa=True),
                rounds=30, calls=10,
            )  # fmt: skip
            print(f"{f'{dtype}, {batch} x {keys}':22s}{1e6 * one:10.0f}{1e6 * two:7.0f}")


def plans() -> None:
    def ids(length: int, segments: int) -> Tensor:
        cuts = torch.zeros(length, dtype=torch.long)
        cuts[torch.randperm(length - 1)[: segments - 1] + 1] = 1
        return cuts.cumsum(0) % 2

    bounds = torch.cat((torch.tensor([0]), (torch.randperm(131071)[:999] + 1).sort().values, torch.tensor([131072])))
    layouts = {
        "17 segments in 4k": mk.segment_modalities(ids(4096, 17)[None], num_modalities=2),
        "64 segments in 8k": mk.segment_modalities(ids(8192, 64)[None], num_modalities=2),
        "500 segments in 32k": mk.segment_modalities(ids(32768, 500)[None], num_modalities=2),
        "1,000 documents in 128k": mk.segment_modalities(
            ids(131072, 4000), num_modalities=2, cu_seqlens=bounds.to(torch.int32)
        ),
    }
    print("plans, ms                      intervals    plan")
    for name, layout in layouts.items():
        for kind, mask in (("causal", CAUSAL), ("within", WITHIN), ("fusion", mk.ModularMask.fusion(2, [0], True))):
            rows = layout.queries()
            found = mask_intervals(layout, rows, mask)
            where = (0, len(found.positions)), layout.cu_seqlens, rows.cu_seqlens, layout.packed, torch.float32

            def intervals(layout: mk.ModalityLayout = layout, mask: mk.ModularMask = mask) -> object:
                rows = layout.queries()
                rows.__dict__["_derived"].clear()  # as of a new layout
                return mask_intervals(layout, rows, mask)

            one, two = seconds(intervals, lambda f=found, w=where: make_plan(f, *w))  # type: ignore[misc]
            print(f"{name + ', ' + kind:32s}{1e3 * one:8.2f}{1e3 * two:8.2f}")


def peak() -> None:
    threads, dim, heads, length = torch.get_num_threads(), 64, 8, 4096
    print(f"peak, billions of operations a second, {threads} threads, D = {dim}")
    x = torch.randn(threads, 256 * 512)
    (exps,) = seconds(lambda: torch.exp(x), rounds=50, calls=20)
    rate = x.numel() / exps
    print(f"{'exponentials, float32':40s}{rate / 1e9:8.1f}")
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(2048, 2048, dtype=dtype) for _ in range(2))
        q, k = torch.randn(heads, 256, dim, dtype=dtype), torch.randn(heads, 512, dim, dtype=dtype)
        p, v = torch.randn(heads, 256, 512, dtype=dtype), torch.randn(heads, 512, dim, dtype=dtype)
        whole, scores, values = seconds(lambda: a @ b, lambda: q @ k.mT, lambda: p @ v)  # noqa: B023
        best = 2 * 2048**3 / whole
        tile = 2 * heads * 256 * 512 * dim
        rows = torch.randn(1, heads, length, dim, dtype=dtype)
        keys = torch.randn(1, 2, length, dim, dtype=dtype)
        (flash,) = seconds(lambda: kernel.forward(rows, keys, keys, False, None, 0.125), rounds=7)  # noqa: B023
        work = 4 * heads * length * length * dim
        alone = work / (work / best + heads * length * length / rate)
        name = str(dtype).removeprefix("torch.")
        for what, made in (
            ("product of 2048 x 2048", best),
            ("tiles of queries and keys", tile / scores),
            ("tiles of weights and values", tile / values),
            ("ATen's attention, 4096 x 4096", work / flash),
            ("products at their best, then exponentials", alone),
        ):
            print(f"{name + ', ' + what:52s}{made / 1e9:8.1f} {made / best:6.0%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", choices=["calls", "padded", "plans", "peak", []], help="default: all")
    asked = parser.parse_args().parts or ["calls", "padded", "plans", "peak"]
    torch.manual_seed(0)
    for part in (calls, padded, plans, peak):
        if part.__name__ in asked:
            part()
