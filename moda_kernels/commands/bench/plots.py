"""Pictures from result files only: what was not written down is not drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moda_kernels.commands.bench.peers import PEERS
from moda_kernels.commands.bench.pieces import PIECES
from moda_kernels.commands.bench.results import Record

FORMATS = (".png", ".pdf", ".svg")
PASSES = ("forward", "forward+backward")
#: Panels of one picture: the layouts of the commonest length and dtype side by side.
WIDTH, HEIGHT = 12.0, 4.2
HATCHES = ("", "//", "..")


def why_not() -> str | None:
    """Why nothing can be drawn here; None if it can."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        return f"drawing needs matplotlib ({error}): pip install matplotlib"
    return None


def look(contestant: str) -> tuple[str, str]:
    """Colour and hatch of a contestant, the same in every picture: by its place among all that there are."""
    at = list(PEERS).index(contestant) if contestant in PEERS else len(PEERS)
    return f"C{at % 10}", HATCHES[at // 10 % len(HATCHES)]


def draw(records: Sequence[Record], path: Path) -> int:
    """Useful GFLOP/s of every contestant, grouped by layout: a panel per pass, at the length with most cases. Below
    them the time over the length for the layout with most lengths; where there is one length only, the parts around
    attention (segmentation, tiles, block masks, alignment) in its place.

    Returns:
        The number of measurements drawn.

    Raises:
        ValueError: there are none to draw. ImportError: matplotlib is missing.
    """
    usable = [r for r in records if r.get("useful_gflops") and r["pass"] in PASSES]
    if not usable:
        raise ValueError("records: expected measured forwards or backwards, got none")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dtype = _commonest([r["dtype"] for r in usable])
    usable = [r for r in usable if r["dtype"] == dtype]
    length = _commonest([r["workload"]["length"] for r in usable])
    passes = [p for p in PASSES if any(r["pass"] == p for r in usable)]
    lengths = {r["workload"]["length"] for r in usable if r["pass"] == "forward"}
    parts = [r for r in records if r["pass"] in PIECES and "ms" in r]
    panels = len(passes) + (len(lengths) > 1 or bool(parts))
    figure = Figure(figsize=(WIDTH, HEIGHT * panels), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    drawn = 0
    for ax, measured in zip(axes, passes, strict=False):
        here = [r for r in usable if r["pass"] == measured and r["workload"]["length"] == length]
        drawn += _bars(ax, here)
        ax.set_title(f"{measured}, {length:,} tokens, {dtype}: useful GFLOP/s (visible pairs only)", loc="left")
    if len(lengths) > 1:
        drawn += _lines(axes[-1], usable)
    elif parts:
        drawn += _parts(axes[-1], parts)
    handles = {h.get_label(): h for ax in axes for h in ax.get_legend_handles_labels()[0]}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize="small")
    e = usable[0]["environment"]
    shape = usable[0]
    figure.suptitle(
        f"{e['device']}, torch {e['torch']}, {e['date'][:10]}; "
        f"{shape['query_heads']}/{shape['key_heads']} heads, D = {shape['head_dim']}",
        fontsize="medium",
    )
    figure.savefig(path, dpi=110)
    return drawn


def _contestants(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(r["contestant"] for r in records))


def _bars(ax: Any, records: Sequence[Record]) -> int:
    layouts = list(dict.fromkeys(r["workload"]["name"] for r in records))
    names = _contestants(records)
    width = 0.85 / max(len(names), 1)
    for i, name in enumerate(names):
        own = [r for r in records if r["contestant"] == name]
        where = [layouts.index(r["workload"]["name"]) + (i - len(names) / 2 + 0.5) * width for r in own]
        heights = [r["useful_gflops"] for r in own]
        colour, hatch = look(name)
        ax.bar(where, heights, width, label=name, color=colour, hatch=hatch, edgecolor="white", lw=0.3)
    ax.set_xticks(range(len(layouts)), layouts)
    _plain(ax, "y")
    return len(records)


def _lines(ax: Any, records: Sequence[Record]) -> int:
    """Forward time over the length, both logarithmic."""
    forward = [r for r in records if r["pass"] == "forward"]
    pairs = {(r["workload"]["name"], r["workload"]["length"]) for r in forward}
    layout = _commonest([name for name, _ in sorted(pairs)])
    own = [r for r in forward if r["workload"]["name"] == layout]
    for name in _contestants(own):
        points = sorted((r["workload"]["length"], r["ms"]["median"]) for r in own if r["contestant"] == name)
        colour, hatch = look(name)
        ax.plot(*zip(*points, strict=True), marker="o", ms=4, label=name, color=colour, ls="--" if hatch else "-")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    lengths = sorted({r["workload"]["length"] for r in own})
    ax.set_xticks(lengths, [f"{n:,}" for n in lengths])
    ax.set_title(f"forward, {layout}: milliseconds over tokens", loc="left")
    _plain(ax, "y")
    return len(own)


def _parts(ax: Any, records: Sequence[Record]) -> int:
    """Milliseconds of the parts, a bar for each layout."""
    length = _commonest([r["workload"]["length"] for r in records])
    own = [r for r in records if r["workload"]["length"] == length]
    names = [name for name in PIECES if any(r["pass"] == name for r in own)][::-1]
    layouts = list(dict.fromkeys(r["workload"]["name"] for r in own))
    height = 0.8 / len(layouts)
    for i, layout in enumerate(layouts):
        mine = [r for r in own if r["workload"]["name"] == layout]
        where = [names.index(r["pass"]) - (i - len(layouts) / 2 + 0.5) * height for r in mine]
        bars = ax.barh(where, [r["ms"]["median"] for r in mine], height, color="0.35", alpha=1 / (i + 1))
        ax.bar_label(bars, [f"{r['ms']['median']:.3g} ms, {layout}" for r in mine], padding=4, fontsize="small")
    ax.set_yticks(range(len(names)), names)
    ax.set_xscale("log")
    ax.margins(x=0.25)
    ax.set_title(f"around attention, {length:,} tokens: milliseconds", loc="left")
    _plain(ax, "x")
    return len(own)


def _plain(ax: Any, axis: str) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=axis, alpha=0.3)


def _commonest(values: Sequence[Any]) -> Any:
    return max(dict.fromkeys(values), key=values.count)
