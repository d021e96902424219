"""From a layout and a mask to few large rectangles of scores: which kernel calls make up one sequence's attention.

Rows are grouped into regions; a region's visible keys are those that all its rows see (one *full* call, the keys
gathered where they don't lie side by side) and those that some of its rows see (one *causal* call where these are the
rows themselves, else one *masked* call over a small block). Long segments are regions of their own; short neighbours
share one, because a call per tiny segment costs more than the scores that it saves. How much is shared is decided by
`PlanCost`, the one place that knows what calls cost.

Everything here is in positions of one sequence (its non-padding tokens, counted from 0) and on the host.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moda_kernels.tokens.layout import ModalityLayout, QueryRows
from moda_kernels.tokens.mask import ModularMask, Visibility, visible_pair


class PlanCost:
    """What calls cost, in scores of a full rectangle; from timings of ATen's kernel on 2 cores, 8 heads, D = 64."""

    #: One more call: its start, and for each row and key what is merged, gathered and added up in the backward, where
    #: 16-bit numbers have to be made 32-bit ones and back.
    CALL = 20_000
    ROW = 64
    NARROW_ROW = 128
    #: A masked score against a full one (the mask is read, and made into numbers).
    MASKED = 1.1
    #: A causal call computes whole blocks along the diagonal.
    CAUSAL_BLOCK = 64
    #: Rows of a region of short segments: these are tried, and the cheapest taken.
    REGION_ROWS = (256, 512, 1024)
    #: A masked call over everything is tried up to this many keys (its mask is rows × keys).
    WHOLE = 1536

    @classmethod
    def of(cls, block: "Block", narrow: bool) -> float:
        rows, keys = size_of(block.rows), size_of(block.keys)
        scores = rows * keys * (cls.MASKED if block.masked else 1.0)
        if block.causal:
            scores = rows * (rows + cls.CAUSAL_BLOCK) / 2
        return cls.CALL + (cls.NARROW_ROW if narrow else cls.ROW) * (rows + keys) + scores


#: Positions of one sequence: a run of them, or any ascending ones (int64).
Span = slice | Tensor


@dataclass(frozen=True, eq=False)
class Block:
    """One kernel call: rows against keys, all of them visible, or causally, or by a bool mask ``[rows, keys]`` (made
    when the plan has been chosen)."""

    rows: Span
    keys: Span
    causal: bool = False
    masked: bool = False
    mask: Tensor | None = None
    #: Rows that the mask hides wholly, bool ``[rows]``; None where there are none.
    hidden: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Region:
    """The calls that make up the attention of some query rows; their results are merged by their lse."""

    rows: Span
    blocks: tuple[Block, ...]


class Job(NamedTuple):
    """The regions of some sequences, and where these lie: slices of the batch, of query rows and of key columns."""

    batch: slice
    queries: slice
    keys: slice
    regions: tuple[Region, ...]


def make_jobs(layout: ModalityLayout, mask: ModularMask, queries: QueryRows, narrow: bool = False) -> list[Job]:
    """The rectangles of a CPU layout: one job per packed document, or per run of equal rows of a batch.

    Args:
        narrow: for 16-bit numbers.
    """
    with torch.device("cpu"):  # whatever the default device is
        return _make_jobs(layout, mask, queries, narrow)


def _make_jobs(layout: ModalityLayout, mask: ModularMask, queries: QueryRows, narrow: bool) -> list[Job]:
    modality, segment = layout.modality.flatten(), layout.segment.flatten()
    bounds, query_bounds = layout.cu_seqlens.tolist(), queries.cu_seqlens.tolist()
    first_column = queries.first_column.tolist()
    known: dict[object, tuple[Region, ...]] = {}
    jobs: list[Job] = []
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        own = segment[begin:end]
        relative = own - own.clamp(min=0).amax() if end > begin else own  # counted from the sequence's last segment
        start, rows = first_column[n] - begin, query_bounds[n + 1] - query_bounds[n]
        key = (tuple(modality[begin:end].tolist()), tuple(relative.tolist()), start, rows)
        if key not in known:
            known[key] = _Planner(mask, modality[begin:end], own, start, rows).best(narrow)
        regions = known[key]
        if layout.packed:
            jobs.append(Job(slice(0, 1), slice(*query_bounds[n : n + 2]), slice(begin, end), regions))
        elif jobs and jobs[-1].regions is regions:
            jobs[-1] = jobs[-1]._replace(batch=slice(jobs[-1].batch.start, n + 1))
        else:
            jobs.append(Job(slice(n, n + 1), slice(None), slice(None), regions))
    return [job for job in jobs if job.regions]


