"""Draws what the pages show, with the package's own drawings: `python docs/pictures.py` writes docs/pictures/*.svg.

Each example of docs/masks.md ends with a `layout` and a `mask`; its picture is named after the heading above it.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import moda_kernels as mk
from moda_kernels.tokens import drawing

DOCS = Path(__file__).parent
PAGE = DOCS / "masks.md"
PICTURES = DOCS / "pictures"


def examples(text: str) -> Iterator[tuple[str, str, int]]:
    """(name, code, line) of every Python block: the name is that of the heading above it."""
    name = "page"
    for found in re.finditer(r"^## ([^\n]+)$|^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if found[1]:
            name = re.sub(r"[^a-z0-9]+", "-", found[1].lower().replace("π", "pi")).strip("-")
        else:
            yield name, found[2], text.count("\n", 0, found.start(2)) + 1


def pictures(text: str) -> dict[str, str]:
    """The SVG of every example of the page, by name."""
    made: dict[str, str] = {}
    namespace: dict[str, Any] = {"__name__": "masks"}
    for name, code, line in examples(text):
        namespace.pop("mask", None)
        exec(compile("\n" * (line - 1) + code, PAGE, "exec"), namespace)
        if "mask" in namespace:
            made[name] = namespace["mask"].draw(namespace["layout"]).svg
    return made


def overview() -> str:
    """One sequence of text and images, and four masks over it."""
    see = mk.Visibility
    runs = ((0, 4), (1, 5), (0, 3), (1, 5), (0, 3))
    ids = torch.tensor([[modality for modality, count in runs for _ in range(count)]])
    layout = mk.segment_modalities(ids)
    text_rules = [see.PAST, see.PAST]
    masks = {
        "causal\nLLaVA, Qwen-VL": mk.ModularMask.causal(2),
        "images see themselves whole\nGemma 3": mk.ModularMask.bidirectional_within(2, [1]),
        "the same, in a window\nGemma 3, sliding layers": mk.ModularMask(
            [text_rules, [see.PAST, see.PAST | see.SEGMENT]], window=8, window_on="all"
        ),
        "all images see each other\nMolmo 2": mk.ModularMask([text_rules, [see.PAST, see.PAST | see.ALL]]),
    }
    grids = drawing.beside([mask.draw(layout) for mask in masks.values()], list(masks))
    strip = layout.draw(["text", "image"])
    return drawing.padded(drawing.above([strip, grids], gap=16)).svg


def everything() -> dict[str, str]:
    """All pictures by name."""
    return {"overview": overview()} | pictures(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    for picture, svg in everything().items():
        (PICTURES / f"{picture}.svg").write_text(svg, encoding="utf-8")
