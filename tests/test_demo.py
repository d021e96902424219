"""The demo: its data don't leak, its variants start equal, it trains, prints and draws."""

import argparse
import dataclasses
import importlib.util
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moda_kernels import ModularMask, align_keys
from moda_kernels.__main__ import main
from moda_kernels.commands import demo
from moda_kernels.commands.demo import data, intervals, model, runs, tasks, train
from moda_kernels.commands.demo.model import CONTROL, MASK_ALONE, MASK_AND_MODA, MODA, PLAIN
from moda_kernels.commands.demo.train import Plan

if importlib.util.find_spec("sklearn") is None or importlib.util.find_spec("matplotlib") is None:
    pytest.skip("the demo's packages are not installed", allow_module_level=True)


@pytest.fixture(autouse=True)
def one_thread() -> object:
    """Tensors are tiny here; threads that wait for each other only slow them down on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images() -> tuple[data.Images, data.Images]:
    return data.load_digits(np.random.default_rng(0))


NAMING = tasks.TASKS["naming"]


@pytest.fixture(scope="module")
def batch(images: tuple[data.Images, data.Images]) -> data.Batch:
    train_images, _ = images
    return next(data.batches(NAMING.training(train_images, np.random.default_rng(1)), train_images, NAMING.tokens))


def test_split_shares_no_image(images: tuple[data.Images, data.Images]) -> None:
    train_images, held_out = images
    assert len(held_out) == data.HELD_OUT
    assert sorted([*train_images.index, *held_out.index]) == list(range(1797))
    assert not {x.tobytes() for x in train_images.pixels} & {x.tobytes() for x in held_out.pixels}


def test_held_out_images_are_seen_once_each(images: tuple[data.Images, data.Images]) -> None:
    _, held_out = images
    documents = list(NAMING.held_out(held_out, np.random.default_rng(2)))
    assert sorted(i for d in documents for i in d.images) == list(range(len(held_out)))
    packed = list(data.batches(iter(documents), held_out, NAMING.tokens))
    assert [d for b in packed for d in b.documents] == documents


def test_text_tells_the_truth(images: tuple[data.Images, data.Images]) -> None:
    train_images, _ = images
    for document in itertools.islice(NAMING.training(train_images, np.random.default_rng(3)), 200):
        labels = [int(train_images.labels[i]) for i in document.images]
        names = ["it"] if len(labels) == 1 else ["left", "right"]
        text = " ".join(document.after)
        for name, label in zip(names, labels, strict=True):
            assert f"{name} is {data.DIGITS[label]} {'odd' if label % 2 else 'even'} ." in text
        if len(labels) == 2:
            larger = "same" if labels[0] == labels[1] else ("left" if labels[0] > labels[1] else "right")
            assert text.startswith(f"larger is {larger} .")
        for place, kind, image in document.answers:
            assert kind in data.KINDS and (kind == "larger") == (image is None)
            if image is not None:
                assert document.after[place] == data.DIGITS[labels[image]]


@pytest.mark.parametrize("name", tasks.TASKS)
def test_answers_are_true_and_every_held_out_image_is_shown(name: str, images: tuple[data.Images, data.Images]) -> None:
    task, (train_images, held_out) = tasks.TASKS[name], images
    shown = list(task.held_out(held_out, np.random.default_rng(5)))
    assert {i for d in shown for i in d.images} == set(range(len(held_out)))
    training = list(itertools.islice(task.training(train_images, np.random.default_rng(4)), 60))
    for documents, among in ((training, train_images), (shown, held_out)):
        for d in documents:
            assert d.labels == tuple(int(among.labels[i]) for i in d.images)
            for place, kind, image in d.answers:
                if kind == "digit":
                    assert image is not None and d.after[place] == data.DIGITS[d.labels[image]]
                if kind == "claim":
                    assert d.after[place] == ("yes" if d.after[2] == data.DIGITS[d.labels[0]] else "no")
            if name == "which":
                assert d.before == ("start", tasks.SIDES[d.answers[0].image or 0], ":")
        packed = data.pack(documents[:5], among).answers_only()
        assert packed.target.tolist() == [data.WORD_ID[d.after[a.place]] for d in documents[:5] for a in d.answers]
        assert (packed.kind > 0).all()
    if name == "bait":
        assert all(d.after[2] == d.after[6] for d in training) and any(d.after[2] != d.after[6] for d in shown)
    if name == "which":  # each pair both ways, so that naming one of two at random is right half of the time
        assert sorted(d.images for d in shown if d.answers[0].image == 0) == sorted(
            d.images for d in shown if d.answers[0].image == 1
        )


def test_the_other_images_digit(images: tuple[data.Images, data.Images]) -> None:
    train_images, _ = images
    documents = list(itertools.islice(tasks.TASKS["which"].training(train_images, np.random.default_rng(6)), 40))
    packed = data.pack(documents, train_images).answers_only()
    for document, asked, other in zip(documents, packed.asked.tolist(), packed.other.tolist(), strict=True):
        label = document.labels[2 - asked]
        same = label == document.labels[asked - 1]
        assert other == (-1 if same else data.WORD_ID[data.DIGITS[label]])


def test_packing(batch: data.Batch, images: tuple[data.Images, data.Images]) -> None:
    layout = batch.layout
    assert layout.num_tokens == sum(d.tokens for d in batch.documents) <= NAMING.tokens
    assert layout.counts[:, data.IMAGE].tolist() == [data.PATCHES * len(d.images) for d in batch.documents]
    image_segments = layout.segments()[:, 3] == data.IMAGE
    assert (layout.segments()[image_segments, 2] == data.PATCHES).all(), "each image is a segment of its own"
    # Only text is learned, and never across documents.
    assert (layout.modality[batch.source + 1] == data.TEXT).all()
    assert (layout.sequence[batch.source] == layout.sequence[batch.source + 1]).all()
    assert int((batch.kind > 0).sum()) == sum(len(d.answers) for d in batch.documents)
    # Patches put back together are the image.
    train_images, _ = images
    first = batch.documents[0]
    patches = batch.pixels[len(first.before) :][: data.PATCHES].unflatten(0, (data.SIDE, data.SIDE))
    whole = patches.unflatten(-1, (data.PATCH, data.PATCH)).transpose(1, 2).reshape(8, 8)
    torch.testing.assert_close((whole + 1) / 2, torch.from_numpy(train_images.pixels[first.images[0]]))


def first_loss(batch: data.Batch, variant: model.Variant) -> float:
    return F.cross_entropy(model.Decoder(0, variant, 2)(batch), batch.target).item()


def test_variants_start_from_the_same_weights(batch: data.Batch) -> None:
    one, other = (model.Decoder(0, variant, 2).state_dict() for variant in (PLAIN, MODA))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert first_loss(batch, MASK_ALONE) == pytest.approx(first_loss(batch, MASK_AND_MODA), rel=1e-6)
    assert first_loss(batch, PLAIN) == pytest.approx(first_loss(batch, MODA), rel=1e-6)
    assert first_loss(batch, PLAIN) == pytest.approx(first_loss(batch, CONTROL), rel=1e-6)
    assert PLAIN.mask == MODA.mask == CONTROL.mask == ModularMask.causal(2)


def test_plain_is_causal_sdpa(batch: data.Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = model.Decoder(0, PLAIN, 2)
    mine = decoder(batch)

    def sdpa(query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
        """Each document by itself, causal."""
        sizes = batch.layout.cu_seqlens.diff().tolist()
        parts = zip(*(x.transpose(0, 1).split(sizes, 1) for x in (query, key, value)), strict=True)
        outs = [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in parts]
        return torch.cat(outs, 1).transpose(0, 1)

    monkeypatch.setattr(model, "moda_attention", sdpa)
    torch.testing.assert_close(mine, decoder(batch), atol=2e-5, rtol=1e-5)


def stirred(variant: model.Variant, layers: int = 2) -> model.Decoder:
    """A decoder whose aligners do something."""
    decoder = model.Decoder(0, variant, layers)
    for layer in decoder.layers:
        if layer.attention.aligner is not None and layer.attention.aligner.weight is not None:
            torch.nn.init.normal_(layer.attention.aligner.weight, std=0.3)
    return decoder


EVERYTHING = model.Variant(
    "", "", gram="own", fusion="linear", norm="frobenius", renorm=True, pseudo=True, pair_bias=True
)
NO_GRAM = model.Variant("no Gram", "", gram="none")


@pytest.mark.parametrize("variant", [PLAIN, MASK_ALONE, MODA, MASK_AND_MODA, EVERYTHING, NO_GRAM], ids=lambda v: v.name)
def test_nothing_leaks(batch: data.Batch, variant: model.Variant) -> None:
    """What is predicted at a text token doesn't depend on later words, nor on other documents."""
    decoder = stirred(variant)
    place = len(batch.source) // 2
    cut = int(batch.source[place])
    words = batch.words.clone()
    later = (torch.arange(len(words)) > cut) & (batch.layout.modality == data.TEXT)
    words[later] = (words[later] + 1) % len(data.WORDS)
    before, after = decoder(batch), decoder(dataclasses.replace(batch, words=words))
    torch.testing.assert_close(before[: place + 1], after[: place + 1])
    assert not torch.allclose(before[place + 1 :], after[place + 1 :])


