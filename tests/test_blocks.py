"""FlexAttention's block masks from intervals, entry by entry against `create_block_mask` over the mask written out."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import moda_kernels as mk
from moda_kernels.testing import generator, random_layout, random_mask
from moda_kernels.tokens import blocks
from moda_kernels.tokens.layout import ModalityLayout, QueryRows

LISTS = blocks.BlockLists._fields


def theirs(seen: Tensor, block_q: int, block_k: int) -> Any:
    """What FlexAttention itself makes of a mask ``[B, Lq, Lk]``."""

    def of_table(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return seen[b, q, k]

    return create_block_mask(of_table, *seen.shape[:1], None, *seen.shape[1:], "cpu", BLOCK_SIZE=(block_q, block_k))


def written_out(mask_mod: blocks.MaskMod, batch: int, rows: int, keys: int) -> Tensor:
    b, q, k = (torch.arange(n) for n in (batch, rows, keys))
    found = mask_mod(b[:, None, None], torch.zeros(1).long(), q[None, :, None], k[None, None, :])
    return found.expand(batch, rows, keys)


def random_rows(g: torch.Generator, layout: ModalityLayout) -> QueryRows:
    """As many queries as keys, or fewer."""
    if layout.packed:
        counts = layout.cu_seqlens.diff()
        fewer = (torch.rand(counts.shape, generator=g) * (counts + 1)).int()
        cu = torch.cat((fewer.new_zeros(1), fewer.cumsum(0))).int()
        return layout.queries(int(cu[-1]), cu_seqlens_q=cu)
    keys = layout.modality.shape[1]
    rows = int(torch.randint(keys + 1, (), generator=g))
    return layout.queries(rows, torch.randint(keys - rows + 1, (layout.num_sequences,), generator=g).int())


def check(layout: ModalityLayout, queries: QueryRows, mask: mk.ModularMask, block_q: int, block_k: int) -> None:
    expected = mask.visible_to(layout, queries)
    expected = expected[None] if layout.packed else expected
    seen = blocks.sight(layout, queries, mask)
    lists = blocks.block_lists(seen, block_q, block_k)
    if expected.numel():
        right = theirs(expected, block_q, block_k)
        for name in LISTS:
            made = getattr(lists, name)
            assert made.dtype == torch.int32 and made.is_contiguous(), name
            assert torch.equal(made, getattr(right, name)), name
    for form in (seen, blocks.in_columns(seen)):
        if form is not None:
            assert torch.equal(written_out(blocks.mask_mod(blocks.readings(form)), *expected.shape), expected)


@pytest.mark.parametrize("seed", range(60))
def test_lists_are_those_of_create_block_mask(seed: int) -> None:
    g = generator(seed)
    layout = random_layout(g, most=(40, 150)[seed % 2])
    mask = random_mask(g, layout.num_roles)
    queries = layout.queries() if seed % 3 else random_rows(g, layout)
    block_q, block_k = ((4, 4), (8, 4), (16, 32), (128, 128))[seed % 4]
    check(layout, queries, mask, block_q, block_k)


def test_many_passes_are_looked_up() -> None:
    g = generator(5)
    m = 7
    rules = torch.randint(64, (m, m), generator=g).tolist()
    mask = mk.ModularMask(tuple(map(tuple, rules)))
    ids = torch.randint(-1, m, (2, 90), generator=g)
    layout = mk.segment_modalities(ids, num_modalities=m, steps=torch.arange(90).expand(2, 90) // 9)
    assert blocks.sight(layout, layout.queries(), mask).low.shape[0] > blocks.UNROLLED
    check(layout, layout.queries(), mask, 16, 8)


@pytest.mark.parametrize("packed", [False, True])
def test_one_run_of_columns_is_said_so(packed: bool) -> None:
    """Where no padding and no other keys stand inside what a row sees: the form that FLASH packs."""
    ids = torch.tensor([[-1, -1, 0, 0, 1, 1, 1, 0, 1, 0], [0, 1, 1, 0, 0, 0, 1, 1, -1, -1]])
    cu = torch.tensor([0, 10, 10, 20], dtype=torch.int32)
    layout = (
        mk.segment_modalities(ids.flatten(), num_modalities=2, cu_seqlens=cu) if packed else mk.segment_modalities(ids)
    )
    mask = mk.ModularMask.bidirectional_within(2, [1])
    found = blocks.in_columns(blocks.sight(layout, layout.queries(), mask))
    assert found is not None and found.low.shape[0] == 1 and not found.place.numel()
    block_mask = mask.to_block_mask(layout)
    seen = mask.visible(layout)[None] if packed else mask.visible(layout)
    assert torch.equal(written_out(block_mask.mask_mod, *seen.shape), seen)

    holes = ids.clone()
    holes[0, 5] = -1
    other = mk.segment_modalities(holes)
    assert blocks.in_columns(blocks.sight(other, other.queries(), mask)) is None
    only = mk.ModularMask.self_only(2)
    assert blocks.in_columns(blocks.sight(layout, layout.queries(), only)) is None


@pytest.mark.parametrize("size", [128, (256, 128), (64, 32)], ids=str)
def test_to_block_mask(size: int | tuple[int, int]) -> None:
    g = generator(1)
    ids = torch.randint(-1, 2, (2, 12), generator=g).repeat_interleave(25, 1)
    layout = mk.segment_modalities(ids, num_modalities=2)
    mask = mk.ModularMask.bidirectional_within(2, [1])
    block_mask = mask.to_block_mask(layout, 130, 70, block_size=size)
    pair = size if isinstance(size, tuple) else (size, size)
    right = theirs(mask.visible(layout, 130, 70), *pair)
    assert pair == block_mask.BLOCK_SIZE and block_mask.shape == right.shape
    for name in LISTS:
        assert torch.equal(getattr(block_mask, name), getattr(right, name)), name
    for bad in (0, -128, 12.5, (128, 0)):
        with pytest.raises((TypeError, ValueError), match="block_size"):
            mask.to_block_mask(layout, block_size=bad)  # type: ignore[arg-type]


def test_no_table_of_pairs() -> None:
    """Memory by tokens and tiles: a hundred thousand tokens, of which a table of pairs would need ten gigabytes."""
    length = 100_000
    ids = (torch.arange(length) // 777 % 3 == 1).long()
    layout = mk.segment_modalities(ids[None], num_modalities=2)
    mask = mk.ModularMask(mk.ModularMask.bidirectional_within(2, [1]).rules, window=2048)
    block_mask = mask.to_block_mask(layout)
    tiles = math.ceil(length / 128)
    assert block_mask.kv_indices.shape == (1, 1, tiles, tiles)
    met = (block_mask.kv_num_blocks + block_mask.full_kv_num_blocks)[0, 0]
    assert int(met.max()) <= 2048 // 128 + 2 + 777 // 128 and int(met.min()) >= 1
    assert int(met.sum()) == int((block_mask.q_num_blocks + block_mask.full_q_num_blocks).sum())
