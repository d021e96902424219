"""Pictures from result files only: what was not written down is not drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moda_kernels.commands.bench.results import Record

FORMATS = (".png", ".pdf", ".svg")
PASSES = ("forward", "forward+backward")
#: Panels of one picture: the layouts of the commonest length and dtype side by side.
WIDTH, HEIGHT = 12.0, 4.2


def why_not() -> str | None:
    """Why nothing can be drawn here; None if it can."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        return f"drawing needs matplotlib ({error}): pip install matplotlib"
    return None


def draw(records: Sequence[Record], path: Path) -> int:
    """Useful GFLOP/s of every contestant, grouped by layout: a panel per pass, at the length with most cases; and below
    it the time over the length for the layout with most lengths.

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
    contestants = list(dict.fromkeys(r["contestant"] for r in usable))
    colours = {name: f"C{i % 10}" for i, name in enumerate(contestants)}
    hatches = {name: ("", "//", "..")[i // 10 % 3] for i, name in enumerate(contestants)}
    passes = [p for p in PASSES if any(r["pass"] == p for r in usable)]
    figure = Figure(figsize=(WIDTH, HEIGHT * (len(passes) + 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(passes) + 1, 1, squeeze=False)[:, 0]
    drawn = 0
    for ax, measured in zip(axes, passes, strict=False):
        here = [r for r in usable if r["pass"] == measured and r["workload"]["length"] == length]
        drawn += _bars(ax, here, colours, hatches)
        ax.set_title(f"{measured}, {length:,} tokens, {dtype}: useful GFLOP/s (visible pairs only)", loc="left")
    drawn += _lines(axes[-1], usable, colours)
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


def _bars(ax: Any, records: Sequence[Record], colours: dict[str, str], hatches: dict[str, str]) -> int:
    layouts = list(dict.fromkeys(r["workload"]["name"] for r in records))
    names = [name for name in colours if any(r["contestant"] == name for r in records)]
    width = 0.85 / max(len(names), 1)
    for i, name in enumerate(names):
        own = [r for r in records if r["contestant"] == name]
        where = [layouts.index(r["workload"]["name"]) + (i - len(names) / 2 + 0.5) * width for r in own]
        heights = [r["useful_gflops"] for r in own]
        ax.bar(where, heights, width, label=name, color=colours[name], hatch=hatches[name], edgecolor="white", lw=0.3)
    ax.set_xticks(range(len(layouts)), layouts)
    _plain(ax)
    return len(records)


def _lines(ax: Any, records: Sequence[Record], colours: dict[str, str]) -> int:
    """Forward time over the length, both logarithmic."""
    forward = [r for r in records if r["pass"] == "forward"]
    pairs = {(r["workload"]["name"], r["workload"]["length"]) for r in forward}
    if not pairs:
        ax.axis("off")
        return 0
    layout = _commonest([name for name, _ in sorted(pairs)])
    own = [r for r in forward if r["workload"]["name"] == layout]
    for name in colours:
        points = sorted((r["workload"]["length"], r["ms"]["median"]) for r in own if r["contestant"] == name)
        if points:
            ax.plot(*zip(*points, strict=True), marker="o", ms=4, label=name, color=colours[name])
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    lengths = sorted({r["workload"]["length"] for r in own})
    ax.set_xticks(lengths, [f"{n:,}" for n in lengths])
    ax.set_title(f"forward, {layout}: milliseconds over tokens", loc="left")
    _plain(ax)
    return len(own)


def _plain(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.3)


def _commonest(values: Sequence[Any]) -> Any:
    return max(dict.fromkeys(values), key=values.count)
