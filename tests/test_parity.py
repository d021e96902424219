"""Every backend against the oracle, for every case of `moda_kernels.testing`: outputs, lse and all gradients.

The reference backend is the oracle of the others, so it is itself compared with a second one: loops over single query
rows, written here from the specification and from nothing else. Gradients are also checked against finite differences.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import moda_kernels as mk
from moda_kernels import backends, testing
from moda_kernels.testing import CASES, Case, Inputs

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BY_NAME = {case.name: case for case in CASES}
V = mk.Visibility


def by_name(case: Case) -> str:
    return case.name


# The second oracle


class Fact(NamedTuple):
    sequence: int
    modality: int
    position: int
    segment: int
    role: int
    step: int
    chunk: int


def slow_facts(layout: mk.ModalityLayout) -> list[Fact]:
    """Facts of every token: position and segment from ids and sequence bounds alone, the others as they were given."""
    given = (layout.modality, layout.role, layout.step, layout.chunk)
    ids, bounds = list(zip(*(x.flatten().tolist() for x in given), strict=True)), layout.cu_seqlens.tolist()
    facts, segment = [], -1
    for n, (begin, end) in enumerate(pairwise(bounds)):
        position, before = -1, None
        for t in range(begin, end):
            modality, role, step, chunk = ids[t]
            if modality == -1:
                facts.append(Fact(n, -1, -1, -1, -1, 0, -1))
            else:
                position, segment = position + 1, segment + ((modality, role) != before)
                facts.append(Fact(n, modality, position, segment, role, step, chunk))
            before = (modality, role)
    return facts


def slow_columns(layout: mk.ModalityLayout, arguments: dict[str, Any], rows: int) -> list[int]:
    """The key token (of the flattened batch) in which each query row (of the flattened queries) stands."""
    if layout.packed:
        starts = layout.cu_seqlens.tolist()
        cu_q = arguments["cu_seqlens_q"].tolist() if arguments.get("cu_seqlens_q") is not None else starts
        counts = [b - a for a, b in pairwise(cu_q)]
        return [end - c + i for end, c in zip(starts[1:], counts, strict=True) for i in range(c)]
    batch, keys = layout.modality.shape
    start = arguments.get("query_start")
    starts = [keys - rows] * batch if start is None else [int(x) for x in torch.as_tensor(start).expand(batch)]
    return [n * keys + first + i for n, first in enumerate(starts) for i in range(rows)]


def slow_attention(q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Sections 3 to 5 of the specification, one query row and head at a time; (out, lse) as `moda_attention`."""
    layout: mk.ModalityLayout = arguments["layout"]
    facts = slow_facts(layout)
    if arguments.get("key_map") is not None:
        k = mk.align_keys(k, arguments["key_map"], layout)
    rows = q.shape[0] if layout.packed else q.shape[2]
    columns = slow_columns(layout, arguments, rows)
    keys = layout.modality.shape[-1]
    mask = arguments.get("mask")
    if mask is None:
        mask = (mk.ModularMask.causal if arguments.get("is_causal") else mk.ModularMask.full)(layout.num_roles)
    window = math.inf if mask.window is None else mask.window
    heads, key_heads = q.shape[1], k.shape[1]
    scale = q.shape[-1] ** -0.5 if arguments.get("scale") is None else arguments["scale"]
    split, cap = arguments.get("duplex") == "split", arguments.get("softcap")
    weights = arguments.get("branch_weights") or (1.0, 1.0)
    pseudo, bias, extra = (arguments.get(name) for name in ("pseudo", "pair_bias", "attn_mask"))
    if extra is not None:
        extra = extra.expand(q.shape[0], heads, rows, keys)

    def sees(i: Fact, j: Fact) -> bool:
        if i.sequence != j.sequence or -1 in (i.modality, j.modality):
            return False
        rule = mask.rules[i.role][j.role]
        near = i.position - j.position < window
        past = j.position <= i.position and near
        allowed = [
            rule & V.PAST and past,
            rule & V.SEGMENT and i.segment == j.segment,
            rule & V.BEFORE and j.step < i.step,
            rule & V.UPTO and j.step <= i.step,
            rule & V.CHUNK and i.chunk == j.chunk != -1 and past,
            rule & V.ALL,
        ]
        return any(allowed) and (near or mask.window_on == "past")

    def pseudo_scores(h: int, total: int, seen: int) -> Tensor | None:
        base, decay = (p[h] if isinstance(p, Tensor) else torch.tensor(p).to(q) for p in (pseudo.base, pseudo.decay))
        total = total if pseudo.length is None else pseudo.length
        if total == math.inf:  # what is left after a thousand scores of decay >= 0.01 has its own closed form
            total = seen + 1000
            tail = base - 1000 * decay - torch.log(1 - torch.exp(-decay))
            return torch.cat((base - decay * torch.arange(1000).to(q), tail[None]))
        return base - decay * torch.arange(max(0, total - seen)).to(q) if total > seen else None

    outs, lses = [], []
    for row, column in enumerate(columns):
        i = facts[column]
        others = [j for j, fact in enumerate(facts) if sees(i, fact)]
        n = i[0]
        tokens = [fact for fact in facts if fact[0] == n and fact[1] >= 0]
        for h in range(heads):
            g = h // (heads // key_heads)
            query = q[row, h] if layout.packed else q[n, h, row % rows]
            parts = [others]
            totals = [len(tokens)]
            if split:
                parts = [[j for j in others if (facts[j][1] == i[1]) == same] for same in (True, False)]
                totals = [sum((t[1] == i[1]) == same for t in tokens) for same in (True, False)]
            out, lse = v.new_zeros(v.shape[-1]), []
            for part, (seen, total) in enumerate(zip(parts, totals, strict=True)):
                scores, values = [], []
                for j in seen:
                    key = k[j, g] if layout.packed else k[n, g, j % keys]
                    s = scale * (query @ key)
                    if cap is not None:
                        s = cap * torch.tanh(s / cap)
                    if bias is not None:
                        s = s + bias[n % bias.shape[0], h % bias.shape[1], i[1], facts[j][1]]
                    if extra is not None and extra.dtype == torch.bool:
                        s = s if extra[n, h, row % rows, j % keys] else s - math.inf
                    elif extra is not None:
                        s = s + extra[n, h, row % rows, j % keys]
                    scores.append(s)
                    values.append(v[j, g] if layout.packed else v[n, g, j % keys])
                added = None if pseudo is None or i[1] == -1 else pseudo_scores(h, total, len(seen))
                every = [*(s[None] for s in scores if s > -math.inf), *([] if added is None else [added])]
                if not every:
                    lse.append(v.new_full((), -math.inf))
                    continue
                z = torch.logsumexp(torch.cat(every), 0)
                lse.append(z)
                weight = weights[part] if split else 1.0
                weight = weight[h] if isinstance(weight, Tensor) else weight
                for s, value in zip(scores, values, strict=True):
                    out = out + weight * torch.exp(s - z) * value
            outs.append(out)
            lses.append(torch.stack(lse) if split else lse[0])
    if not outs:
        shape = (*q.shape[:-1], v.shape[-1])
        return q.new_zeros(shape), q.new_zeros(())
    out = torch.stack(outs).unflatten(0, (-1, heads))  # [rows of all sequences, Hq, E]
    lse = torch.stack(lses).unflatten(0, (-1, heads)).transpose(0, 1)  # [Hq, rows, ...]
    if layout.packed:
        return out, lse
    return out.unflatten(0, (-1, rows)).transpose(1, 2), lse.unflatten(1, (-1, rows)).transpose(0, 1)


