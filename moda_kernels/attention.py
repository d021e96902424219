"""`moda_attention`: MODA attention behind the signature of torch's scaled_dot_product_attention."""

from collections.abc import Callable
from typing import Any, Literal, TypedDict, Unpack, overload

import torch.nn.functional as F
from torch import Tensor

from moda_kernels import backends
from moda_kernels.alignment.maps import KeyMap
from moda_kernels.alignment.memory import DecodeState, LayerState
from moda_kernels.call import AttentionCall
from moda_kernels.runtime import sharded
from moda_kernels.tokens.layout import ModalityLayout
from moda_kernels.tokens.mask import ModularMask
from moda_kernels.tokens.pseudo import PseudoAttention

Weight = float | Tensor
#: What every call with modality arguments is shown to on its way to a backend: by `diagnostics`, while it reports.
watchers: list[Callable[[AttentionCall], None]] = []


class ModalArguments(TypedDict, total=False):
    """The keyword-only arguments of :func:`moda_attention`, but ``return_lse``."""

    layout: ModalityLayout | Tensor | None
    mask: ModularMask | None
    key_map: KeyMap | None
    pair_bias: Tensor | None
    softcap: float | None
    pseudo: PseudoAttention | None
    duplex: str
    branch_weights: tuple[Weight, Weight] | None
    query_start: int | Tensor | None
    cu_seqlens_q: Tensor | None
    state: DecodeState | LayerState | None
    backend: str | None


@overload
def moda_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    return_lse: Literal[False] = False,
    **modal: Unpack[ModalArguments],
) -> Tensor: ...


@overload
def moda_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    return_lse: Literal[True],
    **modal: Unpack[ModalArguments],
) -> tuple[Tensor, Tensor]: ...


