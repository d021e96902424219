"""Tokens to segments: `segment_modalities` and the `ModalityLayout` that it makes.

A layout says of every token which sequence, modality, segment and position it has (spec: "Tokens"), and carries the
prefix counts from which everything later is derived: visible-key counts, tile lists, segment tables. It is made once
per batch and shared by all layers and heads. The arithmetic is in the native extension (`native.py`) with a plain
PyTorch twin here; both give identical results.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from moda_kernels import checks, native, ops
from moda_kernels.ops.library import operator

T = TypeVar("T")

#: Ids that reach this are more likely token ids than modalities.
MANY_MODALITIES = 256


def _remembered(derived: dict[Any, Any], key: Any, make: Callable[[], T]) -> T:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return make()  # tensors made inside a torch.func transform are of no use outside it
    if key not in derived:
        derived[key] = make()
    found: T = derived[key]
    return found


@dataclass(frozen=True, eq=False)
class ModalityLayout:
    """Who is who in a batch of multimodal sequences. Made by :func:`segment_modalities`.

    Shapes: ``[B, L]`` for a batch, ``[T]`` for packed documents; N sequences (B, or the documents), M modalities.

    Attributes:
        modality: int32, 0…M-1, or -1 for padding.
        segment: int32, runs over the whole batch in memory order; -1 for padding.
        position: int32, counts the non-padding tokens of the sequence from 0; -1 for padding.
        sequence: int32, the batch row or document that the token lies in.
        counts: int32 ``[N, M]``, tokens per sequence and modality.
        cu_seqlens: int32 ``[N + 1]``, first token of each sequence in the flattened batch.
        num_modalities: M.
        max_segments: an upper bound of the number of segments, known on the host.
        num_segments: int32 ``[1]`` on the layout's device, the number of segments.
        prefix: int32 ``[tokens + 1, M]``, how many tokens of each modality stand before a token in memory order.
        table: int32 ``[max_segments, 4]``: sequence, first token (in the flattened batch), length, modality; zero rows
            beyond ``num_segments``.
    """

    modality: Tensor
    segment: Tensor
    position: Tensor
    sequence: Tensor
    counts: Tensor
    cu_seqlens: Tensor
    num_modalities: int
    max_segments: int
    num_segments: Tensor
    prefix: Tensor
    table: Tensor
    #: What `check` needs on a device where values are not looked at: (bad ids, bad cu_seqlens), int32 [2].
    faults: Tensor | None = None
    _derived: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def remember(self, key: Any, make: Callable[[], T]) -> T:
        """What has been derived from this layout under `key`, made at the first call: all layers share a layout."""
        return _remembered(self._derived, key, make)

    @property
    def packed(self) -> bool:
        """True for packed documents ``[T]``, False for a batch ``[B, L]``."""
        return self.modality.dim() == 1

    @property
    def device(self) -> torch.device:
        return self.modality.device

    @property
    def num_sequences(self) -> int:
        return self.counts.shape[0]

    @property
    def num_tokens(self) -> int:
        """Tokens in memory, padding included: B·L, or T."""
        return self.modality.numel()

    @property
    def overflow(self) -> Tensor | None:
        """bool ``[1]``, on CUDA only: more segments than ``max_segments`` (outputs are then poisoned with NaN)."""
        return None if self.faults is None else self.num_segments > self.max_segments

    def segments(self) -> Tensor:
        """The segments as an int32 table ``[S, 4]`` on the host: sequence, start column (packed: index in T), length,
        modality. Waits for the device where the layout is not on the CPU."""
        table = self.table[: int(self.num_segments)].cpu()
        if not self.packed:
            start = table[:, 1] - table[:, 0] * self.modality.shape[1]
            table = torch.stack((table[:, 0], start, table[:, 2], table[:, 3]), dim=1)
        return table

    def groups(self, by: str) -> Tensor:
        """int64 ``[tokens]``: the group of each token, -1 for none. ``"modality"``: sequence·M + modality (N·M groups);
        ``"segment"``: the segment (``max_segments`` groups)."""
        modality = self.modality.flatten().long()
        if by == "modality":
            return torch.where(modality >= 0, self.sequence.flatten() * self.num_modalities + modality, -1)
        segment = self.segment.flatten().long()
        return torch.where(segment < self.max_segments, segment, -1)

    def grouping(self, by: str) -> ops.Grouping:
        """The tokens sorted by these groups, for `ops.segment_gram` and `ops.segment_project`."""
        num_groups = self.counts.numel() if by == "modality" else self.max_segments
        return self.remember(("grouping", by), lambda: ops.group_tokens(self.groups(by), num_groups))

    def chosen(self, modalities: tuple[int, ...]) -> Tensor:
        """bool ``[M]``, true for some modalities; made on the device, since a copy to it would wait."""

        def make() -> Tensor:
            numbers = torch.arange(self.num_modalities, device=self.device)
            chosen = torch.zeros_like(numbers, dtype=torch.bool)
            for m in modalities:
                chosen |= numbers == m
            return chosen

        return self.remember(("chosen", modalities), make)

    def to(self, device: torch.device | str) -> "ModalityLayout":
        """This layout with its tensors on another device."""
        moved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in moved.items()}
        if moved["modality"].device.type != "cpu" and moved["faults"] is None:
            moved["faults"] = torch.zeros(2, dtype=torch.int32, device=device)
        return ModalityLayout(**moved)

    def check(self) -> "ModalityLayout":
        """Look at the values that are not looked at on CUDA, and raise for bad ones. Waits for the device.

        Raises:
            ValueError: ids outside -1…M-1, bad ``cu_seqlens``, or more segments than ``max_segments``.
        """
        if self.faults is not None:
            ids, bounds = self.faults.tolist()
            if ids:
                raise checks.wrong_value("modality_ids", f"ids from -1 to {self.num_modalities - 1}", f"{ids} others")
            if bounds:
                raise checks.wrong_value(
                    "cu_seqlens",
                    f"0, non-decreasing, up to the {self.num_tokens} tokens",
                    f"{bounds} entries that break it",
                )
        segments = int(self.num_segments)
        if segments > self.max_segments:
            raise checks.wrong_value("max_segments", f"at least the {segments} segments there are", self.max_segments)
        return self

    def queries(
        self,
        query_length: int | None = None,
        query_start: int | Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
    ) -> "QueryRows":
        """Which key column each query row stands in (spec: "Modular mask", fewer queries than keys).

        Args:
            query_length: query rows per sequence (packed: all rows together). Default: as many as keys.
            query_start: key column of a sequence's query 0, an int or an integer tensor ``[N]``. Default: the last
                columns are the queries.
            cu_seqlens_q: integer ``[N + 1]``, packed layouts only: first query row of each document.

        Raises:
            ValueError, TypeError: as :func:`moda_kernels.moda_attention`.
        """
        if isinstance(query_start, Tensor) or cu_seqlens_q is not None:
            return _query_rows(self, query_length, query_start, cu_seqlens_q)
        key = ("queries", query_length, query_start)
        return self.remember(key, lambda: _query_rows(self, query_length, query_start, None))

    def __repr__(self) -> str:
        kind = f"packed, {self.num_sequences} documents, {self.num_tokens} tokens"
        if not self.packed:
            kind = "batch of {} x {}".format(*self.modality.shape)
        return (
            f"ModalityLayout({kind}, {self.num_modalities} modalities, <= {self.max_segments} segments, {self.device})"
        )


@dataclass(frozen=True, eq=False)
class QueryRows:
    """Where the queries of a call stand among the keys of a layout.

    Attributes:
        shape: ``(B, Lq)``, or ``(Tq,)`` for packed documents.
        cu_seqlens: int32 ``[N + 1]``, first query row of each sequence in the flattened queries.
        first_column: int32 ``[N]``, key token (in the flattened batch) in which a sequence's query 0 stands.
        columns: int64, of shape ``shape``: the key token in which each query stands, -1 for a row outside the keys
            (which then counts as padding).
    """

    shape: tuple[int, ...]
    cu_seqlens: Tensor
    first_column: Tensor
    columns: Tensor
    _derived: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def remember(self, key: Any, make: Callable[[], T]) -> T:
        """What has been derived from these rows under `key`, made at the first call."""
        return _remembered(self._derived, key, make)

    def of(self, per_token: Tensor, missing: int = -1) -> Tensor:
        """A per-token integer property of the keys, taken at the queries: shape ``shape``."""
        flat = per_token.flatten()
        if flat.numel() == 0:
            return torch.full(self.shape, missing, dtype=flat.dtype, device=flat.device)
        return torch.where(self.columns >= 0, flat[self.columns.clamp(min=0)], missing)


def segment_modalities(
    modality_ids: Tensor,
    *,
    num_modalities: int | None = None,
    item_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_segments: int | None = None,
) -> ModalityLayout:
    """Cut sequences into segments: the longest runs of one modality (and one item) in one sequence.

    Args:
        modality_ids: integer ``[B, L]`` (a batch) or ``[T]`` (packed documents, with ``cu_seqlens``): 0…M-1, or -1 for
            padding, which may stand anywhere, ends a run and belongs to no segment.
        num_modalities: M. Default: the largest id + 1, from 1 to 256; reading it waits for a CUDA device.
        item_ids: integer, shape and device of ``modality_ids``; tokens with different items are in different segments
            (two images side by side).
        cu_seqlens: int32 or int64 ``[N + 1]``, from 0 to T, non-decreasing: the first token of each document.
        max_segments: an upper bound of the number of segments, so that nothing waits for a CUDA device. Default: their
            number.

    Returns:
        A :class:`ModalityLayout` on the device of ``modality_ids``. Given both ``num_modalities`` and
        ``max_segments``, making it on CUDA neither synchronises nor breaks a graph capture.

    Raises:
        TypeError: an argument that is not an integer tensor, or not an int.
        ValueError: wrong shapes or devices; on the CPU also ids outside -1…M-1, bad ``cu_seqlens``, more segments than
            ``max_segments``. On CUDA values are looked at in :meth:`ModalityLayout.check` only: until then an id out
            of range counts as padding, and too many segments poison outputs with NaN.
    """
    cu_seqlens = _check_arguments(modality_ids, item_ids, cu_seqlens)
    on_cpu = checks.looks_at_values(modality_ids.device)
    if modality_ids.dtype in (torch.int8, torch.uint8):
        modality_ids = modality_ids.int()  # -1 and M are to be compared with
    if num_modalities is None:
        num_modalities = max(1, int(modality_ids.max()) + 1) if modality_ids.numel() else 1
        if num_modalities > MANY_MODALITIES:
            expected = f"to be given where ids reach {MANY_MODALITIES} (counts per modality are kept for every token)"
            raise checks.wrong_value("num_modalities", expected, f"ids up to {num_modalities - 1}: are they token ids?")
    checks.integer("num_modalities", num_modalities, 1)
    if max_segments is not None:
        checks.integer("max_segments", max_segments, 0)

    in_range = (modality_ids >= -1) & (modality_ids < num_modalities)
    faults = None
    if not on_cpu:
        faults = torch.stack(((~in_range).sum(), _bad_bounds(cu_seqlens, modality_ids.numel()))).int()
        # In bounds whatever came, so that nothing below can read or write elsewhere.
        cu_seqlens = cu_seqlens.clamp(0, modality_ids.numel()).cummax(0).values
    elif not bool(in_range.all()):
        bad = int(modality_ids[~in_range][0])
        raise checks.wrong_value("modality_ids", f"ids from -1 (padding) to {num_modalities - 1}", f"the id {bad}")
    elif _bad_bounds(cu_seqlens, modality_ids.numel()):
        expected = f"non-decreasing offsets from 0 to the {modality_ids.numel()} tokens"
        raise checks.wrong_value("cu_seqlens", expected, f"{_abridged(cu_seqlens)}")

    modality = torch.where(in_range, modality_ids, -1).int().flatten()
    items = None if item_ids is None else item_ids.long().flatten().contiguous()
    cu_seqlens = cu_seqlens.to(torch.int32, copy=True).contiguous()
    segment, position, sequence, prefix, num_segments = _op_segment_tokens(modality, items, cu_seqlens, num_modalities)

    if max_segments is None or on_cpu:
        segments = int(num_segments)
        if max_segments is None:
            max_segments = segments
        elif segments > max_segments:
            raise checks.wrong_value("max_segments", f"at least the {segments} segments there are", max_segments)
    # A token past the last document (possible on CUDA only) has become padding.
    modality = torch.where(segment >= 0, modality, -1) if faults is not None else modality
    shape = modality_ids.shape
    return ModalityLayout(
        modality=modality.view(shape),
        segment=segment.view(shape),
        position=position.view(shape),
        sequence=sequence.view(shape),
        counts=prefix[cu_seqlens[1:]] - prefix[cu_seqlens[:-1]],
        cu_seqlens=cu_seqlens,
        num_modalities=num_modalities,
        max_segments=max_segments,
        num_segments=num_segments,
        prefix=prefix,
        table=_op_segment_table(modality, segment, sequence, max_segments),
        faults=faults,
    )


def segment_tokens_torch(
    modality: Tensor, items: Tensor | None, cu_seqlens: Tensor, num_modalities: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The PyTorch twin of `native.segment_tokens`.

    Args:
        modality: int32 ``[T]``, -1…M-1.
        items: int64 ``[T]`` or None.
        cu_seqlens: int32 ``[N + 1]``, within 0…T and non-decreasing; tokens outside of it are padding.

    Returns:
        segment, position, sequence (int32 ``[T]``), prefix (int32 ``[T + 1, M]``), num_segments (int32 ``[1]``).
    """
    tokens = torch.arange(modality.numel(), dtype=torch.int32, device=modality.device)
    sequence = torch.searchsorted(cu_seqlens[1:], tokens, right=True).int()
    real = (modality >= 0) & (tokens >= cu_seqlens[:1]) & (tokens < cu_seqlens[-1:])
    one_hot = modality[:, None] == torch.arange(num_modalities, device=modality.device)
    prefix = torch.zeros(modality.numel() + 1, num_modalities, dtype=torch.int32, device=modality.device)
    torch.cumsum(one_hot & real[:, None], 0, dtype=torch.int32, out=prefix[1:])

    same = torch.zeros_like(real)
    same[1:] = real[:-1] & (modality[1:] == modality[:-1]) & (sequence[1:] == sequence[:-1])
    if items is not None:
        same[1:] &= items[1:] == items[:-1]
    begins = real & ~same
    started = torch.cumsum(begins, 0, dtype=torch.int32)
    segment = torch.where(real, started - 1, -1)
    seen = prefix.sum(1, dtype=torch.int32)
    # min(): a token past the last document has no sequence start of its own.
    first = cu_seqlens[sequence.clamp(max=cu_seqlens.numel() - 1)]
    position = torch.where(real, seen[:-1] - seen[first], -1)
    sequence = sequence.clamp(max=max(cu_seqlens.numel() - 2, 0))
    num_segments = begins.sum(dtype=torch.int32).view(1)
    return segment, position, sequence, prefix, num_segments


