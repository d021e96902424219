"""Launches the kernels of `kernels/decode.py`: few query rows against many keys, the keys shared between programs."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moda_kernels.backends.triton import configs, launch
from moda_kernels.backends.triton.kernels.decode import (
    CombineTensors,
    DecodeTensors,
    attention_decode,
    attention_decode_combine,
    attention_decode_turn,
)
from moda_kernels.backends.triton.kernels.primitives import Extras
from moda_kernels.backends.triton.plan import Facts, Kept, PassNumbers
from moda_kernels.runtime.launch import Ready, float32_dots, padded

#: Programs per multiprocessor that the keys are split for: side by side where registers allow it, else in turn.
PROGRAMS_PER_SM = 2
#: Programs in the interpreter, where each takes its time: enough that the keys of most tests are shared.
INTERPRETED_PROGRAMS = 16
#: Columns of a matrix that a program of the turning kernel takes, by bits: exact products fill registers sooner.
TURN_COLUMNS = {16: 32, 32: 16}


class _Launches(NamedTuple):
    """Of one call, and the sizes of what its programs share. turn: of a call with a key map."""

    turn: Ready | None
    walk: Ready
    combine: Ready
    cells: int
    shares: int
    block_r: int
    modalities: int


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    matrix: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    decay: Tensor | None,
    weights: Tensor | None,
    attn_mask: Tensor | None,
    count: Tensor | None,
    fault: Tensor | None,
    facts: Sequence[Tensor],
    tiles: Tensor,
    rows: int,
    passes: Sequence[int],
    config: Sequence[int],
    scale: float,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and lse, in the shapes of `launch.forward_outputs`; arguments as of `launch.forward`, but for

    Args:
        tiles: int32 ``[tiles, 3]``: a sequence, its first query row in the tile, and how many rows of it (0: no tile).
        rows: the largest number of them. config: block of keys, warps, stages.
    """
    out, lse = decode_outputs(query, value, weights is not None)
    if out.numel() == 0 and lse.numel() == 0:
        return out, lse
    q, k, v = launch.rows_contiguous(query), launch.rows_contiguous(key), launch.rows_contiguous(value)
    extras = Extras(bias, launch.as_bytes(attn_mask), weights, base, decay, count, fault)
    kind = ("decode", launch.kinds(q, k, v, bias, attn_mask), launch.which(extras), matrix is None, float32_dots())
    kept = {} if kept is None else kept
    if kind not in kept:
        kept[kind] = _launches(
            q, k, v, out, lse, bias, attn_mask, facts, tiles, rows, PassNumbers.read(passes), config, scale,
            matrix is not None, weights is not None,
        )  # fmt: skip
    turn, walk, combine, cells, shares, block_r, modalities = kept[kind]
    branches = 1 if weights is None else 2
    sums = torch.empty((branches, cells, shares, block_r, v.shape[-1]), dtype=torch.float32, device=q.device)
    tops = torch.empty((branches, cells, shares, 2, block_r), dtype=torch.float32, device=q.device)
    turned = None
    if turn is not None:
        turned = q.new_empty(modalities, cells, block_r, q.shape[-1])
        turn(q, *launch.matrices(matrix, q), turned)
    walk(DecodeTensors(q, turned, k, v, sums, tops), extras)
    combine(CombineTensors(sums, tops, out, lse), extras)
    return out, lse


def _launches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    facts: Sequence[Tensor],
    tiles: Tensor,
    rows: int,
    numbers: PassNumbers,
    config: Sequence[int],
    scale: float,
    mapped: bool,
    split: bool,
) -> _Launches:
    block_k, warps, stages = config
    key_heads, of = k.shape[1], Facts(*facts)
    group, cells, branches = q.shape[1] // key_heads, tiles.shape[0] * key_heads, 2 if split else 1
    block_r, unit, columns = padded(rows * group), launch.unit_of(q, k, v, out), TURN_COLUMNS[q.element_size() * 8]
    shares = key_shares(cells * branches, k.shape[0] if k.dim() == 3 else k.shape[2], block_k, q.device)
    given = {
        "facts": of, "p_row_modality": of.row_modality, "p_tiles": tiles,
        "p_modalities": launch.on_device(numbers.of_pass, q.device),
        **launch.strides("q", q, unit), **launch.strides("k", k, unit), **launch.strides("v", v, unit),
        **launch.strides("o", out, unit), **launch.lse_strides("l", lse, q), **launch.bias_strides(bias),
        **launch.mask_numbers(attn_mask, q, k), "scale": scale * launch.LOG2E, "key_heads": key_heads,
        "query_length": launch.length_of(q), "key_length": launch.length_of(k), "shares": shares,
        "first_passes": numbers.second, "passes": numbers.passes, "all_rows": of.row_modality.shape[0],
        "all_keys": of.key_modality.shape[0], "INTERVALS": numbers.intervals, "SPLIT": split,
        "D": q.shape[-1], "BLOCK_D": padded(q.shape[-1]), "E": v.shape[-1], "BLOCK_E": padded(v.shape[-1]),
        "UNIT": unit, "GROUP": group, "BLOCK_R": block_r, "BLOCK_K": block_k, "BLOCK_C": columns,
        "PRECISION": float32_dots(),
    }  # fmt: skip
    of_calls, around = ("tensors", "extras"), vars(configs.AROUND_DECODE)
    grid = cells, numbers.modalities, triton.cdiv(q.shape[-1], columns)
    of_map = "p_q", "p_matrix", "p_matrix_rest", "p_turned"
    return _Launches(
        Ready(attention_decode_turn, grid, q.device, of_map, given, **around) if mapped else None,
        Ready(
            attention_decode, (cells, shares, branches), q.device, of_calls, given, num_warps=warps, num_stages=stages
        ),
        Ready(attention_decode_combine, (cells, rows * group), q.device, of_calls, given, **around),
        cells, shares, block_r, numbers.modalities,
    )  # fmt: skip


def decode_outputs(query: Tensor, value: Tensor, split: bool) -> tuple[Tensor, Tensor]:
    """Room for output and lse."""
    out, _, lse = launch.forward_outputs(query, value, split)
    return out, lse


def key_shares(programs: int, keys: int, block_k: int, device: torch.device) -> int:
    """How many programs share the keys of a tile: as many as the GPU has room for, each with a key tile at least.

    Args:
        programs: without sharing. keys: of a sequence, or a bound of it (packed: of all documents; shares that a short
            document leaves empty end at once).
    """
    return max(1, min(_programs(device) // max(programs, 1), -(-keys // block_k)))


@functools.cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return PROGRAMS_PER_SM * int(torch.cuda.get_device_properties(device).multi_processor_count)
