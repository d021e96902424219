"""Duplex alignment: DuplexAligner and align_keys against the token-by-token reference, what they leave alone, hard
keys, and the module's own behaviour."""

import copy
import functools
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import moda_kernels as mk
from moda_kernels.alignment.maps import ModalityMap, normed

FUSIONS, NORMS, SCOPES = ("add", "linear", "concat"), ("row", "frobenius"), ("sequence", "causal")
D = 4
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def batch(*rows: list[int], m: int) -> mk.ModalityLayout:
    return mk.segment_modalities(torch.tensor(rows).clamp(max=m - 1), num_modalities=m)


def packed(ids: list[int], bounds: list[int], m: int) -> mk.ModalityLayout:
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    return mk.segment_modalities(torch.tensor(ids).clamp(max=m - 1), num_modalities=m, cu_seqlens=cu_seqlens)


def layouts(m: int) -> dict[str, mk.ModalityLayout]:
    return {
        # Padding first, in the middle and last; a row of one modality; a row of padding.
        "batch": batch([-1, 0, 0, 1, -1, 1, 2, 0, 1, -1], [1] * 10, [0, 1, 2, 0, 1, 2, 0, 1, 2, 0], [-1] * 10, m=m),
        # Empty documents, one of padding, one of a single token.
        "packed": packed([0, 0, 1, 1, 2, 0, 1, -1, -1, 2, 1, -1, 1, 0], [0, 0, 5, 5, 8, 9, 10, 14, 14], m),
        "one token": batch([0], [-1], m=m),
    }


