"""FSDP2 (`fully_shard`) over models with aligners, alone and with context parallelism: the training of one process;
parameters in float32 and bfloat16; saved and loaded by torch.distributed.checkpoint."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, world
from torch import Tensor, nn

import moda_kernels as mk
from moda_kernels import distributed as md

pytest.importorskip("torch.distributed.fsdp")
HEADS, DIM, LENGTH = 2, 8, 21
MASK = mk.ModularMask.bidirectional_within(2, [1])


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)
        self.aligner = mk.DuplexAligner(DIM, 2, fusion="concat", scope="causal")
        self.out = nn.Linear(HEADS * DIM, HEADS * DIM)

    def forward(self, x: Tensor, layout: mk.ModalityLayout, cp: md.ContextParallel | None) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if cp is None:
            out = mk.moda_attention(q, k, v, layout=layout, mask=MASK, key_map=self.aligner(k, layout))
        else:
            out = cp.attention(q, k, v, key_map=cp.aligner_map(self.aligner, k))
        return x + self.out(out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: Tensor, layout: mk.ModalityLayout, cp: md.ContextParallel | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, layout, cp)
        return x


def made(dtype: torch.dtype) -> Model:
    torch.manual_seed(1)
    model = Model()
    for layer in model.layers:
        nn.init.normal_(layer.aligner.weight, std=DIM**-0.5)  # type: ignore[union-attr, arg-type]
    return model.to(dtype)


def batch(seed: int, dtype: torch.dtype) -> tuple[Tensor, mk.ModalityLayout]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 2, (1, 7), generator=g).repeat_interleave(3, 1)
    return torch.randn(1, LENGTH, HEADS * DIM, generator=g).to(dtype), mk.segment_modalities(ids, num_modalities=2)


def sharded(model: Model, mixed: bool) -> Model:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32) if mixed else None
    options = {} if policy is None else {"mp_policy": policy}
    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def trained(model: nn.Module, steps: Any, lr: float = 0.05) -> list[float]:
    """The losses of some steps, each a function that makes the loss and its backward."""
    optimizer = torch.optim.AdamW(mk.parameter_groups(model, lr=lr), foreach=False)
    losses = []
    for step in steps:
        optimizer.zero_grad()
        losses.append(step())
        optimizer.step()
    return losses


def full(x: Any) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def job(dtype: torch.dtype, split: str, mixed: bool, folder: str) -> None:
    """Each rank its own sequence ("data"), or some columns of the same ("context")."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    rank, size = dist.get_rank(), dist.get_world_size()
    alone, model = made(dtype), sharded(made(dtype), mixed)

    def by_one(number: int) -> float:
        total = 0.0
        for r in range(size if split == "data" else 1):
            x, layout = batch(number * 8 + r, dtype)
            loss = alone(x, layout).double().square().mean() / (size if split == "data" else 1)
            loss.backward()
            total += float(loss.detach())
        return total

    def by_all(number: int) -> float:
        x, layout = batch(number * 8 + (rank if split == "data" else 0), dtype)
        if split == "data":
            loss = model(x, layout).double().square().mean()
        else:
            cp = md.ContextParallel(world(), layout, MASK)
            # FSDP averages over the ranks, and this rank's part of the loss is one of a sum.
            loss = model(cp.shard(x, 1), layout, cp).double().square().sum() / x.numel() * size
        loss.backward()
        mean = loss.detach() / size
        dist.all_reduce(mean)
        return float(mean)

    want = trained(alone, [lambda n=n: by_one(n) for n in range(3)])
    got = trained(model, [lambda n=n: by_all(n) for n in range(3)])
    tolerance = 0.02 if mixed or dtype == torch.bfloat16 else 1e-4 if dtype == torch.float32 else 1e-9
    assert got == pytest.approx(want, rel=tolerance), (got, want)
    if dtype == torch.float64:  # (Adam's first steps are signs: rounding turns some)
        for (name, p), q in zip(alone.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(full(q), p.data, rtol=1e-6, atol=1e-8, msg=name)
    kept = copy.deepcopy({name: full(p).clone() for name, p in model.state_dict().items()})
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder)
    other = sharded(made(dtype), mixed)
    assert any(not torch.equal(full(p), kept[name]) for name, p in other.state_dict().items())
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    other.load_state_dict(state["model"])
    for name, p in other.state_dict().items():
        assert torch.equal(full(p), kept[name]), name
    assert any("aligner" in name for name in kept)


@pytest.mark.parametrize("split", ["data", "context"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_fsdp2(dtype: torch.dtype, split: str, two: Ranks, tmp_path: Path) -> None:
    two.run(job, dtype, split, False, str(tmp_path))


def test_mixed_precision(two: Ranks, tmp_path: Path) -> None:
    """Parameters in float32, computed with in bfloat16."""
    two.run(job, torch.float32, "context", True, str(tmp_path))