@dataclass(frozen=True)
class _Piece:
    """Query rows of one segment: positions begin…end-1, modality, and the segment's own bounds."""

    begin: int
    end: int
    modality: int
    segment_begin: int
    segment_end: int


class _Planner:
    """Plans one sequence."""

    def __init__(self, mask: ModularMask, modality: Tensor, segment: Tensor, start: int, rows: int) -> None:
        self.mask = mask
        self.rules = mask.rule_table(modality.device)
        # A window that no distance reaches is none.
        self.window = None if mask.window is None or mask.window >= len(modality) else mask.window
        self.columns = torch.nonzero(modality >= 0)[:, 0]
        self.modality, self.segment = modality[self.columns], segment[self.columns]
        self.position = torch.arange(len(self.columns))
        self.start = start
        # Columns rise with positions, so the rows' positions are a run.
        bounds = torch.tensor([start, start + rows])
        self.first, self.last = torch.searchsorted(self.columns, bounds).tolist()
        cuts = [0, *(torch.nonzero(self.segment.diff())[:, 0] + 1).tolist(), len(self.columns)]
        self.pieces = [
            _Piece(max(begin, self.first), min(end, self.last), int(self.modality[begin]), begin, end)
            for begin, end in itertools.pairwise(cuts)
            if max(begin, self.first) < min(end, self.last)
        ]

    def best(self, narrow: bool) -> tuple[Region, ...]:
        """The cheapest of the plans that are tried."""
        candidates = [self._regions(rows) for rows in PlanCost.REGION_ROWS]
        if self.pieces and len(self.columns) <= PlanCost.WHOLE:
            rows = _span_of(torch.arange(self.first, self.last))
            everything = Block(rows, _span_of(self.position), masked=True)
            candidates.append([Region(rows, (everything,))])
        best = min(candidates, key=lambda regions: sum(PlanCost.of(b, narrow) for r in regions for b in r.blocks))
        finished = [self._finished(region) for region in best]
        return tuple(region for region in finished if region.blocks)

    def _regions(self, target: int) -> list[Region]:
        """Regions of about `target` rows where segments are short. Rows that see the past alike go together."""
        classes: dict[tuple[frozenset[int], frozenset[int]], list[_Piece]] = {}
        for piece in self.pieces:
            rule = self.mask.rules[piece.modality]
            everywhere = frozenset(b for b, r in enumerate(rule) if r & Visibility.ALL)
            past = frozenset(b for b, r in enumerate(rule) if r & Visibility.PAST) - everywhere
            classes.setdefault((everywhere, past), []).append(piece)
        return [
            self._region(group, everywhere, past)
            for (everywhere, past), pieces in classes.items()
            for group in self._groups(pieces, everywhere, past, target)
        ]

    def _sees_segment(self, piece: _Piece, everywhere: frozenset[int]) -> bool:
        own = piece.modality
        return bool(self.mask.rules[own][own] & Visibility.SEGMENT) and own not in everywhere

    def _groups(
        self, pieces: list[_Piece], everywhere: frozenset[int], past: frozenset[int], target: int
    ) -> Iterator[list[_Piece]]:
        """Neighbouring pieces that make a region each: long segments alone, runs that are causal among themselves at
        any length, and else pieces up to `target` rows."""
        if not past and not any(self._sees_segment(p, everywhere) for p in pieces):
            yield pieces  # they all see the same
            return
        if self.window is not None and past:
            # Rows share keys only as far as the window reaches.
            target = max(64, min(target, self.window))
            pieces = [
                _Piece(at, min(at + target, p.end), p.modality, p.segment_begin, p.segment_end)
                for p in pieces
                for at in range(p.begin, p.end, target)
            ]
        seen = torch.cat((torch.zeros(1, dtype=torch.int64), _is_in(self.modality, past).cumsum(0)))
        group: list[_Piece] = []
        rows, causal = 0, True
        for piece in pieces:
            size = piece.end - piece.begin
            whole = self._sees_segment(piece, everywhere)
            # Causal among themselves: no keys of the past stand between the rows but the rows.
            runs_on = self.window is None and not whole and piece.modality in past
            runs_on &= not group or bool(seen[piece.begin] == seen[group[-1].end])
            long = size >= target // 2 and not runs_on
            if group and (long or (rows >= target and not (causal and runs_on))):
                yield group
                group, rows, causal = [], 0, True
            group.append(piece)
            rows, causal = rows + size, causal and runs_on
            if long:
                yield group
                group, rows, causal = [], 0, True
            elif not causal and runs_on and size >= target:
                # A long run must not be masked for the sake of what stands before it.
                yield group[:-1]
                group, rows, causal = [piece], size, True
        if group:
            yield group

    def _region(self, group: list[_Piece], everywhere: frozenset[int], past: frozenset[int]) -> Region:
        rows = _span_of(torch.cat([torch.arange(p.begin, p.end) for p in group]))
        first, last = group[0].begin, group[-1].end - 1
        position = self.position
        of_past = _is_in(self.modality, past)
        full = of_past & (position < first)
        some = of_past & (position <= last)
        if self.window is not None:
            full &= position > last - self.window
            some &= position > first - self.window
        full |= _is_in(self.modality, everywhere)
        whole = [p for p in group if self._sees_segment(p, everywhere)]
        for piece in whole:
            (full if len(group) == 1 else some)[piece.segment_begin : piece.segment_end] = True
        some &= ~full
        blocks = [Block(rows, _span(full))] if bool(full.any()) else []
        if bool(some.any()):
            keys = _span(some)
            # The keys that only some rows see are the rows themselves: causal.
            causal = self.window is None and not whole and torch.equal(_indices(rows), _indices(keys))
            blocks.append(Block(rows, keys, causal=causal, masked=not causal))
        return Region(rows, tuple(blocks))

    def _finished(self, region: Region) -> Region:
        """With masks, in query rows and key columns in place of positions, without blocks that show nothing."""
        r = _indices(region.rows)
        rows = _span_of(self.columns[r] - self.start)
        blocks = []
        for block in region.blocks:
            k, mask, hidden = _indices(block.keys), None, None
            if block.masked:
                of_rows = [x[r][:, None] for x in (self.modality, self.position, self.segment)]
                of_keys = [x[k][None, :] for x in (self.modality, self.position, self.segment)]
                mask = visible_pair(self.rules, self.window, *of_rows, *of_keys)
                hidden = ~mask.any(1)
                if bool(hidden.all()):
                    continue
                hidden = hidden if bool(hidden.any()) else None
            blocks.append(Block(rows, _span_of(self.columns[k]), block.causal, block.masked, mask, hidden))
        return Region(rows, tuple(blocks))


def _is_in(modality: Tensor, modalities: frozenset[int]) -> Tensor:
    return torch.isin(modality, torch.tensor(sorted(modalities), dtype=modality.dtype))


def _span(chosen: Tensor) -> Span:
    return _span_of(torch.nonzero(chosen)[:, 0])


def _span_of(indices: Tensor) -> Span:
    """Ascending indices as a slice where they are a run."""
    count = len(indices)
    if count and int(indices[-1]) - int(indices[0]) == count - 1:
        return slice(int(indices[0]), int(indices[-1]) + 1)
    return indices


def _indices(span: Span) -> Tensor:
    return torch.arange(span.start, span.stop) if isinstance(span, slice) else span


def size_of(span: Span) -> int:
    """How many positions a span has."""
    return int(span.stop - span.start) if isinstance(span, slice) else len(span)
