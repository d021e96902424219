"""Attention of few query rows against many keys, as in decoding: split over the keys, no gradient.

A tile of the other kernels would be nearly empty here, and a handful of programs would read a whole cache. So a tile
holds the query rows of one sequence *and* the query heads of one group, keys are read once for all of them, and several
programs share a sequence's keys. Each takes every n-th key tile, so that padding (a static cache), a window or one
modality's keys do not fall to a few of them. Three kernels:

    attention_decode_turn       with a key map to fold only: the queries turned by each modality's matrix
    attention_decode            per tile, share of the keys and branch: sum of values, maximum and sum, in float32
    attention_decode_combine    per output row: shares put together, pseudo scores, both branches of split attention

There are no walks. What they would leave out is skipped by position: a key that no row of the tile sees is not read,
and key tiles before the first and after the last that has something to see are not visited.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

from moda_kernels.backends.triton.kernels.primitives import (
    FAR,
    LN2,
    LOG2E,
    LOWEST,
    limits_of,
    load_key_tile,
    load_mask,
    load_rows,
    log_pseudo_mass,
    row_limits,
    store_rows,
    visible,
)

#: Key tiles whose positions are looked at together, and shares that are put together at a time.
SCAN = tl.constexpr(16)


class DecodeTensors(NamedTuple):
    """Pointers of `attention_decode`. turned: [modalities, tiles · heads, rows, D] or None; sums: float32
    [branches, tiles · heads, shares, rows, E]; tops: [branches, tiles · heads, shares, 2, rows], maximum and sum."""

    q: Any
    turned: Any
    k: Any
    v: Any
    sums: Any
    tops: Any


class CombineTensors(NamedTuple):
    """Pointers of `attention_decode_combine`."""

    sums: Any
    tops: Any
    out: Any
    lse: Any


@triton.jit
def _in_either(b_low, b_high, b_low_2, b_high_2, b_position, INTERVALS: tl.constexpr):
    """Who sees whom where a row may have two intervals; operands broadcast."""
    seen = visible(b_low, b_high, b_position)
    if INTERVALS == 2:
        seen = seen | visible(b_low_2, b_high_2, b_position)
    return seen


@triton.jit
def _any_row(b_low, b_high):
    """An interval that holds what any row of the tile sees."""
    sees = b_high > b_low
    return tl.min(tl.where(sees, b_low, FAR), 0), tl.max(tl.where(sees, b_high, -2), 0)


@triton.jit(do_not_specialize=["s_qb", "s_qh", "s_qt", "key_heads", "query_length"])
def attention_decode_turn(
    p_q, p_matrix, p_matrix_rest, p_turned, p_row_modality, p_tiles, s_qb, s_qh, s_qt, key_heads, query_length,
    UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: tiles · key heads, modalities, blocks of columns. Turned queries: [modalities, tiles · heads, rows, D]."""
    i_cell, i_modality = tl.program_id(0), tl.program_id(1)
    i_tile, i_group = i_cell // key_heads, i_cell % key_heads
    i_sequence = tl.load(p_tiles + i_tile * 3)
    row = tl.load(p_tiles + i_tile * 3 + 1)
    rows = tl.load(p_tiles + i_tile * 3 + 2)
    if rows == 0:
        return
    o_row = tl.arange(0, BLOCK_R)
    o_token, b_head = o_row // GROUP, i_group * GROUP + o_row % GROUP
    b_modality = tl.load(p_row_modality + row + o_token, mask=o_token < rows, other=-1)
    i_batch = i_sequence.to(tl.int64)
    o_q = ((row - i_sequence * query_length + o_token).to(tl.int64) * s_qt + b_head.to(tl.int64) * s_qh) * UNIT
    b_q = load_rows(p_q + i_batch * s_qb * UNIT, o_q, 1, b_modality >= 0, D, BLOCK_D, True)  # [BLOCK_R, BLOCK_D]
    o_column = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    # q · (k A) = (q Aᵀ) · k: column c of the result needs row c of A.
    i_matrix = ((i_batch * tl.num_programs(1) + i_modality) * key_heads + i_group) * D * D
    b_rows = load_rows(p_matrix + i_matrix, o_column, D, o_column < D, D, BLOCK_D, True)  # [BLOCK_C, BLOCK_D]
    b = tl.dot(b_q, tl.trans(b_rows), input_precision=PRECISION)
    if p_matrix_rest is not None:
        b_rest = load_rows(p_matrix_rest + i_matrix, o_column, D, o_column < D, D, BLOCK_D, True)
        b = tl.dot(b_q, tl.trans(b_rest), b, input_precision=PRECISION)
    i_turned = (i_modality.to(tl.int64) * tl.num_programs(0) + i_cell) * BLOCK_R
    p = p_turned + (i_turned + o_row[:, None]) * D + o_column[None, :]
    tl.store(p, b.to(p_turned.dtype.element_ty), mask=(o_column < D)[None, :])


