"""Decoding: with a `DecodeState` the newest outputs are those of one full pass over the raw keys so far, for every
option; new tokens cost their own work; beams, crops, static and sliding caches, packed documents."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from decoder import NEAR, D, Decoder, M, prompt, token
from torch import Tensor

import moda_kernels as mk
from moda_kernels.alignment.maps import KeptKeys
from moda_kernels.testing import CASES, Case

BACKENDS = ("reference", "cpu")
#: Tokens of each step: a prompt, single tokens, a chunk.
STEPS = (9, 1, 1, 6, 1, 5)


def full_call(case: Case, tensors: dict[str, Tensor], backend: str, **more: Any) -> tuple[Tensor, Tensor]:
    layout = more.pop("layout")
    arguments = case._arguments(tensors, layout, {"scale": case.scale, "duplex": case.duplex, "enable_gqa": True})
    if case.mask is not None:
        arguments["mask"] = case.mask((layout or more["state"].layout()).num_roles)
    arguments["is_causal"] = case.is_causal
    qkv = [tensors[name] for name in ("query", "key", "value")]
    return mk.moda_attention(*qkv, return_lse=True, backend=backend, **arguments | more)


def mapper(case: Case, tensors: dict[str, Tensor]) -> Callable[..., mk.KeyMap] | None:
    """From a cache's key, value and state to the key map of a case."""
    if case.fusion is None:
        return None
    if case.fusion == "released":
        return lambda key, value, state: mk.released_key_map(
            key, value, None, tensors["ratio"], tensors["weight"], state=state
        )
    options = {
        "fusion": case.fusion,
        "norm": case.norm,
        "scope": case.scope,
        "aligned": case.aligned,
        "renorm": case.renorm,
        "source_roles": case.source_roles,
    }
    aligner = mk.DuplexAligner(tensors["key"].shape[-1], case.modalities, dtype=tensors["key"].dtype, **options)
    aligner.load_state_dict({name: tensors[name] for name in ("ratio", "weight") if name in tensors})
    aligner.requires_grad_(False)
    return lambda key, value, state: aligner(key, state=state)


