"""A second oracle: the whole of one attention call with dense masks, written from spec.md and from nothing else.

The reference backend shares the package's layouts, masks, checks and closed forms. This file takes plain facts, those
that were given to `segment_modalities`, walks the tokens with loops, writes every mask out, lists every pseudo score
and aligns every key with the sum over the keys that its definition names: slow, in float64, and differentiable.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

PAST, SEGMENT, ALL, BEFORE, UPTO, CHUNK = 1, 2, 4, 8, 16, 32


class Exact:
    """Arithmetic as it is."""

    def narrow(self, x: Tensor) -> Tensor:
        """What a backend keeps in the dtype of its inputs."""
        return x

    def wide(self, x: Tensor) -> Tensor:
        """What it keeps in float32 (for float64: float64)."""
        return x


EXACT = Exact()


class Rounded(Exact):
    """Arithmetic of a dtype: every intermediate number and gradient is off by a random share of that size.

    Where a result is a small difference of large numbers (a softmax of one key has no gradient; a row of a Gram matrix
    is almost 0), its error is no share of itself. This finds out how large it may be, the same on every machine.

    Args:
        dtype: of the inputs. seed: another one, another error.
    """

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.g = torch.Generator().manual_seed(seed)
        least = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        # Sums add several roundings up; exponentials in float32 have 20 bits on some machines.
        self.of_wide = 8 * least
        self.of_narrow = max(torch.finfo(dtype).eps, 8 * least)

    def narrow(self, x: Tensor) -> Tensor:
        return self._off(x, self.of_narrow)

    def wide(self, x: Tensor) -> Tensor:
        return self._off(x, self.of_wide)

    def _off(self, x: Tensor, size: float) -> Tensor:
        forward, backward = (
            1 + size * torch.randn(x.shape, generator=self.g, dtype=x.dtype).to(x.device) for _ in range(2)
        )
        off: Tensor = _Off.apply(x, forward, backward)
        return off


class _Off(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
        ctx.save_for_backward(backward)
        return x * forward

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (backward,) = ctx.saved_tensors
        return grad * backward, None, None


@dataclass(frozen=True)
class Tokens:
    """What `segment_modalities` is given: integer tensors ``[B, L]``, or ``[T]`` with ``cu_seqlens``."""

    modality_ids: Tensor
    num_modalities: int
    item_ids: Tensor | None = None
    roles: Tensor | None = None
    num_roles: int | None = None
    steps: Tensor | None = None
    chunks: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    @property
    def bounds(self) -> list[int]:
        """First token of each sequence in the flattened batch, and the number of tokens."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens.tolist()
        rows, length = self.modality_ids.shape
        return [n * length for n in range(rows + 1)]


class Facts(NamedTuple):
    """Of every token, int64 ``[T]``: section 1 of the specification."""

    sequence: Tensor
    modality: Tensor
    position: Tensor
    segment: Tensor
    role: Tensor
    step: Tensor
    chunk: Tensor

    def at(self, columns: Tensor) -> "Facts":
        return Facts(*(fact[columns] for fact in self))


def facts(tokens: Tokens) -> Facts:
    ids = tokens.modality_ids.flatten().tolist()

    def given(x: Tensor | None, default: list[int]) -> list[int]:
        return default if x is None else x.flatten().tolist()

    nothing = [0] * len(ids)
    items, steps = given(tokens.item_ids, nothing), given(tokens.steps, nothing)
    roles, chunks = given(tokens.roles, ids), given(tokens.chunks, [-1] * len(ids))
    rows, segments, runs = [], 0, 0
    for n, (begin, end) in enumerate(pairwise(tokens.bounds)):
        position, before, of_chunk = 0, None, -1
        for t in range(begin, end):
            if ids[t] < 0:
                rows.append((n, -1, -1, -1, -1, 0, -1))
                before = None
                continue
            kind = (ids[t], roles[t], items[t])
            segments += kind != before
            runs += chunks[t] >= 0 and chunks[t] != of_chunk
            of_chunk = max(chunks[t], -1)
            rows.append((n, ids[t], position, segments - 1, roles[t], steps[t], runs - 1 if of_chunk >= 0 else -1))
            position, before = position + 1, kind
    columns = torch.tensor(rows, dtype=torch.long, device=tokens.modality_ids.device).view(-1, len(Facts._fields))
    return Facts(*columns.unbind(1))


