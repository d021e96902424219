"""What the attention kernels share: where a tile lies, who sees whom, loads that padding cannot poison, log P.

Conventions of all kernels: `b_` values of a tile, `p_` pointers, `o_` offsets, `i_` indices, `s_` strides; a comment
gives each tile's shape. Scores are kept in log2 (`exp2` is the instruction a GPU has). A *pass* visits the keys of some
modalities that each query modality sees by one rule; what a row sees in it is then one interval of positions
(`intervals.py`).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
#: Stands for a bias of -inf, whose differences would be NaN; anything below is as good as hidden.
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def load_rows(
    p_base, o_row, s_row, b_real, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Rows of a matrix with a contiguous last axis, [rows, BLOCK_DIM]; where MASKED, rows that are not real are 0."""
    o_dim = tl.arange(0, BLOCK_DIM)
    p = p_base + o_row[:, None] * s_row + o_dim[None, :]
    if MASKED:
        if BLOCK_DIM == DIM:
            b = tl.load(p, mask=b_real[:, None], other=0.0)
        else:
            b = tl.load(p, mask=b_real[:, None] & (o_dim < DIM)[None, :], other=0.0)
    else:
        if BLOCK_DIM == DIM:
            b = tl.load(p)
        else:
            b = tl.load(p, mask=(o_dim < DIM)[None, :], other=0.0)
    return b


@triton.jit
def store_rows(p_base, o_row, s_row, b, b_inside, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Write rows that are inside, cast to the pointer's type."""
    o_dim = tl.arange(0, BLOCK_DIM)
    p = p_base + o_row[:, None] * s_row + o_dim[None, :]
    inside = b_inside[:, None]
    if BLOCK_DIM != DIM:
        inside = inside & (o_dim < DIM)[None, :]
    tl.store(p, b.to(p_base.dtype.element_ty), mask=inside)


@triton.jit
def turned_rows(
    p_base, o_row, s_row, b_real, p_matrix, p_rest, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows times the transpose of a DIM × DIM matrix, [ROWS, BLOCK_DIM] in float32, in steps along the sum: whole
    matrices leave the registers. p_rest: what rounding the matrix left over, or None."""
    STEP: tl.constexpr = BLOCK_DIM if BLOCK_DIM < 32 else 32
    o_dim = tl.arange(0, BLOCK_DIM)
    b = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    for begin in range(0, BLOCK_DIM, STEP):
        o_sum = begin + tl.arange(0, STEP)
        inside = o_sum < DIM
        b_x = tl.load(
            p_base + o_row[:, None] * s_row + o_sum[None, :], mask=b_real[:, None] & inside[None, :], other=0.0
        )
        o_matrix = o_dim[None, :] * DIM + o_sum[:, None]
        kept = inside[:, None] & (o_dim < DIM)[None, :]
        b = tl.dot(b_x, tl.load(p_matrix + o_matrix, mask=kept, other=0.0), b, input_precision=PRECISION)
        if p_rest is not None:
            b = tl.dot(b_x, tl.load(p_rest + o_matrix, mask=kept, other=0.0), b, input_precision=PRECISION)
    return b


@triton.jit
def row_limits(p_limits, i_pass, all_rows, o_row, inside):
    """Positions (low, high] that each query row sees in a pass; nothing for rows that are not inside."""
    p = p_limits + i_pass * 2 * all_rows + o_row
    return tl.load(p, mask=inside, other=-2), tl.load(p + all_rows, mask=inside, other=-2)


@triton.jit
def visible(b_low, b_high, b_position):
    """Who sees whom; operands broadcast. Position -1 (no key of this pass) lies in no limits."""
    return (b_position > b_low) & (b_position <= b_high)


@triton.jit
def load_mask(p_mask, o_row, o_col, s_row, s_col, b_inside, IS_BOOL: tl.constexpr):
    """attn_mask as what is added to scores in log2; operands broadcast."""
    b = tl.load(p_mask + o_row.to(tl.int64) * s_row + o_col.to(tl.int64) * s_col, mask=b_inside, other=0)
    if IS_BOOL:
        b = tl.where(b != 0, 0.0, float("-inf"))
    else:
        b = b.to(tl.float32) * LOG2E
    return b


@triton.jit
def _log_mean_decay(x):
    """log((1 - e^-x) / x) for x >= 0; its series near 0."""
    square = x * x
    series = -0.5 * x + square * (1 / 24 - square * (1 / 2880 - square * (1 / 181440)))
    large = tl.maximum(x, 0.5)
    return tl.where(x < 0.5, series, tl.log(1.0 - tl.exp(-large)) - tl.log(large))


@triton.jit
def _log_mean_decay_slope(x):
    """Its derivative, 1 / (e^x - 1) - 1 / x."""
    square = x * x
    series = -0.5 + x * (1 / 12 - square * (1 / 720 - square * (1 / 30240)))
    large = tl.maximum(x, 0.5)
    shrunk = tl.exp(-large)
    return tl.where(x < 0.5, series, shrunk / (1.0 - shrunk) - 1.0 / large)


@triton.jit
def log_pseudo_mass(base, decay, b_count):
    """log P = base + log Σ_{j<c} e^{-decay·j}; c < 0: infinity, c = 0 gives -inf (spec: "Pseudo-attention")."""
    b_c = tl.maximum(b_count, 1).to(tl.float32)
    finite = tl.log(b_c) + _log_mean_decay(decay * b_c) - _log_mean_decay(decay)
    endless = -_log_mean_decay(decay) - tl.log(decay)
    b = base + tl.where(b_count < 0, endless, finite)
    return tl.where(b_count == 0, float("-inf"), b)


@triton.jit
def log_pseudo_mass_slope(decay, b_count):
    """d log P / d decay."""
    b_c = tl.maximum(b_count, 1).to(tl.float32)
    finite = b_c * _log_mean_decay_slope(decay * b_c) - _log_mean_decay_slope(decay)
    endless = -_log_mean_decay_slope(decay) - 1.0 / decay
    return tl.where(b_count < 0, endless, finite)
