"""Attention over rectangles of scores: ATen's flash kernel for each, merged by lse, forward and backward.

The gradient over a rectangle needs only the final output and lse of its rows (spec: "Identities worth using"), so the
backward is one ATen call per rectangle too, and nothing of size rows × keys is kept.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moda_kernels.backends.cpu import kernel, routes
from moda_kernels.backends.cpu.plan import Block, Job, OneCall, Plan, Span, additive, size_of
from moda_kernels.products.twin import compute_dtype


def neighbours(x: Tensor) -> Tensor:
    """With the numbers of a row side by side in memory: ATen's kernel takes that for granted, whatever the stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extra: Tensor | None,
    attn_mask: Tensor | None,
    plan: Plan,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out ``[B, Hq, Lq, D]`` (`rows_first`) and lse ``[B, Hq, Lq]`` of the rectangles of a plan.

    Args:
        query: ``[B, Hq, Lq, D]``, key and value ``[B, Hkv, L, D]``, one dtype, value size = key size; `neighbours`.
        extra: log of what each row's softmax sum gets besides its keys, ``[B, Hq, Lq]`` in lse's dtype; or None.
        attn_mask: additive, ``[B or 1, Hq or 1, Lq or 1, L or 1]`` in lse's dtype, without gradient; or None.
        plan: the rectangles; rows in none of them get output 0. scale: τ⁻¹.
    """
    if routes.widens(query.dtype, False, plan.rows):
        out, lse = attend(query.float(), key.float(), value.float(), extra, attn_mask, plan, scale)
        return out.to(query.dtype), lse
    if extra is None and attn_mask is None and plan.one is not None:
        out, lse = attend_at_once(query, key, value, plan.one, scale)
        # What isn't finite in a hidden key makes NaN of all rows that it is hidden from.
        if not plan.one.padding or math.isfinite(float(out.sum(dtype=lse.dtype))):
            return out, lse.contiguous()
    rows = [_split(t, plan, 0) for t in (query, extra)]
    keys = [_split(t, plan, 1) for t in (key, value)]
    parts = [
        _attend(q, k, v, x, given, job, scale)
        for job, q, x, k, v, given in zip(plan.jobs, *rows, *keys, _split_mask(attn_mask, plan), strict=True)
    ]
    if not parts:
        parts = [_nothing(query, extra)]
    return _joined([out for out, _ in parts], plan), torch.cat([lse for _, lse in parts], plan.axis)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extra: Tensor | None,
    attn_mask: Tensor | None,
    job: Job,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As `attend`, of one job, with its own part of each tensor."""
    query, key, value = (_documents(t, job.documents) for t in (query, key, value))
    wide = compute_dtype(query)
    if job.whole is not None and extra is None and attn_mask is None:
        out, lse = kernel.forward(query, key, value, job.whole.causal, job.whole.additive(wide), scale)
        return _side_by_side(out, job.documents), _side_by_side(lse, job.documents)
    out, lse = _nothing(query, None if extra is None else _documents(extra, job.documents))
    for region in job.regions:
        q = _take(query, region.rows)
        parts = []
        for block in region.blocks:
            mask, hidden = _additive(block, attn_mask, wide)
            part_out, part_lse = kernel.forward(
                q, _take(key, block.keys), _take(value, block.keys), block.causal and mask is None, mask, scale
            )
            # A row without a visible key comes with lse 0.
            parts.append((part_out, part_lse if hidden is None else part_lse.masked_fill(hidden, -math.inf)))
        _merge_into(out, lse, region.rows, parts, extra is not None)
    return _side_by_side(out, job.documents), _side_by_side(lse, job.documents)


