"""Tiles of a mask: every device tensor that a tiled kernel needs, in memory linear in tokens.

Who sees whom comes as intervals (`intervals.py`), which tiles are walked as `walks.py` makes it of them; a layout's
layers and heads share both.
"""

from typing import NamedTuple

from torch import Tensor

from moda_kernels.runtime import checks
from moda_kernels.tokens.intervals import mask_intervals, passes_of
from moda_kernels.tokens.layout import ModalityLayout, QueryRows
from moda_kernels.tokens.mask import ModularMask
from moda_kernels.tokens.walks import KeyWalk, QueryWalk, cut_tiles, key_walk, query_walk, tile_capacity


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
