"""Attention over rectangles as an operator with gradients: the door to `rectangles.py`.

`_rectangles` and `_rectangles_backward` are opaque to compilers and transforms: they take intervals, and find the
rectangles by themselves. `RectangleAttention` above them is what autograd, `torch.func` and `torch.compile` see. Where
all tensors are plain ones, `rectangles.py` is called as it is, with the rectangles that the layout keeps.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moda_kernels.backends.cpu import rectangles, routes
from moda_kernels.backends.cpu.plan import Plan, make_plan
from moda_kernels.products.twin import compute_dtype
from moda_kernels.runtime.operators import (
    are_plain,
    each_once,
    may_need_gradients,
    once,
    operator,
    plain_apply,
    register_vmap,
)
from moda_kernels.tokens.intervals import Intervals

#: Plans that the operators keep, since layers call them with equal intervals one after the other.
KEPT_PLANS = 4


class Places(NamedTuple):
    """Where rectangles lie.

    Attributes:
        limits, positions, cu_seqlens, cu_seqlens_q, passes, packed: what they are made from, as `make_jobs` takes it.
        plan: the rectangles; None where they can't be made before the call.
    """

    limits: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    cu_seqlens_q: Tensor
    passes: tuple[int, int]
    packed: bool
    plan: Plan | None = None

    def made(self, dtype: torch.dtype) -> Plan:
        """The rectangles, for numbers of a dtype."""
        return make_plan(Intervals(self.limits, self.positions), self.passes, *self[2:4], self.packed, dtype)

    def arguments(self) -> tuple[Any, ...]:
        """As the operators take them."""
        return list(self[:4]), list(self.passes), self.packed


_kept: list[tuple[Places, torch.dtype]] = []


def _kept_plan(tensors: list[Tensor], passes: Sequence[int], packed: bool, dtype: torch.dtype) -> Plan:
    """As `Places.made`, found again by the numbers in the tensors: a compiler may write others to the same memory."""
    global _kept
    for places, of in _kept:
        if (*places.passes, places.packed, of) == (*passes, packed, dtype) and places.plan is not None:
            if all(map(torch.equal, places[:4], tensors)):
                return places.plan
    limits, positions, cu_seqlens, cu_seqlens_q = (x.clone() for x in tensors)
    places = Places(limits, positions, cu_seqlens, cu_seqlens_q, (passes[0], passes[1]), packed)
    plan = places.made(dtype)
    _kept = [(places._replace(plan=plan), dtype), *_kept[: KEPT_PLANS - 1]]  # in one step, for other threads
    return plan


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extra: Tensor | None,
    attn_mask: Tensor | None,
    places: list[Tensor],
    passes: list[int],
    packed: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    plan = _kept_plan(places, passes, packed, query.dtype)
    out, lse = rectangles.attend(query, key, value, extra, attn_mask, plan, scale)
    return _as_promised(out), lse


def _attend_fake(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return rectangles.rows_first(query, query.dtype), query.new_empty(query.shape[:3], dtype=compute_dtype(query))


def _gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extra: Tensor | None,
    attn_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    places: list[Tensor],
    passes: list[int],
    packed: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if dlse is not None and not bool(dlse.any()):  # compilers write zeros out
        dlse = None
    plan = _kept_plan(places, passes, packed, query.dtype)
    dquery, dkey, dvalue, dextra = rectangles.gradients(
        query, key, value, extra, attn_mask, out, lse, dout, dlse, plan, scale
    )
    return _as_promised(dquery), _as_promised(dkey), _as_promised(dvalue), dextra.contiguous()


def _gradients_fake(query: Tensor, key: Tensor, value: Tensor, extra: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    shape = () if extra is None else extra.shape
    grads = (rectangles.rows_first(x, x.dtype) for x in (query, key, value))
    return *grads, query.new_empty(shape, dtype=compute_dtype(query))


def _as_promised(x: Tensor) -> Tensor:
    """As `rows_first` has it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? extra, Tensor? attn_mask"
_PLACES = "Tensor[] places, int[] passes, bool packed, float scale"
_op_attend = operator(f"_rectangles({_INPUTS}, {_PLACES}) -> (Tensor, Tensor)", _attend, _attend_fake)
_op_gradients = operator(
    f"_rectangles_backward({_INPUTS}, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, {_PLACES}) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _gradients,
    _gradients_fake,
)


