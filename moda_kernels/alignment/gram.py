"""Gram sums per modality or segment as a public function, and how alike two of them are."""

import torch
from torch import Tensor

from moda_kernels import products
from moda_kernels.alignment.maps import NORMS, normed, token_major
from moda_kernels.products.twin import compute_dtype
from moda_kernels.runtime import checks, sharded
from moda_kernels.tokens.layout import ModalityLayout
from moda_kernels.tokens.segments import as_layout


def modality_gram(x: Tensor, y: Tensor, layout: ModalityLayout | Tensor, by: str = "modality") -> Tensor:
    """Gram matrices Σ x_tᵀ y_t per modality or segment and head (MODA Eq. 5).

    Args:
        x: ``[B, H, L, D]``, packed ``[T, H, D]``. y: the same with size E (pass x twice for the Gram basis).
            Both may be DTensors sharded over heads; then so is the result.
        layout: their layout (or modality ids ``[B, L]``).
        by: "modality" or "segment".

    Returns:
        ``[N, M, H, D, E]``, or ``[S, H, D, E]`` with S the layout's ``max_segments``; float32, float64 for float64.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that don't fit.
    """
    spread = sharded.heads_of(x=x, y=y)
    if spread is not None:
        mine = spread.local(x)
        gram = modality_gram(mine, mine if y is x else spread.local(y), layout, by)
        return spread.whole(gram, 2 if by == "modality" else 1)
    layout = as_layout(layout)
    checks.choice("by", by, ("modality", "segment"))
    xs = token_major("x", x, layout)
    ys = xs if y is x else token_major("y", y, layout)
    heads = (layout.num_tokens, xs.shape[-2])
    checks.shape("y", ys[..., 0].flatten(0, -2), heads, "of x but for its last axis (tokens, heads)")
    gram = products.segment_gram(xs, ys, layout.grouping(by))
    return gram.unflatten(0, tuple(layout.counts.shape)) if by == "modality" else gram


def gram_affinity(gram: Tensor, norm: str = "row") -> Tensor:
    """How alike the modalities' normed Gram matrices are (the paper's conditional mask, "Attn." of table 1d).

    Args:
        gram: ``[N, M, H, D, E]``, from :func:`modality_gram` by modality.
        norm: as in :class:`DuplexAligner`.

    Returns:
        ``[N, H, M, M]`` cosines ⟨Ĝ[a], Ĝ[b]⟩ / (‖Ĝ[a]‖ ‖Ĝ[b]‖), 0 where a Gram is 0. For use as ``pair_bias`` repeat to
        query heads and multiply by a learned strength; it looks ahead as the sequence scope does.

    Raises:
        ValueError, TypeError: another rank or norm.
    """
    checks.float_tensor("gram", gram)
    checks.choice("norm", norm, NORMS)
    if gram.dim() != 5:
        raise checks.wrong_value("gram", "[N, M, H, D, E]", gram)
    with torch.autocast(gram.device.type, enabled=False):
        flat = normed(gram.to(compute_dtype(gram)), norm).flatten(-2)
        flat = normed(flat[..., None, :], "frobenius")[..., 0, :].transpose(1, 2)
        return flat @ flat.transpose(-1, -2)
