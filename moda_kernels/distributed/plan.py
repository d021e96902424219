"""Who holds which columns, and who needs them: a plan made from intervals alone, the same on every rank.

Columns (of a batch ``[B, L]`` all rows at once; of packed documents the tokens) are cut into runs, and each rank holds
some. "work" gives every rank as many columns as the others (give or take one) and as many visible pairs: ranks take,
one after another, the window of the columns that are left (its end joined to its beginning, as of a necklace) which
holds their share. There always is one, and all cuts together are at most twice as many as ranks, so that a rank has
about two runs. Nothing here is of size L², and nothing communicates.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moda_kernels.runtime import checks
from moda_kernels.tokens.intervals import count_by_pass, ends_of, mask_intervals
from moda_kernels.tokens.layout import ModalityLayout
from moda_kernels.tokens.mask import ModularMask

BALANCES = ("work", "head_tail", "none")
#: A window may miss its share of the pairs by this much, where one that does is cut less.
TOLERANCE = 0.004
#: From this share of all keys on that the ranks need together, all are gathered: fewer copies, one collective.
GATHER = 0.9

Run = tuple[int, int]
Runs = tuple[Run, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """Shards of a layout, and which keys each rank needs for a mask. Made by :func:`plan_shards`.

    Attributes:
        layout: of the whole sequence, on the CPU.
        mask: who sees whom.
        runs: per rank its runs of columns (first, last + 1), in order.
        work: int64 ``[ranks]``, visible pairs of each rank's rows.
        needed: bool ``[ranks, L]``, the columns of which a rank sees a key.
        places: bool ``[ranks, L]``, the columns that have a place on a rank while it attends: the needed ones, its own,
            and with a window, which measures distances, all between the first and the last that a run sees.
        gathers: whether all keys go to all ranks, because almost all are needed.
    """

    layout: ModalityLayout
    mask: ModularMask
    runs: tuple[Runs, ...]
    work: Tensor
    needed: Tensor
    places: Tensor
    gathers: bool

    @property
    def ranks(self) -> int:
        return len(self.runs)

    @property
    def rows(self) -> list[int]:
        """Columns of each rank."""
        return [count(runs) for runs in self.runs]

    @property
    def imbalance(self) -> float:
        """How much more than the mean the most loaded rank has to do (0: nothing)."""
        mean = float(self.work.double().mean())
        return float(self.work.max()) / mean - 1 if mean else 0.0

    @property
    def received(self) -> list[int]:
        """Columns of keys (and values) that each rank gets from others, per layer."""
        if self.gathers:
            return [(self.ranks - 1) * max(self.rows)] * self.ranks
        return [
            int(self.needed[r].sum()) - int(self.needed[r][indices(runs)].sum()) for r, runs in enumerate(self.runs)
        ]

    @property
    def held(self) -> list[int]:
        """Columns of keys (and values) that each rank holds while it attends, its own among them."""
        held: list[int] = self.places.sum(1).tolist()
        return held


def count(runs: Runs) -> int:
    return sum(stop - start for start, stop in runs)


def indices(runs: Runs) -> Tensor:
    """int64 columns of runs."""
    parts = [torch.arange(start, stop) for start, stop in runs]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)


def columns_of(layout: ModalityLayout) -> int:
    return layout.modality.shape[-1]


def plan_shards(layout: ModalityLayout, mask: ModularMask | None = None, ranks: int = 1, balance: str = "work") -> Plan:
    """Plan context parallelism without running it; needs no process group.

    Args:
        layout: of the whole sequence. mask: default: full.
        ranks: how many. balance: as in :class:`ContextParallel`.

    Raises:
        ValueError, TypeError: arguments other than these.
    """
    if not isinstance(layout, ModalityLayout):
        raise checks.wrong_type("layout", "a ModalityLayout", layout)
    checks.integer("ranks", ranks, 1)
    checks.choice("balance", balance, BALANCES)
    layout = layout.to("cpu") if layout.device.type != "cpu" else layout
    mask = checked_mask(mask, layout)
    return plan_for(layout, mask, _runs(layout, mask, ranks, balance))


def checked_mask(mask: ModularMask | None, layout: ModalityLayout) -> ModularMask:
    if mask is None:
        return ModularMask.full(layout.num_roles)
    if not isinstance(mask, ModularMask):
        raise checks.wrong_type("mask", "a ModularMask", mask)
    mask.check_layout(layout)
    return mask


def plan_for(layout: ModalityLayout, mask: ModularMask, runs: tuple[Runs, ...]) -> Plan:
    """The plan of given shards (layout on the CPU)."""
    pairs, total = _pairs(layout, mask), columns_of(layout)
    work = torch.stack([pairs[indices(mine)].sum() for mine in runs])
    needed, places = torch.zeros(2, len(runs), total, dtype=torch.bool)
    for rank, mine in enumerate(runs):
        for run in mine:
            seen = seen_columns(layout, mask, run)
            needed[rank] |= seen
            places[rank] |= placed(seen, mask, run)
    gathers = False
    if len(runs) > 1 and total:
        own = sum(int(needed[r][indices(mine)].sum()) for r, mine in enumerate(runs))
        gathers = int(needed.sum()) - own >= GATHER * total * (len(runs) - 1)
    return Plan(layout, mask, runs, work, needed, places, gathers)


def placed(seen: Tensor, mask: ModularMask, run: Run) -> Tensor:
    """bool ``[L]``, the columns among which a run's rows stand when they attend."""
    out = seen.clone()
    out[slice(*run)] = True
    if mask.window is not None:
        where = out.nonzero()[:, 0]
        out[int(where[0]) : int(where[-1]) + 1] = True
    return out


