"""What a peer has to offer, and a peer at work on one case."""

import gc
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case


class Peer:
    """An adapter around one way to compute attention. Subclasses override what differs from here.

    Attributes:
        name: in tables, result files and on the command line.
        alignment: None for plain modular attention; "sequence" or "causal" where keys are aligned within that scope.
        prepares: what `setup` makes, in words; "" for nothing.
        compiles: it compiles at the first call of a case.
    """

    name: str
    alignment: str | None = None
    prepares: str = ""
    compiles: bool = False

    def why_not(self, case: Case) -> str | None:
        """Why it doesn't take part in a case; None if it does."""
        return None

    def answers(self, case: Case) -> bool:
        """False for a control: something of the same size, timed for scale, but not what was asked for."""
        return True

    def tokens_first(self, case: Case) -> bool:
        """It takes and gives ``[T, H, D]`` in place of ``[1, H, L, D]``."""
        return False

    def setup(self, case: Case) -> Any:
        """What depends on the workload alone and is shared by all layers: layouts, plans, masks. Timed apart."""
        return None

    def attend(self, state: Any, tensors: dict[str, Tensor], case: Case) -> Tensor:
        """One attention call.

        Args:
            state: from `setup`.
            tensors: query, key, value, and weight where keys are aligned.
        """
        raise NotImplementedError


class Contestant:
    """A peer with its inputs for one case, in the shapes that it takes.

    Attributes:
        tensors: the differentiable inputs by name.
    """

    def __init__(self, peer: Peer, case: Case) -> None:
        self.peer, self.case = peer, case
        made = case.tensors()
        self._dout = self._own(made.pop("dout"))
        if peer.alignment is None:
            del made["weight"]
        self.tensors = {name: t if name == "weight" else self._own(t) for name, t in made.items()}
        for t in self.tensors.values():
            t.requires_grad_(case.backward)
        self._state: Any = None

    def setup(self) -> None:
        self._state = None  # never two at a time
        self._state = self.peer.setup(self.case)

    def drop_setup(self) -> None:
        self._state = None
        gc.collect()

    def call(self) -> tuple[Tensor, ...]:
        """What is timed: the output, and in a case with backward all gradients."""
        if not self.case.backward:
            with torch.no_grad():
                return (self.peer.attend(self._state, self.tensors, self.case),)
        out = self.peer.attend(self._state, self.tensors, self.case)
        return out.detach(), *torch.autograd.grad(out, tuple(self.tensors.values()), self._dout, materialize_grads=True)

    def named(self, results: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """What `call` gave as "out" and "d <input>", in ``[1, H, L, D]``."""
        names = ("out", *(f"d {name}" for name in self.tensors))
        found = dict(zip(names, results, strict=False))
        return {name: t if name == "d weight" else self._common(t) for name, t in found.items()}

    def _own(self, t: Tensor) -> Tensor:
        return t[0].transpose(0, 1).contiguous() if self.peer.tokens_first(self.case) else t

    def _common(self, t: Tensor) -> Tensor:
        return t.transpose(0, 1)[None] if self.peer.tokens_first(self.case) else t
