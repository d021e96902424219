"""From a checked call to what the kernels run: which kernels, with which tiles, and the tensors and numbers that they
walk, each with its name.

Rules end in `tokens/intervals.py`: what comes from there is, per pass, intervals of positions for each query row and a
position for each key, and from those alone `tokens/tiles.py` makes the walks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from moda_kernels.alignment.maps import ModalityMap
from moda_kernels.backends.triton import configs
from moda_kernels.call import AttentionCall
from moda_kernels.products.twin import Grouping
from moda_kernels.runtime.architectures import architecture
from moda_kernels.runtime.launch import find, padded
from moda_kernels.tokens.intervals import Passes, mask_intervals, passes_of
from moda_kernels.tokens.layout import ModalityLayout, QueryRows
from moda_kernels.tokens.pseudo import pseudo_counts
from moda_kernels.tokens.tiles import MaskTiles, mask_tiles
from moda_kernels.tokens.walks import KeyWalk, QueryWalk

#: A map is folded into the query where turning a query row (2 M D² operations) is at most a sixteenth of its attention
#: over all keys (4 L D): from L = 8 M D keys on. Shorter keys are fused and written, once per key head.
FOLD_FROM = 8
#: The kernels have no configuration that folds a larger map, or one in float32: the products leave the registers.
MAX_FOLDED_DIM = 128
#: Calls without gradients go to the kernels of `kernels/decode.py` where query rows are few and keys many: up
#: to 16 rows a sequence (more begin to fill a tile of the forward) and more than 256 keys (fewer are not worth sharing
#: between programs). A tile has up to 32 rows, query rows times heads of a group; larger ones leave the registers.
DECODE_ROWS = 16
DECODE_FROM = 256
DECODE_TILE = 32
#: Up to so many walks are unrolled in the kernels.
UNROLLED = 4
#: What launchers keep from one layer to the next, see `launch.py`.
Kept = dict[Any, Any]
#: Blocks of queries and keys, warps, stages, part of a masked tile: of forward, query's backward, keys' backward.
Configs = tuple[tuple[int, ...], ...]


class Facts(NamedTuple):
    """Who sees whom, all int32: a row of sequence n sees a key of it in pass p iff for one of the intervals
    low < position <= high.

    Attributes:
        limits, positions: of `Intervals`: low and high of each query row, and -1 for keys that are not in the pass.
        row_modality, key_modality: ``[rows]``, ``[tokens]``, -1 for padding (and where a role is out of range).
        cu_k, cu_q: ``[N + 1]``, first key and first query row of each sequence.
    """

    limits: Tensor
    positions: Tensor
    row_modality: Tensor
    key_modality: Tensor
    cu_k: Tensor
    cu_q: Tensor


class PassNumbers(NamedTuple):
    """What kernels are told of the passes.

    Attributes:
        modalities: M.
        passes, intervals: P, and how many intervals a row may have in each.
        second: the first pass of the second softmax of split attention; else P.
        affine: whether all keys are in the one pass there is, so that tiles need no list.
        of_pass: ``[P]``, the modality of each pass's keys, where passes go by modality (else 0).
    """

    modalities: int
    passes: int
    intervals: int
    second: int
    affine: bool
    of_pass: tuple[int, ...]

    @classmethod
    def of(cls, passes: Passes, layout: ModalityLayout) -> "PassNumbers":
        every = passes.passes
        affine = len(every) == 1 and every[0].modality is None and len(every[0].roles) == layout.num_roles
        modalities = tuple(each.modality or 0 for each in every)
        return cls(layout.num_modalities, len(every), passes.intervals, passes.second, affine, modalities)

    @property
    def many(self) -> bool:
        """Whether a loop goes over the walks: more than are unrolled in the kernels."""
        return self.passes * self.intervals > UNROLLED

    def numbers(self) -> list[int]:
        """As operators take them."""
        return [*map(int, self[:5]), *self.of_pass]

    @classmethod
    def read(cls, numbers: Sequence[int]) -> "PassNumbers":
        modalities, passes, intervals, second, affine, *of_pass = numbers
        return cls(modalities, passes, intervals, second, bool(affine), tuple(of_pass))


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """What a call of `ModaAttention` needs beside its differentiable tensors: who sees whom, and by which tiles.

    Attributes:
        facts, passes, walk, config: of the forward.
        count: int32 ``[branches, rows]``, pseudo scores of each query row, -1 for infinitely many; or None.
        fault: int32 ``[1]``, not 0 makes all outputs NaN; or None.
        backward: of the backward, which has no key map to fold and so may have fewer passes; None where there will be
            none.
        grouping: the keys by sequence and modality, where a map is folded into the query; else None.
        scale: of the scores.
        kept: launches made with this plan, see `launch.py`.
    """

    facts: Facts
    passes: PassNumbers
    walk: QueryWalk
    config: tuple[int, ...]
    count: Tensor | None
    fault: Tensor | None
    backward: "BackwardPlan | None"
    grouping: Grouping | None
    scale: float
    kept: Kept = field(default_factory=dict)


class BackwardPlan(NamedTuple):
    """The tensors and numbers of the backward's two kernels."""

    facts: Facts
    query_walk: QueryWalk
    key_walk: KeyWalk
    passes: PassNumbers
    query_config: tuple[int, ...]
    key_config: tuple[int, ...]


