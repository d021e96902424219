"""Sequence parallelism by heads (DeepSpeed-Ulysses, arXiv 2309.14509): an all-to-all turns shards of the sequence with
all heads into some heads with the whole sequence, plain attention runs, another one turns it back."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from moda_kernels.alignment.aligner import DuplexAligner
from moda_kernels.alignment.causal import CausalMap
from moda_kernels.alignment.maps import KeyMap, ModalityMap, align_keys
from moda_kernels.attention import moda_attention
from moda_kernels.call import AttentionCall
from moda_kernels.distributed.groups import check_same, group_of
from moda_kernels.distributed.maps import ShardMap
from moda_kernels.distributed.plan import count, even_runs
from moda_kernels.runtime import checks, collectives
from moda_kernels.runtime.collectives import Group
from moda_kernels.tokens.layout import ModalityLayout
from moda_kernels.tokens.mask import ModularMask
from moda_kernels.tokens.pseudo import PseudoAttention
from moda_kernels.tokens.segments import as_layout


def ulysses_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: Any,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    layout: ModalityLayout | Tensor,
    mask: ModularMask | None = None,
    key_map: KeyMap | DuplexAligner | None = None,
    pair_bias: Tensor | None = None,
    softcap: float | None = None,
    pseudo: PseudoAttention | None = None,
    duplex: str = "joint",
    branch_weights: tuple[float | Tensor, float | Tensor] | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`moda_kernels.moda_attention` over shards of the sequence, heads inside: exact and differentiable.

    Rank r of R holds one run of columns, the r-th of equal lengths (the first ones one longer where R does not divide:
    what ``ContextParallel(..., balance="none").shard`` gives). Every rank does the same work whatever the mask; R
    has to divide the number of key heads. Moved per layer and rank: (R - 1)/R of its shard of query, key, value and
    output. Parameters' gradients are this rank's shares, as in `ContextParallel`.

    Args:
        query, key, value: this rank's shards ``[B, H, n, D]``, packed ``[n, H, D]``, all heads.
        group: a ``ProcessGroup`` or a ``DeviceMesh`` of one dimension; None: all processes.
        layout: of the whole sequence, the same on all ranks (or modality ids ``[B, L]``). (A checksum is compared once
            for each layout.)
        key_map: a :class:`DuplexAligner`, whose sums are made inside, where the sequence is whole; a map of this rank's
            keys from `ContextParallel.aligner_map`; or one made from all keys, where somebody has them.
        attn_mask, pair_bias, pseudo, branch_weights: of the whole sequence and all heads, the same on every rank.
        The others: as there.

    Returns:
        This rank's rows, all heads; with ``return_lse`` also their lse.

    Raises:
        ValueError, TypeError: as there, before anything is sent; tensors that are no shards; heads that the ranks don't
            divide. RuntimeError: a process has died, or did not take part within the group's timeout.
    """
    members = group_of("group", group)
    size, rank = members.size(), members.rank()
    layout = _same_everywhere(as_layout(layout, None if mask is None else mask.num_roles), members)
    tokens, heads = (0 if layout.packed else 2), 1
    runs = even_runs(layout.modality.shape[-1], size)
    rows = [count(mine) for mine in runs]
    for name, x in (("query", query), ("key", key), ("value", value)):
        checks.float_tensor(name, x)
        axes = "[n, H, D]" if layout.packed else "[B, H, n, D]"
        if x.dim() != len(axes.split(",")) or x.shape[tokens] != rows[rank]:
            expected = f"this rank's shard {axes} with n = {rows[rank]} of the layout's columns"
            raise checks.wrong_value(name, expected, x)
        if x.shape[heads] % size or not x.shape[heads]:
            expected = f"a number of heads that {size} ranks divide (ContextParallel takes any)"
            raise checks.wrong_value(name, expected, f"{x.shape[heads]} heads")
    kinds = ShardMap | DuplexAligner | ModalityMap | CausalMap
    if key_map is not None and not isinstance(key_map, kinds):
        raise checks.wrong_type("key_map", "a DuplexAligner or a KeyMap that one has made", key_map)
    if isinstance(key_map, ModalityMap | CausalMap):
        key_map.check(layout, key.shape[heads], key.shape[-1])
    every = query.shape[heads]
    mine = slice(rank * every // size, (rank + 1) * every // size)
    options: dict[str, Any] = {
        "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa, "layout": layout,
        "mask": mask, "duplex": duplex, "attn_mask": _of_heads(attn_mask, -3, every, mine),
        "pair_bias": _of_heads(pair_bias, 1, every, mine), "pseudo": _pseudo_of_heads(pseudo, every, mine),
        "branch_weights": branch_weights, "softcap": softcap,
    }  # fmt: skip
    if isinstance(branch_weights, tuple | list):
        options["branch_weights"] = tuple(_of_heads(weight, 0, every, mine) for weight in branch_weights)
    probes = [_as_inside(x, layout, size) for x in (query, key, value)]
    AttentionCall.make(probes[0], probes[1], probes[2], **options)
    if isinstance(key_map, ShardMap):
        if key_map.runs != runs or key_map.layout.packed != layout.packed:
            expected = 'a map from ContextParallel(..., balance="none")'
            raise checks.wrong_value("key_map", expected, "one of other shards")
        key = align_keys(key, key_map, key_map.layout)
    q, k, v = (to_heads(x, rows, tokens, members) for x in (query, key, value))
    made = key_map(k, layout) if isinstance(key_map, DuplexAligner) else None
    if isinstance(key_map, ModalityMap | CausalMap):
        every = key.shape[heads]
        made = _map_of_heads(key_map, slice(rank * every // size, (rank + 1) * every // size))
    out, lse = moda_attention(q, k, v, key_map=made, return_lse=True, backend=backend, **options)
    used: list[object] = [q, k, v, attn_mask, pair_bias, *(branch_weights or ())]
    used += [] if pseudo is None else [pseudo.base, pseudo.decay]
    used += [key_map.ratio, key_map.weight] if isinstance(key_map, DuplexAligner) else []
    out, lse = (collectives.attached(x, *used) for x in (out, lse))
    out = to_rows(out, rows, tokens, members)
    if not return_lse:
        return out
    # [B, H, L], packed [H, T]; split: one axis more.
    return out, to_rows(lse, rows, 1 if layout.packed else 2, members, 0 if layout.packed else 1)


def _map_of_heads(key_map: ModalityMap | CausalMap, mine: slice) -> KeyMap:
    """The map of some key heads."""
    if isinstance(key_map, CausalMap):
        return dataclasses.replace(key_map, source=key_map.source[..., mine, :])
    unit = key_map.unit_matrix
    return dataclasses.replace(
        key_map, matrix=key_map.matrix[:, :, mine], unit_matrix=None if unit is None else unit[:, :, mine]
    )


def _as_inside(x: Tensor, layout: ModalityLayout, size: int) -> Tensor:
    """A tensor of the shape, dtype and device that one has inside, for checks."""
    shape = list(x.shape)
    shape[0 if layout.packed else 2], shape[1] = layout.modality.shape[-1], shape[1] // size
    return x.detach().new_zeros(1).expand(shape)


def _same_everywhere(layout: ModalityLayout, group: Group) -> ModalityLayout:
    def check() -> bool:
        check_same("layout", layout, (), group)
        return True

    layout.remember(("the same on all ranks", group.group_name), check)
    return layout


def to_heads(x: Tensor, rows: list[int], tokens: int, group: Group) -> Tensor:
    """This rank's rows of all heads → all rows of this rank's heads (along axis 1)."""
    size = group.size()
    if size == 1:
        return x
    x = x.movedim(tokens, 0)  # [n, …, H, D]; of a batch H is axis 2 then
    axis = 1 if tokens == 0 else 2
    parts = torch.cat(x.chunk(size, axis))  # the rows of the first rank's heads, then the second's, …
    mine = [x.shape[0]] * size
    return collectives.move_rows(parts, rows, mine, group).movedim(0, tokens)


def to_rows(x: Tensor, rows: list[int], tokens: int, group: Group, heads: int = 1) -> Tensor:
    """All rows of this rank's heads → this rank's rows of all heads."""
    size = group.size()
    if size == 1:
        return x
    x = x.movedim((tokens, heads), (0, 1))
    mine = rows[group.rank()]
    moved = collectives.move_rows(x, [mine] * size, rows, group).unflatten(0, (size, mine))
    out: Tensor = moved.movedim(0, 1).flatten(1, 2).movedim((0, 1), (tokens, heads))
    return out


def _of_heads(x: Any, axis: int, every: int, mine: slice) -> Any:
    """Of what is given per query head (or for all), this rank's heads."""
    if not isinstance(x, Tensor) or x.dim() < (-axis if axis < 0 else axis + 1) or x.shape[axis] != every:
        return x
    return x.narrow(axis, mine.start, mine.stop - mine.start)


def _pseudo_of_heads(pseudo: PseudoAttention | None, every: int, mine: slice) -> PseudoAttention | None:
    if not isinstance(pseudo, PseudoAttention):
        return pseudo
    return PseudoAttention(
        _of_heads(pseudo.base, 0, every, mine), _of_heads(pseudo.decay, 0, every, mine), pseudo.length
    )
