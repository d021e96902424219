"""The causal scope: no blocks show, memory stays bounded, keys and outputs never look ahead (and what does look
ahead shows), and passes over prefixes equal one full pass."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import moda_kernels as mk
from moda_kernels.alignment.causal import CausalMap

FUSIONS = ("add", "linear", "concat")
D, M = 4, 3
NEAR = {"rtol": 1e-12, "atol": 1e-12}


def ids(length: int, run: int = 2) -> Tensor:
    """Short segments of M modalities, with some padding."""
    return torch.randint(-1, M, (-(-length // run),)).repeat_interleave(run)[:length]


def packed(bounds: list[int], run: int = 1) -> mk.ModalityLayout:
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    return mk.segment_modalities(ids(bounds[-1], run), num_modalities=M, cu_seqlens=cu_seqlens)


def aligner(scope: str = "causal", **options) -> mk.DuplexAligner:
    module = mk.DuplexAligner(D, M, scope=scope, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn_like(parameter)
    return module


def tensors(layout: mk.ModalityLayout, heads: int = 2, query_heads: int = 4) -> list[Tensor]:
    """Query, key and value."""
    shapes = [(layout.num_tokens, h, D) for h in (query_heads, heads, heads)]
    if not layout.packed:
        rows, length = layout.modality.shape
        shapes = [(rows, h, length, D) for h in (query_heads, heads, heads)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def attend(module: mk.DuplexAligner, qkv: list[Tensor], layout: mk.ModalityLayout, **options) -> Tensor:
    query, key, value = qkv
    if "mask" not in options:
        options["is_causal"] = True
    return mk.moda_attention(query, key, value, layout=layout, key_map=module(key, layout), enable_gqa=True, **options)


def rows(length: int, *segments: tuple[int, int]) -> Tensor:
    """(modality, tokens) segments as ids [1, L]."""
    flat = [m for m, n in segments for _ in range(n)]
    assert len(flat) == length
    return torch.tensor([flat])


# Blocks


LAYOUTS = {
    "one-token segments": lambda: mk.segment_modalities(torch.arange(70)[None] % M),
    "short segments": lambda: mk.segment_modalities(ids(80, 2).view(2, 40), num_modalities=M),
    "segments longer than blocks": lambda: mk.segment_modalities(ids(80, 17).view(2, 40), num_modalities=M),
    # Documents that begin inside blocks, at their edges, and several in one; empty ones at the ends and between.
    "packed": lambda: packed([0, 0, 3, 7, 7, 9, 10, 11, 12, 40, 64, 65, 80, 80, 90, 90]),
    "packed, longer segments": lambda: packed([0, 14, 21, 50, 50, 64, 81], run=5),
    "padding": lambda: mk.segment_modalities(torch.full((2, 30), -1), num_modalities=M),
    "padding first": lambda: mk.segment_modalities(torch.tensor([[-1] * 20 + [0, 1, 2] * 4]), num_modalities=M),
    "one token": lambda: mk.segment_modalities(torch.tensor([[1]]), num_modalities=M),
}


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_blocks_do_not_show(name: str, fusion: str) -> None:
    layout, module = LAYOUTS[name](), aligner(fusion=fusion, renorm=fusion == "linear")
    _, key, upstream = tensors(layout)
    key.requires_grad_()
    key_map = module(key, layout)
    assert isinstance(key_map, CausalMap)
    results = []
    for size in (layout.num_tokens, 7, 64, *([1] if fusion == "add" else [])):
        fused = mk.align_keys(key, dataclasses.replace(key_map, size=size), layout)
        gradients = torch.autograd.grad(fused, (key, *module.parameters()), upstream, materialize_grads=True)
        with torch.no_grad():
            assert torch.equal(mk.align_keys(key, dataclasses.replace(key_map, size=size), layout), fused)
        results.append((fused, *gradients))
    for blocked in results[1:]:
        for a, b in zip(blocked, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("renorm", [False, True])
def test_blocks_of_pieces_whose_tokens_are_not_known_on_the_host(name: str, renorm: bool) -> None:
    """As on a GPU, where asking for their places would wait; with more slots than segments too."""
    layout, module = LAYOUTS[name](), aligner(fusion="linear", renorm=renorm)
    roomy = mk.segment_modalities(
        layout.modality, num_modalities=M, cu_seqlens=layout.cu_seqlens if layout.packed else None,
        max_segments=layout.max_segments + 9,
    )  # fmt: skip
    _, key, upstream = tensors(layout)
    key[layout.modality < 0 if layout.packed else (layout.modality < 0)[:, None].expand(key.shape[:3])] = float("nan")
    key.requires_grad_()
    expected = mk.align_keys(key, module(key, layout), layout)
    right = torch.autograd.grad(expected, (key, *module.parameters()), upstream, materialize_grads=True)
    for size in (7, 64):
        key_map = module(key, roomy)
        assert isinstance(key_map, CausalMap)
        fused = key_map._by_pieces(key if layout.packed else key.transpose(1, 2), size)
        fused = fused if layout.packed else fused.transpose(1, 2)
        torch.testing.assert_close(fused, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
        gradients = torch.autograd.grad(fused, (key, *module.parameters()), upstream, materialize_grads=True)
        for a, b in zip(gradients, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * max(1.0, b.abs().max().item()))


def test_blocks_in_double_backward() -> None:
    layout = packed([0, 5, 5, 9])
    module = aligner(renorm=True)
    _, key, _ = tensors(layout, heads=1)
    key.requires_grad_()
    results = []
    for size in (9, 2):
        fused = mk.align_keys(key, dataclasses.replace(module(key, layout), size=size), layout)
        (first,) = torch.autograd.grad(fused.square().sum(), key, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), (key, module.ratio)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_matrices_of_the_segments() -> None:
    for layout in (make() for make in LAYOUTS.values()):
        module = aligner(fusion="concat")
        _, key, _ = tensors(layout)
        key_map = module(key, layout)
        matrices = key_map.matrices()
        assert matrices.shape == (layout.max_segments, 2, D, D)
        flat = key if layout.packed else key.transpose(1, 2).flatten(0, 1)
        segment = layout.segment.flatten().long()
        real = segment >= 0
        fused = mk.align_keys(key, key_map, layout)
        fused = fused if layout.packed else fused.transpose(1, 2).flatten(0, 1)
        expected = torch.einsum("thd,thde->the", flat[real], matrices[segment[real]])
        torch.testing.assert_close(fused[real], expected, **NEAR)


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest storage that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_memory_stays_bounded() -> None:
    length, dim, heads = 4096, 32, 2
    layout = mk.segment_modalities(torch.arange(length)[None] % 2)
    assert layout.max_segments == length
    module = mk.DuplexAligner(dim, 2, scope="causal", fusion="linear")
    key = torch.randn(1, heads, length, dim, requires_grad=True)
    all_matrices = length * heads * dim * dim
    saved: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), LargestTensor() as forward:
        fused = mk.align_keys(key, module(key, layout), layout)
    with LargestTensor() as backward:
        fused.square().sum().backward()
    assert key.grad is not None and bool(key.grad.isfinite().all())
    for name, numbers in (
        ("largest tensor, forward", forward.numbers),
        ("largest tensor, backward", backward.numbers),
        ("all that is saved for the backward", sum(saved.values())),
    ):
        assert numbers <= all_matrices / 8, f"{name}: {numbers / key.numel():.1f} times the keys"


# Never ahead

CHANGED = 9  # the first token that changes
SEQUENCE = rows(16, (0, 3), (1, 4), (0, 1), (2, 3), (1, 2), (0, 3))


def changed_from(x: Tensor, column: int) -> Tensor:
    """Other values from a column on."""
    out = x.clone()
    out[..., column:, :] = torch.randn_like(out[..., column:, :]) * 3 + 1
    return out


@pytest.mark.parametrize("norm", ["row", "frobenius"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_keys_never_look_ahead(fusion: str, norm: str) -> None:
    layout, module = mk.segment_modalities(SEQUENCE), aligner(fusion=fusion, norm=norm, renorm=norm == "frobenius")
    _, key, _ = tensors(layout)
    for size, column in itertools.product((None, 1, 5), range(1, 16)):
        fused = []
        for x in (key, changed_from(key, column)):
            fused.append(mk.align_keys(x, dataclasses.replace(module(x, layout), size=size), layout))
        assert torch.equal(fused[0][:, :, :column], fused[1][:, :, :column])
        assert not torch.equal(fused[0][:, :, column:], fused[1][:, :, column:])


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_keys_do_not_see_what_breaks_later(bad: float) -> None:
    layout, module = mk.segment_modalities(SEQUENCE), aligner()
    _, key, _ = tensors(layout)
    broken = key.clone()
    broken[:, :, CHANGED:] = bad
    fused = [mk.align_keys(x, module(x, layout), layout)[:, :, :CHANGED] for x in (key, broken)]
    assert torch.equal(*fused)


@pytest.mark.parametrize("length", [None, 20, math.inf])
@pytest.mark.parametrize("duplex", ["joint", "split"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_later_values_leave_outputs_bit_identical(fusion: str, duplex: str, length: float | None) -> None:
    """Where the number of tokens stays, pseudo scores of length None see nothing either."""
    layout, module = mk.segment_modalities(SEQUENCE.expand(2, -1)), aligner(fusion=fusion)
    qkv = tensors(layout)
    options = {"pseudo": mk.PseudoAttention(base=0.3, decay=0.5, length=length), "duplex": duplex}
    masks = [mk.ModularMask.causal(M), mk.ModularMask.bidirectional_within(M, [1, 2])]
    masks.append(mk.ModularMask(masks[0].rules, window=4))
    for mask in masks:
        expected = attend(module, qkv, layout, mask=mask, **options)
        for column in (1, 5, CHANGED, 15):
            out = attend(module, [changed_from(x, column) for x in qkv], layout, mask=mask, **options)
            blind = ~mask.visible(layout)[0, :, column:].any(-1)
            assert 0 < blind.sum() <= column
            assert torch.equal(out[:, :, blind], expected[:, :, blind])
            assert not torch.isclose(out[:, :, ~blind], expected[:, :, ~blind]).all(-1).any()


def test_later_documents_and_tokens_leave_packed_outputs_bit_identical() -> None:
    layout, module = packed([0, 0, 13, 30, 30, 47]), aligner(fusion="concat")
    query, key, value = tensors(layout)
    expected = attend(module, [query, key, value], layout)
    for row in (5, 13, 20, 46):
        later = [x.clone() for x in (query, key, value)]
        for x in later:
            x[row:] = torch.randn_like(x[row:])
        assert torch.equal(attend(module, later, layout)[:row], expected[:row])


@pytest.mark.parametrize("length", ["no pseudo scores", 12, math.inf])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_later_modalities_and_lengths_leave_outputs(fusion: str, length: float | str) -> None:
    module = aligner(fusion=fusion)
    pseudo = None if isinstance(length, str) else mk.PseudoAttention(base=0.3, decay=0.5, length=length)
    full = mk.segment_modalities(SEQUENCE, num_modalities=M)
    qkv = tensors(full)
    expected = attend(module, qkv, full, pseudo=pseudo)
    for column in (1, 4, CHANGED, 15):
        kept = SEQUENCE[:, :column]
        later = [*itertools.product(range(-1, M), repeat=2)]
        others = [torch.cat((kept, torch.tensor([(pair * 8)[: 16 - column]])), 1) for pair in later]
        others += [kept, torch.cat((SEQUENCE, torch.tensor([[2, 2, 0, -1, 1]])), 1)]
        for other in others:
            layout = mk.segment_modalities(other, num_modalities=M)
            spare = max(other.shape[1] - 16, 0)
            inputs = [torch.cat((x, torch.randn_like(x[:, :, :spare])), 2)[:, :, : other.shape[1]] for x in qkv]
            out = attend(module, inputs, layout, pseudo=pseudo)
            torch.testing.assert_close(out[:, :, :column], expected[:, :, :column], **NEAR)


def test_what_does_look_ahead_shows() -> None:
    """The tests above can fail: the sequence scope leaks, and so do pseudo scores of the sequence's length."""
    layout = mk.segment_modalities(SEQUENCE, num_modalities=M)
    qkv = tensors(layout)
    for fusion in FUSIONS:
        module = aligner("sequence", fusion=fusion)
        later = [*qkv[:1], changed_from(qkv[1], CHANGED), *qkv[2:]]
        before = [attend(module, x, layout)[:, :, :CHANGED] for x in (qkv, later)]
        assert bool(((before[0] - before[1]).abs() > 1e-6).any())
    module, shorter = aligner(), mk.segment_modalities(SEQUENCE[:, :CHANGED], num_modalities=M)
    cut = [x[:, :, :CHANGED] for x in qkv]
    for length, leaks in ((None, True), (12, False), (math.inf, False)):
        pseudo = mk.PseudoAttention(base=0.3, decay=0.5, length=length)
        difference = attend(module, qkv, layout, pseudo=pseudo)[:, :, :CHANGED] - attend(
            module, cut, shorter, pseudo=pseudo
        )
        assert bool((difference.abs().amax((0, 1, 3))[:-1] > 1e-6).all()) == leaks
        assert leaks or difference.abs().max() < 1e-12


