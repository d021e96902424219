"""Pictures of what was measured; they need matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moda_kernels.runtime import checks

if TYPE_CHECKING:
    from moda_kernels.diagnostics.report import AlignmentReport


def plot_attention_share(
    shares: Sequence[Tensor] | Tensor,
    path: str | Path,
    *,
    modalities: Sequence[str] | None = None,
    titles: Sequence[str] | None = None,
) -> Path:
    """Draw attention shares, one panel per layer (mean over sequences and heads, absent modalities left out).

    Args:
        shares: one ``[N, Hq, M, M]`` per layer, from :func:`attention_share`.
        path: image file to write; its suffix says the format.
        modalities: M names. titles: one per layer.

    Returns:
        The path. Needs matplotlib (``pip install moda_kernels[plot]``).

    Raises:
        ImportError: no matplotlib. ValueError: shapes that don't fit.
    """
    figure_class = _figure_class("plot_attention_share")
    layers = [s.detach().float().cpu() for s in shares]
    for layer in layers:
        if layer.dim() != 4 or layer.shape[-1] != layer.shape[-2]:
            raise checks.wrong_value("shares", "[N, Hq, M, M] per layer", layer)
    if not layers or any(layer.shape[-1] != layers[0].shape[-1] for layer in layers):
        got = f"layers of {[layer.shape[-1] for layer in layers]} modalities"
        raise checks.wrong_value("shares", "at least one layer, all with the same modalities", got)
    size = layers[0].shape[-1]
    names = list(modalities) if modalities is not None else [str(m) for m in range(size)]
    if len(names) != size or (titles is not None and len(titles) != len(layers)):
        raise checks.wrong_value("modalities, titles", f"{size} and {len(layers)} names", f"{modalities}, {titles}")
    figure = figure_class(figsize=(2.6 * max(len(layers), 1) + 0.8, 3.0), layout="constrained")
    for i, layer in enumerate(layers):
        axes = figure.add_subplot(1, len(layers), i + 1)
        mean = layer.nanmean((0, 1)).numpy()
        image = axes.imshow(mean, vmin=0, vmax=1, cmap="viridis")
        for a in range(size):
            for b in range(size):
                color = "black" if mean[a, b] > 0.6 else "white"
                axes.text(b, a, f"{mean[a, b]:.2f}", ha="center", va="center", color=color)
        axes.set_xticks(range(size), names)
        axes.set_yticks(range(size), names if i == 0 else [""] * size)
        axes.set_title(titles[i] if titles is not None else f"layer {i}")
        axes.set_xlabel("key")
        if i == 0:
            axes.set_ylabel("query")
        if i == len(layers) - 1:
            figure.colorbar(image, ax=axes, label="attention share")
    figure.savefig(path, dpi=150)
    return Path(path)


def _figure_class(name: str) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{name} needs matplotlib: pip install 'moda_kernels[plot]'") from error
    return Figure


def draw_report(report: "AlignmentReport", path: str | Path) -> Path:
    """See `AlignmentReport.draw`."""
    figure = _figure_class("draw")(figsize=(12.5, 6.6), layout="constrained")
    layers, names = report.layers, report.modalities
    x = range(1, len(layers) + 1)
    panels = figure.subplots(2, 3)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
    preference, chosen, entropy, length, effect, spectrum = panels.flat

    def lines(axes: Any, which: str, style: str = "o-", suffix: str = "") -> None:
        for m, name in enumerate(names):
            y = [float(getattr(layer, which)[m]) for layer in layers]
            axes.plot(x, y, style, color=f"C{m}", ms=4, label=f"{name}{suffix}")

    lines(preference, "signed")
    if report.no_control is None:
        lines(preference, "control", "x:", ", another document's")
    preference.axhline(0, color="0.7", lw=0.8)
    preference.set_title("attention per visible key: log2 own / other")
    lines(chosen, "chosen")
    chosen.set(title="attention of the chosen rows to each modality", ylim=(0, 1.02))
    entropy.plot(x, [layer.entropy for layer in layers], "o-", color="0.3", ms=4)
    entropy.set(title="its entropy, bits")
    entropy.set_ylim(bottom=0)
    lines(length, "length")
    length.axhline(1, color="0.7", lw=0.8)
    length.set_title("length of aligned keys, of what it was")
    effect.plot(x, [layer.effect for layer in layers], "o-", color="0.3", ms=4, label="with against without alignment")
    effect.plot(x, [layer.of_document for layer in layers], "x:", color="C3", ms=5, label="against another document's")
    title = "change of a layer's output"
    if report.loss:
        title += "\nloss: " + ", ".join(f"{how} {loss:.3g}" for how, loss in report.loss.items())
    effect.set_title(title)
    values = torch.cat([layer.spectrum[None] for layer in layers])  # [layers, M, D]
    for m, name in enumerate(names):
        for i, layer in enumerate(values[:, m]):
            shade = 0.35 + 0.65 * (i + 1) / len(layers)
            label = f"{name}: {float(layers[-1].rank[m]):.1f} count in the last layer" if i == len(layers) - 1 else None
            spectrum.plot(range(1, len(layer) + 1), layer.tolist(), color=f"C{m}", alpha=shade, lw=1.2, label=label)
    spectrum.set(title="singular values of the normed Gram matrix", xlabel="number (paler: earlier layers)")
    spectrum.set_yscale("log")
    top = float(values.nan_to_num().max()) or 1.0
    spectrum.set_ylim(1e-4 * top, 1.5 * top)
    for axes in (preference, chosen, effect, spectrum):
        axes.legend(frameon=False, fontsize=7)
    for axes in panels.flat:
        axes.title.set_fontsize(9)
    figure.savefig(path, dpi=150)
    return Path(path)