def grown(layout: mk.ModalityLayout, steps: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens so far, of them new): indices into the flattened keys of packed documents, or columns of a batch."""
    if not layout.packed:
        end, length = 0, layout.modality.shape[1]
        for step in (*steps, length):
            new, end = torch.arange(end, min(end + step, length)), min(end + step, length)
            yield torch.arange(end), new
        return
    begins, lengths = layout.cu_seqlens[:-1].tolist(), layout.cu_seqlens.diff().tolist()
    have = [0] * len(lengths)
    for step in (*steps, max(lengths)):
        after = [min(h + step, n) for h, n in zip(have, lengths, strict=True)]
        so_far = [torch.arange(b, b + a) for b, a in zip(begins, after, strict=True)]
        yield torch.cat(so_far), torch.cat([s[h:] for s, h in zip(so_far, have, strict=True)])
        have = after


def facts(layout: mk.ModalityLayout, columns: Tensor) -> dict[str, Tensor]:
    """What was told of some tokens beside their modalities."""
    told = {"steps": layout.step}
    if layout.own_roles:
        told["roles"] = layout.role.clamp(min=0)
    if layout.own_chunks:
        told["chunks"] = layout.chunk  # a number of its own for each chunk
    return {name: fact[..., columns].long() for name, fact in told.items()}


def bounds(layout: mk.ModalityLayout, rows: Tensor) -> Tensor:
    """cu_seqlens of some tokens of packed documents."""
    counts = torch.bincount(layout.sequence[rows].long(), minlength=layout.num_sequences)
    return torch.cat((torch.zeros(1), counts.cumsum(0))).int()


# Every option


@pytest.mark.parametrize("case", [c for c in CASES if c.queries is None and c.length != 100], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_step_is_a_full_pass(case: Case, backend: str) -> None:
    tensors = case.build(torch.float64, length=24, head_dim=D).tensors
    layout = case.layout(24)
    roles = {"num_roles": layout.num_roles}
    key_map_of, state = mapper(case, tensors), mk.DecodeState(case.modalities, **roles, undo=0)
    axis = 0 if layout.packed else 2
    seen = 0
    for rows, new in grown(layout, STEPS):
        cut = {n: t.index_select(axis, rows) if n in ("query", "key", "value") else t for n, t in tensors.items()}
        if "attn_mask" in tensors:
            cut["attn_mask"] = tensors["attn_mask"][..., rows, :][..., rows]
        options: dict[str, Any] = {}
        if layout.packed:
            options["cu_seqlens"] = bounds(layout, rows)
        ids = layout.modality[..., rows].long()
        part = mk.segment_modalities(ids, num_modalities=case.modalities, **options, **roles, **facts(layout, rows))
        try:
            out, lse = full_call(case, cut, backend, layout=part)
        except NotImplementedError as refusal:
            pytest.skip(str(refusal))
        if layout.packed:
            newest = torch.isin(rows, new)
            state.append(layout.modality[new], cu_seqlens=bounds(layout, new), **facts(layout, new))
        else:
            newest = torch.arange(len(rows)) >= len(rows) - len(new)
            state.append(layout.modality[:, new], **facts(layout, new))
        assert torch.equal(state.layout().segment, part.segment) and torch.equal(state.layout().prefix, part.prefix)
        if len(new) == 0:
            continue
        now = cut | {"query": cut["query"].index_select(axis, newest.nonzero()[:, 0])}
        if "attn_mask" in cut:
            now["attn_mask"] = cut["attn_mask"][..., newest, :]
        key_map = None if key_map_of is None else key_map_of(cut["key"], cut["value"], state)
        plain = dataclasses.replace(case, fusion=None)
        got, got_lse = full_call(plain, now, backend, layout=None, state=state, key_map=key_map)
        torch.testing.assert_close(got, out.index_select(axis, newest.nonzero()[:, 0]), **NEAR)
        torch.testing.assert_close(got_lse, lse[(slice(None),) * (1 if layout.packed else 2) + (newest,)], **NEAR)
        seen += len(new)
    assert seen == layout.modality.shape[-1]


# What follows decodes by one driver

KINDS = ("causal", "sequence", "released")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("room", [12, 64])
def test_static_cache(kind: str, backend: str, room: int) -> None:
    decoder = Decoder(kind, columns=lambda length, new: room, backend=backend, pseudo=mk.PseudoAttention())
    decoder.step(prompt())
    for _ in range(2):
        decoder.step(token())


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("kind", ["causal", "sequence"])
def test_only_new_keys_are_read(kind: str, renorm: bool) -> None:
    """So a step costs its own tokens: old keys may be NaN for the aligner."""
    decoder = Decoder(kind, batch=1, renorm=renorm)
    decoder.step(torch.tensor([[0, 0, 1, 1, 2, 0]]))
    decoder.gone = 10**6
    for ids in ([0], [1, 1, 2], [2], [0], [0, 1]):
        decoder.step(torch.tensor([ids]))
    assert bool(decoder.state[0].gram.isfinite().all())


def test_aligned_keys_are_kept_in_place() -> None:
    """Growing costs O(1) copies per token."""
    decoder = Decoder("causal")
    decoder.step(prompt(40))
    moves, where = 0, 0
    for _ in range(60):
        decoder.step(token())
        buffer = decoder.state[0]._buffer
        moves, where = moves + (buffer.data_ptr() != where), buffer.data_ptr()
    assert moves <= 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_modality_alone_keeps_its_keys(kind: str) -> None:
    """Token by token; the other sequence has others from the start, and padding now and then."""
    decoder = Decoder(kind)
    decoder.step(torch.tensor([[0, 0], [0, 1]]))
    for ids in ([0, 0], [0, -1], [-1, 2], [1, 0], [1, 0], [0, 1]):
        decoder.step(torch.tensor(ids)[:, None])


@pytest.mark.parametrize("scope", ["causal", "sequence"])
def test_only_some_modalities_are_aligned(scope: str) -> None:
    decoder = Decoder(scope)
    decoder.aligner.aligned = (1,)
    decoder.step(prompt())
    for ids in ([0, 1], [1, 2], [2, 0]):
        decoder.step(torch.tensor(ids)[:, None])


def sliding(window: int) -> Callable[[int, int], int]:
    """Columns of a cache that holds the last window - 1 keys, and gives all at first."""
    return lambda length, new: min(length, window - 1 + new) if length > new else length


WINDOWS = {
    "causal": mk.ModularMask(mk.ModularMask.causal(M).rules, window=5),
    "rules": mk.ModularMask(mk.ModularMask.cross_only(M, causal=True).rules, window=5),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", WINDOWS)
@pytest.mark.parametrize("kind", KINDS)
def test_sliding_cache(kind: str, mask: str, backend: str) -> None:
    """Sums still know the keys that are gone, and pseudo-attention how many there were."""
    decoder = Decoder(
        kind, columns=sliding(5), mask=WINDOWS[mask], backend=backend, pseudo=mk.PseudoAttention(0.3, 0.1)
    )
    decoder.step(torch.cat((torch.full((2, 2), -1), torch.randint(M, (2, 7))), 1))
    for new in (1, 1, 3, 1, 1, 1, 1, 1, 1):
        decoder.step(torch.randint(M, (2, new)))
    assert decoder.state[0]._buffer is None or decoder.state[0]._buffer.shape[2] < 12


def test_sliding_cache_that_is_too_short_for_the_mask(refused: Callable[..., None]) -> None:
    for mask in (mk.ModularMask.causal(M), mk.ModularMask(mk.ModularMask.causal(M).rules, window=6)):
        decoder = Decoder("sequence", columns=sliding(5), mask=mask)
        decoder.step(torch.zeros(2, 8).long())
        refused(lambda d=decoder: d.step(torch.zeros(2, 1).long()), ValueError, ["key", "all 9", "window", "last 5"])
    # A segment that began before the window.
    rules = mk.ModularMask.bidirectional_within(M, [1]).rules
    decoder = Decoder("sequence", columns=sliding(5), mask=mk.ModularMask(rules, window=5))
    decoder.step(torch.ones(1, 8).long().expand(2, -1))
    refused(lambda: decoder.step(torch.ones(2, 1).long()), ValueError, ["key"])
    decoder = Decoder("sequence", columns=sliding(5), mask=mk.ModularMask(rules, window=5))
    decoder.step(torch.ones(2, 8).long())
    decoder.step(torch.zeros(2, 1).long())


@pytest.mark.parametrize("kind", KINDS)
def test_beams(kind: str) -> None:
    decoder = Decoder(kind)
    decoder.step(prompt())
    for order in ([1, 0], [1, 1], [0, 0, 1, 1], [3, 1, 1, 0]):
        decoder.reorder(torch.tensor(order))
        decoder.step(token(len(order)))


@pytest.mark.parametrize("undo", [0, 1, 4, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_crop(kind: str, undo: int) -> None:
    decoder = Decoder(kind, undo=undo)
    decoder.step(prompt())
    decoder.crop(20)  # nothing happens
    decoder.step(token())
    decoder.step(torch.randint(M, (2, 5)))
    for length, new in ((13, 2), (14, 1), (12, 4), (7, 1), (7, 3), (0, 6), (5, 1)):
        decoder.crop(length)
        assert decoder.state.length == length
        decoder.step(torch.randint(M, (2, new)))
        decoder.step(token())


def test_crop_within_the_last_append_reads_no_old_keys() -> None:
    decoder = Decoder("causal", batch=1, undo=2)
    decoder.step(torch.tensor([[0, 0, 1, 1, 2, 0]]))
    decoder.step(torch.tensor([[0]]))
    decoder.step(torch.tensor([[1, 1, 2, 2]]))
    decoder.gone = 7
    decoder.crop(9)
    decoder.step(torch.tensor([[0]]))  # reads columns 7, 8 again
    decoder.gone = 6
    decoder.crop(6)
    decoder.step(torch.tensor([[0]]))


@pytest.mark.parametrize("kind", ["causal", "sequence"])
def test_crop_where_the_keys_are_gone(kind: str, refused: Callable[..., None]) -> None:
    decoder = Decoder(kind, columns=sliding(5), mask=WINDOWS["causal"])
    decoder.step(torch.randint(M, (2, 9)))
    decoder.step(torch.randint(M, (2, 3)))
    decoder.crop(10)
    decoder.columns = lambda length, new: 5
    decoder.step(torch.randint(M, (2, 1)))
    decoder.crop(9)  # no more than `undo` tokens back, and their keys are there
    decoder.step(torch.randint(M, (2, 1)))
    decoder.crop(6)
    refused(lambda: decoder.step(torch.randint(M, (2, 1))), ValueError, ["key", "tokens 0 to", "undo"])


def test_crop_restores_the_sums() -> None:
    """Nothing is subtracted: the sums after a crop are those of a state that never saw the (huge) rest."""
    for undo in (0, 1, 32):
        a, b = Decoder("sequence", undo=undo), Decoder("sequence", undo=undo)
        big = torch.randn(2, 2, 9, D, dtype=torch.float64)
        big[:, :, 5:] *= 1e12
        ids = torch.randint(M, (2, 9))
        for decoder in (a, b):
            decoder.state.append(ids[:, :5])
            decoder.aligner(big[:, :, :5], state=decoder.state)
        a.state.append(ids[:, 5:])
        a.aligner(big, state=a.state)
        a.state.crop(5)
        for decoder in (a, b):
            decoder.state.append(ids[:, :1])
            decoder.aligner(torch.cat((big[:, :, :5], big[:, :, :1]), 2), state=decoder.state)
        expected = b.state[0].gram
        torch.testing.assert_close(a.state[0].gram, expected, rtol=0, atol=1e-12)


# Roles, steps, chunks

V = mk.Visibility
ATOMS = {
    "prefixes": mk.ModularMask([[V.UPTO, V.BEFORE, V.PAST], [V.SEGMENT, V.CHUNK, V.BEFORE], [V.ALL, V.PAST, V.CHUNK]]),
    "unions": mk.ModularMask(
        [
            [V.UPTO | V.CHUNK, V.BEFORE | V.SEGMENT, V.PAST | V.BEFORE],
            [V.CHUNK, V.PAST, V.UPTO],
            [V.HIDDEN, V.ALL, V.PAST],
        ],
        window=4,
    ),
    "window on all": mk.ModularMask([[V.UPTO, V.PAST, V.ALL], [V.CHUNK, V.BEFORE, V.PAST], [V.SEGMENT] * 3], 6, "all"),
}


@pytest.mark.parametrize("undo", [0, 3, 32])
@pytest.mark.parametrize("mask", ATOMS)
@pytest.mark.parametrize("kind", KINDS)
def test_roles_steps_and_chunks(kind: str, mask: str, undo: int) -> None:
    """Chunks that go on over appends, beams and crops or don't."""
    decoder = Decoder(kind, undo=undo, told=True, mask=ATOMS[mask])
    decoder.step(prompt())
    for _ in range(6):
        decoder.step(token())
    decoder.step(torch.randint(-1, M, (2, 5)))
    decoder.reorder(torch.tensor([1, 0, 1]))
    decoder.step(token(3))
    for length, new in ((16, 2), (17, 1), (12, 4), (12, 1), (3, 3), (0, 6)):
        decoder.crop(length)
        decoder.step(torch.randint(-1, M, (3, new)))
        decoder.step(token(3))


