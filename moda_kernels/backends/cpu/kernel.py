"""ATen's flash kernel for the CPU, as it is called: rows of queries in the shape in which it is fast.

It takes every query head by itself, in tiles of rows that are larger where there are more rows. Few rows are a pass
over the keys, and the heads of a group would read the same keys one after the other: they are made rows of one head,
which read them once. (Measured on an AMD EPYC with AVX-512, D = 64, four heads to a group, one row: 1.3 to 1.9 times as
fast in float32, 7 times in bfloat16, 3 times in float16.) With 64 to 767 rows that makes the tiles larger: against
2,048 keys 1.04 to 1.1 times as fast in float32 and in bfloat16, and 1.25 to 1.3 times in bfloat16's backward.
Where there are fewer heads than cores, keys are split among them, and the parts merged by lse.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: Rows that are few.
FEW_ROWS = 8
#: Keys of a part are at least so many; with fewer of them masks written out for a group take longer than its keys (and
#: with a fourth of them queries do).
LEAST_KEYS = 1024
#: ATen's tiles: their rows, by the least rows of a head that have them.
_TILES = ((768, 256), (192, 64), (0, 32))


def forward(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, attn_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and lse (0 in a row without a visible key), in whatever strides.

    Args:
        query: ``[B, Hq, Lq, D]``, key and value ``[B, Hkv, L, D]``.
        attn_mask: additive, ``[Lq, L]`` or ``[B or 1, Hq or 1, Lq, L]``; or None.
    """
    rows, keys, heads, key_heads = query.shape[2], key.shape[2], query.shape[1], key.shape[1]
    group, narrow = heads // key_heads, query.dtype.itemsize == 2
    if causal or 0 in (rows, keys):
        return _kernel(query, key, value, causal, attn_mask, scale)
    run = _few if rows <= FEW_ROWS else _many
    if run is _few:
        # (The mask of one row is not written out.)
        saved = query.shape[0] * (heads - key_heads) * keys if rows == 1 else 0
        together = narrow or saved >= 2 * LEAST_KEYS or keys >= LEAST_KEYS // (4 if attn_mask is None else 1)
    else:  # rows are written out anew for it, once and back
        together = attn_mask is None and keys >= LEAST_KEYS and _larger_tiles(query.shape, key_heads)
    if group == 1 or not together:
        return run(query, key, value, attn_mask, scale)
    if attn_mask is not None:
        attn_mask = _grouped_mask(attn_mask, key_heads, group)
    out, lse = run(_grouped(query, key_heads), key, value, attn_mask, scale)
    return _apart(out, group), _apart(lse, group)


def backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    attn_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, from those of the output; else as `forward`."""
    operator = _operator("_scaled_dot_product_flash_attention_for_cpu_backward")
    batch, heads, rows, _ = query.shape
    key_heads, keys = key.shape[1:3]
    group = heads // key_heads
    result: tuple[Tensor, Tensor, Tensor]
    # In float32 larger tiles are worth nothing here. Its threads take whole heads.
    if (
        (group == 1 or causal or query.dtype.itemsize > 2 or 0 in (rows, keys) or rows >= _TILES[0][0])
        or (attn_mask is not None and keys > LEAST_KEYS)
        or _rounds(batch * key_heads) * group > _rounds(batch * heads)
    ):
        result = operator(dout, query, key, value, out, lse, 0.0, causal, attn_mask=attn_mask, scale=scale)
        return result
    if attn_mask is not None:
        attn_mask = _grouped_mask(attn_mask, key_heads, group)
    dout, query, out, lse = (_grouped(x, key_heads) for x in (dout, query, out, lse))
    result = operator(dout, query, key, value, out, lse, 0.0, False, attn_mask=attn_mask, scale=scale)
    return _apart(result[0], group), *result[1:]


@functools.cache
def _operator(name: str) -> Any:
    """Looked up late: a torch that doesn't have it must still import this package."""
    return getattr(torch.ops.aten, name).default


