"""torch's scaled_dot_product_attention: with the mask written out, and without a mask where that is right.

Its default choice of kernel; on the CPU that is the flash kernel for all of these, grouped-query heads included.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.peers.base import Peer
from moda_kernels import ModularMask


class SdpaDense(Peer):
    """With the whole mask ``[1, 1, L, L]``: bool, or additive in the query's dtype (which saves SDPA a conversion in
    every call, for more memory held)."""

    def __init__(self, name: str, additive: bool) -> None:
        self.name, self.additive = name, additive
        self.prepares = f"dense {'additive' if additive else 'bool'} mask"

    def setup(self, case: Case) -> Tensor:
        mask = case.workload.mask.visible(case.workload.segment())
        mask = mask.view(1, 1, case.length, case.length)
        if self.additive:
            return torch.zeros(mask.shape, dtype=case.dtype).masked_fill_(~mask, -math.inf)
        return mask

    def attend(self, state: Tensor, tensors: dict[str, Tensor], case: Case) -> Tensor:
        q, k, v = (tensors[name] for name in ("query", "key", "value"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=state, enable_gqa=True)


class SdpaCausal(Peer):
    """With is_causal: right for one causal sequence; a control, for scale, on all others."""

    name = "sdpa-causal"

    def answers(self, case: Case) -> bool:
        mask = case.workload.mask
        return not case.workload.packed and mask == ModularMask.causal(mask.num_modalities)

    def attend(self, state: None, tensors: dict[str, Tensor], case: Case) -> Tensor:
        q, k, v = (tensors[name] for name in ("query", "key", "value"))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class SdpaFull(Peer):
    """Without any mask, where everything is visible."""

    name = "sdpa-full"

    def why_not(self, case: Case) -> str | None:
        mask = case.workload.mask
        if case.workload.packed or mask != ModularMask.full(mask.num_modalities):
            return "only where everything is visible"
        return None

    def attend(self, state: None, tensors: dict[str, Tensor], case: Case) -> Tensor:
        q, k, v = (tensors[name] for name in ("query", "key", "value"))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
