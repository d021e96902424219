"""Modular-mask attention as an operator with gradients: the door to the Triton kernels of attention.

The operators `attention`, `attention_backward` and `attention_decode` are opaque to compilers: plain tensors and
numbers in, tensors out. `ModaAttention` above them is what autograd, `torch.func` and `torch.compile`
see; `attention_decode`, for few query rows, has no gradient. Where nobody looks on (`runs_at_once`) their functions are
called without torch's dispatcher, with what the plan keeps from one layer to the next.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moda_kernels.backends.triton.plan import AttentionPlan, DecodePlan, Facts, PassNumbers
from moda_kernels.products.operators import segment_gram, segment_project
from moda_kernels.products.twin import Grouping
from moda_kernels.runtime.operators import each_once, once, operator, plain_apply, register_vmap, runs_at_once
from moda_kernels.tokens.walks import KeyWalk, QueryWalk


def _attention(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from moda_kernels.backends.triton import launch  # Triton is imported where a kernel runs, no earlier

    return launch.forward(*arguments)


def _attention_fake(
    query: Tensor, key: Tensor, value: Tensor, matrix: Any, bias: Any, base: Any, decay: Any, weights: Any, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from moda_kernels.backends.triton import launch

    return launch.forward_outputs(query, value, weights is not None)


def _attention_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from moda_kernels.backends.triton import launch

    return launch.backward(*arguments)


def _attention_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    from moda_kernels.backends.triton import launch

    return launch.backward_outputs(*arguments)


def _attention_decode(*arguments: Any) -> tuple[Tensor, Tensor]:
    from moda_kernels.backends.triton import launch_decode as decode

    return decode.decode(*arguments)


def _attention_decode_fake(
    query: Tensor, key: Tensor, value: Tensor, matrix: Any, bias: Any, base: Any, decay: Any, weights: Any, *_: Any
) -> tuple[Tensor, Tensor]:
    from moda_kernels.backends.triton import launch_decode as decode

    return decode.decode_outputs(query, value, weights is not None)


_MORE = "Tensor? bias, Tensor? base, Tensor? decay, Tensor? weights, Tensor? attn_mask, Tensor? count"
_op_attention = operator(
    f"_attention(Tensor query, Tensor key, Tensor value, Tensor? matrix, {_MORE}, Tensor? fault, Tensor[] facts, "
    "Tensor[] walk, int[] passes, int[] config, float scale) -> (Tensor, Tensor, Tensor)",
    _attention,
    _attention_fake,
)
_op_attention_backward = operator(
    "_attention_backward(Tensor dout, Tensor dlse, Tensor out, Tensor lse, Tensor query, Tensor key, Tensor value, "
    f"{_MORE}, Tensor[] facts, Tensor[] query_walk, Tensor[] key_walk, int[] passes, int[] query_config, "
    "int[] key_config, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _attention_backward,
    _attention_backward_fake,
)
op_attention_decode = operator(
    f"_attention_decode(Tensor query, Tensor key, Tensor value, Tensor? matrix, {_MORE}, Tensor? fault, "
    "Tensor[] facts, Tensor tiles, SymInt rows, int[] passes, int[] config, float scale) -> (Tensor, Tensor)",
    _attention_decode,
    _attention_decode_fake,
)


class _Saved(NamedTuple):
    """What the forward keeps for the backward. out: the parts, where split; the rest as in `ModaAttention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    matrix: Tensor | None
    bias: Tensor | None
    base: Tensor | None
    decay: Tensor | None
    weights: Tensor | None
    attn_mask: Tensor | None
    out: Tensor
    lse: Tensor
    counts: Tensor | None
    facts: Facts
    query_walk: QueryWalk
    key_walk: KeyWalk
    grouping: Grouping | None

    def flat(self) -> list[Tensor | None]:
        """One after the other, as autograd keeps tensors."""
        *plain, facts, query_walk, key_walk, grouping = self
        return [*plain, *facts, *query_walk, *key_walk, *(grouping or ())]

    @classmethod
    def read(cls, tensors: Sequence[Any]) -> "_Saved":
        left = iter(tensors)

        def take(kind: Any) -> Any:
            return kind(*itertools.islice(left, len(kind._fields)))

        plain = itertools.islice(left, cls._fields.index("facts"))
        made: list[Any] = [*plain, take(Facts), take(QueryWalk), take(KeyWalk)]
        rest = list(left)
        return cls._make([*made, Grouping(*rest) if rest else None])


class ModaAttention(torch.autograd.Function):
    """Attention under a modular mask, on the Triton kernels.

    Args of `apply`:
        query, key, value: ``[B, H, L, D]`` or packed ``[T, H, D]``, on a CUDA device.
        matrix: ``[N, M, Hkv, D, D]`` or None: key maps to fold into the query (spec: "Identities worth using").
        bias: ``[N or 1, Hq or 1, M, M]`` or None. base, decay: float32 ``[Hq]`` or None (pseudo scores, Eq. 9-10).
        weights: float32 ``[2, Hq]`` makes the attention split (Eq. 7-8); None: joint.
        attn_mask: bool or float, broadcasts to ``[B, Hq, Lq, Lk]``; no gradient. Or None.
        plan: an `AttentionPlan`.

    Returns:
        out, lse as :func:`moda_kernels.moda_attention`, and the parts ``[2, …]`` of split attention, without gradient.
    """

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        matrix: Tensor | None,
        bias: Tensor | None,
        base: Tensor | None,
        decay: Tensor | None,
        weights: Tensor | None,
        attn_mask: Tensor | None,
        plan: AttentionPlan,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = (query, key, value, matrix, bias, base, decay, weights, attn_mask, plan.count, plan.fault)
        if runs_at_once(*tensors):
            out, parts, lse = _attention(
                *tensors, plan.facts, plan.walk, plan.passes.numbers(), plan.config, plan.scale, plan.kept
            )
            return out, lse, parts
        out, parts, lse = _op_attention(
            *tensors, list(plan.facts), list(plan.walk), plan.passes.numbers(), list(plan.config), plan.scale
        )
        return out, lse, parts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, plan = inputs
        out, lse, parts = output
        ctx.mark_non_differentiable(parts)
        if plan.backward is None:
            return
        # One of them is enough: delta needs the parts where there are any.
        kept = out if inputs[7] is None else parts
        of = plan.backward
        ctx.numbers = (of.passes, of.query_config, of.key_config, plan.scale)
        rest = (plan.count, of.facts, of.query_walk, of.key_walk, plan.grouping)
        # Integers of a plan need no care of autograd's, but where a transform or a compiler wants to know all tensors.
        ctx.plan = (rest, plan.kept) if runs_at_once(*tensors, out, lse) else None
        if ctx.plan is None:
            ctx.save_for_backward(*_Saved._make([*tensors, kept, lse, *rest]).flat())
        else:
            ctx.save_for_backward(*tensors, kept, lse)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor, dparts: Tensor | None) -> tuple[Tensor | None, ...]:
        run, more = _op_attention_backward, []
        if ctx.plan is None:
            saved = _Saved.read(ctx.saved_tensors)
        else:
            (rest, kept), tensors = ctx.plan, ctx.saved_tensors
            saved = _Saved._make([*tensors, *rest])
            if runs_at_once(dout, dlse, *tensors):
                run, more = _attention_backward, [kept]
        query, key, value, matrix, bias, base, decay, weights, *_ = saved
        passes, query_config, key_config, scale = ctx.numbers
        needed = ctx.needs_input_grad
        fused = key
        if matrix is not None and saved.grouping is not None:
            # Folded again, a map would take three products per tile and pass; written, it takes one per key.
            fused = _by_token(segment_project(_by_token(key), matrix.flatten(0, 1), saved.grouping, keep=True))
        dq, dk, dv, bias_sums, sums = run(
            dout, dlse, saved.out, saved.lse, query, fused, value, bias, base, decay, weights, saved.attn_mask,
            saved.counts, list(saved.facts), list(saved.query_walk), list(saved.key_walk), passes.numbers(),
            list(query_config), list(key_config), scale, *more,
        )  # fmt: skip
        dmatrix = dbias = dbase = ddecay = dweights = None
        if matrix is not None and saved.grouping is not None:
            # So far dk is that of the fused keys k A. Padding has none.
            by_group, dfused = matrix.flatten(0, 1), _by_token(dk)
            if needed[3]:
                dmatrix = segment_gram(_by_token(key), dfused, saved.grouping).view(matrix.shape).to(matrix.dtype)
            dk = _by_token(segment_project(dfused, by_group.transpose(-1, -2), saved.grouping))
        if bias is not None and needed[4]:
            dbias = _bias_gradient(bias, bias_sums, saved.query_walk.tiles, passes, saved.facts.cu_k.shape[0] - 1)
        if any(needed[5:8]):
            per_head = sums.sum(0)  # [heads, branches, 3]
            if needed[5]:
                dbase = per_head[..., 1].sum(1)
            if needed[6]:
                ddecay = per_head[..., 2].sum(1)
            if needed[7]:
                dweights = per_head[..., 0].T.contiguous()
        grads: tuple[Tensor | None, ...] = (dq, dk, dv, dmatrix, dbias, dbase, ddecay, dweights)
        if torch.is_grad_enabled():
            grads = once(_SECOND, grads, (dout, dlse, query, key, value, matrix, bias, base, decay, weights))
        return *grads, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        """One call per entry: entries share the layout, so nothing is gained by folding them into the batch."""
        return _one_by_one(ModaAttention.apply, info, in_dims, inputs)


def apply(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`ModaAttention.apply` of these arguments but the last: whether anything is to be differentiated."""
    *given, differentiable = arguments
    function: Any = ModaAttention
    if runs_at_once(*given[:-1]):
        if not differentiable:
            return ModaAttention.forward(*given)
        function = plain_apply(ModaAttention)
    else:
        given = [*each_once(*given[:-1]), given[-1]]
    out: tuple[Tensor, Tensor, Tensor] = function.apply(*given)
    return out


def decode(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Output and lse of few query rows: the tensors of `op_attention_decode` up to attn_mask, and a `DecodePlan`."""
    plan: DecodePlan
    *tensors, plan = arguments
    if runs_at_once(*tensors):
        return _attention_decode(*tensors, *plan)
    count, fault, facts, tiles, rows, passes, config, scale, _ = plan
    out: tuple[Tensor, Tensor] = op_attention_decode(
        *tensors, count, fault, list(facts), tiles, rows, passes, config, scale
    )
    return out


_SECOND = "moda_attention on the Triton kernels has no second derivative: use backend='reference' for it"


def _by_token(x: Tensor) -> Tensor:
    """``[B, H, L, D]`` as ``[B, L, H, D]`` and back; packed ``[T, H, D]`` as it is."""
    return x if x.dim() == 3 else x.transpose(1, 2)


def _bias_gradient(bias: Tensor, sums: Tensor, tiles: Tensor, passes: PassNumbers, sequences: int) -> Tensor:
    """From sums over tiles by pass, head and query modality ``[P, tiles, Hq, M]`` to the shape of the bias."""
    if bias.shape[1] == 1:
        sums = sums.sum(2, keepdim=True)
    if bias.shape[0] == 1:
        summed = sums.sum(1, keepdim=True)  # [P, 1, Hq, M]
    else:
        own = (tiles[:, 0] == torch.arange(sequences, device=sums.device)[:, None]).to(sums.dtype)  # [N, tiles]
        summed = (own @ sums.flatten(2)).unflatten(2, sums.shape[2:])
    none = summed.new_zeros(summed.shape[1:])
    columns = [
        sum((summed[p] for p, of in enumerate(passes.of_pass) if of == m), none) for m in range(passes.modalities)
    ]
    return torch.stack(columns, -1).to(bias.dtype)


def _one_by_one(call: Any, info: Any, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    def entry(i: int) -> Any:
        chosen = (x.select(d, i) if isinstance(d, int) else x for x, d in zip(inputs, in_dims, strict=True))
        return call(*chosen)

    results = [entry(i) for i in range(info.batch_size)]
    stacked = tuple(torch.stack(column) for column in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


register_vmap(
    "_attention_backward",
    lambda info, in_dims, *inputs: _one_by_one(_op_attention_backward, info, in_dims, inputs),
)
register_vmap(
    "_attention_decode",
    lambda info, in_dims, *inputs: _one_by_one(op_attention_decode, info, in_dims, inputs),
)
