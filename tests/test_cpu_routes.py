"""16 bits on the CPU: both routes are right, one is chosen by measurement, once, and kept where that can be."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import moda_kernels as mk
from moda_kernels import testing
from moda_kernels.__main__ import main
from moda_kernels.backends.cpu import routes

BFLOAT16, FLOAT16 = routes.DTYPES


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget = routes.choice.cache_clear
    forget()
    yield
    forget()


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], list[torch.dtype]]:
    """Sets what is measured; returns of which dtypes it was."""

    def given(own: float, wide: float) -> list[torch.dtype]:
        asked: list[torch.dtype] = []
        monkeypatch.setattr(
            routes, "_measure", lambda dtype: asked.append(dtype) or dict.fromkeys(routes.KINDS, (own, wide))
        )
        return asked

    return given


@pytest.mark.parametrize("dtype", routes.DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["joint_interleaved", "pseudo_split", "attn_mask_fixed", "packed_queries", "joint_gqa"]
)
def test_both_routes_are_right(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in testing.CASES if case.name == name)
    for route in (routes.OWN, routes.FLOAT32):
        monkeypatch.setenv(routes.ENVIRONMENT, route)
        assert routes.widens(dtype, False, 8) == (route == routes.FLOAT32)
        testing.check(case, dtype, "cpu", length=40)


def test_one_call_goes_by_its_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward as it is, backward in float32: the gradient is not that of torch's own graph."""
    routed = dict.fromkeys(routes.KINDS, routes.OWN) | {"backward, short": routes.FLOAT32}
    monkeypatch.setattr(routes, "choice", lambda dtype, mode: routes.Choice(routed, ""))
    layout = mk.segment_modalities(torch.zeros(1, 30, dtype=torch.long), num_modalities=2)
    leaves = [torch.randn(1, 2, 30, 8, dtype=BFLOAT16, requires_grad=True) for _ in range(3)]
    seen = []
    monkeypatch.setattr(
        "moda_kernels.backends.cpu.kernel.backward",
        lambda *a, run=routes.kernel.backward, **more: seen.append(a[0].dtype) or run(*a, **more),
    )
    out = mk.moda_attention(*leaves, layout=layout, is_causal=True, backend="cpu")
    grads = torch.autograd.grad(out.float().sum(), leaves)
    assert seen == [torch.float32] and {g.dtype for g in (out, *grads)} == {BFLOAT16}


def test_what_is_wide_has_no_route() -> None:
    assert not any(routes.widens(dtype, back, 9) for dtype in (torch.float32, torch.float64) for back in (False, True))


@pytest.mark.parametrize(("own", "wide", "route"), [(1.0, 0.5, routes.FLOAT32), (1.0, 2.0, routes.OWN)])
def test_the_faster_one_is_kept(own: float, wide: float, route: str, times: Callable[..., list[torch.dtype]]) -> None:
    asked = times(own, wide)
    assert set(routes.choice(BFLOAT16, "measure").routes.values()) == {route}
    routes.choice.cache_clear()  # another process
    again = routes.choice(BFLOAT16, "measure")
    assert asked == [BFLOAT16] and set(again.routes.values()) == {route} and "before" in again.why
    routes.choice(FLOAT16, "measure")
    assert asked == [BFLOAT16, FLOAT16] and len(json.loads(routes.cache_file().read_text())) == 2


def test_what_is_close_goes_by_features(times: Callable[..., list[torch.dtype]]) -> None:
    times(1.0, 0.95)
    assert routes.choice(BFLOAT16, "measure").routes == routes.choice(BFLOAT16, "features").routes


@pytest.mark.parametrize("content", ["", "[]", "{", '{"%s": 3}', '{"%s": {"forward, short": [1]}}'])
def test_a_file_that_says_nothing_is_measured_anew(content: str, times: Callable[..., list[torch.dtype]]) -> None:
    asked = times(1.0, 0.5)
    routes.cache_file().parent.mkdir(parents=True)
    routes.cache_file().write_text(content.replace("%s", routes._key(FLOAT16)))
    routes.choice(FLOAT16, "measure")
    assert asked == [FLOAT16] and routes._read(FLOAT16) == dict.fromkeys(routes.KINDS, (1.0, 0.5))


def test_no_folder_and_no_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))

    def fails(dtype: torch.dtype) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(routes, "_measure", fails)
    made = routes.choice(FLOAT16, "measure")
    assert made.routes == routes.choice(FLOAT16, "features").routes and "no such kernel" in made.why
    routes._write(FLOAT16, dict.fromkeys(routes.KINDS, (1.0, 0.5)))
    assert routes._read(FLOAT16) is None


def test_a_measurement_leaves_threads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "_SIZES", {"few rows": (2, 1, 16), "short": (2, 8, 8), "long": (2, 16, 16)})
    before = torch.get_num_threads()
    found = routes._measure(BFLOAT16)
    assert set(found) == set(routes.KINDS) and all(t > 0 for pair in found.values() for t in pair)
    assert torch.get_num_threads() == before


def test_another_name_is_refused(monkeypatch: pytest.MonkeyPatch, refused: Callable[..., None]) -> None:
    monkeypatch.setenv(routes.ENVIRONMENT, "bfloat16")
    layout, q = torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 1, 4, 8, dtype=BFLOAT16)
    call = lambda: mk.moda_attention(q, q, q, layout=layout, backend="cpu")  # noqa: E731
    refused(call, ValueError, [routes.ENVIRONMENT, "features", "bfloat16"])


def test_doctor_says_what_was_chosen_and_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], times: Callable[..., list[torch.dtype]]
) -> None:
    times(2.5, 0.5)
    monkeypatch.setenv(routes.ENVIRONMENT, "measure")
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "in float32: all" in printed and "backward, long 2.50 or 0.50 ms" in printed
