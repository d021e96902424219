"""Layouts: segments, positions, prefix counts and tables against loops from the definition; query rows; devices."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

import moda_kernels as mk
from moda_kernels.runtime import native
from moda_kernels.testing import PADDING, generator, random_ids, random_layout
from moda_kernels.tokens.segments import segment_table_torch, segment_tokens_torch

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, strategies as st  # noqa: E402, I001


@pytest.fixture(params=["torch", "native"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of making a layout; without the extension only one."""
    if request.param == "torch":
        monkeypatch.setattr(native, "runs_on", lambda device: False)
    elif not native.runs_on(torch.device("cpu")):
        pytest.skip("the native extension is not built")
    return request.param


def by_hand(ids: Tensor, items: Tensor | None, cu_seqlens: Tensor | None, num_modalities: int) -> dict[str, Tensor]:
    """All of a layout, from the words of the specification: one loop over tokens."""
    flat = ids.flatten().tolist()
    item = [0] * len(flat) if items is None else items.flatten().tolist()
    if cu_seqlens is None:
        bounds = [n * ids.shape[1] for n in range(ids.shape[0] + 1)]
    else:
        bounds = cu_seqlens.tolist()
    segment, position, sequence, prefix, table, counts = [], [], [], [[0] * num_modalities], [], []
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        count = [0] * num_modalities
        for t in range(begin, end):
            sequence.append(n)
            prefix.append(list(prefix[-1]))
            if flat[t] == -1:
                segment.append(-1)
                position.append(-1)
                continue
            goes_on = t > begin and flat[t - 1] == flat[t] and item[t - 1] == item[t]
            if not goes_on:
                table.append([n, t, 0, flat[t]])
            table[-1][2] += 1
            segment.append(len(table) - 1)
            position.append(sum(count))
            count[flat[t]] += 1
            prefix[-1][flat[t]] += 1
        counts.append(count)

    def tensor(x: list[object], *shape: int) -> Tensor:
        return torch.tensor(x, dtype=torch.int32).view(shape)

    return {
        "modality": ids.int(),
        "segment": tensor(segment, *ids.shape),
        "position": tensor(position, *ids.shape),
        "sequence": tensor(sequence, *ids.shape),
        "counts": tensor(counts, len(bounds) - 1, num_modalities),
        "cu_seqlens": tensor(bounds, -1),
        "prefix": tensor(prefix, -1, num_modalities),
        "table": tensor(table, len(table), 4),
        "num_segments": tensor([len(table)], 1),
    }


def assert_is(layout: mk.ModalityLayout, expected: dict[str, Tensor]) -> None:
    for name, right in expected.items():
        got = getattr(layout, name)
        assert got.dtype == torch.int32, name
        assert got.shape == right.shape, f"{name}: {got.shape}, expected {right.shape}"
        assert torch.equal(got, right), f"{name}: {got}, expected {right}"


def test_worked_example(arithmetic: str) -> None:
    ids = torch.tensor([[0, 0, 1, 1, 1, -1, 1, 0], [-1, -1, 1, 1, 0, 0, 1, -1]])
    items = torch.tensor([[0, 0, 7, 7, 8, 8, 8, 8], [0, 0, 0, 0, 0, 1, 1, 1]])
    layout = mk.segment_modalities(ids, item_ids=items, num_modalities=3)
    assert layout.segment.tolist() == [[0, 0, 1, 1, 2, -1, 3, 4], [-1, -1, 5, 5, 6, 7, 8, -1]]
    assert layout.position.tolist() == [[0, 1, 2, 3, 4, -1, 5, 6], [-1, -1, 0, 1, 2, 3, 4, -1]]
    assert layout.sequence.tolist() == [[0] * 8, [1] * 8]
    assert layout.counts.tolist() == [[3, 4, 0], [2, 3, 0]]
    assert layout.segments().tolist() == [
        [0, 0, 2, 0], [0, 2, 2, 1], [0, 4, 1, 1], [0, 6, 1, 1], [0, 7, 1, 0],
        [1, 2, 2, 1], [1, 4, 1, 0], [1, 5, 1, 0], [1, 6, 1, 1],
    ]  # fmt: skip
    assert (layout.num_modalities, layout.max_segments, layout.packed, layout.num_sequences) == (3, 9, False, 2)
    assert layout.groups("segment").tolist() == layout.segment.flatten().tolist()
    assert layout.groups("modality").tolist() == [0, 0, 1, 1, 1, -1, 1, 0, -1, -1, 4, 4, 3, 3, 4, -1]
    assert layout.check() is layout