@pytest.mark.parametrize("kind", ["causal", "sequence"])
def test_only_new_keys_are_read_with_chunks(kind: str) -> None:
    decoder = Decoder(kind, told=True, mask=ATOMS["unions"])
    decoder.step(prompt())
    decoder.gone = 10**6
    for new in (1, 1, 3, 1, 2, 1, 1, 1, 4):
        decoder.step(torch.randint(-1, M, (2, new)))


@pytest.mark.parametrize("kind", KINDS)
def test_static_and_sliding_caches_with_chunks(kind: str) -> None:
    static = Decoder(kind, told=True, mask=ATOMS["prefixes"], columns=lambda length, new: 40)
    slides = Decoder(kind, told=True, mask=ATOMS["window on all"], columns=sliding(6))
    for decoder in (static, slides):
        decoder.step(prompt(14))
        for new in (1, 1, 3, 1, 1):
            decoder.step(torch.randint(M, (2, new)))


def test_chunks_that_are_told_late() -> None:
    """The prompt is in no chunk; each answer is one."""
    state, aligner = mk.DecodeState(M), Decoder("causal").aligner
    ids = torch.randint(M, (2, 14))
    chunks = torch.tensor([[-1] * 8 + [0] * 3 + [1] * 3] * 2)
    key = torch.randn(2, 2, 14, D, dtype=torch.float64)
    for begin, end in ((0, 7), (7, 8), (8, 9), (9, 11), (11, 12), (12, 13), (13, 14)):
        told = {"chunks": chunks[:, begin:end]} if begin >= 8 else {}
        layout = state.append(ids[:, begin:end], **told)
        fused = mk.align_keys(key[:, :, :end], aligner(key[:, :, :end], state=state), layout)
        if begin >= 8:
            whole = mk.segment_modalities(ids[:, :end], num_modalities=M, chunks=chunks[:, :end])
            expected = mk.align_keys(key[:, :, :end], aligner(key[:, :, :end], whole), whole)
            torch.testing.assert_close(fused, expected, **NEAR)
    assert state[0].gram.shape == (2, 2 * M, 2, D, D)


