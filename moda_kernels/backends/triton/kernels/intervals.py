"""What each query row sees in each pass, as one interval of positions, written once per layout.

PAST is an interval of positions that ends at the query's own; SEGMENT is one around it, because the tokens of a
segment have consecutive positions; both contain the query, so their union is an interval too, and in it the keys beyond
PAST are those of the query's own segment. So a kernel compares a key's position with two numbers per row, whatever the
rules.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

#: Visibility's flags.
PAST = tl.constexpr(1)
SEGMENT = tl.constexpr(2)
ALL = tl.constexpr(4)
#: Larger than any position.
FAR = tl.constexpr(2147483647)

BLOCK = 256


@triton.jit(do_not_specialize=["all_rows", "keys", "passes", "segments"])
def _row_limits(
    p_columns, p_modality, p_position, p_segment, p_table, p_rules, p_limits, p_row_modality,
    all_rows, passes, modalities, segments, window, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < all_rows
    token = tl.load(p_columns + row, mask=inside, other=-1)
    some = token >= 0
    b_modality = tl.load(p_modality + token, mask=some, other=-1)
    tl.store(p_row_modality + row, b_modality, mask=inside)
    real = b_modality >= 0
    b_position = tl.load(p_position + token, mask=real, other=-1)
    b_segment = tl.load(p_segment + token, mask=real, other=-1)
    known = real & (b_segment >= 0) & (b_segment < segments)
    b_start = tl.load(p_table + b_segment * 4 + 1, mask=known, other=0)
    b_length = tl.load(p_table + b_segment * 4 + 2, mask=known, other=0)
    b_first = tl.load(p_position + b_start, mask=known, other=0)
    for i_pass in range(0, passes):
        b_rule = tl.load(p_rules + i_pass * modalities + b_modality, mask=real, other=0)
        past, own, everything = (b_rule & PAST) != 0, ((b_rule & SEGMENT) != 0) & known, (b_rule & ALL) != 0
        b_high = tl.where(everything, FAR, tl.where(past, b_position, -2))
        b_high = tl.where(own, tl.maximum(b_high, b_first + b_length - 1), b_high)
        b_low = tl.where(everything, -1, tl.where(past, tl.maximum(b_position - window, -1), FAR))
        b_low = tl.where(own, tl.minimum(b_low, b_first - 1), b_low)
        p = p_limits + i_pass * 2 * all_rows + row
        tl.store(p, b_low, mask=inside)
        tl.store(p + all_rows, b_high, mask=inside)


@triton.jit(do_not_specialize=["keys", "passes"])
def _key_positions(p_modality, p_position, p_members, p_positions, keys, passes, BLOCK: tl.constexpr):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < keys
    b_modality = tl.load(p_modality + token, mask=inside, other=-1)
    b_position = tl.load(p_position + token, mask=inside, other=-1)
    for i_pass in range(0, passes):
        member = (b_modality >= 0) & (((tl.load(p_members + i_pass) >> tl.maximum(b_modality, 0)) & 1) != 0)
        p = p_positions + i_pass * keys + token
        tl.store(p, tl.where(member, b_position, -1), mask=inside)
