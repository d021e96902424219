"""Compiled FlexAttention. The kernel is the call; its block mask, built by compiled code too, is the setup, or in the
contestant named "-build" a part of every call (a new layout each step, one layer). "flex-ours": under our block mask,
which is made from intervals."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from moda_kernels.commands.bench.cases import Case
from moda_kernels.commands.bench.peers.base import Peer
from moda_kernels.tokens.intervals import ends_of, mask_intervals


class Flex(Peer):
    """FlexAttention.

    Args:
        build: make the block mask in every call.
        mode: of torch.compile.
        ours: under `ModularMask.to_block_mask`.
    """

    compiles = True

    def __init__(self, name: str, build: bool = False, mode: str | None = None, ours: bool = False) -> None:
        self.name, self.build, self.mode, self.ours = name, build, mode, ours
        self.prepares = "" if build else "block mask"

    def why_not(self, case: Case) -> str | None:
        if case.device == "cpu" and case.backward:
            return "FlexAttention has no backward on the CPU"
        if case.device == "cpu" and self.mode is not None:
            return "tunes CUDA kernels"
        return None

    def setup(self, case: Case) -> Any:
        return None if self.build else self._block_mask(case)

    def attend(self, state: Any, tensors: dict[str, Tensor], case: Case) -> Tensor:
        flex_attention, _ = _compiled(self.mode)
        block_mask = self._block_mask(case) if self.build else state
        q, k, v = (tensors[name] for name in ("query", "key", "value"))
        out: Tensor = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])
        return out

    def _block_mask(self, case: Case) -> Any:
        layout = case.workload.segment()
        if self.ours:
            return case.workload.mask.to_block_mask(layout, case.queries)
        queries = layout.queries(case.queries)
        limits, positions = mask_intervals(layout, queries, case.workload.mask)
        of_query, of_key = queries.of(layout.sequence).flatten(), layout.sequence.flatten()
        passes = list(zip(*ends_of(limits, len(positions)), positions, strict=True))

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = of_query[q] < 0
            for lows, highs, position in passes:
                for low, high in zip(lows, highs, strict=True):
                    seen = seen | ((low[q] < position[k]) & (position[k] <= high[q]))
            return seen & (of_query[q] == of_key[k])

        _, create_block_mask = _compiled(self.mode)
        return create_block_mask(mask_mod, 1, None, case.queries, case.length, device=str(layout.device))


@functools.cache
def _compiled(mode: str | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """flex_attention and create_block_mask, compiled for every shape of its own: the fastest that they come in."""
    import torch
    import torch._dynamo
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Beyond the default of 8 shapes torch would quietly go back to uncompiled code.
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 1024
    return torch.compile(flex_attention, dynamic=False, mode=mode), torch.compile(create_block_mask, dynamic=False)
