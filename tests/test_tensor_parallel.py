"""DTensors sharded over heads: `align_keys`, `modality_gram` and what is refused. (`moda_attention` and aligners, with
all gradients: `test_context_parallel.py`.)"""

from typing import Any

import torch
from ranks import Ranks, silence
from torch import Tensor

import moda_kernels as mk
from moda_kernels.testing import generator

IDS = torch.tensor([[0, 0, 1, 1, 1, 0, 0, -1, 0, 1, 1]])
LAYOUTS = (mk.segment_modalities(IDS), mk.segment_modalities(IDS[0], cu_seqlens=torch.tensor([0, 4, 11])))


def tensors(layout: mk.ModalityLayout, heads: int = 4) -> tuple[Tensor, ...]:
    made = [torch.randn(11, heads, 3, generator=generator(i), dtype=torch.float64) for i in range(3)]
    return tuple(made if layout.packed else [x.transpose(0, 1)[None] for x in made])


def mesh_of_all() -> Any:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def job_functions() -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = mesh_of_all()
    for layout in LAYOUTS:
        q, k, v = tensors(layout)
        parts = [distribute_tensor(x, mesh, [Shard(1)]) for x in (q, k, v)]
        for fusion in ("add", "linear", "concat"):
            aligner = mk.DuplexAligner(3, 2, fusion=fusion, scope="causal", dtype=torch.float64)
            for parameter in aligner.parameters():
                torch.nn.init.normal_(parameter, generator=generator(9))
            whole = mk.align_keys(k, aligner(k, layout), layout)
            with silence():  # nothing is sent in the forward
                got = mk.align_keys(parts[1], aligner(parts[1], layout), layout)
                out = mk.moda_attention(*parts, layout=layout, key_map=aligner(parts[1], layout))
            assert tuple(got.placements) == tuple(out.placements) == (Shard(1),)
            torch.testing.assert_close(got.full_tensor(), whole)
            want = torch.autograd.grad(whole.square().sum(), list(aligner.parameters()))
            found = torch.autograd.grad(got.to_local().square().sum(), list(aligner.parameters()))
            torch.testing.assert_close(found, want)  # whole on every rank
        for by in ("modality", "segment"):
            for x, y in ((0, 0), (0, 2)):
                gram = mk.modality_gram(parts[x], parts[y], layout, by)
                torch.testing.assert_close(gram.full_tensor(), mk.modality_gram((q, k, v)[x], (q, k, v)[y], layout, by))
        # Replicated ones, and a bias as a DTensor.
        same = [distribute_tensor(x, mesh, [Replicate()]) for x in (q, k, v)]
        bias = torch.randn(1, 4, 2, 2, generator=generator(5), dtype=torch.float64)
        want = mk.moda_attention(q, k, v, layout=layout, pair_bias=bias)
        for given in (bias, distribute_tensor(bias, mesh, [Shard(1)]), distribute_tensor(bias, mesh, [Replicate()])):
            for each in (parts, same):
                if each is same and given is not bias and not given.placements[0].is_replicate():
                    continue
                torch.testing.assert_close(mk.moda_attention(*each, layout=layout, pair_bias=given).full_tensor(), want)


def test_functions(four: Ranks) -> None:
    four.run(job_functions)


def job_refused() -> list[tuple[str, str]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh, layout = mesh_of_all(), LAYOUTS[0]
    two = init_device_mesh("cpu", (2, 2))
    q, k, v = tensors(layout)

    def spread(x: Tensor, *placements: Any, on: Any = mesh) -> Any:
        return distribute_tensor(x, on, placements)

    odd = [DTensor.from_local(x[:, :1], mesh, [Shard(1)], shape=(1, 3, 11, 3), stride=x.stride()) for x in (q, k, v)]
    s = Shard(1)
    aligner = mk.DuplexAligner(3, 2, dtype=torch.float64)
    calls = [
        lambda: mk.moda_attention(spread(q, s), k, v, layout=layout),
        lambda: mk.moda_attention(q, spread(k, s), spread(v, s), layout=layout),
        lambda: mk.moda_attention(spread(q, s), spread(k, Replicate()), spread(v, Replicate()), layout=layout),
        lambda: mk.moda_attention(*(spread(x, Shard(2)) for x in (q, k, v)), layout=layout),
        lambda: mk.moda_attention(*(spread(x, Shard(0)) for x in (q, k, v)), layout=layout),
        lambda: mk.moda_attention(*(spread(x, s, s, on=two) for x in (q, k, v)), layout=layout),
        lambda: mk.moda_attention(*odd, layout=layout),
        lambda: aligner(DTensor.from_local(k, mesh, [Partial()]), layout),
        lambda: mk.modality_gram(spread(k, s), k, layout),
        lambda: mk.align_keys(spread(k, s), aligner(k, layout), layout),
        lambda: mk.moda_attention(
            spread(q, s), spread(k, s), spread(v, s), layout=layout,
            pair_bias=spread(torch.zeros(1, 1, 2, 2, dtype=torch.float64), Shard(2)),
        ),
    ]  # fmt: skip
    found = []
    for call in calls:
        try:
            call()
            found.append(("", ""))
        except Exception as error:
            found.append((type(error).__name__, str(error)))
    return found


EXPECTED = [
    ("TypeError", ["key", "a DTensor, as query", "to_local"]),
    ("TypeError", ["query", "a DTensor, as key"]),
    ("ValueError", ["key", "like query"]),
    ("ValueError", ["query", "Shard(1), the heads"]),
    ("ValueError", ["query", "Shard(1), the heads"]),
    ("ValueError", ["query", "one of them Shard(1)"]),
    ("ValueError", ["query", "4 ranks", "3 heads"]),
    ("ValueError", ["key", "Shard(1)"]),
    ("TypeError", ["y", "a DTensor, as x"]),
    ("ValueError", ["key_map", "1 key heads"]),
    ("ValueError", ["pair_bias", "Replicate() or Shard(1)"]),
]


def test_refused(four: Ranks) -> None:
    for found in four.run(job_refused):
        for (kind, message), (error, parts) in zip(found, EXPECTED, strict=True):
            assert kind == error and all(part in message for part in parts), (kind, message, parts)
