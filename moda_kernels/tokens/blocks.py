"""FlexAttention's block masks, written out from intervals (`intervals.py`): no L×L tensor, no compiler, no waiting.

FlexAttention wants lists: for each tile of queries the tiles of keys that it meets with masks and those that it meets
whole, and the same for each tile of keys; beside them a `mask_mod` that says of one pair whether it is seen. All of it
is linear in tokens and tiles, since the keys of a pass that a row sees are a run of the pass's keys: the tiles in which
a run begins and ends say which it meets, and a sum of differences over the rows of a tile says how many meet each.

`mask_mod` reads tensors and knows no numbers, so that another layout of the same sizes is no other code. Nothing here
knows a rule.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moda_kernels.tokens.intervals import FAR, Rules, ends_of, intervals_of, mask_intervals, passes_of
from moda_kernels.tokens.layout import ModalityLayout, QueryRows

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

#: Up to so many intervals a row are compared one by one; beyond, a key looks its own up (two reads for each pair).
UNROLLED = 8


class Sight(NamedTuple):
    """Who sees whom among the keys of P passes, W = P · I intervals a row, all int32. A *place* is a position counted
    on through all sequences, so that rows see keys of their own sequence alone.

    Attributes:
        low, high: ``[W, B, Lq]`` (packed: a batch of one). A row sees the keys of pass w // I at low < place <= high.
        place: ``[P, B, Lk]``, -1 for keys that are not in the pass.
    """

    low: Tensor
    high: Tensor
    place: Tensor

    @property
    def intervals(self) -> int:
        return self.low.shape[0] // max(self.place.shape[0], 1)

    def of(self, begin: int, end: int) -> "Sight":
        """Of the passes from begin to end - 1 alone."""
        i = self.intervals
        return Sight(self.low[begin * i : end * i], self.high[begin * i : end * i], self.place[begin:end])


class Readings(NamedTuple):
    """The tensors that a `mask_mod` reads.

    Attributes:
        low, high: of each interval ``[B, Lq]``; where keys look up their pass, ``[P, B, Lq]``.
        place: of each pass, or of all ``[B, Lk]``; none where a key's column is its place.
        of_pass: ``[B, Lk]``, the pass of each key where they look it up.
    """

    low: tuple[Tensor, ...]
    high: tuple[Tensor, ...]
    place: tuple[Tensor, ...]
    of_pass: Tensor | None


class BlockLists(NamedTuple):
    """What `BlockMask` calls by these names, int32: counts ``[B, 1, Q]`` and lists ``[B, 1, Q, K]`` of Q tiles of
    queries and K of keys (``q_…``: the other way round). Behind its end a list goes on with the tiles that are not in
    it, as `create_block_mask` leaves it."""

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor


def sight(layout: ModalityLayout, queries: QueryRows, mask: Rules, split: bool = False) -> Sight:
    """Who sees whom, in the order of `passes_of` (same arguments); remembered on `queries`."""

    def make() -> Sight:
        limits, positions = mask_intervals(layout, queries, mask, split)
        passes, intervals = len(positions), intervals_of(limits, len(positions))
        rows = queries.shape if len(queries.shape) == 2 else (1, *queries.shape)
        keys = layout.modality.shape if not layout.packed else (1, *layout.modality.shape)
        low, high = ends_of(limits, passes)
        place = positions
        if layout.num_sequences:
            of_row = queries.of(layout.sequence, 0).flatten()
            start, last = layout.cu_seqlens[of_row], layout.cu_seqlens.diff()[of_row] - 1
            some = low < high
            high = torch.where(some, torch.minimum(high, last) + start, -2)
            low = torch.where(some, low + start, FAR)
            place = torch.where(positions >= 0, layout.cu_seqlens[layout.sequence.flatten()] + positions, -1)
        return Sight(
            low.reshape(passes * intervals, *rows),
            high.reshape(passes * intervals, *rows),
            place.reshape(passes, *keys),
        )

    return queries.remember(("sight", passes_of(layout, mask, split), mask.window, mask.window_on), make)


def in_columns(seen: Sight) -> Sight | None:
    """The same with columns for places, where every interval is a run of columns; else None. (Padding within it, or
    keys of others.) `place` has no pass then: a key's column is its place. Waits for the device."""
    if not seen.place.numel() or not seen.low.numel():
        return None
    lk = seen.place.shape[2]
    (begin, end), column = _runs(seen), _columns(seen.place.flatten(1))
    some = begin < end
    reach = column.shape[1] - 1
    first = column.gather(1, begin.flatten(1).clamp(max=reach)).view_as(begin)
    last = column.gather(1, (end - 1).flatten(1).clamp(0, reach)).view_as(end)
    if not bool(torch.where(some, last - first == end - 1 - begin, True).all()):
        return None
    row = torch.arange(seen.low.shape[1], device=first.device)[:, None] * lk
    low = torch.where(some, first - row - 1, FAR).int()
    high = torch.where(some, last - row, -2).int()
    return Sight(low.view_as(seen.low), high.view_as(seen.high), seen.place[:0])


