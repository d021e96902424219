"""The Triton backend: fused kernels on CUDA GPUs (and, for tests, in Triton's interpreter on the CPU).

This file takes a checked call apart and decides where the key map goes; `plan.py` says which kernels run, with which
tiles; `operators.py` runs them.
"""

import torch
from torch import Tensor

from moda_kernels.alignment.maps import ModalityMap, align_keys
from moda_kernels.backends.triton import plan, tuning
from moda_kernels.backends.triton.operators import ModaAttention, apply, decode
from moda_kernels.call import AttentionCall
from moda_kernels.runtime import gpu

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256


class TritonBackend:
    name = "triton"

    def serves(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def why_absent(self) -> list[str]:
        return list(gpu.why_absent())

    def why_not(self, call: AttentionCall) -> list[str]:
        reasons = []
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
        if call.softcap is not None:
            reasons.append("it has no softcap")
        return reasons

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        if not torch.is_autocast_enabled(call.query.device.type):
            return self._attend(call)
        with torch.autocast(call.query.device.type, enabled=False):
            return self._attend(call)

    def _attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        base = decay = None
        if call.pseudo is not None:
            base, decay = _per_head(call, call.pseudo.base), _per_head(call, call.pseudo.decay)
        weights = _weights(call) if call.split else None
        key, key_map = call.key, call.key_map
        matrix = key_map.matrix if isinstance(key_map, ModalityMap) and key_map.foldable else None
        given = (call.query, key, call.value, matrix, call.pair_bias, base, decay, weights)
        rows = 0 if _differentiable(*given) else plan.decode_rows(call)
        if key_map is not None and not (matrix is not None and (rows or plan.folds(call))):
            key, matrix = align_keys(key, key_map, call.layout), None

        tensors = (call.query, key, call.value, matrix, call.pair_bias, base, decay, weights)
        differentiable = _differentiable(*tensors)
        folded = matrix is not None
        if rows and not differentiable:
            return decode(*tensors, call.attn_mask, plan.decode_plan(call, folded, rows))
        if tuning.wanted(call.query.device):
            made = plan.make_plan(call, folded, _tuned(call, tensors, folded, differentiable), differentiable)
        else:
            made = plan.attention_plan(call, folded, differentiable)
        out, lse, _ = apply(*tensors, call.attn_mask, made, differentiable)
        return out, lse


def _tuned(call: AttentionCall, tensors: tuple[Tensor | None, ...], folded: bool, differentiable: bool) -> plan.Configs:
    """The fastest configurations for such calls."""

    def trial(configs: plan.Configs, backward: bool) -> None:
        leaves = [t if t is None else t.detach().requires_grad_(backward) for t in tensors]
        with torch.set_grad_enabled(backward):
            made = plan.make_plan(call, folded, configs, backward)
            out, _, _ = ModaAttention.apply(*leaves, call.attn_mask, made)
        if backward:
            torch.autograd.grad(out, [t for t in leaves if t is not None], out.detach(), allow_unused=True)

    kind = (call.query.dtype, *call.query.shape[1:], *call.value.shape[1:], folded, call.split, call.mask)
    return tuning.tuned(kind, plan.configurations(call, folded), differentiable, trial)


def _differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _per_head(call: AttentionCall, value: float | Tensor) -> Tensor:
    """float32 ``[Hq]``."""
    if isinstance(value, Tensor):
        return value.float()
    heads, device = call.query_heads, call.query.device
    return call.layout.remember(("per head", value, heads), lambda: torch.full((heads,), float(value), device=device))


def _weights(call: AttentionCall) -> Tensor:
    """The branch weights, float32 ``[2, Hq]``."""

    def stacked() -> Tensor:
        return torch.stack([_per_head(call, w) for w in call.branch_weights])

    if any(isinstance(w, Tensor) for w in call.branch_weights):
        return stacked()
    return call.layout.remember(("branch weights", call.branch_weights, call.query_heads), stacked)