def slow_run(inputs: Inputs, like: torch.dtype, seed: int = 0) -> testing.Result:
    """`testing.run` by `slow_attention`, in float64."""
    tensors = {name: t.double().requires_grad_() for name, t in inputs.tensors.items()}
    arguments = inputs.arguments(tensors)
    out, lse = slow_attention(*(tensors[name] for name in ("query", "key", "value")), arguments)
    g = testing.generator(seed + 2)
    upstream = [torch.randn(t.shape, generator=g).to(like).double() for t in (out, lse)]
    grads = torch.autograd.grad((out, lse), tuple(tensors.values()), upstream, allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, tensors.values(), strict=True)]
    named = {f"d {name}": grad for name, grad in zip(tensors, grads, strict=True)}
    return testing.Result({"out": out.detach(), "lse": lse.detach(), **named})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_reference_agrees_with_loops(case: Case, dtype: torch.dtype) -> None:
    sizes: dict[str, Any] = {"length": 9, "head_dim": 4}
    case = Case(**{**vars(case), "length": min(case.length or 9, 9)})
    exact = slow_run(case.build(dtype, **sizes), dtype)
    result = testing.run(case, dtype, "reference", **sizes)
    # float32 or float64 arithmetic, then a rounding (or two: keys take part in their own map).
    for name, right in exact.tensors.items():
        got = result.tensors[name]
        rounded = torch.promote_types(dtype, torch.float32) if name == "lse" else dtype
        assert got.dtype == rounded, name
        scale = max(1.0, float(right.nan_to_num(neginf=0.0).abs().max()) if right.numel() else 0.0)
        arithmetic = 1e-12 if dtype == torch.float64 else 1e-5
        eps = torch.finfo(rounded).eps
        torch.testing.assert_close(got.double(), right, rtol=eps, atol=(arithmetic + eps) * scale)