def test_the_control_knows_another_document(images: tuple[data.Images, data.Images]) -> None:
    """What is asked reaches the image keys of the document before, and no others, in the control; its own in MODA."""
    train_images, _ = images
    stream = tasks.TASKS["which"].training(train_images, np.random.default_rng(7))
    one = data.pack(list(itertools.islice(stream, 3)), train_images).answers_only()
    words = one.words.clone()
    side = int(one.layout.cu_seqlens[1]) + 1  # "left" or "right" of the second document
    words[side] = data.WORD_ID["left"] + data.WORD_ID["right"] - words[side]
    other = dataclasses.replace(one, words=words)
    for variant, aligned_by in ((MODA, 1), (CONTROL, 0)):
        decoder = stirred(variant, 1)
        keys: list[list[Tensor]] = []
        for batch in (one, other):
            trace: list[model.LayerTrace] = []
            decoder(batch, None, trace)
            key_map = trace[0].key_map
            assert key_map is not None
            fused = align_keys(trace[0].key, key_map, batch.layout)
            keys.append(list(fused.split(batch.layout.cu_seqlens.diff().tolist())))
        changed = [not torch.equal(a[3:-2], b[3:-2]) for a, b in zip(*keys, strict=True)]
        assert changed == [i == aligned_by for i in range(3)]


