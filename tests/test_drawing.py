"""Drawings of layouts and masks: well-formed, and of the tokens that are there."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

import moda_kernels as mk
from moda_kernels.tokens import drawing

SVG = "{http://www.w3.org/2000/svg}"
WIDE = f"h{drawing.CELL - 1}v{drawing.CELL - 1}"


def cells(svg: str) -> dict[tuple[int, int], tuple[str, float]]:
    """(row, column) → colour and opacity of every cell of a grid with one strip; later ones lie on top."""
    at = drawing.STRIP + 1 + drawing.GAP
    found: dict[tuple[int, int], tuple[str, float]] = {}
    for path in ET.fromstring(svg).iter(f"{SVG}path"):
        for x, y in re.findall(rf"M(\d+) (\d+){WIDE}", path.attrib["d"]):
            place = (int(y) - at) // drawing.CELL, (int(x) - at) // drawing.CELL
            found[place] = (path.attrib["fill"], float(path.attrib.get("fill-opacity", 1)))
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_a_grid_is_the_mask(packed: bool) -> None:
    ids = torch.tensor([[1, -1, 0, 0, 1, 1, 0]])
    mask = mk.ModularMask.bidirectional_within(2, [1])
    layout = mk.segment_modalities(ids)
    if packed:
        bounds = torch.tensor([0, 3, 10], dtype=torch.int32)
        layout = mk.segment_modalities(torch.cat((torch.tensor([0, 1, 0]), ids[0])), cu_seqlens=bounds)
    seen = mk.segment_modalities(ids)
    visible = mask.visible(seen)[0]
    found = cells(mask.draw(layout, sequence=int(packed)).svg)
    for i in range(7):
        for j in range(7):
            if ids[0, i] < 0 or ids[0, j] < 0:
                assert (i, j) not in found
            else:
                expected = drawing.MODALITIES[int(ids[0, j])] if visible[i, j] else drawing.HIDDEN
                assert found[i, j] == (expected, 1.0), (i, j)


def test_long_sequences_are_drawn_in_groups() -> None:
    layout = mk.segment_modalities(torch.zeros(1, 8, dtype=torch.long))
    found = cells(mk.ModularMask.causal(1).draw(layout, width=4).svg)
    assert len(found) == 16 and found[0, 1][0] == drawing.HIDDEN
    # Of a cell on the diagonal three of four pairs are seen: the colour's own share grows with them.
    assert found[0, 0] == (drawing.MODALITIES[0], pytest.approx(0.25 + 0.75 * 0.75, abs=0.01))
    assert found[1, 0] == (drawing.MODALITIES[0], 1.0)
    with pytest.raises(ValueError, match="sequence"):
        mk.ModularMask.causal(1).draw(layout, sequence=1)
    with pytest.raises(ValueError, match="width"):
        mk.ModularMask.causal(1).draw(layout, width=0)


def rectangles(svg: str) -> list[tuple[float, float, str, str]]:
    """(x, width, colour, title) of the segments of a strip."""
    found = []
    for rect in ET.fromstring(svg).iter(f"{SVG}rect"):
        title = rect.find(f"{SVG}title")
        if title is not None:
            found.append((float(rect.attrib["x"]), float(rect.attrib["width"]), rect.attrib["fill"], title.text or ""))
    return found


def test_a_strip_is_the_segments() -> None:
    layout = mk.segment_modalities(torch.tensor([[0, 0, 1, 1, 1, 0, -1, 0]]), num_modalities=2)
    found = rectangles(layout.draw(["text", "image"]).svg)
    titles = ["text: 2 tokens from 0", "image: 3 tokens from 2", "text: 1 tokens from 5", "text: 1 tokens from 7"]
    assert [title for *_, title in found] == titles
    assert [fill for _, _, fill, _ in found] == [drawing.MODALITIES[m] for m in (0, 1, 0, 0)]
    unit = drawing.LENGTH / 8
    starts = [x - found[0][0] for x, *_ in found]
    assert starts == pytest.approx([0, 2 * unit, 5 * unit, 7 * unit], abs=0.01)
    assert [width for _, width, _, _ in found] == pytest.approx(
        [2 * unit - 0.6, 3 * unit - 0.6] + 2 * [unit - 0.6], abs=0.02
    )
    with pytest.raises(ValueError, match="names"):
        layout.draw(["text"])


def test_strips_of_packed_documents_and_roles() -> None:
    ids, roles = torch.tensor([0, 1, 1, 0, 0, 1]), torch.tensor([0, 1, 2, 0, 0, 1])
    bounds = torch.tensor([0, 3, 3, 6], dtype=torch.int32)
    layout = mk.segment_modalities(ids, cu_seqlens=bounds, roles=roles, num_roles=3)
    found = rectangles(layout.draw().svg)
    assert [title for *_, title in found] == [
        "modality 0: 1 tokens from 0, role 0",
        "modality 1: 1 tokens from 1, role 1",
        "modality 1: 1 tokens from 2, role 2",
        "modality 0: 2 tokens from 0, role 0",
        "modality 1: 1 tokens from 2, role 1",
    ]


def test_notebooks_show_them(tmp_path: Path) -> None:
    layout = mk.segment_modalities(torch.tensor([[0, 1], [1, -1]]), num_modalities=3)
    mask = mk.ModularMask.causal(3)
    assert repr(layout).replace("<", "&lt;") in layout._repr_html_() and "<svg" in layout._repr_html_()
    table = ET.fromstring(mask._repr_html_())
    assert [cell.text for cell in table.iter("td")] == ["PAST"] * 9
    picture = mask.draw(layout, sequence=1)
    assert picture._repr_html_() == picture.svg == picture.save(tmp_path / "a.svg").read_text(encoding="utf-8")
    # Nothing to draw is drawn as nothing.
    for empty in (
        mk.segment_modalities(torch.zeros(0, 4, dtype=torch.long)),
        mk.segment_modalities(torch.zeros(2, 0, dtype=torch.long)),
    ):
        ET.fromstring(empty.draw().svg)


def test_many_rows_are_cut_short() -> None:
    layout = mk.segment_modalities(torch.zeros(30, 3, dtype=torch.long))
    assert len(rectangles(layout.draw().svg)) == 8


def test_drawings_beside_and_above() -> None:
    one = drawing.Drawing(10, 20, "<g/>")
    both = drawing.beside([one, one], ["a <b>", "c\nd"], gap=5)
    assert (both.width, both.height) == (25, 20 + 36) and "a &lt;b&gt;" in both.svg
    assert drawing.above([one, both], gap=3).height == 20 + 3 + both.height
    assert drawing.padded(one, 4).width == 18
    ET.fromstring(drawing.padded(drawing.above([both, both])).svg)
