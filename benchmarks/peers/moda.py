"""This package: by backend, with and without alignment. Layout and plan are made once and shared by all layers."""

import torch
from torch import Tensor
from torch.func import functional_call

from benchmarks.cases import Case
from benchmarks.layouts import MODALITIES
from benchmarks.peers.base import Peer
from moda_kernels import DuplexAligner, ModalityLayout, moda_attention
from moda_kernels.backends import BACKENDS
from moda_kernels.backends.cpu import CpuBackend
from moda_kernels.call import AttentionCall


class Moda(Peer):
    """`moda_attention` on one backend.

    Args:
        alignment: the scope within which keys are aligned ("concat"; the map is made anew in every call), or None.
        longest: the backend isn't asked for more tokens than this.
    """

    def __init__(self, name: str, backend: str, alignment: str | None = None, longest: int | None = None) -> None:
        self.name, self.backend, self.alignment, self.longest = name, backend, alignment, longest
        self.prepares = "segmentation and plan" if backend == "cpu" else "segmentation"

    def why_not(self, case: Case) -> str | None:
        if self.longest is not None and case.length > self.longest:
            return f"takes O(L²) memory: left out above {self.longest} tokens"
        return None

    def tokens_first(self, case: Case) -> bool:
        return case.workload.packed

    def setup(self, case: Case) -> ModalityLayout:
        layout = case.workload.segment()
        backend = BACKENDS[self.backend]
        if isinstance(backend, CpuBackend):
            # The plan is kept with the layout; making it needs shapes only.
            query, key = self._shape_of(case, case.query_heads), self._shape_of(case, case.key_heads)
            call = AttentionCall.make(query, key, key, enable_gqa=True, layout=layout, mask=case.workload.mask)
            backend.jobs(call, call.mask)
        return layout

    def attend(self, state: ModalityLayout, tensors: dict[str, Tensor], case: Case) -> Tensor:
        key_map = None
        if self.alignment is not None:
            aligner = DuplexAligner(case.head_dim, MODALITIES, fusion="concat", scope=self.alignment)
            key_map = functional_call(aligner, {"weight": tensors["weight"]}, (tensors["key"], state))
        out = moda_attention(
            tensors["query"],
            tensors["key"],
            tensors["value"],
            enable_gqa=True,
            layout=state,
            mask=case.workload.mask,
            key_map=key_map,
            backend=self.backend,
        )
        assert isinstance(out, Tensor)
        return out

    def _shape_of(self, case: Case, heads: int) -> Tensor:
        one = torch.empty((), dtype=case.dtype)
        sizes = (case.length, heads) if self.tokens_first(case) else (1, heads, case.length)
        return one.expand(*sizes, case.head_dim)
