"""Every input that is refused, with what the message has to say: the argument, what was expected and what came.

And the choice of a backend, whose refusals are errors too.
"""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import moda_kernels as mk
from moda_kernels import backends

IDS = torch.tensor([[0, 0, 1, 1, -1], [1, 1, 0, 0, 0]])
LAYOUT = mk.segment_modalities(IDS)
PACKED = mk.segment_modalities(torch.tensor([0, 1, 1, 0, 0]), cu_seqlens=torch.tensor([0, 2, 5]))
LONGER = mk.segment_modalities(torch.zeros(2, 7, dtype=torch.long), num_modalities=2)
M = mk.ModularMask
INF, NAN = math.inf, math.nan


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **options)


def call(**changed: Any) -> Any:
    """A good call over 2 x 5 tokens, 4 heads of size 8, with some arguments changed."""
    good = {"query": zeros(2, 4, 5, 8), "key": zeros(2, 4, 5, 8), "value": zeros(2, 4, 5, 8), "layout": LAYOUT}
    return mk.moda_attention(**(good | changed))


def packed_call(**changed: Any) -> Any:
    good = {name: zeros(5, 4, 8) for name in ("query", "key", "value")}
    return mk.moda_attention(**(good | {"layout": PACKED} | changed))


def pseudo_call(**arguments: Any) -> Any:
    return call(pseudo=mk.PseudoAttention(**arguments))


def split_call(*weights: Any) -> Any:
    return call(duplex="split", branch_weights=weights)


def segment(ids: Any = IDS, **options: Any) -> Any:
    return mk.segment_modalities(ids, **options)


def documents(*bounds: Any, **options: Any) -> Any:
    return segment(torch.tensor([0, 1, 1, 0, 0]), cu_seqlens=torch.tensor(bounds, **options))


def aligner(key: Tensor | None = None, layout: Any = LAYOUT, **options: Any) -> mk.KeyMap:
    return mk.DuplexAligner(8, 2, **options)(zeros(2, 4, 5, 8) if key is None else key, layout)


def test_the_good_calls_are_good() -> None:
    assert call().shape == (2, 4, 5, 8)
    assert packed_call().shape == (5, 4, 8)
    assert split_call(1.0, zeros(4)).shape == (2, 4, 5, 8)
    assert pseudo_call(decay=zeros(4), length=7).shape == (2, 4, 5, 8)
    assert call(key_map=aligner()).shape == (2, 4, 5, 8)
    assert documents(0, 2, 5).num_sequences == 2


