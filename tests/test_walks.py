"""Walks of tiles against the dense mask: each visible pair is met once, without masks only where none is needed."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moda_kernels as mk
from moda_kernels.commands.bench.layouts import LAYOUTS, make_workload
from moda_kernels.testing import generator, random_layout, random_mask
from moda_kernels.tokens import tiles, walks
from moda_kernels.tokens.intervals import ends_of, intervals_of, passes_of
from moda_kernels.tokens.layout import QueryRows
from moda_kernels.tokens.tiles import MaskTiles
from moda_kernels.tokens.walks import KeyWalk, QueryWalk

FAR = 2**31 - 1
BLOCKS = ((16, 16), (32, 16), (16, 32), (8, 32), (5, 7))


@dataclass
class Case:
    """Intervals with the sequences that they are of."""

    limits: Tensor  # int32, as `Intervals` has them
    positions: Tensor  # int32 [P, keys]
    real: Tensor  # bool [rows]
    cu_q: Tensor
    cu_k: Tensor
    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]

    def query_walk(self, block_q: int, block_k: int, affine: bool = False) -> QueryWalk:
        return walks.query_walk(self.limits, self.positions, self.real, self.cu_q, self.cu_k, self.q_shape,
                                self.k_shape, block_q, block_k, affine)  # fmt: skip

    def key_walk(self, block_q: int, block_k: int, chains: int = walks.CHAINS) -> KeyWalk:
        return walks.key_walk(self.limits, self.positions, self.cu_q, self.cu_k, self.q_shape, self.k_shape,
                              block_q, block_k, chains)  # fmt: skip

    def seen(self, walk: int) -> Tensor:
        """bool ``[rows, keys]``: what a walk makes visible."""
        ends = (end.flatten(0, 1)[walk] for end in ends_of(self.limits, len(self.positions)))
        (lo, hi), position = ends, self.positions[walk // intervals_of(self.limits, len(self.positions))]
        rows, keys = (
            torch.repeat_interleave(torch.arange(len(cu) - 1), cu.diff().long()) for cu in (self.cu_q, self.cu_k)
        )
        inside = (position > lo[:, None]) & (position <= hi[:, None]) & (position >= 0)
        return inside & (rows[:, None] == keys)


def stored(limits: Tensor) -> Tensor:
    """Limits ``[P, I, 2, rows]`` as `Intervals` has them; second intervals begin where the first of them does."""
    if limits.shape[1] == 1:
        return limits.flatten(0, 2).int()
    if not len(limits):
        return torch.full((1, limits.shape[3]), -1, dtype=torch.int32)
    floor = limits[:, 1, 0].amin(0)
    last = torch.where(limits[:, 1, 0] < limits[:, 1, 1], limits[:, 1, 1], -2)
    return torch.cat((floor[None], torch.cat((limits[:, 0], last[:, None]), 1).flatten(0, 1))).int()


def random_case(seed: int, longest: int = 300) -> Case:
    """Runs of tokens of up to four roles, padding anywhere; a pass a role, or one of some of them. A third: intervals
    that rise along each role, in their own way; a third: that and rows without any; a third: intervals at random."""
    g = generator(seed)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=g))

    roles, packed, kind = 1 + below(4), below(2) == 1, seed % 3
    lengths = [below(longest) for _ in range(1 + below(4))]
    if packed:
        lengths += [0] * below(3)
    else:
        lengths = lengths[:1] * len(lengths)
    total = sum(lengths)
    role = torch.repeat_interleave(
        torch.randint(-1 if below(2) else 0, roles, (total + 1,), generator=g),
        torch.randint(1, 60, (total + 1,), generator=g),
    )[:total]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    real = role >= 0
    before = F.pad(real.cumsum(0), (1, 0))
    position = torch.where(real, before[:-1] - before[cu[sequence].long()], -1)
    groups = [[r] for r in range(roles)] if below(2) else [list(range(1 + below(roles)))]
    positions = torch.stack([torch.where(torch.isin(role, torch.tensor(group)), position, -1) for group in groups])

    two = below(2) == 1
    limits = torch.empty(len(groups), 2, 2, total, dtype=torch.int64)
    for of_pass in limits:
        if kind == 2:
            ends = torch.randint(-1, longest, (4, total), generator=g).sort(0).values
            of_pass.copy_(torch.stack((ends[2:], ends[:2])))
            continue
        for r in range(roles):
            # From the far past, a window or the row itself, to the row, a stretch ahead, or the end; perhaps a prefix.
            reach, ahead = (FAR, 1 + below(90))[below(2)], (0, below(90), FAR)[below(3)]
            step = 1 + below(50)
            lo = (position - reach).clamp(min=-1) // step * step if below(2) else (position - reach).clamp(min=-1)
            hi = (position + ahead).clamp(max=FAR)
            prefix = torch.minimum(position // step * step - 1 - below(30), lo)
            ends = torch.stack((torch.stack((lo, hi)), torch.stack((torch.full_like(lo, -1), prefix))))
            if kind == 1 and below(3) == 0:
                ends[:] = 0
            of_pass[..., role == r] = ends[..., role == r]
    empty = (limits[:, :, :1] >= limits[:, :, 1:]) | ~real
    limits = stored(torch.where(empty, torch.tensor([FAR, -2])[:, None], limits)[:, : 1 + two])
    shape = (total,) if packed else (len(lengths), lengths[0])
    case = Case(limits, positions.int(), real, cu, cu, shape, shape)
    return case if below(3) else fewer_queries(case, g)


def fewer_queries(case: Case, g: torch.Generator) -> Case:
    """The last rows of each sequence are the queries; in a batch as many in each."""
    lengths = case.cu_k.diff()
    rows = (lengths * torch.rand(len(lengths), generator=g)).int()
    if len(case.k_shape) == 2:
        rows = rows[:1].expand(len(lengths))
    kept = torch.cat([torch.arange(int(end - n), int(end)) for end, n in zip(case.cu_k[1:], rows, strict=True)])
    cu_q = F.pad(rows.cumsum(0), (1, 0)).int()
    shape = (len(kept),) if len(case.k_shape) == 1 else (len(lengths), int(rows[0]))
    return Case(
        case.limits[..., kept].contiguous(), case.positions, case.real[kept], cu_q, case.cu_k, shape, case.k_shape
    )


def assert_cut(tiles: Tensor, cu: Tensor, block: int) -> None:
    """Tiles cut every sequence into blocks, in order; unused ones are zero."""
    expected = []
    for n, (begin, end) in enumerate(zip(cu.tolist(), cu[1:].tolist(), strict=False)):
        expected += [[n, row, min(block, end - row)] for row in range(begin, end, block)]
    made = tiles.tolist()
    assert [tile for tile in made if tile[2]] == expected
    assert all(tile == [0, 0, 0] for tile in made if not tile[2])


def members(tiles: Tensor, count: int) -> Tensor:
    """float ``[tiles, count]``: which rows or keys are in a tile."""
    number = torch.arange(count)
    return ((number >= tiles[:, 1:2]) & (number < tiles[:, 1:2] + tiles[:, 2:])).float()


@dataclass
class Truth:
    """Pairs of tiles ``[Q, K]`` of a walk: some pair is visible; every row that is no padding sees a whole key tile;
    every row of a whole query tile does."""

    some: Tensor
    whole_but_padding: Tensor
    whole: Tensor


def truth(case: Case, walk: int, q_tiles: Tensor, k_tiles: Tensor, block_q: int, block_k: int) -> Truth:
    seen, rows, keys = case.seen(walk), members(q_tiles, len(case.real)), members(k_tiles, case.positions.shape[1])
    pairs = rows @ seen.float() @ keys.T
    of_real = (rows * case.real) @ seen.float() @ keys.T
    full_keys = (k_tiles[:, 2] == block_k)[None]
    real = (rows * case.real).sum(1, keepdim=True)
    return Truth(
        pairs > 0,
        full_keys & (of_real == real * block_k) & (pairs > 0),
        full_keys & (q_tiles[:, 2:] == block_q) & (pairs == block_q * block_k),
    )


def index_of(tiles: Tensor, cu: Tensor) -> dict[tuple[int, int], int]:
    """A tile's number by sequence and first token in it."""
    return {(n, first - int(cu[n])): i for i, (n, first, count) in enumerate(tiles.tolist()) if count}


