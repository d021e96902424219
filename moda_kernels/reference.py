"""MODA attention as the paper and the design's specification say it, in plain PyTorch: the oracle of every backend.

To be read beside the paper (arXiv 2507.04635). Names are those of the package; any device and float dtype; autograd
goes through everything. It writes out all scores, so it takes O(L²) memory; nothing here is clever. `segment_modalities`
and `DuplexAligner` here are slow loops from the definitions, against which the fast ones are tested; masks, pseudo
scores and maps are data, shared with the other backends.
"""

from typing import Any

import torch
from torch import Tensor

from moda_kernels import alignment
from moda_kernels.call import AttentionCall
from moda_kernels.keymap import KeyMap, ModalityMap, compute_dtype
from moda_kernels.layout import ModalityLayout

__all__ = ["DuplexAligner", "align_keys", "moda_attention", "modality_gram", "segment_modalities"]


# Tokens


def segment_modalities(
    modality_ids: Tensor, *, item_ids: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Segment, position and sequence of every token, by a loop over tokens on the host.

    Args:
        modality_ids, item_ids, cu_seqlens: as in :func:`moda_kernels.segment_modalities`.

    Returns:
        Three int32 tensors in the shape of ``modality_ids``.
    """
    ids = modality_ids.flatten().tolist()
    items = [0] * len(ids) if item_ids is None else item_ids.flatten().tolist()
    if cu_seqlens is None:
        rows, length = modality_ids.shape
        bounds = [row * length for row in range(rows + 1)]
    else:
        bounds = cu_seqlens.tolist()
    segment, position, sequence = [-1] * len(ids), [-1] * len(ids), [-1] * len(ids)
    segments = 0
    for n, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        seen, last = 0, None
        for t in range(begin, end):
            sequence[t] = n
            if ids[t] == -1:
                last = None
                continue
            if (ids[t], items[t]) != last:
                segments += 1
            last = (ids[t], items[t])
            segment[t], position[t] = segments - 1, seen
            seen += 1
    shape = modality_ids.shape
    return tuple(torch.tensor(x, dtype=torch.int32).view(shape) for x in (segment, position, sequence))  # type: ignore[return-value]


# Duplex alignment, Eq. 5-6


def modality_gram(x: Tensor, y: Tensor, layout: ModalityLayout, by: str = "modality") -> Tensor:
    """G = Σ x_tᵀ y_t over the tokens of each modality ``[N, M, H, D, E]``, or of each segment ``[S, H, D, E]``."""
    xs, ys = alignment.to_tokens("x", x, layout), alignment.to_tokens("y", y, layout)
    dtype = compute_dtype(xs, ys)
    outer = xs.to(dtype)[..., :, None] * ys.to(dtype)[..., None, :]
    group = layout.groups(by)
    groups = layout.counts.numel() if by == "modality" else layout.max_segments
    gram = torch.stack([outer[group == g].sum(0) for g in range(groups)]) if groups else outer[:0]
    return gram.unflatten(0, tuple(layout.counts.shape)) if by == "modality" else gram


class DuplexAligner(alignment.DuplexAligner):
    """The aligner of the package, its fused keys computed token by token from Eq. 5-6."""

    def fused_keys(self, key: Tensor, layout: ModalityLayout) -> Tensor:
        """k' of every key, in the shape of ``key``.

        For token t of modality m: R = Σ k_jᵀ k_j over the other modalities' tokens j of the sequence (scope "causal":
        those before t), normed; k̂ = k_t R̂; k' = k + ρ ⊙ k̂, or (k + ρ ⊙ k̂) Wᵀ, or [k ; k̂] Wᵀ.
        """
        tokens = alignment.to_tokens("key", key, layout)
        modality, sequence = layout.modality.flatten(), layout.sequence.flatten()
        order = torch.arange(len(tokens), device=key.device)
        fused = []
        for t in range(len(tokens)):
            k, m = tokens[t], int(modality[t])
            other = (modality >= 0) & (modality != m) & (sequence == sequence[t])
            if self.scope == "causal":
                other = other & (order < t)
            if m not in self.aligned or not bool(other.any()):
                fused.append(k)
                continue
            rest = torch.einsum("thd,the->hde", tokens[other], tokens[other])
            size = rest.norm(dim=-1, keepdim=True) if self.norm == "row" else rest.norm(dim=(-2, -1), keepdim=True)
            mapped = torch.einsum("hd,hde->he", k, torch.where(size > 0, rest / size, 0))
            if self.fusion == "concat":
                assert self.weight is not None
                fused.append(torch.cat((k, mapped), -1) @ self.weight[m].T)
                continue
            assert self.ratio is not None
            added = k + self.ratio[m] * mapped
            fused.append(added if self.weight is None else added @ self.weight[m].T)
        return alignment.from_tokens(torch.stack(fused), layout) if fused else key


def align_keys(key: Tensor, key_map: KeyMap, layout: ModalityLayout) -> Tensor:
    """k'_t = k_t A (+ u_t B in the released variant), with the matrix of each token looked up."""
    if not isinstance(key_map, ModalityMap):
        return alignment.align_keys(key, key_map, layout)
    tokens = alignment.to_tokens("key", key, layout)
    k = tokens.to(compute_dtype(tokens, key_map.matrix))
    group = layout.groups("modality")
    mapped = (group >= 0) & key_map.mapped.flatten()[group.clamp(min=0)]
    fused = torch.einsum("thd,thde->the", k, key_map.matrix.flatten(0, 1)[group.clamp(min=0)])
    if key_map.unit_matrix is not None:
        shifted = k + 1e-6
        unit = shifted / shifted.norm(dim=-1, keepdim=True)
        fused = fused + torch.einsum("thd,thde->the", unit, key_map.unit_matrix.flatten(0, 1)[group.clamp(min=0)])
    return alignment.from_tokens(torch.where(mapped[:, None, None], fused.to(key.dtype), tokens), layout)


