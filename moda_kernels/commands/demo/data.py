"""The demo's data: scanned digits and short texts about them, as packed sequences of two modalities.

The images are real, 1,797 hand-written digits of 8×8 pixels that come with scikit-learn; the text is made from their
labels. A document is a prompt, one or two images as 16 patches each, and sentences that only the images can answer:

    one digit :  [image]          it is seven odd .
    two digits : [image] [image]  larger is left . right is three odd . left is seven odd .
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Document:
    """One document: `images` (numbers within an `Images`), and its text before and after them.

    Attributes:
        answers: places in `after` of the words that only the images can tell, with their kind ("digit", "larger").
    """

    images: tuple[int, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    answers: tuple[tuple[int, str], ...]

    @property
    def tokens(self) -> int:
        return len(self.before) + PATCHES * len(self.images) + len(self.after)


def about(labels: Sequence[int], images: tuple[int, ...], rng: Rng) -> Document:
    """The document about one or two images with these labels; the order of its last sentences is drawn."""
    number = ("1", "image") if len(images) == 1 else ("2", "images")
    names = ("it",) if len(images) == 1 else ("left", "right")
    after: list[str] = []
    answers: list[tuple[int, str]] = []
    if len(images) == 2:
        larger = "same" if labels[0] == labels[1] else names[int(labels[1] > labels[0])]
        answers.append((2, "larger"))
        after += ["larger", "is", larger, "."]
    for i in rng.permutation(len(images)):
        answers.append((len(after) + 2, "digit"))
        after += [names[i], "is", DIGITS[labels[i]], "odd" if labels[i] % 2 else "even", "."]
    return Document(images, ("start", *number, ":"), tuple(after), tuple(answers))


def documents(images: Images, rng: Rng, *, endless: bool = True) -> Iterator[Document]:
    """Documents about all images in a drawn order, half of them with one image; then again, if endless."""
    while True:
        left = list(rng.permutation(len(images)))
        while left:
            taken = tuple(int(left.pop()) for _ in range(min(len(left), int(rng.integers(1, 3)))))
            yield about([int(images.labels[i]) for i in taken], taken, rng)
        if not endless:
            return


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed documents, T tokens in all.

    Attributes:
        layout: who is who; each image is a segment of its own.
        words: int64 ``[T]``, word ids (0 at image tokens). pixels: float32 ``[T, PIXELS]`` (0 at text tokens).
        source: int64 ``[P]``, tokens whose next token is text: where there is something to learn.
        target: int64 ``[P]``, that text. kind: int64 ``[P]``, 1 for a digit's name, 2 for left/right/same, else 0.
        documents: what was packed.
    """

    layout: ModalityLayout
    words: Tensor
    pixels: Tensor
    source: Tensor
    target: Tensor
    kind: Tensor
    documents: tuple[Document, ...]

    def to(self, device: torch.device) -> "Batch":
        words, pixels, source, target, kind = (
            x.to(device) for x in (self.words, self.pixels, self.source, self.target, self.kind)
        )
        return Batch(self.layout.to(device), words, pixels, source, target, kind, self.documents)


KINDS = {"digit": 1, "larger": 2}


def pack(documents: Sequence[Document], images: Images) -> Batch:
    """Documents one after the other."""
    modality: list[int] = []
    item: list[int] = []
    words: list[int] = []
    kind: list[int] = []
    bounds = [0]
    pixels = np.zeros((sum(d.tokens for d in documents), PIXELS), np.float32)
    for document in documents:
        kinds = {place: KINDS[name] for place, name in document.answers}
        words += [WORD_ID[w] for w in document.before]
        modality += [TEXT] * len(document.before)
        item += [0] * len(document.before)
        for i, image in enumerate(document.images):
            pixels[len(modality) : len(modality) + PATCHES] = images.patches(image)
            words += [0] * PATCHES
            modality += [IMAGE] * PATCHES
            item += [i + 1] * PATCHES
        kind += [0] * (len(words) - len(kind)) + [kinds.get(place, 0) for place in range(len(document.after))]
        words += [WORD_ID[w] for w in document.after]
        modality += [TEXT] * len(document.after)
        item += [0] * len(document.after)
        bounds.append(len(modality))
    is_text = torch.tensor(modality) == TEXT
    is_text[bounds[:-1]] = False  # nothing comes before a document's first token
    source = is_text[1:].nonzero()[:, 0]
    word_ids = torch.tensor(words)
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
        source,
        word_ids[source + 1],
        torch.tensor(kind)[source + 1],
        tuple(documents),
    )


def batches(stream: Iterator[Document], images: Images, tokens: int) -> Iterator[Batch]:
    """As many documents as fit into `tokens`, again and again, until the stream ends."""
    taken: list[Document] = []
    for document in stream:
        if taken and sum(d.tokens for d in taken) + document.tokens > tokens:
            yield pack(taken, images)
            taken = []
        taken.append(document)
    if taken:
        yield pack(taken, images)
