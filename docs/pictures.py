"""Draws the masks of docs/masks.md: `python docs/pictures.py` runs its Python and writes docs/pictures/*.svg.

Each example ends with a `layout` and a `mask`; its picture is named after the heading above it.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import moda_kernels as mk

DOCS = Path(__file__).parent
PAGE = DOCS / "masks.md"
PICTURES = DOCS / "pictures"

CELL, STRIP, GAP = 12, 7, 3
KEYS = ("#4c78a8", "#f58518", "#54a24b")  # by modality
ROLES = ("#bab0ac", "#b279a2", "#72b7b2")
NOTHING = "#eeeeee"


def examples(text: str) -> Iterator[tuple[str, str, int]]:
    """(name, code, line) of every Python block: the name is that of the heading above it."""
    name = "page"
    for found in re.finditer(r"^## ([^\n]+)$|^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if found[1]:
            name = re.sub(r"[^a-z0-9]+", "-", found[1].lower().replace("π", "pi")).strip("-")
        else:
            yield name, found[2], text.count("\n", 0, found.start(2)) + 1


def draw(mask: mk.ModularMask, layout: mk.ModalityLayout) -> str:
    """Rows are queries, columns keys, coloured by the key's modality; strips name modalities and, if given, roles."""
    packed = layout.packed
    seen = mask.visible(layout)
    seen = seen if packed else seen[0]
    length = seen.shape[0]
    modality, role = (x.view(-1)[:length].tolist() for x in (layout.modality, layout.role))
    strips = [[KEYS[m % len(KEYS)] for m in modality]]
    if layout.own_roles:
        strips.append([ROLES[r % len(ROLES)] for r in role])
    edge = len(strips) * (STRIP + 1) + GAP
    size = edge + length * CELL
    boxes: dict[str, list[str]] = {}  # a path for each colour

    def box(x: int, y: int, width: int, height: int, colour: str) -> None:
        boxes.setdefault(colour, []).append(f"M{x} {y}h{width - 1}v{height - 1}h{1 - width}z")

    for depth, colours in enumerate(strips):
        for i, colour in enumerate(colours):
            box(edge + i * CELL, depth * (STRIP + 1), CELL, STRIP + 1, colour)
            box(depth * (STRIP + 1), edge + i * CELL, STRIP + 1, CELL, colour)
    for i in range(length):
        for j in range(length):
            colour = KEYS[modality[j] % len(KEYS)] if bool(seen[i, j]) else NOTHING
            box(edge + j * CELL, edge + i * CELL, CELL, CELL, colour)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{size}" height="{size}" viewBox="0 0 {size} {size}">'
    return "\n".join([head, *(f'<path fill="{c}" d="{"".join(d)}"/>' for c, d in boxes.items()), "</svg>", ""])


def pictures(text: str) -> dict[str, str]:
    """The SVG of every example of the page, by name."""
    made: dict[str, str] = {}
    namespace: dict[str, Any] = {"__name__": "masks"}
    for name, code, line in examples(text):
        namespace.pop("mask", None)
        exec(compile("\n" * (line - 1) + code, PAGE, "exec"), namespace)
        if "mask" in namespace:
            made[name] = draw(namespace["mask"], namespace["layout"])
    return made


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    for picture, svg in pictures(PAGE.read_text(encoding="utf-8")).items():
        (PICTURES / f"{picture}.svg").write_text(svg, encoding="utf-8")
