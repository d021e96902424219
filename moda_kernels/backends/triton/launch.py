"""Launchers of the attention kernels: from tensors to pointers and strides, outputs allocated, grids set.

A call is described by plain tensors and numbers (operators take nothing else), which `plan.py` names:

    query, key, value   [B, H, L, D] or packed [T, H, D], any strides
    facts               the fields of `Facts`
    walk                the fields of `QueryWalk` or `KeyWalk`
    passes              the numbers of `PassNumbers`
    config              block of queries, block of keys, warps, stages, part of a masked tile
    kept                launches made before with the same facts, walks, passes, configurations and scale, by what else
                        they depend on (see `kinds`); the next layer's call then has its pointers to bring, no more
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moda_kernels.backends.triton import configs
from moda_kernels.backends.triton.kernels.backward_keys import KeyTensors, attention_backward_keys
from moda_kernels.backends.triton.kernels.backward_query import (
    QueryTensors,
    RowTensors,
    attention_backward_query,
    attention_row_sums,
)
from moda_kernels.backends.triton.kernels.forward import ForwardTensors, attention_forward
from moda_kernels.backends.triton.kernels.primitives import Extras
from moda_kernels.backends.triton.plan import Facts, Kept, PassNumbers
from moda_kernels.runtime.lasting import lasting
from moda_kernels.runtime.launch import Ready, float32_dots, padded
from moda_kernels.tokens.walks import KeyWalk, QueryWalk

LOG2E = 1.4426950408889634
#: Offsets within a tile of up to 128 rows are 32 bits wide.
WIDEST_ROW = 2**31 // 128


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
    walk: Sequence[Tensor],
    passes: Sequence[int],
    config: Sequence[int],
    scale: float,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, both parts ([2, …], split only, else empty) and lse (in `forward_outputs`' shapes).

    matrix ``[N, M, Hkv, D, D]`` folds a key map into the query; weights ``[2, Hq]`` makes the attention split; bias is
    ``[N or 1, Hq or 1, M, M]``; base, decay float32 ``[Hq]`` with count int32 ``[branches, rows]`` (-1: endless) add
    pseudo scores; fault int32 ``[1]``, not 0: everything becomes NaN.
    """
    split = weights is not None
    out, parts, lse = forward_outputs(query, value, split)
    if out.numel() == 0 and lse.numel() == 0:
        return out, parts, lse
    q, k, v = rows_contiguous(query), rows_contiguous(key), rows_contiguous(value)
    q, scale = _with_positive_scale(q, scale)
    extras = Extras(bias, as_bytes(attn_mask), weights, base, decay, count, fault, *matrices(matrix, q))
    kind = ("forward", kinds(q, k, v, bias, attn_mask), which(extras), float32_dots())
    kept = {} if kept is None else kept
    if kind not in kept:
        tiles, numbers = QueryWalk(*walk), PassNumbers.read(passes)
        unit = unit_of(q, k, v, out, *([parts] if split else []))
        given = {
            **_given(facts, numbers, q, k, v, bias, attn_mask, unit, scale, split, config),
            **strides("o", out, unit), "s_or": parts.stride(0) // unit if split else 0, **lse_strides("l", lse, q),
            "walk": tiles, "tiles": tiles.tiles.shape[0], "width": tiles.key_lists.shape[1],
        }  # fmt: skip
        grid = (tiles.tiles.shape[0] * q.shape[1],)
        kept[kind] = (_ready(attention_forward, grid, q, given, config),)
    (run,) = kept[kind]
    run(ForwardTensors(q, k, v, out, parts, lse), extras)
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
    query_walk: Sequence[Tensor],
    key_walk: Sequence[Tensor],
    passes: Sequence[int],
    query_config: Sequence[int],
    key_config: Sequence[int],
    scale: float,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; of the bias by tile, float32 ``[P, tiles, Hq, M]``; and by tile,
    float32 ``[tiles, Hq, branches, 3]``, Σ do·o and the gradients of base and decay.

    out: the parts, where split. query_walk: of the kernel that owns query tiles; key_walk: of the one that owns key
    tiles.
    """
    split = weights is not None
    outputs = backward_outputs(
        dout, dlse, out, lse, query, key, value, bias, base, decay, weights, attn_mask, count, facts, query_walk,
        key_walk, passes,
    )  # fmt: skip
    dq, dk, dv, dbias, sums = outputs
    sums.zero_()  # tiles that are not used write nothing
    if bias is not None:
        dbias.zero_()
    if query.numel() == 0 or key.numel() == 0:
        for grad in outputs:
            grad.zero_()
        return outputs
    q, k, v, do = rows_contiguous(query), rows_contiguous(key), rows_contiguous(value), rows_contiguous(dout)
    heads, rows = q.shape[1], count_rows(q)
    row_sums = torch.empty((2, sums.shape[2], heads, rows), dtype=torch.float32, device=q.device)
    norm, delta = row_sums.unbind(0)
    extras = Extras(bias, as_bytes(attn_mask), weights, base, decay, count)
    kind = ("backward", kinds(q, k, v, do, out, lse, dlse, bias, attn_mask), which(extras), float32_dots())
    kept = {} if kept is None else kept
    if kind not in kept:
        tiles, key_tiles, numbers = QueryWalk(*query_walk), KeyWalk(*key_walk), PassNumbers.read(passes)
        of_branch = out[0] if split else out
        unit = unit_of(q, k, v, do, dq, dk, dv, out)
        grid = tiles.tiles.shape[0], heads
        common = functools.partial(_given, facts, numbers, q, k, v, bias, attn_mask, unit, scale, split)
        of_rows = {
            **common(query_config), **strides("o", of_branch, unit), "s_or": out.stride(0) // unit if split else 0,
            **strides("do", do, unit), **strides("dq", dq, unit), **lse_strides("l", lse, q),
            **lse_strides("dl", dlse, q), "s_dlt": dlse.stride(-2 if split else -1),
            "p_row_modality": Facts(*facts).row_modality, "p_tiles": tiles.tiles,
            "walk": tiles, "tiles": tiles.tiles.shape[0], "width": tiles.key_lists.shape[1],
        }  # fmt: skip
        of_keys = {
            **common(key_config), **strides("do", do, unit), **strides("dk", dk, unit), **strides("dv", dv, unit),
            "walk": key_tiles, "tiles": key_tiles.tiles.shape[0], "width": key_tiles.query_lists.shape[1],
            "CHAINS": key_tiles.runs.shape[2] // 4 - 1,
        }  # fmt: skip
        kept[kind] = (
            Ready(attention_row_sums, grid, q.device, ("tensors", "extras"), of_rows, **vars(configs.ROW_SUMS)),
            _ready(attention_backward_query, (grid[0] * heads,), q, of_rows, query_config),
            _ready(attention_backward_keys, (key_tiles.tiles.shape[0] * k.shape[1],), q, of_keys, key_config),
        )
    add_rows, for_queries, for_keys = kept[kind]
    add_rows(RowTensors(out, do, lse, dlse, delta, norm, sums), extras)
    for_queries(QueryTensors(q, k, v, do, dq, dbias, delta, norm), extras)
    for_keys(KeyTensors(q, k, v, do, dk, dv, row_sums), extras)
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
    query_walk: Sequence[Tensor],
    key_walk: Sequence[Tensor],
    passes: Sequence[int],
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for what `backward` returns, in the memory order of the inputs."""
    heads, tiles, numbers = query.shape[1], QueryWalk(*query_walk).tiles.shape[0], PassNumbers.read(passes)
    new = functools.partial(torch.empty, dtype=torch.float32, device=query.device)
    sums = new((tiles, heads, 1 if weights is None else 2, 3))
    dbias = new((0 if bias is None else numbers.passes, tiles, heads, numbers.modalities))
    dq, dk, dv = (_new(x, x.shape[-1]) for x in (query, key, value))
    return dq, dk, dv, dbias, sums


