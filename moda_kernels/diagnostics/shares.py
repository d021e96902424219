"""Who attends to whom: attention shares and the paper's disparity figures (MODA Fig. 2 and 4)."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moda_kernels.attention import moda_attention
from moda_kernels.products.twin import compute_dtype
from moda_kernels.runtime import checks
from moda_kernels.tokens.layout import ModalityLayout, QueryRows
from moda_kernels.tokens.mask import ModularMask
from moda_kernels.tokens.segments import as_layout


def attention_share(
    query: Tensor, key: Tensor, layout: ModalityLayout | Tensor, mask: ModularMask | None = None, **options: Any
) -> Tensor:
    """The mean attention mass that queries of one modality give to the keys of another (MODA Fig. 2).

    It is attention with value = one-hot(modality), so it takes no more memory than attention does. With pseudo scores a
    row's masses add up to less than 1.

    Args:
        query, key: as in :func:`moda_kernels.moda_attention`.
        layout: the keys' layout, or modality ids ``[B, L]``.
        mask: default: full.
        options: its other arguments (is_causal, scale, enable_gqa, key_map, pair_bias, pseudo, duplex, …).

    Returns:
        float32 (float64 for float64) ``[N, Hq, M, M]``: query modality, key modality; NaN in the rows of a modality
        without queries.

    Raises:
        ValueError, TypeError: as :func:`moda_kernels.moda_attention`.
    """
    layout = as_layout(layout, getattr(mask, "num_roles", None))
    mass, queries = _mass(query, key, layout, mask, options)
    return mean_by_modality(mass, torch.ones_like(mass[..., 0], dtype=torch.bool), layout, queries)


class ModalDisparity(NamedTuple):
    """How differently a modality attends to itself and to the others; each ``[N, Hq, M]``, NaN where undefined.

    Attributes:
        own: mean over queries of the attention mass per visible key of the query's modality.
        cross: the same for keys of other modalities.
        difference: |own - cross| / max(own, cross), the relative difference; from 0 (balanced) to 1.
    """

    own: Tensor
    cross: Tensor
    difference: Tensor


def modal_disparity(
    query: Tensor, key: Tensor, layout: ModalityLayout | Tensor, mask: ModularMask | None = None, **options: Any
) -> ModalDisparity:
    """The paper's attention disparity of each modality (MODA Fig. 4), per sequence and head.

    The paper reports relative differences (text 56.97 %, visual 62.44 % before MODA, 50.31 % and 41.01 % with it) but
    not their formula; here it is |own - cross| / max(own, cross) of the mean attention mass *per visible key*, so
    that a modality is not called favoured for having many tokens. Queries count that see keys of both kinds, so that
    attention that doesn't look (equal weights) comes out as 0 under any mask.

    Args, Raises: as :func:`attention_share`.
    """
    layout = as_layout(layout, getattr(mask, "num_roles", None))
    mass, queries = _mass(query, key, layout, mask, options)
    rule = mask or (ModularMask.causal if options.get("is_causal") else ModularMask.full)(layout.num_roles)
    visible = rule.count_visible(layout, queries)  # [B, Lq, M]
    return disparity_of(mass, visible[None] if layout.packed else visible, layout, queries)


def disparity_of(mass: Tensor, visible: Tensor, layout: ModalityLayout, queries: QueryRows) -> ModalDisparity:
    """From the mass that rows give to each modality ``[B or 1, Hq, Lq, M]``, and the number of keys of each that they
    see ``[B or 1, Lq, M]``."""
    modality = queries.of(layout.modality).clamp(min=0).long()[..., None]
    modality = modality[None] if layout.packed else modality
    own_kind = torch.arange(layout.num_modalities, device=mass.device) == modality
    keys = [(visible * kind).sum(-1)[:, None] for kind in (own_kind, ~own_kind)]
    both = (keys[0] > 0) & (keys[1] > 0)
    means = []
    for kind, seen in zip((own_kind, ~own_kind), keys, strict=True):
        per_key = (mass * kind[:, None]).sum(-1) / seen.clamp(min=1)
        means.append(mean_by_modality(per_key[..., None], both.expand_as(per_key), layout, queries)[..., 0])
    own_share, cross_share = means
    larger = torch.maximum(own_share, cross_share)
    return ModalDisparity(own_share, cross_share, (own_share - cross_share).abs() / larger)


def _mass(
    query: Tensor, key: Tensor, layout: ModalityLayout, mask: ModularMask | None, options: dict[str, Any]
) -> tuple[Tensor, QueryRows]:
    """Attention mass to each modality, ``[B or 1, Hq, Lq, M]``, and the query rows."""
    checks.float_tensor("key", key)
    if "return_lse" in options:
        raise TypeError("options: expected arguments that change the attention, got return_lse")
    one_hot = F.one_hot(layout.modality.clamp(min=0).long(), layout.num_modalities).to(key.dtype)
    heads = key.shape[1] if key.dim() > 1 else 1
    if layout.packed:
        value = one_hot[:, None].expand(-1, heads, -1)
    else:
        value = one_hot[:, None].expand(-1, heads, -1, -1)
    out = moda_attention(query, key, value, layout=layout, mask=mask, **options)
    assert isinstance(out, Tensor)
    mass = out.transpose(0, 1)[None] if layout.packed else out
    length = query.shape[0] if layout.packed else query.shape[2]
    queries = layout.queries(length, options.get("query_start"), options.get("cu_seqlens_q"))
    return mass.to(compute_dtype(query)), queries


def mean_by_modality(x: Tensor, counted: Tensor, layout: ModalityLayout, queries: QueryRows) -> Tensor:
    """Mean of ``[B or 1, H, Lq, X]`` over the counted queries of each sequence and modality: ``[N, H, M, X]``."""
    n, m = layout.num_sequences, layout.num_modalities
    modality, sequence = queries.of(layout.modality).flatten(), queries.of(layout.sequence, 0).flatten()
    group = torch.where(modality >= 0, sequence * m + modality, n * m).long()
    rows = x.transpose(1, 2).flatten(0, 1)  # [rows, H, X]
    counted = counted.transpose(1, 2).flatten(0, 1)[..., None]
    total = x.new_zeros(n * m + 1, *rows.shape[1:]).index_add_(0, group, torch.where(counted, rows, 0))
    count = x.new_zeros(n * m + 1, counted.shape[1], 1).index_add_(0, group, counted.to(x.dtype))
    mean: Tensor = (total / count)[:-1].unflatten(0, (n, m))
    return mean.transpose(1, 2)
