"""The demo's tasks: what documents say about their images, and what of it is to be answered.

    which    start left : [image] [image] it is seven            the digit of the image that the text before named
    naming   start 1 image : [image] it is seven odd .           and, of two images, which is the larger,
             start 2 images : [image] [image] larger is left . right is three odd . left is seven odd .
    claim    start : [image] it is seven ? yes
    hint     start : [image] hint says two . it is seven         a hint that says nothing
    bait     the same, where hints are always right in training, and say nothing when it is tested

Training documents are endless and drawn from the training images; held-out documents show every held-out image.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moda_kernels.commands.demo.data import DIGITS, Answer, Document, Images, Rng

SIDES = ("left", "right")


@dataclass(frozen=True)
class Task:
    """What is trained and how it is asked.

    Attributes:
        name: as `--task` says it. summary: one line for readers.
        training, held_out: the documents about some images, in an order drawn from a generator.
        kinds: what is asked, of `data.KINDS`; the first is the one that counts.
        tokens: of a packed training batch, at most. answers_only: the loss is that of the answers alone.
        layers, steps: of the demo, if not said otherwise.
    """

    name: str
    summary: str
    training: Callable[[Images, Rng], Iterator[Document]]
    held_out: Callable[[Images, Rng], Iterator[Document]]
    kinds: tuple[str, ...]
    tokens: int
    answers_only: bool
    layers: int
    steps: int


def _which(images: Images, i: int, j: int, side: int) -> Document:
    labels = int(images.labels[i]), int(images.labels[j])
    after = ("it", "is", DIGITS[labels[side]])
    return Document((i, j), labels, ("start", SIDES[side], ":"), after, (Answer(2, "digit", side),))


def _which_training(images: Images, rng: Rng) -> Iterator[Document]:
    while True:
        i, j, side = (int(rng.integers(n)) for n in (len(images), len(images), 2))
        yield _which(images, i, j, side)


def _which_held_out(images: Images, rng: Rng) -> Iterator[Document]:
    """Every image beside another one, and each pair asked both ways."""
    order = rng.permutation(len(images)).tolist()
    pairs = [(i, j, side) for i, j in zip(order, order[1:] + order[:1], strict=True) for side in (0, 1)]
    for number in rng.permutation(len(pairs)).tolist():  # so that what stands beside a document says nothing about it
        yield _which(images, *pairs[number])


def about(images: Images, chosen: tuple[int, ...], rng: Rng) -> Document:
    """All that the task "naming" says about one or two images; the order of its last sentences is drawn."""
    labels = tuple(int(images.labels[i]) for i in chosen)
    number = ("1", "image") if len(chosen) == 1 else ("2", "images")
    names = ("it",) if len(chosen) == 1 else SIDES
    after: list[str] = []
    answers: list[Answer] = []
    if len(chosen) == 2:
        larger = "same" if labels[0] == labels[1] else names[int(labels[1] > labels[0])]
        answers.append(Answer(2, "larger"))
        after += ["larger", "is", larger, "."]
    for i in rng.permutation(len(chosen)).tolist():
        answers.append(Answer(len(after) + 2, "digit", i))
        after += [names[i], "is", DIGITS[labels[i]], "odd" if labels[i] % 2 else "even", "."]
    return Document(chosen, labels, ("start", *number, ":"), tuple(after), tuple(answers))


def _naming_held_out(images: Images, rng: Rng) -> Iterator[Document]:
    """Documents about all images in a drawn order, half of them with one image."""
    left = list(rng.permutation(len(images)))
    while left:
        taken = tuple(int(left.pop()) for _ in range(min(len(left), int(rng.integers(1, 3)))))
        yield about(images, taken, rng)


def _naming_training(images: Images, rng: Rng) -> Iterator[Document]:
    while True:
        yield from _naming_held_out(images, rng)


def _claim(images: Images, i: int, said: int) -> Document:
    label = int(images.labels[i])
    after = ("it", "is", DIGITS[said], "?", "yes" if said == label else "no")
    return Document((i,), (label,), ("start", ":"), after, (Answer(4, "claim", 0),))


def _wrong(label: int, rng: Rng) -> int:
    return (label + int(rng.integers(1, 10))) % 10


def _claim_training(images: Images, rng: Rng) -> Iterator[Document]:
    while True:
        i = int(rng.integers(len(images)))
        label = int(images.labels[i])
        yield _claim(images, i, label if rng.integers(2) else _wrong(label, rng))


def _claim_held_out(images: Images, rng: Rng) -> Iterator[Document]:
    """Of every image what is true, and something that isn't."""
    for i in rng.permutation(len(images)).tolist():
        label = int(images.labels[i])
        yield _claim(images, i, label)
        yield _claim(images, i, _wrong(label, rng))


def _hint(images: Images, i: int, said: int) -> Document:
    label = int(images.labels[i])
    after = ("hint", "says", DIGITS[said], ".", "it", "is", DIGITS[label])
    return Document((i,), (label,), ("start", ":"), after, (Answer(6, "digit", 0),))


def _hinted(name: str, trust: float, summary: str) -> Task:
    """Hints that are right with this probability, and else drawn from all digits. Held-out hints say nothing: they are
    drawn."""

    def training(images: Images, rng: Rng) -> Iterator[Document]:
        while True:
            i = int(rng.integers(len(images)))
            told = rng.random() < trust
            yield _hint(images, i, int(images.labels[i]) if told else int(rng.integers(10)))

    def held_out(images: Images, rng: Rng) -> Iterator[Document]:
        for i in rng.permutation(len(images)).tolist():
            yield _hint(images, i, int(rng.integers(10)))

    return Task(name, summary, training, held_out, ("digit",), 8 * 25, True, 2, 400)


_TASKS = (
    Task(
        "which",
        "two images, and the text before them says which one is to be named",
        _which_training,
        _which_held_out,
        ("digit",),
        8 * 38,
        True,
        1,
        400,
    ),
    Task(
        "naming",
        "name one or two images, say odd or even, and which of the two is larger",
        _naming_training,
        _naming_held_out,
        ("digit", "larger"),
        256,
        False,
        2,
        800,
    ),
    Task(
        "claim",
        "the text after an image claims a digit: is it so?",
        _claim_training,
        _claim_held_out,
        ("claim",),
        8 * 23,
        True,
        2,
        400,
    ),
    _hinted("hint", 0.0, "name the digit beside a hint that says nothing"),
    _hinted("bait", 1.0, "the same, but in training the hint is always right: the image is never needed"),
)
TASKS = {task.name: task for task in _TASKS}
