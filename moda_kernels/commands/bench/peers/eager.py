"""Modular duplex attention the way research code runs it, written from the definition: a loop over the sequences that
picks each modality's tokens out by index, keys aligned with concatenation in the sequence scope, heads repeated, a
dense additive mask, scores and softmax written out in PyTorch. And the same under torch.compile."""

import functools
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from moda_kernels.commands.bench.cases import Case
from moda_kernels.commands.bench.layouts import MODALITIES
from moda_kernels.commands.bench.peers.base import Peer, too_large
from moda_kernels.products.twin import compute_dtype

#: On a CPU, more tokens than this take longer than they tell.
LONGEST_ON_CPU = 4096
#: Per score: itself in the dtype, in float32 with the mask, and its softmax in float32 and in the dtype.
FORWARD_BYTES, TRAINING_BYTES = 14.0, 20.0

#: Dense additive mask ``[1, 1, L, L]``, and per sequence its first token, its end, and its tokens by modality.
State = tuple[Tensor, list[tuple[int, int, list[Tensor]]]]


class Eager(Peer):
    """Eager MODA, compiled or not."""

    alignment = "sequence"
    prepares = "dense additive mask, token indices"

    def __init__(self, name: str, compiled: bool = False) -> None:
        self.name, self.compiles = name, compiled

    def why_not(self, case: Case) -> str | None:
        if case.mode == "decode":
            return "it aligns and attends over whole sequences"
        if case.device == "cpu" and case.length > LONGEST_ON_CPU:
            return f"too slow on a CPU beyond {LONGEST_ON_CPU} tokens"
        return too_large(case, TRAINING_BYTES if case.backward else FORWARD_BYTES)

    def setup(self, case: Case) -> State:
        workload = case.workload
        layout = workload.segment()
        seen = workload.mask.visible(layout).view(1, 1, case.length, case.length)
        mask = torch.zeros(seen.shape, dtype=case.dtype, device=case.device).masked_fill_(~seen, -math.inf)
        ids = workload.ids.flatten()
        bounds = layout.cu_seqlens.tolist()
        sequences = [
            (start, end, [(ids[start:end] == m).nonzero()[:, 0] for m in range(MODALITIES)])
            for start, end in itertools.pairwise(bounds)
        ]
        return mask, sequences

    def attend(self, state: State, tensors: dict[str, Tensor], case: Case) -> Tensor:
        mask, sequences = state
        function = _compiled() if self.compiles else eager_moda
        q, k, v, weight = (tensors[name] for name in ("query", "key", "value", "weight"))
        parts = [
            function(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], weight, mask[:, :, a:b, a:b], tokens)
            for a, b, tokens in sequences
        ]
        return torch.cat(parts, 2)


def eager_moda(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, mask: Tensor, tokens: list[Tensor]) -> Tensor:
    """One sequence: query ``[1, Hq, L, D]``, key and value ``[1, Hkv, L, D]``, weight ``[M, D, 2D]``."""
    wide = key.to(weight.dtype)
    own = [wide[:, :, index] for index in tokens]
    grams = [k.transpose(-1, -2) @ k for k in own]
    aligned = wide
    for m, index in enumerate(tokens):
        rest = [gram for other, gram in enumerate(grams) if other != m and len(tokens[other])]
        if rest and len(index):
            normed = torch.nn.functional.normalize(sum(rest[1:], rest[0]), dim=-1)
            fused = torch.cat((own[m], own[m] @ normed), -1) @ weight[m].T
            aligned = aligned.index_copy(2, index, fused)
    groups = query.shape[1] // key.shape[1]
    keys = aligned.to(key.dtype).repeat_interleave(groups, 1)
    values = value.repeat_interleave(groups, 1)
    scores = query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5 + mask
    return torch.softmax(scores, -1, dtype=compute_dtype(query)).to(query.dtype) @ values


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 1024
    return torch.compile(eager_moda)
