"""How tokens are grouped, and the two grouped products of duplex alignment in plain PyTorch, on any device and without
waiting for it.

segment_gram: [G, H, D, E] = Σ x_tᵀ y_t over the tokens of each group; segment_project: y_t = x_t A[group of t].
Groups may have any size and order, so tokens are sorted by group and cut into pieces, each of one group: in PyTorch of
equal size, so that both products become batched matrix products whose sizes are known on the host; for kernels into
as many as fill a GPU. Sums and products in float32 (float64 for float64 input).
"""

from typing import NamedTuple

import torch
from torch import Tensor

#: Rows of the largest piece in PyTorch: one piece writes D·E numbers of a Gram for every 256·D that it reads.
MAX_PIECE = 256
#: Kernels: all tokens make so many pieces (and one more per group). Each piece and head is a program, and writes D·E
#: sums: more would write more sums than they read keys.
PIECES = 32
#: Pieces that share their group with others, at most: n ≥ 2 pieces of r rows hold more than (n - 1) r ≥ n r / 2 tokens.
SLOTS = 2 * PIECES
#: Kernels: rows of a piece are a multiple of this.
ROWS = 64
#: The release adds this to every key entry before it norms the key.
RELEASED_EPS = 1e-6


class Grouping(NamedTuple):
    """Tokens sorted by their group, and cut into pieces; depends on the group ids alone. Made by `group_tokens`.

    Attributes:
        order: int32 ``[T]``, the tokens, sorted by group (those without one first).
        pieces: int32 ``[PIECES + G + 1, 4]``: first row (in ``order``), rows, group (-1: none), slot (-1: a piece alone
            in its group).
        groups: int32 ``[G, 4]``: first row, rows, first slot, number of pieces.
    """

    order: Tensor
    pieces: Tensor
    groups: Tensor

    def only(self, mapped: Tensor) -> "Grouping":
        """With the tokens of some groups (bool ``[G]``) alone: the others lose their group."""
        if self.groups.shape[0] == 0:
            return self
        first, rows, group, slot = self.pieces.unbind(1)
        stays = (group >= 0) & mapped[group.clamp(min=0).long()]
        pieces = torch.stack((first, rows, torch.where(stays, group, -1), torch.where(stays, slot, -1)), 1)
        return Grouping(self.order, pieces, torch.where(mapped[:, None], self.groups, 0))

    def window(self, first_group: int, num_groups: int) -> "Grouping":
        """With the tokens of consecutive groups alone, counted from 0."""
        first, rows, group, slot = self.pieces.unbind(1)
        stays = (group >= first_group) & (group < first_group + num_groups)
        group, slot = torch.where(stays, group - first_group, -1), torch.where(stays, slot, -1)
        groups = self.groups[first_group : first_group + num_groups]
        return Grouping(self.order, torch.stack((first, rows, group, slot), 1), groups)


