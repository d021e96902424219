"""Rules as data: `ModularMask`, who sees whom (spec: "Modular mask"; MODA Eq. 7-8).

Nothing here touches scores; backends read the rules and ask for facts derived from them: the dense mask, the number of
visible keys in closed form, a FlexAttention block mask.
"""

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moda_kernels.runtime import checks
from moda_kernels.tokens.layout import ModalityLayout, QueryRows


class Visibility(enum.IntFlag):
    """What a query may see of the keys of a modality; flags, so that rules can be united with ``|``.

    Positions count the non-padding tokens of a sequence; keys of other sequences and padding are never seen.
    """

    HIDDEN = 0
    #: Keys at the query's position or before it, closer than the mask's window where it has one.
    PAST = 1
    #: Keys of the query's own segment, before and after it.
    SEGMENT = 2
    #: All keys.
    ALL = 4


@dataclass(frozen=True)
class ModularMask:
    """The modular attention mask (MODA Eq. 7-8): a rule for each ordered pair of modalities.

    Args:
        rules: M×M :class:`Visibility`, ``rules[query modality][key modality]``.
        window: with PAST, keys at a distance of ``window`` positions or more are hidden. Default: no window.

    Raises:
        TypeError, ValueError: rules that are not square or not flags, a window that is not a positive int.
    """

    rules: tuple[tuple[Visibility, ...], ...]
    window: int | None = None

    def __post_init__(self) -> None:
        try:
            rows = [list(row) for row in self.rules]
        except TypeError:
            raise checks.wrong_type("rules", "M rows of M Visibility flags", self.rules) from None
        if not rows or any(len(row) != len(rows) for row in rows):
            raise checks.wrong_value("rules", "M rows of M flags, M >= 1", f"rows of {[len(row) for row in rows]}")
        for rule in (rule for row in rows for rule in row):
            if isinstance(rule, bool) or not isinstance(rule, int):
                raise checks.wrong_type("rules (an entry)", "a Visibility", rule)
            if not 0 <= rule <= (Visibility.PAST | Visibility.SEGMENT | Visibility.ALL):
                raise checks.wrong_value("rules (an entry)", "a union of PAST, SEGMENT and ALL", rule)
        object.__setattr__(self, "rules", tuple(tuple(map(Visibility, row)) for row in rows))
        if self.window is not None:
            # Positions are int32: a larger window is one that no distance reaches.
            object.__setattr__(self, "window", min(checks.integer("window", self.window, 1), 2**31 - 1))

    @property
    def num_modalities(self) -> int:
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

    def part(self, same: bool) -> "ModularMask":
        """The rules between equal (or, with ``same=False``, different) modalities; the rest hidden. The two halves of
        split attention."""
        m = range(self.num_modalities)
        rules = (((self.rules[a][b] if (a == b) == same else Visibility.HIDDEN) for b in m) for a in m)
        return ModularMask(tuple(map(tuple, rules)), self.window)

    def rule_table(self, device: torch.device) -> Tensor:
        """The rules as an int32 tensor ``[M, M]``."""
        return torch.tensor(self.rules, dtype=torch.int32, device=device)

    def check_layout(self, layout: ModalityLayout) -> None:
        """Raise a ValueError where the layout has another number of modalities."""
        if layout.num_modalities != self.num_modalities:
            size = f"{layout.num_modalities} x {layout.num_modalities} rules, as the layout has modalities"
            raise checks.wrong_value("mask", size, f"{self.num_modalities} x {self.num_modalities}")

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
        self.check_layout(layout)
        facts = (layout.modality, layout.position, layout.segment)
        of_query = [queries.of(f)[..., :, None] for f in facts]
        of_key = [f[..., None, :] for f in facts]
        seen = visible_pair(self.rule_table(layout.device), self.window, *of_query, *of_key)
        if layout.packed:
            seen = seen & (queries.of(layout.sequence)[:, None] == layout.sequence[None, :])
        return seen

    def count_visible(self, layout: ModalityLayout, queries: QueryRows) -> Tensor:
        """|V(i)| per key modality in closed form, from prefix counts: int32 ``[B, Lq, M]``, packed ``[Tq, M]``."""
        self.check_layout(layout)
        device, m = layout.device, self.num_modalities
        column = queries.columns.clamp(min=0)
        modality, position = queries.of(layout.modality), queries.of(layout.position)
        if layout.num_tokens == 0 or layout.num_sequences == 0 or column.numel() == 0:
            return torch.zeros(*queries.shape, m, dtype=torch.int32, device=device)
        sequence = queries.of(layout.sequence, 0)
        start = layout.cu_seqlens[sequence]
        begin = start
        if self.window is not None:
            # The first column inside the window: all but `window` of the tokens up to the query stand before it.
            seen = layout.prefix.sum(1, dtype=torch.int32)
            begin = torch.searchsorted(seen, (seen[start] + position + 1 - self.window).clamp(min=0), right=True) - 1
            begin = torch.maximum(begin, start)
        past = layout.prefix[column + 1] - layout.prefix[begin]
        everything = layout.counts[sequence]
        # The query's own segment: its length, and what of it PAST has not counted.
        first, length = _segment_rows(layout, queries).unbind(-1)
        after = first + length - 1 - position
        before = (
            (position + 1 - self.window - first).clamp(min=0) if self.window is not None else torch.zeros_like(after)
        )
        same = torch.arange(m, device=device) == modality[..., None]

        rule = self.rule_table(device)[modality.clamp(min=0)]
        has_past, has_segment = (rule & Visibility.PAST) > 0, same & ((rule & Visibility.SEGMENT) > 0)
        own = torch.where(has_past, (after + before)[..., None], length[..., None])
        count = torch.where(has_past, past, 0) + torch.where(has_segment, own, 0)
        count = torch.where((rule & Visibility.ALL) > 0, everything, count)
        return torch.where(modality[..., None] >= 0, count, 0)

    def to_block_mask(
        self, layout: ModalityLayout, query_length: int | None = None, query_start: int | Tensor | None = None
    ) -> Any:
        """This mask as a FlexAttention ``BlockMask`` (one for all heads; packed: a batch of one).

        Args:
            query_length, query_start: as in :meth:`visible`.
        """
        from torch.nn.attention.flex_attention import create_block_mask

        self.check_layout(layout)
        queries = layout.queries(query_length, query_start)
        rows = [queries.of(f) for f in (layout.modality, layout.position, layout.segment, layout.sequence)]
        keys = [layout.modality, layout.position, layout.segment, layout.sequence]
        if layout.packed:
            rows, keys = [f[None] for f in rows], [f[None] for f in keys]
        rules, window = self.rule_table(layout.device), self.window

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            of_query, of_key = [f[b, q] for f in rows], [f[b, k] for f in keys]
            return visible_pair(rules, window, *of_query[:3], *of_key[:3]) & (of_query[3] == of_key[3])

        batch, keys_length = keys[0].shape
        return create_block_mask(mask_mod, batch, None, rows[0].shape[1], keys_length, device=str(layout.device))


