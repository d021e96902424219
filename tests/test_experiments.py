"""Experiments: what is compared, what is written down, and the page that is made of it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

page = pytest.importorskip("benchmarks.experiments.page", reason="the tests stand alone, without the source tree")
experiments = pytest.importorskip("benchmarks.experiments.__main__")
plans = pytest.importorskip("benchmarks.experiments.plans")

if not page.PAGE.exists():
    pytest.skip("the tests stand alone, without the source tree", allow_module_level=True)


def test_the_page_is_made_from_the_result_file() -> None:
    """`python -m benchmarks.experiments --page` writes the tables; nobody types numbers."""
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.updated(text, page.read()) == text
    assert all(f"<!-- {name}:begin -->" in text for name in plans.EXPERIMENTS)


def record(variant: str, seed: int, rate: float) -> dict[str, Any]:
    where = {"cpu": "a CPU", "cores": 2, "torch": "2", "date": "2026-01-01T00:00"}
    found = {"experiment": "claim", "variant": variant, "seed": seed, "rate": rate, "backend": "cpu", "loss": 0.5}
    found |= {"accuracy": {"claim": {"right": 1, "other": 0, "answers": 10}}, "length": [1.5, 2.5]}
    return found | {"disparity": [[0.2, 0.3]] * 2, "asked": [[0.1, 0.2]], "environment": where}


def test_differences_are_paired_by_seed() -> None:
    records = [record("plain", 0, 0.5), record("MODA", 1, 0.9), record("plain", 1, 0.6), record("MODA", 0, 0.6)]
    records += [record("MODA", 2, 0.1)]  # a seed that plain attention doesn't have yet
    experiment = plans.EXPERIMENTS["claim"]
    found = page.difference(page.rates(records, experiment), "MODA", "plain")
    assert found.mean == pytest.approx(0.2) and found.half == pytest.approx(12.7062 * 0.1, rel=1e-4)
    table = page.table(records, experiment)
    assert "| +20.0 ± 127.1 |" in table and "2.00 | 20%, 30%" in table and "2 to 3 seeds" in table
    assert page.table([], experiment) == "Not measured yet."


def test_clear_differences_are_bold() -> None:
    rates = {"a": {0: 0.5, 1: 0.52, 2: 0.51}, "b": {0: 0.1, 1: 0.1, 2: 0.1}}
    assert page._said(page.difference(rates, "a", "b")).startswith("**+41.0 ± ")
    assert page._said(page.difference(rates, "b", "b")) == "+0.0 ± 0.0"
    assert math.isnan(page.difference({"a": {0: 1.0}, "b": {0: 0.5}}, "a", "b").half)


def test_only_what_is_missing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results.jsonl"
    small = plans.Experiment("claim", "claim", 1, 2, 2, (plans.PLAIN, plans.MODA))
    monkeypatch.setitem(experiments.EXPERIMENTS, "claim", small)
    train_all = experiments.train_all
    monkeypatch.setattr(
        experiments, "train_all", lambda plans, *rest: train_all([replace(p, quick=True) for p in plans], *rest)
    )
    before = page.PAGE.read_text(encoding="utf-8")
    assert experiments.main(["claim", "--seeds", "1", "--jobs", "1", "--out", str(out)]) == 0
    first = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(r["variant"], r["seed"]) for r in first] == [("plain", 0), ("MODA", 0)]
    assert experiments.main(["claim", "--seeds", "2", "--jobs", "1", "--out", str(out)]) == 0
    both = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert both[:2] == first and [r["seed"] for r in both] == [0, 0, 1, 1]
    assert set(both[0]) >= {"rate", "loss", "signed", "disparity", "asked", "length", "environment", "seconds"}
    assert page.PAGE.read_text(encoding="utf-8") == before, "another file is not the page's"
    with pytest.raises(SystemExit):
        experiments.main(["nonsense"])