def visible(
    of_rows: Facts, of_keys: Facts, rules: Sequence[Sequence[int]], window: int | None, window_on: str
) -> Tensor:
    """Section 3: bool ``[rows, T]``, who sees whom."""
    i, j = (Facts(*(fact[:, None] for fact in of_rows)), Facts(*(fact[None] for fact in of_keys)))
    table = torch.tensor([[int(rule) for rule in row] for row in rules], device=i.modality.device)
    rule = table[i.role.clamp(min=0), j.role.clamp(min=0)]
    near = i.position - j.position < (math.inf if window is None else window)
    behind = (j.position <= i.position) & near
    seen = (rule & PAST > 0) & behind
    seen |= (rule & SEGMENT > 0) & (j.segment == i.segment)
    seen |= (rule & BEFORE > 0) & (j.step < i.step)
    seen |= (rule & UPTO > 0) & (j.step <= i.step)
    seen |= (rule & CHUNK > 0) & (j.chunk == i.chunk) & (i.chunk >= 0) & behind
    seen |= rule & ALL > 0
    if window_on == "all":
        seen = seen & near
    return seen & (i.sequence == j.sequence) & (i.modality >= 0) & (j.modality >= 0)


# Section 2: keys


def _divided(x: Tensor, size: Tensor) -> Tensor:
    """x / size; 0, with zero gradient, where size is 0."""
    return torch.where(size > 0, x / torch.where(size > 0, size, 1), 0)


def _length(x: Tensor) -> Tensor:
    """‖x‖ of the last axis, which is kept; 0 has a gradient of 0."""
    square = (x * x).sum(-1, keepdim=True)
    return torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), 0)


def _normed(gram: Tensor, norm: str) -> Tensor:
    # The norm of a constant multiple is that multiple of the norm: squares stay in range.
    axes = (-1,) if norm == "row" else (-2, -1)
    peak = gram.detach().abs().amax(axes, keepdim=True)
    gram = _divided(gram, peak)
    square = (gram * gram).sum(axes, keepdim=True)
    return _divided(gram, torch.where(square > 0, square, 1).sqrt() * (square > 0))


def aligned_keys(
    key: Tensor, tokens: Facts, tensors: dict[str, Tensor], aligner: dict[str, Any], arithmetic: Exact
) -> Tensor:
    """k' ``[T, Hkv, D]``, one Gram sum a token.

    Args:
        aligner: the arguments of `DuplexAligner` by name. tensors: its "ratio" and "weight".
    """
    mine, other = tokens.modality[:, None], tokens.modality[None]
    counted = (tokens.sequence[:, None] == tokens.sequence[None]) & (mine >= 0) & (other >= 0) & (mine != other)
    if aligner.get("source_roles") is not None:
        counted = counted & torch.isin(tokens.role, torch.tensor(aligner["source_roles"], device=key.device))
    if aligner["scope"] == "causal":
        order = torch.arange(len(key), device=key.device)
        counted = counted & (order[None] < order[:, None])
        counted = counted & ((tokens.chunk[None] == -1) | (tokens.chunk[None] == tokens.chunk[:, None]))
    chosen = counted.any(1)
    if aligner["aligned"] is not None:
        named = torch.tensor(aligner["aligned"], dtype=torch.long, device=key.device)
        chosen = chosen & torch.isin(tokens.modality, named)
    rest = arithmetic.wide(torch.einsum("tj,jhd,jhe->thde", counted.to(key), key, key))
    mapped = arithmetic.wide(torch.einsum("thd,thde->the", key, _normed(rest, aligner["norm"])))
    of_token = tokens.modality.clamp(min=0)
    if aligner["fusion"] == "concat":
        fused = torch.einsum("thd,ted->the", torch.cat((key, mapped), -1), tensors["weight"][of_token])
    else:
        fused = key + tensors["ratio"][of_token][:, None] * mapped
        if aligner["fusion"] == "linear":
            fused = torch.einsum("thd,ted->the", fused, tensors["weight"][of_token])
    if aligner["renorm"]:
        length, new = (_length(x) for x in (key, fused))
        fused = fused * _divided(length, new)
    return torch.where(chosen[:, None, None], arithmetic.narrow(fused), key)