def test_without_a_gram_only_weights_train(batch: data.Batch) -> None:
    decoder = model.Decoder(0, NO_GRAM, 1)
    F.cross_entropy(decoder(batch), batch.target).backward()
    aligner = decoder.layers[0].attention.aligner
    assert aligner.ratio.grad is None and not aligner.ratio.any() and aligner.weight.grad.any()


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[train.Run] = []

    def keep(*args: object) -> list[train.Run]:
        kept.extend(runs.train_all(*args))  # type: ignore[arg-type]
        return kept

    monkeypatch.setattr(demo, "train_all", keep)
    picture = tmp_path / "demo.png"
    assert main(["demo", "--quick", "--seeds", "2", "--out", str(picture)]) == 0

    written = picture.read_bytes()
    assert written.startswith(b"\x89PNG") and len(written) > 20_000
    printed = capsys.readouterr()
    for heading in ("digit correct", "95 % intervals", "text→image", "disparity", "What this shows", "toy", "hop"):
        assert heading in printed.out
    assert printed.err.count("\n") == 1 and "72/72 steps" in printed.err, "one line of progress"
    assert [run.plan.variant.name for run in kept] == ["plain", "MODA", "control"] * 2
    for run in kept:
        assert len(run.losses) == train.QUICK_STEPS
        assert np.mean(run.losses[-3:]) < 0.95 * run.losses[0], "training reduces the loss"
        for share in run.shares.share:
            torch.testing.assert_close(torch.tensor(share).sum(-1), torch.ones(2), atol=1e-4, rtol=0)
    rates = {name: [run.rate for run in kept if run.plan.variant.name == name] for name in ("plain", "MODA", "control")}
    for name, own in rates.items():
        row = next(line for line in printed.out.splitlines() if line.startswith(f"  {name} ") and "%" in line)
        assert f"{np.mean(own):.1%}" in row and all(f"{100 * rate:.1f}" in row for rate in own)
    assert f"{intervals.paired(rates['MODA'], rates['plain']).points()} points" in printed.out
    plain, moda, control = kept[:3]
    assert plain.losses[0] == pytest.approx(moda.losses[0], rel=1e-6)
    assert moda.losses[-1] != control.losses[-1] != plain.losses[-1], "aligners learn"
    assert moda.parameters == control.parameters > plain.parameters


