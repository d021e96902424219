"""Attention forward: one program walks the key tiles of one query tile and one query head.

It goes through *branches* (one softmax each: one in joint attention, own and other modalities in split), in a branch
through *passes* and their intervals (see `primitives.py`), in each of these walks first through the tiles that need no
masks, then through the others. Those go in parts of PART keys: masks take registers that a wide tile of scores leaves
no room for. Per pass the query may be turned by the key map (q·(kA) = (qAᵀ)·k, so fused keys are never written), and a
pair bias is a constant per row: it shifts the running maximum and costs nothing per tile. Pseudo scores are one more
term of the final sum.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

from moda_kernels.backends.triton.kernels.primitives import (
    LN2,
    LOG2E,
    LOWEST,
    entry_of,
    load_key_tile,
    load_mask,
    load_rows,
    log_pseudo_mass,
    masked_runs,
    row_limits,
    store_rows,
    turned_rows,
    visible,
)


class ForwardTensors(NamedTuple):
    """Pointers to what every call has; parts: [2, …] as out, split only."""

    q: Any
    k: Any
    v: Any
    out: Any
    parts: Any
    lse: Any


class _Place(NamedTuple):
    """Where a query tile and the keys of its sequence lie: what stays the same in all walks."""

    p_q: Any
    p_k: Any
    p_v: Any
    p_mask: Any
    begin: Any
    end: Any
    row: Any
    rows: Any
    o_q: Any
    s_qt: Any
    s_kt: Any
    s_vt: Any
    s_mq: Any
    s_mk: Any
    scale: Any


@triton.jit
def _visit(
    b_acc, b_max, b_sum, b_q, at, column, o_key, b_position, b_low, b_high, o_row,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    MASKED: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys from a column on."""
    real = o_key >= 0
    if MASKED:
        real = b_position >= 0
    b_k = load_key_tile(at.p_k, column, o_key, at.s_kt, real, D, BLOCK_D, MASKED)  # [KEYS, BLOCK_D]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_Q, KEYS]
    factor = at.scale  # it is positive: the largest score stays the largest, and the scale joins the exponent's sum
    if MASK > 0:
        inside = (o_row < at.rows)[:, None] & real[None, :]
        b_s *= at.scale
        factor = 1.0
        b_s += load_mask(
            at.p_mask, at.o_q + o_row[:, None], column + o_key[None, :], at.s_mq, at.s_mk, inside, MASK == 1
        )  # fmt: skip
    if MASKED:
        b_s = tl.where(visible(b_low[:, None], b_high[:, None], b_position[None, :]), b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * factor)
    b_from = b_new
    if MASKED:  # a row may have seen nothing yet
        b_from = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp2(b_s * factor - b_from[:, None])
    b_shrink = tl.exp2(b_max - b_from)
    b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
    b_v = load_key_tile(at.p_v, column, o_key, at.s_vt, real, E, BLOCK_E, MASKED)  # [KEYS, BLOCK_E]
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_shrink[:, None], input_precision=PRECISION)
    return b_acc, b_new, b_sum


