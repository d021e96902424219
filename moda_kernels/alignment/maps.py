"""Maps of keys: k'_t = k_t A, one small matrix per sequence and modality (spec: "Duplex alignment").

All fusions are linear in the key once the normed Gram is known. So a map is a few D×D matrices, made by plain autograd
over small tensors from one big reduction (`products.segment_gram`) and applied by
one projection (`products.segment_project`).
`causal.py` holds the map of the causal scope: one matrix per segment.
"""

import abc
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moda_kernels import products
from moda_kernels.products.twin import compute_dtype
from moda_kernels.runtime import checks, sharded
from moda_kernels.tokens.layout import ModalityLayout
from moda_kernels.tokens.segments import as_layout

FUSIONS = ("add", "linear", "concat")
NORMS = ("row", "frobenius")


class Normed(torch.autograd.Function):
    """x divided by its L2 norm over some axes, and the norm (with its axes); of zeros 0 and infinity. A function of its
    own, because for autograd this would be ten small operations where four do."""

    @staticmethod
    def forward(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        # The result does not depend on the size, so dividing by a constant first is exact and keeps squares in range.
        peak = x.abs().amax(axes, keepdim=True)
        peak = peak.masked_fill(peak == 0, float("inf"))
        scaled = x / peak
        length = torch.linalg.vector_norm(scaled, 2, axes, keepdim=True).clamp(min=0.5)  # at least 1, or that of zeros
        return scaled / length, peak * length

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.axes = inputs[1]
        ctx.save_for_backward(*output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, of_length: Tensor | None) -> tuple[Tensor | None, None]:
        unit, length = ctx.saved_tensors
        dx = None
        if grad is not None:
            along = (grad * unit).sum(ctx.axes, keepdim=True)
            dx = torch.addcmul(grad, unit, along, value=-1) / length
        if of_length is not None:
            dx = of_length * unit if dx is None else torch.addcmul(dx, of_length, unit)
        return dx, None


def normed(gram: Tensor, norm: str) -> Tensor:
    """Rows ("row") or whole matrices ("frobenius") divided by their L2 norm; zeros stay zero, with zero gradient. What
    is not finite gives NaN."""
    return _unit_and_length(gram, (-1,) if norm == "row" else (-2, -1))[0]


def _unit_and_length(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """`Normed`, as a function only where there is a gradient: that costs more than what it does to one token."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return Normed.forward(x, axes)
    out: tuple[Tensor, Tensor] = Normed.apply(x, axes)
    return out


def sum_of_others(gram: Tensor) -> Tensor:
    """R ``[N, M, …]`` from G ``[N, M, …]``: for each modality the sum over the others. (Total minus own would lose
    digits, which the norm then amplifies.)"""
    if gram.shape[1] == 2:
        return gram.flip(1)
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


def projected(
    key: Tensor, matrix: Tensor, grouping: products.Grouping, mapped: Tensor | None, *, renorm: bool, keep: bool = True
) -> Tensor:
    """k' of `key` ``[…, Hkv, D]``: k A of its group's matrix ``[G, Hkv, D, D]``, for the tokens that have a group;
    others stay as they are (keep) or give 0.

    Args:
        mapped: bool ``[tokens]``, which tokens have a group; only with `renorm`.
        renorm: multiply by ‖k‖ / ‖k'‖.
    """
    if not renorm or mapped is None:
        return products.segment_project(key, matrix, grouping, keep=keep)
    dtype = compute_dtype(key, matrix)
    fused = products.segment_project(key, matrix, grouping, out_dtype=dtype)
    of_token = mapped.view(*key.shape[:-2], 1, 1)
    # Keys that are not mapped may hold anything.
    fused = renormed(fused, key.masked_fill(~of_token, 0).to(dtype)).to(key.dtype)
    return torch.where(of_token, fused, key) if keep else fused


def renormed(fused: Tensor, key: Tensor) -> Tensor:
    """The fused keys with the lengths of the keys; 0 stays 0."""
    unit, length = _unit_and_length(fused, (-1,))[0], _unit_and_length(key, (-1,))[1]
    return unit * length.masked_fill(length.isinf(), 0)


class KeyMap(abc.ABC):
    """A linear map of keys, made by a :class:`DuplexAligner` or by :func:`released_key_map`.

    Applied by :func:`align_keys`, or by :func:`moda_kernels.moda_attention`, which need not write the aligned keys.

    Attributes:
        num_heads, head_dim: Hkv and D of the keys that it maps.
        layout: of the keys that it was made from.
    """

    layout: ModalityLayout

    @property
    @abc.abstractmethod
    def num_heads(self) -> int: ...

    @property
    @abc.abstractmethod
    def head_dim(self) -> int: ...

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
            names = ("segment", "modality", "role", "chunk", "cu_seqlens")
            fits = all(torch.equal(getattr(self.layout, name), getattr(layout, name)) for name in names)
        if not fits:
            raise checks.wrong_value("key_map", f"a map made with {layout!r}", f"one made with {self.layout!r}")

    @abc.abstractmethod
    def align(self, key: Tensor, layout: ModalityLayout) -> Tensor:
        """Fused keys of ``[T, Hkv, D]`` or ``[B, L, Hkv, D]``, in the same shape and dtype."""


@dataclass(frozen=True, eq=False)
class ModalityMap(KeyMap):
    """k'_t = k_t A[n, m] + u_t B[n, m]: one matrix per sequence and modality (scope "sequence", and the release).

    Attributes:
        matrix: A ``[N, M, Hkv, D, D]``, the identity where keys stay as they are.
        mapped: bool ``[N, M]``, which keys are mapped.
        unit_matrix: B of the released variant, else None; u_t is the normed key.
        layout: of the keys that it was made from.
        renorm: mapped keys keep their lengths.
    """

    matrix: Tensor
    mapped: Tensor
    unit_matrix: Tensor | None
    layout: ModalityLayout
    renorm: bool = False

    @property
    def num_heads(self) -> int:
        return self.matrix.shape[2]

    @property
    def head_dim(self) -> int:
        return self.matrix.shape[3]

    @property
    def foldable(self) -> bool:
        """Linear in the key: q·(k A) = (q Aᵀ)·k, so a backend may fold it into the query."""
        return self.unit_matrix is None and not self.renorm

    def align(self, key: Tensor, layout: ModalityLayout) -> Tensor:
        grouping = layout.grouping("modality").only(self.mapped.flatten())
        matrix = self.matrix.flatten(0, 1)
        if self.unit_matrix is not None:
            return products.segment_project(
                key, matrix, grouping, unit_matrix=self.unit_matrix.flatten(0, 1), keep=True
            )
        mapped = self._mapped_tokens(layout) if self.renorm else None
        return projected(key, matrix, grouping, mapped, renorm=self.renorm)

    def _mapped_tokens(self, layout: ModalityLayout) -> Tensor:
        """bool ``[tokens]``."""
        group = layout.groups("modality")
        if self.mapped.numel() == 0:
            return torch.zeros_like(group, dtype=torch.bool)
        return (group >= 0) & self.mapped.flatten()[group.clamp(min=0)]


@dataclass(frozen=True, eq=False)
class KeptKeys(KeyMap):
    """The map of a causal layer while decoding: aligned keys that were made before.

    Attributes:
        keys: aligned, in the shape of the cache's raw keys.
        layout: of these keys.
    """

    keys: Tensor
    layout: ModalityLayout

    @property
    def num_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def head_dim(self) -> int:
        return self.keys.shape[-1]

    def align(self, key: Tensor, layout: ModalityLayout) -> Tensor:
        tokens = self.keys if layout.packed else self.keys.transpose(1, 2).flatten(0, 1)
        return tokens.to(key.dtype)


def token_major(name: str, x: Tensor, layout: ModalityLayout) -> Tensor:
    """``[B, H, L, D]`` or packed ``[T, H, D]``, checked against the layout → the view ``[B, L, H, D]``, or itself."""
    checks.float_tensor(name, x)
    checks.same_device(name, x, layout.device, "the layout")
    if layout.packed:
        if x.dim() != 3 or x.shape[0] != layout.num_tokens:
            raise checks.wrong_value(name, f"[T, H, D] with T = {layout.num_tokens}, as the packed layout", x)
        return x
    batch, length = layout.modality.shape
    if x.dim() != 4 or x.shape[0] != batch or x.shape[2] != length:
        raise checks.wrong_value(name, f"[B, H, L, D] with B = {batch} and L = {length}, as the layout", x)
    return x.transpose(1, 2)


def to_tokens(name: str, x: Tensor, layout: ModalityLayout) -> Tensor:
    """The same → ``[tokens, H, D]``."""
    return token_major(name, x, layout).flatten(0, -3)


def from_tokens(x: Tensor, layout: ModalityLayout) -> Tensor:
    """``[B, L, H, D]`` or ``[tokens, H, D]`` → the layout's own shape."""
    return x if layout.packed else x.view(*layout.modality.shape, *x.shape[-2:]).transpose(1, 2)


def align_keys(key: Tensor, key_map: KeyMap, layout: ModalityLayout | Tensor) -> Tensor:
    """The fused keys k', written out (MODA Eq. 6).

    Args:
        key: ``[B, Hkv, L, D]``, packed ``[T, Hkv, D]``, or a DTensor sharded over heads, as the map was made from.
        key_map: from a :class:`DuplexAligner` or :func:`released_key_map`, made with the same layout.
        layout: the keys' layout (or modality ids ``[B, L]``).

    Returns:
        Keys of the same shape and dtype; those that are not mapped are returned bit for bit.

    Raises:
        ValueError, TypeError: keys, map and layout that don't fit each other.
    """
    if not isinstance(key_map, KeyMap):
        raise checks.wrong_type("key_map", "a KeyMap (call the aligner on the keys)", key_map)
    heads = sharded.heads_of(key=key)
    if heads is not None:
        return heads.whole(align_keys(heads.local(key), key_map, layout), 1)
    layout = as_layout(layout, key_map.num_modalities)
    tokens = token_major("key", key, layout)
    key_map.check(layout, *tokens.shape[-2:])
    if isinstance(key_map, KeptKeys):
        return key_map.keys.to(key.dtype)
    return from_tokens(key_map.align(tokens, layout), layout)
