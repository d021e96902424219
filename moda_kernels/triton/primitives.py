"""What the attention kernels share: where a tile lies, who sees whom, loads that padding cannot poison, log P.

Conventions of all kernels: `b_` values of a tile, `p_` pointers, `o_` offsets, `i_` indices, `s_` strides; a comment gives
each tile's shape. Scores are kept in log2 (`exp2` is the instruction a GPU has). A *pass* visits the keys of some
modalities that all queries see by one rule per query modality, so visibility is two comparisons of positions and one of
segments, with limits that belong to the row.
"""

import triton
import triton.language as tl

#: Visibility's flags, as the kernels read them.
PAST = tl.constexpr(1)
SEGMENT = tl.constexpr(2)
ALL = tl.constexpr(4)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
#: Larger than any position.
FAR = tl.constexpr(2147483647)
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
def load_square(p_base, TRANSPOSED: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """A contiguous DIM × DIM matrix, or its transpose, [BLOCK_DIM, BLOCK_DIM]."""
    o = tl.arange(0, BLOCK_DIM)
    if TRANSPOSED:
        p = p_base + o[None, :] * DIM + o[:, None]
    else:
        p = p_base + o[:, None] * DIM + o[None, :]
    if BLOCK_DIM == DIM:
        b = tl.load(p)
    else:
        b = tl.load(p, mask=(o < DIM)[:, None] & (o < DIM)[None, :], other=0.0)
    return b


@triton.jit
def query_facts(p_modality, p_position, p_segment, begin, end, first, o_row, rows):
    """Modality (-1: padding, or no row), position and segment of query rows; row 0 stands in token `first`, and the
    sequence's tokens are begin…end - 1."""
    token = first + o_row
    inside = (o_row < rows) & (token >= begin) & (token < end)
    b_modality = tl.load(p_modality + token, mask=inside, other=-1)
    b_position = tl.load(p_position + token, mask=inside, other=-1)
    b_segment = tl.load(p_segment + token, mask=inside, other=-1)
    return b_modality, b_position, b_segment


@triton.jit
def row_limits(p_rules, b_modality, b_position, b_segment, window):
    """What each query row sees in a pass: keys at positions in (low, high], and keys of a segment."""
    b_rule = tl.load(p_rules + tl.maximum(b_modality, 0))
    b_rule = tl.where(b_modality >= 0, b_rule, 0)
    past = (b_rule & PAST) != 0
    everything = (b_rule & ALL) != 0
    b_high = tl.where(everything, FAR, tl.where(past, b_position, -2))
    b_low = tl.where(everything, -1, tl.maximum(b_position - window, -1))
    b_segment = tl.where((b_rule & SEGMENT) != 0, b_segment, -2)
    return b_low, b_high, b_segment


@triton.jit
def key_facts(p_modality, p_position, p_segment, token, inside, members):
    """Whether keys are real tokens; and position and segment of those that belong to the pass, -1 of all others."""
    b_modality = tl.load(p_modality + token, mask=inside, other=-1)
    b_position = tl.load(p_position + token, mask=inside, other=-1)
    b_segment = tl.load(p_segment + token, mask=inside, other=-1)
    real = b_modality >= 0
    member = real & (((members >> tl.maximum(b_modality, 0)) & 1) != 0)
    return real, tl.where(member, b_position, -1), tl.where(member, b_segment, -1)


@triton.jit
def visible(b_low, b_high, b_own, b_position, b_segment):
    """Who sees whom; operands broadcast. No limit lets position -1 or segment -1 in."""
    return ((b_position > b_low) & (b_position <= b_high)) | (b_segment == b_own)


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
    """log P = base + log Σ_{j<c} e^{-decay·j}; c < 0 stands for infinity, c = 0 gives -inf (spec, section 4)."""
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

