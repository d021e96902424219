"""The two grouped products of duplex alignment: one pass over the tokens each, sums in float32.

Tokens come sorted by group and cut into pieces of one group (`twin.Grouping` says how), and are
gathered by an index list, so they lie as they lie. segment_gram: a program sums a tile of x_tᵀ y_t over one piece and
head; a piece alone in its group writes the result, others write partial sums that a second kernel adds in order.
segment_project: a program keeps columns of one matrix, and rows of one piece go through.

Precision: numbers of 16 bits are multiplied as they are. Where they meet float32 (a matrix, a normed key), that is
split into two numbers of 16 bits, high and low part, each multiplied in its turn: 16 digits or more where one rounding
would leave bfloat16's 8, and still limited by memory, not by products. float16 has not float32's range: columns of a
matrix are scaled by a power of two before they are split.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from moda_kernels.products import configs
from moda_kernels.runtime.aot import Build
from moda_kernels.runtime.architectures import KNOWN, Target, architecture, table_of
from moda_kernels.runtime.gpu import interpreted
from moda_kernels.runtime.launch import Launch, find, float32_dots, launch, padded

#: The largest head size.
MAX_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
#: Numbers that a program of the second kernel adds.
SUM_BLOCK = 1024
#: A projection's pieces are cut further until there are about so many programs.
PROGRAMS = 512


# Kernels


@triton.jit
def _row_offsets(b_token, length, stride_b, stride_t):
    """Where rows begin, in int64; token = batch row · length + column."""
    return (b_token // length).to(tl.int64) * stride_b + (b_token % length).to(tl.int64) * stride_t


@triton.jit
def _load_rows(p_row, b_inside, o_d, D: tl.constexpr, WHOLE: tl.constexpr):
    """Rows [BT, BD], 0 outside."""
    if WHOLE:
        return tl.load(p_row[:, None] + o_d[None, :], mask=b_inside[:, None], other=0.0)
    else:
        return tl.load(p_row[:, None] + o_d[None, :], mask=b_inside[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def _load_columns(p_row, b_inside, o_d, D: tl.constexpr, WHOLE: tl.constexpr):
    """The same as [BD, BT]: sm_80 fetches a factor early only in the order that its product reads it in."""
    if WHOLE:
        return tl.load(p_row[None, :] + o_d[:, None], mask=b_inside[None, :], other=0.0)
    else:
        return tl.load(p_row[None, :] + o_d[:, None], mask=b_inside[None, :] & (o_d < D)[:, None], other=0.0)


@triton.jit
def _normed(b_k, b_inside, EPS: tl.constexpr):
    """u = (k + eps) / ‖k + eps‖ of rows [BT, BD], in float32, 0 outside; divided by the peak first: squares stay in
    range."""
    b_u = tl.where(b_inside, b_k.to(tl.float32) + EPS, 0.0)
    b_peak = tl.max(tl.abs(b_u), 1)
    b_u = tl.where(b_inside, b_u / tl.where(b_peak > 0, b_peak, 1.0)[:, None], 0.0)
    b_square = tl.sum(b_u * b_u, 1)
    b_scale = tl.where(b_square > 0, 1.0 / tl.sqrt_rn(tl.where(b_square > 0, b_square, 1.0)), 0.0)
    return tl.where((b_square > 0)[:, None], b_u * b_scale[:, None], 0.0)


@triton.jit
def _split(b_x, dtype: tl.constexpr):
    """float32 as the sum of two numbers of 16 bits."""
    b_high = b_x.to(dtype)
    return b_high, (b_x - b_high.to(tl.float32)).to(dtype)


@triton.jit(do_not_specialize=["length", "heads"])
def _segment_gram_kernel(
    p_x, p_y, p_order, p_pieces, p_out, p_partial, length, heads,
    x_stride_b, x_stride_t, x_stride_h, y_stride_b, y_stride_t, y_stride_h,
    D: tl.constexpr, E: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    SAME: tl.constexpr, EPS: tl.constexpr, ATOMIC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the sums, of one piece and head. SAME: the tile's y is its x. EPS: of the normed x, or None."""
    E_TILES: tl.constexpr = (E + BE - 1) // BE
    TILES: tl.constexpr = (D + BD - 1) // BD * E_TILES
    i_piece, i_tile, i_h = tl.program_id(0) // TILES, tl.program_id(0) % TILES, tl.program_id(1)
    first, rows = tl.load(p_pieces + 4 * i_piece), tl.load(p_pieces + 4 * i_piece + 1)
    group, slot = tl.load(p_pieces + 4 * i_piece + 2), tl.load(p_pieces + 4 * i_piece + 3)
    if group < 0:
        return
    LOW: tl.constexpr = (p_y.dtype.element_ty != tl.float32) and (
        (p_x.dtype.element_ty == p_y.dtype.element_ty) or (EPS is not None)
    )
    o_t = tl.arange(0, BT)
    o_d = i_tile // E_TILES * BD + tl.arange(0, BD)
    o_e = i_tile % E_TILES * BE + tl.arange(0, BE)
    p_x += i_h.to(tl.int64) * x_stride_h
    p_y += i_h.to(tl.int64) * y_stride_h
    p_order += first
    b_gram = tl.zeros([BD, BE], tl.float32)
    # Tokens are loaded a step ahead: rows could not be fetched early if their addresses came late.
    b_token = tl.load(p_order + o_t, mask=o_t < rows, other=0)
    for i_t in range(0, rows, BT):
        b_inside = i_t + o_t < rows
        b_next = tl.load(p_order + BT + i_t + o_t, mask=BT + i_t + o_t < rows, other=0)
        p_row = p_x + _row_offsets(b_token, length, x_stride_b, x_stride_t)
        if EPS is not None:
            b_x = _load_rows(p_row, b_inside, o_d, D, D % BD == 0)
            b_xt = tl.trans(_normed(b_x, b_inside[:, None] & (o_d < D)[None, :], EPS))  # [BD, BT]
            b_y = _load_rows(p_y + _row_offsets(b_token, length, y_stride_b, y_stride_t), b_inside, o_e, E, E % BE == 0)
        elif SAME:
            b_y = _load_rows(p_row, b_inside, o_e, E, E % BE == 0)  # [BT, BE]
            b_xt = tl.trans(b_y)
        else:
            b_xt = _load_columns(p_row, b_inside, o_d, D, D % BD == 0)
            b_y = _load_rows(p_y + _row_offsets(b_token, length, y_stride_b, y_stride_t), b_inside, o_e, E, E % BE == 0)
        if EPS is not None and LOW:
            b_high, b_low = _split(b_xt, p_y.dtype.element_ty)
            b_gram = tl.dot(b_high, b_y, b_gram)
            b_gram = tl.dot(b_low, b_y, b_gram)
        elif LOW:
            b_gram = tl.dot(b_xt, b_y, b_gram)
        else:
            b_gram = tl.dot(b_xt.to(tl.float32), b_y.to(tl.float32), b_gram, input_precision=PRECISION)
        b_token = b_next
    o_out = o_d[:, None] * E + o_e[None, :]
    b_mask = (o_d < D)[:, None] & (o_e < E)[None, :]
    p_out += (group.to(tl.int64) * heads + i_h) * (D * E)
    if slot < 0:
        tl.store(p_out + o_out, b_gram, mask=b_mask)
    elif ATOMIC:
        tl.atomic_add(p_out + o_out, b_gram, mask=b_mask, sem="relaxed")
    else:
        tl.store(p_partial + (slot.to(tl.int64) * heads + i_h) * (D * E) + o_out, b_gram, mask=b_mask)


