"""The two grouped products under duplex alignment, segment_gram and segment_project: against loops over tokens, in any
grouping, and as each other's gradient."""

import pytest
import torch
from torch import Tensor

from moda_kernels.products import segment_gram, segment_project

HYPOTHESIS = pytest.importorskip("hypothesis")
given, st = HYPOTHESIS.given, HYPOTHESIS.strategies

# name: (group of each token, number of groups)
GROUPINGS = {
    "sorted": ([0, 0, 0, 1, 1, 2, 2, 2], 3),
    "unsorted": ([2, 0, 1, 0, 2, 2, 1, 0], 3),
    "with-none": ([-1, 0, -1, 1, 0, -1, 1, -1], 2),
    "empty-groups": ([4, 4, 1, -1, 4, 1, 1, 1], 7),
    "one-group": ([0] * 8, 1),
    "one-token-per-group": ([5, 2, 7, 0, 1, 6, 3, 4], 8),
    "more-groups-than-tokens": ([40, 3, 99], 100),
    "one-token": ([0], 1),
    "all-none": ([-1] * 5, 3),
    "no-tokens": ([], 3),
    "no-groups": ([-1] * 4, 0),
    "nothing": ([], 0),
    "63": ([i * i % 5 - 1 for i in range(63)], 4),
    "100": ([i // 7 for i in range(100)], 15),
    "one-large-among-small": ([0] * 300 + [1] + [0] * 300 + [2, 3, 4], 6),
}
LOW = [torch.bfloat16, torch.float16]


def gram_loop(x: Tensor, y: Tensor, group: Tensor, num_groups: int) -> Tensor:
    out = torch.zeros(num_groups, x.shape[1], x.shape[2], y.shape[2], dtype=torch.float64)
    for t, g in enumerate(group.tolist()):
        if g >= 0:
            out[g] += x[t].double()[:, :, None] * y[t].double()[:, None, :]
    return out


def project_loop(x: Tensor, matrix: Tensor, group: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], x.shape[1], matrix.shape[3], dtype=torch.float64)
    for t, g in enumerate(group.tolist()):
        if g >= 0:
            out[t] = (x[t].double()[:, None, :] @ matrix[g].double())[:, 0]
    return out


def make(
    groups: list[int], num_groups: int, dtype: torch.dtype = torch.float64, heads: int = 2, d: int = 3, e: int = 4
):
    group = torch.tensor(groups, dtype=torch.int64)
    x, y = (torch.randn(len(groups), heads, n, dtype=torch.float64).to(dtype) for n in (d, e))
    matrix = torch.randn(num_groups, heads, d, e, dtype=torch.float64).to(dtype)
    return x, y, matrix, group


@pytest.fixture(params=GROUPINGS)
def case(request: pytest.FixtureRequest):
    groups, num_groups = GROUPINGS[request.param]
    return *make(groups, num_groups), num_groups


def test_against_loops(case) -> None:
    x, y, matrix, group, num_groups = case
    gram, projected = segment_gram(x, y, group, num_groups), segment_project(x, matrix, group)
    assert gram.dtype == projected.dtype == torch.float64
    torch.testing.assert_close(gram, gram_loop(x, y, group, num_groups), rtol=0, atol=1e-12)
    torch.testing.assert_close(projected, project_loop(x, matrix, group), rtol=0, atol=1e-12)


@given(
    tokens=st.integers(0, 40),
    num_groups=st.integers(1, 12),
    heads=st.integers(1, 3),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 1000),
)
def test_any_grouping(tokens: int, num_groups: int, heads: int, sizes: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    used = int(torch.randint(1, num_groups + 1, (), generator=generator))
    groups = torch.randint(-1, used, (tokens,), generator=generator).tolist()
    x, y, matrix, group = make(groups, num_groups, heads=heads, d=sizes[0], e=sizes[1])
    expected = gram_loop(x, y, group, num_groups)
    torch.testing.assert_close(segment_gram(x, y, group, num_groups), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(segment_project(x, matrix, group), project_loop(x, matrix, group), rtol=0, atol=1e-12)


def test_each_is_the_gradient_of_the_other(case) -> None:
    x, y, matrix, group, num_groups = case
    for t in (x, y, matrix):
        t.requires_grad_()
    weight = torch.randn_like(matrix)
    dx, dy = torch.autograd.grad(segment_gram(x, y, group, num_groups), (x, y), weight)
    torch.testing.assert_close(dx, project_loop(y, weight.transpose(-1, -2), group), rtol=0, atol=1e-12)
    torch.testing.assert_close(dy, project_loop(x, weight, group), rtol=0, atol=1e-12)
    weight = torch.randn(len(group), x.shape[1], matrix.shape[3], dtype=torch.float64)
    dx, dmatrix = torch.autograd.grad(segment_project(x, matrix, group), (x, matrix), weight)
    torch.testing.assert_close(dx, project_loop(weight, matrix.transpose(-1, -2), group), rtol=0, atol=1e-12)
    torch.testing.assert_close(dmatrix, gram_loop(x, weight, group, num_groups), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["unsorted", "empty-groups", "with-none", "one-token", "all-none", "no-groups"])
def test_derivatives_of_both_orders(name: str) -> None:
    groups, num_groups = GROUPINGS[name]
    x, y, matrix, group = make(groups, num_groups, heads=1, d=2, e=3)
    for t in (x, y, matrix):
        t.requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, y: segment_gram(x, y, group, num_groups), (x, y))
        assert check(lambda x, matrix: segment_project(x, matrix, group), (x, matrix))


def test_the_gradient_of_the_basis_counts_both_sides() -> None:
    x, _, _, group = make(*GROUPINGS["unsorted"])
    x.requires_grad_()
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    (dx,) = torch.autograd.grad(segment_gram(x, x, group, 3), x, weight)
    expected = project_loop(x, weight + weight.transpose(-1, -2), group)
    torch.testing.assert_close(dx, expected, rtol=0, atol=1e-12)


def test_only_the_gradients_asked_for() -> None:
    x, y, matrix, group = make(*GROUPINGS["unsorted"])
    segment_gram(x.requires_grad_(), y, group, 3).sum().backward()
    segment_project(x.detach(), matrix.requires_grad_(), group).sum().backward()
    assert x.grad is not None and y.grad is None and matrix.grad is not None


def test_functional_gradients() -> None:
    x, y, matrix, group = make(*GROUPINGS["with-none"])

    def loss(x: Tensor, y: Tensor, matrix: Tensor) -> Tensor:
        gram = segment_gram(x, y, group, 2)
        return segment_project(x, matrix + gram, group).square().sum()

    def loss_by_loop(x: Tensor, y: Tensor, matrix: Tensor) -> Tensor:
        one_hot = torch.nn.functional.one_hot(group.clamp(min=0), 2).double() * (group >= 0)[:, None]
        gram = torch.einsum("tg,thd,the->ghde", one_hot, x, y)
        return torch.einsum("tg,thd,ghde->the", one_hot, x, matrix + gram).square().sum()

    for of in (0, 1, 2):
        got, expected = (torch.func.grad(f, argnums=of)(x, y, matrix) for f in (loss, loss_by_loop))
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        first, second = (torch.func.grad(f, argnums=of) for f in (loss, loss_by_loop))
        twice = [torch.func.grad(lambda x, f=f: f(x, y, matrix).square().sum())(x) for f in (first, second)]
        torch.testing.assert_close(twice[0], twice[1], rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    # 4096 ones in bfloat16 or float16 get no further than 256 or 2048; 4096·64 is beyond float16's range.
    x = torch.full((4096, 1, 1), 8.0, dtype=dtype)
    group = torch.zeros(4096, dtype=torch.int64)
    gram = segment_gram(x, x, group, 1)
    assert gram.dtype == torch.float32 and gram.item() == 4096 * 64
    assert segment_gram(torch.ones_like(x), torch.ones_like(x), group, 1).item() == 4096
    # The gradient of the projection's matrix is a Gram: it too.
    matrix = torch.ones(1, 1, 1, 1, requires_grad=True)
    segment_project(torch.ones_like(x), matrix, group).sum().backward()
    assert matrix.grad is not None and matrix.grad.item() == 4096

    x, y, matrix, group = make(*GROUPINGS["100"], dtype=dtype)
    torch.testing.assert_close(segment_gram(x, y, group, 15), gram_loop(x, y, group, 15).float(), rtol=1e-5, atol=1e-5)
    # One rounding, at the end.
    projected = segment_project(x, matrix.float(), group)
    assert projected.dtype == dtype
    torch.testing.assert_close(projected, project_loop(x, matrix, group).to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [*LOW, torch.float32, torch.float64])
def test_gradients_have_the_dtype_of_their_tensor(dtype: torch.dtype) -> None:
    x, y, matrix, group = make(*GROUPINGS["with-none"], dtype=dtype)
    x.requires_grad_(), y.requires_grad_()
    matrix = matrix.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    (segment_gram(x, y, group, 2).sum() + segment_project(x, matrix, group).sum()).backward()
    for t in (x, y, matrix):
        assert t.grad is not None and t.grad.dtype == t.dtype and bool(t.grad.isfinite().all())


@pytest.mark.parametrize("dtype", LOW)
def test_autocast_leaves_the_sums_alone(dtype: torch.dtype) -> None:
    x, y, matrix, group = make(*GROUPINGS["100"], dtype=torch.float32, d=16, e=16)

    def run() -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (x, y, matrix)]
        gram, projected = segment_gram(leaves[0], leaves[1], group, 15), segment_project(leaves[0], leaves[2], group)
        # The backward pass inside autocast too.
        return [gram, projected, *torch.autograd.grad(gram.sin().sum() + projected.sin().sum(), leaves)]

    expected = run()
    with torch.autocast("cpu", dtype=dtype):
        got = run()
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_tokens_without_a_group_may_hold_anything() -> None:
    x, y, matrix, group = make(*GROUPINGS["with-none"])
    expected = segment_gram(x, y, group, 2), segment_project(x, matrix, group)
    bad = torch.full_like(x, float("nan")), torch.full_like(y, float("inf"))
    nobody = (group < 0)[:, None, None]
    x, y = torch.where(nobody, bad[0], x).requires_grad_(), torch.where(nobody, bad[1], y).requires_grad_()
    gram, projected = segment_gram(x, y, group, 2), segment_project(x, matrix.requires_grad_(), group)
    assert torch.equal(gram, expected[0]) and torch.equal(projected, expected[1])
    (gram.sum() + projected.sum()).backward()
    for t in (x, y, matrix):
        assert t.grad is not None and bool(t.grad.isfinite().all())
    assert not x.grad[group < 0].any() and not y.grad[group < 0].any()


def test_groups_do_not_touch_each_other() -> None:
    x, y, matrix, group = make(*GROUPINGS["one-large-among-small"])
    expected = segment_gram(x, y, group, 6), segment_project(x, matrix, group)
    x, matrix = x.clone(), matrix.clone()
    x[group == 0], matrix[0] = float("nan"), float("nan")
    gram, projected = segment_gram(x, y, group, 6), segment_project(x, matrix, group)
    assert torch.equal(gram[1:], expected[0][1:]) and bool(gram[0].isnan().all())
    assert torch.equal(projected[group != 0], expected[1][group != 0])


def test_strided_inputs() -> None:
    groups, num_groups = GROUPINGS["63"]
    x, y, matrix, group = make(groups, num_groups)
    strided = x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    turned = matrix.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert not strided.is_contiguous() and not turned.is_contiguous()
    one_head = y[:, :1].expand(-1, 2, -1)
    expected = gram_loop(x, one_head, group, num_groups)
    torch.testing.assert_close(segment_gram(strided, one_head, group, num_groups), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        segment_project(strided, turned, group), project_loop(x, matrix, group), rtol=0, atol=1e-12
    )


def test_inputs_stay_as_they_are() -> None:
    tensors = make(*GROUPINGS["with-none"])
    before = [t.clone() for t in tensors]
    x, y, matrix, group = tensors
    segment_gram(x, y, group, 2)
    segment_project(x, matrix, group)
    assert all(map(torch.equal, tensors, before))