class DecodePlan(NamedTuple):
    """What the decode kernels need beside the tensors of a call: the last arguments of their operator."""

    counts: Tensor | None
    fault: Tensor | None
    facts: Facts
    tiles: Tensor
    rows: int
    passes: list[int]
    config: list[int]
    scale: float
    kept: Kept


T = TypeVar("T")


def _once(call: AttentionCall, kind: tuple[Any, ...], make: Callable[[], T]) -> T:
    """What all layers share that make such a call on the same queries. (A compiler traces how it is made.)"""
    if torch.compiler.is_compiling():
        return make()
    length = None if call.pseudo is None else ("pseudo", call.pseudo.length)
    sizes = (call.query.dtype, call.query.shape[1], call.query.shape[-1], call.key.shape[1], call.value.shape[-1])
    bias, mask = call.pair_bias is not None, call.attn_mask is not None
    return call.queries.remember((*kind, call.mask, call.split, bias, mask, length, call.scale, sizes), make)


def attention_plan(call: AttentionCall, folded: bool, differentiable: bool) -> AttentionPlan:
    """The plan of a call, with the configurations of the table."""

    def make() -> AttentionPlan:
        return make_plan(call, folded, configurations(call, folded), differentiable)

    return _once(call, ("attention plan", folded, differentiable), make)


def decode_plan(call: AttentionCall, folded: bool, rows: int) -> DecodePlan:
    """The plan of a call for the decode kernels, with tiles of so many rows."""

    def make() -> DecodePlan:
        by_modality = call.pair_bias is not None or folded
        return DecodePlan(
            counts(call), fault(call.layout), facts(call, by_modality), decode_tiles(call.queries, rows), rows,
            pass_numbers(call, by_modality).numbers(), decode_configuration(call), call.scale, {},
        )  # fmt: skip

    return _once(call, ("decode plan", folded, rows), make)


def make_plan(call: AttentionCall, folded: bool, chosen: Configs, differentiable: bool) -> AttentionPlan:
    """What the kernels walk; what is for the backward, only where there will be one."""
    layout, of_forward, of_query, of_keys = call.layout, *chosen
    by_modality = call.pair_bias is not None
    backward = None
    if differentiable:
        backward = BackwardPlan(
            facts=facts(call, by_modality),
            query_walk=query_walk(call, by_modality, of_query),
            key_walk=key_walk(call, by_modality, of_keys),
            passes=pass_numbers(call, by_modality),
            query_config=of_query,
            key_config=of_keys,
        )
    by_modality = by_modality or folded
    return AttentionPlan(
        facts=facts(call, by_modality),
        passes=pass_numbers(call, by_modality),
        walk=query_walk(call, by_modality, of_forward),
        config=of_forward,
        count=counts(call),
        fault=fault(layout),
        backward=backward,
        grouping=layout.grouping("modality") if folded else None,
        scale=call.scale,
    )


def pass_numbers(call: AttentionCall, by_modality: bool) -> PassNumbers:
    return PassNumbers.of(passes_of(call.layout, call.mask, call.split, by_modality), call.layout)


def facts(call: AttentionCall, by_modality: bool) -> Facts:
    layout, queries = call.layout, call.queries
    limits, positions = mask_intervals(layout, queries, call.mask, call.split, by_modality)

    def modalities() -> tuple[Tensor, Tensor]:
        real = torch.where(layout.role >= 0, layout.modality, -1)
        return queries.of(real).flatten(), real.flatten()

    rows, keys = queries.remember("modalities", modalities)
    return Facts(limits, positions, rows, keys, layout.cu_seqlens, queries.cu_seqlens)


def fault(layout: ModalityLayout) -> Tensor | None:
    """int32 ``[1]``, not 0 where outputs have to be poisoned; None where values were looked at."""
    return layout.remember("fault", lambda: None if layout.overflow is None else layout.overflow.int())


def _tiles(call: AttentionCall, by_modality: bool, blocks: tuple[int, ...], of_queries: bool) -> MaskTiles:
    return mask_tiles(
        call.layout, call.mask, blocks[0], blocks[1], call.queries, split=call.split, by_modality=by_modality,
        of_queries=of_queries, of_keys=not of_queries,
    )  # fmt: skip


def query_walk(call: AttentionCall, by_modality: bool, config: tuple[int, ...]) -> QueryWalk:
    """The key tiles of each query tile."""
    walk = _tiles(call, by_modality, config, True).queries
    assert walk is not None
    return walk