def test_answers_that_are_decoded_at_the_same_time() -> None:
    """A row each, from one prompt: each is what it is alone, and what it is as a chunk among the others."""
    decoder = Decoder("causal", batch=1)
    decoder.step(torch.tensor([[0, 0, 1, 1, 2, 0]]))
    decoder.reorder(torch.tensor([0, 0, 0]))
    for _ in range(5):
        decoder.step(torch.randint(M, (3, 1)))
    ids = torch.cat((decoder.ids[:1, :6], decoder.ids[:, 6:].reshape(1, -1)), 1)
    chunks = torch.tensor([[-1] * 6 + [i for i in range(3) for _ in range(5)]])
    layout = mk.segment_modalities(ids, num_modalities=M, chunks=chunks)
    _, key, _ = decoder.qkv
    joined = torch.cat((key[:1, :, :6], key[:, :, 6:].transpose(0, 1).flatten(1, 2)[None]), 2)
    fused = mk.align_keys(joined, decoder.aligner(joined, layout), layout)
    alone = mk.segment_modalities(decoder.ids, num_modalities=M)
    apart = mk.align_keys(key, decoder.aligner(key, alone), alone)[:, :, 6:].transpose(0, 1).flatten(1, 2)
    torch.testing.assert_close(fused[0, :, 6:], apart, **NEAR)


