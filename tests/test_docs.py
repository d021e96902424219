"""The pages of docs/ keep their word: their Python runs, pictures are what it draws, links lead somewhere."""

import contextlib
import importlib.util
import io
import re
from pathlib import Path
from types import ModuleType

import pytest

import moda_kernels as mk

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

if not DOCS.exists():
    pytest.skip("the tests stand alone, without the source tree", allow_module_level=True)


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_pictures", DOCS / "pictures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_examples_run_and_pictures_are_theirs(drawing: ModuleType) -> None:
    text = drawing.PAGE.read_text(encoding="utf-8")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        made = drawing.everything()
    assert re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) == [printed.getvalue()]
    assert made.keys() == {path.stem for path in drawing.PICTURES.iterdir()}
    for name, svg in made.items():
        assert (drawing.PICTURES / f"{name}.svg").read_text(encoding="utf-8") == svg, "run docs/pictures.py"
        assert name == "overview" or f"](pictures/{name}.svg)" in text
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert len(headings) == len(made) - 1


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_names_and_links(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not {name for name in re.findall(r"\bmk\.(\w+)", text) if not hasattr(mk, name)}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith(("https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize(
    "page", [p for p in sorted(DOCS.glob("*.md")) if p.name != "masks.md"], ids=lambda page: page.name
)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page, in order, in one namespace, as a reader would paste them; tracebacks name its lines."""
    text = page.read_text(encoding="utf-8")
    if "import transformers" in text and not all(map(importlib.util.find_spec, ("transformers", "sklearn"))):
        pytest.skip("transformers is optional")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for found in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, found.start(1))
        exec(compile("\n" * line + found[1], page, "exec"), namespace)
    assert not list(tmp_path.iterdir()), "an example leaves files behind"


def test_every_page_is_in_the_navigation() -> None:
    yaml = pytest.importorskip("yaml")
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = [target for entry in site["nav"] for target in entry.values()]
    assert sorted(named) == sorted(page.name for page in DOCS.glob("*.md"))


def test_what_the_code_cites_of_the_specification_is_there() -> None:
    text = (DOCS / "spec.md").read_text(encoding="utf-8")
    known = {
        title.lower()
        for title in re.findall(r"^## (.+)$|\*\*([^*]+?)\.?\*\*", text, re.MULTILINE)
        for title in title
        if title
    }
    cited = set()
    for path in [*(ROOT / "moda_kernels").rglob("*.py"), *(ROOT / "csrc").iterdir()]:
        cited |= set(re.findall(r"\(spec: \\?\"([^\"\\]+)", path.read_text(encoding="utf-8")))
    assert len(cited) > 5
    assert {name.lower() for name in cited} <= known