# Backends


def agreements() -> Iterator[Any]:
    """Every backend, case and dtype. In the interpreter float16 differs from float32 by what it rounds: the gate takes
    every other case of it there."""
    names = [name for name in backends.BACKENDS if name != "reference"]
    for backend, (n, case), dtype in itertools.product(names, enumerate(CASES), DTYPES):
        thinned = backend == "triton" and dtype == torch.float16 and not torch.cuda.is_available()
        marks = [pytest.mark.exhaustive] if thinned and n % 2 else []
        yield pytest.param(backend, case, dtype, id=f"{backend}-{case.name}-{dtype}", marks=marks)


@pytest.mark.parametrize(("backend", "case", "dtype"), agreements())
def test_backend_agrees_with_oracle(backend: str, case: Case, dtype: torch.dtype) -> None:
    absent = backends.BACKENDS[backend].why_absent()
    if absent:
        pytest.skip(f"{backend}: {'; '.join(absent)}")
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    try:
        with testing.eager_flex() if backend == "flex" else contextlib.nullcontext():
            testing.check(case, dtype, backend, device=device)
    except NotImplementedError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_auto_runs_everything(case: Case) -> None:
    testing.check(case, torch.float64, "auto", length=17)


def test_criterion_can_fail() -> None:
    case = BY_NAME["joint_all_padding"]
    exact, eager = testing.oracle(case, torch.float32), testing.run(case, torch.float32, "reference")
    assert all(c.good for c in testing.compare(eager, exact, eager, torch.float32))
    for name in eager.tensors:
        off = {n: t.clone(memory_format=torch.contiguous_format) for n, t in eager.tensors.items()}
        off[name].view(-1)[-1] += 1e-4 * float(exact.tensors[name].nan_to_num(neginf=0.0).abs().max())
        wrong = [c for c in testing.compare(testing.Result(off), exact, eager, torch.float32) if not c.good]
        assert [c.name for c in wrong] == [name], str(wrong)
    for name, poison in (("out", math.nan), ("lse", 0.0), ("d value", math.inf)):
        off = {n: t.clone(memory_format=torch.contiguous_format) for n, t in eager.tensors.items()}
        off[name].view(-1)[0] = poison
        wrong = [c for c in testing.compare(testing.Result(off), exact, eager, torch.float32) if not c.good]
        assert [c.name for c in wrong] == [name], str(wrong)


# Finite differences


