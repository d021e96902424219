"""Rules as data: `ModularMask`, who sees whom (spec: "Modular mask"; MODA Eq. 7-8).

Nothing here touches scores, and nothing here knows what a rule means (`intervals.py` does); backends ask for facts
derived from the rules: intervals, the dense mask, the number of visible keys, a FlexAttention block mask.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moda_kernels.runtime import checks
from moda_kernels.runtime.lasting import lasting
from moda_kernels.tokens.blocks import block_lists, block_mask, in_columns, readings, sight
from moda_kernels.tokens.drawing import Drawing
from moda_kernels.tokens.intervals import Visibility, count_keys, visible_keys
from moda_kernels.tokens.layout import ModalityLayout, QueryRows
from moda_kernels.tokens.show import draw, picture, rule_html, rule_table

__all__ = ["ModularMask", "Visibility", "default_mask"]


@torch.compiler.assume_constant_result  # torch 2.11 can't trace flags
def _flags(rules: Any) -> tuple[tuple[Visibility, ...], ...]:
    try:
        rows = [list(row) for row in rules]
    except TypeError:
        raise checks.wrong_type("rules", "R rows of R Visibility flags", rules) from None
    if not rows or any(len(row) != len(rows) for row in rows):
        raise checks.wrong_value("rules", "R rows of R flags, R >= 1", f"rows of {[len(row) for row in rows]}")
    for rule in (rule for row in rows for rule in row):
        if isinstance(rule, bool) or not isinstance(rule, int):
            raise checks.wrong_type("rules (an entry)", "a Visibility", rule)
        if not 0 <= rule < 64:
            raise checks.wrong_value("rules (an entry)", "a union of PAST, SEGMENT, ALL, BEFORE, UPTO, CHUNK", rule)
    return tuple(tuple(map(Visibility, row)) for row in rows)


@dataclass(frozen=True)
class ModularMask:
    """The modular attention mask (MODA Eq. 7-8): a rule for each ordered pair of roles.

    Args:
        rules: R×R :class:`Visibility`, ``rules[query role][key role]``; R = M where the layout has no roles.
        window: keys ``window`` positions or more before the query are hidden. Default: no window.
        window_on: from which rules the window hides them: ``"past"``, from PAST and CHUNK; ``"all"``, from all.

    Raises:
        TypeError, ValueError: rules that are not square or not flags, a window that is not a positive int,
            ``window_on="all"`` without a window.
    """

    rules: tuple[tuple[Visibility, ...], ...]
    window: int | None = None
    window_on: Literal["past", "all"] = "past"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", _flags(self.rules))
        if self.window is not None:
            # Positions are int32: a larger window is one that no distance reaches.
            object.__setattr__(self, "window", min(checks.integer("window", self.window, 1), 2**31 - 1))
        checks.choice("window_on", self.window_on, ("past", "all"))
        if self.window_on == "all" and self.window is None:
            raise checks.wrong_value("window_on", "'past' without a window", self.window_on)

    @property
    def num_roles(self) -> int:
        return len(self.rules)

    @classmethod
    def _table(cls, num_modalities: int, rule: Callable[[int, int], Visibility]) -> "ModularMask":
        checks.integer("num_modalities", num_modalities, 1)
        return cls(tuple(tuple(rule(a, b) for b in range(num_modalities)) for a in range(num_modalities)))

    @classmethod
    def causal(cls, num_modalities: int) -> "ModularMask":
        """Every token sees itself and what comes before it."""
        return cls._table(num_modalities, lambda a, b: Visibility.PAST)

    @classmethod
    def full(cls, num_modalities: int) -> "ModularMask":
        """Every token sees every token."""
        return cls._table(num_modalities, lambda a, b: Visibility.ALL)

    @classmethod
    def bidirectional_within(cls, num_modalities: int, modalities: Iterable[int]) -> "ModularMask":
        """Causal, and the segments of the named modalities see themselves whole (PaliGemma, Gemma 3)."""
        checks.integer("num_modalities", num_modalities, 1)
        named = checks.modality_indices("modalities", modalities, num_modalities)
        whole = Visibility.PAST | Visibility.SEGMENT
        return cls._table(num_modalities, lambda a, b: whole if a == b and a in named else Visibility.PAST)

    @classmethod
    def self_only(cls, num_modalities: int, causal: bool = False) -> "ModularMask":
        """Every modality sees itself only (MODA's self part)."""
        rule = Visibility.PAST if causal else Visibility.ALL
        return cls._table(num_modalities, lambda a, b: rule if a == b else Visibility.HIDDEN)

    @classmethod
    def cross_only(cls, num_modalities: int, causal: bool = False) -> "ModularMask":
        """Every modality sees the others only (MODA's cross part)."""
        rule = Visibility.PAST if causal else Visibility.ALL
        return cls._table(num_modalities, lambda a, b: rule if a != b else Visibility.HIDDEN)

    @classmethod
    def fusion(cls, num_modalities: int, modalities: Iterable[int], causal: bool = False) -> "ModularMask":
        """Every modality sees itself, and the named fusion modalities see all (Zorro)."""
        checks.integer("num_modalities", num_modalities, 1)
        named = checks.modality_indices("modalities", modalities, num_modalities)
        rule = Visibility.PAST if causal else Visibility.ALL
        return cls._table(num_modalities, lambda a, b: rule if a == b or a in named else Visibility.HIDDEN)

    def rule_table(self, device: torch.device) -> Tensor:
        """The rules as an int32 tensor ``[R, R]``."""
        return torch.tensor(self.rules, dtype=torch.int32, device=device)

    def __str__(self) -> str:
        return rule_table(self)

    def show(self, layout: ModalityLayout, sequence: int = 0, width: int = 40) -> str:
        """A small picture in text of who sees whom in one sequence: a line for each query, a mark for each key.

        Args:
            sequence: which row of the batch, or document.
            width: of longer sequences, several tokens share a mark.

        Raises:
            ValueError: the layout has another number of roles, or no such sequence.
        """
        return picture(self, layout, sequence, width)

    def draw(self, layout: ModalityLayout, sequence: int = 0, width: int = 64) -> Drawing:
        """Who sees whom in one sequence, as a drawing that shows itself in a notebook and can be saved.

        Args:
            layout: the tokens. sequence: which of its sequences.
            width: cells in a row at most; in a longer sequence a cell stands for several tokens, and is the paler the
                fewer of its pairs are seen.

        Returns:
            A drawing with ``svg`` and ``save(path)``: a row per query, a column per key in the colour of its modality;
            strips along the edges are modalities and, if the layout has them, roles.

        Raises:
            ValueError: as :meth:`show`.
        """
        return draw(self, layout, sequence, width)

    def _repr_html_(self) -> str:
        return rule_html(self)

    def check_layout(self, layout: ModalityLayout) -> None:
        """Raise a ValueError where the layout has another number of roles."""
        if layout.num_roles != self.num_roles:
            size = f"{layout.num_roles} x {layout.num_roles} rules, as the layout has roles"
            raise checks.wrong_value("mask", size, f"{self.num_roles} x {self.num_roles}")

    def visible(
        self, layout: ModalityLayout, query_length: int | None = None, query_start: int | Tensor | None = None
    ) -> Tensor:
        """The mask written out, for looking and for tests: True where query i sees key j.

        Args:
            query_length, query_start: fewer queries than keys, as in :func:`moda_kernels.moda_attention`.

        Returns:
            bool ``[B, Lq, Lk]``; packed: ``[T, T]``.
        """
        return self.visible_to(layout, layout.queries(query_length, query_start))

    def visible_to(self, layout: ModalityLayout, queries: QueryRows) -> Tensor:
        """`visible` for given query rows: bool ``[B, Lq, Lk]``, packed ``[Tq, T]``."""
        return visible_keys(layout, queries, self)

    def count_visible(self, layout: ModalityLayout, queries: QueryRows) -> Tensor:
        """|V(i)| per key modality, in time linear in tokens: int32 ``[B, Lq, M]``, packed ``[Tq, M]``."""
        return count_keys(layout, queries, self)

    @lasting
    def to_block_mask(
        self,
        layout: ModalityLayout,
        query_length: int | None = None,
        query_start: int | Tensor | None = None,
        *,
        block_size: int | tuple[int, int] = 128,
    ) -> Any:
        """This mask as a FlexAttention ``BlockMask`` (one for all heads; packed: a batch of one), made from intervals:
        in time linear in tokens and tiles, without an L×L tensor and without a compiler.

        Its ``mask_mod`` reads tensors alone, so that compiled FlexAttention takes another layout of the same sizes as
        it is. On the CPU, where what a row sees is one run of columns, it says so (``low < k <= high``), which the
        FLASH engine of FlexAttention packs.

        Args:
            query_length, query_start: as in :meth:`visible`.
            block_size: of a tile, or (queries, keys). FLASH wants (256, 128) on Blackwell.
        """
        sizes = block_size if isinstance(block_size, tuple) else (block_size, block_size)
        of_q, of_k = (checks.integer("block_size", size, 1) for size in sizes)
        queries = layout.queries(query_length, query_start)
        seen = sight(layout, queries, self)
        lists = block_lists(seen, of_q, of_k)
        columns = in_columns(seen) if checks.looks_at_values(layout.device) else None
        lengths = seen.low.shape[2], seen.place.shape[2]
        return block_mask(readings(seen if columns is None else columns), lists, lengths, (of_q, of_k))


def _default(num_roles: int, causal: bool) -> ModularMask:
    return (ModularMask.causal if causal else ModularMask.full)(num_roles)


#: Made once, and never while a compiler traces (torch 2.11 can't trace flags).
_DEFAULTS = {(roles, causal): _default(roles, causal) for roles in range(1, 9) for causal in (False, True)}


def default_mask(num_roles: int, causal: bool) -> ModularMask:
    """The mask of a call that names none."""
    known = _DEFAULTS.get((num_roles, causal))
    return _default(num_roles, causal) if known is None else known
