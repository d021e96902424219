"""Whose tokens count for whom: the causal scope between chunks and `source_roles`, in all ways of the map, against the
token-by-token reference; what answers know of each other; and that chunks cost nothing where there are none."""

import copy
import dataclasses
import itertools
import types

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import moda_kernels as mk
from moda_kernels import products
from moda_kernels.alignment.causal import CausalMap
from moda_kernels.alignment.pieces import pieces_of
from moda_kernels.runtime.later import Later

D, M, R = 4, 3, 3
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def runs(low: int, high: int, count: int, longest: int) -> Tensor:
    values = torch.randint(low, high, (count,))
    return values.repeat_interleave(torch.randint(1, longest + 1, (count,)))[:count]


def drawn(seed: int, packed: bool, **more: int) -> mk.ModalityLayout:
    """Padding, roles and chunks that cut segments anywhere."""
    torch.manual_seed(seed)
    ids, chunks, roles = runs(-1, M, 40, 4), runs(-1, 3, 40, 9), runs(0, R, 40, 3)
    options = {"num_modalities": M, "num_roles": R} | more
    if packed:
        cu_seqlens = torch.tensor([0, 0, 13, 20, 20, 40])
        return mk.segment_modalities(ids, chunks=chunks, roles=roles, cu_seqlens=cu_seqlens, **options)
    ids, chunks, roles = (x.view(2, 20) for x in (ids, chunks, roles))
    return mk.segment_modalities(ids, chunks=chunks, roles=roles, **options)


def keys(layout: mk.ModalityLayout) -> Tensor:
    shape = (layout.num_tokens, 2, D) if layout.packed else (layout.modality.shape[0], 2, layout.modality.shape[1], D)
    return torch.randn(shape, dtype=torch.float64)


