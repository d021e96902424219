"""Keys and values on their way: from the shards that hold them to the ranks that see them, and their gradients back.

One collective for both, and in the backward one for both gradients: an all-to-all of the columns that are seen or,
where almost all are, an all-gather (whose backward is a reduce-scatter).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moda_kernels.distributed.plan import Plan, indices, placed, seen_columns
from moda_kernels.distributed.shards import Part, part_of
from moda_kernels.runtime import collectives
from moda_kernels.runtime.collectives import Group
from moda_kernels.tokens.layout import ModalityLayout, QueryRows


@dataclass(frozen=True, eq=False)
class Call:
    """One call of attention: a run of this rank's rows, and the keys among which it stands.

    Attributes:
        rows: the first and last + 1 of the rank's rows. keys: of the columns that the rank holds.
        part: those keys' layout.
        query_start, cu_seqlens_q: where the rows stand among them, as `moda_attention` wants it; queries: as a backend
            does, which remembers there what all layers share.
    """

    rows: tuple[int, int]
    keys: tuple[int, int]
    part: Part
    query_start: int | Tensor
    cu_seqlens_q: Tensor | None
    queries: QueryRows


@dataclass(frozen=True, eq=False)
class Route:
    """How the keys of a plan get to one rank.

    Attributes:
        columns: that the rank holds while it attends, int64, rising, on the CPU.
        calls: of attention.
        order: int64 ``[columns]``, where each column's key stands in what arrived: this rank's own first, then those of
            the others (gathered: of all ranks, padded to the longest shard), and behind all one of zeros.
        sent, received: columns to and from each rank; None where all are gathered.
        own: int64, which of this rank's columns are sent, in the order of the ranks that get them.
        padded: columns of the longest shard.
        zeros: whether some column that is held isn't seen.
    """

    columns: Tensor
    calls: list[Call]
    order: Tensor
    sent: list[int] | None
    received: list[int] | None
    own: Tensor
    padded: int
    zeros: bool

    def bring(self, tensors: list[Tensor], dim: int, group: Group) -> list[Tensor]:
        """Shards (of equal shapes but for their last axis, columns along `dim`) → what this rank holds."""
        if group.size() == 1:
            return tensors
        rows = [x.movedim(dim, 0) for x in tensors]
        flat = torch.cat([x.flatten(1) for x in rows], 1)
        arrived = self._arrived(flat, group)
        held = arrived.index_select(0, self.order)
        parts = held.split([x.flatten(1).shape[1] for x in rows], 1)
        return [part.unflatten(1, x.shape[1:]).movedim(0, dim) for part, x in zip(parts, rows, strict=True)]

    def _arrived(self, flat: Tensor, group: Group) -> Tensor:
        if self.sent is None or self.received is None:
            more = self.padded - flat.shape[0]
            return collectives.gather_rows(torch.nn.functional.pad(flat, (0, 0, 0, more)) if more else flat, group)
        parts = [flat, collectives.move_rows(flat.index_select(0, self.own), self.received, self.sent, group)]
        if self.zeros:
            parts.append(flat.new_zeros(1, flat.shape[1]))
        return torch.cat(parts)


def route_for(plan: Plan, rank: int, device: torch.device) -> Route:
    """The route of a rank."""
    mine = indices(plan.runs[rank])
    columns = plan.places[rank].nonzero()[:, 0]
    owner, place = _places(plan)
    whole = plan.layout
    calls = _calls(plan, rank, columns, device)
    if plan.gathers:
        padded = max(plan.rows)
        order = owner[columns] * padded + place[columns]
        return Route(columns, calls, order.to(device), None, None, mine.new_zeros(0).to(device), padded, False)
    ranks = range(plan.ranks)
    away = [plan.needed[r] & (owner != r) for r in ranks]
    to_others = [(away[r] & (owner == rank)).nonzero()[:, 0] for r in ranks]
    to_me = [(away[rank] & (owner == r)).nonzero()[:, 0] for r in ranks]
    # Behind all of them stand zeros, for columns that keep others apart and that nobody sees.
    arrived = torch.cat([mine, *to_me])
    at = torch.full((whole.modality.shape[-1],), len(arrived))
    at[arrived] = torch.arange(len(arrived))
    order = at[columns]
    return Route(
        columns,
        calls,
        order.to(device),
        [len(x) for x in to_others],
        [len(x) for x in to_me],
        place[torch.cat(to_others)].to(device),
        0,
        bool((order == len(arrived)).any()),
    )


def _places(plan: Plan) -> tuple[Tensor, Tensor]:
    """Of each column the rank that holds it, and which of its columns it is."""
    total = plan.layout.modality.shape[-1]
    owner, place = torch.zeros(total, dtype=torch.long), torch.zeros(total, dtype=torch.long)
    for rank, runs in enumerate(plan.runs):
        mine = indices(runs)
        owner[mine], place[mine] = rank, torch.arange(len(mine))
    return owner, place


def _calls(plan: Plan, rank: int, columns: Tensor, device: torch.device) -> list[Call]:
    made: list[Call] = []
    first = 0
    for start, stop in plan.runs[rank]:
        run = start, stop
        where = placed(seen_columns(plan.layout, plan.mask, run), plan.mask, run).nonzero()[:, 0]
        # From the first to the last of those that are held: a view, and others among them are seen by nobody.
        low = int(torch.searchsorted(columns, where[:1]))
        high = int(torch.searchsorted(columns, where[-1:])) + 1
        part = part_of(plan.layout, columns[low:high], device)
        query_start, bounds = (_on(x, device) for x in _standing(plan.layout, part, start, stop))
        queries = part.layout.queries(stop - start, query_start, bounds)
        rows = (first, first + stop - start)
        made.append(Call(rows, (low, high), part, query_start, bounds, queries))
        first = rows[1]
    return made


def _on(x: Any, device: torch.device) -> Any:
    return x.to(device) if isinstance(x, Tensor) else x


def _standing(whole: ModalityLayout, part: Part, start: int, stop: int) -> tuple[int | Tensor, Tensor | None]:
    """`query_start` and `cu_seqlens_q` of the rows of columns start … stop - 1 (which lie side by side in the part)."""
    at = int(torch.searchsorted(part.columns, torch.tensor(start)))
    if not whole.packed:
        return at, None
    low, high = part.sequences
    begins = whole.cu_seqlens[low : high + 1].long()
    rows = begins.clamp(start, stop) - start
    keys = torch.searchsorted(part.columns, begins)
    offsets = torch.where(rows.diff() > 0, (at + rows[:-1] - keys[:-1]), 0)
    return offsets.int(), rows.int()
