"""The demo: its data don't leak, its variants start equal, it trains, prints and draws."""

import argparse
import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moda_kernels import ModularMask
from moda_kernels.__main__ import main
from moda_kernels.commands import demo
from moda_kernels.commands.demo import data, model, train

if importlib.util.find_spec("sklearn") is None or importlib.util.find_spec("matplotlib") is None:
    pytest.skip("the demo's packages are not installed", allow_module_level=True)

PLAIN, MASK_ALONE, MODA = model.VARIANTS


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


@pytest.fixture(scope="module")
def batch(images: tuple[data.Images, data.Images]) -> data.Batch:
    train_images, _ = images
    return next(data.batches(data.documents(train_images, np.random.default_rng(1)), train_images, train.TOKENS))


def test_split_shares_no_image(images: tuple[data.Images, data.Images]) -> None:
    train_images, held_out = images
    assert len(held_out) == data.HELD_OUT
    assert sorted([*train_images.index, *held_out.index]) == list(range(1797))
    assert not {x.tobytes() for x in train_images.pixels} & {x.tobytes() for x in held_out.pixels}


def test_held_out_images_are_seen_once_each(images: tuple[data.Images, data.Images]) -> None:
    _, held_out = images
    documents = list(data.documents(held_out, np.random.default_rng(2), endless=False))
    assert sorted(i for d in documents for i in d.images) == list(range(len(held_out)))
    packed = list(data.batches(iter(documents), held_out, train.TOKENS))
    assert [d for b in packed for d in b.documents] == documents


def test_text_tells_the_truth(images: tuple[data.Images, data.Images]) -> None:
    train_images, _ = images
    for document in itertools.islice(data.documents(train_images, np.random.default_rng(3)), 200):
        labels = [int(train_images.labels[i]) for i in document.images]
        names = ["it"] if len(labels) == 1 else ["left", "right"]
        text = " ".join(document.after)
        for name, label in zip(names, labels, strict=True):
            assert f"{name} is {data.DIGITS[label]} {'odd' if label % 2 else 'even'} ." in text
        if len(labels) == 2:
            larger = "same" if labels[0] == labels[1] else ("left" if labels[0] > labels[1] else "right")
            assert text.startswith(f"larger is {larger} .")
        assert {kind for _, kind in document.answers} <= set(data.KINDS)


def test_packing(batch: data.Batch, images: tuple[data.Images, data.Images]) -> None:
    layout = batch.layout
    assert layout.num_tokens == sum(d.tokens for d in batch.documents) <= train.TOKENS
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
    return F.cross_entropy(model.Decoder(0)(batch, variant), batch.target).item()


def test_variants_start_from_the_same_weights(batch: data.Batch) -> None:
    one, other = model.Decoder(0).state_dict(), model.Decoder(0).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert first_loss(batch, MASK_ALONE) == pytest.approx(first_loss(batch, MODA), rel=1e-6)
    assert PLAIN.mask == ModularMask.causal(2)
    assert MASK_ALONE.mask == MODA.mask != PLAIN.mask
    assert [v.aligned for v in model.VARIANTS] == [False, False, True]


def test_plain_is_causal_sdpa(batch: data.Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = model.Decoder(0)
    mine = decoder(batch, PLAIN)

    def sdpa(query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
        """Each document by itself, causal."""
        sizes = batch.layout.cu_seqlens.diff().tolist()
        parts = zip(*(x.transpose(0, 1).split(sizes, 1) for x in (query, key, value)), strict=True)
        outs = [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in parts]
        return torch.cat(outs, 1).transpose(0, 1)

    monkeypatch.setattr(model, "moda_attention", sdpa)
    torch.testing.assert_close(mine, decoder(batch, PLAIN), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", model.VARIANTS, ids=lambda v: v.name)
def test_nothing_leaks(batch: data.Batch, variant: model.Variant) -> None:
    """What is predicted at a text token doesn't depend on later words, nor on other documents."""
    decoder = model.Decoder(0)
    for layer in decoder.layers:
        torch.nn.init.normal_(layer.attention.aligner.weight, std=0.3)
    place = len(batch.source) // 2
    cut = int(batch.source[place])
    words = batch.words.clone()
    later = (torch.arange(len(words)) > cut) & (batch.layout.modality == data.TEXT)
    words[later] = (words[later] + 1) % len(data.WORDS)
    changed = data.Batch(batch.layout, words, batch.pixels, batch.source, batch.target, batch.kind, batch.documents)
    before, after = decoder(batch, variant), decoder(changed, variant)
    torch.testing.assert_close(before[: place + 1], after[: place + 1])
    assert not torch.allclose(before[place + 1 :], after[place + 1 :])


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[list[train.Run]] = []

    def keep(*args: object) -> object:
        result = train.train_all(*args)  # type: ignore[arg-type]
        kept.append(result[0])
        return result

    monkeypatch.setattr(demo, "train_all", keep)
    picture = tmp_path / "demo.png"
    assert main(["demo", "--quick", "--out", str(picture)]) == 0

    written = picture.read_bytes()
    assert written.startswith(b"\x89PNG") and len(written) > 20_000
    printed = capsys.readouterr()
    for heading in ("held-out loss", "digits correct", "text→image", "disparity", "What this shows", "toy"):
        assert heading in printed.out
    (runs,) = kept
    for run in runs:
        assert len(run.losses) == demo.QUICK_STEPS
        assert np.mean(run.losses[-3:]) < 0.95 * run.losses[0], "training reduces the loss"
        rows = [line for line in printed.out.splitlines() if line.startswith(f"  {run.variant.name} ")]
        assert any(f"{run.held_out.loss:.3f}" in row for row in rows)
        assert len(rows) >= 1 + model.LAYERS
        assert run.variant.name in printed.err, "a progress bar"
        for share in run.shares.share:
            torch.testing.assert_close(share.sum(-1), torch.ones(2), atol=1e-4, rtol=0)
    plain, mask_alone, moda = runs
    assert mask_alone.losses[0] == pytest.approx(moda.losses[0], rel=1e-6)
    assert mask_alone.losses[0] != plain.losses[0]
    assert moda.losses[-1] != mask_alone.losses[-1], "the aligner learns"
    assert moda.parameters > mask_alone.parameters == plain.parameters


def test_attention_maps_are_attention(batch: data.Batch) -> None:
    """Attention to patches and the rest of a row adds up to 1; with equal weights each key gets the same."""
    material = train.Material.make(0, 1, torch.device("cpu"), quick=True)
    one = train.pictured(material)
    glances = train.look(model.Decoder(0), MODA, one, None)
    assert [glance.question for glance in glances] == ["left", "right"]
    assert all(0 < float(sum(m.sum() for m in glance.maps)) < 1 for glance in glances)
    even = train.even_weights(ModularMask.full(2), material.held_out)
    counts = torch.cat([b.layout.counts for b in material.held_out]).float()
    expected = (counts / counts.sum(1, keepdim=True)).mean(0).expand(2, -1)
    torch.testing.assert_close(even.share[0], expected)


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
    assert options["seed"] == 0 and options["out"] == Path("moda-demo.png")