def group_tokens(group: Tensor, num_groups: int) -> Grouping:
    """Group the tokens: group int64 ``[T]`` in -1…G-1, -1 for none."""
    count, device = group.numel(), group.device
    rows = -(-max(count, 1) // (PIECES * ROWS)) * ROWS
    ids, order = torch.sort(group, stable=True)
    # Group -1 comes first, as number 0.
    begin = torch.searchsorted(ids, torch.arange(-1, num_groups + 1, device=device))
    size = begin.diff()
    begin = begin[:-1]
    own_pieces = (size + rows - 1) // rows
    last_piece = own_pieces.cumsum(0)
    shared = own_pieces > 1
    shared[:1].fill_(False)  # (an assignment would copy from the host, and wait)
    slots = torch.where(shared, own_pieces, 0)
    first_slot = slots.cumsum(0) - slots

    piece = torch.arange(PIECES + num_groups + 1, device=device)
    own = torch.searchsorted(last_piece, piece, right=True)
    exists, own = own <= num_groups, own.clamp(max=num_groups)
    number = piece - (last_piece - own_pieces)[own]
    length = torch.where(exists, (size[own] - number * rows).clamp(0, rows), 0)
    slot = torch.where(exists & shared[own], first_slot[own] + number, -1)
    pieces = torch.stack((begin[own] + number * rows, length, torch.where(exists, own - 1, -1), slot), 1)
    groups = torch.stack((begin, size, first_slot, own_pieces), 1)[1:]
    return Grouping(order.int(), pieces.int(), groups.int().contiguous())


class _Pieces(NamedTuple):
    tokens: Tensor  # int64 [P, rows], T where a piece has no such row
    group: Tensor  # int64 [P]


def _cut(grouping: Grouping) -> _Pieces:
    """Pieces of equal size."""
    count, num_groups, device = grouping.order.numel(), grouping.groups.shape[0], grouping.order.device
    rows = min(MAX_PIECE, 1 << max(0, -(-count // max(num_groups, 1)) - 1).bit_length())
    pieces = (count + num_groups * (rows - 1)) // rows
    begin, size = grouping.groups[:, :2].long().unbind(1)
    order = torch.cat((grouping.order.long(), torch.full((1,), count, device=device)))
    last_piece = ((size + rows - 1) // rows).cumsum(0)
    piece = torch.arange(pieces, device=device)
    own = torch.searchsorted(last_piece, piece, right=True).clamp(max=num_groups - 1)
    first_piece = last_piece - (size + rows - 1) // rows
    row = (piece - first_piece[own])[:, None] * rows + torch.arange(rows, device=device)
    inside = row < size[own][:, None]
    return _Pieces(order[torch.where(inside, begin[own][:, None] + row, count)], own)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any tensor is float64, else float32 (spec: "Arithmetic")."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def released_unit(key: Tensor) -> Tensor:
    """u_t = (k_t + 1e-6) / ‖k_t + 1e-6‖ (released variant); zeros stay zero."""
    return _unit_and_inverse_norm(key)[0]


def released_unit_backward(key: Tensor, grad: Tensor) -> Tensor:
    """dk of u, given du; differentiable itself."""
    unit, inverse = _unit_and_inverse_norm(key)
    return (grad - unit * (unit * grad).sum(-1, keepdim=True)) * inverse


def _unit_and_inverse_norm(key: Tensor) -> tuple[Tensor, Tensor]:
    shifted = key + RELEASED_EPS
    # The unit does not depend on the size, so dividing by a constant first is exact and keeps squares in range.
    peak = shifted.detach().abs().amax(-1, keepdim=True)
    peak = torch.where(peak > 0, peak, 1)
    scaled = shifted / peak
    square = scaled.square().sum(-1, keepdim=True)
    inverse = torch.where(square > 0, torch.where(square > 0, square, 1).rsqrt(), 0)
    return torch.where(square > 0, scaled * inverse, 0), inverse / peak


def _rows(x: Tensor, pieces: _Pieces, dtype: torch.dtype, unit: bool = False) -> Tensor:
    """Rows of each piece, zero where it has none: [P, H, rows, D]. unit: the normed rows."""
    inside = (pieces.tokens < x.shape[0])[..., None, None]
    rows = torch.where(inside, x[pieces.tokens.clamp(max=x.shape[0] - 1)], 0).to(dtype)
    if unit:
        rows = torch.where(inside, released_unit(rows), 0)
    return rows.transpose(1, 2)


def segment_gram(x: Tensor, y: Tensor, grouping: Grouping, unit: bool = False) -> Tensor:
    """x ``[T, H, D]``, y ``[T, H, E]`` → float32/float64 ``[G, H, D, E]``. unit: of the normed x."""
    dtype = compute_dtype(x, y)
    num_groups = grouping.groups.shape[0]
    gram = torch.zeros(num_groups, x.shape[1], x.shape[2], y.shape[2], dtype=dtype, device=x.device)
    if gram.numel() == 0 or x.shape[0] == 0:
        return gram
    pieces = _cut(grouping)
    with torch.autocast(x.device.type, enabled=False):
        parts = _rows(x, pieces, dtype, unit).transpose(-1, -2) @ _rows(y, pieces, dtype)
    return gram.index_add_(0, pieces.group, parts)


def segment_project(
    x: Tensor,
    matrix: Tensor,
    grouping: Grouping,
    *,
    unit_matrix: Tensor | None = None,
    keep: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x ``[T, H, D]``, matrix ``[G, H, D, E]`` → ``[T, H, E]`` in x's dtype; tokens without a group give 0.

    Args:
        unit_matrix: like matrix, for the normed x: x_t A + u_t B.
        keep: tokens without a group give x.
        out_dtype: another dtype than x's.
    """
    dtype = compute_dtype(x, matrix)
    num_groups, heads, _, out_dim = matrix.shape
    # One row more takes the rows that pieces don't have.
    out = torch.zeros(x.shape[0] + 1, heads, out_dim, dtype=out_dtype or x.dtype, device=x.device)
    if keep:
        out[:-1] = x
    if x.shape[0] and num_groups and out.numel():
        pieces = _cut(grouping)
        with torch.autocast(x.device.type, enabled=False):
            rows = _rows(x, pieces, dtype) @ matrix.to(dtype)[pieces.group]
            if unit_matrix is not None:
                rows += _rows(x, pieces, dtype, unit=True) @ unit_matrix.to(dtype)[pieces.group]
        rows = rows.transpose(1, 2).reshape(-1, heads, out_dim)
        out.index_copy_(0, pieces.tokens.flatten(), rows.to(out.dtype))
    return out[:-1]