def test_packed_example(arithmetic: str) -> None:
    ids = torch.tensor([0, 0, 0, 1, -1, 1])
    layout = mk.segment_modalities(ids, cu_seqlens=torch.tensor([0, 0, 2, 2, 6, 6], dtype=torch.int32))
    assert layout.packed and layout.num_sequences == 5 and layout.num_tokens == 6
    assert layout.segment.tolist() == [0, 0, 1, 2, -1, 3]  # a document's end ends a run
    assert layout.position.tolist() == [0, 1, 0, 1, -1, 2]
    assert layout.sequence.tolist() == [1, 1, 3, 3, 3, 3]
    assert layout.counts.tolist() == [[0, 0], [2, 0], [0, 0], [1, 2], [0, 0]]
    assert layout.segments().tolist() == [[1, 0, 2, 0], [3, 2, 1, 0], [3, 3, 1, 1], [3, 5, 1, 1]]


@st.composite
def token_batches(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    m = draw(st.integers(1, 4))
    token = st.integers(-1, m - 1)
    if draw(st.booleans()):
        documents = draw(st.lists(st.lists(token, max_size=9), max_size=5))
        flat = [t for d in documents for t in d]
        cu = torch.tensor([0, *map(len, documents)]).cumsum(0).to(draw(st.sampled_from((torch.int32, torch.int64))))
        ids = torch.tensor(flat, dtype=torch.long)
    else:
        b, length = draw(st.integers(0, 4)), draw(st.integers(0, 12))
        flat = draw(st.lists(token, min_size=b * length, max_size=b * length))
        ids, cu = torch.tensor(flat, dtype=torch.long).view(b, length), None
    items = None
    if draw(st.booleans()):
        values = draw(st.lists(st.integers(-1, 1), min_size=ids.numel(), max_size=ids.numel()))
        items = torch.tensor(values, dtype=torch.long).view(ids.shape)
    return ids, items, cu, m


@given(token_batches())
def test_against_loop(batch: tuple[Tensor, Tensor | None, Tensor | None, int]) -> None:
    ids, items, cu, m = batch
    layout = mk.segment_modalities(ids, num_modalities=m, item_ids=items, cu_seqlens=cu)
    assert_is(layout, by_hand(*batch))
    assert layout.max_segments == int(layout.num_segments)
    assert_is(mk.reference.segment_modalities(ids, num_modalities=m, item_ids=items, cu_seqlens=cu), by_hand(*batch))


@given(token_batches(), st.integers(0, 5))
def test_pytorch_arithmetic_with_room(batch: tuple[Tensor, Tensor | None, Tensor | None, int], room: int) -> None:
    ids, items, _, m = batch
    expected = by_hand(*batch)
    items = None if items is None else items.flatten()
    made = segment_tokens_torch(ids.flatten().int(), items, expected["cu_seqlens"], m)
    for name, got in zip(("segment", "position", "sequence", "prefix", "num_segments"), made, strict=True):
        assert torch.equal(got.view(expected[name].shape), expected[name]), name
    segments = int(expected["num_segments"])
    table = segment_table_torch(ids.flatten().int(), made[0], made[2], segments + room)
    assert torch.equal(table[:segments], expected["table"]) and not table[segments:].any()
    # Too little room cuts the table and touches nothing else (only possible where values aren't looked at).
    if segments:
        assert torch.equal(
            segment_table_torch(ids.flatten().int(), made[0], made[2], segments - 1), expected["table"][:-1]
        )


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("longest", [1, 3, 40])
@pytest.mark.parametrize("length", [1, 63, 100])
def test_shapes(length: int, longest: int, padding: str, arithmetic: str) -> None:
    g = generator(length)
    ids = torch.stack([random_ids(length, 3, g, longest=longest, padding=padding) for _ in range(2)])
    assert_is(mk.segment_modalities(ids, num_modalities=3), by_hand(ids, None, None, 3))


@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (3, 0)])
def test_without_tokens(shape: tuple[int, int], arithmetic: str) -> None:
    layout = mk.segment_modalities(torch.zeros(shape, dtype=torch.long))
    assert_is(layout, by_hand(torch.zeros(shape).long(), None, None, 1))
    assert layout.num_modalities == 1 and layout.max_segments == 0
    assert layout.segments().shape == (0, 4)
    assert layout.queries().shape == shape


@pytest.mark.parametrize("bounds", [[0], [0, 0], [0, 0, 0]])
def test_packed_without_tokens(bounds: list[int], arithmetic: str) -> None:
    layout = mk.segment_modalities(torch.zeros(0).long(), cu_seqlens=torch.tensor(bounds), num_modalities=2)
    assert layout.num_sequences == len(bounds) - 1 and layout.counts.shape == (len(bounds) - 1, 2)
    assert not layout.counts.any() and layout.queries().shape == (0,)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8])
def test_integer_dtypes(dtype: torch.dtype) -> None:
    ids = torch.tensor([[0, 2, 2, 1]]).to(dtype)
    layout = mk.segment_modalities(ids, item_ids=torch.tensor([[0, 0, 1, 1]]).to(dtype))
    assert layout.segment.tolist() == [[0, 1, 2, 3]] and layout.num_modalities == 3
    # More modalities than the dtype can count.
    assert mk.segment_modalities(ids, num_modalities=300).num_modalities == 300


