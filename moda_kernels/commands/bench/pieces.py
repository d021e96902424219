"""The parts around attention, each alone: segmentation, tiles, both together, FlexAttention's block mask from our
intervals and from its own builder (both with a layout each), and the alignment of keys.

On CUDA they are replayed from a captured graph, as in a captured training step: device time without launches. Each is
checked before it is timed: layouts and lists against the PyTorch twins on the CPU, aligned keys against float64.
"""

import dataclasses
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moda_kernels import align_keys
from moda_kernels.commands.bench import clock, results, runner
from moda_kernels.commands.bench.cases import Case
from moda_kernels.commands.bench.layouts import TILE
from moda_kernels.commands.bench.oracle import align
from moda_kernels.commands.bench.peers.moda import concat_map
from moda_kernels.commands.bench.results import Record
from moda_kernels.testing import Comparison, Result, compare
from moda_kernels.tokens import blocks
from moda_kernels.tokens.intervals import Intervals, mask_intervals
from moda_kernels.tokens.layout import ModalityLayout
from moda_kernels.tokens.mask import ModularMask
from moda_kernels.tokens.segments import segment_table_torch, segment_tokens_torch
from moda_kernels.tokens.tiles import MaskTiles, mask_tiles
from moda_kernels.tokens.walks import CHAINS, KeyWalk, QueryWalk, key_walk_torch, query_walk_torch, tile_sizes

#: The alignment's pass is named by its scope. "Tile lists" is all of `MaskTiles`: so result files name it.
PIECES = (
    "segmentation", "tiles", "segmentation + tiles", "block mask, ours", "block mask, create_block_mask",
    "alignment (sequence)", "alignment (causal)",
)  # fmt: skip
#: Longest sequence for which `create_block_mask` is asked: uncompiled it holds L×L tensors.
LONGEST_DENSE = 8192


@dataclass(frozen=True)
class Piece:
    """Something to time: the work, and what is wrong with its results (None: nothing)."""

    work: Callable[[], Any]
    fault: Callable[[Any], str | None]


def run(cases: list[Case], options: runner.Options, tell: Callable[[str], None]) -> Iterator[list[Record]]:
    """Records as `runner.run`, the contestant being the piece, "moda"."""
    environments: dict[str, Record] = {}
    for case in cases:
        tell(f"pieces: {case.layout}, L = {case.length}, {case.dtype_name}")
        environment = environments.setdefault(case.device, results.environment(case.device, options.commit))
        yield run_case(case, options, environment, tell)


def run_case(
    case: Case, options: runner.Options, environment: Record, tell: Callable[[str], None] = lambda _: None
) -> list[Record]:
    """One record a piece."""
    records: dict[str, Record] = {}
    entries: dict[str, runner._Entry] = {}
    timer = clock.clock_for(case.device)
    common = {
        "schema": results.SCHEMA,
        "device": case.device,
        "run": None,
        "workload": case.workload.describe() | {"seed": case.seed},
        "dtype": case.dtype_name,
        "query_heads": case.query_heads,
        "key_heads": case.key_heads,
        "head_dim": case.head_dim,
        "contestant": "moda",
    }
    for name, piece in pieces(case).items():
        record = common | {"pass": name, "graph": False, "status": "ok", "reason": None}
        try:
            with torch.no_grad():
                found = piece.work()
                work, record["graph"], record["reason"] = captured(piece.work, case.device)
            fault = piece.fault(found)
        except Exception as error:  # recorded: the others go on
            record |= {"status": "failed", "reason": runner._fault(error)}
        else:
            if fault is None:
                entries[name] = runner._Entry(
                    lambda w=work: timer.spans(lambda _: w()),  # type: ignore[misc]
                    options.rounds,
                    options.seconds / len(PIECES),
                )
            else:
                record |= {"status": "wrong", "reason": fault}
        if record["status"] != "ok":
            tell(f"  {name} is left out ({record['status']}): {record['reason']}")
        records[name] = record
    with torch.no_grad():
        runner._rounds(list(entries.values()), random.Random(options.seed))
    for name, entry in entries.items():
        if entry.fault is None:
            records[name]["ms"] = results.spread([sample[0] for sample in entry.samples])
        else:
            records[name] |= {"status": "failed", "reason": entry.fault}
    last = {"threads": torch.get_num_threads(), "rounds": options.rounds, "seconds": options.seconds}
    return [record | last | {"environment": environment} for record in records.values()]


