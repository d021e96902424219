"""The Triton kernels under every mask that can be said: all six flags, roles, steps, chunks, both kinds of windows, two
intervals a row; sequences and tensors of any size; and one compile for all lengths."""

import json
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import moda_kernels as mk
from moda_kernels import testing
from moda_kernels.runtime import gpu
from moda_kernels.testing import Result, compare, generator, poisoned_memory
from moda_kernels.tokens.intervals import passes_of

if gpu.why_absent():
    pytest.skip("; ".join(gpu.why_absent()), allow_module_level=True)

from test_intervals import any_mask, random_tokens, some_queries

from moda_kernels.backends.triton import plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
P, S, A, B, U, C = 1, 2, 4, 8, 16, 32  # past, segment, all, before, upto, chunk


def outputs(leaves: list[Tensor], upstream: list[Tensor], backend: str, dtype: torch.dtype, **options: Any) -> Result:
    """Out, lse and all gradients; upstream gradients of lse are 0 where a row sees nothing."""

    def cast(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(cast, x))
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    leaves = [cast(x).detach().requires_grad_() for x in leaves]
    q, k, v, *bias = leaves
    out, lse = mk.moda_attention(
        q, k, v, backend=backend, enable_gqa=True, return_lse=True, pair_bias=bias[0] if bias else None,
        **{name: cast(x) for name, x in options.items()},
    )  # fmt: skip
    dlse = torch.where(lse.detach() == -math.inf, 0, upstream[1].to(lse.dtype))
    grads = torch.autograd.grad((out, lse), leaves, (cast(upstream[0]), dlse))
    names = ("dq", "dk", "dv", "dbias")
    return Result({"out": out, "lse": lse, **dict(zip(names, grads, strict=False))})


