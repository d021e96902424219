"""Backends: one room each, one small contract, and the one place where a call is given to one of them.

To add a backend: write its module with an object that has the four members of `Backend`, and name it in `BACKENDS`.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from moda_kernels.backends import trust
from moda_kernels.backends.cpu import CpuBackend
from moda_kernels.backends.flex import FlexBackend
from moda_kernels.backends.reference import ReferenceBackend
from moda_kernels.backends.triton import TritonBackend
from moda_kernels.call import AttentionCall
from moda_kernels.runtime import backend_name, checks

log = logging.getLogger("moda_kernels")


class Backend(Protocol):
    """What a backend has to offer."""

    name: str

    def serves(self, device: torch.device) -> bool:
        """Whether `auto` should ask it for tensors on a device at all; if not, it is left out without a word."""

    def why_absent(self) -> list[str]:
        """Every reason why it can run nothing on this machine; empty if it can."""

    def why_not(self, call: AttentionCall) -> list[str]:
        """Every reason why it can't run this call; empty if it can."""

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Output and lse, as `moda_kernels.reference.attend`; differentiable in every float tensor of the call; NaN
        where the layout has more segments than it has room for."""


#: In the order in which `auto` asks them.
BACKENDS: dict[str, Backend] = {b.name: b for b in (TritonBackend(), FlexBackend(), CpuBackend(), ReferenceBackend())}

_told: set[tuple[str, ...]] = set()


@contextlib.contextmanager
def use_backend(name: str, **options: Any) -> Iterator[None]:
    """Within the block, `moda_attention` runs on this backend or raises, saying every reason.

    Args:
        name: a backend's name, or "auto" for the first that can run the call.
        options: of "flex": FlexAttention's ``kernel_options`` (``BACKEND="FLASH"``, ``BLOCK_M=64``, …), and
            ``BLOCK_SIZE``, an int or (queries, keys), the tiles of its block mask.

    Raises:
        ValueError: an unknown name, of a backend or of an option. TypeError: an option's value; options for a backend
            that has none.
    """
    _known("use_backend", name)
    checked: tuple[tuple[str, Any], ...] = ()
    if options:
        check = getattr(BACKENDS.get(name), "check_options", None)
        if check is None:
            raise checks.wrong_type("use_backend", f"no options with {name!r}", options)
        checked = check(options)
    with backend_name.block(name, checked):
        yield


def choose(call: AttentionCall, name: str | None) -> Backend:
    """The backend for a call: the one named by the argument, `use_backend` or the environment; else the first that can.

    Raises:
        ValueError: an unknown name. NotImplementedError: it can't run the call; the message has every reason.
    """
    name = named_backend(name)
    refused: list[str] = []
    distrusted: list[str] = []
    for backend in asked(name, call.query.device):
        reasons = backend.why_absent() or backend.why_not(call)
        if not reasons and name == "auto" and isinstance(backend, TritonBackend):
            distrusted = [f"{backend.name}: {reason}" for reason in trust.why_not(call, backend.attend)]
            if distrusted:  # which was told where it was found
                continue
        if not reasons:
            _tell_once(backend.name, refused)
            return backend
        refused += [f"{backend.name}: {reason}" for reason in reasons]
    raise NotImplementedError(f"backend {name!r} can't run this call: " + "; ".join(distrusted + refused))


def asked(name: str, device: torch.device) -> list[Backend]:
    """The backends that a name stands for, in the order in which they are asked; "auto": those that serve a device."""
    return [b for b in BACKENDS.values() if b.serves(device)] if name == "auto" else [BACKENDS[name]]


def named_backend(name: str | None = None) -> str:
    """The backend asked for: by the argument, else by `use_backend`, else by the environment, else "auto"."""
    if name is not None:
        return _known("backend", name)
    return _known(backend_name.ENVIRONMENT, backend_name.name())


def _known(argument: str, name: str) -> str:
    return checks.choice(argument, name, ("auto", *BACKENDS))


def _tell_once(chosen: str, refused: list[str]) -> None:
    if refused and (chosen, *refused) not in _told:
        _told.add((chosen, *refused))
        log.warning("moda_attention runs on the %s backend (%s)", chosen, "; ".join(refused))
