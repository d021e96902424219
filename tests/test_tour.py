"""The notebook runs, cell by cell, and is kept without outputs. No Jupyter is needed: what a cell ends with is shown as
a notebook would show it."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch

NOTEBOOK = Path(__file__).parents[1] / "examples" / "tour.ipynb"

if not NOTEBOOK.exists():
    pytest.skip("the tests stand alone, without the source tree", allow_module_level=True)


def run(source: str, namespace: dict[str, Any], name: str) -> Any:
    """Run a cell; the value of the expression that it ends with, if it does."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), namespace)
    if last is None:
        return None
    assert isinstance(last, ast.Expr)
    return eval(compile(ast.Expression(last.value), name, "eval"), namespace)


def test_the_tour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    namespace: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    with torch.random.fork_rng(devices=[]):
        for i, cell in enumerate(notebook["cells"]):
            if cell["cell_type"] != "code":
                continue
            assert not cell["outputs"] and cell["execution_count"] is None, "clear the outputs before you commit it"
            shown.append(run("".join(cell["source"]), namespace, f"tour.ipynb, cell {i}"))
    drawn = [value for value in shown if hasattr(value, "_repr_html_") and "<svg" in value._repr_html_()]
    assert len(drawn) == 3, "a layout and two masks draw themselves"
    assert 2 in shown, "both layers' calls were replaced"
    unchanged, moved = next(v for v in shown if isinstance(v, tuple) and isinstance(v[0], bool))
    assert unchanged and moved > 0
    assert not list(tmp_path.iterdir())
