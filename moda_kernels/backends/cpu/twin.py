"""The planner without the native extension: the same decisions, and so the same plans, as `csrc/plan.cpp`.

Plain Python over lists. Everything is in ranks: a pass's keys counted within a sequence, so that rows that see the same
keys have equal numbers whatever their limits are. A *slot* is one interval of one pass.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moda_kernels.tokens.intervals import ends_of, intervals_of

_FAR = 2**31 - 1
FULL, CAUSAL, MASKED = range(3)
_ALIKE, _RISING, _MIXED = range(3)

#: A pass and ranks in it, first included, last excluded.
_Range = tuple[int, int, int]
#: As a tensor has them: a call's sequences (first, last excluded), whether its rows are others than those of the call
#: before, its kind, and rows and keys: how many; first of a run or -1; else where `indices` has them.
PlannedCall = tuple[int, ...]


class Costs(NamedTuple):
    """What calls cost, in scores of a full rectangle (`plan.COSTS` has numbers and reasons).

    Attributes:
        call: one more call. row, key: each of its rows and keys.
        masked: 100 masked scores.
        causal_block: rows of a block along the diagonal, which a causal call computes whole.
        atom, most: rows: shorter pieces are put together; the most of a call with a mask.
        whole: a masked call over a whole sequence has up to whole² scores.
    """

    call: int
    row: int
    key: int
    masked: int
    causal_block: int
    atom: int
    most: int
    whole: int

    def of_call(self, rows: int, keys: int, masked: bool, times: int = 1) -> int:
        """What a call costs, over a batch of `times`."""
        scores = rows * keys * self.masked // 100 if masked else rows * keys
        return self.call + times * (self.row * rows + self.key * keys + scores)


def plan_attention(
    limits: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    passes: tuple[int, int],
    costs: Costs,
) -> tuple[Tensor, Tensor]:
    """The calls that cover what the intervals of some passes show, each visible score once. A sequence that
    looks like the one before is served by its calls.

    Args:
        limits, positions: of `Intervals`.
        cu_seqlens, cu_seqlens_q: int32 ``[N + 1]``.
        passes: from the first to the last (excluded).

    Returns:
        int32 ``[calls, 10]`` of `PlannedCall`, and int32 indices: rows and keys that are no run.

    Raises:
        ValueError: positions that don't rise along a sequence.
    """
    rows, keys = cu_seqlens_q.tolist(), cu_seqlens.tolist()
    intervals = intervals_of(limits, len(positions))
    ends = (end[slice(*passes)].flatten(0, 1).tolist() for end in ends_of(limits, len(positions)))
    of_limits = list(zip(*ends, strict=True))
    of_keys = positions[slice(*passes)].tolist()
    calls: list[PlannedCall] = []
    indices: list[int] = []
    before: object = None
    first = 0
    for s, (bounds, row_bounds) in enumerate(zip(itertools.pairwise(keys), itertools.pairwise(rows), strict=True)):
        own_keys = [p[slice(*bounds)] for p in of_keys]
        own_limits = [[side[slice(*row_bounds)] for side in slot] for slot in of_limits]
        now = (own_keys, own_limits, bounds[1] - bounds[0], row_bounds[1] - row_bounds[0])
        if now == before:
            calls[first:] = [(call[0], s + 1, *call[2:]) for call in calls[first:]]
            continue
        before, first = now, len(calls)
        planner = _Planner(own_keys, own_limits, intervals, bounds[1] - bounds[0], costs, indices)
        calls += [(s, s + 1, *call) for call in planner.calls(row_bounds[1] - row_bounds[0])]
    made = torch.tensor(calls, dtype=torch.int32, device="cpu").view(-1, 10)
    return made, torch.tensor(indices, dtype=torch.int32, device="cpu")


def plan_masks(
    limits: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    passes: tuple[int, int],
    calls: Tensor,
    indices: Tensor,
    sizes: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """The masks of the masked calls, bool, one after another (``[rows, keys]`` each); and bool, for each of their rows
    whether all is hidden.

    Args:
        sizes: of both results together.
    """
    masks, hidden = [], []
    lows, highs = ends_of(limits, len(positions))
    first_row, first_key = cu_seqlens_q.tolist(), cu_seqlens.tolist()
    for s, _, _, kind, count, start, at, key_count, key_start, key_at in calls.tolist():
        if kind != MASKED:
            continue
        with torch.device("cpu"):
            r = torch.arange(start, start + count) if start >= 0 else indices[at : at + count].long()
            k = (
                torch.arange(key_start, key_start + key_count)
                if key_start >= 0
                else indices[key_at : key_at + key_count].long()
            )
            seen = torch.zeros(count, key_count, dtype=torch.bool)
        for p in range(*passes):
            key = positions[p, first_key[s] + k]
            for low, high in zip(lows[p][:, first_row[s] + r], highs[p][:, first_row[s] + r], strict=True):
                seen |= (key > low[:, None]) & (key <= high[:, None]) & (key >= 0)
        masks.append(seen.flatten())
        hidden.append(~seen.any(1))
    none = torch.empty(0, dtype=torch.bool, device="cpu")
    return torch.cat([none, *masks]), torch.cat([none, *hidden])


class _Bounds:
    """Of some rows, for each slot: the least and the largest rank at which it begins and ends."""

    def __init__(self, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
        begins, ends = zip(*rows, strict=True)
        self.begins = [(min(column), max(column)) for column in zip(*begins, strict=True)]
        self.ends = [(min(column), max(column)) for column in zip(*ends, strict=True)]

    def corners(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Two rows that have these bounds."""
        return [(tuple(b[side] for b in self.begins), tuple(e[side] for e in self.ends)) for side in (0, 1)]


