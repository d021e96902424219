"""Intervals: every rule, token by token from the specification, against the few numbers that all else is made from."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import moda_kernels as mk
from moda_kernels.testing import generator, random_ids
from moda_kernels.tokens.intervals import (
    FAR,
    NOTHING,
    Intervals,
    Pass,
    ends_of,
    intervals_of,
    limits_shape,
    make_passes,
    mask_intervals,
    passes_of,
)

H, P, S, A, B, U, C = 0, 1, 2, 4, 8, 16, 32  # hidden, past, segment, all, before, upto, chunk
M = mk.ModularMask


# The definition


def segments_and_chunks(ids: list[Any], bounds: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Segment, chunk and position of each token (spec: "Tokens"); ids: (modality, role, item, chunk id)."""
    segment, chunk, position = ([-1] * len(ids) for _ in range(3))
    runs = itertools.count()
    for begin, end in itertools.pairwise(bounds):
        real = None
        for t in range(begin, end):
            if ids[t][0] < 0:
                continue
            same = t > begin and ids[t - 1][:3] == ids[t][:3]
            segment[t] = segment[t - 1] if same else next(runs)
            position[t] = 0 if real is None else position[real] + 1
            if ids[t][3] >= 0:
                chunk[t] = chunk[real] if real is not None and ids[real][3] == ids[t][3] else next(runs)
            real = t
    return segment, chunk, position


def sees(rule: int, i: dict[str, int], j: dict[str, int], mask: M) -> bool:
    """Whether i sees j, word by word (spec: "Modular mask")."""
    if i["sequence"] != j["sequence"] or i["modality"] < 0 or j["modality"] < 0:
        return False
    distance = i["position"] - j["position"]
    if mask.window is not None and distance >= mask.window:
        if mask.window_on == "all":
            return False
        rule &= ~(P | C)
    return bool(
        (rule & P and distance >= 0)
        or (rule & S and i["segment"] == j["segment"])
        or (rule & B and j["step"] < i["step"])
        or (rule & U and j["step"] <= i["step"])
        or (rule & C and i["chunk"] == j["chunk"] and i["chunk"] >= 0 and distance >= 0)
        or rule & A
    )


def tokens_of(given: dict[str, Tensor | None], cu_seqlens: Tensor) -> list[dict[str, int]]:
    ids, bounds = given["modality"], cu_seqlens.tolist()
    assert ids is not None
    names = ("modality", "role", "item", "chunk", "step")
    flat = {n: None if given.get(n) is None else given[n].flatten().tolist() for n in names}  # type: ignore[union-attr]
    modality = flat["modality"]
    count = len(modality)
    role = flat["role"] or modality
    item, chunk_ids, step = flat["item"] or [0] * count, flat["chunk"] or [-1] * count, flat["step"] or [0] * count
    facts = list(zip(modality, role, item, chunk_ids, strict=True))
    segment, chunk, position = segments_and_chunks(facts, bounds)
    sequence = [n for n, (a, b) in enumerate(itertools.pairwise(bounds)) for _ in range(a, b)]
    keys = ("modality", "role", "segment", "chunk", "position", "step", "sequence")
    values = zip(modality, role, segment, chunk, position, step, sequence, strict=True)
    return [dict(zip(keys, v, strict=True)) for v in values]


def dense(tokens: list[dict[str, int]], mask: M, columns: Tensor) -> Tensor:
    """bool [query rows, tokens] over the flattened batch."""
    seen = torch.zeros(columns.numel(), len(tokens), dtype=torch.bool)
    for row, i in enumerate(columns.flatten().tolist()):
        for j, key in enumerate(tokens):
            if i >= 0 and tokens[i]["modality"] >= 0 and key["modality"] >= 0:
                seen[row, j] = sees(int(mask.rules[tokens[i]["role"]][key["role"]]), tokens[i], key, mask)
    return seen


# Random tokens and masks


