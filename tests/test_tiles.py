"""Tile lists made by PyTorch, against the dense mask: which pairs are full, partial and absent, and their order."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import moda_kernels as mk
from moda_kernels.runtime import native
from moda_kernels.testing import generator, random_ids, random_layout, random_mask
from moda_kernels.tokens import tiles
from moda_kernels.tokens.layout import QueryRows

EMPTY, PARTIAL, FULL = 0, 1, 2


@pytest.fixture(autouse=True)
def in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "runs_on", lambda device: False)


def flat_mask(layout: mk.ModalityLayout, mask: mk.ModularMask, queries: QueryRows) -> Tensor:
    """The mask over the flattened batch: bool [query rows, tokens]."""
    seen = mask.visible_to(layout, queries)
    if layout.packed:
        return seen
    b, rows, keys = seen.shape
    flat = torch.zeros(b, rows, b, keys, dtype=torch.bool)
    for n in range(b):
        flat[n, :, n] = seen[n]
    return flat.view(b * rows, b * keys)


def kind_of(seen: Tensor, real: Tensor, query: list[int], key: list[int], block_q: int, block_k: int) -> int:
    """What a pair of tiles is, from the mask: only whole tiles without padding are full."""
    rows = slice(query[1], query[1] + query[2])
    pair = seen[rows, key[1] : key[1] + key[2]] & real[rows, None]
    if not bool(pair.any()):
        return EMPTY
    return FULL if bool(pair.all()) and (query[2], key[2]) == (block_q, block_k) else PARTIAL


def listed(lists: Tensor, counts: Tensor, tile: int) -> dict[int, int]:
    """Kinds by tile; each kind has to be ascending, unused entries zero."""
    full, every = counts[tile].tolist()
    entries = lists[tile, :every].tolist()
    assert not lists[tile, every:].any()
    assert entries[:full] == sorted(set(entries[:full])) and entries[full:] == sorted(set(entries[full:]))
    return {entry: FULL if i < full else PARTIAL for i, entry in enumerate(entries)}


def assert_covers(made: Tensor, cu_seqlens: Tensor, block: int) -> None:
    """Tiles cut every sequence into blocks, in order; unused ones are zero."""
    expected = []
    bounds = cu_seqlens.tolist()
    for n, (begin, end) in enumerate(pairwise(bounds)):
        expected += [[n, row, min(block, end - row)] for row in range(begin, end, block)]
    assert made[: len(expected)].tolist() == expected
    assert not made[len(expected) :].any()


def assert_lists(layout: mk.ModalityLayout, mask: mk.ModularMask, queries: QueryRows, bq: int, bk: int) -> None:
    made = tiles.tile_lists(layout, mask, bq, bk, queries)
    for name, t in vars(made).items():
        assert t.dtype == torch.int32, name
    assert_covers(made.query_tiles, queries.cu_seqlens, bq)
    assert_covers(made.key_tiles, layout.cu_seqlens, bk)
    assert made.overflow.tolist() == [0]
    seen, real = flat_mask(layout, mask, queries), queries.of(layout.modality).flatten() >= 0
    by_key: dict[int, dict[int, int]] = {j: {} for j in range(len(made.key_tiles))}
    for i, query in enumerate(made.query_tiles.tolist()):
        kinds = listed(made.key_lists, made.key_counts, i)
        for j, key in enumerate(made.key_tiles.tolist()):
            expected = kind_of(seen, real, query, key, bq, bk) if query[2] and key[2] else EMPTY
            assert kinds.get(j, EMPTY) == expected, f"query tile {query}, key tile {key}"
            if expected:
                by_key[j][i] = expected
    for j, expected_kinds in by_key.items():
        assert listed(made.query_lists, made.query_counts, j) == expected_kinds


def some_queries(layout: mk.ModalityLayout, g: torch.Generator) -> QueryRows:
    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=g))

    if layout.packed:
        if below(2):
            return layout.queries()
        cu_q = torch.tensor([0, *(below(n + 1) for n in layout.cu_seqlens.diff().tolist())]).cumsum(0).int()
        return layout.queries(int(cu_q[-1]), None, cu_q)
    keys = layout.modality.shape[1]
    rows = below(keys + 1)
    return layout.queries(rows, [None, below(keys - rows + 1)][below(2)])


@pytest.mark.parametrize("seed", range(150))
def test_random(seed: int) -> None:
    g = generator(seed)
    layout = random_layout(g, most=40, plain=True)
    mask = random_mask(g, layout.num_modalities, plain=True)
    bq, bk = (int(2 ** torch.randint(5, (), generator=g)) for _ in range(2))
    assert_lists(layout, mask, some_queries(layout, g), bq, bk)


@pytest.mark.parametrize("window", [None, 1, 7, 16, 30, 1000])
@pytest.mark.parametrize("blocks", [(8, 8), (16, 4), (4, 16), (5, 7)])
def test_windows(window: int | None, blocks: tuple[int, int]) -> None:
    g = generator(window or 0)
    ids = torch.stack([random_ids(63, 2, g, longest=12, padding=p) for p in ("middle", "none")])
    layout = mk.segment_modalities(ids, num_modalities=2)
    for rules in ([[1, 1], [1, 1]], [[1, 1], [1, 3]], [[3, 0], [4, 2]]):
        assert_lists(layout, mk.ModularMask(rules, window), layout.queries(), *blocks)


def test_work_grows_with_tiles_seen() -> None:
    """A causal mask over one document lists half of the square, and all but the diagonal as full."""
    layout = mk.segment_modalities(torch.zeros(1, 256, dtype=torch.long))
    made = tiles.tile_lists(layout, mk.ModularMask.causal(1), 16, 16)
    assert made.key_counts.tolist() == [[i, i + 1] for i in range(16)]
    assert made.query_counts.tolist() == [[15 - j, 16 - j] for j in range(16)]


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)])
def test_without_tokens(shape: tuple[int, int]) -> None:
    layout = mk.segment_modalities(torch.zeros(shape, dtype=torch.long))
    made = tiles.tile_lists(layout, mk.ModularMask.full(1), 8, 8)
    assert all(t.numel() == 0 or not t.any() for t in vars(made).values())


def test_all_padding_lists_nothing() -> None:
    layout = mk.segment_modalities(torch.full((2, 9), -1), num_modalities=2)
    made = tiles.tile_lists(layout, mk.ModularMask.full(2), 4, 4)
    assert not made.key_counts.any() and not made.query_counts.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_q": 0}, r"block_q: expected an int >= 1, got 0"),
        ({"block_k": 2.0}, r"block_k: expected an int, got 2.0"),
        ({"mask": mk.ModularMask.full(2)}, r"mask: expected 1 x 1 rules.*got 2 x 2"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    layout = mk.segment_modalities(torch.zeros(1, 4, dtype=torch.long))
    usual = {"layout": layout, "mask": mk.ModularMask.full(1), "block_q": 4, "block_k": 4}
    with pytest.raises((ValueError, TypeError), match=message):
        tiles.tile_lists(**(usual | arguments))


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    many = mk.segment_modalities(torch.zeros(1, 4, dtype=torch.long), num_modalities=17)
    with pytest.raises(ValueError, match=r"mask: expected at most 16 modalities.*got 17"):
        tiles.tile_lists(many, mk.ModularMask.full(17), 4, 4)
    monkeypatch.setattr(tiles, "MAX_TOKENS", 3)
    layout = mk.segment_modalities(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"layout: expected sequences of at most 3 tokens.*got 4 tokens"):
        tiles.tile_lists(layout, mk.ModularMask.full(1), 4, 4)
