"""Maps of keys: k'_t = k_t A, one small matrix per sequence and modality (spec: "Duplex alignment").

All fusions are linear in the key once the normed Gram is known. So a map is a few D×D matrices, made by plain autograd
over small tensors from one big reduction (`ops.segment_gram`) and applied by one projection (`ops.segment_project`).
`causal.py` holds the map of the causal scope: one matrix per segment.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moda_kernels import checks, ops
from moda_kernels.layout import ModalityLayout


def normed(gram: Tensor, norm: str) -> Tensor:
    """Rows ("row") or whole matrices ("frobenius") divided by their L2 norm; zeros stay zero, with zero gradient."""
    axes = (-1,) if norm == "row" else (-2, -1)
    # The result does not depend on the size, so dividing by a constant first is exact and keeps squares in range.
    peak = gram.detach().abs().amax(axes, keepdim=True)
    scaled = gram / torch.where(peak > 0, peak, 1)
    square = scaled.square().sum(axes, keepdim=True)
    return torch.where(square > 0, scaled * torch.where(square > 0, square, 1).rsqrt(), 0)


def sum_of_others(gram: Tensor) -> Tensor:
    """R ``[N, M, …]`` from G ``[N, M, …]``: for each modality the sum over the others. (Total minus own would lose
    digits, which the norm then amplifies.)"""
    parts = gram.unbind(1)
    before, after = [torch.zeros_like(parts[0])], [torch.zeros_like(parts[0])]
    for part, other in zip(parts[:-1], parts[:0:-1], strict=True):
        before.append(before[-1] + part)
        after.append(after[-1] + other)
    return torch.stack([a + b for a, b in zip(before, reversed(after), strict=True)], 1)


def fused_matrix(rest: Tensor, ratio: Tensor | None, weight: Tensor | None, fusion: str) -> Tensor:
    """A of k' = k A from the normed rest R̂.

    Args:
        rest: ``[…, H, D, D]``.
        ratio: ρ ``[…, D]`` (add, linear); weight: W ``[…, D, D]`` (linear) or ``[…, D, 2D]`` (concat).
    """
    dim = rest.shape[-1]
    if fusion == "concat":
        assert weight is not None
        own, other = weight[..., None, :, :dim], weight[..., None, :, dim:]
        return own.transpose(-1, -2) + rest @ other.transpose(-1, -2)
    assert ratio is not None
    added = torch.eye(dim, dtype=rest.dtype, device=rest.device) + rest * ratio[..., None, None, :]
    if fusion == "add":
        return added
    assert weight is not None
    return added @ weight[..., None, :, :].transpose(-1, -2)


class KeyMap:
    """A linear map of keys, made by a :class:`DuplexAligner` or by :func:`released_key_map`.

    Applied by :func:`align_keys`, or by :func:`moda_kernels.moda_attention`, which need not write the aligned keys.

    Attributes:
        num_heads, head_dim: Hkv and D of the keys that it maps.
        layout: of the keys that it was made from.
    """

    num_heads: int
    head_dim: int
    layout: ModalityLayout

    @property
    def num_modalities(self) -> int:
        return self.layout.num_modalities

    def check(self, layout: ModalityLayout, num_heads: int, head_dim: int) -> None:
        """Raise a ValueError where this map is for other keys."""
        if (self.num_heads, self.head_dim) != (num_heads, head_dim):
            raise checks.wrong_value(
                "key_map", f"a map for {num_heads} key heads of size {head_dim}", f"{self.num_heads} of {self.head_dim}"
            )
        if layout is self.layout:
            return
        mine, theirs = self.layout.modality, layout.modality
        fits = (mine.shape, mine.device, self.num_modalities) == (theirs.shape, theirs.device, layout.num_modalities)
        # On CUDA values are not looked at.
        if fits and checks.looks_at_values(mine.device):
            fits = torch.equal(self.layout.segment, layout.segment) and torch.equal(mine, theirs)
            fits = fits and torch.equal(self.layout.cu_seqlens, layout.cu_seqlens)
        if not fits:
            raise checks.wrong_value("key_map", f"a map made with {layout!r}", f"one made with {self.layout!r}")

    def align(self, key: Tensor, layout: ModalityLayout) -> Tensor:
        """Fused keys of ``[T, Hkv, D]`` or ``[B, L, Hkv, D]``, in the same shape and dtype."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class ModalityMap(KeyMap):
    """k'_t = k_t A[n, m] + u_t B[n, m]: one matrix per sequence and modality (scope "sequence", and the release).

    Attributes:
        matrix: A ``[N, M, Hkv, D, D]``, the identity where keys stay as they are.
        mapped: bool ``[N, M]``, which keys are mapped.
        unit_matrix: B of the released variant, else None; u_t is the normed key.
        layout: of the keys that it was made from.
    """

    matrix: Tensor
    mapped: Tensor
    unit_matrix: Tensor | None
    layout: ModalityLayout

    @property
    def num_heads(self) -> int:  # type: ignore[override]
        return self.matrix.shape[2]

    @property
    def head_dim(self) -> int:  # type: ignore[override]
        return self.matrix.shape[3]

    @property
    def foldable(self) -> bool:
        """Linear in the key: q·(k A) = (q Aᵀ)·k, so a backend may fold it into the query."""
        return self.unit_matrix is None

    def align(self, key: Tensor, layout: ModalityLayout) -> Tensor:
        grouping = layout.grouping("modality").only(self.mapped.flatten())
        matrix = self.matrix.flatten(0, 1)
        unit = None if self.unit_matrix is None else self.unit_matrix.flatten(0, 1)
        return ops.segment_project(key, matrix, grouping, unit_matrix=unit, keep=True)
