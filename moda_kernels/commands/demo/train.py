"""Training and measuring the demo's variants: same initial weights, same batches, same number of steps."""

import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moda_kernels import backends
from moda_kernels.attention import moda_attention
from moda_kernels.call import AttentionCall
from moda_kernels.commands.demo.data import (
    KINDS,
    PATCHES,
    WORD_ID,
    Batch,
    Images,
    batches,
    documents,
    load_digits,
    pack,
)
from moda_kernels.commands.demo.model import VARIANTS, Decoder, LayerTrace, Variant
from moda_kernels.diagnostics import attention_share, modal_disparity
from moda_kernels.tokens.mask import ModularMask

#: Tokens of a packed batch.
TOKENS = 256
LEARNING_RATE, WARMUP = 4e-3, 30
#: Held-out accuracy is taken so often for the training curve, on so many of the held-out batches.
CHECKS, CHECK_BATCHES = 10, 8
QUICK_BATCHES = 3


@dataclass(frozen=True, eq=False)
class Material:
    """Everything that the variants share: images, batches in their order, the held-out documents."""

    train_images: Images
    held_out_images: Images
    train: list[Batch]
    held_out: list[Batch]

    @classmethod
    def make(cls, seed: int, steps: int, device: torch.device, quick: bool = False) -> "Material":
        """Everything drawn from one seed. `quick`: a few held-out documents instead of all."""
        split, train_order, held_out_order = (np.random.default_rng([seed, part]) for part in range(3))
        train_images, held_out_images = load_digits(split)
        endless = batches(documents(train_images, train_order), train_images, TOKENS)
        once = batches(documents(held_out_images, held_out_order, endless=False), held_out_images, 2 * TOKENS)
        return cls(
            train_images,
            held_out_images,
            [next(endless).to(device) for _ in range(steps)],
            [batch.to(device) for batch in itertools.islice(once, QUICK_BATCHES if quick else None)],
        )


@dataclass(frozen=True)
class Accuracy:
    """How many answers of one kind were right."""

    right: int
    answers: int

    @property
    def rate(self) -> float:
        return self.right / self.answers if self.answers else math.nan

    @property
    def standard_error(self) -> float:
        """Of the rate, from the number of held-out answers alone."""
        return math.sqrt(self.rate * (1 - self.rate) / self.answers) if self.answers else math.nan


@dataclass(frozen=True)
class Measured:
    """Held-out results: mean loss over text tokens, and accuracies by kind ("digit", "larger")."""

    loss: float
    accuracy: dict[str, Accuracy]


@dataclass(frozen=True, eq=False)
class Shares:
    """Attention between modalities, mean over documents and heads, one entry per layer.

    Attributes:
        share: ``[M, M]`` each, query modality to key modality. disparity: ``[M]`` each.
    """

    share: list[Tensor]
    disparity: list[Tensor]


@dataclass(frozen=True, eq=False)
class Glance:
    """What the answer of one question looked at.

    Attributes:
        question: "left" or "right". answer: the model's. truth: the right one.
        maps: per image ``[SIDE * SIDE]``: the attention mass on its patches (last layer, mean over heads).
    """

    question: str
    answer: str
    truth: str
    maps: list[Tensor]


@dataclass(frozen=True, eq=False)
class Run:
    """One trained variant.

    Attributes:
        losses: training loss of each step. seconds: time of the steps alone. checks: (step, held-out digit accuracy).
    """

    variant: Variant
    backend: str
    parameters: int
    losses: list[float]
    seconds: float
    checks: list[tuple[int, float]]
    held_out: Measured
    shares: Shares
    glances: list[Glance]


class Reporter(Protocol):
    """Takes the steps of a progress bar."""

    def __call__(self, note: str) -> None: ...