def test_gradients_do_not_come_from_ahead() -> None:
    """An output's gradient reaches no later key."""
    layout, module = mk.segment_modalities(SEQUENCE), aligner(fusion="linear")
    for scope, leaks in (("causal", False), ("sequence", True)):
        module.scope = scope
        qkv = [x.requires_grad_() for x in tensors(layout)]
        attend(module, qkv, layout)[:, :, :CHANGED].square().sum().backward()
        assert bool(qkv[1].grad[:, :, CHANGED:].any()) == leaks
        assert not qkv[2].grad[:, :, CHANGED:].any() and bool(qkv[1].grad[:, :, :CHANGED].any())


# Passes over prefixes


@pytest.mark.parametrize("fusion", FUSIONS)
def test_fewer_queries_than_keys(fusion: str) -> None:
    layout, module = mk.segment_modalities(ids(70, 3).view(2, 35), num_modalities=M), aligner(fusion=fusion)
    query, key, value = tensors(layout)
    pseudo = mk.PseudoAttention(length=40)
    full = attend(module, [query, key, value], layout, pseudo=pseudo)
    for start, count in ((34, 1), (20, 15), (7, 5), (0, 35), (0, 1), (35, 0)):
        rows = [query[:, :, start : start + count], key, value]
        out = attend(module, rows, layout, pseudo=pseudo, query_start=start)
        torch.testing.assert_close(out, full[:, :, start : start + count], **NEAR)
        if start + count == 35:
            torch.testing.assert_close(attend(module, rows, layout, pseudo=pseudo), out, **NEAR)
    starts = torch.tensor([3, 20], dtype=torch.int32)
    rows = [torch.stack([query[n, :, s : s + 6] for n, s in enumerate(starts.tolist())]), key, value]
    expected = torch.stack([full[n, :, s : s + 6] for n, s in enumerate(starts.tolist())])
    torch.testing.assert_close(attend(module, rows, layout, pseudo=pseudo, query_start=starts), expected, **NEAR)


