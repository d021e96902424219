"""Launchers of the attention kernels: from tensors to pointers and strides, outputs allocated, grids set.

A call is described by plain tensors and numbers (operators take nothing else):

    query, key, value   [B, H, L, D] or packed [T, H, D], any strides with a contiguous last axis
    facts               modality of the key tokens; limits, key positions, row modalities (see `launch_intervals.py`);
                        cu_seqlens of keys and of queries (all int32)
    lists               tiles [tiles, 3]; order [tiles], the longest first; lists [passes, tiles, width], columns or
                        rows *within the sequence*, one more than are listed; counts [passes, tiles, 2]: full, all
    passes              modalities M, passes of the first branch, passes P; then P·M rules, P member bits, P modalities
    config              block of queries, block of keys, warps, stages
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moda_kernels.backends.triton.kernels.backward_keys import attention_backward_keys
from moda_kernels.backends.triton.kernels.backward_query import attention_backward_query, attention_row_sums
from moda_kernels.backends.triton.kernels.forward import attention_forward
from moda_kernels.runtime.launch import float32_dots, padded

LOG2E = 1.4426950408889634
#: Up to so many passes are unrolled in the kernels.
UNROLLED = 4


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    matrix: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    decay: Tensor | None,
    weights: Tensor | None,
    attn_mask: Tensor | None,
    count: Tensor | None,
    fault: Tensor | None,
    facts: Sequence[Tensor],
    lists: Sequence[Tensor],
    passes: Sequence[int],
    config: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, both parts ([2, …], split only, else empty) and lse (in `forward_outputs`' shapes).

    matrix ``[N, M, Hkv, D, D]`` folds a key map into the query; weights ``[2, Hq]`` makes the attention split; bias is
    ``[N or 1, Hq or 1, M, M]``; base, decay float32 ``[Hq]`` with count int32 ``[branches, rows]`` (-1: endless) add
    pseudo scores; fault int32 ``[1]``, not 0: everything becomes NaN.
    """
    out, parts, lse = forward_outputs(query, value, weights is not None)
    tiles = lists[0].shape[0]
    if out.numel() == 0 and lse.numel() == 0:
        return out, parts, lse
    q, k, v = (_rows_contiguous(x) for x in (query, key, value))
    q, scale = _with_positive_scale(q, scale)
    heads = q.shape[1]
    attention_forward[(tiles * heads,)](
        p_q=q, p_k=k, p_v=v, p_out=out, p_parts=parts, p_lse=lse,
        **_matrices(matrix, q), p_bias=bias, p_base=base, p_decay=decay, p_weights=weights, p_count=count,
        p_fault=fault, **_facts(facts), **_lists(lists, passes, query.device),
        **_strides("q", q), **_strides("k", k), **_strides("v", v), **_strides("o", out),
        s_pr=parts.stride(0), **_lse_strides("l", lse, q, with_rows=False),
        **_bias_strides(bias), **_mask(attn_mask, q, k), s_cr=_count_rows(q),
        query_heads=heads, group=heads // k.shape[1], query_length=_length(q), key_length=_length(k),
        scale=scale * LOG2E,
        **_blocks(q, v, config), SPLIT=weights is not None, PRECISION=float32_dots(),
    )  # fmt: skip
    return out, parts, lse


