"""What a peer has to offer, and a peer at work on one case."""

import contextlib
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moda_kernels.commands.bench.cases import Case

#: A contestant that writes scores out is left out where they would take more than this share of the memory there is.
MEMORY_SHARE = 0.75


class RefusedError(Exception):
    """A contestant can't run a case here; the message says why. No fault of its numbers."""


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

        Raises:
            RefusedError: it can't run this here.
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

    def setup_again(self) -> None:
        """What is timed as the setup: the result is dropped, so that what calls have kept with the first one stays."""
        self.peer.setup(self.case)

    def drop_setup(self) -> None:
        self._state = None
        gc.collect()

    def call(self, mark: Callable[[], None] = lambda: None, rows: Tensor | None = None) -> tuple[Tensor, ...]:
        """What is timed: the output, and in a training case all gradients.

        Args:
            mark: called between forward and backward.
            rows: the upstream gradient is zero in all other query rows.
        """
        if not self.case.backward:
            with torch.no_grad():
                return (self.peer.attend(self._state, self.tensors, self.case),)
        dout = self._dout if rows is None else self._only(rows)
        out = self.peer.attend(self._state, self.tensors, self.case)
        mark()
        return out.detach(), *torch.autograd.grad(out, tuple(self.tensors.values()), dout, materialize_grads=True)

    def named(self, results: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """What `call` gave as "out" and "d <input>", in ``[1, H, L, D]``."""
        names = ("out", *(f"d {name}" for name in self.tensors))
        found = dict(zip(names, results, strict=False))
        return {name: t if name == "d weight" else self._common(t) for name, t in found.items()}

    def _only(self, rows: Tensor) -> Tensor:
        axis = 0 if self.peer.tokens_first(self.case) else 2
        kept = torch.zeros_like(self._dout)
        return kept.index_copy_(axis, rows, self._dout.index_select(axis, rows))

    def _own(self, t: Tensor) -> Tensor:
        return t[0].transpose(0, 1).contiguous() if self.peer.tokens_first(self.case) else t

    def _common(self, t: Tensor) -> Tensor:
        return t.transpose(0, 1)[None] if self.peer.tokens_first(self.case) else t


def too_large(case: Case, bytes_per_score: float) -> str | None:
    """Why a contestant that writes ``[Hq, Lq, L]`` scores out can't run a case; None if it can."""
    needed = case.query_heads * case.queries * case.length * bytes_per_score
    there = available_memory(case.device)
    if there is None or needed <= MEMORY_SHARE * there:
        return None
    return f"its scores would take about {needed / 2**30:.0f} GiB, {there / 2**30:.0f} GiB are free"


def available_memory(device: str) -> int | None:
    """Free bytes on a device; None where nobody says."""
    if device == "cuda":
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0]) + cached
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) * 1024
    return None
