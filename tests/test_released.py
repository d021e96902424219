"""The alignment of the authors' released weights: recorded inputs and outputs of the released code (float64,
data/released_mha.npz), and the rules around it."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import moda_kernels as mk

RECORDED = {name: torch.from_numpy(x) for name, x in np.load(Path(__file__).parent / "data/released_mha.npz").items()}
QUERY, KEY, VALUE = (RECORDED[name] for name in ("query", "key", "value"))
RATIO, WEIGHT = RECORDED["ratio_v"], RECORDED["pfuser_v"]
TEXT, VISION = 0, 1
# Tokens with neither flag are padding.
IDS = torch.where(RECORDED["vflag"], VISION, torch.where(RECORDED["tflag"], TEXT, -1))
REAL = IDS >= 0
LAYOUT = mk.segment_modalities(IDS, num_modalities=2)
EXACT = {"rtol": 0, "atol": 1e-10}


def key_map(key: Tensor = KEY, value: Tensor = VALUE, layout: mk.ModalityLayout = LAYOUT, **options) -> mk.KeyMap:
    return mk.released_key_map(key, value, layout, RATIO, WEIGHT, **options)


def attend(**options) -> Tensor:
    return mk.moda_attention(QUERY, KEY, VALUE, layout=LAYOUT, is_causal=True, key_map=key_map(), **options)


def at_tokens(x: Tensor, real: Tensor = REAL) -> Tensor:
    return x.transpose(1, 2)[real]


def fused_by_definition(key: Tensor, value: Tensor, ids: Tensor, ratio: Tensor, weight: Tensor) -> Tensor:
    """Token by token: k' = (k + r ⊙ (u Ĝ)) Wᵀ for vision, G = Σ uᵀ v over text, u = (k + 1e-6) / ‖k + 1e-6‖."""
    unit = (key + 1e-6) / (key + 1e-6).norm(dim=-1, keepdim=True)
    out = []
    for n in range(len(ids)):
        for h in range(key.shape[1]):
            gram = unit[n, h][ids[n] == TEXT].T @ value[n, h][ids[n] == TEXT]
            for t, m in enumerate(ids[n].tolist()):
                k = key[n, h, t]
                if m == VISION and TEXT in ids[n]:
                    k = (k + ratio * (unit[n, h, t] @ (gram / gram.norm(dim=-1, keepdim=True)))) @ weight.T
                out.append(k)
    return torch.stack(out).view_as(key)


# Recorded


def test_the_record_has_what_it_is_for() -> None:
    assert RECORDED["vflag"].any() and RECORDED["tflag"].any() and not REAL.all()
    assert not (RECORDED["vflag"] & RECORDED["tflag"]).any()
    vision = IDS == VISION
    assert not torch.isclose(at_tokens(RECORDED["fused_key"], vision), at_tokens(KEY, vision)).all(-1).any()


def test_recorded_fused_keys() -> None:
    for ratio in (RATIO, RATIO.flatten()):
        fused = mk.align_keys(KEY, mk.released_key_map(KEY, VALUE, LAYOUT, ratio, WEIGHT), LAYOUT)
        torch.testing.assert_close(at_tokens(fused), at_tokens(RECORDED["fused_key"]), **EXACT)
        # All but vision: the very same keys.
        assert torch.equal(at_tokens(fused, IDS != VISION), at_tokens(KEY, IDS != VISION))
    torch.testing.assert_close(mk.reference.align_keys(KEY, key_map(), LAYOUT), fused, **EXACT)


def test_recorded_outputs() -> None:
    out = attend()
    again = attend()  # says, where the comparison fails, whether the failure stays
    difference = (at_tokens(out) - at_tokens(RECORDED["out"])).abs().max().item()
    second = (at_tokens(again) - at_tokens(RECORDED["out"])).abs().max().item()
    assert difference <= 1e-10, f"off by {difference}, in a second call by {second}"
    assert torch.equal(out, again)
    assert not at_tokens(out, ~REAL).any(), "padding queries give 0"
    torch.testing.assert_close(at_tokens(attend(backend="reference")), at_tokens(RECORDED["out"]), **EXACT)


