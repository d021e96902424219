"""Named, seeded sequences with the modalities of real multimodal inputs; the length is a parameter.

Two modalities, text and image. Texts are causal, images see themselves whole (PaliGemma, Gemma 3), except in the two
controls: "causal" is text alone, "full" lets everything see everything. Where a sequence is too short for the images
that its name stands for, they shrink in proportion, so that every layout has every length.
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moda_kernels import ModalityLayout, ModularMask, segment_modalities
from moda_kernels.tokens.tiles import mask_tiles

TEXT, IMAGE = 0, 1
MODALITIES = 2
#: Below this the sequences would lose what their names say.
SHORTEST = 64
#: Rows and columns of the tiles in which a layout's share of partial tiles is counted.
TILE = (128, 64)
#: The most of a sequence that images take.
MOST_IMAGE = 0.9

#: One sequence as (modality, tokens); each run is an item of its own.
Runs = list[tuple[int, int]]
#: From a length and a generator to one sequence, or to packed documents.
Builder = Callable[[int, torch.Generator], list[Runs]]


@dataclass(frozen=True, eq=False)
class Workload:
    """One sequence, or one batch of packed documents, and who sees whom in it.

    Attributes:
        name: in :data:`LAYOUTS`.
        ids: int32 modality ids ``[1, L]``; packed: ``[T]``.
        items: which run a token belongs to, where runs of one modality stand side by side, else None.
        cu_seqlens: int32 ``[N + 1]`` where documents are packed, else None.
        mask: the rules.
        max_segments: as many as there are, so that segmenting on a GPU waits for nothing.
    """

    name: str
    ids: Tensor
    items: Tensor | None
    cu_seqlens: Tensor | None
    mask: ModularMask
    max_segments: int

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    @property
    def length(self) -> int:
        """Tokens, of all documents together."""
        return self.ids.numel()

    def segment(self) -> ModalityLayout:
        """The layout, made anew (contestants that need one time this)."""
        return segment_modalities(
            self.ids,
            num_modalities=MODALITIES,
            item_ids=self.items,
            cu_seqlens=self.cu_seqlens,
            max_segments=self.max_segments,
        )

    @functools.cached_property
    def layout(self) -> ModalityLayout:
        """The layout for everything that is not timed."""
        return self.segment()

    def pairs(self, queries: int | None = None) -> int:
        """Visible (query, key) pairs, counted in closed form.

        Args:
            queries: the last so many tokens ask. Default: all.
        """
        return int(self.mask.count_visible(self.layout, self.layout.queries(queries)).sum())

    @functools.cached_property
    def visible_pairs(self) -> int:
        """(query, key) pairs that the mask shows."""
        return self.pairs()

    @property
    def density(self) -> float:
        """The share of all L² pairs that is visible."""
        return self.visible_pairs / self.length**2

    @property
    def causal(self) -> bool:
        """One sequence under a causal mask: what `is_causal` says."""
        return not self.packed and self.mask == ModularMask.causal(MODALITIES)

    @property
    def full(self) -> bool:
        """One sequence in which everything sees everything: what no mask says."""
        return not self.packed and self.mask == ModularMask.full(MODALITIES)

    @functools.cached_property
    def tiles(self) -> dict[str, Any]:
        """Of tiles of :data:`TILE`: how many the forward visits, and which share of those is partial (needs mask
        arithmetic)."""
        runs = mask_tiles(self.layout, self.mask, *TILE, of_keys=False).queries.runs.long()  # type: ignore[union-attr]
        full, *partial = (runs[..., 1::2] - runs[..., ::2]).sum((0, 1)).tolist()
        visited = full + sum(partial)
        return {"size": list(TILE), "visited": visited, "partial_share": (visited - full) / max(visited, 1)}

    def describe(self) -> dict[str, Any]:
        """What a result file says of this workload."""
        segments = self.layout.segments()
        return {
            "name": self.name,
            "length": self.length,
            "packed": self.packed,
            "documents": self.layout.num_sequences,
            "segments": len(segments),
            "images": int((segments[:, 3] == IMAGE).sum()),
            "text_tokens": int((self.ids == TEXT).sum()),
            "image_tokens": int((self.ids == IMAGE).sum()),
            "visible_pairs": self.visible_pairs,
            "density": self.density,
            "tiles": self.tiles,
        }


def make_workload(name: str, length: int, seed: int = 0, device: str = "cpu") -> Workload:
    """The named workload with `length` tokens; the same for the same arguments, everywhere.

    Raises:
        ValueError: an unknown name, or a length too short to hold what the name says.
    """
    if name not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {name!r}")
    if length < SHORTEST:
        raise ValueError(f"length: expected at least {SHORTEST} tokens, got {length}")
    build, mask = LAYOUTS[name]
    documents = build(length, torch.Generator().manual_seed(seed))
    lengths = [sum(count for _, count in runs) for runs in documents]
    assert sum(lengths) == length
    runs = [run for document in documents for run in document]
    sizes = torch.tensor([count for _, count in runs])
    ids = torch.tensor([modality for modality, _ in runs], dtype=torch.int32).repeat_interleave(sizes).to(device)
    side_by_side = any(a[0] == b[0] for document in documents for a, b in itertools.pairwise(document))
    items = torch.arange(len(runs)).repeat_interleave(sizes).to(device) if side_by_side else None
    if name != "packed":
        return Workload(name, ids[None], None if items is None else items[None], None, mask, len(runs))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    return Workload(name, ids, items, cu_seqlens, mask, len(runs))


def _one_image(tokens: int) -> Builder:
    """A prompt of 35 tokens (the system prompt of LLaVA), one image, and text."""

    def build(length: int, g: torch.Generator) -> list[Runs]:
        prompt = min(35, length // 32)
        (image,) = _fitted([tokens], length - prompt)
        return [[(TEXT, prompt), (IMAGE, image), (TEXT, length - prompt - image)]]

    return build


def _dynamic_resolution(fewest: int, most: int) -> Builder:
    """Images of 256 to 4,096 tokens (log-uniform), with text before, between and after them."""

    def build(length: int, g: torch.Generator) -> list[Runs]:
        sizes = [round(256 * 16 ** float(torch.rand((), generator=g))) for _ in range(_draw(fewest, most, g))]
        images = _fitted(sizes, length)
        return [_between(images, length - sum(images), g)]

    return build


def _interleaved(length: int, g: torch.Generator) -> list[Runs]:
    """A web document: 8 to 32 images (more in longer ones) of 64 to 576 tokens, up to half of it, among texts."""
    count = min(32, max(8, length // 512))
    sizes = [(64, 144, 256, 576)[_draw(0, 3, g)] for _ in range(count)]
    images = _fitted(sizes, length, 0.5)
    return [_between(images, length - sum(images), g)]


def _video(length: int, g: torch.Generator) -> list[Runs]:
    """16 to 128 frames of 196 tokens side by side, each an item that sees itself whole, between two texts."""
    frames = min(128, max(16, int(length * MOST_IMAGE) // 196))
    sizes = _fitted([196] * frames, length)
    text = length - sum(sizes)
    prompt = max(1, text // 4)
    return [[(TEXT, prompt), *((IMAGE, size) for size in sizes), (TEXT, text - prompt)]]


def _packed(length: int, g: torch.Generator) -> list[Runs]:
    """Documents of length/64 to length/4 tokens (log-uniform), with up to three images of 64 to 576 tokens each."""
    documents: list[Runs] = []
    left = length
    while left:
        spread = float(torch.rand((), generator=g))
        size = min(left, max(8, round(length / 64 * math.exp(spread * math.log(16)))))
        images: list[int] = []
        for _ in range(_draw(0, 3, g)):
            fitting = [n for n in (64, 144, 256, 576) if n + sum(images) <= size * 3 // 4]
            if fitting:
                images.append(fitting[_draw(0, len(fitting) - 1, g)])
        documents.append(_between(images, size - sum(images), g))
        left -= size
    return documents


def _text(length: int, g: torch.Generator) -> list[Runs]:
    return [[(TEXT, length)]]


_WITHIN = ModularMask.bidirectional_within(MODALITIES, [IMAGE])

LAYOUTS: dict[str, tuple[Builder, ModularMask]] = {
    "llava-1.5": (_one_image(576), _WITHIN),
    "llava-next": (_one_image(2880), _WITHIN),
    "qwen2-vl": (_dynamic_resolution(1, 8), _WITHIN),
    "qwen2-vl-8": (_dynamic_resolution(8, 8), _WITHIN),
    "interleaved": (_interleaved, _WITHIN),
    "video": (_video, _WITHIN),
    "packed": (_packed, _WITHIN),
    "causal": (_text, ModularMask.causal(MODALITIES)),
    "full": (_one_image(2880), ModularMask.full(MODALITIES)),
}


def _draw(low: int, high: int, g: torch.Generator) -> int:
    """An integer from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=g))


def _fitted(sizes: list[int], length: int, share: float = MOST_IMAGE) -> list[int]:
    """The sizes, or where they take more than their share of the length, smaller in proportion."""
    factor = min(1.0, share * length / sum(sizes))
    return [max(1, int(size * factor)) for size in sizes]


def _between(images: list[int], text: int, g: torch.Generator) -> Runs:
    """Images with `text` tokens before, between and after them, at least one token in each place where they suffice."""
    if not images:
        return [(TEXT, text)]
    spare = max(0, text - len(images) - 1)
    cuts = sorted(torch.randint(spare + 1, (len(images),), generator=g).tolist())
    least = 1 if text > len(images) else 0
    texts = [end - begin + least for begin, end in zip([0, *cuts], [*cuts, spare], strict=True)]
    texts[-1] += text - sum(texts)
    runs: Runs = [(TEXT, texts[0])]
    for image, after in zip(images, texts[1:], strict=True):
        runs += [(IMAGE, image), (TEXT, after)]
    return [run for run in runs if run[1]]
