"""From rules to what kernels walk: passes over key modalities, and the tile lists of each.

A kernel's visibility test knows one rule per query row. So key modalities that every query modality treats alike
share a pass, and others get passes of their own: causal masks, "images see themselves whole" and full ones need one.
Where something belongs to the key's modality (a pair bias, a key map folded into the query) each modality is a pass.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moda_kernels.backends.triton.operators import op_attention_limits
from moda_kernels.tokens.layout import ModalityLayout, QueryRows
from moda_kernels.tokens.mask import ModularMask, Visibility
from moda_kernels.tokens.tiles import tile_lists


@dataclass(frozen=True)
class Passes:
    """The passes of a mask.

    Attributes:
        masks: of each pass, what is left of the rules: those of its key modalities.
        numbers: as kernels take them, see `launch.py`.
    """

    masks: tuple[ModularMask, ...]
    numbers: tuple[int, ...]


@functools.lru_cache(maxsize=256)
def make_passes(mask: ModularMask, split: bool, by_modality: bool) -> Passes:
    """The passes of a mask; split: first those of keys of the query's own modality, then those of the others."""
    m = mask.num_roles
    masks: list[ModularMask] = []
    rules: list[int] = []
    members: list[int] = []
    modalities: list[int] = []
    branches = [mask.part(same=True), mask.part(same=False)] if split else [mask]
    first = 0
    for branch in branches:
        first = len(masks) if branch is branches[-1] else first
        groups: dict[object, list[int]] = {}
        for b in range(m):
            column = tuple(_between_modalities(branch.rules[a][b]) for a in range(m))
            if any(column) or branch.rules[b][b] & Visibility.SEGMENT:
                groups.setdefault((column, b if by_modality else None), []).append(b)
        for (column, _), of_group in groups.items():  # type: ignore[misc]
            kept = (
                tuple(branch.rules[a][b] if b in of_group else Visibility.HIDDEN for b in range(m)) for a in range(m)
            )
            masks.append(ModularMask(tuple(kept), mask.window))
            rules += [
                int(column[a] | (branch.rules[a][a] & Visibility.SEGMENT if a in of_group else 0)) for a in range(m)
            ]
            members.append(sum(1 << b for b in of_group))
            modalities.append(of_group[0])
    return Passes(tuple(masks), (m, first if split else len(masks), len(masks), *rules, *members, *modalities))


def _between_modalities(rule: Visibility) -> Visibility:
    """A rule without SEGMENT, which only says something about one modality; ALL says it all."""
    return Visibility.ALL if rule & Visibility.ALL else rule & Visibility.PAST


def query_tile_lists(
    layout: ModalityLayout, queries: QueryRows, passes: Passes, block_q: int, block_k: int
) -> tuple[Tensor, ...]:
    """Lists of key columns for each query tile: (tiles, order, lists, counts, overflow)."""
    return _lists(layout, queries, passes, block_q, block_k, of_queries=True)


def key_tile_lists(
    layout: ModalityLayout, queries: QueryRows, passes: Passes, block_q: int, block_k: int
) -> tuple[Tensor, ...]:
    """Lists of query rows for each key tile."""
    return _lists(layout, queries, passes, block_q, block_k, of_queries=False)


def _lists(
    layout: ModalityLayout, queries: QueryRows, passes: Passes, block_q: int, block_k: int, of_queries: bool
) -> tuple[Tensor, ...]:
    def make() -> tuple[Tensor, ...]:
        masks = passes.masks or (ModularMask.self_only(layout.num_modalities),)  # its tiles are wanted, no list
        made = [tile_lists(layout, mask, block_q, block_k, queries) for mask in masks]
        own, other, bounds = made[0].query_tiles, made[0].key_tiles, layout.cu_seqlens
        lists, counts = [t.key_lists for t in made], [t.key_counts for t in made]
        if not of_queries:
            own, other, bounds = other, own, queries.cu_seqlens
            lists, counts = [t.query_lists for t in made], [t.query_counts for t in made]
        entries, count = torch.stack(lists), torch.stack(counts)
        if other.shape[0] and layout.num_sequences:
            # From a tile to its first row within the sequence.
            entries = other[:, 1][entries.long()] - bounds[own[:, :1].long()]
        order = torch.argsort(count[..., 1].sum(0), descending=True, stable=True).int()
        size = len(passes.masks)
        return own, order, F.pad(entries, (0, 1))[:size].contiguous(), count[:size].contiguous(), made[0].overflow

    return queries.remember(("tile lists", passes.numbers, passes.masks, block_q, block_k, of_queries), make)


def decode_tiles(queries: QueryRows, rows: int) -> Tensor:
    """Tiles of up to `rows` query rows of a sequence, int32 ``[tiles, 3]``: sequence, first row, rows (0: no tile).

    As many as the sizes that the host knows can need: nothing waits for a device.
    """

    def make() -> Tensor:
        bounds = queries.cu_seqlens
        sequences, total = bounds.shape[0] - 1, queries.columns.numel()
        packed = len(queries.shape) == 1
        room = (total + sequences * (rows - 1)) // rows if packed else sequences * -(-queries.shape[1] // rows)
        counts = (bounds.diff() + (rows - 1)) // rows
        ends = counts.cumsum(0)
        tile = torch.arange(room, device=bounds.device)
        sequence = torch.searchsorted(ends, tile, right=True).clamp(max=sequences - 1)
        first = bounds[sequence] + (tile - (ends - counts)[sequence]) * rows
        some = torch.where(tile < ends[-1], (bounds[sequence + 1] - first).clamp(max=rows), 0)
        return torch.stack((sequence, first, some), 1).int()

    return queries.remember(("decode tiles", rows), make)


def pseudo_counts(
    layout: ModalityLayout, queries: QueryRows, mask: ModularMask, split: bool, length: int | float | None
) -> Tensor:
    """How many pseudo scores each query row gets, int32 ``[branches, rows]``; -1 for infinitely many."""

    def make() -> Tensor:
        modality = queries.of(layout.modality)
        if length == float("inf"):
            count = torch.where(modality >= 0, -1, 0).int().flatten()
            return count.expand(2 if split else 1, -1).contiguous()
        total = torch.zeros_like(modality)
        own = total
        if layout.num_sequences:
            of_sequence = layout.counts[queries.of(layout.sequence, 0).long()]
            total = of_sequence.sum(-1, dtype=torch.int32)
            own = of_sequence.gather(-1, modality.clamp(min=0).long()[..., None])[..., 0]
        made = []
        for part, tokens in (
            ((mask.part(same=True), own), (mask.part(same=False), total - own)) if split else ((mask, total),)
        ):
            seen = part.count_visible(layout, queries).sum(-1, dtype=torch.int32)
            count = ((tokens if length is None else int(length)) - seen).clamp(min=0)
            made.append(torch.where(modality >= 0, count, 0).flatten())
        return torch.stack(made).int()

    return queries.remember(("pseudo counts", mask, split, length), make)


def row_facts(layout: ModalityLayout, queries: QueryRows, passes: Passes, window: int | None) -> tuple[Tensor, ...]:
    """The facts of a call, as `launch.py` names them."""

    def make() -> tuple[Tensor, ...]:
        modality, position, segment = (f.flatten() for f in (layout.modality, layout.position, layout.segment))
        limits = op_attention_limits(
            modality, position, segment, layout.table, queries.columns.flatten(), list(passes.numbers),
            2**31 - 1 if window is None else window,
        )  # fmt: skip
        return modality, *limits, layout.cu_seqlens, queries.cu_seqlens

    return queries.remember(("row facts", passes.numbers, window), make)
