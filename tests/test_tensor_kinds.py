"""Tensors that aren't plain: torch's CausalBias means what it means in SDPA, all other kinds are refused by name."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import moda_kernels as mk
from moda_kernels.call import AttentionCall

IDS = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 0, 0], [-1, -1, 0, 1, 1, -1, 1, 1, 0]])
LAYOUT = mk.segment_modalities(IDS, num_modalities=2)
L = IDS.shape[1]
MASKS = {
    "none": None,
    "causal": mk.ModularMask.causal(2),
    "windowed": mk.ModularMask(mk.ModularMask.causal(2).rules, window=3),
    "within": mk.ModularMask.bidirectional_within(2, [1]),
    "self only": mk.ModularMask.self_only(2),
}


def dense(bias: Any) -> Tensor:
    """The table that a bias stands for, by torch itself."""
    return bias._materialize()


def attend(attn_mask: Tensor, rows: int = L, **options: Any) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 2, n, 8, generator=g, dtype=torch.float64) for n in (rows, L, L))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = mk.moda_attention(*leaves, attn_mask, layout=LAYOUT, return_lse=True, **options)
    loss = (out * torch.randn(out.shape, generator=g)).sum() + torch.where(lse == -math.inf, 0, lse).sum()
    return [out, lse, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("pseudo", [None, mk.PseudoAttention(0.3, 0.1)], ids=["", "pseudo"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("corner", [causal_upper_left, causal_lower_right])
@pytest.mark.parametrize(
    ("rows", "start"), [(L, None), (L, 0), (4, None), (4, 0), (4, 2), (4, torch.tensor([5, 1])), (1, None)], ids=str
)
def test_a_causal_bias_is_the_table_that_it_stands_for(
    corner: Callable[..., Tensor], rows: int, start: Any, mask: str, pseudo: Any, backend: str
) -> None:
    options = {"mask": MASKS[mask], "query_start": start, "pseudo": pseudo, "backend": backend}
    expected = attend(dense(corner(rows, L)), rows, **options)
    torch.testing.assert_close(attend(corner(rows, L), rows, **options), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("corner", [causal_upper_left, causal_lower_right])
def test_a_causal_bias_alone_is_torch_sdpa(corner: Callable[..., Tensor]) -> None:
    q, k, v = (torch.randn(1, 2, n, 8) for n in (4, 7, 7))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, corner(4, 7))
    torch.testing.assert_close(mk.moda_attention(q, k, v, corner(4, 7)), expected)
    layout = torch.zeros(1, 7, dtype=torch.long)
    for backend in ("cpu", "reference"):
        got = mk.moda_attention(q, k, v, corner(4, 7), layout=layout, backend=backend)
        torch.testing.assert_close(got, expected)
        with mk.replace_sdpa(layout=layout, backend=backend) as replacing:
            got = torch.nn.functional.scaled_dot_product_attention(q, k, v, corner(4, 7))
        torch.testing.assert_close(got, expected)
        assert replacing.replaced == 1


def test_a_causal_bias_becomes_rules_where_these_say_the_same() -> None:
    def made(attn_mask: Tensor, rows: int = L, **options: Any) -> AttentionCall:
        q, k = torch.randn(2, 2, rows, 8), torch.randn(2, 2, L, 8)
        return AttentionCall.make(q, k, k, attn_mask, layout=LAYOUT, **options)

    causal, pseudo = mk.ModularMask.causal(2), mk.PseudoAttention()
    for call in (
        made(causal_upper_left(L, L)),
        made(causal_lower_right(L, L), is_causal=True),
        made(causal_lower_right(3, L), 3, mask=causal, pseudo=pseudo),
        made(causal_upper_left(3, L), 3, query_start=0),
    ):
        assert call.mask == causal and call.attn_mask is None
    for call in (
        made(causal_upper_left(L, L), pseudo=pseudo),
        made(causal_upper_left(3, L), 3),
        made(causal_lower_right(3, L), 3, query_start=1),
        made(causal_lower_right(L, L), mask=mk.ModularMask.full(2)),
    ):
        assert call.attn_mask is not None and call.attn_mask.dtype == torch.bool


class Own(torch.Tensor):
    """A subclass that nothing is known of."""


@pytest.fixture(scope="module")
def distributed() -> Any:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def kinds(distributed: Any) -> dict[str, tuple[Callable[[Tensor], Any], type[Exception], list[str]]]:
    from torch.distributed.tensor import Replicate, distribute_tensor

    return {
        "own": (lambda x: x.as_subclass(Own), TypeError, ["a plain torch.Tensor", "an? Own of shape"]),
        "dtensor": (
            lambda x: distribute_tensor(x, distributed, [Replicate()]), TypeError,
            [r"to_local\(\)", "a DTensor of shape"],
        ),
        "masked": (
            lambda x: torch.masked.masked_tensor(x, torch.ones_like(x, dtype=torch.bool)), TypeError,
            ["modality -1", "MaskedTensor"],
        ),
        "jagged": (
            lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged), TypeError,
            ["cu_seqlens", "a nested tensor"],
        ),
        "nested": (lambda x: torch.nested.nested_tensor(list(x)), TypeError, ["cu_seqlens", "a nested tensor"]),
        "sparse": (lambda x: x.to_sparse(), TypeError, ["a dense tensor", "sparse_coo"]),
        "meta": (lambda x: x.to("meta"), ValueError, ["meta"]),
    }  # fmt: skip


KINDS = ("own", "dtensor", "masked", "jagged", "nested", "sparse", "meta")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_refused_by_name(kind: str, distributed: Any, refused: Callable[..., None]) -> None:
    made, error, parts = kinds(distributed)[kind]
    q, bias, base = torch.randn(2, 2, L, 8), torch.zeros(2, 1, 2, 2), torch.zeros(2)
    item_ids, starts = torch.zeros(2, L, dtype=torch.long), torch.tensor([0, 0])
    bounds = torch.tensor([[0, 2 * L]])
    aligner = mk.DuplexAligner(8, 2)

    def attend(query: Any = q, key: Any = q, value: Any = q, **options: Any) -> None:
        mk.moda_attention(query, key, value, **{"layout": LAYOUT} | options)

    calls: dict[str, Callable[[], Any]] = {
        "query": lambda: attend(made(q)),
        "key": lambda: attend(q, made(q)),
        "value": lambda: attend(q, q, made(q)),
        "attn_mask": lambda: attend(attn_mask=made(torch.zeros(2, 1, L, L))),
        "pair_bias": lambda: attend(pair_bias=made(bias)),
        "modality_ids": lambda: attend(layout=made(IDS)),
        "item_ids": lambda: mk.segment_modalities(IDS, item_ids=made(item_ids)),
        "gram": lambda: mk.modality_gram(made(q), q, LAYOUT),
    }
    if kind != "dtensor":  # (which may be sharded over heads)
        calls["aligner"] = lambda: aligner(made(q), LAYOUT)
    if kind not in ("masked", "jagged", "nested"):  # made of rows: not for what has one axis
        calls["query_start"] = lambda: attend(query_start=made(starts))
        calls["base"] = lambda: attend(pseudo=mk.PseudoAttention(made(base)))
        calls["branch_weights"] = lambda: attend(duplex="split", branch_weights=(made(base), 1.0))
        calls["cu_seqlens"] = lambda: mk.segment_modalities(IDS.flatten(), cu_seqlens=made(bounds[0]))
    for name, call in calls.items():
        with pytest.raises(error) as raised:
            call()
        message = str(raised.value)
        assert all(re.search(part, message) for part in parts), f"{name}: {message}"
        assert "expected" in message and "got" in message, f"{name}: {message}"


def test_meta_tensors_are_refused(refused: Callable[..., None]) -> None:
    layout, q = LAYOUT.to("meta"), torch.randn(2, 2, L, 8, device="meta")
    aligner = mk.DuplexAligner(8, 2, device="meta")
    for name, call in {
        "modality_ids": lambda: mk.segment_modalities(IDS.to("meta")),
        "query": lambda: mk.moda_attention(q, q, q, layout=layout),
        "key": lambda: aligner(q, layout),
    }.items():
        refused(call, ValueError, [name, "a tensor with numbers", "torch.compile", "meta"])


def test_traced_calls_are_refused() -> None:
    q = torch.randn(2, 2, L, 8)
    calls: list[Callable[[Tensor], Any]] = [
        lambda x: mk.moda_attention(x, x, x, layout=LAYOUT),
        lambda x: mk.DuplexAligner(8, 2)(x, LAYOUT).matrices,
        lambda x: mk.segment_modalities((x[:, 0, :, 0] > 0).long()).segment,
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match=r"outside torch\.jit\.trace.*torch\.compile.*got a traced"):
            torch.jit.trace(call, (q,))
    assert torch.equal(torch.jit.trace(lambda x: mk.moda_attention(x, x, x), (q,))(q), mk.moda_attention(q, q, q))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_stands_for_plain_tensors_is_taken(backend: str) -> None:
    """Parameters, and what torch's own transformations and tracers put in a tensor's place."""
    from torch._subclasses import FakeTensorMode

    q = torch.randn(2, 2, L, 8)

    def call(x: Tensor) -> Tensor:
        return mk.moda_attention(x, x, x, layout=LAYOUT, is_causal=True, backend=backend)

    expected = call(q)
    torch.testing.assert_close(call(torch.nn.Parameter(q)), expected)
    torch.testing.assert_close(torch.vmap(call)(q[None])[0], expected)
    torch.testing.assert_close(torch.func.functionalize(call)(q), expected)
    assert torch.func.grad(lambda x: call(x).sum())(q).shape == q.shape
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(q), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert call(mode.from_tensor(q)).shape == q.shape