@pytest.mark.parametrize(
    "name",
    [
        "joint_rules", "split_full", "split_everything", "bias_own", "bias_shared", "pseudo_sequence",
        "pseudo_infinite", "pseudo_no_decay", "attn_mask_float", "packed_split", "queries_tensor",
        "key_map_concat_causal", "key_map_frobenius", "key_map_released", "joint_gqa",
    ],
)  # fmt: skip
def test_gradcheck(name: str) -> None:
    inputs = Case(**{**vars(BY_NAME[name]), "length": 5}).build(torch.float64, length=5, head_dim=3, seed=1)
    names = list(inputs.tensors)

    def outputs(*values: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = inputs.call(dict(zip(names, values, strict=True)), backend="reference")
        return out, torch.where(torch.isinf(lse), 0, lse)

    values = tuple(inputs.tensors[n].clone().requires_grad_() for n in names)
    assert torch.autograd.gradcheck(outputs, values, fast_mode=True)


# What must not matter


def attend(inputs: Inputs, **more: Any) -> tuple[Tensor, Tensor]:
    return inputs.call(inputs.tensors, backend="reference", **more)


@pytest.mark.parametrize("fusion", [None, "add", "concat"])
@pytest.mark.parametrize("scope", ["sequence", "causal"])
@pytest.mark.parametrize("duplex", ["joint", "split"])
def test_packed_equals_one_by_one(fusion: str | None, scope: str, duplex: str) -> None:
    g = testing.generator(3)
    lengths = [7, 0, 1, 12, 5]
    ids = [testing.random_ids(n, 2, g, padding="middle") if n else torch.zeros(0).long() for n in lengths]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = mk.segment_modalities(torch.cat(ids), num_modalities=2, cu_seqlens=cu)
    q, k, v = (torch.randn(25, h, 4, generator=g, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    aligner = mk.DuplexAligner(4, 2, fusion=fusion or "add", scope=scope, dtype=torch.float64)
    for parameter in aligner.parameters():
        torch.nn.init.normal_(parameter)
    options = {"mask": mk.ModularMask.bidirectional_within(2, [1]), "duplex": duplex, "enable_gqa": True}
    options |= {"pseudo": mk.PseudoAttention(0.3, 0.2), "return_lse": True, "backend": "reference"}

    key_map = aligner(k, packed) if fusion else None
    out, lse = mk.moda_attention(q, k, v, layout=packed, key_map=key_map, **options)
    outs, lses = [], []
    for n, own in enumerate(ids):
        part = slice(cu[n], cu[n + 1])
        one = mk.segment_modalities(own[None], num_modalities=2)
        a, b, c = (x[part].transpose(0, 1)[None] for x in (q, k, v))
        o, z = mk.moda_attention(a, b, c, layout=one, key_map=aligner(b, one) if fusion else None, **options)
        outs.append(o[0].transpose(0, 1))
        lses.append(z[0])
    torch.testing.assert_close(out, torch.cat(outs), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, torch.cat(lses, 1), rtol=1e-12, atol=1e-12)
    weight = torch.randn(out.shape, generator=g, dtype=torch.float64)
    together = torch.autograd.grad((out * weight).sum(), (q, k, v))
    apart = torch.autograd.grad((torch.cat(outs) * weight).sum(), (q, k, v))
    torch.testing.assert_close(together, apart, rtol=1e-11, atol=1e-11)


def padded(side: str, content: float, fusion: str | None, duplex: str) -> list[Tensor]:
    """Outputs, lse and gradients of two sequences with padding of some content, padding rows taken out."""
    g = testing.generator(5)
    real = torch.tensor([[0, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 1]])
    q, k, v = (torch.randn(2, 2, 6, 4, generator=g, dtype=torch.float64) for _ in range(3))
    upstream = torch.randn(2, 2, 6, 4, generator=g, dtype=torch.float64)
    rows = {"none": [0, 1, 2, 3, 4, 5], "left": [3, 4, 5, 6, 7, 8], "right": [0, 1, 2, 3, 4, 5],
            "both": [2, 3, 4, 5, 6, 7], "middle": [0, 1, 4, 5, 6, 9]}[side]  # fmt: skip
    length = 6 if side == "none" else 10
    ids = torch.full((2, length), -1)
    ids[:, rows] = real

    def pad(x: Tensor, fill: float) -> Tensor:
        wide = torch.full((2, 2, length, 4), fill, dtype=torch.float64)
        wide[:, :, rows] = x
        return wide.requires_grad_()

    q, k, v = (pad(x, content) for x in (q, k, v))
    layout = mk.segment_modalities(ids, num_modalities=2)
    key_map = None
    if fusion == "released":
        ratio, weight = torch.randn(4, generator=g).double(), torch.randn(4, 4, generator=g).double()
        key_map = mk.released_key_map(k, v, layout, ratio, weight)
    elif fusion is not None:
        aligner = mk.DuplexAligner(4, 2, fusion="linear", scope=fusion, dtype=torch.float64)
        torch.nn.init.normal_(aligner.ratio, generator=g)
        key_map = aligner(k, layout)
    out, lse = mk.moda_attention(
        q, k, v, layout=layout, mask=mk.ModularMask.causal(2), key_map=key_map, duplex=duplex,
        pseudo=mk.PseudoAttention(0.2, 0.1), return_lse=True, backend="reference",
    )  # fmt: skip
    hidden = [t for t in range(length) if t not in rows]
    assert bool((out[:, :, hidden] == 0).all())
    assert bool((lse[:, :, hidden] == -math.inf).all())
    upstream = pad(upstream, 3.0).detach()
    grads = torch.autograd.grad((out, lse), (q, k, v), (upstream, torch.ones_like(lse)))
    for name, grad in zip("qkv", grads, strict=True):
        assert bool((grad[:, :, hidden] == 0).all()), f"d{name} of padding"
    return [x[:, :, rows] for x in (out, lse, *grads)]


@pytest.mark.parametrize("duplex", ["joint", "split"])
@pytest.mark.parametrize("fusion", [None, "sequence", "causal", "released"])
@pytest.mark.parametrize("content", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("side", ["left", "right", "both", "middle"])
def test_padding_changes_nothing(side: str, content: float, fusion: str | None, duplex: str) -> None:
    # With padding in the middle a run of one modality is cut; causal rules don't look at segments.
    expected, got = padded("none", 0.0, fusion, duplex), padded(side, content, fusion, duplex)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("duplex", ["joint", "split"])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0), (2, 1), (1, 63)])
def test_empty_and_all_padding(shape: tuple[int, int], duplex: str) -> None:
    layout = mk.segment_modalities(torch.full(shape, -1), num_modalities=2)
    q, k, v = (torch.randn(shape[0], 2, shape[1], 4, requires_grad=True) for _ in range(3))
    aligner = mk.DuplexAligner(4, 2, fusion="concat", scope="causal")
    out, lse = mk.moda_attention(
        q, k, v, layout=layout, key_map=aligner(k, layout), pseudo=mk.PseudoAttention(), duplex=duplex,
        pair_bias=torch.zeros(1, 1, 2, 2), return_lse=True, backend="reference",
    )  # fmt: skip
    assert out.shape == q.shape and lse.shape == (*q.shape[:3], *([2] if duplex == "split" else []))
    assert bool((out == 0).all()) and bool((lse == -math.inf).all())
    for grad in torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse))):
        assert bool((grad == 0).all())


