"""From intervals to few large rectangles of scores: which kernel calls make up one sequence's attention.

Rows are grouped into regions; a region's visible keys are those that all its rows see (one *full* call, the keys
gathered where they don't lie side by side) and those that some of its rows see (one *causal* call where each row sees
one more of them, else one *masked* call over a small block). Rows that see alike, and rows of which each sees one key
more, make a region at any length; others share one with their neighbours, because a call per tiny segment costs more
than the scores that it saves. The cheapest way to cut all rows into regions is found by `COSTS`, the one place that
knows what calls cost.

Everything is found from `Intervals` alone, natively (`csrc/plan.cpp`) or by the same decisions in Python (`twin.py`);
no rule is known here. Spans are in query rows and key columns of one sequence, on the host.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moda_kernels.backends.cpu import twin
from moda_kernels.backends.cpu.kernel import FEW_ROWS
from moda_kernels.backends.cpu.twin import CAUSAL, MASKED, Costs
from moda_kernels.runtime import native
from moda_kernels.runtime.lasting import lasting
from moda_kernels.tokens.intervals import Intervals

#: From timings of ATen's kernel and of the merging around it, 8 heads, D = 64. A causal call computes whole blocks of
#: keys along the diagonal (up to 512 rows it takes as long as without a mask); a masked one reads its mask.
COSTS = Costs(call=8_000, row=48, key=24, masked=115, causal_block=512, atom=64, most=1024, whole=1536)
#: Of 16-bit numbers: they are made 32-bit ones and back for each sum.
NARROW_COSTS = COSTS._replace(row=96, key=48)

#: What planners take first: limits, positions, cu_seqlens, cu_seqlens_q, passes.
_Where = tuple[Tensor, Tensor, Tensor, Tensor, tuple[int, int]]

#: Rows or key columns of a job: a run of them, or any ascending ones (int64).
Span = slice | Tensor


_FIRST, _ALL = slice(0, 1), slice(None)

#: Masks of so many scores are kept as the kernel takes them, which is four times as large.
_KEPT_SCORES = 2**18


@dataclass(slots=True, eq=False)
class Block:
    """One kernel call: rows against keys, all of them visible, or causally, or by a bool mask ``[rows, keys]``."""

    rows: Span
    keys: Span
    causal: bool = False
    mask: Tensor | None = None
    #: Rows that the mask hides wholly, bool ``[rows]``; None where there are none.
    hidden: Tensor | None = None
    _additive: Tensor | None = None

    def additive(self, dtype: torch.dtype) -> Tensor | None:
        """The mask as it is added to the scores."""
        if self.mask is None:
            return None
        made = self._additive
        if made is None or made.dtype != dtype:
            made = lasting(additive)(self.mask, dtype)
            if made.numel() <= _KEPT_SCORES:
                self._additive = made
        return made


class Region(NamedTuple):
    """The calls that make up the attention of some query rows; their results are merged by their lse."""

    rows: Span
    blocks: tuple[Block, ...]


class Job(NamedTuple):
    """The regions of one sequence, or of equal ones side by side, and where these lie: slices of the batch, of query
    rows and of key columns. Spans count from there."""

    batch: slice
    queries: slice
    keys: slice
    regions: list[Region]
    #: So many packed documents of one length, side by side, make a batch of their own.
    documents: int = 1
    #: If one call is all there is to do, over all rows and keys, none of which it hides wholly: that one.
    whole: Block | None = None


class OneCall(NamedTuple):
    """The kernel call that makes up all rows of all sequences, where one does.

    Attributes:
        keys: which ones; None: all.
        causal: or not. mask: additive, ``[rows, keys]`` or ``[B, 1, rows, keys]``; or None. It hides no row wholly.
        documents: so many packed documents of one length are a batch.
        padding: whether padding is among the keys, hidden by the mask alone.
    """

    keys: Span | None
    causal: bool
    mask: Tensor | None
    documents: int
    padding: bool = False


class Plan(NamedTuple):
    """The calls of one softmax, for numbers of one dtype.

    Attributes:
        jobs: all of them, side by side along an axis, nothing left out.
        one: if a single call is all there is to do, how to make that and nothing else.
        rows: of a call, on average.
        axis: 0: the batch; 2: tokens. sizes: of each job on that axis, in queries and in keys.
    """

    jobs: list[Job]
    one: OneCall | None
    rows: int
    axis: int
    sizes: tuple[list[int], list[int]]


def make_plan(
    intervals: Intervals,
    passes: tuple[int, int],
    cu_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    packed: bool,
    dtype: torch.dtype,
) -> Plan:
    """As `make_jobs`, for numbers of a dtype."""
    costs = NARROW_COSTS if dtype.itemsize == 2 else COSTS
    jobs = make_jobs(intervals, passes, cu_seqlens, cu_seqlens_q, packed, costs)
    sizes = [size_of(region.rows) for job in jobs for region in job.regions for _ in region.blocks]
    of_jobs = [(job.queries, job.keys) if packed else (job.batch, job.batch) for job in jobs]
    on_axis = [size_of(queries) for queries, _ in of_jobs], [size_of(keys) for _, keys in of_jobs]
    plan = Plan(jobs, None, sum(sizes) // max(len(sizes), 1), 2 if packed else 0, on_axis)
    if len(jobs) > 1 and not packed:
        where = (*intervals, cu_seqlens, cu_seqlens_q, passes)
        return plan._replace(one=_together(where, jobs, costs, torch.promote_types(dtype, torch.float32)))
    if len(jobs) != 1 or len(jobs[0].regions) != 1 or len(jobs[0].regions[0].blocks) != 1:
        return plan
    (job,) = jobs
    (block,) = job.regions[0].blocks
    batch = 1 if packed else cu_seqlens.numel() - 1
    rows, keys = intervals.limits.shape[1] // batch, intervals.positions.shape[1] // batch
    all_rows = isinstance(block.rows, slice) and size_of(block.rows) * job.documents == rows
    if not all_rows or block.hidden is not None or job.batch not in (slice(None), slice(0, batch)):
        return plan
    all_keys = isinstance(block.keys, slice) and size_of(block.keys) * job.documents == keys
    if job.documents > 1 and not all_keys:
        return plan
    mask = None if block.mask is None else additive(block.mask, torch.promote_types(dtype, torch.float32))
    return plan._replace(one=OneCall(None if all_keys else block.keys, block.causal, mask, job.documents))


def _together(where: _Where, jobs: list[Job], costs: Costs, dtype: torch.dtype) -> OneCall | None:
    """Few rows of a batch that differ, say in padding: one masked call over everything, where that is cheaper."""
    limits, positions, cu_seqlens, _, _ = where
    batch = cu_seqlens.numel() - 1
    rows, keys = limits.shape[1] // batch, positions.shape[1] // batch
    if not 0 < rows <= FEW_ROWS or keys == 0:
        return None
    apart = sum(
        costs.of_call(size_of(block.rows), size_of(block.keys), block.mask is not None, size_of(job.batch))
        for job in jobs for region in job.regions for block in region.blocks
    )  # fmt: skip
    if costs.of_call(rows, keys, True, batch) >= apart:
        return None
    calls = [[s, s + 1, 1, MASKED, rows, 0, -1, keys, 0, -1] for s in range(batch)]
    as_tensor = torch.tensor(calls, dtype=torch.int32, device="cpu")
    sizes = (batch * rows * keys, batch * rows)
    seen, hidden = _planner().plan_masks(*where, as_tensor, as_tensor.new_empty(0), sizes)
    if bool(hidden.any()):  # of such rows ATen makes NaN in some dtypes
        return None
    return OneCall(None, False, additive(seen.view(batch, 1, rows, keys), dtype), 1, padding=True)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a bool mask shows, and -inf where it hides."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, -math.inf)


def make_jobs(
    intervals: Intervals,
    passes: tuple[int, int],
    cu_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    packed: bool,
    costs: Costs = COSTS,
) -> list[Job]:
    """The rectangles of a CPU layout: one job per run of equal rows of a batch, or of equal packed documents.

    Args:
        intervals: who sees whom, on the CPU.
        passes: which of its passes, from the first to the last (excluded): those of one softmax.
        cu_seqlens, cu_seqlens_q: int32 ``[N + 1]``, of keys and of query rows.
        packed: documents, or rows of a batch.
    """
    planner = _planner()
    where = (*intervals, cu_seqlens, cu_seqlens_q, passes)
    calls, indices = planner.plan_attention(*where, costs)
    rows = calls.tolist()
    masked = [call for call in rows if call[3] == MASKED]
    sizes = sum(call[4] * call[7] for call in masked), sum(call[4] for call in masked)
    masks = hidden = torch.empty(0, dtype=torch.bool, device="cpu")
    if masked:
        masks, hidden = planner.plan_masks(*where, calls, indices, sizes)
    # Tensors are cut all at once: one by one that takes longer than all planning.
    parts = iter(masks.split([call[4] * call[7] for call in masked]))
    ends = list(itertools.accumulate((call[4] for call in masked), initial=0))
    hides = (
        torch.cat((hidden.new_zeros(1, dtype=torch.int32), hidden.cumsum(0, dtype=torch.int32)))[ends].diff().tolist()
    )
    chosen = _cut(indices.long(), rows)

    bounds, query_bounds = cu_seqlens.tolist(), cu_seqlens_q.tolist()
    count = len(bounds) - 1
    found: list[tuple[int, int, list[Region]]] = []  # of a job: its sequences
    nth = end = 0  # of the masked calls; behind the sequences so far
    before = -1
    regions: list[Region] = []
    for first, last, begins, kind, number, row_start, row_offset, keys, key_start, key_offset in rows:
        if first != before:
            if first > end:
                found.append((end, first, []))  # nothing is seen here
            before, end = first, last
            regions = []
            found.append((first, last, regions))
        mask = none_seen = None
        if kind == MASKED:
            mask = next(parts).view(number, keys)
            none_seen = hidden[ends[nth] : ends[nth + 1]] if hides[nth] else None
            nth += 1
        span = _span(number, row_start, chosen.get(row_offset))
        block = Block(span, _span(keys, key_start, chosen.get(key_offset)), kind == CAUSAL, mask, none_seen)
        if begins:
            regions.append(Region(span, (block,)))
        else:
            regions[-1] = Region(regions[-1].rows, (*regions[-1].blocks, block))
    if end < count:
        found.append((end, count, []))
    if not packed:
        of_rows, of_keys = query_bounds[-1] // max(count, 1), bounds[-1] // max(count, 1)
        return [Job(slice(a, b), _ALL, _ALL, made, 1, _whole(made, of_rows, of_keys)) for a, b, made in found]
    jobs = []
    for first, last, made in found:
        of_rows, of_keys = query_bounds[last] - query_bounds[first], bounds[last] - bounds[first]
        if of_rows == of_keys == 0:
            continue
        number = last - first if made else 1
        whole = _whole(made, of_rows // number, of_keys // number)
        queries, columns = slice(query_bounds[first], query_bounds[last]), slice(bounds[first], bounds[last])
        jobs.append(Job(_FIRST, queries, columns, made, number, whole))
    # Tokens outside of every document: jobs cover all there are.
    queries, columns = slice(0, query_bounds[0]), slice(0, bounds[0])
    if queries.stop or columns.stop:
        jobs.insert(0, Job(_FIRST, queries, columns, []))
    queries = slice(query_bounds[-1], intervals.limits.shape[1])
    columns = slice(bounds[-1], intervals.positions.shape[1])
    if size_of(queries) or size_of(columns):
        jobs.append(Job(_FIRST, queries, columns, []))
    return jobs


def _planner() -> Any:
    return native if native.runs_on(torch.device("cpu")) else twin


def _whole(regions: list[Region], rows: int, keys: int) -> Block | None:
    if len(regions) != 1 or len(regions[0].blocks) != 1:
        return None
    (block,) = regions[0].blocks
    of_rows, of_keys = block.rows, block.keys
    if isinstance(of_rows, Tensor) or isinstance(of_keys, Tensor) or block.hidden is not None:
        return None
    return block if (of_rows.stop - of_rows.start, of_keys.stop - of_keys.start) == (rows, keys) else None


def _cut(indices: Tensor, calls: list[list[int]]) -> dict[int, Tensor]:
    """What calls have in `indices`, by where it begins there."""
    sizes = {call[at + 2]: call[at] for call in calls for at in (4, 7) if call[at + 1] < 0}
    begins = sorted(sizes)
    return dict(zip(begins, indices.split([sizes[begin] for begin in begins]), strict=True))


def _span(count: int, start: int, chosen: Tensor | None) -> Span:
    return slice(start, start + count) if chosen is None else chosen


def size_of(span: Span) -> int:
    """How many positions a span has."""
    return int(span.stop - span.start) if isinstance(span, slice) else len(span)
