"""What a rule means: `Visibility`, and every mask over a layout as intervals of positions. The one place that knows.

Among the keys of one role, what a query row sees is an interval of positions for each flag (spec: "Intervals"): PAST
and CHUNK end at the row's own, SEGMENT stands around it, BEFORE and UPTO begin with the sequence and end where the
role's steps pass the row's. Those of a row that touch are one, so at most two are left: the one at the row, and before
it the prefix. Roles share a *pass* only where the rules alone say that a row sees the same interval of both. Nothing
behind the intervals (what is visible, how many keys, which tiles and rectangles) knows a rule.
"""

import enum
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moda_kernels.runtime import native
from moda_kernels.runtime.operators import operator
from moda_kernels.tokens.layout import ModalityLayout, QueryRows

#: Beyond every position.
FAR = 2**31 - 1
#: An interval (lo, hi] without positions.
NOTHING = (FAR, -2)
#: With more roles than these the PyTorch version is used.
MANY_ROLES = 2048
#: Beside the flags of a rule, for the operator: keys of this role are in the pass.
_MEMBER = 64


class Visibility(enum.IntFlag):
    """What queries of a role may see of the keys of a role; flags, so that rules can be united with ``|``.

    Positions count the non-padding tokens of a sequence; keys of other sequences and padding are never seen.
    """

    HIDDEN = 0
    #: Keys at the query's position or before it, closer than the mask's window where it has one.
    PAST = 1
    #: Keys of the query's own segment, before and after it.
    SEGMENT = 2
    #: All keys.
    ALL = 4
    #: Keys of an earlier step.
    BEFORE = 8
    #: Keys of the query's step or an earlier one.
    UPTO = 16
    #: Keys of the query's own chunk at its position or before it, closer than the mask's window where it has one.
    CHUNK = 32


class _V:
    """The same as plain numbers: compilers trace these with every torch (2.11's can't trace flags)."""

    HIDDEN = Visibility.HIDDEN.value
    PAST, SEGMENT, ALL = Visibility.PAST.value, Visibility.SEGMENT.value, Visibility.ALL.value
    BEFORE, UPTO, CHUNK = Visibility.BEFORE.value, Visibility.UPTO.value, Visibility.CHUNK.value


class Rules(Protocol):
    """What is asked of a mask here; `ModularMask` is one."""

    @property
    def rules(self) -> tuple[tuple[Visibility, ...], ...]: ...

    @property
    def window(self) -> int | None: ...

    @property
    def window_on(self) -> str: ...

    def check_layout(self, layout: ModalityLayout) -> None: ...

    def __hash__(self) -> int: ...


class Pass(NamedTuple):
    """Keys that one walk over a sequence covers. From the rules alone, never from data.

    Attributes:
        branch: 0, or 1 for the second softmax (the other modalities) of split attention.
        roles: the keys are of these roles …
        modality: … and of this modality; None: of any.
        rules: ``[R]``, what each query role may see of these keys. SEGMENT speaks of keys of the query's own role.
        own: rows of `modality` only (True), all rows but these (False), or all rows (None).
    """

    branch: int
    roles: tuple[int, ...]
    modality: int | None
    rules: tuple[int, ...]
    own: bool | None


class Passes(NamedTuple):
    """The passes of a mask: each visible pair of a query and a key is in exactly one.

    Attributes:
        passes: first those of branch 0, then those of branch 1.
        intervals: how many a row may need in a pass, 1 or 2.
        second: index of the first pass of branch 1.
    """

    passes: tuple[Pass, ...]
    intervals: int
    second: int


class Intervals(NamedTuple):
    """A mask over a layout: row i of a sequence sees key j of it in pass p iff, for one of the intervals (they never
    overlap), ``lo < positions[p, j] <= hi``.

    Attributes:
        limits: int32, of each query row (flattened). With one interval ``[2 P, rows]``: lo and hi of each pass. With
            two ``[1 + 3 P, rows]``: lo of all second intervals; then of each pass lo and hi of the first and hi of the
            second. The first is the one that ends at the row or holds it, where there is one; a second one lies before
            it and begins with the sequence, or with the window. -1 <= lo < hi; what is not there is `NOTHING`, a second
            one has only its hi. `ends_of` knows this.
        positions: int32 ``[P, tokens]``: each key's position, -1 for padding and for keys of other passes.
    """

    limits: Tensor
    positions: Tensor


