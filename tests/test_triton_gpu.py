"""The Triton backend on a GPU: real sizes in all dtypes against the oracle, graph capture, no waits, compiled once."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import moda_kernels as mk
from moda_kernels import testing
from moda_kernels.testing import CASES, Case

pytestmark = pytest.mark.gpu

BY_NAME = {case.name: case for case in CASES}
LARGE = ("joint_bidirectional", "joint_rules", "split_weights", "pseudo_sequence", "bias_own", "attn_mask_fixed",
         "key_map_add_sequence", "key_map_concat_sequence", "key_map_concat_causal", "key_map_released",
         "packed_bidirectional", "queries_tensor")  # fmt: skip


def large(name: str) -> Case:
    """A case with long segments and few heads: the oracle writes out all scores in float64."""
    return dataclasses.replace(BY_NAME[name], longest=700, key_heads=1, group=2, padding=("right",))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("length", [2048, 4100])
@pytest.mark.parametrize("name", LARGE)
def test_parity_at_real_sizes(name: str, length: int, dtype: torch.dtype) -> None:
    testing.check(large(name), dtype, "triton", device="cuda", length=length, head_dim=128)


@pytest.mark.parametrize("name", ["joint_bidirectional", "key_map_add_sequence"])
def test_parity_at_16k(name: str) -> None:
    case = dataclasses.replace(large(name), group=1)
    testing.check(case, torch.bfloat16, "triton", device="cuda", length=16384, head_dim=64)


@pytest.mark.parametrize("head_dim", [40, 64, 80, 96, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_head_sizes(head_dim: int, dtype: torch.dtype) -> None:
    for name in ("joint_bidirectional", "key_map_add_sequence"):
        testing.check(large(name), dtype, "triton", device="cuda", length=1100, head_dim=head_dim)


@pytest.mark.parametrize("name", ["joint_bidirectional", "split_weights", "bias_own", "packed_split", "everything"])
def test_small_shapes(name: str) -> None:
    """Small enough for compute-sanitizer (`make sanitize`)."""
    for dtype in (torch.bfloat16, torch.float32):
        testing.run(BY_NAME[name], dtype, "triton", device="cuda", length=150, head_dim=64)


def inputs(length: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    g = testing.generator(seed)
    ids = torch.stack([testing.random_ids(length, 2, g, longest=300) for _ in range(2)]).cuda()
    tensors = [torch.randn(2, h, length, 64, generator=g).cuda().bfloat16().requires_grad_() for h in (8, 2, 2)]
    return ids, tensors


def step(ids: Tensor, q: Tensor, k: Tensor, v: Tensor, aligner: Any, segments: int = 512) -> list[Tensor]:
    """Segmentation, alignment, attention and all gradients."""
    layout = mk.segment_modalities(ids, num_modalities=2, max_segments=segments)
    out, lse = mk.moda_attention(
        q, k, v, layout=layout, mask=mk.ModularMask.bidirectional_within(2, [1]), key_map=aligner(k, layout),
        pseudo=mk.PseudoAttention(length=8192), enable_gqa=True, return_lse=True, backend="triton",
    )  # fmt: skip
    return [out, lse, *torch.autograd.grad(out.float().square().sum() + lse.sum(), (q, k, v, *aligner.parameters()))]


@pytest.mark.parametrize("scope", ["sequence", "causal"])
def test_graph_capture(scope: str) -> None:
    """A captured step, replayed on another layout and other tensors."""
    aligner = mk.DuplexAligner(64, 2, scope=scope, device="cuda")
    torch.nn.init.normal_(aligner.ratio)
    ids, tensors = inputs(1024)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(ids, *tensors, aligner)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = step(ids, *tensors, aligner)
    other, others = inputs(1024, seed=1)
    with torch.no_grad():
        ids.copy_(other)
        for t, o in zip(tensors, others, strict=True):
            t.copy_(o)
    graph.replay()
    for got, expected in zip(results, step(other, *others, aligner), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("scope", ["sequence", "causal"])
def test_nothing_waits(scope: str) -> None:
    aligner = mk.DuplexAligner(64, 2, scope=scope, device="cuda")
    step(*inputs(1024)[:1], *inputs(1024)[1], aligner)
    ids, tensors = inputs(1024, seed=1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(ids, *tensors, aligner)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_once_for_twenty_layouts() -> None:
    torch._dynamo.reset()
    aligner = mk.DuplexAligner(64, 2, scope="causal", device="cuda")
    compiled = torch.compile(step, fullgraph=True)
    counter = torch._dynamo.utils.counters["stats"]
    graphs = []
    for i in range(20):
        ids, tensors = inputs(1024 + 37 * i, seed=i)
        results = compiled(ids, *tensors, aligner)
        if i in (0, 19):
            expected = step(ids, *tensors, aligner)
            torch.testing.assert_close(results[0].float(), expected[0].float(), rtol=2e-2, atol=2e-2)
        graphs.append(counter["unique_graphs"])
    assert graphs[-1] == graphs[1], f"compiled anew: {graphs}"
