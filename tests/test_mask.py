"""Masks: presets against tables written by hand, visibility and counts against loops, attention against FlexAttention
and dense SDPA, forward and gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import moda_kernels as mk
from moda_kernels.testing import generator, random_ids, random_layout, random_mask
from moda_kernels.tokens import intervals

H, P, S, A = 0, 1, 2, 4  # hidden, past, segment, all
M = mk.ModularMask

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


PRESETS = [
    (M.causal(2), [[P, P], [P, P]]),
    (M.full(2), [[A, A], [A, A]]),
    (M.full(1), [[A]]),
    (M.bidirectional_within(3, [1]), [[P, P, P], [P, P | S, P], [P, P, P]]),
    (M.bidirectional_within(3, (2, 0, 2)), [[P | S, P, P], [P, P, P], [P, P, P | S]]),
    (M.bidirectional_within(2, []), [[P, P], [P, P]]),
    (M.self_only(3), [[A, H, H], [H, A, H], [H, H, A]]),
    (M.self_only(2, causal=True), [[P, H], [H, P]]),
    (M.cross_only(3), [[H, A, A], [A, H, A], [A, A, H]]),
    (M.cross_only(2, causal=True), [[H, P], [P, H]]),
    (M.fusion(3, [2]), [[A, H, H], [H, A, H], [A, A, A]]),
    (M.fusion(3, [0, 2], causal=True), [[P, P, P], [H, P, H], [P, P, P]]),
]


@pytest.mark.parametrize(("mask", "rules"), PRESETS)
def test_presets(mask: M, rules: list[list[int]]) -> None:
    assert [list(map(int, row)) for row in mask.rules] == rules
    assert mask.window is None and mask.num_roles == len(rules)
    assert mask.rule_table(torch.device("cpu")).tolist() == rules
    assert mask == M(rules) and hash(mask) == hash(M(rules))


def test_flags() -> None:
    V = mk.Visibility
    assert (V.HIDDEN, V.PAST, V.SEGMENT, V.ALL) == (H, P, S, A)
    assert M([[V.PAST | V.SEGMENT]]).rules == ((V(3),),)


def test_visible_of_a_worked_example() -> None:
    # text text image image | image (another item) text, and padding
    layout = mk.segment_modalities(
        torch.tensor([[0, 0, 1, 1, 1, 0, -1]]), item_ids=torch.tensor([[0, 0, 1, 1, 2, 0, 0]])
    )
    assert M.bidirectional_within(2, [1]).visible(layout)[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]
    assert M([[P, H], [S | P, S]], window=2).visible(layout)[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0],  # the second text token is at distance 1, the first at 2
        [0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]


def test_a_mask_prints_itself() -> None:
    V = mk.Visibility
    mask = M([[V.SEGMENT, V.BEFORE], [V.HIDDEN, V.UPTO | V.PAST]], window=9, window_on="all")
    assert str(mask).splitlines() == [
        "ModularMask: query role × key role, a window of 9 on all",
        "   0        1",
        "0  SEGMENT  BEFORE",
        "1  -        PAST|UPTO",
    ]
    assert str(M.causal(1)).splitlines() == ["ModularMask: query role × key role", "   0", "0  PAST"]


def test_show() -> None:
    layout = mk.segment_modalities(
        torch.tensor([[0, 0, 0, 0], [0, 0, -1, 1]]),
        roles=torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0]]),
        steps=torch.tensor([[0, 0, 0, 0], [0, 7, 0, 9]]),
        chunks=torch.tensor([[-1, -1, -1, -1], [-1, 4, 4, 4]]),
    )
    mask = M([[S, 8], [H, 16]])
    assert mask.show(layout, 1).splitlines() == [
        "modality  0 0   1",
        "role      1 1   0",
        "step      0 1   2",
        "chunk     - 0   0",
        "       1  ■ ·   ·",
        "       1  ■ ■   ·",
        "",
        "       0  ■ ■   ■",
    ]
    packed = mk.segment_modalities(torch.tensor([1, 0, 0, 0, 1, 1]), cu_seqlens=torch.tensor([0, 1, 6]))
    assert M.causal(2).show(packed, 1, width=3).splitlines() == [
        "modality  0 * 1",
        "       0  □ · ·",
        "       *  ■ □ ·",
        "       1  ■ ■ ■",
        "(2 tokens a mark: ■ all, □ some, · none)",
    ]
    for bad in (2, -1):
        with pytest.raises(ValueError, match=rf"sequence: expected an int from 0 to 1, got {bad}"):
            mask.show(layout, bad)
    with pytest.raises(ValueError, match="mask: expected 2 x 2 rules"):
        M.causal(3).show(layout)


# Loops


def visible_by_hand(layout: mk.ModalityLayout, mask: M, columns: Tensor) -> Tensor:
    """bool [query rows, tokens] over the flattened batch, one pair at a time."""
    n, m, p, s = (t.flatten().tolist() for t in (layout.sequence, layout.modality, layout.position, layout.segment))
    seen = torch.zeros(columns.numel(), layout.num_tokens, dtype=torch.bool)
    for row, i in enumerate(columns.flatten().tolist()):
        for j in range(layout.num_tokens):
            if n[i] != n[j] or m[i] == -1 or m[j] == -1:
                continue
            rule = mask.rules[m[i]][m[j]]
            near = mask.window is None or p[i] - p[j] < mask.window
            seen[row, j] = bool((rule & P and p[j] <= p[i] and near) or (rule & S and s[i] == s[j]) or rule & A)
    return seen


def random_queries(layout: mk.ModalityLayout, g: torch.Generator) -> dict[str, Any]:
    """Arguments of `ModalityLayout.queries`, in half the cases for all rows."""
    if int(torch.randint(2, (), generator=g)):
        return {}
    if layout.packed:
        counts = [int(torch.randint(n + 1, (), generator=g)) for n in layout.cu_seqlens.diff().tolist()]
        return {"query_length": sum(counts), "cu_seqlens_q": torch.tensor([0, *counts]).cumsum(0).int()}
    keys = layout.modality.shape[1]
    rows = int(torch.randint(keys + 1, (), generator=g))
    starts = [None, (keys - rows) // 2, torch.randint(keys - rows + 1, (layout.num_sequences,), generator=g)]
    return {"query_length": rows, "query_start": starts[int(torch.randint(3, (), generator=g))]}


@pytest.mark.parametrize("seed", range(150))
def test_visible_and_counts_against_loops(seed: int) -> None:
    g = generator(seed)
    layout = random_layout(g, most=20, plain=True)
    mask = random_mask(g, layout.num_modalities, plain=True)
    queries = layout.queries(**random_queries(layout, g))
    expected = visible_by_hand(layout, mask, queries.columns)
    seen = mask.visible_to(layout, queries)
    if layout.packed:
        assert torch.equal(seen, expected)
    else:
        b, keys = layout.modality.shape
        blocks = expected.view(b, -1, b, keys) if expected.numel() else expected.view(*seen.shape[:2], b, keys)
        assert torch.equal(seen, torch.stack([blocks[n, :, n] for n in range(b)]) if b else seen)
        assert int(seen.sum()) == int(expected.sum())
    one_hot = layout.modality.flatten()[:, None] == torch.arange(layout.num_modalities)
    counts = expected.int() @ one_hot.int()
    got = mask.count_visible(layout, queries)
    assert got.dtype == torch.int32 and torch.equal(got.view(counts.shape), counts)


def test_counts_at_full_size() -> None:
    g = generator(0)
    ids = torch.stack([random_ids(700, 3, g, longest=90, padding=p) for p in ("middle", "left")])
    layout = mk.segment_modalities(ids)
    for mask in (M.bidirectional_within(3, [1]), M([[P, S, A], [P | S, H, P], [A, P, P | S]], window=50)):
        seen = mask.visible(layout)
        expected = torch.stack([(seen & (ids == b)[:, None]).sum(-1) for b in range(3)], -1)
        assert torch.equal(mask.count_visible(layout, layout.queries()).long(), expected)


# Other people's attention


def sdpa(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Dense SDPA; rows that see nothing made 0 (SDPA's own answer there differs by version and kernel)."""
    blind = ~seen.any(-1)[:, None, :, None]
    out = F.scaled_dot_product_attention(q, k, v, (seen | ~seen.any(-1, keepdim=True))[:, None], enable_gqa=True)
    return torch.where(blind, 0, out)