@contextmanager
def progress(total: int, label: str) -> Iterator[Reporter]:
    """A progress bar on stderr: tqdm's where it is installed, else a plain one."""
    try:
        from tqdm import tqdm
    except ImportError:
        done, shown = 0, 0.0
        live = sys.stderr.isatty()

        def step(note: str) -> None:
            nonlocal done, shown
            done += 1
            now = time.monotonic()
            if done == total or (live and now - shown > 0.1):
                shown = now
                bar = "#" * (30 * done // total)
                sys.stderr.write(f"\r{label:<11} [{bar:<30}] {done}/{total}  {note}  ")
                sys.stderr.flush()

        yield step
        sys.stderr.write("\n")
        return
    with tqdm(total=total, desc=f"{label:<11}", file=sys.stderr) as bar:

        def advance(note: str) -> None:
            bar.set_postfix_str(note, refresh=False)
            bar.update()

        yield advance


def train(model: Decoder, variant: Variant, material: Material, backend: str | None = None) -> Run:
    """Train a copy of the shared initial weights and measure it on held-out images.

    Args:
        model: the initial weights; it is trained in place.
        backend: as in :func:`moda_kernels.moda_attention`.
    """
    steps = len(material.train)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    check_at = {math.ceil(steps * (i + 1) / CHECKS) for i in range(CHECKS)}
    losses: list[float] = []
    checks: list[tuple[int, float]] = []
    seconds = 0.0
    with progress(steps, variant.name) as step:
        for i, batch in enumerate(material.train):
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * learning_rate_share(i, steps)
            loss = F.cross_entropy(model(batch, variant, backend), batch.target)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())  # waits for the device, so that the time is the step's
            seconds += time.perf_counter() - began
            if i + 1 in check_at:
                measured = measure(model, variant, material.held_out[:CHECK_BATCHES], backend)
                checks.append((i + 1, measured.accuracy["digit"].rate))
            step(f"loss {losses[-1]:.3f}")
    return Run(
        variant,
        backend_name(model, variant, material.held_out[0], backend),
        model.used_parameters(variant),
        losses,
        seconds,
        checks,
        measure(model, variant, material.held_out, backend),
        attention_between(model, variant, material.held_out, backend),
        look(model, variant, pictured(material), backend),
    )


def learning_rate_share(step: int, steps: int) -> float:
    """A short warm-up, then a cosine down to a twentieth."""
    return min(1.0, (step + 1) / WARMUP) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


@torch.no_grad()
def measure(model: Decoder, variant: Variant, held_out: Sequence[Batch], backend: str | None = None) -> Measured:
    """Loss over all text tokens, and how many answers the likeliest word gets right (earlier answers given)."""
    loss, words = 0.0, 0
    right, answers = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for batch in held_out:
        scores = model(batch, variant, backend)
        loss += float(F.cross_entropy(scores, batch.target, reduction="sum"))
        words += len(batch.target)
        hit = scores.argmax(-1) == batch.target
        for name, kind in KINDS.items():
            right[name] += int(hit[batch.kind == kind].sum())
            answers[name] += int((batch.kind == kind).sum())
    return Measured(loss / words, {name: Accuracy(right[name], answers[name]) for name in KINDS})


def most_frequent(held_out: Sequence[Batch], kind: str) -> float:
    """The accuracy of always giving the held-out answers' most frequent one."""
    counts = torch.cat([batch.target[batch.kind == KINDS[kind]] for batch in held_out]).bincount()
    return float(counts.max() / counts.sum())


def _traced(model: Decoder, variant: Variant, batch: Batch, backend: str | None) -> tuple[Tensor, list[LayerTrace]]:
    trace: list[LayerTrace] = []
    return model(batch, variant, backend, trace), trace


