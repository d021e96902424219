"""The causal scope of duplex alignment: a key is mapped by the Gram sums over *earlier* tokens only.

Earlier tokens of another modality all lie in segments before a token's own, so one matrix per segment is exact; keys
never look ahead and aligned keys never change. One matrix per segment can outgrow the keys (many short segments): then
segments are walked in chunks with a running Gram per modality, and each chunk is computed again in the backward.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moda_kernels import ops
from moda_kernels.grouped import compute_dtype
from moda_kernels.keymap import KeyMap, fused_matrix, normed, sum_of_others
from moda_kernels.layout import ModalityLayout

#: All segments at once while their matrices hold at most this many times the keys' numbers, …
MATRICES_PER_KEYS = 4
#: … and at most so many segments: sums over earlier segments are a product with a segments × segments matrix.
MAX_SEGMENTS = 512
#: Segments of a chunk otherwise.
CHUNK_SEGMENTS = (64, 128)


@dataclass(frozen=True, eq=False)
class CausalMap(KeyMap):
    """k'_t = k_t A[segment of t] (scope "causal").

    Attributes:
        source: ``[tokens, Hkv, D]``, the keys whose Gram sums make the map.
        layout: their layout.
        ratio, weight, fusion, norm, aligned: the aligner's.
        chunk: segments per chunk. Default: all at once where that is small.
        before: Gram sums ``[N, M, Hkv, D, D]`` over tokens that stand before these (while decoding), and before_counts
            ``[N, M]``, how many they are.
    """

    source: Tensor
    layout: ModalityLayout
    ratio: Tensor | None
    weight: Tensor | None
    fusion: str
    norm: str
    aligned: tuple[int, ...]
    chunk: int | None = None
    before: Tensor | None = None
    before_counts: Tensor | None = None

    @property
    def num_heads(self) -> int:  # type: ignore[override]
        return self.source.shape[1]

    @property
    def head_dim(self) -> int:  # type: ignore[override]
        return self.source.shape[2]

    def align(self, key: Tensor, layout: ModalityLayout) -> Tensor:
        with torch.autocast(key.device.type, enabled=False):
            running = self._nothing()
            chunks = self._chunks()
            out = []
            for begin, end, first, slots in chunks:
                step = running, self.source[begin:end], key[begin:end], begin, first, slots
                if len(chunks) > 1 and torch.is_grad_enabled():
                    fused, running = checkpoint(self._chunk, *step, use_reentrant=False, preserve_rng_state=False)
                else:
                    fused, running = self._chunk(*step)
                out.append(fused)
        return torch.cat(out) if out else key

    def matrices(self) -> Tensor:
        """A of every segment, ``[max_segments, Hkv, D, D]`` (the identity where keys stay as they are)."""
        layout = self.layout
        gram = ops.segment_gram(self.source, self.source, layout.groups("segment"), layout.max_segments)
        with torch.autocast(gram.device.type, enabled=False):
            matrix, _ = self._segment_matrices(self._nothing(), gram, layout.table, -1)
        return matrix

    def _nothing(self) -> Tensor:
        """Gram sums over no tokens, ``[M, Hkv, D, D]``."""
        shape = self.layout.num_modalities, self.num_heads, self.head_dim, self.head_dim
        return torch.zeros(shape, dtype=compute_dtype(self.source), device=self.source.device)

    def _chunks(self) -> list[tuple[int, int, int, int]]:
        """First and last token, first segment and number of segments of each chunk."""
        tokens, segments = self.source.shape[0], self.layout.max_segments
        if tokens == 0:
            return []
        fits = segments <= MAX_SEGMENTS and segments * self.head_dim <= MATRICES_PER_KEYS * tokens
        if self.chunk is None and fits:
            return [(0, tokens, 0, segments)]
        low, high = CHUNK_SEGMENTS
        size = self.chunk or max(low, min(high, MATRICES_PER_KEYS * tokens // self.head_dim))
        # The one place that waits for the device.
        starts = self.layout.remember(
            "segment starts", lambda: self.layout.table[: int(self.layout.num_segments), 1].tolist()
        )
        cuts = [0, *starts[size::size], tokens]
        return [(cuts[i], cuts[i + 1], i * size, min(size, len(starts) - i * size)) for i in range(len(cuts) - 1)]

    def _chunk(
        self, running: Tensor, source: Tensor, key: Tensor, begin: int, first: int, slots: int
    ) -> tuple[Tensor, Tensor]:
        """Fused keys of tokens begin…, which hold segments first…, and the running Gram ``[M, Hkv, D, D]`` of the
        sequence in which they end."""
        layout = self.layout
        segment = layout.segment.flatten()[begin : begin + source.shape[0]].long()
        local = torch.where((segment >= 0) & (segment < layout.max_segments), segment - first, -1)
        gram = ops.segment_gram(source, source, local, slots)
        table = layout.table[first : first + slots]
        sequence, modality = table[:, 0], table[:, 3]
        before = layout.table[first - 1, 0] if first else -1  # the sequence that `running` belongs to
        matrix, mapped = self._segment_matrices(running, gram, table, before)

        token_mapped = (local >= 0) & mapped[local.clamp(min=0)] if slots else local >= 0
        wide = key.to(compute_dtype(source, key))
        fused = ops.segment_project(wide, matrix, torch.where(token_mapped, local, -1)).to(key.dtype)
        fused = torch.where(token_mapped[:, None, None], fused, key)
        if slots:
            stays = sequence == sequence[-1]
            of = (modality == torch.arange(layout.num_modalities, device=key.device)[:, None]) & stays
            running = torch.where(sequence[-1] == before, running, 0) + _weighted_sum(of, gram)
        return fused, running

    def _segment_matrices(
        self, running: Tensor, gram: Tensor, table: Tensor, running_sequence: Tensor | int
    ) -> tuple[Tensor, Tensor]:
        """A ``[K, Hkv, D, D]`` of K consecutive segments, and which of them are mapped; `running` holds the Gram sums
        of one sequence before them."""
        layout = self.layout
        sequence, start, length, modality = table.unbind(1)
        exists = length > 0
        slot = torch.arange(table.shape[0], device=table.device)
        earlier = (slot[None, :] < slot[:, None]) & (sequence[None, :] == sequence[:, None]) & exists[None, :]
        earlier &= modality[None, :] != modality[:, None]
        others = torch.arange(layout.num_modalities, device=table.device)[None, :] != modality[:, None]
        carried = others & (sequence == running_sequence)[:, None]
        rest = _weighted_sum(torch.cat((carried, earlier), 1), torch.cat((running, gram)))

        counts = layout.prefix[start.long()] - layout.prefix[layout.cu_seqlens[sequence.long()].long()]
        if self.before is not None and self.before_counts is not None:
            rest = rest + sum_of_others(self.before)[sequence.long(), modality.long()]
            counts = counts + self.before_counts[sequence.long()]
        aligned = torch.tensor([m in self.aligned for m in range(layout.num_modalities)], device=table.device)
        mapped = exists & ((counts * others).sum(1) > 0) & aligned[modality.long()]

        ratio, weight = (None if p is None else p.to(gram.dtype)[modality.long()] for p in (self.ratio, self.weight))
        matrix = fused_matrix(normed(rest, self.norm), ratio, weight, self.fusion)
        identity = torch.eye(self.head_dim, dtype=gram.dtype, device=gram.device)
        return torch.where(mapped[:, None, None, None], matrix, identity), mapped


def _weighted_sum(of: Tensor, gram: Tensor) -> Tensor:
    """Σ of the Gram matrices ``[K, …]`` that each row of a bool ``[R, K]`` names; what is not finite stays out of the
    sums that don't name it, as 0 · inf would not."""
    finite = gram.detach().isfinite().flatten(1).all(1)
    clean = torch.where(finite.view(-1, *[1] * (gram.dim() - 1)), gram, 0)
    total = (of.to(gram.dtype) @ clean.flatten(1)).view(of.shape[0], *gram.shape[1:])
    broken = (of & ~finite).any(1).view(-1, *[1] * (gram.dim() - 1))
    return torch.where(broken, float("nan"), total)
