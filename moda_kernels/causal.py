"""The causal scope of duplex alignment: a key is mapped by the Gram sums over *earlier* tokens only.

Earlier tokens of another modality all lie in segments before a token's own, so one matrix per segment is exact; keys
never look ahead and aligned keys never change. One matrix per segment can outgrow the keys (many short segments): then
the tokens are walked in chunks with a running Gram per modality, and each chunk is computed again in the backward.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moda_kernels import ops
from moda_kernels.keymap import KeyMap, compute_dtype, fused_matrix, normed
from moda_kernels.layout import ModalityLayout

#: Chunk while the matrices of all segments would hold more numbers than this many times the keys.
MATRICES_PER_KEYS = 4
MIN_CHUNK = 64


@dataclass(frozen=True, eq=False)
class CausalMap(KeyMap):
    """k'_t = k_t A[segment of t] (scope "causal").

    Attributes:
        source: ``[tokens, Hkv, D]``, the keys whose Gram sums make the map.
        layout: their layout.
        ratio, weight, fusion, norm, aligned: the aligner's.
        chunk: tokens per chunk. Default: all at once where that is small.
    """

    source: Tensor
    layout: ModalityLayout
    ratio: Tensor | None
    weight: Tensor | None
    fusion: str
    norm: str
    aligned: tuple[int, ...]
    chunk: int | None = None
    made_for: tuple[object, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "made_for", self.signature(self.layout))

    @staticmethod
    def signature(layout: ModalityLayout) -> tuple[object, ...]:
        return *KeyMap.signature(layout), layout.modality.shape

    @property
    def num_heads(self) -> int:  # type: ignore[override]
        return self.source.shape[1]

    @property
    def head_dim(self) -> int:  # type: ignore[override]
        return self.source.shape[2]

    def align(self, key: Tensor, layout: ModalityLayout) -> Tensor:
        dtype = compute_dtype(self.source, key)
        with torch.autocast(key.device.type, enabled=False):
            running = key.new_zeros(layout.num_modalities, *key.shape[1:], key.shape[-1], dtype=dtype)
            out = []
            for begin in range(0, key.shape[0], self._chunk_tokens()):
                end = min(begin + self._chunk_tokens(), key.shape[0])
                if self._chunk_tokens() < key.shape[0] and torch.is_grad_enabled():
                    fused, running = checkpoint(
                        self._chunk,
                        running,
                        self.source[begin:end],
                        key[begin:end],
                        begin,
                        use_reentrant=False,
                        preserve_rng_state=False,
                    )
                else:
                    fused, running = self._chunk(running, self.source[begin:end], key[begin:end], begin)
                out.append(fused)
        return torch.cat(out) if out else key

    def matrices(self) -> Tensor:
        """A of every segment, ``[max_segments, Hkv, D, D]`` (the identity where keys stay as they are)."""
        layout = self.layout
        gram = ops.segment_gram(self.source, self.source, layout.groups("segment"), layout.max_segments)
        nothing = gram.new_zeros(layout.num_modalities, *gram.shape[1:])
        with torch.autocast(gram.device.type, enabled=False):
            matrix, _, _ = self._segment_matrices(nothing, gram, layout.table, -1)
        return matrix

    def _chunk_tokens(self) -> int:
        tokens, _, dim = self.source.shape
        if self.chunk is not None:
            return self.chunk
        if self.layout.max_segments * dim <= MATRICES_PER_KEYS * tokens:
            return max(tokens, 1)
        return max(MIN_CHUNK, tokens // dim)

    def _chunk(self, running: Tensor, source: Tensor, key: Tensor, begin: int) -> tuple[Tensor, Tensor]:
        """Fused keys of tokens begin…, and the running Gram [M, Hkv, D, D] of the sequence in which the chunk ends.

        A segment may go on from the chunk before; what of it lies there is in `running`, under its own modality, which
        its own map leaves out. So cutting segments is exact.
        """
        layout, count = self.layout, source.shape[0]
        segment = layout.segment.flatten()[begin : begin + count].long()
        if begin == 0:
            before = torch.zeros_like(layout.num_segments).long()
        else:
            before = layout.segment.flatten()[:begin].amax().clamp(min=0).long().view(1)
        slots = min(layout.max_segments, count + 1)
        local = torch.where((segment >= 0) & (segment < layout.max_segments), segment - before, -1)
        gram = ops.segment_gram(source, source, local, slots)
        rows = before + torch.arange(slots, device=key.device)
        table = layout.table[rows.clamp(max=max(layout.max_segments - 1, 0))]
        table = torch.where((rows < layout.max_segments)[:, None], table, 0)
        # `running` belongs to the sequence of the token before the chunk.
        running_sequence = layout.sequence.flatten()[begin - 1] if begin else -1
        matrix, mapped, contributes = self._segment_matrices(running, gram, table, running_sequence)

        token_mapped = (local >= 0) & mapped[local.clamp(min=0)] if slots else local >= 0
        wide = key.to(compute_dtype(source, key))
        fused = ops.segment_project(wide, matrix, torch.where(token_mapped, local, -1)).to(key.dtype)
        fused = torch.where(token_mapped[:, None, None], fused, key)

        ending = layout.sequence.flatten()[begin + count - 1]
        stays = (ending == running_sequence) if begin else torch.zeros_like(ending, dtype=torch.bool)
        inside = contributes & (table[:, 0] == ending)
        modality = torch.arange(layout.num_modalities, device=key.device)
        pick = (inside & (table[:, 3] == modality[:, None])).to(gram.dtype)
        added = (pick @ gram.flatten(1)).view_as(running)
        return fused, torch.where(stays, running, 0) + added

    def _segment_matrices(
        self, running: Tensor, gram: Tensor, table: Tensor, running_sequence: Tensor | int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A ``[K, Hkv, D, D]`` of K consecutive segments, whether they are mapped, and whether they exist."""
        layout = self.layout
        sequence, start, length, modality = table.unbind(1)
        exists = length > 0
        slot = torch.arange(table.shape[0], device=table.device)
        earlier = (slot[None, :] < slot[:, None]) & (sequence[None, :] == sequence[:, None]) & exists[None, :]
        earlier &= modality[None, :] != modality[:, None]
        others = torch.arange(layout.num_modalities, device=table.device)[None, :] != modality[:, None]
        carried = others & (sequence == running_sequence)[:, None]
        rest = torch.cat((carried, earlier), 1).to(gram.dtype) @ torch.cat((running, gram)).flatten(1)

        counts = layout.prefix[start.long()] - layout.prefix[layout.cu_seqlens[sequence.long()].long()]
        aligned = torch.tensor([m in self.aligned for m in range(layout.num_modalities)], device=table.device)
        mapped = exists & ((counts * others).sum(1) > 0) & aligned[modality.long()]

        ratio, weight = (None if p is None else p.to(gram.dtype)[modality.long()] for p in (self.ratio, self.weight))
        matrix = fused_matrix(normed(rest.view_as(gram), self.norm), ratio, weight, self.fusion)
        identity = torch.eye(self.head_dim, dtype=gram.dtype, device=gram.device)
        return torch.where(mapped[:, None, None, None], matrix, identity), mapped, exists
