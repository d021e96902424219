"""Attention backward, the keys' side: one program owns a key tile of one key head, walks the query tiles that see it
and, inside, the query heads that share it, so dk and dv need neither atomics nor a second pass.

Scores stand transposed, keys by queries: their exponentials then feed the next product from registers.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from moda_kernels.backends.triton.kernels.primitives import (
    LN2,
    LOG2E,
    LOWEST,
    load_mask,
    load_rows,
    row_limits,
    store_rows,
    visible,
)


@triton.jit
def _walk(
    b_dk, b_dv, b_k, b_v, i_pass, token, count,
    p_q, p_dout, p_limit, p_delta, p_bias, p_weights, p_list, i_begin, i_end,
    p_limits, p_keys, p_row_modality, p_mask, o_column, o_flat, rows, i_branch, i_key_head,
    s_qh, s_qt, s_dh, s_dt, s_bh, s_ba, s_mh, s_mq, s_mk, query_heads, group, all_rows, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PARTIAL: tl.constexpr,
    MASK: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk (without the scale) and dv over listed query tiles and the heads of the group, one after the other."""
    o_q = tl.arange(0, BLOCK_Q)
    if PARTIAL or MASK > 0:
        # Not passed in: through the loop over full tiles they would cost registers.
        o_key = tl.arange(0, BLOCK_K)
        b_position = tl.load(p_keys + token + o_key, mask=o_key < count, other=-1)
    ahead = tl.load(p_list + i_begin)
    for i in range(i_begin * group, i_end * group):
        row = ahead  # of the sequence's queries
        ahead = tl.load(p_list + (i + 1) // group)
        i_head = i_key_head * group + i % group
        o_row = row + o_q
        p_q_tile = p_q + i_head.to(tl.int64) * s_qh + row.to(tl.int64) * s_qt
        p_do_tile = p_dout + i_head.to(tl.int64) * s_dh + row.to(tl.int64) * s_dt
        o_head = (i_branch * query_heads + i_head).to(tl.int64) * all_rows + o_flat + row
        b_real = o_q >= 0
        if PARTIAL:
            b_real = o_row < rows
        if PARTIAL or p_bias is not None:
            b_modality = tl.load(p_row_modality + o_flat + o_row, mask=b_real, other=-1)
            b_real = b_modality >= 0
        if PARTIAL:
            b_limit = tl.load(p_limit + o_head + o_q, mask=b_real, other=float("inf"))
        else:
            b_limit = tl.load(p_limit + o_head + o_q)
        if p_bias is not None:
            b_shift = tl.load(p_bias + i_head * s_bh + tl.maximum(b_modality, 0) * s_ba).to(tl.float32) * LOG2E
            b_limit -= tl.where(b_shift < LOWEST, LOWEST, b_shift)
        b_q = load_rows(p_q_tile, o_q, s_qt, b_real, D, BLOCK_D, PARTIAL)  # [BLOCK_Q, BLOCK_D]
        b_do = load_rows(p_do_tile, o_q, s_dt, b_real, E, BLOCK_E, PARTIAL)  # [BLOCK_Q, BLOCK_E]
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale - b_limit[None, :]  # [BLOCK_K, BLOCK_Q]
        if MASK > 0:
            inside = (o_key < count)[:, None] & b_real[None, :]
            p_mask_head = p_mask + i_head.to(tl.int64) * s_mh
            b_s += load_mask(p_mask_head, o_row[None, :], (o_column + o_key)[:, None], s_mq, s_mk, inside, MASK == 1)
        if PARTIAL:
            b_low, b_high = row_limits(p_limits, i_pass, all_rows, o_flat + o_row, b_real)
            seen = visible(b_low[None, :], b_high[None, :], b_position[:, None])
            b_s = tl.where(seen, b_s, float("-inf"))
        b_p = tl.exp2(b_s)
        if SPLIT:
            weight = tl.load(p_weights + i_branch * query_heads + i_head)
            b_dv = tl.dot((b_p * weight).to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION) * weight
        else:
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        # Loaded no earlier: a column each would cost registers.
        if PARTIAL:
            b_delta = tl.load(p_delta + o_head + o_q, mask=b_real, other=0.0)
        else:
            b_delta = tl.load(p_delta + o_head + o_q)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit
def _pass(
    b_dk, b_dv, b_k, b_v, i_pass, i_branch, i_key_head, i_tile, token, count,
    p_q, p_dout, p_limit, p_delta, p_bias, p_weights, p_mask,
    p_limits, p_keys, p_row_modality, p_lists, p_counts, p_modalities,
    o_column, o_flat, rows, s_qh, s_qt, s_dh, s_dt, s_bh, s_ba, s_bb, s_mh, s_mq, s_mk,
    query_heads, group, tiles, width, modalities, all_rows, all_keys, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, MASK: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One pass: its lists walked."""
    i_modality = tl.load(p_modalities + i_pass)
    i_list = (i_pass * tiles + i_tile).to(tl.int64)
    p_list = p_lists + i_list * width
    full, every = tl.load(p_counts + i_list * 2), tl.load(p_counts + i_list * 2 + 1)
    p_bias_pass = p_bias
    if p_bias is not None:
        p_bias_pass = p_bias + i_modality * s_bb
    p_keys += i_pass * all_keys
    b_dk, b_dv = _walk(
        b_dk, b_dv, b_k, b_v, i_pass, token, count, p_q, p_dout, p_limit, p_delta, p_bias_pass, p_weights, p_list,
        0, full,
        p_limits, p_keys, p_row_modality, p_mask, o_column, o_flat, rows, i_branch, i_key_head,
        s_qh, s_qt, s_dh, s_dt, s_bh, s_ba, s_mh, s_mq, s_mk, query_heads, group, all_rows, scale,
        D, E, BLOCK_D, BLOCK_E, BLOCK_Q, BLOCK_K, False, MASK, SPLIT, PRECISION,
    )  # fmt: skip
    b_dk, b_dv = _walk(
        b_dk, b_dv, b_k, b_v, i_pass, token, count, p_q, p_dout, p_limit, p_delta, p_bias_pass, p_weights, p_list,
        full, every,
        p_limits, p_keys, p_row_modality, p_mask, o_column, o_flat, rows, i_branch, i_key_head,
        s_qh, s_qt, s_dh, s_dt, s_bh, s_ba, s_mh, s_mq, s_mk, query_heads, group, all_rows, scale,
        D, E, BLOCK_D, BLOCK_E, BLOCK_Q, BLOCK_K, True, MASK, SPLIT, PRECISION,
    )  # fmt: skip
    return b_dk, b_dv


@triton.jit(do_not_specialize=["query_heads", "query_length", "key_length", "tiles", "width", "first_passes", "passes",
                               "all_rows", "all_keys"])  # fmt: skip
def attention_backward_keys(
    p_q, p_k, p_v, p_dout, p_dk, p_dv, p_delta, p_limit,
    p_bias, p_weights, p_mask,
    p_modality, p_limits, p_keys, p_row_modality, p_cu_k, p_cu_q, p_tiles, p_order, p_lists, p_counts, p_modalities,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_db, s_dh, s_dt, s_gb, s_gh, s_gt, s_eb, s_eh, s_et,
    s_bn, s_bh, s_ba, s_bb, s_mb, s_mh, s_mq, s_mk,
    query_heads, group, query_length, key_length, tiles, width, first_passes, passes, modalities, all_rows,
    all_keys, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    FIRST_PASSES: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """dk and dv. Grid: key tiles · key heads, the longest lists first."""
    key_heads = query_heads // group
    i_tile = tl.load(p_order + tl.program_id(0) // key_heads)
    i_key_head = tl.program_id(0) % key_heads
    i_sequence = tl.load(p_tiles + i_tile * 3)
    token = tl.load(p_tiles + i_tile * 3 + 1)
    count = tl.load(p_tiles + i_tile * 3 + 2)
    if count == 0:
        return
    begin = tl.load(p_cu_k + i_sequence)
    o_flat = tl.load(p_cu_q + i_sequence)
    rows = tl.load(p_cu_q + i_sequence + 1) - o_flat
    i_batch = i_sequence.to(tl.int64)
    o_q, o_k = o_flat - i_sequence * query_length, token - i_sequence * key_length
    p_q += i_batch * s_qb + o_q.to(tl.int64) * s_qt
    p_dout += i_batch * s_db + o_q.to(tl.int64) * s_dt
    p_k += i_batch * s_kb + i_key_head.to(tl.int64) * s_kh + o_k.to(tl.int64) * s_kt
    p_v += i_batch * s_vb + i_key_head.to(tl.int64) * s_vh + o_k.to(tl.int64) * s_vt
    if MASK > 0:
        p_mask += i_batch * s_mb
    if p_bias is not None:
        p_bias += i_batch * s_bn

    o_row = tl.arange(0, BLOCK_K)
    inside = o_row < count
    real = tl.load(p_modality + token + o_row, mask=inside, other=-1) >= 0
    b_k = load_rows(p_k, o_row, s_kt, real, D, BLOCK_D, True)  # [BLOCK_K, BLOCK_D]
    b_v = load_rows(p_v, o_row, s_vt, real, E, BLOCK_E, True)  # [BLOCK_K, BLOCK_E]
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_E], tl.float32)

    for i_branch in tl.static_range(2 if SPLIT else 1):
        if PASSES > 0:
            for i_pass in tl.static_range(
                FIRST_PASSES if i_branch == 1 else 0, FIRST_PASSES if SPLIT and i_branch == 0 else PASSES
            ):  # fmt: skip
                b_dk, b_dv = _pass(
                    b_dk, b_dv, b_k, b_v, i_pass, i_branch, i_key_head, i_tile, token, count,
                    p_q, p_dout, p_limit, p_delta, p_bias, p_weights, p_mask,
                    p_limits, p_keys, p_row_modality, p_lists, p_counts, p_modalities,
                    token - begin, o_flat, rows, s_qh, s_qt, s_dh, s_dt, s_bh, s_ba, s_bb, s_mh, s_mq, s_mk,
                    query_heads, group, tiles, width, modalities, all_rows, all_keys, scale,
                    D, E, BLOCK_D, BLOCK_E, BLOCK_Q, BLOCK_K, MASK, SPLIT, PRECISION,
                )  # fmt: skip
        else:
            pass_from = first_passes if i_branch == 1 else 0
            pass_to = first_passes if SPLIT and i_branch == 0 else passes
            for i_pass in range(pass_from, pass_to):
                b_dk, b_dv = _pass(
                    b_dk, b_dv, b_k, b_v, i_pass, i_branch, i_key_head, i_tile, token, count,
                    p_q, p_dout, p_limit, p_delta, p_bias, p_weights, p_mask,
                    p_limits, p_keys, p_row_modality, p_lists, p_counts, p_modalities,
                    token - begin, o_flat, rows, s_qh, s_qt, s_dh, s_dt, s_bh, s_ba, s_bb, s_mh, s_mq, s_mk,
                    query_heads, group, tiles, width, modalities, all_rows, all_keys, scale,
                    D, E, BLOCK_D, BLOCK_E, BLOCK_Q, BLOCK_K, MASK, SPLIT, PRECISION,
                )  # fmt: skip

    # Addresses are made again here: kept through the loops they would cost registers.
    o_row = tl.arange(0, BLOCK_K)
    p_dk += i_batch * s_gb + i_key_head.to(tl.int64) * s_gh + o_k.to(tl.int64) * s_gt
    p_dv += i_batch * s_eb + i_key_head.to(tl.int64) * s_eh + o_k.to(tl.int64) * s_et
    store_rows(p_dk, o_row, s_gt, b_dk * (scale * LN2), o_row < count, D, BLOCK_D)
    store_rows(p_dv, o_row, s_et, b_dv, o_row < count, E, BLOCK_E)
