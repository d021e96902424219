"""The backend "flex": PyTorch's FlexAttention under block masks that are made from intervals.

A second engine that shares no code with ours, on NVIDIA, AMD and Intel GPUs, forward and backward; on the CPU its
compiled forward. This file takes a checked call apart; `tokens/blocks.py` makes the masks, `engine.py` calls the
engine. Keys are aligned first (written out); split attention is two calls; pseudo scores join through lse, which is
differentiable; biases and masks of scores are a `score_mod`.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor

from moda_kernels import reference
from moda_kernels.alignment.maps import align_keys
from moda_kernels.backends.flex import engine, options
from moda_kernels.call import AttentionCall
from moda_kernels.products.twin import compute_dtype
from moda_kernels.tokens.blocks import BlockLists, Readings, block_lists, in_columns, readings, sight
from moda_kernels.tokens.intervals import passes_of

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_DEVICES = ("cuda", "xpu", "cpu")
#: What the engine's Triton kernels take; smaller heads get zeros.
LEAST_HEAD_DIM, MOST_HEAD_DIM = 16, 256
#: And where a block has so much shared memory: the engine's tiles of such heads (64 rows, 3 stages of 32 keys).
WIDE_HEAD_DIM, WIDE_SHARED = 512, 192 * 1024


class FlexBackend:
    name = "flex"

    def serves(self, device: torch.device) -> bool:
        return device.type in ("cuda", "xpu")

    def why_absent(self) -> list[str]:
        if engine.is_uncompiled():
            reason = engine.why_not_uncompiled()
            return [] if reason is None else [reason]
        return list(engine.why_absent())

    def why_not(self, call: AttentionCall) -> list[str]:
        if engine.is_uncompiled():
            return []
        reasons = []
        device, flash = call.query.device.type, options.is_flash(options.current())
        if device not in _DEVICES:
            reasons.append(f"FlexAttention runs on {', '.join(_DEVICES)}, the tensors are on {call.query.device}")
        if call.query.dtype not in _DTYPES:
            reasons.append(f"FlexAttention supports {', '.join(map(str, _DTYPES))}, got {call.query.dtype}")
        wanting = _wanting(call)
        if device == "cpu":
            if not engine.compiles_on_cpu():
                reasons.append("FlexAttention's C++ kernels need an x86 CPU with AVX2, and Linux")
            if wanting:
                reasons.append(
                    f"FlexAttention has no backward on the CPU, and gradients are wanted of {', '.join(wanting)}: use "
                    "backend 'cpu'"
                )
            if flash:
                reasons.append("BACKEND='FLASH' of FlexAttention runs on CUDA")
            if torch.compiler.is_compiling():
                said = {
                    "lse": call.return_lse,
                    "pseudo": call.pseudo is not None,
                    "attn_mask": call.attn_mask is not None,
                }
                asked = [name for name, there in said.items() if there]
                if asked:
                    reasons.append(f"inside torch.compile FlexAttention has no {', '.join(asked)} on the CPU")
            return reasons
        most = _most_head_dim(call.query.device)
        for name, tensor in (("query and key", call.query), ("value", call.value)):
            if tensor.shape[-1] > most:
                reasons.append(
                    f"FlexAttention takes head sizes of {name} up to {most} on this device, got {tensor.shape[-1]}"
                )
        if flash:
            reasons += engine.why_not_flash(call.query.device)
            if call.query.dtype == torch.float32:
                reasons.append(
                    "BACKEND='FLASH' of FlexAttention supports torch.bfloat16, torch.float16, got torch.float32"
                )
            tables = [name for name in wanting if name in ("pair_bias", "attn_mask")]
            if tables:
                reasons.append(f"BACKEND='FLASH' of FlexAttention has no gradient for {' and '.join(tables)}")
        return reasons

    def check_options(self, given: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
        """As `options.check`."""
        return options.check("use_backend", given)

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        with torch.autocast(call.query.device.type, enabled=False):
            if 0 in (call.query.numel(), call.key.numel(), call.value.numel()):  # nothing for an engine
                out, lse = reference.attend(call)
            else:
                out, lse = self._attend(call)
        return call.poisoned(out), call.poisoned(lse)

    def _attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        layout, wide = call.layout, compute_dtype(call.query)
        key = call.key if call.key_map is None else align_keys(call.key, call.key_map, layout)
        q, k, v = (x.transpose(0, 1)[None] if layout.packed else x for x in (call.query, key, call.value))
        scale, value_dim = call.scale, v.shape[-1]
        if scale <= 0:  # engines take maxima before they scale
            q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
        if q.device.type != "cpu":
            q, k, v = (F.pad(x, (0, max(LEAST_HEAD_DIM - x.shape[-1], 0))) for x in (q, k, v))
        facts = _facts(call)
        rows, keys = (x[:, None, :, None] < 0 for x in (facts.row_modality, facts.key_modality))
        q, k, v = q.masked_fill(rows, 0), k.masked_fill(keys, 0), v.masked_fill(keys, 0)
        terms, form = _terms(call, facts, scale)

        def part(branch: int, same: bool | None) -> tuple[Tensor, Tensor]:
            """One softmax, as `AttentionCall.log_pseudo` has them."""
            read, lists = _masks(call, branch, form.block_size)
            out, lse = engine.run(q, k, v, engine.Terms(read, lists, *terms), form)
            out = out if out.shape[-1] == value_dim else out[..., :value_dim]
            if lse is None:
                return out, out.new_empty(out.shape[:-1], dtype=wide)
            if call.pseudo is not None:
                out, lse = _with_pseudo(out, lse, call.log_pseudo(same))
            return out, lse

        return call.merged([part(0, True), part(1, False)] if call.split else [part(0, None)])


@functools.cache
@torch.compiler.assume_constant_result
def _most_head_dim(device: torch.device) -> int:
    if device.type != "cuda" or torch.version.hip is not None:
        return MOST_HEAD_DIM
    shared = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    return WIDE_HEAD_DIM if shared >= WIDE_SHARED else MOST_HEAD_DIM


def _wanting(call: AttentionCall) -> list[str]:
    """What the engine would have to give a gradient to. (Pseudo scores and weights join behind it.)"""
    if not torch.is_grad_enabled():
        return []
    named: dict[str, Any] = {name: getattr(call, name) for name in ("query", "key", "value", "pair_bias", "attn_mask")}
    if call.key_map is not None:
        inside = pytree.tree_leaves(list(vars(call.key_map).values()))
        named["key_map"] = next((x for x in inside if isinstance(x, Tensor) and x.requires_grad), None)
    return [name for name, x in named.items() if isinstance(x, Tensor) and x.requires_grad]


class _Facts(NamedTuple):
    """int32 ``[B, Lq or Lk]`` (packed: a batch of one); modalities -1 for padding."""

    row_modality: Tensor
    row_sequence: Tensor
    key_modality: Tensor


def _facts(call: AttentionCall) -> _Facts:
    layout, queries = call.layout, call.queries

    def make() -> _Facts:
        real = torch.where(layout.role >= 0, layout.modality, -1)
        facts = queries.of(real), queries.of(layout.sequence, 0), real
        return _Facts(*(x[None] if layout.packed else x for x in facts))

    return queries.remember("flex facts", make)


def _terms(
    call: AttentionCall, facts: _Facts, scale: float
) -> tuple[tuple[engine.Bias | None, Tensor | None], engine.Form]:
    """What both softmaxes of a call share beside tensors: bias and attn_mask, and what code depends on."""
    wide, chosen = compute_dtype(call.query), options.current()
    bias = None
    if call.pair_bias is not None:
        table = call.pair_bias.to(wide).expand(call.layout.num_sequences, call.query_heads, -1, -1).contiguous()
        row_modality, row_sequence, key_modality = facts
        bias = engine.Bias(table, row_sequence, row_modality.clamp(min=0), key_modality.clamp(min=0))
    attn_mask = call.attn_mask
    mask_axes: tuple[bool, ...] = ()
    if attn_mask is not None:
        attn_mask = attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(wide)
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        mask_axes = tuple(size != 1 for size in attn_mask.shape)
        if not any(mask_axes):  # one number for all: one for each head, since what is read has to have a place
            attn_mask, mask_axes = attn_mask.expand(-1, call.query_heads, -1, -1), (False, True, False, False)
        attn_mask = attn_mask[tuple(slice(None) if own else 0 for own in mask_axes)].contiguous()
    size = options.block_size(chosen, call.query.device)
    wants_lse = call.return_lse or call.pseudo is not None
    cap = None if call.softcap is None else repr(call.softcap)
    return (bias, attn_mask), engine.Form(mask_axes, scale, cap, size, options.for_kernels(chosen), wants_lse)


def _masks(call: AttentionCall, branch: int, block_size: tuple[int, int]) -> tuple[Readings, BlockLists]:
    """Who sees whom in one softmax; made once per layout and mask, shared by all layers."""
    layout, queries, mask, device = call.layout, call.queries, call.mask, call.query.device
    made = passes_of(layout, mask, call.split)
    ends = (0, made.second, len(made.passes))[branch : branch + 2]
    # On Blackwell the FLASH engine packs intervals of columns; whether there are any, one has to wait for.
    packs = options.is_flash(options.current()) and options.is_blackwell(device) and _may_wait(device)

    def make() -> tuple[Readings, BlockLists]:
        seen = sight(layout, queries, mask, call.split).of(*ends)
        lists = block_lists(seen, *block_size)
        columns = in_columns(seen) if packs else None
        return readings(seen if columns is None else columns), lists

    return queries.remember(("flex", made, mask.window, mask.window_on, branch, block_size, packs), make)


def _may_wait(device: torch.device) -> bool:
    return not torch.compiler.is_compiling() and not (
        device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    )


def _with_pseudo(out: Tensor, lse: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
    """Output and lse with one more term, of log `extra`, in the softmax's sum."""
    nothing, none = lse == -math.inf, extra == -math.inf
    more = torch.where(nothing | none, 0, lse) - torch.where(nothing | none, 0, extra)
    # By its log: where a sigmoid is almost 1, its gradient has no digits.
    log_share = F.logsigmoid(more)
    total = torch.where(none, lse, torch.where(nothing, extra, lse.masked_fill(nothing, 0) - log_share))
    share = torch.where(nothing | none, 0, log_share).exp()  # a row that sees nothing has an output of 0 already
    return (out * share[..., None]).to(out.dtype), total
