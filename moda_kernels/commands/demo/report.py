"""What the demo says: tables on the screen, and one picture. Every number in them was measured in this run."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from moda_kernels.commands.demo.data import IMAGE, KINDS, MODALITIES, SIDE, TEXT
from moda_kernels.commands.demo.train import Glance, Material, Run, even_weights, most_frequent, pictured

COLORS = {"plain": "#7f7f7f", "mask alone": "#1f77b4", "MODA": "#d95f02"}
SHARES_EXPLAINED = """Who attends to whom: mean over held-out documents and heads. Disparity: of the attention per
visible key to the own and to the other modality, |own - cross| / max(own, cross)."""
PAIRS = [(a, b) for a in (TEXT, IMAGE) for b in (TEXT, IMAGE)]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned first column, right-aligned others, a rule under the header."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        return "  " + "   ".join(cells).rstrip()

    return "\n".join([line(header), "  " + "-" * (sum(widths) + 3 * (len(widths) - 1)), *map(line, rows)])


def results_table(runs: Sequence[Run], material: Material) -> str:
    """Losses, accuracies and times."""
    header = ("", "parameters", "train loss", "held-out loss", "digits correct", "larger correct", "time", "backend")
    guesses = [f"{most_frequent(material.held_out, kind):.1%}" for kind in KINDS]
    rows = [("always the most frequent", "", "", "", *guesses, "", "")]
    for run in runs:
        accuracy = run.held_out.accuracy
        rows.append(
            (
                run.variant.name,
                f"{run.parameters:,}",
                f"{np.mean(run.losses[-20:]):.3f}",
                f"{run.held_out.loss:.3f}",
                *(f"{accuracy[kind].rate:.1%}" for kind in KINDS),
                f"{run.seconds:.1f} s",
                run.backend,
            )
        )
    return table(header, rows)


def shares_table(runs: Sequence[Run], material: Material) -> str:
    """Attention shares and disparities, by layer, beside those of attention that doesn't look."""
    names = [f"{MODALITIES[a]}→{MODALITIES[b]}" for a, b in PAIRS]
    header = ("", "layer", *names, "disparity text", "image")
    rows = []
    for mask in dict.fromkeys(run.variant.mask for run in runs):
        users = [run for run in runs if run.variant.mask == mask]
        even = even_weights(mask, material.held_out)
        rows.append((f"even weights, mask of {users[0].variant.name}", "", *_cells(even.share[0], even.disparity[0])))
        for run in users:
            for i, (share, disparity) in enumerate(zip(run.shares.share, run.shares.disparity, strict=True)):
                rows.append((run.variant.name, str(i + 1), *_cells(share, disparity)))
    return table(header, rows)


def _cells(share: Tensor, disparity: Tensor) -> list[str]:
    return [*(f"{share[a, b]:.0%}" for a, b in PAIRS), *(f"{disparity[m]:.0%}" for m in (TEXT, IMAGE))]


def conclusion(runs: Sequence[Run]) -> str:
    """What the run shows and what it doesn't, in words."""
    by_name = {run.variant.name: run for run in runs}
    moda, lines = by_name["MODA"].held_out.accuracy["digit"], []
    for name in ("mask alone", "plain"):
        other = by_name[name].held_out.accuracy["digit"]
        difference = 100 * (moda.rate - other.rate)
        error = 100 * math.hypot(moda.standard_error, other.standard_error)
        size = "no clear difference" if abs(difference) <= 2 * error else "better" if difference > 0 else "worse"
        lines.append(f"  MODA against {name}: {difference:+.1f} points of digits correct (± {2 * error:.1f}), {size}.")
    steps, differences = len(runs[0].losses), "\n".join(lines)
    return f"""What this shows, and what it does not
{differences}
  ± is twice the standard error that comes from {moda.answers} held-out answers alone; another seed moves the results
  as well, often further (try --seed). This is a toy: tiny models, 8×8 images, {steps} steps, one seed, one learning
  rate for all. It shows MODA training through packed documents, and where attention goes; it is no evidence
  about larger models. MODA also has the aligners' parameters, and takes their time."""


def explanation() -> str:
    """What the variants and the columns are."""
    return """Three small decoders learn to answer questions about scanned digits:
  plain       causal attention
  mask alone  the same, but the patches of an image see each other both ways (modular mask)
  MODA        that mask, and keys aligned with the other modality (duplex alignment: causal scope, fusion "concat")
Same initial weights, batches, order and number of steps. Loss on text only; tested on images never trained on.
"Larger": which of two digits is larger (left, right, same), asked before they are named."""


