"""How operators are defined: opaque to compilers, without gradients, with a fake that knows shapes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return all(t is None or (type(t) in _PLAIN and not wrapped(t)) for t in tensors)


_PLAIN = (Tensor, torch.nn.Parameter)