# Modular mask and pseudo-attention, Eq. 7-10


def moda_attention(*args: Any, return_lse: bool = False, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`moda_kernels.moda_attention` with a layout, by this file: the same arguments but ``backend``."""
    call = AttentionCall.make(*args, **kwargs)
    out, lse = attend(call)
    return (call.poisoned(out), call.poisoned(lse)) if return_lse else call.poisoned(out)


def attend(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Output and lse of a checked call.

    Returns:
        out ``[B, Hq, Lq, E]`` (packed ``[Tq, Hq, E]``) in the query's dtype; lse ``[B, Hq, Lq]`` (packed ``[Hq, Tq]``)
        in float32 (float64), for split with a last axis (self, cross).
    """
    with torch.autocast(call.query.device.type, enabled=False):
        return _attend(call)


def _attend(call: AttentionCall) -> tuple[Tensor, Tensor]:
    layout, queries, mask = call.layout, call.queries, call.mask
    dtype = compute_dtype(call.query)
    key = call.key.to(dtype)
    if call.key_map is not None:
        key = alignment.align_keys(key, call.key_map, layout)

    # Packed documents are a batch of one whose mask keeps them apart.
    def batch(x: Tensor) -> Tensor:
        return x.transpose(0, 1)[None] if layout.packed else x

    def rows(x: Tensor) -> Tensor:
        return x[None] if layout.packed else x

    # Padding may hold anything, NaN too.
    real_key, real_query = rows(layout.modality) >= 0, rows(queries.of(layout.modality)) >= 0
    q = torch.where(real_query[:, None, :, None], batch(call.query).to(dtype), 0)
    k = torch.where(real_key[:, None, :, None], batch(key), 0)
    v = torch.where(real_key[:, None, :, None], batch(call.value).to(dtype), 0)
    group = call.query_heads // call.key_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)

    score = call.scale * (q @ k.transpose(-1, -2))
    query_modality, key_modality = rows(queries.of(layout.modality)), rows(layout.modality)
    if call.pair_bias is not None:
        sequence = rows(queries.of(layout.sequence, 0)).long()
        bias = call.pair_bias.to(dtype).expand(layout.num_sequences, -1, -1, -1)
        of_row = bias[sequence, :, query_modality.clamp(min=0).long()].transpose(1, 2)  # [B, H, Lq, M]
        of_row = of_row.expand(-1, call.query_heads, -1, -1)
        column = key_modality.clamp(min=0).long()[:, None, None, :].expand(score.shape)
        score = score + of_row.gather(-1, column)
    if call.attn_mask is not None:
        if call.attn_mask.dtype == torch.bool:
            score = torch.where(call.attn_mask, score, float("-inf"))
        else:
            score = score + call.attn_mask.to(dtype)

    visible = rows(mask.visible_to(layout, queries))
    counts = rows(layout.counts[queries.of(layout.sequence, 0).long()]) if layout.num_sequences else None
    tokens = visible.sum(-1) if counts is None else counts.sum(-1)

    def part(seen: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """One softmax: over the keys seen and, if asked for, `total` - |seen| pseudo scores."""
        extra = None
        if call.pseudo is not None:
            extra = call.pseudo.log_mass(total, seen.sum(-1), dtype)
            extra = torch.where(real_query[:, None], extra, float("-inf"))
        return _softmax(torch.where(seen[:, None], score, float("-inf")), v, extra)

    if not call.split:
        out, lse = part(visible, tokens)
    else:
        same = query_modality[:, :, None] == key_modality[:, None, :]
        own = tokens if counts is None else counts.gather(-1, query_modality.clamp(min=0).long()[..., None])[..., 0]
        out_self, lse_self = part(visible & same, own)
        out_cross, lse_cross = part(visible & ~same, tokens - own)
        weights = [w.to(dtype)[:, None, None] if isinstance(w, Tensor) else w for w in call.branch_weights]
        out = weights[0] * out_self + weights[1] * out_cross
        lse = torch.stack((lse_self, lse_cross), -1)
    out = out.to(call.query.dtype)
    return (out[0].transpose(0, 1), lse[0]) if layout.packed else (out, lse)


def _softmax(score: Tensor, value: Tensor, extra: Tensor | None) -> tuple[Tensor, Tensor]:
    """O = Σ e^s v / Z and log Z with Z = Σ e^s + e^extra; a row with Z = 0 gives 0 and -inf, and no gradient.

    Args:
        score: ``[B, H, Lq, Lk]``, -inf where hidden. value: ``[B, H, Lk, E]``. extra: ``[B, H or 1, Lq]`` or None.
    """
    if score.shape[-1] == 0:
        score = torch.nn.functional.pad(score, (0, 1), value=float("-inf"))
        value = torch.nn.functional.pad(value, (0, 0, 0, 1))
    peak = score.detach().amax(-1)
    if extra is not None:
        peak = torch.maximum(peak, extra.detach())
    peak = torch.where(torch.isneginf(peak), 0, peak)
    weight = torch.exp(score - peak[..., None])
    total = weight.sum(-1)
    if extra is not None:
        total = total + torch.exp(extra - peak)
    nothing = total == 0
    total = torch.where(nothing, 1, total)
    out = (weight @ value) / total[..., None]
    return out, torch.where(nothing, float("-inf"), peak + torch.log(total))
