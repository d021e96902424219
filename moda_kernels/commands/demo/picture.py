"""The demo's picture: accuracy curves of all seeds, where each run ended, and who looks where when a digit is named."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moda_kernels.commands.demo.data import SIDE
from moda_kernels.commands.demo.report import by_variant, spread
from moda_kernels.commands.demo.train import Glance, Material, Run

COLORS = ("#8c8c8c", "#d95f02", "#1f77b4", "#7570b3", "#1b9e77")


def draw(runs: Sequence[Run], material: Material, path: Path) -> None:
    """Curves and ends above; below, a column per model with what each question of one pair of images looked at."""
    from matplotlib.figure import Figure

    own = by_variant(runs)
    colors = dict(zip(own, COLORS, strict=False))
    questions = len(next(iter(own.values()))[0].glances)
    height = 3.9 + 1.95 * questions
    figure = Figure(figsize=(12, height))
    plan = runs[0].plan
    title = f'Task "{plan.task}": {material.task.summary}'
    figure.suptitle(title, fontsize=13, weight="bold", x=0.04, y=1 - 0.18 / height, ha="left", va="top")
    split = (1.95 * questions + 0.35) / height
    top = figure.add_gridspec(1, 2, left=0.07, right=0.98, bottom=split + 0.55 / height, top=1 - 0.85 / height,
                              width_ratios=[2, 1], wspace=0.22)  # fmt: skip
    _curves(figure.add_subplot(top[0]), own, colors, material.task.kinds[0])
    _ends(figure.add_subplot(top[1]), own, colors, spread(runs))

    below, above = 0.25 / height, split - 0.45 / height
    grid = figure.add_gridspec(
        questions, len(own), left=0.04, right=0.9, bottom=below, top=above, hspace=0.5, wspace=0.08
    )
    first = {name: found[0] for name, found in own.items()}
    # One scale for all maps, so that they can be compared.
    peak = max(max(map(max, glance.maps)) for run in first.values() for glance in run.glances)
    image: Any = None
    for column, (name, run) in enumerate(first.items()):
        for row, glance in enumerate(run.glances):
            axes = figure.add_subplot(grid[row, column])
            image = _glance(axes, material, glance, peak)
            if row == 0:
                heading = f"{name}: another document's Gram" if run.plan.variant.gram == "another" else name
                axes.annotate(heading, (0, 1), (0, 26), xycoords="axes fraction", textcoords="offset points", ha="left",
                              fontsize=12, weight="bold", color=colors[name])  # fmt: skip
    bar = figure.colorbar(image, cax=figure.add_axes((0.92, 0.5 / height, 0.009, split - 1.1 / height)))
    bar.set_label(
        f"attention to a patch before the answer\n(last layer, mean over heads, seed {plan.seed})", fontsize=8
    )
    bar.ax.tick_params(labelsize=8)
    figure.savefig(path, dpi=120)


def _curves(axes: Any, own: dict[str, list[Run]], colors: dict[str, str], kind: str) -> None:
    for name, runs in own.items():
        steps = [step for step, _ in runs[0].checks]
        rates = 100 * np.array([[rate for _, rate in run.checks] for run in runs])
        for seed in rates:
            axes.plot(steps, seed, color=colors[name], lw=0.8, alpha=0.45)
        axes.plot(steps, rates.mean(0), "o-", color=colors[name], lw=2, ms=3.5, label=name)
    axes.set(title=f"{kind} correct on held-out images, while training", xlabel="step", ylim=(0, 102))
    _percent(axes)
    axes.legend(frameon=False, loc="upper left", title="mean; thin: each seed", title_fontsize=8)


def _ends(axes: Any, own: dict[str, list[Run]], colors: dict[str, str], said: dict[str, str]) -> None:
    for i, (name, runs) in enumerate(own.items()):
        rates = [100 * run.rate for run in runs]
        axes.bar(i, np.mean(rates), color=colors[name], alpha=0.35, width=0.62)
        places = i + np.linspace(-0.18, 0.18, len(rates)) if len(rates) > 1 else [i]
        axes.plot(places, rates, "o", color=colors[name], ms=5)
        axes.annotate(said[name], (i, 2), ha="center", va="bottom", fontsize=9)
    axes.set(title="all held-out, each seed; mean, 95 %", ylim=(0, 102))
    axes.set_xticks(range(len(own)), own)
    _percent(axes)


def _percent(axes: Any) -> None:
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.title.set_fontsize(10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)


def _glance(axes: Any, material: Material, glance: Glance, peak: float) -> Any:
    """The images of a document side by side, under the attention of one answer; the one that is asked for is framed."""
    over, left = None, 0.0
    height, width = material.held_out_images.pixels.shape[1:]
    for i, (number, patches) in enumerate(zip(glance.images, glance.maps, strict=True)):
        pixels = material.held_out_images.pixels[number]
        left = i * (width + 0.8)
        place = (left, left + width, height, 0)
        axes.imshow(pixels, cmap="gray_r", vmin=0, vmax=1.4, extent=place)
        grid = np.reshape(patches, (SIDE, SIDE))
        over = axes.imshow(grid, cmap=_see_through(), vmin=0, vmax=peak, extent=place)
        asked = i == glance.asked
        box = ([left, left + width, left + width, left, left], [0, 0, height, height, 0])
        axes.plot(*box, color="black" if asked else "0.8", lw=1.8 if asked else 0.8)
        share = f"{sum(patches):.0%} of attention"
        axes.text(left + width / 2, height + 0.3, share, ha="center", va="top", fontsize=8)
    axes.set(xlim=(-0.2, left + width + 0.2), ylim=(height + 0.1, -0.2), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    verdict = "right" if glance.answer == glance.truth else f"wrong: {glance.truth}"
    axes.set_title(f"{glance.question} … {glance.answer}  ({verdict})", fontsize=9)
    return over


def _see_through() -> Any:
    """Nothing to full red: the digit stays readable where there is little attention."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    red = to_rgb("#e6311c")
    return LinearSegmentedColormap.from_list("attention", [(*red, 0.0), (*red, 0.85)])
