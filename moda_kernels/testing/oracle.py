"""Cases run and judged: the oracle and the error criterion.

The oracle is the reference backend in float64 on the same, already rounded, inputs. A result is good where its error is
at most twice that of the same maths in eager low precision (the reference backend in the case's dtype), plus two units
in the last place of the largest number.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moda_kernels import reference
from moda_kernels.backends import use_backend
from moda_kernels.call import AttentionCall
from moda_kernels.runtime import backend_name
from moda_kernels.testing import interpreter
from moda_kernels.testing.cases import Case, Inputs, Result, generator

#: float64 has no finer oracle to measure its own rounding with: room for another order of the sums.
FLOAT64_ULPS = 512
#: Backends that are made of torch's own kernel on the CPU, or may be.
MADE_OF_SDPA = ("cpu", "auto")
#: Times that the kernel's error is drawn: one draw's effect on a sum can be small by luck.
DRAWS = 4
#: Orders of summation in which eager PyTorch is tried where a normed Gram matrix is in play.
ORDERS = 4


def run(
    case: Case | Inputs,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
    *,
    compute: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    attend: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]] | None = None,
    **sizes: int,
) -> Result:
    """Run a case forward and backward, under random gradients of out and lse.

    Args:
        dtype: to which the inputs are rounded.
        backend: as in `moda_attention`.
        compute: to which the rounded inputs are then cast. Default: ``dtype``.
        attend: from a case's tensors to out and lse. Default: `moda_attention`.
        sizes: length and head_dim, of `Case.build`.

    Raises:
        NotImplementedError: the backend can't run the case.
    """
    interpreter.prepare()
    inputs = case.build(dtype, device, seed=seed, **sizes) if isinstance(case, Case) else case
    tensors = {
        name: t.detach().to(compute or dtype).requires_grad_(name not in inputs.fixed)
        for name, t in inputs.tensors.items()
    }
    leaves = {name: t for name, t in tensors.items() if t.requires_grad}
    g = generator(seed + 2)
    # By name for the block, so that key maps are made by the backend's kernels too.
    with use_backend(backend or backend_name.name()):
        out, lse = inputs.call(tensors, backend=backend) if attend is None else attend(tensors)
        outputs = (out, lse) if inputs.lse_gradient else (out,)
        upstream = [torch.randn(t.shape, generator=g).to(device, dtype).to(t.dtype) for t in outputs]
        grads = _gradients(outputs, leaves, upstream, inputs.may_be_unused)
    return Result({"out": out.detach(), "lse": lse.detach()} | {f"d {name}": grad for name, grad in grads.items()})


def _gradients(
    outputs: tuple[Tensor, ...], leaves: dict[str, Tensor], upstream: list[Tensor], may_be_unused: bool
) -> dict[str, Tensor]:
    if may_be_unused:
        used = [(t, g) for t, g in zip(outputs, upstream, strict=True) if t.requires_grad]
        outputs, upstream = tuple(t for t, _ in used), [g for _, g in used]
    if not leaves or not outputs:
        return {name: torch.zeros_like(t) for name, t in leaves.items()}
    grads = torch.autograd.grad(outputs, tuple(leaves.values()), upstream, allow_unused=may_be_unused)
    return {
        name: torch.zeros_like(t) if grad is None else grad
        for (name, t), grad in zip(leaves.items(), grads, strict=True)
    }


def oracle(case: Case | Inputs, dtype: torch.dtype, **options: Any) -> Result:
    """The right answer: the reference backend in float64 on the inputs rounded to ``dtype``. Options: as in `run`."""
    return run(case, dtype, "reference", compute=torch.float64, **options)


def eager(case: Case | Inputs, dtype: torch.dtype, **options: Any) -> list[Result]:
    """The reference backend in a dtype, whose error is the measure of a kernel's. Options: as in `run`.

    Rows of a Gram matrix are divided by their norm, and a row whose norm is almost 0 (a key with an almost empty entry,
    early in a sequence) makes gradients ill-conditioned: eager PyTorch's own error then changes several times over with
    the order in which it sums. So with a fused map it is run with the head dimension in several orders, which is the
    same maths; the measure is the worst of them.
    """
    sizes = {name: options.pop(name) for name in ("length", "head_dim") if name in options}
    seed = options.get("seed", 0)
    inputs = case
    if isinstance(case, Case):
        inputs = case.build(dtype, options.get("device", "cpu"), seed=seed, **sizes)
    assert isinstance(inputs, Inputs)
    results = [run(inputs, dtype, "reference", **options)]
    if not inputs.normed or dtype == torch.float64:
        return results
    for order in head_orders(inputs.tensors["key"].shape[-1]):
        tensors = {name: reordered(name, t, order.to(t.device)) for name, t in inputs.tensors.items()}
        result = run(dataclasses.replace(inputs, tensors=tensors), dtype, "reference", **options)
        back = torch.argsort(order)
        results.append(Result({n: reordered(n[2:], t, back.to(t.device)) for n, t in result.tensors.items()}))
    return results


def head_orders(dim: int) -> list[Tensor]:
    """The orders of the head dimension in which eager PyTorch is tried, besides its own."""
    return [torch.randperm(dim, generator=generator(i)) for i in range(1, ORDERS)]


def reordered(name: str, x: Tensor, order: Tensor) -> Tensor:
    """A tensor of a case (or its gradient) with the head dimension of queries and keys in another order."""
    if name in ("query", "key", "ratio"):
        return x[..., order]
    if name == "weight":  # [M, D, D] or [M, D, 2 D]
        halves = x[:, order].reshape(*x.shape[:-1], -1, order.numel())
        return halves[..., order].flatten(-2)
    return x


@dataclass(frozen=True)
class Comparison:
    """One tensor's largest error against the oracle, the error allowed, and whether infinities and NaN agree."""

    name: str
    error: float
    allowed: float
    same_special: bool

    @property
    def good(self) -> bool:
        return self.same_special and self.error <= self.allowed

    def __str__(self) -> str:
        special = "" if self.same_special else ", infinities or NaN elsewhere"
        return f"{self.name}: error {self.error:.3g}, allowed {self.allowed:.3g}{special}"


