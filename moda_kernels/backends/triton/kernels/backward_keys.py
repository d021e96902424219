"""Attention backward, the keys' side: one program owns a key tile of one key head, walks the query tiles that see it
and, inside, the query heads that share it, so dk and dv need neither atomics nor a second pass.

Query tiles stand in chains along which what they see moves on, so that those which meet a key tile are a run of each
chain, and those which see all of it a run inside that one (`tokens/tiles.py`). Scores stand transposed, keys by
queries: their exponentials then feed the next product from registers.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

from moda_kernels.backends.triton.kernels.primitives import (
    LN2,
    LOG2E,
    LOWEST,
    limits_of,
    load_key_tile,
    load_mask,
    load_rows,
    row_limits,
    store_rows,
    visible,
)

#: At least as many as a key tile can have runs, a power of two.
RUNS = tl.constexpr(8)


class KeyTensors(NamedTuple):
    """Pointers of `attention_backward_keys`. row_sums: float32 [2, branches, heads, rows], norm and delta: one pointer
    for both, because the loop has no register left for another."""

    q: Any
    k: Any
    v: Any
    dout: Any
    dk: Any
    dv: Any
    row_sums: Any


class _Numbers(NamedTuple):
    """Plain arguments of the kernel that more than its own lines need; the scale is that of scores in log2."""

    s_qb: Any
    s_qh: Any
    s_qt: Any
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
    query_length: Any
    key_length: Any
    tiles: Any
    width: Any
    all_rows: Any
    all_keys: Any
    scale: Any


class _Place(NamedTuple):
    """Where a program's key tile and the queries of its sequence lie."""

    p_q: Any
    p_dout: Any
    p_row_sums: Any
    p_row_modality: Any
    i_tile: Any
    i_key_head: Any
    i_batch: Any
    o_flat: Any
    rows: Any
    token: Any
    column: Any
    count: Any
    o_k: Any
    s_qh: Any
    s_qt: Any
    s_doh: Any
    s_dot: Any


