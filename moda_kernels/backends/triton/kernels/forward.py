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
    limits_of,
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


class _Numbers(NamedTuple):
    """Plain arguments of the kernel that more than its own lines need; the scale is that of scores in log2."""

    s_qb: Any
    s_qh: Any
    s_qt: Any
    s_kb: Any
    s_kh: Any
    s_kt: Any
    s_vb: Any
    s_vh: Any
    s_vt: Any
    s_bb: Any
    s_bh: Any
    s_bq: Any
    s_bk: Any
    s_mb: Any
    s_mh: Any
    s_mq: Any
    s_mk: Any
    query_heads: Any
    modalities: Any
    query_length: Any
    key_length: Any
    tiles: Any
    width: Any
    all_rows: Any
    all_keys: Any
    scale: Any


class _Place(NamedTuple):
    """Where a program's query tile and the keys of its sequence lie."""

    p_q: Any
    p_k: Any
    p_v: Any
    i_tile: Any
    i_batch: Any
    i_head: Any
    row: Any
    rows: Any
    o_q: Any
    begin: Any
    keys: Any
    s_qt: Any
    s_kt: Any
    s_vt: Any


@triton.jit
def _place(tensors, facts, walk, numbers, UNIT: tl.constexpr, GROUP: tl.constexpr):
    """This program's place; asked for anew by each part of the kernel, see `backward_keys.py`."""
    i_tile = tl.load(walk.order + tl.program_id(0) // numbers.query_heads, volatile=True)
    i_head = tl.program_id(0) % numbers.query_heads
    i_sequence = tl.load(walk.tiles + i_tile * 3)
    row = tl.load(walk.tiles + i_tile * 3 + 1)
    rows = tl.load(walk.tiles + i_tile * 3 + 2)
    begin = tl.load(facts.cu_k + i_sequence)
    keys = tl.load(facts.cu_k + i_sequence + 1) - begin
    # Rows and columns within the batch's matrix (packed: lengths are given as 0, and there is one).
    i_batch, i_wide, i_group = i_sequence.to(tl.int64), i_head.to(tl.int64), (i_head // GROUP).to(tl.int64)
    o_q = row - i_sequence * numbers.query_length
    o_k = (begin - i_sequence * numbers.key_length).to(tl.int64)
    return _Place(
        tensors.q + (i_batch * numbers.s_qb + i_wide * numbers.s_qh + o_q.to(tl.int64) * numbers.s_qt) * UNIT,
        tensors.k + (i_batch * numbers.s_kb + i_group * numbers.s_kh + o_k * numbers.s_kt) * UNIT,
        tensors.v + (i_batch * numbers.s_vb + i_group * numbers.s_vh + o_k * numbers.s_vt) * UNIT,
        i_tile, i_batch, i_head, row, rows, o_q, begin, keys,
        numbers.s_qt * UNIT, numbers.s_kt * UNIT, numbers.s_vt * UNIT,
    )  # fmt: skip


@triton.jit
def _visit(
    b_acc, b_max, b_sum, b_q, at, numbers, p_mask, column, o_key, b_position, b_low, b_high, o_row,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    MASKED: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys from a column on."""
    real = o_key >= 0
    if MASKED:
        real = b_position >= 0
    b_k = load_key_tile(at.p_k, column, o_key, at.s_kt, real, D, BLOCK_D, MASKED)  # [KEYS, BLOCK_D]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_Q, KEYS]
    # It is positive: the largest score stays the largest, and the scale joins the exponent's sum.
    factor = numbers.scale
    if MASK > 0:
        inside = (o_row < at.rows)[:, None] & real[None, :]
        b_s *= numbers.scale
        factor = 1.0
        b_s += load_mask(
            p_mask, at.o_q + o_row[:, None], column + o_key[None, :], numbers.s_mq, numbers.s_mk, inside, MASK == 1
        )
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
    b_acc, b_max, b_sum, b_q, tensors, extras, facts, walk, numbers, i_pass,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, UNIT: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PART: tl.constexpr, AFFINE: tl.constexpr,
    INTERVALS: tl.constexpr, INTERVAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_walk = i_pass * INTERVALS + INTERVAL
    p_list = walk.key_lists + numbers.width.to(tl.int64) * i_pass
    if MASK == 0:
        at = _place(tensors, facts, walk, numbers, UNIT, GROUP)
        p_run = walk.runs + (numbers.tiles.to(tl.int64) * i_walk + at.i_tile) * 8
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
                b_acc, b_max, b_sum, b_q, at, numbers, None, column, o_key, None, None, None, None,
                D, E, BLOCK_D, BLOCK_E, False, 0, PRECISION,
            )  # fmt: skip
    # What only this loop needs is loaded only here: through the one above it would cost registers.
    at = _place(tensors, facts, walk, numbers, UNIT, GROUP)
    p_mask = extras.mask
    if MASK > 0:
        p_mask = extras.mask + at.i_batch * numbers.s_mb + at.i_head.to(tl.int64) * numbers.s_mh
    PARTS: tl.constexpr = BLOCK_K // PART
    o_part, o_row = tl.arange(0, PART), tl.arange(0, BLOCK_Q)
    p_low, upper = limits_of(facts.limits, i_pass, numbers.all_rows, INTERVALS, INTERVAL)
    b_low, b_high = row_limits(p_low, upper, at.row + o_row, o_row < at.rows)
    p_keys = facts.positions + numbers.all_keys.to(tl.int64) * i_pass + at.begin
    runs = masked_runs(walk.runs, i_walk, numbers.tiles, at.i_tile, MASK > 0)
    next_tile = tl.load(p_list + entry_of(runs, 0))
    for i in range(0, runs.until_third * PARTS):
        column = next_tile + i % PARTS * PART
        next_tile = tl.load(p_list + entry_of(runs, (i + 1) // PARTS))
        b_position = tl.load(p_keys + column + o_part, mask=column + o_part < at.keys, other=-1)
        b_acc, b_max, b_sum = _visit(
            b_acc, b_max, b_sum, b_q, at, numbers, p_mask, column, o_part, b_position, b_low, b_high, o_row,
            D, E, BLOCK_D, BLOCK_E, True, MASK, PRECISION,
        )  # fmt: skip
    return b_acc, b_max, b_sum


@triton.jit
def _pass(
    b_acc, b_max, b_sum, b_query, tensors, extras, facts, walk, numbers, p_modalities, i_pass,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, UNIT: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PART: tl.constexpr, INTERVALS: tl.constexpr,
    AFFINE: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One pass: the query turned, the bias set, its walks."""
    b_q = b_query
    if extras.matrix is not None or extras.bias is not None:
        at = _place(tensors, facts, walk, numbers, UNIT, GROUP)
        i_modality = tl.load(p_modalities + i_pass)
        o_row = tl.arange(0, BLOCK_Q)
        b_modality = tl.load(facts.row_modality + at.row + o_row, mask=o_row < at.rows, other=-1)
    if extras.matrix is not None:
        i_matrix = (at.i_batch * numbers.modalities + i_modality) * (numbers.query_heads // GROUP) + at.i_head // GROUP
        p_rest = extras.matrix_rest
        if extras.matrix_rest is not None:
            p_rest = extras.matrix_rest + i_matrix * D * D
        b_q = turned_rows(
            at.p_q, o_row, at.s_qt, b_modality >= 0, extras.matrix + i_matrix * D * D, p_rest,
            D, BLOCK_D, BLOCK_Q, PRECISION,
        ).to(at.p_q.dtype.element_ty)  # fmt: skip
    if extras.bias is not None:
        p_row = extras.bias + at.i_batch * numbers.s_bb + at.i_head * numbers.s_bh + i_modality * numbers.s_bk
        b_shift = tl.load(p_row + tl.maximum(b_modality, 0) * numbers.s_bq).to(tl.float32) * LOG2E
        # A bias of -inf hides the keys: under a maximum that no score reaches they weigh nothing.
        hidden = b_shift < LOWEST
        b_before = b_max
        b_max = tl.where(hidden, -LOWEST, b_max - b_shift)
    for i_interval in tl.static_range(INTERVALS):
        b_acc, b_max, b_sum = _walk(
            b_acc, b_max, b_sum, b_q, tensors, extras, facts, walk, numbers, i_pass,
            D, E, BLOCK_D, BLOCK_E, UNIT, GROUP, BLOCK_Q, BLOCK_K, PART, AFFINE, INTERVALS, i_interval, MASK,
            PRECISION,
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
    numbers = _Numbers(
        s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_bb, s_bh, s_bq, s_bk, s_mb, s_mh, s_mq, s_mk,
        query_heads, modalities, query_length, key_length, tiles, width, all_rows, all_keys, scale,
    )  # fmt: skip
    at = _place(tensors, facts, walk, numbers, UNIT, GROUP)
    if at.rows == 0:
        return
    o_row = tl.arange(0, BLOCK_Q)
    b_query = 0
    if extras.matrix is None:
        b_modality = tl.load(facts.row_modality + at.row + o_row, mask=o_row < at.rows, other=-1)
        b_query = load_rows(at.p_q, o_row, at.s_qt, b_modality >= 0, D, BLOCK_D, True)  # [BLOCK_Q, BLOCK_D]

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
                    b_acc, b_max, b_sum, b_query, tensors, extras, facts, walk, numbers, p_modalities, i_pass,
                    D, E, BLOCK_D, BLOCK_E, UNIT, GROUP, BLOCK_Q, BLOCK_K, PART, INTERVALS, AFFINE, MASK, PRECISION,
                )  # fmt: skip
        else:
            pass_from = first_passes if i_branch == 1 else 0
            pass_to = first_passes if SPLIT and i_branch == 0 else passes
            for i_pass in range(pass_from, pass_to):
                b_acc, b_max, b_sum = _pass(
                    b_acc, b_max, b_sum, b_query, tensors, extras, facts, walk, numbers, p_modalities, i_pass,
                    D, E, BLOCK_D, BLOCK_E, UNIT, GROUP, BLOCK_Q, BLOCK_K, PART, INTERVALS, AFFINE, MASK, PRECISION,
                )  # fmt: skip

        # Close the sum. A row that sees nothing has sum 0: output 0, lse -inf (log P with pseudo scores).
        at = _place(tensors, facts, walk, numbers, UNIT, GROUP)
        i_wide, o_row = at.i_head.to(tl.int64), tl.arange(0, BLOCK_Q)
        b_top = b_max
        if extras.base is not None:
            base, decay = tl.load(extras.base + at.i_head), tl.load(extras.decay + at.i_head)
            p_count = extras.counts + all_rows.to(tl.int64) * i_branch + at.row
            b_count = tl.load(p_count + o_row, mask=o_row < at.rows, other=0)
            b_extra = log_pseudo_mass(base, decay, b_count) * LOG2E
            b_top = tl.maximum(b_max, b_extra)
        b_top = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_keep = tl.exp2(b_max - b_top)
        b_z = b_sum * b_keep
        if extras.base is not None:
            b_z += tl.exp2(b_extra - b_top)
        b_modality = tl.load(facts.row_modality + at.row + o_row, mask=o_row < at.rows, other=-1)
        some = (b_modality >= 0) & (b_z != 0.0)
        b_lse = tl.where(some, (b_top + tl.log2(b_z)) * LN2, float("-inf"))
        b_out = b_acc * tl.where(some, b_keep / b_z, 0.0)[:, None]
        b_out = tl.where(some[:, None], b_out, 0.0)
        if extras.fault is not None:
            broken = tl.load(extras.fault) != 0
            b_lse = tl.where(broken, float("nan"), b_lse)
            b_out = tl.where(broken, float("nan"), b_out)
        inside = o_row < at.rows
        p_lse = tensors.lse + i_branch * s_lr.to(tl.int64) + at.i_batch * s_lb + i_wide * s_lh + at.o_q
        tl.store(p_lse + o_row, b_lse, mask=inside)
        o_out = (at.i_batch * s_ob + i_wide * s_oh + at.o_q.to(tl.int64) * s_ot) * UNIT
        if SPLIT:
            # Both parts are kept, rounded, for the backward; the first is read again here.
            p_part = tensors.parts + i_branch * s_or.to(tl.int64) * UNIT + o_out
            store_rows(p_part, o_row, s_ot * UNIT, b_out, inside, E, BLOCK_E)
            if i_branch == 1:
                tl.debug_barrier()
                b_own = load_rows(tensors.parts + o_out, o_row, s_ot * UNIT, inside, E, BLOCK_E, True).to(tl.float32)
                w_own = tl.load(extras.weights + at.i_head)
                w_cross = tl.load(extras.weights + query_heads + at.i_head)
                b_out = w_own * b_own + w_cross * b_out
                store_rows(tensors.out + o_out, o_row, s_ot * UNIT, b_out, inside, E, BLOCK_E)
        else:
            store_rows(tensors.out + o_out, o_row, s_ot * UNIT, b_out, inside, E, BLOCK_E)