def released_keys(
    key: Tensor, value: Tensor, tokens: Facts, ratio: Tensor, weight: Tensor, arithmetic: Exact
) -> Tensor:
    """k' of the release, vision 1 and text 0."""
    shifted = key + 1e-6
    unit = shifted / shifted.norm(dim=-1, keepdim=True)
    text = (tokens.sequence[:, None] == tokens.sequence[None]) & (tokens.modality == 0)
    gram = arithmetic.wide(torch.einsum("tj,jhd,jhe->thde", text.to(key), unit, value))
    fused = (key + ratio.flatten() * torch.einsum("thd,thde->the", unit, _normed(gram, "row"))) @ weight.T
    chosen = (tokens.modality == 1) & text.any(1)
    return torch.where(chosen[:, None, None], arithmetic.narrow(fused), key)


# Sections 4 and 5: pseudo scores and the softmax


def pseudo_scores(
    base: Tensor, decay: Tensor, length: int | float | None, seen: Tensor, tokens: Tensor, arithmetic: Exact
) -> Tensor:
    """Every pseudo score of every row, ``[H, rows, most]``, -inf after a row's last.

    Args:
        base, decay: ``[H]``. seen, tokens: int64 ``[rows]``, |V(i)| and the tokens of its sequence (or branch).
    """
    if length == math.inf:  # the sum of all of them is that of one score
        return (base - torch.log(1 - torch.exp(-decay)))[:, None, None].expand(-1, len(seen), 1)
    count = ((tokens if length is None else torch.full_like(seen, int(length))) - seen).clamp(min=0)
    number = torch.arange(int(count.max()) if count.numel() else 0, device=seen.device)
    # (In closed form the gradient of decay is a difference too, even where the only number is 0.)
    off = arithmetic.wide(torch.ones(number.shape, dtype=base.dtype, device=seen.device)) - 1
    scores = base[:, None, None] - decay[:, None, None] * (number + off)
    return torch.where(number < count[:, None], scores, -math.inf)


def softmax(scores: Tensor, value: Tensor, pseudo: Tensor | None, arithmetic: Exact) -> tuple[Tensor, Tensor]:
    """out ``[H, rows, E]`` and lse ``[H, rows]`` of scores ``[H, rows, T]``, values ``[H, T, E]`` and pseudo scores."""
    nothing = scores.new_full((*scores.shape[:2], 1), -math.inf)
    every = torch.cat((scores, nothing) if pseudo is None else (scores, nothing, pseudo), -1)
    peak = every.detach().amax(-1, keepdim=True)
    peak = torch.where(peak == -math.inf, 0, peak)
    weight = torch.exp(every - peak)
    total = weight.sum(-1, keepdim=True)
    safe = torch.where(total > 0, total, 1)
    lse = torch.where(total > 0, peak + torch.log(arithmetic.wide(safe)), -math.inf)
    safe = arithmetic.narrow(safe)
    out = (arithmetic.narrow(weight[..., : scores.shape[-1]]) @ value) / safe
    return arithmetic.narrow(out), lse[..., 0]