def visible_pair(
    rules: Tensor,
    window: int | None,
    query_modality: Tensor,
    query_position: Tensor,
    query_segment: Tensor,
    key_modality: Tensor,
    key_position: Tensor,
    key_segment: Tensor,
) -> Tensor:
    """Whether queries see keys *of their sequence*, elementwise over broadcast tensors: the rules, once and for all."""
    rule = rules[query_modality.clamp(min=0), key_modality.clamp(min=0)]
    distance = query_position - key_position
    past = distance >= 0
    if window is not None:
        past = past & (distance < window)
    seen = ((rule & Visibility.PAST) > 0) & past
    seen = seen | (((rule & Visibility.SEGMENT) > 0) & (query_segment == key_segment))
    seen = seen | ((rule & Visibility.ALL) > 0)
    return seen & (query_modality >= 0) & (key_modality >= 0)


def _segment_rows(layout: ModalityLayout, queries: QueryRows) -> Tensor:
    """First position and length of each query's segment, int32 ``[..., 2]`` (zeros for padding)."""
    segment = queries.of(layout.segment)
    if layout.max_segments == 0:
        return torch.zeros(*segment.shape, 2, dtype=torch.int32, device=layout.device)
    rows = layout.table[segment.clamp(0, layout.max_segments - 1).long()]
    first = layout.position.flatten()[rows[..., 1].long()]
    return torch.where(segment[..., None] >= 0, torch.stack((first, rows[..., 2]), -1), 0)