@functools.cache
def sdpa_error(dtype: torch.dtype, device: str = "cpu") -> float:
    """The error that torch's own SDPA makes in a dtype, forward and backward, as a share of the largest number.

    It is what `moda_attention` takes the place of. Its kernels compute weights again from lse in the backward, and on
    the CPU with exponentials of 20 bits, so softmax written out in PyTorch alone would be too strict a measure for any
    kernel built like it.
    """
    worst = 0.0
    for number in range(8):
        g = generator(number)
        q, k, v, upstream = (torch.randn(2, 4, 63, 16, generator=g).to(dtype).to(device) for _ in range(4))
        seen = (torch.rand(63, 63, generator=g) > 0.4).to(device) | torch.eye(63, dtype=torch.bool, device=device)

        def attend(
            wide: torch.dtype, inputs: tuple[Tensor, ...] = (q, k, v, upstream), seen: Tensor = seen
        ) -> list[Tensor]:
            query, key, value = leaves = [t.to(wide).requires_grad_() for t in inputs[:3]]
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=0.5)
            return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3].to(wide))]

        for got, right in zip(attend(dtype), attend(torch.float64), strict=True):
            worst = max(worst, _largest(got.double() - right) / _largest(right))
    return worst


def sdpa_errors(case: Case | Inputs, dtype: torch.dtype, *, seed: int = 0, **sizes: int) -> dict[str, float]:
    """As `sdpa_error`, on a case's own query, keys (aligned), value, scale, heads and mask; by the name of the tensor.

    The measure of a backend that is made of torch's kernel: on some CPUs its error grows several times faster than that
    of softmax written out, as scores do (float32, a scale of 0.7). Taken in each form that the kernel is called in:
    all keys, causal, and under a mask.
    """
    if dtype == torch.float64:  # judged by `FLOAT64_ULPS`
        return {}
    inputs = case.build(dtype, "cpu", seed=seed, **sizes) if isinstance(case, Case) else case
    tensors = {name: t.detach().to(dtype).double() for name, t in inputs.tensors.items()}
    q, k, v = (tensors[name] for name in ("query", "key", "value"))
    call = AttentionCall.make(q, k, v, **inputs.arguments(tensors))
    layout = call.layout
    if call.key_map is not None:
        k = reference.align_keys(k, call.key_map, layout).detach()
    seen = call.mask.visible_to(layout, call.queries)
    if layout.packed:
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        seen = seen[None]
    if call.scale == 0 or q.numel() == 0 or k.numel() == 0:
        return {}
    seen, added = seen[:, None], call.attn_mask
    if added is not None and added.dtype == torch.bool:
        seen, added = seen & added, None
    # (A row that sees nothing is made to see everything: there torch's kernels differ.)
    mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device)
    mask = mask.masked_fill(~seen & seen.any(-1, keepdim=True), float("-inf"))
    mask = (mask if added is None else mask + added).to(dtype).double()
    q = q if call.scale > 0 else -q
    size = max(q.shape[-1], v.shape[-1])  # the kernel takes one for all
    q, k, v = (F.pad(t, (0, size - t.shape[-1])) for t in (q, k, v))
    upstream = torch.randn(q.shape, generator=generator(seed + 2)).to(dtype).double()

    def attend(wide: torch.dtype, form: dict[str, Any]) -> dict[str, Tensor]:
        query, key, value = leaves = [t.to(dtype).to(wide).requires_grad_() for t in (q, k, v)]
        out = F.scaled_dot_product_attention(query, key, value, scale=abs(call.scale), enable_gqa=True, **form)
        grads = torch.autograd.grad(out, leaves, upstream.to(wide))
        return dict(zip(("out", "d query", "d key", "d value"), (out.detach(), *grads), strict=True))

    worst: dict[str, float] = {}
    forms: list[dict[str, Any]] = [{}, {"attn_mask": mask}]
    if q.shape[2] == k.shape[2]:
        forms.append({"is_causal": True})
    for form in forms:
        narrow = {name: x.to(dtype) if isinstance(x, Tensor) else x for name, x in form.items()}
        got, exact = attend(dtype, narrow), attend(torch.float64, form)
        # A gradient that is 0 but for rounding (one key a row) has no error that could be a share of it.
        nothing = torch.finfo(dtype).eps * max(map(_largest, exact.values()))
        for name, right in exact.items():
            if _largest(right) > nothing:
                share = _largest(got[name].double() - right) / _largest(right)
                worst[name] = max(worst.get(name, 0.0), share)
    return worst


