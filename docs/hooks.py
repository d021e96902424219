"""What the site needs beyond its pages: pictures of results from where they are kept, and docstrings without roles."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def on_files(files: Any, config: Any) -> Any:
    """The pictures of the result files are part of the site."""
    from mkdocs.structure.files import File

    for path in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """In the source tree pages name those pictures where they are."""
    return markdown.replace("](../benchmarks/results/", "](results/")


def on_page_content(html: str, **_: Any) -> str:
    """``:class:`X``` of a docstring is `X` here."""
    return re.sub(r":(class|func|meth|mod|attr):(?=<code)", "", html)
