"""The CPU backend under compilers and transforms: one graph, any length, the same numbers; and its operators by torch's
own checks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import moda_kernels as mk
from moda_kernels import testing
from moda_kernels.backends.cpu import operators
from moda_kernels.tokens.intervals import mask_intervals

WITHIN = mk.ModularMask.bidirectional_within(2, [1])
SAMPLE = ("packed_key_map_causal", "attn_mask_fixed", "queries_mapped")
OF_FAKES = ("test_schema", "test_faketensor")
CASES = {case.name: case for case in testing.CASES if case.attn_mask != "float"}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(operators, "_kept", [])


def gradients(inputs: testing.Inputs, attend: Callable[..., Any]) -> list[Tensor]:
    """Output, lse, and what a loss on both has for gradients. (Maps of keys are made outside.)"""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.tensors.items()}
    tensors = (leaves[name] for name in ("query", "key", "value"))
    out, lse = attend(*tensors, return_lse=True, backend="cpu", **inputs.arguments(leaves))
    loss = (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()
    loss = loss + torch.where(torch.isneginf(lse), 0, lse).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return [out.detach(), lse.detach(), *grads]


@pytest.mark.parametrize(
    "name",
    [*SAMPLE, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in CASES if name not in SAMPLE)],
)
def test_a_case_in_one_graph(name: str) -> None:
    inputs = CASES[name].build(length=30, head_dim=8)

    compiled = torch.compile(mk.moda_attention, fullgraph=True, backend="aot_eager")
    expected = gradients(inputs, mk.moda_attention)
    torch.testing.assert_close(gradients(inputs, compiled), expected, rtol=1e-4, atol=1e-5)


def layers(q: Tensor, k: Tensor, v: Tensor, layout: mk.ModalityLayout) -> Tensor:
    for _ in range(2):
        q = mk.moda_attention(q, k, v, enable_gqa=True, layout=layout, mask=WITHIN, backend="cpu")
    return q.sin().sum()


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_any_length_in_one_graph(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    monkeypatch.setattr(operators, "make_plan", lambda *a, make=operators.make_plan: plans.append(a) or make(*a))
    compiled = torch.compile(layers, fullgraph=True, dynamic=True, backend="aot_eager")
    counter = torch._dynamo.utils.counters["stats"]
    graphs = []
    for length in (24, 37, 31):
        ids = (torch.arange(length) // 5 % 2)[None]
        q, k, v = (torch.randn(1, h, length, 8, requires_grad=True) for h in (4, 2, 2))
        bounds = None
        if packed:
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
            ids, bounds = ids[0], torch.tensor([0, 9, length])
        results = []
        for run in (compiled, layers):
            layout = mk.segment_modalities(ids, num_modalities=2, cu_seqlens=bounds)
            before = len(plans)
            loss = run(q, k, v, layout)
            results.append([loss.detach(), *torch.autograd.grad(loss, (q, k, v))])
            assert len(plans) - before == 1  # for both layers, forward and backward
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
        graphs.append(counter["unique_graphs"])
    assert graphs[-1] == graphs[0], f"compiled anew: {graphs}"


def test_plans_are_told_apart_by_what_is_in_memory_now() -> None:
    """A compiler may write the next layout where the one before was."""
    first, second = (
        mk.segment_modalities(torch.tensor([ids]), num_modalities=2) for ids in ([0, 1, 1, 0], [1, 1, 0, 0])
    )
    q = torch.randn(1, 1, 4, 8)
    places = []
    for layout in (first, second):
        queries = layout.queries()
        places.append([*mask_intervals(layout, queries, WITHIN), layout.cu_seqlens, queries.cu_seqlens])
    where = [x.clone() for x in places[0]]
    for layout, numbers in zip((first, second, first), (*places, places[0]), strict=True):
        for mine, x in zip(where, numbers, strict=True):
            mine.copy_(x)
        got, _ = torch.ops.moda_kernels._rectangles(q, q, q, None, None, where, [0, len(where[1])], False, 0.5)
        expected = mk.moda_attention(q, q, q, layout=layout, mask=WITHIN, scale=0.5, backend="reference")
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("grouped", [False, True])
def test_operators_are_what_they_say(grouped: bool) -> None:
    """Fakes and strides by torch.library.opcheck: one call and many; with and without what is optional."""
    ids = torch.tensor([[0, 0, 1, 1, 1, 0, 1], [-1, 0, 1, 1, 0, 0, 0]])
    layout = mk.segment_modalities(ids, num_modalities=2)
    queries = layout.queries()
    q, k, v = (torch.randn(2, h, 7, 8) for h in (4 if grouped else 2, 2, 2))
    extra, attn_mask = torch.randn(2, q.shape[1], 7), torch.randn(1, 1, 7, 7)
    for mask, more in ((mk.ModularMask.causal(2), (None, None)), (WITHIN, (None, None)), (WITHIN, (extra, attn_mask))):
        limits, positions = mask_intervals(layout, queries, mask)
        where = [limits, positions, layout.cu_seqlens, queries.cu_seqlens], [0, len(positions)], False, 0.3
        torch.library.opcheck(torch.ops.moda_kernels._rectangles, (q, k, v, *more, *where), test_utils=OF_FAKES)
        out, lse = torch.ops.moda_kernels._rectangles(q, k, v, *more, *where)
        for dlse in (None, torch.randn_like(lse)):
            arguments = (q, k, v, *more, out, lse, torch.randn_like(out), dlse, *where)
            torch.library.opcheck(torch.ops.moda_kernels._rectangles_backward, arguments, test_utils=OF_FAKES)


@pytest.mark.parametrize("packed", [False, True])
def test_vmap_over_every_tensor(packed: bool) -> None:
    """One call for all entries, whichever tensors have them; and gradients within and around it."""
    ids, bounds = torch.tensor([0, 0, 1, 1, 1, 0, 1, -1]), None
    if packed:
        bounds = torch.tensor([0, 3, 8])
    layout = mk.segment_modalities(ids if packed else ids[None], num_modalities=2, cu_seqlens=bounds)
    shapes = {"q": (4, 8, 6), "k": (2, 8, 6), "v": (2, 8, 5), "bias": (1, 4, 2, 2), "add": (8, 8)}
    if packed:
        shapes.pop("add")
    entries = {
        name: torch.randn(3, *shape[1::-1], shape[2]) if packed and len(shape) == 3
        else torch.randn(3, *([1] if len(shape) == 3 else []), *shape)
        for name, shape in shapes.items()
    }  # fmt: skip

    add = entries.pop("add", torch.zeros(3))

    def call(x: dict[str, Tensor], add: Tensor, backend: str = "cpu") -> Tensor:
        out, lse = mk.moda_attention(
            x["q"], x["k"], x["v"], None if packed else add, enable_gqa=True, layout=layout, mask=WITHIN,
            pair_bias=x["bias"], return_lse=True, backend=backend,
        )  # fmt: skip
        return out.sin().sum() + torch.where(torch.isneginf(lse), 0, lse).sum()

    for chosen in ([*entries, "add"], *([name] for name in (*entries, "add"))):
        given = {name: x if name in chosen else x[0] for name, x in entries.items()}
        singles = [{name: x[i] if name in chosen else x for name, x in given.items()} for i in range(3)]
        adds = [add[i if "add" in chosen else 0] for i in range(3)]
        arguments = given, add if "add" in chosen else add[0]
        dims = {name: 0 if name in chosen else None for name in entries}, 0 if "add" in chosen else None
        expected = torch.stack([call(x, y, "reference") for x, y in zip(singles, adds, strict=True)])
        torch.testing.assert_close(torch.vmap(call, dims)(*arguments), expected)
        grads = [torch.func.grad(call)(x, y, "reference") for x, y in zip(singles, adds, strict=True)]
        within = torch.vmap(torch.func.grad(call), dims)(*arguments)
        around = torch.func.grad(lambda *x: torch.vmap(call, dims)(*x).sum())(*arguments)  # noqa: B023
        for name in entries:
            of_name = torch.stack([x[name] for x in grads])
            torch.testing.assert_close(within[name], of_name, rtol=1e-4, atol=1e-5)
            of_name = of_name if name in chosen else of_name.sum(0)
            torch.testing.assert_close(around[name], of_name, rtol=1e-4, atol=1e-5)


def test_second_derivatives_are_refused_in_transforms_too() -> None:
    layout = mk.segment_modalities(torch.tensor([[0, 1, 1, 0]]), num_modalities=2)
    q = torch.randn(1, 2, 4, 8)

    def loss(x: Tensor) -> Tensor:
        return mk.moda_attention(x, q, q, layout=layout, mask=WITHIN, backend="cpu").square().sum()

    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(q)


@pytest.mark.exhaustive
def test_inductor_in_a_model() -> None:
    """Compiled code around it, which takes strides at their word."""
    project = torch.nn.Linear(32, 96)

    def block(x: Tensor, ids: Tensor) -> Tensor:
        layout = mk.segment_modalities(ids, num_modalities=2)
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in project(x).chunk(3, -1))
        out = mk.moda_attention(q, k, v, layout=layout, mask=WITHIN, backend="cpu")
        return (x + out.transpose(1, 2).flatten(2)).tanh()

    x, ids = torch.randn(2, 40, 32), torch.arange(40).expand(2, -1) // 5 % 2
    results = []
    for run in (torch.compile(block, fullgraph=True), block):
        project.zero_grad()
        out = run(x, ids)
        out.square().sum().backward()
        results.append((out.detach(), project.weight.grad.clone()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
