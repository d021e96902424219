"""Plans of the CPU backend from random intervals: each visible score once, the same without the extension; and that
the few rows of a batch with unequal padding are one call."""

import itertools
import math
import random

import pytest
import torch
from test_walks import stored
from torch import Tensor

import moda_kernels as mk
from moda_kernels.backends.cpu import kernel, twin
from moda_kernels.backends.cpu.plan import COSTS, Job, make_jobs, size_of
from moda_kernels.runtime import native
from moda_kernels.tokens.intervals import FAR, NOTHING, Intervals, ends_of


def random_intervals(rng: random.Random) -> tuple[Intervals, Tensor, Tensor, bool]:
    """Intervals that no rules need to have made, cu_seqlens, cu_seqlens_q, and whether documents are packed."""
    packed, passes, slots = rng.random() < 0.5, rng.choice([0, 1, 1, 2, 4]), rng.choice([1, 2])
    kind = rng.choice(["rising", "alike", "window", "steps", "any", "any"])
    most = rng.choice([1, 7, 100, 300])
    count = rng.randint(0, 3)
    lengths = [rng.randint(0, most) for _ in range(count)]
    rows = [rng.choice([n, n, rng.randint(0, n)]) for n in lengths]
    if not packed or rng.random() < 0.3:
        lengths, rows = lengths[:1] * count, rows[:1] * count
    limits = torch.empty(passes, slots, 2, sum(rows), dtype=torch.int32)
    positions = torch.full((passes, sum(lengths)), -1, dtype=torch.int32)
    run, width = rng.choice([1, 3, 40, 200]), rng.choice([1, 5, 64])
    base = rng.randint(0, 10**6)
    for n, (length, number) in enumerate(zip(lengths, rows, strict=True)):
        if rng.random() < 0.7:
            rng.seed(base)  # as the sequence before
        begin, first = sum(lengths[:n]), sum(rows[:n])
        owner, position = -1, 0
        for k in range(length):
            if k % run == 0:
                owner = rng.randrange(-1, passes)
            if rng.random() < 0.05:
                continue  # padding
            if owner >= 0:
                positions[owner, begin + k] = position
            position += 1
        for p in range(passes):
            there = rng.random() < 0.8
            for r in range(number):
                at = length - number + r
                low, high, before = -1, at, -1
                if kind == "window":
                    low = max(-1, at - width)
                elif kind == "steps":
                    high = (at // run + 1) * run - 1
                elif kind == "alike":
                    high = FAR
                elif kind == "any" and (r % run == 0 or rng.random() < 0.2):
                    low = rng.randint(-1, length)
                    high = rng.choice([rng.randint(-1, length + 3), FAR])
                elif kind == "any":
                    low, high = (int(x) for x in limits[p, 0, :, first + r - 1])
                if slots == 2 and low > 0 and low < high:
                    before = rng.choice([-1, low - 1, low // 2])
                hidden = not there or rng.random() < 0.02
                limits[p, 0, 0, first + r], limits[p, 0, 1, first + r] = (
                    NOTHING if hidden or low >= high else (low, high)
                )
                if slots == 2:
                    limits[p, 1, 0, first + r], limits[p, 1, 1, first + r] = NOTHING if before < 0 else (-1, before)

    def bounds(of: list[int]) -> Tensor:
        return torch.tensor([0, *of]).cumsum(0).int()

    return Intervals(stored(limits), positions), bounds(lengths), bounds(rows), packed


def written_out(intervals: Intervals, passes: tuple[int, int], of_keys: Tensor, of_rows: Tensor) -> list[Tensor]:
    """How often each query row of a sequence sees each of its keys, ``[rows, keys]`` for each sequence."""
    (lows, highs), positions = ends_of(intervals.limits, len(intervals.positions)), intervals.positions
    sequences = []
    for (k0, k1), (r0, r1) in zip(
        itertools.pairwise(of_keys.tolist()), itertools.pairwise(of_rows.tolist()), strict=True
    ):
        seen = torch.zeros(r1 - r0, k1 - k0, dtype=torch.int32)
        for p, i in itertools.product(range(*passes), range(lows.shape[1])):
            low, high = (end[p, i, r0:r1, None] for end in (lows, highs))
            key = positions[p, k0:k1]
            seen += ((low < key) & (key <= high) & (key >= 0)).int()
        sequences.append(seen)
    return sequences


def covered(jobs: list[Job], of_keys: Tensor, of_rows: Tensor, packed: bool) -> list[Tensor]:
    """How often the calls of a plan cover each score, as `written_out`."""
    bounds = list(zip(itertools.pairwise(of_rows.tolist()), itertools.pairwise(of_keys.tolist()), strict=True))
    batch = 1 if packed else len(bounds)
    rows, keys = (int(x[-1]) // max(batch, 1) for x in (of_rows, of_keys))
    counts = torch.zeros(batch, rows, keys, dtype=torch.int32)
    for job in jobs:
        queries, columns = torch.arange(rows)[job.queries], torch.arange(keys)[job.keys]
        queries, columns = queries.view(job.documents, -1), columns.view(job.documents, -1)
        for region, document in itertools.product(job.regions, range(job.documents)):
            for block in region.blocks:
                shape = size_of(block.rows), size_of(block.keys)
                shown = torch.ones(shape, dtype=torch.int32)
                shown = shown.tril() if block.causal else shown if block.mask is None else block.mask.int()
                hidden = torch.zeros(shape[0], dtype=torch.bool) if block.hidden is None else block.hidden
                assert torch.equal(hidden, shown.sum(1) == 0)
                assert not block.causal or shape[0] == shape[1]
                r, k = queries[document][block.rows], columns[document][block.keys]
                counts[job.batch, r[:, None], k[None, :]] += shown
    if not packed:
        return list(counts)
    inside = torch.zeros(rows, keys, dtype=torch.bool)
    for (r0, r1), (k0, k1) in bounds:
        inside[r0:r1, k0:k1] = True
    assert not bool(counts[0][~inside].any())
    return [counts[0, r0:r1, k0:k1] for (r0, r1), (k0, k1) in bounds]


#: Small ones too, so that few rows make many regions.
_COSTS = (
    COSTS,
    COSTS._replace(call=40, row=1, key=1, atom=4, most=30, whole=0),
    COSTS._replace(call=0, atom=1, whole=9),
)


@pytest.mark.parametrize("seed", range(150))
def test_plans_cover_each_visible_score_once(seed: int) -> None:
    rng = random.Random(seed)
    intervals, of_keys, of_rows, packed = random_intervals(rng)
    number = len(intervals.positions)
    passes = rng.choice([(0, number), (0, number), (number // 2, number)])
    jobs = make_jobs(intervals, passes, of_keys, of_rows, packed, rng.choice(_COSTS))
    expected = written_out(intervals, passes, of_keys, of_rows)
    for got, seen in zip(covered(jobs, of_keys, of_rows, packed), expected, strict=True):
        assert torch.equal(got, seen)


@pytest.mark.skipif(not native.runs_on(torch.device("cpu")), reason="needs the native extension")
@pytest.mark.parametrize("seed", range(150))
def test_native_plans_are_those_of_the_twin(seed: int) -> None:
    rng = random.Random(1000 + seed)
    intervals, of_keys, of_rows, _ = random_intervals(rng)
    where = (*intervals, of_keys, of_rows, (0, len(intervals.positions)))
    costs = rng.choice(_COSTS)
    calls, indices = native.plan_attention(*where, costs)
    expected = twin.plan_attention(*where, costs)
    assert torch.equal(calls, expected[0]) and torch.equal(indices, expected[1])
    masked = [call for call in calls.tolist() if call[3] == twin.MASKED]
    sizes = sum(call[4] * call[7] for call in masked), sum(call[4] for call in masked)
    for got, mask in zip(
        native.plan_masks(*where, calls, indices, sizes), twin.plan_masks(*where, calls, indices, sizes), strict=True
    ):
        assert torch.equal(got, mask)


@pytest.mark.parametrize("planner", [twin, native], ids=["twin", "native"])
def test_positions_that_do_not_rise_are_refused(planner: object) -> None:
    if planner is native and not native.runs_on(torch.device("cpu")):
        pytest.skip("needs the native extension")
    limits = torch.tensor([[-1], [FAR]]).int().expand(2, 3)
    bounds = torch.tensor([0, 3]).int()
    for positions in ([0, 0, 1], [2, 1, 0], [0, 1, 3]):
        with pytest.raises(ValueError, match="positions: expected them to rise"):
            planner.plan_attention(  # type: ignore[attr-defined]
                limits, torch.tensor([positions]).int(), bounds, bounds, (0, 1), COSTS
            )


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_few_rows_of_a_padded_batch(dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are one call, and whatever lies in padding, it doesn't reach them: neither NaN, nor what makes it."""
    calls = []
    monkeypatch.setattr(kernel, "_kernel", lambda *a, run=kernel._kernel: calls.append(a) or run(*a))
    padding = torch.arange(40) < torch.tensor([[0], [1], [7], [8], [9], [16], [31], [36]])
    layout = mk.segment_modalities(torch.where(padding, -1, 0), num_modalities=1)
    q, k, v = (torch.randn(8, h, n, 16, dtype=dtype) for h, n in ((4, rows), (2, 40), (2, 40)))
    leaf = q.clone().requires_grad_()
    options = {"layout": layout, "is_causal": True, "enable_gqa": True, "return_lse": True}
    exact = mk.moda_attention(q.double(), k.double(), v.double(), backend="reference", **options)
    rounding = {torch.float64: 1e-9, torch.float32: 1e-5}.get(dtype, 2e-2)

    def check(k: Tensor, v: Tensor) -> None:
        for x, y in zip(mk.moda_attention(q, k, v, backend="cpu", **options), exact, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=rounding, atol=rounding)

    check(k, v)
    assert len(calls) == 1
    largest = torch.finfo(dtype).max
    for poison in (math.nan, math.inf, -math.inf, largest, -largest):
        for dims in (slice(0, 1), slice(None)):
            for where in (padding, padding & (torch.arange(40) == 6), padding & (torch.arange(40) == 0)):
                bad = torch.zeros(16, dtype=torch.bool)
                bad[dims] = True
                bad = where[:, None, :, None] & bad
                check(k.masked_fill(bad, poison), v)
                check(k, v.masked_fill(bad, poison))
    calls.clear()
    hidden = padding[:, None, :, None]
    out = mk.moda_attention(leaf, k.masked_fill(hidden, -math.inf), v, backend="cpu", **options)[0]
    (dquery,) = torch.autograd.grad(out.sum(), leaf)
    assert len(calls) > 1 and bool(dquery.isfinite().all())
