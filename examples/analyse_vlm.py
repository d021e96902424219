"""Who attends to whom, layer by layer: the paper's figures, drawn for a model before and after some training.

    python examples/analyse_vlm.py --out pictures

writes, for a LLaVA with fresh and with trained aligners,

- `shares-*.png`: the mean attention that text and image tokens give to each other, a panel a layer (Fig. 2);
- `alignment-*.png`: how much each modality prefers itself (Fig. 4), what alignment changes, and whether it is the
  document that changes it: the same with another document's Gram sums beside it.

Any enabled model goes in the place of this one, which is that of `finetune_vlm.py`. Needs scikit-learn, transformers
and matplotlib.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from finetune_vlm import IGNORED, IMAGE_TOKENS, Crops, make_model, quickly
from torch import Tensor

from moda_kernels.diagnostics import AlignmentReport, alignment_report, plot_attention_share

NAMES = ("text", "image")


def batch() -> dict[str, Tensor]:
    """Four documents, a row each: an image, a question and an answer."""
    row = Crops(1, seed=1)[0]
    ids = row["input_ids"].view(-1, IMAGE_TOKENS + 3)
    labels = torch.full_like(ids, IGNORED)
    labels[:, -1] = ids[:, -1]
    return {"input_ids": ids, "labels": labels, "pixel_values": row["pixel_values"]}


def analyse(model: Any, name: str, folder: Path) -> AlignmentReport:
    """Print what there is, and draw it."""
    device = next(model.parameters()).device
    given: dict[str, Any] = {key: x.to(device) for key, x in batch().items()}
    # Rows that are looked at alone: the question, from whose place the answer is said.
    rows = torch.zeros_like(given["input_ids"], dtype=torch.bool)
    rows[:, -2] = True
    report = alignment_report(model.eval(), given | {"use_cache": False}, rows=rows, modalities=NAMES)
    print(f"{name}\n{report}\n")
    shares = [layer.share[None, None] for layer in report.layers]
    titles = [f"layer {i + 1}" for i in range(len(shares))]
    plot_attention_share(shares, folder / f"shares-{name}.png", modalities=NAMES, titles=titles)
    report.draw(folder / f"alignment-{name}.png")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="of training (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the pictures (default: here)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    model = make_model()
    analyse(model, "fresh", options.out)
    analyse(quickly(model, options.steps), "trained", options.out)


if __name__ == "__main__":
    main()
