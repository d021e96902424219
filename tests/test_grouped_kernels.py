"""The Triton kernels of segment_gram and segment_project, on a GPU or else in Triton's interpreter: against loops over
tokens in float64, their gradients, transforms and operators, and that it is they that run."""

import collections
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import moda_kernels as mk
from moda_kernels import products
from moda_kernels.products import twin
from moda_kernels.runtime import gpu
from moda_kernels.testing import random_ids

if not gpu.why_absent():
    from moda_kernels.products import kernels as kernels
else:
    pytest.skip("; ".join(gpu.why_absent()), allow_module_level=True)

DEVICE = "cpu" if gpu.interpreted() else "cuda"
# The interpreter multiplies bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]

F32, F64 = torch.float32, torch.float64

# name: (group of each token, number of groups)
GROUPINGS = {
    "one-token": ([0], 1),
    "63": ([i * i % 5 - 1 for i in range(63)], 4),
    "100-in-one-of-three": ([1] * 100, 3),
    "one-token-per-group": ([5, 2, 7, 0, 1, 6, 3, 4], 8),
    "all-none": ([-1] * 5, 3),
    "several-pieces": ([0] * 70 + [1] * 3 + [-1] * 5 + [0] * 70 + [2] * 65, 5),
}
SIZES = [(1, 16), (8, 40), (96, 8), (40, 96)]


class Launches(collections.Counter[str]):
    """How often each launcher ran."""


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """The kernels are chosen, the PyTorch twins of 16 and 32 bits refuse, and new memory holds NaN."""
    monkeypatch.setenv("MODA_KERNELS_BACKEND", "triton")
    found = Launches()

    def counted(name: str, launch: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: object, **kwargs: object) -> Tensor:
            found[name] += 1
            return launch(*args, **kwargs)

        return run

    def refusing(twin: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, *args: object, **kwargs: object) -> Tensor:
            assert x.dtype == torch.float64, "the PyTorch twin ran in place of the kernel"
            return twin(x, *args, **kwargs)

        return run

    for name in ("segment_gram", "segment_project"):
        monkeypatch.setattr(kernels, name, counted(name, getattr(kernels, name)))
        monkeypatch.setattr(twin, name, refusing(getattr(twin, name)))
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(kernels.torch, "empty", poisoned)
    yield found


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).to(DEVICE)


def grouping_of(name: str) -> tuple[Tensor, int, products.Grouping]:
    groups, num_groups = GROUPINGS[name]
    group = torch.tensor(groups, device=DEVICE)
    return group, num_groups, products.group_tokens(group, num_groups)


def unit(x: Tensor) -> Tensor:
    return (x + 1e-6) / (x + 1e-6).norm(dim=-1, keepdim=True)


def gram_loop(x: Tensor, y: Tensor, group: Tensor, num_groups: int, dtype: torch.dtype) -> Tensor:
    out = torch.zeros(num_groups, x.shape[1], x.shape[2], y.shape[2], dtype=dtype, device=x.device)
    for t, g in enumerate(group.tolist()):
        if g >= 0:
            out[g] += x[t].to(dtype)[:, :, None] * y[t].to(dtype)[:, None, :]
    return out


