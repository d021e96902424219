"""Attention backward, the query's side: row sums that all of it needs, then dq, with the gradients that belong to rows.

Nothing is added up in memory by atomics: every program owns what it writes, so results don't depend on the order of
execution. `backward_keys.py` has the keys' side.
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
    log_pseudo_mass,
    log_pseudo_mass_slope,
    row_limits,
    store_rows,
    visible,
)


@triton.jit(do_not_specialize=["query_heads", "query_length", "all_rows"])
def attention_row_sums(
    p_dout, p_out, p_dlse, p_lse, p_base, p_decay, p_weights, p_count,
    p_row_modality, p_tiles,
    p_delta, p_limit, p_sums,
    s_db, s_dh, s_dt, s_ob, s_oh, s_ot, s_or, s_lr, s_lb, s_lh, s_gr, s_gb, s_gh, s_gt,
    query_heads, query_length, all_rows,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_Q: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """delta = w (do · o) - dlse and lse in log2 (+inf where a row sees nothing), by branch, head and flat row; and,
    summed over each tile, what d base, d decay and d branch_weights are made of.

    Grid: (query tiles, query heads). p_sums: [tiles, heads, branches, 3].
    """
    i_tile, i_head = tl.program_id(0), tl.program_id(1)
    i_sequence = tl.load(p_tiles + i_tile * 3)
    row = tl.load(p_tiles + i_tile * 3 + 1)
    rows = tl.load(p_tiles + i_tile * 3 + 2)
    i_batch = i_sequence.to(tl.int64)
    o_q = row - i_sequence * query_length
    o_row = tl.arange(0, BLOCK_Q)
    inside = o_row < rows
    b_real = tl.load(p_row_modality + row + o_row, mask=inside, other=-1) >= 0
    p_dout += i_batch * s_db + i_head.to(tl.int64) * s_dh + o_q.to(tl.int64) * s_dt
    p_out += i_batch * s_ob + i_head.to(tl.int64) * s_oh + o_q.to(tl.int64) * s_ot
    b_do = load_rows(p_dout, o_row, s_dt, b_real, E, BLOCK_E, True).to(tl.float32)  # [BLOCK_Q, BLOCK_E]
    for i_branch in tl.static_range(2 if SPLIT else 1):
        b_o = load_rows(p_out + i_branch * s_or, o_row, s_ot, b_real, E, BLOCK_E, True).to(tl.float32)
        b_dot = tl.sum(b_do * b_o, 1)
        weight = 1.0
        if SPLIT:
            weight = tl.load(p_weights + i_branch * query_heads + i_head)
        p_row = p_lse + i_branch * s_lr + i_batch * s_lb + i_head * s_lh + o_q
        b_lse = tl.load(p_row + o_row, mask=b_real, other=float("-inf"))
        p_dlse_row = p_dlse + i_branch * s_gr + i_batch * s_gb + i_head * s_gh + o_q.to(tl.int64) * s_gt
        b_dlse = tl.load(p_dlse_row + o_row * s_gt, mask=b_real, other=0.0)
        some = b_lse != float("-inf")
        b_delta = tl.where(some, weight * b_dot - b_dlse, 0.0)
        o_flat = (i_branch * query_heads + i_head).to(tl.int64) * all_rows + row + o_row
        tl.store(p_delta + o_flat, b_delta, mask=inside)
        tl.store(p_limit + o_flat, tl.where(some, b_lse * LOG2E, float("inf")), mask=inside)
        p_sum = p_sums + ((i_tile * query_heads + i_head) * (2 if SPLIT else 1) + i_branch) * 3
        tl.store(p_sum, tl.sum(b_dot, 0))
        if p_base is not None:
            base, decay = tl.load(p_base + i_head), tl.load(p_decay + i_head)
            b_count = tl.load(p_count + i_branch * all_rows + row + o_row, mask=b_real, other=0)
            # d log P = -(P / Z) delta
            b_mass = tl.where(some, tl.exp(log_pseudo_mass(base, decay, b_count) - b_lse), 0.0)
            b_dlog = -b_mass * b_delta
            tl.store(p_sum + 1, tl.sum(b_dlog, 0))
            b_slope = tl.where(b_mass != 0.0, log_pseudo_mass_slope(decay, b_count), 0.0)
            tl.store(p_sum + 2, tl.sum(b_dlog * b_slope, 0))


@triton.jit
def _walk(
    b_dq, b_db, b_q, b_do, b_limit, b_delta, weight, i_pass,
    p_k, p_v, p_list, i_begin, i_end, p_limits, p_keys, p_mask,
    begin, end, row, rows, o_q, all_rows, s_kt, s_vt, s_mq, s_mk, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PARTIAL: tl.constexpr,
    MASK: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq (without the scale) and row sums of ds over listed key tiles."""
    o_k = tl.arange(0, BLOCK_K)
    if PARTIAL or MASK > 0:
        # Not passed in: through the loop over full tiles they would cost registers.
        o_row = tl.arange(0, BLOCK_Q)
        b_low, b_high = row_limits(p_limits, i_pass, all_rows, row + o_row, o_row < rows)
    ahead = tl.load(p_list + i_begin)
    for i in range(i_begin, i_end):
        column = ahead
        ahead = tl.load(p_list + i + 1)
        p_k_tile, p_v_tile = p_k + column.to(tl.int64) * s_kt, p_v + column.to(tl.int64) * s_vt
        if PARTIAL:
            token = begin + column + o_k
            b_position = tl.load(p_keys + token, mask=token < end, other=-1)
            real = b_position >= 0
        else:
            real = o_k >= 0
        b_k = load_rows(p_k_tile, o_k, s_kt, real, D, BLOCK_D, PARTIAL)  # [BLOCK_K, BLOCK_D]
        b_v = load_rows(p_v_tile, o_k, s_vt, real, E, BLOCK_E, PARTIAL)  # [BLOCK_K, BLOCK_E]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale - b_limit[:, None]  # [BLOCK_Q, BLOCK_K]
        if MASK > 0:
            inside = (o_row < rows)[:, None] & real[None, :]
            b_s += load_mask(p_mask, o_q + o_row[:, None], column + o_k[None, :], s_mq, s_mk, inside, MASK == 1)
        if PARTIAL:
            seen = visible(b_low[:, None], b_high[:, None], b_position[None, :])
            b_s = tl.where(seen, b_s, float("-inf"))
        b_p = tl.exp2(b_s)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        if SPLIT:
            b_dp *= weight
        b_ds = b_p * (b_dp - b_delta[:, None])
        if BIAS:
            b_db += tl.sum(b_ds, 1)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_dq, b_db


