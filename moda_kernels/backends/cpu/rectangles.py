"""Attention over rectangles of scores: ATen's flash kernel for each, merged by lse, forward and backward.

The gradient over a rectangle needs only the final output and lse of its rows (spec: "Identities worth using"), so the
backward is one ATen call per rectangle too, and nothing of size rows × keys is kept.
"""

import math

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
        out, lse = attend(query.float(), key.float(), value.float(), extra, attn_mask, _wide(plan), scale)
        return out.to(query.dtype), lse
    if extra is None and attn_mask is None and plan.one is not None:
        out, lse = attend_at_once(query, key, value, plan.one, scale)
        return out, lse.contiguous()
    out = rows_first(query, query.dtype).zero_()
    if extra is None:
        lse = torch.full(query.shape[:3], -math.inf, dtype=compute_dtype(query), device=query.device)
    else:
        lse = extra.clone(memory_format=torch.contiguous_format)
    for job in plan.jobs:
        q, o, s = (_rows(t, job) for t in (query, out, lse))
        k, v = (_keys(t, job) for t in (key, value))
        given = _job_mask(attn_mask, job)
        for region in job.regions:
            q_rows = _take(q, region.rows)
            parts = []
            for block in region.blocks:
                mask, hidden = _additive(block, given, query.dtype)
                part_out, part_lse = kernel.forward(
                    q_rows, _take(k, block.keys), _take(v, block.keys), block.causal and mask is None, mask, scale
                )
                # A row without a visible key comes with lse 0.
                parts.append((part_out, part_lse if hidden is None else part_lse.masked_fill(hidden, -math.inf)))
            _merge_into(o, s, region.rows, parts, extra is not None)
    return out, lse


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
        dq, dk, dv, dextra = gradients(q, k, v, extra, attn_mask, o, lse, do, dlse, _wide(plan), scale)
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
    if attn_mask is None and one is not None and one.keys is None:  # all see something
        together = [_documents(t, one.documents) for t in (dout, query, key, value, out, lse)]
        grads = kernel.backward(*together, one.causal, one.mask, scale)
        dquery, dkey, dvalue = (_side_by_side(t, one.documents) for t in grads)
        if dlse is not None:
            dquery, dkey, dvalue = dquery[..., :dim], dkey[..., :dim], dvalue[..., :dim]
        return dquery, dkey, dvalue, dextra
    # exp(score - lse) is then 0 in rows that see nothing.
    lse = torch.where(torch.isneginf(lse), math.inf, lse)
    dquery = rows_first(query, query.dtype).zero_()
    dkey, dvalue = (rows_first(t, wide).zero_() for t in (key, value))
    for job in plan.jobs:
        of_rows = [_rows(t, job) for t in (query, out, dout, lse, dquery)]
        k, v, dk, dv = (_keys(t, job) for t in (key, value, dkey, dvalue))
        given = _job_mask(attn_mask, job)
        for region in job.regions:
            q, o, do, s = (_take(t, region.rows) for t in of_rows[:4])
            total = None
            for block in region.blocks:
                mask, _ = _additive(block, given, query.dtype)
                grads = kernel.backward(
                    do,
                    q,
                    _take(k, block.keys),
                    _take(v, block.keys),
                    o,
                    s,
                    block.causal and mask is None,
                    mask,
                    scale,
                )
                total = grads[0] if total is None else total.to(wide) + grads[0]
                _add(dk, block.keys, grads[1])
                _add(dv, block.keys, grads[2])
            assert total is not None
            _put(of_rows[4], region.rows, total)
    narrow = [t[..., :dim].to(query.dtype) for t in (dquery, dkey, dvalue)]
    return narrow[0], narrow[1], narrow[2], dextra


def _wide(plan: Plan) -> Plan:
    """For numbers made float32."""
    if plan.one is None or plan.one.mask is None:
        return plan
    return plan._replace(one=plan.one._replace(mask=plan.one.mask.float()))


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


def _rows(x: Tensor, job: Job) -> Tensor:
    """A view of a job's queries, ``[batch, heads, rows, …]``."""
    return _documents(x[job.batch, :, job.queries], job.documents)


def _keys(x: Tensor, job: Job) -> Tensor:
    """A view of a job's keys."""
    return _documents(x[job.batch, :, job.keys], job.documents)


def _documents(x: Tensor, count: int) -> Tensor:
    return x if count == 1 else x[0].unflatten(1, (count, -1)).transpose(0, 1)


def _side_by_side(x: Tensor, count: int) -> Tensor:
    """The reverse: ``[documents, H, L, …]`` as ``[1, H, documents · L, …]``."""
    return x if count == 1 else x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]


def _job_mask(attn_mask: Tensor | None, job: Job) -> Tensor | None:
    return attn_mask if attn_mask is None or attn_mask.shape[0] == 1 else attn_mask[job.batch]


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
    seen = block.mask
    if seen is None and attn_mask is None:
        return None, None
    rows, keys = size_of(block.rows), size_of(block.keys)
    if seen is None and block.causal:
        seen = torch.ones(rows, rows, dtype=torch.bool, device="cpu").tril()
    mask = None
    if seen is not None:
        # 0 and -inf are numbers of every dtype; what is added to them comes in float32 or float64.
        dtype = dtype if attn_mask is None else attn_mask.dtype
        mask = additive(seen, dtype)
    if attn_mask is None:
        return mask, block.hidden
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
