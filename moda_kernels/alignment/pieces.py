"""Pieces of the causal scope: whose Gram sums count for whom (spec: "Duplex alignment", scope).

Integers alone, the same for all layers, heads and aligners of one kind: a layout remembers them, and a layer is left
with the arithmetic on its keys.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moda_kernels import products
from moda_kernels.tokens.layout import ModalityLayout


class Block(NamedTuple):
    """K consecutive pieces that are done at once.

    Attributes:
        grouping: of their tokens, for Gram sums. mapped: of those that are mapped.
        of_mapped: bool ``[tokens]``, which those are; is_mapped: bool ``[K]``, which pieces.
        names: bool ``[K + C, C + K]``: which of C sums carried into the block, and which of its own pieces, count for
            each piece; and then for each sum that is carried on (C = 0 where none is).
        sequence, modality: int64 ``[K]``.
    """

    grouping: products.Grouping
    mapped: products.Grouping
    of_mapped: Tensor
    is_mapped: Tensor
    names: Tensor
    sequence: Tensor
    modality: Tensor


@dataclass(frozen=True, eq=False)
class Pieces:
    """The tokens of a layout cut into pieces, each of which has one matrix: its segments.

    Attributes:
        layout: theirs. aligned: the modalities whose keys are mapped.
        group: int64 ``[tokens]``, the piece of each token, -1: none.
        number: an upper bound of how many there are.
        table: int64 ``[number, 3]``: sequence, first token, modality; sequence -1 where there is no such piece.
        mapped: bool ``[tokens]``, whose keys are mapped: those of an aligned modality for which tokens of others count.
    """

    layout: ModalityLayout
    aligned: tuple[int, ...]
    group: Tensor
    number: int
    table: Tensor
    mapped: Tensor

    @property
    def starts(self) -> list[int]:
        """The first token of each piece there is. Only on the CPU."""

        def make() -> list[int]:
            sequence, first, _ = self.table.unbind(1)
            found: list[int] = first[sequence >= 0].tolist()
            return found

        return self.layout.remember("piece starts", make)

    def block(
        self, first: int, count: int, tokens: tuple[int, int] | None = None, carries: bool | None = None
    ) -> Block:
        """Pieces first … first + count - 1.

        Args:
            tokens: first and last + 1 of their tokens, which alone are then grouped. None: all tokens are.
            carries: whether sums per modality are carried into and out of it. Default: with `tokens`.
        """
        carries = tokens is not None if carries is None else carries
        key = ("block", self.aligned, first, count, tokens, carries)
        return self.layout.remember(key, lambda: self._block(first, count, tokens, carries))

    def _block(self, first: int, count: int, tokens: tuple[int, int] | None, carries: bool) -> Block:
        layout = self.layout
        sequence, start, modality = self.table[first : first + count].unbind(1)
        exists = sequence >= 0
        slot = torch.arange(count, device=start.device)
        names = (sequence[None, :] == sequence[:, None]) & exists[None, :]
        names &= (slot[None, :] < slot[:, None]) & (modality[None, :] != modality[:, None])
        if carries:
            of = torch.arange(layout.num_modalities, device=start.device)
            before = self.table[first - 1, 0] if first else torch.full_like(start[:1], -1)[0]
            # Slots without a piece (as many as the bound is too high) come last.
            last = torch.where(exists, sequence, before).amax()
            carried = (of[None, :] != modality[:, None]) & (exists & (sequence == before))[:, None]
            stays = (of[None, :] == of[:, None]) & (last == before)
            joins = (of[:, None] == modality[None, :]) & (exists & (sequence == last))[None, :]
            names = torch.cat((torch.cat((carried, names), 1), torch.cat((stays, joins), 1)))
        if tokens is None:
            group, of_mapped = self.group, self.mapped
            grouping = layout.grouping("segment")
            if count < self.number:
                grouping = grouping.window(first, count)
                of_mapped = of_mapped & (group >= first) & (group < first + count)
        else:
            local, of_mapped = self.group[slice(*tokens)], self.mapped[slice(*tokens)]
            grouping = products.group_tokens(torch.where(local >= 0, local - first, -1), count)
        is_mapped = exists & self.mapped[start]
        return Block(grouping, grouping.only(is_mapped), of_mapped, is_mapped, names, sequence.clamp(min=0), modality)


def pieces_of(layout: ModalityLayout, aligned: tuple[int, ...]) -> Pieces:
    """The pieces of a layout, for an aligner of these modalities."""

    def make() -> Pieces:
        sequence, first, length, modality = layout.table.long().unbind(1)
        table = torch.stack((torch.where(length > 0, sequence, -1), first, modality), 1)
        return Pieces(
            layout, aligned, layout.groups("segment"), layout.max_segments, table, mapped_tokens(layout, aligned)
        )

    return layout.remember(("pieces", aligned), make)


def mapped_tokens(layout: ModalityLayout, aligned: tuple[int, ...]) -> Tensor:
    """`Pieces.mapped`, in time linear in tokens."""
    modality, sequence = layout.modality.flatten().long(), layout.sequence.flatten().long()
    if layout.num_tokens == 0 or layout.num_sequences == 0:
        return torch.zeros_like(modality, dtype=torch.bool)
    seen = layout.prefix[:-1] - layout.prefix[layout.cu_seqlens[:-1].long()][sequence]
    own = modality.clamp(min=0)
    others = seen.sum(1) - seen.gather(1, own[:, None])[:, 0]
    return (modality >= 0) & (others > 0) & layout.chosen(aligned)[own]
