"""The doctor: a report of what runs here, a self-check, and an exit code that means it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import moda_kernels
from moda_kernels import backends
from moda_kernels.__main__ import main
from moda_kernels.call import AttentionCall
from moda_kernels.commands import doctor
from moda_kernels.runtime import backend_name, native


def test_report(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backend_name.ENVIRONMENT, raising=False)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for part in ("Installed", "Machine", "Native extension", "Backends", "Environment", "Self-check"):
        assert f"\n{part}" in printed
    for part in (
        moda_kernels.__version__,
        torch.__version__,
        "triton",
        "numpy",
        "matplotlib",
        "scikit-learn",
        "threads",
    ):
        assert part in printed
    assert all(f"\n  {name} " in printed for name in backends.BACKENDS)
    assert backend_name.ENVIRONMENT in printed and "MODA_KERNELS_NATIVE" in printed
    assert "largest error" in printed
    assert printed.rstrip().endswith("Attention runs here.")
    assert max(map(len, printed.splitlines())) <= 160


def test_native_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_not", lambda kind: None if kind == "cpu" else "no compiler")
    monkeypatch.setattr(native, "build_info", lambda: {"made of": "stone"})
    assert doctor.native_extension() == [("cpu", "runs here"), ("cuda", "no: no compiler"), ("made of", "stone")]


def test_auto_is_what_a_call_gets() -> None:
    call = doctor.sample_call("cpu")
    assert doctor.taken("cpu", "auto") == backends.choose(call, "auto").name
    assert doctor.taken("cpu", "reference") == "reference"


class Broken:
    """A backend that computes something else, or nothing."""

    name = "broken"

    def __init__(self, absent: str | None) -> None:
        self.absent = absent

    def serves(self, device: torch.device) -> bool:
        return True

    def why_absent(self) -> list[str]:
        return [self.absent] if self.absent else []

    def why_not(self, call: AttentionCall) -> list[str]:
        return []

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        return torch.full_like(call.query, float("nan")), call.query[..., 0]


@pytest.mark.parametrize(("absent", "said"), [("it was never built", "it was never built"), (None, "WRONG")])
def test_bad_news(
    absent: str | None, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "BACKENDS", {"broken": Broken(absent)})
    monkeypatch.delenv(backend_name.ENVIRONMENT, raising=False)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert said in printed and "does not run here as it should" in printed


def test_unknown_backend_in_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(backend_name.ENVIRONMENT, "nonsense")
    assert main(["doctor"]) == 1
    assert "nonsense" in capsys.readouterr().out


def test_named_backend_is_the_one_checked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend_name.ENVIRONMENT, "reference")
    assert main(["doctor"]) == 0
    assert "reference backend, largest error" in capsys.readouterr().out


def test_system_files(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nmodel name\t: Abacus 9: fast\nmodel name\t: Abacus 9: fast\n")
    assert doctor.cpu_model(cpuinfo) == "Abacus 9: fast"
    assert doctor.cpu_model(tmp_path / "none")
    assert doctor.driver(tmp_path / "none") == "unknown"
    cpuinfo.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.1  Mon\nGCC version: 12\n")
    assert doctor.driver(cpuinfo) == "NVIDIA UNIX x86_64 Kernel Module  580.1  Mon"


@pytest.mark.parametrize("arguments", [[], ["nonsense"]])
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: python -m moda_kernels" in capsys.readouterr().err
