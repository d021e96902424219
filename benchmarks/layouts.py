"""Named, seeded sequences with the modalities of real multimodal inputs; the length is a parameter.

Two modalities, text and image. Texts are causal, images see themselves whole (PaliGemma, Gemma 3), except in the two
controls: "causal" is text alone, "full" lets everything see everything.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moda_kernels import ModalityLayout, ModularMask, segment_modalities

TEXT, IMAGE = 0, 1
MODALITIES = 2
#: Below this the sequences would lose what their names say.
SHORTEST = 64

#: One sequence as (modality, tokens).
Runs = list[tuple[int, int]]
#: From a length and a generator to one sequence, or to packed documents.
Builder = Callable[[int, torch.Generator], list[Runs]]


@dataclass(frozen=True, eq=False)
class Workload:
    """One sequence, or one batch of packed documents, and who sees whom in it.

    Attributes:
        name: in :data:`LAYOUTS`.
        ids: int32 modality ids ``[1, L]``; packed: ``[T]``.
        cu_seqlens: int32 ``[N + 1]`` where documents are packed, else None.
        mask: the rules.
    """

    name: str
    ids: Tensor
    cu_seqlens: Tensor | None
    mask: ModularMask

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    @property
    def length(self) -> int:
        """Tokens, of all documents together."""
        return self.ids.numel()

    def segment(self) -> ModalityLayout:
        """The layout, made anew (contestants that need one time this)."""
        return segment_modalities(self.ids, num_modalities=MODALITIES, cu_seqlens=self.cu_seqlens)

    @functools.cached_property
    def layout(self) -> ModalityLayout:
        """The layout for everything that is not timed."""
        return self.segment()

    @functools.cached_property
    def visible_pairs(self) -> int:
        """(query, key) pairs that the mask shows, counted in closed form."""
        return int(self.mask.count_visible(self.layout, self.layout.queries()).sum())

    @property
    def density(self) -> float:
        """The share of all L² pairs that is visible."""
        return self.visible_pairs / self.length**2

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
        }


def make_workload(name: str, length: int, seed: int = 0) -> Workload:
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
    ids = torch.cat(
        [torch.full((count,), modality, dtype=torch.int32) for runs in documents for modality, count in runs]
    )
    if name != "packed":
        return Workload(name, ids[None], None, mask)
    return Workload(name, ids, torch.tensor([0, *lengths]).cumsum(0).int(), mask)


def _image_text(length: int, g: torch.Generator) -> list[Runs]:
    """A short prompt, one image of 2,880 tokens (below 4,096 in proportion), and text."""
    image = min(2880, round(length * 2880 / 4096))
    prompt = max(1, min(32, length // 64))
    return [[(TEXT, prompt), (IMAGE, image), (TEXT, length - prompt - image)]]


def _three_images(length: int, g: torch.Generator) -> list[Runs]:
    """At 8,192 tokens images of 2,880, 576 and 1,152, else in proportion, with text before, between and after them."""
    images = [round(tokens * length / 8192) for tokens in (2880, 576, 1152)]
    return [_between(images, length - sum(images), g)]


def _interleaved(length: int, g: torch.Generator) -> list[Runs]:
    """Texts of 5 to 60 tokens and images of 16 to 64 in turn, until the sequence is full."""
    runs: Runs = []
    left = length
    while left:
        modality = IMAGE if len(runs) % 2 else TEXT
        tokens = _draw(16, 64, g) if modality == IMAGE else _draw(5, 60, g)
        runs.append((modality, min(tokens, left)))
        left -= runs[-1][1]
    return [runs]


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
    "image-text": (_image_text, _WITHIN),
    "three-images": (_three_images, _WITHIN),
    "interleaved": (_interleaved, _WITHIN),
    "packed": (_packed, _WITHIN),
    "causal": (_text, ModularMask.causal(MODALITIES)),
    "full": (_image_text, ModularMask.full(MODALITIES)),
}


def _draw(low: int, high: int, g: torch.Generator) -> int:
    """An integer from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=g))


def _between(images: list[int], text: int, g: torch.Generator) -> Runs:
    """Images with `text` tokens before, between and after them, at least one token in each place."""
    cuts = sorted((torch.randperm(text - 1, generator=g)[: len(images)] + 1).tolist()) if images else []
    texts = [end - begin for begin, end in zip([0, *cuts], [*cuts, text], strict=True)]
    runs: Runs = [(TEXT, texts[0])]
    for image, after in zip(images, texts[1:], strict=True):
        runs += [(IMAGE, image), (TEXT, after)]
    return runs
