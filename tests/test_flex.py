"""The backend "flex": compilations are counted, options and refusals are said, nothing it is told of stays on tensors.

Its numbers, in all dtypes with gradients, are those of `test_parity.py` and `test_fuzz.py` (uncompiled there); here the
compiled forward.
"""

import contextlib
import functools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import moda_kernels as mk
from moda_kernels import testing
from moda_kernels.backends import BACKENDS
from moda_kernels.backends.flex import engine, options
from moda_kernels.call import AttentionCall
from moda_kernels.testing import CASES, generator, random_ids

BY_NAME = {case.name: case for case in CASES}
FLEX = BACKENDS["flex"]
WITHIN = mk.ModularMask.bidirectional_within(2, [1])

compiled = pytest.mark.skipif(
    bool(engine.why_absent()) or not engine.compiles_on_cpu(), reason="; ".join(engine.why_absent()) or "no AVX2"
)


def random_call(g: torch.Generator, length: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    padding = ("none", "right", "middle", "left")[int(torch.randint(4, (), generator=g))]
    ids = torch.stack([random_ids(length, 2, g, longest=30, padding=padding) for _ in range(2)])
    tensors = [torch.randn(2, heads, length, 16, generator=g).to(dtype) for heads in (4, 2, 2)]
    return (*tensors, mk.segment_modalities(ids, num_modalities=2))


@compiled
def test_layouts_and_lengths_do_not_compile_again() -> None:
    """20 layouts of 5 lengths: compiled once, or twice."""
    g = generator(0)
    before = counters["stats"]["unique_graphs"]
    for i in range(20):
        *tensors, layout = random_call(g, (70, 128, 200, 300, 513)[i % 5])
        given = {"layout": layout, "mask": WITHIN, "enable_gqa": True}
        with torch.no_grad():
            out = mk.moda_attention(*tensors, backend="flex", **given)
        torch.testing.assert_close(out, mk.moda_attention(*tensors, backend="reference", **given))
    assert 1 <= counters["stats"]["unique_graphs"] - before <= 2
    assert not any(hasattr(x, "_dynamo_static_indices") or hasattr(x, "_dynamo_dynamic_indices") for x in tensors)


@compiled
@pytest.mark.parametrize(("name", "dtype"), [("packed_split", torch.float32), ("everything", torch.bfloat16)], ids=str)
def test_compiled_forward(name: str, dtype: torch.dtype) -> None:
    inputs = BY_NAME[name].build(dtype, length=150)
    exact = testing.run(BY_NAME[name], dtype, "reference", compute=torch.float64, length=150)
    usual = testing.run(BY_NAME[name], dtype, "reference", length=150)
    with torch.no_grad():
        out, lse = inputs.call(inputs.tensors, backend="flex")
    forward = [{n: r.tensors[n] for n in ("out", "lse")} for r in (exact, usual)]
    wrong = testing.compare(
        testing.Result({"out": out, "lse": lse}), testing.Result(forward[0]), testing.Result(forward[1]), dtype
    )
    assert all(c.good for c in wrong), str(wrong)


@pytest.mark.exhaustive
@compiled
def test_a_caller_compiles_whole() -> None:
    """With what makes its tensors and what becomes of its output, and sizes that vary."""
    *tensors, layout = random_call(generator(3), 200)

    def model(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, backend: str) -> Tensor:
        made = mk.segment_modalities(ids, num_modalities=2, max_segments=400)
        given: dict[str, Any] = {"layout": made, "mask": WITHIN, "enable_gqa": True, "backend": backend}
        return mk.moda_attention(q + 1, k, v, pair_bias=torch.ones(1, 1, 2, 2).tril(), **given) * 2

    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, dynamic=True)(*tensors, layout.modality, "flex")
    torch.testing.assert_close(found, model(*tensors, layout.modality, "reference"))


@compiled
def test_capped_scores_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """(Their kernel compiles with `-m exhaustive`, below.)"""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(engine, "_compiled", engine._compiled.__wrapped__)
    inputs = BY_NAME["softcap"].build(torch.float32, length=40)
    with torch.no_grad():
        out, _ = inputs.call(inputs.tensors, backend="flex")
        torch.testing.assert_close(out, inputs.call(inputs.tensors, backend="reference")[0])