def limits_shape(passes: int, intervals: int, rows: Any) -> tuple[Any, Any]:
    """The shape of `Intervals.limits`."""
    return native.limits_of(passes, intervals), rows


intervals_of = native.intervals_of


def ends_of(limits: Tensor, passes: int) -> tuple[Tensor, Tensor]:
    """lo and hi of `Intervals.limits`, each ``[P, I, rows]``."""
    rows = limits.shape[1]
    if intervals_of(limits, passes) == 1:
        low, high = limits.view(passes, 2, rows).split(1, 1)
        return low, high
    of_pass = limits[1:].view(passes, 3, rows)
    return torch.stack((of_pass[:, 0], limits[:1].expand(passes, rows)), 1), of_pass[:, 1:]


@functools.lru_cache(maxsize=256)
def make_passes(
    mask: Rules, num_modalities: int, split: bool = False, by_modality: bool = False, own_roles: bool = False
) -> Passes:
    """The passes of a mask.

    Args:
        split: one branch for keys of the query's modality, one for the others; passes go by modality then.
        by_modality: each pass has keys of one modality.
        own_roles: roles of any modality (the layout was given roles). Else roles are the modalities.
    """
    count = len(mask.rules)
    clamped = mask.window is not None and mask.window_on == "past"
    table = [[_reduced(mask.rules[a][b].value, a == b, clamped) for b in range(count)] for a in range(count)]
    groups: dict[tuple[int, ...], list[int]] = {}
    for b in range(count):
        column = [table[a][b] for a in range(count)]
        alone = b if any(rule & (_V.BEFORE | _V.UPTO) for rule in column) else -1
        groups.setdefault((alone, *(rule & ~_V.SEGMENT for rule in column)), []).append(b)

    passes: list[Pass] = []
    starts: list[int] = []
    for branch, own in enumerate((True, False) if split else (None,)):
        starts.append(len(passes))
        for group in groups.values():
            for modality in range(num_modalities) if split or by_modality else (None,):
                roles = tuple(group)
                if modality is not None and not own_roles:
                    roles = tuple(b for b in group if b == modality)
                rules = [_united(table[a][b] for b in roles) for a in range(count)]
                rows = own
                if own is not None and not own_roles:
                    # A row's role says its modality.
                    rules = [rule if (a == modality) == own else _V.HIDDEN for a, rule in enumerate(rules)]
                    rows = None
                if any(rules):
                    passes.append(Pass(branch, roles, modality, tuple(rules), rows))
    two = any(_apart(rule, a in each.roles, clamped) for each in passes for a, rule in enumerate(each.rules))
    return Passes(tuple(passes), 2 if two else 1, starts[1] if split else len(passes))


def _united(rules: Iterable[int]) -> int:
    united = 0
    for rule in rules:
        united |= rule
    return united


def _reduced(rule: int, same: bool, clamped: bool) -> int:
    """A rule without the flags that say nothing beside the others.

    Args:
        same: between a role and itself. clamped: a window limits PAST and CHUNK, and not the others.
    """
    if rule & _V.ALL:
        return _V.ALL
    if not same:
        rule &= ~_V.SEGMENT  # a segment has one role
    if rule & _V.UPTO:
        rule &= ~_V.BEFORE
        if same:
            rule &= ~(_V.PAST | _V.CHUNK)  # steps never fall along a role
    if rule & _V.PAST:
        rule &= ~_V.CHUNK
        if same and not clamped:
            rule &= ~_V.BEFORE
    return rule


def _apart(rule: int, same: bool, clamped: bool) -> bool:
    """Whether a prefix may end before the interval at the row begins, for a reduced rule."""
    near = rule & (_V.PAST | _V.SEGMENT | _V.CHUNK)
    if not near or not rule & (_V.BEFORE | _V.UPTO):
        return False
    if near & _V.PAST and not clamped:
        return False  # both begin with the sequence, or with the window
    return not (same and rule & _V.UPTO)  # own keys up to the row's step reach the row


