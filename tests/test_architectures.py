"""Which table a GPU takes, and where the Triton kernels refuse to run; on GPUs that are none."""

import types
from collections.abc import Iterator

import pytest
import torch

from moda_kernels import backends
from moda_kernels.runtime import architectures, gpu
from moda_kernels.runtime.architectures import KNOWN, TABLES, Target, architecture, table_of

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("target", "table"),
    [(80, 80), (86, 86), (87, 86), (88, 86), (89, 86), (90, 90), (100, 100), (101, 100), (103, 100), (110, 100),
     (120, 120), (121, 120), (130, 120), ("gfx90a", "gfx942"), ("gfx942", "gfx942"), ("gfx1100", "gfx942")],
)  # fmt: skip
def test_tables(target: Target, table: Target) -> None:
    assert table_of(target) == table


def test_a_table_fits_whatever_takes_it() -> None:
    for known in KNOWN.values():
        assert known.table in TABLES and known.shared >= KNOWN[known.table].shared


@pytest.mark.parametrize(("capability", "table"), [((8, 0), 80), ((8, 9), 86), ((9, 0), 90), ((12, 0), 120)])
def test_a_device_of_cuda(capability: tuple[int, int], table: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert architecture(GPU) == table


def test_a_device_of_rocm_never_takes_hoppers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    named = types.SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: named)
    assert architecture(GPU) == "gfx942" and architectures.gcn_name(0) == "gfx942"


@pytest.fixture
def looked_at_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process without the interpreter; what it says of itself is not remembered."""
    pytest.importorskip("triton")
    monkeypatch.setattr(gpu, "interpreted", lambda: False)
    gpu.why_absent.cache_clear()
    yield
    gpu.why_absent.cache_clear()


@pytest.mark.usefixtures("looked_at_anew")
@pytest.mark.parametrize("kind", ["rocm", "xpu"])
def test_triton_refuses_where_it_never_ran(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, and `auto` asks the next one."""
    device, word = (GPU, "ROCm 6.4") if kind == "rocm" else (torch.device("xpu", 0), "XPU")
    monkeypatch.setattr(torch.version, "hip", "6.4" if kind == "rocm" else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: kind == "rocm")
    monkeypatch.setattr(torch.xpu, "is_available", lambda: kind == "xpu")
    assert word in gpu.why_absent()[0] and not gpu.runs_on(device)
    monkeypatch.setattr(backends.FlexBackend, "why_absent", lambda self: [])
    monkeypatch.setattr(backends.FlexBackend, "why_not", lambda self, call: [])
    call = types.SimpleNamespace(query=types.SimpleNamespace(device=device))
    with pytest.raises(NotImplementedError, match=f"triton: .*{word}"):
        backends.choose(call, "triton")  # type: ignore[arg-type]
    assert backends.choose(call, "auto").name == "flex"  # type: ignore[arg-type]