@triton.jit
def _walk(
    b_acc, b_max, b_sum, b_q, at, facts, walk, i_pass, i_walk, i_tile, tiles, width, all_rows, all_keys,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PART: tl.constexpr, AFFINE: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    p_list = walk.key_lists + width.to(tl.int64) * i_pass
    if MASK == 0:
        p_run = walk.runs + (tiles.to(tl.int64) * i_walk + i_tile) * 8
        first, last = tl.load(p_run), tl.load(p_run + 1)
        o_key = tl.arange(0, BLOCK_K)
        ahead = 0
        if not AFFINE:  # a step ahead: an address that has to be waited for would cost a pipeline stage
            ahead = tl.load(p_list + first)
        for i in range(first, last):
            if AFFINE:
                column = i * BLOCK_K
            else:
                column = ahead
                ahead = tl.load(p_list + i + 1)
            b_acc, b_max, b_sum = _visit(
                b_acc, b_max, b_sum, b_q, at, column, o_key, None, None, None, None,
                D, E, BLOCK_D, BLOCK_E, False, 0, PRECISION,
            )  # fmt: skip
    # What only this loop needs is loaded only here: through the one above it would cost registers.
    PARTS: tl.constexpr = BLOCK_K // PART
    o_part, o_row = tl.arange(0, PART), tl.arange(0, BLOCK_Q)
    b_low, b_high = row_limits(facts.limits, i_walk, all_rows, at.row + o_row, o_row < at.rows)
    p_keys = facts.positions + all_keys.to(tl.int64) * i_pass + at.begin
    runs = masked_runs(walk.runs, i_walk, tiles, i_tile, MASK > 0)
    next_tile = tl.load(p_list + entry_of(runs, 0))
    for i in range(0, runs.until_third * PARTS):
        column = next_tile + i % PARTS * PART
        next_tile = tl.load(p_list + entry_of(runs, (i + 1) // PARTS))
        b_position = tl.load(p_keys + column + o_part, mask=column + o_part < at.end - at.begin, other=-1)
        b_acc, b_max, b_sum = _visit(
            b_acc, b_max, b_sum, b_q, at, column, o_part, b_position, b_low, b_high, o_row,
            D, E, BLOCK_D, BLOCK_E, True, MASK, PRECISION,
        )  # fmt: skip
    return b_acc, b_max, b_sum


@triton.jit
def _pass(
    b_acc, b_max, b_sum, b_query, at, extras, facts, walk, p_modalities, i_pass, i_batch, i_head, i_group, i_tile,
    s_bb, s_bh, s_bq, s_bk, tiles, width, modalities, key_heads, all_rows, all_keys,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PART: tl.constexpr, INTERVALS: tl.constexpr, AFFINE: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One pass: the query turned, the bias set, its walks."""
    b_q = b_query
    if extras.matrix is not None or extras.bias is not None:
        i_modality = tl.load(p_modalities + i_pass)
        o_row = tl.arange(0, BLOCK_Q)
        b_modality = tl.load(facts.row_modality + at.row + o_row, mask=o_row < at.rows, other=-1)
    if extras.matrix is not None:
        i_matrix = ((i_batch * modalities + i_modality) * key_heads + i_group) * D * D
        p_rest = extras.matrix_rest
        if extras.matrix_rest is not None:
            p_rest = extras.matrix_rest + i_matrix
        b_q = turned_rows(
            at.p_q, o_row, at.s_qt, b_modality >= 0, extras.matrix + i_matrix, p_rest, D, BLOCK_D, BLOCK_Q, PRECISION
        ).to(at.p_q.dtype.element_ty)  # fmt: skip
    if extras.bias is not None:
        p_row = extras.bias + i_batch * s_bb + i_head * s_bh + tl.maximum(b_modality, 0) * s_bq + i_modality * s_bk
        b_shift = tl.load(p_row).to(tl.float32) * LOG2E
        # A bias of -inf hides the keys: under a maximum that no score reaches they weigh nothing.
        hidden = b_shift < LOWEST
        b_before = b_max
        b_max = tl.where(hidden, -LOWEST, b_max - b_shift)
    for i_interval in tl.static_range(INTERVALS):
        b_acc, b_max, b_sum = _walk(
            b_acc, b_max, b_sum, b_q, at, facts, walk, i_pass, i_pass * INTERVALS + i_interval, i_tile,
            tiles, width, all_rows, all_keys,
            D, E, BLOCK_D, BLOCK_E, BLOCK_Q, BLOCK_K, PART, AFFINE, MASK, PRECISION,
        )  # fmt: skip
    if extras.bias is not None:
        b_max = tl.where(hidden, b_before, b_max + b_shift)
    return b_acc, b_max, b_sum


@triton.jit(do_not_specialize=[
    "s_qb", "s_qh", "s_qt", "s_kb", "s_kh", "s_kt", "s_vb", "s_vh", "s_vt", "s_ob", "s_oh", "s_ot", "s_or",
    "s_lb", "s_lh", "s_lr", "s_bb", "s_bh", "s_bq", "s_bk", "s_mb", "s_mh", "s_mq", "s_mk",
    "query_heads", "modalities", "query_length", "key_length", "tiles", "width", "first_passes", "passes", "all_rows",
    "all_keys",
])  # fmt: skip
def attention_forward(
    tensors, extras, facts, walk, p_modalities,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_ob, s_oh, s_ot, s_or,
    s_lb, s_lh, s_lr, s_bb, s_bh, s_bq, s_bk, s_mb, s_mh, s_mq, s_mk,
    query_heads, modalities, query_length, key_length, tiles, width, first_passes, passes, all_rows, all_keys, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, UNIT: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PART: tl.constexpr,
    FIRST_PASSES: tl.constexpr, PASSES: tl.constexpr, INTERVALS: tl.constexpr, AFFINE: tl.constexpr,
    SPLIT: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: query tiles · query heads, the longest walks first, the heads of a tile side by side."""
    i_tile = tl.load(walk.order + tl.program_id(0) // query_heads)
    i_head = tl.program_id(0) % query_heads
    i_group = i_head // GROUP
    i_sequence = tl.load(walk.tiles + i_tile * 3)
    row = tl.load(walk.tiles + i_tile * 3 + 1)
    rows = tl.load(walk.tiles + i_tile * 3 + 2)
    if rows == 0:
        return
    begin, end = tl.load(facts.cu_k + i_sequence), tl.load(facts.cu_k + i_sequence + 1)
    # Rows and columns within the batch's matrix (packed: lengths are given as 0, and there is one).
    i_batch = i_sequence.to(tl.int64)
    o_q = row - i_sequence * query_length
    o_k = (begin - i_sequence * key_length).to(tl.int64)
    p_q = tensors.q + (i_batch * s_qb + i_head.to(tl.int64) * s_qh + o_q.to(tl.int64) * s_qt) * UNIT
    p_k = tensors.k + (i_batch * s_kb + i_group.to(tl.int64) * s_kh + o_k * s_kt) * UNIT
    p_v = tensors.v + (i_batch * s_vb + i_group.to(tl.int64) * s_vh + o_k * s_vt) * UNIT
    p_mask = extras.mask
    if MASK > 0:
        p_mask = extras.mask + i_batch * s_mb + i_head.to(tl.int64) * s_mh
    at = _Place(
        p_q, p_k, p_v, p_mask, begin, end, row, rows, o_q, s_qt * UNIT, s_kt * UNIT, s_vt * UNIT, s_mq, s_mk, scale
    )  # fmt: skip
    o_row = tl.arange(0, BLOCK_Q)
    b_query = 0
    if extras.matrix is None:
        b_modality = tl.load(facts.row_modality + row + o_row, mask=o_row < rows, other=-1)
        b_query = load_rows(p_q, o_row, at.s_qt, b_modality >= 0, D, BLOCK_D, True)  # [BLOCK_Q, BLOCK_D]

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
                    b_acc, b_max, b_sum, b_query, at, extras, facts, walk, p_modalities, i_pass, i_batch, i_head,
                    i_group, i_tile, s_bb, s_bh, s_bq, s_bk, tiles, width, modalities, query_heads // GROUP,
                    all_rows, all_keys,
                    D, E, BLOCK_D, BLOCK_E, BLOCK_Q, BLOCK_K, PART, INTERVALS, AFFINE, MASK, PRECISION,
                )  # fmt: skip
        else:
            pass_from = first_passes if i_branch == 1 else 0
            pass_to = first_passes if SPLIT and i_branch == 0 else passes
            for i_pass in range(pass_from, pass_to):
                b_acc, b_max, b_sum = _pass(
                    b_acc, b_max, b_sum, b_query, at, extras, facts, walk, p_modalities, i_pass, i_batch, i_head,
                    i_group, i_tile, s_bb, s_bh, s_bq, s_bk, tiles, width, modalities, query_heads // GROUP,
                    all_rows, all_keys,
                    D, E, BLOCK_D, BLOCK_E, BLOCK_Q, BLOCK_K, PART, INTERVALS, AFFINE, MASK, PRECISION,
                )  # fmt: skip

        # Close the sum. A row that sees nothing has sum 0: output 0, lse -inf (log P with pseudo scores).
        b_top = b_max
        if extras.base is not None:
            base, decay = tl.load(extras.base + i_head), tl.load(extras.decay + i_head)
            p_count = extras.counts + all_rows.to(tl.int64) * i_branch + row
            b_count = tl.load(p_count + o_row, mask=o_row < rows, other=0)
            b_extra = log_pseudo_mass(base, decay, b_count) * LOG2E
            b_top = tl.maximum(b_max, b_extra)
        b_top = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_keep = tl.exp2(b_max - b_top)
        b_z = b_sum * b_keep
        if extras.base is not None:
            b_z += tl.exp2(b_extra - b_top)
        b_modality = tl.load(facts.row_modality + row + o_row, mask=o_row < rows, other=-1)
        some = (b_modality >= 0) & (b_z != 0.0)
        b_lse = tl.where(some, (b_top + tl.log2(b_z)) * LN2, float("-inf"))
        b_out = b_acc * tl.where(some, b_keep / b_z, 0.0)[:, None]
        b_out = tl.where(some[:, None], b_out, 0.0)
        if extras.fault is not None:
            broken = tl.load(extras.fault) != 0
            b_lse = tl.where(broken, float("nan"), b_lse)
            b_out = tl.where(broken, float("nan"), b_out)
        inside = o_row < rows
        p_lse = tensors.lse + i_branch * s_lr.to(tl.int64) + i_batch * s_lb + i_head.to(tl.int64) * s_lh + o_q
        tl.store(p_lse + o_row, b_lse, mask=inside)
        o_out = (i_batch * s_ob + i_head.to(tl.int64) * s_oh + o_q.to(tl.int64) * s_ot) * UNIT
        if SPLIT:
            # Both parts are kept, rounded, for the backward; the first is read again here.
            p_part = tensors.parts + i_branch * s_or.to(tl.int64) * UNIT + o_out
            store_rows(p_part, o_row, s_ot * UNIT, b_out, inside, E, BLOCK_E)
            if i_branch == 1:
                tl.debug_barrier()
                b_own = load_rows(tensors.parts + o_out, o_row, s_ot * UNIT, inside, E, BLOCK_E, True).to(tl.float32)
                w_own = tl.load(extras.weights + i_head)
                w_cross = tl.load(extras.weights + query_heads + i_head)
                b_out = w_own * b_own + w_cross * b_out
                store_rows(tensors.out + o_out, o_row, s_ot * UNIT, b_out, inside, E, BLOCK_E)
        else:
            store_rows(tensors.out + o_out, o_row, s_ot * UNIT, b_out, inside, E, BLOCK_E)
