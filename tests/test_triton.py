"""The Triton backend beyond parity (`test_parity.py` has that): what it launches and allocates, shapes, strides and
padding, compilers and transforms. On the CPU in Triton's interpreter; on a GPU compiled."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.optests import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import moda_kernels as mk
from moda_kernels import backends, testing
from moda_kernels.backends.triton import TritonBackend, plan, tuning
from moda_kernels.call import AttentionCall
from moda_kernels.runtime import checks, gpu
from moda_kernels.testing import CASES, Case, poisoned_memory

if gpu.why_absent():
    pytest.skip("; ".join(gpu.why_absent()), allow_module_level=True)

from moda_kernels.backends.triton import configs
from moda_kernels.backends.triton import launch as kernels
from moda_kernels.backends.triton import operators as operators

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BY_NAME = {case.name: case for case in CASES}


@pytest.fixture
def always_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moda_kernels.backends.triton.plan.FOLD_FROM", 0)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts the launches of the attention kernels, and refuses every other backend."""
    counts: dict[str, int] = {}
    for name in ("forward", "backward"):
        run = getattr(kernels, name)

        def counted(*arguments: Any, run: Callable[..., Any] = run, name: str = name) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return run(*arguments)

        monkeypatch.setattr(kernels, name, counted)
    return counts


def check(case: Case, dtype: torch.dtype = torch.float32, **sizes: int) -> None:
    """The case on the kernels, in poisoned memory, against the oracle."""
    options: dict[str, Any] = {"device": DEVICE, **sizes}
    with poisoned_memory():
        result = testing.run(case, dtype, "triton", **options)
    exact, eager = testing.oracle(case, dtype, **options), testing.eager(case, dtype, **options)
    wrong = [str(c) for c in testing.compare(result, exact, eager, dtype) if not c.good]
    assert not wrong, "; ".join(wrong)


# No fallback, no memory