def project_loop(x: Tensor, matrix: Tensor, group: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.zeros(x.shape[0], x.shape[1], matrix.shape[3], dtype=dtype, device=x.device)
    for t, g in enumerate(group.tolist()):
        if g >= 0:
            out[t] = (x[t].to(dtype)[:, None, :] @ matrix[g].to(dtype))[:, 0]
    return out


def check_gram(got: Tensor, x: Tensor, y: Tensor, group: Tensor, norm: bool = False) -> None:
    wide, eager = (gram_loop(unit(x.to(t)) if norm else x, y, group, got.shape[0], t) for t in (F64, F32))
    check(got, wide, eager)


def check_project(got: Tensor, x: Tensor, matrix: Tensor, group: Tensor, unit_matrix: Tensor | None = None) -> None:
    results = []
    for dtype in (F64, F32):
        out = project_loop(x, matrix, group, dtype)
        if unit_matrix is not None:
            out += project_loop(unit(x.to(dtype)), unit_matrix, group, dtype)
        results.append(out)
    check(got, results[0], results[1].to(got.dtype))


def check(got: Tensor, exact: Tensor, eager: Tensor) -> None:
    """The error criterion: twice that of eager float32 rounded to the result's dtype, and two units in the last place
    of the largest number."""
    assert got.shape == exact.shape and got.dtype == eager.dtype
    if exact.numel():
        allowed = 2 * (eager.double() - exact).abs().max() + 2 * torch.finfo(got.dtype).eps * exact.abs().max()
        error = (got.double() - exact).abs().max()
        assert error <= allowed, f"off by {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("name", GROUPINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_loops(name: str, dtype: torch.dtype, launches: Launches) -> None:
    group, num_groups, grouping = grouping_of(name)
    d, e = SIZES[list(GROUPINGS).index(name) % len(SIZES)]
    x, y = (normal(len(group), 2, n, dtype=dtype) for n in (d, e))
    matrix, other = (normal(num_groups, 2, d, e, dtype=torch.float32) for _ in range(2))
    check_gram(products.segment_gram(x, y, grouping), x, y, group)
    projected = products.segment_project(x, matrix, grouping)
    check_project(projected, x, matrix, group)
    assert not projected[group < 0].any()
    # The released variant's.
    check_gram(products.segment_gram(x, y, grouping, unit=True), x, y, group, norm=True)
    check_project(products.segment_project(x, matrix, grouping, unit_matrix=other), x, matrix, group, other)
    assert launches == {"segment_gram": 2, "segment_project": 2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "e"), [*SIZES, (16, 16), (72, 80)])
def test_head_sizes(d: int, e: int, dtype: torch.dtype) -> None:
    group, _, grouping = grouping_of("63")
    x, y, matrix = normal(63, 1, d, dtype=dtype), normal(63, 1, e, dtype=dtype), normal(4, 1, d, e, dtype=torch.float32)
    check_gram(products.segment_gram(x, y, grouping), x, y, group)
    check_project(products.segment_project(x, matrix, grouping), x, matrix, group)


def test_large_heads() -> None:
    """More than one tile of sums, and of columns."""
    group, num_groups, grouping = grouping_of("several-pieces")
    for dtype in DTYPES:
        x, matrix = normal(len(group), 1, 200, dtype=dtype), normal(num_groups, 1, 200, 200, dtype=torch.float32)
        check_gram(products.segment_gram(x, x, grouping), x, x, group)
        check_project(products.segment_project(x, matrix, grouping), x, matrix, group)


def test_nothing() -> None:
    for tokens, groups, heads in ((0, 3, 2), (4, 0, 2), (4, 2, 0), (0, 0, 2)):
        grouping = products.group_tokens(torch.full((tokens,), -1, device=DEVICE), groups)
        x, matrix = normal(tokens, heads, 8, dtype=torch.float32), normal(groups, heads, 8, 8, dtype=torch.float32)
        assert torch.equal(products.segment_gram(x, x, grouping), torch.zeros_like(matrix))
        assert torch.equal(products.segment_project(x, matrix, grouping), torch.zeros_like(x))
        assert torch.equal(products.segment_project(x, matrix, grouping, keep=True), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: torch.dtype) -> None:
    """Views [B, L, H, D] of [B, H, L, D], one head seen as three, transposed matrices, rows that don't follow each
    other."""
    group, num_groups, grouping = grouping_of("63")
    keys = normal(3, 2, 21, 16, dtype=dtype)
    views = {
        "batch": keys.transpose(1, 2),
        "expanded": keys[:, :1].expand(-1, 2, -1, -1).transpose(1, 2),
        "every other": normal(126, 4, 20, dtype=dtype)[::2, 1::2, :16],
        "last axis apart": normal(16, 2, 63, dtype=dtype).permute(2, 1, 0),
    }
    matrix = normal(num_groups, 2, 16, 16, dtype=torch.float32).transpose(-1, -2)
    for view in views.values():
        flat = view.reshape(63, 2, 16)
        check_gram(products.segment_gram(view, view, grouping), flat, flat, group)
        projected = products.segment_project(view, matrix, grouping)
        assert projected.shape == view.shape
        check_project(projected.reshape(63, 2, 16), flat, matrix, group)


