"""`parameter_groups`: aligners' weights at a rate of their own."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import moda_kernels as mk
from moda_kernels.alignment.released import ReleasedAligner
from moda_kernels.alignment.training import RATE


class Layer(nn.Module):
    def __init__(self, aligner: nn.Module) -> None:
        super().__init__()
        self.linear, self.aligner = nn.Linear(4, 4), aligner


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Embedding(3, 4), Layer(mk.DuplexAligner(4, 2, fusion="linear")), Layer(ReleasedAligner(4)), nn.LayerNorm(4)
    )


def test_every_parameter_is_in_one_group() -> None:
    made = model()
    others, aligners = mk.parameter_groups(made, 0.02)
    assert others["lr"] == 0.02 and "weight_decay" not in others
    assert aligners["lr"] == 0.02 * RATE and aligners["weight_decay"] == 0
    names = {id(p): name for name, p in made.named_parameters()}
    assert {names[id(p)] for p in aligners["params"]} == {name for name in names.values() if "aligner" in name}
    found = [names[id(p)] for group in (others, aligners) for p in group["params"]]
    assert sorted(found) == sorted(names.values())
    assert mk.parameter_groups(made, 0.02, rate=0.5)[1]["lr"] == 0.01
    assert mk.parameter_groups(made, 0.02, rate=0)[1]["lr"] == 0


def test_groups_that_a_model_has() -> None:
    assert [len(group["params"]) for group in mk.parameter_groups(nn.Linear(2, 2), 1)] == [2]
    (own,) = mk.parameter_groups(mk.DuplexAligner(4, 2, fusion="concat"), 1)
    assert own["lr"] == RATE
    assert mk.parameter_groups(nn.Identity(), 1.0) == []


def test_shared_and_wrapped_aligners_count_once() -> None:
    aligner = mk.DuplexAligner(4, 2)
    made = torch.nn.DataParallel(nn.ModuleList([Layer(aligner), Layer(aligner)]))
    others, own = mk.parameter_groups(made, 1.0)
    assert len(own["params"]) == 1 and own["params"][0] is aligner.ratio and len(others["params"]) == 4


def test_a_step_moves_aligners_less_and_nothing_decays_them() -> None:
    made = model()
    for parameter in made.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [p.detach().clone() for p in made.parameters()]
    optimizer = torch.optim.AdamW(mk.parameter_groups(made, 0.1), weight_decay=0.5)
    rates = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    for (name, p), old in zip(made.named_parameters(), before, strict=True):
        if "aligner" in name:  # Adam's first step is the rate
            torch.testing.assert_close(old - p, torch.full_like(p, 0.1 * RATE), rtol=1e-4, atol=1e-6, msg=name)
        else:
            torch.testing.assert_close(old - p, 0.1 + 0.05 * old, rtol=1e-4, atol=1e-6, msg=name)
    rates.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.05 * RATE])


def test_errors(refused: Callable[..., None]) -> None:
    refused(lambda: mk.parameter_groups([], 0.1), TypeError, ["model", "nn.Module"])
    refused(lambda: mk.parameter_groups(model(), "0.1"), TypeError, ["lr"])
    refused(lambda: mk.parameter_groups(model(), True), TypeError, ["lr"])
    refused(lambda: mk.parameter_groups(model(), -0.1), ValueError, ["lr", "-0.1"])
    refused(lambda: mk.parameter_groups(model(), float("nan")), ValueError, ["lr"])
    refused(lambda: mk.parameter_groups(model(), 0.1, rate=-1.0), ValueError, ["rate"])
