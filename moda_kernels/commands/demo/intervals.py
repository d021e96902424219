"""Means over seeds and their 95 % intervals (Student's t), paired where two variants share their seeds."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean over seeds, and half the width of its 95 % interval: NaN for one seed."""

    mean: float
    half: float
    seeds: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return abs(self.mean) > self.half

    def points(self) -> str:
        """As percentage points: "+36.4 ± 6.1"."""
        spread = "" if math.isnan(self.half) else f" ± {100 * self.half:.1f}"
        return f"{100 * self.mean:+.1f}{spread}"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one number per seed."""
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return Estimate(float(x.mean()) if len(x) else math.nan, math.nan, len(x))
    from scipy.special import stdtrit  # comes with scikit-learn

    return Estimate(float(x.mean()), float(stdtrit(len(x) - 1, 0.975) * x.std(ddof=1) / math.sqrt(len(x))), len(x))


def paired(values: Sequence[float], others: Sequence[float]) -> Estimate:
    """The mean difference, seed by seed."""
    return estimate([a - b for a, b in zip(values, others, strict=True)])