@pytest.mark.parametrize("bounds", [[0], [0, 0, 0]])
def test_packed_without_tokens(bounds: list[int]) -> None:
    layout = mk.segment_modalities(torch.zeros(0).long(), num_modalities=2, cu_seqlens=torch.tensor(bounds))
    q = torch.randn(0, 2, 4, requires_grad=True)
    key_map = mk.DuplexAligner(4, 2)(q, layout)
    out, lse = mk.moda_attention(q, q, q, layout=layout, key_map=key_map, return_lse=True, backend="reference")
    assert out.shape == (0, 2, 4) and lse.shape == (2, 0)
    out.sum().backward()
    assert q.grad is not None


def test_no_queries() -> None:
    layout = mk.segment_modalities(torch.tensor([[0, 1, 1]]))
    k = torch.randn(1, 2, 3, 4)
    out, lse = mk.moda_attention(k[:, :, :0], k, k, layout=layout, return_lse=True, backend="reference")
    assert out.shape == (1, 2, 0, 4) and lse.shape == (1, 2, 0)


def test_rows_that_see_nothing() -> None:
    layout = mk.segment_modalities(torch.tensor([[0, 0, 1, 0]]))
    q, k, v = (torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = mk.ModularMask([[0, 0], [0, 1]])
    out, lse = mk.moda_attention(q, k, v, layout=layout, mask=mask, return_lse=True, backend="reference")
    blind = [0, 1, 3]
    assert bool((out[:, :, blind] == 0).all()) and bool((lse[:, :, blind] == -math.inf).all())
    torch.testing.assert_close(out[:, :, 2], v[:, :, 2])
    dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
    for grad in (dq, dk, dv):
        assert bool((grad[:, :, blind] == 0).all())
    # With pseudo scores lse is their log sum: 4 of them for a row that sees nothing.
    pseudo = mk.PseudoAttention(0.5, 0.25)
    out, lse = mk.moda_attention(q, k, v, layout=layout, mask=mask, pseudo=pseudo, return_lse=True, backend="reference")
    assert bool((out[:, :, blind] == 0).all())
    expected = math.log(sum(math.exp(0.5 - 0.25 * j) for j in range(4)))
    torch.testing.assert_close(lse[:, :, blind], torch.full((1, 2, 3), expected, dtype=torch.float64))


def test_attn_mask_that_hides_a_row() -> None:
    layout = mk.segment_modalities(torch.tensor([[0, 1, 1]]))
    q, k, v = (torch.randn(1, 1, 3, 2, requires_grad=True) for _ in range(3))
    hidden = torch.ones(3, 3, dtype=torch.bool)
    hidden[1] = False
    additive = torch.zeros(3, 3).masked_fill(~hidden, -math.inf).requires_grad_()
    for attn_mask in (hidden, additive):
        out, lse = mk.moda_attention(q, k, v, attn_mask, layout=layout, return_lse=True, backend="reference")
        assert bool((out[0, 0, 1] == 0).all()) and lse[0, 0, 1] == -math.inf
        for grad in torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse))):
            assert bool(torch.isfinite(grad).all())
        # attn_mask does not change the number of visible keys: 3 of 3, so no pseudo scores.
        pseudo = mk.PseudoAttention(length=3)
        again = mk.moda_attention(q, k, v, attn_mask, layout=layout, pseudo=pseudo, backend="reference")
        torch.testing.assert_close(again, out)