def moda_attention(
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
    branch_weights: tuple[Weight, Weight] | None = None,
    query_start: int | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    state: DecodeState | LayerState | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""MODA attention (arXiv 2507.04635, Eq. 5-10); without modality arguments exactly torch SDPA.

    .. math:: O_i = \frac{\sum_{j \in V(i)} e^{s_{ij}} v_j}{\sum_{j \in V(i)} e^{s_{ij}} + P_i}, \quad
              s_{ij} = c(\tau^{-1} q_i \cdot k'_j) + bias[m_i, m_j] + attn\_mask_{ij}

    Shapes: N sequences (B rows, or documents), M modalities, Hq query heads, Hkv key heads (Hq a multiple of Hkv),
    D and E the key and value head sizes. Batch layouts take 4-D tensors (torch SDPA's shapes), packed layouts 3-D ones
    (FlashAttention's varlen shapes). query, key and value have one dtype (any floating-point one) and one device;
    softmax, lse and Gram sums are computed in float32 (float64 for float64). All three may be DTensors sharded over
    heads (tensor parallelism): then so are the results, and nothing is sent but gradients of what all heads share.

    Args:
        query: ``[B, Hq, Lq, D]``, packed ``[Tq, Hq, D]``.
        key: ``[B, Hkv, L, D]``, packed ``[T, Hkv, D]``, not aligned (``key_map`` does that).
        value: ``[B, Hkv, L, E]``, packed ``[T, Hkv, E]``.
        attn_mask: as in torch SDPA: bool (True: take part) or float (added to the scores), broadcast to
            ``[B, Hq, Lq, L]``; on top of ``mask``; torch's ``CausalBias`` too. Not with packed layouts.
        dropout_p: with modality arguments only 0.0.
        is_causal: without ``mask``: a causal mask in place of a full one.
        scale: τ⁻¹. Default: 1/√D.
        enable_gqa: True where Hq and Hkv differ.
        layout: the keys' :class:`ModalityLayout`, or modality ids ``[B, L]`` (segmented by the call).
        mask: who sees whom (Eq. 7-8), a rule for each pair of the layout's roles. Default: full, or causal with
            ``is_causal``.
        key_map: from a :class:`DuplexAligner` (Eq. 5-6) or :func:`released_key_map`, made for these keys.
        pair_bias: float ``[N or 1, Hq or 1, M, M]``: added to the scores of (query modality, key modality).
        softcap: a number > 0: c(s) = softcap · tanh(s / softcap), before biases and masks (Gemma 2). Default: c(s) = s.
            The backends "triton" and "cpu" refuse it.
        pseudo: pseudo-attention scores (Eq. 9-10).
        duplex: "joint": one softmax (as released); "split": one over keys of the query's modality and one over the
            others, added with ``branch_weights`` (Eq. 7-8 as written).
        branch_weights: (self, cross), each a float or ``[Hq]``. Default: (1, 1).
        query_start: with fewer queries than keys (a KV cache), the key column of query 0: an int, or an integer tensor
            ``[N]``. Default: the queries are the last columns.
        cu_seqlens_q: packed layouts with fewer queries than keys: int32 ``[N + 1]``, each document's query rows, which
            are its last tokens.
        state: while decoding, a :class:`DecodeState` (or one of its layers) in place of ``layout``, ``query_start`` and
            ``cu_seqlens_q``: key and value are the cache's, the queries the newest tokens.
        return_lse: also return the log of the softmax sums (natural log, pseudo scores included, differentiable).
        backend: a backend's name, or "auto". Default: see :func:`use_backend`.

    Returns:
        The output in the query's dtype: ``[B, Hq, Lq, E]``, packed ``[Tq, Hq, E]``. A padding query gives 0; a row that
        sees nothing gives 0. With ``return_lse`` also lse ``[B, Hq, Lq]``, packed ``[Hq, Tq]``, in float32 (float64);
        with "split" one more axis of 2 (self, cross).

    Raises:
        ValueError, TypeError: arguments that don't fit each other, before any work; modality arguments or
            ``return_lse`` without a layout.
        NotImplementedError: a combination that no backend (or not the one named) can run, with every reason.
    """
    modal = (mask, key_map, pair_bias, softcap, pseudo, branch_weights, query_start, cu_seqlens_q, state)
    if layout is None and not return_lse and duplex == "joint" and all(argument is None for argument in modal):
        if backend is not None:
            backends.named_backend(backend)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    heads = sharded.heads_of(query=query, key=key, value=value)
    if heads is not None:
        every = query.shape[1]
        out, lse = moda_attention(
            heads.local(query),
            heads.local(key),
            heads.local(value),
            heads.own("attn_mask", attn_mask, -3, every),
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            layout=layout,
            mask=mask,
            key_map=key_map,
            pair_bias=heads.own("pair_bias", pair_bias, 1, every),
            softcap=softcap,
            pseudo=own_pseudo(pseudo, heads, every),
            duplex=duplex,
            branch_weights=own_weights(branch_weights, heads, every),
            query_start=query_start,
            cu_seqlens_q=cu_seqlens_q,
            state=state,
            return_lse=True,
            backend=backend,
        )
        out = heads.whole(out, 1)
        return (out, heads.whole(lse, 0 if query.dim() == 3 else 1)) if return_lse else out
    call = AttentionCall.make(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        layout=layout,
        mask=mask,
        key_map=key_map,
        pair_bias=pair_bias,
        softcap=softcap,
        pseudo=pseudo,
        duplex=duplex,
        branch_weights=branch_weights,
        query_start=query_start,
        cu_seqlens_q=cu_seqlens_q,
        state=state,
        return_lse=return_lse,
    )
    for watch in watchers:
        watch(call)
    out, lse = backends.choose(call, backend).attend(call)
    return (out, lse) if return_lse else out


def own_pseudo(pseudo: PseudoAttention | None, heads: sharded.Heads, every: int) -> PseudoAttention | None:
    """Of `every` query heads those that are here."""
    if not isinstance(pseudo, PseudoAttention):
        return pseudo
    base, decay = (heads.own(name, x, 0, every) for name, x in pseudo.parameters.items())
    return PseudoAttention(base, decay, pseudo.length)


def own_weights(weights: Any, heads: sharded.Heads, every: int) -> Any:
    """Of `every` query heads those that are here."""
    if not isinstance(weights, tuple | list):
        return weights
    return tuple(heads.own("branch_weights", weight, 0, every) for weight in weights)