def random_tokens(g: torch.Generator, most: int = 20) -> tuple[dict[str, Tensor | None], dict[str, Any], Tensor]:
    """Tokens of a batch or of packed documents: what `tokens_of` takes, what `segment_modalities` takes, cu_seqlens."""

    def drawn(*options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=g))]

    m, packed = drawn(1, 2, 3), drawn(False, True)
    sequences = drawn(0, 1, 2, 3)
    lengths = [int(torch.randint(most + 1, (), generator=g)) for _ in range(sequences)]
    lengths = lengths if packed else lengths[:1] * sequences
    total = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()

    def runs(low: int, high: int, longest: int) -> Tensor:
        values = torch.randint(low, high, (total,), generator=g)
        return values.repeat_interleave(torch.randint(1, longest + 1, (total,), generator=g))[:total]

    longest, padding = drawn(1, 3, 9), drawn("none", "middle", "left", "right", "all")
    rows = [random_ids(n, m, g, longest=longest, padding=padding) for n in lengths]
    ids = torch.cat(rows) if rows else torch.zeros(0).long()
    r = m
    role = None
    if drawn(False, True, True):
        r = drawn(1, 2, 3)
        role = runs(0, r, drawn(1, 4))
    given = {"modality": ids, "role": role, "item": None, "chunk": None, "step": None}
    if drawn(False, True):
        given["item"] = runs(0, 2, 5)
    if drawn(False, True, True):
        given["chunk"] = runs(-1, 3, drawn(2, 7))
    if drawn(False, True, True, True):
        # Steps rise along each role of each sequence by themselves: sorted among its tokens.
        step = torch.randint(-3, 3, (total,), generator=g)
        kind = torch.searchsorted(cu_seqlens[1:], torch.arange(total).int(), right=True) * 8
        kind = kind + (ids.clamp(min=-1) if role is None else role)
        for k in kind.unique():
            of_kind = (kind == k) & (ids >= 0)
            step[of_kind] = step[of_kind].sort().values
        given["step"] = step
    shape = (total,) if packed else (sequences, lengths[0] if lengths else 0)
    arguments = {
        "modality_ids": ids.view(shape),
        "num_modalities": m,
        "num_roles": None if role is None else r,
        "cu_seqlens": cu_seqlens if packed else None,
    }
    for name, fact in (("roles", "role"), ("item_ids", "item"), ("chunks", "chunk"), ("steps", "step")):
        value = given[fact]
        arguments[name] = None if value is None else value.view(shape)
    return given, arguments, cu_seqlens


def any_mask(g: torch.Generator, roles: int) -> M:
    """Rules of all six flags; half of the masks of few flags, half with a window of either kind."""
    few = int(torch.randint(2, (), generator=g))
    rules = [[0] * roles for _ in range(roles)]
    for a, b in itertools.product(range(roles), repeat=2):
        for flag in (P, S, B, U, C):
            if torch.rand((), generator=g) < (0.2 if few else 0.4):
                rules[a][b] |= flag
        if torch.rand((), generator=g) < 0.08:
            rules[a][b] |= A
    window = (None, 1, 3, 8)[int(torch.randint(4, (), generator=g))]
    where = "all" if window is not None and torch.rand((), generator=g) < 0.5 else "past"
    return M(rules, window, where)  # type: ignore[arg-type]


def some_queries(layout: mk.ModalityLayout, g: torch.Generator) -> dict[str, Any]:
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


def pairs(made: Intervals, layout: mk.ModalityLayout, queries: Any) -> Tensor:
    """How often each pair of a row and a key is in each pass: [P, rows, tokens]."""
    low, high = (end[..., None] for end in ends_of(made.limits, len(made.positions)))
    key = made.positions[:, None, None, :]
    same = queries.of(layout.sequence, -1).flatten()[:, None] == layout.sequence.flatten()
    return (((low < key) & (key <= high)) & same).sum(1)


# Tests


