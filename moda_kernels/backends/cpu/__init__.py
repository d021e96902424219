"""The CPU backend: a mask made of intervals is a set of rectangles, and ATen's flash kernel runs each of them.

`plan.py` finds the rectangles, `rectangles.py` runs them, `operators.py` shows that to autograd, transforms and
compilers; this file takes a checked call apart. Keys are aligned first (written out once per key head); a pair bias
becomes a few more columns of query and key, so that it neither cuts rectangles nor needs a gradient of its own; pseudo
scores join the softmax sum by their log.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moda_kernels.alignment.maps import align_keys
from moda_kernels.backends.cpu.operators import Places, apply
from moda_kernels.backends.cpu.plan import additive
from moda_kernels.backends.cpu.rectangles import neighbours
from moda_kernels.call import AttentionCall
from moda_kernels.products.twin import compute_dtype
from moda_kernels.runtime.operators import are_plain
from moda_kernels.tokens.intervals import mask_intervals, passes_of

_OPERATORS = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class CpuBackend:
    name = "cpu"

    def serves(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def why_absent(self) -> list[str]:
        missing = [name for name in _OPERATORS if not hasattr(torch.ops.aten, name)]
        return [f"torch {torch.__version__} has no operator aten::{name}" for name in missing]

    def why_not(self, call: AttentionCall) -> list[str]:
        reasons = []
        if call.query.device.type != "cpu":
            reasons.append(f"it runs on the CPU, the tensors are on {call.query.device}")
        if call.query.dtype not in _DTYPES:
            reasons.append(f"it supports {', '.join(map(str, _DTYPES))}, got {call.query.dtype}")
        if call.attn_mask is not None and call.attn_mask.requires_grad:
            reasons.append("it has no gradient for attn_mask")
        if call.softcap is not None:
            reasons.append("it has no softcap")
        if call.pair_bias is not None and not reasons:
            reasons += _why_not_columns(call.pair_bias, call.scale, call.query.dtype)
        return reasons

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        if not torch.is_autocast_enabled("cpu"):
            return self._attend(call)
        with torch.autocast("cpu", enabled=False):
            return self._attend(call)

    def places(self, call: AttentionCall, known: bool = True) -> list[Places]:
        """Where the rectangles of each softmax of a call lie; made once per layout, shared by all layers.

        Args:
            known: with the rectangles, for which numbers are looked at.
        """
        layout, rows, dtype = call.layout, call.queries, call.query.dtype

        def make() -> list[Places]:
            intervals = mask_intervals(layout, rows, call.mask, call.split)
            made = passes_of(layout, call.mask, call.split)
            branches = [(0, made.second), (made.second, len(made.passes))] if call.split else [(0, made.second)]
            bounds = layout.cu_seqlens, rows.cu_seqlens
            found = [Places(*intervals, *bounds, branch, layout.packed) for branch in branches]
            return [each._replace(plan=each.made(dtype)) for each in found] if known else found

        if not known:
            return make()
        key = ("rectangles", call.mask, call.split, dtype)

        def remembered() -> list[Places]:
            where = (rows.shape, tuple(rows.first_column.tolist()), tuple(rows.cu_seqlens.tolist()))
            return layout.remember((*key, *where), make)

        return rows.remember(key, remembered)

    def _attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        layout, scale = call.layout, call.scale
        q, v = call.query, call.value
        k = call.key if call.key_map is None else align_keys(call.key, call.key_map, layout)
        if layout.packed:
            q, k, v = q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None]
        if scale <= 0:  # ATen's kernel multiplies its own -inf by it: the query is turned instead
            q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
        value_dim = v.shape[-1]
        if call.pair_bias is not None:
            q, k = _with_bias_columns(q, k, call, scale)
        dim = max(q.shape[-1], value_dim)
        if q.shape[-1] < dim:
            q, k = (F.pad(x, (0, dim - x.shape[-1])) for x in (q, k))
        elif value_dim < dim:
            v = F.pad(v, (0, dim - value_dim))
        q, k, v = neighbours(q), neighbours(k), neighbours(v)
        attn_mask = None if call.attn_mask is None else _additive(call.attn_mask, compute_dtype(q))
        # One softmax over keys of the query's modality, and one over those of others; or one over all.
        softmaxes = (True, False) if call.split else (None,)
        extras = [None if call.pseudo is None else call.log_pseudo(same) for same in softmaxes]
        places = self.places(call, are_plain(q, k, v, attn_mask, *extras, layout.modality))
        parts = []
        for extra, where in zip(extras, places, strict=True):
            out, lse = apply(q, k, v, extra, attn_mask, where, scale, call.return_lse)
            # A slice of everything would cost a copy in the backward.
            parts.append((out if value_dim == dim else out[..., :value_dim], lse))
        return call.merged(parts)


def _additive(attn_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B or 1, Hq or 1, Lq or 1, L or 1]``, added to the scores."""
    if attn_mask.dtype == torch.bool:
        attn_mask = additive(attn_mask, dtype)
    return attn_mask.to(dtype)[(None,) * (4 - attn_mask.dim())]


