"""The demo's data: scanned digits as packed sequences of two modalities.

The images are real, 1,797 hand-written digits of 8×8 pixels that come with scikit-learn, cut into 16 patches; what is
said about them is made from their labels, in documents that `tasks.py` writes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moda_kernels.tokens.layout import ModalityLayout
from moda_kernels.tokens.segments import segment_modalities

TEXT, IMAGE = 0, 1
MODALITIES = ("text", "image")

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = (
    *DIGITS,
    "odd",
    "even",
    "left",
    "right",
    "same",
    "it",
    "larger",
    "is",
    ".",
    ":",
    "start",
    "1",
    "2",
    "image",
    "images",
    "?",
    "yes",
    "no",
    "hint",
    "says",
)
WORD_ID = {word: i for i, word in enumerate(WORDS)}

#: Images are cut into SIDE × SIDE patches of PATCH × PATCH pixels.
SIDE, PATCH = 4, 2
PATCHES, PIXELS = SIDE * SIDE, PATCH * PATCH
HELD_OUT = 360

Rng = np.random.Generator


@dataclass(frozen=True, eq=False)
class Images:
    """Images with their labels and their numbers in the whole data set (so that a split can be checked).

    Attributes:
        pixels: float32 ``[N, 8, 8]``, 0…1. labels: int64 ``[N]``. index: int64 ``[N]``.
    """

    pixels: NDArray[np.float32]
    labels: NDArray[np.int64]
    index: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    def patches(self, i: int) -> NDArray[np.float32]:
        """Image i, row by row of patches: ``[PATCHES, PIXELS]``, centred."""
        grid = self.pixels[i].reshape(SIDE, PATCH, SIDE, PATCH).swapaxes(1, 2)
        centred: NDArray[np.float32] = grid.reshape(PATCHES, PIXELS) * 2 - 1
        return centred


def load_digits(rng: Rng) -> tuple[Images, Images]:
    """The images for training and those held out, which no training document contains.

    Raises:
        ImportError: no scikit-learn.
    """
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    pixels = (digits.images / 16).astype(np.float32)
    order = rng.permutation(len(pixels))
    train, held_out = order[HELD_OUT:], order[:HELD_OUT]
    return tuple(Images(pixels[i], digits.target[i].astype(np.int64), i) for i in (train, held_out))  # type: ignore[return-value]


class Answer(NamedTuple):
    """A word of a document that only its images can tell.

    Attributes:
        place: its place in the text after the images.
        kind: what is asked, of `KINDS`. image: the number of the image that it is about, if it is about one.
    """

    place: int
    kind: str
    image: int | None = None


KINDS = {"digit": 1, "larger": 2, "claim": 3}


@dataclass(frozen=True)
class Document:
    """One document: `images` (numbers in an `Images`), their labels, the text before and after them, its answers."""

    images: tuple[int, ...]
    labels: tuple[int, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    answers: tuple[Answer, ...]

    @property
    def tokens(self) -> int:
        return len(self.before) + PATCHES * len(self.images) + len(self.after)

    def other(self, answer: Answer) -> str | None:
        """The digit of the image that was not asked for, where that is another one."""
        if answer.kind != "digit" or answer.image is None or len(self.images) != 2:
            return None
        label = self.labels[1 - answer.image]
        return None if label == self.labels[answer.image] else DIGITS[label]


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed documents, T tokens in all.

    Attributes:
        layout: who is who; each image is a segment of its own.
        words: int64 ``[T]``, word ids (0 at image tokens). pixels: float32 ``[T, PIXELS]`` (0 at text tokens).
        item: int64 ``[T]``, 0 for text, else which of its document's images, from 1 on.
        source: int64 ``[P]``, tokens whose next token is to be said. target: int64 ``[P]``, that word.
        kind: int64 ``[P]``, of an answer its number in `KINDS`, else 0.
        asked: int64 ``[P]``, the item that an answer is about, else 0. other: int64 ``[P]``, the word that the other
            image would have for an answer, else -1.
        documents: what was packed.
    """

    layout: ModalityLayout
    words: Tensor
    pixels: Tensor
    item: Tensor
    source: Tensor
    target: Tensor
    kind: Tensor
    asked: Tensor
    other: Tensor
    documents: tuple[Document, ...]

    def to(self, device: torch.device) -> "Batch":
        names = ("words", "pixels", "item", "source", "target", "kind", "asked", "other")
        return replace(self, layout=self.layout.to(device), **{name: getattr(self, name).to(device) for name in names})

    def answers_only(self) -> "Batch":
        """The same documents where nothing is to be learnt but the answers."""
        kept = self.kind > 0
        names = ("source", "target", "kind", "asked", "other")
        return replace(self, **{name: getattr(self, name)[kept] for name in names})


def pack(documents: Sequence[Document], images: Images) -> Batch:
    """Documents one after the other."""
    modality: list[int] = []
    item: list[int] = []
    words: list[int] = []
    answers: dict[int, tuple[int, int, int]] = {}  # by token: kind, asked, other
    bounds = [0]
    pixels = np.zeros((sum(d.tokens for d in documents), PIXELS), np.float32)

    def say(text: Iterable[str]) -> None:
        ids = [WORD_ID[word] for word in text]
        words.extend(ids)
        modality.extend([TEXT] * len(ids))
        item.extend([0] * len(ids))

    for document in documents:
        say(document.before)
        for i, image in enumerate(document.images):
            pixels[len(modality) : len(modality) + PATCHES] = images.patches(image)
            words += [0] * PATCHES
            modality += [IMAGE] * PATCHES
            item += [i + 1] * PATCHES
        for answer in document.answers:
            word = document.other(answer)
            number = 0 if answer.image is None else answer.image + 1
            answers[len(words) + answer.place] = (KINDS[answer.kind], number, -1 if word is None else WORD_ID[word])
        say(document.after)
        bounds.append(len(modality))
    is_text = torch.tensor(modality) == TEXT
    is_text[bounds[:-1]] = False  # nothing comes before a document's first token
    source = is_text[1:].nonzero()[:, 0]
    word_ids = torch.tensor(words)
    kind, asked, other = torch.tensor([answers.get(int(t) + 1, (0, 0, -1)) for t in source]).view(-1, 3).unbind(1)
    layout = segment_modalities(
        torch.tensor(modality),
        num_modalities=len(MODALITIES),
        item_ids=torch.tensor(item),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
    )
    return Batch(
        layout,
        word_ids,
        torch.from_numpy(pixels),
        torch.tensor(item),
        source,
        word_ids[source + 1],
        kind,
        asked,
        other,
        tuple(documents),
    )


def batches(stream: Iterable[Document], images: Images, tokens: int) -> Iterator[Batch]:
    """As many documents as fit into `tokens`, again and again, until the stream ends."""
    taken: list[Document] = []
    for document in stream:
        if taken and sum(d.tokens for d in taken) + document.tokens > tokens:
            yield pack(taken, images)
            taken = []
        taken.append(document)
    if taken:
        yield pack(taken, images)
