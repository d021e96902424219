"""What is compared with what: a task, the variants, and the one that each is set against."""

from dataclasses import dataclass, replace

from moda_kernels.commands.demo.model import CONTROL, IMAGES_WHOLE, MASK_ALONE, MASK_AND_MODA, MODA, PLAIN, Variant
from moda_kernels.commands.demo.train import LEARNING_RATE, Plan

NO_GRAM = Variant("own weights, no Gram", "the aligner's W alone: k' = k Wᵀ", gram="none")
ADD = replace(MODA, name="add", label="fusion add: k + ρ ⊙ k̂", fusion="add")
LINEAR = replace(MODA, name="linear", label="fusion linear: (k + ρ ⊙ k̂) Wᵀ", fusion="linear")
RENORM = replace(MODA, name="MODA, renorm", label="k' keeps each key's length", renorm=True)
SLOW = replace(MODA, name="MODA, a tenth of the rate", label="for the aligner's weights: parameter_groups", rate=0.1)
FROBENIUS = replace(MODA, name="MODA, frobenius", label='norm="frobenius"', norm="frobenius")
PSEUDO = Variant("pseudo scores", "learned, no alignment", pseudo=True)
PAIR_BIAS = Variant("pair bias", "learned, no alignment", pair_bias=True)
WHOLE_RENORM = replace(MASK_AND_MODA, name="mask and MODA, renorm", label="that mask; k' keeps its length", renorm=True)
WHOLE_SLOW = replace(
    MASK_AND_MODA, name="mask and MODA, a tenth of the rate", label="that mask; parameter_groups", rate=0.1
)
WHOLE_CONTROL = replace(CONTROL, name="mask and control", label="that mask; another document's Gram", mask=IMAGES_WHOLE)


@dataclass(frozen=True)
class Experiment:
    """Variants of one task; the first is what the others are compared with, seed by seed.

    Attributes:
        against: a second one to be compared with, for those that are aligned.
        before, lr: of `Plan`.
    """

    name: str
    task: str
    layers: int
    steps: int
    seeds: int
    variants: tuple[Variant, ...]
    against: Variant | None = None
    before: tuple[str, int] | None = None
    lr: float = LEARNING_RATE

    def plans(self, seeds: int | None = None) -> list[Plan]:
        """One model per seed and variant."""
        return [
            Plan(self.task, variant, seed, self.layers, self.steps, lr=self.lr, before=self.before)
            for seed in range(seeds or self.seeds)
            for variant in self.variants
        ]


_EXPERIMENTS = (
    Experiment(
        "which",
        "which",
        1,
        400,
        6,
        (PLAIN, MODA, ADD, LINEAR, RENORM, SLOW, FROBENIUS, CONTROL, NO_GRAM),
        CONTROL,
    ),
    Experiment("which-longer", "which", 1, 1600, 3, (PLAIN, MODA)),
    Experiment("which-two-layers", "which", 2, 400, 6, (PLAIN, MODA, CONTROL), CONTROL),
    Experiment(
        "naming", "naming", 2, 800, 4, (MASK_ALONE, PLAIN, MASK_AND_MODA, WHOLE_RENORM, WHOLE_SLOW, WHOLE_CONTROL)
    ),
    Experiment("claim", "claim", 2, 400, 6, (PLAIN, MODA, CONTROL), CONTROL),
    Experiment(
        "finetune",
        "hint",
        2,
        60,
        6,
        (PLAIN, MODA, ADD, CONTROL, PSEUDO, PAIR_BIAS),
        CONTROL,
        before=("bait", 200),
        lr=2e-3,
    ),
)
EXPERIMENTS = {experiment.name: experiment for experiment in _EXPERIMENTS}
