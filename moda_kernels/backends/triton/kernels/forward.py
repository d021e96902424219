"""Attention forward: one program walks the tile lists of one query tile and one query head.

It goes through *branches* (one softmax each: one in joint attention, own and other modalities in split), in a branch
through *passes* (keys of some modalities under one rule, see `primitives.py`), in a pass first through full tiles,
without mask arithmetic, then through partial ones. Per pass the query may be turned by the key map
(q·(kA) = (qAᵀ)·k, so fused keys are never written), and a pair bias is a constant per row: it shifts the running
maximum and costs nothing per tile. Pseudo scores are one more term of the final sum.
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
    row_limits,
    store_rows,
    turned_rows,
    visible,
)


@triton.jit
def _walk(
    b_acc, b_max, b_sum, b_q, i_pass,
    p_k, p_v, p_list, i_begin, i_end, p_limits, p_keys, p_mask,
    begin, end, row, rows, o_q, all_rows, s_kt, s_vt, s_mq, s_mk, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PARTIAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over listed key tiles."""
    o_k = tl.arange(0, BLOCK_K)
    if PARTIAL or MASK > 0:
        # Not passed in: through the loop over full tiles they would cost registers.
        o_row = tl.arange(0, BLOCK_Q)
        b_low, b_high = row_limits(p_limits, i_pass, all_rows, row + o_row, o_row < rows)
    # The next entry is loaded a step ahead: an address that has to be waited for would cost a pipeline stage.
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
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_Q, BLOCK_K]
        factor = scale  # it is positive: the largest score stays the largest, and the scale joins the exponent's sum
        if MASK > 0:
            b_s *= scale
            factor = 1.0
            inside = (o_row < rows)[:, None] & real[None, :]
            b_s += load_mask(p_mask, o_q + o_row[:, None], column + o_k[None, :], s_mq, s_mk, inside, MASK == 1)
        if PARTIAL:
            seen = visible(b_low[:, None], b_high[:, None], b_position[None, :])
            b_s = tl.where(seen, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * factor)
        b_from = b_new
        if PARTIAL or MASK > 0:  # a row may have seen nothing yet
            b_from = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s * factor - b_from[:, None])
        b_shrink = tl.exp2(b_max - b_from)
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_v = load_rows(p_v_tile, o_k, s_vt, real, E, BLOCK_E, PARTIAL)  # [BLOCK_K, BLOCK_E]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_shrink[:, None], input_precision=PRECISION)
        b_max = b_new
    return b_acc, b_max, b_sum