def met_by_queries(
    case: Case, made: QueryWalk, k_tiles: Tensor, walk: int, block_k: int, affine: bool
) -> tuple[Tensor, Tensor]:
    """How often each pair of tiles is met without and with masks, ``[Q, K]``."""
    plain, masked = (torch.zeros(len(made.tiles), len(k_tiles), dtype=torch.int) for _ in range(2))
    intervals = intervals_of(case.limits, len(case.positions))
    listed, index = made.key_lists[walk // intervals].tolist(), index_of(k_tiles, case.cu_k)
    for i, ((n, _, count), runs) in enumerate(zip(made.tiles.tolist(), made.runs[walk].tolist(), strict=True)):
        assert count or not any(runs)
        for number, (begin, end) in enumerate(zip(runs[::2], runs[1::2], strict=True)):
            assert begin <= end
            for j in range(begin, end):
                column = j * block_k if affine and number == 0 else listed[j]
                (masked if number else plain)[i, index[n, column]] += 1
    return plain, masked


def met_by_keys(case: Case, made: KeyWalk, q_tiles: Tensor, walk: int, chains: int) -> tuple[Tensor, Tensor]:
    plain, masked = (torch.zeros(len(q_tiles), len(made.tiles), dtype=torch.int) for _ in range(2))
    listed, index = made.query_lists[walk].tolist(), index_of(q_tiles, case.cu_q)
    for j, ((n, _, count), runs) in enumerate(zip(made.tiles.tolist(), made.runs[walk].tolist(), strict=True)):
        pairs = list(zip(runs[::2], runs[1::2], strict=True))
        assert len(pairs) == 2 * chains + 2 and all(begin <= end for begin, end in pairs)
        assert count or all(begin == end for begin, end in pairs)
        for into, some in ((masked, pairs), (plain, [(runs[4 * c + 1], runs[4 * c + 2]) for c in range(chains)])):
            for begin, end in some:
                assert begin <= end
                for i in range(begin, end):
                    into[index[n, listed[i]], j] += 1
    return plain, masked


def assert_longest_first(order: Tensor, work: Tensor) -> None:
    assert sorted(order.tolist()) == list(range(len(work)))
    level = (work.long() * (walks.LEVELS - 1) // max(1, int(work.max()))).tolist() if len(work) else []
    assert order.tolist() == sorted(range(len(work)), key=lambda i: -level[i])


@dataclass
class Count:
    exact: int = 0
    of_queries: int = 0
    of_keys: int = 0
    whole: int = 0
    whole_of_keys: int = 0
    whole_of_queries: int = 0


def check(case: Case, block_q: int, block_k: int, affine: bool = False, chains: int = walks.CHAINS) -> Count:
    made = case.query_walk(block_q, block_k, affine), case.key_walk(block_q, block_k, chains)
    return check_made(case, *made, block_q, block_k, affine, chains)


def check_made(
    case: Case, of_queries: QueryWalk, of_keys: KeyWalk, block_q: int, block_k: int, affine: bool, chains: int
) -> Count:
    """Both directions against the dense mask."""
    assert all(t.dtype == torch.int32 and t.is_contiguous() for t in (*of_queries, *of_keys))
    assert_cut(of_queries.tiles, case.cu_q, block_q)
    assert_cut(of_keys.tiles, case.cu_k, block_k)
    count = Count()
    work_q, work_k = (torch.zeros(len(t), dtype=torch.int) for t in (of_queries.tiles, of_keys.tiles))
    for walk in range(len(of_queries.runs)):
        true = truth(case, walk, of_queries.tiles, of_keys.tiles, block_q, block_k)
        plain, masked = met_by_queries(case, of_queries, of_keys.tiles, walk, block_k, affine)
        t_plain, t_masked = met_by_keys(case, of_keys, of_queries.tiles, walk, chains)
        for name, p, m, whole in (
            ("queries", plain, masked, true.whole_but_padding),
            ("keys", t_plain, t_masked, true.whole),
        ):
            assert ((p + m) <= 1).all(), f"{name}: met twice"
            assert (true.some <= (p + m > 0)).all(), f"{name}: a visible pair is missed"
            assert ((p > 0) <= whole).all(), f"{name}: masks left out of a tile that is not whole"
        if not affine:
            assert (true.whole <= (plain > 0)).all(), "queries: masks in a whole tile"
        work_q += (plain + masked).sum(1)
        work_k += (t_plain + t_masked).sum(0)
        count.exact += int(true.some.sum())
        count.whole += int(true.whole.sum())
        count.of_queries += int((plain + masked).sum())
        count.of_keys += int((t_plain + t_masked).sum())
        count.whole_of_queries += int((plain > 0).logical_and(true.whole).sum())
        count.whole_of_keys += int(t_plain.sum())
    assert_longest_first(of_queries.order, work_q)
    assert_longest_first(of_keys.order, work_k)
    return count


@pytest.mark.parametrize("seed", range(90))
def test_random_intervals(seed: int) -> None:
    check(random_case(seed), *BLOCKS[seed % 5], affine=seed % 4 == 1, chains=1 + seed % 3)


# Of masks


def of_mask(layout: mk.ModalityLayout, queries: QueryRows, made: MaskTiles) -> Case:
    real = (queries.of(layout.modality) >= 0).flatten()
    return Case(made.limits, made.positions, real, queries.cu_seqlens, layout.cu_seqlens, queries.shape,
                tuple(layout.modality.shape))  # fmt: skip


def check_mask(
    layout: mk.ModalityLayout, mask: mk.ModularMask, queries: QueryRows, blocks: tuple[int, int], **passes: bool
) -> Count:
    """The walks of a mask: together they meet what it makes visible, each pair once."""
    made = tiles.mask_tiles(layout, mask, *blocks, queries, **passes)
    assert made.queries is not None and made.keys is not None
    case = of_mask(layout, queries, made)
    met = torch.zeros(len(case.real), layout.num_tokens, dtype=torch.int)
    for walk in range(len(made.queries.runs)):
        met += case.seen(walk)
    seen = mask.visible_to(layout, queries)
    if not layout.packed:
        seen = torch.block_diag(*seen.int()) if len(seen) else torch.zeros(0, 0)
    assert torch.equal(met, seen.int().view(met.shape))
    return check_made(case, made.queries, made.keys, *blocks, is_affine(layout, mask, passes), walks.CHAINS)


def is_affine(layout: mk.ModalityLayout, mask: mk.ModularMask, passes: dict[str, bool]) -> bool:
    """Whether every key is in the only pass, whatever the data."""
    (only, *others) = passes_of(layout, mask, **passes).passes or (None,)
    return not others and only is not None and only.modality is None and len(only.roles) == layout.num_roles


def some_queries(layout: mk.ModalityLayout, g: torch.Generator) -> QueryRows:
    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=g))

    if layout.packed:
        cu_q = torch.tensor([0, *(below(n + 1) for n in layout.cu_seqlens.diff().tolist())]).cumsum(0).int()
        return layout.queries(int(cu_q[-1]), None, cu_q)
    keys = layout.modality.shape[1]
    rows = below(keys + 1)
    return layout.queries(rows, [None, below(keys - rows + 1)][below(2)])