def passes_of(layout: ModalityLayout, mask: Rules, split: bool = False, by_modality: bool = False) -> Passes:
    """The passes of a mask over a layout like this one; as `make_passes`.

    Raises:
        ValueError: the layout has another number of roles than the mask.
    """
    mask.check_layout(layout)
    return make_passes(mask, layout.num_modalities, split, by_modality, layout.own_roles)


def mask_intervals(
    layout: ModalityLayout, queries: QueryRows, mask: Rules, split: bool = False, by_modality: bool = False
) -> Intervals:
    """The intervals of a mask over a layout, in the order of `passes_of` (same arguments); remembered on `queries`.

    Raises:
        ValueError: the layout has another number of roles than the mask.
    """
    made = passes_of(layout, mask, split, by_modality)

    def make() -> Intervals:
        facts = (layout.modality, layout.role, layout.position, layout.segment, layout.step, layout.chunk)
        members = [
            rule | (_MEMBER if a in each.roles else 0) for each in made.passes for a, rule in enumerate(each.rules)
        ]
        modalities = [-1 if each.modality is None else each.modality for each in made.passes]
        own = [-1 if each.own is None else int(each.own) for each in made.passes]
        limits, positions = _op_mask_intervals(
            *(fact.flatten() for fact in facts), layout.sequence.flatten(), layout.cu_seqlens, layout.table,
            queries.columns.flatten(), members, modalities, own, made.intervals, mask.window, mask.window_on == "all",
        )  # fmt: skip
        return Intervals(limits, positions)

    return queries.remember(("intervals", made, mask.window, mask.window_on), make)


