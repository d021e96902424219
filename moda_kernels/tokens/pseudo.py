"""Pseudo-attention: scores without values that take up the attention of rows that see little (MODA Eq. 9-10).

Spec: "Pseudo-attention". They are one term P_i in a row's softmax sum, in closed form.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moda_kernels.runtime import checks
from moda_kernels.tokens.intervals import count_by_pass, passes_of
from moda_kernels.tokens.layout import ModalityLayout, QueryRows
from moda_kernels.tokens.mask import ModularMask

#: A decay after which nothing is left in any precision: of endless scores only the first one counts.
_ALONE = 64.0


@dataclass(frozen=True, eq=False)
class PseudoAttention:
    """Pseudo-attention scores (MODA Eq. 9-10, after StableMask, arXiv 2402.04779): row i's softmax gets
    c = N - |visible keys| more scores base - decay·j, j = 0…c-1, that carry no value.

    Args:
        base: the first score; a float, or a float tensor ``[Hq]`` (differentiable).
        decay: how much each further score is smaller, >= 0; a float, or a float tensor ``[Hq]`` (differentiable).
        length: N. None: the non-padding tokens of the sequence (looks ahead: one more token changes earlier rows); an
            int: a fixed context length, c = max(0, N - |visible|); ``math.inf``: endless (decay > 0).

    Raises:
        TypeError, ValueError: negative or non-finite parameters, a negative length, an infinite length without decay.
    """

    base: float | Tensor = 0.0
    decay: float | Tensor = 1.0
    length: int | float | None = None

    def __post_init__(self) -> None:
        self.check()

    @classmethod
    def sink(cls, base: float | Tensor) -> "PseudoAttention":
        """One pseudo score in every row, whatever it sees: an attention sink, e^base in the softmax's sum.

        Args:
            base: a float, or a float tensor ``[Hq]`` (differentiable). With split attention each part has one.
        """
        return cls(base, _ALONE, math.inf)

    def check(self) -> None:
        """Raise for parameters out of range; learned ones may get there after they were first looked at."""
        _check_pseudo_parameter("base", self.base, lambda x: x == x, "finite")
        _check_pseudo_parameter("decay", self.decay, lambda x: x >= 0, "finite and >= 0")
        if self.length is None:
            return
        if self.length == math.inf:
            _check_pseudo_parameter("decay", self.decay, lambda x: x > 0, "> 0 where length is infinite")
        else:
            checks.integer("length", self.length, 0)

    @property
    def parameters(self) -> dict[str, float | Tensor]:
        return {"base": self.base, "decay": self.decay}

    def log_mass(self, tokens: Tensor, visible: Tensor, dtype: torch.dtype) -> Tensor:
        """log P_i, differentiable in base and decay.

        Args:
            tokens: integer ``[B, Lq]``: N_i where ``length`` is None (else unused).
            visible: integer ``[B, Lq]``: |V(i)|, the keys that each row sees.
            dtype: of the result.

        Returns:
            ``[B, Hq or 1, Lq]``; -inf where a row gets no pseudo scores.
        """
        # A column per head against rows of queries.
        base, decay = (_per_head(p, dtype, visible.device) for p in (self.base, self.decay))
        if self.length == math.inf:
            rows = torch.zeros_like(visible[:, None], dtype=dtype)
            return base - torch.log(-torch.expm1(-decay)) + rows
        total = tokens if self.length is None else torch.full_like(visible, int(self.length))
        count = (total - visible).clamp(min=0)[:, None].to(dtype)
        return torch.where(count > 0, base + log_geometric_sum(decay, count.clamp(min=1)), -math.inf)


class Counts(NamedTuple):
    """What the number of pseudo scores is made from, int32 ``[branches, B, Lq]``, packed ``[branches, Tq]``: one branch
    for joint attention, two for split: the query's own modality and the others.

    Attributes:
        tokens: N_i, the tokens of the sequence (and branch); 0 for padding.
        visible: |V(i)|.
    """

    tokens: Tensor
    visible: Tensor


def pseudo_counts(layout: ModalityLayout, queries: QueryRows, mask: ModularMask, split: bool) -> Counts:
    """N_i and |V(i)| of every query row, from intervals; remembered on `queries`."""

    def make() -> Counts:
        passes = passes_of(layout, mask, split)
        seen = count_by_pass(layout, queries, mask, split)
        branches = [seen[: passes.second], seen[passes.second :]] if split else [seen]
        modality = queries.of(layout.modality)
        total = own = torch.zeros_like(modality)
        if layout.num_sequences:
            of_sequence = layout.counts[queries.of(layout.sequence, 0).long()]
            total = torch.where(modality >= 0, of_sequence.sum(-1, dtype=torch.int32), 0)
            own = of_sequence.gather(-1, modality.clamp(min=0).long()[..., None])[..., 0]
            own = torch.where(modality >= 0, own, 0)
        visible = [branch.sum(0, dtype=torch.int32).view(queries.shape) for branch in branches]
        return Counts(torch.stack([own, total - own] if split else [total]), torch.stack(visible))

    return queries.remember(("pseudo counts", mask, split), make)


def _check_pseudo_parameter(name: str, value: float | Tensor, holds: Callable[[Any], Any], expected: str) -> None:
    if isinstance(value, Tensor):
        checks.float_tensor(name, value)
        if value.dim() != 1:
            raise checks.wrong_value(name, "a float or a tensor [Hq]", value)
        looked_at = checks.looks_at_values(value.device)
        if looked_at and not bool((holds(value.detach()) & torch.isfinite(value.detach())).all()):
            raise checks.wrong_value(name, f"{expected} numbers", f"{value.detach().tolist()}")
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise checks.wrong_type(name, "a float or a tensor [Hq]", value)
    elif not (math.isfinite(value) and holds(value)):
        raise checks.wrong_value(name, f"a number that is {expected}", value)


def _per_head(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(dtype)[:, None]
    return torch.full((1, 1), float(value), dtype=dtype, device=device)


def log_geometric_sum(decay: Tensor, count: Tensor) -> Tensor:
    """log Σ_{j<c} e^{-βj} = log((1 - e^{-βc}) / (1 - e^{-β})) for β >= 0, c >= 1; β = 0 gives log c.

    Near β = 0 the quotient's gradient is a small difference of large numbers, so there its series is used:
    log((1 - e^{-x}) / x) = -x/2 + x²/24 - x⁴/2880 + x⁶/181440 - …, once for x = βc, once for x = β.
    """
    # Where the series is as exact as the quotient: its first left-out term is x⁸/9676800.
    small = decay * count < (0.05 if decay.dtype == torch.float64 else 0.5)
    x = torch.where(small, 1, decay)  # keeps 0/0 out of the gradient of the branch not taken
    quotient = torch.log(torch.expm1(-x * count) / torch.expm1(-x))
    b = torch.where(small, decay, 0)

    def even_terms(x: Tensor) -> Tensor:
        square = x.square()
        return square * (1 / 24 - square * (1 / 2880 - square / 181440))

    series = count.log() - b * (count - 1) / 2 + even_terms(b * count) - even_terms(b)
    return torch.where(small, series, quotient)
