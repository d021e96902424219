"""The CPU backend: its plans cover each visible score once, few calls do it, and it does what it says it can't.

That its results are right is for test_parity.py, which runs every backend; here are larger random layouts against the
reference, so that plans with many regions are met, and the properties that only this backend has.
"""

import itertools
import math
import random

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import moda_kernels as mk
from moda_kernels import backends, testing
from moda_kernels.backends.cpu import CpuBackend, kernel
from moda_kernels.backends.cpu.plan import COSTS, Block, make_jobs, make_plan
from moda_kernels.tokens.intervals import mask_intervals
from moda_kernels.tokens.mask import Visibility


def random_layout(rng: random.Random, modalities: int) -> mk.ModalityLayout:
    run = rng.choice([1, 4, 30, 250, 700])
    low = rng.choice([-1, 0])
    if rng.random() < 0.5:
        lengths = [rng.choice([0, 1, 17, 40, 900]) for _ in range(rng.randint(1, 3))]
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        tokens = int(bounds[-1])
        ids = torch.randint(low, modalities, (tokens // run + 1,)).repeat_interleave(run)[:tokens]
        return mk.segment_modalities(ids, num_modalities=modalities, cu_seqlens=bounds)
    batch, length = rng.randint(1, 3), rng.choice([0, 1, 63, 300, 1700])
    ids = torch.randint(low, modalities, (batch, length // run + 1)).repeat_interleave(run, 1)[:, :length]
    if rng.random() < 0.3:
        ids = ids[:1].expand(batch, -1)
    return mk.segment_modalities(ids, num_modalities=modalities)


def random_mask(rng: random.Random, m: int) -> mk.ModularMask:
    window = rng.choice([None, None, 1, 3, 100, 10_000])
    table = [[rng.choice([0, 1, 2, 3, 4, 7]) for _ in range(m)] for _ in range(m)]
    return rng.choice(
        [
            mk.ModularMask.causal(m),
            mk.ModularMask.full(m),
            mk.ModularMask.bidirectional_within(m, [m - 1]),
            mk.ModularMask.self_only(m, causal=True),
            mk.ModularMask.cross_only(m, causal=True),
            mk.ModularMask.fusion(m, [0], causal=True),
            mk.ModularMask(table, window),
            mk.ModularMask([[1 | 2 * (a == b) for a in range(m)] for b in range(m)], window),
        ]
    )


def random_queries(rng: random.Random, layout: mk.ModalityLayout) -> tuple[int, dict]:
    """Number of query rows, and the arguments that place them."""
    if layout.packed:
        if rng.random() < 0.5:
            return layout.num_tokens, {}
        lengths = [rng.randint(0, n) for n in layout.cu_seqlens.diff().tolist()]
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        return int(bounds[-1]), {"cu_seqlens_q": bounds}
    keys = layout.modality.shape[1]
    rows = rng.choice([keys, keys, rng.randint(0, keys)])
    return rows, {"query_start": rng.choice([None, rng.randint(0, keys - rows)])}


def planned(layout: mk.ModalityLayout, mask: mk.ModularMask) -> list[Block]:
    """The kernel calls of a plan for all tokens of a layout."""
    queries = layout.queries()
    intervals = mask_intervals(layout, queries, mask)
    passes = 0, len(intervals.positions)
    jobs = make_jobs(intervals, passes, layout.cu_seqlens, queries.cu_seqlens, layout.packed)
    return [b for job in jobs for r in job.regions for b in r.blocks]


@pytest.mark.parametrize("rules", ["plain", "all"])
@pytest.mark.parametrize("seed", range(32))
def test_agrees_with_the_reference(seed: int, rules: str) -> None:
    rng = random.Random(1000 + seed)
    torch.manual_seed(seed)
    if rules == "plain":
        layout = random_layout(rng, rng.randint(1, 3))
        mask = random_mask(rng, layout.num_modalities)
    else:
        g = testing.generator(seed)
        layout = testing.random_layout(g, most=rng.choice([40, 300]))
        mask = testing.random_mask(g, layout.num_roles)
    m, n = layout.num_modalities, layout.num_sequences
    heads, group, dim = rng.choice([1, 2]), rng.choice([1, 3]), rng.choice([5, 8])
    value_dim = rng.choice([dim, 3, 11])
    rows, options = random_queries(rng, layout)
    options["mask"] = mask

    def tensor(tokens: int, h: int, d: int) -> Tensor:
        shape = (tokens, h, d) if layout.packed else (n, h, tokens, d)
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    keys = layout.num_tokens if layout.packed else layout.modality.shape[1]
    q, k, v = tensor(rows, heads * group, dim), tensor(keys, heads, dim), tensor(keys, heads, value_dim)
    leaves = [q, k, v]
    if rng.random() < 0.5:
        shape = rng.choice([1, n]), rng.choice([1, heads * group]), m, m
        options["pair_bias"] = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        leaves.append(options["pair_bias"])
    if rng.random() < 0.5:
        base, decay = (torch.rand(heads * group, dtype=torch.float64, requires_grad=True) for _ in range(2))
        options["pseudo"] = mk.PseudoAttention(base, decay, rng.choice([None, 50, math.inf]))
        leaves += [base, decay]
    if rng.random() < 0.4:
        options["duplex"] = "split"
        weight = torch.randn(heads * group, dtype=torch.float64, requires_grad=True)
        options["branch_weights"] = (weight, 0.7)
        leaves.append(weight)
    if not layout.packed and rng.random() < 0.4:
        options["attn_mask"] = rng.choice(
            [torch.rand(n, 1, rows, keys) > 0.3, torch.randn(heads * group, rows, keys), torch.rand(rows, 1) > 0.3]
        )
    with_lse = rng.random() < 0.5
    results = []
    for backend in ("reference", "cpu"):
        out, lse = mk.moda_attention(
            q, k, v, layout=layout, enable_gqa=True, return_lse=True, backend=backend, **options
        )
        torch.manual_seed(seed)
        # Not randn_like, which goes by strides.
        loss = (out * torch.randn(out.shape)).sum()
        if with_lse:
            loss = loss + torch.where(torch.isneginf(lse), 0, lse * torch.randn(lse.shape)).sum()
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        results.append([out, torch.where(torch.isneginf(lse), -1e6, lse), *grads])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [-0.125, -1e-20, -0.0, 1e-20, -3.0])
def test_a_scale_of_any_sign_where_the_kernel_masks(scale: float, dtype: torch.dtype) -> None:
    """ATen's kernel multiplies its own -inf by the scale; torch's own causal SDPA gives NaN there."""
    for case in (
        testing.Case("causal", scale=scale, modalities=1, padding=("none",)),
        testing.Case("windowed", lambda m: mk.ModularMask([[1] * m] * m, 20), scale=scale, attn_mask="bool"),
    ):
        testing.check(case, dtype, "cpu", length=100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [-0.3, 1e-5, -1e-5, 40.0])
def test_pair_bias_with_any_scale(scale: float, dtype: torch.dtype) -> None:
    inputs = testing.Case("biased", bias="own", scale=scale).build(dtype)
    if scale == 40.0:
        inputs.tensors["query"] /= 64
    testing.check(inputs, dtype, "cpu")


def test_pair_bias_that_bias_columns_cannot_hold_is_refused() -> None:
    layout = three_images(32, (8,))

    def attend(dtype: torch.dtype, bias: float, scale: float) -> Tensor:
        q = torch.randn(1, 1, 32, 8, dtype=dtype)
        table = torch.full((1, 1, 2, 2), bias)
        return mk.moda_attention(q, q, q, layout=layout, pair_bias=table, scale=scale, backend="cpu")

    lowest = torch.finfo(torch.float32).min
    for dtype, bias, scale, reason in (
        (torch.float16, 1.0, 1e-9, "nearer to 1"),
        (torch.float16, 6e4, 1.0, "larger than 3.28e"),
        (torch.float32, lowest, 1.0, "larger than 1.7e"),
        (torch.bfloat16, -1e9, -1e-30, "larger than 1.7e"),
    ):
        with pytest.raises(NotImplementedError, match=f"pair_bias in .* {reason}"):
            attend(dtype, bias, scale)
    for bias in (lowest / 16, -1e20):  # a number that hides all the same
        assert bool(torch.isfinite(attend(torch.float32, bias, 0.3)).all())


def three_images(length: int, images: tuple[int, ...]) -> mk.ModalityLayout:
    ids = torch.zeros(1, length, dtype=torch.long)
    gap = (length - sum(images)) // (len(images) + 1)
    at = gap
    for size in images:
        ids[:, at : at + size] = 1
        at += size + gap
    return mk.segment_modalities(ids, num_modalities=2)


def test_large_segments_are_few_calls() -> None:
    layout = three_images(8192, (2880, 576, 1152))
    blocks = planned(layout, mk.ModularMask.bidirectional_within(2, [1]))
    assert len(blocks) <= 11  # one per image, two per text but for the first
    assert all(b.mask is None for b in blocks)
    assert [b.causal for b in planned(layout, mk.ModularMask.causal(2))] == [True]


def test_short_segments_share_calls() -> None:
    ids = torch.arange(4096).div(16, rounding_mode="floor").remainder(2)[None]
    layout = mk.segment_modalities(ids, num_modalities=2)
    blocks = planned(layout, mk.ModularMask.bidirectional_within(2, [1]))
    assert len(blocks) <= 2 * 4096 / 256  # 256 segments


@pytest.mark.parametrize("fewer", [False, True])
def test_equal_documents_share_calls(fewer: bool) -> None:
    """Documents of one kind side by side are a batch; others among them are not."""
    a, b = [0] * 5 + [1] * 9 + [0] * 3, [1, 0, 0]
    documents = [a, a, a, b, b, [], a]
    bounds = torch.tensor([0, *map(len, documents)]).cumsum(0).int()
    ids = torch.tensor([m for document in documents for m in document])
    layout = mk.segment_modalities(ids, num_modalities=2, cu_seqlens=bounds)
    mask = mk.ModularMask.bidirectional_within(2, [1])
    options = {}
    rows = len(ids)
    if fewer:
        options["cu_seqlens_q"] = torch.tensor([0, *(min(len(d), 2) for d in documents)]).cumsum(0).int()
        rows = int(options["cu_seqlens_q"][-1])
    else:
        calls = len(planned(layout, mask))
        alone = [mk.segment_modalities(torch.tensor([d]), num_modalities=2) for d in (a, b, a)]
        assert calls == sum(len(planned(one, mask)) for one in alone)
    tensors = [torch.randn(n, h, 8, dtype=torch.float64, requires_grad=True) for n, h in ((rows, 4), (len(ids), 2))]
    q, k, v = *tensors, torch.randn(len(ids), 2, 8, dtype=torch.float64, requires_grad=True)
    base = torch.rand(4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(rows, 4, 8, dtype=torch.float64)
    for pseudo in (None, mk.PseudoAttention(base)):
        results = []
        for backend in ("reference", "cpu"):
            out, lse = mk.moda_attention(
                q, k, v, layout=layout, mask=mask, enable_gqa=True, pseudo=pseudo, return_lse=True, backend=backend,
                **options,
            )  # fmt: skip
            leaves = [q, k, v] if pseudo is None else [q, k, v, base]
            results.append([out, lse, *torch.autograd.grad((out * weight).sum() + lse.sin().sum(), leaves)])
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)


def test_unequal_documents_are_calls_side_by_side() -> None:
    """One call each, forward and backward, their results put together at once; none for a document without tokens."""
    lengths = [9, 5, 0, 12]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    layout = mk.segment_modalities(torch.arange(26) // 4 % 2, num_modalities=2, cu_seqlens=bounds)
    leaves = [torch.randn(26, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    mask, weight = mk.ModularMask.bidirectional_within(2, [1]), torch.randn(26, 4, 8)

    def run(backend: str) -> list[Tensor]:
        out = mk.moda_attention(*leaves, layout=layout, mask=mask, enable_gqa=True, backend=backend)
        return [out, *torch.autograd.grad(out, leaves, weight)]

    torch.testing.assert_close(run("cpu"), run("reference"))  # and masks are written out
    with Calls() as calls:
        run("cpu")
    aten = "aten::_scaled_dot_product_flash_attention_for_cpu"
    counts = [calls.names.count(name) for name in (aten, f"{aten}_backward", "aten::cat")]
    assert counts == [3, 3, 5]
    assert not {"aten::zero_", "aten::copy_", "aten::index_select", "aten::masked_fill"} & {*calls.names}


class LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("kind", ["large", "short"])
def test_memory_is_linear_in_length(kind: str) -> None:
    length = 6144
    if kind == "large":
        layout = three_images(length, (2880, 576))
    else:
        ids = torch.arange(length).div(16, rounding_mode="floor").remainder(2)[None]
        layout = mk.segment_modalities(ids, num_modalities=2)
    q, k, v = (torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3))
    mask = mk.ModularMask.bidirectional_within(2, [1])
    with LargestTensor() as largest:
        mk.moda_attention(q, k, v, layout=layout, mask=mask, backend="cpu").sum().backward()
    assert largest.numel <= COSTS.most * 4 * 1024 < length**2 / 8


def test_plans_are_made_once_per_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr("moda_kernels.backends.cpu.operators.make_plan", lambda *a: made.append(a) or make_plan(*a))
    layout = three_images(256, (64,))
    q = torch.randn(1, 2, 256, 8)
    for _ in range(3):
        mk.moda_attention(q, q, q, layout=layout, is_causal=True, backend="cpu")
    assert len(made) == 1
    mk.moda_attention(q, q, q, layout=layout, backend="cpu")
    assert len(made) == 2


@pytest.mark.parametrize(
    ("pseudo", "error", "message"),
    [
        (mk.PseudoAttention(), NotImplementedError, "second derivatives"),
        (None, RuntimeError, "derivative for aten::_scaled.* is not implemented"),  # one call: as of SDPA
    ],
)
def test_second_backward_is_refused(pseudo: mk.PseudoAttention, error: type[Exception], message: str) -> None:
    layout = three_images(64, (16,))
    q = torch.randn(1, 1, 64, 8, requires_grad=True)
    out = mk.moda_attention(q, q, q, layout=layout, is_causal=True, pseudo=pseudo, backend="cpu")
    with pytest.raises(error, match=message):
        (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
        (grad * q).sum().backward()


class Calls(TorchDispatchMode):
    """The operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["causal", "full", "decode", "decode within", "packed", "one segment"])
def test_one_call_and_nothing_else(kind: str) -> None:
    """Where one kernel call does the whole job, forward and backward."""
    length, causal, within = 24, mk.ModularMask.causal(2), mk.ModularMask.bidirectional_within(2, [1])
    ids = torch.arange(length).expand(2, -1) // 5 % 2
    bounds, rows, mask = None, length, {"full": None, "decode within": within}.get(kind, causal)
    if kind == "packed":
        ids, bounds = (torch.arange(length) % 8 // 5), torch.tensor([0, 8, 16, 24])
    elif kind == "one segment":
        ids, mask = torch.ones_like(ids), within
    elif "decode" in kind:
        rows = 1
    layout = mk.segment_modalities(ids, num_modalities=2, cu_seqlens=bounds)
    shapes = [(2, 4, rows, 8), (2, 2, length, 8), (2, 2, length, 8)]
    if kind == "packed":
        shapes = [(length, 4, 8), (length, 2, 8), (length, 2, 8)]
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]

    def run(backend: str) -> list[Tensor]:
        out = mk.moda_attention(*leaves, layout=layout, mask=mask, enable_gqa=True, backend=backend)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    torch.testing.assert_close(run("cpu"), run("reference"))
    with Calls() as calls:
        run("cpu")
    views = ("transpose", "squeeze", "select", "slice", "alias", "detach", "unflatten", "view", "expand")
    work = [name for name in calls.names if not any(view in name for view in views)]
    if "decode" in kind:  # heads of a group are rows of one head
        work = [name for name in work if name not in ("aten::clone", "aten::_unsafe_view")]
    aten = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert [name for name in work if name != "aten::ones_like"] == [aten, f"{aten}_backward"], calls.names


def test_functional_gradient() -> None:
    layout = three_images(64, (16,))
    q = torch.randn(1, 1, 64, 8, dtype=torch.float64)

    def loss(x: Tensor, backend: str) -> Tensor:
        return mk.moda_attention(x, q, q, layout=layout, is_causal=True, backend=backend).square().sum()

    expected = torch.func.grad(loss)(q, "reference")
    torch.testing.assert_close(torch.func.grad(loss)(q, "cpu"), expected)


def test_what_it_cannot_do_is_refused_or_left_to_another(caplog: pytest.LogCaptureFixture) -> None:
    layout = three_images(32, (8,))
    q = torch.randn(1, 1, 32, 8)
    attn_mask = torch.zeros(32, 32, requires_grad=True)
    with pytest.raises(NotImplementedError, match="cpu: it has no gradient for attn_mask"):
        mk.moda_attention(q, q, q, attn_mask, layout=layout, backend="cpu")
    backends._told.clear()
    with caplog.at_level("WARNING", "moda_kernels"):
        for _ in range(2):
            mk.moda_attention(q, q, q, attn_mask, layout=layout).sum().backward()
    assert attn_mask.grad is not None
    assert len(caplog.records) == 1 and "no gradient for attn_mask" in caplog.text
    bias = torch.full((1, 1, 2, 2), -math.inf)
    with pytest.raises(NotImplementedError, match="pair_bias must be finite"):
        mk.moda_attention(q, q, q, layout=layout, pair_bias=bias, backend="cpu")


def test_missing_operator_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("moda_kernels.backends.cpu._OPERATORS", ("_no_such_operator",))
    (reason,) = CpuBackend().why_absent()
    assert "aten::_no_such_operator" in reason
    backends._told.clear()
    layout = three_images(32, (8,))
    q = torch.randn(1, 1, 32, 8)
    with caplog.at_level("WARNING", "moda_kernels"):
        for _ in range(2):
            mk.moda_attention(q, q, q, layout=layout)
    assert len(caplog.records) == 1 and "reference" in caplog.text


def test_hidden_rows_among_visible_ones() -> None:
    """Rows that ATen would give lse 0 to, because their block hides them wholly."""
    layout = mk.segment_modalities(torch.tensor([[0, 1] * 40]), num_modalities=2)
    mask = mk.ModularMask([[Visibility.HIDDEN, Visibility.PAST], [Visibility.HIDDEN, Visibility.HIDDEN]])
    q = torch.randn(1, 2, 80, 8, dtype=torch.float64)
    expected = mk.moda_attention(q, q, q, layout=layout, mask=mask, backend="reference", return_lse=True)
    got = mk.moda_attention(q, q, q, layout=layout, mask=mask, backend="cpu", return_lse=True)
    for e, g in zip(expected, got, strict=True):
        torch.testing.assert_close(g, e)


def test_default_device_does_not_matter() -> None:
    layout = three_images(700, (64, 300))
    mask = mk.ModularMask.bidirectional_within(2, [1])
    q = torch.randn(1, 2, 700, 8)
    attn_mask = torch.rand(700, 700) > 0.1
    options = {"mask": mask, "pseudo": mk.PseudoAttention(length=800), "duplex": "split"}

    def run(layout: mk.ModalityLayout, backend: str) -> list[Tensor]:
        leaf = q.clone().requires_grad_()
        aligner = mk.DuplexAligner(8, 2, scope="causal", device="cpu")
        out = mk.moda_attention(
            leaf, leaf, leaf, attn_mask, layout=layout, key_map=aligner(leaf, layout), backend=backend, **options
        )
        return [out, *torch.autograd.grad(out.sum(), leaf)]

    for backend in ("cpu", "reference"):
        expected = run(layout, backend)
        with torch.device("meta"):
            fresh = mk.segment_modalities(layout.modality.long())
            assert torch.equal(fresh.segment, layout.segment)
            got = run(fresh, backend)
        for e, g in zip(expected, got, strict=True):
            torch.testing.assert_close(g, e)


@pytest.mark.parametrize("threads", [1, 12])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_few_rows(dtype: torch.dtype, rows: int, group: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of a group as rows, keys split among cores; with and without masks, some of which hide whole parts."""
    monkeypatch.setattr(kernel, "LEAST_KEYS", 5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    split = []
    monkeypatch.setattr(kernel, "_in_parts", lambda *a, run=kernel._in_parts: split.append(a[-1]) or run(*a))
    ids = torch.arange(44) // 9 % 2
    lengths = torch.tensor([0, 44, 67])
    rules = mk.ModularMask.causal(2).rules
    masks = [
        mk.ModularMask.full(2), mk.ModularMask(rules), mk.ModularMask(rules, 7), mk.ModularMask.self_only(2),
        mk.ModularMask([[0, 1], [0, 2]]),
    ]  # fmt: skip
    tolerance = 1e-9 if dtype == torch.float64 else 2e-2
    one = mk.segment_modalities(ids[None], num_modalities=2)
    two = mk.segment_modalities(torch.cat((ids, ids[:23])), num_modalities=2, cu_seqlens=lengths)
    for layout, more in ((one, {}), (two, {"cu_seqlens_q": torch.tensor([0, rows, 2 * rows])})):
        keys, number = layout.num_tokens, layout.num_sequences
        shapes = [(number * rows, 2 * group, 8), (keys, 2, 8), (keys, 2, 8)]
        tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
        added = [None]
        if not layout.packed:
            tensors = [x.transpose(0, 1)[None] for x in tensors]
            added += [torch.randn(1, 2 * group, rows, keys), torch.rand(rows, keys) > 0.8]
        for mask, attn_mask in itertools.product(masks, added):
            options = more | {"layout": layout, "mask": mask, "attn_mask": attn_mask, "enable_gqa": True}
            got = mk.moda_attention(*tensors, return_lse=True, backend="cpu", **options)
            exact = [x.double() for x in tensors]
            expected = mk.moda_attention(*exact, return_lse=True, backend="reference", **options)
            for x, y in zip(got, expected, strict=True):
                torch.testing.assert_close(x.double(), y.double(), rtol=tolerance, atol=tolerance)
    assert bool(split) == (threads > 1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_heads_of_a_group_as_rows(dtype: torch.dtype, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ATen's kernel does it head by head, whatever the strides."""
    monkeypatch.setattr(kernel, "LEAST_KEYS", 35)
    together = []
    monkeypatch.setattr(kernel, "_grouped", lambda *a, run=kernel._grouped: together.append(a) or run(*a))
    q, dout = (torch.randn(2, 70, 6, 8, dtype=dtype).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(2, 2, 35, 8, dtype=dtype) for _ in range(2))
    mask = torch.zeros(2, 6, 70, 35, dtype=dtype).masked_fill(torch.rand(2, 6, 70, 35) < 0.3, -math.inf)
    mask = mask if masked else None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    out, lse = kernel.forward(q, k, v, False, mask, 0.3)
    assert bool(together) != masked
    expected = kernel._kernel(q, k, v, False, mask, 0.3)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close((out, lse), expected, **tolerance)
    together.clear()
    got = kernel.backward(dout, q, k, v, *expected, False, mask, 0.3)
    assert bool(together) == (dtype == torch.bfloat16)
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grads = operator(dout, q, k, v, *expected, 0.0, False, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(got, tuple(grads), **tolerance)


@pytest.mark.parametrize("which", ["query", "key", "value", "d out"])
def test_rows_whose_numbers_are_apart(which: str) -> None:
    """ATen's kernel takes a last stride of 1 for granted."""
    layout = mk.segment_modalities(torch.tensor([[0, 0, 1, 1, 0, 1, 1]]), num_modalities=2)
    mask = mk.ModularMask.bidirectional_within(2, [1])
    given = {name: torch.randn(1, 2, 7, 8, dtype=torch.float64) for name in ("query", "key", "value", "d out")}
    apart = given | {which: torch.stack((given[which], torch.full_like(given[which], math.nan)), -1)[..., 0]}
    assert apart[which].stride(-1) == 2
    results = []
    for tensors in (given, apart):
        leaves = [tensors[name].requires_grad_() for name in ("query", "key", "value")]
        out = mk.moda_attention(*leaves, layout=layout, mask=mask, backend="cpu")
        results.append((out, *torch.autograd.grad(out, leaves, tensors["d out"])))
    torch.testing.assert_close(results[1], results[0])
