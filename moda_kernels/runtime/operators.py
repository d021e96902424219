"""How operators are defined: opaque to compilers, without gradients, with a fake that knows shapes."""

from collections.abc import Callable
from typing import Any

import torch

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
