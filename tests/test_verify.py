"""`python -m moda_kernels verify`: finds what is wrong, says so in its exit code, covers what the parity suite does."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moda_kernels import __main__ as command_line
from moda_kernels import backends, reference, testing
from moda_kernels.backends.cpu import kernel
from moda_kernels.call import AttentionCall
from moda_kernels.commands import verify

QUICK = ["verify", "--device", "cpu", "--quick", "--dtypes", "float32"]


class Other(backends.ReferenceBackend):
    """The reference under another name, with a fault that a test gives it."""

    name = "other"

    def __init__(self, **faults: Any) -> None:
        self.faults = faults

    def why_absent(self) -> list[str]:
        return self.faults.get("absent", [])

    def why_not(self, call: AttentionCall) -> list[str]:
        return ["no split softmax"] if self.faults.get("no_split") and call.split else []

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        if self.faults.get("raises"):
            raise RuntimeError("illegal memory access\nand more")
        out, lse = reference.attend(call)
        if self.faults.get("lse_gradient"):
            lse = lse.detach() + 1.01 * (lse - lse.detach())
        return out * (1 + self.faults.get("off", 0.0)), lse


def run_with(monkeypatch: pytest.MonkeyPatch, *options: str, **faults: Any) -> int:
    monkeypatch.setitem(backends.BACKENDS, "other", Other(**faults))
    return command_line.main([*QUICK, "--backends", "other", "--features", "masks;split;packed documents", *options])


def test_what_is_right_passes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with(monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "other cpu float32" in printed and "Right. 3 runs" in printed and "WRONG" not in printed


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ({"off": 1e-4}, "masks on other cpu float32: joint_full, 63 tokens, D = 16: out: error"),
        ({"off": float("nan")}, "infinities or NaN elsewhere"),
        ({"lse_gradient": True}, "joint_full, 63 tokens, D = 16: d query: error"),
        ({"raises": True}, "RuntimeError: illegal memory access\n"),
    ],
)
def test_what_is_wrong_fails_and_is_named(
    faults: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(monkeypatch, **faults) == 1
    printed = capsys.readouterr().out
    assert said in printed and "WRONG: see above." in printed


def test_what_is_refused_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "made" / "verify.jsonl"
    assert run_with(monkeypatch, "--out", str(out), no_split=True) == 0
    assert "Refused (split): other: no split softmax" in capsys.readouterr().out
    records = {r["feature"]: r for r in map(json.loads, out.read_text().splitlines())}
    assert records["split"]["ran"] == 0 and records["split"]["refused"] == ["other: no split softmax"]
    assert records["masks"]["ran"] == 1 and 0 <= records["masks"]["worst_share"] <= 1 and not records["masks"]["faults"]


def test_what_is_absent_is_named_and_nothing_run_is_no_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(monkeypatch, absent=["no driver", "no luck"]) == 2
    printed = capsys.readouterr().out
    assert (
        "Not here: other: no driver" in printed and "Not here: other: no luck" in printed and "Nothing ran" in printed
    )


def test_time_that_is_over_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with(monkeypatch, "--seconds", "-1") == 2
    assert "3 runs left out: -1 s were over" in capsys.readouterr().out


def test_the_cpu_backend_is_right_in_every_feature(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main([*QUICK, "--backends", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert all(feature in printed for feature in verify.FEATURES) and "not run" not in printed


@pytest.mark.parametrize(
    "fault",
    [
        lambda out, lse: (out * (1 + 2e-5), lse),
        lambda out, lse: (out, lse * (1 + 2e-5)),
        lambda dq, dk, dv: (dq, dk * (1 + 4e-5), dv),
        lambda dq, dk, dv: (dq, dk, dv * (1 - 4e-5)),
    ],
    ids=["out", "lse", "d key", "d value"],
)
def test_a_fault_around_the_kernel_is_found(
    fault: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Torch's kernel is a yardstick, so what is done with its results must not hide behind its error."""
    name = "forward" if fault.__code__.co_argcount == 2 else "backward"
    run = getattr(kernel, name)
    monkeypatch.setattr(kernel, name, lambda *args, **kwargs: fault(*run(*args, **kwargs)))
    assert command_line.main([*QUICK, "--backends", "cpu", "--features", "masks;value size, scale;split"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG, value size, scale on cpu cpu float32: joint_scale" in printed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernels_own_error_is_small_and_0_is_no_measure(dtype: torch.dtype) -> None:
    for case in testing.CASES:
        errors = testing.sdpa_errors(case, dtype)
        assert all(error <= 64 * torch.finfo(dtype).eps for error in errors.values()), (case, errors)
    (alone,) = [case for case in testing.CASES if case.name == "joint_length_one"]
    assert set(testing.sdpa_errors(alone, dtype)) == {"out", "d value"}
    assert testing.sdpa_errors(alone, torch.float64) == {}


def test_every_case_belongs_to_a_feature_and_every_feature_has_cases() -> None:
    cases = [case for feature in verify.FEATURES for case in verify.cases_of(feature)]
    assert sorted(case.name for case in cases) == sorted(case.name for case in testing.CASES)
    assert all(verify.cases_of(feature) for feature in verify.FEATURES)


def test_features_are_named_with_commas_and_all() -> None:
    assert verify._names("concat, causal scope") == ("concat, causal scope",)
    assert verify._names("masks; concat, causal scope") == ("masks", "concat, causal scope")
    assert verify._names("float32,bfloat16") == ("float32", "bfloat16")


def test_scores_keep_their_size_with_the_head_size(monkeypatch: pytest.MonkeyPatch) -> None:
    scales = []
    judge = testing.judge
    monkeypatch.setattr(testing, "judge", lambda case, *a, **k: scales.append(case.scale) or judge(case, *a, **k))
    (case,) = [case for case in testing.CASES if case.name == "joint_scale"]
    verify._judge(verify.Outcome(), case, ("cpu", "cpu", "float32"), (20, 64), 0)
    assert set(scales) == {0.35}


@pytest.mark.parametrize("option", ["--backends", "--features", "--dtypes"])
def test_unknown_names_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["verify", option, "no such thing"]) == 2
    assert f"{option}: expected names of" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["verify", "--foo", "3"], ["--foo=3", "verify"]])
def test_unknown_options_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command_line.main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "usage: python -m moda_kernels verify" in said
    assert "expected options of verify (--help, --backends," in said and re.search(r"got --foo[ =]3$", said.rstrip())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["verify", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_all_is_right_on_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    code = command_line.main(["verify", "--device", "cuda", "--quick", "--dtypes", "bfloat16", "--seconds", "60"])
    printed = capsys.readouterr().out
    assert code in (0, 2) and "WRONG" not in printed, printed


def test_flex_is_named_and_says_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    """On the CPU the engine has no backward, and all that is verified has one."""
    assert (
        command_line.main(["verify", "--backends", "flex,cpu", "--device", "cpu", "--quick", "--features", "split"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "flex cpu float32" in printed
    assert "Refused (split): flex: FlexAttention has no backward on the CPU" in printed or "Not here: flex" in printed