def test_materialised_keys_give_the_recorded_outputs() -> None:
    fused = mk.align_keys(KEY, key_map(), LAYOUT)
    out = mk.moda_attention(QUERY, fused, VALUE, layout=LAYOUT, is_causal=True)
    torch.testing.assert_close(at_tokens(out), at_tokens(RECORDED["out"]), **EXACT)


def test_packed_equals_batch() -> None:
    # Padding left out, and an empty document between the rows.
    ends = REAL.sum(1).cumsum(0).tolist()
    cu_seqlens = torch.tensor([0, ends[0], ends[0], *ends[1:]], dtype=torch.int32)
    layout = mk.segment_modalities(IDS[REAL], num_modalities=2, cu_seqlens=cu_seqlens)
    query, key, value = (at_tokens(x) for x in (QUERY, KEY, VALUE))
    packed_map = key_map(key, value, layout)
    fused = mk.align_keys(key, packed_map, layout)
    torch.testing.assert_close(fused, at_tokens(RECORDED["fused_key"]), **EXACT)
    out = mk.moda_attention(query, key, value, layout=layout, is_causal=True, key_map=packed_map)
    torch.testing.assert_close(out, at_tokens(RECORDED["out"]), **EXACT)
    # Padding kept.
    rows, length = IDS.shape
    cu_seqlens = torch.arange(rows + 1, dtype=torch.int32) * length
    layout = mk.segment_modalities(IDS.flatten(), num_modalities=2, cu_seqlens=cu_seqlens)
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (QUERY, KEY, VALUE))
    packed_map = key_map(key, value, layout)
    out = mk.moda_attention(query, key, value, layout=layout, is_causal=True, key_map=packed_map)
    torch.testing.assert_close(out[REAL.flatten()], at_tokens(RECORDED["out"]), **EXACT)


@pytest.mark.parametrize(("vision", "text", "modalities"), [(0, 1, 2), (2, 0, 3), (0, 3, 5)])
def test_other_modality_ids(vision: int, text: int, modalities: int) -> None:
    ids = torch.where(IDS == VISION, vision, torch.where(IDS == TEXT, text, -1))
    layout = mk.segment_modalities(ids, num_modalities=modalities)
    other = key_map(layout=layout, vision=vision, text=text)
    torch.testing.assert_close(at_tokens(mk.align_keys(KEY, other, layout)), at_tokens(RECORDED["fused_key"]), **EXACT)
    out = mk.moda_attention(QUERY, KEY, VALUE, layout=layout, is_causal=True, key_map=other)
    torch.testing.assert_close(at_tokens(out), at_tokens(RECORDED["out"]), **EXACT)


def test_recorded_outputs_in_lower_precision() -> None:
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)):
        query, key, value, ratio, weight = (x.to(dtype) for x in (QUERY, KEY, VALUE, RATIO, WEIGHT))
        low = mk.released_key_map(key, value, LAYOUT, ratio, weight)
        fused = mk.align_keys(key, low, LAYOUT)
        out = mk.moda_attention(query, key, value, layout=LAYOUT, is_causal=True, key_map=low)
        assert fused.dtype == out.dtype == dtype
        for got, expected in ((fused, RECORDED["fused_key"]), (out, RECORDED["out"])):
            torch.testing.assert_close(at_tokens(got).double(), at_tokens(expected), rtol=near, atol=near)


# Rules


