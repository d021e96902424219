"""Random calls, every option at once: each backend against the reference, the reference against a second oracle.

A failure is a line for the shell that repeats the one call. `make fuzz` runs more of them.
"""

import contextlib
import dataclasses
import math
import warnings

import pytest
import torch

from moda_kernels import backends, testing
from moda_kernels.backends.cpu import rectangles
from moda_kernels.testing import fuzz, interpreter
from moda_kernels.testing.__main__ import main

#: Calls of each backend, and in how many tests, so that these can be spread over processes.
CALLS = {"reference": 500, "cpu": 500, "flex": 500, "triton": 500}
TESTS = 20


def _in_short(backend: str, on_gpu: bool) -> contextlib.AbstractContextManager[None]:
    """Lengths of up to 48 tokens overflow no integers."""
    interpreted = backend == "triton" and not on_gpu
    return interpreter.unchecked_integers() if interpreted else contextlib.nullcontext()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(TESTS))
@pytest.mark.parametrize("backend", CALLS)
def test_random_calls(backend: str, part: int) -> None:
    absent = backends.BACKENDS[backend].why_absent()
    if absent:
        pytest.skip(f"{backend}: {'; '.join(absent)}")
    on_gpu = backend == "triton" and torch.cuda.is_available()
    count = CALLS[backend] // TESTS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of the interpreter's numpy: 1 / 0 where nothing is seen
        with testing.eager_flex() if backend == "flex" else _in_short(backend, on_gpu):
            faults, refused = fuzz.trials(part * count, count, backend, "cuda" if on_gpu else "cpu")
    assert not faults, "\n" + "\n".join(faults)
    assert refused == 0, "calls that are refused show nothing: draw others"


def test_every_option_is_drawn() -> None:
    """Over the calls of the gate each option comes up, alone and with others."""
    calls = [fuzz.draw(seed) for seed in range(CALLS["reference"])]
    said = {
        "packed": sum(call.tokens.packed for call in calls),
        "roles": sum(call.tokens.roles is not None for call in calls),
        "steps": sum(call.tokens.steps is not None for call in calls),
        "chunks": sum(call.tokens.chunks is not None for call in calls),
        "items": sum(call.tokens.item_ids is not None for call in calls),
        "no tokens": sum(call.tokens.modality_ids.numel() == 0 for call in calls),
        "padding alone": sum(bool((call.tokens.modality_ids < 0).all()) for call in calls),
        "fewer queries": sum("query_start" in call.options for call in calls),
        "cu_seqlens_q": sum("cu_seqlens_q" in call.options for call in calls),
        "raw ids": sum(call.raw_ids for call in calls),
        "endless pseudo scores": sum(call.pseudo is not None and call.pseudo["length"] == math.inf for call in calls),
        "split with weights": sum(call.weights is not None for call in calls),
        "no gradients": sum(call.fixed == frozenset(call.tensors) for call in calls),
        "a negative scale": sum(call.options.get("scale", 1) < 0 for call in calls),
        "no scale": sum(call.options.get("scale") == 0 for call in calls),
        "window on all": sum(call.mask is not None and call.mask.window_on == "all" for call in calls),
        "NaN in padding": sum(bool(call.tensors["key"].isnan().any()) for call in calls),
        "strides": sum(call.tensors["query"].stride(-1) not in (0, 1) for call in calls),
        "expanded": sum(0 in call.tensors["value"].stride() for call in calls),
        "attn_mask": sum("attn_mask" in call.tensors or call.attn_mask is not None for call in calls),
        "pair bias": sum("pair_bias" in call.tensors for call in calls),
    }
    for fusion in ("add", "linear", "concat", "released"):
        said[fusion] = sum(call.aligner is not None and call.aligner["fusion"] == fusion for call in calls)
    rare = {name: count for name, count in said.items() if count < 5}
    assert not rare, rare


def test_a_seed_is_a_call() -> None:
    first, again = (fuzz.draw(17, "cpu") for _ in range(2))
    assert str(first) == str(again)
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor.nan_to_num(), again.tensors[name].nan_to_num()), name


def test_a_fault_is_a_line_that_repeats_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # A merge that forgets one part's weight.
    merge = rectangles._merge_into

    def forgetful(out, lse, rows, parts, has_extra):  # type: ignore[no-untyped-def]
        merge(out, lse, rows, [(o, s + (i > 0) * 0.01) for i, (o, s) in enumerate(parts)], has_extra)

    monkeypatch.setattr(rectangles, "_merge_into", forgetful)
    assert main(["--backend", "cpu", "--seed", "0", "--calls", "40"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("40 calls on 'cpu' in ")
    named = [line for line in lines if line.startswith("make fuzz BACKEND=cpu SEED=")]
    assert named and all("error" in line and "allowed" in line for line in named)
    seed = named[0].partition("SEED=")[2].partition(" ")[0]
    assert main(["--backend", "cpu", "--seed", seed, "--calls", "1"]) == 1
    monkeypatch.undo()
    assert main(["--backend", "cpu", "--seed", seed, "--calls", "1"]) == 0


def test_the_reference_is_judged_by_another_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that the package gets wrong everywhere alike shows all the same."""
    draw = fuzz.draw

    def other_window(*arguments):  # type: ignore[no-untyped-def]
        call = draw(*arguments)
        wrong = call.inputs
        mask = dataclasses.replace(call.mask, window=2) if call.mask is not None and call.mask.window else call.mask
        object.__setattr__(call, "inputs", lambda *makers: dataclasses.replace(call, mask=mask).inputs(*makers))
        assert wrong is not call.inputs
        return call

    monkeypatch.setattr(fuzz, "draw", other_window)
    faults, _ = fuzz.trials(0, 40, "reference")
    assert faults