def forward_outputs(query: Tensor, value: Tensor, split: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for output, parts and lse: out in the memory order of the query; lse ``[B, Hq, Lq]``, packed ``[Hq, T]``,
    split with a last axis of 2. (Packed: 0 and -inf, see `_new`.)"""
    out = _new(query, value.shape[-1])
    parts = _new(query, value.shape[-1], (2,)) if split else out.new_empty(0)
    packed = query.dim() == 3
    shape = (query.shape[1], query.shape[0]) if packed else tuple(query.shape[:3])
    shape = (2, *shape) if split else shape
    lse = torch.empty(shape, dtype=torch.float32, device=query.device)
    if packed:
        lse.fill_(-math.inf)
    return out, parts, lse.movedim(0, -1) if split else lse


def backward(
    dout: Tensor,
    dlse: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    base: Tensor | None,
    decay: Tensor | None,
    weights: Tensor | None,
    attn_mask: Tensor | None,
    count: Tensor | None,
    facts: Sequence[Tensor],
    query_lists: Sequence[Tensor],
    key_lists: Sequence[Tensor],
    passes: Sequence[int],
    query_config: Sequence[int],
    key_config: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; of the bias by tile, float32 ``[P, tiles, Hq, M]``; and by tile,
    float32 ``[tiles, Hq, branches, 3]``, Σ do·o and the gradients of base and decay.

    out: the parts, where split. query_lists: of the kernel that owns query tiles; key_lists: of the one that owns key
    tiles (lists of query rows).
    """
    split = weights is not None
    outputs = backward_outputs(
        dout, dlse, out, lse, query, key, value, bias, base, decay, weights, attn_mask, count, facts, query_lists,
        key_lists, passes,
    )  # fmt: skip
    dq, dk, dv, dbias, sums = outputs
    dbias.zero_()  # tiles that are not used write nothing
    sums.zero_()
    if query.numel() == 0 or key.numel() == 0:
        for grad in outputs:
            grad.zero_()
        return outputs
    q, k, v, do = (_rows_contiguous(x) for x in (query, key, value, dout))
    heads, key_heads = q.shape[1], k.shape[1]
    rows, tiles = _count_rows(q), query_lists[0].shape[0]
    new = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    delta, limit = new(sums.shape[2], heads, rows), new(sums.shape[2], heads, rows)
    lengths = {"query_length": _length(q), "key_length": _length(k)}

    attention_row_sums[(tiles, heads)](
        p_dout=do, p_out=out, p_dlse=dlse, p_lse=lse, p_base=base, p_decay=decay, p_weights=weights, p_count=count,
        p_row_modality=facts[3], p_tiles=query_lists[0], p_delta=delta, p_limit=limit, p_sums=sums,
        **_strides("d", do), **_strides("o", out[0] if split else out), s_or=out.stride(0) if split else 0,
        **_lse_strides("l", lse, q, with_rows=False), **_lse_strides("g", dlse, q, with_rows=True),
        query_heads=heads, query_length=lengths["query_length"], all_rows=rows,
        E=v.shape[-1], BLOCK_E=padded(v.shape[-1]), BLOCK_Q=query_config[0], SPLIT=split, num_warps=8,
    )  # fmt: skip
    common: dict[str, Any] = {
        "p_q": q, "p_k": k, "p_v": v, "p_dout": do, "p_delta": delta, "p_limit": limit,
        "p_bias": bias, "p_weights": weights, **_facts(facts),
        **_strides("q", q), **_strides("k", k), **_strides("v", v), **_strides("d", do),
        **_bias_strides(bias), **_mask(attn_mask, q, k),
        "query_heads": heads, "group": heads // key_heads, **lengths,
        "scale": scale * LOG2E, "SPLIT": split, "PRECISION": float32_dots(),
    }  # fmt: skip
    attention_backward_query[(tiles * heads,)](
        p_dq=dq, p_dbias=dbias, **_strides("g", dq),
        **_lists(query_lists, passes, q.device), **_blocks(q, v, query_config), **common,
    )  # fmt: skip
    attention_backward_keys[(key_lists[0].shape[0] * key_heads,)](
        p_dk=dk, p_dv=dv, p_modality=facts[0], p_cu_q=facts[5], **_strides("g", dk), **_strides("e", dv),
        **_lists(key_lists, passes, q.device), **_blocks(q, v, key_config), **common,
    )  # fmt: skip
    return outputs


def backward_outputs(
    dout: Tensor,
    dlse: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    base: Tensor | None,
    decay: Tensor | None,
    weights: Tensor | None,
    attn_mask: Tensor | None,
    count: Tensor | None,
    facts: Sequence[Tensor],
    query_lists: Sequence[Tensor],
    key_lists: Sequence[Tensor],
    passes: Sequence[int],
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for what `backward` returns, in the memory order of the inputs."""
    heads, tiles = query.shape[1], query_lists[0].shape[0]
    new = functools.partial(torch.empty, dtype=torch.float32, device=query.device)
    sums = new((tiles, heads, 1 if weights is None else 2, 3))
    dbias = new((0 if bias is None else passes[2], tiles, heads, passes[0]))
    dq, dk, dv = (_new(x, x.shape[-1]) for x in (query, key, value))
    return dq, dk, dv, dbias, sums


def pass_tables(passes: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rules ``[P·M]``, member bits ``[P]`` and modalities ``[P]`` of `passes` on a device."""
    modalities, _, number = passes[:3]
    table = _on_device(tuple(passes[3:]), device)
    return table[: number * modalities], table[number * modalities :][:number], table[number * (modalities + 1) :]


@functools.lru_cache(maxsize=256)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Written once per mask, so that no call waits for a copy."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.int32, device=device)


def _new(like: Tensor, size: int, several: tuple[int, ...] = ()) -> Tensor:
    """Room in the memory order of a tensor, with another last axis. (Packed: zeros, because rows that lie in no
    document are in no tile.)"""
    if like.dim() == 3:
        return torch.zeros((*several, *like.shape[:2], size), dtype=like.dtype, device=like.device)
    batch, heads, length, _ = like.shape
    new = functools.partial(torch.empty, dtype=like.dtype, device=like.device)
    if like.stride(1) < like.stride(2):
        return new((*several, batch, length, heads, size)).transpose(-3, -2)
    return new((*several, batch, heads, length, size))


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _with_positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """The forward's largest score has to be the largest product too; a scale of 0 or less turns the query instead."""
    if scale > 0:
        return query, scale
    return (-query, -scale) if scale < 0 else (query * 0, 1.0)


def _matrices(matrix: Tensor | None, query: Tensor) -> dict[str, Tensor | None]:
    """The key map's matrices in the query's dtype, and what that rounding left over."""
    if matrix is None or query.dtype == torch.float32:
        return {"p_matrix": None if matrix is None else matrix.contiguous(), "p_matrix_rest": None}
    rounded = matrix.to(query.dtype).contiguous()
    return {"p_matrix": rounded, "p_matrix_rest": (matrix - rounded).to(query.dtype).contiguous()}


def _length(x: Tensor) -> int:
    """Rows from one sequence to the next; 0 where they are packed in one matrix."""
    return 0 if x.dim() == 3 else x.shape[2]


def _count_rows(x: Tensor) -> int:
    return x.shape[0] if x.dim() == 3 else x.shape[0] * x.shape[2]


def _strides(name: str, x: Tensor) -> dict[str, int]:
    """Of batch, head and token."""
    b, h, t = (0, x.stride(1), x.stride(0)) if x.dim() == 3 else x.stride()[:3]
    return {f"s_{name}b": b, f"s_{name}h": h, f"s_{name}t": t}


def _lse_strides(name: str, lse: Tensor, query: Tensor, with_rows: bool) -> dict[str, int]:
    """Of branch, batch and head (and row) of lse or its gradient."""
    packed = query.dim() == 3
    b, h, t = (0, *lse.stride()[:2]) if packed else lse.stride()[:3]
    r = lse.stride(-1) if lse.dim() > (2 if packed else 3) else 0
    return {f"s_{name}r": r, f"s_{name}b": b, f"s_{name}h": h, **({f"s_{name}t": t} if with_rows else {})}


def _bias_strides(bias: Tensor | None) -> dict[str, int]:
    strides = (
        (0, 0, 0, 0)
        if bias is None
        else tuple(0 if n == 1 else s for n, s in zip(bias.shape, bias.stride(), strict=True))
    )
    return dict(zip(("s_bn", "s_bh", "s_ba", "s_bb"), strides, strict=True))


def _mask(attn_mask: Tensor | None, query: Tensor, key: Tensor) -> dict[str, Any]:
    """attn_mask broadcast by strides of 0."""
    kind = 0
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if attn_mask is not None:
        kind = 1 if attn_mask.dtype == torch.bool else 2
        attn_mask = attn_mask.view(torch.uint8) if kind == 1 else attn_mask
        strides = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2]).stride()
    return {"p_mask": attn_mask, "MASK": kind, **dict(zip(("s_mb", "s_mh", "s_mq", "s_mk"), strides, strict=True))}


