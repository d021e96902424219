"""Drawings in SVG, from plain numbers: strips of segments, grids of who sees whom, drawings side by side.

A `Drawing` shows itself in notebooks, and saves itself to a file; the pictures of the documentation are made with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

#: By modality, and by role; both again from the start where there are more. What nobody sees; what isn't there.
MODALITIES = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#9d755d", "#ff9da6")
ROLES = ("#bab0ac", "#b279a2", "#72b7b2", "#eeca3b", "#d67195", "#79706e")
HIDDEN, PAPER, INK = "#ededed", "#ffffff", "#333333"
CELL, STRIP, GAP = 12, 7, 3
#: Of a strip of segments: the whole length, and the height of a row.
LENGTH, ROW = 640, 18
FONT = "font-family='system-ui, sans-serif'"


@dataclass(frozen=True)
class Drawing:
    """An SVG drawing of some width and height.

    Attributes:
        body: the elements inside.
    """

    width: float
    height: float
    body: str

    @property
    def svg(self) -> str:
        """The whole element, on white, so that it is read on dark pages too."""
        w, h = _number(self.width), _number(self.height)
        head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" viewBox="0 0 {w} {h}">'
        paper = f'<rect width="{w}" height="{h}" fill="{PAPER}"/>'
        return f"{head}\n{paper}\n{self.body}\n</svg>\n"

    def _repr_html_(self) -> str:
        return self.svg

    def save(self, path: str | Path) -> Path:
        """Write an .svg file; its path."""
        path = Path(path)
        path.write_text(self.svg, encoding="utf-8")
        return path


def colour(number: int, colours: Sequence[str] = MODALITIES) -> str:
    """Of a modality or role; of padding, none (its number is negative)."""
    return colours[number % len(colours)] if number >= 0 else PAPER


def text(x: float, y: float, said: str, size: int = 11, anchor: str = "start", weight: str = "normal") -> str:
    """A line of text."""
    place = f'x="{_number(x)}" y="{_number(y)}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text {place} font-weight="{weight}" fill="{INK}" {FONT}>{escape(said)}</text>'


def beside(drawings: Sequence[Drawing], titles: Sequence[str] = (), gap: float = 22) -> Drawing:
    """Drawings in a row, under their titles (a line break begins a second, smaller line)."""
    lines = max((title.count("\n") + 1 for title in titles), default=0)
    top = 16 * lines + 4 * (lines > 0)
    x, parts = 0.0, []
    for i, drawing in enumerate(drawings):
        for line, said in enumerate(titles[i].split("\n") if titles else ()):
            size, weight = (13, "bold") if line == 0 else (11, "normal")
            parts.append(text(x, 13 + 16 * line, said, size, weight=weight))
        parts.append(f'<g transform="translate({_number(x)} {top})">\n{drawing.body}\n</g>')
        x += drawing.width + gap
    return Drawing(x - gap, top + max(drawing.height for drawing in drawings), "\n".join(parts))


def above(drawings: Sequence[Drawing], gap: float = 10) -> Drawing:
    """Drawings below each other."""
    y, parts = 0.0, []
    for drawing in drawings:
        parts.append(f'<g transform="translate(0 {_number(y)})">\n{drawing.body}\n</g>')
        y += drawing.height + gap
    return Drawing(max(drawing.width for drawing in drawings), y - gap, "\n".join(parts))


def padded(drawing: Drawing, margin: float = 8) -> Drawing:
    """The same with a margin around it."""
    m = _number(margin)
    body = f'<g transform="translate({m} {m})">\n{drawing.body}\n</g>'
    return Drawing(drawing.width + 2 * margin, drawing.height + 2 * margin, body)


def grid(
    seen: Sequence[Sequence[float]],
    keys: Sequence[int],
    strips: Sequence[tuple[Sequence[int], Sequence[str]]],
    cell: float = CELL,
) -> Drawing:
    """Rows are queries, columns keys: who sees whom.

    Args:
        seen: L×L; the part of a cell's pairs that is seen, 0 to 1, below 0 where there is none (padding).
        keys: the modality of each column: its colour.
        strips: numbers along both edges, each with its colours.
    """
    edge = len(strips) * (STRIP + 1) + GAP
    length = len(keys)
    boxes: dict[tuple[str, str], list[str]] = {}  # a path for each colour and opacity

    def box(x: float, y: float, width: float, height: float, fill: str, opacity: str = "1") -> None:
        place = f"M{_number(x)} {_number(y)}h{_number(width - 1)}v{_number(height - 1)}h{_number(1 - width)}z"
        boxes.setdefault((fill, opacity), []).append(place)

    for depth, (numbers, colours) in enumerate(strips):
        for i, number in enumerate(numbers):
            if number >= 0:
                box(edge + i * cell, depth * (STRIP + 1), cell, STRIP + 1, colour(number, colours))
                box(depth * (STRIP + 1), edge + i * cell, STRIP + 1, cell, colour(number, colours))
    for i, row in enumerate(seen):
        for j, part in enumerate(row):
            if 0 <= part < 1:
                box(edge + j * cell, edge + i * cell, cell, cell, HIDDEN)
            if part > 0:
                box(edge + j * cell, edge + i * cell, cell, cell, colour(keys[j]), f"{0.25 + 0.75 * part:.2g}")
    paths = []
    for (fill, opacity), places in boxes.items():
        faint = "" if opacity == "1" else f' fill-opacity="{opacity}"'
        paths.append(f'<path fill="{fill}"{faint} d="{"".join(places)}"/>')
    size = edge + length * cell
    return Drawing(size, size, "\n".join(paths))


def segments(
    rows: Sequence[tuple[str, int, Sequence[tuple[int, int, int, int | None]]]],
    names: Sequence[str],
    legend: Sequence[str],
    length: float = LENGTH,
) -> Drawing:
    """Sequences as strips of their segments, to scale, with a legend.

    Args:
        rows: for each sequence its name, its length with padding, and (start, length, modality, role or None) of each
            segment.
        names: of modalities. legend: what the legend says of each.
    """
    left = 8 + 7 * max((len(name) for name, _, _ in rows), default=0)
    longest = max((total for _, total, _ in rows), default=1) or 1
    scale = length / longest
    parts, y = [], 0.0
    for name, total, found in rows:
        parts.append(text(left - 8, y + 12, name, anchor="end"))
        size = f'height="{ROW - 4}" fill="none" stroke="#cccccc"'
        parts.append(f'<rect x="{_number(left)}" y="{_number(y)}" width="{_number(total * scale)}" {size}/>')
        for start, count, modality, role in found:
            x, width = _number(left + start * scale), _number(max(count * scale - 0.6, 0.4))
            said = f"{names[modality]}: {count} tokens from {start}"
            said += "" if role is None else f", role {role}"
            place = f'x="{x}" y="{_number(y)}" width="{width}" height="{ROW - 4 if role is None else ROW - 8}"'
            parts.append(f'<rect {place} fill="{colour(modality)}"><title>{escape(said)}</title></rect>')
            if role is not None:
                place = f'x="{x}" y="{_number(y + ROW - 8)}" width="{width}" height="4"'
                parts.append(f'<rect {place} fill="{colour(role, ROLES)}"/>')
        y += ROW
    at = float(left)
    for number, name in enumerate(legend):
        parts.append(f'<rect x="{_number(at)}" y="{_number(y + 4)}" width="10" height="10" fill="{colour(number)}"/>')
        parts.append(text(at + 14, y + 13, name))
        at += 28 + 6.5 * len(name)
    return Drawing(max(left + length, at), y + ROW, "\n".join(parts))


def _number(x: float) -> str:
    return f"{x:.2f}".rstrip("0").rstrip(".")
