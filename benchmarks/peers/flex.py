"""Compiled FlexAttention. The kernel is the call; its block mask, built by compiled code too, is the setup."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.cases import Case
from benchmarks.peers.base import Peer
from moda_kernels.mask import visible_pair


class Flex(Peer):
    name = "flex"
    prepares = "block mask"
    compiles = True

    def why_not(self, case: Case) -> str | None:
        if case.backward:
            return "FlexAttention has no backward on the CPU"
        return None

    def setup(self, case: Case) -> Any:
        workload = case.workload
        layout, window = workload.segment(), workload.mask.window
        rules = workload.mask.rule_table(layout.device)
        modality, position, segment, sequence = (
            fact.flatten() for fact in (layout.modality, layout.position, layout.segment, layout.sequence)
        )

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            facts = (modality, position, segment)
            seen = visible_pair(rules, window, *(f[q] for f in facts), *(f[k] for f in facts))
            return seen & (sequence[q] == sequence[k])

        _, create_block_mask = _compiled()
        return create_block_mask(mask_mod, 1, None, case.length, case.length, device=str(layout.device))

    def attend(self, state: Any, tensors: dict[str, Tensor], case: Case) -> Tensor:
        flex_attention, _ = _compiled()
        q, k, v = (tensors[name] for name in ("query", "key", "value"))
        out: Tensor = flex_attention(q, k, v, block_mask=state, enable_gqa=True)
        return out


@functools.cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """flex_attention and create_block_mask, compiled for every shape of its own: the fastest that they come in."""
    import torch
    import torch._dynamo
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Beyond the default of 8 shapes torch would quietly go back to uncompiled code.
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 1024
    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)
