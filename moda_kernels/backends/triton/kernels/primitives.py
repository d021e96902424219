"""What the attention kernels share: where a tile lies, who sees whom, loads that padding cannot poison, log P.

Conventions of all kernels: `b_` values of a tile, `p_` pointers, `o_` offsets, `i_` indices, `s_` strides; a comment
gives each tile's shape. A stride's letters are its tensor (q, k, v, o: out, l: lse, b: bias, m: attn_mask; a d before
them: its gradient) and its axis (b: batch, h: head, t: token, r: branch; of tables q: the query's side, k: the key's).
Strides of q, k, v, out and their gradients come in units of UNIT elements: 16 where all of them are multiples of it,
which lets rows be loaded 16 bytes at a time, whatever the lengths that they are made of. Scores are kept in log2
(`exp2` is the instruction a GPU has).

Kernels know no rule. A *pass* visits some of a sequence's keys; a query row sees those at positions in up to two
intervals (low, high], and a key that is not in the pass has position -1, which lies in none. A *walk* is a pass and one
of its intervals; `tokens/tiles.py` says which tiles belong to it, and which of them need no masks.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
#: Stands for a bias of -inf, whose differences would be NaN; anything below is as good as hidden.
LOWEST = tl.constexpr(-1.0e30)
#: Larger than any position.
FAR = tl.constexpr(2147483647)


class Extras(NamedTuple):
    """What a call may have beside queries, keys and values: pointers or None."""

    bias: Any = None  # [N or 1, Hq or 1, M, M]
    mask: Any = None  # attn_mask, uint8 where it is bool
    weights: Any = None  # float32 [2, Hq]: split attention
    base: Any = None  # float32 [Hq], with decay and counts: pseudo scores
    decay: Any = None
    counts: Any = None  # int32 [branches, rows], -1: endless
    fault: Any = None  # int32 [1], not 0: everything becomes NaN
    matrix: Any = None  # [N, M, Hkv, D, D]: a key map to fold into the query
    matrix_rest: Any = None  # what rounding the matrix left over


class Runs(NamedTuple):
    """Three runs of a list: entry n is n + the number of the run it falls in; `until`: entries up to a run's end."""

    first: Any
    second: Any
    third: Any
    until_first: Any
    until_second: Any
    until_third: Any


@triton.jit
def load_rows(
    p_base, o_row, s_row, b_real, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Rows of a matrix with a contiguous last axis, [rows, BLOCK_DIM]; where MASKED, rows that are not real are 0.
    DIM: how many columns there are from the first on."""
    o_dim = tl.arange(0, BLOCK_DIM)
    p = p_base + (o_row[:, None] * s_row + o_dim[None, :])  # one offset of 32 bits: see WIDEST_ROW of `launch.py`
    if MASKED:
        if BLOCK_DIM <= DIM:
            b = tl.load(p, mask=b_real[:, None], other=0.0)
        else:
            b = tl.load(p, mask=b_real[:, None] & (o_dim < DIM)[None, :], other=0.0)
    else:
        if BLOCK_DIM <= DIM:
            b = tl.load(p)
        else:
            b = tl.load(p, mask=(o_dim < DIM)[None, :], other=0.0)
    return b


@triton.jit
def store_rows(p_base, o_row, s_row, b, b_inside, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Write rows that are inside, cast to the pointer's type."""
    o_dim = tl.arange(0, BLOCK_DIM)
    p = p_base + (o_row[:, None] * s_row + o_dim[None, :])
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
def load_key_tile(
    p_base, column, o_key, s_token, b_real, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Keys (or values) from a column of the sequence on, [keys, BLOCK_DIM]; p_base: the sequence's first."""
    return load_rows(p_base + column.to(tl.int64) * s_token, o_key, s_token, b_real, DIM, BLOCK_DIM, MASKED)


@triton.jit
def limits_of(p_limits, i_pass, all_rows, INTERVALS: tl.constexpr, INTERVAL: tl.constexpr):
    """Where the lower limits of one interval of a pass begin, and how far behind them the upper ones: all second
    intervals share their lower limits, which come first (`Intervals`)."""
    wide = all_rows.to(tl.int64)
    if INTERVAL == 1:
        p_low = p_limits
        upper = wide * (3 * i_pass + 3)
    else:
        p_low = p_limits + wide * ((1 + INTERVALS) * i_pass + (INTERVALS - 1))
        upper = all_rows
    return p_low, upper


@triton.jit
def row_limits(p_low, upper, o_row, inside):
    """Positions (low, high] that each query row sees in a walk; nothing for rows that are not inside. p_low, upper: of
    `limits_of`."""
    p = p_low + o_row
    return tl.load(p, mask=inside, other=-2), tl.load(p + upper, mask=inside, other=-2)


@triton.jit
def masked_runs(p_runs, i_walk, tiles, i_tile, ALL: tl.constexpr):
    """The runs of key tiles that a query tile compares positions with, one after the other: entry n of them is
    `entry_of`. ALL: those that need no comparison too (they lie between the first run and the last)."""
    p = p_runs + (tiles.to(tl.int64) * i_walk + i_tile) * 8
    first = tl.load(p + 2)
    if ALL:
        until = tl.load(p + 7) - first
        return Runs(first, first, first, until, until, until)
    second, third = tl.load(p + 4), tl.load(p + 6)
    until_first = tl.load(p + 3) - first
    until_second = until_first + tl.load(p + 5) - second
    until_third = until_second + tl.load(p + 7) - third
    return Runs(first, second - until_first, third - until_second, until_first, until_second, until_third)


@triton.jit
def entry_of(runs, n):
    """Where entry n of three runs stands in the list; beyond the last: behind it."""
    return n + tl.where(n < runs.until_first, runs.first, tl.where(n < runs.until_second, runs.second, runs.third))


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
