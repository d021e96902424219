"""MODA attention as the paper and the design's specification say it, in plain PyTorch: the oracle of every backend.

To be read beside the paper (arXiv 2507.04635). Names are those of the package; any device and float dtype; autograd
goes through everything. It writes out all scores, so it takes O(L²) memory; nothing here is clever. Layouts and fused
keys are loops over tokens from the definitions, against which the fast ones are tested. Rules (`ModularMask`,
`PseudoAttention`) are data that all backends share.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moda_kernels.alignment import aligner, maps
from moda_kernels.alignment.maps import KeyMap, ModalityMap
from moda_kernels.alignment.memory import DecodeState, LayerState, layer_of
from moda_kernels.call import AttentionCall
from moda_kernels.products.twin import compute_dtype
from moda_kernels.runtime import checks
from moda_kernels.runtime.lasting import lasting
from moda_kernels.tokens.layout import ModalityLayout, QueryRows
from moda_kernels.tokens.mask import ModularMask, Visibility
from moda_kernels.tokens.segments import as_layout

__all__ = [
    "DuplexAligner",
    "align_keys",
    "attention_share",
    "gram_affinity",
    "moda_attention",
    "modality_gram",
    "released_key_map",
    "segment_modalities",
]


# Tokens


@lasting
def segment_modalities(
    modality_ids: Tensor,
    *,
    num_modalities: int | None = None,
    item_ids: Tensor | None = None,
    roles: Tensor | None = None,
    num_roles: int | None = None,
    steps: Tensor | None = None,
    chunks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_segments: int | None = None,
) -> ModalityLayout:
    """:func:`moda_kernels.segment_modalities` by a loop over tokens on the host; the same arguments (not checked)."""
    ids = modality_ids.flatten().tolist()
    items = [0] * len(ids) if item_ids is None else item_ids.flatten().tolist()
    of_role = ids if roles is None else roles.flatten().tolist()
    of_chunk = [-1] * len(ids) if chunks is None else chunks.flatten().tolist()
    if cu_seqlens is None:
        rows, length = modality_ids.shape
        bounds = [row * length for row in range(rows + 1)]
    else:
        bounds = cu_seqlens.tolist()
    m = num_modalities or max([1, *(i + 1 for i in ids)])
    r = m if roles is None else num_roles or max([1, *(i + 1 for i in of_role)])

    segment, position, sequence, chunk = ([-1] * len(ids) for _ in range(4))
    counts = [[0] * m for _ in bounds[1:]]
    prefix, table = [[0] * m], []
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        seen, last, real = 0, None, None
        for t in range(begin, end):
            sequence[t] = n
            prefix.append(list(prefix[-1]))
            if ids[t] == -1:
                last = None
                continue
            if (ids[t], of_role[t], items[t]) != last:
                table.append([n, t, 0, ids[t]])
            last = (ids[t], of_role[t], items[t])
            if of_chunk[t] >= 0:  # that of the token before, padding aside, or a new one
                goes_on = real is not None and of_chunk[real] == of_chunk[t]
                chunk[t] = chunk[real] if goes_on and real is not None else t
            real = t
            table[-1][2] += 1
            segment[t], position[t] = len(table) - 1, seen
            seen += 1
            counts[n][ids[t]] += 1
            prefix[-1][ids[t]] += 1
    room = len(table) if max_segments is None else max_segments

    def made(values: Any, *shape: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=modality_ids.device).view(*shape)

    return ModalityLayout(
        modality=modality_ids.int(),
        segment=made(segment, *modality_ids.shape),
        position=made(position, *modality_ids.shape),
        sequence=made(sequence, *modality_ids.shape),
        role=made([-1 if m == -1 else a for m, a in zip(ids, of_role, strict=True)], *modality_ids.shape),
        step=made([0] * len(ids), *modality_ids.shape)
        if steps is None
        else torch.where(modality_ids < 0, 0, steps).int(),
        chunk=made(chunk, *modality_ids.shape),
        counts=made(counts, -1, m) if counts else made([], 0, m),
        cu_seqlens=made(bounds, -1),
        num_modalities=m,
        num_roles=r,
        own_roles=roles is not None,
        own_chunks=chunks is not None,
        max_segments=room,
        num_segments=made([len(table)], 1),
        prefix=made(prefix, -1, m),
        table=made(table + [[0] * 4] * (room - len(table)), room, 4),
        faults=None if modality_ids.device.type == "cpu" else made([0] * 4, 4),
    )


# Duplex alignment, Eq. 5-6


def modality_gram(x: Tensor, y: Tensor, layout: ModalityLayout, by: str = "modality") -> Tensor:
    """G = Σ x_tᵀ y_t over the tokens of each modality ``[N, M, H, D, E]``, or of each segment ``[S, H, D, E]``."""
    xs, ys = maps.to_tokens("x", x, layout), maps.to_tokens("y", y, layout)
    dtype = compute_dtype(xs, ys)
    outer = xs.to(dtype)[..., :, None] * ys.to(dtype)[..., None, :]
    group = layout.groups(by)
    groups = layout.counts.numel() if by == "modality" else layout.max_segments
    gram = torch.stack([outer[group == g].sum(0) for g in range(groups)]) if groups else outer[:0]
    return gram.unflatten(0, tuple(layout.counts.shape)) if by == "modality" else gram


def _norm(gram: Tensor, norm: str) -> Tensor:
    """R̂: rows, or the whole matrix, divided by the L2 norm; zero stays zero."""
    axes = (-1,) if norm == "row" else (-2, -1)
    zero = (gram == 0).all(axes, keepdim=True) if norm == "row" else (gram == 0).flatten(-2).all(-1)[..., None, None]
    normed: Tensor = gram / torch.where(zero, 1, gram).norm(dim=axes, keepdim=True)
    return normed


class DuplexAligner(aligner.DuplexAligner):
    """The aligner of the package, its fused keys computed token by token from Eq. 5-6."""

    def forward(
        self,
        key: Tensor,
        layout: ModalityLayout | Tensor | None = None,
        *,
        state: DecodeState | LayerState | None = None,
        parallel: aligner.Parallel | None = None,
    ) -> KeyMap:
        """A map that is applied by :meth:`fused_keys`; with a state made anew from all keys, which the cache has to
        hold."""
        if parallel is not None:
            raise NotImplementedError("parallel: the reference knows one process; use moda_kernels.DuplexAligner")
        if state is not None:
            memory = layer_of(state)
            layout = memory.layout_for(key, layout)
            if layout.modality.shape[-1] < memory.history.length:
                raise checks.wrong_value("key", f"the keys of all {memory.history.length} tokens", key)
        elif layout is None:
            raise checks.wrong_value("layout", "a ModalityLayout, modality ids, or state", None)
        layout = as_layout(layout, self.num_modalities)
        return _TokenMap(self, maps.to_tokens("key", key, layout), layout)

    def fused_keys(self, key: Tensor, layout: ModalityLayout) -> Tensor:
        """k' of every key, in the shape of ``key``.

        For token t of modality m: R = Σ k_jᵀ k_j over the other modalities' tokens j of the sequence that have a role
        whose tokens count (scope "causal": those before t, in no chunk or in its own), normed; k̂ = k_t R̂;
        k' = k + ρ ⊙ k̂, or (k + ρ ⊙ k̂) Wᵀ, or [k ; k̂] Wᵀ; with `renorm` times ‖k‖ / ‖k'‖.
        """
        tokens = maps.to_tokens("key", key, layout)
        return maps.from_tokens(self._fused(tokens, tokens, layout), layout)

    def _fused(self, source: Tensor, tokens: Tensor, layout: ModalityLayout) -> Tensor:
        """k' of `tokens` with Gram sums over `source`, both ``[tokens, H, D]``."""
        modality, sequence = layout.modality.flatten(), layout.sequence.flatten()
        order, chunk, role = (
            torch.arange(len(tokens), device=tokens.device),
            layout.chunk.flatten(),
            layout.role.flatten(),
        )
        counts = torch.ones_like(order, dtype=torch.bool)
        if self.source_roles is not None:
            counts = torch.isin(role, torch.tensor(self.source_roles, device=tokens.device))
        dtype = compute_dtype(source, tokens)
        fused = []
        for t in range(len(tokens)):
            k, m = tokens[t].to(dtype), int(modality[t])
            other = counts & (modality >= 0) & (modality != m) & (sequence == sequence[t])
            if self.scope == "causal":
                other = other & (order < t) & ((chunk == -1) | (chunk == chunk[t]))
            if m not in self.aligned or not bool(other.any()):
                fused.append(tokens[t])
                continue
            rest = torch.einsum("thd,the->hde", source[other].to(dtype), source[other].to(dtype))
            mapped = torch.einsum("hd,hde->he", k, _norm(rest, self.norm))
            ratio, weight = (None if p is None else p[m].to(dtype) for p in (self.ratio, self.weight))
            if ratio is None:  # concat
                assert weight is not None
                joined = torch.cat((k, mapped), -1) @ weight.T
            else:
                joined = k + ratio * mapped
                joined = joined if weight is None else joined @ weight.T
            if self.renorm:
                joined = _with_length(joined, k)
            fused.append(joined.to(tokens.dtype))
        return torch.stack(fused) if fused else tokens


