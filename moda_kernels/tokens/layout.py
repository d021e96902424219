"""Tokens to segments: `segment_modalities` and the `ModalityLayout` that it makes.

A layout says of every token which sequence, modality, role, segment, position, step and chunk it has (spec: "Tokens"),
and carries the prefix counts from which others are derived. It is made once per batch and shared by all layers and
heads. The arithmetic is in the native extension (`native.py`) with a plain PyTorch twin here; both give identical
results.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeVar

import torch
from torch import Tensor

from moda_kernels import products
from moda_kernels.runtime import checks
from moda_kernels.runtime.lasting import lasting
from moda_kernels.tokens import drawing
from moda_kernels.tokens.drawing import Drawing

T = TypeVar("T")

#: Sequences that are drawn at most.
MAX_STRIPS = 8
STEPS_EXPECTED = "int32 numbers that never fall along the tokens of one role of a sequence"


def remembered(derived: dict[Any, Any], key: Any, make: Callable[[], T]) -> T:
    """What `derived` has under `key`, made at the first call; of use to all that come later."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return make()  # tensors made inside a torch.func transform are of no use outside it
    if key not in derived:
        derived[key] = lasting(make)()
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
        role: int32, 0…R-1, the row and column of the rules that the token uses; the modality where no roles were given.
        step: int32, a frame, a scale, a diffusion block, a turn; never falls along a role of a sequence.
        chunk: int32, the first token of the token's chunk (in the flattened batch), so that equal numbers are one
            chunk; -1 for tokens in none, and for padding.
        counts: int32 ``[N, M]``, tokens per sequence and modality.
        cu_seqlens: int32 ``[N + 1]``, first token of each sequence in the flattened batch.
        num_modalities: M.
        num_roles: R.
        own_roles, own_chunks: whether roles, or chunks, were given.
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
    role: Tensor
    step: Tensor
    chunk: Tensor
    counts: Tensor
    cu_seqlens: Tensor
    num_modalities: int
    num_roles: int
    own_roles: bool
    own_chunks: bool
    max_segments: int
    num_segments: Tensor
    prefix: Tensor
    table: Tensor
    #: Where values are not looked at: how many ids, cu_seqlens, roles, steps are bad; int32 [4]. For `check`.
    faults: Tensor | None = None

    def __post_init__(self) -> None:
        # No field: what walks through arguments (FSDP2, which looks for tensors with gradients) would follow it round
        # and round.
        object.__setattr__(self, "_derived", {})

    def remember(self, key: Any, make: Callable[[], T]) -> T:
        """What has been derived from this layout under `key`, made at the first call: all layers share a layout."""
        return remembered(self.__dict__["_derived"], key, make)

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
        """bool ``[1]``, on CUDA only: whether outputs are to be poisoned with NaN, because there are more segments than
        ``max_segments``, or steps that fall."""
        return None if self.faults is None else (self.num_segments > self.max_segments) | (self.faults[3:] > 0)

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

    def grouping(self, by: str) -> products.Grouping:
        """The tokens sorted by these groups, for `products.segment_gram` and `products.segment_project`."""
        num_groups = self.counts.numel() if by == "modality" else self.max_segments
        return self.remember(("grouping", by), lambda: products.group_tokens(self.groups(by), num_groups))

    def chosen(self, modalities: tuple[int, ...]) -> Tensor:
        """bool ``[M]``, true for some modalities; made on the device, since a copy to it would wait."""

        def make() -> Tensor:
            numbers = torch.arange(self.num_modalities, device=self.device)
            chosen = torch.zeros_like(numbers, dtype=torch.bool)
            for m in modalities:
                chosen |= numbers == m
            return chosen

        return self.remember(("chosen", modalities), make)

    @lasting
    def to(self, device: torch.device | str) -> "ModalityLayout":
        """This layout with its tensors on another device."""
        moved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in moved.items()}
        if moved["modality"].device.type != "cpu" and moved["faults"] is None:
            moved["faults"] = torch.zeros(4, dtype=torch.int32, device=device)
        return ModalityLayout(**moved)

    def check(self) -> "ModalityLayout":
        """Look at the values that are not looked at on CUDA, and raise for bad ones. Waits for the device.

        Raises:
            ValueError: ids outside -1…M-1, roles outside 0…R-1, steps that fall, bad ``cu_seqlens``, or more segments
                than ``max_segments``.
        """
        if self.faults is not None:
            ids, bounds, roles, steps = self.faults.tolist()
            if ids:
                raise checks.wrong_value("modality_ids", f"ids from -1 to {self.num_modalities - 1}", f"{ids} others")
            if bounds:
                raise checks.wrong_value(
                    "cu_seqlens",
                    f"0, non-decreasing, up to the {self.num_tokens} tokens",
                    f"{bounds} entries that break it",
                )
            if roles:
                raise checks.wrong_value("roles", f"roles from 0 to {self.num_roles - 1}", f"{roles} others")
            if steps:
                raise checks.wrong_value("steps", STEPS_EXPECTED, f"{steps} that fall")
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

    def draw(self, names: Sequence[str] | None = None) -> Drawing:
        """The sequences as strips of their segments (the first eight of them), as a drawing that shows itself in a
        notebook and can be saved. Waits for the device.

        Args:
            names: of the M modalities, for the legend. Default: their numbers.

        Raises:
            ValueError: another number of names.
        """
        if names is not None and len(names) != self.num_modalities:
            raise checks.wrong_value("names", f"{self.num_modalities} names", f"{len(names)}")
        shown = min(self.num_sequences, MAX_STRIPS)
        bounds = self.cu_seqlens[: shown + 1].tolist()
        roles = self.role.flatten().cpu() if self.own_roles else None
        rows: list[tuple[str, int, list[tuple[int, int, int, int | None]]]] = [
            (f"{'document' if self.packed else 'row'} {n}", bounds[n + 1] - bounds[n], []) for n in range(shown)
        ]
        for sequence, start, length, modality in self.segments().tolist():
            if sequence < shown:
                first = start if self.packed else start + bounds[sequence]
                role = None if roles is None else int(roles[first])
                rows[sequence][2].append((first - bounds[sequence], length, modality, role))
        counts = self.counts.sum(0).tolist()
        called = list(names) if names is not None else [f"modality {m}" for m in range(self.num_modalities)]
        return drawing.segments(rows, called, [f"{name}: {n} tokens" for name, n in zip(called, counts, strict=True)])

    def _repr_html_(self) -> str:
        return f"<div>{escape(repr(self))}</div>{self.draw().svg}"

    def __repr__(self) -> str:
        kind = f"packed, {self.num_sequences} documents, {self.num_tokens} tokens"
        if not self.packed:
            kind = "batch of {} x {}".format(*self.modality.shape)
        roles = f", {self.num_roles} roles" if self.own_roles else ""
        many = f"{self.num_modalities} modalities{roles}, <= {self.max_segments} segments"
        return f"ModalityLayout({kind}, {many}, {self.device})"


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "_derived", {})

    def remember(self, key: Any, make: Callable[[], T]) -> T:
        """What has been derived from these rows under `key`, made at the first call."""
        return remembered(self.__dict__["_derived"], key, make)

    def of(self, per_token: Tensor, missing: int = -1) -> Tensor:
        """A per-token integer property of the keys, taken at the queries: shape ``shape``."""
        flat = per_token.flatten()
        if flat.numel() == 0:
            return torch.full(self.shape, missing, dtype=flat.dtype, device=flat.device)
        return torch.where(self.columns >= 0, flat[self.columns.clamp(min=0)], missing)


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
            "query_start", "0 <= query_start <= keys - queries in every sequence", f"{abridged(offset)}"
        )
    first_column = (key_starts + offset).int()

    rows = torch.arange(shape[-1] if layout.packed else shape[0] * shape[1], device=device)
    sequence = torch.searchsorted(cu_q[1:], rows.int(), right=True).clamp(max=max(sequences - 1, 0))
    if sequences == 0:
        columns = torch.full_like(rows, -1)
    else:
        columns = first_column[sequence].long() + rows - cu_q[sequence]
        inside = (columns >= key_starts[sequence]) & (columns < key_ends[sequence])
        # A row before the first document or past the last one (on CUDA bounds aren't looked at) is in none.
        inside = inside & (rows >= cu_q[sequence]) & (rows < cu_q[sequence + 1])
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
        if bad_bounds(cu_q, length):
            raise checks.wrong_value(
                "cu_seqlens_q", f"non-decreasing offsets from 0 to the {length} queries", abridged(cu_q)
            )
        if bool((cu_q.diff() > layout.cu_seqlens.diff()).any()):
            raise checks.wrong_value("cu_seqlens_q", "no document with more queries than keys", abridged(cu_q))
    return (length,), cu_q.clamp(0, length).cummax(0).values.int()


def _start_offsets(layout: ModalityLayout, query_start: int | Tensor) -> Tensor:
    if not isinstance(query_start, Tensor):
        start = checks.integer("query_start", query_start, 0)
        return torch.full((layout.num_sequences,), start, dtype=torch.int32, device=layout.device)
    checks.integer_tensor("query_start", query_start)
    checks.shape("query_start", query_start, (layout.num_sequences,), "[N]")
    checks.same_device("query_start", query_start, layout.device, "the layout")
    return query_start.int()


def bad_bounds(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """How many of the conditions "from 0, non-decreasing, to `tokens`" are broken."""
    return (cu_seqlens[1:] < cu_seqlens[:-1]).sum() + (cu_seqlens[0] != 0) + (cu_seqlens[-1] != tokens)


def abridged(values: Tensor) -> str:
    shown = ", ".join(map(str, values[:8].tolist()))
    return f"[{shown}{', …' if values.numel() > 8 else ''}]"