def test_random_masks() -> None:
    """200 layouts and masks with all that there is. What is met in vain: less than one of a hundred."""
    exact = of_queries = of_keys = whole = found = 0
    for seed in range(200):
        g = generator(seed)
        layout = random_layout(g, most=(40, 200)[seed % 2])
        mask = random_mask(g, layout.num_roles)
        queries = some_queries(layout, g) if seed % 3 == 0 else layout.queries()
        passes = {"split": seed % 5 == 0, "by_modality": seed % 5 == 1}
        count = check_mask(layout, mask, queries, BLOCKS[seed % len(BLOCKS)], **passes)
        exact += count.exact
        of_queries += count.of_queries
        of_keys += count.of_keys
        whole += count.whole
        found += count.whole_of_keys
    assert exact > 10_000 and whole > 500
    assert of_queries < 1.01 * exact and of_keys < 1.01 * exact, (exact, of_queries, of_keys)
    assert found > 0.98 * whole, (found, whole)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_the_benchmark_meet_nothing_in_vain(name: str) -> None:
    workload = make_workload(name, 1600)
    for mask in (workload.mask, mk.ModularMask([[1, 1], [8, 2]]), mk.ModularMask.bidirectional_within(2, [1])):
        for passes in ({}, {"split": True}):
            count = check_mask(workload.layout, mask, workload.layout.queries(), (128, 64), **passes)
            assert count.of_queries == count.of_keys == count.exact
            assert count.whole_of_keys == count.whole