def pieces(case: Case) -> dict[str, Piece]:
    """Those of a case."""
    workload, layout = case.workload, case.workload.layout
    made: dict[str, Piece] = {"segmentation": Piece(workload.segment, lambda found: _segments_fault(case, found))}
    queries = layout.queries()
    made["tiles"] = Piece(
        lambda: mask_tiles(layout, workload.mask, *TILE, dataclasses.replace(queries)),  # which remember nothing
        lambda found: _tiles_fault(case, found),
    )

    def both() -> tuple[Any, Any]:
        fresh = workload.segment()
        return fresh, mask_tiles(fresh, workload.mask, *TILE)

    made["segmentation + tiles"] = Piece(
        both, lambda found: _segments_fault(case, found[0]) or _tiles_fault(case, found[1])
    )
    for name, make in (("ours", _block_mask), ("create_block_mask", _their_block_mask)):
        if make is _block_mask or case.length <= LONGEST_DENSE:
            made[f"block mask, {name}"] = Piece(
                lambda make=make: make(workload.segment(), workload.mask),  # type: ignore[misc]
                lambda found: _block_mask_fault(case, found),
            )
    tensors = case.tensors()
    key, weight = tensors["key"], tensors["weight"]
    own = key[0].transpose(0, 1).contiguous() if workload.packed else key
    for scope in ("sequence", "causal"):
        made[f"alignment ({scope})"] = Piece(
            lambda scope=scope: align_keys(own, concat_map(own, weight, layout, scope), layout),  # type: ignore[misc]
            lambda found, scope=scope: _keys_fault(case, key, weight, found, scope),  # type: ignore[misc]
        )
    return made


def _block_mask(layout: ModalityLayout, mask: ModularMask) -> Any:
    return mask.to_block_mask(layout)


def _their_block_mask(layout: ModalityLayout, mask: ModularMask) -> Any:
    """FlexAttention's own builder, on the same `mask_mod`."""
    from torch.nn.attention.flex_attention import create_block_mask

    mask_mod = blocks.mask_mod(blocks.readings(blocks.sight(layout, layout.queries(), mask)))
    batch, length = layout.modality.view(-1, layout.modality.shape[-1]).shape
    return create_block_mask(mask_mod, batch, None, length, length, device=str(layout.device))


def captured(work: Callable[[], Any], device: str) -> tuple[Callable[[], Any], bool, str | None]:
    """Its replay from a CUDA graph and True; or, where there are none, the work itself, False, and why."""
    if device == "cpu":
        return work, False, None
    try:
        return _captured(work), True, None
    except Exception as error:
        torch.cuda.synchronize()
        return work, False, f"not captured in a graph: {runner._fault(error)}"


def _captured(work: Callable[[], Any]) -> Callable[[], Any]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warmed up where it is captured
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = work()
    kept = [made]  # the graph writes into it

    def replay() -> Any:
        graph.replay()
        return kept[0]

    return replay