def flex(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Tensor:
    out = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("seed", range(18))
def test_attention_agrees_with_flex_and_sdpa(seed: int, dtype: torch.dtype) -> None:
    g = generator(seed)
    packed = seed % 3 == 0
    layout = random_layout(g, most=63, packed=packed, plain=True)
    while layout.num_tokens == 0:
        layout = random_layout(g, most=63, packed=packed, plain=True)
    m = layout.num_modalities
    presets = [M.causal(m), M.full(m), M.bidirectional_within(m, [m - 1]), M.fusion(m, [0], causal=True)]
    mask = random_mask(g, m, plain=True) if seed % 2 else presets[seed // 2 % 4]
    rows = where = {}
    keys = layout.modality.shape[-1]
    if not packed and seed % 4 < 2:  # fewer queries
        length = max(keys // 2, 1)
        start = [None, (keys - length) // 2, torch.randint(keys - length + 1, (layout.num_sequences,), generator=g)]
        where = {"query_start": start[seed % 3]}
        rows = {"query_length": length, **where}
    count, n = rows.get("query_length", keys), layout.num_sequences
    shapes = [(count, 4, 8), (keys, 2, 8), (keys, 2, 8)]
    shapes = shapes if packed else [(n, h, length, d) for length, h, d in shapes]
    q, k, v = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes)

    out = mk.moda_attention(q, k, v, layout=layout, mask=mask, enable_gqa=True, backend="reference", **where)
    upstream = torch.randn(out.shape, generator=g, dtype=torch.float64).to(dtype)
    grads = torch.autograd.grad(out, (q, k, v), upstream)
    batch = [x.transpose(0, 1)[None] if packed else x for x in (q, k, v)]
    seen = mask.visible(layout, **rows)
    seen = seen[None] if packed else seen
    block_mask = mask.to_block_mask(layout, **rows)
    tolerance = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 2e-5}
    theirs = sdpa(*batch, seen)
    theirs = theirs[0].transpose(0, 1) if packed else theirs
    torch.testing.assert_close(out, theirs, **tolerance)
    torch.testing.assert_close(grads, torch.autograd.grad(theirs, (q, k, v), upstream), **tolerance)

    # FlexAttention has no backward on the CPU: its slope along a random direction instead.
    def flexed(step: float) -> Tensor:
        moved = [x.detach() + step * d for x, d in zip(batch, directions, strict=True)]
        result = flex(*moved, block_mask)
        return result[0].transpose(0, 1) if packed else result

    directions = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(dtype) for x in batch]
    torch.testing.assert_close(out.detach(), flexed(0.0), **tolerance)
    if dtype == torch.float64:
        slope = ((flexed(1e-5) - flexed(-1e-5)) * upstream).sum() / 2e-5
        along = [d[0].transpose(0, 1) if packed else d for d in directions]
        expected = torch.stack([(grad * d).sum() for grad, d in zip(grads, along, strict=True)]).sum()
        torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", [1, 127, 129, 300])
def test_block_mask_is_the_mask(length: int) -> None:
    g = generator(length)
    layout = mk.segment_modalities(random_ids(length, 2, g, longest=60, padding="middle")[None], num_modalities=2)
    mask = M.bidirectional_within(2, [1])
    block_mask = mask.to_block_mask(layout)
    rows = torch.arange(length)
    dense = block_mask.mask_mod(torch.zeros(1).long(), torch.zeros(1).long(), rows[:, None], rows[None, :])
    assert torch.equal(dense, mask.visible(layout)[0])
    # What it leaves out sees nothing.
    blocks = F.pad(mask.visible(layout)[0], (0, -length % 128, 0, -length % 128)).unflatten(0, (-1, 128))
    assert torch.equal(block_mask.to_dense()[0, 0].bool(), blocks.unflatten(2, (-1, 128)).any(3).any(1))


def test_mask_of_another_size() -> None:
    layout = mk.segment_modalities(torch.tensor([[0, 1]]))
    for ask in (
        lambda: M.causal(3).visible(layout),
        lambda: M.causal(3).to_block_mask(layout),
        lambda: M.causal(3).count_visible(layout, layout.queries()),
    ):
        with pytest.raises(ValueError, match=r"mask: expected 2 x 2 rules.*got 3 x 3"):
            ask()


def test_numbers_of_rules_are_those_of_their_names() -> None:
    numbers = {name: value for name, value in vars(intervals._V).items() if name.isupper()}
    assert numbers == {"HIDDEN": 0} | {flag.name: flag.value for flag in mk.Visibility}