def readings(seen: Sight) -> Readings:
    """What `mask_mod` reads of it."""
    passes, intervals = seen.place.shape[0], seen.intervals
    if not passes or seen.low.shape[0] <= UNROLLED:
        return Readings(seen.low.unbind(), seen.high.unbind(), seen.place.unbind(), None)
    low, high = (x.unflatten(0, (passes, intervals)).transpose(0, 1).contiguous() for x in (seen.low, seen.high))
    return Readings(
        low.unbind(), high.unbind(), (seen.place.max(0).values,), (seen.place >= 0).to(torch.int32).argmax(0).int()
    )


def mask_mod(read: Readings) -> MaskMod:
    """Whether a pair is seen, as FlexAttention asks."""
    lows, highs, places, of_pass = read

    def one_by_one(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        found = None
        for w in range(len(lows)):
            place = places[w * len(places) // len(lows)][b, k] if places else k
            row = (b, q) if of_pass is None else (of_pass[b, k], b, q)
            inside = (lows[w][row] < place) & (place <= highs[w][row])
            found = inside if found is None else found | inside
        return (q < 0) & (k < 0) if found is None else found

    return one_by_one


def block_lists(seen: Sight, block_q: int, block_k: int) -> BlockLists:
    """The lists of a block mask with tiles of block_q queries and block_k keys."""
    passes, batch, keys = seen.place.shape
    rows, device = seen.low.shape[2], seen.place.device
    of_q, of_k = -(-rows // block_q), -(-keys // block_k)
    met = torch.zeros(batch, of_q, of_k, dtype=torch.bool, device=device)
    whole = torch.zeros_like(met)
    if met.numel() and passes:
        edges = (torch.arange(of_k + 1, device=device) * block_k).clamp(max=keys)
        edges = edges + torch.arange(batch, device=device)[:, None] * keys
        rank = _before(seen.place.flatten(1) >= 0)[:, edges]  # [P, B, K + 1], how many members stand before a tile
        members = rank.diff(dim=-1)
        whole = (members.sum(0) == block_k)[:, None].expand(-1, of_q, -1)
        tile = torch.arange(rows, device=device) // block_q
        tile = tile + torch.arange(batch, device=device)[:, None] * of_q
        for p, (begin, end) in enumerate(zip(*_runs(seen), strict=True)):
            meets, covers = _tiles_of_runs(begin, end, rank[p], tile, of_q)
            some = (members[p] > 0)[:, None]
            met = met | ((meets > 0) & some)
            whole = whole & ((covers == block_q) | ~some)
    partial = met & ~whole
    return BlockLists(
        *_ordered(partial), *_ordered(whole), *_ordered(partial.transpose(1, 2)), *_ordered(whole.transpose(1, 2))
    )


def block_mask(read: Readings, lists: BlockLists, lengths: tuple[int, int], block_size: tuple[int, int]) -> Any:
    """The `BlockMask` of these lists.

    Args:
        lengths: of queries and keys. block_size: of its tiles.
    """
    from torch.nn.attention.flex_attention import BlockMask

    return BlockMask(seq_lengths=lengths, **lists._asdict(), BLOCK_SIZE=block_size, mask_mod=mask_mod(read))


def _before(member: Tensor) -> Tensor:
    """How many of ``[P, n]`` stand before each, ``[P, n + 1]``."""
    return F.pad(member.cumsum(1, dtype=torch.int32), (1, 0))


def _columns(place: Tensor) -> Tensor:
    """The columns of the members of each pass, in their order, ``[P, n + 1]``; behind them 0."""
    member = place >= 0
    spot = torch.where(member, _before(member)[:, :-1], place.shape[1]).long()
    column = torch.arange(place.shape[1], device=place.device).expand_as(place)
    return torch.zeros(place.shape[0], place.shape[1] + 1, dtype=torch.long, device=place.device).scatter(
        1, spot, column
    )


def _runs(seen: Sight) -> tuple[Tensor, Tensor]:
    """Each interval as a run of its pass's members, begin included, end excluded, int64 ``[P, I, B, Lq]``; those of a
    row that touch are one."""
    place = seen.place.flatten(1)
    tokens = place.shape[1]
    spot = torch.where(place >= 0, place.clamp(max=tokens - 1), tokens).long()
    there = torch.zeros(place.shape[0], tokens + 1, dtype=torch.int32, device=place.device)
    before = _before(there.scatter(1, spot, 1)[:, :tokens] > 0)

    def rank(x: Tensor) -> Tensor:  # of members at places up to x
        x = (x.clamp(-1, tokens - 1) + 1).long()
        of_pass = x.unflatten(0, (-1, seen.intervals))
        return before.gather(1, of_pass.flatten(1)).view_as(of_pass).long()

    begin, end = rank(seen.low), rank(seen.high)
    end = torch.maximum(begin, end)
    if seen.intervals == 2:  # the second one lies before the first
        touch = (end[:, 1] == begin[:, 0]) & (begin[:, 0] < end[:, 0]) & (begin[:, 1] < end[:, 1])
        begin = torch.stack((torch.where(touch, begin[:, 1], begin[:, 0]), begin[:, 1]), 1)
        end = torch.stack((end[:, 0], torch.where(touch, begin[:, 1], end[:, 1])), 1)
    return begin, end


def _tiles_of_runs(begin: Tensor, end: Tensor, rank: Tensor, tile: Tensor, of_q: int) -> tuple[Tensor, Tensor]:
    """How many rows of each query tile meet each key tile, and how many see all its members, int32 ``[B, Q, K]``.

    Args:
        begin, end: ``[I, B, Lq]``, runs of one pass.
        rank: ``[B, K + 1]``, how many members stand before each key tile.
        tile: ``[B, Lq]``, the query tile of each row, counted on through the batch.
    """
    intervals, batch = begin.shape[:2]
    of_k = rank.shape[1] - 1
    begin, end = (x.transpose(0, 1).flatten(1).contiguous() for x in (begin, end))  # [B, I · Lq]
    some = (begin < end).int()
    rank = rank.long().contiguous()
    first = torch.searchsorted(rank, begin, right=True) - 1
    last = torch.searchsorted(rank, end - 1, right=True) - 1
    first, last = first.clamp(0, of_k - 1), last.clamp(0, of_k - 1)
    line = tile[:, None].expand(-1, intervals, -1).flatten(1) * (of_k + 1)

    def total(from_tile: Tensor, to_tile: Tensor, weight: Tensor) -> Tensor:
        change = torch.zeros(batch * of_q * (of_k + 1), dtype=torch.int32, device=rank.device)
        change = change.scatter_add(0, (line + from_tile).flatten(), weight.flatten())
        change = change.scatter_add(0, (line + to_tile).flatten(), -weight.flatten())
        return change.view(batch, of_q, of_k + 1).cumsum(-1, dtype=torch.int32)[..., :of_k]

    whole_from = first + (rank.gather(1, first) < begin).long()
    whole_to = last + (rank.gather(1, last + 1) <= end).long()
    covering = some * (whole_from < whole_to)
    return total(first, last + 1, some), total(whole_from, torch.maximum(whole_from, whole_to), covering)


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Of each line of ``[B, Q, K]`` how many are chosen, and which: those first, then the others."""
    count = chosen.sum(-1, dtype=torch.int32)
    ahead = chosen.cumsum(-1, dtype=torch.int32)
    number = torch.arange(chosen.shape[-1], dtype=torch.int32, device=chosen.device)
    spot = torch.where(chosen, ahead - 1, count[..., None] + number - ahead).long()
    listed = torch.zeros(chosen.shape, dtype=torch.int32, device=chosen.device)
    listed = listed.scatter(-1, spot, number.expand(chosen.shape))
    return count[:, None], listed[:, None]
