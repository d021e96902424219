"""Attention backward, the query's side: row sums that all of it needs, then dq, with the gradients that belong to rows.

dq walks key tiles as the forward does. Nothing is added up in memory by atomics: every program owns what it writes, so
results don't depend on the order of execution. `backward_keys.py` has the keys' side.
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
    log_pseudo_mass_slope,
    masked_runs,
    row_limits,
    store_rows,
    visible,
)


class RowTensors(NamedTuple):
    """Pointers of `attention_row_sums`. delta, norm: float32 [branches, heads, rows]; sums: float32
    [tiles, heads, branches, 3]."""

    out: Any
    dout: Any
    lse: Any
    dlse: Any
    delta: Any
    norm: Any
    sums: Any


class QueryTensors(NamedTuple):
    """Pointers of `attention_backward_query`. dbias: float32 [passes, tiles, heads, modalities] or None."""

    q: Any
    k: Any
    v: Any
    dout: Any
    dq: Any
    dbias: Any
    delta: Any
    norm: Any


@triton.jit(do_not_specialize=[
    "s_ob", "s_oh", "s_ot", "s_or", "s_dob", "s_doh", "s_dot", "s_lb", "s_lh", "s_lr", "s_dlb", "s_dlh", "s_dlr",
    "s_dlt", "query_heads", "query_length", "all_rows",
])  # fmt: skip
def attention_row_sums(
    tensors, extras, p_row_modality, p_tiles,
    s_ob, s_oh, s_ot, s_or, s_dob, s_doh, s_dot, s_lb, s_lh, s_lr, s_dlb, s_dlh, s_dlr, s_dlt,
    query_heads, query_length, all_rows,
    E: tl.constexpr, BLOCK_E: tl.constexpr, UNIT: tl.constexpr, BLOCK_Q: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """delta = w (do · o) - dlse and norm, lse in log2 (+inf where a row sees nothing), by branch, head and flat row;
    and, summed over each tile, what d base, d decay and d branch_weights are made of.

    Grid: (query tiles, query heads).
    """
    STEP: tl.constexpr = BLOCK_E if BLOCK_E < 64 else 64  # columns at a time: rows of 256 would leave the registers
    i_tile, i_head = tl.program_id(0), tl.program_id(1)
    i_sequence = tl.load(p_tiles + i_tile * 3)
    row = tl.load(p_tiles + i_tile * 3 + 1)
    rows = tl.load(p_tiles + i_tile * 3 + 2)
    i_batch, i_wide = i_sequence.to(tl.int64), i_head.to(tl.int64)
    o_q = row - i_sequence * query_length
    o_row = tl.arange(0, BLOCK_Q)
    inside = o_row < rows
    b_real = tl.load(p_row_modality + row + o_row, mask=inside, other=-1) >= 0
    p_dout = tensors.dout + (i_batch * s_dob + i_wide * s_doh + o_q.to(tl.int64) * s_dot) * UNIT
    p_out = tensors.out + (i_batch * s_ob + i_wide * s_oh + o_q.to(tl.int64) * s_ot) * UNIT
    for i_branch in tl.static_range(2 if SPLIT else 1):
        p_part = p_out + i_branch * s_or.to(tl.int64) * UNIT
        b_dot = tl.zeros([BLOCK_Q], tl.float32)
        for begin in tl.static_range(0, BLOCK_E, STEP):
            b_do = load_rows(p_dout + begin, o_row, s_dot * UNIT, b_real, E - begin, STEP, True).to(tl.float32)
            b_o = load_rows(p_part + begin, o_row, s_ot * UNIT, b_real, E - begin, STEP, True).to(tl.float32)
            b_dot += tl.sum(b_do * b_o, 1)  # [BLOCK_Q]
        weight = 1.0
        if SPLIT:
            weight = tl.load(extras.weights + i_branch * query_heads + i_head)
        p_lse = tensors.lse + i_branch * s_lr.to(tl.int64) + i_batch * s_lb + i_wide * s_lh + o_q
        b_lse = tl.load(p_lse + o_row, mask=b_real, other=float("-inf"))
        p_dlse = tensors.dlse + i_branch * s_dlr.to(tl.int64) + i_batch * s_dlb + i_wide * s_dlh
        b_dlse = tl.load(p_dlse + (o_q + o_row).to(tl.int64) * s_dlt, mask=b_real, other=0.0)
        some = b_lse != float("-inf")
        b_delta = tl.where(some, weight * b_dot - b_dlse, 0.0)
        o_flat = (i_branch * query_heads + i_head).to(tl.int64) * all_rows + row + o_row
        tl.store(tensors.delta + o_flat, b_delta, mask=inside)
        tl.store(tensors.norm + o_flat, tl.where(some, b_lse * LOG2E, float("inf")), mask=inside)
        p_sum = tensors.sums + ((i_tile * query_heads.to(tl.int64) + i_head) * (2 if SPLIT else 1) + i_branch) * 3
        tl.store(p_sum, tl.sum(b_dot, 0))
        if extras.base is not None:
            base, decay = tl.load(extras.base + i_head), tl.load(extras.decay + i_head)
            p_count = extras.counts + all_rows.to(tl.int64) * i_branch + row
            b_count = tl.load(p_count + o_row, mask=b_real, other=0)
            # d log P = -(P / Z) delta
            b_mass = tl.where(some, tl.exp(log_pseudo_mass(base, decay, b_count) - b_lse), 0.0)
            b_dlog = -b_mass * b_delta
            tl.store(p_sum + 1, tl.sum(b_dlog, 0))
            b_slope = tl.where(b_mass != 0.0, log_pseudo_mass_slope(decay, b_count), 0.0)
            tl.store(p_sum + 2, tl.sum(b_dlog * b_slope, 0))


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
    s_dob: Any
    s_doh: Any
    s_dot: Any
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
    p_dout: Any
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
    i_batch, i_wide, i_group = i_sequence.to(tl.int64), i_head.to(tl.int64), (i_head // GROUP).to(tl.int64)
    o_q = row - i_sequence * numbers.query_length
    o_k = (begin - i_sequence * numbers.key_length).to(tl.int64)
    return _Place(
        tensors.q + (i_batch * numbers.s_qb + i_wide * numbers.s_qh + o_q.to(tl.int64) * numbers.s_qt) * UNIT,
        tensors.dout + (i_batch * numbers.s_dob + i_wide * numbers.s_doh + o_q.to(tl.int64) * numbers.s_dot) * UNIT,
        tensors.k + (i_batch * numbers.s_kb + i_group * numbers.s_kh + o_k * numbers.s_kt) * UNIT,
        tensors.v + (i_batch * numbers.s_vb + i_group * numbers.s_vh + o_k * numbers.s_vt) * UNIT,
        i_tile, i_batch, i_head, row, rows, o_q, begin, keys, numbers.s_kt * UNIT, numbers.s_vt * UNIT,
    )  # fmt: skip


@triton.jit
def _visit(
    b_dq, b_db, b_q, b_do, b_norm, b_delta, weight, at, numbers, p_mask, column, o_key, b_position, b_low, b_high,
    o_row,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    MASKED: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq (without the scale) and row sums of ds over the keys from a column on."""
    real = o_key >= 0
    if MASKED:
        real = b_position >= 0
    b_k = load_key_tile(at.p_k, column, o_key, at.s_kt, real, D, BLOCK_D, MASKED)  # [KEYS, BLOCK_D]
    b_v = load_key_tile(at.p_v, column, o_key, at.s_vt, real, E, BLOCK_E, MASKED)  # [KEYS, BLOCK_E]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * numbers.scale - b_norm[:, None]  # [BLOCK_Q, KEYS]
    if MASK > 0:
        inside = (o_row < at.rows)[:, None] & real[None, :]
        b_s += load_mask(
            p_mask, at.o_q + o_row[:, None], column + o_key[None, :], numbers.s_mq, numbers.s_mk, inside, MASK == 1
        )
    if MASKED:
        b_s = tl.where(visible(b_low[:, None], b_high[:, None], b_position[None, :]), b_s, float("-inf"))
    b_p = tl.exp2(b_s)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    if SPLIT:
        b_dp *= weight
    b_ds = b_p * (b_dp - b_delta[:, None])
    if MASK > 0:  # a tile without anything to see adds nothing, whatever its rows hold
        b_ds = tl.where(b_p == 0.0, 0.0, b_ds)
    if BIAS:
        b_db += tl.sum(b_ds, 1)
    b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_dq, b_db


