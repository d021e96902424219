"""The decode kernels of the Triton backend: every option that a call without gradients can have, against the oracle,
and when it is them that run. On the CPU in Triton's interpreter, where a key tile has 16 keys; on a GPU compiled."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import moda_kernels as mk
from moda_kernels.runtime import gpu
from moda_kernels.testing import CASES, Case, Result, compare, oracle, poisoned_memory
from moda_kernels.testing import run as run_case
from moda_kernels.tokens.layout import ModalityLayout

if gpu.why_absent():
    pytest.skip("; ".join(gpu.why_absent()), allow_module_level=True)

from torch.testing._internal.optests import opcheck

from moda_kernels.backends.triton import launch as kernels
from moda_kernels.backends.triton import launch_decode, operators, plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BY_NAME = {case.name: case for case in CASES}
M = 2


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the launchers that ran, in order; no other backend may."""
    ran: list[str] = []
    for module, name in ((launch_decode, "decode"), (kernels, "forward"), (kernels, "backward")):
        run = getattr(module, name)

        def counted(*arguments: Any, run: Any = run, name: str = name) -> Any:
            ran.append(name)
            return run(*arguments)

        monkeypatch.setattr(module, name, counted)
    return ran


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few the keys, however many the query rows."""
    monkeypatch.setattr(plan, "DECODE_FROM", 0)
    monkeypatch.setattr(plan, "DECODE_ROWS", 1000)


def ids(*lengths: int, run: int = 7) -> Tensor:
    return torch.cat([torch.arange(n) // run % M for n in lengths])


def attend(
    dtype: torch.dtype, layout: ModalityLayout, rows: int, heads: tuple[int, int] = (8, 2), dim: int = 16,
    value_dim: int = 24, **options: Any,
) -> tuple[Result, Result, Result]:  # fmt: skip
    """Out and lse of a call on random tensors: of the kernels, of the oracle, and of eager PyTorch in the dtype."""
    n, keys = layout.num_sequences, layout.modality.shape[-1]
    shapes = [(rows, heads[0], dim), (keys, heads[1], dim), (keys, heads[1], value_dim)]
    if not layout.packed:
        shapes = [(n, h, length, d) for length, h, d in shapes]
    qkv = [torch.randn(shape, dtype=dtype, device=DEVICE) for shape in shapes]

    def result(name: str, kind: torch.dtype) -> Result:
        def cast(x: Any) -> Any:
            return x.to(kind) if isinstance(x, Tensor) and x.is_floating_point() else x

        q, k, v = map(cast, qkv)
        made = {key: cast(x) for key, x in options.items()}
        if "branch_weights" in made:
            made["branch_weights"] = tuple(map(cast, made["branch_weights"]))
        if "aligner" in made:
            made["key_map"] = made.pop("aligner").to(kind)(k, layout)
        with torch.no_grad():
            out, lse = mk.moda_attention(
                q, k, v, layout=layout, enable_gqa=True, return_lse=True, backend=name, **made
            )  # fmt: skip
        return Result({"out": out, "lse": lse})

    with poisoned_memory():
        made = result("triton", dtype)
    return made, result("reference", torch.float64), result("reference", dtype)


def check(dtype: torch.dtype, *arguments: Any, **options: Any) -> None:
    wrong = [str(c) for c in compare(*attend(dtype, *arguments, **options), dtype) if not c.good]
    assert not wrong, "; ".join(wrong)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


# What comes out


@DTYPES
@pytest.mark.parametrize("rows", [1, 3])
def test_everything_together(rows: int, dtype: torch.dtype, everywhere: None, launches: list[str]) -> None:
    """A group of 4, padding on the left and in the middle, and a last row that is padding."""
    padded = torch.stack((ids(69), ids(69)))
    padded[0, :20], padded[1, 30:50] = -1, -1
    padded[1, -2:] = -1
    layout = mk.segment_modalities(padded.to(DEVICE), num_modalities=M, max_segments=100)
    numbers = [torch.randn(8, device=DEVICE) for _ in range(4)]
    check(
        dtype, layout, rows, mask=mk.ModularMask.bidirectional_within(M, [1]), duplex="split",
        branch_weights=numbers[:2], pseudo=mk.PseudoAttention(numbers[2], numbers[3].abs(), 300),
        pair_bias=torch.randn(2, 8, M, M, device=DEVICE), attn_mask=torch.randn(rows, 69, device=DEVICE),
    )  # fmt: skip
    assert launches == ["decode"]


CHOSEN = (
    "joint_no_scale", "joint_all_padding", "split_everything", "attn_mask_bool", "key_map_concat_sequence",
    "key_map_released", "queries_int", "packed_split",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype"), [*((n, torch.float32) for n in CHOSEN), *((n, torch.float16) for n in CHOSEN[2:5])], ids=str
)
def test_cases(
    name: str, dtype: torch.dtype, everywhere: None, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cases of all backends, with fewer queries than keys; so few rows in a tile that sequences take several."""
    monkeypatch.setattr(plan, "DECODE_TILE", 8)
    case: Case = dataclasses.replace(BY_NAME[name], group=2, queries=BY_NAME[name].queries or "default")
    sizes: dict[str, Any] = {"device": DEVICE, "length": 20}
    inputs = case.build(dtype, **sizes)
    with torch.no_grad(), mk.use_backend("triton"), poisoned_memory():
        out, lse = inputs.call(inputs.tensors)
    assert launches == ["decode"]
    exact, eager = oracle(case, dtype, **sizes), run_case(case, dtype, "reference", **sizes)
    exact, eager = (Result({name: r.tensors[name] for name in ("out", "lse")}) for r in (exact, eager))
    wrong = [str(c) for c in compare(Result({"out": out, "lse": lse}), exact, eager, dtype) if not c.good]
    assert not wrong, "; ".join(wrong)