@torch.no_grad()
def attention_between(model: Decoder, variant: Variant, held_out: Sequence[Batch], backend: str | None) -> Shares:
    """Attention shares and disparities of each layer over the held-out documents."""
    shares: list[list[Tensor]] = [[] for _ in model.layers]
    disparities: list[list[Tensor]] = [[] for _ in model.layers]
    for batch in held_out:
        for i, layer in enumerate(_traced(model, variant, batch, backend)[1]):
            options = {"key_map": layer.key_map, "enable_gqa": True, "backend": backend}
            shares[i].append(attention_share(layer.query, layer.key, batch.layout, variant.mask, **options))
            disparity = modal_disparity(layer.query, layer.key, batch.layout, variant.mask, **options)
            disparities[i].append(disparity.difference)
    return Shares(
        [torch.cat(layer).nanmean((0, 1)).cpu() for layer in shares],
        [torch.cat(layer).nanmean((0, 1)).cpu() for layer in disparities],
    )


@torch.no_grad()
def even_weights(mask: ModularMask, held_out: Sequence[Batch]) -> Shares:
    """The same for attention that doesn't look: equal weights on all keys that the mask shows."""
    shares, disparities = [], []
    for batch in held_out:
        nothing = batch.pixels.new_zeros(len(batch.words), 1, 1)
        shares.append(attention_share(nothing, nothing, batch.layout, mask))
        disparities.append(modal_disparity(nothing, nothing, batch.layout, mask).difference)
    return Shares(*([torch.cat(x).nanmean((0, 1)).cpu()] for x in (shares, disparities)))


def pictured(material: Material) -> Batch:
    """One held-out document with two images of different digits."""
    images = material.held_out_images
    for batch in material.held_out:
        for document in batch.documents:
            if len({int(images.labels[i]) for i in document.images}) == 2:
                return pack([document], images).to(batch.words.device)
    raise ValueError("no held-out document has two images of different digits")


@torch.no_grad()
def look(model: Decoder, variant: Variant, batch: Batch, backend: str | None) -> list[Glance]:
    """Where the last layer looks when it names the digits of one document.

    A row of attention weights is attention with value = identity, so it comes from the same call as the output.
    """
    scores, trace = _traced(model, variant, batch, backend)
    layer = trace[-1]
    tokens = len(batch.words)
    one_hot = torch.eye(tokens, device=layer.key.device)[:, None].expand(-1, layer.key.shape[1], -1)
    weights = moda_attention(
        layer.query,
        layer.key,
        one_hot,
        enable_gqa=True,
        layout=batch.layout,
        mask=variant.mask,
        key_map=layer.key_map,
        backend=backend,
    )
    (document,) = batch.documents
    words = {number: word for word, number in WORD_ID.items()}
    glances = []
    for place in (batch.kind == KINDS["digit"]).nonzero()[:, 0].tolist():
        token = int(batch.source[place])
        row = weights[token].mean(0).cpu()
        first = len(document.before)
        maps = [row[first + i * PATCHES : first + (i + 1) * PATCHES] for i in range(len(document.images))]
        answer, truth = words[int(scores[place].argmax())], words[int(batch.target[place])]
        glances.append(Glance(words[int(batch.words[token - 1])], answer, truth, maps))
    return sorted(glances, key=lambda glance: glance.question)


@torch.no_grad()
def backend_name(model: Decoder, variant: Variant, batch: Batch, backend: str | None) -> str:
    """The backend that this variant's attention runs on."""
    layer = _traced(model, variant, batch, backend)[1][0]
    call = AttentionCall.make(
        layer.query,
        layer.key,
        layer.key,
        enable_gqa=True,
        layout=batch.layout,
        mask=variant.mask,
        key_map=layer.key_map,
    )
    return backends.choose(call, backend).name


def train_all(
    seed: int, steps: int, backend: str | None = None, device: str = "cpu", quick: bool = False
) -> tuple[list[Run], Material]:
    """All variants, from the same weights, over the same batches in the same order."""
    place = torch.device(device)
    material = Material.make(seed, steps, place, quick)
    return [train(Decoder(seed).to(place), variant, material, backend) for variant in VARIANTS], material
