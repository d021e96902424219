"""Pseudo-attention: its closed form against sums written out, in extremes of decay and count, with gradients; and the
whole of it against StableMask's own form, softmax(s ⊙ C + P) ⊙ C."""

import contextlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import moda_kernels as mk
from moda_kernels.testing import eager_flex, generator, random_layout, random_mask
from moda_kernels.tokens.pseudo import log_geometric_sum, pseudo_counts

DTYPES = (torch.float64, torch.float32)
DECAYS = (0.0, 1e-12, 1e-6, 1e-3, 0.04, 0.3, 1.0, 7.0, 80.0)
COUNTS = (1, 2, 3, 10, 63, 100, 1000, 10000)


def exact(decay: float, count: int) -> tuple[float, float]:
    """log Σ_{j<c} e^{-βj} and its derivative, term by term without rounding on the way."""
    terms = [math.exp(-decay * j) for j in range(count)]
    total = math.fsum(terms)
    return math.log(total), -math.fsum(j * t for j, t in enumerate(terms)) / total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decay", DECAYS)
def test_sum_and_gradient(decay: float, dtype: torch.dtype) -> None:
    x = torch.full((len(COUNTS),), decay, dtype=dtype, requires_grad=True)
    got = log_geometric_sum(x, torch.tensor(COUNTS, dtype=dtype))
    (grad,) = torch.autograd.grad(got.sum(), x)
    values, slopes = zip(*(exact(float(x[0].detach().double()), c) for c in COUNTS), strict=True)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(got.double(), torch.tensor(values, dtype=torch.float64), rtol=tolerance, atol=tolerance)
    # Near the series' end the slope is a difference of numbers about 1/(βc) times as large.
    slope = torch.tensor(slopes, dtype=torch.float64)
    torch.testing.assert_close(grad.double(), slope, rtol=50 * tolerance, atol=50 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 7, 100, 4096])
def test_on_both_sides_of_the_series(count: int, dtype: torch.dtype) -> None:
    """No step in value or slope where the series hands over to the quotient."""
    edge = (0.05 if dtype == torch.float64 else 0.5) / count
    for decay in (edge * 0.999, edge * 1.001):
        x = torch.tensor([decay], dtype=dtype, requires_grad=True)
        got = log_geometric_sum(x, torch.tensor([count], dtype=dtype))
        (grad,) = torch.autograd.grad(got.sum(), x)
        value, slope = exact(float(x.detach()), count)
        tolerance = 1e-11 if dtype == torch.float64 else 2e-5
        assert float(got.detach()) == pytest.approx(value, rel=tolerance, abs=tolerance)
        assert float(grad) == pytest.approx(slope, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [10**6, 4 * 10**6, 10**8])