def draw(runs: Sequence[Run], material: Material, path: Path) -> None:
    """The picture: training curves above; below, a row per variant with attention shares and what answers looked at."""
    from matplotlib.figure import Figure

    layers, count = len(runs[0].shares.share), len(runs)
    figure = Figure(figsize=(13, 4.0 + 2.3 * count))
    title = "Scanned digits and text about them: plain causal attention, modular mask, MODA"
    figure.suptitle(title, fontsize=14, weight="bold", y=0.985)
    split = 2.3 * count / (4.0 + 2.3 * count)
    top = figure.add_gridspec(1, 3, left=0.06, right=0.98, bottom=split + 0.085, top=0.915, width_ratios=[1.3, 1.3, 1])
    widths = [1] * layers + [2, 2]
    below = figure.add_gridspec(
        count, layers + 2, left=0.1, right=0.91, bottom=0.035, top=split - 0.02, hspace=0.35, width_ratios=widths
    )
    _draw_curves([figure.add_subplot(top[i]) for i in range(3)], runs)

    document = pictured(material).documents[0]
    images = [material.held_out_images.pixels[i] for i in document.images]
    # One scale for all maps, so that they can be compared.
    peak = max(float(patches.max()) for run in runs for glance in run.glances for patches in glance.maps)
    image: Any = None
    for number, run in enumerate(runs):
        row = [figure.add_subplot(below[number, i]) for i in range(layers + 2)]
        for i, share in enumerate(run.shares.share):
            _draw_share(row[i], share, f"attention, layer {i + 1}", first=i == 0)
        color = COLORS[run.variant.name]
        row[0].set_ylabel(run.variant.name, fontsize=13, weight="bold", color=color, labelpad=10)
        for axes, glance in zip(row[layers:], run.glances, strict=True):
            image = _draw_glance(axes, images, glance, peak)
    bar = figure.colorbar(image, cax=figure.add_axes((0.925, 0.1, 0.009, split - 0.2)))
    bar.set_label("attention to a patch when the digit is named\n(last layer, mean over heads)", fontsize=9)
    figure.savefig(path, dpi=120)


def _draw_curves(panels: Sequence[Any], runs: Sequence[Run]) -> None:
    from matplotlib.ticker import NullLocator

    loss, accuracy, bars = panels
    for run in runs:
        name, color = run.variant.name, COLORS[run.variant.name]
        smooth = _smoothed(run.losses)
        loss.plot(range(1, len(smooth) + 1), smooth, label=name, color=color, lw=1.6)
        steps, rates = zip(*run.checks, strict=True)
        accuracy.plot(steps, [100 * rate for rate in rates], "o-", color=color, lw=1.6, ms=3.5, label=name)
    loss.set(title="training loss (text tokens)", xlabel="step", yscale="log")
    loss.yaxis.set_minor_locator(NullLocator())
    ticks = [0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 3]
    loss.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    loss.set_ylim(0.8 * min(min(_smoothed(run.losses)) for run in runs), 4)
    loss.legend(frameon=False)
    accuracy.set(title="digits correct, part of held-out images", xlabel="step", ylim=(0, 102))
    accuracy.axhline(10, color="0.6", lw=0.8, ls=":")
    accuracy.annotate("chance", (0.99, 10.5), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="0.5")
    accuracy.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    for i, run in enumerate(runs):
        result = run.held_out.accuracy["digit"]
        bars.bar(i, 100 * result.rate, yerr=200 * result.standard_error, color=COLORS[run.variant.name], capsize=4)
        bars.annotate(f"{result.rate:.1%}", (i, 3), ha="center", color="white", weight="bold")
    bars.set(title="digits correct, all held-out", ylim=(0, 102))
    bars.set_xticks(range(len(runs)), [run.variant.name for run in runs])
    bars.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    for axes in (loss, accuracy, bars):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)


def _smoothed(losses: Sequence[float], share: float = 0.95) -> list[float]:
    """A running mean with forgetting, free of the bias of its start."""
    total = weight = 0.0
    out = []
    for loss in losses:
        total, weight = share * total + loss, share * weight + 1
        out.append(total / weight)
    return out


def _draw_share(axes: Any, share: Tensor, title: str, first: bool) -> None:
    axes.imshow(share.numpy(), vmin=0, vmax=1, cmap="Blues")
    for a, b in PAIRS:
        value = float(share[a, b])
        axes.text(b, a, f"{value:.0%}", ha="center", va="center", color="white" if value > 0.55 else "black")
    axes.set_xticks(range(len(MODALITIES)), [f"to {name}" for name in MODALITIES], fontsize=8)
    labels = [f"from {name}" for name in MODALITIES] if first else []
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.tick_params(length=0)
    axes.set_title(title, fontsize=10)
    axes.spines[:].set_visible(False)


def _draw_glance(axes: Any, images: Sequence[Any], glance: Glance, peak: float) -> Any:
    """The images of a document side by side, under the attention of one answer."""
    height, width = images[0].shape
    for i, (pixels, patches) in enumerate(zip(images, glance.maps, strict=True)):
        left = i * (width + 0.8)
        place = (left, left + width, height, 0)
        axes.imshow(pixels, cmap="gray_r", vmin=0, vmax=1.4, extent=place)
        over = axes.imshow(patches.reshape(SIDE, SIDE).numpy(), cmap=_see_through(), vmin=0, vmax=peak, extent=place)
        axes.plot([left, left + width, left + width, left, left], [0, 0, height, height, 0], color="0.8", lw=0.8)
        share = f"{float(patches.sum()):.0%} of attention"
        axes.text(left + width / 2, height + 0.3, share, ha="center", va="top", fontsize=8)
    axes.set(xlim=(-0.1, left + width + 0.1), ylim=(height + 0.1, -0.1), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    verdict = "correct" if glance.answer == glance.truth else f"wrong, it is {glance.truth}"
    axes.set_title(f"{glance.question} is … {glance.answer}  ({verdict})", fontsize=10)
    return over


def _see_through() -> Any:
    """Nothing to full red: the digit stays readable where there is little attention."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    red = to_rgb("#e6311c")
    return LinearSegmentedColormap.from_list("attention", [(*red, 0.0), (*red, 0.85)])
