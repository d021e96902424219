"""Rows outside every document or key: on CUDA and while compiling nobody looks at offsets, so these may be anything.

Such rows give output 0, lse -inf and gradient 0, on every backend, whatever they hold; all others are as if those rows
weren't there. Here the CPU doesn't look either, and new memory is NaN until it is written to.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import moda_kernels as mk
from moda_kernels import backends
from moda_kernels.backends.triton import plan
from moda_kernels.runtime import checks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDS = torch.tensor([0, 1, 0, 0, 1, 1, -1, 0, 1, 0, 1, 1])
T = len(IDS)
#: First token of each document; first query row of each document, and the number of query rows.
BOUNDS: dict[str, tuple[list[int], list[int] | None, int]] = {
    "both ends": ([2, 5, 9], None, T),
    "the end": ([0, 4, 4, 7], None, T),
    "no document": ([0], None, T),
    "an empty document": ([3, 3], None, T),
    "queries after": ([0, 5, T], [0, 2, 5], 8),
    "queries before": ([0, 5, T], [1, 2, 5], 8),
    "queries and keys": ([1, 5, 10], [2, 3, 5], 8),
    "more queries than keys": ([0, 5, T], [0, 7, 9], 10),
}


@pytest.fixture(autouse=True)
def nobody_looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(checks, "looks_at_values", lambda device: False)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty makes
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", "triton", "triton, decoding", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = request.param.partition(",")[0]
    absent = backends.BACKENDS[name].why_absent()
    if absent or (name == "cpu" and DEVICE == "cuda"):
        pytest.skip("; ".join(absent) or "the tensors are on CUDA")
    if name != request.param:
        monkeypatch.setattr(plan, "DECODE_FROM", 0)
        monkeypatch.setattr(plan, "DECODE_ROWS", 1000)
    return request.param


def run(q: Tensor, k: Tensor, v: Tensor, backend: str, fusion: str | None, **options: Any) -> list[Tensor]:
    """Output, lse, and (but while decoding) the gradients."""
    name, _, decoding = backend.partition(",")
    leaves = [t.detach().to(DEVICE).requires_grad_(not decoding) for t in (q, k, v)]
    with backends.use_backend(name), torch.set_grad_enabled(not decoding):
        if fusion is not None:
            aligner = mk.DuplexAligner(16, 2, scope=fusion, device=DEVICE)
            torch.nn.init.ones_(aligner.ratio)
            options["key_map"] = aligner(leaves[1], options["layout"])
        out, lse = mk.moda_attention(*leaves, return_lse=True, **options)
        if decoding:
            return [out.cpu(), lse.cpu()]
        grads = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)))
    return [t.detach().cpu() for t in (out, lse, *grads)]


@pytest.mark.parametrize("options", ["joint", "split", "pseudo", "sequence", "causal"])
@pytest.mark.parametrize("bounds", BOUNDS)
def test_rows_in_no_document(bounds: str, options: str, backend: str) -> None:
    cu, cu_q, rows = BOUNDS[bounds]
    more: dict[str, Any] = {"mask": mk.ModularMask.causal(2), "duplex": "split" if options == "split" else "joint"}
    more["pseudo"] = mk.PseudoAttention(0.2, 0.1) if options == "pseudo" else None
    fusion = options if options in ("sequence", "causal") else None

    def layout(ids: Tensor, bounds: list[int]) -> mk.ModalityLayout:
        cu_seqlens = torch.tensor(bounds, device=DEVICE)
        return mk.segment_modalities(ids.to(DEVICE), num_modalities=2, cu_seqlens=cu_seqlens, max_segments=T)

    q, k, v = torch.randn(rows, 2, 16), torch.randn(T, 2, 16), torch.randn(T, 2, 16)
    first, last = cu[0], cu[-1]
    q_first, q_last = (first, last) if cu_q is None else (cu_q[0], cu_q[-1])
    blind = torch.ones(rows, dtype=torch.bool)
    for n in range(len(cu) - 1):
        begin, end = (cu_q or cu)[n : n + 2]
        for row in range(begin, end):
            token = cu[n + 1] - (end - row)  # the rows of a document are its last tokens
            blind[row] = token < cu[n] or IDS[token] < 0
    apart = torch.ones(T, dtype=torch.bool)
    apart[first:last] = False

    q_poisoned, k_poisoned, v_poisoned = q.clone(), k.clone(), v.clone()
    q_poisoned[:q_first], q_poisoned[q_last:] = math.nan, math.nan
    k_poisoned[apart], v_poisoned[apart] = math.nan, math.nan
    place = {"layout": layout(IDS, cu)}
    if cu_q is not None:
        place["cu_seqlens_q"] = torch.tensor(cu_q, dtype=torch.int32, device=DEVICE)
    got = run(q_poisoned, k_poisoned, v_poisoned, backend, fusion, **place, **more)
    out, lse = got[:2]
    assert bool((out[blind] == 0).all())
    assert bool((lse[:, blind] == -math.inf).all())
    assert bool(torch.isfinite(lse[:, ~blind]).all()) or options == "split"
    for name, grad, rows_apart in zip("qkv", got[2:], (blind, apart, apart), strict=False):
        assert bool((grad[rows_apart] == 0).all()), f"d{name}"

    # The documents alone.
    place = {"layout": layout(IDS[first:last], [b - first for b in cu])}
    if cu_q is not None:
        place["cu_seqlens_q"] = torch.tensor([b - q_first for b in cu_q], dtype=torch.int32, device=DEVICE)
    alone = run(q[q_first:q_last], k[first:last], v[first:last], backend, fusion, **place, **more)
    kept = [got[0][q_first:q_last], got[1][:, q_first:q_last]]
    kept += [g[s] for g, s in zip(got[2:], (slice(q_first, q_last), *[slice(first, last)] * 2), strict=False)]
    torch.testing.assert_close(kept, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("duplex", ["joint", "split"])
@pytest.mark.parametrize("starts", [[10, -2], [-9, 12], [3, 11]])
def test_rows_beside_the_keys(starts: list[int], duplex: str, backend: str) -> None:
    layout = mk.segment_modalities(IDS.expand(2, -1).to(DEVICE), num_modalities=2, max_segments=2 * T)
    q, k, v = torch.randn(2, 2, 4, 16), torch.randn(2, 2, T, 16), torch.randn(2, 2, T, 16)
    blind = torch.tensor([[not 0 <= s + i < T or IDS[s + i] < 0 for i in range(4)] for s in starts])
    q.transpose(1, 2)[blind] = math.nan
    got = run(
        q, k, v, backend, None, layout=layout, query_start=torch.tensor(starts, device=DEVICE), is_causal=True,
        duplex=duplex,
    )  # fmt: skip
    out, lse = got[:2]
    assert bool((out.transpose(1, 2)[blind] == 0).all()) and bool((lse.transpose(1, 2)[blind] == -math.inf).all())
    assert bool(torch.isfinite(lse.transpose(1, 2)[~blind][..., :1] if duplex == "joint" else out).all())
    for grad in got[2:]:
        assert bool(torch.isfinite(grad).all())
    if len(got) > 2:
        assert bool((got[2].transpose(1, 2)[blind] == 0).all())
    expected = run(
        torch.nan_to_num(q), k, v, "reference", None, layout=layout, is_causal=True, duplex=duplex,
        query_start=torch.tensor(starts, device=DEVICE),
    )  # fmt: skip
    torch.testing.assert_close(got, expected[: len(got)], rtol=1e-4, atol=1e-5)