@pytest.mark.parametrize("name", ["joint_bidirectional", "split_weights", "bias_own", "key_map_add_sequence"])
def test_it_is_the_kernels_that_run(name: str, launches: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> None:
        raise AssertionError("another backend ran")

    for other in ("cpu", "reference"):
        monkeypatch.setattr(type(backends.BACKENDS[other]), "attend", refused)
    testing.run(BY_NAME[name], torch.float32, "triton", device=DEVICE)
    assert launches == {"forward": 1, "backward": 1}


class Sizes(TorchDispatchMode):
    """The sizes of all floating-point storages that are allocated, inside operators too."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = [t.untyped_storage() for t in known]  # kept, so that no address is used again
        self.numbers: list[int] = []

    def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if op.namespace == "moda_kernels":
            with self:  # operators are Python: what they allocate is seen as well
                result = op._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *arguments, **(named or {}))
        else:
            result = op(*arguments, **(named or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, Tensor) and t.is_floating_point():
                storage = t.untyped_storage()
                if all(storage.data_ptr() != other.data_ptr() for other in self.known):
                    self.known.append(storage)
                    self.numbers.append(storage.nbytes() // t.element_size())
        return result


def test_memory_is_linear() -> None:
    """No tensor of L × L numbers, forward or backward."""
    length, heads, dim = 320, 1, 16
    ids = (torch.arange(length) // 64 % 2)[None].to(DEVICE)
    layout = mk.segment_modalities(ids, num_modalities=2, max_segments=5)
    q, k, v = (torch.randn(1, heads, length, dim, device=DEVICE, requires_grad=True) for _ in range(3))
    sizes = Sizes(q, k, v)
    with sizes:
        out = mk.moda_attention(
            q, k, v, layout=layout, mask=mk.ModularMask.bidirectional_within(2, [1]), backend="triton",
            pseudo=mk.PseudoAttention(), pair_bias=torch.zeros(1, 1, 2, 2, device=DEVICE),
        )  # fmt: skip
        torch.autograd.grad(out.sum(), (q, k, v))
    assert max(sizes.numbers) >= heads * length * dim, "the mode sees nothing"
    assert max(sizes.numbers) < length * length // 4


def test_folded_keys_are_never_written(always_fold: None) -> None:
    """In the forward nothing of the keys' size is allocated; without folding, fused keys are."""
    length, key_heads, dim = 96, 3, 32
    ids = (torch.arange(length) // 16 % 2)[None].to(DEVICE)
    layout = mk.segment_modalities(ids, num_modalities=2, max_segments=6)
    q = torch.randn(1, 2 * key_heads, length, dim, device=DEVICE)
    k, v = (torch.randn(1, key_heads, length, dim, device=DEVICE) for _ in range(2))

    def of_key_size(scope: str) -> int:
        with torch.no_grad(), mk.use_backend("triton"):
            key_map = mk.DuplexAligner(dim, 2, scope=scope, device=DEVICE)(k, layout)
            sizes = Sizes(q, k, v)
            with sizes:
                mk.moda_attention(q, k, v, layout=layout, is_causal=True, key_map=key_map, enable_gqa=True)
        return sum(n == k.numel() for n in sizes.numbers)

    if CUDA:
        q, k, v = (t.half() for t in (q, k, v))
    assert of_key_size("sequence") == 0
    assert of_key_size("causal") > 0


# Both ways of a key map


FOLDED = [
    *(Case(f"{fusion}_{norm}", fusion=fusion, norm=norm) for fusion in ("add", "concat") for norm in ("row",)),
    Case("linear_gqa_bias", BY_NAME["joint_bidirectional"].mask, fusion="linear", group=2, bias="own"),
    Case("split", fusion="add", duplex="split", weights=True, pseudo={"length": None}, padding=("left", "middle")),
    Case("three", fusion="concat", modalities=3, aligned=(0, 2), longest=4),
    Case("five", fusion="add", modalities=5, longest=4),
    Case("packed", fusion="add", packed=True, longest=6, norm="frobenius"),
    Case("fewer_queries", fusion="linear", queries="tensor"),
]


@pytest.mark.parametrize("case", FOLDED, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_folded_maps(case: Case, dtype: torch.dtype, always_fold: None) -> None:
    check(case, dtype, length=48)


def test_the_rule_that_folds() -> None:
    def call(length: int, scope: str = "sequence", dim: int = 16) -> AttentionCall:
        ids = (torch.arange(length) // 8 % 2)[None].to(DEVICE)
        layout = mk.segment_modalities(ids, num_modalities=2, max_segments=length)
        x = torch.randn(1, 1, length, dim, device=DEVICE, dtype=torch.float16)
        key_map = mk.DuplexAligner(dim, 2, scope=scope, device=DEVICE)(x, layout)
        return AttentionCall.make(x, x, x, layout=layout, key_map=key_map)

    assert plan.folds(call(256)) and not plan.folds(call(255))
    assert not plan.folds(call(256, "causal"))
    assert plan.folds(call(2048, dim=128)) and not plan.folds(call(4096, dim=130))


# Shapes


@pytest.mark.parametrize("dims", [(1, 1), (8, 8), (17, 40), (40, 16), (72, 72), (80, 96), (256, 24)])
def test_head_sizes(dims: tuple[int, int]) -> None:
    head_dim, value_dim = dims
    case = Case("sizes", BY_NAME["joint_bidirectional"].mask, value_dim=value_dim / head_dim, group=2, key_heads=1)
    check(case, length=37, head_dim=head_dim)


@pytest.mark.parametrize(("dim", "unit"), [(36, 1), (40, 8), (64, 8), (72, 8), (120, 8)])
def test_rows_are_read_in_wide_pieces(dim: int, unit: int) -> None:
    """16 bytes at a time, where all begin at multiples of that."""
    assert kernels.unit_of(torch.empty(2, 3, 5, dim, device=DEVICE)) == unit
    assert kernels.unit_of(torch.empty(2, 5, 3, dim, device=DEVICE).transpose(1, 2)) == unit


@pytest.mark.parametrize("length", [1, 2, 33])
def test_lengths(length: int) -> None:
    for name in ("joint_bidirectional", "split_causal", "pseudo_sequence", "joint_all_padding"):
        check(Case(**{**vars(BY_NAME[name]), "length": length}))


def test_memory_order_is_the_querys() -> None:
    """[B, L, H, D] views cost no copy, and give such views."""
    layout = mk.segment_modalities(torch.tensor([[0, 1, 1, 0, 1]], device=DEVICE), num_modalities=2, max_segments=5)
    x = torch.randn(1, 5, 3, 2, 16, device=DEVICE, requires_grad=True)
    q, k, v = x.permute(2, 0, 3, 1, 4)
    out = mk.moda_attention(q, k, v, layout=layout, is_causal=True, backend="triton")
    assert out.transpose(1, 2).is_contiguous()
    exact = mk.moda_attention(q.double(), k.double(), v.double(), layout=layout, is_causal=True, backend="reference")
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    (got,) = torch.autograd.grad(out.sum(), x)
    (right,) = torch.autograd.grad(exact.sum(), x)
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_any_strides() -> None:
    layout = mk.segment_modalities(torch.tensor([[0, 1, 1, 0]] * 2, device=DEVICE), num_modalities=2, max_segments=8)
    wide = torch.randn(2, 2, 8, 40, device=DEVICE)
    q = wide[:, :, ::2, 4:20]  # gaps between rows, an offset
    k = torch.randn(1, 2, 4, 16, device=DEVICE).expand(2, -1, -1, -1)  # one for all sequences
    v = torch.randn(2, 2, 16, 4, device=DEVICE).transpose(2, 3)  # rows that are not contiguous
    out = mk.moda_attention(q, k, v, layout=layout, backend="triton")
    exact = mk.moda_attention(q, k, v, layout=layout, backend="reference")
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 7), (1, 7), (5, 1), (2, 1, 5, 7), (3, 5, 7), (2, 3, 5, 7)])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_attn_mask_broadcasts(shape: tuple[int, ...], kind: torch.dtype) -> None:
    layout = mk.segment_modalities(torch.tensor([[0, 1, 1, 0, 0, 1, -1]] * 2, device=DEVICE), max_segments=8)
    q = torch.randn(2, 3, 5, 16, device=DEVICE)
    k, v = (torch.randn(2, 3, 7, 16, device=DEVICE) for _ in range(2))
    attn_mask = (torch.rand(shape) > 0.3).to(DEVICE) if kind == torch.bool else torch.randn(shape, device=DEVICE)
    out, exact = (
        mk.moda_attention(q, k, v, attn_mask, layout=layout, backend=name, return_lse=True)
        for name in ("triton", "reference")
    )
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 3)])
@pytest.mark.parametrize("duplex", ["joint", "split"])
def test_nothing_to_see(shape: tuple[int, int], duplex: str) -> None:
    ids = torch.full(shape, -1, device=DEVICE)
    layout = mk.segment_modalities(ids, num_modalities=2, max_segments=2)
    q, k, v = (torch.randn(shape[0], 2, shape[1], 16, device=DEVICE, requires_grad=True) for _ in range(3))
    with poisoned_memory():
        out, lse = mk.moda_attention(
            q, k, v, layout=layout, duplex=duplex, pseudo=mk.PseudoAttention(), return_lse=True, backend="triton",
            pair_bias=torch.zeros(1, 1, 2, 2, device=DEVICE),
        )  # fmt: skip
        grads = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
    assert out.shape == q.shape and bool((out == 0).all()) and bool((lse == -math.inf).all())
    assert all(bool((g == 0).all()) for g in grads)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_tiles_without_anything_to_see_under_an_attn_mask(kind: torch.dtype) -> None:
    """Their loop goes round once all the same; what it meets there is not read."""
    ids = torch.tensor([0] * 40 + [1] * 40, device=DEVICE)[None]
    layout = mk.segment_modalities(ids, num_modalities=2)
    mask = mk.ModularMask([[0, 0], [0, 1]])  # the first half sees nothing, and nothing sees it
    given = [torch.randn(1, 2, 80, 16, device=DEVICE) for _ in range(4)]
    attn_mask = torch.rand(80, 80, device=DEVICE) > 0.3
    attn_mask = attn_mask if kind == torch.bool else attn_mask.float()
    results = []
    for backend, content in (("reference", 0.0), ("triton", math.nan)):
        half = torch.arange(80, device=DEVICE)[:, None] < 40
        *leaves, dout = (x.masked_fill(half, content) for x in given)
        leaves = [x.requires_grad_() for x in leaves]
        with poisoned_memory():
            out = mk.moda_attention(*leaves, attn_mask, layout=layout, mask=mask, backend=backend)
            results.append([out, *torch.autograd.grad(out, leaves, dout)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    assert all(bool((x[:, :, :40] == 0).all()) for x in results[1])


@pytest.mark.parametrize("fusion", [None, "sequence", "causal", "released"])
@pytest.mark.parametrize("content", [math.nan, math.inf])
def test_padding_may_hold_anything(fusion: str | None, content: float, always_fold: None) -> None:
    ids = torch.tensor([[-1, 0, 0, 1, -1, 1, 0, 1, 1, -1, -1]] * 2, device=DEVICE)
    ids[1] = ids[1].flip(0)
    layout = mk.segment_modalities(ids, num_modalities=2, max_segments=16)
    padding = (ids < 0)[:, None, :, None]
    clean = [torch.randn(2, 2, 11, 16, device=DEVICE) for _ in range(4)]

    def run(fill: float) -> list[Tensor]:
        q, k, v, upstream = (torch.where(padding, fill, x) for x in clean)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        with mk.use_backend("triton"):
            key_map = None
            if fusion == "released":
                key_map = mk.released_key_map(
                    k, v, layout, torch.full((16,), 0.5, device=DEVICE), torch.eye(16, device=DEVICE)
                )  # fmt: skip
            elif fusion is not None:
                aligner = mk.DuplexAligner(16, 2, scope=fusion, device=DEVICE)
                torch.nn.init.ones_(aligner.ratio)
                key_map = aligner(k, layout)
            out, lse = mk.moda_attention(
                q, k, v, layout=layout, mask=mk.ModularMask.bidirectional_within(2, [1]), key_map=key_map,
                pseudo=mk.PseudoAttention(), return_lse=True,
            )  # fmt: skip
            dlse = torch.where(padding[..., 0], fill, torch.ones_like(lse))
            grads = torch.autograd.grad((out, lse), leaves, (upstream, dlse))
        return [out, lse, *grads]

    for got, expected in zip(run(content), run(0.0), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("hidden", [0, 1, 2])
def test_a_bias_of_minus_infinity_hides(hidden: int) -> None:
    """The modality before others and after them; rows that see nothing else; gradients."""
    ids = torch.tensor([[0] * 20 + [1] * 20 + [2] * 20], device=DEVICE)
    layout = mk.segment_modalities(ids, num_modalities=3, max_segments=3)
    q, k, v = (torch.randn(1, 2, 60, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 2, 3, 3, device=DEVICE)
    bias[..., hidden] = -math.inf
    results = []
    for backend in ("triton", "reference"):
        out, lse = mk.moda_attention(
            q, k, v, layout=layout, is_causal=True, pair_bias=bias, return_lse=True, backend=backend,
            pseudo=mk.PseudoAttention(length=30),
        )  # fmt: skip
        upstream = torch.where(lse.isinf(), 0, 1.0)
        results.append([out, lse, *torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), upstream))])
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_more_segments_than_there_is_room_for() -> None:
    """Where values are not looked at, everything is poisoned."""
    layout = mk.segment_modalities(torch.tensor([[0, 1, 0, 1]]), num_modalities=2).to(DEVICE)
    faults = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    room = dataclasses.replace(layout, max_segments=2, table=layout.table[:2], faults=faults)
    q = torch.randn(1, 1, 4, 16, device=DEVICE)
    out, lse = mk.moda_attention(q, q, q, layout=room, return_lse=True, backend="triton")
    assert bool(out.isnan().all()) and bool(lse.isnan().all())


# Compilers and transforms


def small(length: int = 40, dtype: torch.dtype = torch.float32) -> tuple[mk.ModalityLayout, list[Tensor]]:
    ids = (torch.arange(length) // 7 % 2)[None].to(DEVICE)
    layout = mk.segment_modalities(ids, num_modalities=2, max_segments=length // 7 + 1)
    tensors = [torch.randn(1, h, length, 16, device=DEVICE, dtype=dtype, requires_grad=True) for h in (2, 1, 1)]
    return layout, tensors


def loss(q: Tensor, k: Tensor, v: Tensor, layout: mk.ModalityLayout, base: Tensor, aligner: Any = None) -> Tensor:
    out, lse = mk.moda_attention(
        q, k, v, layout=layout, mask=mk.ModularMask.bidirectional_within(2, [1]), enable_gqa=True,
        key_map=None if aligner is None else aligner(k, layout), pseudo=mk.PseudoAttention(base, 0.5, 64),
        pair_bias=torch.zeros(1, 1, 2, 2, device=q.device), return_lse=True, backend="triton",
    )  # fmt: skip
    return out.float().sin().sum() + lse.sum()


@pytest.mark.parametrize(
    ("scope", "dynamic"),
    [
        pytest.param(None, None, marks=pytest.mark.exhaustive),
        pytest.param("sequence", None, marks=pytest.mark.exhaustive),
        ("causal", True),
    ],
)
def test_compiles_whole_and_once(scope: str | None, dynamic: bool | None, always_fold: None) -> None:
    torch._dynamo.reset()
    aligner = None if scope is None else mk.DuplexAligner(16, 2, scope=scope, device=DEVICE)
    base = torch.zeros(2, device=DEVICE, requires_grad=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    counter = torch._dynamo.utils.counters["stats"]
    graphs = []
    for length in (35, 42, 50):
        layout, tensors = small(length)
        for run, result in ((compiled, []), (loss, [])):
            value = run(*tensors, layout, base, aligner)
            result += [value.detach(), *torch.autograd.grad(value, (*tensors, base))]
            if run is compiled:
                first = result
        torch.testing.assert_close(first, result, rtol=1e-5, atol=1e-5)
        graphs.append(counter["unique_graphs"])
    assert graphs[-1] == graphs[1], f"compiled anew: {graphs}"


def test_compiles_with_segmentation_inside() -> None:
    torch._dynamo.reset()

    def model(ids: Tensor, q: Tensor) -> Tensor:
        layout = mk.segment_modalities(ids, num_modalities=2, max_segments=16)
        return mk.moda_attention(q, q, q, layout=layout, is_causal=True, backend="triton")

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length in (40, 50):
        ids = (torch.arange(length, device=DEVICE) // 5 % 2)[None]
        q = torch.randn(1, 2, length, 16, device=DEVICE)
        torch.testing.assert_close(compiled(ids, q), model(ids, q))


def test_func_grad_and_vmap() -> None:
    layout, (q, k, v) = (x if isinstance(x, mk.ModalityLayout) else [t.detach() for t in x] for x in small(20))
    base = torch.zeros(2, device=DEVICE)
    grads = torch.func.grad(loss, argnums=(0, 1, 2, 4))(q, k, v, layout, base)
    leaves = [t.clone().requires_grad_() for t in (q, k, v, base)]
    expected = torch.autograd.grad(loss(*leaves[:3], layout, leaves[3]), leaves)
    torch.testing.assert_close(grads, expected)
    queries = torch.stack((q, -q))
    per_query = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None, None, None, None))(queries, k, v, layout, base)
    one_by_one = torch.stack([torch.func.grad(loss)(x, k, v, layout, base) for x in queries])
    torch.testing.assert_close(per_query, one_by_one)


def test_no_second_derivative() -> None:
    layout, (q, k, v) = small(20)
    base = torch.zeros(2, device=DEVICE)
    (dq,) = torch.autograd.grad(loss(q, k, v, layout, base), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(dq.sum(), k)


def test_checkpointing_and_autocast() -> None:
    layout, (q, k, v) = small(20)
    base = torch.zeros(2, device=DEVICE)
    expected = torch.autograd.grad(loss(q, k, v, layout, base), (q, k, v))
    again = torch.autograd.grad(checkpoint(loss, q, k, v, layout, base, use_reentrant=False), (q, k, v))
    torch.testing.assert_close(again, expected)
    with torch.autocast(DEVICE, torch.float16):
        out, lse = mk.moda_attention(
            q, k, v, layout=layout, enable_gqa=True, return_lse=True, pseudo=mk.PseudoAttention(), backend="triton"
        )
    assert (out.dtype, lse.dtype) == (torch.float16, torch.float32)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.float().sum(), (q, k, v)))


def test_deterministic() -> None:
    layout, (q, k, v) = small(40)
    base = torch.zeros(2, device=DEVICE)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (torch.autograd.grad(loss(q, k, v, layout, base), (q, k, v)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["joint_gqa", "packed_split", pytest.param("bias_own", marks=pytest.mark.exhaustive)])
def test_opcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The raw operators: schemas, fakes, and what AOT makes of them."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    for op in ("_op_attention", "_op_attention_backward"):
        run = getattr(operators, op)

        def recorded(*arguments: Any, run: Any = run) -> Any:
            calls.append((run, arguments))
            return run(*arguments)

        monkeypatch.setattr(operators, op, recorded)
    monkeypatch.setattr(operators, "runs_at_once", lambda *_: False)
    testing.run(BY_NAME[name], torch.float32, "triton", device=DEVICE, length=20)
    assert len(calls) == 2
    for run, arguments in calls:
        plain = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
        opcheck(run, tuple(plain), test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


# What it refuses


def reasons(**changes: Any) -> str:
    layout = mk.segment_modalities(torch.zeros(1, 4, dtype=torch.long, device=DEVICE), num_modalities=1, max_segments=1)
    x = torch.randn(1, 1, 4, changes.pop("dim", 16), device=DEVICE, dtype=changes.pop("dtype", torch.float32))
    return "; ".join(TritonBackend().why_not(AttentionCall.make(x, x, x, layout=layout, **changes)))


def test_refusals() -> None:
    assert reasons() == ""
    assert "float64" in reasons(dtype=torch.float64)
    assert "from 1 to 256, got 257" in reasons(dim=257)
    assert "it has no softcap" in reasons(softcap=2.0)
    assert "no gradient for attn_mask" in reasons(attn_mask=torch.zeros(4, 4, device=DEVICE, requires_grad=True))
    everything = reasons(dtype=torch.float64, dim=300)
    assert "float64" in everything and "300" in everything
    x = torch.randn(1, 1, 4, 300, device=DEVICE)
    with pytest.raises(NotImplementedError, match=r"backend 'triton' can't run this call.*got 300"):
        mk.moda_attention(x, x, x, layout=torch.zeros(1, 4, dtype=torch.long, device=DEVICE), backend="triton")


def test_auto_leaves_the_interpreter_alone() -> None:
    """On the CPU it is asked for by name; `auto` takes it on CUDA devices."""
    assert TritonBackend().serves(torch.device("cuda")) and not TritonBackend().serves(torch.device("cpu"))
    assert next(iter(backends.BACKENDS)) == "triton"
    assert checks.looks_at_values(torch.device("cpu"))


# Tuning


def test_tuning_takes_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the three configurations at a time; what a GPU has no room for is left out; asked once per kind."""
    start = ((128, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3))
    runs: list[tuple[Any, bool]] = []

    def run(chosen: Any, backward: bool) -> None:
        runs.append((chosen, backward))
        if chosen[0][0] == 64:
            raise RuntimeError("out of shared memory")

    def clock(timed: Callable[[], object]) -> float:
        timed()
        chosen, backward = runs[-1]
        return float(sum(chosen[2]) if backward else chosen[0][1])

    monkeypatch.setattr(tuning, "milliseconds", clock)
    monkeypatch.setattr(tuning, "_found", {})
    best = tuning.tuned("kind", start, True, run)
    assert best[0][:2] == (128, 32) and sum(best[2]) == min(sum(c.numbers()) for c in configs.CANDIDATES["keys"])
    assert [backward for _, backward in runs] == sorted(backward for _, backward in runs)
    before = len(runs)
    assert tuning.tuned("kind", start, True, run) == best and len(runs) == before
    assert not tuning.wanted(torch.device("cpu"))