def seen_columns(layout: ModalityLayout, mask: ModularMask, run: Run) -> Tensor:
    """bool ``[L]``: columns in which some row of a run's columns sees a key."""
    length, sequences = columns_of(layout), layout.num_sequences
    seen = torch.zeros(layout.num_tokens, dtype=torch.bool)
    if not sequences:
        return torch.zeros(length, dtype=torch.bool)
    limits, positions = mask_intervals(layout, layout.queries(), mask)
    batch = 1 if layout.packed else sequences
    rows = (torch.arange(batch)[:, None] * length + torch.arange(*run)).flatten()
    of_row = layout.sequence.flatten()[rows].long()
    # One place more for each sequence: where what reaches its last token ends.
    begin = layout.cu_seqlens[:-1].long() + torch.arange(sequences)
    size = layout.cu_seqlens.diff().long()
    first, most = begin[of_row], size[of_row]
    of_key = begin[layout.sequence.flatten().long()]
    for lows, highs, position in zip(*ends_of(limits, len(positions)), positions, strict=True):
        change = torch.zeros(layout.num_tokens + sequences + 1, dtype=torch.int32)
        for low, high in zip(lows[:, rows].long(), highs[:, rows].long(), strict=True):
            some = (low < high).int()
            change.scatter_add_(0, first + torch.minimum(low + 1, most).clamp(min=0), some)
            change.scatter_add_(0, first + torch.minimum(high + 1, most).clamp(min=0), -some)
        covered = change.cumsum(0) > 0
        seen |= (position >= 0) & covered[of_key + position.long().clamp(min=0)]
    return seen.view(-1, length).any(0)


def _pairs(layout: ModalityLayout, mask: ModularMask) -> Tensor:
    """int64 ``[L]``: visible pairs of the rows in each column."""

    def make() -> Tensor:
        counted = count_by_pass(layout, layout.queries(), mask).sum(0, dtype=torch.int64)
        length = columns_of(layout)
        return counted.view(-1, length).sum(0) if length else counted.new_zeros(0)

    return layout.remember(("pairs of columns", mask), make)


