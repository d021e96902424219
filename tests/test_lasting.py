"""Layouts that were made, or used first, in inference mode: training goes on with them as with any other."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import moda_kernels as mk
from moda_kernels import backends, testing
from moda_kernels.testing import CASES, Case, Inputs

BY_NAME = {case.name: case for case in CASES}

#: Some of all that is remembered: sorted tokens, pieces, query rows, numbers per head, walks, counts, block masks.
SAMPLE = ("key_map_concat_causal", "key_map_released", "queries_int", "packed_split", "packed_chunks_source")


def engine(backend: str) -> Any:
    return testing.eager_flex() if backend == "flex" else contextlib.nullcontext()


def train_after_inference(backend: str, case: Case, make: Callable[[], Inputs]) -> None:
    with engine(backend):
        usual = testing.run(case.build(length=12), torch.float32, backend)
        inputs = make()
        with torch.inference_mode(), mk.use_backend(backend):
            out, lse = inputs.call(inputs.tensors, backend=backend)
        got = testing.run(inputs, torch.float32, backend)
    torch.testing.assert_close((out, lse), (usual.tensors["out"], usual.tensors["lse"]))
    for name, expected in usual.tensors.items():
        torch.testing.assert_close(got.tensors[name], expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.parametrize("backend", [name for name in backends.BACKENDS if name != "triton"])
def test_used_in_inference_mode_first(backend: str, name: str) -> None:
    case = BY_NAME[name]
    train_after_inference(backend, case, lambda: case.build(length=12))


def test_used_in_inference_mode_first_by_kernels() -> None:
    """One case: interpreted kernels take long."""
    case = BY_NAME["queries_int"]
    train_after_inference("triton", case, lambda: case.build(length=12))


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_every_case_used_in_inference_mode_first(backend: str, case: Case) -> None:
    try:
        train_after_inference(backend, case, lambda: case.build(length=12))
    except NotImplementedError as refused:
        pytest.skip(str(refused))


@pytest.mark.parametrize("backend", ("reference", "cpu"))
def test_made_in_inference_mode(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Case.layout
    case = BY_NAME["key_map_concat_causal"]

    def make() -> Inputs:
        with monkeypatch.context() as patch:
            patch.setattr(Case, "layout", torch.inference_mode()(plain))
            return case.build(length=12)

    train_after_inference(backend, case, make)


@pytest.mark.parametrize("library", (mk, mk.reference), ids=("package", "reference"))
def test_nothing_of_a_layout_is_an_inference_tensor(library: Any) -> None:
    with torch.inference_mode():
        ids = torch.tensor([[0, 0, 1, 1, -1]])
        layout = library.segment_modalities(ids, item_ids=ids, steps=torch.zeros_like(ids), chunks=ids)
        block_mask = mk.ModularMask.causal(2).to_block_mask(layout)
        found = [layout, layout.queries(2), layout.grouping("segment"), layout.to("cpu"), block_mask.as_tuple()]
        assert torch.is_inference_mode_enabled() and (ids + 1).is_inference()
    for each in found:
        kept = each if isinstance(each, tuple) else vars(each).values()
        assert not any(x.is_inference() for x in kept if isinstance(x, Tensor)), each
