"""Gram matrices and affinities: modality_gram against loops over tokens, gram_affinity against its definition, and as
an attention bias."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import moda_kernels as mk

NORMS = ("row", "frobenius")
D = 4
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def batch(*rows: list[int], m: int) -> mk.ModalityLayout:
    return mk.segment_modalities(torch.tensor(rows), num_modalities=m)


def layouts() -> dict[str, mk.ModalityLayout]:
    ids = torch.tensor([0, 0, 1, 1, 2, 0, 1, -1, -1, 2, 1, -1, 1, 0])
    cu_seqlens = torch.tensor([0, 0, 5, 5, 8, 9, 10, 14, 14], dtype=torch.int32)
    return {
        "batch": batch([-1, 0, 0, 1, -1, 1, 2, 0, 1, -1], [1] * 10, [0, 1, 2, 0, 1, 2, 0, 1, 2, 0], [-1] * 10, m=3),
        "packed": mk.segment_modalities(ids, num_modalities=3, cu_seqlens=cu_seqlens),
        "one token": batch([0], [-1], m=3),
        "one modality": batch([0, 0, -1], [0, 0, 0], m=1),
    }


def keys(layout: mk.ModalityLayout, dim: int = D, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = (layout.num_tokens, 2, dim)
    if not layout.packed:
        rows, length = layout.modality.shape
        shape = (rows, 2, length, dim)
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", ["batch", "packed", "one token", "one modality"])
def test_modality_gram(name: str) -> None:
    layout = layouts()[name]
    x, y = keys(layout, dim=3), keys(layout, dim=5)
    xs, ys = (z if layout.packed else z.transpose(1, 2).flatten(0, 1) for z in (x, y))
    by_modality = torch.zeros(layout.num_sequences, layout.num_modalities, 2, 3, 5, dtype=torch.float64)
    by_segment = torch.zeros(layout.max_segments, 2, 3, 5, dtype=torch.float64)
    facts = (layout.sequence, layout.modality, layout.segment)
    for t, (n, m, s) in enumerate(zip(*(f.flatten().tolist() for f in facts), strict=True)):
        if m >= 0:
            by_modality[n, m] += xs[t][:, :, None] * ys[t][:, None, :]
            by_segment[s] += xs[t][:, :, None] * ys[t][:, None, :]
    for by, expected in (("modality", by_modality), ("segment", by_segment)):
        torch.testing.assert_close(mk.modality_gram(x, y, layout, by=by), expected, **EXACT)
        torch.testing.assert_close(mk.reference.modality_gram(x, y, layout, by=by), expected, **EXACT)
    assert mk.modality_gram(x.bfloat16(), y.bfloat16(), layout).dtype == torch.float32


def affinity_by_definition(gram: Tensor, norm: str) -> Tensor:
    n, m, h = gram.shape[:3]
    table = torch.zeros(n, h, m, m, dtype=gram.dtype)
    for i, j, a, b in itertools.product(range(n), range(h), range(m), range(m)):
        hats = []
        for g in (gram[i, a, j], gram[i, b, j]):
            size = g.norm(dim=1, keepdim=True) if norm == "row" else g.norm()
            hats.append(torch.where(size > 0, g / size, 0))
        scale = hats[0].norm() * hats[1].norm()
        table[i, j, a, b] = (hats[0] * hats[1]).sum() / scale if scale > 0 else 0
    return table


@pytest.mark.parametrize("norm", NORMS)
def test_gram_affinity(norm: str) -> None:
    layout = layouts()["batch"]  # rows of one modality and of padding: Grams of zero
    key = keys(layout).requires_grad_()
    gram = mk.modality_gram(key, key, layout)
    table = mk.gram_affinity(gram, norm)
    torch.testing.assert_close(table, affinity_by_definition(gram.detach(), norm), **EXACT)
    present = (layout.counts > 0).double()[:, None].expand(-1, 2, -1)
    torch.testing.assert_close(table.diagonal(dim1=-2, dim2=-1), present, rtol=0, atol=1e-14)
    assert bool((table.abs() <= 1 + 1e-14).all())
    torch.testing.assert_close(table, table.transpose(-1, -2), rtol=0, atol=1e-15)
    pairs = torch.where((layout.counts > 0)[:, None, :, None] & (layout.counts > 0)[:, None, None], 0, table)
    assert not pairs.any(), "a pair with an absent modality has affinity 0"
    (grad,) = torch.autograd.grad(table, key, torch.randn_like(table))
    assert bool(grad.isfinite().all()) and bool(grad.any())
    # A cosine can be -1 where x and y differ.
    opposite = torch.stack((gram[:, 2], -gram[:, 2]), 1)[2:3]
    assert mk.gram_affinity(opposite, norm)[0, 0, 0, 1].item() == pytest.approx(-1)


def test_gram_affinity_under_autocast_and_in_low_precision() -> None:
    """Gram sums and D×D algebra are float32 (float64 for float64)."""
    layout = layouts()["batch"]
    key = keys(layout, dtype=torch.bfloat16)
    expected = mk.gram_affinity(mk.modality_gram(key.double(), key.double(), layout))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        table = mk.gram_affinity(mk.modality_gram(key, key, layout))
    assert table.dtype == torch.float32
    torch.testing.assert_close(table.double(), expected, rtol=1e-5, atol=1e-5)


def test_affinity_as_a_bias() -> None:
    """The conditional mask end to end: affinity times a learned strength per query head, against dense softmax."""
    layout = batch([0, 0, 1, 1, 2, 0, 1], [0, 1, 0, 1, 1, 1, 1], m=3)
    key, value = keys(layout).requires_grad_(), keys(layout)
    query = torch.randn(2, 4, 7, D, dtype=torch.float64)
    strength = torch.randn(4, dtype=torch.float64, requires_grad=True)
    table = mk.gram_affinity(mk.modality_gram(key, key, layout)).repeat_interleave(2, dim=1)
    bias = strength[:, None, None] * table
    out = mk.moda_attention(query, key, value, layout=layout, pair_bias=bias, enable_gqa=True)
    ids = layout.modality.long()
    dense = torch.stack([bias[n][:, ids[n]][:, :, ids[n]] for n in range(2)])
    wide = [x.repeat_interleave(2, 1) for x in (key, value)]
    score = query @ wide[0].transpose(-1, -2) / math.sqrt(D) + dense
    torch.testing.assert_close(out, score.softmax(-1) @ wide[1], **EXACT)
    grads = torch.autograd.grad(out.square().sum(), (strength, key))
    assert all(bool(g.isfinite().all()) and bool(g.any()) for g in grads)


LAYOUT = batch([0, 1, 1, 0], m=2)
X = torch.randn(1, 2, 4, D)
ERRORS: dict[str, tuple[Callable[[], object], type[Exception], list[str]]] = {
    "by": (lambda: mk.modality_gram(X, X, LAYOUT, by="nonsense"), ValueError, ["by", "'segment'", "got 'nonsense'"]),
    "by type": (lambda: mk.modality_gram(X, X, LAYOUT, by=0), ValueError, ["by", "'modality'", "0"]),
    "length of y": (lambda: mk.modality_gram(X, X[:, :, :3], LAYOUT), ValueError, ["y", "L = 4", "(1, 2, 3, 4)"]),
    "heads of y": (lambda: mk.modality_gram(X, X[:, :1], LAYOUT), ValueError, ["y", "(4, 2)", "1"]),
    "x type": (lambda: mk.modality_gram(X.long(), X, LAYOUT), TypeError, ["x", "floating-point", "int64"]),
    "layout": (lambda: mk.modality_gram(X, X, None), TypeError, ["layout", "ModalityLayout", "None"]),
    "rank": (
        lambda: mk.gram_affinity(torch.zeros(2, 2, D, D)),
        ValueError,
        ["gram", "[N, M, H, D, E]", "(2, 2, 4, 4)"],
    ),
    "norm": (lambda: mk.gram_affinity(torch.zeros(1, 2, 2, D, D), "max"), ValueError, ["norm", "'row'", "got 'max'"]),
    "gram type": (lambda: mk.gram_affinity([1.0]), TypeError, ["gram", "tensor", "[1.0]"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str, refused: Callable[..., None]) -> None:
    refused(*ERRORS[name])