class _Group(NamedTuple):
    rows: list[int]
    kind: int
    bounds: _Bounds


class _Planner:
    """Plans one sequence."""

    def __init__(
        self,
        positions: list[list[int]],
        limits: list[list[list[int]]],  # of each slot: lo and hi of each row
        intervals: int,
        keys: int,
        costs: Costs,
        indices: list[int],
    ) -> None:
        self.intervals, self.keys, self.costs, self.indices = intervals, keys, costs, indices
        self.limits = limits
        self.columns: list[list[int]] = []  # of each pass: its keys
        self.ranks: list[list[int]] = []  # of each pass: its keys before each position
        for position in positions:
            members = [k for k, x in enumerate(position) if x >= 0]
            at = [position[k] for k in members]
            if any(a >= b for a, b in itertools.pairwise(at)) or (at and at[-1] >= keys):
                raise ValueError("positions: expected them to rise along each sequence, below its number of keys")
            self.columns.append(members)
            ranks = [0] * (keys + 1)
            for x in at:
                ranks[x + 1] = 1
            self.ranks.append(list(itertools.accumulate(ranks)))
        self.seen: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}  # of each row that sees something

    def calls(self, rows: int) -> list[PlannedCall]:
        """The calls of the sequence, without its number."""
        classes = self._classes(rows)
        groups: list[_Group] = []
        cost = 0
        for of_class in classes:
            chosen, spent = self._choose(of_class)
            groups += chosen
            cost += spent
        whole = self._whole(classes, cost) if len(groups) > 1 else None
        return [whole] if whole else [call for group in groups for call in self._written(group)]

    def _classes(self, rows: int) -> list[list[int]]:
        """Rows whose intervals are there, begin with the sequence, and reach beyond its end alike."""
        classes: dict[tuple[int, ...], list[int]] = {}
        for r in range(rows):
            begins, ends, signature = [], [], []
            for s, (lows, highs) in enumerate(self.limits):
                low, high = lows[r], highs[r]
                if low >= high or low < -1:
                    begins.append(0)
                    ends.append(0)
                    signature.append(0)
                    continue
                ranks = self.ranks[s // self.intervals]
                begins.append(ranks[min(low, self.keys - 1) + 1])
                ends.append(ranks[min(high, self.keys - 1) + 1])
                signature.append(3 if high == _FAR else 1 if low == -1 else 2)
            if any(b < e for b, e in zip(begins, ends, strict=True)):
                self.seen[r] = tuple(begins), tuple(ends)
                classes.setdefault(tuple(signature), []).append(r)
        return list(classes.values())

    def _last_seen(self, row: int) -> int:
        """The last key that a row sees."""
        begins, ends = self.seen[row]
        return max(
            self.columns[s // self.intervals][e - 1] for s, (b, e) in enumerate(zip(begins, ends, strict=True)) if b < e
        )

    def _one_more(self, row: int, after: int, last: int) -> int:
        """The key that a row sees beyond those of another one: one, behind all that `last` stands for; else -1."""
        (begins, ends), (new_begins, new_ends) = self.seen[row], self.seen[after]
        if begins != new_begins:
            return -1
        grown = [(s, new - old) for s, (old, new) in enumerate(zip(ends, new_ends, strict=True)) if new != old]
        if len(grown) != 1 or grown[0][1] != 1:
            return -1
        slot = grown[0][0]
        key = self.columns[slot // self.intervals][ends[slot]]
        return key if key > last else -1

    def _cut(self, rows: list[int]) -> list[tuple[int, int, int]]:
        """Atoms: neighbouring rows of a class, begin and end in its list, and their kind."""
        atoms: list[tuple[int, int, int]] = []
        pending: tuple[int, int, int] | None = None
        at = 0
        while at < len(rows):
            end, kind, last = at + 1, _ALIKE, -1
            while end < len(rows):
                row, after = rows[end - 1], rows[end]
                alike = self.seen[row] == self.seen[after]
                if alike and kind == _ALIKE:
                    end += 1
                    continue
                if alike or (kind == _ALIKE and end - at > 1):
                    break
                key = self._one_more(row, after, self._last_seen(row) if kind == _ALIKE else last)
                if key < 0:
                    break
                kind, last, end = _RISING, key, end + 1
            if end - at >= self.costs.atom:
                atoms += [pending] if pending else []
                atoms.append((at, end, kind))
                pending = None
            else:
                pending = (pending[0], end, _MIXED) if pending else (at, end, kind)
            if pending and pending[1] - pending[0] >= self.costs.atom:
                atoms.append(pending)
                pending = None
            at = end
        return atoms + ([pending] if pending else [])

    def _split(self, bounds: _Bounds) -> tuple[list[_Range], list[_Range]]:
        """The keys that all rows see, and those that only some may see."""
        full, some = [], []
        for p in range(len(self.columns)):
            slots = range(p * self.intervals, (p + 1) * self.intervals)
            every = _united([(p, bounds.begins[s][1], bounds.ends[s][0]) for s in slots])
            hull = _united([(p, bounds.begins[s][0], bounds.ends[s][1]) for s in slots])
            full += every
            some += _without(hull, every)
        return full, some

    def _cost(self, bounds: _Bounds, rows: int, kind: int) -> int:
        full, some = map(_size, self._split(bounds))
        if some == 0:
            return self.costs.of_call(rows, full, False)
        apart = self._apart(rows, full, some, kind)
        return self.costs.of_call(rows, full + some, True) if self._is_together(rows, full, some, apart) else apart

    def _apart(self, rows: int, full: int, some: int, kind: int) -> int:
        """One call for the keys that all rows see and one for the others. Of rising rows the last key that all see is
        the first one of those along the diagonal."""
        c = self.costs
        diagonal = c.call + (c.row + c.key) * rows + min(rows * rows, rows * (rows + c.causal_block) // 2)
        full -= kind == _RISING
        return (self.costs.of_call(rows, full, False) if full > 0 else 0) + (
            diagonal if kind == _RISING else self.costs.of_call(rows, some, True)
        )

    def _is_together(self, rows: int, full: int, some: int, apart: int) -> bool:
        """Whether one masked call over all these keys does as well."""
        return (
            full > 0 and some > 0 and rows <= self.costs.most and self.costs.of_call(rows, full + some, True) <= apart
        )

    def _choose(self, rows: list[int]) -> tuple[list[_Group], int]:
        """The cheapest way to cut a class's rows into groups, and its cost."""
        atoms = self._cut(rows)
        bounds = [_Bounds([self.seen[r] for r in rows[begin:end]]) for begin, end, _ in atoms]
        best, start = [0], [0]
        for j in range(1, len(atoms) + 1):
            corners: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
            found: tuple[int, int] | None = None
            for i in range(j - 1, -1, -1):
                size = atoms[j - 1][1] - atoms[i][0]
                if i < j - 1 and size > self.costs.most:
                    break
                joined = _Bounds(corners + bounds[i].corners())
                corners = joined.corners()
                cost = best[i] + self._cost(joined, size, atoms[i][2] if i == j - 1 else _MIXED)
                if found is None or cost < found[0]:
                    found = cost, i
            assert found is not None
            best.append(found[0])
            start.append(found[1])
        groups, j = [], len(atoms)
        while j > 0:
            i = start[j]
            joined = _Bounds([corner for b in bounds[i:j] for corner in b.corners()])
            groups.append(_Group(rows[atoms[i][0] : atoms[j - 1][1]], atoms[i][2] if i == j - 1 else _MIXED, joined))
            j = i
        return groups[::-1], best[-1]

    def _whole(self, classes: list[list[int]], cost: int) -> PlannedCall | None:
        """Short sequences: one masked call over everything, where that is cheaper."""
        rows = sorted(r for of_class in classes for r in of_class)
        if len(rows) * self.keys > self.costs.whole**2:
            return None
        keys = []
        for p, members in enumerate(self.columns):
            change = [0] * (len(members) + 1)
            for r, s in itertools.product(rows, range(p * self.intervals, (p + 1) * self.intervals)):
                begin, end = self.seen[r][0][s], self.seen[r][1][s]
                if begin < end:
                    change[begin] += 1
                    change[end] -= 1
            keys += [k for k, seen in zip(members, itertools.accumulate(change), strict=False) if seen > 0]
        if self.costs.of_call(len(rows), len(keys), True) >= cost:
            return None
        return (1, MASKED, *self._span(rows), *self._span(sorted(keys)))

    def _written(self, group: _Group) -> list[PlannedCall]:
        full, some = self._split(group.bounds)
        rows, of_full, of_some, kind = len(group.rows), _size(full), _size(some), MASKED
        if self._is_together(rows, of_full, of_some, self._apart(rows, of_full, of_some, group.kind)):
            full, some = [], some + full
        elif group.kind == _RISING:
            kind = CAUSAL
            key = self._last_seen(group.rows[0])
            taken = next(i for i, (p, _, end) in enumerate(full) if self.columns[p][end - 1] == key)
            p, begin, end = full[taken]
            full[taken : taken + 1] = [(p, begin, end - 1)] if begin < end - 1 else []
            some.append((p, end - 1, end))
        of_rows = self._span(group.rows)
        calls: list[PlannedCall] = []
        for ranges, of_kind in ((full, FULL), (some, kind)):
            if ranges:
                keys = sorted(k for p, begin, end in ranges for k in self.columns[p][begin:end])
                calls.append((0 if calls else 1, of_kind, *of_rows, *self._span(keys)))
        return calls

    def _span(self, chosen: list[int]) -> tuple[int, int, int]:
        if chosen[-1] - chosen[0] == len(chosen) - 1:
            return len(chosen), chosen[0], -1
        offset = len(self.indices)
        self.indices += chosen
        return len(chosen), -1, offset


def _united(ranges: list[_Range]) -> list[_Range]:
    """Ranges of one pass, sorted, disjoint and not empty."""
    result: list[_Range] = []
    for p, begin, end in sorted(r for r in ranges if r[1] < r[2]):
        if result and begin <= result[-1][2]:
            result[-1] = (p, result[-1][1], max(result[-1][2], end))
        else:
            result.append((p, begin, end))
    return result


def _without(ranges: list[_Range], taken: list[_Range]) -> list[_Range]:
    """What `ranges` has and `taken` has not; both of one pass and united."""
    result: list[_Range] = []
    for p, begin, end in ranges:
        for _, other, stop in taken:
            if stop <= begin or other >= end:
                continue
            if other > begin:
                result.append((p, begin, other))
            begin = stop
        if begin < end:
            result.append((p, begin, end))
    return result


def _size(ranges: list[_Range]) -> int:
    return sum(end - begin for _, begin, end in ranges)