def test_caches_that_are_too_short_for_steps_and_chunks(refused: Callable[..., None]) -> None:
    ids = torch.zeros(1, 8).long()
    rules = {"UPTO": V.UPTO, "BEFORE": V.BEFORE, "CHUNK": V.CHUNK, "ALL": V.ALL}
    for name, rule in rules.items():
        for window_on, seen in (("past", name != "CHUNK"), ("all", False)):
            state = mk.DecodeState(M)
            mask = mk.ModularMask([[rule] * M] * M, 5, window_on)
            query, key = torch.randn(1, 2, 1, D), torch.randn(1, 2, 9, D)
            state.append(ids, steps=ids, chunks=ids)
            state.append(ids[:, :1], steps=1 + ids[:, :1], chunks=ids[:, :1])
            call = functools.partial(mk.moda_attention, query, state=state, mask=mask)
            if seen:
                refused(lambda c=call, k=key[:, :, -5:]: c(k, k), ValueError, ["key", "all 9", "last 5"])
            else:
                torch.testing.assert_close(call(key[:, :, -5:], key[:, :, -5:]), call(key, key))


def test_wrong_facts_leave_a_state_as_it_was(refused: Callable[..., None]) -> None:
    state, ids = mk.DecodeState(M, num_roles=2), torch.zeros(2, 3).long()
    roles = torch.ones_like(ids)
    layout = state.append(ids, steps=ids + 4, roles=roles)
    refused(lambda: state.append(ids, steps=ids + 3, roles=roles), ValueError, ["steps", "fall"])
    refused(lambda: state.append(ids, steps=ids + 5, roles=roles + 1), ValueError, ["roles", "2"])
    refused(lambda: state.append(ids, chunks=ids[:, :2]), ValueError, ["chunks"])
    refused(lambda: state.append(ids, steps=ids.double()), TypeError, ["steps"])
    refused(lambda: mk.DecodeState(M, num_roles=0), ValueError, ["num_roles"])
    assert state.length == 3 and state.layout() is layout and not layout.own_chunks
    assert state.append(ids, steps=ids + 4).role.tolist() == [[1, 1, 1, 0, 0, 0]] * 2