@triton.jit
def _place(tensors, facts, walk, numbers, UNIT: tl.constexpr, GROUP: tl.constexpr):
    """This program's place. Every loop asks anew, and so does what follows the loops: the accumulators and a tile of
    scores leave no registers in which any of it could live on. The compiler may not remember a volatile load."""
    key_heads = numbers.query_heads // GROUP
    i_tile = tl.load(walk.order + tl.program_id(0) // key_heads, volatile=True)
    i_sequence = tl.load(walk.tiles + i_tile * 3)
    token = tl.load(walk.tiles + i_tile * 3 + 1)
    count = tl.load(walk.tiles + i_tile * 3 + 2)
    o_flat = tl.load(facts.cu_q + i_sequence)
    rows = tl.load(facts.cu_q + i_sequence + 1) - o_flat
    column = token - tl.load(facts.cu_k + i_sequence)
    i_batch = i_sequence.to(tl.int64)
    o_q = (o_flat - i_sequence * numbers.query_length).to(tl.int64)
    return _Place(
        tensors.q + (i_batch * numbers.s_qb + o_q * numbers.s_qt) * UNIT,
        tensors.dout + (i_batch * numbers.s_dob + o_q * numbers.s_dot) * UNIT,
        tensors.row_sums + o_flat, facts.row_modality + o_flat,
        i_tile, tl.program_id(0) % key_heads, i_batch, o_flat, rows, token, column, count,
        (token - i_sequence * numbers.key_length).to(tl.int64),
        numbers.s_qh.to(tl.int64) * UNIT, numbers.s_qt * UNIT, numbers.s_doh.to(tl.int64) * UNIT, numbers.s_dot * UNIT,
    )  # fmt: skip


@triton.jit
def _visit(
    b_dk, b_dv, b_k, b_v, b_position, at, numbers, p_low, upper, p_bias, p_mask, p_weights, row,
    i_head, i_part,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, MASKED: tl.constexpr, MASK: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk (without the scale) and dv of one head's query rows from `row` of the sequence on. i_part: of the norms and
    deltas, branch · heads + head."""
    o_q = tl.arange(0, ROWS)
    i_wide = i_head.to(tl.int64)
    o_sum = i_part.to(tl.int64) * numbers.all_rows + row
    b_real = o_q >= 0
    if MASKED:
        # A row that sees nothing, padding too, is not read.
        b_low, b_high = row_limits(p_low, upper, row + o_q, row + o_q < at.rows)
        b_real = b_low < b_high
        b_norm = tl.load(at.p_row_sums + o_sum + o_q, mask=b_real, other=float("inf"))
    else:
        b_norm = tl.load(at.p_row_sums + o_sum + o_q)
    if p_bias is not None:
        b_modality = tl.load(at.p_row_modality + row + o_q, mask=b_real, other=0)
        p_row = p_bias + i_wide * numbers.s_bh + b_modality * numbers.s_bq
        b_shift = tl.load(p_row, mask=b_real, other=0.0).to(tl.float32) * LOG2E
        b_norm -= tl.where(b_shift < LOWEST, LOWEST, b_shift)
    p_q = at.p_q + i_wide * at.s_qh + row.to(tl.int64) * at.s_qt
    p_do = at.p_dout + i_wide * at.s_doh + row.to(tl.int64) * at.s_dot
    b_q = load_rows(p_q, o_q, at.s_qt, b_real, D, BLOCK_D, MASKED)  # [ROWS, BLOCK_D]
    b_do = load_rows(p_do, o_q, at.s_dot, b_real, E, BLOCK_E, MASKED)  # [ROWS, BLOCK_E]
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * numbers.scale - b_norm[None, :]  # [BLOCK_K, ROWS]
    if MASK > 0:
        o_key = tl.arange(0, BLOCK_K)
        b_s += load_mask(
            p_mask + i_wide * numbers.s_mh, row + o_q[None, :], (at.column + o_key)[:, None],
            numbers.s_mq, numbers.s_mk, (o_key < at.count)[:, None] & b_real[None, :], MASK == 1,
        )  # fmt: skip
    if MASKED:
        b_s = tl.where(visible(b_low[None, :], b_high[None, :], b_position[:, None]), b_s, float("-inf"))
    b_p = tl.exp2(b_s)
    if SPLIT:
        weight = tl.load(p_weights + i_part)
        b_dv = tl.dot((b_p * weight).to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION) * weight
    else:
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
    # Loaded no earlier: a column each would cost registers.
    o_sum = ((2 if SPLIT else 1) * numbers.query_heads + i_part).to(tl.int64) * numbers.all_rows + row
    if MASKED:
        b_delta = tl.load(at.p_row_sums + o_sum + o_q, mask=b_real, other=0.0)
    else:
        b_delta = tl.load(at.p_row_sums + o_sum + o_q)
    b_ds = b_p * (b_dp - b_delta[None, :])
    if MASK > 0:
        b_ds = tl.where(b_p == 0.0, 0.0, b_ds)
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit
def _shift(b_start, b_until, b_shift, n):
    return tl.sum(tl.where((n >= b_start) & (n < b_until), b_shift, 0), 0)


@triton.jit
def _of_walk(walk, numbers, i_tile, i_walk, CHAINS: tl.constexpr):
    """The walk's list of query tiles, and the key tile's runs in it."""
    p_list = walk.query_lists + numbers.width.to(tl.int64) * i_walk
    return p_list, walk.runs + (numbers.tiles.to(tl.int64) * i_walk + i_tile) * (4 * CHAINS + 4)


@triton.jit
def _whole(
    b_dk, b_dv, b_k, b_v, tensors, extras, facts, walk, numbers, p_modalities, i_pass, i_walk, i_first,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, CHAINS: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Query tiles that see all keys, in one loop over the runs of all chains; inside, the heads of the group.
    i_first: branch · heads."""
    at = _place(tensors, facts, walk, numbers, UNIT, GROUP)
    p_list, p_runs = _of_walk(walk, numbers, at.i_tile, i_walk, CHAINS)
    p_bias = extras.bias
    if extras.bias is not None:
        p_bias = extras.bias + at.i_batch * numbers.s_bb + tl.load(p_modalities + i_pass) * numbers.s_bk
    i_head = at.i_key_head * GROUP
    # Entry n of all runs is list[n + shift], with the shift of the run that it falls in.
    shift_0 = tl.load(p_runs + 1)
    until_0 = tl.load(p_runs + 2) - shift_0
    shift_1, until_1, shift_2, total = shift_0, until_0, shift_0, until_0
    if CHAINS > 1:
        shift_1 = tl.load(p_runs + 5) - until_0
        until_1 = tl.load(p_runs + 6) - shift_1
        total = until_1
    if CHAINS > 2:
        shift_2 = tl.load(p_runs + 9) - until_1
        total = tl.load(p_runs + 10) - shift_2
    ahead = tl.load(p_list + tl.where(until_0 > 0, shift_0, tl.where(until_1 > 0, shift_1, shift_2)))
    for i in range(0, total * GROUP):
        row = ahead
        n = (i + 1) // GROUP
        shift = shift_0
        if CHAINS > 1:
            shift = tl.where(n < until_0, shift_0, shift_1)
        if CHAINS > 2:
            shift = tl.where(n < until_1, shift, shift_2)
        ahead = tl.load(p_list + n + shift)
        b_dk, b_dv = _visit(
            b_dk, b_dv, b_k, b_v, None, at, numbers, None, None, p_bias, None, extras.weights, row,
            i_head + i % GROUP, i_first + i_head + i % GROUP,
            D, E, BLOCK_D, BLOCK_E, BLOCK_Q, BLOCK_K, False, 0, SPLIT, PRECISION,
        )  # fmt: skip
    return b_dk, b_dv


@triton.jit
def _compared(
    b_dk, b_dv, b_k, b_v, tensors, extras, facts, walk, numbers, p_modalities, i_pass, i_first,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PART: tl.constexpr, GROUP: tl.constexpr, CHAINS: tl.constexpr,
    INTERVALS: tl.constexpr, INTERVAL: tl.constexpr, MASK: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The others, whose rows' limits are compared with the keys' positions, in parts of PART rows. With an attn_mask
    that is every tile."""
    i_walk = i_pass * INTERVALS + INTERVAL
    at = _place(tensors, facts, walk, numbers, UNIT, GROUP)
    p_list, p_runs = _of_walk(walk, numbers, at.i_tile, i_walk, CHAINS)
    p_bias = extras.bias
    if extras.bias is not None:
        p_bias = extras.bias + at.i_batch * numbers.s_bb + tl.load(p_modalities + i_pass) * numbers.s_bk
    p_low, upper = limits_of(facts.limits, i_pass, numbers.all_rows, INTERVALS, INTERVAL)
    p_low += at.o_flat
    p_keys = facts.positions + numbers.all_keys.to(tl.int64) * i_pass + at.token
    p_mask = extras.mask
    if MASK > 0:
        p_mask = extras.mask + at.i_batch * numbers.s_mb
    i_head = at.i_key_head * GROUP
    o_key = tl.arange(0, BLOCK_K)
    b_position = tl.load(p_keys + o_key, mask=o_key < at.count, other=-1)
    # All these runs in one loop, too: entry n is list[n + shift], with the shift of the run that it falls in. With an
    # attn_mask what lies before, in and after the full run of a chain is one run.
    o_run = tl.arange(0, RUNS)
    o_first, o_last = 2 * o_run, 2 * o_run + 1
    there = o_run < 2 * CHAINS + 2
    if MASK > 0:
        o_first = tl.where(o_run < CHAINS, 4 * o_run, 2 * (o_run + CHAINS))
        o_last = tl.where(o_run < CHAINS, 4 * o_run + 3, o_first + 1)
        there = o_run < CHAINS + 2
    b_first = tl.load(p_runs + o_first, mask=there, other=0)
    b_length = tl.load(p_runs + o_last, mask=there, other=0) - b_first
    b_until = tl.cumsum(b_length, 0)
    b_start = b_until - b_length
    b_shift = b_first - b_start
    PARTS: tl.constexpr = BLOCK_Q // PART
    ahead = tl.load(p_list + _shift(b_start, b_until, b_shift, 0))
    count = tl.sum(b_length, 0) * (GROUP * PARTS)
    if MASK > 0:  # at least once, see `backward_query.py`
        ahead = tl.where(count > 0, ahead, at.rows)
        count = tl.maximum(count, 1)
    for i in range(0, count):
        row = ahead + i % PARTS * PART
        n = (i + 1) // (GROUP * PARTS)
        ahead = tl.load(p_list + n + _shift(b_start, b_until, b_shift, n))
        i_of_group = i // PARTS % GROUP
        b_dk, b_dv = _visit(
            b_dk, b_dv, b_k, b_v, b_position, at, numbers, p_low, upper, p_bias, p_mask, extras.weights,
            row, i_head + i_of_group, i_first + i_head + i_of_group,
            D, E, BLOCK_D, BLOCK_E, PART, BLOCK_K, True, MASK, SPLIT, PRECISION,
        )  # fmt: skip
    return b_dk, b_dv


@triton.jit
def _pass(
    b_dk, b_dv, b_k, b_v, tensors, extras, facts, walk, numbers, p_modalities, i_pass, i_branch,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PART: tl.constexpr, GROUP: tl.constexpr, CHAINS: tl.constexpr,
    INTERVALS: tl.constexpr, SPLIT: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One pass: its walks."""
    i_first = i_branch * numbers.query_heads
    for i_interval in tl.static_range(INTERVALS):
        i_walk = i_pass * INTERVALS + i_interval
        if MASK == 0:
            b_dk, b_dv = _whole(
                b_dk, b_dv, b_k, b_v, tensors, extras, facts, walk, numbers, p_modalities, i_pass, i_walk, i_first,
                D, E, BLOCK_D, BLOCK_E, UNIT, BLOCK_Q, BLOCK_K, GROUP, CHAINS, SPLIT, PRECISION,
            )  # fmt: skip
        b_dk, b_dv = _compared(
            b_dk, b_dv, b_k, b_v, tensors, extras, facts, walk, numbers, p_modalities, i_pass, i_first,
            D, E, BLOCK_D, BLOCK_E, UNIT, BLOCK_Q, BLOCK_K, PART, GROUP, CHAINS, INTERVALS, i_interval, MASK,
            SPLIT, PRECISION,
        )  # fmt: skip
    return b_dk, b_dv


@triton.jit(do_not_specialize=[
    "s_qb", "s_qh", "s_qt", "s_kb", "s_kh", "s_kt", "s_vb", "s_vh", "s_vt", "s_dob", "s_doh", "s_dot",
    "s_dkb", "s_dkh", "s_dkt", "s_dvb", "s_dvh", "s_dvt", "s_bb", "s_bh", "s_bq", "s_bk", "s_mb", "s_mh", "s_mq",
    "s_mk", "query_heads", "query_length", "key_length", "tiles", "width", "first_passes", "passes", "all_rows",
    "all_keys",
])  # fmt: skip
def attention_backward_keys(
    tensors, extras, facts, walk, p_modalities,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_dob, s_doh, s_dot,
    s_dkb, s_dkh, s_dkt, s_dvb, s_dvh, s_dvt, s_bb, s_bh, s_bq, s_bk, s_mb, s_mh, s_mq, s_mk,
    query_heads, query_length, key_length, tiles, width, first_passes, passes, all_rows, all_keys, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, UNIT: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PART: tl.constexpr, CHAINS: tl.constexpr,
    FIRST_PASSES: tl.constexpr, PASSES: tl.constexpr, INTERVALS: tl.constexpr,
    SPLIT: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv. Grid: key tiles · key heads, the longest walks first."""
    numbers = _Numbers(
        s_qb, s_qh, s_qt, s_dob, s_doh, s_dot, s_bb, s_bh, s_bq, s_bk, s_mb, s_mh, s_mq, s_mk,
        query_heads, query_length, key_length, tiles, width, all_rows, all_keys, scale,
    )  # fmt: skip
    at = _place(tensors, facts, walk, numbers, UNIT, GROUP)
    if at.count == 0:
        return
    i_wide = at.i_key_head.to(tl.int64)
    p_k = tensors.k + (at.i_batch * s_kb + i_wide * s_kh + at.o_k * s_kt) * UNIT
    p_v = tensors.v + (at.i_batch * s_vb + i_wide * s_vh + at.o_k * s_vt) * UNIT
    o_key = tl.arange(0, BLOCK_K)
    real = tl.load(facts.key_modality + at.token + o_key, mask=o_key < at.count, other=-1) >= 0
    b_k = load_key_tile(p_k, 0 * at.token, o_key, s_kt * UNIT, real, D, BLOCK_D, True)  # [BLOCK_K, BLOCK_D]
    b_v = load_key_tile(p_v, 0 * at.token, o_key, s_vt * UNIT, real, E, BLOCK_E, True)  # [BLOCK_K, BLOCK_E]
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_E], tl.float32)

    for i_branch in tl.static_range(2 if SPLIT else 1):
        if PASSES > 0:
            for i_pass in tl.static_range(
                FIRST_PASSES if i_branch == 1 else 0, FIRST_PASSES if SPLIT and i_branch == 0 else PASSES
            ):  # fmt: skip
                b_dk, b_dv = _pass(
                    b_dk, b_dv, b_k, b_v, tensors, extras, facts, walk, numbers, p_modalities, i_pass, i_branch,
                    D, E, BLOCK_D, BLOCK_E, UNIT, BLOCK_Q, BLOCK_K, PART, GROUP, CHAINS, INTERVALS, SPLIT, MASK,
                    PRECISION,
                )  # fmt: skip
        else:
            pass_from = first_passes if i_branch == 1 else 0
            pass_to = first_passes if SPLIT and i_branch == 0 else passes
            for i_pass in range(pass_from, pass_to):
                b_dk, b_dv = _pass(
                    b_dk, b_dv, b_k, b_v, tensors, extras, facts, walk, numbers, p_modalities, i_pass, i_branch,
                    D, E, BLOCK_D, BLOCK_E, UNIT, BLOCK_Q, BLOCK_K, PART, GROUP, CHAINS, INTERVALS, SPLIT, MASK,
                    PRECISION,
                )  # fmt: skip

    at = _place(tensors, facts, walk, numbers, UNIT, GROUP)
    i_wide = at.i_key_head.to(tl.int64)
    o_key = tl.arange(0, BLOCK_K)
    p_dk = tensors.dk + (at.i_batch * s_dkb + i_wide * s_dkh + at.o_k * s_dkt) * UNIT
    p_dv = tensors.dv + (at.i_batch * s_dvb + i_wide * s_dvh + at.o_k * s_dvt) * UNIT
    store_rows(p_dk, o_key, s_dkt * UNIT, b_dk * (scale * LN2), o_key < at.count, D, BLOCK_D)
    store_rows(p_dv, o_key, s_dvt * UNIT, b_dv, o_key < at.count, E, BLOCK_E)