def _many(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return _kernel(query, key, value, False, attn_mask, scale)


def _grouped(x: Tensor, key_heads: int) -> Tensor:
    """The heads of a group as rows of one, one head after the other."""
    batch, heads, rows, *dim = x.shape
    return x.reshape(batch, key_heads, heads // key_heads * rows, *dim)


def _apart(x: Tensor, group: int) -> Tensor:
    """The reverse."""
    batch, key_heads, rows, *dim = x.shape
    return x.reshape(batch, key_heads * group, rows // group, *dim)


def _larger_tiles(shape: Sequence[int], key_heads: int) -> bool:
    """Whether tiles are larger with the heads of a group as rows of one, and threads have as much to do as before."""
    batch, heads, rows, _ = shape
    found = []
    for count, of_head in ((batch * heads, rows), (batch * key_heads, heads // key_heads * rows)):
        tile = next(tile for least, tile in _TILES if of_head >= least)
        found.append((tile, tile * _rounds(count * -(-of_head // tile))))
    return found[1][0] > found[0][0] and found[1][1] <= found[0][1]


def _rounds(tasks: int) -> int:
    """Tasks of the thread that has most of them."""
    return -(-tasks // torch.get_num_threads())


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, attn_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    operator = _operator("_scaled_dot_product_flash_attention_for_cpu")
    result: tuple[Tensor, Tensor] = operator(query, key, value, 0.0, causal, attn_mask=attn_mask, scale=scale)
    return result


def _grouped_mask(attn_mask: Tensor, key_heads: int, group: int) -> Tensor:
    """For heads that are rows: of a group, one head after the other."""
    if attn_mask.dim() < 4 or attn_mask.shape[1] == 1:
        one = attn_mask.shape[-2] == 1
        return attn_mask.expand(*attn_mask.shape[:-2], group, -1) if one else _again(attn_mask, group)
    return _grouped(attn_mask, key_heads)


def _again(x: Tensor, times: int) -> Tensor:
    """The rows of a mask (or of queries), all of them, so many times."""
    return torch.cat([x] * times, -2)


def _few(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    parts = _parts(query, key, value)
    if parts > 1:
        return _in_parts(query, key, value, attn_mask, scale, parts)
    if query.dtype.itemsize > 2 or query.shape[2] > 1:
        return _kernel(query, key, value, False, attn_mask, scale)
    # A product of one row alone is slower in 16 bits than that of two.
    mask = None if attn_mask is None else _again(attn_mask, 2)
    out, lse = _kernel(_again(query, 2), key, value, False, mask, scale)
    return out[:, :, :1], lse[:, :, :1]


def _parts(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Among how many the keys are split."""
    if query.shape[0] > 1:  # parts of several sequences would have to be copied together
        return 1
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return 1  # lse has no gradient in autograd's eyes
    return max(1, min(torch.get_num_threads() // query.shape[1], key.shape[2] // LEAST_KEYS))


def _in_parts(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float, parts: int
) -> tuple[Tensor, Tensor]:
    """Of one sequence: equal parts of the keys as a batch; what is left over goes with a call of its own."""
    size = key.shape[2] // parts
    cuts = [(parts, slice(parts * size)), (1, slice(parts * size, None))]
    outs, sums = [], []
    for count, cut in cuts:
        k, v = key[:, :, cut], value[:, :, cut]
        if k.shape[2] == 0:
            continue
        k, v = (x[0].unflatten(1, (count, -1)).transpose(0, 1) for x in (k, v))  # [parts, Hkv, size, D]
        mask = None
        if attn_mask is not None:
            mask = attn_mask[(None,) * (4 - attn_mask.dim())][0, ..., cut]
            mask = mask.unflatten(-1, (count, -1)).permute(2, 0, 1, 3)
        out, lse = _kernel(query.expand(count, -1, -1, -1), k, v, False, mask, scale)
        if mask is not None:
            lse = lse.masked_fill(torch.isneginf(mask).all(-1), -math.inf)
        outs.append(out)
        sums.append(lse)
    out, lse = torch.cat(outs), torch.cat(sums)
    total = lse.logsumexp(0, keepdim=True)
    weight = torch.exp(lse - torch.where(torch.isneginf(total), 0, total))
    merged = (out.to(lse.dtype) * weight[..., None]).sum(0, keepdim=True).to(query.dtype)
    return merged, torch.where(torch.isneginf(total), 0, total)