def compare(
    result: Result,
    exact: Result,
    usual: Result | Sequence[Result],
    dtype: torch.dtype,
    kernel_errors: Mapping[str, float] | None = None,
) -> list[Comparison]:
    """Each tensor's error against the oracle: allowed is 2 × the error of eager PyTorch (`eager`, the largest, or SDPA
    where that is larger: `sdpa_error`) + 2 eps(dtype) × the largest exact number (float64, where the oracle itself is
    no finer: 512 eps).

    Args:
        kernel_errors: for a backend that is made of torch's kernel, what `sdpa_errors` says: a third yardstick (for lse
            and the gradients of parameters the largest of them).
    """
    runs = [usual] if isinstance(usual, Result) else usual
    ulps = FLOAT64_ULPS if dtype == torch.float64 else 2
    compared = []
    kernel_errors = kernel_errors or {}
    most = max(kernel_errors.values(), default=0.0)
    for name, right in exact.tensors.items():
        device = right.device
        got, *ours = (r.tensors[name].to(device, torch.float64) for r in (result, *runs))
        right = right.double()
        if got.shape != right.shape:
            raise AssertionError(f"{name}: shape {tuple(got.shape)}, the oracle has {tuple(right.shape)}")
        special = ~torch.isfinite(right)
        same = bool(torch.equal(torch.isfinite(got), ~special)) and bool(
            torch.equal(torch.nan_to_num(got[special], nan=7.0), torch.nan_to_num(right[special], nan=7.0))
        )
        difference, *differences = (_largest((t - right)[~special]) for t in (got, *ours))
        usual_difference = max(differences)
        largest = _largest(right[~special])
        if dtype != torch.float64:
            share = max(sdpa_error(dtype, device.type), kernel_errors.get(name, most))
            usual_difference = max(usual_difference, share * largest)
        allowed = 2 * usual_difference + ulps * torch.finfo(dtype).eps * largest
        compared.append(Comparison(name, difference, allowed, same))
    return compared


