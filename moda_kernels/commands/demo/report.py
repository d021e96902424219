"""What the demo says: tables and words. Every number in them was measured in this run."""

import math
from collections.abc import Iterable, Sequence
from textwrap import fill

import numpy as np

from moda_kernels.commands.demo.data import IMAGE, MODALITIES, TEXT
from moda_kernels.commands.demo.intervals import estimate, paired
from moda_kernels.commands.demo.tasks import TASKS
from moda_kernels.commands.demo.train import Material, Run, even_weights, most_frequent

WIDTH = 118
PAIRS = [(a, b) for a in (TEXT, IMAGE) for b in (TEXT, IMAGE)]
COMPARED = {
    "which": (("MODA", "plain"), ("control", "plain"), ("MODA", "control")),
    "naming": (("mask alone", "plain"), ("mask and MODA", "plain"), ("mask and MODA", "mask alone")),
}


def by_variant(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each variant, in the order of their seeds."""
    found: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.plan.seed):
        found.setdefault(run.plan.variant.name, []).append(run)
    order = dict.fromkeys(run.plan.variant.name for run in runs)
    return {name: found[name] for name in order}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned first column, right-aligned others, a rule under the header."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        return "  " + "   ".join(cells).rstrip()

    return "\n".join([line(header), "  " + "-" * (sum(widths) + 3 * (len(widths) - 1)), *map(line, rows)])


def explanation(runs_per_variant: int, task: str, layers: int, steps: int, variants: Sequence[tuple[str, str]]) -> str:
    """What is trained on what, before it begins."""
    what = TASKS[task]
    width = max(len(name) for name, _ in variants)
    lines = "\n".join(f"  {name.ljust(width)}   {label}" for name, label in variants)
    seeds = "one seed" if runs_per_variant == 1 else f"{runs_per_variant} seeds"
    size = f"{len(variants)} decoders of {layers} layer{'s' * (layers != 1)}, {steps} steps each, {seeds}"
    return f"""Task "{task}": {what.summary}.
{size}; scanned digits, tested on images never trained on.
{lines}
Same initial weights, batches and order within a seed."""


def results_table(runs: Sequence[Run], material: Material) -> str:
    """Accuracies, seed by seed and as means, losses and times."""
    kinds = material.task.kinds
    named = kinds[0] == "digit" and any(run.held_out.accuracy["digit"].other for run in runs)
    seeds = sorted({run.plan.seed for run in runs})
    header = ["held-out answers", f"{kinds[0]} correct", "seed by seed"]
    header += [f"{kind} correct" for kind in kinds[1:]] + ["the other image's digit"] * named
    header += ["loss", "parameters", "time", "backend"]
    guesses = [f"{most_frequent(material.held_out, kind):.1%}" for kind in kinds]
    rows = [["always the most frequent", guesses[0], "", *guesses[1:], *[""] * (named + 4)]]
    for name, own in by_variant(runs).items():
        first = own[0]
        row = [name, f"{np.mean([run.rate for run in own]):.1%}", " ".join(f"{100 * run.rate:.1f}" for run in own)]
        row += [f"{np.mean([run.held_out.accuracy[kind].rate for run in own]):.1%}" for kind in kinds[1:]]
        if named:
            digits = [run.held_out.accuracy["digit"] for run in own]
            row.append(f"{np.mean([a.other / a.answers for a in digits]):.1%}")
        row += [f"{np.mean([run.held_out.loss for run in own]):.2f}", f"{first.parameters:,}"]
        row += [f"{sum(run.seconds for run in own):.0f} s", first.backend]
        rows.append(row)
    if len(seeds) == 1:
        header, rows = ([*header[:2], *header[3:]], [[*row[:2], *row[3:]] for row in rows])
    return table(header, rows)


def differences(runs: Sequence[Run], task: str) -> list[tuple[str, str, str]]:
    """(variant, other, what the difference is) of the task's comparisons."""
    own = by_variant(runs)
    lines = []
    for a, b in COMPARED.get(task, COMPARED["which"]):
        found = paired([run.rate for run in own[a]], [run.rate for run in own[b]])
        if math.isnan(found.half):
            verdict = "one seed: no interval"
        else:
            verdict = ("better" if found.mean > 0 else "worse") if found.clear else "no clear difference"
        lines.append((a, b, f"{found.points()} points, {verdict}"))
    return lines


def difference_table(runs: Sequence[Run], task: str) -> str:
    """Paired over seeds."""
    seeds = len({run.plan.seed for run in runs})
    title = f"Differences, paired over {seeds} seeds, with 95 % intervals:" if seeds > 1 else "Differences:"
    return "\n".join([title, *(f"  {a} against {b}:  {said}" for a, b, said in differences(runs, task))])


SHARES_EXPLAINED = fill(
    'Who attends to whom, layer by layer; means over held-out documents, heads and seeds. "Asked" and "other": the '
    "attention of the word before an answer to the image that it is about, and to the other one. Disparity: of the "
    "attention per visible key to the own and to the other modality, |own - cross| / max(own, cross): 0 is balanced, "
    "and no aim in itself.",
    WIDTH,
)


def shares_table(runs: Sequence[Run], material: Material) -> str:
    """Attention shares and disparities, by layer, beside those of attention that doesn't look."""
    names = [f"{MODALITIES[a]}→{MODALITIES[b]}" for a, b in PAIRS]
    header = ("", "layer", "asked", "other", *names, "disparity text", "image")
    rows: list[Sequence[str]] = []
    own = by_variant(runs)
    for mask in dict.fromkeys(run.plan.variant.mask for run in runs):
        even = even_weights(mask, material.held_out)
        users = {name: found for name, found in own.items() if found[0].plan.variant.mask == mask}
        label = (
            "even weights" if len({r.plan.variant.mask for r in runs}) == 1 else f"even weights, {next(iter(users))}"
        )
        rows.append((label, "", "", "", *_cells(even.share[0], even.disparity[0])))
        for name, found in users.items():
            for i in range(found[0].plan.layers):
                share = np.mean([run.shares.share[i] for run in found], 0)
                disparity = np.mean([run.shares.disparity[i] for run in found], 0)
                asked = np.mean([run.shares.asked[i] for run in found], 0)
                rows.append((name, str(i + 1), *(f"{x:.0%}" for x in asked), *_cells(share, disparity)))
    return table(header, rows)


def _cells(share: Sequence[Sequence[float]], disparity: Sequence[float]) -> list[str]:
    return [*(f"{share[a][b]:.0%}" for a, b in PAIRS), *(f"{disparity[m]:.0%}" for m in (TEXT, IMAGE))]


def conclusion(runs: Sequence[Run], task: str) -> str:
    """What the run shows and what it doesn't, in words."""
    layers, seeds, steps = runs[0].plan.layers, len({run.plan.seed for run in runs}), runs[0].plan.steps
    said = []
    if task == "which":
        own = by_variant(runs)
        gain = paired([run.rate for run in own["MODA"]], [run.rate for run in own["control"]])
        said.append(
            'The task is made for alignment. To name the right image, something has to carry "left" or "right" from '
            "the text to the images before the last word looks at them: one hop of attention more. A key aligned "
            "through the Gram matrix is k + Σ_t (k · k_t) k_t over earlier text (then normed and weighted): that hop "
            "is inside the key. Without it a model names one of the two images and has to guess which. The control has "
            "the same parameters and a Gram matrix too, but another document's."
        )
        if layers > 1:
            said.append("With more than one layer, the earlier ones can make that hop themselves: compare --layers 1.")
        elif seeds > 1 and gain.clear and gain.mean > 0:
            said.append(
                "Here MODA beats the control clearly: what helps is what this document's text says, not more weights. "
                "With two layers the first can make the hop itself, and the gain is smaller and uncertain: --layers 2."
            )
        else:
            said.append("Here MODA doesn't beat the control clearly: more steps (--steps) or seeds (--seeds) may tell.")
    else:
        said.append(
            "This task was not made for alignment: see whether it does more than the variants beside it, and give it "
            "seeds (--seeds), because models differ by chance as well."
        )
    said.append(
        f"It is a toy: tiny models, 8×8 images, {steps} steps, one learning rate for all. It is no evidence about "
        "larger models; docs/does-it-help.md has more tasks and variants, those where alignment did nothing among them."
    )
    paragraphs = (fill(text, WIDTH, initial_indent="  ", subsequent_indent="  ") for text in said)
    return "\n".join(["What this shows, and what it does not", *paragraphs])


def spread(runs: Sequence[Run]) -> dict[str, str]:
    """The mean accuracy of each variant with its interval, for the picture."""
    said = {}
    for name, own in by_variant(runs).items():
        found = estimate([run.rate for run in own])
        said[name] = f"{found.mean:.0%}" + ("" if math.isnan(found.half) else f" ± {100 * found.half:.0f}")
    return said