def attend(
    tokens: Tokens,
    tensors: dict[str, Tensor],
    *,
    rules: Sequence[Sequence[int]],
    window: int | None = None,
    window_on: str = "past",
    scale: float | None = None,
    softcap: float | None = None,
    attn_mask: Tensor | None = None,
    aligner: dict[str, Any] | None = None,
    pseudo: dict[str, Any] | None = None,
    split: bool = False,
    weights: tuple[float | Tensor, float | Tensor] = (1.0, 1.0),
    query_start: int | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    arithmetic: Exact = EXACT,
) -> tuple[Tensor, Tensor]:
    """Output and lse of one call, in the shapes of `moda_attention`.

    Args:
        tensors: "query", "key", "value" in its shapes; "pair_bias"; the aligner's "ratio" and "weight".
        rules, window, window_on: of the mask. attn_mask: bool or float, broadcasts to ``[B, Hq, Lq, L]``.
        aligner: None, the arguments of `DuplexAligner`, or {"fusion": "released"}.
        pseudo: None, or base and decay (floats or tensors ``[Hq]``) and length of `PseudoAttention`.
        arithmetic: exact, or off as in some dtype.
    """
    query, key, value = (tensors[n] if tokens.packed else tensors[n].transpose(1, 2) for n in ("query", "key", "value"))
    shape = query.shape[:-2]
    query, key, value = (x if tokens.packed else x.flatten(0, 1) for x in (query, key, value))
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    of_keys = facts(tokens)
    columns = _columns(tokens, shape, query_start, cu_seqlens_q).to(query.device)
    of_rows = of_keys.at(columns)
    real_key, real_row = of_keys.modality >= 0, of_rows.modality >= 0
    key, value = (torch.where(real_key[:, None, None], x, 0) for x in (key, value))
    query = torch.where(real_row[:, None, None], query, 0)

    if aligner is not None and aligner["fusion"] == "released":
        key = released_keys(key, value, of_keys, tensors["ratio"], tensors["weight"], arithmetic)
    elif aligner is not None:
        key = aligned_keys(key, of_keys, tensors, aligner, arithmetic)
    key, value = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (key, value))  # [Hq, T, D]
    products = arithmetic.wide(query.transpose(0, 1) @ key.transpose(1, 2))
    scores = (query.shape[-1] ** -0.5 if scale is None else scale) * products
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if "pair_bias" in tensors:
        sequences = len(tokens.bounds) - 1
        bias = tensors["pair_bias"].expand(sequences, heads, -1, -1)
        pair = bias[of_rows.sequence, :, of_rows.modality.clamp(min=0)].transpose(0, 1)  # [Hq, rows, M]
        scores = scores + pair[:, :, of_keys.modality.clamp(min=0)]
    if attn_mask is not None:
        scores = _masked(scores, attn_mask, shape, tokens)
    seen = visible(of_rows, of_keys, rules, window, window_on)
    same = of_rows.modality[:, None] == of_keys.modality[None]
    of_sequence = (of_rows.sequence[:, None] == of_keys.sequence[None]) & real_key

    outs, lses = [], []
    for part in [same, ~same] if split else [torch.ones_like(same)]:
        extra = None
        if pseudo is not None:
            base, decay = (_per_head(pseudo[name], scores) for name in ("base", "decay"))
            extra = pseudo_scores(
                base, decay, pseudo["length"], (seen & part).sum(1), (of_sequence & part).sum(1), arithmetic
            )
            extra = torch.where(real_row[:, None], extra, -math.inf)
        out, lse = softmax(torch.where(seen & part, scores, -math.inf), value, extra, arithmetic)
        outs.append(out)
        lses.append(lse)
    if split:
        of_head = [w[:, None, None] if isinstance(w, Tensor) else w for w in weights]
        out, lse = of_head[0] * outs[0] + of_head[1] * outs[1], torch.stack(lses, -1)
    else:
        out, lse = outs[0], lses[0]
    if tokens.packed:
        return out.transpose(0, 1), lse
    return out.unflatten(1, shape).transpose(0, 1), lse.unflatten(1, shape).transpose(0, 1)


def _per_head(value: float | Tensor, scores: Tensor) -> Tensor:
    return (value if isinstance(value, Tensor) else scores.new_tensor(value)).to(scores).expand(scores.shape[0])


def _columns(
    tokens: Tokens, shape: Sequence[int], query_start: int | Tensor | None, cu_seqlens_q: Tensor | None
) -> Tensor:
    """The token (of the flattened batch) in which each query row stands."""
    columns: list[int] = []
    sequences = list(pairwise(tokens.bounds))
    rows = [shape[1]] * len(sequences) if not tokens.packed else [end - begin for begin, end in sequences]
    if cu_seqlens_q is not None:
        rows = [end - begin for begin, end in pairwise(cu_seqlens_q.tolist())]
    for n, ((begin, end), count) in enumerate(zip(sequences, rows, strict=True)):
        first = end - count
        if isinstance(query_start, Tensor):
            first = begin + int(query_start[n])
        elif query_start is not None:
            first = begin + query_start
        columns += range(first, first + count)
    return torch.tensor(columns, dtype=torch.long)


def _masked(scores: Tensor, attn_mask: Tensor, shape: Sequence[int], tokens: Tokens) -> Tensor:
    """Scores ``[Hq, rows, T]`` of a batch with ``attn_mask`` on those of equal sequences (others are hidden anyway)."""
    batch, rows = shape
    length = tokens.modality_ids.shape[1]
    whole = attn_mask.expand(batch, scores.shape[0], rows, length)
    blocks = scores.unflatten(2, (batch, length)).unflatten(1, (batch, rows))  # [Hq, B, Lq, B, L]
    masked = []
    for n in range(batch):
        block = blocks[:, n, :, n]
        masked.append(torch.where(whole[n], block, -math.inf) if whole.dtype == torch.bool else block + whole[n])
    spread = [torch.nn.functional.pad(block, (n * length, (batch - 1 - n) * length)) for n, block in enumerate(masked)]
    return torch.cat(spread, 1) if spread else scores
