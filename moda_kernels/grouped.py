"""The two grouped products of duplex alignment in plain PyTorch, on any device and without waiting for it.

segment_gram: [G, H, D, E] = Σ x_tᵀ y_t over the tokens of each group; segment_project: y_t = x_t A[group of t].
Groups may have any size and order, so tokens are sorted by group and cut into pieces of equal size, each of one group:
both products become batched matrix products whose sizes are known on the host. Sums and products in float32 (float64
for float64 input).
"""

from typing import NamedTuple

import torch
from torch import Tensor

#: Rows of the largest piece: one piece writes D·E numbers of a Gram for every 256·D that it reads.
MAX_PIECE = 256


class _Pieces(NamedTuple):
    tokens: Tensor  # int64 [P, rows], T where a piece has no such row
    group: Tensor  # int64 [P]


def _cut(group: Tensor, num_groups: int) -> _Pieces:
    count = group.numel()
    device = group.device
    rows = min(MAX_PIECE, 1 << max(0, -(-count // max(num_groups, 1)) - 1).bit_length())
    pieces = (count + num_groups * (rows - 1)) // rows
    # Group -1 (no group) is sorted to the front, as number 0.
    size = torch.zeros(num_groups + 1, dtype=torch.int64, device=device)
    size.scatter_add_(0, group + 1, torch.ones_like(group))
    begin = (size.cumsum(0) - size)[1:]
    size = size[1:]
    order = torch.cat((torch.argsort(group, stable=True), torch.full_like(group[:1], count)))
    last_piece = ((size + rows - 1) // rows).cumsum(0)
    piece = torch.arange(pieces, device=device)
    own = torch.searchsorted(last_piece, piece, right=True).clamp(max=num_groups - 1)
    first_piece = last_piece - (size + rows - 1) // rows
    row = (piece - first_piece[own])[:, None] * rows + torch.arange(rows, device=device)
    inside = row < size[own][:, None]
    return _Pieces(order[torch.where(inside, begin[own][:, None] + row, count)], own)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any tensor is float64, else float32 (spec: arithmetic)."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _rows(x: Tensor, pieces: _Pieces, dtype: torch.dtype) -> Tensor:
    """Rows of each piece, zero where it has none: [P, H, rows, D]."""
    inside = (pieces.tokens < x.shape[0])[..., None, None]
    return torch.where(inside, x[pieces.tokens.clamp(max=x.shape[0] - 1)], 0).to(dtype).transpose(1, 2)


def segment_gram(x: Tensor, y: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """x ``[T, H, D]``, y ``[T, H, E]``, group int64 ``[T]`` in -1…G-1 → float32/float64 ``[G, H, D, E]``."""
    dtype = compute_dtype(x, y)
    gram = torch.zeros(num_groups, x.shape[1], x.shape[2], y.shape[2], dtype=dtype, device=x.device)
    if gram.numel() == 0 or x.shape[0] == 0:
        return gram
    pieces = _cut(group, num_groups)
    with torch.autocast(x.device.type, enabled=False):
        parts = _rows(x, pieces, dtype).transpose(-1, -2) @ _rows(y, pieces, dtype)
    return gram.index_add_(0, pieces.group, parts)


def segment_project(x: Tensor, matrix: Tensor, group: Tensor) -> Tensor:
    """x ``[T, H, D]``, matrix ``[G, H, D, E]``, group int64 ``[T]`` → x's dtype ``[T, H, E]``; group -1 gives 0."""
    dtype = compute_dtype(x, matrix)
    num_groups, heads, _, out_dim = matrix.shape
    # One row more takes the rows that pieces don't have.
    out = torch.zeros(x.shape[0] + 1, heads, out_dim, dtype=x.dtype, device=x.device)
    if x.shape[0] and num_groups and out.numel():
        pieces = _cut(group, num_groups)
        with torch.autocast(x.device.type, enabled=False):
            rows = _rows(x, pieces, dtype) @ matrix.to(dtype)[pieces.group]
        rows = rows.transpose(1, 2).reshape(-1, heads, out_dim)
        out.index_copy_(0, pieces.tokens.flatten(), rows.to(x.dtype))
    return out[:-1]
