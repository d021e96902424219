"""torch's scaled_dot_product_attention: with the mask written out, and without a mask where that is right.

Its kernels differ by a factor of two and more, so each is also pinned by name; where one can't run, torch's own reasons
are reported.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moda_kernels.commands.bench.cases import Case
from moda_kernels.commands.bench.peers.base import Peer, RefusedError, too_large

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
#: Bytes per score that the math kernel holds in a forward (scores, softmax, weights); a backward doubles them.
MATH_BYTES = 12.0
#: What torch says when the kernels that it may use can't run.
_REFUSALS = ("No available kernel", "No viable backend")


class Sdpa(Peer):
    """Without a mask: is_causal where the layout is causal, nothing where everything is visible.

    Args:
        kernel: in :data:`KERNELS`; None: torch's own choice, which is also the control, with is_causal, on all layouts
            that have a mask of their own.
    """

    def __init__(self, name: str, kernel: str | None = None) -> None:
        self.name, self.kernel = name, kernel

    def why_not(self, case: Case) -> str | None:
        if self.kernel in ("cudnn", "efficient") and case.device == "cpu":
            return "a CUDA kernel"
        if self.kernel is not None and not case.plain:
            return "it has no such mask: see the layouts causal and full"
        if self.kernel == "math":
            return too_large(case, MATH_BYTES * (2 if case.backward else 1))
        return None

    def answers(self, case: Case) -> bool:
        return case.plain

    def attend(self, state: None, tensors: dict[str, Tensor], case: Case) -> Tensor:
        q, k, v = (tensors[name] for name in ("query", "key", "value"))
        if self.kernel == "efficient":
            k, v = repeated(k, case), repeated(v, case)
        with pinned(self.kernel):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=case.is_causal, enable_gqa=q.shape[1] != k.shape[1]
            )


class SdpaDense(Peer):
    """With the whole mask ``[1, 1, Lq, L]``: bool, or additive in the query's dtype (which saves SDPA a conversion in
    every call, for more memory held).

    Args:
        kernel: on CUDA, where torch's choice for grouped heads with a mask may be the slow math kernel; on the CPU the
            flash kernel takes both.
    """

    def __init__(self, name: str, additive: bool = False, kernel: str = "efficient") -> None:
        self.name, self.additive, self.kernel = name, additive, kernel
        self.prepares = f"dense {'additive' if additive else 'bool'} mask"

    def why_not(self, case: Case) -> str | None:
        return "a CUDA kernel" if self.kernel == "cudnn" and case.device == "cpu" else None

    def setup(self, case: Case) -> Tensor:
        mask = case.workload.mask.visible(case.workload.segment(), None if case.workload.packed else case.queries)
        mask = mask.view(1, 1, *mask.shape[-2:])[:, :, -case.queries :]
        if self.additive:
            return torch.zeros(mask.shape, dtype=case.dtype, device=case.device).masked_fill_(~mask, -math.inf)
        return mask

    def attend(self, state: Tensor, tensors: dict[str, Tensor], case: Case) -> Tensor:
        q, k, v = (tensors[name] for name in ("query", "key", "value"))
        kernel = self.kernel if case.device == "cuda" else None
        if kernel == "efficient":
            k, v = repeated(k, case), repeated(v, case)
        with pinned(kernel):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=state, enable_gqa=q.shape[1] != k.shape[1])


def repeated(t: Tensor, case: Case) -> Tensor:
    """Key heads repeated to the query's: the memory-efficient kernel knows no grouped heads."""
    return t.repeat_interleave(case.query_heads // case.key_heads, 1)


@contextlib.contextmanager
def pinned(kernel: str | None) -> Iterator[None]:
    """Only this kernel. Where torch refuses, `RefusedError` has the reasons that it gives as warnings."""
    if kernel is None:
        yield
        return
    with warnings.catch_warnings(record=True) as said, sdpa_kernel(KERNELS[kernel]):
        warnings.simplefilter("always")
        try:
            yield
        except RuntimeError as error:
            if not any(words in str(error) for words in _REFUSALS):
                raise
            reasons = [str(w.message).split(" (Triggered")[0] for w in said]
            raise RefusedError("; ".join([str(error).split(".")[0], *reasons])) from error
