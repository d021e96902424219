"""Launches the kernels of `kernels/intervals.py`: limits of query rows and positions of keys."""

import triton
from torch import Tensor

from moda_kernels.backends.triton.kernels.intervals import BLOCK, _key_positions, _row_limits


def limits(
    modality: Tensor,
    position: Tensor,
    segment: Tensor,
    table: Tensor,
    columns: Tensor,
    rules: Tensor,
    members: Tensor,
    passes: int,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Limits, key positions and row modalities.

    Args:
        modality, position, segment: int32 ``[tokens]``. table: int32 ``[segments, 4]``, as the layout's.
        columns: int64 ``[rows]``, the token in which each query row stands, -1 for none.
        rules: int32 ``[passes, M]``. members: int32 ``[passes]``, a bit for each modality.

    Returns:
        int32 ``[passes, 2, rows]``: row i sees keys at positions in (first, second]; int32 ``[passes, tokens]``: each
        key's position, -1 in passes that it has no part in; int32 ``[rows]``: the modality, -1 for padding.
    """
    rows, keys = columns.numel(), modality.numel()
    made, positions, row_modality = limits_outputs(modality, columns, passes)
    if rows:
        _row_limits[(triton.cdiv(rows, BLOCK),)](
            columns, modality, position, segment, table, rules, made, row_modality,
            rows, passes, rules.numel() // max(passes, 1), table.shape[0], window, BLOCK=BLOCK,
        )  # fmt: skip
    if keys:
        _key_positions[(triton.cdiv(keys, BLOCK),)](modality, position, members, positions, keys, passes, BLOCK=BLOCK)
    return made, positions, row_modality


def limits_outputs(modality: Tensor, columns: Tensor, passes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what `limits` returns."""
    new = modality.new_empty
    return new((passes, 2, columns.numel())), new((passes, modality.numel())), new(columns.numel())
