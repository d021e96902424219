"""Training one of the demo's models, and measuring it: its answers, who attends to whom, what an answer looks at."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moda_kernels import backends
from moda_kernels.alignment.maps import align_keys
from moda_kernels.alignment.training import parameter_groups
from moda_kernels.attention import moda_attention
from moda_kernels.call import AttentionCall
from moda_kernels.commands.demo.data import KINDS, PATCHES, WORDS, Batch, Images, batches, load_digits, pack
from moda_kernels.commands.demo.model import Decoder, LayerTrace, Variant
from moda_kernels.commands.demo.tasks import TASKS, Task
from moda_kernels.diagnostics import attention_share, modal_disparity
from moda_kernels.tokens.mask import ModularMask

LEARNING_RATE, WARMUP = 4e-3, 30
#: Held-out accuracy is taken so often for the training curve, on so many of the held-out batches.
CHECKS, CHECK_BATCHES = 10, 8
#: Of `--quick`: steps, and held-out batches.
QUICK_STEPS, QUICK_BATCHES = 12, 3


@dataclass(frozen=True)
class Plan:
    """One model to be trained: everything that decides its numbers.

    Attributes:
        task: a name of `TASKS`. seed: of weights, split and order.
        before: a task that plain attention is trained on first, for so many steps; the variant starts from there.
        quick: few held-out documents.
    """

    task: str
    variant: Variant
    seed: int
    layers: int
    steps: int
    lr: float = LEARNING_RATE
    before: tuple[str, int] | None = None
    backend: str | None = None
    device: str = "cpu"
    quick: bool = False

    @property
    def all_steps(self) -> int:
        return self.steps + (self.before[1] if self.before else 0)


@dataclass(frozen=True, eq=False)
class Material:
    """Everything that the variants share: images, batches in their order, the held-out documents."""

    task: Task
    train_images: Images
    held_out_images: Images
    train: list[Batch]
    held_out: list[Batch]

    @classmethod
    def make(cls, task: str, seed: int, steps: int, device: str = "cpu", quick: bool = False) -> "Material":
        """Everything drawn from one seed. `quick`: a few held-out documents instead of all."""
        what = TASKS[task]
        split, train_order, held_out_order = (np.random.default_rng([seed, part]) for part in range(3))
        train_images, held_out_images = load_digits(split)
        endless = batches(what.training(train_images, train_order), train_images, what.tokens)
        shown = what.held_out(held_out_images, held_out_order)
        once = list(
            itertools.islice(batches(shown, held_out_images, 2 * what.tokens), QUICK_BATCHES if quick else None)
        )
        if len(once) > 1 and len(once[-1].documents) == 1:  # the control borrows from another one
            once[-2:] = [pack([*once[-2].documents, *once[-1].documents], held_out_images)]
        place = torch.device(device)

        def ready(batch: Batch) -> Batch:
            return (batch.answers_only() if what.answers_only else batch).to(place)

        return cls(
            what,
            train_images,
            held_out_images,
            [ready(next(endless)) for _ in range(steps)],
            [ready(batch) for batch in once],
        )


#: The variants of one seed are trained one after the other.
material_of = lru_cache(maxsize=2)(Material.make)


@dataclass(frozen=True)
class Accuracy:
    """How many answers of one kind were right, and how many named the other image instead."""

    right: int
    other: int
    answers: int

    @property
    def rate(self) -> float:
        return self.right / self.answers if self.answers else math.nan


@dataclass(frozen=True)
class Measured:
    """Held-out results: mean loss over what is to be said, and accuracies by kind."""

    loss: float
    accuracy: dict[str, Accuracy]


@dataclass(frozen=True)
class Shares:
    """Attention between modalities, mean over documents and heads, one entry per layer, as plain numbers.

    Attributes:
        share: ``[M][M]`` each, query modality to key modality. disparity: ``[M]`` each. signed: ``[M]`` each, log₂ of
            the attention per visible key of the own modality over that of the other.
        asked: of the rows that give an answer about an image: the attention to that image, and to the other one.
        length: the mean of ‖k'‖ / ‖k‖ over the image tokens; 1 without alignment.
    """

    share: list[list[list[float]]]
    disparity: list[list[float]]
    signed: list[list[float]]
    asked: list[tuple[float, float]] = field(default_factory=list)
    length: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Glance:
    """What the answer of one question looked at.

    Attributes:
        question: the document's text up to the answer. answer: the model's. truth: the right one.
        maps: per image ``[SIDE * SIDE]``: the attention mass on its patches (last layer, mean over heads).
        images: the held-out images' numbers. asked: which of them it is about.
    """

    question: str
    answer: str
    truth: str
    maps: list[list[float]]
    images: tuple[int, ...]
    asked: int


@dataclass(frozen=True)
class Run:
    """One trained model.

    Attributes:
        losses: training loss of each step. seconds: time of the steps alone. checks: (step, held-out accuracy).
    """

    plan: Plan
    backend: str
    parameters: int
    losses: list[float]
    seconds: float
    checks: list[tuple[int, float]]
    held_out: Measured
    shares: Shares
    glances: list[Glance]

    @property
    def rate(self) -> float:
        """Held-out accuracy in what the task is about."""
        return self.held_out.accuracy[TASKS[self.plan.task].kinds[0]].rate


def train(plan: Plan, tell: Callable[[float], None] = lambda loss: None) -> Run:
    """Train one model and measure it on held-out images.

    Args:
        tell: is called with the loss after each step.
    """
    material = material_of(plan.task, plan.seed, plan.steps, plan.device, plan.quick)
    model = Decoder(plan.seed, plan.variant, plan.layers).to(plan.device)
    if plan.before is not None:
        _start_from(model, plan, tell)
    checks: list[tuple[int, float]] = []
    check_at = {math.ceil(plan.steps * (i + 1) / CHECKS) for i in range(CHECKS)}
    losses: list[float] = []
    seconds, began = 0.0, time.perf_counter()
    for i, loss in enumerate(_steps(model, material.train, plan)):
        losses.append(loss)
        seconds += time.perf_counter() - began
        if i + 1 in check_at:
            measured = measure(model, material.task, material.held_out[:CHECK_BATCHES], plan.backend)
            checks.append((i + 1, measured.accuracy[material.task.kinds[0]].rate))
        tell(loss)
        began = time.perf_counter()
    return Run(
        plan,
        backend_name(model, material.held_out[0], plan.backend),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        losses,
        seconds,
        checks,
        measure(model, material.task, material.held_out, plan.backend),
        attention_between(model, material.held_out, plan.backend),
        look(model, material, plan.backend),
    )


def _steps(model: Decoder, material: Sequence[Batch], plan: Plan) -> Iterator[float]:
    """The loss of each step of training."""
    groups = parameter_groups(model, plan.lr, rate=plan.variant.rate)
    rates = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    for i, batch in enumerate(material):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * learning_rate_share(i, len(material))
        loss = F.cross_entropy(model(batch, plan.backend), batch.target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item()  # waits for the device, so that the time is the step's


def _start_from(model: Decoder, plan: Plan, tell: Callable[[float], None]) -> None:
    """The weights of plain attention, trained on another task."""
    assert plan.before is not None
    task, steps = plan.before
    plain = Variant("before", "", mask=plan.variant.mask)
    first = Decoder(plan.seed, plain, plan.layers).to(plan.device)
    material = material_of(task, plan.seed, steps, plan.device, plan.quick)
    before = Plan(task, plain, plan.seed, plan.layers, steps, backend=plan.backend, device=plan.device)
    for loss in _steps(first, material.train, before):
        tell(loss)
    model.load_state_dict(first.state_dict(), strict=False)


def learning_rate_share(step: int, steps: int) -> float:
    """A short warm-up, then a cosine down to a twentieth."""
    return min(1.0, (step + 1) / WARMUP) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


@torch.no_grad()
def measure(model: Decoder, task: Task, held_out: Sequence[Batch], backend: str | None = None) -> Measured:
    """The loss, and how many answers the likeliest word gets right (earlier answers given)."""
    loss, words = 0.0, 0
    counts = {kind: [0, 0, 0] for kind in task.kinds}
    for batch in held_out:
        scores = model(batch, backend)
        loss += float(F.cross_entropy(scores, batch.target, reduction="sum"))
        words += len(batch.target)
        said = scores.argmax(-1)
        for kind, count in counts.items():
            of_kind = batch.kind == KINDS[kind]
            for i, hits in enumerate((said == batch.target, said == batch.other, torch.ones_like(of_kind))):
                count[i] += int((hits & of_kind).sum())
    return Measured(loss / words, {kind: Accuracy(*count) for kind, count in counts.items()})


def most_frequent(held_out: Sequence[Batch], kind: str) -> float:
    """The accuracy of always giving the held-out answers' most frequent one."""
    counts = torch.cat([batch.target[batch.kind == KINDS[kind]] for batch in held_out]).bincount()
    return float(counts.max() / counts.sum())