@pytest.mark.parametrize("task", [name for name in tasks.TASKS if name != "which"])
def test_every_task_runs(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "demo.svg"
    assert main(["demo", "--quick", "--steps", "2", "--layers", "1", "--task", task, "--out", str(picture)]) == 0
    assert f'"{task}"' in capsys.readouterr().out and picture.exists()


def test_processes_change_nothing() -> None:
    plans = [Plan("which", variant, 3, 1, 2, quick=True) for variant in (PLAIN, MODA)]
    ended: list[train.Run] = []
    together = runs.train_all(plans, 2, ended.append)
    assert sorted(map(id, ended)) == sorted(map(id, together))
    for one, other in zip(runs.train_all(plans, 1), together, strict=True):
        assert dataclasses.replace(one, seconds=0) == dataclasses.replace(other, seconds=0)


def test_a_failure_in_a_process_is_raised() -> None:
    plan = Plan("which", PLAIN, 0, 1, 2, quick=True, backend="nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        runs.train_all([plan, plan], 2)


def test_starts_from_what_plain_attention_learnt() -> None:
    """After no steps of its own a variant is what was trained before."""
    plan = Plan("hint", MODA, 0, 1, 1, before=("bait", 30), quick=True)
    first, second = train.train(plan), train.train(dataclasses.replace(plan, variant=PLAIN))
    assert first.losses == pytest.approx(second.losses) and first.losses[0] < 2.5


def test_intervals() -> None:
    """Half widths are t(0.975, n - 1) · s / √n: 4.3027 for three values, 12.706 for two."""
    found = intervals.estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.half) == (2.0, pytest.approx(4.30265 / 3**0.5, rel=1e-5))
    assert not found.clear
    found = intervals.paired([0.5, 0.7], [0.1, 0.2])
    assert (found.mean, found.half) == (pytest.approx(0.45), pytest.approx(12.7062 * 0.05, rel=1e-4))
    assert np.isnan(intervals.estimate([1.0]).half) and intervals.estimate([1.0]).points() == "+100.0"


def test_progress_fits_on_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(runs.sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(runs.os, "get_terminal_size", lambda fd: os.terminal_size((40, 24)))
    monkeypatch.setattr(runs.sys.stderr, "fileno", lambda: 2)
    progress = runs.Progress(2)
    for note in ("a long note that would not fit on the line at all", "short"):
        progress.shown = 0.0
        progress.step(note)
    progress.end()
    written = capsys.readouterr().err
    assert written.count("\n") == 1 and max(map(len, written.replace("\n", "").split("\r"))) <= 39


def test_attention_maps_are_attention(batch: data.Batch) -> None:
    """Attention to patches and the rest of a row adds up to 1; with equal weights each key gets the same."""
    material = train.Material.make("which", 0, 1, quick=True)
    glances = train.look(model.Decoder(0, MODA, 1), material, None)
    assert [glance.question for glance in glances] == [f"start {side} : □ □ it is" for side in tasks.SIDES]
    assert glances[0].truth != glances[1].truth and [glance.asked for glance in glances] == [0, 1]
    assert all(0 < sum(map(sum, glance.maps)) < 1 for glance in glances)
    naming = train.Material.make("naming", 0, 1, quick=True)
    even = train.even_weights(ModularMask.full(2), naming.held_out)
    counts = torch.cat([b.layout.counts for b in naming.held_out]).float()
    expected = (counts / counts.sum(1, keepdim=True)).mean(0).expand(2, -1)
    torch.testing.assert_close(torch.tensor(even.share[0]), expected)
    # A fresh model's answers look at both images alike, up to chance; all of a row is text, or one of the two.
    shares = train.attention_between(model.Decoder(0, PLAIN, 1), material.held_out, None)
    ((asked, other),) = shares.asked
    assert 0.2 < asked < 0.8 and 0.2 < other < 0.8 and asked + other < 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "no/such/folder/x.png"], "--out"),
        (["--out", "x.exe"], ".png"),
        (["--backend", "nonsense"], "nonsense"),
    ],
)
def test_refuses_before_training(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_names_missing_packages(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert main(["demo"]) == 2
    assert "pip install scikit-learn matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["0", "-3", "many"])
def test_steps_are_positive(steps: str) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--steps", steps])


def test_options() -> None:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    options = vars(parser.parse_args([]))
    assert options["task"] == "which" and options["seed"] == 0 and options["out"] == Path("moda-demo.png")
