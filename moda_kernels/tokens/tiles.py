"""Tile lists: which key tiles a query tile has to visit, and which of them without mask arithmetic.

Made from a layout and a mask in time linear in tokens + tile pairs, never in token pairs: a tile is summed up by the
smallest and largest position and segment of each modality in it, and because positions and segments rise along a
sequence, those decide every pair of tiles exactly (the one exception, "is any key inside the window?" for tiles whose
columns overlap, is decided by looking at the pair's tokens). The native extension does the same on CPU and CUDA.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moda_kernels.runtime import checks, native
from moda_kernels.runtime.operators import operator
from moda_kernels.tokens.intervals import mask_intervals, passes_of
from moda_kernels.tokens.layout import ModalityLayout, QueryRows
from moda_kernels.tokens.mask import ModularMask, Visibility, visible_pair
from moda_kernels.tokens.walks import KeyWalk, QueryWalk, cut_tiles, key_walk, query_walk, tile_capacity

#: Sequences up to this length have exact lists; beyond it the lists' memory would outgrow the keys.
MAX_TOKENS = 65536
#: The native kernels take the rule table by value.
MAX_MODALITIES = 16

#: A position or segment beyond all others, for tiles in which a modality does not occur.
_NONE = 2**31 - 1


class MaskTiles(NamedTuple):
    """Everything that a tiled kernel needs to know of a mask.

    Attributes:
        limits, positions: who sees whom, see `Intervals`.
        queries: what query tiles walk (forward, dq), or None.
        keys: what key tiles walk (dk, dv), or None.
    """

    limits: Tensor
    positions: Tensor
    queries: QueryWalk | None
    keys: KeyWalk | None


def mask_tiles(
    layout: ModalityLayout,
    mask: ModularMask,
    block_q: int,
    block_k: int,
    queries: QueryRows | None = None,
    *,
    split: bool = False,
    by_modality: bool = False,
    of_queries: bool = True,
    of_keys: bool = True,
) -> MaskTiles:
    """The tiles of a mask over a layout; remembered on `queries`. Its memory is linear in tokens, nothing waits.

    Args:
        block_q, block_k: rows of a query tile and keys of a key tile.
        queries: from :meth:`ModalityLayout.queries`. Default: as many queries as keys.
        split, by_modality: which passes there are, see `make_passes`.
        of_queries, of_keys: which walks to make.

    Raises:
        TypeError, ValueError: blocks that are no ints from 1 to 65,536, a mask that doesn't fit the layout.
    """
    passes = passes_of(layout, mask, split, by_modality)
    rows = layout.queries() if queries is None else queries
    limits, positions = mask_intervals(layout, rows, mask, split, by_modality)
    bounds = (rows.cu_seqlens, layout.cu_seqlens, rows.shape, tuple(layout.modality.shape), block_q, block_k)
    # Every key that is no padding is in the only pass.
    affine = [(each.roles, each.modality) for each in passes.passes] == [(tuple(range(layout.num_roles)), None)]

    def of_rows() -> QueryWalk:
        real = ((rows.of(layout.modality) >= 0) & (rows.of(layout.role) >= 0)).flatten()
        return query_walk(limits, positions, real, *bounds, affine)

    of = (passes, mask.window, mask.window_on, block_q, block_k)
    return MaskTiles(
        limits,
        positions,
        rows.remember(("query walk", *of), of_rows) if of_queries else None,
        rows.remember(("key walk", *of), lambda: key_walk(limits, positions, *bounds)) if of_keys else None,
    )


def decode_tiles(queries: QueryRows, rows: int) -> Tensor:
    """Tiles of up to `rows` query rows of a sequence, int32 ``[tiles, 3]``: sequence, first row, rows (0: no tile). As
    many as the shape can need, so that nothing waits; remembered on `queries`."""
    checks.integer("rows", rows, 1)
    length = queries.shape[1] if len(queries.shape) == 2 else -1
    capacity = tile_capacity(queries.shape, queries.cu_seqlens.shape[0] - 1, rows)

    def make() -> Tensor:
        return cut_tiles(queries.cu_seqlens, length, rows, capacity)[2]

    return queries.remember(("decode tiles of", rows), make)


@dataclass(frozen=True, eq=False)
class TileLists:
    """Tile lists of one mask, layout and tile size.

    A tile lies in one sequence; unused rows (capacities come from sizes known on the host) have 0 rows and counts.

    Attributes:
        query_tiles, key_tiles: int32 ``[tiles, 3]``: sequence, first row (in the flattened queries or keys), rows.
        key_lists: int32 ``[query tiles, widest]``: the key tiles to visit, full ones first, each kind ascending.
        key_counts: int32 ``[query tiles, 2]``: full key tiles, and all key tiles to visit.
        query_lists: int32 ``[key tiles, widest]``, query_counts: int32 ``[key tiles, 2]``: the transpose.
        overflow: int32 ``[1]``: sequences longer than :data:`MAX_TOKENS` (possible only where packed lengths are not
            known on the host; the lists are then cut short and outputs must be poisoned).

    A pair is *full* where all rows of both tiles are tokens (whole tiles, no padding) and every query sees every key,
    so that a kernel needs no masks at all; *empty* (absent) where no query sees any key; else *partial*.
    """

    query_tiles: Tensor
    key_tiles: Tensor
    key_lists: Tensor
    key_counts: Tensor
    query_lists: Tensor
    query_counts: Tensor
    overflow: Tensor


def tile_lists(
    layout: ModalityLayout, mask: ModularMask, block_q: int, block_k: int, queries: QueryRows | None = None
) -> TileLists:
    """The tile lists of a mask over a layout.

    Args:
        block_q, block_k: rows of a query tile and of a key tile.
        queries: from :meth:`ModalityLayout.queries`. Default: as many queries as keys.

    Raises:
        ValueError: a sequence of more than 65,536 tokens, more than 16 modalities, a mask that doesn't fit the layout.
    """
    mask.check_layout(layout)
    checks.integer("block_q", block_q, 1)
    checks.integer("block_k", block_k, 1)
    queries = layout.queries() if queries is None else queries
    if mask.num_roles > MAX_MODALITIES:
        raise checks.wrong_value("mask", f"at most {MAX_MODALITIES} modalities for tile lists", f"{mask.num_roles}")
    if checks.looks_at_values(layout.device) and layout.num_sequences:
        longest = int(layout.cu_seqlens.diff().max())
    else:
        longest = 0 if layout.packed else layout.modality.shape[-1]
    if longest > MAX_TOKENS:
        raise checks.wrong_value(
            "layout", f"sequences of at most {MAX_TOKENS} tokens for tile lists", f"{longest} tokens"
        )
    rules = [int(rule) for row in mask.rules for rule in row]
    shapes = _capacities(layout, queries, block_q, block_k)
    made = _op_tile_lists(
        layout.modality.flatten(), layout.segment.flatten(), layout.position.flatten(), layout.cu_seqlens,
        queries.cu_seqlens, queries.first_column, rules, mask.window, block_q, block_k, list(shapes),
    )  # fmt: skip
    return TileLists(*made)


def _capacities(layout: ModalityLayout, queries: QueryRows, block_q: int, block_k: int) -> tuple[int, int, int, int]:
    """Query tiles, key tiles, and the widest list over key tiles and over query tiles, all from sizes on the host."""

    def tiles(shape: tuple[int, ...], block: int) -> tuple[int, int]:
        if len(shape) == 2:
            per_row = -(-shape[1] // block)
            return shape[0] * per_row, per_row
        n = layout.num_sequences
        return (shape[0] + n * (block - 1)) // block, -(-min(shape[0], MAX_TOKENS) // block)

    query_tiles, query_width = tiles(queries.shape, block_q)
    key_tiles, key_width = tiles(tuple(layout.modality.shape), block_k)
    return query_tiles, key_tiles, key_width, query_width


def tile_lists_torch(
    modality: Tensor,
    segment: Tensor,
    position: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    first_column: Tensor,
    rules: list[int],
    window: int | None,
    block_q: int,
    block_k: int,
    capacities: tuple[int, int, int, int],
) -> tuple[Tensor, ...]:
    """The PyTorch twin of `native.tile_lists`; returns the fields of `TileLists` in order.

    Args:
        modality, segment, position: int32 ``[T]`` of the keys.
        cu_seqlens, cu_seqlens_q: int32 ``[N + 1]`` of keys and queries.
        first_column: int32 ``[N]``, the key token in which a sequence's query 0 stands.
        rules: M·M Visibility flags, row by row.
        window: of PAST, or None.
        capacities: rows of query_tiles and key_tiles, columns of key_lists and query_lists.
    """
    query_tiles, key_tiles, key_width, query_width = capacities
    num_modalities = int(len(rules) ** 0.5)
    device = modality.device
    overflow = (cu_seqlens.diff() > MAX_TOKENS).sum(dtype=torch.int32).view(1)
    q_first, q_tiles = _cut(cu_seqlens_q, block_q, query_tiles)
    k_first, k_tiles = _cut(cu_seqlens, block_k, key_tiles)
    if query_tiles == 0 or key_tiles == 0 or modality.numel() == 0:
        shapes = ((query_tiles, key_width), (query_tiles, 2), (key_tiles, query_width), (key_tiles, 2))
        empty = [torch.zeros(shape, dtype=torch.int32, device=device) for shape in shapes]
        return q_tiles, k_tiles, *empty, overflow

    facts = torch.stack((modality, position, segment))
    # Rows of each tile: key tokens [tiles, block], -1 where a tile has no such row or the row stands outside the keys.
    k_tokens = _tile_rows(k_tiles, block_k)
    q_rows = _tile_rows(q_tiles, block_q)
    sequence = q_tiles[:, :1].long()
    q_tokens = first_column[sequence].long() + q_rows - cu_seqlens_q[sequence]
    inside = (q_rows >= 0) & (q_tokens >= cu_seqlens[sequence]) & (q_tokens < cu_seqlens[sequence + 1])
    q_tokens = torch.where(inside, q_tokens, -1)

    # Every query tile against the key tiles of its sequence: [query tiles, key_width].
    k_ids, exists = _same_sequence(q_tiles, k_first, key_tiles, key_width)
    q_sum, k_sum = _summary(facts, q_tokens, num_modalities), _summary(facts, k_tokens, num_modalities)
    q_whole, k_whole = ((_facts(facts, tokens)[0] >= 0).all(1) for tokens in (q_tokens, k_tokens))
    seen, full = torch.zeros_like(exists), q_whole[:, None] & k_whole[k_ids]
    for a in range(num_modalities):
        for b in range(num_modalities):
            query, key = q_sum[:, :, a, None], k_sum[:, :, b][:, k_ids]
            some, every = _decide(rules[a * num_modalities + b], a == b, window, query, key)
            here = (query[0] != _NONE) & (key[0] != _NONE)
            seen |= here & some
            full &= ~here | every
    if window is not None:
        # Tiles with common columns: look at the tokens.
        column = first_column[sequence] - cu_seqlens[sequence] + q_tiles[:, 1:2] - cu_seqlens_q[sequence]
        table = torch.tensor(rules, dtype=torch.int32, device=device).view(num_modalities, -1)
        for step in range(-(-block_q // block_k) + 1):
            local = (column // block_k + step).clamp(0, key_width - 1).long()
            queries, keys = _facts(facts, q_tokens)[..., :, None], _facts(facts, k_tokens[k_ids.gather(1, local)[:, 0]])
            some = visible_pair(table, window, *queries, *keys[..., None, :]).any(2).any(1)
            seen.scatter_(1, local, some[:, None])
    seen &= exists
    full &= seen

    t_ids, t_exists = _same_sequence(k_tiles, q_first, query_tiles, query_width)
    k_local = torch.arange(key_tiles, device=device) - k_first[k_tiles[:, 0].long()]
    t_exists &= (k_local < key_width)[:, None]  # beyond it in a sequence that overflows
    k_local = k_local.clamp(0, key_width - 1).long()[:, None]
    t_seen, t_full = seen[t_ids, k_local] & t_exists, full[t_ids, k_local] & t_exists
    return q_tiles, k_tiles, *_compact(k_ids, seen, full), *_compact(t_ids, t_seen, t_full), overflow


def _tile_lists(modality: Tensor, *arguments: Any) -> list[Tensor]:
    make: Callable[..., tuple[Tensor, ...]] = tile_lists_torch
    if native.runs_on(modality.device):
        make = native.tile_lists
    *before, shapes = arguments
    return [t.contiguous() for t in make(modality, *before, tuple(shapes))]


def _tile_lists_fake(modality: Tensor, *arguments: Any) -> list[Tensor]:
    query_tiles, key_tiles, key_width, query_width = arguments[-1]
    shapes = ((query_tiles, 3), (key_tiles, 3), (query_tiles, key_width), (query_tiles, 2), (key_tiles, query_width),
              (key_tiles, 2), (1,))  # fmt: skip
    return [modality.new_empty(shape, dtype=torch.int32) for shape in shapes]


_op_tile_lists = operator(
    "_tile_lists(Tensor modality, Tensor segment, Tensor position, Tensor cu_seqlens, Tensor cu_seqlens_q, "
    "Tensor first_column, int[] rules, int? window, int block_q, int block_k, SymInt[] capacities) -> Tensor[]",
    _tile_lists,
    _tile_lists_fake,
)


def _cut(cu_seqlens: Tensor, block: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Cut sequences into tiles: first tile of each sequence ``[N + 1]``, and the tiles ``[capacity, 3]``."""
    lengths = cu_seqlens.diff()
    first = torch.zeros_like(cu_seqlens)
    torch.cumsum((lengths + block - 1) // block, 0, dtype=torch.int32, out=first[1:])
    ids = torch.arange(capacity, dtype=torch.int32, device=cu_seqlens.device)
    sequence = torch.searchsorted(first[1:], ids, right=True).clamp(max=max(lengths.numel() - 1, 0))
    if lengths.numel() == 0:
        return first, torch.zeros(capacity, 3, dtype=torch.int32, device=cu_seqlens.device)
    row = (ids - first[sequence]) * block
    count = (lengths[sequence] - row).clamp(0, block)
    tiles = torch.stack((sequence.int(), cu_seqlens[sequence] + row, count), 1)
    return first, torch.where((count > 0)[:, None], tiles, 0)


def _tile_rows(tiles: Tensor, block: int) -> Tensor:
    """int64 ``[tiles, block]``: the rows of each tile, -1 beyond its last."""
    offset = torch.arange(block, device=tiles.device)
    return torch.where(offset < tiles[:, 2:], tiles[:, 1:2].long() + offset, -1)


def _facts(facts: Tensor, tokens: Tensor) -> Tensor:
    """(modality, position, segment) at tokens, -1 where there is no token: ``[3, …]``."""
    return torch.where(tokens >= 0, facts[:, tokens.clamp(min=0)], -1)


def _summary(facts: Tensor, tokens: Tensor, num_modalities: int) -> Tensor:
    """``[4, tiles, M]``: smallest and largest position, smallest and largest segment of each modality in each tile;
    `_NONE` where it has no token."""
    modality, *ordered = _facts(facts, tokens)
    here = modality[..., None] == torch.arange(num_modalities, device=tokens.device)
    ends = []
    for fact in ordered:
        ends += [torch.where(here, fact[..., None], _NONE).amin(1), torch.where(here, fact[..., None], -1).amax(1)]
    return torch.stack(ends)


def _same_sequence(tiles: Tensor, first: Tensor, count: int, width: int) -> tuple[Tensor, Tensor]:
    """All tiles of the other side in each tile's sequence: ids ``[tiles, width]``, and which of them exist."""
    sequence = tiles[:, 0].long()
    ids = first[sequence][:, None] + torch.arange(width, device=tiles.device)
    exists = (ids < first[sequence + 1][:, None]) & (tiles[:, 2:] > 0)
    return ids.clamp(max=count - 1).long(), exists


def _decide(rule: int, same: bool, window: int | None, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Whether any, and whether all, queries of one modality see keys of one modality, from two summaries.

    Exact, because along a sequence a later segment has later positions; but with a window "any" is decided for tiles
    without common columns only.
    """
    q_low, q_high, q_first, q_last = query
    k_low, k_high, k_first, k_last = key
    nobody = torch.zeros(torch.broadcast_shapes(q_low.shape, k_low.shape), dtype=torch.bool, device=q_low.device)
    some, every = nobody, nobody
    if rule & Visibility.PAST:
        # Without common columns the closest pair is the query tile's first token and the key tile's last.
        near = True if window is None else q_low - k_high < window
        some, every = (q_high >= k_low) & near, q_low >= k_high
        if window is not None:
            every = every & (q_high - k_low < window)
    if same and rule & Visibility.SEGMENT:
        some = some | ((q_first <= k_last) & (k_first <= q_last))
        if rule & Visibility.PAST:
            # Hidden are later segments, and earlier ones out of the window.
            every = k_last <= q_first
            if window is not None:
                every = every & ((q_last == k_first) | (q_high - k_low < window))
        else:
            every = (q_first == q_last) & (k_first == k_last) & (q_first == k_first)
    if rule & Visibility.ALL:
        some = every = ~nobody
    return some, every


def _compact(ids: Tensor, seen: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
    """Lists and counts from a grid of candidates: full ones first, then partial ones, zeros behind."""
    kind = torch.where(full, 0, torch.where(seen, 1, 2))
    order = torch.argsort(kind, dim=1, stable=True)
    counts = torch.stack((full.sum(1), seen.sum(1)), 1).int()
    lists = ids.gather(1, order)
    listed = torch.arange(ids.shape[1], device=ids.device) < counts[:, 1:]
    return torch.where(listed, lists, 0).int(), counts