def test_offsets_beyond_32_bits() -> None:
    far = 2**31
    memory = torch.zeros(0, dtype=torch.float16, device=DEVICE)
    memory.untyped_storage().resize_(2 * (far + 64))  # only the few pages that are touched exist
    x = memory.as_strided((2, 1, 16), (far, 16, 1))
    x.copy_(normal(2, 1, 16, dtype=torch.float16))
    group = torch.tensor([0, 1], device=DEVICE)
    check_gram(products.segment_gram(x, x, group, 2), x, x, group)
    matrix = normal(2, 1, 16, 16, dtype=torch.float32)
    check_project(products.segment_project(x, matrix, group), x, matrix, group)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_without_a_group(dtype: torch.dtype) -> None:
    """They may hold anything, come back bit for bit, and reach neither sums nor gradients."""
    group, num_groups, grouping = grouping_of("several-pieces")
    nobody = group < 0
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    x = normal(len(group), 2, 40, dtype=dtype)
    x[nobody] = torch.tensor([float("nan"), float("inf"), -0.0, -float("inf"), 1e-40] * 8, device=DEVICE).to(dtype)
    x.requires_grad_()
    matrix, other = (normal(num_groups, 2, 40, 40, dtype=torch.float32).requires_grad_() for _ in range(2))
    for unit_matrix in (None, other):
        out = products.segment_project(x, matrix, grouping, unit_matrix=unit_matrix, keep=True)
        assert torch.equal(out[nobody].view(integer), x[nobody].view(integer))
        assert bool(out[~nobody].isfinite().all())
        upstream = normal(*out.shape, dtype=dtype)
        dx, *rest = torch.autograd.grad(out, [t for t in (x, matrix, unit_matrix) if t is not None], upstream)
        assert torch.equal(dx[nobody], upstream[nobody])
        assert all(bool(t.isfinite().all()) for t in (dx, *rest))
    for normed in (False, True):
        gram = products.segment_gram(x, x.detach().clone(), grouping, unit=normed)
        (dx,) = torch.autograd.grad(gram, x, torch.ones_like(gram))
        assert bool(gram.isfinite().all()) and bool(dx.isfinite().all()) and not dx[nobody].any()


def test_float16_matrices_of_any_size() -> None:
    """A matrix is float32: its range is not float16's."""
    group, _, grouping = grouping_of("63")
    x = normal(63, 2, 16, dtype=torch.float16)
    for size in (1e-12, 1e6):
        matrix = size * normal(4, 2, 16, 16, dtype=torch.float32)
        projected = products.segment_project(x, matrix, grouping, out_dtype=torch.float32)
        exact = project_loop(x, matrix, group, F64)
        # The two parts have 21 digits together.
        torch.testing.assert_close(projected.double(), exact, rtol=0, atol=2**-20 * float(exact.abs().max()))


def test_some_groups_alone() -> None:
    """Those of a mask or of a window, out of one sorting, as the aligners use it."""
    group, _, grouping = grouping_of("several-pieces")
    x, matrix = normal(len(group), 1, 16, dtype=F32), normal(5, 1, 16, 16, dtype=F32)
    mapped = torch.tensor([True, False, True, True, False], device=DEVICE)
    some = torch.where((group >= 0) & mapped[group.clamp(min=0)], group, -1)
    window = torch.where((group >= 1) & (group < 4), group - 1, -1)
    for part, own, a in ((grouping.only(mapped), some, matrix), (grouping.window(1, 3), window, matrix[1:4])):
        gram = products.segment_gram(x, x, part)
        assert gram.shape == a.shape
        check_gram(gram, x, x, own)
        check_project(products.segment_project(x, a, part), x, a, own)
        kept = products.segment_project(x, a, part, keep=True)
        assert torch.equal(kept[own < 0], x[own < 0])


