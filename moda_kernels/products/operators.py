"""The two products of duplex alignment: opaque operators, and gradients above them.

`segment_gram` and `segment_project` (spec: "Duplex alignment") are each other's gradient: one
`torch.autograd.Function` each, over operators that choose at run time, unseen by a compiler, between the kernels of
`kernels.py` and the PyTorch of `twin.py`. Both take tokens sorted by group (`Grouping`), which depends on the
group ids alone: layouts keep theirs.
"""

from typing import Any

import torch
from torch import Tensor

from moda_kernels.products import twin
from moda_kernels.products.twin import Grouping, compute_dtype, released_unit_backward
from moda_kernels.runtime import checks, gpu, self_check
from moda_kernels.runtime.operators import operator, register_vmap

# Operators (private: without gradients)


def _uses_kernels(kind: str, x: Tensor, y: Tensor | None, unit: Tensor | bool | None) -> bool:
    """Whether the kernel of a kind ("Gram", "projection") serves these tensors, and is trusted where they are."""
    if not gpu.runs_on(x.device):
        return False
    from moda_kernels.products import kernels as kernels

    if kernels.why_not(*(t for t in (x, y, unit) if isinstance(t, Tensor))) is not None:
        return False
    if not self_check.wanted(x.device):
        return True
    y = x if y is None else y
    has_unit = unit is True or isinstance(unit, Tensor)
    named = kind, *(str(t.dtype).removeprefix("torch.") for t in (x, y)), f"D={x.shape[-1]}", f"E={y.shape[-1]}"
    numbers = x.dtype, y.dtype, x.shape[-1], y.shape[-1], x.device
    tried = (*named, "unit") if has_unit else named
    return self_check.why_not(tried, x.device, lambda: _trial(kind, *numbers, has_unit)) is None