def small(ids: list[list[int]], heads: int = 2, dim: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = (len(ids), heads, len(ids[0]), dim)
    key, value = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    ratio, weight = torch.randn(dim, dtype=torch.float64), torch.randn(dim, dim, dtype=torch.float64)
    return torch.tensor(ids), key, value, ratio, weight


MIXED = [[0, 1, 1, -1, 0, 1], [-1, 1, 0, 1, 1, -1], [1, 1, 1, -1, 1, 1], [0, 0, -1, 0, 0, 0], [-1] * 6]


@pytest.mark.parametrize("ids", [MIXED, [[1, 0]], [[1]], [[0]], [[-1]], [[1] * 63], [[0, 1] * 50]])
def test_against_the_definition(ids: list[list[int]]) -> None:
    ids, key, value, ratio, weight = small(ids)
    layout = mk.segment_modalities(ids, num_modalities=2)
    inputs = [x.requires_grad_() for x in (key, value, ratio, weight)]
    fused = mk.align_keys(key, mk.released_key_map(key, value, layout, ratio, weight), layout)
    expected = fused_by_definition(key, value, ids, ratio, weight)
    torch.testing.assert_close(fused, expected, **EXACT)
    upstream = torch.randn_like(key)
    gradients = [torch.autograd.grad(x, inputs, upstream, materialize_grads=True) for x in (fused, expected)]
    for got, by_definition in zip(*gradients, strict=True):
        torch.testing.assert_close(got, by_definition, **EXACT)


def test_sequences_without_text_or_without_vision_keep_their_keys() -> None:
    ids, key, value, ratio, weight = small([[1, 1, -1, 1], [0, -1, 0, 0], [-1] * 4])
    for num_modalities in (2, 3):
        layout = mk.segment_modalities(ids, num_modalities=num_modalities)
        unchanged = mk.released_key_map(key, value, layout, ratio, weight)
        assert torch.equal(mk.align_keys(key, unchanged, layout), key)
        out = mk.moda_attention(key, key, value, layout=layout, is_causal=True, key_map=unchanged)
        assert torch.equal(out, mk.moda_attention(key, key, value, layout=layout, is_causal=True))
    # A layout that does not have the modalities at all.
    for row in (0, 1):
        layout = mk.segment_modalities(ids[1:2], num_modalities=1)
        one = mk.released_key_map(key[1:2], value[1:2], layout, ratio, weight, vision=1 - row, text=row)
        assert torch.equal(mk.align_keys(key[1:2], one, layout), key[1:2])


def test_a_third_modality_stays_out() -> None:
    ids, key, value, ratio, weight = small([[0, 2, 1, 2, 0, 1, 2]])
    layout = mk.segment_modalities(ids)
    fused = mk.align_keys(key, mk.released_key_map(key, value, layout, ratio, weight), layout)
    torch.testing.assert_close(fused, fused_by_definition(key, value, ids, ratio, weight), **EXACT)
    assert torch.equal(fused[:, :, ids[0] != 1], key[:, :, ids[0] != 1])


def test_no_tokens() -> None:
    layout = mk.segment_modalities(torch.zeros(2, 0, dtype=torch.int32), num_modalities=2)
    key = torch.zeros(2, 2, 0, 32, dtype=torch.float64)
    empty = key_map(key, key, layout)
    assert mk.align_keys(key, empty, layout).shape == key.shape
    assert mk.moda_attention(key, key, key, layout=layout, key_map=empty).shape == key.shape


def test_gradcheck() -> None:
    ids, key, value, ratio, weight = small([[0, 1, -1, 0, 1]], heads=1, dim=3)
    layout = mk.segment_modalities(ids)
    inputs = [x.requires_grad_() for x in (key, value, ratio, weight)]

    def out(key: Tensor, value: Tensor, ratio: Tensor, weight: Tensor) -> Tensor:
        released = mk.released_key_map(key, value, layout, ratio, weight)
        return mk.moda_attention(key, key, value, layout=layout, is_causal=True, key_map=released)

    assert torch.autograd.gradcheck(out, inputs)


def test_padding_may_hold_anything() -> None:
    ids, key, value, ratio, weight = small(MIXED)
    layout = mk.segment_modalities(ids)
    hidden = (ids < 0)[:, None, :, None]
    expected = mk.align_keys(key, mk.released_key_map(key, value, layout, ratio, weight), layout)
    for bad in (float("nan"), float("inf"), -1e-6):  # the last one's unit key is 0 / 0
        leaves = [torch.where(hidden, bad, x).requires_grad_() for x in (key, value)] + [
            x.detach().clone().requires_grad_() for x in (ratio, weight)
        ]
        fused = mk.align_keys(leaves[0], mk.released_key_map(*leaves[:2], layout, *leaves[2:]), layout)
        assert torch.equal(torch.where(hidden, 0, fused), torch.where(hidden, 0, expected))
        torch.where(hidden, 0, fused).sum().backward()
        for name, leaf in zip(("key", "value", "ratio", "weight"), leaves, strict=True):
            assert bool(leaf.grad.isfinite().all()), f"gradient of {name}, padding holds {bad}"


def test_autocast() -> None:
    key, value, ratio, weight = (x.float() for x in (KEY, VALUE, RATIO, WEIGHT))
    expected = mk.align_keys(key, mk.released_key_map(key, value, LAYOUT, ratio, weight), LAYOUT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = mk.align_keys(key, mk.released_key_map(key, value, LAYOUT, ratio, weight), LAYOUT)
    assert torch.equal(fused, expected)


# Errors

ERRORS: dict[str, tuple[Callable[[], object], type[Exception], list[str]]] = {
    "value size": (lambda: key_map(value=VALUE[..., :16]), ValueError, ["value", "32", "16"]),
    "value heads": (lambda: key_map(value=VALUE[:, :2]), ValueError, ["value", "4", "2"]),
    "value length": (lambda: key_map(value=VALUE[:, :, :95]), ValueError, ["value", "L = 96", "95"]),
    "value type": (lambda: key_map(value=VALUE.long()), TypeError, ["value", "floating-point", "int64"]),
    "key length": (lambda: key_map(key=KEY[:, :, :95]), ValueError, ["key", "L = 96", "95"]),
    "ratio shape": (
        lambda: mk.released_key_map(KEY, VALUE, LAYOUT, RATIO[0], WEIGHT),
        ValueError,
        ["ratio", "(32,)", "[1, 1, D]", "(1, 32)"],
    ),
    "ratio size": (
        lambda: mk.released_key_map(KEY, VALUE, LAYOUT, RATIO.flatten()[:31], WEIGHT),
        ValueError,
        ["ratio", "(32,)", "(31,)"],
    ),
    "ratio type": (lambda: mk.released_key_map(KEY, VALUE, LAYOUT, 0.5, WEIGHT), TypeError, ["ratio", "tensor", "0.5"]),
    "weight shape": (
        lambda: mk.released_key_map(KEY, VALUE, LAYOUT, RATIO, WEIGHT[:, :31]),
        ValueError,
        ["weight", "(32, 32)", "(32, 31)"],
    ),
    "weight type": (
        lambda: mk.released_key_map(KEY, VALUE, LAYOUT, RATIO, WEIGHT.long()),
        TypeError,
        ["weight", "floating-point", "int64"],
    ),
    "weight device": (
        lambda: mk.released_key_map(KEY, VALUE, LAYOUT, RATIO, WEIGHT.to("meta")),
        ValueError,
        ["weight", "cpu", "meta"],
    ),
    "same modalities": (lambda: key_map(vision=0), ValueError, ["vision", "text", "0"]),
    "vision type": (lambda: key_map(vision="image"), TypeError, ["vision", "int", "'image'"]),
    "negative text": (lambda: key_map(text=-1), ValueError, ["text", ">= 0", "-1"]),
    "layout": (lambda: key_map(layout="ids"), TypeError, ["layout", "ModalityLayout", "'ids'"]),
    "other heads": (lambda: mk.align_keys(KEY[:, :2], key_map(), LAYOUT), ValueError, ["key_map", "2 key heads", "4"]),
    "other batch": (
        lambda: mk.align_keys(KEY[:1], key_map(), mk.segment_modalities(IDS[:1], num_modalities=2)),
        ValueError,
        ["key_map", "1 x 96", "2"],
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str, refused: Callable[..., None]) -> None:
    refused(*ERRORS[name])


def test_reference_has_no_gradient_from_padding() -> None:
    """Padding may hold anything, and 0 times NaN is NaN."""
    layout = mk.segment_modalities(torch.tensor([[0, 1, -1, 1]]), num_modalities=2)
    key, value = (torch.randn(1, 1, 4, 4, dtype=torch.float64) for _ in range(2))
    key[:, :, 2] = value[:, :, 2] = math.nan
    leaves = [t.requires_grad_() for t in (key, value, torch.ones(4).double(), torch.eye(4).double())]
    key_map = mk.reference.released_key_map(*leaves[:2], layout, *leaves[2:])
    fused = mk.reference.align_keys(leaves[0], key_map, layout)
    for grad in torch.autograd.grad(fused[:, :, [0, 1, 3]].sum(), leaves):
        assert bool(torch.isfinite(grad).all())