def test_dtypes_that_differ() -> None:
    group, num_groups, grouping = grouping_of("63")
    low, wide = normal(63, 2, 8, dtype=torch.float16), normal(63, 2, 8, dtype=F32)
    matrix = normal(num_groups, 2, 8, 8, dtype=F32)
    for x, y in ((low, wide), (wide, low)):
        check_gram(products.segment_gram(x, y, grouping), x, y, group)
        check_gram(products.segment_gram(x, y, grouping, unit=True), x, y, group, norm=True)
    for x, a, out_dtype in ((wide, matrix.half(), F32), (low, matrix.half(), F32), (wide, matrix, torch.float16)):
        projected = products.segment_project(x, a, grouping, unit_matrix=a, out_dtype=out_dtype)
        assert projected.dtype == out_dtype
        if x is wide:
            check_project(projected, x, a, group, a)
        else:  # what is split into two parts of float16 has 22 digits, not float32's 24
            exact = project_loop(x, a, group, F64) + project_loop(unit(x.double()), a, group, F64)
            torch.testing.assert_close(projected.double(), exact, rtol=1e-5, atol=1e-5)


# Gradients


def programs(grouping: products.Grouping) -> dict[str, Callable[..., Tensor]]:
    return {
        "gram": lambda x, y, a, b: products.segment_gram(x, y, grouping),
        "basis": lambda x, y, a, b: products.segment_gram(x, x, grouping),
        "unit gram": lambda x, y, a, b: products.segment_gram(x, y, grouping, unit=True),
        "project": lambda x, y, a, b: products.segment_project(x, a, grouping),
        "keep": lambda x, y, a, b: products.segment_project(x, a, grouping, keep=True),
        "unit": lambda x, y, a, b: products.segment_project(x, a, grouping, unit_matrix=b, keep=True),
    }


@pytest.mark.parametrize("of", programs(products.Grouping(*[torch.empty(0)] * 3)))
def test_gradients_of_both_orders(of: str) -> None:
    """float32 by the kernels against float64 by PyTorch."""
    _, num_groups, grouping = grouping_of("63")
    inputs = normal(63, 2, 8), normal(63, 2, 8), normal(num_groups, 2, 8, 8), normal(num_groups, 2, 8, 8)
    found = []
    for dtype in (torch.float64, torch.float32):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        out = programs(grouping)[of](*leaves)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True, allow_unused=True)
        first = [g for g in first if g is not None]
        total = torch.stack([(g * torch.linspace(-1, 1, g.numel(), device=DEVICE).view(g.shape)).sum() for g in first])
        second = torch.autograd.grad(total.sum(), leaves, allow_unused=True)
        found.append([*first, *[g for g in second if g is not None]])
    assert len(found[0]) == len(found[1]) > 1
    for exact, got in zip(*found, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5 * float(exact.detach().abs().max()))


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float32])
def test_gradients_in_low_precision(dtype: torch.dtype, launches: Launches) -> None:
    group, num_groups, grouping = grouping_of("several-pieces")
    x, upstream = (normal(len(group), 2, 16, dtype=dtype) for _ in range(2))
    matrix = normal(num_groups, 2, 16, 16, dtype=torch.float32).requires_grad_()
    out = products.segment_project(x.requires_grad_(), matrix, grouping)
    dx, dmatrix = torch.autograd.grad(out, (x, matrix), upstream)
    check_project(dx, upstream, matrix.detach().transpose(-1, -2), group)
    check_gram(dmatrix, x.detach(), upstream, group)
    weight = normal(num_groups, 2, 16, 16, dtype=torch.float32)
    (dx,) = torch.autograd.grad(products.segment_gram(x, x, grouping), x, weight)
    check_project(dx, x.detach(), weight + weight.transpose(-1, -2), group)
    assert launches == {"segment_gram": 2, "segment_project": 3}, "one pass for each gradient"


