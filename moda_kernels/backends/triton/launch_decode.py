"""Launches the kernels of `kernels/decode.py`: few query rows against many keys, the keys shared between programs."""

import functools
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from moda_kernels.backends.triton import launch as of_attention
from moda_kernels.backends.triton.kernels.decode import (
    CombineTensors,
    DecodeTensors,
    attention_decode,
    attention_decode_combine,
    attention_decode_turn,
)
from moda_kernels.backends.triton.kernels.primitives import Extras
from moda_kernels.backends.triton.plan import Facts, PassNumbers
from moda_kernels.runtime.launch import float32_dots, launch, padded

#: Programs per multiprocessor that the keys are split for: side by side where registers allow it, else in turn.
PROGRAMS_PER_SM = 2
#: Programs in the interpreter, where each takes its time: enough that the keys of most tests are shared.
INTERPRETED_PROGRAMS = 16
#: Columns of a matrix that a program of the turning kernel takes, by bits: exact products fill registers sooner.
TURN_COLUMNS = {16: 32, 32: 16}


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
) -> tuple[Tensor, Tensor]:
    """Output and lse, in the shapes of `launch.forward_outputs`; arguments as of `launch.forward`, but for

    Args:
        tiles: int32 ``[tiles, 3]``: a sequence, its first query row in the tile, and how many rows of it (0: no tile).
        rows: the largest number of them. config: block of keys, warps, stages.
    """
    out, lse = decode_outputs(query, value, weights is not None)
    if out.numel() == 0 and lse.numel() == 0:
        return out, lse
    q, k, v = (of_attention.rows_contiguous(x) for x in (query, key, value))
    key_heads, split, of = k.shape[1], weights is not None, Facts(*facts)
    group, cells, branches = q.shape[1] // key_heads, tiles.shape[0] * key_heads, 2 if split else 1
    block_k, warps, stages = config
    block_r, unit = padded(rows * group), of_attention.unit_of(q, k, v, out)
    numbers = PassNumbers.read(passes)
    mask, mask_kind, mask_strides = of_attention.mask_arguments(attn_mask, q, k)
    shares = key_shares(cells * branches, k.shape[0] if k.dim() == 3 else k.shape[2], block_k, q.device)
    new = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    sums, tops = new(branches, cells, shares, block_r, v.shape[-1]), new(branches, cells, shares, 2, block_r)
    sizes = {"D": q.shape[-1], "BLOCK_D": padded(q.shape[-1]), "GROUP": group, "BLOCK_R": block_r, "UNIT": unit}
    values = {"E": v.shape[-1], "BLOCK_E": padded(v.shape[-1])}
    where = {"key_heads": key_heads, "query_length": of_attention.length_of(q), "p_tiles": tiles}
    extras = Extras(bias, mask, weights, base, decay, count, fault)
    turned = None
    if matrix is not None:
        turned = q.new_empty(numbers.modalities, cells, block_r, q.shape[-1])
        columns = TURN_COLUMNS[q.element_size() * 8]
        rounded, rest = of_attention.matrices(matrix, q)
        launch(
            attention_decode_turn, (cells, numbers.modalities, triton.cdiv(q.shape[-1], columns)), q.device,
            p_q=q, p_matrix=rounded, p_matrix_rest=rest, p_turned=turned, p_row_modality=of.row_modality,
            **of_attention.strides("q", q, unit), **where, **sizes, BLOCK_C=columns, PRECISION=float32_dots(),
            num_warps=4,
        )  # fmt: skip
    launch(
        attention_decode, (cells, shares, branches), q.device,
        DecodeTensors(q, turned, k, v, sums, tops), extras, of,
        p_modalities=of_attention.on_device(numbers.of_pass, q.device),
        **of_attention.strides("q", q, unit), **of_attention.strides("k", k, unit),
        **of_attention.strides("v", v, unit),
        **of_attention.bias_strides(bias), **mask_strides, **where, key_length=of_attention.length_of(k),
        first_passes=numbers.second, passes=numbers.passes, all_rows=of.row_modality.shape[0],
        all_keys=of.key_modality.shape[0], scale=scale * of_attention.LOG2E, **sizes, **values, BLOCK_K=block_k,
        INTERVALS=numbers.intervals, MASK=mask_kind, PRECISION=float32_dots(), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    launch(
        attention_decode_combine, (cells, rows * group), q.device,
        CombineTensors(sums, tops, out, lse), extras, of.row_modality,
        **of_attention.strides("o", out, unit), **of_attention.lse_strides("l", lse, q), **where, shares=shares,
        all_rows=of.row_modality.shape[0], UNIT=unit, **values, GROUP=group, BLOCK_R=block_r, SPLIT=split, num_warps=4,
    )  # fmt: skip
    return out, lse


def decode_outputs(query: Tensor, value: Tensor, split: bool) -> tuple[Tensor, Tensor]:
    """Room for output and lse."""
    out, _, lse = of_attention.forward_outputs(query, value, split)
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