@DTYPES
@pytest.mark.parametrize("aligned", [False, True])
def test_packed(dtype: torch.dtype, aligned: bool, everywhere: None, launches: list[str]) -> None:
    """Documents of all lengths, one of them empty, with different numbers of query rows."""
    lengths, rows = (50, 0, 1, 20, 35), torch.tensor([1, 0, 1, 5, 2])
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
    layout = mk.segment_modalities(ids(*lengths).to(DEVICE), num_modalities=M, cu_seqlens=bounds, max_segments=60)
    cu_seqlens_q = torch.cat((torch.zeros(1), rows.cumsum(0))).int().to(DEVICE)
    more: dict[str, Any] = {}
    if aligned:
        more["aligner"] = mk.DuplexAligner(16, M, fusion="concat", device=DEVICE).requires_grad_(False)
        for parameter in more["aligner"].parameters():
            parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))
            parameter.copy_(parameter.to(dtype))
    check(dtype, layout, 9, heads=(2, 1), mask=mk.ModularMask.causal(M), cu_seqlens_q=cu_seqlens_q, **more)
    assert launches == ["decode"]


@DTYPES
def test_static_cache_and_window(dtype: torch.dtype, launches: list[str]) -> None:
    """Queries in the middle of a cache that is not full yet; a window leaves most key tiles out."""
    cache = torch.stack((ids(300), ids(300)))
    cache[0, 200:], cache[1, 150:] = -1, -1
    layout = mk.segment_modalities(cache.to(DEVICE), num_modalities=M, max_segments=100)
    mask = mk.ModularMask(mk.ModularMask.causal(M).rules, window=20)
    start = torch.tensor([197, 147], device=DEVICE)
    check(dtype, layout, 3, mask=mask, query_start=start)
    assert launches == ["decode"]


def test_keys_that_no_row_sees_are_not_read(launches: list[str]) -> None:
    """Whatever is beyond the window or padding may be NaN."""
    cache = ids(300)[None].clone()
    cache[:, 250:] = -1
    layout = mk.segment_modalities(cache.to(DEVICE), num_modalities=M, max_segments=100)
    mask = mk.ModularMask(mk.ModularMask.causal(M).rules, window=20)
    q, k, v = (torch.randn(1, 2, n, 16, device=DEVICE) for n in (1, 300, 300))
    made = []
    for fill in (0.0, math.nan):
        for x in (k, v):
            x[:, :, :230] = fill
            x[:, :, 250:] = fill
        made.append(mk.moda_attention(q, k, v, layout=layout, mask=mask, query_start=249, backend="triton"))
    assert torch.equal(*made) and bool(made[0].isfinite().all())
    assert launches == ["decode", "decode"]