# Plain torch SDPA


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_modality_arguments_it_is_sdpa(dtype: torch.dtype) -> None:
    sdpa = torch.nn.functional.scaled_dot_product_attention
    shapes = ((2, 4, 63, 16), (2, 2, 63, 16), (2, 2, 63, 16))
    mask = torch.rand(63, 63) < 0.8
    for more in ({}, {"is_causal": True}, {"attn_mask": mask}, {"scale": 0.3}):
        results = []
        for attention in (sdpa, mk.moda_attention, partial(mk.moda_attention, backend="reference")):
            torch.manual_seed(1)
            q, k, v = (torch.randn(s).to(dtype).requires_grad_() for s in shapes)
            out = attention(q, k, v, enable_gqa=True, **more)
            results.append((out, *torch.autograd.grad(out, (q, k, v), torch.randn(out.shape).to(dtype))))
        for result in results[1:]:
            for a, b in zip(results[0], result, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("more", [{"attn_mask": torch.ones(2, 9)}, {"dropout_p": 2.0}, {}])
def test_without_modality_arguments_errors_are_those_of_sdpa(more: dict[str, Any]) -> None:
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 3, 3, 8)
    q = q if not more else q[:, :3]
    with pytest.raises(Exception) as theirs:
        torch.nn.functional.scaled_dot_product_attention(q, k, k, **more)
    with pytest.raises(Exception) as ours:
        mk.moda_attention(q, k, k, **more)
    assert (ours.type, str(ours.value)) == (theirs.type, str(theirs.value))