@triton.jit
def _pass(
    b_acc, b_max, b_sum, b_query, i_pass, i_batch, i_head, i_group, i_tile, p_q, p_k, p_v,
    p_matrix, p_matrix_rest, p_bias, p_mask, p_limits, p_keys, p_row_modality, p_lists, p_counts, p_modalities,
    begin, end, row, rows, o_q, all_rows, all_keys, tiles, width, modalities, key_heads, scale,
    s_qt, s_kt, s_vt, s_bn, s_bh, s_ba, s_bb, s_mq, s_mk,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One pass: the query turned, the bias set, the lists walked."""
    b_q = b_query
    i_modality = tl.load(p_modalities + i_pass)
    if p_matrix is not None:
        i_matrix = ((i_batch * modalities + i_modality) * key_heads + i_group) * D * D
        p_rest = p_matrix_rest
        if p_matrix_rest is not None:
            p_rest = p_matrix_rest + i_matrix
        o_row = tl.arange(0, BLOCK_Q)
        b_real = tl.load(p_row_modality + row + o_row, mask=o_row < rows, other=-1) >= 0
        b_q = turned_rows(
            p_q, o_row, s_qt, b_real, p_matrix + i_matrix, p_rest, D, BLOCK_D, BLOCK_Q, PRECISION
        ).to(p_q.dtype.element_ty)  # fmt: skip
    if p_bias is not None:
        o_row = tl.arange(0, BLOCK_Q)
        b_modality = tl.load(p_row_modality + row + o_row, mask=o_row < rows, other=-1)
        p_row = p_bias + i_batch * s_bn + i_head * s_bh + tl.maximum(b_modality, 0) * s_ba + i_modality * s_bb
        b_shift = tl.load(p_row).to(tl.float32) * LOG2E
        # A bias of -inf hides the keys: under a maximum that no score reaches they weigh nothing.
        hidden = b_shift < LOWEST
        b_before = b_max
        b_max = tl.where(hidden, -LOWEST, b_max - b_shift)
    i_list = (i_pass * tiles + i_tile).to(tl.int64)
    p_list = p_lists + i_list * width
    full, every = tl.load(p_counts + i_list * 2), tl.load(p_counts + i_list * 2 + 1)
    p_keys += i_pass * all_keys
    b_acc, b_max, b_sum = _walk(
        b_acc, b_max, b_sum, b_q, i_pass, p_k, p_v, p_list, 0, full, p_limits, p_keys, p_mask,
        begin, end, row, rows, o_q, all_rows, s_kt, s_vt, s_mq, s_mk, scale,
        D, E, BLOCK_D, BLOCK_E, BLOCK_Q, BLOCK_K, False, MASK, PRECISION,
    )  # fmt: skip
    b_acc, b_max, b_sum = _walk(
        b_acc, b_max, b_sum, b_q, i_pass, p_k, p_v, p_list, full, every, p_limits, p_keys, p_mask,
        begin, end, row, rows, o_q, all_rows, s_kt, s_vt, s_mq, s_mk, scale,
        D, E, BLOCK_D, BLOCK_E, BLOCK_Q, BLOCK_K, True, MASK, PRECISION,
    )  # fmt: skip
    if p_bias is not None:
        b_max = tl.where(hidden, b_before, b_max + b_shift)
    return b_acc, b_max, b_sum


@triton.jit(do_not_specialize=["query_heads", "query_length", "key_length", "tiles", "width", "first_passes", "passes",
                               "all_rows", "all_keys"])  # fmt: skip
def attention_forward(
    p_q, p_k, p_v, p_out, p_parts, p_lse,
    p_matrix, p_matrix_rest, p_bias, p_base, p_decay, p_weights, p_mask, p_count, p_fault,
    p_limits, p_keys, p_row_modality, p_cu_k, p_tiles, p_order, p_lists, p_counts, p_modalities,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_ob, s_oh, s_ot, s_pr, s_lr, s_lb, s_lh,
    s_bn, s_bh, s_ba, s_bb, s_mb, s_mh, s_mq, s_mk, s_cr,
    query_heads, group, query_length, key_length, tiles, width, first_passes, passes, modalities,
    all_rows, all_keys, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    FIRST_PASSES: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """Grid: query tiles · query heads, the longest lists first, the heads of a tile side by side."""
    i_tile = tl.load(p_order + tl.program_id(0) // query_heads)
    i_head = tl.program_id(0) % query_heads
    i_group = i_head // group
    i_sequence = tl.load(p_tiles + i_tile * 3)
    row = tl.load(p_tiles + i_tile * 3 + 1)
    rows = tl.load(p_tiles + i_tile * 3 + 2)
    if rows == 0:
        return
    begin, end = tl.load(p_cu_k + i_sequence), tl.load(p_cu_k + i_sequence + 1)
    # Rows and columns within the batch's matrix (packed: lengths are given as 0, and there is one).
    i_batch = i_sequence.to(tl.int64)
    o_q, o_k = row - i_sequence * query_length, begin - i_sequence * key_length
    p_q += i_batch * s_qb + i_head.to(tl.int64) * s_qh + o_q.to(tl.int64) * s_qt
    p_k += i_batch * s_kb + i_group.to(tl.int64) * s_kh + o_k.to(tl.int64) * s_kt
    p_v += i_batch * s_vb + i_group.to(tl.int64) * s_vh + o_k.to(tl.int64) * s_vt
    if MASK > 0:
        p_mask += i_batch * s_mb + i_head.to(tl.int64) * s_mh

    o_row = tl.arange(0, BLOCK_Q)
    b_modality = tl.load(p_row_modality + row + o_row, mask=o_row < rows, other=-1)
    b_query = 0
    if p_matrix is None:
        b_query = load_rows(p_q, o_row, s_qt, b_modality >= 0, D, BLOCK_D, True)  # [BLOCK_Q, BLOCK_D]

    for i_branch in tl.static_range(2 if SPLIT else 1):
        b_acc = tl.zeros([BLOCK_Q, BLOCK_E], tl.float32)
        b_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_Q], tl.float32)
        # Unrolled where they are few: a loop around the loops would cost registers.
        if PASSES > 0:
            for i_pass in tl.static_range(
                FIRST_PASSES if i_branch == 1 else 0, FIRST_PASSES if SPLIT and i_branch == 0 else PASSES
            ):  # fmt: skip
                b_acc, b_max, b_sum = _pass(
                    b_acc, b_max, b_sum, b_query, i_pass, i_batch, i_head, i_group, i_tile, p_q, p_k, p_v,
                    p_matrix, p_matrix_rest, p_bias, p_mask, p_limits, p_keys, p_row_modality, p_lists, p_counts,
                    p_modalities, begin, end, row, rows, o_q, all_rows, all_keys, tiles, width, modalities,
                    query_heads // group, scale,
                    s_qt, s_kt, s_vt, s_bn, s_bh, s_ba, s_bb, s_mq, s_mk,
                    D, E, BLOCK_D, BLOCK_E, BLOCK_Q, BLOCK_K, MASK, PRECISION,
                )  # fmt: skip
        else:
            pass_from = first_passes if i_branch == 1 else 0
            pass_to = first_passes if SPLIT and i_branch == 0 else passes
            for i_pass in range(pass_from, pass_to):
                b_acc, b_max, b_sum = _pass(
                    b_acc, b_max, b_sum, b_query, i_pass, i_batch, i_head, i_group, i_tile, p_q, p_k, p_v,
                    p_matrix, p_matrix_rest, p_bias, p_mask, p_limits, p_keys, p_row_modality, p_lists, p_counts,
                    p_modalities, begin, end, row, rows, o_q, all_rows, all_keys, tiles, width, modalities,
                    query_heads // group, scale,
                    s_qt, s_kt, s_vt, s_bn, s_bh, s_ba, s_bb, s_mq, s_mk,
                    D, E, BLOCK_D, BLOCK_E, BLOCK_Q, BLOCK_K, MASK, PRECISION,
                )  # fmt: skip

        # Close the sum. A row that sees nothing has sum 0: output 0, lse -inf (log P with pseudo scores).
        b_top = b_max
        if p_base is not None:
            base, decay = tl.load(p_base + i_head), tl.load(p_decay + i_head)
            b_count = tl.load(p_count + i_branch * s_cr + row + o_row, mask=o_row < rows, other=0)
            b_extra = log_pseudo_mass(base, decay, b_count) * LOG2E
            b_top = tl.maximum(b_max, b_extra)
        b_top = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_keep = tl.exp2(b_max - b_top)
        b_z = b_sum * b_keep
        if p_base is not None:
            b_z += tl.exp2(b_extra - b_top)
        b_modality = tl.load(p_row_modality + row + o_row, mask=o_row < rows, other=-1)
        some = (b_modality >= 0) & (b_z != 0.0)
        b_lse = tl.where(some, (b_top + tl.log2(b_z)) * LN2, float("-inf"))
        b_out = b_acc * tl.where(some, b_keep / b_z, 0.0)[:, None]
        b_out = tl.where(some[:, None], b_out, 0.0)
        if p_fault is not None:
            broken = tl.load(p_fault) != 0
            b_lse = tl.where(broken, float("nan"), b_lse)
            b_out = tl.where(broken, float("nan"), b_out)
        inside = o_row < rows
        p_lse_row = p_lse + i_branch * s_lr + i_batch * s_lb + i_head * s_lh + o_q
        tl.store(p_lse_row + o_row, b_lse, mask=inside)
        p_o = i_batch * s_ob + i_head.to(tl.int64) * s_oh + o_q.to(tl.int64) * s_ot
        if SPLIT:
            # Both parts are kept, rounded, for the backward; the first is read again here.
            store_rows(p_parts + i_branch * s_pr + p_o, o_row, s_ot, b_out, inside, E, BLOCK_E)
            if i_branch == 1:
                tl.debug_barrier()
                b_own_part = load_rows(p_parts + p_o, o_row, s_ot, inside, E, BLOCK_E, True).to(tl.float32)
                w_own = tl.load(p_weights + i_head)
                w_cross = tl.load(p_weights + query_heads + i_head)
                b_out = w_own * b_own_part + w_cross * b_out
                store_rows(p_out + p_o, o_row, s_ot, b_out, inside, E, BLOCK_E)
        else:
            store_rows(p_out + p_o, o_row, s_ot, b_out, inside, E, BLOCK_E)