# Packed documents


@pytest.mark.parametrize("kind", KINDS)
def test_packed_beams_and_crop(kind: str) -> None:
    decoder = Decoder(kind)
    state = decoder.state
    docs: list[list[int]] = [[], [], []]
    keys: list[Tensor] = [torch.zeros(0, 2, D, dtype=torch.float64) for _ in docs]

    def step(new: list[list[int]]) -> None:
        for i, ids in enumerate(new):
            docs[i] = docs[i] + ids
            keys[i] = torch.cat((keys[i], torch.randn(len(ids), 2, D, dtype=torch.float64)))
        cu = torch.tensor([0, *map(len, new)]).cumsum(0).int()
        state.append(torch.tensor([*itertools.chain(*new)], dtype=torch.long), cu_seqlens=cu)
        whole = torch.tensor([0, *map(len, docs)]).cumsum(0).int()
        layout = mk.segment_modalities(torch.tensor([*itertools.chain(*docs)]), num_modalities=M, cu_seqlens=whole)
        key = torch.cat(keys)
        value, query = key.flip(-1), key.repeat_interleave(2, 1)
        key_map = decoder.map(key, value, layout=layout)
        options = {"is_causal": True, "enable_gqa": True}
        full = mk.moda_attention(query, key, value, layout=layout, key_map=key_map, **options)
        rows = torch.cat([torch.arange(e - len(n), e) for e, n in zip(whole[1:].tolist(), new, strict=True)])
        key_map = decoder.map(key, value, state=state)
        out = mk.moda_attention(query[rows], key, value, state=state, key_map=key_map, **options)
        torch.testing.assert_close(out, full[rows], **NEAR)

    step([[0, 0, 1], [], [2, 1, 1, 0]])
    step([[1], [0, 2], []])
    state.reorder(torch.tensor([2, 0, 0, 1]))
    docs[:], keys[:] = [docs[i] for i in (2, 0, 0, 1)], [keys[i] for i in (2, 0, 0, 1)]
    step([[2], [0], [1], [1]])
    lengths = [3, 9, 1, 0]
    state.crop(torch.tensor(lengths))
    docs[:] = [d[:n] for d, n in zip(docs, lengths, strict=True)]
    keys[:] = [k[:n] for k, n in zip(keys, lengths, strict=True)]
    assert state.length == 3 + 5 + 1
    step([[0], [1, 0], [2], [1]])
    state.crop(2)
    docs[:], keys[:] = [d[:2] for d in docs], [k[:2] for k in keys]
    step([[0], [], [2, 2], [1]])


# Layers, gradients, precision


