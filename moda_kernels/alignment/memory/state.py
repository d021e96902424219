"""`DecodeState`, which tokens a cache holds and what they are, for all layers."""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from moda_kernels.alignment.memory.documents import bounds_of, merged, scattered
from moda_kernels.alignment.memory.layer import LayerState
from moda_kernels.runtime import checks
from moda_kernels.tokens.layout import ModalityLayout
from moda_kernels.tokens.mask import ModularMask
from moda_kernels.tokens.segments import segment_modalities


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

    def __getitem__(self, layer: int) -> LayerState:
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
                old, new = merged(self._bounds, bounds, 0), merged(chunk.cu_seqlens, bounds, 1)
                ids, items = scattered(self._ids, ids, old, new), scattered(self._items, items, old, new)
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
            first = max(-spare, 0)
            made = self._segmented(ids[..., first:], items[..., first:], self._bounds)
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
        if checks.float_tensor("query", query).dim() != key.dim():
            raise checks.wrong_value("query", f"{key.dim()} axes, as key", query)
        rows = query.shape[0 if self.packed else 2]
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
            self._bounds, self._new_bounds = (bounds_of(n) for n in (lengths, newest))
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
            wanted = torch.as_tensor(length, dtype=torch.int32, device=old.device).clamp(min=0)
            lengths = torch.minimum(old.diff(), wanted)
            if torch.equal(lengths, old.diff()):
                return
            self._bounds = bounds_of(lengths)
            kept = merged(self._bounds, old, 0)
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
        axes = "[T, Hkv, D]" if self.packed else "[B, Hkv, columns, D]"
        if checks.float_tensor("key", key).dim() != (3 if self.packed else 4):
            raise checks.wrong_value("key", f"{axes}, the cache's", key)
        own = self.layout(key.shape[0 if self.packed else 2])
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
                rows = merged(self._new_bounds, self._bounds, 1)
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


def layer_of(state: DecodeState | LayerState) -> LayerState:
    """``state[i]`` as it is; of a whole state, that of its only layer, 0."""
    if isinstance(state, LayerState):
        return state
    if not isinstance(state, DecodeState):
        raise checks.wrong_type("state", "a DecodeState, or state[i] of one", state)
    return state[0]