def mask_intervals_torch(
    modality: Tensor,
    role: Tensor,
    position: Tensor,
    segment: Tensor,
    step: Tensor,
    chunk: Tensor,
    sequence: Tensor,
    cu_seqlens: Tensor,
    table: Tensor,
    columns: Tensor,
    rules: list[int],
    modalities: list[int],
    own: list[int],
    intervals: int,
    window: int | None,
    window_all: bool,
) -> tuple[Tensor, Tensor]:
    """The PyTorch twin of `native.mask_intervals`: limits and positions of `Intervals`.

    Args:
        modality, role, position, segment, step, chunk, sequence: int32 ``[tokens]``, cu_seqlens, table: the layout's.
        columns: int64 ``[rows]``, the token in which each query row stands, -1 for none.
        rules: ``[P · R]``, of each pass and query role; with the bit 64 where keys of the role are in the pass.
        modalities: ``[P]``, -1 for any. own: ``[P]``, as in `Pass`, -1 for None.
        window: or None; of everything, if window_all.
    """
    passes, rows = len(modalities), columns.numel()
    roles = len(rules) // max(passes, 1)
    limits = torch.empty(limits_shape(passes, intervals, rows), dtype=torch.int32, device=modality.device)
    positions = torch.empty(passes, modality.numel(), dtype=torch.int32, device=modality.device)
    real = (modality >= 0) & (role >= 0)
    if modality.numel() == 0:
        # There are no rows that stand in a token.
        made = limits[intervals - 1 :].view(passes, 1 + intervals, rows)
        made[:, 0], made[:, 1:], limits[: intervals - 1] = *NOTHING, -1
        return limits, positions

    some = columns >= 0
    tokens = columns.clamp(min=0)
    some = some & real[tokens]
    of_row = [torch.where(some, fact[tokens], -1) for fact in (modality, role, position, segment, chunk)]
    row_modality, row_role, at, own_segment, own_chunk = of_row
    # Where the row's segment and chunk begin, and the segment ends.
    whole = (own_segment >= 0) & (own_segment < table.shape[0])
    begin = end = torch.zeros_like(at)
    if table.shape[0]:
        placed = table[own_segment.clamp(0, table.shape[0] - 1).long()]
        begin = position[placed[:, 1].long()]
        end = begin + placed[:, 2] - 1
    chunked = own_chunk >= 0
    chunk_begin = position[own_chunk.clamp(min=0).long()]
    nearest = torch.full_like(at, -1) if window is None else (at - window).clamp(min=-1)
    past = torch.full_like(at, -1) if window_all else nearest
    if intervals == 2:
        limits[0] = nearest if window_all else -1

    for p in range(passes):
        of_pass = rules[p * roles : (p + 1) * roles]
        rule, member = torch.zeros_like(at), torch.zeros_like(real)
        for r, bits in enumerate(of_pass):
            rule = torch.where(row_role == r, bits & ~_MEMBER, rule)
            if bits & _MEMBER:
                member = member | (role == r)
        if own[p] >= 0:
            rule = torch.where((row_modality == modalities[p]) == bool(own[p]), rule, 0)
        rule = torch.where(some, rule, 0)
        member = member & real
        positions[p] = torch.where(member if modalities[p] < 0 else member & (modality == modalities[p]), position, -1)

        # The interval at the row.
        is_past, is_chunk = (rule & _V.PAST) > 0, ((rule & _V.CHUNK) > 0) & chunked
        is_segment, is_all = ((rule & _V.SEGMENT) > 0) & whole, (rule & _V.ALL) > 0
        low = torch.where(is_past, past, FAR)
        low = torch.where(is_chunk, torch.minimum(low, torch.maximum(chunk_begin - 1, past)), low)
        low = torch.where(is_segment, torch.minimum(low, begin - 1), low)
        high = torch.where(is_past | is_chunk, at, -2)
        high = torch.where(is_segment, torch.maximum(high, end), high)
        low, high = torch.where(is_all, -1, low), torch.where(is_all, FAR, high)
        # The prefix: it joins the interval that it touches, takes the place of one that is not there, or is a second.
        prefix = torch.full_like(at, -1)
        for flag in (_V.BEFORE, _V.UPTO):
            if any(bits & flag for bits in of_pass):
                last = _last_step(member, step, position, sequence, torch.where(some, tokens, -1), flag == _V.UPTO)
                prefix = torch.where((rule & flag) > 0, last, prefix)
        joins = (prefix >= 0) & (prefix >= low)
        alone = (prefix >= 0) & (low >= high)
        second = (prefix >= 0) & ~joins & ~alone
        low = torch.where(joins | alone, -1, low)
        high = torch.where(joins, torch.maximum(high, prefix), torch.where(alone, prefix, high))
        low = torch.maximum(low, nearest) if window_all else low
        made, there = limits[intervals - 1 :].view(passes, 1 + intervals, rows)[p], low < high
        made[0], made[1] = torch.where(there, low, NOTHING[0]), torch.where(there, high, NOTHING[1])
        if intervals == 2:
            made[2] = torch.where(second & (prefix > limits[0]), prefix, NOTHING[1])
    return limits, positions


def _last_step(
    member: Tensor, step: Tensor, position: Tensor, sequence: Tensor, rows: Tensor, same_step: bool
) -> Tensor:
    """Position of the last member of each row's sequence whose step is less than the row's (`same_step`: or equal);
    -1 where there is none, and for rows -1. Steps never fall among the members of a sequence."""
    placed = (sequence.long() << 32) + step.long() + 2**31
    # Between members the last one's stand, so that a search finds its way.
    rising = torch.where(member, placed, -1).cummax(0).values
    last = torch.where(member, torch.arange(member.numel(), device=member.device), -1).cummax(0).values
    tokens = rows.clamp(min=0)
    found = torch.searchsorted(rising, placed[tokens], right=same_step) - 1
    found = torch.where(found >= 0, last[found.clamp(min=0)], -1)
    inside = (rows >= 0) & (found >= 0)
    found = found.clamp(min=0)
    return torch.where(inside & (sequence[found] == sequence[tokens]), position[found], -1)