@pytest.mark.parametrize("dim", [1, 40])
def test_head_sizes_strides_and_scale(dim: int, launches: list[str]) -> None:
    layout = mk.segment_modalities(ids(260)[None].to(DEVICE), num_modalities=M, max_segments=60)
    x = torch.randn(1, 260, 3, 2, dim + 2, device=DEVICE)
    q, k, v = x[..., 1 : dim + 1].permute(2, 0, 3, 1, 4)
    made, exact = (
        mk.moda_attention(q[:, :, -2:], k, v, layout=layout, is_causal=True, scale=-0.3, return_lse=True, backend=name)
        for name in ("triton", "reference")
    )
    torch.testing.assert_close(made, exact, rtol=1e-5, atol=1e-5)
    assert launches == ["decode"]


def test_hidden_by_bias(launches: list[str]) -> None:
    layout = mk.segment_modalities(ids(260)[None].to(DEVICE), num_modalities=M, max_segments=60)
    bias = torch.zeros(1, 1, M, M, device=DEVICE)
    bias[:, :, :, 1] = -math.inf
    made, exact, _ = attend(torch.float32, layout, 2, pair_bias=bias, pseudo=mk.PseudoAttention())
    torch.testing.assert_close(made.tensors, {n: t.float() for n, t in exact.tensors.items()}, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scope", ["causal", "sequence"])
def test_token_by_token(scope: str, monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> None:
    """With a `DecodeState`: kept keys, or the map folded into the query; each step is a full pass over the raw keys."""
    aligner = mk.DuplexAligner(16, M, fusion="add", scope=scope, device=DEVICE).requires_grad_(False)
    for parameter in aligner.parameters():
        parameter.normal_()
    monkeypatch.setattr(plan, "DECODE_FROM", 0)
    state = mk.DecodeState(M)
    tokens = torch.stack((ids(44), ids(44, run=5))).to(DEVICE)
    tokens[0, :3] = -1
    q, k, v = (torch.randn(2, h, 44, 16, device=DEVICE) for h in (4, 2, 2))
    options: dict[str, Any] = {"is_causal": True, "enable_gqa": True}
    end = 0
    for step in (40, 1, 1, 2):
        begin, end = end, end + step
        state.append(tokens[:, begin:end])
        key, value = k[:, :, :end], v[:, :, :end]
        out = mk.moda_attention(
            q[:, :, begin:end], key, value, state=state, key_map=aligner(key, state=state[0]), backend="triton",
            **options,
        )  # fmt: skip
        layout = mk.segment_modalities(tokens[:, :end], num_modalities=M, max_segments=60)
        full = mk.moda_attention(
            q[:, :, :end], key, value, layout=layout, key_map=aligner(key, layout), backend="reference", **options
        )
        torch.testing.assert_close(out, full[:, :, begin:end], rtol=1e-4, atol=1e-5)
    assert launches == ["forward"] + ["decode"] * 3


def test_more_segments_than_there_is_room_for(launches: list[str]) -> None:
    layout = mk.segment_modalities(ids(300)[None], num_modalities=M).to(DEVICE)
    faults = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    room = dataclasses.replace(layout, max_segments=2, table=layout.table[:2], faults=faults)
    q, k = torch.randn(1, 1, 1, 16, device=DEVICE), torch.randn(1, 1, 300, 16, device=DEVICE)
    out, lse = mk.moda_attention(q, k, k, layout=room, return_lse=True, backend="triton")
    assert bool(out.isnan().all()) and bool(lse.isnan().all()) and launches == ["decode"]


# When


def test_which_calls_come_here(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[str] = []
    for module, name, outputs in (
        (launch_decode, "decode", launch_decode.decode_outputs), (kernels, "forward", kernels.forward_outputs),
    ):  # fmt: skip

        def noted(*arguments: Any, name: str = name, outputs: Any = outputs) -> Any:
            launches.append(name)
            return outputs(arguments[0], arguments[2], False)

        monkeypatch.setattr(module, name, noted)

    def launched(rows: int, keys: int, group: int = 1, grad: str | None = None) -> list[str]:
        layout = mk.segment_modalities(torch.zeros(1, keys).long().to(DEVICE), num_modalities=1, max_segments=1)
        tensors = [torch.randn(1, h, n, 16, device=DEVICE) for h, n in ((group, rows), (1, keys), (1, keys))]
        bias = torch.zeros(1, 1, 1, 1, device=DEVICE)
        {"q": tensors[0], "k": tensors[1], "v": tensors[2], "bias": bias, None: torch.zeros(1)}[grad].requires_grad_()
        launches.clear()
        mk.moda_attention(*tensors, layout=layout, pair_bias=bias, enable_gqa=True, backend="triton")
        return list(launches)

    assert launched(1, 257) == launched(16, 257) == launched(1, 257, group=32) == ["decode"]
    assert launched(1, 256) == launched(17, 257) == launched(1, 257, group=33) == ["forward"]
    for grad in ("q", "k", "v", "bias"):
        assert launched(1, 257, grad=grad) == ["forward"]
    with torch.no_grad():
        assert launched(1, 257, grad="q") == ["decode"]


@pytest.mark.parametrize("scope", ["causal", "sequence"])
def test_a_gradient_of_the_key_map_alone(scope: str, everywhere: None, launches: list[str]) -> None:
    aligner = mk.DuplexAligner(16, M, fusion="add", scope=scope, device=DEVICE)
    layout = mk.segment_modalities(ids(40)[None].to(DEVICE), num_modalities=M, max_segments=9)
    q, k = torch.randn(1, 1, 2, 16, device=DEVICE), torch.randn(1, 1, 40, 16, device=DEVICE)
    out = mk.moda_attention(q, k, k, layout=layout, key_map=aligner(k, layout), is_causal=True, backend="triton")
    out.sum().backward()
    assert launches == ["forward", "backward"] and aligner.ratio.grad is not None


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_tiles_hold_every_row_once(rows: int) -> None:
    counts = torch.tensor([1, 0, 9, 3, 0, 8])
    bounds = torch.tensor([0, *[20] * 6]).cumsum(0).int()
    layout = mk.segment_modalities(ids(120), num_modalities=M, cu_seqlens=bounds)
    queries = layout.queries(21, None, torch.cat((torch.zeros(1), counts.cumsum(0))).int())
    tiles = plan.decode_tiles(queries, rows)
    held = [(s, row) for s, first, n in tiles.tolist() for row in range(first, first + n)]
    assert held == [(s, int(queries.cu_seqlens[s]) + i) for s in range(6) for i in range(counts[s])]
    assert int(tiles[:, 2].max()) <= rows


def test_shares_of_the_keys() -> None:
    def shares(programs: int, keys: int) -> int:
        return launch_decode.key_shares(programs, keys, 64, torch.device("cpu"))

    assert shares(1, 1 << 20) == launch_decode.INTERPRETED_PROGRAMS
    assert shares(9, 1 << 20) == shares(16, 1 << 20) == 1 and shares(8, 1 << 20) == 2
    assert shares(1, 65) == 2 and shares(1, 64) == shares(1000, 1 << 20) == shares(1, 0) == 1


# Compilers and transforms


def test_compiles_and_maps(everywhere: None, launches: list[str]) -> None:
    layout = mk.segment_modalities(ids(40)[None].to(DEVICE), num_modalities=M, max_segments=60)
    q, k = torch.randn(3, 1, 2, 1, 16, device=DEVICE), torch.randn(1, 2, 40, 16, device=DEVICE)

    def call(query: Tensor) -> Tensor:
        return mk.moda_attention(query, k, k, layout=layout, is_causal=True, backend="triton")

    expected = torch.stack([call(x) for x in q])
    torch.testing.assert_close(torch.func.vmap(call)(q), expected)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(q[0]), expected[0])
    assert set(launches) == {"decode"}


def test_opcheck(everywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    run = operators.op_attention_decode
    monkeypatch.setattr(operators, "runs_at_once", lambda *_: False)
    monkeypatch.setattr(operators, "op_attention_decode", lambda *a: (calls.append(a), run(*a))[1])
    layout = mk.segment_modalities(ids(30)[None].to(DEVICE), num_modalities=M, max_segments=60)
    q, k = torch.randn(1, 1, 1, 16, device=DEVICE), torch.randn(1, 1, 30, 16, device=DEVICE)
    mk.moda_attention(q, k, k, layout=layout, duplex="split", pseudo=mk.PseudoAttention(), backend="triton")
    ((*arguments,),) = calls
    opcheck(run, tuple(arguments), test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))
