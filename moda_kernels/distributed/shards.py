"""Parts of a layout: some columns of it, as a layout of their own in which the same tokens see each other.

Positions count anew among the columns that are there. That changes nothing for rules that ask which token comes first;
windows measure distances, so there no column between two others may be missing (`plan.spanned`).
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from moda_kernels.tokens.layout import ModalityLayout
from moda_kernels.tokens.segments import segment_modalities


@dataclass(frozen=True, eq=False)
class Part:
    """Some columns of a whole layout.

    Attributes:
        layout: theirs, on the whole layout's device; `counts` are the whole sequences'.
        columns: int64, rising, on the CPU.
        sequences: the first and last + 1 of the whole's sequences that these lie among (of a batch: all).
    """

    layout: ModalityLayout
    columns: Tensor
    sequences: tuple[int, int]

    def of_sequences(self, x: Tensor, dim: int = 0) -> Tensor:
        """Of numbers per sequence of the whole (or one for all), those of this part."""
        first, last = self.sequences
        return x if x.shape[dim] == 1 or x.shape[dim] == last - first else x.narrow(dim, first, last - first)


def part_of(whole: ModalityLayout, columns: Tensor, device: torch.device) -> Part:
    """Args: whole: on the CPU. columns: int64, rising, on the CPU. device: of the part's layout."""
    steps = whole.remember("steps, or none", lambda: whole.step if bool((whole.step != 0).any()) else None)
    bounds, sequences = None, (0, whole.num_sequences)
    if whole.packed:
        of_column = whole.sequence[columns]
        sequences = (int(of_column[0]), int(of_column[-1]) + 1) if len(columns) else (0, 0)
        begins = whole.cu_seqlens[sequences[0] : sequences[1] + 1].long()
        bounds = torch.searchsorted(columns, begins).int()
    layout = segment_modalities(
        whole.modality[..., columns],
        num_modalities=whole.num_modalities,
        num_roles=whole.num_roles if whole.own_roles else None,
        item_ids=whole.segment[..., columns],
        roles=whole.role[..., columns] if whole.own_roles else None,
        steps=None if steps is None else steps[..., columns],
        chunks=whole.chunk[..., columns] if whole.own_chunks else None,
        cu_seqlens=bounds,
    )
    layout = dataclasses.replace(layout, counts=whole.counts[slice(*sequences)])
    return Part(layout.to(device) if device.type != "cpu" else layout, columns, sequences)
