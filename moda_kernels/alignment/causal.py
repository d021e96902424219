"""The causal scope of duplex alignment: a key is mapped by the Gram sums over *earlier* tokens only.

Earlier tokens of another modality all lie in segments before a token's own, so one matrix per piece (`pieces.py`) is
exact; keys never look ahead and aligned keys never change. One matrix per piece can outgrow the keys (many short
segments): then pieces are walked in blocks with running Gram sums, and each block is computed again in the backward.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moda_kernels import products
from moda_kernels.alignment.maps import KeyMap, fused_matrix, normed, projected, sum_of_others
from moda_kernels.alignment.pieces import Block, Pieces
from moda_kernels.products.twin import compute_dtype
from moda_kernels.tokens.layout import ModalityLayout

#: All pieces at once while their matrices hold at most this many times the keys' numbers, …
MATRICES_PER_KEYS = 4
#: … and at most so many pieces: sums over earlier pieces are a product with a pieces × pieces matrix.
MAX_PIECES = 512
#: Pieces of a block otherwise.
BLOCK_PIECES = (64, 128)


@dataclass(frozen=True, eq=False)
class CausalMap(KeyMap):
    """k'_t = k_t A[piece of t] (scope "causal").

    Attributes:
        source: ``[T, Hkv, D]`` or ``[B, L, Hkv, D]``, the keys whose Gram sums make the map.
        layout: their layout. pieces: of it.
        ratio, weight, fusion, norm, renorm: the aligner's.
        size: pieces per block. Default: all at once where that is small.
        before: Gram sums ``[N, C, Hkv, D, D]`` over tokens that stand before these (while decoding), C being
            `pieces.carried`.
    """

    source: Tensor
    layout: ModalityLayout
    pieces: Pieces
    ratio: Tensor | None
    weight: Tensor | None
    fusion: str
    norm: str
    renorm: bool = False
    size: int | None = None
    before: Tensor | None = None

    @property
    def num_heads(self) -> int:
        return self.source.shape[-2]

    @property
    def head_dim(self) -> int:
        return self.source.shape[-1]

    def align(self, key: Tensor, layout: ModalityLayout) -> Tensor:
        number = self.pieces.number
        # A graph that is being traced knows neither number: all pieces are one block there, however many there are.
        if not torch.compiler.is_compiling() and (layout.num_tokens == 0 or number == 0):
            return key
        with torch.autocast(key.device.type, enabled=False):
            size = self.size or (None if torch.compiler.is_compiling() else self._block_size())
            if size is None:
                block = self.pieces.block(0, number)
                return self._fused(None, self.source, key, block)[0]
            if key.device.type == "cpu" and not torch.compiler.is_compiling():
                return self._by_tokens(key, size)
            return self._by_pieces(key, self.size or BLOCK_PIECES[1])

    def _by_tokens(self, key: Tensor, size: int) -> Tensor:
        """In blocks of pieces, each with its tokens alone: their places are known on the host."""
        source, keys = self.source.flatten(0, -3), key.flatten(0, -3)
        out, running = [], self._nothing()
        starts = self.pieces.starts
        if not starts:  # padding alone
            return key
        cuts = [0, *starts[size::size], len(keys)]
        for i, (begin, end) in enumerate(itertools.pairwise(cuts)):
            block = self.pieces.block(i * size, min(size, len(starts) - i * size), (begin, end))
            fused, running = self._again(running, source[begin:end], keys[begin:end], block)
            out.append(fused)
        return torch.cat(out).view(key.shape)

    def _by_pieces(self, key: Tensor, size: int) -> Tensor:
        """In blocks of slots: every block passes over all tokens, as where its own lie is not known without waiting
        for the device, and leaves 0 where they are not. Blocks behind the last piece would add 0: they are left out as
        soon as the device has said how many pieces there are."""
        running, total = self._nothing(), torch.zeros_like(key)
        known, number = self.pieces.there_are.value, self.pieces.number
        for first in range(0, number if known is None else min(known, number), size):
            block = self.pieces.block(first, min(size, number - first), carries=True)
            fused, running = self._again(running, self.source, key, block, False)
            total = total + fused
        return torch.where(self.pieces.mapped.view(*key.shape[:-2], 1, 1), total, key)

    def _again(self, *step: Any) -> tuple[Tensor, Tensor]:
        """A block that is computed again in the backward."""
        if not torch.is_grad_enabled():
            return self._fused(*step)
        fused, running = checkpoint(self._fused, *step, use_reentrant=False, preserve_rng_state=False)
        return fused, running

    def matrices(self) -> Tensor:
        """A of every piece, ``[pieces, Hkv, D, D]`` (the identity where keys stay as they are)."""
        block = self.pieces.block(0, self.pieces.number)
        gram = products.segment_gram(self.source, self.source, block.grouping)
        with torch.autocast(gram.device.type, enabled=False):
            matrix, _ = self._matrices(None, gram, block)
            identity = torch.eye(self.head_dim, dtype=gram.dtype, device=gram.device)
            return torch.where(block.is_mapped[:, None, None, None], matrix, identity)

    def _nothing(self) -> Tensor:
        """Gram sums over no tokens, ``[C, Hkv, D, D]``."""
        shape = self.pieces.carried, self.num_heads, self.head_dim, self.head_dim
        return torch.zeros(shape, dtype=compute_dtype(self.source), device=self.source.device)

    def _block_size(self) -> int | None:
        """Pieces of a block; None: all at once."""
        tokens, number = self.layout.num_tokens, self.pieces.number
        if number <= MAX_PIECES and number * self.head_dim <= MATRICES_PER_KEYS * tokens:
            return None
        low, high = BLOCK_PIECES
        return max(low, min(high, MATRICES_PER_KEYS * tokens // self.head_dim))

    def _fused(
        self, running: Tensor | None, source: Tensor, key: Tensor, block: Block, keep: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Fused keys of the pieces of a block (keep: and the other keys as they are), after tokens with the Gram sums
        `running` ``[C, Hkv, D, D]``, and the sums after them."""
        gram = products.segment_gram(source, source, block.grouping)
        matrix, running = self._matrices(running, gram, block)
        return projected(key, matrix, block.mapped, block.of_mapped, renorm=self.renorm, keep=keep), running

    def _matrices(self, running: Tensor | None, gram: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """A ``[K, Hkv, D, D]`` of K consecutive pieces with Gram sums ``[K, Hkv, D, D]`` (anything where a piece is not
        mapped), and the running sums after them (where there were any before)."""
        count = gram.shape[0]
        if running is None:
            rest = after = _named_sums(block.names, gram)
        else:
            sums = _named_sums(block.names, torch.cat((running, gram)))
            rest, after = sums[:count], sums[count:].clone()  # a copy, since a view would keep all sums
        if self.before is not None:
            rest = rest + rest_before(self.before, block.sequence, block.modality, block.continues)
        ratio, weight = (
            None if p is None else p.to(gram.dtype).index_select(0, block.modality) for p in (self.ratio, self.weight)
        )
        return fused_matrix(normed(rest, self.norm), ratio, weight, self.fusion), after


def _named_sums(names: Tensor, gram: Tensor) -> Tensor:
    """Σ of the Gram matrices ``[K, …]`` that each row of a bool ``[R, K]`` names; what is not finite stays out of the
    sums that don't name it, as 0 · inf would not."""
    flat = gram.flatten(1)
    broken = ~(flat.detach().abs().amax(1) < float("inf"))
    total = names.to(gram.dtype) @ flat.masked_fill(broken[:, None], 0)
    total = total.masked_fill((names & broken).any(1, keepdim=True), float("nan"))
    return total.view(names.shape[0], *gram.shape[1:])


def rest_before(before: Tensor, sequence: Tensor, modality: Tensor, continues: Tensor | None) -> Tensor:
    """R ``[K, Hkv, D, D]`` of pieces from sums ``[N, C, Hkv, D, D]`` over tokens before: per modality those in no
    chunk, then those of the chunk in progress, for the pieces that continue it."""
    if continues is None:
        return sum_of_others(before)[sequence, modality]
    free, own = (sum_of_others(sums)[sequence, modality] for sums in before.chunk(2, 1))
    return free + own.masked_fill(~continues[:, None, None, None], 0)