@triton.jit
def _walk(
    b_dq, b_db, b_q, b_do, b_norm, b_delta, weight, tensors, extras, facts, walk, numbers, i_pass,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, UNIT: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PART: tl.constexpr, AFFINE: tl.constexpr,
    INTERVALS: tl.constexpr, INTERVAL: tl.constexpr, MASK: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As in the forward: tiles that need no masks, then the others in parts."""
    BIAS: tl.constexpr = extras.bias is not None
    i_walk = i_pass * INTERVALS + INTERVAL
    p_list = walk.key_lists + numbers.width.to(tl.int64) * i_pass
    if MASK == 0:
        at = _place(tensors, facts, walk, numbers, UNIT, GROUP)
        p_run = walk.runs + (numbers.tiles.to(tl.int64) * i_walk + at.i_tile) * 8
        first, last = tl.load(p_run), tl.load(p_run + 1)
        o_key = tl.arange(0, BLOCK_K)
        ahead = 0
        if not AFFINE:
            ahead = tl.load(p_list + first)
        for i in range(first, last):
            if AFFINE:
                column = i * BLOCK_K
            else:
                column = ahead
                ahead = tl.load(p_list + i + 1)
            b_dq, b_db = _visit(
                b_dq, b_db, b_q, b_do, b_norm, b_delta, weight, at, numbers, None, column, o_key, None, None, None,
                None, D, E, BLOCK_D, BLOCK_E, False, 0, BIAS, SPLIT, PRECISION,
            )  # fmt: skip
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
    count = runs.until_third * PARTS
    if MASK > 0:
        # The one loop there is goes round at least once, if only past the last key: of one that may not, ptxas makes
        # each wgmma wait, because where it is left out the accumulator is no product's.
        next_tile = tl.where(count > 0, next_tile, at.keys)
        count = tl.maximum(count, 1)
    for i in range(0, count):
        column = next_tile + i % PARTS * PART
        next_tile = tl.load(p_list + entry_of(runs, (i + 1) // PARTS))
        b_position = tl.load(p_keys + column + o_part, mask=column + o_part < at.keys, other=-1)
        b_dq, b_db = _visit(
            b_dq, b_db, b_q, b_do, b_norm, b_delta, weight, at, numbers, p_mask, column, o_part, b_position, b_low,
            b_high, o_row, D, E, BLOCK_D, BLOCK_E, True, MASK, BIAS, SPLIT, PRECISION,
        )  # fmt: skip
    return b_dq, b_db


@triton.jit
def _pass(
    b_dq, b_q, b_do, b_norm, b_delta, weight, tensors, extras, facts, walk, numbers, p_modalities, i_pass,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, UNIT: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PART: tl.constexpr, INTERVALS: tl.constexpr,
    AFFINE: tl.constexpr, SPLIT: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One pass: dq so far, and the pass's d bias."""
    b_db = tl.zeros([BLOCK_Q], tl.float32)
    if extras.bias is not None:
        at = _place(tensors, facts, walk, numbers, UNIT, GROUP)
        o_row = tl.arange(0, BLOCK_Q)
        b_modality = tl.load(facts.row_modality + at.row + o_row, mask=o_row < at.rows, other=-1)
        p_row = extras.bias + at.i_batch * numbers.s_bb + at.i_head * numbers.s_bh
        p_row += tl.load(p_modalities + i_pass) * numbers.s_bk
        b_shift = tl.load(p_row + tl.maximum(b_modality, 0) * numbers.s_bq).to(tl.float32) * LOG2E
        b_norm -= tl.where(b_shift < LOWEST, LOWEST, b_shift)
    for i_interval in tl.static_range(INTERVALS):
        b_dq, b_db = _walk(
            b_dq, b_db, b_q, b_do, b_norm, b_delta, weight, tensors, extras, facts, walk, numbers, i_pass,
            D, E, BLOCK_D, BLOCK_E, UNIT, GROUP, BLOCK_Q, BLOCK_K, PART, AFFINE, INTERVALS, i_interval, MASK,
            SPLIT, PRECISION,
        )  # fmt: skip
    if extras.bias is not None:
        at = _place(tensors, facts, walk, numbers, UNIT, GROUP)
        o_row = tl.arange(0, BLOCK_Q)
        b_modality = tl.load(facts.row_modality + at.row + o_row, mask=o_row < at.rows, other=-1)
        i_cell = (numbers.tiles.to(tl.int64) * i_pass + at.i_tile) * numbers.query_heads + at.i_head
        for i_modality in range(0, numbers.modalities):
            of_rows = tl.sum(tl.where(b_modality == i_modality, b_db, 0.0), 0)
            tl.store(tensors.dbias + i_cell * numbers.modalities + i_modality, of_rows)
    return b_dq


@triton.jit(do_not_specialize=[
    "s_qb", "s_qh", "s_qt", "s_kb", "s_kh", "s_kt", "s_vb", "s_vh", "s_vt", "s_dob", "s_doh", "s_dot",
    "s_dqb", "s_dqh", "s_dqt", "s_bb", "s_bh", "s_bq", "s_bk", "s_mb", "s_mh", "s_mq", "s_mk",
    "query_heads", "modalities", "query_length", "key_length", "tiles", "width", "first_passes", "passes", "all_rows",
    "all_keys",
])  # fmt: skip
def attention_backward_query(
    tensors, extras, facts, walk, p_modalities,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_dob, s_doh, s_dot, s_dqb, s_dqh, s_dqt,
    s_bb, s_bh, s_bq, s_bk, s_mb, s_mh, s_mq, s_mk,
    query_heads, modalities, query_length, key_length, tiles, width, first_passes, passes, all_rows, all_keys, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, UNIT: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PART: tl.constexpr,
    FIRST_PASSES: tl.constexpr, PASSES: tl.constexpr, INTERVALS: tl.constexpr, AFFINE: tl.constexpr,
    SPLIT: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and d bias summed over each tile by query modality. Grid: as `attention_forward`."""
    numbers = _Numbers(
        s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_dob, s_doh, s_dot, s_bb, s_bh, s_bq, s_bk,
        s_mb, s_mh, s_mq, s_mk, query_heads, modalities, query_length, key_length, tiles, width, all_rows, all_keys,
        scale,
    )  # fmt: skip
    at = _place(tensors, facts, walk, numbers, UNIT, GROUP)
    if at.rows == 0:
        return
    o_row = tl.arange(0, BLOCK_Q)
    b_real = tl.load(facts.row_modality + at.row + o_row, mask=o_row < at.rows, other=-1) >= 0
    b_q = load_rows(at.p_q, o_row, s_qt * UNIT, b_real, D, BLOCK_D, True)  # [BLOCK_Q, BLOCK_D]
    b_do = load_rows(at.p_dout, o_row, s_dot * UNIT, b_real, E, BLOCK_E, True)  # [BLOCK_Q, BLOCK_E]
    b_dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    weight = 1.0

    for i_branch in tl.static_range(2 if SPLIT else 1):
        at = _place(tensors, facts, walk, numbers, UNIT, GROUP)
        o_row = tl.arange(0, BLOCK_Q)
        b_real = tl.load(facts.row_modality + at.row + o_row, mask=o_row < at.rows, other=-1) >= 0
        o_flat = (i_branch * query_heads + at.i_head).to(tl.int64) * all_rows + at.row + o_row
        b_norm = tl.load(tensors.norm + o_flat, mask=b_real, other=float("inf"))
        b_delta = tl.load(tensors.delta + o_flat, mask=b_real, other=0.0)
        if SPLIT:
            weight = tl.load(extras.weights + i_branch * query_heads + at.i_head)
        if PASSES > 0:
            for i_pass in tl.static_range(
                FIRST_PASSES if i_branch == 1 else 0, FIRST_PASSES if SPLIT and i_branch == 0 else PASSES
            ):  # fmt: skip
                b_dq = _pass(
                    b_dq, b_q, b_do, b_norm, b_delta, weight, tensors, extras, facts, walk, numbers, p_modalities,
                    i_pass, D, E, BLOCK_D, BLOCK_E, UNIT, GROUP, BLOCK_Q, BLOCK_K, PART, INTERVALS, AFFINE, SPLIT,
                    MASK, PRECISION,
                )  # fmt: skip
        else:
            pass_from = first_passes if i_branch == 1 else 0
            pass_to = first_passes if SPLIT and i_branch == 0 else passes
            for i_pass in range(pass_from, pass_to):
                b_dq = _pass(
                    b_dq, b_q, b_do, b_norm, b_delta, weight, tensors, extras, facts, walk, numbers, p_modalities,
                    i_pass, D, E, BLOCK_D, BLOCK_E, UNIT, GROUP, BLOCK_Q, BLOCK_K, PART, INTERVALS, AFFINE, SPLIT,
                    MASK, PRECISION,
                )  # fmt: skip

    at = _place(tensors, facts, walk, numbers, UNIT, GROUP)
    i_wide, o_row = at.i_head.to(tl.int64), tl.arange(0, BLOCK_Q)
    p_dq = tensors.dq + (at.i_batch * s_dqb + i_wide * s_dqh + at.o_q.to(tl.int64) * s_dqt) * UNIT
    # Scores are scaled for exp2; their gradient is not.
    store_rows(p_dq, o_row, s_dqt * UNIT, b_dq * (scale * LN2), o_row < at.rows, D, BLOCK_D)