def test_noncontiguous_input() -> None:
    ids, items = torch.randint(-1, 2, (6, 4)), torch.randint(2, (6, 4))
    assert_is(
        mk.segment_modalities(ids.T, item_ids=items.T, num_modalities=2),
        by_hand(ids.T.contiguous(), items.T.contiguous(), None, 2),
    )


def test_layout_keeps_its_own_copy() -> None:
    ids, cu = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 2, 4], dtype=torch.int32)
    layout = mk.segment_modalities(ids, cu_seqlens=cu)
    ids.fill_(-1)
    cu[1] = 3
    assert layout.modality.tolist() == [0, 1, 1, 0]
    assert layout.cu_seqlens.tolist() == [0, 2, 4], "cu_seqlens is shared with the caller"


def test_max_segments_with_room(arithmetic: str) -> None:
    ids = torch.tensor([[0, 1, 1, -1, 0]])
    layout = mk.segment_modalities(ids, max_segments=10)
    assert layout.table.shape == (10, 4) and int(layout.num_segments) == 3 and layout.max_segments == 10
    assert not layout.table[3:].any()
    assert layout.segments().tolist() == mk.segment_modalities(ids).segments().tolist()
    # One segment more than there is room for is an error here, and is found by check().
    cut = dataclasses.replace(layout, max_segments=2)
    with pytest.raises(ValueError, match=r"max_segments: expected at least the 3 segments .*, got 2"):
        cut.check()


def test_check_reports_what_was_counted() -> None:
    layout = mk.segment_modalities(torch.tensor([[0, 1]]))
    bad_ids = dataclasses.replace(layout, faults=torch.tensor([2, 0, 0, 0], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"modality_ids: expected ids from -1 to 1, got 2"):
        bad_ids.check()
    bad_bounds = dataclasses.replace(layout, faults=torch.tensor([0, 1, 0, 0], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"cu_seqlens: expected .* 2 tokens, got 1"):
        bad_bounds.check()
    for faults, message in (
        ([0, 0, 3, 0], "roles: expected roles from 0 to 1, got 3"),
        ([0, 0, 0, 4], "steps: .*got 4"),
    ):
        bad = dataclasses.replace(layout, faults=torch.tensor(faults, dtype=torch.int32))
        with pytest.raises(ValueError, match=message):
            bad.check()
        assert bad.overflow is not None and bool(bad.overflow) == bool(faults[3])
    assert layout.overflow is None and layout.faults is None


def test_to_another_device() -> None:
    layout = mk.segment_modalities(torch.tensor([[0, 1, 1]]))
    moved = layout.to("meta")
    assert moved.device.type == "meta" and moved.table.device.type == "meta" and moved.overflow is not None
    assert layout.to("cpu").device.type == "cpu" and layout.to("cpu").faults is None
    assert "batch of 1 x 3" in repr(layout) and "2 modalities" in repr(layout)


# Query rows


def columns_by_hand(starts: list[int], lengths: list[int], first: list[int], counts: list[int]) -> list[int]:
    assert all(f + c <= n for f, c, n in zip(first, counts, lengths, strict=True))
    return [s + f + i for s, f, c in zip(starts, first, counts, strict=True) for i in range(c)]


@pytest.mark.parametrize("seed", range(20))
def test_query_rows(seed: int) -> None:
    g = generator(seed)
    layout = random_layout(g, most=12)
    starts, lengths = layout.cu_seqlens.tolist()[:-1], layout.cu_seqlens.diff().tolist()
    if layout.packed:
        counts = [int(torch.randint(n + 1, (), generator=g)) for n in lengths]
        cu_q = torch.tensor([0, *counts]).cumsum(0)
        queries = layout.queries(sum(counts), cu_seqlens_q=cu_q)
        first = [n - c for n, c in zip(lengths, counts, strict=True)]
        assert queries.columns.tolist() == columns_by_hand(starts, lengths, first, counts)
        return
    keys = layout.modality.shape[1]
    rows = int(torch.randint(keys + 1, (), generator=g))
    spare = keys - rows
    own = torch.randint(spare + 1, (len(lengths),), generator=g)
    for start, first in (
        (None, [spare] * len(lengths)),
        (spare // 2, [spare // 2] * len(lengths)),
        (own, own.tolist()),
    ):
        queries = layout.queries(rows, start)
        assert queries.shape == (len(lengths), rows)
        expected = columns_by_hand(starts, lengths, first, [rows] * len(lengths))
        assert queries.columns.flatten().tolist() == expected
        modality = layout.modality.flatten()[queries.columns.flatten()] if expected else layout.modality.new_zeros(0)
        assert torch.equal(queries.of(layout.modality).flatten(), modality)


def test_all_queries_by_default() -> None:
    layout = mk.segment_modalities(torch.tensor([[0, 1, -1], [1, 1, 0]]))
    queries = layout.queries()
    assert queries.columns.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert queries.of(layout.position).tolist() == layout.position.tolist()
    assert queries.first_column.tolist() == [0, 3] and queries.cu_seqlens.tolist() == [0, 3, 6]
