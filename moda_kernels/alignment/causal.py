"""The causal scope of duplex alignment: a key is mapped by the Gram sums over *earlier* tokens only.

Earlier tokens of another modality all lie in segments before a token's own, so one matrix per segment is exact; keys
never look ahead and aligned keys never change. One matrix per segment can outgrow the keys (many short segments): then
segments are walked in chunks with a running Gram per modality, and each chunk is computed again in the backward.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moda_kernels import products
from moda_kernels.alignment.maps import KeyMap, fused_matrix, normed, sum_of_others
from moda_kernels.products.twin import compute_dtype
from moda_kernels.tokens.layout import ModalityLayout

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
        source: ``[T, Hkv, D]`` or ``[B, L, Hkv, D]``, the keys whose Gram sums make the map.
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
    def num_heads(self) -> int:
        return self.source.shape[-2]

    @property
    def head_dim(self) -> int:
        return self.source.shape[-1]

    def align(self, key: Tensor, layout: ModalityLayout) -> Tensor:
        if layout.num_tokens == 0:
            return key
        with torch.autocast(key.device.type, enabled=False):
            size = self.chunk or self._chunk_size()
            if size is None:
                grouping = layout.grouping("segment")
                return self._fused(self._nothing(), self.source, key, grouping, 0, layout.max_segments)[0]
            if key.device.type == "cpu" and not torch.compiler.is_compiling():
                return self._by_tokens(key, size)
            return self._by_segments(key, self.chunk or CHUNK_SEGMENTS[1])

    def _by_tokens(self, key: Tensor, size: int) -> Tensor:
        """In chunks of segments, each with its tokens alone: their places are known on the host."""
        source, keys = self.source.flatten(0, -3), key.flatten(0, -3)
        layout, out, running = self.layout, [], self._nothing()
        starts = layout.remember("segment starts", lambda: layout.table[: int(layout.num_segments), 1].tolist())
        segment = layout.groups("segment")
        cuts = [0, *starts[size::size], len(keys)]
        for i, (begin, end) in enumerate(itertools.pairwise(cuts)):
            first, slots = i * size, min(size, len(starts) - i * size)
            local = segment[begin:end]
            grouping = products.group_tokens(torch.where(local >= 0, local - first, -1), slots)
            fused, running = self._again(running, source[begin:end], keys[begin:end], grouping, first, slots)
            out.append(fused)
        return torch.cat(out).view(key.shape)

    def _by_segments(self, key: Tensor, size: int) -> Tensor:
        """In chunks of segment slots: every chunk passes over all tokens, as where its own lie is not known without
        waiting for the device, and leaves 0 where they are not."""
        layout, running = self.layout, self._nothing()
        if layout.max_segments == 0:
            return key
        total = torch.zeros_like(key)
        for first in range(0, layout.max_segments, size):
            slots = min(size, layout.max_segments - first)
            grouping = layout.grouping("segment").window(first, slots)
            fused, running = self._again(running, self.source, key, grouping, first, slots, False)
            total = total + fused
        mapped = self._mapped(layout.table).index_select(0, layout.groups("segment").clamp(min=0))
        mapped = (mapped & (layout.groups("segment") >= 0)).view(*key.shape[:-2], 1, 1)
        return torch.where(mapped, total, key)

    def _again(self, *step: Any) -> tuple[Tensor, Tensor]:
        """A chunk that is computed again in the backward."""
        if not torch.is_grad_enabled():
            return self._chunk(*step)
        fused, running = checkpoint(self._chunk, *step, use_reentrant=False, preserve_rng_state=False)
        return fused, running

    def matrices(self) -> Tensor:
        """A of every segment, ``[max_segments, Hkv, D, D]`` (the identity where keys stay as they are)."""
        gram = products.segment_gram(self.source, self.source, self.layout.grouping("segment"))
        with torch.autocast(gram.device.type, enabled=False):
            matrix, _ = self._segment_matrices(self._nothing(), gram, self.layout.table, -1)
        return matrix

    def _nothing(self) -> Tensor:
        """Gram sums over no tokens, ``[M, Hkv, D, D]``."""
        shape = self.layout.num_modalities, self.num_heads, self.head_dim, self.head_dim
        return torch.zeros(shape, dtype=compute_dtype(self.source), device=self.source.device)

    def _chunk_size(self) -> int | None:
        """Segments of a chunk; None: all at once."""
        tokens, segments = self.layout.num_tokens, self.layout.max_segments
        if segments <= MAX_SEGMENTS and segments * self.head_dim <= MATRICES_PER_KEYS * tokens:
            return None
        low, high = CHUNK_SEGMENTS
        return max(low, min(high, MATRICES_PER_KEYS * tokens // self.head_dim))

    def _chunk(
        self,
        running: Tensor,
        source: Tensor,
        key: Tensor,
        grouping: products.Grouping,
        first: int,
        slots: int,
        keep: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Fused keys of `slots` segments from `first` on, and the running Gram of the sequence in which they end."""
        fused, gram = self._fused(running, source, key, grouping, first, slots, keep)
        if slots == 0:
            return fused, running
        sequence, _, length, modality = self.layout.table[first : first + slots].unbind(1)
        before, exists = self._sequence_before(first), length > 0
        # Slots without a segment (as many as the layout's bound is too high) come last.
        last = torch.where(exists, sequence, before).amax()
        numbers = torch.arange(self.layout.num_modalities, device=key.device)
        of = (modality == numbers[:, None]) & exists & (sequence == last)
        return fused, torch.where(last == before, running, 0) + _weighted_sum(of, gram)

    def _fused(
        self,
        running: Tensor,
        source: Tensor,
        key: Tensor,
        grouping: products.Grouping,
        first: int,
        slots: int,
        keep: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Fused keys of `slots` segments from `first` on, whose tokens are grouped (keep: and the other keys as they
        are), after tokens with the Gram sums `running` ``[M, Hkv, D, D]``, and the segments' own Gram sums."""
        gram = products.segment_gram(source, source, grouping)
        table = self.layout.table[first : first + slots]
        matrix, mapped = self._segment_matrices(running, gram, table, self._sequence_before(first))
        return products.segment_project(key, matrix, grouping.only(mapped), keep=keep), gram

    def _sequence_before(self, first: int) -> Tensor | int:
        """The sequence of the segment before this one."""
        return self.layout.table[first - 1, 0] if first else -1

    def _segment_matrices(
        self, running: Tensor, gram: Tensor, table: Tensor, running_sequence: Tensor | int
    ) -> tuple[Tensor, Tensor]:
        """A ``[K, Hkv, D, D]`` of K consecutive segments, and which of them are mapped; `running` holds the Gram sums
        of one sequence before them."""
        layout = self.layout
        sequence, _, length, modality = table.unbind(1)
        exists = length > 0
        slot = torch.arange(table.shape[0], device=table.device)
        earlier = (slot[None, :] < slot[:, None]) & (sequence[None, :] == sequence[:, None]) & exists[None, :]
        earlier &= modality[None, :] != modality[:, None]
        others = torch.arange(layout.num_modalities, device=table.device)[None, :] != modality[:, None]
        carried = others & (sequence == running_sequence)[:, None]
        rest = _weighted_sum(torch.cat((carried, earlier), 1), torch.cat((running, gram)))

        if self.before is not None:
            rest = rest + sum_of_others(self.before)[sequence.long(), modality.long()]
        mapped = self._mapped(table)
        ratio, weight = (None if p is None else p.to(gram.dtype)[modality.long()] for p in (self.ratio, self.weight))
        matrix = fused_matrix(normed(rest, self.norm), ratio, weight, self.fusion)
        identity = torch.eye(self.head_dim, dtype=gram.dtype, device=gram.device)
        return torch.where(mapped[:, None, None, None], matrix, identity), mapped

    def _mapped(self, table: Tensor) -> Tensor:
        """Which segments of a table are mapped: those after tokens of another modality, in their sequence."""
        layout = self.layout
        sequence, start, length, modality = table.long().unbind(1)
        others = torch.arange(layout.num_modalities, device=table.device)[None, :] != modality[:, None]
        counts = layout.prefix[start] - layout.prefix[layout.cu_seqlens[sequence].long()]
        if self.before_counts is not None:
            counts = counts + self.before_counts[sequence]
        return (length > 0) & ((counts * others).sum(1) > 0) & layout.chosen(self.aligned)[modality]


def _weighted_sum(of: Tensor, gram: Tensor) -> Tensor:
    """Σ of the Gram matrices ``[K, …]`` that each row of a bool ``[R, K]`` names; what is not finite stays out of the
    sums that don't name it, as 0 · inf would not."""
    finite = gram.detach().isfinite().flatten(1).all(1)
    clean = torch.where(finite.view(-1, *[1] * (gram.dim() - 1)), gram, 0)
    total = (of.to(gram.dtype) @ clean.flatten(1)).view(of.shape[0], *gram.shape[1:])
    broken = (of & ~finite).any(1).view(-1, *[1] * (gram.dim() - 1))
    return torch.where(broken, float("nan"), total)
