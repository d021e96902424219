"""The control of every claim about alignment: the same map, from the Gram sums of another document."""

import torch
from torch import Tensor

from moda_kernels.alignment.maps import from_tokens, to_tokens
from moda_kernels.runtime import checks
from moda_kernels.tokens.layout import ModalityLayout
from moda_kernels.tokens.segments import as_layout


def keys_of_another_document(key: Tensor, layout: ModalityLayout | Tensor) -> Tensor:
    """Keys in which every token stands for one of the same modality of another sequence. ::

        control = aligner(keys_of_another_document(key, layout), layout)
        mk.moda_attention(query, key, value, layout=layout, key_map=control)

    Token number r of modality m of a sequence becomes token number r of modality m of the next sequence of the batch
    that has any (the first one follows the last; if that has fewer, they are taken again from the start). So Gram sums
    keep their places and sizes, under either scope, and lose what they knew about their own sequence. If a model does
    as well with such a map, alignment by the Gram matrix is not what helps it.

    Args:
        key: ``[B, Hkv, L, D]``, packed ``[T, Hkv, D]``. layout: theirs (or modality ids ``[B, L]``).

    Returns:
        Like ``key``, differentiable; padding stays as it is.

    Raises:
        ValueError: a modality that one sequence alone has; what :class:`moda_kernels.DuplexAligner` raises.
    """
    layout = as_layout(layout)
    tokens = to_tokens("key", key, layout)
    return from_tokens(tokens.index_select(0, layout.remember("another document", lambda: _places(layout))), layout)


def _places(layout: ModalityLayout) -> Tensor:
    """For each token the one that stands for it, int64 ``[tokens]``."""
    n, m = layout.num_sequences, layout.num_modalities
    modality, sequence = (x.flatten().long() for x in (layout.modality, layout.sequence))
    group = torch.where(modality >= 0, sequence * m + modality, n * m)
    order = group.argsort(stable=True)
    counts = torch.bincount(group, minlength=n * m + 1)
    start = counts.cumsum(0) - counts
    table = counts[:-1].view(n, m).cpu()
    lender = torch.empty(n, m, dtype=torch.long)
    for kind in range(m):
        having = table[:, kind].nonzero()[:, 0]
        if len(having) == 1:
            raise checks.wrong_value(
                "layout", f"modality {kind} in two sequences or more, or in none", "one sequence that has it"
            )
        lender[having, kind] = having.roll(-1) * m + kind
    lender = torch.cat((lender.flatten(), torch.zeros(1, dtype=torch.long))).to(group.device)
    rank = torch.empty_like(group)
    rank[order] = torch.arange(len(group), device=group.device) - start[group[order]]
    other = lender[group]
    real = modality >= 0
    taken = order[(start[other] + rank % counts[other].clamp(min=1)).clamp(max=len(order) - 1)]
    return torch.where(real, taken, torch.arange(len(group), device=group.device))
