"""This package: by backend, with and without alignment. Layout and plan are made once and shared by all layers, except
by the contestants named "-build", which make them in every call (a new layout each step, one layer)."""

import torch
from torch import Tensor
from torch.func import functional_call

from moda_kernels import DuplexAligner, KeyMap, ModalityLayout, moda_attention
from moda_kernels.backends import BACKENDS
from moda_kernels.backends.cpu import CpuBackend
from moda_kernels.call import AttentionCall
from moda_kernels.commands.bench.cases import Case
from moda_kernels.commands.bench.layouts import MODALITIES
from moda_kernels.commands.bench.peers.base import Peer
from moda_kernels.runtime import gpu

#: Triton's interpreter is there for tests: more tokens than this would take minutes.
LONGEST_INTERPRETED = 64


class Moda(Peer):
    """`moda_attention` on one backend, which need not be there.

    Args:
        alignment: the scope within which keys are aligned ("concat"; the map is made anew in every call), or None.
        longest: the backend isn't asked for more tokens than this.
        build: segment in every call.
    """

    def __init__(
        self, name: str, backend: str, alignment: str | None = None, longest: int | None = None, build: bool = False
    ) -> None:
        self.name, self.backend, self.alignment, self.longest, self.build = name, backend, alignment, longest, build
        if not build:
            self.prepares = "segmentation and plan" if backend == "cpu" else "segmentation"

    def why_not(self, case: Case) -> str | None:
        if self.backend not in BACKENDS:
            return f"this moda_kernels has no backend {self.backend!r}"
        longest = self.longest
        if self.backend == "triton" and gpu.interpreted():
            longest = LONGEST_INTERPRETED
        if longest is not None and case.length > longest:
            return f"too slow beyond {longest} tokens"
        backend = BACKENDS[self.backend]
        return "; ".join(backend.why_absent() or backend.why_not(self._call(case, case.workload.layout))) or None

    def tokens_first(self, case: Case) -> bool:
        return case.workload.packed

    def setup(self, case: Case) -> ModalityLayout | None:
        if self.build:
            return None
        layout = case.workload.segment()
        backend = BACKENDS[self.backend]
        if isinstance(backend, CpuBackend):
            # The plan is kept with the layout; making it needs shapes only.
            call = self._call(case, layout)
            backend.places(call)
        return layout

    def attend(self, state: ModalityLayout | None, tensors: dict[str, Tensor], case: Case) -> Tensor:
        layout = case.workload.segment() if state is None else state
        key_map = None
        if self.alignment is not None:
            key_map = concat_map(tensors["key"], tensors["weight"], layout, self.alignment)
        out = moda_attention(
            tensors["query"],
            tensors["key"],
            tensors["value"],
            enable_gqa=case.query_heads != case.key_heads,
            layout=layout,
            mask=case.workload.mask,
            key_map=key_map,
            backend=self.backend,
        )
        assert isinstance(out, Tensor)
        return out

    def _call(self, case: Case, layout: ModalityLayout) -> AttentionCall:
        """A call of the case's shapes, without its numbers."""

        def shaped(heads: int, rows: int) -> Tensor:
            sizes = (rows, heads) if self.tokens_first(case) else (1, heads, rows)
            # Of ordinary strides, which a backend may look at; never written to.
            return torch.empty(*sizes, case.head_dim, dtype=case.dtype, device=case.device)

        query, key = shaped(case.query_heads, case.queries), shaped(case.key_heads, case.length)
        gqa = case.query_heads != case.key_heads
        return AttentionCall.make(query, key, key, enable_gqa=gqa, layout=layout, mask=case.workload.mask)


def concat_map(key: Tensor, weight: Tensor, layout: ModalityLayout, scope: str) -> KeyMap:
    """The key map of a "concat" aligner with this weight ``[M, D, 2D]``."""
    aligner = DuplexAligner(key.shape[-1], MODALITIES, fusion="concat", scope=scope, device=key.device)
    made: KeyMap = functional_call(aligner, {"weight": weight}, (key, layout))
    return made
