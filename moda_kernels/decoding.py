"""`DecodeState`: what MODA remembers beside a KV cache, so that a new token costs one token's work (spec: "Decoding").

The cache holds raw keys. Beside it, for each layer, stand running Gram sums per modality and, with the causal scope,
the aligned keys: those never change once made. Aligned keys are not put into the cache in place of raw ones, because
after a crop sums are made again from raw keys (never subtracted), and because one rule for all scopes is easier to live
with; the price is half a cache more for each causal layer. Layouts are segmented anew for each append: linear integer
work once for all layers, which is little beside one layer's attention over the same tokens.
"""

import dataclasses
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moda_kernels import checks, ops
from moda_kernels.keymap import KeyMap
from moda_kernels.layout import ModalityLayout, segment_modalities
from moda_kernels.mask import ModularMask

#: Room for new aligned keys, in parts of those there are: copying all of them costs O(1) per token so.
GROWTH = 4


@dataclass(frozen=True, eq=False)
class KeptKeys(KeyMap):
    """The map of a causal layer while decoding: aligned keys that were made before.

    Attributes:
        keys: aligned, in the shape of the cache's raw keys.
        layout: of these keys.
    """

    keys: Tensor
    layout: ModalityLayout

    @property
    def num_heads(self) -> int:  # type: ignore[override]
        return self.keys.shape[1]

    @property
    def head_dim(self) -> int:  # type: ignore[override]
        return self.keys.shape[-1]

    def align(self, key: Tensor, layout: ModalityLayout) -> Tensor:
        tokens = self.keys if layout.packed else self.keys.transpose(1, 2).flatten(0, 1)
        return tokens.to(key.dtype)


class Place(NamedTuple):
    """Where an attention call's keys and queries stand: arguments of `moda_attention`."""

    layout: ModalityLayout
    query_start: int | None
    cu_seqlens_q: Tensor | None


