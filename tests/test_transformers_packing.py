"""Documents with pictures in one row: what `PackingCollator` makes is its documents one by one, forward and
backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import vlm
from torch import Tensor
from vlm import transformers

from moda_kernels.integrations.transformers import PackingCollator, enable


def documents(family: str) -> list[dict[str, Tensor]]:
    """Two with a picture (one of them padded on its left) and one without."""
    both, text = vlm.inputs(family), vlm.inputs(family, images=False)
    made = []
    for seed in (1, 2):
        one = {name: t[:1] if t.shape[0] == 2 else t.clone() for name, t in both.items()}
        one["pixel_values"] = torch.randn(one["pixel_values"].shape, generator=torch.Generator().manual_seed(seed))
        made.append(one)
    made[1] = {name: t[:, 3:] if t.shape[:2] == (1, both["input_ids"].shape[1]) else t for name, t in made[1].items()}
    return [made[0], {name: t[1:] for name, t in text.items()}, made[1]]


def as_video(document: dict[str, Tensor]) -> dict[str, Tensor]:
    """A document of Qwen's with a video in the place of its picture."""
    ids, kinds = document["input_ids"], document["mm_token_type_ids"]
    names = {"pixel_values": "pixel_values_videos", "image_grid_thw": "video_grid_thw"}
    made = {names.get(name, name): t for name, t in document.items()}
    return made | {
        "input_ids": torch.where(ids == vlm.IMAGE, vlm.VIDEO, ids),
        "mm_token_type_ids": torch.where(kinds == 1, 2, kinds),
    }


def alone(document: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without padding."""
    real = document["attention_mask"][0] > 0
    row = {name: t[:, real] if t.shape == (1, len(real)) else t for name, t in document.items()}
    labels = row["input_ids"].clone()
    labels[:, 0] = -100
    return {name: t for name, t in row.items() if name != "attention_mask"} | {"labels": labels}


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each token that has a label. (The model's own is in float32.)"""
    labels = labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="none")[labels != -100]


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("family", "bounds", "video"),
    [(f, b, False) for f in vlm.FAMILIES for b in (False, True)] + [("qwen2_vl", False, True)],
)
def test_pictures_in_packed_rows(family: str, bounds: bool, video: bool) -> None:
    model = vlm.randomised(enable(vlm.make(family))).double()
    given = documents(family)
    given[2] = as_video(given[2]) if video else given[2]
    row = PackingCollator(model, bounds=bounds)(given)
    assert ("cu_seq_lens_q" in row) == bounds and "attention_mask" not in row
    if bounds and row["position_ids"].dim() == 2:
        del row["position_ids"]  # they follow from the bounds
    outs, losses = [], []
    for document in map(alone, given):
        outs.append(model(**document, use_cache=False).logits)
        losses.append(loss(outs[-1], document["labels"]))
    torch.cat(losses).mean().backward()
    expected = gradients(model)
    out = model(**row, use_cache=False)
    torch.testing.assert_close(out.logits, torch.cat(outs, 1), rtol=0, atol=1e-7)  # (some norms are in float32)
    torch.testing.assert_close(out.loss.double(), torch.cat(losses).mean(), rtol=1e-5, atol=0)
    loss(out.logits, row["labels"]).mean().backward()
    got = gradients(model)
    assert got.keys() == expected.keys() and any("moda_aligner" in name for name in got)
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(
            got[name], grad, rtol=1e-5, atol=1e-6 * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_without_aligners_and_with_labels_of_ones_own() -> None:
    model = vlm.make("llava")
    model.set_attn_implementation({"text_config": "moda"})
    given = documents("llava")
    for document in given:
        document["labels"] = torch.where(document["input_ids"] == vlm.IMAGE, -100, document["input_ids"])
    row = PackingCollator(model)(given)
    assert row["labels"].shape == row["input_ids"].shape
    assert int((row["labels"] == -100).sum()) == 2 * vlm.IMAGE_TOKENS["llava"] + len(given)
    with torch.no_grad():
        got = model(**row, use_cache=False).logits
        expected = torch.cat([model(**alone(document), use_cache=False).logits for document in given], 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_ids_alone_are_what_the_collator_of_transformers_makes() -> None:
    given = [{"input_ids": list(range(3, 3 + n))} for n in (4, 1, 6)]
    theirs = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)(given)
    ours = PackingCollator(bounds=True)(given)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(torch.as_tensor(ours[name]).long(), torch.as_tensor(value).long()), name


def test_pictures_in_unequal_numbers_of_patches() -> None:
    given = [{"input_ids": [3], "pixel_values": torch.ones(1, n, 3, 4, 4)} for n in (2, 5)]
    made = PackingCollator()(given)["pixel_values"]
    assert made.shape == (2, 5, 3, 4, 4) and made.sum() == 7 * 48


def test_what_does_not_fit(refused: Callable[..., None]) -> None:
    collate, one = PackingCollator(), {"input_ids": torch.arange(4)}
    refused(lambda: collate([]), ValueError, ["documents", "at least one"])
    refused(lambda: collate([one, {"labels": [1]}]), ValueError, ["documents", "input_ids", "document 1"])
    refused(lambda: collate([{"input_ids": torch.zeros(2, 4).long()}]), ValueError, ["documents", "[1, L]"])
    kinds = {"token_type_ids": torch.zeros(4).long()}
    refused(lambda: collate([one | kinds, one]), ValueError, ["documents", "token_type_ids", "document 1"])
    pictures = [one | {"pixel_values": torch.zeros(1, 3, side, side)} for side in (4, 8)]
    refused(lambda: collate(pictures), ValueError, ["documents", "pixel_values", "(1, 3, 8, 8)"])
