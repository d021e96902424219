"""The Triton backend: fused kernels on CUDA GPUs (and, for tests, in Triton's interpreter on the CPU).

`passes.py` turns rules into what kernels walk; this file takes a checked call apart, picks tile sizes and decides where
the key map goes; `operators.py` runs it.
"""

import torch
from torch import Tensor

from moda_kernels.alignment.maps import ModalityMap, align_keys
from moda_kernels.backends.triton import configs, tuning
from moda_kernels.backends.triton.operators import AttentionPlan, ModaAttention, op_attention_decode
from moda_kernels.backends.triton.passes import (
    decode_tiles,
    key_tile_lists,
    make_passes,
    pseudo_counts,
    query_tile_lists,
    row_facts,
)
from moda_kernels.call import AttentionCall
from moda_kernels.runtime import checks, gpu
from moda_kernels.runtime.launch import architecture, find, padded
from moda_kernels.tokens.layout import ModalityLayout
from moda_kernels.tokens.tiles import MAX_MODALITIES, MAX_TOKENS

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256
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


class TritonBackend:
    name = "triton"

    def serves(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def why_absent(self) -> list[str]:
        return list(gpu.why_absent())

    def why_not(self, call: AttentionCall) -> list[str]:
        reasons = call.mask.why_not_pairwise(call.layout)
        device = gpu.why_not_on(call.query.device)
        if device is not None:
            reasons.append(device)
        if call.query.dtype not in _DTYPES:
            reasons.append(f"it supports {', '.join(map(str, _DTYPES))}, got {call.query.dtype}")
        elif call.query.dtype == torch.bfloat16 and gpu.interpreted():
            reasons.append("products in bfloat16 are wrong in Triton's interpreter")
        for name, tensor in (("query and key", call.query), ("value", call.value)):
            if not 1 <= tensor.shape[-1] <= MAX_HEAD_DIM:
                reasons.append(f"it supports head sizes of {name} from 1 to {MAX_HEAD_DIM}, got {tensor.shape[-1]}")
        if call.attn_mask is not None and call.attn_mask.requires_grad:
            reasons.append("it has no gradient for attn_mask")
        if call.mask.num_roles > MAX_MODALITIES:
            reasons.append(f"it supports at most {MAX_MODALITIES} modalities, got {call.mask.num_roles}")
        longest = _longest(call.layout)
        if longest > MAX_TOKENS:
            reasons.append(f"it supports sequences of at most {MAX_TOKENS} tokens, got {longest}")
        return reasons

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        with torch.autocast(call.query.device.type, enabled=False):
            return self._attend(call)

    def _attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        layout, queries, heads = call.layout, call.queries, call.query_heads
        device = call.query.device
        base = decay = count = weights = None
        if call.pseudo is not None:
            base, decay = (_per_head(p, heads, device) for p in (call.pseudo.base, call.pseudo.decay))
            count = pseudo_counts(layout, queries, call.mask, call.split, call.pseudo.length)
        if call.split:
            weights = torch.stack([_per_head(w, heads, device) for w in call.branch_weights])

        key, key_map = call.key, call.key_map
        matrix = key_map.matrix if isinstance(key_map, ModalityMap) and key_map.foldable else None
        given = (call.query, key, call.value, matrix, call.pair_bias, base, decay, weights)
        rows = 0 if _differentiable(*given) else decode_rows(call)
        if key_map is not None and not (matrix is not None and (rows or folds(call))):
            key, matrix = align_keys(key, key_map, layout), None

        tensors = (call.query, key, call.value, matrix, call.pair_bias, base, decay, weights)
        differentiable = _differentiable(*tensors)
        folded = matrix is not None
        if rows and not differentiable:
            passes = make_passes(call.mask, call.split, call.pair_bias is not None or folded)
            facts = list(row_facts(layout, queries, passes, call.mask.window))
            fault = None if layout.overflow is None else layout.overflow.int()
            out, lse = op_attention_decode(
                *tensors, call.attn_mask, count, fault, facts, decode_tiles(queries, rows), rows, list(passes.numbers),
                decode_configuration(call), call.scale,
            )  # fmt: skip
            return out, lse
        chosen = configurations(call, folded)
        if tuning.wanted(device):

            def trial(configs: tuple[tuple[int, ...], ...], backward: bool) -> None:
                leaves = [t if t is None else t.detach().requires_grad_(backward) for t in tensors]
                with torch.set_grad_enabled(backward):
                    out, _, _ = ModaAttention.apply(
                        *leaves, call.attn_mask, make_plan(call, folded, count, configs, backward)
                    )
                if backward:
                    torch.autograd.grad(out, [t for t in leaves if t is not None], out.detach(), allow_unused=True)

            kind = (call.query.dtype, *call.query.shape[1:], *call.value.shape[1:], folded, call.split, call.mask)
            chosen = tuning.tuned(kind, chosen, differentiable, trial)
        out, lse, _ = ModaAttention.apply(
            *tensors, call.attn_mask, make_plan(call, folded, count, chosen, differentiable)
        )
        return out, lse


def make_plan(
    call: AttentionCall,
    folded: bool,
    count: Tensor | None,
    chosen: tuple[tuple[int, ...], ...],
    differentiable: bool,
) -> AttentionPlan:
    """What the kernels walk; what is for the backward, only where there will be one."""
    layout, queries, window = call.layout, call.queries, call.mask.window
    of_forward, of_query, of_keys = chosen
    passes = make_passes(call.mask, call.split, call.pair_bias is not None or folded)
    *lists, overflow = query_tile_lists(layout, queries, passes, *of_forward[:2])
    backward = make_passes(call.mask, call.split, call.pair_bias is not None)
    backward_facts: tuple[Tensor, ...] = ()
    query_lists: tuple[Tensor, ...] = ()
    key_lists: tuple[Tensor, ...] = ()
    if differentiable:
        backward_facts = row_facts(layout, queries, backward, window)
        query_lists = query_tile_lists(layout, queries, backward, *of_query[:2])[:4]
        key_lists = key_tile_lists(layout, queries, backward, *of_keys[:2])[:4]
    return AttentionPlan(
        facts=row_facts(layout, queries, passes, window),
        passes=passes.numbers,
        count=count,
        fault=None if layout.overflow is None else (layout.overflow | (overflow > 0)).int(),
        lists=tuple(lists),
        config=of_forward,
        backward_facts=backward_facts,
        backward_passes=backward.numbers,
        query_lists=query_lists,
        query_config=of_query,
        key_lists=key_lists,
        key_config=of_keys,
        grouping=layout.grouping("modality") if folded else None,
        scale=call.scale,
    )


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


def configurations(call: AttentionCall, folded: bool) -> tuple[tuple[int, ...], ...]:
    """Blocks of queries and keys, warps and stages of the forward and of the backward's two kernels."""
    device = call.query.device
    if device.type != "cuda":
        return tuple(tuple(configs.INTERPRETED[kind].numbers()) for kind in ("forward", "query", "keys"))
    capability, bits = architecture(device), torch.finfo(call.query.dtype).bits
    size = max(padded(call.query.shape[-1]), padded(call.value.shape[-1]))
    forward = configs.FORWARD if call.attn_mask is None else configs.MASKED
    tables = (configs.FOLDED if folded else forward, configs.BACKWARD_QUERY, configs.BACKWARD_KEYS)
    return tuple(tuple(find(table, capability, bits, size).numbers()) for table in tables)


def _differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _per_head(value: float | Tensor, heads: int, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.float()
    return torch.full((heads,), float(value), device=device)


def _longest(layout: ModalityLayout) -> int:
    """Tokens of the longest sequence, as far as known without waiting for a device."""
    if layout.packed and checks.looks_at_values(layout.device) and layout.num_sequences:
        return int(layout.cu_seqlens.diff().max())
    return 0 if layout.packed else layout.modality.shape[1]