def aligner(cls: type = mk.DuplexAligner, **options: object) -> mk.DuplexAligner:
    module = cls(D, M, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def gradients(out: Tensor, of: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, of, upstream, materialize_grads=True, retain_graph=True)


OPTIONS = [
    {"fusion": "add"},
    {"fusion": "concat", "renorm": True, "aligned": (0, 2)},
    {"fusion": "linear", "norm": "frobenius", "source_roles": (0, 2)},
    {"fusion": "add", "source_roles": (1,)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("scope", ["causal", "sequence"])
def test_against_the_reference(scope: str, packed: bool, options: dict[str, object]) -> None:
    module, literal = (aligner(cls, scope=scope, **options) for cls in (mk.DuplexAligner, mk.reference.DuplexAligner))
    for seed in range(3):
        layout = drawn(seed, packed)
        key, upstream = keys(layout).requires_grad_(), keys(layout)
        expected = literal.fused_keys(key, layout)
        right = gradients(expected, (key, *literal.parameters()), upstream)
        key_map = module(key, layout)
        ways = [mk.align_keys(key, key_map, layout)]
        if isinstance(key_map, CausalMap):
            for size in (1, 5):  # by tokens, and as on a GPU
                ways.append(mk.align_keys(key, dataclasses.replace(key_map, size=size), layout))
                by_pieces = key_map._by_pieces(key if packed else key.transpose(1, 2), size)
                ways.append(by_pieces if packed else by_pieces.transpose(1, 2))
        for out in ways:
            torch.testing.assert_close(out, expected, **EXACT)
            for a, b in zip(gradients(out, (key, *module.parameters()), upstream), right, strict=True):
                torch.testing.assert_close(a, b, **EXACT)


def test_pieces_are_segments_cut_at_chunks() -> None:
    ids = torch.tensor([[0, 0, 0, 0, -1, 0, 1, 1, 1, 0]])
    chunks = torch.tensor([[-1, 3, 3, 5, 7, 5, 5, -1, 5, 5]])
    layout = mk.segment_modalities(ids, chunks=chunks)
    pieces = pieces_of(layout, (0, 1))
    assert pieces.group.tolist() == [0, 1, 1, 2, -1, 3, 4, 5, 6, 7]
    assert pieces.table[:, 1].tolist() == [0, 1, 3, 5, 6, 7, 8, 9]
    # The image of chunk 5 knows its chunk's text and what is in no chunk; the next one is another chunk 5.
    assert pieces.mapped.tolist() == [False] * 6 + [True, True, True, True]
    alone = mk.segment_modalities(torch.tensor([[0, 1, 0, 1]]), chunks=torch.tensor([[0, 1, -1, 2]]))
    assert pieces_of(alone, (0, 1)).mapped.tolist() == [False, False, False, True]


def test_without_chunks_pieces_are_the_segments() -> None:
    ids = torch.randint(-1, M, (2, 30))
    layout = mk.segment_modalities(ids, num_modalities=M)
    pieces = pieces_of(layout, (0, 1, 2))
    assert pieces.number == layout.max_segments and torch.equal(pieces.group, layout.groups("segment"))
    assert pieces.block(0, pieces.number).grouping is layout.grouping("segment")
    nowhere = mk.segment_modalities(ids, num_modalities=M, chunks=torch.full_like(ids, -1))
    key = keys(layout)
    fused = [mk.align_keys(key, aligner(scope="causal")(key, of), of) for of in (layout, nowhere)]
    torch.testing.assert_close(*fused, rtol=1e-13, atol=1e-13)


def test_answers_do_not_know_each_other() -> None:
    """Several answers in one sequence have the keys that each has alone behind the prompt."""
    prompt, answers = [0, 0, 1, 1, 0], [[1, 0, 1], [0, 1, 1, 2], [2], [1, 0, 0, 1, 2, 0]]
    module = aligner(scope="causal", fusion="concat")
    ids = torch.tensor([prompt + [*itertools.chain(*answers)]])
    chunks = [-1] * len(prompt) + [i for i, answer in enumerate(answers) for _ in answer]
    layout = mk.segment_modalities(ids, num_modalities=M, chunks=torch.tensor([chunks]))
    key = keys(layout)
    fused = mk.align_keys(key, module(key, layout), layout)
    begin = len(prompt)
    for answer in answers:
        of = [*range(len(prompt)), *range(begin, begin + len(answer))]
        begin += len(answer)
        alone = mk.segment_modalities(torch.tensor([prompt + answer]), num_modalities=M)
        one = mk.align_keys(key[:, :, of], module(key[:, :, of], alone), alone)
        torch.testing.assert_close(one, fused[:, :, of], **EXACT)


def test_copies_that_do_not_count_change_nothing() -> None:
    """Noised copies of an image stay out of the sums; they are aligned themselves."""
    ids, roles = torch.tensor([[0, 0, 1, 1, 1, 1, 0]]), torch.tensor([[0, 0, 1, 1, 2, 2, 0]])
    layout = mk.segment_modalities(ids, roles=roles)
    for scope in ("causal", "sequence"):
        module = mk.DuplexAligner(D, 2, scope=scope, source_roles=[1, 0], dtype=torch.float64)
        torch.nn.init.normal_(module.ratio)
        key = torch.randn(1, 2, 7, D, dtype=torch.float64)
        other = torch.where(roles[:, None, :, None] == 2, 7 * key, key)
        fused = [mk.align_keys(x, module(x, layout), layout) for x in (key, other)]
        clean = roles[0] != 2
        assert torch.equal(fused[0][:, :, clean], fused[1][:, :, clean])
        assert not torch.isclose(fused[0][:, :, ~clean], key[:, :, ~clean]).all(-1).any()


def test_no_token_that_counts_leaves_a_key_as_it_is() -> None:
    ids, roles = torch.tensor([[1, 0, 1, 0]]), torch.tensor([[2, 0, 2, 0]])
    layout = mk.segment_modalities(ids, roles=roles, num_roles=3)
    for scope, kept in (("causal", [0, 1, 3]), ("sequence", [1, 3])):
        module = mk.DuplexAligner(D, 2, fusion="concat", scope=scope, source_roles=(0,), dtype=torch.float64)
        torch.nn.init.normal_(module.weight)
        key = torch.randn(1, 2, 4, D, dtype=torch.float64)
        fused = mk.align_keys(key, module(key, layout), layout)
        same = (fused == key).all(-1).all(1)[0]
        assert same.nonzero()[:, 0].tolist() == kept


def test_keys_never_look_ahead_nor_into_other_chunks() -> None:
    layout, module = drawn(1, packed=False), aligner(scope="causal", source_roles=(0, 1))
    key, chunk, column = keys(layout), layout.chunk, torch.arange(20)
    counted = (layout.role == 0) | (layout.role == 1)
    for size, t in itertools.product((None, 5), range(20)):
        other = key.clone()
        other[:, :, t] = 3 + other[:, :, t]
        fused = [
            mk.align_keys(x, dataclasses.replace(module(x, layout), size=size), layout).movedim(2, 1)
            for x in (key, other)
        ]
        knows = (column > t) & ((chunk[:, t, None] == -1) | (chunk == chunk[:, t, None])) & counted[:, t, None]
        knows &= (layout.modality != layout.modality[:, t, None]) & (layout.modality[:, t, None] >= 0)
        changed = (fused[0] != fused[1]).any(-1).any(-1)
        assert torch.equal(changed, (knows & (layout.modality >= 0)) | (column == t))


def test_sums_that_are_broken_stay_in_their_chunk() -> None:
    ids = torch.tensor([[0, 1, 0, 1, 0, 1, 0, 1]])
    layout = mk.segment_modalities(ids, chunks=torch.tensor([[-1, -1, 0, 0, 1, 1, -1, -1]]))
    module, key = mk.DuplexAligner(D, 2, scope="causal"), torch.randn(1, 2, 8, D)
    torch.nn.init.normal_(module.ratio)
    broken = key.clone()
    broken[:, :, 2] = float("nan")
    for size in (None, 1, 3):
        good, bad = (mk.align_keys(x, dataclasses.replace(module(x, layout), size=size), layout) for x in (key, broken))
        here = torch.tensor([False, False, True, True, False, False, False, False])
        assert torch.equal(good[:, :, ~here], bad[:, :, ~here]) and bool(bad[:, :, here].isnan().all())


@pytest.mark.parametrize("chunks", [False, True])
def test_a_loose_bound_costs_no_blocks(chunks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, once the number of pieces has come; without it all blocks run, to the same bits."""
    ids = torch.arange(60).view(2, 30) // 4 % M
    told = {"chunks": ids} if chunks else {}
    layout = mk.segment_modalities(ids, num_modalities=M, max_segments=60, **told)
    module, key = aligner(scope="causal", renorm=True), keys(layout).requires_grad_()
    upstream, key_map = keys(layout), module(key, layout)
    pieces = dataclasses.replace(key_map.pieces, number=60, table=torch.full((60, 4), -1))
    expected = mk.align_keys(key, key_map, layout)
    there = key_map.pieces.table[key_map.pieces.table[:, 0] >= 0]
    pieces.table[:, 1:3] = 0
    pieces.table[: len(there)] = there
    grouping = products.group_tokens(pieces.group, 60)
    monkeypatch.setattr(type(pieces), "_grouping", lambda self: grouping)
    runs = []
    monkeypatch.setattr(CausalMap, "_again", lambda self, *step: runs.append(1) or self._fused(*step))
    results = []
    for known in (True, False):
        now = dataclasses.replace(pieces, there_are=Later(torch.tensor(len(there))))
        if not known:
            now.there_are._event = types.SimpleNamespace(query=lambda: False)
        runs.clear()
        fused = dataclasses.replace(key_map, pieces=now)._by_pieces(key.transpose(1, 2), 4).transpose(1, 2)
        assert len(runs) == (-(-len(there) // 4) if known else 15)
        results.append((fused, *gradients(fused, (key, *module.parameters()), upstream)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(results[0][0], expected, **EXACT)


def test_a_number_that_comes_later() -> None:
    assert Later(torch.tensor([7])).value == 7
    waiting = Later(torch.tensor(3))
    waiting._event = types.SimpleNamespace(query=lambda: False)
    assert waiting.value is None and copy.deepcopy(waiting) is waiting
    waiting._event = types.SimpleNamespace(query=lambda: True)
    assert waiting.value == 3
    with FakeTensorMode():
        assert Later(torch.zeros(1, dtype=torch.int32)).value is None
    assert torch.vmap(lambda x: x + (Later(x).value is None))(torch.zeros(2)).tolist() == [1, 1]


class Operations(TorchDispatchMode):
    """How many operations compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        outs = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)]
        self.number += any(x.untyped_storage().data_ptr() not in inputs for x in outs)
        return out


def test_a_layer_computes_little_but_its_keys() -> None:
    """All that follows from modalities, roles and chunks is made once: 81 to 85 and 32 to 37 operations before."""
    for layout in (drawn(0, packed=False), mk.segment_modalities(torch.arange(40).view(2, 20) // 3 % M)):
        for fusion in ("add", "linear", "concat"):
            module, key = aligner(scope="causal", fusion=fusion), keys(layout).requires_grad_()
            mk.align_keys(key, module(key, layout), layout)
            with Operations() as forward:
                fused = mk.align_keys(key, module(key, layout), layout)
            with Operations() as backward:
                torch.autograd.grad(fused, (key, *module.parameters()), torch.ones_like(fused))
            assert forward.number <= 28 and backward.number <= 24, (fusion, forward.number, backward.number)


@pytest.mark.parametrize("chunks", [False, True])
def test_compiled_whole(chunks: bool) -> None:
    """Also where pieces are first made within the compiled part."""
    ids = torch.randint(2, (2, 16))
    told = {"chunks": torch.tensor([[-1] * 4 + [0] * 6 + [1] * 6] * 2)} if chunks else {}
    layout = mk.segment_modalities(ids, num_modalities=2, **told)
    module = mk.DuplexAligner(D, 2, scope="causal", renorm=True)
    torch.nn.init.normal_(module.ratio)
    key = torch.randn(2, 2, 16, D)
    torch._dynamo.reset()
    fused = torch.compile(
        lambda key: mk.align_keys(key, module(key, layout), layout), fullgraph=True, backend="aot_eager"
    )(key)
    torch.testing.assert_close(fused, mk.align_keys(key, module(key, layout), layout))


def test_errors(refused) -> None:
    for roles, kind in ((3, TypeError), ((), ValueError), ((-1,), ValueError), (("a",), TypeError)):
        refused(lambda roles=roles: mk.DuplexAligner(D, M, source_roles=roles), kind, ["source_roles"])
    module = mk.DuplexAligner(D, M, source_roles=(0, 5))
    layout = drawn(0, packed=False)
    refused(lambda: module(keys(layout), layout), ValueError, ["layout", "source_roles", "3"])
    assert "source_roles=(0, 5)" in repr(module)
    plain = mk.segment_modalities(layout.modality, num_modalities=M, roles=layout.role.clamp(min=0), num_roles=R)
    key = keys(layout)
    refused(lambda: mk.align_keys(key, aligner(scope="causal")(key, layout), plain), ValueError, ["key_map"])
