"""FlashAttention 2, 3 and 4, each where it is installed: never a dependency. They know causal and full masks only."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moda_kernels.commands.bench.cases import Case
from moda_kernels.commands.bench.peers.base import Peer


class Flash(Peer):
    """A module with `flash_attn_func(q, k, v, causal=...)` over ``[B, L, H, D]``, bottom-right causal."""

    def __init__(self, name: str, module: str, package: str) -> None:
        self.name, self.module, self.package = name, module, package

    def why_not(self, case: Case) -> str | None:
        try:
            self._function()
        except Exception as error:  # an extension built for another torch fails in ways of its own
            return f"{self.package} cannot be imported ({type(error).__name__}: {str(error).splitlines()[0]})"
        if case.device == "cpu":
            return "a CUDA kernel"
        if case.dtype not in (torch.float16, torch.bfloat16):
            return f"takes float16 and bfloat16, not {case.dtype_name}"
        if not case.plain:
            return "it has no such mask: see the layouts causal and full"
        return None

    def attend(self, state: None, tensors: dict[str, Tensor], case: Case) -> Tensor:
        q, k, v = (tensors[name].transpose(1, 2) for name in ("query", "key", "value"))
        out = self._function()(q, k, v, causal=case.is_causal)
        result: Tensor = out[0] if isinstance(out, tuple) else out  # some versions give lse too
        return result.transpose(1, 2)

    def _function(self) -> Callable[..., Any]:
        function: Callable[..., Any] = importlib.import_module(self.module).flash_attn_func
        return function
