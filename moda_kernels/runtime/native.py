"""The only door to the native extension (C++ and CUDA, `csrc/`): is it there, and its functions.

The extension knows nothing of torch: it gets addresses, sizes and a stream. So everything that a tensor has to be is
checked here, and everything that it writes to, workspace included, is allocated here: on CUDA by torch on the current
stream, so that memory is reused in the right order and a call can be captured in a CUDA graph.

Each function has a PyTorch twin of the same signature and meaning (in `tokens/`), for where it cannot run.
"""

import functools
import os
import types
from typing import Any

import torch
from torch import Tensor

from moda_kernels.runtime import checks

#: Changes with the extension's functions, as in `csrc/bindings.cpp`: an old build must not be taken for a new one.
INTERFACE = 6

_extension: types.ModuleType | None = None
_missing: str | None = None  # why there is no extension
if os.environ.get("MODA_KERNELS_NATIVE", "1") == "0":
    _missing = "switched off by MODA_KERNELS_NATIVE=0"
else:
    try:
        import moda_kernels._native as _extension
    except ModuleNotFoundError:
        _missing = "not built: no C++ compiler at installation, a build that failed, or left out on purpose"
    except ImportError as error:
        _missing = f"built, but it cannot be loaded: {error}"
    else:
        if getattr(_extension, "INTERFACE", 0) != INTERFACE:
            _extension, _missing = None, "built from other sources than these: build it again"


def runs_on(device: torch.device) -> bool:
    """Whether the functions below take tensors of a device."""
    if _extension is None:
        return False
    return device.type == "cpu" or (device.type == "cuda" and not _cuda_fault(_index(device)))


def why_not(device_type: str) -> str | None:
    """Why the extension doesn't run on ``"cpu"`` or ``"cuda"`` here, in plain words; None where it does."""
    if _extension is None:
        return _missing
    if device_type == "cpu":
        return None
    if device_type != "cuda":
        return f"there is no native code for {device_type}"
    if not _extension.WITH_CUDA:
        return "built without CUDA: no CUDA compiler at installation, a build that failed, or left out on purpose"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    return _cuda_fault(torch.cuda.current_device()) or None


def build_info() -> dict[str, str]:
    """What the extension was built with, for reports. Empty where there is none."""
    if _extension is None:
        return {}
    info = {"file": str(_extension.__file__)}
    if _extension.WITH_CUDA:
        version = _extension.CUDA_RUNTIME
        info["cuda runtime"] = f"{version // 1000}.{version % 1000 // 10}, linked in"
        info["cuda architectures"] = _extension.CUDA_ARCHITECTURES
    return info