def _with_length(fused: Tensor, key: Tensor) -> Tensor:
    """k' ‖k‖ / ‖k'‖, 0 where k' is 0; of one token, ``[H, D]``."""
    rows = [f if not f.any() else f * (k.norm() / f.norm()) for f, k in zip(fused, key, strict=True)]
    return torch.stack(rows)


@dataclass(frozen=True, eq=False)
class _TokenMap(KeyMap):
    """The map of the reference's aligner: no matrices, the definition itself."""

    aligner: DuplexAligner
    source: Tensor
    layout: ModalityLayout

    @property
    def num_heads(self) -> int:
        return self.source.shape[1]

    @property
    def head_dim(self) -> int:
        return self.source.shape[2]

    def align(self, key: Tensor, layout: ModalityLayout) -> Tensor:
        return self.aligner._fused(self.source, key.flatten(0, -3), layout).view(key.shape)


def _without_padding(tokens: Tensor, layout: ModalityLayout) -> Tensor:
    """``[tokens, H, D]`` with 0 at padding, which may hold anything: 0 times NaN is a gradient of NaN."""
    return torch.where((layout.modality.flatten() >= 0)[:, None, None], tokens, 0)


def released_key_map(
    key: Tensor,
    value: Tensor,
    layout: ModalityLayout,
    ratio: Tensor,
    weight: Tensor,
    *,
    vision: int = 1,
    text: int = 0,
) -> KeyMap:
    """The release's alignment: G = Σ over text of u_tᵀ v_t, rows normed; vision keys k' = (k + r ⊙ (u Ĝ)) Wᵀ."""
    keys, values = maps.to_tokens("key", key, layout), maps.to_tokens("value", value, layout)
    dtype = compute_dtype(keys, values)
    shifted = _without_padding(keys, layout).to(dtype) + 1e-6
    unit = shifted / shifted.norm(dim=-1, keepdim=True)
    n, m = layout.counts.shape
    matrix = torch.eye(keys.shape[-1], dtype=dtype, device=key.device).repeat(n, m, keys.shape[1], 1, 1)
    unit_matrix = torch.zeros_like(matrix)
    mapped = torch.zeros(n, m, dtype=torch.bool, device=key.device)
    for sequence in range(n):
        texts = (layout.sequence.flatten() == sequence) & (layout.modality.flatten() == text)
        if vision >= m or not bool(texts.any()):
            continue
        gram = _norm(torch.einsum("thd,the->hde", unit[texts], values[texts].to(dtype)), "row")
        matrix[sequence, vision] = weight.to(dtype).T
        unit_matrix[sequence, vision] = gram @ torch.diag(ratio.to(dtype).flatten()) @ weight.to(dtype).T
        mapped[sequence, vision] = True
    return ModalityMap(matrix, mapped, unit_matrix, layout)


