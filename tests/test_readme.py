"""README.md keeps its word and its length: its Python runs, its results are those of the result files. docs/backends.md
names the backends and settings there are, CONTRIBUTING.md draws the imports as they are."""

import ast
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import moda_kernels as mk
from moda_kernels import backends

readme = pytest.importorskip("benchmarks.readme", reason="the tests stand alone, without the source tree")

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"

if not README.exists():
    pytest.skip("the tests stand alone, without the source tree", allow_module_level=True)
TEXT = README.read_text(encoding="utf-8")
BACKENDS = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")


def python_blocks() -> list[tuple[int, str]]:
    """(line of the first statement, code) of every Python block."""
    found = re.finditer(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [(TEXT.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks, in order, in one namespace, as a reader would paste them. Tracebacks name README.md's lines."""
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks()
    assert blocks, "no Python in README.md"
    module = ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)  # torch.compile looks for the module of a function
    for line, code in blocks:
        exec(compile("\n" * (line - 1) + code, README, "exec"), module.__dict__)
    assert not list(tmp_path.iterdir()), "an example leaves files behind"


def test_names_exist() -> None:
    unknown = {name for name in re.findall(r"\bmk\.(\w+)", TEXT) if not hasattr(mk, name)}
    assert not unknown


def test_every_backend_has_a_column() -> None:
    (header,) = re.findall(r"^\| \|(.*`reference`.*)\|$", BACKENDS, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", header)) == set(backends.BACKENDS)


def test_every_environment_variable_is_listed() -> None:
    sources = [ROOT / "setup.py", *(ROOT / "moda_kernels").rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    read = set(re.findall(r"[\"'](MODA_KERNELS_\w+)[\"']", code))
    listed = set(re.findall(r"^\| `(MODA_KERNELS_\w+)", BACKENDS, re.MULTILINE))
    assert read == listed


def anchors_of(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_it_is_short_and_opens_on_a_picture() -> None:
    assert len(TEXT.splitlines()) <= 180
    assert "](docs/pictures/overview.svg)" in TEXT[: TEXT.index("```")]
    # Words of the trade that nothing has explained yet.
    assert not re.search(r"go hungry|\bfold", TEXT)
    assert TEXT.index("pseudo scores**, weight that goes to no key") == TEXT.lower().index("pseudo scores")


def test_links_lead_somewhere() -> None:
    anchors = anchors_of(TEXT)
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        if target.startswith("#"):
            assert target[1:] in anchors
        elif not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            assert (ROOT / path).exists(), target
            assert not anchor or anchor in anchors_of((ROOT / path).read_text(encoding="utf-8")), target


def test_results_are_those_of_the_result_files() -> None:
    """`python -m benchmarks.readme` writes the performance tables; nobody types numbers."""
    for path, text in readme.pages().items():
        assert path.read_text(encoding="utf-8") == text, path.name
    ours = re.findall(r"^\|.*\| (\d[\d.]*)× \|$", TEXT, re.MULTILINE)
    assert len(ours) == len(readme.HIGHLIGHTS) and min(map(float, ours)) < 1, "what is slower is told, too"


def imports(path: Path) -> set[str]:
    """The files and folders of the package that a file imports from; the compiled extension is none."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "moda_kernels":
            names = [f"moda_kernels.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found |= {(name.split(".") + ["__init__"])[1] for name in names if name.split(".")[0] == "moda_kernels"}
    return found - {"_native"}


def test_imports_go_one_way_as_contributing_draws_them() -> None:
    package = ROOT / "moda_kernels"
    text = CONTRIBUTING.read_text(encoding="utf-8")
    drawing = re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[0]
    floors = [line.split("  ")[0].split(", ") for line in drawing.splitlines()]
    height = {name: -i for i, names in enumerate(floors) for name in names}
    assert len(height) == sum(map(len, floors)), "a name is drawn twice"
    files = {path: path.relative_to(package).parts[0].removesuffix(".py") for path in package.rglob("*.py")}
    assert set(files.values()) == set(height), "CONTRIBUTING.md draws other files than there are"
    for path, own in files.items():
        # What is no file of the package is something that `__init__` defines, such as `__version__`.
        for other in {name if name in height else "__init__" for name in imports(path)} - {own}:
            assert height[other] < height[own], f"{path.name} imports {other}, which isn't drawn below it"
