"""Sums and moves of tensors over the processes of a group, with gradients; and what to say when one of them is gone.

Every process has a loss of its own, and what is differentiated is their sum: where a process uses what others have, the
backward brings gradients back and adds them up. (Functional collectives of torch without their own autograd: theirs
differ between releases.)
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

#: A torch.distributed.ProcessGroup: its module is imported by those who have one.
Group = Any


@contextlib.contextmanager
def guarded(what: str, group: Group) -> Iterator[None]:
    """Says of a collective that failed what that means."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{what}: rank {group.rank()} of {group.size()} waited in vain for the others: a process has died, has "
            f"raised an error, or did not take part within the group's timeout ({error})"
        ) from error


def _run(name: str, x: Tensor, *arguments: Any, group: Group) -> Tensor:
    """An operator of torch's functional collectives, and its result."""
    functional = torch.ops._c10d_functional
    with guarded(name, group):
        out: Tensor = functional.wait_tensor(getattr(functional, name)(x.contiguous(), *arguments, group.group_name))
    return out


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """Σ over ranks, without a gradient."""
    return _run("all_reduce", x, "sum", group=group)


def all_gather(x: Tensor, group: Group) -> Tensor:
    """``[n, …]`` of each rank → ``[ranks · n, …]``, without a gradient."""
    return _run("all_gather_into_tensor", x, group.size(), group=group)


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """``[ranks · n, …]`` → this rank's ``[n, …]`` of Σ over ranks, without a gradient."""
    return _run("reduce_scatter_tensor", x, "sum", group.size(), group=group)


def all_to_all(x: Tensor, received: list[int], sent: list[int], group: Group) -> Tensor:
    """``sent[r]`` rows go to rank r, in order; ``received[r]`` rows come from it. Without a gradient."""
    return _run("all_to_all_single", x, received, sent, group=group)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_over_ranks(grad, ctx.group), None


def sum_over_ranks(x: Tensor, group: Group) -> Tensor:
    """Σ over ranks, on every rank; so is the gradient."""
    if group.size() == 1:
        return x
    out: Tensor = _SumOverRanks.apply(x, group)
    return out


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_over_ranks(grad, ctx.group), None


def sum_gradients(x: Tensor, group: Group) -> Tensor:
    """x, which all ranks have alike and each uses for a part of the work: its gradient is the sum of theirs."""
    if group.size() == 1 or not x.requires_grad:
        return x
    out: Tensor = _SumGradients.apply(x, group)
    return out


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return scatter_sums(grad, ctx.group), None


class _ScatterSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gather_rows(grad, ctx.group), None


def gather_rows(x: Tensor, group: Group) -> Tensor:
    """``[n, …]`` of each rank (equal n) → ``[ranks · n, …]`` on every rank; backward: `scatter_sums`."""
    if group.size() == 1:
        return x
    out: Tensor = _GatherRows.apply(x, group)
    return out


def scatter_sums(x: Tensor, group: Group) -> Tensor:
    """``[ranks · n, …]`` → this rank's rows of the sum over ranks; backward: `gather_rows`."""
    if group.size() == 1:
        return x
    out: Tensor = _ScatterSums.apply(x, group)
    return out


class _MoveRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, received: list[int], sent: list[int], group: Group) -> Tensor:
        ctx.plan = received, sent, group
        return all_to_all(x, received, sent, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        received, sent, group = ctx.plan
        return move_rows(grad, sent, received, group), None, None, None


def move_rows(x: Tensor, received: list[int], sent: list[int], group: Group) -> Tensor:
    """``[Σ sent, …]`` → ``[Σ received, …]``: rows in the order of the ranks that they go to, and come from."""
    if group.size() == 1:
        return x
    out: Tensor = _MoveRows.apply(x, received, sent, group)
    return out


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(*others)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        zeros = (torch.zeros_like(t) if need else None for t, need in zip(ctx.saved_tensors, wanted, strict=True))
        return grad, *zeros


def attached(x: Tensor, *others: object) -> Tensor:
    """x, as if it had been made from the others too: their gradient is 0 where nothing else uses them, and never None.
    So every rank's backward goes the same way, whatever it has to do."""
    tensors = [t for t in others if isinstance(t, Tensor) and t.requires_grad]
    if not tensors or not torch.is_grad_enabled():
        return x
    out: Tensor = _Attached.apply(x, *tensors)
    return out