def align_keys(key: Tensor, key_map: KeyMap, layout: ModalityLayout) -> Tensor:
    """k'_t = k_t A (+ u_t B in the released variant), with the matrix of each token looked up."""
    if not isinstance(key_map, ModalityMap):
        return maps.align_keys(key, key_map, layout)
    tokens = maps.to_tokens("key", key, layout)
    k = _without_padding(tokens, layout).to(compute_dtype(tokens, key_map.matrix))
    group = layout.groups("modality")
    mapped = (group >= 0) & key_map.mapped.flatten()[group.clamp(min=0)]
    fused = torch.einsum("thd,thde->the", k, key_map.matrix.flatten(0, 1)[group.clamp(min=0)])
    if key_map.unit_matrix is not None:
        shifted = k + 1e-6
        unit = shifted / shifted.norm(dim=-1, keepdim=True)
        fused = fused + torch.einsum("thd,thde->the", unit, key_map.unit_matrix.flatten(0, 1)[group.clamp(min=0)])
    if key_map.renorm:
        fused = torch.stack([_with_length(f, of) for f, of in zip(fused, k, strict=True)]) if len(k) else fused
    return maps.from_tokens(torch.where(mapped[:, None, None], fused.to(key.dtype), tokens), layout)


def gram_affinity(gram: Tensor, norm: str = "row") -> Tensor:
    """⟨Ĝ[a], Ĝ[b]⟩ / (‖Ĝ[a]‖ ‖Ĝ[b]‖) for every pair of modalities, 0 where a Gram is 0: ``[N, H, M, M]``."""
    normed = _norm(gram, norm).transpose(1, 2)
    dot = torch.einsum("nhade,nhbde->nhab", normed, normed)
    size = dot.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    sizes = size[..., :, None] * size[..., None, :]
    return torch.where(sizes > 0, dot / torch.where(sizes > 0, sizes, 1), 0)


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
        key = maps.align_keys(key, call.key_map, layout)

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
    if call.softcap is not None:
        score = call.softcap * torch.tanh(score / call.softcap)
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

    visible = rows(_visible(layout, queries, mask))
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