def keys(layout: mk.ModalityLayout, heads: int = 2, dim: int = D, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = (layout.num_tokens, heads, dim)
    if not layout.packed:
        rows, length = layout.modality.shape
        shape = (rows, heads, length, dim)
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def tokens(x: Tensor, layout: mk.ModalityLayout) -> Tensor:
    """[B, H, L, D] or [T, H, D] to [tokens, H, D]."""
    return x if layout.packed else x.transpose(1, 2).flatten(0, 1)


def aligner(m: int, dim: int = D, *, cls: type = mk.DuplexAligner, seed: int = 0, **options):
    """An aligner that changes keys."""
    module = cls(dim, m, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def fuse(module: mk.DuplexAligner, key: Tensor, layout: mk.ModalityLayout) -> Tensor:
    return mk.align_keys(key, module(key, layout), layout)


# Against the definition


@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_against_the_reference(fusion: str, norm: str, scope: str, m: int) -> None:
    for aligned in {None, (0,), (m - 1,)}:
        options = {"fusion": fusion, "norm": norm, "scope": scope, "aligned": aligned}
        module, literal = aligner(m, **options), aligner(m, cls=mk.reference.DuplexAligner, seed=1, **options)
        literal.load_state_dict(module.state_dict())
        for name, layout in layouts(m).items():
            key = keys(layout).requires_grad_()
            got, expected = fuse(module, key, layout), literal.fused_keys(key, layout)
            torch.testing.assert_close(got, expected, **EXACT, msg=lambda s, name=name: f"{name}: {s}")
            weight = torch.randn_like(key)
            got = torch.autograd.grad((got * weight).sum(), (key, *module.parameters()), materialize_grads=True)
            expected = (expected * weight).sum()
            expected = torch.autograd.grad(expected, (key, *literal.parameters()), materialize_grads=True)
            for of, a, b in zip(("key", *module.state_dict()), got, expected, strict=True):
                torch.testing.assert_close(
                    a, b, **EXACT, msg=lambda s, of=of, name=name: f"{name}, gradient of {of}: {s}"
                )


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_keys_that_keep_their_lengths(fusion: str, norm: str, scope: str) -> None:
    options = {"fusion": fusion, "norm": norm, "scope": scope, "aligned": (0, 2), "renorm": True}
    module, literal = aligner(3, **options), aligner(3, cls=mk.reference.DuplexAligner, **options)
    for name, layout in layouts(3).items():
        key = keys(layout)
        flat = tokens(key, layout)
        flat[2::5] = 0  # some keys are zero
        key.requires_grad_()
        got, expected = fuse(module, key, layout), literal.fused_keys(key, layout)
        torch.testing.assert_close(got, expected, **EXACT, msg=lambda s, name=name: f"{name}: {s}")
        torch.testing.assert_close(got.norm(dim=-1), key.norm(dim=-1), **EXACT)
        if scope == "sequence":
            key_map = module(key, layout)
            assert isinstance(key_map, ModalityMap) and not key_map.foldable
            torch.testing.assert_close(mk.reference.align_keys(key, key_map, layout), got, **EXACT)
        weight = torch.randn_like(key)
        got = torch.autograd.grad(got, (key, *module.parameters()), weight, materialize_grads=True)
        # The norm of a zero key has no gradient: a subgradient is 0.
        expected = torch.autograd.grad(expected, (key, *literal.parameters()), weight, materialize_grads=True)
        for of, a, b in zip(("key", *module.state_dict()), got, expected, strict=True):
            torch.testing.assert_close(a, b, **EXACT, msg=lambda s, of=of, name=name: f"{name}, {of}: {s}")


def test_a_fused_key_of_zero_stays_zero() -> None:
    layout = layouts(3)["batch"]
    for scope in SCOPES:
        module, key = aligner(3, fusion="linear", scope=scope, renorm=True), keys(layout).requires_grad_()
        with torch.no_grad():
            module.weight[1] = 0
        fused = fuse(module, key, layout)
        zero = (fused == 0).all(-1)
        assert bool(zero.any()) and bool((layout.modality[:, None].expand(zero.shape)[zero] == 1).all())
        for grad in torch.autograd.grad(fused, (key, *module.parameters()), torch.randn_like(fused)):
            assert bool(grad.isfinite().all())


@pytest.mark.parametrize("length", [1, 63, 100])
@pytest.mark.parametrize("scope", SCOPES)
def test_odd_lengths(scope: str, length: int) -> None:
    layout = mk.segment_modalities(torch.randint(-1, 3, (2, length)), num_modalities=4)
    module = aligner(4, fusion="concat", scope=scope)
    literal = aligner(4, cls=mk.reference.DuplexAligner, fusion="concat", scope=scope)
    key = keys(layout)
    torch.testing.assert_close(fuse(module, key, layout), literal.fused_keys(key, layout), **EXACT)


@pytest.mark.parametrize("scope", SCOPES)
def test_no_tokens(scope: str) -> None:
    module = aligner(2, scope=scope)
    empty = [torch.zeros(shape, dtype=torch.int32) for shape in ((2, 0), (0, 5), (0, 0))]
    cu_seqlens = [torch.zeros(n, dtype=torch.int32) for n in (1, 3)]
    for layout in [mk.segment_modalities(ids, num_modalities=2) for ids in empty] + [
        mk.segment_modalities(torch.zeros(0, dtype=torch.int32), num_modalities=2, cu_seqlens=c) for c in cu_seqlens
    ]:
        key = keys(layout).requires_grad_()
        fused = fuse(module, key, layout)
        assert fused.shape == key.shape
        fused.sum().backward()
        gram = mk.modality_gram(key, key, layout)
        assert gram.shape == (layout.num_sequences, 2, 2, D, D) and not gram.any()
        assert mk.modality_gram(key, key, layout, by="segment").shape == (0, 2, D, D)
        assert mk.gram_affinity(gram).shape == (layout.num_sequences, 2, 2, 2)
        out = mk.moda_attention(key, key, key, layout=layout, key_map=module(key, layout))
        assert out.shape == key.shape


@pytest.mark.parametrize("scope", SCOPES)
def test_a_packed_batch_equals_its_documents(scope: str) -> None:
    whole = layouts(3)["packed"]
    module = aligner(3, fusion="linear", scope=scope)
    key = keys(whole)
    fused = fuse(module, key, whole)
    bounds = whole.cu_seqlens.tolist()
    for a, b in itertools.pairwise(bounds):
        layout = mk.segment_modalities(whole.modality[None, a:b], num_modalities=3)
        alone = fuse(module, key[a:b].transpose(0, 1)[None], layout)
        torch.testing.assert_close(alone[0].transpose(0, 1), fused[a:b], **EXACT)


def test_side_by_side_items_are_not_each_others_modality() -> None:
    ids, items = torch.tensor([[0, 0, 1, 1, 1, 1, 0]]), torch.tensor([[0, 0, 1, 1, 2, 2, 0]])
    one, two = (mk.segment_modalities(ids, item_ids=i) for i in (None, items))
    assert (one.max_segments, two.max_segments) == (3, 4)
    for scope in SCOPES:
        module, key = aligner(2, scope=scope), keys(one)
        torch.testing.assert_close(fuse(module, key, one), fuse(module, key, two), **EXACT)


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(fusion: str, scope: str, norm: str, renorm: bool) -> None:
    layout = packed([0, 1, 1, -1, 2, 0, 1, 2], [0, 6, 8], 3)
    module = aligner(3, dim=2, fusion=fusion, scope=scope, norm=norm, renorm=renorm)
    names = list(module.state_dict())

    def fused(key: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        return mk.align_keys(key, torch.func.functional_call(module, named, (key, layout)), layout)

    inputs = (
        keys(layout, heads=1, dim=2).requires_grad_(),
        *(p.detach().requires_grad_() for p in module.parameters()),
    )
    assert torch.autograd.gradcheck(fused, inputs)
    if norm == "row":
        assert torch.autograd.gradgradcheck(fused, inputs, atol=1e-4)


def test_alignment_folds_into_the_query() -> None:
    """q·(k A) = (q Aᵀ)·k, and the reference's align_keys looks up the same matrices."""
    for name, fusion in itertools.product(("batch", "packed"), FUSIONS):
        layout = layouts(3)[name]
        module, key = aligner(3, fusion=fusion), keys(layout)
        key_map = module(key, layout)
        fused = mk.align_keys(key, key_map, layout)
        torch.testing.assert_close(mk.reference.align_keys(key, key_map, layout), fused, **EXACT)
        assert isinstance(key_map, ModalityMap) and key_map.foldable
        matrix = key_map.matrix[layout.sequence.flatten().long(), layout.modality.flatten().clamp(min=0).long()]
        query = torch.randn_like(tokens(key, layout))
        folded = torch.einsum("the,thde->thd", query, matrix)
        expected, got = (query * tokens(fused, layout)).sum(-1), (folded * tokens(key, layout)).sum(-1)
        real = layout.modality.flatten() >= 0
        torch.testing.assert_close(got[real], expected[real], **EXACT)
    causal = aligner(3, scope="causal")(key, layout)
    torch.testing.assert_close(
        mk.reference.align_keys(key, causal, layout), mk.align_keys(key, causal, layout), **EXACT
    )


# What stays as it is


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_fresh_aligner_changes_nothing(fusion: str, scope: str, dtype: torch.dtype, renorm: bool) -> None:
    layout = layouts(3)["batch"]
    key, value, query = (keys(layout, dtype=dtype) for _ in range(3))
    module = mk.DuplexAligner(D, 3, fusion=fusion, scope=scope, renorm=renorm)
    key_map = module(key, layout)
    fused = mk.align_keys(key, key_map, layout)
    assert fused.dtype == dtype
    # The length is taken twice.
    torch.testing.assert_close(
        fused, key, rtol=(8 if renorm and dtype.itemsize > 2 else 1) * torch.finfo(dtype).eps, atol=0
    )
    plain = mk.moda_attention(query, key, value, layout=layout, is_causal=True)
    aligned = mk.moda_attention(query, key, value, layout=layout, is_causal=True, key_map=key_map)
    # One rounding of keys in the arithmetic's dtype; low precision is computed wider.
    torch.testing.assert_close(
        aligned, plain, rtol=1e-2 if dtype.itemsize == 2 else 8 * torch.finfo(dtype).eps, atol=1e-7
    )


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_keys_that_are_not_mapped_are_returned_bit_for_bit(
    fusion: str, scope: str, dtype: torch.dtype, renorm: bool
) -> None:
    for layout in layouts(3).values():
        key = keys(layout, dtype=dtype)
        key = torch.where(key.abs() < 0.1, -0.0, key).requires_grad_()
        module = aligner(3, fusion=fusion, scope=scope, aligned=(0, 1), renorm=renorm)
        modality, sequence = layout.modality.flatten(), layout.sequence.flatten()
        order = torch.arange(len(modality))
        other = (sequence[:, None] == sequence) & (modality[:, None] != modality) & (modality >= 0)
        if scope == "causal":
            other &= order < order[:, None]
        kept = ~((modality >= 0) & (modality < 2) & other.any(1))
        fused = fuse(module, key, layout)
        same, wide = (tokens(x.detach(), layout) for x in (key, fused))
        bits = torch.int16 if dtype.itemsize == 2 else torch.int32 if dtype.itemsize == 4 else torch.int64
        assert torch.equal(same[kept].view(bits), wide[kept].view(bits))
        assert not kept.all() or layout.num_tokens == 2
        assert bool((same[~kept] != wide[~kept]).any(-1).all())
        # Their direct gradient is the upstream's; padding gets exactly that.
        (grad,) = torch.autograd.grad(fused.sum(), key)
        assert bool((tokens(grad, layout)[modality < 0] == 1).all())


def test_no_modality_switched_on() -> None:
    layout = layouts(3)["batch"]
    for scope in SCOPES:
        key = keys(layout)
        assert torch.equal(fuse(aligner(3, scope=scope, aligned=()), key, layout), key)


def test_padding_may_hold_anything() -> None:
    layout = layouts(3)["batch"]
    hidden = (layout.modality < 0)[:, None, :, None]
    for fusion, scope, renorm in itertools.product(FUSIONS, SCOPES, (False, True)):
        module, key = aligner(3, fusion=fusion, scope=scope, renorm=renorm), keys(layout)
        expected = fuse(module, key, layout)
        bad = torch.where(hidden, float("nan"), key).requires_grad_()
        got = fuse(module, bad, layout)
        assert torch.equal(torch.where(hidden, 0, got), torch.where(hidden, 0, expected))
        torch.where(hidden, 0, got).sum().backward()
        assert bad.grad is not None and bool(bad.grad.isfinite().all())
        assert all(bool(p.grad.isfinite().all()) for p in module.parameters())


# Hard keys


@pytest.mark.parametrize("norm", NORMS)
def test_norm_of_zero_rows(norm: str) -> None:
    gram = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    gram[0, 0, 1], gram[1] = 0, 0
    zero = (gram == 0).all(-1) if norm == "row" else (gram == 0).all(-1).all(-1, keepdim=True).expand(3, 2, 4)
    gram.requires_grad_()
    out = normed(gram, norm)
    assert bool(out.isfinite().all()) and not out[zero].any()
    sizes = out.norm(dim=-1) if norm == "row" else out.flatten(-2).norm(dim=-1, keepdim=True).expand(3, 2, 4)
    torch.testing.assert_close(sizes, (~zero).double(), rtol=0, atol=1e-14)
    (grad,) = torch.autograd.grad(out, gram, torch.randn_like(out))
    assert bool(grad.isfinite().all())
    assert not grad[zero].any(), "a zero row has zero gradient"


@pytest.mark.parametrize("scope", SCOPES)
def test_a_zero_column_of_keys(scope: str) -> None:
    """Where entry c of one modality's keys is zero, row c of the rest of others is: no effect, no gradient."""
    layout, c = batch([0, 1, 0, 1, 1, 0], m=2), 2
    module = aligner(2, scope=scope)
    modality, order = layout.modality[0], torch.arange(6)
    key = keys(layout)
    key[:, :, modality == 0, c] = 0
    key.requires_grad_()
    other = modality[:, None] != modality
    if scope == "causal":
        other &= order < order[:, None]
    rest = torch.einsum("tj,bhjd,bhje->bhtde", other.double(), key, key)
    row = ((torch.arange(D) != c)[:, None] | (modality == 0)[:, None, None]) & other.any(1)[:, None, None]
    hat = torch.where(row, rest / torch.where(row, rest, 1).norm(dim=-1, keepdim=True), 0)
    expected = key + module.ratio[modality.long()] * torch.einsum("bhtd,bhtde->bhte", key, hat)
    fused = fuse(module, key, layout)
    torch.testing.assert_close(fused, expected, **EXACT)
    weight = torch.randn_like(key)
    got, expected = (torch.autograd.grad(x, (key, module.ratio), weight) for x in (fused, expected))
    for a, b in zip(got, expected, strict=True):
        assert bool(a.isfinite().all())
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("size", [1e-18, 1e15])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_huge_and_tiny_keys(fusion: str, scope: str, norm: str, size: float, renorm: bool) -> None:
    """R̂ does not depend on the keys' size: k' of c·k is c·k', with the same gradient."""
    layout = layouts(3)["batch"]
    module = aligner(3, fusion=fusion, scope=scope, norm=norm, renorm=renorm).float()
    key = keys(layout, dtype=torch.float32)
    weight = torch.randn_like(key)

    def run(scale: float) -> tuple[Tensor, Tensor]:
        scaled = (key * scale).requires_grad_()
        fused = fuse(module, scaled, layout)
        (grad,) = torch.autograd.grad(fused, scaled, weight)
        return fused / scale, grad

    for a, b in zip(run(size), run(1.0), strict=True):
        assert bool(a.isfinite().all())
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_low_precision_keys(fusion: str, scope: str, dtype: torch.dtype) -> None:
    """Computed in float32, rounded once."""
    layout = layouts(3)["batch"]
    module, key = aligner(3, fusion=fusion, scope=scope), keys(layout, dtype=dtype)
    expected = fuse(module, key.double(), layout)
    fused = fuse(module.float(), key.requires_grad_(), layout)
    assert fused.dtype == dtype
    torch.testing.assert_close(fused.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)
    fused.float().square().sum().backward()
    assert key.grad is not None and key.grad.dtype == dtype and bool(key.grad.isfinite().all())


def test_large_half_precision_keys_do_not_overflow() -> None:
    layout = batch([0, 1] * 32, m=2)
    key = torch.full((1, 1, 64, D), 300.0, dtype=torch.float16)
    for scope in SCOPES:
        module = aligner(2, scope=scope).half()
        assert bool(fuse(module, key, layout).isfinite().all())


@pytest.mark.parametrize("pair", [*itertools.permutations([torch.float64, torch.float32, torch.bfloat16], 2)])
@pytest.mark.parametrize("scope", SCOPES)
def test_map_made_in_one_dtype_applied_in_another(scope: str, pair: tuple[torch.dtype, torch.dtype]) -> None:
    """As where keys are cached in another dtype than they are made in."""
    layout, module = layouts(2)["batch"], aligner(2, scope=scope)
    source = keys(layout, dtype=torch.bfloat16)
    expected = fuse(module, source.double(), layout)
    fused = mk.align_keys(source.to(pair[1]), module(source.to(pair[0]), layout), layout)
    assert fused.dtype == pair[1]
    torch.testing.assert_close(fused.double(), expected, rtol=2 * torch.finfo(fused.dtype).eps, atol=1e-4)


@pytest.mark.parametrize("scope", SCOPES)
def test_sequences_do_not_touch_each_other(scope: str) -> None:
    """An overflow or NaN in one sequence stays there."""
    layout, module = batch([0, 1, 0, 1], [0, 1, 1, 0], [1, 0, 1, 0], m=2), aligner(2, scope=scope)
    key = keys(layout)
    expected = fuse(module, key, layout)
    for bad in (float("nan"), float("inf"), 1e200):
        broken = key.clone()
        broken[1, :, 2] = bad
        fused = fuse(module, broken, layout)
        assert torch.equal(fused[0], expected[0]) and torch.equal(fused[2], expected[2]), bad
        assert bool(fused[1, :, 3].isnan().all()), "a sum that is broken does not pass for one of zeros"


# The module


def test_state_dict_and_shapes() -> None:
    shapes = {
        "add": {"ratio": (3, D)},
        "linear": {"ratio": (3, D), "weight": (3, D, D)},
        "concat": {"weight": (3, D, 2 * D)},
    }
    layout = layouts(3)["packed"]
    key = keys(layout)
    for fusion, expected in shapes.items():
        module = aligner(3, fusion=fusion)
        assert {name: tuple(p.shape) for name, p in module.named_parameters()} == expected
        assert {name: tuple(p.shape) for name, p in module.state_dict().items()} == expected
        other = aligner(3, fusion=fusion, seed=5)
        assert not torch.equal(fuse(other, key, layout), fuse(module, key, layout))
        other.load_state_dict(module.state_dict())
        copied = copy.deepcopy(module)
        assert all(a is not b for a, b in zip(copied.parameters(), module.parameters(), strict=True))
        for same in (other, copied):
            assert torch.equal(fuse(same, key, layout), fuse(module, key, layout))
        module.reset_parameters()
        torch.testing.assert_close(fuse(module, key, layout), key, **EXACT)
    text = repr(mk.DuplexAligner(8, 3, fusion="concat", norm="frobenius", scope="causal", aligned=[2, 0]))
    for part in ("head_dim=8", "num_modalities=3", "'concat'", "'frobenius'", "'causal'", "aligned=(0, 2)"):
        assert part in text


def test_device_and_dtype_arguments() -> None:
    for fusion in FUSIONS:
        module = mk.DuplexAligner(D, 2, fusion=fusion, device="meta", dtype=torch.bfloat16)
        assert all(p.is_meta and p.dtype == torch.bfloat16 for p in module.parameters())
        module = module.to_empty(device="cpu")
        module.reset_parameters()
        layout = layouts(2)["batch"]
        key = keys(layout, dtype=torch.bfloat16)
        assert torch.equal(fuse(module, key, layout), key)
        assert all(p.dtype == torch.get_default_dtype() for p in mk.DuplexAligner(D, 2, fusion=fusion).parameters())


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_training_step(fusion: str, scope: str) -> None:
    layout = layouts(2)["batch"]
    query, key, value = (keys(layout) for _ in range(3))
    module = mk.DuplexAligner(D, 2, fusion=fusion, scope=scope, dtype=torch.float64)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

    def run() -> Tensor:
        return mk.moda_attention(query, key, value, layout=layout, is_causal=True, key_map=module(key, layout))

    before = run()
    target = torch.randn_like(before)
    loss = F.mse_loss(before, target)
    loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), name
    optimizer.step()
    after = run()
    assert not torch.equal(after, before) and F.mse_loss(after, target) < loss


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_autocast(fusion: str, scope: str) -> None:
    """Gram sums and D×D algebra stay float32."""
    layout, module = layouts(3)["batch"], aligner(3, fusion=fusion, scope=scope).float()
    key = keys(layout, dtype=torch.float32)
    expected = fuse(module, key, layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = fuse(module, key, layout)
        out = mk.moda_attention(key, key, key, layout=layout, key_map=module(key, layout))
    assert torch.equal(fused, expected)
    assert out.dtype == torch.bfloat16
    full = mk.moda_attention(key, key, key, layout=layout, key_map=module(key, layout))
    torch.testing.assert_close(out.float(), full, rtol=0.1, atol=0.1)
    fused.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("scope", SCOPES)
def test_activation_checkpointing(scope: str) -> None:
    layout = layouts(3)["batch"]
    inputs = [keys(layout) for _ in range(3)]
    module = aligner(3, fusion="linear", scope=scope)

    def block(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return mk.moda_attention(query, key, value, layout=layout, is_causal=True, key_map=module(key, layout))

    def gradients(run: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        return torch.autograd.grad(run(*leaves).square().sum(), (*leaves, *module.parameters()))

    plain, again = gradients(block), gradients(functools.partial(checkpoint, block, use_reentrant=False))
    assert all(map(torch.equal, plain, again))


def test_modality_ids_in_place_of_a_layout() -> None:
    """The aligner knows M; so a batch without the last modality is no other batch."""
    module, key = aligner(3), torch.randn(1, 2, 5, D, dtype=torch.float64)
    for ids in (torch.tensor([[0, 1, 2, 0, 1]]), torch.tensor([[0, 1, 1, 0, 1]])):
        layout = mk.segment_modalities(ids, num_modalities=3)
        key_map = module(key, ids)
        assert torch.equal(mk.align_keys(key, key_map, ids), fuse(module, key, layout))
        out = mk.moda_attention(key, key, key, layout=ids, key_map=key_map)
        assert torch.equal(out, mk.moda_attention(key, key, key, layout=layout, key_map=module(key, layout)))


def test_causal_scope_over_padding_alone() -> None:
    """With room for segments that aren't there."""
    ids = torch.full((3,), -1)
    layout = mk.segment_modalities(ids, num_modalities=2, cu_seqlens=torch.tensor([0, 3]), max_segments=3)
    key = torch.randn(3, 2, 8, requires_grad=True)
    fused = mk.align_keys(key, mk.DuplexAligner(8, 2, fusion="concat", scope="causal")(key, layout), layout)
    assert torch.equal(fused, key)
    (grad,) = torch.autograd.grad(fused, key, torch.ones_like(fused))
    assert torch.equal(grad, torch.ones_like(grad))