@triton.jit
def _pass(
    b_dq, b_query, b_do, b_limit, b_delta, weight, i_pass, i_batch, i_head, i_tile, p_k, p_v,
    p_dbias, p_bias, p_mask, p_limits, p_keys, p_row_modality, p_lists, p_counts, p_modalities,
    begin, end, row, rows, o_q, all_rows, all_keys, tiles, width, modalities, query_heads, scale,
    s_kt, s_vt, s_bn, s_bh, s_ba, s_bb, s_mq, s_mk,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One pass: dq so far, and the pass's d bias."""
    b_db = tl.zeros([BLOCK_Q], tl.float32)
    i_modality = tl.load(p_modalities + i_pass)
    if p_bias is not None:
        o_row = tl.arange(0, BLOCK_Q)
        b_modality = tl.load(p_row_modality + row + o_row, mask=o_row < rows, other=-1)
        p_row = p_bias + i_batch * s_bn + i_head * s_bh + tl.maximum(b_modality, 0) * s_ba + i_modality * s_bb
        b_shift = tl.load(p_row).to(tl.float32) * LOG2E
        b_limit -= tl.where(b_shift < LOWEST, LOWEST, b_shift)
    i_list = (i_pass * tiles + i_tile).to(tl.int64)
    p_list = p_lists + i_list * width
    full, every = tl.load(p_counts + i_list * 2), tl.load(p_counts + i_list * 2 + 1)
    p_keys += i_pass * all_keys
    b_dq, b_db = _walk(
        b_dq, b_db, b_query, b_do, b_limit, b_delta, weight, i_pass, p_k, p_v, p_list, 0, full, p_limits, p_keys,
        p_mask, begin, end, row, rows, o_q, all_rows, s_kt, s_vt, s_mq, s_mk, scale,
        D, E, BLOCK_D, BLOCK_E, BLOCK_Q, BLOCK_K, False, MASK, p_bias is not None, SPLIT, PRECISION,
    )  # fmt: skip
    b_dq, b_db = _walk(
        b_dq, b_db, b_query, b_do, b_limit, b_delta, weight, i_pass, p_k, p_v, p_list, full, every, p_limits, p_keys,
        p_mask, begin, end, row, rows, o_q, all_rows, s_kt, s_vt, s_mq, s_mk, scale,
        D, E, BLOCK_D, BLOCK_E, BLOCK_Q, BLOCK_K, True, MASK, p_bias is not None, SPLIT, PRECISION,
    )  # fmt: skip
    if p_bias is not None:
        o_row = tl.arange(0, BLOCK_Q)
        b_modality = tl.load(p_row_modality + row + o_row, mask=o_row < rows, other=-1)
        p_dbias_row = p_dbias + ((i_pass * tiles + i_tile) * query_heads + i_head) * modalities
        for i_row_modality in range(0, modalities):
            tl.store(p_dbias_row + i_row_modality, tl.sum(tl.where(b_modality == i_row_modality, b_db, 0.0), 0))
    return b_dq


@triton.jit(do_not_specialize=["query_heads", "query_length", "key_length", "tiles", "width", "first_passes", "passes",
                               "all_rows", "all_keys"])  # fmt: skip
def attention_backward_query(
    p_q, p_k, p_v, p_dout, p_dq, p_dbias, p_delta, p_limit,
    p_bias, p_weights, p_mask,
    p_limits, p_keys, p_row_modality, p_cu_k, p_tiles, p_order, p_lists, p_counts, p_modalities,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_db, s_dh, s_dt, s_gb, s_gh, s_gt,
    s_bn, s_bh, s_ba, s_bb, s_mb, s_mh, s_mq, s_mk,
    query_heads, group, query_length, key_length, tiles, width, first_passes, passes, modalities, all_rows,
    all_keys, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    FIRST_PASSES: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """dq, and d bias summed over each tile by query modality.

    Grid: as `attention_forward`. p_dbias: [passes, tiles, heads, modalities].
    """
    i_tile = tl.load(p_order + tl.program_id(0) // query_heads)
    i_head = tl.program_id(0) % query_heads
    i_group = i_head // group
    i_sequence = tl.load(p_tiles + i_tile * 3)
    row = tl.load(p_tiles + i_tile * 3 + 1)
    rows = tl.load(p_tiles + i_tile * 3 + 2)
    if rows == 0:
        return
    begin, end = tl.load(p_cu_k + i_sequence), tl.load(p_cu_k + i_sequence + 1)
    i_batch = i_sequence.to(tl.int64)
    o_q, o_k = row - i_sequence * query_length, begin - i_sequence * key_length
    p_q += i_batch * s_qb + i_head.to(tl.int64) * s_qh + o_q.to(tl.int64) * s_qt
    p_k += i_batch * s_kb + i_group.to(tl.int64) * s_kh + o_k.to(tl.int64) * s_kt
    p_v += i_batch * s_vb + i_group.to(tl.int64) * s_vh + o_k.to(tl.int64) * s_vt
    p_dout += i_batch * s_db + i_head.to(tl.int64) * s_dh + o_q.to(tl.int64) * s_dt
    if MASK > 0:
        p_mask += i_batch * s_mb + i_head.to(tl.int64) * s_mh

    o_row = tl.arange(0, BLOCK_Q)
    b_real = tl.load(p_row_modality + row + o_row, mask=o_row < rows, other=-1) >= 0
    b_query = load_rows(p_q, o_row, s_qt, b_real, D, BLOCK_D, True)  # [BLOCK_Q, BLOCK_D]
    b_do = load_rows(p_dout, o_row, s_dt, b_real, E, BLOCK_E, True)  # [BLOCK_Q, BLOCK_E]
    b_dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    weight = 1.0

    for i_branch in tl.static_range(2 if SPLIT else 1):
        o_flat = (i_branch * query_heads + i_head).to(tl.int64) * all_rows + row + o_row
        b_limit = tl.load(p_limit + o_flat, mask=b_real, other=float("inf"))
        b_delta = tl.load(p_delta + o_flat, mask=b_real, other=0.0)
        if SPLIT:
            weight = tl.load(p_weights + i_branch * query_heads + i_head)
        if PASSES > 0:
            for i_pass in tl.static_range(
                FIRST_PASSES if i_branch == 1 else 0, FIRST_PASSES if SPLIT and i_branch == 0 else PASSES
            ):  # fmt: skip
                b_dq = _pass(
                    b_dq, b_query, b_do, b_limit, b_delta, weight, i_pass, i_batch, i_head, i_tile, p_k, p_v,
                    p_dbias, p_bias, p_mask, p_limits, p_keys, p_row_modality, p_lists, p_counts,
                    p_modalities, begin, end, row, rows, o_q, all_rows, all_keys, tiles, width, modalities,
                    query_heads, scale,
                    s_kt, s_vt, s_bn, s_bh, s_ba, s_bb, s_mq, s_mk,
                    D, E, BLOCK_D, BLOCK_E, BLOCK_Q, BLOCK_K, SPLIT, MASK, PRECISION,
                )  # fmt: skip
        else:
            pass_from = first_passes if i_branch == 1 else 0
            pass_to = first_passes if SPLIT and i_branch == 0 else passes
            for i_pass in range(pass_from, pass_to):
                b_dq = _pass(
                    b_dq, b_query, b_do, b_limit, b_delta, weight, i_pass, i_batch, i_head, i_tile, p_k, p_v,
                    p_dbias, p_bias, p_mask, p_limits, p_keys, p_row_modality, p_lists, p_counts,
                    p_modalities, begin, end, row, rows, o_q, all_rows, all_keys, tiles, width, modalities,
                    query_heads, scale,
                    s_kt, s_vt, s_bn, s_bh, s_ba, s_bb, s_mq, s_mk,
                    D, E, BLOCK_D, BLOCK_E, BLOCK_Q, BLOCK_K, SPLIT, MASK, PRECISION,
                )  # fmt: skip

    # Addresses are made again here: kept through the loops they would cost registers.
    p_dq += i_batch * s_gb + i_head.to(tl.int64) * s_gh + o_q.to(tl.int64) * s_gt
    # Scores are scaled for exp2; their gradient is not.
    store_rows(p_dq, o_row, s_gt, b_dq * (scale * LN2), o_row < rows, D, BLOCK_D)