def _facts(facts: Sequence[Tensor]) -> dict[str, Any]:
    _, limits, keys, row_modality, cu_seqlens, _ = facts
    return {
        "p_limits": limits, "p_keys": keys, "p_row_modality": row_modality, "p_cu_k": cu_seqlens,
        "all_rows": limits.shape[2], "all_keys": keys.shape[1],
    }  # fmt: skip


def _lists(lists: Sequence[Tensor], passes: Sequence[int], device: torch.device) -> dict[str, Any]:
    tiles, order, entries, counts = lists
    modalities, first_passes, number = passes[:3]
    _, _, of_pass = pass_tables(passes, device)
    return {
        "p_tiles": tiles, "p_order": order, "p_lists": entries, "p_counts": counts,
        "p_modalities": of_pass,
        "tiles": tiles.shape[0], "width": entries.shape[2], "first_passes": first_passes, "passes": number,
        "modalities": modalities,
        "FIRST_PASSES": first_passes if number <= UNROLLED else 0, "PASSES": number if number <= UNROLLED else 0,
    }  # fmt: skip


def _blocks(query: Tensor, value: Tensor, config: Sequence[int]) -> dict[str, Any]:
    block_q, block_k, warps, stages = config
    return {
        "D": query.shape[-1], "BLOCK_D": padded(query.shape[-1]),
        "E": value.shape[-1], "BLOCK_E": padded(value.shape[-1]),
        "BLOCK_Q": block_q, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip
