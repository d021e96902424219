"""Kernels that are tried before they are trusted, with faults put in: a wrong number, an exception, NaN.

Triton's interpreter stands for a GPU: "triton" serves the CPU here, and MODA_KERNELS_SELF_CHECK=1 has it tried.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import moda_kernels as mk
from moda_kernels import backends, products, testing
from moda_kernels.backends import trust
from moda_kernels.runtime import gpu, self_check

if gpu.why_absent() or not gpu.interpreted():
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

from moda_kernels.backends.triton import launch
from moda_kernels.products import kernels

MASK = mk.ModularMask.causal(2)
LAYOUT = mk.segment_modalities(torch.tensor([[0, 0, 1, 1, 0, 1, 0, 0]]), num_modalities=2)


@pytest.fixture(autouse=True)
def tried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`auto` takes "triton" on the CPU, unless it fails its trial; "flex" runs uncompiled."""
    for name in ("triton", "flex"):
        monkeypatch.setattr(type(backends.BACKENDS[name]), "serves", lambda self, device: True)
    monkeypatch.setattr(self_check, "_found", {})
    monkeypatch.setattr(trust, "LENGTH", 41)
    monkeypatch.setenv(self_check.ENVIRONMENT, "1")
    monkeypatch.delenv("MODA_KERNELS_BACKEND", raising=False)
    with testing.eager_flex():
        yield


def chosen(grad: bool = False, **options: Any) -> str:
    from moda_kernels.call import AttentionCall

    q = torch.randn(1, 2, 8, 16, requires_grad=grad)
    call = AttentionCall.make(q, q.detach(), q.detach(), layout=LAYOUT, mask=MASK, **options)
    return backends.choose(call, None).name


def test_what_is_right_is_trusted_and_tried_once(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    trials = []
    trial = trust._trial
    monkeypatch.setattr(trust, "_trial", lambda kernel, *rest: trials.append(kernel) or trial(kernel, *rest))
    for _ in range(2):
        assert chosen(grad=True) == "triton" and chosen() == "triton"
    assert trials == ["forward", "backward"]
    assert chosen(pseudo=mk.PseudoAttention()) == "triton" and trials[2:] == ["forward"]
    assert not caplog.records


def spoiled(run: Callable[..., Any], how: str) -> Callable[..., Any]:
    def changed(*arguments: Any, **named: Any) -> Any:
        if how == "exception":
            raise RuntimeError("an illegal memory access was encountered\nmore of it")
        found = run(*arguments, **named)
        first = found if isinstance(found, Tensor) else found[0]
        flat = first.view(-1)
        flat[flat.numel() // 2] += math.nan if how == "NaN" else 0.01
        return found

    return changed


@pytest.mark.parametrize("how", ["wrong number", "exception", "NaN"])
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_what_is_wrong_is_told_once_and_left_alone(
    kernel: str, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(launch, kernel, spoiled(getattr(launch, kernel), how))
        assert chosen(grad=True) == "flex"
    assert chosen(grad=True) == "flex", "what was found is kept"
    (said,) = (record.getMessage() for record in caplog.records)
    for part in (kernel, "float32", "D=16", "report", "doctor", self_check.ENVIRONMENT):
        assert part in said
    assert {"wrong number": "is off by", "exception": "illegal memory access", "NaN": "NaN"}[how] in said
    assert "more of it" not in said
    # Other kinds of kernels are other questions; who names it, gets it.
    assert chosen() == ("flex" if kernel == "forward" else "triton")
    x = torch.randn(1, 2, 8, 16)
    with mk.use_backend("triton"):
        assert torch.isfinite(mk.moda_attention(x, x, x, layout=LAYOUT, mask=MASK)).all()


def test_without_flex_it_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "forward", spoiled(launch.forward, "NaN"))
    for name in ("flex", "cpu"):
        monkeypatch.setattr(type(backends.BACKENDS[name]), "serves", lambda self, device: False)
    assert chosen() == "reference"


def test_decoding_is_a_kind_of_its_own(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from moda_kernels.backends.triton import launch_decode, plan

    monkeypatch.setattr(plan, "DECODE_FROM", 4)
    monkeypatch.setattr(launch_decode, "decode", spoiled(launch_decode.decode, "wrong number"))
    from moda_kernels.call import AttentionCall

    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 8, 16)
    assert backends.choose(AttentionCall.make(q, k, k, layout=LAYOUT, mask=MASK), None).name == "flex"
    assert "decode" in caplog.text
    monkeypatch.setattr(plan, "DECODE_FROM", 256)
    assert chosen() == "triton"


@pytest.mark.parametrize("kernel", ["Gram", "projection"])
def test_products_have_their_twin(kernel: str, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    name = {"Gram": "segment_gram", "projection": "segment_project"}[kernel]
    monkeypatch.setattr(kernels, name, spoiled(getattr(kernels, name), "wrong number"))
    x, group = torch.randn(60, 2, 16), torch.arange(60) // 20
    with mk.use_backend("triton"):
        gram = products.segment_gram(x, x, group, 3)
        projected = products.segment_project(x, gram, group)
    monkeypatch.undo()
    torch.testing.assert_close(gram, products.segment_gram(x, x, group, 3))
    torch.testing.assert_close(projected, products.segment_project(x, gram, group))
    (said,) = (record.getMessage() for record in caplog.records)
    assert kernel in said


def test_nothing_is_tried_in_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert chosen() == "flex"
    monkeypatch.undo()
    assert not self_check._found


def test_when_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu_device = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(self_check, "architecture", lambda device: "sm_90" if device.type == "cuda" else device.type)
    said = {}
    for value in ("", "0", "1"):
        monkeypatch.setenv(self_check.ENVIRONMENT, value)
        said[value] = [self_check.wanted(cpu), self_check.wanted(gpu_device)]
    assert said == {"": [False, True], "0": [False, False], "1": [True, True]}
    monkeypatch.setenv(self_check.ENVIRONMENT, "")
    monkeypatch.setattr(self_check, "PROVEN", frozenset({"sm_90"}))
    assert not self_check.wanted(gpu_device)
    monkeypatch.setenv(self_check.ENVIRONMENT, "yes")
    with pytest.raises(ValueError, match=r"MODA_KERNELS_SELF_CHECK: expected one of '0', '1', got 'yes'"):
        self_check.wanted(cpu)