def _trial(
    kind: str, dtype: torch.dtype, other: torch.dtype, dim: int, size: int, device: torch.device, unit: bool
) -> str | None:
    """What is wrong with a small product of a kernel, beside its twin's; None if nothing."""
    from moda_kernels.products import kernels as kernels

    g, tokens, heads = torch.Generator().manual_seed(0), 150, 2
    group = (torch.arange(tokens) // 41 - 1).to(device)  # -1, 0, 1, 2
    grouping = twin.group_tokens(group, 3)
    x = torch.randn(tokens, heads, dim, generator=g).to(device, dtype)
    arguments = (grouping.order, _used(*grouping))
    if kind == "Gram":
        y = torch.randn(tokens, heads, size, generator=g).to(device, other)
        eps = twin.RELEASED_EPS if unit else None
        got = kernels.segment_gram(x, y, *arguments, grouping.groups, slots=twin.SLOTS, eps=eps)
        usual, exact = (twin.segment_gram(*pair, grouping, unit) for pair in ((x, y), (x.double(), y.double())))
    else:
        matrices = [torch.randn(3, heads, dim, size, generator=g).to(device, other) for _ in range(1 + unit)]
        second = matrices[1] if unit else None
        got = kernels.segment_project(
            x, matrices[0], second, *arguments, keep=False, dtype=dtype, eps=twin.RELEASED_EPS
        )
        wide = [m.double() for m in matrices]
        usual, exact = (
            twin.segment_project(of, m[0], grouping, unit_matrix=m[1] if unit else None, keep=False, out_dtype=of.dtype)
            for of, m in ((x, matrices), (x.double(), wide))
        )
    return self_check.difference(f"the {kind}", got, usual, exact)


def _tokens(x: Tensor) -> Tensor:
    """``[B, L, H, D]`` as ``[T, H, D]``."""
    return x.flatten(0, -3)


def _used(order: Tensor, pieces: Tensor, groups: Tensor) -> Tensor:
    """The pieces that can exist: a group's last one, and those with all their rows."""
    return pieces[: order.numel() // twin.ROWS + groups.shape[0] + 1]


def _group_tokens(group: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    order, pieces, groups = twin.group_tokens(group, num_groups)
    return order, pieces, groups


def _group_tokens_fake(group: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    def integers(*shape: int) -> Tensor:
        return group.new_empty(shape, dtype=torch.int32)

    return integers(group.shape[0]), integers(twin.PIECES + num_groups + 1, 4), integers(num_groups, 4)


def _segment_gram(x: Tensor, y: Tensor | None, order: Tensor, pieces: Tensor, groups: Tensor, unit: bool) -> Tensor:
    if _uses_kernels("Gram", x, y, unit):
        from moda_kernels.products import kernels as kernels

        eps = twin.RELEASED_EPS if unit else None
        used = _used(order, pieces, groups)
        return kernels.segment_gram(x, y, order, used, groups, slots=twin.SLOTS, eps=eps)
    other = _tokens(x if y is None else y)
    return twin.segment_gram(_tokens(x), other, Grouping(order, pieces, groups), unit)


def _segment_gram_fake(
    x: Tensor, y: Tensor | None, order: Tensor, pieces: Tensor, groups: Tensor, unit: bool
) -> Tensor:
    y = x if y is None else y
    return x.new_empty((groups.shape[0], x.shape[-2], x.shape[-1], y.shape[-1]), dtype=compute_dtype(x, y))


def _segment_project(
    x: Tensor,
    matrix: Tensor,
    unit_matrix: Tensor | None,
    order: Tensor,
    pieces: Tensor,
    groups: Tensor,
    keep: bool,
    dtype: torch.dtype,
) -> Tensor:
    if dtype != torch.float64 and _uses_kernels("projection", x, matrix, unit_matrix):
        from moda_kernels.products import kernels as kernels

        eps = twin.RELEASED_EPS
        used = _used(order, pieces, groups)
        return kernels.segment_project(x, matrix, unit_matrix, order, used, keep=keep, dtype=dtype, eps=eps)
    grouping = Grouping(order, pieces, groups)
    out = twin.segment_project(
        _tokens(x), matrix, grouping, unit_matrix=unit_matrix, keep=keep, out_dtype=dtype
    )  # a view of a larger tensor where nothing is left over for an operator to return
    return out.reshape(*x.shape[:-1], matrix.shape[-1]).contiguous()


def _segment_project_fake(
    x: Tensor,
    matrix: Tensor,
    unit_matrix: Tensor | None,
    order: Tensor,
    pieces: Tensor,
    groups: Tensor,
    keep: bool,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], matrix.shape[-1]), dtype=dtype)


_GROUPING = "Tensor order, Tensor pieces, Tensor groups"
_op_group_tokens = operator(
    "_group_tokens(Tensor group, SymInt num_groups) -> (Tensor, Tensor, Tensor)", _group_tokens, _group_tokens_fake
)
_op_segment_gram = operator(
    f"_segment_gram(Tensor x, Tensor? y, {_GROUPING}, bool unit) -> Tensor", _segment_gram, _segment_gram_fake
)
_op_segment_project = operator(
    f"_segment_project(Tensor x, Tensor matrix, Tensor? unit_matrix, {_GROUPING}, bool keep, ScalarType dtype)"
    " -> Tensor",
    _segment_project,
    _segment_project_fake,
)


def _group_tokens_vmap(info: Any, in_dims: tuple[int | None, ...], group: Tensor, num_groups: int) -> Any:
    rows = [_op_group_tokens(row, num_groups) for row in group.unbind(in_dims[0] or 0)]
    return tuple(torch.stack(tensors) for tensors in zip(*rows, strict=True)), (0, 0, 0)


register_vmap("_group_tokens", _group_tokens_vmap)


# Gradients


class SegmentGram(torch.autograd.Function):
    """G[g] = Σ_{t in group g} x_tᵀ y_t; dx = project(y, dGᵀ), dy = project(x, dG). y None: x. unit: of the normed x."""

    @staticmethod
    def forward(x: Tensor, y: Tensor | None, order: Tensor, pieces: Tensor, groups: Tensor, unit: bool) -> Tensor:
        out: Tensor = _op_segment_gram(x, y, order, pieces, groups, unit)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.unit = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *plan = ctx.saved_tensors
        grouping, turned = Grouping(*plan), grad.transpose(-1, -2)
        dx = dy = None
        if y is None:  # both sides in one pass
            dx = segment_project(x, grad + turned, grouping)
        elif ctx.needs_input_grad[0] and ctx.unit:
            dx = _through_unit(x, segment_project(y, turned, grouping, out_dtype=grad.dtype), grouping)
        elif ctx.needs_input_grad[0]:
            dx = segment_project(y, turned, grouping, out_dtype=x.dtype)
        if ctx.needs_input_grad[1] and ctx.unit:
            dy = segment_project(x, torch.zeros_like(grad), grouping, unit_matrix=grad, out_dtype=y.dtype)
        elif ctx.needs_input_grad[1]:
            dy = segment_project(x, grad, grouping, out_dtype=y.dtype)
        return dx, dy, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        if any(dim is not None for dim in in_dims[2:5]):
            return _loop(SegmentGram, info, in_dims, inputs)
        size = info.batch_size
        x, y = (_into_heads(t, dim, size, -2) for t, dim in zip(inputs[:2], in_dims[:2], strict=True))
        out = SegmentGram.apply(x, y, *inputs[2:])
        return out.unflatten(1, (size, out.shape[1] // size)), 1


class SegmentProject(torch.autograd.Function):
    """y_t = x_t A[group(t)] + u_t B[group(t)], u the normed x; without a group 0 or (keep) x_t. dx = project(dy, Aᵀ),
    and project(dy, Bᵀ) through the norm; dA = gram(x, dy), dB = gram(u, dy)."""

    @staticmethod
    def forward(
        x: Tensor,
        matrix: Tensor,
        unit_matrix: Tensor | None,
        order: Tensor,
        pieces: Tensor,
        groups: Tensor,
        keep: bool,
        out_dtype: torch.dtype,
    ) -> Tensor:
        out: Tensor = _op_segment_project(x, matrix, unit_matrix, order, pieces, groups, keep, out_dtype)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.keep, _ = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, matrix, unit_matrix, *plan = ctx.saved_tensors
        grouping = Grouping(*plan)
        dx = dmatrix = dunit = None
        if ctx.needs_input_grad[0]:
            turned = matrix.transpose(-1, -2)
            if unit_matrix is None:
                dx = segment_project(grad, turned, grouping, keep=ctx.keep, out_dtype=x.dtype)
            else:
                wide = compute_dtype(x, matrix)
                dx = segment_project(grad, turned, grouping, keep=ctx.keep, out_dtype=wide)
                du = segment_project(grad, unit_matrix.transpose(-1, -2), grouping, out_dtype=wide)
                dx = (dx + _through_unit(x, du, grouping)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dmatrix = segment_gram(x, grad, grouping).to(matrix.dtype)
        if unit_matrix is not None and ctx.needs_input_grad[2]:
            dunit = segment_gram(x, grad, grouping, unit=True).to(unit_matrix.dtype)
        return dx, dmatrix, dunit, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        if any(dim is not None for dim in in_dims[3:6]):
            return _loop(SegmentProject, info, in_dims, inputs)
        size = info.batch_size
        axes = (-2, -3, -3)
        folded = (_into_heads(t, dim, size, axis) for t, dim, axis in zip(inputs[:3], in_dims[:3], axes, strict=True))
        out = SegmentProject.apply(*folded, *inputs[3:])
        return out.unflatten(-2, (size, out.shape[-2] // size)), out.dim() - 2


def _through_unit(x: Tensor, du: Tensor, grouping: Grouping) -> Tensor:
    """dx of the normed x, 0 for tokens without a group, which may hold anything."""
    ones = du.new_ones(*x.shape[:-2], 1, 1), du.new_ones(grouping.groups.shape[0], 1, 1, 1)
    grouped_tokens = segment_project(*ones, grouping) > 0
    return released_unit_backward(torch.where(grouped_tokens, x, 0).to(du.dtype), du).to(x.dtype)


def _loop(function: Any, info: Any, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]) -> tuple[Tensor, int]:
    """A batch of groupings, one after another."""
    rows = []
    for i in range(info.batch_size):
        row = (x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True))
        rows.append(function.apply(*row))
    return torch.stack(rows), 0


def _into_heads(x: Tensor | None, in_dim: int | None, size: int, axis: int) -> Tensor | None:
    """A batch dimension (made where there is none) folded into the axis of the heads, counted from the end."""
    if x is None:
        return None
    x = x.unsqueeze(0).expand(size, *x.shape) if in_dim is None else x.movedim(in_dim, 0)
    return x.movedim(0, axis - 1).flatten(axis - 1, axis)


# Functions


def group_tokens(group: Tensor, num_groups: int) -> Grouping:
    """Tokens sorted by their group: int64 ``[T]`` in -1…G-1 (-1: none). Neither waits for the device nor breaks a graph
    capture."""
    return Grouping(*_op_group_tokens(group, num_groups))


def segment_gram(
    x: Tensor, y: Tensor, group: Tensor | Grouping, num_groups: int | None = None, *, unit: bool = False
) -> Tensor:
    """Σ x_tᵀ y_t per group, differentiable in x and y, to any order.

    Args:
        x: ``[T, H, D]``, or ``[B, L, H, D]`` with T = B·L. y: the same with size E.
        group: int64 ``[T]`` (-1: none) and the number of groups G, or a `Grouping`.
        unit: in place of x the normed x of the released variant.

    Returns:
        ``[G, H, D, E]`` in float32 (float64 for float64 input).
    """
    grouping = _grouping(group, num_groups)
    out: Tensor = SegmentGram.apply(x, None if y is x and not unit else y, *grouping, unit)
    return out


def segment_project(
    x: Tensor,
    matrix: Tensor,
    group: Tensor | Grouping,
    *,
    unit_matrix: Tensor | None = None,
    keep: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x_t A[group(t)], differentiable in x and the matrices, to any order.

    Args:
        x: ``[T, H, D]``, or ``[B, L, H, D]`` with T = B·L. matrix: A ``[G, H, D, E]``.
        group: int64 ``[T]`` (-1: the result is 0), or a `Grouping`.
        unit_matrix: B like A, of the normed x of the released variant: x_t A + u_t B.
        keep: tokens without a group give x_t, bit for bit, in place of 0 (where D = E).
        out_dtype: of the result. Default: x's.

    Returns:
        x's shape with size E.
    """
    grouping = _grouping(group, matrix.shape[0])
    out: Tensor = SegmentProject.apply(x, matrix, unit_matrix, *grouping, keep, out_dtype or x.dtype)
    return out


def _grouping(group: Tensor | Grouping, num_groups: int | None) -> Grouping:
    if isinstance(group, Grouping):
        return group
    if num_groups is None:
        raise checks.wrong_type("num_groups", "an int, with a tensor of groups", num_groups)
    return group_tokens(group, num_groups)
