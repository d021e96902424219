"""`History`: which tokens a cache holds, and what they are; all layers share one, `state.py` is its public face.

What was told of the tokens, modality ids first, stands in one tensor, so that a step costs one concatenation.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from moda_kernels.alignment.memory.documents import bounds_of, merged, scattered
from moda_kernels.alignment.pieces import counting
from moda_kernels.runtime import checks
from moda_kernels.tokens.layout import ModalityLayout
from moda_kernels.tokens.mask import ModularMask, Visibility
from moda_kernels.tokens.segments import segment_modalities

#: Rows of `History.told`.
IDS, ITEMS, ROLES, STEPS, CHUNKS = range(5)
#: What they are of padding.
UNTOLD = (-1, 0, 0, 0, -1)


class Place(NamedTuple):
    """Where an attention call's keys and queries stand: arguments of `moda_attention`."""

    layout: ModalityLayout
    query_start: int | None
    cu_seqlens_q: Tensor | None


class Moved(NamedTuple):
    """What a reordering did: which sequence (or document) each new one was, which row of the cache (a sequence; packed:
    a token) each new one was, and how many tokens there were before."""

    sequences: Tensor
    rows: Tensor
    before: int


class Sums(NamedTuple):
    """Where new tokens go: group int64 ``[tokens]``, sequence · 2 M + modality (+ M in the chunk in progress), -1: into
    no sum; and bool ``[N]``, whether the chunk in progress before them still is."""

    group: Tensor
    stays: Tensor


#: What an append changes, by name: torch 2.11 can't trace `vars`.
_CHANGES = (
    "told", "bounds", "own_roles", "own_steps", "own_chunks", "_room", "new_bounds", "newest", "_layouts", "_roomy",
    "_parts",
)  # fmt: skip


