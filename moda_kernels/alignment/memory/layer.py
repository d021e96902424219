"""`LayerState`, what one attention layer remembers: Gram sums and, with the causal scope, aligned keys."""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from moda_kernels import products
from moda_kernels.alignment.memory.documents import merged, scattered
from moda_kernels.alignment.memory.history import History, Moved, Sums
from moda_kernels.alignment.pieces import After, counting, mapped_tokens
from moda_kernels.runtime import checks
from moda_kernels.tokens.layout import ModalityLayout

#: Room for new aligned keys, in parts of those there are: copying all of them costs O(1) per token so.
GROWTH = 4


class LayerState:
    """What one attention layer remembers: ``state[i]`` of a :class:`DecodeState`.

    Attributes:
        gram: running Gram sums per modality over the tokens that count, float32 (float64), ``[N, M, Hkv, D, D]`` (for
            `gram_affinity`, too); of the released variant ``[N, 1, Hkv, D, D]``; with the causal scope and chunks ``[N,
            2 M, Hkv, D, D]``, first of tokens in no chunk, then of those of the chunk in progress. None before the
            first call.
    """

    def __init__(self, history: History) -> None:
        self.history = history
        self.gram: Tensor | None = None
        self._summed = 0  # tokens in `gram`
        self._before: deque[tuple[int, Tensor | None]] = deque(maxlen=2 if history.undo else 0)  # older (_summed, gram)
        # Aligned keys of the last tokens before `_aligned`: columns first…end-1 of a buffer that may have room behind.
        self._buffer: Tensor | None = None
        self._first = self._end = 0
        self._aligned = 0

    # Called by the aligners.

    def layout_for(self, key: Tensor, layout: ModalityLayout | Tensor | None) -> ModalityLayout:
        """The layout of these keys of the cache; a layout that the caller named has to be the same."""
        return self.history.layout_for(key, layout)

    def begin(self, causal: bool) -> tuple[int, int]:
        """(first, last + 1) of the tokens that a call has to look at: those not yet summed and, for the causal scope,
        aligned.

        Raises:
            ValueError: nothing is new.
        """
        history = self.history
        history.layout()
        if history.packed and self._summed not in (0, history.length - history.newest):
            self._forget()
        if (self._aligned if causal else self._summed) == history.length and history.length:
            raise checks.wrong_value(
                "state", "new tokens (state.append once per step, and state[i] of its own for each layer)", "none"
            )
        return self._summed, self._aligned if causal and self._aligned > self._summed else history.length

    def new_tokens(self, name: str, cached: Tensor, begin: int, end: int) -> tuple[Tensor, ModalityLayout]:
        """Keys (or values) of tokens begin…end-1 from a cache ``[B, H, columns, D]``, packed ``[T, H, D]``, as
        ``[tokens, H, D]``, and their layout.

        Raises:
            ValueError: the cache no longer has them.
        """
        history = self.history
        part = history.part(begin, end)
        if history.packed:
            if begin > 0:
                assert history.new_bounds is not None and history.bounds is not None
                cached = cached[merged(history.new_bounds, history.newest, history.bounds, 1)]
            return cached, part
        gone = max(history.length - cached.shape[2], 0)
        if begin < gone:
            raise checks.wrong_value(
                name,
                f"those of tokens {begin} to {end - 1} (not summed yet, or to be summed again after a crop; `undo` of "
                "DecodeState says how far crop goes back without them)",
                f"a cache that holds only tokens from {gone} on",
            )
        return cached[:, :, begin - gone : end - gone].transpose(1, 2).flatten(0, 1), part

    def after(
        self, part: ModalityLayout, begin: int, end: int, aligned: tuple[int, ...], sources: tuple[int, ...] | None
    ) -> After:
        """What tokens begin…end-1, whose layout this is, know of those that are summed already."""
        history = self.history

        def make() -> After:
            mapped = mapped_tokens(history.layout(), aligned, sources, history.rows_of(begin, end))
            return After(mapped, history.continues(begin, end))

        return part.remember(("after", aligned, sources), make)

    def before(self) -> Tensor | None:
        """`gram` of the causal scope, with room for a chunk in progress where there are chunks."""
        gram, history = self.gram, self.history
        if gram is not None and history.own_chunks and gram.shape[1] == history.num_modalities:  # no chunks so far
            return torch.cat((gram, torch.zeros_like(gram)), 1)
        return gram

    def add_keys(self, x: Tensor, begin: int, end: int, sources: tuple[int, ...] | None, causal: bool) -> Tensor:
        """`gram` with the keys ``[tokens, H, D]`` of tokens begin…end-1."""
        history, m = self.history, self.history.num_modalities
        part = history.part(begin, end)
        if not (causal and history.own_chunks):

            def plain() -> Tensor:
                return torch.where(counting(part, sources), part.groups("modality"), -1)

            return self.add(x, x, part.remember(("sums", sources), plain), m, end)
        self.gram = self.before()

        def sums(first: int, last: int) -> Sums:
            return part.remember(("sums", sources, first, last), lambda: history.sums(begin, end, first, last, sources))

        return self.add(x, x, sums, 2 * m, end)

    def add(self, x: Tensor, y: Tensor, group: Tensor | Callable[[int, int], Sums], groups: int, end: int) -> Tensor:
        """Σ x_tᵀ y_t ``[N, G, H, D, E]`` so far, with new tokens ``[tokens, H, D]``.

        Args:
            group: int64 ``[tokens]``: sequence · G + which, -1: none; or, where there are chunks, from the first and
                last + 1 of some tokens to where they go.
        """
        n, begin, undo = self.history.layout().num_sequences, self._summed, self.history.undo

        def plus(before: Tensor | None, group: Tensor | Callable[[int, int], Sums], first: int, last: int) -> Tensor:
            if callable(group):
                group, stays = group(first, last)
                if before is not None:
                    free, own = before.chunk(2, 1)
                    before = torch.cat((free, own.masked_fill(~stays[:, None, None, None, None], 0)), 1)
            elif (first, last) != (begin, end):
                column = torch.arange(begin, end, device=x.device).repeat(n)
                group = torch.where((column >= first) & (column < last), group, -1)
            if before is not None and not self.history.packed and last - first == 1 == end - begin:
                return _plus_outer(before, x, y, group)
            new: Tensor = products.segment_gram(x, y, group, n * groups).unflatten(0, (n, groups))
            return new if before is None else before + new

        if self.history.packed:
            self.gram = plus(self.gram, group, begin, end)
        elif self.gram is not None and end - begin == 1:
            # (No copies in a compiled step, which would be another graph each: `crop` can do without.)
            copies = not torch.compiler.is_compiling()
            if copies and (not self._before or begin - self._before[-1][0] >= undo):
                self._before.append((begin, self.gram))
            self.gram = plus(self.gram, group, begin, end)
        else:
            # A copy of the sums at most `undo` tokens back.
            cut = max(begin, end - undo)
            if begin < cut < end:
                self.gram = plus(self.gram, group, begin, cut)
            self._before.append((cut, self.gram))
            self.gram = plus(self.gram, group, cut if begin < cut < end else begin, end)
        self._summed = end
        return self.gram

    def keep(self, fused: Tensor, begin: int, key: Tensor) -> Tensor:
        """Keep the aligned keys ``[tokens, H, D]`` of tokens begin… (the newest), and return those of all keys of the
        cache, in its shape."""
        history = self.history
        if history.bounds is not None:
            if self._buffer is not None and begin > 0:
                assert history.new_bounds is not None
                old = history.bounds - history.new_bounds
                rows = (
                    merged(old, history.length - history.newest, history.bounds, 0),
                    merged(history.new_bounds, history.newest, history.bounds, 1),
                )
                fused = scattered(self._buffer, fused, *rows)
            self._buffer, self._aligned = fused, history.length
            return fused
        columns = key.shape[2]
        new = fused.unflatten(0, (key.shape[0], -1)).transpose(1, 2)
        have = 0 if begin == 0 else self._end - self._first
        if min(columns, history.length) > have + new.shape[2]:
            expected = f"a cache of at most the last {have + new.shape[2]} keys (older aligned keys are gone)"
            raise checks.wrong_value("key", expected, f"{columns} keys")
        if self._buffer is None or begin == 0:
            self._replace(new)
        elif torch.is_grad_enabled() and (new.requires_grad or self._buffer.requires_grad):
            self._replace(torch.cat((self._buffer[:, :, self._first : self._end], new), 2))
        else:
            self._extend(self._buffer, new, columns)
        self._aligned = history.length
        assert self._buffer is not None
        if columns < history.length:
            return self._buffer[:, :, self._end - columns : self._end]
        if self._first > 0 or self._buffer.shape[2] < columns:
            kept = self._buffer[:, :, self._first : self._end]
            self._buffer = torch.nn.functional.pad(kept, (0, 0, 0, columns - kept.shape[2]))
            self._first, self._end = 0, kept.shape[2]
        return self._buffer[:, :, :columns]

    def _replace(self, keys: Tensor) -> None:
        self._buffer, self._first, self._end = keys, 0, keys.shape[2]

    def _extend(self, buffer: Tensor, new: Tensor, columns: int) -> None:
        """Aligned keys of new tokens behind those kept: in place while there is room."""
        if self._end + new.shape[2] > buffer.shape[2]:
            kept = buffer[:, :, self._first : self._end]
            if columns < self.history.length:  # of a sliding window only the last ones are needed again
                kept = kept[:, :, max(kept.shape[2] - columns, 0) :]
            total = kept.shape[2] + new.shape[2]
            buffer = kept.new_zeros(*kept.shape[:2], max(columns, total + total // GROWTH), kept.shape[3])
            buffer[:, :, : kept.shape[2]] = kept
            self._buffer, self._first, self._end = buffer, 0, kept.shape[2]
        buffer[:, :, self._end : self._end + new.shape[2]] = new
        self._end += new.shape[2]

    # Called by the state.

    def reorder(self, moved: Moved) -> None:
        sequences, rows, before = moved
        if self.history.packed:
            if self._summed != before:  # between `append` and the aligner: not worth keeping
                return self._forget()
            self._summed = self.history.length
            self._aligned = self._aligned and self.history.length
        if self.gram is not None:
            self.gram = self.gram.index_select(0, sequences)
        self._before = deque(
            ((end, None if gram is None else gram.index_select(0, sequences)) for end, gram in self._before),
            maxlen=self._before.maxlen,
        )
        if self._buffer is not None:
            self._buffer = self._buffer.index_select(0, rows)

    def crop(self) -> None:
        """To the tokens that there still are."""
        if self.history.packed:
            return self._forget()
        length = self.history.length
        if self._aligned > length:
            self._end = max(self._end - (self._aligned - length), self._first)
            self._aligned = length
            if self._end == self._first:
                self._buffer, self._aligned = None, 0
        while self._summed > length:
            self._summed, self.gram = self._before.pop() if self._before else (0, None)

    def _forget(self) -> None:
        self.gram, self._summed, self._buffer, self._aligned = None, 0, None, 0
        self._before.clear()


def _plus_outer(gram: Tensor, x: Tensor, y: Tensor, group: Tensor) -> Tensor:
    """gram + xᵀy where each sequence has one new token: `segment_gram` in few small operations, because they are done
    for every token and layer."""
    real = (group >= 0)[:, None, None]  # padding may hold anything
    x, y = (torch.where(real, t, 0).to(gram.dtype) for t in (x, y))
    own: Tensor = torch.nn.functional.one_hot(group.clamp(min=0) % gram.shape[1], gram.shape[1]).to(gram.dtype)
    return gram + own[..., None, None, None] * (x[..., :, None] * y[..., None, :])[:, None]