def _nothing(query: Tensor, extra: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and lse where no key is seen."""
    out = rows_first(query, query.dtype).zero_()
    if extra is not None:
        return out, extra.clone(memory_format=torch.contiguous_format)
    return out, torch.full(query.shape[:3], -math.inf, dtype=compute_dtype(query), device=query.device)


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extra: Tensor | None,
    attn_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    plan: Plan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Those of query, key, value (`rows_first`) and extra (without one, of no meaning), given those of the results of
    `attend` (dlse: None for 0)."""
    if routes.widens(query.dtype, True, plan.rows):
        q, k, v, o, do = (x.float() for x in (query, key, value, out, dout))
        dq, dk, dv, dextra = gradients(q, k, v, extra, attn_mask, o, lse, do, dlse, plan, scale)
        return dq.to(query.dtype), dk.to(query.dtype), dv.to(query.dtype), dextra
    wide = lse.dtype
    dextra = lse.new_zeros(())
    if extra is not None:
        # d extra = (P / Z) (dlse - rowsum(out · dout))
        change = -(out.to(wide) * dout.to(wide)).sum(-1)
        change = change if dlse is None else change + dlse
        dextra = torch.exp(extra - torch.where(torch.isneginf(lse), 0, lse)) * change
    dim, dout = query.shape[-1], neighbours(dout)
    if dlse is not None:
        # ATen takes delta = rowsum(out · dout); a gradient of lse is to be taken off it. One more value column
        # that is 0 in every key, -dlse in out and 1 in dout does that.
        query, key, value = (F.pad(t, (0, 1)) for t in (query, key, value))
        out = torch.cat((out, -dlse[..., None].to(out.dtype)), -1)
        dout = torch.cat((dout, torch.ones_like(dout[..., :1])), -1)
    one = plan.one
    if attn_mask is None and one is not None and one.keys is None and not one.padding:  # all see something
        do, q, k, v, o, s = (_documents(t, one.documents) for t in (dout, query, key, value, out, lse))
        grads = kernel.backward(do, q, k, v, o, s, one.causal, one.mask, scale)
        dquery, dkey, dvalue = (_side_by_side(t, one.documents) for t in grads)
        if dlse is not None:
            dquery, dkey, dvalue = dquery[..., :dim], dkey[..., :dim], dvalue[..., :dim]
        return dquery, dkey, dvalue, dextra
    rows = [_split(t, plan, 0) for t in (query, out, lse, dout)]
    keys = [_split(t, plan, 1) for t in (key, value)]
    parts = [
        _gradients(q, k, v, given, o, s, do, job, scale)
        for job, q, o, s, do, k, v, given in zip(plan.jobs, *rows, *keys, _split_mask(attn_mask, plan), strict=True)
    ]
    if not parts:
        parts = [tuple(torch.zeros_like(t) for t in (query, key, value))]
    dquery, dkey, dvalue = (_joined([part[i] for part in parts], plan) for i in range(3))
    if dlse is not None:
        dquery, dkey, dvalue = dquery[..., :dim], dkey[..., :dim], dvalue[..., :dim]
    return dquery, dkey, dvalue, dextra


def _gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    job: Job,
    scale: float,
) -> tuple[Tensor, ...]:
    """Those of query, key and value, of one job, with its own part of each tensor."""
    query, key, value, out, lse, dout = (_documents(t, job.documents) for t in (query, key, value, out, lse, dout))
    wide, whole = compute_dtype(query), job.whole
    if whole is not None and attn_mask is None:
        grads: tuple[Tensor, ...] = kernel.backward(
            dout, query, key, value, out, lse, whole.causal, whole.additive(wide), scale
        )
        return tuple(_side_by_side(t, job.documents) for t in grads)
    # exp(score - lse) is then 0 in rows that see nothing.
    lse = torch.where(torch.isneginf(lse), math.inf, lse)
    dquery = rows_first(query, query.dtype).zero_()
    dkey, dvalue = (rows_first(t, wide).zero_() for t in (key, value))
    for region in job.regions:
        q, o, s, do = (_take(t, region.rows) for t in (query, out, lse, dout))
        total = None
        for block in region.blocks:
            mask, _ = _additive(block, attn_mask, wide)
            k, v = _take(key, block.keys), _take(value, block.keys)
            grads = kernel.backward(do, q, k, v, o, s, block.causal and mask is None, mask, scale)
            total = grads[0] if total is None else total.to(wide) + grads[0]
            _add(dkey, block.keys, grads[1])
            _add(dvalue, block.keys, grads[2])
        assert total is not None
        _put(dquery, region.rows, total)
    return tuple(_side_by_side(t.to(query.dtype), job.documents) for t in (dquery, dkey, dvalue))


def _split(x: Tensor | None, plan: Plan, side: int) -> Sequence[Any]:
    """What each job has of queries (side 0) or of keys (1)."""
    if x is None or len(plan.jobs) == 1:
        return [x] * len(plan.jobs)
    return x.split(plan.sizes[side], plan.axis)  # type: ignore[no-any-return]