def test_vmap_and_func_grad() -> None:
    group = torch.tensor([0, 1, -1, 1, 0, 1], device=DEVICE)
    num_groups, grouping = 2, products.group_tokens(group, 2)
    x, y = normal(2, 6, 1, 8, dtype=torch.float32), normal(6, 1, 8, dtype=torch.float32)
    matrix = normal(2, num_groups, 1, 8, 8, dtype=torch.float32)
    close = {"rtol": 1e-5, "atol": 1e-5}

    def gram(x: Tensor, y: Tensor) -> Tensor:
        return products.segment_gram(x, y, grouping)

    def project(x: Tensor, matrix: Tensor) -> Tensor:
        return products.segment_project(x, matrix, grouping, unit_matrix=matrix, keep=True)

    rows = torch.stack([gram(row, y) for row in x])
    torch.testing.assert_close(torch.vmap(gram, (0, None))(x, y), rows, **close)
    torch.testing.assert_close(torch.vmap(gram, (None, 1))(y, x.transpose(0, 1)), rows.transpose(-1, -2), **close)
    rows = torch.stack([project(a, b) for a, b in zip(x, matrix, strict=True)])
    torch.testing.assert_close(torch.vmap(project)(x, matrix), rows, **close)
    rows = torch.stack([project(y, b) for b in matrix])
    torch.testing.assert_close(torch.vmap(project, (None, 0))(y, matrix), rows, **close)
    groups = torch.stack((group, group.flip(0)))
    rows = torch.stack([products.segment_gram(y, y, row, num_groups) for row in groups])
    torch.testing.assert_close(torch.vmap(lambda g: products.segment_gram(y, y, g, num_groups))(groups), rows, **close)

    def loss(x: Tensor, matrix: Tensor) -> Tensor:
        return (project(x, matrix) * gram(x, x).sum()).square().sum()

    by_autograd = []
    for a, b in zip(x, matrix, strict=True):
        leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
        by_autograd.append(torch.autograd.grad(loss(*leaves), leaves))
    expected = [torch.stack(t) for t in zip(*by_autograd, strict=True)]
    for got, right in zip(torch.vmap(torch.func.grad(loss, (0, 1)))(x, matrix), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))


# Operators


def test_operators() -> None:
    group, num_groups, grouping = grouping_of("63")
    raw = torch.ops.moda_kernels
    x, y, matrix = (normal(*s, dtype=torch.float32) for s in ((63, 2, 8), (63, 2, 4), (num_groups, 2, 8, 8)))
    for op, *arguments in (
        (raw._group_tokens, group, num_groups),
        (raw._segment_gram, x, y, *grouping, False),
        (raw._segment_gram, x.view(3, 21, 2, 8), None, *grouping, False),
        (raw._segment_project, x.half(), matrix, None, *grouping, True, torch.float16),
        (raw._segment_project, x.view(3, 21, 2, 8), matrix, matrix, *grouping, False, torch.float32),
    ):
        torch.library.opcheck(op.default, tuple(arguments))