@pytest.mark.parametrize("seed", range(400))
def test_every_rule_against_the_definition(seed: int) -> None:
    g = generator(seed)
    given, arguments, cu_seqlens = random_tokens(g)
    layout = mk.segment_modalities(**arguments)
    tokens = tokens_of(given, cu_seqlens)
    mask = any_mask(g, layout.num_roles)
    queries = layout.queries(**some_queries(layout, g))
    expected = dense(tokens, mask, queries.columns)

    row_modality = queries.of(layout.modality).flatten()
    key_modality = layout.modality.flatten()
    for split, by_modality in ((False, False), (False, True), (True, False)):
        made, passes = (
            mask_intervals(layout, queries, mask, split, by_modality),
            passes_of(layout, mask, split, by_modality),
        )
        rows, p = queries.columns.numel(), len(passes.passes)
        assert made.limits.shape == limits_shape(p, passes.intervals, rows) and made.limits.dtype == torch.int32
        assert p == 0 or intervals_of(made.limits, p) == passes.intervals
        assert made.positions.shape == (p, layout.num_tokens) and made.positions.dtype == torch.int32
        often = pairs(made, layout, queries)
        assert torch.equal(often.sum(0), expected.long())  # each visible pair once, and no other
        low, high = ends_of(made.limits, p)
        empty = low >= high
        assert bool((low[:, 0][empty[:, 0]] == NOTHING[0]).all()) and bool((high[empty] == NOTHING[1]).all())
        assert bool((low >= -1).all())
        if passes.intervals == 2 and p:  # the second one only beside a first one, and before it
            assert bool((empty[:, 1] | (~empty[:, 0] & (high[:, 1] < low[:, 0]))).all())
        for each, key in zip(passes.passes, made.positions, strict=True):
            if each.modality is not None:
                assert bool((key_modality[key >= 0] == each.modality).all())
        if split:
            same = row_modality[:, None] == key_modality
            assert torch.equal(often[: passes.second].sum(0), (expected & same).long())
            assert torch.equal(often[passes.second :].sum(0), (expected & ~same).long())
        else:
            assert passes.second == p

    seen = mask.visible_to(layout, queries)
    if layout.packed:
        assert torch.equal(seen, expected)
    elif seen.numel():
        b, keys = layout.modality.shape
        blocks = expected.view(b, -1, b, keys)
        assert torch.equal(seen, torch.stack([blocks[n, :, n] for n in range(b)]))
    one_hot = key_modality[:, None] == torch.arange(layout.num_modalities)
    counts = mask.count_visible(layout, queries)
    assert counts.dtype == torch.int32 and torch.equal(
        counts.view(rows, layout.num_modalities), expected.int() @ one_hot.int()
    )


@pytest.mark.parametrize("seed", range(60))
def test_layout_against_the_definition(seed: int) -> None:
    given, arguments, cu_seqlens = random_tokens(generator(seed))
    expected = tokens_of(given, cu_seqlens)
    for made in (mk.segment_modalities(**arguments), mk.reference.segment_modalities(**arguments)):
        role, step, chunk = (x.flatten().tolist() for x in (made.role, made.step, made.chunk))
        segment, position, modality = (x.flatten().tolist() for x in (made.segment, made.position, made.modality))
        for t, token in enumerate(expected):
            real = token["modality"] >= 0
            assert (modality[t], segment[t] >= 0, position[t]) == (token["modality"], real, token["position"])
            assert (role[t], step[t]) == ((token["role"], token["step"]) if real else (-1, 0))
            assert (chunk[t] >= 0) == (token["chunk"] >= 0)
        for ours, name in ((segment, "segment"), (chunk, "chunk")):
            theirs = [token[name] for token in expected]
            # The same partition, numbers rising.
            assert len({*zip(ours, theirs, strict=True)}) == len({*ours}) == len({*theirs})
            some = [n for n in ours if n >= 0]
            assert some == sorted(some)
        for dtype in (made.role, made.step, made.chunk):
            assert dtype.dtype == torch.int32 and dtype.shape == made.modality.shape
        assert (made.num_roles, made.own_roles) == (
            arguments["num_roles"] or arguments["num_modalities"],
            arguments["roles"] is not None,
        )