def _split_mask(attn_mask: Tensor | None, plan: Plan) -> Sequence[Any]:
    """(Packed documents have none.)"""
    shared = attn_mask is None or attn_mask.shape[0] == 1
    return [attn_mask] * len(plan.jobs) if shared else _split(attn_mask, plan, 0)


def _joined(parts: list[Tensor], plan: Plan) -> Tensor:
    """The reverse of `_split`, `rows_first`."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.transpose(1, 2) for part in parts], plan.axis // 2).transpose(1, 2)


def rows_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor ``[B, H, L, D]`` like x in which the heads of a token lie side by side, as ATen's results have
    it, and models want it."""
    batch, heads, length, dim = x.shape
    return x.new_empty(batch, length, heads, dim, dtype=dtype).transpose(1, 2)


def attend_at_once(query: Tensor, key: Tensor, value: Tensor, one: OneCall, scale: float) -> tuple[Tensor, Tensor]:
    """As `attend`, by one call of ATen's kernel, which autograd knows (but for lse); lse has ATen's strides."""
    if one.keys is not None:
        key, value = _take(key, one.keys), _take(value, one.keys)
    if one.documents > 1:
        query, key, value = (_documents(t, one.documents) for t in (query, key, value))
    out, lse = kernel.forward(query, key, value, one.causal, one.mask, scale)
    if one.documents > 1:
        return _side_by_side(out, one.documents), _side_by_side(lse, one.documents)
    return out, lse


def _documents(x: Tensor, count: int) -> Tensor:
    return x if count == 1 else x[0].unflatten(1, (count, -1)).transpose(0, 1)


def _side_by_side(x: Tensor, count: int) -> Tensor:
    """The reverse: ``[documents, H, L, …]`` as ``[1, H, documents · L, …]``."""
    return x if count == 1 else x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]


def _merge_into(out: Tensor, lse: Tensor, rows: Span, parts: list[tuple[Tensor, Tensor]], has_extra: bool) -> None:
    """Write the rows of a region: results over disjoint keys, weighed by exp(lse - total)."""
    if len(parts) == 1 and not has_extra:
        _put(out, rows, parts[0][0])
        _put(lse, rows, parts[0][1])
        return
    sums = [s for _, s in parts]
    if has_extra:
        sums.append(_take(lse, rows))
    peak = sums[0]
    for s in sums[1:]:
        peak = torch.maximum(peak, s)
    peak = torch.where(torch.isneginf(peak), 0, peak)
    weights = [torch.exp(s - peak) for s in sums]
    total = weights[0].clone()
    for w in weights[1:]:
        total += w
    share = torch.where(total > 0, total, 1).reciprocal()
    merged = parts[0][0].to(lse.dtype) * (weights[0] * share)[..., None]
    for (o, _), w in zip(parts[1:], weights[1:], strict=False):
        merged.addcmul_(o.to(lse.dtype), (w * share)[..., None])
    _put(out, rows, merged)
    _put(lse, rows, peak + torch.log(total))


def _additive(block: Block, attn_mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """The block's mask as ATen takes it, and which rows it hides wholly (None: none)."""
    if attn_mask is None:
        return block.additive(dtype), block.hidden
    rows, keys = size_of(block.rows), size_of(block.keys)
    mask = block.additive(dtype)
    if block.causal:
        mask = additive(torch.ones(rows, rows, dtype=torch.bool, device="cpu").tril(), dtype)
    given = attn_mask if attn_mask.shape[2] == 1 else _take(attn_mask, block.rows)
    given = given if given.shape[3] == 1 else _take(given.transpose(2, 3), block.keys).transpose(2, 3)
    mask = given if mask is None else given + mask
    mask = mask.expand(*mask.shape[:2], rows, keys)
    hidden = torch.isneginf(mask).all(-1)
    return mask, hidden if bool(hidden.any()) else None


def _take(x: Tensor, span: Span) -> Tensor:
    """Rows of axis 2."""
    return x[:, :, span] if isinstance(span, slice) else x.index_select(2, span)


def _put(x: Tensor, span: Span, rows: Tensor) -> None:
    if isinstance(span, slice):
        x[:, :, span] = rows
    else:
        x.index_copy_(2, span, rows.to(x.dtype))


def _add(x: Tensor, span: Span, rows: Tensor) -> None:
    if isinstance(span, slice):
        x[:, :, span] += rows
    else:
        x.index_add_(2, span, rows.to(x.dtype))