def _vmap(operator: Any) -> Any:
    """The entries as so many times the heads: they have one layout. (A key head serves heads side by side.)"""

    def rule(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        count = info.batch_size
        *tensors, places, passes, packed, scale = inputs
        *dims, places_dims, _, _, _ = in_dims
        if any(dim is not None for dim in places_dims):
            raise NotImplementedError("vmap of moda_attention on the cpu backend: expected one layout for all entries")

        def folded(x: Tensor, dim: int | None, heads: int = -1) -> Tensor:
            """From [entries, B, H, …] to [B, entries · H, …]."""
            x = x[None].expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.transpose(0, 1).expand(-1, -1, heads, *[-1] * (x.dim() - 3)).flatten(1, 2)

        def unfolded(x: Tensor) -> Tensor:
            return x if x.dim() == 0 else x.unflatten(1, (count, -1)).transpose(0, 1)

        made = [None if x is None else folded(x, dim) for x, dim in zip(tensors, dims, strict=True)]
        attn_mask = tensors[4]
        if attn_mask is not None:  # which may be one for all heads
            query: Any = made[0]
            shared = dims[4] is None and attn_mask.shape[1] == 1
            made[4] = attn_mask if shared else folded(attn_mask, dims[4], query.shape[1] // count)
        results = operator(*made, places, passes, packed, scale)
        return tuple(map(unfolded, results)), tuple(0 if x.dim() else None for x in results)  # (a scalar means nothing)

    return rule


register_vmap("_rectangles", _vmap(_op_attend))
register_vmap("_rectangles_backward", _vmap(_op_gradients))


class RectangleAttention(torch.autograd.Function):
    """Output and lse, as `rectangles.attend` (same arguments, but `places` in place of a plan)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        extra: Tensor | None,
        attn_mask: Tensor | None,
        places: Places,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        tensors = (query, key, value, extra, attn_mask)
        if places.plan is not None:
            return rectangles.attend(*tensors, places.plan, scale)
        out: tuple[Tensor, Tensor] = _op_attend(*tensors, *places.arguments(), scale)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, places, scale = inputs
        # Integers of a plan need no care of autograd's, but where a transform or a compiler wants to know all tensors.
        opaque = places.plan is None
        ctx.save_for_backward(*tensors, *output, *(places[:4] if opaque else ()))
        ctx.places = places[4:] if opaque else places
        ctx.scale = scale
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, extra, attn_mask, out, lse, *where = ctx.saved_tensors
        places = Places(*where, *ctx.places) if where else ctx.places
        dout = torch.zeros_like(out) if dout is None else dout
        tensors = (query, key, value, extra, attn_mask, out, lse, dout, dlse)
        grads: tuple[Tensor | None, ...]
        if places.plan is not None and are_plain(*tensors):
            with torch.no_grad():
                grads = rectangles.gradients(*tensors, places.plan, ctx.scale)
        else:
            grads = _op_gradients(*tensors, *places.arguments(), ctx.scale)
        if torch.is_grad_enabled():
            grads = once(_SECOND, grads, (query, key, value, extra, dout, dlse))
        dquery, dkey, dvalue, dextra = grads
        return dquery, dkey, dvalue, None if extra is None else dextra, None, None, None


_SECOND = "double backward through moda_attention on the cpu backend: use backend='reference' for second derivatives"


def apply(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extra: Tensor | None,
    attn_mask: Tensor | None,
    places: Places,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """`RectangleAttention.apply`, without what a graph costs where there will be none.

    Args:
        return_lse: if not, it may come without its gradient, of any strides.
    """
    tensors = (query, key, value, extra, attn_mask)
    plan = places.plan
    out: tuple[Tensor, Tensor]
    if plan is None:
        if may_need_gradients(*tensors):
            out = RectangleAttention.apply(*each_once(*tensors), places, scale)
        else:
            out = _op_attend(*tensors, *places.arguments(), scale)
        return out
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    one = plan.one if extra is None and attn_mask is None else None
    if one is not None and not one.padding and not (differentiable and return_lse):
        passes = (False, True) if differentiable else (False,)
        if query.dtype.itemsize > 2 or not any(routes.widens(query.dtype, each, plan.rows) for each in passes):
            out = rectangles.attend_at_once(query, key, value, one, scale)
            return (out[0], out[1].contiguous()) if return_lse else out
    if not differentiable:
        return rectangles.attend(*tensors, plan, scale)
    out = plain_apply(RectangleAttention).apply(*tensors, places, scale)
    return out