@triton.jit(do_not_specialize=["heads"])
def _sum_slots_kernel(p_partial, p_groups, p_out, heads, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Σ of a group's partial sums, in order; 0 for a group without tokens. A piece alone has written its own."""
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    i_group, i_block, i_h = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS, tl.program_id(1)
    slot, pieces = tl.load(p_groups + 4 * i_group + 2), tl.load(p_groups + 4 * i_group + 3)
    if pieces == 1:
        return
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    p_partial += (slot.to(tl.int64) * heads + i_h) * SIZE
    b_sum = tl.zeros([BLOCK], tl.float32)
    for _ in range(pieces):
        b_sum += tl.load(p_partial + o, mask=o < SIZE, other=0.0)
        p_partial += heads.to(tl.int64) * SIZE
    tl.store(p_out + (i_group.to(tl.int64) * heads + i_h) * SIZE + o, b_sum, mask=o < SIZE)


@triton.jit(do_not_specialize=["length", "heads", "splits"])
def _segment_project_kernel(
    p_x, p_matrix, p_unit, p_order, p_pieces, p_out, length, heads, splits, x_stride_b, x_stride_t, x_stride_h,
    matrix_stride_g, matrix_stride_h, matrix_stride_d, matrix_stride_e,
    unit_stride_g, unit_stride_h, unit_stride_d, unit_stride_e,
    D: tl.constexpr, E: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    KEEP: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BE columns of x_t A (+ u_t B), for a share of the rows of one piece, and one head. EPS: None without B."""
    E_TILES: tl.constexpr = (E + BE - 1) // BE
    i_tile, i_h = tl.program_id(0) % E_TILES, tl.program_id(1)
    i_share, i_piece = tl.program_id(0) // E_TILES % splits, tl.program_id(0) // E_TILES // splits
    first, rows = tl.load(p_pieces + 4 * i_piece), tl.load(p_pieces + 4 * i_piece + 1)
    group = tl.load(p_pieces + 4 * i_piece + 2)
    share = tl.cdiv(tl.cdiv(rows, splits), BT) * BT
    first += i_share * share
    rows = tl.minimum(rows - i_share * share, share)
    if rows <= 0:
        return
    dtype: tl.constexpr = p_x.dtype.element_ty
    LOW: tl.constexpr = dtype != tl.float32
    SPLIT: tl.constexpr = LOW and ((p_matrix.dtype.element_ty == tl.float32) or (EPS is not None))
    SAME_DTYPE: tl.constexpr = p_matrix.dtype.element_ty == dtype
    o_t, o_d = tl.arange(0, BT), tl.arange(0, BD)
    o_e = i_tile * BE + tl.arange(0, BE)
    b_column = o_e < E
    p_x += i_h.to(tl.int64) * x_stride_h
    p_out += i_h.to(tl.int64) * E
    p_order += first
    out_stride = heads.to(tl.int64) * E
    b_token = tl.load(p_order + o_t, mask=o_t < rows, other=0)

    if group < 0:
        for i_t in range(0, rows, BT):
            b_inside = i_t + o_t < rows
            b_next = tl.load(p_order + BT + i_t + o_t, mask=BT + i_t + o_t < rows, other=0)
            b_mask = b_inside[:, None] & b_column[None, :]
            if KEEP:
                p_row = p_x + _row_offsets(b_token, length, x_stride_b, x_stride_t)
                b_out = tl.load(p_row[:, None] + o_e[None, :], mask=b_mask, other=0.0)
            else:
                b_out = tl.zeros([BT, BE], p_out.dtype.element_ty)
            tl.store(p_out + b_token.to(tl.int64)[:, None] * out_stride + o_e[None, :], b_out, mask=b_mask)
            b_token = b_next
    else:
        b_mask = (o_d < D)[:, None] & b_column[None, :]
        p_matrix += group.to(tl.int64) * matrix_stride_g + i_h.to(tl.int64) * matrix_stride_h
        o_row, o_column = o_d.to(tl.int64)[:, None], o_e.to(tl.int64)[None, :]
        b_a = tl.load(p_matrix + o_row * matrix_stride_d + o_column * matrix_stride_e, mask=b_mask, other=0.0)
        b_b = b_a
        if EPS is not None:
            p_unit += group.to(tl.int64) * unit_stride_g + i_h.to(tl.int64) * unit_stride_h
            b_b = tl.load(p_unit + o_row * unit_stride_d + o_column * unit_stride_e, mask=b_mask, other=0.0)
            b_b = b_b.to(tl.float32)
        b_scale = tl.full([BE], 1.0, tl.float32)
        if SPLIT:
            b_a = b_a.to(tl.float32)
            if dtype == tl.float16:
                b_peak = tl.max(tl.abs(b_a), 0)
                if EPS is not None:
                    b_peak = tl.maximum(b_peak, tl.max(tl.abs(b_b), 0))
                # The power of two at or below the peak, its inverse not too small for a normal number.
                b_scale = (b_peak.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
                b_scale = tl.minimum(tl.maximum(b_scale, 7.888609052210118e-31), 1.2676506002282294e30)
                b_a = b_a / b_scale[None, :]
                b_b = b_b / b_scale[None, :]
            b_a, b_a_low = _split(b_a, dtype)
            if EPS is not None:
                b_b, b_b_low = _split(b_b, dtype)
        for i_t in range(0, rows, BT):
            b_inside = i_t + o_t < rows
            b_next = tl.load(p_order + BT + i_t + o_t, mask=BT + i_t + o_t < rows, other=0)
            p_row = p_x + _row_offsets(b_token, length, x_stride_b, x_stride_t)
            b_x = _load_rows(p_row, b_inside, o_d, D, D == BD)  # [BT, BD]
            b_out = tl.zeros([BT, BE], tl.float32)
            if SPLIT:
                b_out = tl.dot(b_x, b_a, b_out)
                b_out = tl.dot(b_x, b_a_low, b_out)
            elif LOW and SAME_DTYPE:
                b_out = tl.dot(b_x, b_a, b_out)
            else:
                b_out = tl.dot(b_x.to(tl.float32), b_a.to(tl.float32), b_out, input_precision=PRECISION)
            if EPS is not None:
                b_u = _normed(b_x, b_inside[:, None] & (o_d < D)[None, :], EPS)
                if SPLIT:
                    b_u, b_u_low = _split(b_u, dtype)
                    b_out = tl.dot(b_u, b_b, b_out)
                    b_out = tl.dot(b_u, b_b_low, b_out)
                    b_out = tl.dot(b_u_low, b_b, b_out)
                else:
                    b_out = tl.dot(b_u, b_b, b_out, input_precision=PRECISION)
            if SPLIT and dtype == tl.float16:
                b_out *= b_scale[None, :]
            b_out = b_out.to(p_out.dtype.element_ty)
            p_to = p_out + b_token.to(tl.int64)[:, None] * out_stride + o_e[None, :]
            tl.store(p_to, b_out, mask=b_inside[:, None] & b_column[None, :])
            b_token = b_next


# Launchers


def why_not(*tensors: Tensor) -> str | None:
    """Why the kernels don't take tensors ``[…, D]``; None where they do."""
    for t in tensors:
        if t.dtype not in DTYPES:
            return f"the grouped kernels take float16, bfloat16 and float32, not {t.dtype}"
        if t.dtype == torch.bfloat16 and interpreted():
            return "Triton's interpreter multiplies bfloat16 wrongly"
        if t.shape[-1] > MAX_DIM:
            return f"the grouped kernels support head sizes up to {MAX_DIM}, got {t.shape[-1]}"
    return None


def _tokens(x: Tensor) -> tuple[Tensor, int, tuple[int, int, int]]:
    """x ``[T, H, D]`` or ``[B, L, H, D]`` with a contiguous last axis, the length of its rows, and its strides."""
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    if x.dim() == 3:
        return x, x.shape[0], (0, x.stride(0), x.stride(1))
    return x, x.shape[1], (x.stride(0), x.stride(1), x.stride(2))


def segment_gram(
    x: Tensor,
    y: Tensor | None,
    order: Tensor,
    pieces: Tensor,
    groups: Tensor,
    *,
    slots: int,
    eps: float | None = None,
    atomics: bool = False,
) -> Tensor:
    """Σ x_tᵀ y_t: x ``[T, H, D]`` or ``[B, L, H, D]``, y the same with E (None: y is x) → float32 ``[G, H, D, E]``.

    Args:
        order, pieces, groups: of a `Grouping`; slots: pieces that share their group, at most.
        eps: of the released variant, which sums u_tᵀ y_t with u = (x + eps) / ‖x + eps‖.
        atomics: add partial sums as they come: one launch and fewer bytes, and sums in no fixed order. Not done where
            torch wants deterministic algorithms.
    """
    heads, d, e = x.shape[-2], x.shape[-1], x.shape[-1] if y is None else y.shape[-1]
    num_groups = groups.shape[0]
    shape = (num_groups, heads, d, e)
    if order.numel() == 0 or 0 in shape:
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    atomics = atomics and not torch.are_deterministic_algorithms_enabled()
    x, length, x_strides = _tokens(x)
    y, _, y_strides = _tokens(x if y is None else y)
    bits = 16 if _gram_is_low(x.dtype, y.dtype, eps) else 32
    table = configs.GRAM if eps is None else configs.UNIT_GRAM
    size = max(padded(d), padded(e))
    config = find(table, architecture(x.device), bits, size)
    bd, be = _gram_tile(config, d, e, eps)
    make = torch.zeros if atomics else torch.empty
    out = make(shape, dtype=torch.float32, device=x.device)
    partial = (
        out if atomics else torch.empty((min(slots, pieces.shape[0]), *shape[1:]), dtype=torch.float32, device=x.device)
    )
    launch(
        _segment_gram_kernel, (pieces.shape[0] * triton.cdiv(d, bd) * triton.cdiv(e, be), heads), x.device,
        x, y, order, pieces, out, partial, length, heads, *x_strides, *y_strides,
        D=d, E=e, BT=config.block_t, BD=bd, BE=be,
        SAME=config.load_once and eps is None and y is x and bd >= d and be >= e,
        EPS=eps, ATOMIC=atomics, PRECISION=float32_dots(),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if not atomics:
        launch(
            _sum_slots_kernel, (num_groups * triton.cdiv(d * e, SUM_BLOCK), heads), x.device,
            partial, groups, out, heads, SIZE=d * e, BLOCK=SUM_BLOCK,
        )  # fmt: skip
    return out


def segment_project(
    x: Tensor,
    matrix: Tensor,
    unit_matrix: Tensor | None,
    order: Tensor,
    pieces: Tensor,
    *,
    keep: bool,
    dtype: torch.dtype,
    eps: float,
) -> Tensor:
    """x_t A (+ u_t B): x ``[T, H, D]`` or ``[B, L, H, D]``, matrix A and unit_matrix B ``[G, H, D, E]`` → x's shape
    with E, contiguous.

    Args:
        order, pieces: of a `Grouping`.
        keep: tokens without a group give x bit for bit (D = E and x's dtype only), else 0.
        dtype: of the result. eps: of u = (x + eps) / ‖x + eps‖.
    """
    heads, d, e = matrix.shape[1:]
    out = torch.empty(*x.shape[:-1], e, dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, length, x_strides = _tokens(x)
    table = configs.PROJECT if unit_matrix is None else configs.UNIT_PROJECT
    bits = 16 if _project_is_low(x.dtype, matrix.dtype, unit_matrix is not None) else 32
    config = find(table, architecture(x.device), bits, max(padded(d), padded(e)))
    be = min(config.block_e, padded(e))
    other = matrix if unit_matrix is None else unit_matrix
    tiles = triton.cdiv(e, be)
    # Pieces as if none shared its group, since how full they are is not known on the host.
    used = min(pieces.shape[0], order.numel())
    splits = max(1, min(order.numel() // (used * config.block_t), PROGRAMS // (used * heads * tiles)))
    launch(
        _segment_project_kernel, (pieces.shape[0] * splits * tiles, heads), x.device,
        x, matrix, other, order, pieces, out, length, heads, splits,
        *x_strides, *matrix.stride(), *other.stride(),
        D=d, E=e, BT=config.block_t, BD=padded(d), BE=be, KEEP=keep,
        EPS=None if unit_matrix is None else eps, PRECISION=float32_dots(),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def _gram_is_low(x: torch.dtype, y: torch.dtype, eps: float | None) -> bool:
    """Whether the products are of 16 bits, as in the kernel."""
    return y != torch.float32 and (x == y or eps is not None)


def _project_is_low(x: torch.dtype, matrix: torch.dtype, unit: bool) -> bool:
    return x != torch.float32 and (matrix in (x, torch.float32) or unit)


def _gram_tile(config: configs.GramConfig, d: int, e: int, eps: float | None) -> tuple[int, int]:
    """The tile of a program: no larger than the sums, and of whole rows where they are normed."""
    bd = padded(d) if eps is not None else min(config.block_d, padded(d))
    return bd, min(config.block_e, padded(e))


# Builds

_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
#: (architecture, dtype, head size) of the gate: both norms of both kernels.
_GATE: set[tuple[Target, torch.dtype, int]] = {
    *((target, torch.bfloat16, 128) for target in (80, 120, "gfx942")),
    *((90, dtype, d) for dtype in (torch.bfloat16, torch.float32) for d in (64, 128, 256)),
}


def _strides(of: str, axes: str) -> tuple[str, ...]:
    return tuple(f"{of}_stride_{axis}" for axis in axes)


def _gram_build(target: Target, dtype: torch.dtype, d: int, eps: float | None, same: bool) -> Build:
    table = configs.GRAM if eps is None else configs.UNIT_GRAM
    config = find(table, table_of(target), torch.finfo(dtype).bits, padded(d))
    bd, be = _gram_tile(config, d, d, eps)
    strides = (*_strides("x", "bth"), *_strides("y", "bth"))
    pointers = {"p_x": _TYPES[dtype], "p_y": _TYPES[dtype], "p_out": "*fp32", "p_partial": "*fp32"}
    constants = {"D": d, "E": d, "BT": config.block_t, "BD": bd, "BE": be, "SAME": same, "EPS": eps, "ATOMIC": False}
    return Build(
        name=f"{'unit_gram' if eps else 'segment_gram'}{' of one' if same else ''} {_TYPES[dtype][1:]} {d}",
        kernel=_segment_gram_kernel,
        target=target,
        types={
            **pointers,
            "p_order": "*i32",
            "p_pieces": "*i32",
            **dict.fromkeys(("length", "heads", *strides), "i32"),
        },
        constants={**constants, "PRECISION": "ieee"},
        config=config,
        divisible_by_16=strides,
        gate=(target, dtype, d) in _GATE,
    )


def _project_build(target: Target, dtype: torch.dtype, d: int, eps: float | None) -> Build:
    table = configs.PROJECT if eps is None else configs.UNIT_PROJECT
    config = find(table, table_of(target), torch.finfo(dtype).bits, padded(d))
    strides = (*_strides("x", "bth"), *_strides("matrix", "ghd"), *_strides("unit", "ghd"))
    pointers = {"p_x": _TYPES[dtype], "p_matrix": "*fp32", "p_unit": "*fp32", "p_out": _TYPES[dtype]}
    integers = dict.fromkeys(("length", "heads", "splits", *strides), "i32")
    size = padded(d)
    constants = {"D": d, "E": d, "BT": config.block_t, "BD": size, "BE": min(config.block_e, size), "KEEP": True}
    return Build(
        name=f"{'unit_project' if eps else 'segment_project'} {_TYPES[dtype][1:]} {d}",
        kernel=_segment_project_kernel,
        target=target,
        types={**pointers, "p_order": "*i32", "p_pieces": "*i32", **integers},
        constants={"matrix_stride_e": 1, "unit_stride_e": 1, **constants, "EPS": eps, "PRECISION": "ieee"},
        config=config,
        divisible_by_16=strides,
        # Two registers too few.
        stack_allowance=16 if (table_of(target), size, eps is None) == (100, MAX_DIM, False) else 0,
        gate=(target, dtype, d) in _GATE,
    )


def builds() -> Iterator[Build]:
    """Every configuration, at the head sizes that it is for, and one that needs masks."""
    for target in KNOWN:
        for dtype in _TYPES:
            for d in (64, 96, 128, 256):
                for eps in (None, 1e-6):
                    yield _gram_build(target, dtype, d, eps, same=False)
                    yield _project_build(target, dtype, d, eps)
                gram = find(configs.GRAM, table_of(target), torch.finfo(dtype).bits, padded(d))
                if gram.load_once and gram.block_d >= d:
                    yield _gram_build(target, dtype, d, None, same=True)
        yield Build(
            name="sum_slots 128x128",
            kernel=_sum_slots_kernel,
            target=target,
            types={"p_partial": "*fp32", "p_groups": "*i32", "p_out": "*fp32", "heads": "i32"},
            constants={"SIZE": 128 * 128, "BLOCK": SUM_BLOCK},
            config=Launch(4, 3),
            gate=target == 90,
        )