def _visible(layout: ModalityLayout, queries: QueryRows, mask: ModularMask) -> Tensor:
    """Who sees whom, every pair by the definition: bool ``[B, Lq, L]``, packed ``[Tq, T]``."""

    def of(fact: Tensor) -> tuple[Tensor, Tensor]:
        return queries.of(fact)[..., :, None], fact[..., None, :]

    (modality_i, modality_j), (role_i, role_j) = of(layout.modality), of(layout.role)
    (p_i, p_j), (segment_i, segment_j) = of(layout.position), of(layout.segment)
    (step_i, step_j), (chunk_i, chunk_j) = of(layout.step), of(layout.chunk)
    sequence_i, sequence_j = of(layout.sequence)
    # Role -1 is padding, which sees nothing and is not seen.
    rule = mask.rule_table(layout.device)[role_i.clamp(min=0).long(), role_j.clamp(min=0).long()]
    anywhere = torch.ones_like(p_i >= p_j)
    near = anywhere if mask.window is None else p_i - p_j < mask.window
    past = (p_j <= p_i) & near
    allowed = (
        ((rule & Visibility.PAST) > 0) & past
        | ((rule & Visibility.SEGMENT) > 0) & (segment_j == segment_i)
        | ((rule & Visibility.BEFORE) > 0) & (step_j < step_i)
        | ((rule & Visibility.UPTO) > 0) & (step_j <= step_i)
        | ((rule & Visibility.CHUNK) > 0) & (chunk_j == chunk_i) & (chunk_i >= 0) & past
        | ((rule & Visibility.ALL) > 0)
    )
    if mask.window_on == "all":
        allowed = allowed & near
    return allowed & (sequence_i == sequence_j) & (modality_i >= 0) & (modality_j >= 0)


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


# Diagnostics, Fig. 2


def attention_share(query: Tensor, key: Tensor, layout: ModalityLayout, *args: Any, **options: Any) -> Tensor:
    """Mean over the queries of modality a of the attention mass on keys of modality b, ``[N, Hq, M, M]``."""
    n, m = layout.counts.shape
    one_hot = (layout.modality[..., None] == torch.arange(m, device=key.device)).to(key.dtype)
    value = (
        one_hot[:, None].expand(*key.shape[:2], -1) if layout.packed else one_hot[:, None].expand(*key.shape[:3], -1)
    )
    if args:
        options["mask"] = args[0]
    call = AttentionCall.make(query, key, value, layout=layout, **options)
    mass = attend(call)[0]
    mass = mass if layout.packed else mass.transpose(1, 2)  # [..., Lq, Hq, M]
    modality, sequence = call.queries.of(layout.modality), call.queries.of(layout.sequence, 0)
    rows = [[mass[(modality == a) & (sequence == i)].mean(0) for a in range(m)] for i in range(n)]
    return torch.stack([torch.stack(row, 1) for row in rows]) if rows else mass.new_zeros(0, query.shape[1], m, m)
