"""Pieces of the causal scope: whose Gram sums count for whom (spec: "Duplex alignment", scope).

Integers alone, the same for all layers, heads and aligners of one kind: a layout remembers them, and a layer is left
with the arithmetic on its keys.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moda_kernels import products
from moda_kernels.runtime.later import Later
from moda_kernels.tokens.layout import ModalityLayout


class Block(NamedTuple):
    """K consecutive pieces that are done at once.

    Attributes:
        grouping: of their tokens, for Gram sums. mapped: of those that are mapped.
        of_mapped: bool ``[tokens]``, which those are; is_mapped: bool ``[K]``, which pieces.
        names: bool ``[K + C, C + K]``: which of C sums carried into the block, and which of its own pieces, count for
            each piece; and then for each sum that is carried on (C = 0 where none is).
        sequence, modality: int64 ``[K]``. continues: bool ``[K]``, whether a piece's chunk began before the layout's
            first tokens (of a part of a longer history); None where no chunk did.
    """

    grouping: products.Grouping
    mapped: products.Grouping
    of_mapped: Tensor
    is_mapped: Tensor
    names: Tensor
    sequence: Tensor
    modality: Tensor
    continues: Tensor | None


@dataclass(frozen=True, eq=False)
class Pieces:
    """The tokens of a layout cut into pieces, each of which has one matrix: segments, cut where chunks begin and end.

    Attributes:
        layout: theirs. aligned: the modalities whose keys are mapped. sources: the roles whose tokens count, None: all.
        group: int64 ``[tokens]``, the piece of each token, -1: none.
        number: an upper bound of how many there are.
        table: int64 ``[number, 4]``: sequence, first token, modality, chunk; sequence -1 where there is no such piece.
        mapped: bool ``[tokens]``, whose keys are mapped: those of an aligned modality for which tokens of others count.
        there_are: how many pieces there are.
        continues: bool ``[tokens]``, whether a token's chunk began before this layout's tokens; None: no chunk did.
    """

    layout: ModalityLayout
    aligned: tuple[int, ...]
    sources: tuple[int, ...] | None
    group: Tensor
    number: int
    table: Tensor
    mapped: Tensor
    there_are: Later
    continues: Tensor | None = None

    @property
    def carried(self) -> int:
        """How many sums per sequence are carried on: per modality those of tokens in no chunk and, where there are
        chunks, of the chunk in progress."""
        return self.layout.num_modalities * (2 if self.layout.own_chunks else 1)

    @property
    def starts(self) -> list[int]:
        """The first token of each piece there is. Only on the CPU."""

        def make() -> list[int]:
            found: list[int] = self.table[self.table[:, 0] >= 0, 1].tolist()
            return found

        return self.layout.remember("piece starts", make)

    def block(
        self, first: int, count: int, tokens: tuple[int, int] | None = None, carries: bool | None = None
    ) -> Block:
        """Pieces first … first + count - 1.

        Args:
            tokens: first and last + 1 of their tokens, which alone are then grouped. None: all tokens are.
            carries: whether sums are carried into and out of it. Default: with `tokens`.
        """
        carries = tokens is not None if carries is None else carries
        key = ("block", self.aligned, self.sources, first, count, tokens, carries)
        return self.layout.remember(key, lambda: self._block(first, count, tokens, carries))

    def _block(self, first: int, count: int, tokens: tuple[int, int] | None, carries: bool) -> Block:
        layout = self.layout
        sequence, start, modality, chunk = self.table[first : first + count].unbind(1)
        exists = sequence >= 0
        counts = exists & counting(layout, self.sources)[start]
        slot = torch.arange(count, device=start.device)
        names = (sequence[None, :] == sequence[:, None]) & (slot[None, :] < slot[:, None]) & counts[None, :]
        names &= modality[None, :] != modality[:, None]
        if layout.own_chunks:
            names &= (chunk[None, :] < 0) | (chunk[None, :] == chunk[:, None])
        if carries:
            names = self._with_carried(names, first, counts)
        if tokens is None:
            group, of_mapped, grouping = self.group, self.mapped, self._grouping()
            if count < self.number:
                grouping = grouping.window(first, count)
                of_mapped = of_mapped & (group >= first) & (group < first + count)
        else:
            local, of_mapped = self.group[slice(*tokens)], self.mapped[slice(*tokens)]
            grouping = products.group_tokens(torch.where(local >= 0, local - first, -1), count)
        is_mapped = exists & self.mapped[start]
        continues = None if self.continues is None else self.continues[start]
        return Block(
            grouping, grouping.only(is_mapped), of_mapped, is_mapped, names, sequence.clamp(min=0), modality, continues
        )

    def _with_carried(self, names: Tensor, first: int, counts: Tensor) -> Tensor:
        """`Block.names` from those among its own pieces."""
        nothing = torch.full_like(self.table[:1], -1)
        before = self.table[first - 1 : first] if first else nothing
        pieces = self.table[first : first + names.shape[0]]
        exists = pieces[:, 0] >= 0
        # Slots without a piece (as many as the bound is too high) come last.
        last = torch.where(exists, torch.arange(len(pieces), device=exists.device), -1).amax(0, keepdim=True)
        last = torch.where(last[:, None] < 0, before, pieces.index_select(0, last.clamp(min=0)))
        of = torch.arange(self.layout.num_modalities, device=exists.device)
        # Of tokens in no chunk, from the sequence before the block to that in which it ends.
        carried = (of[None, :] != pieces[:, 2:3]) & (exists & (pieces[:, 0] == before[:, 0]))[:, None]
        stays = (of[None, :] == of[:, None]) & (last[:, 0] == before[:, 0])
        joins = (of[:, None] == pieces[None, :, 2]) & (counts & (pieces[:, 0] == last[:, 0]))[None, :]
        if self.layout.own_chunks:  # and of the chunk before it to the chunk in which it ends
            in_chunk = pieces[:, 3] >= 0
            same = in_chunk & (pieces[:, 3] == before[:, 3])
            carried = torch.cat((carried, (of[None, :] != pieces[:, 2:3]) & same[:, None]), 1)
            goes_on = (of[None, :] == of[:, None]) & (last[:, 3] == before[:, 3]) & (last[:, 3] >= 0)
            zeros = torch.zeros_like(stays)
            stays = torch.cat((torch.cat((stays, zeros), 1), torch.cat((zeros, goes_on), 1)))
            joined = (of[:, None] == pieces[None, :, 2]) & (counts & in_chunk & (pieces[:, 3] == last[:, 3]))[None, :]
            joins = torch.cat((joins & ~in_chunk, joined))
        return torch.cat((torch.cat((carried, names), 1), torch.cat((stays, joins), 1)))

    def _grouping(self) -> products.Grouping:
        if not self.layout.own_chunks:
            return self.layout.grouping("segment")
        return self.layout.remember(("grouping", "piece"), lambda: products.group_tokens(self.group, self.number))


class After(NamedTuple):
    """What the tokens of a part of a longer history know of those before it: `Pieces.mapped` and `Pieces.continues`."""

    mapped: Tensor
    continues: Tensor | None


def pieces_of(
    layout: ModalityLayout,
    aligned: tuple[int, ...],
    sources: tuple[int, ...] | None = None,
    after: After | None = None,
) -> Pieces:
    """The pieces of a layout, for an aligner of these modalities and sources."""

    def make() -> Pieces:
        if layout.num_tokens == 0:
            nothing = layout.sequence.flatten().long()
            none = Later(layout.num_segments)
            return Pieces(layout, aligned, sources, nothing, 0, nothing.new_zeros(0, 4), nothing > 0, none)
        if layout.own_chunks:
            group, number, first, exists = _cut_by_chunks(layout)
        else:
            group, number = layout.groups("segment"), layout.max_segments
            first, exists = layout.table[:, 1].long(), layout.table[:, 2] > 0
        facts = [fact.flatten()[first].long() for fact in (layout.sequence, layout.modality, layout.chunk)]
        table = torch.stack((torch.where(exists, facts[0], -1), first, facts[1].clamp(min=0), facts[2]), 1)
        mapped, continues = After(mapped_tokens(layout, aligned, sources), None) if after is None else after
        return Pieces(layout, aligned, sources, group, number, table, mapped, Later(exists.sum()), continues)

    return layout.remember(("pieces", aligned, sources), make)


def _cut_by_chunks(layout: ModalityLayout) -> tuple[Tensor, int, Tensor, Tensor]:
    """The piece of each token, a bound of their number (exact where it can be read), first tokens, which exist."""
    segment, chunk = layout.segment.flatten(), layout.chunk.flatten()
    real, tokens = segment >= 0, segment.numel()
    begins = real.clone()
    begins[1:] &= (segment[1:] != segment[:-1]) | (chunk[1:] != chunk[:-1])
    group = torch.where(real, begins.cumsum(0) - 1, -1)
    countable = segment.device.type == "cpu" and not torch.compiler.is_compiling()
    number = int(begins.sum()) if countable else tokens
    # One row more takes what begins no piece.
    first = torch.full((number + 1,), tokens, device=segment.device)
    first.scatter_(0, torch.where(begins, group, number), torch.arange(tokens, device=segment.device))
    exists = first[:number] < tokens
    return group, number, torch.where(exists, first[:number], 0), exists


def counting(layout: ModalityLayout, sources: tuple[int, ...] | None) -> Tensor:
    """bool ``[tokens]``: whose Gram sums count, those of tokens with one of these roles (None: any)."""

    def make() -> Tensor:
        role = layout.role.flatten()
        if sources is None:
            return role >= 0
        counts = torch.zeros_like(role, dtype=torch.bool)
        for number in sources:  # compared with numbers, because a copy of them to the device would wait
            counts |= role == number
        return counts

    return layout.remember(("counting", sources), make)


def counting_groups(layout: ModalityLayout, sources: tuple[int, ...] | None) -> products.Grouping:
    """The tokens that count, by sequence and modality."""
    if sources is None:
        return layout.grouping("modality")

    def make() -> products.Grouping:
        group = torch.where(counting(layout, sources), layout.groups("modality"), -1)
        return products.group_tokens(group, layout.counts.numel())

    return layout.remember(("grouping", "modality", sources), make)


def mapped_modalities(layout: ModalityLayout, aligned: tuple[int, ...], sources: tuple[int, ...] | None) -> Tensor:
    """bool ``[N, M]``: whose keys the sequence scope maps, those of an aligned modality beside tokens of others that
    count."""

    def make() -> Tensor:
        counts = layout.counts
        if sources is not None:
            counts = counting_groups(layout, sources).groups[:, 1].view(counts.shape)
        return (counts.sum(1, keepdim=True) > counts) & layout.chosen(aligned)

    return layout.remember(("mapped modalities", aligned, sources), make)


def mapped_tokens(
    layout: ModalityLayout,
    aligned: tuple[int, ...],
    sources: tuple[int, ...] | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """`Pieces.mapped`, of all tokens or of some rows of the flattened ones (int64), in time linear in tokens."""
    if layout.num_tokens == 0 or layout.num_sequences == 0:
        return torch.zeros(layout.num_tokens, dtype=torch.bool, device=layout.device)
    rows = torch.arange(layout.num_tokens, device=layout.device) if rows is None else rows
    modality, sequence, chunk = (
        fact.flatten()[rows].long() for fact in (layout.modality, layout.sequence, layout.chunk)
    )
    own, begin = modality.clamp(min=0), layout.cu_seqlens[:-1].long()[sequence]
    if sources is None and not layout.own_chunks:
        seen = layout.prefix[rows] - layout.prefix[begin]
    else:
        numbers = torch.arange(layout.num_modalities, device=layout.device)
        ones = (layout.modality.flatten()[:, None] == numbers) & counting(layout, sources)[:, None]

        def since(which: Tensor, begin: Tensor) -> Tensor:
            prefix = torch.nn.functional.pad((ones & which.flatten()[:, None]).cumsum(0), (0, 0, 1, 0))
            return prefix[rows] - prefix[begin]

        seen = since(layout.chunk < 0, begin)
        if layout.own_chunks:
            seen = seen + torch.where(chunk[:, None] >= 0, since(layout.chunk >= 0, chunk.clamp(min=0)), 0)
    others = seen.sum(1) - seen.gather(1, own[:, None])[:, 0]
    return (modality >= 0) & (others > 0) & layout.chosen(aligned)[own]
