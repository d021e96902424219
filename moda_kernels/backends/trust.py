"""Whether the Triton kernels of a call are trusted where it runs: their trial, against the reference.

A trial is a small call with the features of the one that is asked about, so that it compiles what that would compile.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moda_kernels import reference
from moda_kernels.alignment.maps import ModalityMap
from moda_kernels.backends.triton import plan
from moda_kernels.call import AttentionCall
from moda_kernels.runtime import self_check
from moda_kernels.tokens.mask import ModularMask
from moda_kernels.tokens.pseudo import PseudoAttention
from moda_kernels.tokens.segments import segment_modalities

#: Tokens of a sequence; a prime, so that the last tiles are ragged.
LENGTH = 181


def why_not(call: AttentionCall, attend: Callable[[AttentionCall], tuple[Tensor, Tensor]]) -> list[str]:
    """Every reason why the Triton kernels of a call are not trusted; empty if they are.

    Args:
        attend: the Triton backend's.
    """
    device = call.query.device
    if not self_check.wanted(device):
        return []
    wants = _tensors(call)
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in wants.values())
    rows = 0 if backward else plan.decode_rows(call)
    folded = isinstance(call.key_map, ModalityMap) and call.key_map.foldable and (rows > 0 or plan.folds(call))
    has = {
        "split": call.split, "pseudo": call.pseudo is not None, "pair_bias": call.pair_bias is not None,
        "attn_mask": call.attn_mask is not None, "folded": folded, "grouped": call.query_heads > call.key_heads,
    }  # fmt: skip
    features = tuple(name for name, there in has.items() if there)
    sizes = f"D={call.query.shape[-1]}", f"E={call.value.shape[-1]}"
    reasons = []
    for kernel in ["decode"] if rows else ["forward", "backward"] if backward else ["forward"]:
        kind = (kernel, str(call.query.dtype).removeprefix("torch."), *sizes, *features)

        def trial(kernel: str = kernel) -> str | None:
            return _trial(kernel, call, has, attend)

        reason = self_check.why_not(kind, device, trial)
        if reason is not None:
            reasons.append(reason)
            break  # a backward behind a forward that is not trusted
    return reasons


def _tensors(call: AttentionCall) -> dict[str, Tensor]:
    """Every tensor of a call that may want a gradient."""
    named: dict[str, Any] = {name: getattr(call, name) for name in ("query", "key", "value", "pair_bias", "attn_mask")}
    named |= {} if call.pseudo is None else call.pseudo.parameters
    named |= {} if call.key_map is None else vars(call.key_map)
    named |= dict(zip(("weight_self", "weight_cross"), call.branch_weights, strict=True))
    return {name: x for name, x in named.items() if isinstance(x, Tensor)}


def _trial(
    kernel: str, like: AttentionCall, has: dict[str, bool], attend: Callable[[AttentionCall], tuple[Tensor, Tensor]]
) -> str | None:
    """What is wrong with a small call of the same kind; None if nothing."""
    call = _small(kernel, like, has)
    backward = kernel == "backward"
    names = ["query", "key", "value", *(["pair_bias"] if has["pair_bias"] else [])] if backward else []

    def results(run: Callable[[AttentionCall], tuple[Tensor, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
        changed: dict[str, Any] = {
            name: x.detach().to(dtype if name in ("query", "key", "value") else x.dtype).requires_grad_(name in names)
            for name in ("query", "key", "value", "pair_bias")
            if isinstance(x := getattr(call, name), Tensor)
        }
        if isinstance(call.key_map, ModalityMap) and dtype == torch.float64:
            changed["key_map"] = dataclasses.replace(call.key_map, matrix=call.key_map.matrix.double())
        mine = dataclasses.replace(call, **changed)
        with torch.set_grad_enabled(backward):
            out, lse = run(mine)
        found = {"out": out.detach(), "lse": lse.detach()}
        if backward:
            weight = (
                _random(torch.Generator().manual_seed(1), *out.shape).to(out.device, like.query.dtype).to(out.dtype)
            )
            finite = torch.where(torch.isfinite(lse), lse, 0)
            grads = torch.autograd.grad((out * weight).sum() + finite.sum().to(out.dtype), [changed[n] for n in names])
            found |= {f"d {name}": grad for name, grad in zip(names, grads, strict=True)}
        return found

    got = results(attend, like.query.dtype)
    usual, exact = (results(reference.attend, dtype) for dtype in (like.query.dtype, torch.float64))
    wrong = (self_check.difference(name, x, usual[name], exact[name]) for name, x in got.items())
    return next((fault for fault in wrong if fault is not None), None)


def _small(kernel: str, like: AttentionCall, has: dict[str, bool]) -> AttentionCall:
    g, device, dtype = torch.Generator().manual_seed(0), like.query.device, like.query.dtype
    dim, value_dim, group = like.query.shape[-1], like.value.shape[-1], like.query_heads // like.key_heads
    keys = LENGTH
    if kernel == "decode":
        keys = max(keys, plan.DECODE_FROM + 30)
    elif has["folded"]:
        keys = max(keys, plan.FOLD_FROM * 2 * dim + 30)
    rows = min(plan.DECODE_ROWS, 3) if kernel == "decode" else keys
    ids = (torch.arange(keys) // 37 % 2).repeat(2, 1)
    ids[1, -11:] = -1
    layout = segment_modalities(ids.to(device), num_modalities=2, max_segments=2 * keys)
    heads = group * 2
    shapes = {"query": (2, heads, rows, dim), "key": (2, 2, keys, dim), "value": (2, 2, keys, value_dim)}
    tensors: dict[str, Any] = {name: _random(g, *shape).to(device, dtype) for name, shape in shapes.items()}
    key_map = None
    if has["folded"]:
        matrix = torch.eye(dim) + 0.1 * _random(g, 2, 2, 2, dim, dim)
        mapped = torch.ones(2, 2, dtype=torch.bool, device=device)
        key_map = ModalityMap(matrix.to(device, torch.float32), mapped, None, layout)
    attn_mask = None
    if like.attn_mask is not None:
        boolean = like.attn_mask.dtype == torch.bool
        table = _random(g, rows, keys)
        attn_mask = (table > -1).to(device) if boolean else table.to(device, like.attn_mask.dtype)
    return AttentionCall.make(
        **tensors,
        enable_gqa=True,
        layout=layout,
        mask=ModularMask.bidirectional_within(2, [1]),
        key_map=key_map,
        attn_mask=attn_mask,
        pair_bias=_random(g, 2, heads, 2, 2).to(device) if has["pair_bias"] else None,
        pseudo=PseudoAttention(0.3, 0.2) if has["pseudo"] else None,
        duplex="split" if has["split"] else "joint",
    )


def _random(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g)
