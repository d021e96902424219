"""What a model's own code asks of a mask, said in rules: no matrix of queries × keys is made.

transformers builds a mask by handing a function of index pairs to whatever is registered under the attention's name.
`asked` is registered, and reads that function: it is put together by transformers' own `and_masks`, `or_masks` and a
few overlays (causal, sliding, chunked, blocks, packed rows), and each of them is known by its code. What comes out is
an `AskedMask`, which travels to the attention layers in the mask's place. A function that isn't known is refused by
name.

Packed rows are documents one by one. (transformers looks up the blocks of packed rows by positions, and in some models
lets blocks see other documents' blocks; neither is followed.)
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from moda_kernels.runtime import checks
from moda_kernels.tokens.layout import ModalityLayout
from moda_kernels.tokens.mask import ModularMask, Visibility
from moda_kernels.tokens.segments import segment_modalities

Start = int | Tensor


class Facts(NamedTuple):
    """What a mask function says beside "causal".

    Attributes:
        window: of everything, or of what is causal alone ("all", "past"; as `ModularMask`'s).
        blocks: integer ``[B, >= columns]``: tokens of one number >= 0 see each other whole.
        documents: integer ``[B, columns]`` of packed rows: tokens of different numbers don't see each other.
        chunk: chunks of so many positions, and where each row's first begins, ``[B]``.
    """

    window: int | None = None
    window_on: str = "past"
    blocks: Tensor | None = None
    documents: Tensor | None = None
    chunk: tuple[int, Tensor] | None = None


class AskedMask(BlockMask):
    """A mask in rules, made once per call for all layers of a kind. (A BlockMask, because transformers hands those on
    untouched, where other objects are taken for a padding mask.)

    Attributes:
        shape: (batch, 1, queries, columns), as of the matrix that is not made.
        start: the column of query 0, an int or a tensor without axes.
        first: how many tokens stand before the columns (of a sliding cache).
        told: the padding mask of the call, bool ``[B, tokens]``, or None.
        facts: `Facts`.
    """

    def __init__(self, batch: int, rows: int, columns: int, start: Start, first: Start, told: Tensor | None,
                 facts: Facts, device: Any) -> None:  # fmt: skip
        self.sizes, self.start, self.first, self.told, self.facts = (batch, 1, rows, columns), start, first, told, facts
        self.device = torch.device(device)
        self._made: dict[bool, tuple[ModalityLayout, ModularMask]] = {}
        self._documents: tuple[Tensor, AskedMask] | None = None
        #: What `cu_seq_lens_q` of a call said, and the documents found in it.
        self.bounds: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sizes

    @property
    def plain(self) -> bool:
        """Causal and nothing else, padding aside."""
        return self.facts.window is None and all(fact is None for fact in self.facts[2:])

    def contiguous(self) -> "AskedMask":
        return self

    def to(self, device: Any, *args: Any, **kwargs: Any) -> "AskedMask":
        """Itself on another device (models spread over several)."""
        device = torch.device(device) if isinstance(device, str | torch.device) else self.device
        if device == self.device:
            return self
        old = self.facts
        facts = Facts(
            old.window,
            old.window_on,
            None if old.blocks is None else old.blocks.to(device),
            None if old.documents is None else old.documents.to(device),
            None if old.chunk is None else (old.chunk[0], old.chunk[1].to(device)),
        )
        start, first = (x.to(device) if isinstance(x, Tensor) else x for x in (self.start, self.first))
        told = None if self.told is None else self.told.to(device)
        return AskedMask(self.sizes[0], self.sizes[2], self.sizes[3], start, first, told, facts, device)

    def __getitem__(self, index: Any) -> Any:
        raise NotImplementedError("a mask in rules has no elements: a layer that cuts or changes its mask is not known")

    def __repr__(self) -> str:
        said = ", ".join(name for name, value in self.facts._asdict().items() if value is not None)
        return f"AskedMask({self.sizes}, {said})"

    __str__ = __repr__

    # What attention asks

    def made(self, by_document: bool = False) -> tuple[ModalityLayout, ModularMask]:
        """Layout (of one modality) and mask of the columns; made at the first call.

        Args:
            by_document: packed rows as a packed layout, in which each document is a sequence of its own.
        """
        by_document = by_document and self.facts.documents is not None
        if by_document not in self._made:
            self._made[by_document] = self._make(by_document)
        return self._made[by_document]

    def query_start(self) -> Start:
        """As an argument of `moda_attention`."""
        if isinstance(self.start, int):
            return self.start
        return self.start.to(self.device, torch.int32).expand(self.sizes[0])

    def shown(self) -> Tensor | None:
        """bool ``[B, columns]``: what the padding mask shows."""
        return None if self.told is None else _columns(self.told, self.first, self.sizes[3], False)

    def chunks(self) -> Tensor | None:
        """int64 ``[B, columns]``: what packed rows and chunked layers keep apart; None: nothing."""
        documents, chunk, (batch, _, _, columns) = self.facts.documents, self.facts.chunk, self.sizes
        if chunk is None:
            return None if documents is None else documents.long()
        column = torch.arange(columns, device=self.device) + self.first - chunk[1].long()[:, None]
        if documents is None:
            # Padding before the first chunk has numbers below 0, which are no chunk's.
            return torch.div(column, chunk[0], rounding_mode="floor").expand(batch, -1)
        number = torch.div(_since(documents), chunk[0], rounding_mode="floor")
        return documents.long() * (columns + 1) + number

    def of_documents(self, documents: Tensor) -> "AskedMask":
        """This mask for rows of packed documents, told by `documents_of`; all layers share it."""
        if self.facts.documents is not None:
            return self
        if self._documents is None or self._documents[0] is not documents:
            facts = self.facts._replace(documents=documents.to(self.device))
            size = self.sizes
            self._documents = (
                documents, AskedMask(size[0], size[2], size[3], self.start, self.first, self.told, facts, self.device)
            )  # fmt: skip
        return self._documents[1]

    def _make(self, by_document: bool) -> tuple[ModalityLayout, ModularMask]:
        batch, _, _, columns = self.sizes
        shown, chunks, window = self.shown(), self.chunks(), self.facts.window
        blocks, whole = self._blocks(shown, chunks)
        ids = torch.zeros(batch, columns, dtype=torch.int64, device=self.device)
        roles: Tensor | None = None if blocks is None else (blocks >= 0).long()
        hidden = None
        if shown is not None and window is None:
            ids = torch.where(shown, 0, -1)
        elif shown is not None:
            # The model's windows count columns, padding too, so padding keeps its place and has a role nobody sees.
            hidden = 1 if blocks is None else 2
            roles = torch.where(shown, ids if roles is None else roles, hidden)
        flat = chunks is not None and (by_document or (blocks is not None and whole == Visibility.ALL))
        own = Visibility.PAST if chunks is None or (flat and self.facts.chunk is None) else Visibility.CHUNK
        size = 1 + (blocks is not None) + (hidden is not None)
        rules = [[own] * size for _ in range(size)]
        if blocks is not None:
            rules[1][1] = own | whole
        if hidden is not None:
            for row in rules:
                row[hidden] = Visibility.HIDDEN
            rules[hidden] = [Visibility.HIDDEN] * size
        mask = ModularMask(rules, window, self.facts.window_on if window is not None else "past")  # type: ignore[arg-type]
        told = {"roles": roles, "item_ids": blocks}
        room = None if self.device.type == "cpu" else batch * columns
        if flat and chunks is not None:
            told = {name: t if t is None else t.flatten() for name, t in told.items()}
            told["chunks"] = None if self.facts.chunk is None else chunks.flatten()
            bounds = bounds_of(chunks if self.facts.documents is None else self.facts.documents)
            layout = segment_modalities(
                ids.flatten(), num_modalities=1, num_roles=None if roles is None else size, cu_seqlens=bounds,
                max_segments=room, **told,
            )  # fmt: skip
        else:
            layout = segment_modalities(
                ids, num_modalities=1, num_roles=None if roles is None else size, chunks=chunks, max_segments=room,
                **told,
            )  # fmt: skip
        return layout, mask

    def _blocks(self, shown: Tensor | None, chunks: Tensor | None) -> tuple[Tensor | None, Visibility]:
        """Blocks of the columns, and the rule by which a block sees itself. (Values are looked at, which waits for a
        CUDA device: once for all layers, and only in models that have blocks.)"""
        if self.facts.blocks is None:
            return None, Visibility.HIDDEN
        blocks = _columns(self.facts.blocks.to(self.device), self.first, self.sizes[3], -1).long()
        if shown is not None:
            blocks = torch.where(shown, blocks, -1)
        one = blocks <= 0
        if chunks is not None:
            blocks = torch.where(blocks >= 0, blocks + (blocks.max() + 1) * _ordinal(chunks), -1)
        if torch.compiler.is_compiling() or _are_runs(blocks):
            return blocks, Visibility.SEGMENT  # while compiling, `evaluated` made runs of them
        if bool(one.all()):  # one block in each row or document, whatever stands between its parts
            return blocks, Visibility.ALL
        raise NotImplementedError(
            "a mask of several blocks that lie between one another (block_sequence_ids): no rules say it"
        )


def _are_runs(blocks: Tensor) -> bool:
    """Whether each number >= 0 stands in one run of its row, and they rise."""
    starts = blocks >= 0
    starts[:, 1:] &= blocks[:, 1:] != blocks[:, :-1]
    before = torch.nn.functional.pad(blocks.cummax(1).values, (1, 0), value=-1)[:, :-1]
    return not bool((starts & (before >= blocks)).any())


def bounds_of(documents: Tensor) -> Tensor:
    """cu_seqlens, int32, of rows ``[B, L]`` of documents one after the other, told by numbers that change. Waits."""
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    begins = starts.flatten().nonzero()[:, 0]
    return torch.nn.functional.pad(begins, (0, 1), value=documents.numel()).int()


def documents_of(cu_seqlens: Tensor, columns: int, name: str) -> Tensor:
    """int64 ``[1, columns]``: which document each token of a packed row is in.

    Raises:
        ValueError: other than a row of so many tokens.
    """
    if checks.looks_at_values(cu_seqlens.device) and int(cu_seqlens[-1]) != columns:
        raise checks.wrong_value(name, f"one row whose documents end at its {columns} tokens", f"{cu_seqlens.tolist()}")
    column = torch.arange(columns, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), column.to(cu_seqlens.dtype), right=True)[None]


def _columns(x: Tensor, first: Start, columns: int, value: Any) -> Tensor:
    """What is said of tokens, ``[B, tokens]``, of the columns alone; `value` of those that nothing is said of."""
    if not isinstance(first, int):
        index = torch.arange(columns, device=x.device) + first
        inside = index < x.shape[1]
        return torch.where(inside, x[:, index.clamp(max=x.shape[1] - 1)], value)
    x = x[:, first : first + columns]
    missing = columns - x.shape[1]
    return torch.nn.functional.pad(x, (0, missing), value=value) if missing else x


def _ordinal(x: Tensor) -> Tensor:
    """0, 1, … where a row changes its number."""
    changed = torch.zeros_like(x, dtype=torch.int64)
    changed[:, 1:] = (x[:, 1:] != x[:, :-1]).long()
    return changed.cumsum(1)


def _since(x: Tensor) -> Tensor:
    """How far each column is from where its number began."""
    column = torch.arange(x.shape[1], device=x.device).expand_as(x)
    begins = torch.ones_like(x, dtype=torch.bool)
    begins[:, 1:] = x[:, 1:] != x[:, :-1]
    return column - torch.where(begins, column, 0).cummax(1).values


# Reading a mask function


class Term(NamedTuple):
    """A conjunction; a mask is a disjunction of such."""

    causal: bool = False
    window: int | None = None
    blocks: Tensor | None = None
    documents: Tensor | None = None
    chunk: tuple[int, Tensor] | None = None

    def __and__(self, other: "Term") -> "Term":
        windows = [w for w in (self.window, other.window) if w is not None]
        pairs = zip(self[2:], other[2:], strict=True)
        if any(a is not None and b is not None and a is not b for a, b in pairs):
            raise NotImplementedError("a mask that asks for two kinds of blocks, documents or chunks at once")
        return Term(
            self.causal or other.causal,
            min(windows, default=None),
            self.blocks if other.blocks is None else other.blocks,
            self.documents if other.documents is None else other.documents,
            self.chunk if other.chunk is None else other.chunk,
        )


class UnknownMaskError(NotImplementedError):
    """A mask function whose code isn't transformers' own."""


@functools.cache
def _known() -> dict[Any, str]:
    """The code of transformers' mask functions."""
    from transformers import masking_utils as m

    nothing = torch.zeros(1, 1, dtype=torch.int64)
    made = {
        "and": m.and_masks(m.causal_mask_function),
        "or": m.or_masks(m.causal_mask_function),
        "causal": m.causal_mask_function,
        "full": m.bidirectional_mask_function,
        "window": m.sliding_window_overlay(1),
        "chunk": m.chunked_overlay(1, nothing),
        "padding": m.padding_mask_function(nothing),
        "packed": m.packed_sequence_mask_function(nothing),
        "blocks": m.blockwise_overlay(nothing),
    }
    if hasattr(m, "remap_positions_for_packed_sequence"):  # from 5.23 on
        made["remapped"] = m.remap_positions_for_packed_sequence(m.causal_mask_function, nothing)
    return {function.__code__: name for name, function in made.items()}


def _terms(function: Callable[..., Any]) -> list[Term]:
    code = getattr(function, "__code__", None)
    kind = _known().get(code)
    if kind is None:
        name = getattr(function, "__qualname__", repr(function))
        raise UnknownMaskError(
            f"a mask made by {getattr(function, '__module__', '?')}.{name}, which no rules are known for"
        )
    names = code.co_freevars if code is not None else ()
    said = {name: cell.cell_contents for name, cell in zip(names, function.__closure__ or (), strict=True)}
    if kind in ("and", "or"):
        parts = [_terms(part) for part in said["mask_functions"]]
        if kind == "or":
            return [term for part in parts for term in part]
        found = [Term()]
        for part in parts:
            found = [a & b for a in found for b in part]
        return found
    if kind == "remapped":
        return _terms(said["mask_function"])
    if kind == "causal":
        return [Term(causal=True)]
    if kind == "window":
        return [Term(window=int(said["sliding_window"]))]
    if kind == "chunk":
        return [Term(chunk=(int(said["chunk_size"]), said["left_padding"]))]
    if kind == "blocks":
        return [Term(blocks=said["block_sequence_ids"])]
    if kind == "packed":
        return [Term(documents=said["packed_sequence_mask"])]
    if kind == "full":
        return [Term()]
    raise UnknownMaskError("a mask with a padding mask inside its function, which no rules are known for")


def read(function: Callable[..., Any]) -> Facts | None:
    """What a mask function says; None: it isn't causal at all (an encoder's).

    Raises:
        NotImplementedError: what rules can't say, or functions that aren't known, by name.
    """
    terms = _terms(function)
    causal = [term for term in terms if term.causal]
    if not causal:
        return None
    whole = [term for term in terms if not term.causal]
    if len(causal) > 1 or len(whole) > 1 or any(term.blocks is None for term in whole) or causal[0].blocks is not None:
        raise NotImplementedError(f"a mask of {len(causal)} causal and {len(whole)} other parts: no rules say it")
    own, block = causal[0], whole[0] if whole else None
    window_on = "past"
    if block is not None and block.window is not None:
        if block.window != own.window:
            raise NotImplementedError(
                f"a mask with a window of {own.window} in time and {block.window} within blocks: no rules say it"
            )
        window_on = "all"
    chunk = own.chunk
    if block is not None and chunk is not None:
        raise NotImplementedError("a mask of chunks with blocks: no rules say it")
    return Facts(own.window, window_on, None if block is None else block.blocks, own.documents, chunk)


#: Decoders whose blocks are known to be runs, and those that see an image whole only within their window.
_RUNS = ("gemma", "gemma3_text", "gemma4_text")
_CUT_RUNS = ("gemma3_text", "gemma4_text")


def evaluated(
    function: Callable[..., Any], size: tuple[int, int, int], start: Start, told: Tensor | None, device: Any,
    config: Any, said: dict[str, Any],
) -> Facts:  # fmt: skip
    """As `read`, where a graph is being traced and functions can't be looked into: which kind of mask it is follows
    from how transformers calls, and where documents and blocks begin from the function's values at neighbouring tokens.

    Args:
        size: batch, queries, columns. start: position of query 0. told: the padding mask. said: the other arguments.

    Raises:
        NotImplementedError: blocks in a model of which it isn't known that they are runs.
    """
    batch, rows, columns = size
    local, kind = said.get("local_size"), getattr(config, "model_type", None)
    chunked = local is not None and "chunked_attention" in (getattr(config, "layer_types", None) or ())
    chunked = chunked or (local is not None and getattr(config, "sliding_window", None) != local)
    composed, whole = bool(said.get("use_vmap")), function.__name__ == "or_mask"
    if composed and kind not in _CUT_RUNS:
        raise UnknownMaskError("a mask of the caller's own functions can't be read while a graph is traced")
    if whole and kind not in _RUNS:
        raise NotImplementedError("blocks (block_sequence_ids) can't be read while a graph is traced")
    row = torch.arange(batch, device=device)[:, None]
    documents = blocks = None
    head = torch.zeros_like(row)
    column = torch.arange(columns, device=device)[None]
    if told is None and rows == columns and isinstance(start, int) and start == 0 and rows > 1:
        same = function(row, head, column[:, 1:], column[:, :-1]).expand(batch, columns - 1)
        documents = torch.nn.functional.pad((~same).long(), (1, 0)).cumsum(1)
    if (composed or whole) and columns > 1:
        ahead = function(row, head, column[:, :-1], column[:, 1:]).expand(batch, columns - 1)
        after, before = (torch.nn.functional.pad(ahead.long(), side) for side in ((0, 1), (1, 0)))
        number = torch.cumsum(((after > 0) & (before == 0)).long(), 1) - 1
        blocks = torch.where((after > 0) | (before > 0), number, -1)
    if chunked and documents is None:
        left = torch.zeros(batch, dtype=torch.int64, device=device)
        if told is not None:
            left = (told.cumsum(-1) == 0).sum(-1)
        return Facts(None, "past", blocks, None, (int(local), left))  # type: ignore[arg-type]
    if composed:
        local = config.sliding_window
    window = None if chunked or local is None else int(local)
    return Facts(window, "all" if composed else "past", blocks, documents)


def asked(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Start = 0,
    kv_offset: Start = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: Any = "cpu",
    config: Any = None,
    **others: Any,
) -> Any:
    """The mask function: an `AskedMask`, or for what isn't causal (encoders) what SDPA gets.

    Raises:
        NotImplementedError: a mask that no rules say, naming the function and the model.
    """
    # Traced with the model: torch 2.11 can't trace `from transformers import`, whose module is of a class of its own.
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    function = causal_mask_function if mask_function is None else mask_function
    try:
        if torch.compiler.is_compiling():
            if others.get("allow_is_causal_skip") is None:
                facts = None
            else:
                size = (batch_size, q_length, kv_length)
                facts = evaluated(function, size, q_offset, attention_mask, device, config, others)
        else:
            facts = read(function)
    except NotImplementedError as error:
        kind = getattr(config, "model_type", "?")
        layers = "layers with a window or chunks" if others.get("local_size") else "full layers"
        raise type(error)(
            f"attention 'moda': the mask of {layers} of model_type {kind!r}: {error}. Use "
            'attn_implementation="sdpa", or mk.replace_sdpa around the model'
        ) from None
    if facts is None:
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, function, attention_mask, device=device, **others
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise checks.wrong_value("attention_mask", "2 or 4 axes", attention_mask)
    return AskedMask(batch_size, q_length, kv_length, q_offset - kv_offset, kv_offset, attention_mask, facts, device)