@compiled
@pytest.mark.exhaustive
def test_capped_scores_compile() -> None:
    test_compiled_forward("softcap", torch.float32)


@pytest.mark.parametrize("backend", ["cpu", "flex"])
def test_heads_of_512(backend: str) -> None:
    """Gemma 4's full layers; forward, backward and decoding."""
    with testing.eager_flex() if backend == "flex" else contextlib.nullcontext():
        for name in ("joint_gqa", "queries_last"):
            testing.check(BY_NAME[name], torch.float32, backend, length=20, head_dim=512)


@compiled
@pytest.mark.exhaustive
def test_heads_of_512_compile() -> None:
    inputs = BY_NAME["joint_gqa"].build(torch.float32, length=20, head_dim=512)
    with torch.no_grad():
        out, _ = inputs.call(inputs.tensors, backend="flex")
        torch.testing.assert_close(out, inputs.call(inputs.tensors, backend="reference")[0])


def test_decoding() -> None:
    """A state beside a cache, one query row at a time."""
    g = generator(7)
    q, k, v = (torch.randn(1, heads, 20, 8, generator=g, dtype=torch.float64) for heads in (4, 2, 2))
    ids = random_ids(20, 2, g, longest=4)[None]
    mask = mk.ModularMask.causal(2)
    state = mk.DecodeState(2)
    layout = mk.segment_modalities(ids, num_modalities=2)
    expected = mk.moda_attention(q, k, v, layout=layout, mask=mask, enable_gqa=True, backend="reference")
    with testing.eager_flex():
        for begin, end in [(0, 12), *((t, t + 1) for t in range(12, 20))]:
            state.append(ids[:, begin:end])
            out = mk.moda_attention(
                q[:, :, begin:end],
                k[:, :, :end],
                v[:, :, :end],
                state=state,
                mask=mask,
                enable_gqa=True,
                backend="flex",
            )
            torch.testing.assert_close(out, expected[:, :, begin:end], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 63, 300])