def _traced(model: Decoder, batch: Batch, backend: str | None) -> tuple[Tensor, list[LayerTrace]]:
    trace: list[LayerTrace] = []
    return model(batch, backend, trace), trace


def _weights(layer: LayerTrace, value: Tensor, batch: Batch, mask: ModularMask, backend: str | None) -> Tensor:
    """Attention weights summed over the kinds of keys that one-hot values ``[T, kinds]`` say: ``[T, kinds]``, mean over
    heads. A row of attention weights is attention with such values."""
    out = moda_attention(
        layer.query,
        layer.key,
        value[:, None].expand(-1, layer.key.shape[1], -1),
        enable_gqa=True,
        layout=batch.layout,
        mask=mask,
        key_map=layer.key_map,
        pair_bias=layer.pair_bias,
        pseudo=layer.pseudo,
        backend=backend,
    )
    return out.mean(1)


def _none(model: Decoder) -> list[list[Tensor]]:
    """A list for each layer."""
    return [[] for _ in model.layers]


@torch.no_grad()
def attention_between(model: Decoder, held_out: Sequence[Batch], backend: str | None) -> Shares:
    """Attention between modalities, and from answers to images, in each layer over the held-out documents."""
    mask = model.variant.mask
    shares, disparities, signed, asked, lengths = [_none(model) for _ in range(5)]
    for batch in held_out:
        answers = batch.asked > 0
        items = F.one_hot(batch.item, 3).to(batch.pixels.dtype)  # text, first image, second image
        for i, layer in enumerate(_traced(model, batch, backend)[1]):
            options: dict[str, Any] = {"key_map": layer.key_map, "enable_gqa": True, "backend": backend}
            options |= {"pair_bias": layer.pair_bias, "pseudo": layer.pseudo}
            shares[i].append(attention_share(layer.query, layer.key, batch.layout, mask, **options))
            found = modal_disparity(layer.query, layer.key, batch.layout, mask, **options)
            disparities[i].append(found.difference)
            signed[i].append((found.own / found.cross).log2())
            rows = _weights(layer, items, batch, mask, backend)[batch.source[answers]]
            fused = layer.key if layer.key_map is None else align_keys(layer.key, layer.key_map, batch.layout)
            lengths[i].append((fused.norm(dim=-1) / layer.key.norm(dim=-1))[batch.item > 0])
            to_asked = rows.gather(1, batch.asked[answers][:, None])[:, 0]
            asked[i].append(torch.stack((to_asked, rows[:, 1:].sum(1) - to_asked), 1))
    share, disparity, ratio = (
        [torch.cat(layer).nanmean((0, 1)).tolist() for layer in x] for x in (shares, disparities, signed)
    )
    return Shares(
        share,
        disparity,
        ratio,
        [tuple(torch.cat(layer).mean(0).tolist()) for layer in asked],
        [float(torch.cat(layer).mean()) for layer in lengths],
    )


