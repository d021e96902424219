"""The examples that have no test file of their own: each runs, small, on the photographs, and does what it says."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

for name in ("transformers", "accelerate", "sklearn"):
    pytest.importorskip(name)
EXAMPLES = Path(__file__).parents[1] / "examples"
if not EXAMPLES.exists():
    pytest.skip("the tests stand alone, without the source tree", allow_module_level=True)


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where they are run: examples import each other."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with torch.random.fork_rng(devices=[]):
        yield


def example(name: str) -> Any:
    return importlib.import_module(name)


def test_lora_and_aligners(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    losses = example("finetune_lora").run(3, 2e-2, tmp_path)
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_lora_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "finetune_lora", raising=False)
    with pytest.raises(SystemExit, match="needs PEFT: pip install peft"):
        example("finetune_lora")


def test_finetuned_saved_and_served(tmp_path: Path) -> None:
    """The static cache, a growing one and one pass agree, or the example stops."""
    example("finetune_vlm").train("data", 2, 1e-2, tmp_path)
    model = example("serve_vlm").load(tmp_path)
    answers = example("serve_vlm").serve(model, batches=2)
    assert [tuple(a.shape) for a in answers] == [(4, example("serve_vlm").NEW)] * 2


def test_a_model_of_ones_own() -> None:
    """What it generates is what a full pass says, or it stops."""
    model, losses = example("own_model").train(12)
    assert losses[-1] < 0.7 * losses[0]
    assert 0 <= example("own_model").check(model) <= 1


def test_shares_by_layer(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    analyse, finetune = example("analyse_vlm"), example("finetune_vlm")
    model = finetune.make_model()
    reports = [analyse.analyse(model, "fresh", tmp_path)]
    reports.append(analyse.analyse(finetune.quickly(model, 3), "trained", tmp_path))
    for report in reports:
        assert len(report.layers) == 2 and set(report.loss) == {"as it is", "another document", "no alignment"}
        for layer in report.layers:
            torch.testing.assert_close(layer.share.sum(-1), torch.ones(2))
    assert reports[0].layers[0].effect == pytest.approx(0, abs=1e-6) and reports[1].layers[0].effect > 1e-5
    assert all(
        (tmp_path / f"{of}-{name}.png").stat().st_size > 5000
        for of in ("shares", "alignment")
        for name in ("fresh", "trained")
    )