def test_fewer_queries_than_keys_in_documents() -> None:
    layout, module = packed([0, 9, 9, 10, 30]), aligner()
    query, key, value = tensors(layout)
    full = attend(module, [query, key, value], layout)
    last = torch.tensor([5, 6, 7, 8, 27, 28, 29])  # 4 of the first document, none, none, 3 of the last
    cu_seqlens_q = torch.tensor([0, 4, 4, 4, 7], dtype=torch.int32)
    out = attend(module, [query[last], key, value], layout, cu_seqlens_q=cu_seqlens_q)
    torch.testing.assert_close(out, full[last], **NEAR)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_one_pass_equals_a_pass_per_token(fusion: str) -> None:
    """Decoding: the newest token over the prefix so far gives the full pass's row."""
    module = aligner(fusion=fusion)
    whole = mk.segment_modalities(SEQUENCE, num_modalities=M)
    qkv = tensors(whole)
    pseudo = mk.PseudoAttention(decay=0.5, length=math.inf)
    full = attend(module, qkv, whole, pseudo=pseudo)
    aligned = mk.align_keys(qkv[1], module(qkv[1], whole), whole)
    for n in range(1, 17):
        layout = mk.segment_modalities(SEQUENCE[:, :n], num_modalities=M)
        query, key, value = (x[:, :, :n] for x in qkv)
        newest = attend(module, [query[:, :, -1:], key, value], layout, pseudo=pseudo)
        torch.testing.assert_close(newest, full[:, :, n - 1 : n], **NEAR)
        # An aligned key, once made, never changes.
        torch.testing.assert_close(mk.align_keys(key, module(key, layout), layout), aligned[:, :, :n], **NEAR)