def _column_unit(scale: float, dtype: torch.dtype) -> float:
    """What the bias columns of the keys hold: the power of two next to 1 / scale, of those that a dtype has."""
    most = -round(math.log2(torch.finfo(dtype).tiny))
    return 2.0 ** min(max(-round(math.log2(scale)), -most), most)


def _why_not_columns(pair_bias: Tensor, scale: float, dtype: torch.dtype) -> list[str]:
    """Every reason why `_with_bias_columns` can't write a pair bias."""
    if scale == 0:
        return ["pair_bias needs a scale other than 0"]
    looked_at = are_plain(pair_bias)  # else what is not finite gives NaN
    if looked_at and not bool(torch.isfinite(pair_bias).all()):
        return ["pair_bias must be finite"]
    factor = abs(scale) * _column_unit(abs(scale), dtype)
    if not 2**-8 <= factor <= 2**8:
        return [f"pair_bias in {dtype} needs a scale nearer to 1 than {scale:.3g}"]
    # Rows hold bias / factor; the kernel adds up bias / scale, and half of its range is left to the query's products.
    wide = torch.promote_types(dtype, torch.float32)
    most = min(torch.finfo(dtype).max * factor, torch.finfo(wide).max * min(abs(scale), 1.0)) / 2
    if looked_at and pair_bias.numel() and float(pair_bias.detach().abs().max()) > most:
        return [f"pair_bias in {dtype} with a scale of {scale:.3g} must not be larger than {most:.3g}"]
    return []


def _with_bias_columns(q: Tensor, k: Tensor, call: AttentionCall, scale: float) -> tuple[Tensor, Tensor]:
    """q and k with columns whose product is pair_bias[m(i), m(j)] / scale: one per modality, in low precision three
    (a number as the sum of three roundings keeps 24 bits in bfloat16)."""
    assert call.pair_bias is not None
    layout, queries = call.layout, call.queries
    wide = compute_dtype(q)
    unit = _column_unit(scale, q.dtype)
    modality, sequence = queries.of(layout.modality).clamp(min=0).long(), queries.of(layout.sequence, 0).long()
    one_hot = F.one_hot(layout.modality.clamp(min=0).long(), layout.num_modalities).to(k.dtype) * unit
    if layout.packed:
        modality, sequence, one_hot = modality[None], sequence[None], one_hot[None]
    bias = (call.pair_bias.to(wide) / (scale * unit)).expand(layout.num_sequences, -1, -1, -1)
    rows = bias[sequence, :, modality].transpose(1, 2).expand(-1, call.query_heads, -1, -1)  # [B, Hq, Lq, M]
    parts = []
    for _ in range(1 if q.dtype == wide else 3):
        parts.append(rows.to(q.dtype))
        rows = rows - parts[-1].to(wide)
    keys = one_hot[:, None].expand(-1, k.shape[1], -1, -1)
    return torch.cat((q, *parts), -1), torch.cat((k, *[keys] * len(parts)), -1)
