"""What alignment does in a model, layer by layer, against attention written out."""

import copy
import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moda_kernels as mk
from moda_kernels.diagnostics import alignment_report, keys_of_another_document

DOUBLE = torch.float64
IDS = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 0, 1, -1, -1], [1, 0, 0, 1, 1, 1, 0]])
MASK = mk.ModularMask.bidirectional_within(2, [1])


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


class Layer(nn.Module):
    def __init__(self, written_out: bool, **options: Any) -> None:
        super().__init__()
        self.aligner = mk.DuplexAligner(4, 2, fusion="add", dtype=DOUBLE, **options)
        nn.init.normal_(self.aligner.ratio)
        self.written_out = written_out
        self.arguments: dict[str, Any] = {}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: mk.ModalityLayout) -> Tensor:
        key_map = self.aligner(k, layout=layout)
        if self.written_out:
            k, key_map = mk.align_keys(k, key_map, layout), None
        return mk.moda_attention(q, k, v, layout=layout, mask=MASK, key_map=key_map, enable_gqa=True, **self.arguments)


class Model(nn.Module):
    """Two layers; the second one attends to keys that were aligned before."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(False, **options), Layer(True, **options)])
        self.seen: list[tuple[Tensor, ...]] = []

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: mk.ModalityLayout) -> Any:
        self.seen = []
        for layer in self.layers:
            self.seen.append((q, k, v))
            q = q + layer(q, k, v, layout)
            k, v = k.flip(-1), v + 1
        self.loss = q.square().mean()
        return self


def inputs(packed: bool = False) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(3, h, 7, 4, generator=g, dtype=DOUBLE) for h in (4, 2, 2))
    if not packed:
        return {"q": q, "k": k, "v": v, "layout": mk.segment_modalities(IDS, num_modalities=2)}
    bounds = torch.tensor([0, 7, 14, 21], dtype=torch.int32)
    layout = mk.segment_modalities(IDS.flatten(), num_modalities=2, cu_seqlens=bounds)
    return {name: x.transpose(1, 2).flatten(0, 1) for name, x in (("q", q), ("k", k), ("v", v))} | {"layout": layout}


@pytest.mark.parametrize("scope", ["causal", "sequence"])
def test_it_says_what_attention_does(scope: str) -> None:
    model, given = Model(scope=scope), inputs()
    layout = given["layout"]
    report = alignment_report(model, given, modalities=["text", "image"])
    assert [layer.name for layer in report.layers] == ["layers.0.aligner", "layers.1.aligner"]
    # The last pass had no alignment: the first layer got the same, the second other queries. Run it again as it is.
    model(**given)
    visible = MASK.visible(layout)[:, None]
    for layer, module, (q, k, v) in zip(report.layers, model.layers, model.seen, strict=True):
        key_map = module.aligner(k, layout)
        share = mk.attention_share(q, k, layout, MASK, key_map=key_map, enable_gqa=True).nanmean((0, 1))
        torch.testing.assert_close(layer.share, share)
        found = mk.modal_disparity(q, k, layout, MASK, key_map=key_map, enable_gqa=True)
        torch.testing.assert_close(layer.disparity, found.difference.nanmean((0, 1)))
        torch.testing.assert_close(layer.signed, (found.own / found.cross).log2().nanmean((0, 1)))
        control = module.aligner(keys_of_another_document(k, layout), layout)
        other = mk.modal_disparity(q, k, layout, MASK, key_map=control, enable_gqa=True)
        torch.testing.assert_close(layer.control, (other.own / other.cross).log2().nanmean((0, 1)))

        def weights(keys: Tensor, q: Tensor = q) -> Tensor:
            scores = q @ keys.repeat_interleave(2, 1).transpose(-1, -2) / 2
            return torch.softmax(scores.masked_fill(~visible, -math.inf), -1).nan_to_num()

        fused, borrowed = (mk.align_keys(k, made, layout) for made in (key_map, control))
        p = weights(fused)
        last = torch.tensor([6, 4, 6])
        rows = p[torch.arange(3), :, last]  # [3, H, L]
        kinds = torch.stack([(m == IDS)[:, None].expand(-1, 4, -1) for m in (0, 1)], -1)
        torch.testing.assert_close(layer.chosen, (rows[..., None] * kinds).sum(2).mean((0, 1)))
        entropy = -(rows * rows.clamp(min=1e-300).log2()).sum(-1).mean()
        assert layer.entropy == pytest.approx(float(entropy), rel=1e-6)
        value = v.repeat_interleave(2, 1)
        with_it, without, another = (weights(keys) @ value for keys in (fused, k, borrowed))
        assert layer.effect == pytest.approx(float((with_it - without).norm() / without.norm()), rel=1e-6)
        assert layer.of_document == pytest.approx(float((with_it - another).norm() / without.norm()), rel=1e-6)
        ratio = (fused.norm(dim=-1) / k.norm(dim=-1)).transpose(1, 2)
        torch.testing.assert_close(layer.length, torch.stack([ratio[m == IDS].mean() for m in (0, 1)]).float(),
                                   check_dtype=False, rtol=1e-5, atol=1e-5)  # fmt: skip
        for m in (0, 1):
            others = [torch.stack([k[n, h, IDS[n] == 1 - m] for h in (0, 1)]) for n in range(3)]
            normed = torch.stack([torch.nn.functional.normalize(x.transpose(1, 2) @ x, dim=-1) for x in others])
            values = torch.linalg.svdvals(normed).mean((0, 1))
            torch.testing.assert_close(layer.spectrum[m], values)
            part = values / values.sum()
            assert float(layer.rank[m]) == pytest.approx(float((-part * part.log()).sum().exp()))


def test_losses_are_those_of_three_passes() -> None:
    model, given = Model(scope="causal"), inputs()
    report = alignment_report(model, given)
    assert report.modalities == ("0", "1") and report.no_control is None
    as_it_is = float(model(**given).loss)
    bare = copy.deepcopy(model)
    for layer in bare.layers:
        layer.aligner.reset_parameters()
    assert report.loss["as it is"] == pytest.approx(as_it_is)
    assert report.loss["no alignment"] == pytest.approx(float(bare(**given).loss)) != pytest.approx(as_it_is)
    assert report.loss["another document"] not in (report.loss["as it is"], report.loss["no alignment"])
    mine = alignment_report(model, given, loss=lambda output: 2 * output.loss)
    assert mine.loss["as it is"] == pytest.approx(2 * as_it_is)
    assert not mk.attention.watchers and not model.layers[0].aligner._forward_hooks, "nothing is left behind"


def test_packed_documents_are_the_same() -> None:
    batch, packed = (alignment_report(Model(scope="causal"), inputs(packed)) for packed in (False, True))
    for one, other in zip(batch.layers, packed.layers, strict=True):
        for name in ("share", "signed", "control", "chosen", "length", "spectrum"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name))
        assert one.entropy == pytest.approx(other.entropy) and one.of_document == pytest.approx(other.of_document)


def test_entropy_knows_biases_and_pseudo_scores() -> None:
    model, given = Model(scope="causal"), inputs()
    pair_bias = torch.randn(3, 4, 2, 2, dtype=DOUBLE)
    model.layers[0].arguments = {"pair_bias": pair_bias, "pseudo": mk.PseudoAttention(0.3, 0.5, length=9)}
    rows = torch.zeros_like(IDS, dtype=torch.bool)
    rows[0, 3] = rows[2, 1] = True
    report = alignment_report(model, given, rows=rows)
    layout = given["layout"]
    q, k = given["q"], mk.align_keys(given["k"], model.layers[0].aligner(given["k"], layout), layout)
    visible = MASK.visible(layout)
    total = []
    for n, i in ((0, 3), (2, 1)):
        for h in range(4):
            keys = visible[n, i].nonzero()[:, 0]
            scores = k[n, h // 2, keys] @ q[n, h, i] / 2 + pair_bias[n, h, IDS[n, i], IDS[n, keys]]
            extra = 0.3 - 0.5 * torch.arange(9 - len(keys), dtype=DOUBLE)
            p = torch.softmax(torch.cat((scores, extra)), 0)[: len(keys)]
            total.append(float(-(p * p.log2()).sum()))
    assert report.layers[0].entropy == pytest.approx(sum(total) / len(total), rel=1e-6)
    model.layers[0].arguments = {"attn_mask": torch.zeros(7, 7, dtype=DOUBLE)}
    assert math.isnan(alignment_report(model, given).layers[0].entropy)


def test_a_document_alone_has_no_control() -> None:
    model, given = Model(scope="causal"), inputs()
    one = {name: x[:1] for name, x in given.items() if name != "layout"} | {"layout": IDS[:1]}
    report = alignment_report(model, one)
    assert report.no_control is not None and "two sequences" in report.no_control
    assert set(report.loss) == {"as it is", "no alignment"} and math.isnan(report.layers[0].of_document)
    assert "no control" in str(report)


def test_it_prints_and_draws(tmp_path: Path) -> None:
    report = alignment_report(Model(scope="causal"), inputs(), modalities=["text", "image"])
    printed = str(report)
    lines = printed.splitlines()
    assert lines[2].split()[0] == "0" and lines[3].split()[0] == "1" and max(map(len, lines)) <= 160
    assert f"{report.layers[0].entropy:.3g}" in lines[2].split()
    assert f"loss, another document: {report.loss['another document']:.4f}" in printed
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("no matplotlib")
    picture = report.draw(tmp_path / "report.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_it_refuses() -> None:
    model, given = Model(scope="causal"), inputs()
    with pytest.raises(ValueError, match="DuplexAligner"):
        alignment_report(nn.Linear(2, 2), {})
    with pytest.raises(ValueError, match="rows"):
        alignment_report(model, given, rows=torch.ones(2, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="modalities"):
        alignment_report(model, given, modalities=["text"])
    assert not mk.attention.watchers


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.aligner = mk.DuplexAligner(4, 2, dtype=DOUBLE)

    def forward(self, **_: Any) -> None:
        return None


def test_an_aligner_that_nobody_calls() -> None:
    with pytest.raises(ValueError, match="none that did"):
        alignment_report(Unused(), {})


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_models_of_transformers(family: str) -> None:
    pytest.importorskip("transformers", minversion="5.0")
    vlm = pytest.importorskip("vlm")
    from moda_kernels.integrations.transformers import enable

    model, given = vlm.make(family), vlm.inputs(family)
    enable(model)
    for module in model.modules():
        if isinstance(module, mk.DuplexAligner):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.5)
    both = {
        name: torch.cat([x[:1], x[:1]]) if name != "pixel_values" else torch.cat([x, x + 1])
        for name, x in given.items()
    }
    both["labels"] = both["input_ids"]
    with pytest.raises(ValueError, match="use_cache"):
        alignment_report(model, both | {"use_cache": True})
    report = alignment_report(model, both | {"use_cache": False}, modalities=_names(model))
    assert len(report.layers) == 2 and all(layer.effect > 0 for layer in report.layers)
    assert set(report.loss) == {"as it is", "another document", "no alignment"}
    # Both rows start alike and differ where the images do: text keys borrow another image's Gram sums.
    assert report.layers[0].of_document > 0 and report.loss["as it is"] != report.loss["another document"]


def _names(model: Any) -> list[str]:
    aligner = next(m for m in model.modules() if isinstance(m, mk.DuplexAligner))
    return [f"kind {m}" for m in range(aligner.num_modalities)]
