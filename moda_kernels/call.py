"""One attention call: every argument checked, defaults filled in, ready for any backend."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moda_kernels.alignment.maps import KeyMap
from moda_kernels.alignment.memory import DecodeState, LayerState, layer_of
from moda_kernels.products.twin import compute_dtype
from moda_kernels.runtime import checks
from moda_kernels.tokens.layout import ModalityLayout, QueryRows
from moda_kernels.tokens.mask import ModularMask, Visibility, default_mask
from moda_kernels.tokens.pseudo import PseudoAttention, pseudo_counts
from moda_kernels.tokens.segments import as_layout


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """What a backend gets: the arguments of :func:`moda_kernels.moda_attention`, checked and complete.

    Attributes:
        query, key, value: ``[B, H, L, D]``, packed ``[T, H, D]``; one dtype, one device. ``key`` is not aligned yet.
        layout: of the keys. queries: where the queries stand among them. (Of a sliding cache both are those of the
            keys that it still holds, but `layout.counts` counts all tokens.)
        key_map: apply it with `alignment.align_keys` (while decoding with the causal scope that returns keys aligned
            before, a strided view), or fold a `ModalityMap` that is `foldable` into the query.
        scale: τ⁻¹. softcap: > 0, or None.
        branch_weights: (self, cross), each a float or ``[Hq]``; used where ``split``.
        return_lse: whether lse is wanted; a backend to which it costs something may leave it out if not.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    layout: ModalityLayout
    queries: QueryRows
    mask: ModularMask
    scale: float
    attn_mask: Tensor | None
    key_map: KeyMap | None
    pair_bias: Tensor | None
    pseudo: PseudoAttention | None
    split: bool
    branch_weights: tuple[float | Tensor, float | Tensor]
    return_lse: bool = True
    softcap: float | None = None

    @property
    def query_heads(self) -> int:
        return self.query.shape[1]

    @property
    def key_heads(self) -> int:
        return self.key.shape[1]

    @classmethod
    def make(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        *,
        layout: ModalityLayout | Tensor | None = None,
        mask: ModularMask | None = None,
        key_map: KeyMap | None = None,
        pair_bias: Tensor | None = None,
        softcap: float | None = None,
        pseudo: PseudoAttention | None = None,
        duplex: str = "joint",
        branch_weights: tuple[float | Tensor, float | Tensor] | None = None,
        query_start: int | Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        state: DecodeState | LayerState | None = None,
        return_lse: bool = True,
    ) -> "AttentionCall":
        """Check the arguments of `moda_attention` (which documents them) before any work."""
        if state is not None:
            if query_start is not None or cu_seqlens_q is not None:
                name = "query_start" if query_start is not None else "cu_seqlens_q"
                raise checks.wrong_value(name, "None together with state, which knows it", query_start or cu_seqlens_q)
            place = layer_of(state).history.place(query, key, mask, is_causal, layout)
            layout, query_start, cu_seqlens_q = place
        if layout is None:
            raise checks.wrong_value(
                "layout", "a ModalityLayout or modality ids for a call with modality arguments", None
            )
        if mask is not None and not isinstance(mask, ModularMask):
            raise checks.wrong_type("mask", "a ModularMask", mask)
        if mask is not None and is_causal:
            raise ValueError("is_causal and mask: expected one of them, got both (the mask says what is causal)")
        if key_map is not None and not isinstance(key_map, KeyMap):
            raise checks.wrong_type("key_map", "a KeyMap (call the aligner on the keys)", key_map)
        known = mask if mask is not None else key_map
        layout = as_layout(
            layout,
            None if known is None else (known.num_roles if isinstance(known, ModularMask) else known.num_modalities),
        )
        query, key, value = _checked(query, key, value, layout, enable_gqa)
        rows = query.shape[0] if layout.packed else query.shape[2]
        if state is not None and layout.packed:  # the newest tokens, for all layers
            newest = cu_seqlens_q
            queries = layout.remember(("newest queries", rows), lambda: layout.queries(rows, None, newest))
        else:
            queries = layout.queries(rows, query_start, cu_seqlens_q)
        replaceable = mask is None and not is_causal and pseudo is None
        if mask is None:
            mask = default_mask(layout.num_roles, bool(is_causal))
        mask.check_layout(layout)
        if checks.is_causal_bias(attn_mask):
            of_batch = None if layout.packed else rows
            mask, attn_mask = _read_causal_bias(attn_mask, mask, replaceable, layout, of_batch, query_start)
        heads = query.shape[1]
        if not isinstance(dropout_p, int | float) or not 0 <= dropout_p <= 1:
            raise checks.wrong_value("dropout_p", "a probability", dropout_p)
        if dropout_p > 0:
            raise NotImplementedError(
                f"dropout_p={dropout_p} together with modality arguments: use dropout_p=0.0, or dropout on the output"
            )
        for name, number in (("scale", scale), ("softcap", softcap)):
            if number is None:
                continue
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise checks.wrong_type(name, "a float or None", number)
            # Kernels take it in the dtype of the scores, some as a multiple: neither may become 0 or infinite.
            least = torch.finfo(torch.promote_types(query.dtype, torch.float32)).tiny
            if name == "scale" and number != 0 and not least <= abs(number) <= 1 / least:
                raise checks.wrong_value(name, f"0 or a finite number from {least:.2g} to {1 / least:.2g}", number)
            if name == "softcap" and not least <= number <= 1 / least:
                raise checks.wrong_value(name, f"a number from {least:.2g} to {1 / least:.2g}, or None", number)
        checks.choice("duplex", duplex, ("joint", "split"))
        if branch_weights is not None and duplex == "joint":
            raise checks.wrong_value("branch_weights", "None unless duplex='split'", "weights with duplex='joint'")
        if key_map is not None:
            key_map.check(layout, key.shape[1], key.shape[-1])
        if attn_mask is not None:
            _check_attn_mask(attn_mask, query, key, layout)
        if pair_bias is not None:
            _check_pair_bias(pair_bias, layout, heads)
        if pseudo is not None:
            if not isinstance(pseudo, PseudoAttention):
                raise checks.wrong_type("pseudo", "a PseudoAttention", pseudo)
            pseudo.check()
            for name, parameter in pseudo.parameters.items():
                _check_per_head(f"pseudo.{name}", parameter, heads, layout.device)
        return cls(
            query=query,
            key=key,
            value=value,
            layout=layout,
            queries=queries,
            mask=mask,
            scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
            attn_mask=attn_mask,
            key_map=key_map,
            pair_bias=pair_bias,
            pseudo=pseudo,
            split=duplex == "split",
            branch_weights=_checked_branch_weights(branch_weights, heads, layout.device),
            return_lse=return_lse,
            softcap=None if softcap is None else float(softcap),
        )

    def log_pseudo(self, same: bool | None) -> Tensor:
        """log P_i, ``[B, Hq, Lq]`` (packed: a batch of one), of one softmax, where there are pseudo scores; -inf for
        padding.

        Args:
            same: over keys of the query's modality, of the others (False), or of all (None).
        """
        assert self.pseudo is not None
        modality = self.queries.of(self.layout.modality)
        counts = pseudo_counts(self.layout, self.queries, self.mask, self.split)
        tokens, seen = (of[1 if same is False else 0] for of in counts)
        if self.layout.packed:
            tokens, seen, modality = tokens[None], seen[None], modality[None]
        extra = self.pseudo.log_mass(tokens, seen, compute_dtype(self.query))
        return torch.where(modality[:, None] >= 0, extra, -math.inf).expand(-1, self.query_heads, -1)

    def merged(self, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Output and lse of the call from those of its softmaxes (one, or own and cross), ``[B, Hq, Lq, …]`` (packed: a
        batch of one)."""
        out, lse = parts[0]
        if self.split:
            cross, cross_lse = parts[1]
            of_own, of_cross = (w[:, None, None] if isinstance(w, Tensor) else w for w in self.branch_weights)
            wide = compute_dtype(self.query)
            out = (of_own * out.to(wide) + of_cross * cross.to(wide)).to(self.query.dtype)
            lse = torch.stack((lse, cross_lse), -1)
        return (out[0].transpose(0, 1), lse[0]) if self.layout.packed else (out, lse)

    def poisoned(self, result: Tensor) -> Tensor:
        """NaN everywhere where the layout, on CUDA, turned out to have more segments than it has room for."""
        overflow = self.layout.overflow
        return result if overflow is None else torch.where(overflow, float("nan"), result)


def _checked(query: Tensor, key: Tensor, value: Tensor, layout: ModalityLayout, enable_gqa: bool) -> list[Tensor]:
    """Query, key and value, in autocast's dtype where that is on, and checked: what the layers of a model have in
    common is looked at once."""
    tensors, device = [query, key, value], layout.device.type
    known: set[Any] | None = None
    if not torch.compiler.is_compiling() and all(type(t) in _PLAIN and not t.is_nested for t in tensors):
        if device != "meta" and not (torch.is_autocast_enabled(device) or torch._C._is_tracing()):
            known = layout.remember("calls checked", set)
            kind = (*[(t.shape, t.dtype, t.device, t.layout) for t in tensors], enable_gqa)
            if kind in known:
                return tensors
    query, key, value = _autocast(layout.device, query, key, value)
    _check_shapes(query, key, value, layout, enable_gqa)
    if known is not None:
        known.add(kind)
    return [query, key, value]


_PLAIN = (Tensor, torch.nn.Parameter)


def _autocast(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """Under autocast, what torch SDPA does: float tensors (but float64) in the autocast dtype."""
    for name, t in zip(("query", "key", "value"), tensors, strict=True):
        checks.same_device(name, checks.float_tensor(name, t), device, "the layout")
    if not torch.is_autocast_enabled(device.type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device.type)
    return [t if t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, layout: ModalityLayout, enable_gqa: bool) -> None:
    axes = "[T, H, D]" if layout.packed else "[B, H, L, D]"
    kind = "a packed" if layout.packed else "a batch"
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() != (3 if layout.packed else 4):
            raise checks.wrong_value(name, f"{axes} with {kind} layout", t)
        if t.dtype != query.dtype:
            raise checks.wrong_type(name, f"{query.dtype}, as query", t)
    tokens, heads = (0, 1) if layout.packed else (2, 1)
    expected = layout.num_tokens if layout.packed else layout.modality.shape[1]
    for name, t in (("key", key), ("value", value)):
        if t.shape[tokens] != expected or (not layout.packed and t.shape[0] != layout.modality.shape[0]):
            raise checks.wrong_value(name, f"{axes} for a layout of shape {tuple(layout.modality.shape)}", t)
    if not layout.packed and query.shape[0] != key.shape[0]:
        raise checks.wrong_value("query", f"a batch of {key.shape[0]}, as key", query)
    if value.shape[heads] != key.shape[heads]:
        raise checks.wrong_value("value", f"{key.shape[heads]} heads, as key", value)
    if query.shape[-1] != key.shape[-1] or query.shape[-1] < 1:
        raise checks.wrong_value("query", f"the head size of key ({key.shape[-1]}), at least 1", query)
    q_heads, k_heads = query.shape[heads], key.shape[heads]
    if q_heads != k_heads and not enable_gqa:
        raise checks.wrong_value("enable_gqa", f"True for {q_heads} query and {k_heads} key heads", enable_gqa)
    if k_heads == 0 or q_heads % k_heads:
        raise checks.wrong_value("query", f"a multiple of the {k_heads} key heads", f"{q_heads} heads")


def _check_attn_mask(attn_mask: Tensor, query: Tensor, key: Tensor, layout: ModalityLayout) -> None:
    checks.tensor("attn_mask", attn_mask)
    if layout.packed:
        raise checks.wrong_value("attn_mask", "None with a packed layout", attn_mask)
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise checks.wrong_type("attn_mask", "a bool or floating-point tensor", attn_mask)
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    fits = attn_mask.dim() <= 4 and all(
        n in (1, m) for n, m in zip(reversed(attn_mask.shape), reversed(full), strict=False)
    )
    if not fits:
        raise checks.wrong_value("attn_mask", f"a shape that broadcasts to [B, Hq, Lq, Lk] = {full}", attn_mask)
    checks.same_device("attn_mask", attn_mask, layout.device, "the layout")


def _read_causal_bias(
    bias: Any, mask: ModularMask, replaceable: bool, layout: ModalityLayout, rows: int | None, query_start: Any
) -> tuple[ModularMask, Tensor | None]:
    """Mask and attn_mask that say what torch's CausalBias says: by rules where these can, else as the bools it stands
    for. (Like any attn_mask it changes no number of visible keys, so pseudo scores keep it from becoming rules.)"""
    if rows is None:
        raise checks.wrong_value("attn_mask", "None with a packed layout", bias)
    keys, size = layout.modality.shape[1], (bias.seq_len_q, bias.seq_len_kv)
    if size != (rows, keys):
        raise checks.wrong_value("attn_mask", f"a CausalBias of Lq x L = {rows} x {keys}", f"{size[0]} x {size[1]}")
    last = keys - rows
    offset = last if bias.variant.name == "LOWER_RIGHT" else 0  # row i sees columns up to i + offset
    start = last if query_start is None else query_start
    if isinstance(start, int) and start == offset:  # row i stands in that column
        if replaceable:
            return default_mask(layout.num_roles, True), None
        if not any(rule & ~Visibility.PAST for row in mask.rules for rule in row):
            return mask, None
    return mask, torch.ones(rows, keys, dtype=torch.bool, device=layout.device).tril(offset)


def _check_pair_bias(pair_bias: Tensor, layout: ModalityLayout, heads: int) -> None:
    checks.float_tensor("pair_bias", pair_bias)
    n, m = layout.num_sequences, layout.num_modalities
    sizes = tuple(pair_bias.shape)
    if len(sizes) != 4 or sizes[0] not in (1, n) or sizes[1] not in (1, heads) or sizes[2:] != (m, m):
        raise checks.wrong_value("pair_bias", f"[N or 1, Hq or 1, M, M] with N, Hq, M = {n}, {heads}, {m}", pair_bias)
    checks.same_device("pair_bias", pair_bias, layout.device, "the layout")


def _check_per_head(name: str, value: Any, heads: int, device: torch.device) -> None:
    """A finite float, or a tensor ``[Hq]``."""
    if isinstance(value, Tensor):
        checks.shape(name, checks.float_tensor(name, value), (heads,), "[Hq]")
        checks.same_device(name, value, device, "the layout")
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise checks.wrong_type(name, "a float or a tensor [Hq]", value)
    elif not math.isfinite(value):
        raise checks.wrong_value(name, "a finite number", value)


def _checked_branch_weights(weights: Any, heads: int, device: torch.device) -> tuple[float | Tensor, float | Tensor]:
    if weights is None:
        return 1.0, 1.0
    if isinstance(weights, Tensor) or not isinstance(weights, tuple | list) or len(weights) != 2:
        raise checks.wrong_value("branch_weights", "a pair (self, cross)", weights)
    for name, weight in zip(("self", "cross"), weights, strict=True):
        _check_per_head(f"branch_weights ({name})", weight, heads, device)
    return weights[0], weights[1]