@torch.no_grad()
def even_weights(mask: ModularMask, held_out: Sequence[Batch]) -> Shares:
    """The same for attention that doesn't look: equal weights on all keys that the mask shows."""
    shares, disparities = [], []
    for batch in held_out:
        nothing = batch.pixels.new_zeros(len(batch.words), 1, 1)
        shares.append(attention_share(nothing, nothing, batch.layout, mask))
        disparities.append(modal_disparity(nothing, nothing, batch.layout, mask).difference)
    share, disparity = ([torch.cat(x).nanmean((0, 1)).tolist()] for x in (shares, disparities))
    return Shares(share, disparity, [[0.0] * len(disparity[0])])


def pictured(material: Material) -> tuple[Batch, list[int]]:
    """The first held-out images of different digits with all that is asked about them: a batch, and which of its
    documents those are. Each stands beside one about other images, which the control borrows from."""
    documents = list(material.task.held_out(material.held_out_images, np.random.default_rng(0)))
    clear = [d for d in documents if len(set(d.labels)) == len(d.labels)]
    most = max(len(d.images) for d in clear)
    chosen = next(d.images for d in clear if len(d.images) == most)
    asked = [d for d in documents if d.images == chosen]
    beside = [d for d in documents if not set(d.images) & set(chosen) and len(d.images) == most][: len(asked)]
    packed = [d for pair in zip(asked, beside, strict=True) for d in pair]
    batch = pack(packed, material.held_out_images).to(material.held_out[0].words.device)
    return batch, list(range(0, len(packed), 2))