def segment_table_torch(modality: Tensor, segment: Tensor, sequence: Tensor, max_segments: int) -> Tensor:
    """The PyTorch twin of `native.segment_table`: int32 ``[max_segments, 4]``, see `ModalityLayout.table`."""
    tokens = torch.arange(modality.numel(), dtype=torch.int32, device=modality.device)
    # One row more takes what belongs to no segment, or to one too many.
    row = torch.where((segment >= 0) & (segment < max_segments), segment, max_segments).long()
    table = torch.zeros(max_segments + 1, 4, dtype=torch.int32, device=modality.device)
    table[:, 0].scatter_(0, row, sequence)
    table[:, 1].fill_(modality.numel()).scatter_reduce_(0, row, tokens, "amin")
    table[:, 2].scatter_add_(0, row, torch.ones_like(tokens))
    table[:, 3].scatter_(0, row, modality)
    return torch.where(table[:, 2:3] > 0, table, 0)[:max_segments].contiguous()


def _segment_tokens(
    modality: Tensor, items: Tensor | None, cu_seqlens: Tensor, num_modalities: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    segment_tokens = native.segment_tokens if native.runs_on(modality.device) else segment_tokens_torch
    return segment_tokens(modality, items, cu_seqlens, num_modalities)


def _segment_tokens_fake(
    modality: Tensor, items: Tensor | None, cu_seqlens: Tensor, num_modalities: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens = modality.numel()
    per_token = (torch.empty_like(modality) for _ in range(3))
    return *per_token, modality.new_empty(tokens + 1, num_modalities), modality.new_empty(1)  # type: ignore[return-value]


def _segment_table(modality: Tensor, segment: Tensor, sequence: Tensor, max_segments: int) -> Tensor:
    segment_table = native.segment_table if native.runs_on(modality.device) else segment_table_torch
    return segment_table(modality, segment, sequence, max_segments)


def _segment_table_fake(modality: Tensor, segment: Tensor, sequence: Tensor, max_segments: int) -> Tensor:
    return modality.new_empty(max_segments, 4)


_op_segment_tokens = operator(
    "_segment_tokens(Tensor modality, Tensor? items, Tensor cu_seqlens, int num_modalities)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _segment_tokens,
    _segment_tokens_fake,
)
_op_segment_table = operator(
    "_segment_table(Tensor modality, Tensor segment, Tensor sequence, SymInt max_segments) -> Tensor",
    _segment_table,
    _segment_table_fake,
)


def _check_arguments(modality_ids: Tensor, item_ids: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Shapes, dtypes and devices; returns cu_seqlens, made for a batch."""
    checks.has_numbers("modality_ids", checks.integer_tensor("modality_ids", modality_ids))
    if item_ids is not None:
        checks.integer_tensor("item_ids", item_ids)
        checks.shape("item_ids", item_ids, modality_ids.shape, "of modality_ids")
        checks.same_device("item_ids", item_ids, modality_ids.device, "modality_ids")
    if cu_seqlens is None:
        if modality_ids.dim() != 2:
            raise checks.wrong_value("modality_ids", "[B, L], or [T] together with cu_seqlens", modality_ids)
        rows, length = modality_ids.shape
        return torch.arange(rows + 1, dtype=torch.int32, device=modality_ids.device) * length
    if modality_ids.dim() != 1:
        raise checks.wrong_value("modality_ids", "[T] together with cu_seqlens", modality_ids)
    return cu_seqlens_argument("cu_seqlens", cu_seqlens, modality_ids.device)


def cu_seqlens_argument(
    name: str, cu_seqlens: Tensor, device: torch.device, num_sequences: int | None = None
) -> Tensor:
    """A checked ``[N + 1]`` offset tensor (not its values)."""
    if checks.tensor(name, cu_seqlens).dtype not in (torch.int32, torch.int64):
        raise checks.wrong_type(name, "an int32 or int64 tensor", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise checks.wrong_value(name, "shape [N + 1]", cu_seqlens)
    if num_sequences is not None and cu_seqlens.numel() != num_sequences + 1:
        raise checks.wrong_value(name, f"shape [N + 1] = ({num_sequences + 1},)", cu_seqlens)
    checks.same_device(name, cu_seqlens, device, "the layout")
    return cu_seqlens


def _bad_bounds(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """How many of the conditions "from 0, non-decreasing, to `tokens`" are broken."""
    return (cu_seqlens[1:] < cu_seqlens[:-1]).sum() + (cu_seqlens[0] != 0) + (cu_seqlens[-1] != tokens)


def _abridged(values: Tensor) -> str:
    shown = ", ".join(map(str, values[:8].tolist()))
    return f"[{shown}{', …' if values.numel() > 8 else ''}]"


def _query_rows(
    layout: ModalityLayout, query_length: int | None, query_start: int | Tensor | None, cu_seqlens_q: Tensor | None
) -> QueryRows:
    device, sequences = layout.device, layout.num_sequences
    key_starts, key_ends = layout.cu_seqlens[:-1], layout.cu_seqlens[1:]
    if layout.packed:
        shape, cu_q = _packed_queries(layout, query_length, cu_seqlens_q)
    else:
        if cu_seqlens_q is not None:
            raise checks.wrong_value("cu_seqlens_q", "None with a batch layout", cu_seqlens_q)
        keys = layout.modality.shape[1]
        length = keys if query_length is None else checks.integer("query_length", query_length, 0)
        if length > keys:
            raise checks.wrong_value(
                "query", f"at most as many queries as the layout's {keys} keys", f"{length} queries"
            )
        shape = (sequences, length)
        cu_q = torch.arange(sequences + 1, dtype=torch.int32, device=device) * length
    lengths = cu_q[1:] - cu_q[:-1]

    spare = key_ends - key_starts - lengths
    offset = spare if query_start is None else _start_offsets(layout, query_start)
    if checks.looks_at_values(device) and query_start is not None and bool(((offset < 0) | (offset > spare)).any()):
        raise checks.wrong_value(
            "query_start", "0 <= query_start <= keys - queries in every sequence", f"{_abridged(offset)}"
        )
    first_column = (key_starts + offset).int()

    rows = torch.arange(shape[-1] if layout.packed else shape[0] * shape[1], device=device)
    sequence = torch.searchsorted(cu_q[1:], rows.int(), right=True).clamp(max=max(sequences - 1, 0))
    if sequences == 0:
        columns = torch.full_like(rows, -1)
    else:
        columns = first_column[sequence].long() + rows - cu_q[sequence]
        inside = (columns >= key_starts[sequence]) & (columns < key_ends[sequence])
        columns = torch.where(inside, columns, -1)
    return QueryRows(tuple(shape), cu_q, first_column, columns.view(shape))


def _packed_queries(
    layout: ModalityLayout, query_length: int | None, cu_seqlens_q: Tensor | None
) -> tuple[tuple[int, ...], Tensor]:
    tokens = layout.num_tokens
    length = tokens if query_length is None else checks.integer("query_length", query_length, 0)
    if length > tokens:
        raise checks.wrong_value("query", f"at most as many queries as the layout's {tokens} keys", f"{length} queries")
    if cu_seqlens_q is None:
        if length != tokens:
            raise checks.wrong_value("cu_seqlens_q", f"the documents of the {length} queries (keys: {tokens})", None)
        return (length,), layout.cu_seqlens
    cu_q = cu_seqlens_argument("cu_seqlens_q", cu_seqlens_q, layout.device, layout.num_sequences)
    if checks.looks_at_values(layout.device):
        if _bad_bounds(cu_q, length):
            raise checks.wrong_value(
                "cu_seqlens_q", f"non-decreasing offsets from 0 to the {length} queries", _abridged(cu_q)
            )
        if bool((cu_q.diff() > layout.cu_seqlens.diff()).any()):
            raise checks.wrong_value("cu_seqlens_q", "no document with more queries than keys", _abridged(cu_q))
    return (length,), cu_q.clamp(0, length).cummax(0).values.int()


def _start_offsets(layout: ModalityLayout, query_start: int | Tensor) -> Tensor:
    if not isinstance(query_start, Tensor):
        start = checks.integer("query_start", query_start, 0)
        return torch.full((layout.num_sequences,), start, dtype=torch.int32, device=layout.device)
    checks.integer_tensor("query_start", query_start)
    checks.shape("query_start", query_start, (layout.num_sequences,), "[N]")
    checks.same_device("query_start", query_start, layout.device, "the layout")
    return query_start.int()