@triton.jit(do_not_specialize=[
    "s_qb", "s_qh", "s_qt", "s_kb", "s_kh", "s_kt", "s_vb", "s_vh", "s_vt", "s_bb", "s_bh", "s_bq", "s_bk",
    "s_mb", "s_mh", "s_mq", "s_mk", "key_heads", "query_length", "key_length", "first_passes", "passes", "all_rows",
    "all_keys",
])  # fmt: skip
def attention_decode(
    tensors, extras, facts, p_tiles, p_modalities,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_bb, s_bh, s_bq, s_bk, s_mb, s_mh, s_mq, s_mk,
    key_heads, query_length, key_length, first_passes, passes, all_rows, all_keys, scale,
    UNIT: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, INTERVALS: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: tiles · key heads, shares of the keys, branches."""
    i_cell, i_share, i_branch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cells, shares = tl.num_programs(0), tl.num_programs(1)
    i_tile, i_group = i_cell // key_heads, i_cell % key_heads
    i_sequence = tl.load(p_tiles + i_tile * 3)
    row = tl.load(p_tiles + i_tile * 3 + 1)
    rows = tl.load(p_tiles + i_tile * 3 + 2)
    if rows == 0:
        return
    begin = tl.load(facts.cu_k + i_sequence)
    length = tl.load(facts.cu_k + i_sequence + 1) - begin
    i_batch = i_sequence.to(tl.int64)
    o_q = row - i_sequence * query_length
    o_begin = (begin - i_sequence * key_length).to(tl.int64)
    p_k = tensors.k + (i_batch * s_kb + i_group.to(tl.int64) * s_kh + o_begin * s_kt) * UNIT
    p_v = tensors.v + (i_batch * s_vb + i_group.to(tl.int64) * s_vh + o_begin * s_vt) * UNIT

    o_row, o_k, o_scan = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K), tl.arange(0, SCAN)
    o_token, b_head = o_row // GROUP, i_group * GROUP + o_row % GROUP
    inside = o_token < rows
    b_modality = tl.load(facts.row_modality + row + o_token, mask=inside, other=-1)
    if tensors.turned is None:
        b_at = ((o_q + o_token).to(tl.int64) * s_qt + b_head.to(tl.int64) * s_qh) * UNIT
        b_q = load_rows(
            tensors.q + i_batch * s_qb * UNIT, b_at, 1, b_modality >= 0, D, BLOCK_D, True
        )  # [BLOCK_R, BLOCK_D]
    if MASK > 0:
        p_mask_row = extras.mask + i_batch * s_mb + b_head.to(tl.int64)[:, None] * s_mh

    b_acc = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    b_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_R], tl.float32)
    own = (tl.cdiv(length, BLOCK_K) - i_share + shares - 1) // shares  # key tiles of this share
    for i_pass in range(i_branch * first_passes, first_passes + i_branch * (passes - first_passes)):
        i_modality = tl.load(p_modalities + i_pass)
        if tensors.turned is not None:
            i_turned = (i_modality.to(tl.int64) * cells + i_cell) * BLOCK_R
            b_q = load_rows(tensors.turned + i_turned * D, o_row, D, b_modality >= 0, D, BLOCK_D, True)
        p_low, upper = limits_of(facts.limits, i_pass, all_rows, INTERVALS, 0)
        b_low, b_high = row_limits(p_low, upper, row + o_token, inside)
        b_low_2, b_high_2 = b_low, b_high
        if INTERVALS == 2:
            p_low, upper = limits_of(facts.limits, i_pass, all_rows, INTERVALS, 1)
            b_low_2, b_high_2 = row_limits(p_low, upper, row + o_token, inside)
        if extras.bias is not None:
            p_row = extras.bias + i_batch * s_bb + b_head * s_bh + tl.maximum(b_modality, 0) * s_bq + i_modality * s_bk
            b_shift = tl.load(p_row, mask=inside, other=0.0).to(tl.float32) * LOG2E
            # As good as hidden.
            b_high = tl.where(b_shift < LOWEST, -2, b_high)
            b_high_2 = tl.where(b_shift < LOWEST, -2, b_high_2)
        # What any row of the tile may see. A key beyond is not read.
        low, high = _any_row(b_low, b_high)
        low_2, high_2 = _any_row(b_low_2, b_high_2)
        p_of_pass = facts.positions + all_keys.to(tl.int64) * i_pass + begin
        first, last = own, own * 0
        for i in range(0, own, SCAN):
            o_tile = i_share + (i + o_scan) * shares
            o_token_k = o_tile[:, None] * BLOCK_K + o_k[None, :]
            b_position = tl.load(p_of_pass + o_token_k, mask=o_token_k < length, other=-1)  # [SCAN, BLOCK_K]
            seen = _in_either(low, high, low_2, high_2, b_position, INTERVALS)
            some = tl.max(seen.to(tl.int32), 1) > 0
            first = tl.minimum(first, tl.min(tl.where(some, i + o_scan, own), 0))
            last = tl.maximum(last, tl.max(tl.where(some, i + o_scan + 1, 0), 0))
        for i in range(first, last):
            column = (i_share + i * shares) * BLOCK_K
            b_position = tl.load(p_of_pass + column + o_k, mask=column + o_k < length, other=-1)
            real = _in_either(low, high, low_2, high_2, b_position, INTERVALS)
            b_k = load_key_tile(p_k, column, o_k, s_kt * UNIT, real, D, BLOCK_D, True)  # [BLOCK_K, BLOCK_D]
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale  # [BLOCK_R, BLOCK_K]
            if extras.bias is not None:
                b_s += b_shift[:, None]
            if MASK > 0:
                b_s += load_mask(
                    p_mask_row, (o_q + o_token)[:, None], column + o_k[None, :], s_mq, s_mk,
                    inside[:, None] & real[None, :], MASK == 1,
                )  # fmt: skip
            seen = _in_either(
                b_low[:, None], b_high[:, None], b_low_2[:, None], b_high_2[:, None], b_position[None, :], INTERVALS
            )
            b_s = tl.where(seen, b_s, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_s, 1))
            b_from = tl.where(b_new == float("-inf"), 0.0, b_new)  # a row may have seen nothing yet
            b_p = tl.exp2(b_s - b_from[:, None])
            b_shrink = tl.exp2(b_max - b_from)
            b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
            b_v = load_key_tile(p_v, column, o_k, s_vt * UNIT, real, E, BLOCK_E, True)  # [BLOCK_K, BLOCK_E]
            b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_shrink[:, None], input_precision=PRECISION)
            b_max = b_new

    i_part = ((i_branch * cells + i_cell).to(tl.int64) * shares + i_share) * BLOCK_R
    store_rows(tensors.sums + i_part * E, o_row, E, b_acc, inside, E, BLOCK_E)
    tl.store(tensors.tops + i_part * 2 + o_row, b_max, mask=inside)
    tl.store(tensors.tops + i_part * 2 + BLOCK_R + o_row, b_sum, mask=inside)


@triton.jit(do_not_specialize=["s_ob", "s_oh", "s_ot", "s_lb", "s_lh", "s_lr", "key_heads", "query_length", "shares",
                               "all_rows"])  # fmt: skip
def attention_decode_combine(
    tensors, extras, p_row_modality, p_tiles, s_ob, s_oh, s_ot, s_lb, s_lh, s_lr,
    key_heads, query_length, shares, all_rows,
    UNIT: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, GROUP: tl.constexpr, BLOCK_R: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Grid: tiles · key heads, rows of a tile."""
    i_cell, i_row = tl.program_id(0), tl.program_id(1)
    i_tile = i_cell // key_heads
    i_sequence = tl.load(p_tiles + i_tile * 3)
    row = tl.load(p_tiles + i_tile * 3 + 1) + i_row // GROUP
    if i_row // GROUP >= tl.load(p_tiles + i_tile * 3 + 2):
        return
    i_head = i_cell % key_heads * GROUP + i_row % GROUP
    i_batch = i_sequence.to(tl.int64)
    o_q = row - i_sequence * query_length
    real = tl.load(p_row_modality + row) >= 0
    o_scan, o_e = tl.arange(0, SCAN), tl.arange(0, BLOCK_E)
    b_result = tl.zeros([BLOCK_E], tl.float32)
    for i_branch in tl.static_range(2 if SPLIT else 1):
        b_acc = tl.zeros([BLOCK_E], tl.float32)
        top = tl.full([], float("-inf"), tl.float32)
        total = tl.zeros([], tl.float32)
        i_part = (i_branch * tl.num_programs(0) + i_cell).to(tl.int64) * shares
        for i in range(0, shares, SCAN):
            o_part = (i_part + i + o_scan) * BLOCK_R
            b_there = i + o_scan < shares
            b_top = tl.load(tensors.tops + o_part * 2 + i_row, mask=b_there, other=float("-inf"))
            b_total = tl.load(tensors.tops + o_part * 2 + BLOCK_R + i_row, mask=b_there, other=0.0)
            new = tl.maximum(top, tl.max(b_top, 0))
            start = tl.where(new == float("-inf"), 0.0, new)
            b_weight, shrink = tl.exp2(b_top - start), tl.exp2(top - start)
            p = tensors.sums + (o_part + i_row)[:, None] * E + o_e[None, :]
            b = tl.load(p, mask=b_there[:, None] & (o_e < E)[None, :], other=0.0)  # [SCAN, BLOCK_E]
            b_acc = b_acc * shrink + tl.sum(b * b_weight[:, None], 0)
            total = total * shrink + tl.sum(b_total * b_weight, 0)
            top = new

        # Close the sum. A row that sees nothing has sum 0: output 0, lse -inf (log P with pseudo scores).
        highest = top
        if extras.base is not None:
            base, decay = tl.load(extras.base + i_head), tl.load(extras.decay + i_head)
            extra = (
                log_pseudo_mass(base, decay, tl.load(extras.counts + all_rows.to(tl.int64) * i_branch + row)) * LOG2E
            )
            highest = tl.maximum(top, extra)
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        keep = tl.exp2(top - highest)
        z = total * keep
        if extras.base is not None:
            z += tl.exp2(extra - highest)
        some = real & (z != 0.0)
        lse = tl.where(some, (highest + tl.log2(z)) * LN2, float("-inf"))
        b_out = tl.where(some, b_acc * tl.where(some, keep / z, 0.0), 0.0)
        if extras.fault is not None:
            broken = tl.load(extras.fault) != 0
            lse = tl.where(broken, float("nan"), lse)
            b_out = tl.where(broken, float("nan"), b_out)
        p_lse = tensors.lse + i_branch * s_lr.to(tl.int64) + i_batch * s_lb + i_head.to(tl.int64) * s_lh + o_q
        tl.store(p_lse, lse)
        if SPLIT:
            b_out *= tl.load(extras.weights + i_branch * key_heads * GROUP + i_head)
        b_result += b_out
    p_out = tensors.out + (i_batch * s_ob + i_head.to(tl.int64) * s_oh + o_q.to(tl.int64) * s_ot) * UNIT
    tl.store(p_out + o_e, b_result.to(p_out.dtype.element_ty), mask=o_e < E)