@torch.no_grad()
def look(model: Decoder, material: Material, backend: str | None) -> list[Glance]:
    """Where the last layer looks when it answers the questions of a document or two."""
    batch, chosen = pictured(material)
    scores, trace = _traced(model, batch, backend)
    one_hot = torch.eye(len(batch.words), device=batch.words.device)
    weights = _weights(trace[-1], one_hot, batch, model.variant.mask, backend).cpu()
    bounds = batch.layout.cu_seqlens.tolist()
    glances = []
    for place in (batch.asked > 0).nonzero()[:, 0].tolist():
        token = int(batch.source[place])
        number = next(i for i, end in enumerate(bounds[1:]) if token < end)
        if number not in chosen:
            continue
        document, begin = batch.documents[number], bounds[number]
        first = begin + len(document.before)
        row = weights[token]
        maps = [row[first + i * PATCHES : first + (i + 1) * PATCHES].tolist() for i in range(len(document.images))]
        said = [WORDS[w] for w, item in zip(batch.words[begin : token + 1], batch.item[begin : token + 1], strict=True)
                if not item]  # fmt: skip
        before, after = said[: len(document.before)], said[len(document.before) :]
        question = " ".join([*before, *["□"] * len(document.images), *after])
        answer, truth = WORDS[int(scores[place].argmax())], WORDS[int(batch.target[place])]
        glances.append(Glance(question, answer, truth, maps, document.images, int(batch.asked[place]) - 1))
    return sorted(glances, key=lambda glance: glance.asked)


@torch.no_grad()
def backend_name(model: Decoder, batch: Batch, backend: str | None) -> str:
    """The backend that this model's attention runs on."""
    layer = _traced(model, batch, backend)[1][0]
    call = AttentionCall.make(
        layer.query,
        layer.key,
        layer.key,
        enable_gqa=True,
        layout=batch.layout,
        mask=model.variant.mask,
        key_map=layer.key_map,
        pair_bias=layer.pair_bias,
        pseudo=layer.pseudo,
    )
    return backends.choose(call, backend).name