def _runs(layout: ModalityLayout, mask: ModularMask, ranks: int, balance: str) -> tuple[Runs, ...]:
    total = columns_of(layout)
    if balance == "none":
        return even_runs(total, ranks)
    if balance == "head_tail":
        cuts = [total * i // (2 * ranks) for i in range(2 * ranks + 1)]
        pairs = list(itertools.pairwise(cuts))
        return tuple(_joined([pairs[r], pairs[-1 - r]]) for r in range(ranks))
    marks = set(layout.cu_seqlens.tolist()) if layout.packed else set()
    return _by_work(_pairs(layout, mask), ranks, marks)


def even_runs(total: int, ranks: int) -> tuple[Runs, ...]:
    """One run each, of equal lengths give or take one, in the order of the ranks."""
    sizes = [total // ranks + (r < total % ranks) for r in range(ranks)]
    ends = list(itertools.accumulate(sizes))
    return tuple(_joined([(end - size, end)]) for end, size in zip(ends, sizes, strict=True))


def _joined(runs: Sequence[Run]) -> Runs:
    """In order, those that touch as one, without empty ones."""
    made: list[Run] = []
    for start, stop in sorted(run for run in runs if run[0] < run[1]):
        if made and made[-1][1] == start:
            made[-1] = (made[-1][0], stop)
        else:
            made.append((start, stop))
    return tuple(made)


def _by_work(pairs: Tensor, ranks: int, marks: set[int]) -> tuple[Runs, ...]:
    """Args: marks: columns where a cut is cheaper (documents begin)."""
    share = float(pairs.sum()) / ranks
    sizes = [len(pairs) // ranks + (r < len(pairs) % ranks) for r in range(ranks)]
    left: list[Run] = [(0, len(pairs))] if len(pairs) else []
    taken: list[Runs] = []
    for rank, size in enumerate(sizes):
        if rank == ranks - 1 or not size:
            taken.append(tuple(left) if size else ())
            continue
        columns = indices(tuple(left))
        weight = pairs[columns].double()
        around = torch.nn.functional.pad(torch.cat((weight, weight[:size])).cumsum(0), (1, 0))
        window = around[size:] - around[: len(around) - size]  # of the window that begins at each column, and the last
        miss = (window[: len(columns)] - weight.sum() / (ranks - rank)).abs()
        # What a cut before each column costs: nothing where there is one.
        cost = torch.full((len(columns),), 2)
        places = {start: place for place, start in zip(_places(left), (run[0] for run in left), strict=True)}
        cost[[*places.values()]] = 0
        for start, stop in left if marks else ():
            inside = [mark for mark in marks if start < mark < stop]
            cost[[places[start] + mark - start for mark in inside]] = 1
        cost = cost + cost.roll(-size)
        good = miss <= max(float(miss.min()), TOLERANCE * share)
        least = good & (cost == cost[good].min())
        begin = int(torch.where(least, miss, float("inf")).argmin())
        chosen = _cut(left, begin, begin + size)
        taken.append(chosen)
        left = _without(left, chosen)
    return tuple(taken)


def _places(runs: Sequence[Run]) -> list[int]:
    """How many columns lie in the runs before each."""
    return list(itertools.accumulate((stop - start for start, stop in runs[:-1]), initial=0))


def _cut(runs: Sequence[Run], begin: int, end: int) -> Runs:
    """The begin-th to end-th columns of runs, counted on from the first after the last."""
    total = sum(stop - start for start, stop in runs)
    parts: list[Run] = []
    for low, high in ((begin, min(end, total)), (0, end - total)):
        for place, (start, stop) in zip(_places(runs), runs, strict=True):
            a, b = max(low, place), min(high, place + stop - start)
            if a < b:
                parts.append((start + a - place, start + b - place))
    return _joined(parts)


def _without(runs: Sequence[Run], taken: Runs) -> list[Run]:
    left: list[Run] = []
    for start, stop in runs:
        at = start
        for a, b in taken:
            if start <= a < stop:
                left.append((at, a))
                at = b
        left.append((at, stop))
    return [run for run in left if run[0] < run[1]]