def _mask_intervals(modality: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    # The extension does not know more roles than these, nor has anybody else.
    if native.runs_on(modality.device) and len(arguments[9]) <= MANY_ROLES * len(arguments[10]):
        return native.mask_intervals(modality, *arguments)
    return mask_intervals_torch(modality, *arguments)


def _mask_intervals_fake(modality: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    columns, _, modalities, _, intervals = arguments[8:13]
    passes = len(modalities)  # type: ignore[arg-type]
    rows: int = columns.numel()  # type: ignore[attr-defined]
    limits = modality.new_empty(limits_shape(passes, intervals, rows))  # type: ignore[arg-type]
    return limits, modality.new_empty(passes, modality.numel())


_op_mask_intervals = operator(
    "_mask_intervals(Tensor modality, Tensor role, Tensor position, Tensor segment, Tensor step, Tensor chunk, "
    "Tensor sequence, Tensor cu_seqlens, Tensor table, Tensor columns, int[] rules, int[] modalities, int[] own, "
    "int intervals, int? window, bool window_all) -> (Tensor, Tensor)",
    _mask_intervals,
    _mask_intervals_fake,
)


def visible_keys(layout: ModalityLayout, queries: QueryRows, mask: Rules) -> Tensor:
    """Every pair of a query and a key written out: bool ``[B, Lq, Lk]``, packed ``[Tq, T]``."""
    limits, positions = mask_intervals(layout, queries, mask)
    shape = (*queries.shape, layout.modality.shape[-1])
    seen = torch.zeros(shape, dtype=torch.bool, device=layout.device)
    for lows, highs, key in zip(*ends_of(limits, len(positions)), positions, strict=True):
        key = key.view(layout.modality.shape)[..., None, :]
        for low, high in zip(lows, highs, strict=True):
            seen = seen | ((low.view(queries.shape)[..., None] < key) & (key <= high.view(queries.shape)[..., None]))
    if layout.packed:
        seen = seen & (queries.of(layout.sequence)[:, None] == layout.sequence[None, :])
    return seen


def count_by_pass(
    layout: ModalityLayout, queries: QueryRows, mask: Rules, split: bool = False, by_modality: bool = False
) -> Tensor:
    """How many keys of each pass every query sees: int32 ``[P, rows]``; linear in tokens."""
    limits, positions = mask_intervals(layout, queries, mask, split, by_modality)
    tokens, device, rows = layout.num_tokens, layout.device, queries.columns.numel()
    if tokens == 0 or layout.num_sequences == 0 or positions.shape[0] == 0:
        return torch.zeros(positions.shape[0], rows, dtype=torch.int32, device=device)
    position, sequence = layout.position.flatten(), queries.of(layout.sequence, 0).flatten().long()
    first, length = layout.cu_seqlens[sequence], layout.cu_seqlens.diff()[sequence]
    # Members are counted where each sequence's tokens have moved together (padding: behind all tokens).
    place = torch.where(position >= 0, layout.cu_seqlens[layout.sequence.flatten().long()] + position, tokens).long()
    counts = []
    for lows, highs, key in zip(*ends_of(limits, len(positions)), positions, strict=True):
        member = torch.zeros(tokens + 1, dtype=torch.int32, device=device)
        member = member.scatter(0, place, (key >= 0).int())
        before = torch.nn.functional.pad(member[:tokens].cumsum(0, dtype=torch.int32), (1, 0))
        count = torch.zeros(rows, dtype=torch.int32, device=device)
        for low, high in zip(lows, highs, strict=True):
            ends = [torch.minimum(x.clamp(max=FAR - 1) + 1, length) for x in (low, high)]
            begin, end = (before[(first + torch.where(low < high, x, 0)).long()] for x in ends)
            count = count + (end - begin)
        counts.append(count)
    return torch.stack(counts)


def count_keys(layout: ModalityLayout, queries: QueryRows, mask: Rules) -> Tensor:
    """How many keys of each modality every query sees: int32 ``[B, Lq, M]``, packed ``[Tq, M]``."""
    counted = count_by_pass(layout, queries, mask, by_modality=True)
    of_pass = [each.modality for each in passes_of(layout, mask, by_modality=True).passes]
    nothing = counted.new_zeros(queries.columns.numel())
    by_modality = [
        sum((c for c, m in zip(counted, of_pass, strict=True) if m == modality), nothing)
        for modality in range(layout.num_modalities)
    ]
    return torch.stack(by_modality, -1).view(*queries.shape, layout.num_modalities)