class History:
    """Tokens so far; see :class:`DecodeState`, whose arguments and errors these are.

    Attributes:
        told: int64 ``[5, B, L]``, packed ``[5, T]``: ids, items, roles, steps, chunks; None before the first append.
        own_roles, own_steps, own_chunks: whether these were ever told.
        bounds, new_bounds: packed: cu_seqlens of all tokens and of the last append's.
        newest: tokens of the last append.
    """

    def __init__(self, num_modalities: int, num_roles: int, undo: int) -> None:
        self.num_modalities, self.num_roles, self.undo = num_modalities, num_roles, undo
        self.own_roles = self.own_steps = self.own_chunks = False
        self.told: Tensor | None = None
        self.bounds: Tensor | None = None
        self.new_bounds: Tensor | None = None
        self.newest = 0
        self._room = 0  # an upper bound of the segments of each sequence, so that nothing waits for a CUDA device
        # (In lists, since a number that is a key is a graph of its own to a compiler.)
        self._layouts: list[tuple[int, ModalityLayout]] = []
        self._roomy: list[tuple[int, ModalityLayout]] = []
        self._parts: list[tuple[tuple[int, int], ModalityLayout]] = []

    @property
    def length(self) -> int:
        return 0 if self.told is None else self.told.shape[-1]

    @property
    def packed(self) -> bool:
        return self.bounds is not None

    # What `DecodeState` does

    def append(self, modality_ids: Tensor, cu_seqlens: Tensor | None, **given: Tensor | None) -> ModalityLayout:
        """`given`: item_ids, roles, steps and chunks."""
        shape = checks.integer_tensor("modality_ids", modality_ids).shape
        own = {name: given[name] is not None for name in ("roles", "steps", "chunks")}
        # Checks everything that is new.
        new = segment_modalities(
            modality_ids, num_modalities=self.num_modalities, cu_seqlens=cu_seqlens, **given,
            num_roles=self.num_roles if own["roles"] else None,
            max_segments=None if modality_ids.device.type == "cpu" else modality_ids.numel(),
        )  # fmt: skip
        zeros, none = torch.zeros_like(modality_ids), torch.full_like(modality_ids, -1)
        defaults = {"item_ids": zeros, "roles": modality_ids, "steps": zeros, "chunks": none}
        facts = [given[name] for name in defaults]
        rest = [d if fact is None else fact for fact, d in zip(facts, defaults.values(), strict=True)]
        told = torch.stack([fact.long() for fact in (modality_ids, *rest)])
        bounds = new.cu_seqlens if new.packed else None
        if self.told is not None:
            checks.same_device("modality_ids", told, self.told.device, "what was appended before")
            if new.packed != self.packed:
                kind = "packed documents" if self.packed else "a batch"
                raise checks.wrong_value("modality_ids", f"{kind}, as appended before", modality_ids)
            if not new.packed and shape[0] != self.told.shape[1]:
                expected = f"[B, n] with B = {self.told.shape[1]}, as before"
                raise checks.wrong_value("modality_ids", expected, modality_ids)
            if self.bounds is not None:
                if new.cu_seqlens.shape != self.bounds.shape:
                    documents = self.bounds.numel() - 1
                    raise checks.wrong_value("cu_seqlens", f"[N + 1] with N = {documents}, as before", new.cu_seqlens)
                bounds = self.bounds + new.cu_seqlens
                rows = merged(self.bounds, self.length, bounds, 0), merged(new.cu_seqlens, shape[0], bounds, 1)
                told = scattered(self.told.T, told.T, *rows).T
            else:
                told = torch.cat((self.told, told), 2)
        before = [getattr(self, name) for name in _CHANGES]
        self.told, self.bounds = told, bounds
        self.own_roles, self.own_steps = self.own_roles or own["roles"], self.own_steps or own["steps"]
        self.own_chunks = self.own_chunks or own["chunks"]
        self._room += modality_ids.numel() if new.packed else shape[1]
        self.new_bounds, self.newest = new.cu_seqlens, shape[-1]
        self._layouts, self._roomy, self._parts = [], [], []
        try:
            return self.layout()  # where steps may turn out to fall
        except ValueError:
            for name, value in zip(_CHANGES, before, strict=True):
                setattr(self, name, value)
            raise

    def layout(self, columns: int | None = None) -> ModalityLayout:
        told = self._told()
        # To a compiler a cache that is full is like one that isn't yet: all steps of a generation are one graph.
        roomy = columns is not None and torch.compiler.is_compiling() and columns >= self.length and not self.packed
        columns = self.length if columns is None else checks.integer("columns", columns, 0)
        layouts = self._roomy if roomy else self._layouts
        for known, layout in layouts:
            if known == columns:
                return layout
        if self.packed and columns != self.length:
            raise checks.wrong_value("key", f"the {self.length} tokens of the packed documents", f"{columns}")
        spare = columns - self.length
        if roomy or spare > 0:
            # (Looked up, since to a compiler a tensor of one column is another graph than one of two.)
            column = torch.arange(columns, device=told.device)
            untold = torch.stack([told.new_full((1, 1), value) for value in UNTOLD])
            longer = torch.nn.functional.pad(told, (0, 1))
            told = torch.where(column < self.length, longer[..., column.clamp(max=self.length)], untold)
        made = self._segmented(told if roomy else told[..., max(-spare, 0) :], self.bounds)
        if not roomy and spare < 0:
            made = dataclasses.replace(made, counts=self.layout().counts)
        layouts.append((columns, made))
        return made

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
            layout: that which the caller named; has to be this history's.

        Raises:
            ValueError: more queries than new tokens; keys that the mask shows are gone.
        """
        own = self.layout_for(key, layout)
        if checks.float_tensor("query", query).dim() != key.dim():
            raise checks.wrong_value("query", f"{key.dim()} axes, as key", query)
        rows = query.shape[0 if self.packed else 2]
        if rows > self.newest or (self.packed and rows != self.newest):
            raise checks.wrong_value("query", f"the {self.newest} tokens appended last", f"{rows} queries")
        if self.packed:
            return Place(own, None, self.new_bounds)
        columns = own.modality.shape[1]
        missing = self.length - columns
        if missing > 0 and rows > 0:
            known = (ModularMask.causal if is_causal else ModularMask.full)(self.num_roles)
            self._check_missing(known if mask is None else mask, columns, rows)
        return Place(own, min(self.length, columns) - rows, None)

    def reorder(self, beam_idx: Tensor) -> Moved | None:
        """None: there are no tokens yet."""
        checks.integer_tensor("beam_idx", beam_idx)
        if beam_idx.dim() != 1:
            raise checks.wrong_value("beam_idx", "[N]", beam_idx)
        if self.told is None:
            return None
        sequences = beam_idx.to(self.told.device, torch.int64)
        rows, before = sequences, self.length
        if self.bounds is not None and self.new_bounds is not None:
            lengths, newest = self.bounds.diff()[sequences], self.new_bounds.diff()[sequences]
            starts = self.bounds[:-1][sequences]
            rows = torch.cat([torch.arange(a, a + n) for a, n in zip(starts.tolist(), lengths.tolist(), strict=True)])
            rows = rows.to(sequences.device)
            self.bounds, self.new_bounds = (bounds_of(n) for n in (lengths, newest))
            self.newest = int(newest.sum())
        self.told = self.told.index_select(1, rows)
        self._layouts, self._roomy, self._parts = [], [], []
        return Moved(sequences, rows, before)

    def crop(self, length: int | Tensor) -> bool:
        """Whether anything happened."""
        if isinstance(length, Tensor):
            checks.integer_tensor("length", length)
        else:
            checks.integer("length", length, 0)
        if self.told is None:
            return False
        if self.bounds is not None:
            old = self.bounds
            wanted = torch.as_tensor(length, dtype=torch.int32, device=old.device).clamp(min=0)
            lengths = torch.minimum(old.diff(), wanted)
            if torch.equal(lengths, old.diff()):
                return False
            self.bounds = bounds_of(lengths)
            self.told = self.told[:, merged(self.bounds, int(self.bounds[-1]), old, 0)]
            self.new_bounds, self.newest = torch.zeros_like(old), 0
        elif isinstance(length, Tensor):
            raise checks.wrong_type("length", "an int for a batch", length)
        elif length >= self.length:
            return False
        else:
            self.newest = max(self.newest - (self.length - length), 0)
            self.told = self.told[:, :, :length]
        self._layouts, self._roomy, self._parts = [], [], []
        return True

    # What layers ask

    def layout_for(self, key: Tensor, layout: ModalityLayout | Tensor | None) -> ModalityLayout:
        """The layout of these keys of the cache; a layout that the caller named has to be the same."""
        axes = "[T, Hkv, D]" if self.packed else "[B, Hkv, columns, D]"
        if checks.float_tensor("key", key).dim() != (3 if self.packed else 4):
            raise checks.wrong_value("key", f"{axes}, the cache's", key)
        own = self.layout(key.shape[0 if self.packed else 2])
        if layout is not None and layout is not own:
            raise checks.wrong_value("layout", "None together with state, or state.layout(keys of the cache)", layout)
        return own

    def part(self, begin: int, end: int) -> ModalityLayout:
        """The layout of tokens begin…end-1 alone (packed: of all, or of those of the last append). Segments cut at
        its edges do no harm: sums per modality don't know of segments."""
        if (begin, end) == (0, self.length):
            return self.layout()
        for known, layout in self._parts:
            if known == (begin, end):
                return layout
        told = self._told()
        if self.bounds is not None:
            assert self.new_bounds is not None
            made = self._segmented(told[:, merged(self.new_bounds, self.newest, self.bounds, 1)], self.new_bounds)
        else:
            made = self._segmented(told[:, :, begin:end], None)
        self._parts.append(((begin, end), made))
        return made

    def of_part(self, x: Tensor, begin: int, end: int) -> Tensor:
        """What stands for each token, ``[tokens]``, of the tokens of a part."""
        return x if (begin, end) == (0, self.length) else x[self.rows_of(begin, end)]

    def rows_of(self, begin: int, end: int) -> Tensor:
        """Where the tokens of a part stand among all, int64."""
        if self.bounds is not None and self.new_bounds is not None and (begin, end) != (0, self.length):
            return merged(self.new_bounds, self.newest, self.bounds, 1)
        rows = torch.arange(self._told()[IDS].numel(), device=self._told().device)
        return rows if self.packed else rows.view(-1, self.length)[:, begin:end].flatten()

    def sums(self, begin: int, end: int, first: int, last: int, sources: tuple[int, ...] | None) -> "Sums":
        """Which sums the tokens first…last-1 of a part begin…end-1 belong to, for the causal scope between chunks
        (packed: those of the last append, or all)."""
        whole = self.layout()
        sequence, chunk = whole.sequence.flatten().long(), whole.chunk.flatten().long()
        start = whole.cu_seqlens[:-1].long()
        column = torch.arange(whole.num_tokens, device=whole.device) - start[sequence]
        here = (column >= first) & (column < last)
        # Where each sequence has the first of these tokens, and its chunk at the last of them.
        at = torch.full_like(start, first)
        if self.bounds is not None:
            assert self.new_bounds is not None
            at = (self.bounds.diff() - self.new_bounds.diff()).long() * (begin > 0)
            here = column >= at[sequence]
        real = (whole.modality.flatten() >= 0) & (here | (column < at[sequence]))
        place = torch.where(real, torch.arange(whole.num_tokens, device=whole.device), -1)
        latest = torch.full_like(start, -1).scatter_reduce(0, sequence, place, "amax")
        in_progress = torch.where(latest >= 0, chunk[latest.clamp(min=0)], -1)
        in_progress = torch.where(in_progress >= 0, in_progress, -2)  # equal to no chunk

        m = self.num_modalities
        group = sequence * 2 * m + whole.modality.flatten().clamp(min=0)
        belongs = here & counting(whole, sources)
        free, own = belongs & (chunk < 0), belongs & (chunk == in_progress[sequence])
        group = torch.where(free, group, torch.where(own, group + m, -1))
        stays = (in_progress >= 0) & (in_progress - start < at)
        return Sums(self.of_part(group, begin, end), stays)

    def continues(self, begin: int, end: int) -> Tensor | None:
        """bool ``[tokens]`` of a part: whether a token's chunk began before it; None: there are no chunks."""
        if not self.own_chunks:
            return None
        whole = self.layout()
        sequence, chunk = whole.sequence.flatten().long(), whole.chunk.flatten().long()
        at: int | Tensor = begin
        if self.bounds is not None:
            assert self.new_bounds is not None
            at = ((self.bounds.diff() - self.new_bounds.diff()).long() * (begin > 0))[sequence]
        continues = (chunk >= 0) & (chunk - whole.cu_seqlens[:-1].long()[sequence] < at)
        return self.of_part(continues, begin, end)

    def _told(self) -> Tensor:
        if self.told is None:
            raise checks.wrong_value("state", "tokens (call state.append(modality_ids) first)", "an empty DecodeState")
        return self.told

    def _segmented(self, told: Tensor, bounds: Tensor | None) -> ModalityLayout:
        room, ids = None, told[IDS]
        if ids.device.type != "cpu":
            sequences = ids.shape[0] if bounds is None else bounds.numel() - 1
            room = min(self._room * sequences, ids.numel())
        return segment_modalities(
            ids, num_modalities=self.num_modalities, item_ids=told[ITEMS], cu_seqlens=bounds, max_segments=room,
            num_roles=self.num_roles if self.own_roles else None,
            roles=told[ROLES] if self.own_roles else None,
            steps=told[STEPS] if self.own_steps else None,
            chunks=told[CHUNKS] if self.own_chunks else None,
        )  # fmt: skip

    def _check_missing(self, mask: ModularMask, columns: int, rows: int) -> None:
        """Raise where a query of the last `rows` sees keys before the cache's `columns` last ones. On CUDA, where
        values are not looked at, only where no rule could hide them."""
        full, missing = self.layout(), self.length - columns
        mask.check_layout(full)

        def seen() -> bool:
            if full.device.type != "cpu":
                everything = any(rule & Visibility.ALL for row in mask.rules for rule in row)
                return mask.window is None or (everything and mask.window_on == "past")
            queries = full.queries(rows, self.length - rows)
            return bool(mask.visible_to(full, queries)[..., :missing].any())

        if full.remember(("missing keys are seen", mask, columns, rows), seen):
            raise checks.wrong_value(
                "key",
                f"all {self.length} tokens' keys (the mask shows the newest queries keys older than the cache's; give "
                "it the cache's window, or let the cache keep all)",
                f"the last {columns}",
            )