class DecodeState:
    """Lives beside the KV cache of a model while it generates; with it each new token costs one token's alignment.

    One state serves all layers: the tokens are said once per step (:meth:`append`), and ``state[i]`` is what layer i
    remembers. The cache holds raw keys (after the rotary embedding). Each attention call gives what one full pass over
    the raw keys so far gives for the newest tokens, whatever the options. ::

        state = mk.DecodeState(num_modalities=2)
        for ids in (prompt_ids, next_ids, next_ids):  # integer [B, n]: modalities of the new tokens, -1 = padding
            state.append(ids)
            for i, layer in enumerate(layers):
                q, k, v = layer.project(x)  # of the new tokens
                keys, values = cache.update(k, v, i)  # raw
                key_map = layer.aligner(keys, state=state[i])  # reads the new keys only
                x = x + mk.moda_attention(q, keys, values, state=state, key_map=key_map, is_causal=True)

    How many keys the cache gives decides how they are read, call by call:

    - as many as tokens so far: a cache that grows;
    - more: a static cache, filled from the left (what lies behind the newest token is not looked at);
    - fewer: a sliding-window cache, which holds the last ones. A mask that shows a query keys that are gone raises.

    Packed layouts (``cu_seqlens``) have the new tokens at the end of each document, so keys and values are to be put
    there, too.

    Args:
        num_modalities: M.
        undo: so many of the last tokens :meth:`crop` takes back without reading all keys again, by up to two older
            copies of the Gram sums (M·Hkv·D² numbers each, per sequence and layer). Has to be less than the window of a
            sliding cache. Not for packed documents.

    Attributes:
        length: tokens so far, padding included: columns of the batch, or all tokens of packed documents.

    A state belongs to one set of weights: make a new one for each prompt, and after each optimiser step.
    """

    def __init__(self, num_modalities: int, *, undo: int = 32) -> None:
        self.num_modalities = checks.integer("num_modalities", num_modalities, 1)
        self.undo = checks.integer("undo", undo, 0)
        self._ids: Tensor | None = None
        self._items: Tensor | None = None
        self._bounds: Tensor | None = None  # packed: cu_seqlens of all tokens, …
        self._new_bounds: Tensor | None = None  # … and of the last append
        self._newest = 0  # tokens of the last append
        self._room = 0  # an upper bound of the segments of each sequence, so that nothing waits for a CUDA device
        self._layers: dict[int, LayerState] = {}
        self._layouts: dict[object, ModalityLayout] = {}

    @property
    def length(self) -> int:
        return 0 if self._ids is None else self._ids.shape[-1]

    @property
    def packed(self) -> bool:
        return self._bounds is not None

    def __getitem__(self, layer: int) -> "LayerState":
        """What layer `layer` remembers; made at the first call."""
        checks.integer("layer", layer, 0)
        return self._layers.setdefault(layer, LayerState(self))

    def append(
        self, modality_ids: Tensor, *, item_ids: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> ModalityLayout:
        """Say what the new tokens are: once per step, before the layers run.

        Args:
            modality_ids: integer ``[B, n]``, or ``[n]`` with ``cu_seqlens``: 0…M-1, or -1 for padding, which is also
                what a sequence without a new token gets.
            item_ids: as in :func:`segment_modalities`; where they are left out, they are 0.
            cu_seqlens: packed documents: integer ``[N + 1]``, which new tokens are of which document.

        Returns:
            The layout of all tokens so far.

        Raises:
            ValueError, TypeError: as :func:`segment_modalities`; another batch size, number of documents or device than
                before. The state is then as it was.
        """
        shape = checks.integer_tensor("modality_ids", modality_ids).shape
        items = torch.zeros_like(modality_ids) if item_ids is None else item_ids
        # Checks everything that is new.
        chunk = segment_modalities(
            modality_ids, num_modalities=self.num_modalities, item_ids=items, cu_seqlens=cu_seqlens,
            max_segments=None if self._ids is None or modality_ids.device.type == "cpu" else modality_ids.numel(),
        )  # fmt: skip
        bounds = None
        ids, items = modality_ids.long(), items.long()
        if self._ids is None or self._items is None:
            bounds = chunk.cu_seqlens if chunk.packed else None
            self._room = chunk.max_segments
        else:
            checks.same_device("modality_ids", ids, self._ids.device, "what was appended before")
            if chunk.packed != self.packed:
                kind = "packed documents" if self.packed else "a batch"
                raise checks.wrong_value("modality_ids", f"{kind}, as appended before", modality_ids)
            if not chunk.packed and shape[0] != self._ids.shape[0]:
                raise checks.wrong_value("modality_ids", f"[B, n] with B = {self._ids.shape[0]}, as before", ids)
            if self._bounds is not None:
                if chunk.cu_seqlens.shape != self._bounds.shape:
                    documents = self._bounds.numel() - 1
                    raise checks.wrong_value("cu_seqlens", f"[N + 1] with N = {documents}, as before", chunk.cu_seqlens)
                bounds = self._bounds + chunk.cu_seqlens
                old, new = _merged(self._bounds, bounds, 0), _merged(chunk.cu_seqlens, bounds, 1)
                ids, items = _scattered(self._ids, ids, old, new), _scattered(self._items, items, old, new)
            else:
                ids, items = torch.cat((self._ids, ids), 1), torch.cat((self._items, items), 1)
            self._room += modality_ids.numel() if chunk.packed else shape[1]
        self._ids, self._items, self._bounds = ids, items, bounds
        self._new_bounds, self._newest = chunk.cu_seqlens, shape[-1]
        self._layouts.clear()
        return self.layout()

    def layout(self, columns: int | None = None) -> ModalityLayout:
        """The layout of the keys that a cache of so many columns holds.

        Args:
            columns: default: as many as tokens. More: padding behind them; fewer: the last ones (counts are those of
                all tokens, so that pseudo-attention knows the sequence's length). Packed: only the default.

        Raises:
            ValueError: nothing appended yet; another number of columns with packed documents.
        """
        if self._ids is None or self._items is None:
            raise checks.wrong_value("state", "tokens (call state.append(modality_ids) first)", "an empty DecodeState")
        columns = self.length if columns is None else checks.integer("columns", columns, 0)
        if columns not in self._layouts:
            if self.packed and columns != self.length:
                raise checks.wrong_value("key", f"the {self.length} tokens of the packed documents", f"{columns}")
            ids, items = self._ids, self._items
            spare = columns - self.length
            if spare > 0:
                ids = torch.nn.functional.pad(ids, (0, spare), value=-1)
                items = torch.nn.functional.pad(items, (0, spare))
            made = self._segmented(ids[..., -columns:] if spare < 0 else ids, items[..., -columns:], self._bounds)
            if spare < 0:
                made = dataclasses.replace(made, counts=self.layout().counts)
            self._layouts[columns] = made
        return self._layouts[columns]

    def place(
        self,
        query: Tensor,
        key: Tensor,
        mask: ModularMask | None = None,
        is_causal: bool = False,
        layout: ModalityLayout | Tensor | None = None,
    ) -> Place:
        """Where the newest queries and a cache's keys stand; `moda_attention` asks.

        Args:
            query: of the newest tokens: ``[B, Hq, n, D]``, or the last of these; packed: all of them.
            key: the cache's. mask, is_causal: as there.
            layout: that which the caller named; has to be this state's.

        Raises:
            ValueError: more queries than new tokens; keys that the mask shows are gone.
        """
        own = self._layout_for(key, layout)
        rows = checks.float_tensor("query", query).shape[0 if self.packed else -2]
        if rows > self._newest or (self.packed and rows != self._newest):
            raise checks.wrong_value("query", f"the {self._newest} tokens appended last", f"{rows} queries")
        if self.packed:
            return Place(own, None, self._new_bounds)
        columns = own.modality.shape[1]
        missing = self.length - columns
        if missing > 0 and rows > 0:
            known = (ModularMask.causal if is_causal else ModularMask.full)(self.num_modalities)
            self._check_missing(known if mask is None else mask, columns, rows)
        return Place(own, min(self.length, columns) - rows, None)

    def reorder(self, beam_idx: Tensor) -> None:
        """Sequences (or documents) in another order, some of them several times or not at all, as a cache does for
        beams.

        Args:
            beam_idx: integer ``[new N]``, which sequence each new one continues.
        """
        checks.integer_tensor("beam_idx", beam_idx)
        if beam_idx.dim() != 1:
            raise checks.wrong_value("beam_idx", "[N]", beam_idx)
        if self._ids is None or self._items is None:
            return
        sequences = beam_idx.to(self._ids.device, torch.int64)
        rows = sequences
        if self._bounds is not None and self._new_bounds is not None:
            lengths, newest = self._bounds.diff()[sequences], self._new_bounds.diff()[sequences]
            starts = self._bounds[:-1][sequences]
            rows = torch.cat([torch.arange(a, a + n) for a, n in zip(starts.tolist(), lengths.tolist(), strict=True)])
            rows = rows.to(sequences.device)
            self._bounds, self._new_bounds = (_bounds_of(n) for n in (lengths, newest))
            self._newest = int(newest.sum())
        before = self.length
        self._ids, self._items = self._ids.index_select(0, rows), self._items.index_select(0, rows)
        self._layouts.clear()
        for layer in self._layers.values():
            layer._reorder(sequences, rows, before)

    def crop(self, length: int | Tensor) -> None:
        """Forget all tokens but the first ``length``, as a cache does for rejected ones.

        Aligned keys of the others stay; Gram sums go back to an older copy (see ``undo``) or to nothing, and are made
        again from there with the cache's keys at the next call, which raises if the cache no longer has them. Nothing
        is subtracted.

        Args:
            length: columns that stay; packed: tokens of each document, also an integer tensor ``[N]``. More than there
                are: nothing happens.
        """
        if isinstance(length, Tensor):
            checks.integer_tensor("length", length)
        else:
            checks.integer("length", length, 0)
        if self._ids is None or self._items is None:
            return
        if self._bounds is not None:
            old = self._bounds
            lengths = torch.minimum(old.diff(), torch.as_tensor(length, dtype=torch.int32, device=old.device))
            if torch.equal(lengths, old.diff()):
                return
            self._bounds = _bounds_of(lengths)
            kept = _merged(self._bounds, old, 0)
            self._ids, self._items = self._ids[kept], self._items[kept]
            self._new_bounds, self._newest = torch.zeros_like(old), 0
            for layer in self._layers.values():
                layer._forget()
        elif isinstance(length, Tensor):
            raise checks.wrong_type("length", "an int for a batch", length)
        elif length < self.length:
            self._newest = max(self._newest - (self.length - length), 0)
            self._ids, self._items = self._ids[:, :length], self._items[:, :length]
            for layer in self._layers.values():
                layer._crop(length)
        self._layouts.clear()

    def _segmented(self, ids: Tensor, items: Tensor, bounds: Tensor | None) -> ModalityLayout:
        room = None
        if ids.device.type != "cpu":
            sequences = ids.shape[0] if bounds is None else bounds.numel() - 1
            room = min(self._room * sequences, ids.numel())
        return segment_modalities(
            ids, num_modalities=self.num_modalities, item_ids=items, cu_seqlens=bounds, max_segments=room
        )

    def _layout_for(self, key: Tensor, layout: ModalityLayout | Tensor | None) -> ModalityLayout:
        columns = checks.float_tensor("key", key).shape[0 if self.packed else -2] if key.dim() > 1 else 0
        own = self.layout(columns)
        if layout is not None and layout is not own:
            raise checks.wrong_value("layout", "None together with state, or state.layout(keys of the cache)", layout)
        return own

    def _part(self, begin: int, end: int) -> ModalityLayout:
        """The layout of tokens begin…end-1 alone (packed: of all, or of those of the last append). Segments cut at
        its edges do no harm: sums per modality don't know of segments."""
        assert self._ids is not None and self._items is not None
        if (begin, end) == (0, self.length):
            return self.layout()
        key = (begin, end)
        if key not in self._layouts:
            if self._bounds is not None:
                assert self._new_bounds is not None
                rows = _merged(self._new_bounds, self._bounds, 1)
                made = self._segmented(self._ids[rows], self._items[rows], self._new_bounds)
            else:
                made = self._segmented(self._ids[:, begin:end], self._items[:, begin:end], None)
            self._layouts[key] = made
        return self._layouts[key]

    def _check_missing(self, mask: ModularMask, columns: int, rows: int) -> None:
        """Raise where a query of the last `rows` sees keys before the cache's `columns` last ones. On CUDA, where
        values are not looked at, only where no rule could hide them."""
        full, missing = self.layout(), self.length - columns
        mask.check_layout(full)

        def seen() -> bool:
            if full.device.type != "cpu":
                return mask.window is None
            queries = full.queries(rows, self.length - rows)
            return bool(mask.visible_to(full, queries)[..., :missing].any())

        if full.remember(("missing keys are seen", mask, columns, rows), seen):
            raise checks.wrong_value(
                "key",
                f"all {self.length} tokens' keys (the mask shows the newest queries keys older than the cache's; give "
                "it the cache's window, or let the cache keep all)",
                f"the last {columns}",
            )


class LayerState:
    """What one attention layer remembers: ``state[i]`` of a :class:`DecodeState`.

    Attributes:
        gram: running Gram sums per modality, float32 (float64), ``[N, M, Hkv, D, D]`` (for `gram_affinity`, too); of
            the released variant ``[N, 1, Hkv, D, D]``. None before the first call.
    """

    def __init__(self, state: DecodeState) -> None:
        self.state = state
        self.gram: Tensor | None = None
        self._summed = 0  # tokens in `gram`
        self._before: deque[tuple[int, Tensor | None]] = deque(maxlen=2 if state.undo else 0)  # older (_summed, gram)
        # Aligned keys of the last tokens before `_aligned`: columns first…end-1 of a buffer that may have room behind.
        self._buffer: Tensor | None = None
        self._first = self._end = 0
        self._aligned = 0

    # Called by the aligners.

    def layout_for(self, key: Tensor, layout: ModalityLayout | Tensor | None) -> ModalityLayout:
        """The layout of these keys of the cache; a layout that the caller named has to be the same."""
        return self.state._layout_for(key, layout)

    def begin(self, causal: bool) -> tuple[int, int]:
        """(first, last + 1) of the tokens that a call has to look at: those not yet summed and, for the causal scope,
        aligned.

        Raises:
            ValueError: nothing is new.
        """
        state = self.state
        state.layout()
        if state.packed and self._summed not in (0, state.length - state._newest):
            self._forget()
        if self._summed == state.length and state.length:
            raise checks.wrong_value(
                "state", "new tokens (state.append once per step, and state[i] of its own for each layer)", "none"
            )
        return self._summed, self._aligned if causal and self._aligned > self._summed else state.length

    def new_tokens(self, name: str, cached: Tensor, begin: int, end: int) -> tuple[Tensor, ModalityLayout]:
        """Keys (or values) of tokens begin…end-1 from a cache ``[B, H, columns, D]``, packed ``[T, H, D]``, as
        ``[tokens, H, D]``, and their layout.

        Raises:
            ValueError: the cache no longer has them.
        """
        state = self.state
        part = state._part(begin, end)
        if state.packed:
            if begin > 0:
                assert state._new_bounds is not None and state._bounds is not None
                cached = cached[_merged(state._new_bounds, state._bounds, 1)]
            return cached, part
        gone = max(state.length - cached.shape[2], 0)
        if begin < gone:
            raise checks.wrong_value(
                name,
                f"those of tokens {begin} to {end - 1} (not summed yet, or to be summed again after a crop; `undo` of "
                "DecodeState says how far crop goes back without them)",
                f"a cache that holds only tokens from {gone} on",
            )
        return cached[:, :, begin - gone : end - gone].transpose(1, 2).flatten(0, 1), part

    def add(self, x: Tensor, y: Tensor, group: Tensor, groups: int, end: int) -> Tensor:
        """Σ x_tᵀ y_t ``[N, G, H, D, E]`` so far, with new tokens ``[tokens, H, D]``; group int64 ``[tokens]``:
        sequence · G + which, -1: none."""
        n, begin, undo = self.state.layout().num_sequences, self._summed, self.state.undo

        def plus(before: Tensor | None, group: Tensor) -> Tensor:
            new = ops.segment_gram(x, y, group, n * groups).unflatten(0, (n, groups))
            return new if before is None else before + new

        if self.state.packed:
            self.gram = plus(self.gram, group)
        elif self.gram is not None and end - begin == 1:
            if not self._before or begin - self._before[-1][0] >= undo:
                self._before.append((begin, self.gram))
            self.gram = _plus_outer(self.gram, x, y, group)
        else:
            # A copy of the sums at most `undo` tokens back.
            cut = max(begin, end - undo)
            if begin < cut < end:
                late = (torch.arange(begin, end, device=x.device) >= cut).repeat(n)
                self.gram, group = plus(self.gram, torch.where(late, -1, group)), torch.where(late, group, -1)
            self._before.append((cut, self.gram))
            self.gram = plus(self.gram, group)
        self._summed = end
        return self.gram

    def keep(self, fused: Tensor, begin: int, key: Tensor) -> Tensor:
        """Keep the aligned keys ``[tokens, H, D]`` of tokens begin… (the newest), and return those of all keys of the
        cache, in its shape."""
        state = self.state
        if state._bounds is not None:
            if self._buffer is not None and begin > 0:
                assert state._new_bounds is not None
                old = state._bounds - state._new_bounds
                rows = _merged(old, state._bounds, 0), _merged(state._new_bounds, state._bounds, 1)
                fused = _scattered(self._buffer, fused, *rows)
            self._buffer, self._aligned = fused, state.length
            return fused
        columns = key.shape[2]
        new = fused.unflatten(0, (key.shape[0], -1)).transpose(1, 2)
        have = 0 if begin == 0 else self._end - self._first
        if min(columns, state.length) > have + new.shape[2]:
            expected = f"a cache of at most the last {have + new.shape[2]} keys (older aligned keys are gone)"
            raise checks.wrong_value("key", expected, f"{columns} keys")
        if self._buffer is None or begin == 0:
            self._replace(new)
        elif torch.is_grad_enabled() and (new.requires_grad or self._buffer.requires_grad):
            self._replace(torch.cat((self._buffer[:, :, self._first : self._end], new), 2))
        else:
            self._extend(self._buffer, new, columns)
        self._aligned = state.length
        assert self._buffer is not None
        if columns <= state.length:
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
            if columns < self.state.length:  # of a sliding window only the last ones are needed again
                kept = kept[:, :, max(kept.shape[2] - columns, 0) :]
            total = kept.shape[2] + new.shape[2]
            buffer = kept.new_zeros(*kept.shape[:2], max(columns, total + total // GROWTH), kept.shape[3])
            buffer[:, :, : kept.shape[2]] = kept
            self._buffer, self._first, self._end = buffer, 0, kept.shape[2]
        buffer[:, :, self._end : self._end + new.shape[2]] = new
        self._end += new.shape[2]

    # Called by the state.

    def _reorder(self, sequences: Tensor, rows: Tensor, length: int) -> None:
        """`length`: tokens before the reordering."""
        if self.state.packed:
            if self._summed != length:  # between `append` and the aligner: not worth keeping
                return self._forget()
            self._summed = self.state.length
            self._aligned = self._aligned and self.state.length
        if self.gram is not None:
            self.gram = self.gram.index_select(0, sequences)
        self._before = deque(
            ((end, None if gram is None else gram.index_select(0, sequences)) for end, gram in self._before),
            maxlen=self._before.maxlen,
        )
        if self._buffer is not None:
            self._buffer = self._buffer.index_select(0, rows)

    def _crop(self, length: int) -> None:
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


def layer_of(state: DecodeState | LayerState) -> LayerState:
    """``state[i]`` as it is; of a whole state, that of its only layer, 0."""
    if isinstance(state, LayerState):
        return state
    if not isinstance(state, DecodeState):
        raise checks.wrong_type("state", "a DecodeState, or state[i] of one", state)
    return state[0]


def _plus_outer(gram: Tensor, x: Tensor, y: Tensor, group: Tensor) -> Tensor:
    """gram + xᵀy where each sequence has one new token: `segment_gram` in few small operations, because they are done
    for every token and layer."""
    real = (group >= 0)[:, None, None]  # padding may hold anything
    x, y = (torch.where(real, t, 0).to(gram.dtype) for t in (x, y))
    own = torch.nn.functional.one_hot(group.clamp(min=0) % gram.shape[1], gram.shape[1]).to(gram.dtype)
    return gram + own[..., None, None, None] * (x[..., :, None] * y[..., None, :])[:, None]


def _bounds_of(lengths: Tensor) -> Tensor:
    """``[N]`` → ``[N + 1]``, int32."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


def _merged(part: Tensor, whole: Tensor, end: int) -> Tensor:
    """Where a part's tokens stand in the whole, int64: at the begin (0) or the end (1) of each document; both given
    by their cu_seqlens. (Waits for a CUDA device.)"""
    rows = torch.arange(int(part[-1]), device=part.device)
    document = torch.searchsorted(part[1:], rows.int(), right=True)
    return whole[document + end].long() + rows - part[document + end]


def _scattered(old: Tensor, new: Tensor, old_rows: Tensor, new_rows: Tensor) -> Tensor:
    """Two parts put together along axis 0; each row comes from one of them."""
    source = torch.cat((old, new))
    order = torch.empty_like(torch.cat((old_rows, new_rows)))
    order[torch.cat((old_rows, new_rows))] = torch.arange(order.numel(), device=order.device)
    return source.index_select(0, order)
