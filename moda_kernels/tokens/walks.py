"""Which tiles a kernel walks, in memory linear in tiles, made from intervals alone (`intervals.py`).

A *pass* is a group of keys with their positions, -1 where a key is not in it; positions rise along a sequence. In a
pass a query row sees the keys at positions in (lo, hi]; it may have several such intervals, which do not overlap: each
is a *walk* of its own over the same keys. So walk w belongs to pass w // intervals. Nothing here knows a rule.

**Query tiles over keys** (`QueryWalk`: forward, dq). Of the tiles of keys that have a key in the pass (N), some are in
it whole (C), others not (I). The union of the intervals of a query tile's rows, and their intersection, are each a
range of tiles; since positions rise, the tiles of a kind in a range are a run of the list of that kind. C inside the
intersection needs no masks; N before it, I inside and N after it do.

**Key tiles over queries** (`KeyWalk`: dk, dv). The query tiles that a key tile meets are no range: rows of several
roles stand side by side. So they are peeled into *chains* along which the ends of unions and intersections rise: in a
chain the tiles that a key tile meets are a range, and those that it meets whole are a range inside it. Each round takes
the widest or the tightest envelope of what is left, whichever has more tiles; at last one chain of tiles that are met
with masks only, and the *rest*, one range as wide as it has to be: the only place where a key tile may meet tiles in
vain that its query tiles would not meet.

Sizes come from shapes that the host knows; nothing waits for a device. The tiles of packed documents are numbered so
that no sum over documents is needed: tile i of document s is ``cu_seqlens[s] // block + s + i``, with gaps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moda_kernels.runtime import checks, native
from moda_kernels.runtime.operators import operator
from moda_kernels.tokens.intervals import FAR, ends_of, intervals_of

#: Chains of query tiles that may be met whole; each is four numbers a key tile and walk, and a select in the kernel.
CHAINS = 3
#: How finely work is told apart where the longest tiles come first.
LEVELS = 64


class QueryWalk(NamedTuple):
    """What each of Q query tiles walks over K key tiles: P passes, W walks. All int32 and contiguous.

    Attributes:
        tiles: ``[Q, 3]``: sequence, first row in the flattened queries, rows (0: no tile, nothing to do).
        order: ``[Q]``, the tiles, those with most key tiles first, all walks together.
        runs: ``[W, Q, 8]``, pairs of begin and end: C inside the intersection, to be walked without masks; then with
            masks N before it, I inside it, N after it. All index ``key_lists[pass]``; where the walk is *affine* (asked
            for at the build) the first pair are tile numbers within the sequence instead, a tile's first column being
            ``number * block_k``, and I is empty. A tile that is walked without masks has `block_k` keys, all in the
            pass, that all rows see which are no padding; a query tile of fewer than `block_q` rows may have them, too.
        key_lists: ``[P, 2 K + 1]``: N, then C and I side by side behind entry K, and one spare entry that may be read
            ahead: each the first column of a key tile within its sequence.
    """

    tiles: Tensor
    order: Tensor
    runs: Tensor
    key_lists: Tensor


class KeyWalk(NamedTuple):
    """What each of K key tiles walks over Q query tiles: W walks, `chains` chains. All int32 and contiguous.

    Attributes:
        tiles: ``[K, 3]``: sequence, first key in the flattened keys, keys (0: no tile, nothing to do).
        order: ``[K]``, the tiles, those with most query tiles first, all walks together.
        runs: ``[W, K, 4 chains + 4]``, indices into ``query_lists[walk]``: of each chain c, at 4 c: begin, begin of the
            tiles that are met whole, their end, end; then begin and end of the chain with masks, and of the rest. So
            the runs with masks are the pairs at 0, 2, 4 … (``2 chains + 2`` of them), those without at 4 c + 1. Where
            one is met without masks both tiles are full of rows and of keys of the pass, and every row sees every key.
        query_lists: ``[W, Q + 1]``: chain after chain, the first row of each query tile within its sequence, and one
            spare entry that may be read ahead.
    """

    tiles: Tensor
    order: Tensor
    runs: Tensor
    query_lists: Tensor


def query_walk(
    limits: Tensor,
    positions: Tensor,
    real: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    block_q: int,
    block_k: int,
    affine: bool = False,
) -> QueryWalk:
    """What query tiles walk.

    Args:
        limits, positions: of `Intervals`.
        real: bool ``[rows]``, False for padding, whose output does not depend on what is walked.
        cu_q, cu_k: int32 ``[N + 1]``, first row and first key of each sequence.
        q_shape, k_shape: of queries and keys, ``(B, L)`` or, packed, ``(T,)``.
        block_q, block_k: rows of a query tile, keys of a key tile.
        affine: all keys but padding are in the pass: whole tiles are one stretch of each sequence and need no list.
            Right for any keys, but where they are not, tiles are walked with masks that need none.

    Raises:
        TypeError, ValueError: blocks that are no ints from 1 to 65,536.
    """
    capacities, lengths = tile_sizes(q_shape, k_shape, cu_q, block_q, block_k)
    return QueryWalk(
        *_op_query_walk(limits, positions, real, cu_q, cu_k, capacities, lengths, [block_q, block_k], affine)
    )


def key_walk(
    limits: Tensor,
    positions: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    block_q: int,
    block_k: int,
    chains: int = CHAINS,
) -> KeyWalk:
    """What key tiles walk; arguments and errors as `query_walk`."""
    checks.integer("chains", chains, 1, 8)
    capacities, lengths = tile_sizes(q_shape, k_shape, cu_q, block_q, block_k)
    return KeyWalk(*_op_key_walk(limits, positions, cu_q, cu_k, capacities, lengths, [block_q, block_k], chains))


def tile_capacity(shape: tuple[int, ...], sequences: int, block: int) -> int:
    """How many tiles are made for this shape: what a batch has, or packed documents of any lengths can have."""
    if len(shape) == 2:
        return shape[0] * -(-shape[1] // block)
    return shape[0] // block + sequences


def tile_sizes(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], cu_q: Tensor, block_q: int, block_k: int
) -> tuple[list[int], list[int]]:
    """Query and key tiles; rows and keys of a sequence, where all have the same (a batch), else -1."""
    capacities, lengths = [], []
    for name, shape, block in (("block_q", q_shape, block_q), ("block_k", k_shape, block_k)):
        checks.integer(name, block, 1, 2**16)
        capacities.append(tile_capacity(shape, cu_q.shape[0] - 1, block))
        lengths.append(shape[1] if len(shape) == 2 else -1)
    return capacities, lengths


def cut_tiles(cu_seqlens: Tensor, length: int, block: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences cut into tiles of `block` tokens, the last of each perhaps of fewer.

    Args:
        length: of each sequence, where all have the same; -1 where not.

    Returns:
        The number of each sequence's first tile, int64 ``[N + 1]``; the sequence of each number, int64 ``[capacity]``,
        in gaps too; and the tiles, int32 ``[capacity, 3]``: sequence, first token, tokens (all 0 in a gap).
    """
    sequences = cu_seqlens.shape[0] - 1
    number = torch.arange(sequences + 1, device=cu_seqlens.device)
    first = number * -(-length // block) if length >= 0 else cu_seqlens.long() // block + number
    tile = torch.arange(capacity, device=cu_seqlens.device)
    if sequences == 0:
        return first, tile, torch.zeros(capacity, 3, dtype=torch.int32, device=cu_seqlens.device)
    sequence = torch.searchsorted(first[1:], tile, right=True).clamp(max=sequences - 1)
    token = cu_seqlens[sequence] + (tile - first[sequence]) * block
    tokens = (cu_seqlens[sequence + 1] - token).clamp(0, block)
    tiles = torch.stack((sequence, token, tokens), 1)
    return first, sequence, torch.where((tokens > 0)[:, None], tiles, 0).int()


class _KeyTiles(NamedTuple):
    """Key tiles in each pass, ``[P, K]``: their numbers as rising bounds of positions, and of what kind they are."""

    tiles: Tensor
    first: Tensor
    low: Tensor  # lowest position from this tile on, highest up to it; (sequence << 32) + position + 1
    high: Tensor
    some: Tensor
    whole: Tensor


def _key_tiles(positions: Tensor, cu_k: Tensor, length: int, block: int, capacity: int) -> _KeyTiles:
    first, sequence, tiles = cut_tiles(cu_k, length, block, capacity)
    position = _by_tile(positions, tiles, length, block, -1)
    member = position >= 0
    base = sequence << 32
    low = base + torch.where(member, position, FAR).amin(-1) + 1
    high = base + position.amax(-1) + 1
    # Tiles without a key in the pass take over their neighbours' bounds.
    return _KeyTiles(tiles, first, _suffix_min(low), high.cummax(-1).values, member.any(-1), member.all(-1))


def _ranges(keys: _KeyTiles, base: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of limits ``[P, I, Q]``, numbers of key tiles: the first with a position above lo, the first with none up to hi,
    the first with all above lo, the first with one above hi; each within the sequence, or its end."""
    passes = lo.shape[0]

    def first(bounds: Tensor, limit: Tensor) -> Tensor:
        sought = (base + limit + 1).reshape(passes, -1)
        return torch.searchsorted(bounds, sought, right=True).view(limit.shape)

    return first(keys.high, lo), first(keys.low, hi), first(keys.low, lo), first(keys.high, hi)


def query_walk_torch(
    limits: Tensor,
    positions: Tensor,
    real: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    capacities: list[int],
    lengths: list[int],
    blocks: list[int],
    affine: bool,
) -> tuple[Tensor, ...]:
    """The PyTorch twin of `native.query_walk`; returns the fields of `QueryWalk`.

    Args: as `query_walk`, and
        capacities: query tiles and key tiles. lengths: rows and keys of each sequence, -1 where they differ.
        blocks: rows of a query tile, keys of a key tile.
    """
    passes = positions.shape[0]
    intervals = intervals_of(limits, passes)
    (q_count, k_count), device = capacities, limits.device
    _, sequence, q_tiles = cut_tiles(cu_q, lengths[0], blocks[0], q_count)
    if q_count == 0 or k_count == 0 or passes == 0:
        runs = torch.zeros(passes * intervals, q_count, 8, dtype=torch.int32, device=device)
        lists = torch.zeros(passes, 2 * k_count + 1, dtype=torch.int32, device=device)
        return q_tiles, torch.arange(q_count, dtype=torch.int32, device=device), runs, lists
    keys = _key_tiles(positions, cu_k, lengths[1], blocks[1], k_count)

    low, high = ends_of(limits, passes)
    lo = _by_tile(low, q_tiles, lengths[0], blocks[0], FAR)
    hi = _by_tile(high, q_tiles, lengths[0], blocks[0], -2)
    counts = _by_tile(real, q_tiles, lengths[0], blocks[0], False)  # in an intersection
    sees = lo < hi
    union_lo, union_hi = torch.where(sees, lo, FAR).amin(-1), torch.where(sees, hi, -2).amax(-1)
    common_lo = torch.where(counts, torch.where(sees, lo, FAR), -1).amax(-1)
    common_hi = torch.where(counts, torch.where(sees, hi, -2), FAR).amin(-1)
    base = sequence << 32
    u0, u1, _, _ = _ranges(keys, base, union_lo, union_hi)
    _, _, f0, f1 = _ranges(keys, base, common_lo, common_hi)
    u1 = torch.maximum(u1, u0)
    f0 = f0.clamp(min=u0, max=u1)
    f1 = f1.clamp(min=f0, max=u1)

    rank_n, rank_c = _ranks(keys.some), _ranks(keys.whole)
    rank_i = rank_n - rank_c
    of_i = k_count + rank_c[:, -1:]
    column = (keys.tiles[:, 1] - cu_k[keys.tiles[:, 0].long()]).expand(passes, -1)
    lists = torch.zeros(passes, 2 * k_count + 1, dtype=torch.int32, device=device)
    spare = 2 * k_count
    lists.scatter_(1, torch.where(keys.some, rank_n[:, :-1], spare), column)
    place = torch.where(keys.whole, k_count + rank_c[:, :-1], of_i + rank_i[:, :-1])
    lists.scatter_(1, torch.where(keys.some, place, spare), column)
    lists[:, spare] = 0

    def at(ranks: Tensor, tile: Tensor) -> Tensor:
        return ranks.gather(1, tile.view(passes, -1)).view_as(tile)

    if affine:
        # The first unbroken stretch of whole tiles in the intersection.
        number = torch.arange(k_count + 1, device=device)
        whole = F.pad(keys.whole, (0, 1))
        f0 = torch.minimum(at(_suffix_min(torch.where(whole, number, k_count)), f0), f1)
        f1 = torch.minimum(at(_suffix_min(torch.where(whole, k_count, number)), f0), f1)
        start = keys.first[q_tiles[:, 0].long()]
        nothing = torch.zeros_like(f0)
        ends = [f0 - start, f1 - start, at(rank_n, u0), at(rank_n, f0), nothing, nothing]
    else:
        ends = [k_count + at(rank_c, f0), k_count + at(rank_c, f1), at(rank_n, u0), at(rank_n, f0)]
        ends += [of_i[..., None] + at(rank_i, f0), of_i[..., None] + at(rank_i, f1)]
    runs = torch.stack([*ends, at(rank_n, f1), at(rank_n, u1)], -1).view(passes * intervals, q_count, 8)
    runs = torch.where((q_tiles[:, 2] > 0)[:, None], runs, 0).int()
    return q_tiles, _longest_first((runs[..., 1::2] - runs[..., ::2]).long().sum((0, 2))), runs, lists


def key_walk_torch(
    limits: Tensor,
    positions: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    capacities: list[int],
    lengths: list[int],
    blocks: list[int],
    chains: int,
) -> tuple[Tensor, ...]:
    """The PyTorch twin of `native.key_walk`; returns the fields of `KeyWalk`. Arguments as of `query_walk_torch`."""
    passes = positions.shape[0]
    intervals = intervals_of(limits, passes)
    walks, (q_count, k_count), device = passes * intervals, capacities, limits.device
    _, sequence, q_tiles = cut_tiles(cu_q, lengths[0], blocks[0], q_count)
    if q_count == 0 or k_count == 0 or passes == 0:
        k_tiles = cut_tiles(cu_k, lengths[1], blocks[1], k_count)[2]
        runs = torch.zeros(walks, k_count, 4 * chains + 4, dtype=torch.int32, device=device)
        lists = torch.zeros(walks, q_count + 1, dtype=torch.int32, device=device)
        return k_tiles, torch.arange(k_count, dtype=torch.int32, device=device), runs, lists
    keys = _key_tiles(positions, cu_k, lengths[1], blocks[1], k_count)

    low, high = ends_of(limits, passes)
    lo = _by_tile(low, q_tiles, lengths[0], blocks[0], FAR)
    hi = _by_tile(high, q_tiles, lengths[0], blocks[0], -2)
    sees = lo < hi
    base = sequence << 32
    u0, u1, _, _ = _ranges(keys, base, torch.where(sees, lo, FAR).amin(-1), torch.where(sees, hi, -2).amax(-1))
    _, _, f0, f1 = _ranges(keys, base, lo.amax(-1), hi.amin(-1))
    f0, f1 = f0.clamp(min=u0, max=torch.maximum(u0, u1)), f1.clamp(max=u1)
    meets = u0 < u1
    whole = meets & sees.all(-1) & (f0 < f1)  # such a tile has `block_q` rows: what is missing sees nothing
    ends = [x.view(walks, q_count) for x in (u1, u0, f1, f0)]
    chain = _peel(ends, whole.view(walks, q_count), meets.view(walks, q_count), chains)

    # Chain after chain, in the order of memory, so that the ends rise along each; in the rest they are made to.
    order = torch.argsort(chain, dim=1, stable=True)
    first_row = (q_tiles[:, 1] - cu_q[q_tiles[:, 0].long()]).expand(walks, -1).gather(1, order)
    step = k_count + 1
    chain = chain.gather(1, order) * step
    u1, u0, f1, f0 = (x.gather(1, order) + chain for x in ends)
    u1, u0 = u1.cummax(1).values, _suffix_min(u0)
    # Only in chains of tiles that may be met whole do the ends of intersections rise.
    listed = chain < chains * step
    f1, f0 = torch.where(listed, f1, chain), torch.where(listed, f0, chain)

    sought = torch.arange(chains + 2, device=device)[:, None] * step + torch.arange(k_count, device=device)

    def count(rising: Tensor, kinds: int) -> Tensor:
        """How many entries, of earlier chains and of this one, do not exceed a key tile's number: ``[W, K, kinds]``."""
        number = sought[:kinds].reshape(1, -1).expand(walks, -1).contiguous()
        found = torch.searchsorted(rising.contiguous(), number, right=True)
        return found.view(walks, kinds, k_count).transpose(1, 2)

    some = keys.some.repeat_interleave(intervals, 0)[..., None]
    begin, end = count(u1, chains + 2), count(u0, chains + 2)
    end = torch.where(some, torch.maximum(begin, end), begin)
    full_begin = count(f1, chains).clamp(min=begin[..., :chains], max=end[..., :chains])
    full_end = count(f0, chains).clamp(min=full_begin, max=end[..., :chains])
    full_end = torch.where(keys.whole.repeat_interleave(intervals, 0)[..., None], full_end, full_begin)
    of_chains = torch.stack((begin[..., :chains], full_begin, full_end, end[..., :chains]), -1).flatten(2)
    others = torch.stack((begin[..., chains:], end[..., chains:]), -1).flatten(2)
    runs = torch.cat((of_chains, others), 2).int()
    work = (runs[..., 1::2] - runs[..., ::2]).long().sum((0, 2))
    work += (runs[..., 2 : 4 * chains : 4] - runs[..., 1 : 4 * chains : 4]).long().sum((0, 2))
    return keys.tiles, _longest_first(work), runs, F.pad(first_row, (0, 1)).contiguous()


def _peel(ends: list[Tensor], whole: Tensor, meets: Tensor, chains: int) -> Tensor:
    """The chain of each query tile, int64 ``[W, Q]``: 0 … of those that may be met whole, `chains` with masks only,
    then the rest, then those that see nothing.

    Args:
        ends: of unions and intersections of the tiles, as key tiles: u1, u0, f1, f0, each ``[W, Q]``.
        whole, meets: which may be met whole, which at all.
    """
    chain = torch.where(meets, chains + 1, chains + 2)
    for number in range(chains + 1):
        left = (whole if number < chains else meets) & (chain == chains + 1)
        of = ends if number < chains else ends[:2]
        widest, tightest = _envelope(of, left, True), _envelope(of, left, False)
        more = tightest.sum(-1, keepdim=True) > widest.sum(-1, keepdim=True)
        chain = torch.where(torch.where(more, tightest, widest), number, chain)
    return chain


def _envelope(ends: list[Tensor], left: Tensor, widest: bool) -> Tensor:
    """Tiles, of those left, along which all ends rise: the widest intervals or the tightest.

    The widest: whose end no earlier tile exceeds, and whose begin no later one falls below. The tightest: the reverse.
    One end after the other, among what the one before has kept, so that something always stays."""
    kept = left
    for number, end in enumerate(ends):  # ends and begins in turn
        if (number % 2 == 0) == widest:
            kept = kept & (end >= torch.where(kept, end, -1).cummax(-1).values)
        else:
            kept = kept & (end <= _suffix_min(torch.where(kept, end, FAR)))
    return kept


def _longest_first(work: Tensor) -> Tensor:
    """int32 ``[tiles]``, the tiles, those with most work first, in memory order where they have about the same: what
    is the same after rounding to `LEVELS` parts of the most."""
    level = work * (LEVELS - 1) // work.amax().clamp(min=1)
    return torch.argsort(level, descending=True, stable=True).int()


def _by_tile(values: Tensor, tiles: Tensor, length: int, block: int, fill: int) -> Tensor:
    """``[…, tokens]`` as ``[…, tiles, block]``."""
    if length >= 0:  # all sequences alike: no gather
        padded = F.pad(values.reshape(*values.shape[:-1], -1, length), (0, -length % block), value=fill)
        return padded.view(*values.shape[:-1], -1, block)
    if values.shape[-1] == 0:
        return values.new_full((*values.shape[:-1], len(tiles), block), fill)
    offset = torch.arange(block, device=values.device, dtype=torch.int32)
    token = (tiles[:, 1:2] + offset).clamp(max=values.shape[-1] - 1)
    return torch.where(offset < tiles[:, 2:], values[..., token], fill)


def _ranks(chosen: Tensor) -> Tensor:
    """How many are chosen before each index: ``[…, n + 1]``."""
    return F.pad(chosen.cumsum(-1), (1, 0))


def _suffix_min(values: Tensor) -> Tensor:
    return values.flip(-1).cummin(-1).values.flip(-1)


def _query_walk_fake(limits: Tensor, positions: Tensor, *arguments: object) -> list[Tensor]:
    q_count, k_count = arguments[3]  # type: ignore[misc]
    passes = positions.shape[0]
    shapes = ((q_count, 3), (q_count,), (passes * intervals_of(limits, passes), q_count, 8), (passes, 2 * k_count + 1))  # type: ignore[has-type]
    return [limits.new_empty(shape) for shape in shapes]


def _key_walk_fake(limits: Tensor, positions: Tensor, *arguments: object) -> list[Tensor]:
    (q_count, k_count), chains = arguments[2], arguments[5]  # type: ignore[misc]
    walks = positions.shape[0] * intervals_of(limits, positions.shape[0])
    shapes = ((k_count, 3), (k_count,), (walks, k_count, 4 * chains + 4), (walks, q_count + 1))  # type: ignore[operator, has-type]
    return [limits.new_empty(shape) for shape in shapes]


def _made(
    native_walk: Callable[..., tuple[Tensor, ...]], twin: Callable[..., tuple[Tensor, ...]]
) -> Callable[..., list[Tensor]]:
    def make(limits: Tensor, positions: Tensor, *arguments: Any) -> list[Tensor]:
        something = positions.shape[0] > 0 and all(arguments[-4])  # a pass, and tiles on both sides
        made = native_walk if something and native.runs_on(limits.device) else twin
        return [t.contiguous() for t in made(limits, positions, *arguments)]

    return make


_op_query_walk = operator(
    "_query_walk(Tensor limits, Tensor positions, Tensor real, Tensor cu_q, Tensor cu_k, SymInt[] capacities, "
    "SymInt[] lengths, int[] blocks, bool affine) -> Tensor[]",
    _made(native.query_walk, query_walk_torch),
    _query_walk_fake,
)
_op_key_walk = operator(
    "_key_walk(Tensor limits, Tensor positions, Tensor cu_q, Tensor cu_k, SymInt[] capacities, SymInt[] lengths, "
    "int[] blocks, int chains) -> Tensor[]",
    _made(native.key_walk, key_walk_torch),
    _key_walk_fake,
)