@pytest.mark.parametrize("decay", [0.0, 1e-12, 1e-9, 1e-3, 1.0])
def test_large_counts(decay: float, count: int, dtype: torch.dtype) -> None:
    x = torch.tensor([decay], dtype=dtype, requires_grad=True)
    got = log_geometric_sum(x, torch.tensor([count], dtype=dtype))
    (grad,) = torch.autograd.grad(got.sum(), x)
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(60):
        b = mpmath.mpf(float(x.detach()))
        value = mpmath.log(count if b == 0 else mpmath.expm1(-b * count) / mpmath.expm1(-b))
        slope = -mpmath.mpf(count - 1) / 2 if b == 0 else count / mpmath.expm1(b * count) - 1 / mpmath.expm1(b)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    assert float(got.detach()) == pytest.approx(float(value), rel=tolerance, abs=tolerance)
    assert float(grad) == pytest.approx(float(slope), rel=1e3 * tolerance, abs=1e3 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slope_of_the_mass_without_decay(dtype: torch.dtype) -> None:
    """dP/dβ = -e^base c(c-1)/2 at β = 0."""
    base = torch.tensor([0.7, -0.3], dtype=dtype, requires_grad=True)
    decay = torch.zeros(2, dtype=dtype, requires_grad=True)
    counts = torch.tensor([[5, 4, 2, 1, 0]])
    log_mass = mk.PseudoAttention(base, decay).log_mass(torch.full((1, 5), 5), 5 - counts, dtype)
    mass = log_mass.exp()
    c = counts[0].to(dtype)
    torch.testing.assert_close(mass[0], c * base.detach().exp()[:, None])
    for row in range(5):
        d_base, d_decay = torch.autograd.grad(mass[0, :, row].sum(), (base, decay), retain_graph=True)
        torch.testing.assert_close(d_base, base.detach().exp() * c[row])
        torch.testing.assert_close(d_decay, -base.detach().exp() * c[row] * (c[row] - 1) / 2)


@pytest.mark.parametrize("decay", DECAYS)
def test_no_scores_have_no_mass_and_no_gradient(decay: float) -> None:
    base = torch.zeros(2, requires_grad=True)
    rate = torch.full((2,), decay, requires_grad=True)
    seen = torch.tensor([[3, 4, 9]])
    log_mass = mk.PseudoAttention(base, rate, length=3).log_mass(seen, seen, torch.float32)
    assert bool((log_mass == -math.inf).all())
    for grad in torch.autograd.grad(log_mass.exp().sum(), (base, rate)):
        assert bool((grad == 0).all())


@pytest.mark.parametrize(("length", "expected"), [(None, [4, 1, 0]), (6, [3, 2, 0]), (0, [0, 0, 0])])
def test_counts(length: int | None, expected: list[int]) -> None:
    tokens, seen = torch.tensor([[7, 5, 9]]), torch.tensor([[3, 4, 9]])
    mass = mk.PseudoAttention(0.0, 0.0, length).log_mass(tokens, seen, torch.float64).exp()
    torch.testing.assert_close(mass, torch.tensor([[expected]]).double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_is_the_limit(dtype: torch.dtype) -> None:
    base = torch.tensor([0.2, -1.0, 0.0], dtype=dtype, requires_grad=True)
    decay = torch.tensor([0.5, 0.02, 6.0], dtype=dtype, requires_grad=True)
    seen = torch.tensor([[0, 3]])
    results = []
    for length in (math.inf, 10**6):
        mass = mk.PseudoAttention(base, decay, length).log_mass(seen, seen, dtype)
        results.append((mass.expand(1, 3, 2), *torch.autograd.grad(mass.expand(1, 3, 2).sum(), (base, decay))))
    torch.testing.assert_close(results[0], results[1])
    expected = base - torch.log1p(-torch.exp(-decay))
    torch.testing.assert_close(results[0][0], expected[None, :, None].expand(1, 3, 2))


def test_a_number_is_a_tensor_of_it() -> None:
    tokens, seen = torch.full((2, 6), 6), torch.arange(12).view(2, 6) % 7
    for length in (None, 9, math.inf):
        one = mk.PseudoAttention(0.3, 0.7, length).log_mass(tokens, seen, torch.float64)
        other = mk.PseudoAttention(
            torch.full((3,), 0.3, dtype=torch.float64), torch.full((3,), 0.7, dtype=torch.float64), length
        )
        torch.testing.assert_close(one.expand(2, 3, 6), other.log_mass(tokens, seen, torch.float64).expand(2, 3, 6))


@pytest.mark.parametrize("decay", [0.0, 1e-6, 0.04, 0.06, 1.3])
def test_gradcheck(decay: float) -> None:
    tokens, seen = torch.full((1, 4), 9), torch.tensor([[1, 5, 8, 2]])

    def log_mass(base: Tensor, rate: Tensor) -> Tensor:
        return mk.PseudoAttention(base, rate).log_mass(tokens, seen, torch.float64)

    base = torch.tensor([0.1, -0.4], dtype=torch.float64, requires_grad=True)
    # Finite differences step to both sides: not at 0 itself (its slope has a test of its own).
    rate = torch.full((2,), max(decay, 1e-5), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_mass, (base, rate), eps=1e-6, atol=1e-6)


# StableMask's own form


def stable_mask(q: Tensor, k: Tensor, v: Tensor, base: Tensor, decay: Tensor) -> Tensor:
    """softmax(s ⊙ C + P) ⊙ C · v with C the causal 0/1 matrix and P upper triangular: base - β·(j - i - 1)."""
    length = q.shape[2]
    causal = torch.ones(length, length, dtype=q.dtype).tril()
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    scores = base[:, None, None] - decay[:, None, None] * (j - i - 1)
    pseudo = torch.where(j > i, scores, 0)
    s = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return (torch.softmax(s * causal + pseudo, -1) * causal) @ v


@pytest.mark.parametrize("decay", [0.0, 1e-6, 0.1, 2.0])
@pytest.mark.parametrize("length", [1, 2, 63, 100])
def test_is_stable_mask(length: int, decay: float) -> None:
    q, k, v = (torch.randn(2, 3, length, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    base = torch.randn(3, dtype=torch.float64, requires_grad=True)
    rate = torch.full((3,), decay, dtype=torch.float64, requires_grad=True)
    layout = mk.segment_modalities(torch.zeros(2, length, dtype=torch.long))
    out = mk.moda_attention(q, k, v, is_causal=True, layout=layout, pseudo=mk.PseudoAttention(base, rate))
    theirs = stable_mask(q, k, v, base, rate)
    torch.testing.assert_close(out, theirs, rtol=1e-10, atol=1e-12)
    upstream = torch.randn(out.shape, dtype=torch.float64)
    ours = torch.autograd.grad(out, (q, k, v, base, rate), upstream)
    torch.testing.assert_close(
        ours, torch.autograd.grad(theirs, (q, k, v, base, rate), upstream), rtol=1e-8, atol=1e-10
    )


def test_paper_figure() -> None:
    """Its matrix has base = -β: the first pseudo score of a row lies one step below 0."""
    q = torch.zeros(1, 1, 4, 2, dtype=torch.float64)
    layout = mk.segment_modalities(torch.zeros(1, 4, dtype=torch.long))
    pseudo = mk.PseudoAttention(base=-0.5, decay=0.5)
    _, lse = mk.moda_attention(q, q, q, is_causal=True, layout=layout, pseudo=pseudo, return_lse=True)
    rows = [sum([1.0] * (i + 1) + [math.exp(-0.5 * j) for j in range(1, 4 - i)]) for i in range(4)]
    torch.testing.assert_close(lse[0, 0].exp(), torch.tensor(rows, dtype=torch.float64))


@pytest.mark.parametrize("length", [None, 6])
def test_long_rows_take_all_scores(length: int | None) -> None:
    """Joined pseudo scores equal as many keys with value 0, at whatever scores."""
    ids = torch.tensor([[0, 1, 1, 0, -1]])
    layout = mk.segment_modalities(ids)
    q, k, v = (torch.randn(1, 2, 5, 3, dtype=torch.float64) for _ in range(3))
    mask = mk.ModularMask([[1, 0], [1, 3]])
    pseudo = mk.PseudoAttention(0.4, 0.9, length)
    out, lse = mk.moda_attention(q, k, v, layout=layout, mask=mask, pseudo=pseudo, return_lse=True)
    seen = mask.visible(layout)[0]
    for i in range(4):
        count = max((4 if length is None else length) - int(seen[i].sum()), 0)
        scores = (k[0, :, seen[i]] @ q[0, :, i, :, None])[..., 0] * 3**-0.5
        extra = 0.4 - 0.9 * torch.arange(count).double()
        z = torch.logsumexp(torch.cat((scores, extra.expand(2, -1)), -1), -1)
        torch.testing.assert_close(lse[0, :, i], z)
        torch.testing.assert_close(
            out[0, :, i], torch.einsum("hj,hjd->hd", (scores - z[:, None]).exp(), v[0, :, seen[i]])
        )


def test_padding_and_other_documents_do_not_count() -> None:
    q = torch.zeros(5, 1, 2, dtype=torch.float64)
    layout = mk.segment_modalities(torch.tensor([0, 0, -1, 0, 0]), cu_seqlens=torch.tensor([0, 3, 5]))
    options: dict[str, Any] = {"is_causal": True, "layout": layout, "return_lse": True}
    _, lse = mk.moda_attention(q, q, q, pseudo=mk.PseudoAttention(0.0, 0.0), **options)
    torch.testing.assert_close(lse[0, [0, 1, 3, 4]].exp(), torch.full((4,), 2.0).double())
    assert lse[0, 2] == -math.inf


@pytest.mark.parametrize("seed", range(40))
def test_counts_of_a_mask(seed: int) -> None:
    """N and |V| of both kinds of attention, against the mask written out."""
    g = generator(seed)
    layout = random_layout(g, most=24)
    mask = random_mask(g, layout.num_roles)
    queries = layout.queries()
    modality = layout.modality
    real = modality >= 0
    same = modality[..., :, None] == modality[..., None, :]
    together = real[..., :, None] & real[..., None, :]
    if layout.packed:
        together = together & (layout.sequence[:, None] == layout.sequence)
    for split, parts in ((False, [torch.ones_like(same)]), (True, [same, ~same])):
        tokens, visible = pseudo_counts(layout, queries, mask, split)
        assert tokens.dtype == visible.dtype == torch.int32
        for got, seen in ((tokens, together), (visible, mask.visible(layout))):
            assert got.tolist() == [(seen & part).sum(-1).tolist() for part in parts]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu", "flex", "triton"])
def test_a_sink_is_one_score_in_every_row(backend: str, learned: bool, packed: bool) -> None:
    """A column of scores without values, written out; what a row sees has no say in it."""
    g = generator(7)
    ids = torch.tensor([0, 1, 1, -1, 0, 1, 0, 0, 1])
    bounds = {"cu_seqlens": torch.tensor([0, 4, 9], dtype=torch.int32)} if packed else {}
    layout = mk.segment_modalities(ids if packed else ids[None], num_modalities=2, **bounds)
    if backend == "triton" and mk.backends.BACKENDS[backend].why_absent():
        pytest.skip("; ".join(mk.backends.BACKENDS[backend].why_absent()))
    dtype = torch.float32 if backend == "triton" else torch.float64
    q, k, v = (torch.randn(9, 2, 4, generator=g, dtype=dtype) for _ in range(3))
    base = torch.randn(2, generator=g, dtype=dtype, requires_grad=learned)
    mask = mk.ModularMask([[mk.Visibility.PAST, mk.Visibility.HIDDEN], [mk.Visibility.HIDDEN, mk.Visibility.PAST]], 2)
    for one in (base, 0.7):
        arguments = [x if packed else x.transpose(0, 1)[None] for x in (q, k, v)]
        given: dict[str, Any] = {"layout": layout, "mask": mask, "pseudo": mk.PseudoAttention.sink(one)}
        with eager_flex() if backend == "flex" else contextlib.nullcontext():
            out, lse = mk.moda_attention(*arguments, return_lse=True, backend=backend, **given)
        out, lse = (out, lse) if packed else (out[0].transpose(0, 1), lse[0])
        seen = mask.visible(layout)
        seen = seen if packed else seen[0]
        scores = torch.einsum("ihd,jhd->hij", q, k) / 2
        scores = scores.masked_fill(~seen, -math.inf)
        sink = torch.full((2,), one, dtype=dtype) if isinstance(one, float) else one
        scores = torch.cat((scores, sink[:, None, None].expand(-1, 9, 1)), -1)
        real = ids >= 0
        expected = torch.einsum("hij,jhd->ihd", scores.softmax(-1)[..., :-1], v)
        torch.testing.assert_close(out[real], expected[real])
        torch.testing.assert_close(lse[:, real], scores.logsumexp(-1)[:, real])
        if isinstance(one, Tensor) and learned:
            (got,) = torch.autograd.grad(out[real].square().sum(), base)
            (wanted,) = torch.autograd.grad(expected[real].square().sum(), base)
            torch.testing.assert_close(got, wanted)