def segment_tokens(
    modality: Tensor, items: Tensor | None, cu_seqlens: Tensor, num_modalities: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `layout.segment_tokens_torch`, its twin."""
    extension, device = _loaded(), modality.device
    tokens, sequences = modality.numel(), cu_seqlens.numel() - 1
    checks.integer("num_modalities", num_modalities, 1)
    if tokens >= 2**31 - 1:
        raise checks.wrong_value("modality", "fewer than 2^31 - 1 tokens", f"{tokens}")
    modality = _checked("modality", modality, device, (tokens,))
    cu_seqlens = _checked("cu_seqlens", cu_seqlens, device, (sequences + 1,))
    if items is not None:
        items = _checked("items", items, device, (tokens,), torch.int64)

    new = functools.partial(torch.empty, dtype=torch.int32, device=device)
    segment, position, sequence, num_segments = new(tokens), new(tokens), new(tokens), new(1)
    prefix = new(tokens + 1, num_modalities)
    index, stream = _queue(device)
    workspace = new(extension.segment_tokens_workspace(tokens, num_modalities) if index >= 0 else 0)
    extension.segment_tokens(
        device=index,
        stream=stream,
        workspace=workspace.data_ptr(),
        tokens=tokens,
        sequences=sequences,
        modalities=num_modalities,
        modality=modality.data_ptr(),
        items=0 if items is None else items.data_ptr(),
        cu_seqlens=cu_seqlens.data_ptr(),
        segment=segment.data_ptr(),
        position=position.data_ptr(),
        sequence=sequence.data_ptr(),
        prefix=prefix.data_ptr(),
        num_segments=num_segments.data_ptr(),
    )
    return segment, position, sequence, prefix, num_segments


def token_facts(
    modality: Tensor, role: Tensor, sequence: Tensor, steps: Tensor | None, chunks: Tensor | None, num_roles: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `segments.token_facts_torch`, its twin; on the CPU only."""
    tokens, device = modality.numel(), modality.device
    named = (("modality", modality), ("role", role), ("sequence", sequence))
    modality, role, sequence = (_checked(name, fact, device, (tokens,)) for name, fact in named)
    given = [
        None if fact is None else _checked(name, fact, device, (tokens,), torch.int64)
        for name, fact in (("steps", steps), ("chunks", chunks))
    ]
    step, chunk = torch.empty_like(modality), torch.empty_like(modality)
    falls = torch.empty(1, dtype=torch.int32)
    _loaded().token_facts(
        tokens=tokens,
        roles=num_roles,
        modality=modality.data_ptr(),
        role=role.data_ptr(),
        sequence=sequence.data_ptr(),
        steps=0 if given[0] is None else given[0].data_ptr(),
        chunks=0 if given[1] is None else given[1].data_ptr(),
        step=step.data_ptr(),
        chunk=chunk.data_ptr(),
        falls=falls.data_ptr(),
    )
    return step, chunk, falls


def segment_table(modality: Tensor, segment: Tensor, sequence: Tensor, max_segments: int) -> Tensor:
    """See `layout.segment_table_torch`, its twin."""
    extension, device, tokens = _loaded(), modality.device, modality.numel()
    modality = _checked("modality", modality, device, (tokens,))
    segment = _checked("segment", segment, device, (tokens,))
    sequence = _checked("sequence", sequence, device, (tokens,))
    checks.integer("max_segments", max_segments, 0, 2**31 - 1)

    table = torch.empty(max_segments, 4, dtype=torch.int32, device=device)
    index, stream = _queue(device)
    extension.segment_table(
        device=index,
        stream=stream,
        tokens=tokens,
        max_segments=max_segments,
        modality=modality.data_ptr(),
        segment=segment.data_ptr(),
        sequence=sequence.data_ptr(),
        table=table.data_ptr(),
    )
    return table


def mask_intervals(
    modality: Tensor,
    role: Tensor,
    position: Tensor,
    segment: Tensor,
    step: Tensor,
    chunk: Tensor,
    sequence: Tensor,
    cu_seqlens: Tensor,
    table: Tensor,
    columns: Tensor,
    rules: list[int],
    modalities: list[int],
    own: list[int],
    intervals: int,
    window: int | None,
    window_all: bool,
) -> tuple[Tensor, Tensor]:
    """See `intervals.mask_intervals_torch`, its twin."""
    extension, device = _loaded(), modality.device
    tokens, rows, sequences, passes = modality.numel(), columns.numel(), cu_seqlens.numel() - 1, len(modalities)
    named = zip(
        ("modality", "role", "position", "segment", "step", "chunk", "sequence"),
        (modality, role, position, segment, step, chunk, sequence),
        strict=True,
    )
    facts = [_checked(name, fact, device, (tokens,)) for name, fact in named]
    cu_seqlens = _checked("cu_seqlens", cu_seqlens, device, (sequences + 1,))
    table = _checked("table", table, device, (table.shape[0], 4))
    columns = _checked("columns", columns, device, (rows,), torch.int64)

    new = functools.partial(torch.empty, dtype=torch.int32, device=device)
    limits, positions = new(limits_of(passes, intervals), rows), new(passes, tokens)
    index, stream = _queue(device)
    # Room for each role whose steps are searched, of those passes that are done at once.
    slots = min(len(rules) // max(passes, 1), extension.PASSES_AT_ONCE) if any(r & 24 for r in rules) else 0
    workspace = new(extension.mask_intervals_workspace(tokens, slots) if index >= 0 else 0)
    extension.mask_intervals(
        device=index,
        stream=stream,
        workspace=workspace.data_ptr(),
        tokens=tokens,
        rows=rows,
        sequences=sequences,
        roles=len(rules) // max(passes, 1) or 1,
        max_segments=table.shape[0],
        facts=[fact.data_ptr() for fact in facts],
        cu_seqlens=cu_seqlens.data_ptr(),
        table=table.data_ptr(),
        columns=columns.data_ptr(),
        rules=rules,
        modalities=modalities,
        own=own,
        intervals=intervals,
        window=extension.NO_WINDOW if window is None else window,
        window_all=window_all,
        limits=limits.data_ptr(),
        positions=positions.data_ptr(),
    )
    return limits, positions


def query_walk(
    limits: Tensor,
    positions: Tensor,
    real: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    capacities: list[int],
    lengths: list[int],
    blocks: list[int],
    affine: bool,
) -> tuple[Tensor, ...]:
    """See `walks.query_walk_torch`, its twin. At least one pass, and a tile on each side."""
    (q_tiles, k_tiles), passes = capacities, positions.shape[0]
    call, kept = _walk_call(limits, positions, cu_q, cu_k, capacities, lengths, blocks, of_keys=False)
    real = _checked("real", real, limits.device, (limits.shape[1],), torch.bool, like="limits")
    new = functools.partial(torch.empty, dtype=torch.int32, device=limits.device)
    tiles, order = new(q_tiles, 3), new(q_tiles)
    runs, key_lists = new(passes * call["intervals"], q_tiles, 8), new(passes, 2 * k_tiles + 1)
    _loaded().query_walk(
        **call,
        real=real.data_ptr(),
        affine=affine,
        tiles=tiles.data_ptr(),
        order=order.data_ptr(),
        runs=runs.data_ptr(),
        key_lists=key_lists.data_ptr(),
    )
    del kept
    return tiles, order, runs, key_lists


def key_walk(
    limits: Tensor,
    positions: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    capacities: list[int],
    lengths: list[int],
    blocks: list[int],
    chains: int,
) -> tuple[Tensor, ...]:
    """See `walks.key_walk_torch`, its twin. At least one pass, and a tile on each side."""
    q_tiles, k_tiles = capacities
    call, kept = _walk_call(limits, positions, cu_q, cu_k, capacities, lengths, blocks, of_keys=True)
    walks = call["passes"] * call["intervals"]
    new = functools.partial(torch.empty, dtype=torch.int32, device=limits.device)
    tiles, order = new(k_tiles, 3), new(k_tiles)
    runs, query_lists = new(walks, k_tiles, 4 * chains + 4), new(walks, q_tiles + 1)
    _loaded().key_walk(
        **call,
        chains=chains,
        tiles=tiles.data_ptr(),
        order=order.data_ptr(),
        runs=runs.data_ptr(),
        query_lists=query_lists.data_ptr(),
    )
    del kept
    return tiles, order, runs, query_lists


def _walk_call(
    limits: Tensor,
    positions: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    capacities: list[int],
    lengths: list[int],
    blocks: list[int],
    of_keys: bool,
) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    """What both walks tell the extension, and the tensors whose addresses are in it."""
    extension, device = _loaded(), limits.device
    rows, sequences = checks.tensor("limits", limits).shape[-1], cu_k.numel() - 1
    passes, tokens = positions.shape
    for name, of in (("limits", rows), ("positions", tokens)):
        if of >= 2**31 - 1:
            raise checks.wrong_value(name, "fewer than 2^31 - 1 tokens", f"{of}")
    intervals, limits = _limits(limits, device, passes, rows)
    positions = _checked("positions", positions, device, (passes, tokens), like="limits")
    cu_q = _checked("cu_q", cu_q, device, (sequences + 1,), like="limits")
    cu_k = _checked("cu_k", cu_k, device, (sequences + 1,), like="limits")
    index, stream = _queue(device)
    size = extension.walk_workspace(passes, passes * intervals, *capacities, of_keys) if index >= 0 else 0
    workspace = torch.empty(size, dtype=torch.int32, device=device)
    call = {
        "device": index,
        "stream": stream,
        "workspace": workspace.data_ptr(),
        "passes": passes,
        "intervals": intervals,
        "sequences": sequences,
        "rows": rows,
        "tokens": tokens,
        "limits": limits.data_ptr(),
        "positions": positions.data_ptr(),
        "queries": (cu_q.data_ptr(), lengths[0], blocks[0], capacities[0]),
        "keys": (cu_k.data_ptr(), lengths[1], blocks[1], capacities[1]),
    }
    return call, (limits, positions, cu_q, cu_k, workspace)


def limits_of(passes: int, intervals: int) -> int:
    """How many limits a row has, of `tokens.intervals.Intervals`: all second intervals share their lower ones."""
    return 2 * passes if intervals == 1 else 1 + 3 * passes


def intervals_of(limits: Tensor, passes: int) -> int:
    """How many intervals a row may have in a pass."""
    return 1 if limits.shape[0] == limits_of(passes, 1) else 2


def _limits(limits: Tensor, device: torch.device, passes: int, rows: int) -> tuple[int, Tensor]:
    """Limits of `tokens.intervals.Intervals`, and how many intervals they are of."""
    intervals = intervals_of(limits, passes)
    shape = (limits_of(passes, intervals), rows)
    return intervals, _checked("limits", limits, device, shape, like="limits")


def plan_attention(
    limits: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    passes: tuple[int, int],
    costs: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """See `backends.cpu.twin.plan_attention`, its twin."""
    extension = _loaded()
    arguments, _kept = _plan_arguments(limits, positions, cu_seqlens, cu_seqlens_q, passes, costs)
    calls, indices = extension.plan_attention(arguments)
    # An empty buffer is no buffer.
    made = [
        torch.frombuffer(x, dtype=torch.int32) if x else torch.empty(0, dtype=torch.int32, device="cpu")
        for x in (calls, indices)
    ]
    return made[0].view(-1, extension.CALL_FIELDS), made[1]


def plan_masks(
    limits: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    passes: tuple[int, int],
    calls: Tensor,
    indices: Tensor,
    sizes: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """See `backends.cpu.twin.plan_masks`, its twin."""
    extension = _loaded()
    arguments, _kept = _plan_arguments(limits, positions, cu_seqlens, cu_seqlens_q, passes, (0,) * 8)
    masks, hidden = (torch.empty(n, dtype=torch.bool, device="cpu") for n in sizes)
    calls = _checked("calls", calls, calls.device, (calls.shape[0], extension.CALL_FIELDS))
    indices = _checked("indices", indices, calls.device, tuple(indices.shape))
    addresses = [t.data_ptr() for t in (calls, indices, masks, hidden)]
    extension.plan_masks(arguments, calls.shape[0], *addresses)
    return masks, hidden


def _plan_arguments(
    limits: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    passes: tuple[int, int],
    costs: tuple[int, ...],
) -> tuple[tuple[object, ...], list[Tensor]]:
    """What the extension takes, and the tensors to keep until it has been called."""
    device, sequences = positions.device, cu_seqlens.numel() - 1
    number, tokens = positions.shape
    rows = limits.shape[-1]
    intervals, limits = _limits(limits, device, number, rows)
    kept = [
        limits,
        _checked("positions", positions, device, (number, tokens)),
        _checked("cu_seqlens", cu_seqlens, device, (sequences + 1,)),
        _checked("cu_seqlens_q", cu_seqlens_q, device, (sequences + 1,)),
    ]
    if not 0 <= passes[0] <= passes[1] <= number:
        raise checks.wrong_value("passes", f"a range within the {number} passes", passes)
    sizes = (tokens, rows, sequences)
    addresses = tuple(t.data_ptr() for t in kept)
    return (sizes, (number, *passes, intervals), addresses, costs), kept


def _loaded() -> types.ModuleType:
    if _extension is None:
        raise RuntimeError(f"moda_kernels: there is no native extension: {_missing}")
    return _extension


def _checked(
    name: str,
    value: Tensor,
    device: torch.device,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.int32,
    like: str = "modality",
) -> Tensor:
    """A contiguous tensor of this dtype, shape and device; its caller keeps it until the extension has been called."""
    if checks.tensor(name, value).dtype != dtype:
        raise checks.wrong_type(name, f"a tensor of {dtype}", value)
    checks.shape(name, value, shape, "a flat tensor,")
    checks.same_device(name, value, device, like)
    return value.contiguous()


def _queue(device: torch.device) -> tuple[int, int]:
    """The CUDA device and the stream to work on; (-1, 0) for the CPU."""
    if device.type != "cuda":
        return -1, 0
    return _index(device), torch.cuda.current_stream(device).cuda_stream


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _cuda_fault(index: int) -> str:
    """Why the extension doesn't run on a CUDA device, or "": no CUDA half, no code for this GPU, too old a driver."""
    return str(_loaded().cuda_probe(index))