def check(dtype: torch.dtype, layout: mk.ModalityLayout, queries: dict[str, Any], **options: Any) -> None:
    """A call on random tensors in poisoned memory, against the reference in float64 and in the dtype itself."""
    rows, keys = math.prod(layout.queries(**queries).shape), layout.num_tokens
    n, heads, key_heads, dim, value_dim = layout.num_sequences, 4, 2, 16, 24
    shapes = [(rows, heads, dim), (keys, key_heads, dim), (keys, key_heads, value_dim)]
    up = [(rows, heads, value_dim), (heads, rows)]
    if not layout.packed:
        shapes = [(n, h, t // max(n, 1), d) for t, h, d in shapes]
        up = [(n, heads, rows // max(n, 1), value_dim), (n, heads, rows // max(n, 1))]
    if options.get("duplex") == "split":
        up[1] = (*up[1], 2)
    leaves, upstream = ([torch.randn(shape, dtype=dtype, device=DEVICE) for shape in all_of] for all_of in (shapes, up))
    if options.pop("bias", False):
        m = layout.num_modalities
        leaves.append(torch.randn(max(n, 1), heads, m, m, device=DEVICE).to(dtype))
    named = {name: queries[name] for name in ("query_start", "cu_seqlens_q") if queries.get(name) is not None}
    every = {"layout": layout, **named, **options}
    with poisoned_memory():
        made = outputs(leaves, upstream, "triton", dtype, **every)
    exact = outputs(leaves, upstream, "reference", torch.float64, **every)
    eager = outputs(leaves, upstream, "reference", dtype, **every)
    wrong = [str(c) for c in compare(made, exact, eager, dtype) if not c.good]
    assert not wrong, f"{options}: {'; '.join(wrong)}"


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=pytest.mark.exhaustive if seed > 5 else ()) for seed in range(24)]
)
def test_any_mask_over_any_tokens(seed: int) -> None:
    """Joint and split, with a bias and without, forward and backward; every third in float16."""
    g = generator(seed)
    layout = mk.segment_modalities(**random_tokens(g, most=70)[1]).to(DEVICE)
    mask = any_mask(g, layout.num_roles)
    queries = some_queries(layout, g)
    options: dict[str, Any] = {"mask": mask}
    if seed % 2:
        options |= {"duplex": "split", "branch_weights": tuple(torch.randn(2, 4, device=DEVICE))}
    if seed % 3 == 1:
        options["pseudo"] = mk.PseudoAttention(0.3, 0.5, None if seed % 4 else 90)
    options["bias"] = seed % 4 > 1
    check(torch.float16 if seed % 3 == 2 else torch.float32, layout, queries, **options)


def block_diffusion(blocks: int, size: int) -> mk.ModalityLayout:
    """A noised copy of a text (role 0), then the text (role 1), in blocks."""
    step = torch.arange(blocks).repeat_interleave(size).repeat(2)
    role = torch.arange(2).repeat_interleave(blocks * size)
    return mk.segment_modalities(
        torch.zeros_like(role)[None], num_modalities=1, roles=role[None], num_roles=2, steps=step[None],
        item_ids=step[None],
    ).to(DEVICE)  # fmt: skip


#: Masks of released models: (rules, how the tokens stand).
MODELS = {
    "block diffusion": ([[S, B], [0, U]], lambda: block_diffusion(9, 8)),
    "two intervals": ([[S | B, B], [P, U]], lambda: block_diffusion(7, 10)),
    "frames": (
        [[P, A], [P, U]],
        lambda: mk.segment_modalities(
            (torch.arange(140) % 20 >= 4).long()[None], num_modalities=2, steps=(torch.arange(140) // 20)[None]
        ).to(DEVICE),
    ),
    "answers to one prompt": (
        [[P, 0], [P, C]],
        lambda: mk.segment_modalities(
            (torch.arange(120) >= 30).long()[None], num_modalities=2, chunks=((torch.arange(120) - 30) // 25)[None]
        ).to(DEVICE),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.exhaustive)], ids=str)
def test_masks_of_models(name: str, dtype: torch.dtype) -> None:
    rules, make = MODELS[name]
    layout = make()
    mask = mk.ModularMask(rules)
    if name == "two intervals":
        assert passes_of(layout, mask).intervals == 2
    check(dtype, layout, {}, mask=mask, bias=name == "frames")
    check(dtype, layout, {"query_length": 35}, mask=mk.ModularMask(rules, window=33, window_on="all"))


@pytest.mark.parametrize("name", MODELS)
@DTYPES
def test_decoding_under_masks_of_models(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "DECODE_FROM", 0)
    rules, make = MODELS[name]
    layout = make()
    keys = layout.num_tokens
    q, k, v = (torch.randn(1, h, n, 16, dtype=dtype, device=DEVICE) for h, n in ((4, 3), (2, keys), (2, keys)))
    made = []
    for backend, kind in (("triton", dtype), ("reference", torch.float64), ("reference", dtype)):
        out, lse = mk.moda_attention(
            *(x.to(kind) for x in (q, k, v)), layout=layout, mask=mk.ModularMask(rules), enable_gqa=True,
            return_lse=True, pseudo=mk.PseudoAttention(), backend=backend,
        )  # fmt: skip
        made.append(Result({"out": out, "lse": lse}))
    wrong = [str(c) for c in compare(*made, dtype) if not c.good]
    assert not wrong, "; ".join(wrong)


# No bounds


def test_many_modalities() -> None:
    ids = (torch.arange(60) % 20)[None].to(DEVICE)
    layout = mk.segment_modalities(ids, num_modalities=20, max_segments=60)
    rules = testing.random_mask(generator(0), 20).rules
    check(torch.float32, layout, {"query_length": 12}, mask=mk.ModularMask(rules), bias=True)


def test_a_hundred_thousand_tokens() -> None:
    """Its last rows in a window, so that the interpreter has little to do; all keys' gradients come out."""
    length, rows = 100_000, 33
    ids = (torch.arange(length, device=DEVICE) // 1000 % 2)[None]
    layout = mk.segment_modalities(ids, num_modalities=2, max_segments=100)
    mask = mk.ModularMask([[P, P], [P, P | S]], window=40, window_on="all")
    q = torch.randn(1, 1, rows, 16, device=DEVICE, requires_grad=True)
    k, v = (torch.randn(1, 1, length, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    seen = mask.visible(layout, rows)[0]
    monkey = pytest.MonkeyPatch()
    # Key tiles of a thousand keys: a program each takes the interpreter its time.
    monkey.setitem(plan.configs.INTERPRETED, "keys", plan.configs.AttentionConfig(1, 1, 32, 1024, 16))
    with monkey.context():
        out = mk.moda_attention(q, k, v, layout=layout, mask=mask, backend="triton")
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), attn_mask=seen)
    right = torch.autograd.grad(exact.sum(), (q, k, v))
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)
    for got, expected in zip(grads, right, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sequences", [1, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_a_million_tokens(sequences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """2^20 in a sequence, 2^22 in packed documents: rows of the last window, forward, backward and decoding."""
    length, rows, window = 2**20, 33, 40
    monkeypatch.setitem(plan.configs.INTERPRETED, "keys", plan.configs.AttentionConfig(1, 1, 32, 2**14, 32))
    ids = torch.arange(length, device=DEVICE, dtype=torch.int32).div(1000, rounding_mode="floor") % 2
    mask = mk.ModularMask([[P, P], [P, P | S]], window=window, window_on="all")
    bounds = torch.arange(sequences + 1, device=DEVICE, dtype=torch.int32)
    layout = mk.segment_modalities(
        ids.repeat(sequences), num_modalities=2, max_segments=1100 * sequences, cu_seqlens=bounds * length
    )
    k, v = (torch.zeros(sequences * length, 1, 16, device=DEVICE) for _ in range(2))
    near = rows + window  # all that is seen
    columns = (bounds[1:, None].long() * length - near + torch.arange(near, device=DEVICE)).flatten()
    for x in (k, v):
        x[columns] = torch.randn(len(columns), 1, 16, device=DEVICE)
    seen = mask.visible(mk.segment_modalities(ids[None, -near:], num_modalities=2), rows)[0]
    for count in (rows, 5):
        q = torch.randn(sequences * count, 1, 16, device=DEVICE)
        leaves = [x.requires_grad_(count > 16) for x in (q, k, v)]
        out = mk.moda_attention(*leaves, layout=layout, mask=mask, cu_seqlens_q=bounds * count, backend="triton")
        of = [x.detach().double().view(sequences, -1, 16) for x in (q, k[columns], v[columns])]
        exact_leaves = [x.requires_grad_() for x in of]
        exact = torch.nn.functional.scaled_dot_product_attention(*exact_leaves, attn_mask=seen[-count:])
        torch.testing.assert_close(out.double().view_as(exact), exact, rtol=1e-4, atol=1e-5)
        if count > 16:
            dq, dk, dv = torch.autograd.grad(out.sum(), leaves)
            right = torch.autograd.grad(exact.sum(), exact_leaves)
            for got, expected in zip((dq, dk[columns], dv[columns]), right, strict=True):
                torch.testing.assert_close(got.double().view_as(expected), expected, rtol=1e-4, atol=1e-5)
            for grad in (dk, dv):
                grad[columns] = 0
                assert not grad.any()
        k, v = k.detach(), v.detach()


@pytest.mark.skipif(not gpu.interpreted(), reason="memory that nothing touches costs nothing on the CPU only")
@pytest.mark.parametrize("rows", [5, 40])
def test_offsets_beyond_32_bits(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads, sequences and rows of a mask that lie farther apart than 2^31 elements."""
    from triton.runtime import interpreter

    # It copies the storage of every argument back, here onto itself, which would touch it all.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    monkeypatch.setattr(plan, "DECODE_FROM", 0)
    far = 2**31 + 16
    layout = mk.segment_modalities((torch.arange(40) // 7 % 2).expand(2, -1).contiguous(), num_modalities=2)

    def spread(x: Tensor, head: int, batch: int) -> Tensor:
        room = torch.empty(head + batch + x[0, 0].numel(), dtype=x.dtype)
        return room.as_strided(x.shape, (batch, head, x.shape[3], 1)).copy_(x)

    small = [torch.randn(2, 2, n, 16, dtype=torch.float16) for n in (rows, 40, 40)]
    big = [spread(small[0], far, 4096), spread(small[1], 4096, far), spread(small[2], far, 4096)]
    mask = torch.rand(2, 2, rows, 40) > 0.3
    results = []
    for (q, k, v), attn_mask in ((small, mask), (big, spread(mask, 4096, far))):
        leaves = [x.detach().requires_grad_(rows > 16) for x in (q, k, v)]
        out = mk.moda_attention(*leaves, attn_mask, layout=layout, is_causal=True, backend="triton")
        upstream = out.detach() if q is small[0] else spread(out.detach(), far, 4096)
        results.append((out, *(torch.autograd.grad(out, leaves, upstream) if rows > 16 else ())))
    for near, apart in zip(*results, strict=True):
        torch.testing.assert_close(near, apart, rtol=0, atol=0)


# One compile for all lengths

SPECIALISATIONS = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import create_function_from_signature
import moda_kernels as mk
from moda_kernels.backends.triton import launch, launch_decode, operators, plan
from moda_kernels.runtime import gpu

backend = triton.compiler.make_backend(GPUTarget("cuda", 90, 32))
seen = {}

class Recorded:
    def __init__(self, kernel):
        self.binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        self.name, self.arg_names = kernel.__name__, kernel.arg_names

    def __getitem__(self, grid):
        def launched(*arguments, **named):
            bound, specialised, options = self.binder(*arguments, debug=False, **named)
            seen.setdefault(self.name, set()).add(repr((specialised, options)))
        return launched

for module in (launch, launch_decode):
    for name, value in list(vars(module).items()):
        if isinstance(value, triton.JITFunction):
            setattr(module, name, Recorded(value))
gpu.why_absent = gpu.why_not_on = lambda *_: None
type(mk.backends.BACKENDS["triton"]).why_absent = lambda self: []
type(mk.backends.BACKENDS["triton"]).why_not = lambda self, call: []
plan.DECODE_FROM = 0
for dim in (64, 40):
    for length in range(21, 41):
        for rows in (length, 1):
            ids = (torch.arange(length) // 7 % 2)[None].expand(2, -1).contiguous()
            layout = mk.segment_modalities(ids, num_modalities=2)
            grad = rows > 1
            q, k, v = (torch.randn(2, h, n, dim, requires_grad=grad) for h, n in ((4, rows), (2, length), (2, length)))
            out, lse = mk.moda_attention(
                q, k, v, torch.randn(rows, length), layout=layout, is_causal=True, duplex="split", enable_gqa=True,
                pseudo=mk.PseudoAttention(), pair_bias=torch.zeros(1, 1, 2, 2), return_lse=True, backend="triton",
            )
            if grad:
                torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
print(json.dumps({name: len(of) for name, of in seen.items()}))
"""


def test_one_compile_for_twenty_lengths() -> None:
    """What Triton tells launches apart by, with recorders in place of the kernels: two head sizes, twenty lengths."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", SPECIALISATIONS], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    kernels = ("forward", "row_sums", "backward_query", "backward_keys", "decode", "decode_combine")
    assert counts == {f"attention_{name}": 2 for name in kernels}