@pytest.mark.parametrize("scope", ["sequence", "causal"])
def test_compiled_whole_and_once(scope: str, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.backends.debugging import aot_eager

    compiled, sorted_ = [], []
    monkeypatch.setattr(twin, "group_tokens", lambda *a, f=twin.group_tokens: sorted_.append(1) or f(*a))

    def counting(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        compiled.append(1)
        return aot_eager(module, inputs)

    aligner = mk.DuplexAligner(8, 2, scope=scope, device=DEVICE)

    def fuse(key: Tensor, layout: mk.ModalityLayout) -> Tensor:
        return mk.align_keys(key, aligner(key, layout), layout)

    torch._dynamo.reset()
    whole = torch.compile(fuse, fullgraph=True, backend=counting)
    for number, length in enumerate((20, 33, 27)):
        ids = torch.stack([random_ids(length, 2, torch.Generator().manual_seed(i)).sort().values for i in range(2)]).to(
            DEVICE
        )
        layout = mk.segment_modalities(ids, num_modalities=2, max_segments=8)
        key = normal(2, 2, length, 8, dtype=torch.float32).requires_grad_()
        leaves = (key, *aligner.parameters())
        expected = fuse(key, layout)
        right = torch.autograd.grad(expected.square().sum(), leaves)
        launches.clear(), sorted_.clear()
        out = whole(key, mk.segment_modalities(ids, num_modalities=2, max_segments=8))
        assert launches == {"segment_gram": 1, "segment_project": 1} and len(sorted_) == 1
        torch.testing.assert_close(out, expected)
        for a, b in zip(torch.autograd.grad(out.square().sum(), leaves), right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
        assert len(compiled) <= min(number + 1, 2), "compiled again for a new length"


# Chosen


class Watched(TorchDispatchMode):
    """Refuses what copies from the host or waits for the device."""

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        name = str(func)
        for unwanted in ("lift_fresh", "_local_scalar_dense", "nonzero", "is_nonzero"):
            assert unwanted not in name, f"{name} would wait"
        return func(*args, **(kwargs or {}))


def test_one_pass_each_and_no_wait(launches: Launches) -> None:
    ids = torch.tensor([[0, 1, 1, 2, -1, 0, 1], [1] * 7], device=DEVICE)
    layout = mk.segment_modalities(ids, num_modalities=3, max_segments=7)
    key, value = (normal(2, 2, 7, 8, dtype=torch.float16).requires_grad_() for _ in range(2))
    aligners = [
        mk.DuplexAligner(8, 3, scope=scope, fusion=fusion, aligned=(0, 1), device=DEVICE)
        for scope, fusion in (("sequence", "concat"), ("causal", "add"))
    ]
    ratio, weight = torch.ones(8, device=DEVICE), torch.eye(8, device=DEVICE)
    maps: list[Callable[[], mk.KeyMap]] = [lambda a=a: a(key, layout) for a in aligners]
    maps.append(lambda: mk.released_key_map(key, value, layout, ratio, weight))
    for make in maps:
        launches.clear()
        with Watched():
            out = mk.align_keys(key, make(), layout)
            assert launches == {"segment_gram": 1, "segment_project": 1}
            torch.autograd.grad(out.sum(), key)
        assert out.dtype == torch.float16 and out.shape == key.shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", ["sequence", "causal"])
def test_aligner_against_the_reference(scope: str, dtype: torch.dtype) -> None:
    layout = mk.segment_modalities(torch.tensor([[0, 0, 1, 1, 2, -1, 0, 1], [1] * 8], device=DEVICE), num_modalities=3)
    options = {"fusion": "linear", "scope": scope, "device": DEVICE}
    fast, literal = mk.DuplexAligner(8, 3, **options), mk.reference.DuplexAligner(8, 3, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter += torch.randn_like(parameter)
    literal.load_state_dict(fast.state_dict())
    key = normal(2, 2, 8, 8, dtype=dtype)
    exact = literal.fused_keys(key.double(), layout)
    eager = literal.float().fused_keys(key.float(), layout).to(dtype)
    check(mk.align_keys(key, fast(key, layout), layout), exact, eager)


def test_atomics_only_where_order_may_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    group, _, grouping = grouping_of("several-pieces")
    x = normal(len(group), 2, 16, dtype=torch.float32)
    used = []

    class Spy:
        def __getitem__(self, grid: object) -> Callable[..., object]:
            def launch(*args: object, **kwargs: object) -> object:
                used.append(kwargs["ATOMIC"])
                return kernel[grid](*args, **kwargs)

            return launch

    kernel = kernels._segment_gram_kernel
    monkeypatch.setattr(kernels, "_segment_gram_kernel", Spy())
    for deterministic in (False, True):
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(deterministic)
        try:
            gram = kernels.segment_gram(x, x, *grouping, slots=twin.SLOTS, atomics=True)
        finally:
            torch.use_deterministic_algorithms(before)
        check_gram(gram, x, x, group)
    assert used == [True, False]


def test_what_they_do_not_take() -> None:
    wide = normal(3, 1, 300, dtype=torch.float32)
    assert "up to 256, got 300" in str(kernels.why_not(wide))
    assert "float64" in str(kernels.why_not(normal(3, 1, 8)))
    if DEVICE == "cpu":
        assert "bfloat16" in str(kernels.why_not(normal(3, 1, 8, dtype=torch.bfloat16)))
    assert kernels.why_not(normal(3, 1, 256, dtype=torch.float16)) is None