def test_layers_have_their_own_memory() -> None:
    layers = [Decoder("causal"), Decoder("sequence")]
    state = mk.DecodeState(M)
    ids = prompt()
    keys = [torch.randn(2, 2, 11, D, dtype=torch.float64) for _ in layers]
    for begin, end in ((0, 10), (10, 11)):
        new = ids if begin == 0 else torch.zeros(2, 1).long()
        layout = state.append(new)
        for i, (layer, key) in enumerate(zip(layers, keys, strict=True)):
            now = key[:, :, :end]
            made = mk.align_keys(now, layer.aligner(now, layout, state=state[i]), layout)
            torch.testing.assert_close(made, mk.align_keys(now, layer.aligner(now, layout), layout), **NEAR)


@pytest.mark.parametrize("kind", ["causal", "sequence"])
def test_gradients_go_through_steps(kind: str) -> None:
    decoder = Decoder(kind)
    aligner = decoder.aligner.requires_grad_()
    ids = torch.cat((prompt(), torch.randint(M, (2, 3))), 1)
    layout = mk.segment_modalities(ids, num_modalities=M)
    q, k, v = (torch.randn(2, 2, 13, D, dtype=torch.float64, requires_grad=True) for _ in range(3))
    state, outs = mk.DecodeState(M), []
    # Without old queries looking ahead, a row of the full pass is what its own step gave.
    for begin, end in ((0, 10), (10, 11), (11, 13)):
        state.append(ids[:, begin:end])
        key_map = aligner(k[:, :, :end], state=state)
        now = [q[:, :, begin:end], k[:, :, :end], v[:, :, :end]]
        outs.append(mk.moda_attention(*now, state=state, key_map=key_map, is_causal=True))
    step = outs[-1]
    full = mk.moda_attention(q, k, v, layout=layout, key_map=aligner(k, layout), is_causal=True)[:, :, -2:]
    upstream = torch.randn_like(step)
    inputs = (q, k, v, *aligner.parameters())
    grads = [torch.autograd.grad(x, inputs, upstream, retain_graph=True) for x in (step, full)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision(kind: str, dtype: torch.dtype) -> None:
    """Sums are kept in float32; kept keys are in the cache's dtype, as the aligned keys of one pass are."""
    decoder = Decoder(kind, dtype=torch.float32)
    if dtype == torch.float32:
        decoder.step(prompt())
        for _ in range(3):
            decoder.step(token())
        return
    state, key = mk.DecodeState(M), torch.randn(2, 2, 12, D).to(dtype)
    value = torch.randn(2, 2, 12, D).to(dtype)
    ids = prompt(12)
    for end in (10, 11, 12):
        layout = state.append(ids[:, 0 if end == 10 else end - 1 : end])
        key_map = decoder.map(key[:, :, :end], value[:, :, :end], state=state)
    assert state[0].gram.dtype == torch.float32
    expected = mk.align_keys(key, decoder.map(key, value, layout=layout), layout)
    got = mk.align_keys(key, key_map, layout)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=1e-2)


def test_running_gram_for_the_conditional_mask() -> None:
    decoder = Decoder("causal")
    decoder.step(prompt())
    decoder.step(token())
    layout = mk.segment_modalities(decoder.ids, num_modalities=M)
    expected = mk.modality_gram(decoder.qkv[1], decoder.qkv[1], layout)
    torch.testing.assert_close(decoder.state[0].gram, expected, **NEAR)


def test_the_reference_aligner_takes_a_state() -> None:
    state, aligner = mk.DecodeState(M), mk.reference.DuplexAligner(D, M, scope="causal", dtype=torch.float64)
    torch.nn.init.normal_(aligner.ratio)
    key = torch.randn(2, 2, 12, D, dtype=torch.float64)
    ids = prompt(12)
    for begin, end in ((0, 10), (10, 11), (11, 12)):
        layout = state.append(ids[:, begin:end])
        fused = mk.align_keys(key[:, :, :end], aligner(key[:, :, :end], state=state), layout)
    torch.testing.assert_close(fused, aligner.fused_keys(key, layout), **NEAR)


def test_last_query_only() -> None:
    """A layer may ask for fewer rows than were appended: the last ones."""
    decoder = Decoder("causal")
    ids = prompt()
    decoder.step(ids)
    query, key, value = decoder.qkv
    out = mk.moda_attention(query[:, :, -1:], key, value, state=decoder.state, enable_gqa=True, is_causal=True)
    layout = mk.segment_modalities(ids, num_modalities=M)
    full = mk.moda_attention(query, key, value, layout=layout, enable_gqa=True, is_causal=True)
    torch.testing.assert_close(out, full[:, :, -1:], **NEAR)