def key_walk(call: AttentionCall, by_modality: bool, config: tuple[int, ...]) -> KeyWalk:
    """The query tiles of each key tile."""
    walk = _tiles(call, by_modality, config, False).keys
    assert walk is not None
    return walk


def counts(call: AttentionCall) -> Tensor | None:
    """How many pseudo scores each query row gets, int32 ``[branches, rows]``; -1 for infinitely many. None: none."""
    if call.pseudo is None:
        return None
    layout, queries, length = call.layout, call.queries, call.pseudo.length

    def make() -> Tensor:
        real = queries.of(layout.modality).flatten() >= 0
        if length == float("inf"):
            return torch.where(real, -1, 0).int().expand(2 if call.split else 1, -1).contiguous()
        of = pseudo_counts(layout, queries, call.mask, call.split)
        left = (of.tokens if length is None else int(length)) - of.visible
        return torch.where(real, left.flatten(1).clamp(min=0), 0).int()

    return queries.remember(("counts", call.mask, call.split, length), make)


def decode_tiles(queries: QueryRows, rows: int) -> Tensor:
    """Tiles of up to `rows` query rows of a sequence, int32 ``[tiles, 3]``: sequence, first row, rows (0: no tile).

    As many as the sizes that the host knows can need: nothing waits for a device.
    """

    def make() -> Tensor:
        bounds = queries.cu_seqlens
        sequences, total = bounds.shape[0] - 1, queries.columns.numel()
        packed = len(queries.shape) == 1
        room = (total + sequences * (rows - 1)) // rows if packed else sequences * -(-queries.shape[1] // rows)
        counts = (bounds.diff() + (rows - 1)) // rows
        ends = counts.cumsum(0)
        tile = torch.arange(room, device=bounds.device)
        sequence = torch.searchsorted(ends, tile, right=True).clamp(max=sequences - 1)
        first = bounds[sequence] + (tile - (ends - counts)[sequence]) * rows
        some = torch.where(tile < ends[-1], (bounds[sequence + 1] - first).clamp(max=rows), 0)
        return torch.stack((sequence, first, some), 1).int()

    return queries.remember(("decode tiles", rows), make)


def folds(call: AttentionCall) -> bool:
    """Whether the call's key map is folded into the query, so that fused keys are never written.

    Only a map with one matrix per modality can be (scope "sequence"); it pays where keys are many: see `FOLD_FROM`.
    """
    key_map = call.key_map
    if not isinstance(key_map, ModalityMap) or not key_map.foldable:
        return False
    wide = call.query.dtype == torch.float32 and call.query.device.type == "cuda"
    if wide or max(call.key.shape[-1], call.value.shape[-1]) > MAX_FOLDED_DIM:
        return False
    keys = call.layout.num_tokens // max(call.layout.num_sequences, 1)
    return keys >= FOLD_FROM * call.layout.num_modalities * call.key.shape[-1]


def decode_rows(call: AttentionCall) -> int:
    """Query rows of a tile where the call is for the decode kernels, as far as sizes say; else 0.

    Of packed documents only the mean is known here; one with more rows takes several tiles.
    """
    sequences = call.layout.num_sequences
    if not sequences or call.query.numel() == 0 or call.layout.num_tokens <= DECODE_FROM * sequences:
        return 0
    rows = -(-call.query.shape[0] // sequences) if call.layout.packed else call.query.shape[2]
    of_tile = DECODE_TILE // (call.query_heads // call.key_heads)
    return min(rows, of_tile) if rows <= DECODE_ROWS else 0


def decode_configuration(call: AttentionCall) -> list[int]:
    """Block of keys, warps and stages of the decode kernels."""
    device = call.query.device
    if device.type != "cuda":
        return configs.INTERPRETED_DECODE.numbers()
    bits, size = torch.finfo(call.query.dtype).bits, max(call.query.shape[-1], call.value.shape[-1])
    return find(configs.DECODE, architecture(device), bits, padded(size)).numbers()


def configurations(call: AttentionCall, folded: bool) -> Configs:
    """Of the forward and of the backward's two kernels."""
    device = call.query.device
    if device.type != "cuda":
        return tuple(tuple(configs.INTERPRETED[kind].numbers()) for kind in ("forward", "query", "keys"))
    table_of, bits = architecture(device), torch.finfo(call.query.dtype).bits
    size = max(padded(call.query.shape[-1]), padded(call.value.shape[-1]))
    forward, query = configs.FORWARD, configs.BACKWARD_QUERY
    keys = configs.BACKWARD_KEYS if call.attn_mask is None else configs.MASKED_KEYS
    if pass_numbers(call, by_modality=call.pair_bias is not None).many:
        forward, query, keys = (configs.MANY[kind] for kind in ("forward", "query", "keys"))
    forward = configs.FOLDED if folded else forward if call.attn_mask is None else configs.MASKED
    tables = (forward, query, keys)
    return tuple(tuple(find(table, table_of, bits, size).numbers()) for table in tables)