V, T = ValueError, TypeError
#: name: (what is done, the error, the argument, what was expected, what came)
REFUSED: dict[str, tuple[Any, type[Exception], str, str, str]] = {
    # Rank
    "query of rank 3": (lambda: call(query=zeros(4, 5, 8)), V, "query", r"\[B, H, L, D\]", r"\(4, 5, 8\)"),
    "key of rank 5": (lambda: call(key=zeros(1, 2, 4, 5, 8)), V, "key", r"\[B, H, L, D\]", r"\(1, 2, 4, 5, 8\)"),
    "value of rank 3": (lambda: call(value=zeros(2, 5, 8)), V, "value", r"\[B, H, L, D\]", r"\(2, 5, 8\)"),
    "packed query of rank 4": (lambda: packed_call(query=zeros(1, 4, 5, 8)),
        V, "query", r"\[T, H, D\]", r"\(1, 4, 5, 8\)"),
    # Dtype
    "integer query": (lambda: call(query=zeros(2, 4, 5, 8).int()), T, "query", "floating-point", "int32"),
    "complex value": (lambda: call(value=zeros(2, 4, 5, 8) + 0j), T, "value", "floating-point", "complex64"),
    "key of another dtype": (lambda: call(key=zeros(2, 4, 5, 8).half()), T, "key", "float32", "float16"),
    "value of another dtype": (lambda: call(value=zeros(2, 4, 5, 8).double()), T, "value", "float32", "float64"),
    "no query": (lambda: call(query=None), T, "query", "a tensor", "None"),
    "numbers as key": (lambda: call(key=[[1.0]]), T, "key", "a tensor", r"\[\[1.0\]\]"),
    # Device
    "query elsewhere": (lambda: call(query=zeros(2, 4, 5, 8, device="meta")), V, "query", "on cpu", "meta"),
    "key elsewhere": (lambda: call(key=zeros(2, 4, 5, 8, device="meta")), V, "key", "on cpu", "meta"),
    "value elsewhere": (lambda: call(value=zeros(2, 4, 5, 8, device="meta")), V, "value", "on cpu", "meta"),
    "layout elsewhere": (lambda: call(layout=LAYOUT.to("meta")), V, "query", "on meta", "cpu"),
    "pair_bias elsewhere": (lambda: call(pair_bias=zeros(1, 1, 2, 2, device="meta")), V, "pair_bias", "on cpu", "meta"),
    "attn_mask elsewhere": (lambda: call(attn_mask=zeros(5, 5, device="meta")), V, "attn_mask", "on cpu", "meta"),
    "decay elsewhere": (lambda: pseudo_call(decay=zeros(4, device="meta")), V, "pseudo.decay", "on cpu", "meta"),
    "branch weights elsewhere": (lambda: split_call(1.0, zeros(4, device="meta")),
        V, "branch_weights", "on cpu", "meta"),
    "query_start elsewhere": (lambda: call(query_start=zeros(2, device="meta").int()),
        V, "query_start", "on cpu", "meta"),
    "cu_seqlens elsewhere": (lambda: documents(0, 5, device="meta"), V, "cu_seqlens", "on cpu", "meta"),
    "item_ids elsewhere": (lambda: segment(item_ids=IDS.to("meta")), V, "item_ids", "on cpu", "meta"),
    # Heads and sizes
    "heads that don't divide": (lambda: call(key=zeros(2, 3, 5, 8), value=zeros(2, 3, 5, 8), enable_gqa=True),
        V, "query", "multiple of the 3", "4 heads"),
    "more key heads": (lambda: call(query=zeros(2, 2, 5, 8), enable_gqa=True),
        V, "query", "multiple of the 4", "2 heads"),
    "no enable_gqa": (lambda: call(key=zeros(2, 2, 5, 8), value=zeros(2, 2, 5, 8)),
        V, "enable_gqa", "True for 4 query and 2 key", "False"),
    "no key heads": (lambda: call(key=zeros(2, 0, 5, 8), value=zeros(2, 0, 5, 8), enable_gqa=True),
        V, "query", "multiple of the 0", "4 heads"),
    "value heads": (lambda: call(value=zeros(2, 2, 5, 8)), V, "value", "4 heads, as key", r"\(2, 2, 5, 8\)"),
    "head sizes": (lambda: call(query=zeros(2, 4, 5, 4)), V, "query", r"head size of key \(8\)", r"\(2, 4, 5, 4\)"),
    "no head size": (lambda: call(query=zeros(2, 4, 5, 0), key=zeros(2, 4, 5, 0)),
        V, "query", "at least 1", r"\(2, 4, 5, 0\)"),
    "another batch": (lambda: call(query=zeros(1, 4, 5, 8)), V, "query", "batch of 2", r"\(1, 4, 5, 8\)"),
    # The layout and the keys
    "too few keys": (lambda: call(key=zeros(2, 4, 4, 8), value=zeros(2, 4, 4, 8)),
        V, "key", r"layout of shape \(2, 5\)", r"\(2, 4, 4, 8\)"),
    "too few values": (lambda: call(value=zeros(2, 4, 4, 8)),
        V, "value", r"layout of shape \(2, 5\)", r"\(2, 4, 4, 8\)"),
    "keys of one sequence": (lambda: call(key=zeros(1, 4, 5, 8)),
        V, "key", r"layout of shape \(2, 5\)", r"\(1, 4, 5, 8\)"),
    "FlashAttention's order": (lambda: call(key=zeros(2, 5, 4, 8)),
        V, "key", r"layout of shape \(2, 5\)", r"\(2, 5, 4, 8\)"),
    "packed keys": (lambda: packed_call(key=zeros(4, 4, 8)), V, "key", r"layout of shape \(5,\)", r"\(4, 4, 8\)"),
    "more queries": (lambda: call(query=zeros(2, 4, 6, 8)), V, "query", "at most .* 5 keys", "6 queries"),
    "more packed queries": (lambda: packed_call(query=zeros(6, 4, 8)), V, "query", "at most .* 5 keys", "6 queries"),
    "ids of one sequence": (lambda: call(layout=IDS[0]), V, "layout", r"\[B, L\]", r"\(5,\)"),
    "ids in a list": (lambda: call(layout=[[0, 1]]), T, "layout", "ModalityLayout", "list"),
    "ids as floats": (lambda: call(layout=IDS.float()), T, "modality_ids", "integer", "float32"),
    "ids beyond the mask": (lambda: call(layout=IDS + 1, mask=M.full(2)), V, "modality_ids", "to 1", "2"),
    # Making a layout
    "id out of range": (lambda: segment(num_modalities=1), V, "modality_ids", r"-1 \(padding\) to 0", "1"),
    "id below -1": (lambda: segment(IDS - 1, num_modalities=2), V, "modality_ids", r"-1 \(padding\) to 1", "-2"),
    "large id": (lambda: segment(torch.tensor([[2**31]]), num_modalities=2), V, "modality_ids", "to 1", "2147483648"),
    "bool ids": (lambda: segment(IDS > 0), T, "modality_ids", "integer", "bool"),
    "ids of rank 1": (lambda: segment(IDS[0]), V, "modality_ids", r"\[B, L\]", r"\(5,\)"),
    "ids of rank 3": (lambda: segment(IDS[None]), V, "modality_ids", r"\[B, L\]", r"\(1, 2, 5\)"),
    "packed ids of rank 2": (lambda: segment(cu_seqlens=torch.tensor([0, 10])),
        V, "modality_ids", r"\[T\]", r"\(2, 5\)"),
    "ids as numbers": (lambda: segment([[0]]), T, "modality_ids", "a tensor", "list"),
    "item shape": (lambda: segment(item_ids=IDS[:1]), V, "item_ids", r"\(2, 5\)", r"\(1, 5\)"),
    "item dtype": (lambda: segment(item_ids=IDS.float()), T, "item_ids", "integer", "float32"),
    "decreasing cu_seqlens": (lambda: documents(0, 4, 3, 5), V, "cu_seqlens", "non-decreasing", r"\[0, 4, 3, 5\]"),
    "cu_seqlens not from 0": (lambda: documents(1, 5), V, "cu_seqlens", "from 0", r"\[1, 5\]"),
    "cu_seqlens too short": (lambda: documents(0, 4), V, "cu_seqlens", "5 tokens", r"\[0, 4\]"),
    "cu_seqlens too long": (lambda: documents(0, 2**32 + 5), V, "cu_seqlens", "5 tokens", "4294967301"),
    "empty cu_seqlens": (lambda: documents(dtype=torch.int32), V, "cu_seqlens", r"\[N \+ 1\]", r"\(0,\)"),
    "cu_seqlens of rank 2": (lambda: documents([0, 5]), V, "cu_seqlens", r"\[N \+ 1\]", r"\(1, 2\)"),
    "cu_seqlens as floats": (lambda: documents(0.0, 5.0), T, "cu_seqlens", "int32", "float32"),
    "cu_seqlens in a list": (lambda: segment(IDS[0], cu_seqlens=[0, 5]), T, "cu_seqlens", "a tensor", "list"),
    "no modalities": (lambda: segment(num_modalities=0), V, "num_modalities", ">= 1", "0"),
    "modalities as float": (lambda: segment(num_modalities=2.0), T, "num_modalities", "an int", "2.0"),
    "modalities as bool": (lambda: segment(num_modalities=True), T, "num_modalities", "an int", "True"),
    "too many segments": (lambda: segment(max_segments=3), V, "max_segments", "4 segments", "3"),
    "token ids": (lambda: segment(IDS * 31_999), V, "num_modalities", "given", "up to 31999"),
    "negative max_segments": (lambda: segment(max_segments=-1), V, "max_segments", ">= 0", "-1"),
    # Masks
    "rules of another size": (lambda: call(mask=M.causal(3)), V, "mask", "2 x 2", "3 x 3"),
    "rules that aren't square": (lambda: M([[1, 1]]), V, "rules", "R rows of R", r"\[2\]"),
    "no rules": (lambda: M([]), V, "rules", "R >= 1", r"\[\]"),
    "rules as number": (lambda: M(3), T, "rules", "R rows", "3"),
    "an unknown flag": (lambda: M([[64]]), V, "rules", "PAST, SEGMENT, ALL, BEFORE, UPTO, CHUNK", "64"),
    "a rule as string": (lambda: M([["all"]]), T, "rules", "Visibility", "'all'"),
    "a rule as bool": (lambda: M([[True]]), T, "rules", "Visibility", "True"),
    "window of 0": (lambda: M([[1]], window=0), V, "window", ">= 1", "0"),
    "negative window": (lambda: M([[1]], window=-4), V, "window", ">= 1", "-4"),
    "window as float": (lambda: M([[1]], window=1.5), T, "window", "an int", "1.5"),
    "an unknown modality": (lambda: M.bidirectional_within(2, [2]), V, "modalities", "from 0 to 1", "2"),
    "one modality": (lambda: M.fusion(2, 1), T, "modalities", "iterable", "1"),
    "no modalities in a mask": (lambda: M.full(0), V, "num_modalities", ">= 1", "0"),
    "a tensor as mask": (lambda: call(mask=zeros(5, 5)), T, "mask", "ModularMask", r"\(5, 5\)"),
    "mask and is_causal": (lambda: call(mask=M.full(2), is_causal=True),
        V, "is_causal and mask", "one of them", "both"),
    # Pseudo-attention
    "negative decay": (lambda: pseudo_call(decay=-0.5), V, "decay", ">= 0", "-0.5"),
    "negative decays": (lambda: pseudo_call(decay=torch.tensor([0.0, -1.0, 0, 0])), V, "decay", ">= 0", "-1.0"),
    "infinite decay": (lambda: pseudo_call(decay=INF), V, "decay", "finite", "inf"),
    "base not a number": (lambda: pseudo_call(base=NAN), V, "base", "finite", "nan"),
    "infinite bases": (lambda: pseudo_call(base=torch.tensor([0, INF, 0, 0])), V, "base", "finite", "inf"),
    "endless without decay": (lambda: pseudo_call(decay=0.0, length=INF), V, "decay", "> 0", "0.0"),
    "endless without decays": (lambda: pseudo_call(decay=zeros(4), length=INF), V, "decay", "> 0", "0.0"),
    "negative length": (lambda: pseudo_call(length=-1), V, "length", ">= 0", "-1"),
    "length as float": (lambda: pseudo_call(length=7.0), T, "length", "an int", "7.0"),
    "base of other heads": (lambda: pseudo_call(base=zeros(3)), V, "pseudo.base", r"\(4,\)", r"\(3,\)"),
    "decay of rank 2": (lambda: pseudo_call(decay=zeros(4, 1)), V, "decay", r"\[Hq\]", r"\(4, 1\)"),
    "integer bases": (lambda: pseudo_call(base=zeros(4).int()), T, "base", "floating-point", "int32"),
    "base as string": (lambda: pseudo_call(base="0"), T, "base", "float", "'0'"),
    "a number as pseudo": (lambda: call(pseudo=1.0), T, "pseudo", "PseudoAttention", "1.0"),
    # Queries
    "queries out of place": (lambda: call(query_start=1), V, "query_start", "keys - queries", "1"),
    "a sequence out of place": (lambda: call(query=zeros(2, 4, 3, 8), query_start=torch.tensor([0, 3])),
        V, "query_start", "keys - queries", r"\[0, 3\]"),
    "negative query_start": (lambda: call(query_start=-1), V, "query_start", ">= 0", "-1"),
    "query_start as float": (lambda: call(query_start=0.0), T, "query_start", "an int", "0.0"),
    "query_start of another batch": (lambda: call(query_start=torch.tensor([0])),
        V, "query_start", r"\(2,\)", r"\(1,\)"),
    "query_start as floats": (lambda: call(query_start=zeros(2)), T, "query_start", "integer", "float32"),
    "cu_seqlens_q of a batch": (lambda: call(cu_seqlens_q=torch.tensor([0, 5, 10])),
        V, "cu_seqlens_q", "None with a batch", r"\(3,\)"),
    "no cu_seqlens_q": (lambda: packed_call(query=zeros(3, 4, 8)),
        V, "cu_seqlens_q", "documents of the 3 queries", "None"),
    "cu_seqlens_q of other documents": (lambda: packed_call(cu_seqlens_q=torch.tensor([0, 5])),
        V, "cu_seqlens_q", r"\(3,\)", r"\(2,\)"),
    "cu_seqlens_q too short": (lambda: packed_call(cu_seqlens_q=torch.tensor([0, 1, 2])),
        V, "cu_seqlens_q", "5 queries", r"\[0, 1, 2\]"),
    "queries beyond a document": (lambda: packed_call(cu_seqlens_q=torch.tensor([0, 3, 5])),
        V, "cu_seqlens_q", "no document with more", r"\[0, 3, 5\]"),
    # Biases, branches
    "attn_mask when packed": (lambda: packed_call(attn_mask=zeros(5, 5)),
        V, "attn_mask", "None with a packed", r"\(5, 5\)"),
    "attn_mask that doesn't broadcast": (lambda: call(attn_mask=zeros(5, 4)),
        V, "attn_mask", r"\(2, 4, 5, 5\)", r"\(5, 4\)"),
    "attn_mask of rank 5": (lambda: call(attn_mask=zeros(1, 1, 1, 5, 5)),
        V, "attn_mask", r"\(2, 4, 5, 5\)", r"\(1, 1, 1, 5, 5\)"),
    "attn_mask of integers": (lambda: call(attn_mask=zeros(5, 5).int()), T, "attn_mask", "bool or floating", "int32"),
    "pair_bias of rank 2": (lambda: call(pair_bias=zeros(2, 2)),
        V, "pair_bias", r"\[N or 1, Hq or 1, M, M\]", r"\(2, 2\)"),
    "pair_bias of other modalities": (lambda: call(pair_bias=zeros(1, 1, 3, 3)),
        V, "pair_bias", "2, 4, 2", r"\(1, 1, 3, 3\)"),
    "pair_bias of key heads": (lambda: call(pair_bias=zeros(1, 2, 2, 2)), V, "pair_bias", "2, 4, 2", r"\(1, 2, 2, 2\)"),
    "pair_bias of integers": (lambda: call(pair_bias=zeros(1, 1, 2, 2).int()),
        T, "pair_bias", "floating-point", "int32"),
    "branch weights with joint": (lambda: call(branch_weights=(1.0, 1.0)),
        V, "branch_weights", "duplex='split'", "'joint'"),
    "one branch weight": (lambda: split_call(1.0), V, "branch_weights", "pair", r"\(1.0,\)"),
    "branch weights as tensor": (lambda: call(duplex="split", branch_weights=zeros(2)),
        V, "branch_weights", "pair", r"\(2,\)"),
    "branch weights of other heads": (lambda: split_call(zeros(3), 1.0), V, "branch_weights", r"\(4,\)", r"\(3,\)"),
    "branch weight as bool": (lambda: split_call(1.0, True), T, "branch_weights", "float", "True"),
    "branch weight not a number": (lambda: split_call(NAN, 1.0), V, "branch_weights", "finite", "nan"),
    "an unknown duplex": (lambda: call(duplex="both"), V, "duplex", "'joint', 'split'", "both"),
    # Key maps
    "an aligner as map": (lambda: call(key_map=mk.DuplexAligner(8, 2)), T, "key_map", "KeyMap", "DuplexAligner"),
    "a map of other heads": (lambda: call(key_map=aligner(zeros(2, 2, 5, 8))),
        V, "key_map", "4 key heads of size 8", "2 of 8"),
    "a map of other sequences": (lambda: call(key_map=aligner(zeros(1, 4, 5, 8), segment(IDS[:1]))),
        V, "key_map", "2 x 5", "1"),
    "a map of other lengths": (lambda: call(key_map=aligner(zeros(2, 4, 7, 8), LONGER)),
        V, "key_map", "2 x 5", "7"),
    "a causal map of other lengths": (lambda: call(key_map=aligner(zeros(2, 4, 7, 8), LONGER, scope="causal")),
        V, "key_map", "2 x 5", "7"),
    # torch SDPA's own
    "scale not a number": (lambda: call(scale=NAN), V, "scale", "finite", "nan"),
    "scale that float32 has only as 0": (lambda: call(scale=-1e-40), V, "scale", "0 or a finite number", "-1e-40"),
    "scale that float32 has only as inf": (lambda: call(scale=10**400), V, "scale", "0 or a finite number", "1000"),
    "softcap of 0": (lambda: call(softcap=0.0), V, "softcap", "a number from .* or None", "0.0"),
    "softcap not a number": (lambda: call(softcap=NAN), V, "softcap", "a number from", "nan"),
    "softcap as tensor": (lambda: call(softcap=torch.tensor(1.0)), T, "softcap", "a float", r"\(\)"),
    "scale as tensor": (lambda: call(scale=torch.tensor(1.0)), T, "scale", "a float", r"\(\)"),
    "dropout": (lambda: call(dropout_p=0.1), NotImplementedError, "dropout_p", "use dropout_p=0.0", "0.1"),
    "no probability": (lambda: call(dropout_p=1.5), V, "dropout_p", "probability", "1.5"),
    # Without a layout
    **{
        f"{name} without layout": (
            lambda name=name, value=value: call(layout=None, **{name: value}), V, "layout", "modality arguments", "None"
        )
        for name, value in {
            "mask": M.full(2), "key_map": aligner(), "pair_bias": zeros(1, 1, 2, 2), "softcap": 1.0,
            "pseudo": mk.PseudoAttention(), "duplex": "split", "branch_weights": (1.0, 1.0), "query_start": 0,
            "cu_seqlens_q": torch.tensor([0, 5, 10]), "return_lse": True,
        }.items()
    },
    # Backends
    "an unknown backend": (lambda: call(backend="cudnn"), V, "backend", "'auto', .*'reference'", "cudnn"),
    "an unknown backend of plain SDPA": (lambda: call(layout=None, backend="cudnn"),
        V, "backend", "'auto', .*'reference'", "cudnn"),
    "a number as backend": (lambda: call(backend=1), V, "backend", "'auto', .*'reference'", "1"),
    "use of an unknown backend": (lambda: mk.use_backend("gpu").__enter__(),
        V, "use_backend", "'auto', .*'reference'", "gpu"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    do, error, argument, expected, got = REFUSED[name]
    with pytest.raises(error) as raised:
        do()
    assert raised.type is error  # not a kind of it
    message = str(raised.value)
    assert message.startswith(argument), message
    for part in (expected, got):
        assert re.search(part, message), f"{part!r} is not in: {message}"


def test_messages_stay_short() -> None:
    with pytest.raises(TypeError, match="query") as raised:
        call(query=zeros(2, 4, 5, 8).tolist())
    assert len(str(raised.value)) < 1000


def test_parameters_that_go_bad_later() -> None:
    """Learned parameters change after PseudoAttention was made; on the CPU values are always looked at."""
    decay = torch.nn.Parameter(torch.full((4,), 0.1))
    pseudo, endless = mk.PseudoAttention(decay=decay), mk.PseudoAttention(decay=decay, length=INF)
    call(pseudo=pseudo)
    with torch.no_grad():
        decay[1] = -0.1
    with pytest.raises(ValueError, match=r"decay: expected .*>= 0.*got .*-0\.1"):
        call(pseudo=pseudo)
    with torch.no_grad():
        decay.zero_()
    with pytest.raises(ValueError, match=r"decay: expected .*> 0.*got .*0\.0"):
        call(pseudo=endless)


def test_a_causal_map_of_other_segments() -> None:
    """A causal map holds one matrix per segment: with another layout of the same shape it would map other tokens."""
    other = segment(IDS.flip(1))
    with pytest.raises(ValueError, match="key_map"):
        call(key_map=aligner(layout=other, scope="causal"))


# The choice of a backend


class Fake:
    """A backend that says who it is, and refuses what it is told to."""

    def __init__(self, name: str, absent: list[str] | None = None, cannot: list[str] | None = None) -> None:
        self.name, self.absent, self.cannot, self.calls = name, absent or [], cannot or [], 0

    def serves(self, device: torch.device) -> bool:
        return True

    def why_absent(self) -> list[str]:
        return self.absent

    def why_not(self, call: Any) -> list[str]:
        return self.cannot

    def attend(self, call: Any) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return mk.reference.attend(call)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    made = {
        "picky": Fake("picky", cannot=["head sizes above 4", "no padding"]),
        "away": Fake("away", absent=["no such device"]),
        "first": Fake("first"),
        "second": Fake("second"),
    }
    monkeypatch.setattr(backends, "BACKENDS", made)
    monkeypatch.setattr(backends, "_told", set())
    monkeypatch.delenv("MODA_KERNELS_BACKEND", raising=False)
    return made


def called(fakes: dict[str, Fake], **arguments: Any) -> str:
    before = {name: fake.calls for name, fake in fakes.items()}
    call(**arguments)
    return next(name for name, fake in fakes.items() if fake.calls > before[name])


def test_auto_takes_the_first_that_can(fakes: dict[str, Fake], caplog: pytest.LogCaptureFixture) -> None:
    assert called(fakes) == called(fakes, backend="auto") == "first"
    # Why the others can't is told, once.
    assert len(caplog.records) == 1
    for part in ("first", "picky: head sizes above 4", "picky: no padding", "away: no such device"):
        assert part in caplog.text


def test_argument_before_block_before_environment(fakes: dict[str, Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODA_KERNELS_BACKEND", "second")
    assert called(fakes) == "second"
    assert called(fakes, backend="first") == "first"
    assert called(fakes, backend="auto") == "first"
    with mk.use_backend("first"):
        assert called(fakes) == "first"
        assert called(fakes, backend="second") == "second"
        with mk.use_backend("second"):
            assert called(fakes) == "second"
        with mk.use_backend("auto"):
            assert called(fakes) == "first"
        assert called(fakes) == "first"
    assert called(fakes) == "second"
    monkeypatch.setenv("MODA_KERNELS_BACKEND", "")
    assert called(fakes) == "first"


def test_block_ends_with_an_exception(fakes: dict[str, Fake]) -> None:
    with pytest.raises(KeyError), mk.use_backend("second"):
        raise KeyError
    assert called(fakes) == "first"


def test_unknown_name_in_the_environment(fakes: dict[str, Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODA_KERNELS_BACKEND", "tpu")
    with pytest.raises(ValueError, match=r"MODA_KERNELS_BACKEND: expected one of 'auto', .*'second', got '?tpu"):
        call()


def test_a_named_backend_runs_or_says_every_reason(fakes: dict[str, Fake]) -> None:
    with pytest.raises(NotImplementedError, match=r"'picky' .*head sizes above 4.*no padding"):
        call(backend="picky")
    with pytest.raises(NotImplementedError, match=r"'away' .*no such device"), mk.use_backend("away"):
        call()
    for name in ("first", "second"):
        del fakes[name]
    with pytest.raises(NotImplementedError, match=r"'auto' .*head sizes above 4.*no padding.*no such device"):
        call()
