"""The two products of duplex alignment with gradients.

`segment_gram` and `segment_project` (spec: "Duplex alignment") are each other's gradient; each is one
`torch.autograd.Function` over a grouped product. Faster kernels go under them without touching anything above.
"""

from typing import Any

import torch
from torch import Tensor

from moda_kernels import grouped


class SegmentGram(torch.autograd.Function):
    """G[g] = Σ_{t in group g} x_tᵀ y_t; dx = project(y, dGᵀ), dy = project(x, dG)."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, group: Tensor, num_groups: int) -> Tensor:
        return grouped.segment_gram(x, y, group, num_groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, group = ctx.saved_tensors
        dx = segment_project(y, grad.transpose(-1, -2), group).to(x.dtype) if ctx.needs_input_grad[0] else None
        dy = segment_project(x, grad, group).to(y.dtype) if ctx.needs_input_grad[1] else None
        return dx, dy, None, None


class SegmentProject(torch.autograd.Function):
    """y_t = x_t A[group(t)]; dx = project(dy, Aᵀ), dA = gram(x, dy)."""

    @staticmethod
    def forward(x: Tensor, matrix: Tensor, group: Tensor) -> Tensor:
        return grouped.segment_project(x, matrix, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, matrix, group = ctx.saved_tensors
        dx = segment_project(grad, matrix.transpose(-1, -2), group).to(x.dtype) if ctx.needs_input_grad[0] else None
        dmatrix = None
        if ctx.needs_input_grad[1]:
            dmatrix = segment_gram(x, grad, group, matrix.shape[0]).to(matrix.dtype)
        return dx, dmatrix, None


def segment_gram(x: Tensor, y: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Σ x_tᵀ y_t per group: x ``[T, H, D]``, y ``[T, H, E]``, group int64 ``[T]`` (-1: none) → ``[G, H, D, E]`` in
    float32 (float64 for float64 input). Differentiable in x and y, to any order."""
    out: Tensor = SegmentGram.apply(x, y, group, num_groups)
    return out


def segment_project(x: Tensor, matrix: Tensor, group: Tensor) -> Tensor:
    """x_t A[group(t)]: x ``[T, H, D]``, matrix ``[G, H, D, E]``, group int64 ``[T]`` (-1: the result is 0) →
    ``[T, H, E]`` in x's dtype. Differentiable in x and matrix, to any order."""
    out: Tensor = SegmentProject.apply(x, matrix, group)
    return out