@functools.lru_cache(maxsize=256)
@lasting
def on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """A small table, written once; by fills, because a copy to a device would wait."""
    table = torch.zeros(max(len(numbers), 1), dtype=torch.int32, device=device)
    for i, number in enumerate(numbers):
        table[i : i + 1].fill_(number)
    return table


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


def rows_contiguous(x: Tensor) -> Tensor:
    """With a contiguous last axis, and rows no farther apart than kernels can count."""
    row = x.stride(0) if x.dim() == 3 else x.stride(2)
    return x if x.stride(-1) == 1 and row < WIDEST_ROW else x.contiguous()


def _with_positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """The forward's largest score has to be the largest product too; a scale of 0 or less turns the query instead."""
    if scale > 0:
        return query, scale
    return (-query, -scale) if scale < 0 else (query * 0, 1.0)


def matrices(matrix: Tensor | None, query: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The key map's matrices in the query's dtype, and what that rounding left over."""
    if matrix is None or query.dtype == torch.float32:
        return None if matrix is None else matrix.contiguous(), None
    rounded = matrix.to(query.dtype).contiguous()
    return rounded, (matrix - rounded).to(query.dtype).contiguous()


def length_of(x: Tensor) -> int:
    """Rows from one sequence to the next; 0 where they are packed in one matrix."""
    return 0 if x.dim() == 3 else x.shape[2]


def count_rows(x: Tensor) -> int:
    return x.shape[0] if x.dim() == 3 else x.shape[0] * x.shape[2]


def unit_of(*tensors: Tensor) -> int:
    """8 where rows of all tensors begin at multiples of 8 elements, so that kernels may load them in wide pieces."""
    steps = (s for x in tensors for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1)
    return 8 if all(s % 8 == 0 for s in steps) else 1


def strides(name: str, x: Tensor, unit: int) -> dict[str, int]:
    """Of batch, head and token, in units."""
    b, h, t = (0, x.stride(1), x.stride(0)) if x.dim() == 3 else x.stride()[:3]
    return {f"s_{name}b": b // unit, f"s_{name}h": h // unit, f"s_{name}t": t // unit}


def lse_strides(name: str, lse: Tensor, query: Tensor) -> dict[str, int]:
    """Of batch, head and branch of lse or its gradient."""
    packed = query.dim() == 3
    b, h = (0, lse.stride(0)) if packed else lse.stride()[:2]
    r = lse.stride(-1) if lse.dim() > (2 if packed else 3) else 0
    return {f"s_{name}b": b, f"s_{name}h": h, f"s_{name}r": r}


def bias_strides(bias: Tensor | None) -> dict[str, int]:
    """Of batch, head, the query's and the key's modality."""
    of = (
        (0, 0, 0, 0)
        if bias is None
        else tuple(0 if n == 1 else s for n, s in zip(bias.shape, bias.stride(), strict=True))
    )
    return dict(zip(("s_bb", "s_bh", "s_bq", "s_bk"), of, strict=True))


def as_bytes(attn_mask: Tensor | None) -> Tensor | None:
    """attn_mask as kernels load it."""
    return attn_mask.view(torch.uint8) if attn_mask is not None and attn_mask.dtype == torch.bool else attn_mask


def mask_numbers(attn_mask: Tensor | None, query: Tensor, key: Tensor) -> dict[str, int]:
    """Kind of attn_mask (0: none, 1: bool, 2: float), and its strides, 0 where it broadcasts."""
    kind, of = 0, (0, 0, 0, 0)
    if attn_mask is not None:
        kind = 1 if attn_mask.dtype == torch.bool else 2
        b, h, q, k = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2]).stride()
        of = b, h, q, k
    return dict(zip(("MASK", "s_mb", "s_mh", "s_mq", "s_mk"), (kind, *of), strict=True))


def kinds(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Of each tensor all that a launch has to know but where it lies."""
    return tuple([None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors])


def which(extras: Extras) -> tuple[bool, ...]:
    """Which of them there are."""
    return tuple([x is not None for x in extras])


def _given(
    facts: Sequence[Tensor],
    numbers: PassNumbers,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    unit: int,
    scale: float,
    split: bool,
    config: Sequence[int],
) -> dict[str, Any]:
    """The arguments of the forward and of both kernels of the backward that have the same names in all of them."""
    of, (block_q, block_k, _, _, part) = Facts(*facts), config
    return {
        "facts": of, "p_modalities": on_device(numbers.of_pass, query.device),
        **strides("q", query, unit), **strides("k", key, unit), **strides("v", value, unit),
        **bias_strides(bias), **mask_numbers(attn_mask, query, key), "scale": scale * LOG2E,
        "query_heads": query.shape[1], "query_length": length_of(query), "key_length": length_of(key),
        "modalities": numbers.modalities, "first_passes": numbers.second, "passes": numbers.passes,
        "all_rows": of.row_modality.shape[0], "all_keys": of.key_modality.shape[0],
        "FIRST_PASSES": 0 if numbers.many else numbers.second, "PASSES": 0 if numbers.many else numbers.passes,
        "INTERVALS": numbers.intervals, "AFFINE": numbers.affine, "SPLIT": split, "PRECISION": float32_dots(),
        "D": query.shape[-1], "BLOCK_D": padded(query.shape[-1]), "E": value.shape[-1],
        "BLOCK_E": padded(value.shape[-1]), "UNIT": unit, "GROUP": query.shape[1] // key.shape[1],
        "BLOCK_Q": block_q, "BLOCK_K": block_k, "PART": part,
    }  # fmt: skip


def _ready(kernel: Any, grid: tuple[int, ...], query: Tensor, given: dict[str, Any], config: Sequence[int]) -> Ready:
    _, _, warps, stages, _ = config
    return Ready(kernel, grid, query.device, ("tensors", "extras"), given, num_warps=warps, num_stages=stages)
