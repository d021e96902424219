"""How operators are defined: opaque to compilers, without gradients, with a fake that knows shapes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

_LIBRARY = torch.library.Library("moda_kernels", "FRAGMENT")


def operator(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operator `moda_kernels::…` of a schema; all of them are private, their names begin with an underscore.

    Args:
        run: on any device. fake: the same arguments, tensors without numbers in them; returns empty results.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moda_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.moda_kernels, name).default


def register_vmap(name: str, rule: Callable[..., Any]) -> None:
    """A vmap rule for an operator that is called without an autograd Function above it."""
    torch.library.register_vmap(f"moda_kernels::{name}", rule, lib=_LIBRARY)


def runs_at_once(*tensors: Tensor | None) -> bool:
    """Whether an operator's own function may be called in its place, without torch's dispatcher: all its tensors have
    numbers, and no compiler, mode or transform looks on."""
    return are_plain(*tensors) and not torch._C._len_torch_dispatch_stack()


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether all these have numbers in memory of their own, and no compiler or transform looks on."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    # A list, since a generator takes longer than all else here.
    return not [t for t in tensors if t is not None and (type(t) not in _PLAIN or wrapped(t))]


_PLAIN = (Tensor, torch.nn.Parameter)


def may_need_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd or a transform around the call may ask for gradients of what is made from these."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    if torch.compiler.is_compiling():
        return True
    kinds = torch._C._functorch.TransformType
    return any(each.key() in (kinds.Grad, kinds.Jvp) for each in retrieve_all_functorch_interpreters())


def each_once(*tensors: Tensor | None) -> list[Tensor | None]:
    """The same, none twice: compilers don't take one tensor for two arguments of an autograd Function."""
    made: list[Tensor | None] = []
    for t in tensors:
        made.append(t.view_as(t) if t is not None and any(t is other for other in made) else t)
    return made


def plain_apply(function: type[torch.autograd.Function]) -> Any:
    """What has an `apply` as that of an autograd Function, for plain tensors (`are_plain`): it does all but bind
    arguments to names, which takes longer than a small call."""
    return super(torch.autograd.Function, function)


def once(message: str, grads: Sequence[Tensor | None], of: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients as they are, which have none themselves: who asks for it is told this.

    Args:
        of: all tensors that they depend on.
    """
    witness = torch.cat([t.reshape(-1)[:0].float() for t in of if t is not None])
    return tuple(None if g is None else _Once.apply(g, witness, message) for g in grads)


class _Once(torch.autograd.Function):
    """witness: an empty tensor with the graph of all that the gradient depends on."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, witness: Tensor, message: str) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
        ctx.message = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(ctx.message)