def test_lse_in_pieces_of_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU lse is made apart from the compiled output."""
    monkeypatch.setattr(engine, "LSE_ROWS", rows)
    monkeypatch.setattr(engine, "_run_compiled", lambda query, *rest: (query, None))
    for name in ("everything", "attn_mask_float", "packed_queries", "bias_own"):
        inputs = BY_NAME[name].build(torch.float32)
        with torch.no_grad():
            _, lse = inputs.call(inputs.tensors, backend="flex")
            _, expected = inputs.call(inputs.tensors, backend="reference")
        torch.testing.assert_close(lse, expected)


def reasons(**changed: Any) -> str:
    q = torch.randn(1, 2, 8, changed.pop("dim", 8), dtype=changed.pop("dtype", torch.float32))
    q.requires_grad_(changed.pop("grad", False))
    call = AttentionCall.make(q, q.detach(), q.detach(), layout=torch.zeros(1, 8, dtype=torch.long), **changed)
    return "; ".join(FLEX.why_not(call))


def test_refusals() -> None:
    assert not reasons() or not engine.compiles_on_cpu()
    assert "no backward on the CPU" in reasons(grad=True) and "query" in reasons(grad=True)
    with torch.no_grad():
        assert "backward" not in reasons(grad=True)
    assert "of pair_bias" in reasons(pair_bias=torch.zeros(1, 1, 1, 1, requires_grad=True))
    assert "of attn_mask" in reasons(attn_mask=torch.zeros(8, 8, requires_grad=True))
    assert "float64" in reasons(dtype=torch.float64)
    with mk.use_backend("flex", BACKEND="FLASH"):
        assert "runs on CUDA" in reasons()
    aligner = mk.DuplexAligner(8, 1)
    key_map = aligner(torch.randn(1, 2, 8, 8), torch.zeros(1, 8, dtype=torch.long))
    assert "of key_map" in reasons(key_map=key_map)
    # Pseudo scores and weights join behind the engine: their gradients are none of its business.
    base = torch.zeros(2, requires_grad=True)
    assert "backward" not in reasons(pseudo=mk.PseudoAttention(base), duplex="split", branch_weights=(base, 1.0))
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"'flex' can't run this call: flex: .*no backward on the CPU"):
        mk.moda_attention(x, x, x, layout=torch.zeros(1, 8, dtype=torch.long), backend="flex")
    with pytest.raises(NotImplementedError, match="dropout_p"):
        mk.moda_attention(x, x, x, dropout_p=0.1, layout=torch.zeros(1, 8, dtype=torch.long), backend="flex")
    with testing.eager_flex():
        assert not reasons(grad=True, dtype=torch.float64, dim=1)


def test_it_serves_gpus() -> None:
    assert [FLEX.serves(torch.device(kind)) for kind in ("cuda", "xpu", "cpu")] == [True, True, False]


def test_another_operator_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._higher_order_ops.flex_attention import FlexAttentionHOP

    monkeypatch.setattr(FlexAttentionHOP, "__call__", lambda self, query, key, surprise: None)
    with pytest.raises(NotImplementedError, match=re.escape(torch.__version__)), testing.eager_flex():
        pass


def test_options_are_given_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert options.current() == ()
    monkeypatch.setenv(options.ENVIRONMENT, '{"fwd_BLOCK_M": 64, "BLOCK_SIZE": [64, 32]}')
    cpu = torch.device("cpu")
    assert options.current() == (("BLOCK_SIZE", (64, 32)), ("fwd_BLOCK_M", 64))
    assert options.block_size(options.current(), cpu) == (64, 32)
    assert options.for_kernels(options.current()) == (("fwd_BLOCK_M", 64),)
    with mk.use_backend("flex", BLOCK_SIZE=256, num_warps=4):
        assert options.current() == (("BLOCK_SIZE", (256, 256)), ("num_warps", 4))
        with mk.use_backend("reference"):
            assert dict(options.current())["fwd_BLOCK_M"] == 64
    monkeypatch.delenv(options.ENVIRONMENT)
    assert options.block_size(options.current(), cpu) == (128, 128)
    with mk.use_backend("flex", BACKEND="FLASH"):
        assert options.is_flash(options.current())


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("flex", {"BLOCKM": 64}, "BLOCKM"),
        ("flex", {"BLOCK_M": [64]}, "BLOCK_M"),
        ("flex", {"BLOCK_SIZE": 0}, "BLOCK_SIZE"),
        ("flex", {"BLOCK_SIZE": (1, 2, 3)}, "BLOCK_SIZE"),
        ("reference", {"BLOCK_M": 64}, "no options with 'reference'"),
        ("auto", {"BLOCK_M": 64}, "no options with 'auto'"),
    ],
)
def test_options_that_are_none(name: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error, mk.use_backend(name, **given):
        pass
    assert said in str(error.value) and "expected" in str(error.value) and "got" in str(error.value)


@pytest.mark.parametrize("text", ["{", "[1]", '{"NOPE": 1}'])
def test_bad_options_in_the_environment(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(options.ENVIRONMENT, text)
    x = torch.randn(1, 1, 4, 8)
    with pytest.raises((TypeError, ValueError), match=options.ENVIRONMENT):
        mk.moda_attention(x, x, x, layout=torch.zeros(1, 4, dtype=torch.long), backend="flex")


@pytest.mark.parametrize("size", [(32, 32), (64, 16)])
def test_tiles_of_any_size(size: tuple[int, int]) -> None:
    case = BY_NAME["packed_split"]
    with testing.eager_flex(), mk.use_backend("flex", BLOCK_SIZE=size):
        testing.check(case, torch.float64, None)  # type: ignore[arg-type]


def test_a_row_that_sees_nothing_takes_its_pseudo_scores() -> None:
    layout = mk.segment_modalities(torch.tensor([[0, 1, -1]]), num_modalities=2)
    hidden = mk.ModularMask(((0, 0), (0, 0)))
    q = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    base = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    with testing.eager_flex():
        given = {"pseudo": mk.PseudoAttention(base, length=1), "return_lse": True, "backend": "flex"}
        out, lse = mk.moda_attention(q, q, q, layout=layout, mask=hidden, **given)
    assert not out.any() and torch.equal(lse[..., :2].detach(), torch.full((1, 1, 2), 0.5, dtype=torch.float64))
    assert lse[0, 0, 2] == -math.inf
    of_q, of_base = torch.autograd.grad((out.sum() + lse[..., :2].sum()), (q, base))
    assert not of_q.any() and of_base == 2