def test_mask_tiles_are_remembered_and_made_as_asked() -> None:
    layout = mk.segment_modalities(torch.tensor([[0, 0, 1, 1, 0, -1, 1]]), num_modalities=2)
    mask = mk.ModularMask.bidirectional_within(2, [1])
    made = tiles.mask_tiles(layout, mask, 4, 2)
    assert made.queries is not None and made.keys is not None
    again = tiles.mask_tiles(layout, mask, 4, 2, of_keys=False)
    assert again.queries is made.queries and again.keys is None and again.limits is made.limits
    assert tiles.mask_tiles(layout, mask, 4, 4).queries is not made.queries
    # One pass with all keys is affine, so the first pair are numbers of tiles. Row 0 sees no tile whole; rows 4 to 6 (5
    # is padding) see the first two, and of the last two, with padding and with a key too few, what masks leave.
    assert made.queries.runs.tolist() == [[[0, 0, 0, 0, 0, 0, 0, 2], [0, 2, 0, 0, 0, 0, 2, 4]]]
    split = tiles.mask_tiles(layout, mask, 4, 2, split=True)
    assert split.queries is not None and len(split.queries.runs) == 4


@pytest.mark.parametrize("seed", range(20))
def test_decode_tiles(seed: int) -> None:
    g = generator(seed)
    layout = random_layout(g)
    queries = some_queries(layout, g)
    made = tiles.decode_tiles(queries, 1 + seed % 9)
    assert made.dtype == torch.int32
    assert_cut(made, queries.cu_seqlens, 1 + seed % 9)
    assert tiles.decode_tiles(queries, 1 + seed % 9) is made


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)])
def test_without_tokens(shape: tuple[int, int]) -> None:
    layout = mk.segment_modalities(torch.zeros(shape, dtype=torch.long))
    for made in tiles.mask_tiles(layout, mk.ModularMask.full(1), 8, 8)[2:]:
        assert made is not None and not any(bool(t.any()) for t in made)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_q": 0}, r"block_q: expected an int from 1 to 65536, got 0"),
        ({"block_k": 2.0}, r"block_k: expected an int, got 2.0"),
        ({"mask": mk.ModularMask.full(2)}, r"mask: expected 1 x 1 rules.*got 2 x 2"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    layout = mk.segment_modalities(torch.zeros(1, 4, dtype=torch.long))
    usual = {"layout": layout, "mask": mk.ModularMask.full(1), "block_q": 4, "block_k": 4}
    with pytest.raises((ValueError, TypeError), match=message):
        tiles.mask_tiles(**(usual | arguments))


@pytest.mark.parametrize(
    ("rules", "passes", "intervals"),
    [
        ([[1, 1, 1], [1, 3, 1], [1, 1, 1]], 1, 1),
        ([[1, 1, 8], [1, 3, 8], [1, 1, 10]], 2, 2),
        ([[1, 8, 8], [1, 16, 8], [1, 8, 16]], 3, 1),
        ([[10, 1, 16], [8, 10, 1], [1, 16, 10]], 3, 2),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("blocks", [(128, 64), (64, 128), (64, 64)])
def test_memory_of_a_million_tokens(
    rules: list[list[int]], passes: int, intervals: int, packed: bool, blocks: tuple[int, int]
) -> None:
    """Beside 4 GiB of keys and values (8 heads of 128 in 16 bits): at most 64 MiB, both directions together."""
    tokens = 2**20
    ids = torch.arange(tokens) // 700 % 3
    bounds = torch.arange(0, tokens + 1, 2**17, dtype=torch.int32) if packed else None
    layout = mk.segment_modalities(
        ids if packed else ids[None], num_modalities=3, steps=None, cu_seqlens=bounds, max_segments=1600
    )
    made = tiles.mask_tiles(layout, mk.ModularMask(rules), *blocks)
    assert made.limits.shape == (2 * passes if intervals == 1 else 1 + 3 * passes, tokens)
    assert made.queries is not None and made.keys is not None
    size = sum(t.nbytes for t in (made.limits, made.positions, *made.queries, *made.keys))
    assert size <= 64 * 2**20
    of_walks = sum(t.nbytes for t in (*made.queries, *made.keys))
    assert of_walks <= tokens // 64 * 144 * passes * intervals  # linear in tiles


def test_memory_is_linear_in_tokens() -> None:
    """All tables of both directions, at the blocks of the kernels: 12 bytes a token for every pass of one interval, of
    two 16 and 4 for all; and under 2 for each of its walks' tiles."""
    see = mk.Visibility
    near = see.BEFORE | see.SEGMENT
    rules = ((near, see.PAST, see.UPTO), (see.BEFORE, near, see.PAST), (see.PAST, see.UPTO, near))
    for mask, walks_of_pass, passes in ((mk.ModularMask.causal(3), 1, 1), (mk.ModularMask(rules), 2, 3)):
        for length in (4096, 16384):
            ids = (torch.arange(length) // 64 % 3)[None]
            layout = mk.segment_modalities(ids, num_modalities=3, max_segments=length // 64)
            forward = tiles.mask_tiles(layout, mask, 128, 64, of_keys=False)
            backward = tiles.mask_tiles(layout, mask, 64, 128, of_queries=False)
            assert forward.queries is not None and backward.keys is not None
            assert (len(forward.positions), intervals_of(forward.limits, passes)) == (passes, walks_of_pass)
            made = (forward.limits, forward.positions, *forward.queries, *backward.keys)
            most = 4 * (walks_of_pass - 1) + passes * (8 + 4 * walks_of_pass + 2 * walks_of_pass)
            assert sum(t.numel() * t.element_size() for t in made) <= most * length