def _segments_fault(case: Case, found: Any) -> str | None:
    """Against the twins in PyTorch, on the CPU."""
    w = case.workload
    ids = w.ids.flatten().cpu()
    items = None if w.items is None else w.items.flatten().long().cpu()
    bounds = torch.tensor([0, case.length], dtype=torch.int32) if w.cu_seqlens is None else w.cu_seqlens.cpu()
    segment, position, sequence, prefix, count = segment_tokens_torch(ids, items, bounds, found.num_modalities)
    table = segment_table_torch(ids, segment, sequence, found.max_segments)
    facts = (found.segment, found.position, found.sequence, found.prefix, found.num_segments, found.table)
    names = ("segment", "position", "sequence", "prefix", "num_segments", "table")
    right = (segment, position, sequence, prefix, count, table)
    wrong = [n for n, a, b in zip(names, facts, right, strict=True) if not torch.equal(a.cpu().view(b.shape), b)]
    return f"other {', '.join(wrong)} than PyTorch's" if wrong else None


def _tiles_fault(case: Case, found: MaskTiles) -> str | None:
    layout, mask = case.workload.layout.to("cpu"), case.workload.mask
    queries, shape = layout.queries(), tuple(layout.modality.shape)
    intervals = mask_intervals(layout, queries, mask)
    bounds = (queries.cu_seqlens, layout.cu_seqlens)
    sizes = (*tile_sizes(queries.shape, shape, layout.cu_seqlens, *TILE), list(TILE))
    real, affine = layout.modality.flatten() >= 0, len(intervals.positions) == 1
    right = (
        *intervals,
        *query_walk_torch(*intervals, real, *bounds, *sizes, affine),
        *key_walk_torch(*intervals, *bounds, *sizes, CHAINS),
    )
    assert found.queries is not None and found.keys is not None
    names: tuple[str, ...] = Intervals._fields
    names += tuple(f"{n} of queries" for n in QueryWalk._fields) + tuple(f"{n} of keys" for n in KeyWalk._fields)
    made = (*found[:2], *found.queries, *found.keys)
    wrong = [n for n, a, b in zip(names, made, right, strict=True) if not torch.equal(a.cpu(), b)]
    return f"other {', '.join(wrong)} than PyTorch's" if wrong else None


def _block_mask_fault(case: Case, found: Any) -> str | None:
    """Against the mask written out, one tile of queries at a time."""
    layout, mask = case.workload.layout.to("cpu"), case.workload.mask
    queries, (size_q, size_k) = layout.queries(), found.BLOCK_SIZE
    lists = [x.cpu() for x in (found.kv_num_blocks, found.kv_indices, found.full_kv_num_blocks, found.full_kv_indices)]
    batch, of_q = lists[0].shape[0], lists[0].shape[2]
    for i in range(of_q):
        cut = slice(i * size_q, (i + 1) * size_q)
        columns = queries.columns[..., cut]
        rows = dataclasses.replace(queries, shape=tuple(columns.shape), columns=columns)
        seen = mask.visible_to(layout, rows).view(batch, columns.shape[-1], -1)
        keys = seen.shape[2]
        seen = F.pad(seen, (0, -keys % size_k, 0, size_q - seen.shape[1])).unflatten(2, (-1, size_k))
        met, full = seen.any(3).any(1), seen.all(3).all(1)
        for right, count, listed in ((met & ~full, *lists[:2]), (full, *lists[2:])):
            for b in range(batch):
                if right[b].nonzero().flatten().tolist() != listed[b, 0, i, : int(count[b, 0, i])].tolist():
                    return f"other tiles than the mask has, in row {i} of them"
    return None


def _keys_fault(case: Case, key: Tensor, weight: Tensor, found: Tensor, scope: str) -> str | None:
    """Aligned keys against the definition in float64, as an attention output is judged."""
    found = found.transpose(0, 1)[None] if case.workload.packed else found
    layout = case.workload.layout
    exact, eager = (
        Result({"keys": align(k, weight.to(torch.float64) if k.dtype == torch.float64 else weight, layout, scope)})
        for k in (key.double(), key)
    )
    comparisons: list[Comparison] = compare(Result({"keys": found}), exact, eager, case.dtype)
    wrong = [str(c) for c in comparisons if not c.good]
    return "; ".join(wrong) or None