# Wrong use


def test_errors(refused: Callable[..., None]) -> None:
    key = torch.randn(2, 2, 5, D)
    aligner = mk.DuplexAligner(D, M, scope="causal")
    state = mk.DecodeState(M)
    refused(lambda: mk.DecodeState(0), ValueError, ["num_modalities"])
    refused(lambda: mk.DecodeState(2, undo=-1), ValueError, ["undo"])
    refused(lambda: aligner(key), ValueError, ["layout"])
    refused(lambda: aligner(key, state=state), ValueError, ["state", "append"])
    refused(lambda: aligner(key, state=3), TypeError, ["state"])
    refused(lambda: state.append(torch.randn(2, 5)), TypeError, ["modality_ids"])
    refused(lambda: state.append(torch.full((2, 5), 7)), ValueError, ["modality_ids", "7"])
    layout = state.append(torch.zeros(2, 5).long())
    refused(lambda: state.append(torch.zeros(3, 1).long()), ValueError, ["modality_ids", "B = 2"])
    refused(lambda: state.append(torch.full((2, 1), -2)), ValueError, ["modality_ids"])
    bounds = torch.tensor([0, 1])
    refused(lambda: state.append(torch.zeros(1).long(), cu_seqlens=bounds), ValueError, ["modality_ids", "a batch"])
    assert state.length == 5 and state.layout() is layout
    refused(lambda: aligner(key, mk.segment_modalities(torch.zeros(2, 5).long()), state=state), ValueError, ["layout"])
    refused(lambda: aligner(torch.randn(3, 2, 5, D), state=state), ValueError, ["key"])
    refused(lambda: aligner(key[:, :, :3], state=state), ValueError, ["key", "tokens 0 to 4"])
    key_map = aligner(key, state=state)
    assert isinstance(key_map, KeptKeys)
    refused(lambda: aligner(key, state=state), ValueError, ["state", "state[i]"])
    cropped = mk.DecodeState(M)  # nothing new either
    cropped.append(torch.zeros(2, 5).long())
    aligner(key, state=cropped)
    cropped.crop(3)
    refused(lambda: aligner(key[:, :, :3], state=cropped), ValueError, ["state", "new tokens"])
    refused(lambda: aligner(key[0], state=cropped), ValueError, ["key", "[B, Hkv, columns, D]"])
    refused(lambda: aligner(3, state=cropped), TypeError, ["key"])
    attend = mk.moda_attention
    refused(lambda: attend(key, key, key, state=state, query_start=1), ValueError, ["query_start"])
    refused(lambda: attend(torch.randn(2, 2, 6, D), key, key, state=state), ValueError, ["query", "5"])
    refused(lambda: attend(key, key, key, state=aligner), TypeError, ["state"])
    other = mk.segment_modalities(torch.zeros(2, 5).long())
    refused(lambda: attend(key, key, key, state=state, layout=other), ValueError, ["layout"])
    refused(lambda: state.reorder(torch.tensor([[0]])), ValueError, ["beam_idx"])
    refused(lambda: state.reorder(torch.tensor([0.5])), TypeError, ["beam_idx"])
    refused(lambda: state.crop(-1), ValueError, ["length"])
    refused(lambda: state.crop(torch.tensor([1, 2])), TypeError, ["length"])
    refused(lambda: state[-1], ValueError, ["layer"])
    packed = mk.DecodeState(M)
    packed.append(torch.zeros(3).long(), cu_seqlens=torch.tensor([0, 1, 3]))
    refused(lambda: packed.append(torch.zeros(1).long(), cu_seqlens=bounds), ValueError, ["cu_seqlens", "N = 2"])
    refused(lambda: aligner(torch.randn(4, 2, D), state=packed), ValueError, ["key", "3 tokens"])