def _largest(x: Tensor) -> float:
    """The largest magnitude; NaN wins."""
    return float(x.abs().max()) if x.numel() else 0.0


def judge(case: Case | Inputs, dtype: torch.dtype, backend: str, **options: Any) -> list[Comparison]:
    """Run a case on a backend and compare it with the oracle. Options: as in `run`.

    Raises:
        NotImplementedError: the backend can't run the case.
    """
    return judged(run(case, dtype, backend, **options), case, dtype, backend, **options)


def judged(result: Result, case: Case | Inputs, dtype: torch.dtype, backend: str, **options: Any) -> list[Comparison]:
    """`judge` of what a case gave on a backend, whoever ran it (in parts, say, on several processes)."""
    exact, usual = oracle(case, dtype, **options), eager(case, dtype, **options)
    kernel_errors: dict[str, float] = {}
    if backend in MADE_OF_SDPA and torch.device(options.get("device", "cpu")).type == "cpu":
        sizes = {name: value for name, value in options.items() if name != "device"}
        kernel_errors = sdpa_errors(case, dtype, **sizes)
        if kernel_errors:
            usual += [_with_kernel_error(case, dtype, exact, kernel_errors, i, **sizes) for i in range(DRAWS)]
    return compare(result, exact, usual, dtype, kernel_errors)


def _with_kernel_error(
    case: Case | Inputs,
    dtype: torch.dtype,
    exact: Result,
    errors: dict[str, float],
    draw: int,
    *,
    seed: int = 0,
    **sizes: int,
) -> Result:
    """What the error of torch's kernel does to all other tensors: the oracle, where query, key and value have come with
    it, in one draw of it. (Gradients of a few parameters are sums over all rows, which may cancel: a share of their own
    size is no measure.)"""
    inputs = case.build(dtype, "cpu", seed=seed, **sizes) if isinstance(case, Case) else case
    g, size, tensors = generator(DRAWS * seed + draw + 3), max(errors.values()), dict(inputs.tensors)
    for name in ("query", "key", "value"):
        wide = tensors[name].double()
        tensors[name] = wide * (1 + size * torch.randn(wide.shape, generator=g, dtype=wide.dtype))
    found = run(dataclasses.replace(inputs, tensors=tensors), dtype, "reference", compute=torch.float64, seed=seed)
    return Result({name: exact.tensors[name] if name in errors else t for name, t in found.tensors.items()})


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, so that whatever a kernel does not write shows."""
    empty = torch.empty

    def poisoned(*arguments: Any, **named: Any) -> Tensor:
        made = empty(*arguments, **named)
        # Detached, since torch's own code makes leaves with it (torch 2.11's checkpoint does).
        made.detach().fill_(math.nan if made.is_floating_point() else 2**30)
        return made

    torch.empty = poisoned
    try:
        yield
    finally:
        torch.empty = empty


def check(case: Case | Inputs, dtype: torch.dtype, backend: str, **options: Any) -> list[Comparison]:
    """`judge` a case and raise where a backend is worse than the criterion allows. Options: as in `run`.

    Raises:
        AssertionError: naming every tensor that is off. NotImplementedError: the backend can't run the case.
    """
    compared = judge(case, dtype, backend, **options)
    wrong = [str(c) for c in compared if not c.good]
    if wrong:
        raise AssertionError(f"{case} in {dtype} on {backend!r}: " + "; ".join(wrong))
    return compared
