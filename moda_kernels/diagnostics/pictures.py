"""Pictures of what was measured; they need matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from moda_kernels.runtime import checks


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
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_attention_share needs matplotlib: pip install 'moda_kernels[plot]'") from error
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
    figure = Figure(figsize=(2.6 * max(len(layers), 1) + 0.8, 3.0), layout="constrained")
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