def test_intervals_of_a_worked_example() -> None:
    # A clean text of blocks 0 0 1 1, then its noised copy: block diffusion.
    layout = mk.segment_modalities(
        torch.zeros(1, 8, dtype=torch.long),
        roles=torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]]),
        steps=torch.tensor([[0, 0, 1, 1, 0, 0, 1, 1]]),
        item_ids=torch.tensor([[0, 0, 1, 1, 0, 0, 1, 1]]),
    )
    mask = M([[S, B], [H, U]])
    passes = passes_of(layout, mask)
    assert passes.intervals == 1
    assert passes.passes == (
        Pass(0, (0,), None, (mk.Visibility.SEGMENT, mk.Visibility.HIDDEN), None),
        Pass(0, (1,), None, (mk.Visibility.BEFORE, mk.Visibility.UPTO), None),
    )
    made = mask_intervals(layout, layout.queries(), mask)
    lo, hi = NOTHING
    assert made.limits[:2].tolist() == [[lo, lo, lo, lo, 3, 3, 5, 5], [hi, hi, hi, hi, 5, 5, 7, 7]]
    assert made.limits[2:].tolist() == [[-1, -1, -1, -1, lo, lo, -1, -1], [1, 1, 3, 3, hi, hi, 1, 1]]
    assert made.positions.tolist() == [[-1, -1, -1, -1, 4, 5, 6, 7], [0, 1, 2, 3, -1, -1, -1, -1]]


def test_all_is_without_end() -> None:
    layout = mk.segment_modalities(torch.tensor([[0, -1, 0]]))
    made = mask_intervals(layout, layout.queries(), M.full(1))
    assert made.limits.tolist() == [[-1, FAR, -1], [FAR, -2, FAR]]


def test_passes_come_from_rules_alone() -> None:
    def roles(mask: M, **options: Any) -> list[tuple[int, ...]]:
        return [each.roles for each in make_passes(mask, 3, **options).passes]

    assert roles(M.causal(3)) == [(0, 1, 2)]
    assert roles(M.bidirectional_within(3, [1])) == [(0, 1, 2)]
    assert roles(M.causal(3), by_modality=True) == [(0,), (1,), (2,)]
    assert roles(M.causal(3), by_modality=True, own_roles=True) == [(0, 1, 2)] * 3
    assert roles(M([[U] * 3] * 3)) == [(0,), (1,), (2,)]  # where a step ends is another place in each role
    assert roles(M([[P | B] * 3] * 3)) == [(0,), (1,), (2,)]
    assert roles(M([[P | B]])) == [(0,)] and make_passes(M([[P | B]]), 1).passes[0].rules == (mk.Visibility.PAST,)
    assert roles(M([[C] * 3] * 3)) == [(0, 1, 2)]
    assert roles(M([[H] * 3] * 3)) == []
    for mask in (
        M([[P | U] * 2] * 2),
        M([[S | U, U], [U, S | U]]),
        M([[S | C] * 2] * 2, 3),
        M([[P | U] * 2] * 2, 3, "all"),
    ):
        assert make_passes(mask, 2).intervals == 1
    for mask in (M([[C | U] * 2] * 2), M([[S | B]]), M([[P | B]], 3), M([[C | B]], 3, "all")):
        assert make_passes(mask, 2).intervals == 2
    split = make_passes(M.causal(2), 2, split=True)
    assert split.second == 2 and [(p.branch, p.modality) for p in split.passes] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_intervals_are_made_once() -> None:
    layout = mk.segment_modalities(torch.tensor([[0, 1, 1]]))
    queries = layout.queries()
    assert mask_intervals(layout, queries, M.causal(2)) is mask_intervals(layout, queries, M.causal(2))
    assert mask_intervals(layout, queries, M([[P] * 2] * 2, 2)) is not mask_intervals(layout, queries, M.causal(2))


@pytest.mark.parametrize("seed", range(20))
def test_falling_steps_stay_inside(seed: int) -> None:
    """What is wrong with the data is found elsewhere; here nothing may break."""
    g = generator(seed)
    _, arguments, _ = random_tokens(g)
    arguments["steps"] = None
    layout = mk.segment_modalities(**arguments)
    layout.step.copy_(torch.randint(-9, 9, layout.step.shape, generator=g))
    made = mask_intervals(layout, layout.queries(), any_mask(g, layout.num_roles))
    low, high = ends_of(made.limits, len(made.positions))
    assert bool((high[low < high] >= 0).all())


def test_a_call_with_everything_equals_the_reference() -> None:
    x = torch.randn(1, 1, 4, 8, dtype=torch.float64)
    ids = torch.tensor([[0, 0, 1, 1]])
    layout = mk.segment_modalities(ids, roles=torch.tensor([[0, 0, 0, 1]]), steps=ids, chunks=ids)
    for mask in (M([[C, U], [B, S]]), M([[C | B, U], [P, S | B]], 2, "all")):
        made = [mk.moda_attention(x, x, x, layout=layout, mask=mask, backend=name) for name in (None, "reference")]
        torch.testing.assert_close(made[0], made[1], rtol=0, atol=1e-13)


BAD = {
    "roles of another shape": ({"roles": torch.zeros(1, 3).long()}, ("roles", "shape", "(1, 4)")),
    "a role out of range": ({"roles": torch.tensor([[0, 5, 0, 9]]), "num_roles": 6}, ("roles", "0 to 5", "9")),
    "a role below 0": ({"roles": torch.tensor([[0, -1, 0, 0]])}, ("roles", "0 to 0", "-1")),
    "roles are floats": ({"roles": torch.zeros(1, 4)}, ("roles", "integer")),
    "num_roles without roles": ({"num_roles": 3}, ("num_roles", "2", "3")),
    "steps that fall": ({"steps": torch.tensor([[1, 2, 0, 1]])}, ("steps", "never fall", "2 that")),
    "steps beyond int32": ({"steps": torch.tensor([[0, 0, 0, 2**40]])}, ("steps", "int32", "1")),
    "steps of another shape": ({"steps": torch.zeros(4).long()}, ("steps", "shape")),
    "chunks of another shape": ({"chunks": torch.zeros(2, 2).long()}, ("chunks", "shape")),
    "chunks are bools": ({"chunks": torch.zeros(1, 4).bool()}, ("chunks", "integer")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_layouts(name: str, refused: Any) -> None:
    arguments, parts = BAD[name]
    kind = TypeError if "floats" in name or "bools" in name else ValueError
    ids = torch.tensor([[0, 1, 0, 1]])
    refused(lambda: mk.segment_modalities(ids, **arguments), kind, parts)


def test_steps_may_fall_between_roles_and_sequences() -> None:
    ids, steps = torch.tensor([[0, 1, 0, 1], [0, -1, 0, 1]]), torch.tensor([[5, 1, 5, 2], [0, 9, 0, -4]])
    assert mk.segment_modalities(ids, steps=steps).step.tolist() == [[5, 1, 5, 2], [0, 0, 0, -4]]


def test_bad_masks(refused: Any) -> None:
    refused(lambda: M([[P]], None, "all"), ValueError, ("window_on", "without a window"))
    refused(lambda: M([[P]], 3, "none"), ValueError, ("window_on", "'past', 'all'"))  # type: ignore[arg-type]
    refused(lambda: M([[64]]), ValueError, ("rules", "CHUNK", "64"))
    layout = mk.segment_modalities(torch.tensor([[0, 1]]), roles=torch.tensor([[0, 2]]))
    refused(lambda: M.causal(2).visible(layout), ValueError, ("mask", "3 x 3 rules", "roles"))
