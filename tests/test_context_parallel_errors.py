"""Context parallelism and what may be wrong with it; plans of shards; a process that is gone."""

import itertools
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from ranks import Ranks, alone, silence, world
from torch import Tensor

import moda_kernels as mk
from moda_kernels import distributed as md
from moda_kernels.commands.bench.layouts import LAYOUTS, make_workload
from moda_kernels.distributed.plan import indices
from moda_kernels.testing import generator, random_layout, random_mask

IDS = torch.tensor([[0, 0, 1, 1, 1, 0, 0, -1, 0, 1, 1]])
PACKED = mk.segment_modalities(IDS[0], cu_seqlens=torch.tensor([0, 4, 11]))


def heads(n: int, count: int = 2, dim: int = 4) -> Tensor:
    return torch.randn(1, count, n, dim, generator=generator(0))


# Plans


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("length", [640, 4096])
def test_shards_have_the_same_work(name: str, length: int) -> None:
    """At most 5 % between the most and the least loaded rank, as many columns on each, in about two runs."""
    workload = make_workload(name, length)
    for ranks in (2, 3, 4, 8, 16, 64) if length > 1000 else (2, 3, 4, 8):
        plan = md.plan_shards(workload.layout, workload.mask, ranks)
        assert int(plan.work.sum()) == workload.visible_pairs
        assert int(plan.work.min()) >= 0.95 * int(plan.work.max())
        assert max(plan.rows) - min(plan.rows) <= 1 and sum(plan.rows) == length
        assert sum(map(len, plan.runs)) < 2 * ranks
        columns = torch.cat([indices(runs) for runs in plan.runs])
        assert torch.equal(columns.sort().values, torch.arange(length))


def test_plans_of_any_layout() -> None:
    """Every column is on one rank; what ranks need is what the mask shows; what they hold has it all."""
    for seed in range(60):
        g = generator(seed)
        layout = random_layout(g)
        mask = random_mask(g, layout.num_roles)
        visible = mask.visible(layout)
        length = layout.modality.shape[-1]
        visible = visible.view(-1 if visible.numel() else layout.num_sequences, length, length).sum(0)
        for balance, ranks in itertools.product(("work", "head_tail", "none"), (1, 3, 7)):
            plan = md.plan_shards(layout, mask, ranks, balance)
            columns = [indices(runs) for runs in plan.runs]
            assert torch.equal(torch.cat(columns).sort().values, torch.arange(length))
            for rank, mine in enumerate(columns):
                seen = visible[mine]
                assert int(plan.work[rank]) == int(seen.sum())
                assert torch.equal(plan.needed[rank], seen.any(0))
                assert bool((plan.places[rank] >= plan.needed[rank]).all()) and bool(plan.places[rank][mine].all())


def test_only_what_is_seen_is_moved() -> None:
    ids = torch.zeros(1, 1024, dtype=torch.long)
    layout = mk.segment_modalities(ids, num_modalities=1)
    window = mk.ModularMask(mk.ModularMask.causal(1).rules, window=64)
    plan = md.plan_shards(layout, window, 8)
    assert max(plan.received) <= 3 * 63 and max(plan.held) <= 128 + 3 * 63
    documents = mk.segment_modalities(ids[0], num_modalities=1, cu_seqlens=torch.arange(0, 1025, 128))
    assert md.plan_shards(documents, None, 8).received == [0] * 8
    modalities = mk.segment_modalities(torch.cat((ids[:, :512], ids[:, :512] + 1), 1))
    assert md.plan_shards(modalities, mk.ModularMask.self_only(2), 2).received == [0, 0]
    full = md.plan_shards(layout, None, 4)
    assert full.gathers and full.received == [768] * 4 and full.imbalance == 0


def test_head_tail_is_torchs() -> None:
    balancers = pytest.importorskip("torch.distributed.tensor.experimental._context_parallel._load_balancer")
    order = balancers._HeadTailLoadBalancer(48, 4, "cpu")._generate_indices()[0]
    plan = md.plan_shards(mk.segment_modalities(torch.zeros(1, 48).long()), None, 4, "head_tail")
    assert torch.equal(torch.cat([indices(runs) for runs in plan.runs]), order)


def test_plans_refuse(refused: Callable[..., None]) -> None:
    layout = mk.segment_modalities(IDS)
    refused(lambda: md.plan_shards(layout, None, 0), ValueError, ["ranks"])
    refused(lambda: md.plan_shards(layout, None, 2, "even"), ValueError, ["balance", "'work'"])
    refused(lambda: md.plan_shards(IDS, None, 2), TypeError, ["layout"])  # type: ignore[arg-type]
    refused(lambda: md.plan_shards(layout, mk.ModularMask.full(3), 2), ValueError, ["mask"])


def test_without_a_process_group(refused: Callable[..., None]) -> None:
    for given in (None, object()):
        refused(lambda given=given: md.ContextParallel(given, IDS), ValueError, ["mesh_or_group", "init_process_group"])


# Jobs


def errors_of(calls: list[Callable[[], Any]]) -> list[tuple[str, str]]:
    found = []
    for call in calls:
        try:
            call()
            found.append(("", ""))
        except Exception as error:
            found.append((type(error).__name__, str(error)))
    return found


def wrong_calls() -> list[tuple[str, str]]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size, 1), mesh_dim_names=("cp", "tp"))
    layout = mk.segment_modalities(IDS)
    cp = md.ContextParallel(mesh["cp"], layout)
    mine = cp.plan.rows[rank]
    x, whole = heads(mine), heads(11)
    other = dist.new_group([0])
    outside = (lambda: md.ContextParallel(other, layout)) if rank else (lambda: md.ContextParallel("cp", layout))
    changed = IDS.clone()
    changed[0, rank] = 1
    with silence():
        found = errors_of([
            lambda: md.ContextParallel(mesh, layout),
            outside,
            lambda: md.ContextParallel(world(), layout, balance="even"),
            lambda: md.ContextParallel(world(), layout, "causal"),
            lambda: cp.attention(whole, whole, whole),
            lambda: cp.attention(x, x, whole),
            lambda: cp.attention(x, x, x, is_causal=True, mask=mk.ModularMask.causal(2)),
            lambda: cp.attention(x, x, x, key_map=mk.DuplexAligner(4, 2, scope="causal")(whole, layout)),
            lambda: cp.attention(x, x, x, query_start=0),
            lambda: cp.attention(x, x, x, layout=mk.segment_modalities(IDS)),
            lambda: cp.attention(x, x, x, pair_bias=torch.zeros(2, 1, 2, 2)),
            lambda: cp.attention(x, x, x, torch.ones(mine + 1, 11, dtype=torch.bool)),
            lambda: cp.attention(heads(mine, 4), x, x),
            lambda: cp.attention(x, x, x, dropout_p=0.1),
            lambda: cp.attention(x, x, x, scale=0.0, pair_bias=torch.zeros(1, 1, 2, 2), backend="cpu"),
            lambda: cp.attention(x, x, x, backend="tritom"),
            lambda: cp.shard(heads(10), 2),
            lambda: cp.shard(whole, 4),
            lambda: cp.unshard(whole, 2),
            lambda: cp.aligner_map(mk.DuplexAligner(4, 2), whole),
            lambda: cp.aligner_map(mk.DuplexAligner(4, 3), x),
            lambda: mk.DuplexAligner(4, 2)(x, layout, parallel=cp),
        ])  # fmt: skip
    found += errors_of([
        lambda: md.ContextParallel(world(), changed),
        lambda: md.ContextParallel(world(), layout, mk.ModularMask.causal(2) if rank else None),
        lambda: md.ContextParallel(world(), layout, balance="none" if rank else "work"),
    ])  # fmt: skip
    return found


EXPECTED = [
    ("ValueError", ["mesh_or_group", "one dimension", 'mesh["cp"]']),
    ("", ["mesh_or_group"]),
    ("ValueError", ["balance", "'head_tail'", "'even'"]),
    ("TypeError", ["mask", "ModularMask"]),
    ("ValueError", ["query", "this rank's shard", "ContextParallel.shard"]),
    ("ValueError", ["value", "this rank's shard"]),
    ("ValueError", ["is_causal and mask"]),
    ("TypeError", ["key_map", "aligner_map"]),
    ("ValueError", ["query_start", "None"]),
    ("ValueError", ["layout", "made with"]),
    ("ValueError", ["pair_bias", "N = 1"]),
    ("ValueError", ["attn_mask", "this rank's rows"]),
    ("ValueError", ["enable_gqa"]),
    ("NotImplementedError", ["dropout_p"]),
    ("NotImplementedError", ["'cpu'", "can't run"]),
    ("ValueError", ["backend", "'reference'"]),
    ("ValueError", ["x", "11 columns"]),
    ("ValueError", ["dim", "axis"]),
    ("ValueError", ["x", "this rank's"]),
    ("ValueError", ["key", "L ="]),
    ("ValueError", ["layout", "3 modalities"]),
    ("ValueError", ["layout", "parallel"]),
    ("ValueError", ["layout", "the same on all 4 ranks", "others on ranks"]),
    ("ValueError", ["mask and balance", "ranks [0]"]),
    ("ValueError", ["mask and balance", "ranks [0]"]),
]


def test_refused_on_every_rank_before_anything_is_sent(four: Ranks) -> None:
    for rank, found in enumerate(four.run(wrong_calls)):
        assert len(found) == len(EXPECTED)
        for (kind, message), (error, parts) in zip(found, EXPECTED, strict=True):
            assert kind == error or (not error and kind in ("ValueError", "TypeError")), (rank, kind, message, parts)
            assert all(part in message for part in parts), (rank, message, parts)


def job_alone() -> None:
    """A group of one process: the plain call, and nothing is sent."""
    group = alone()
    for layout in (mk.segment_modalities(IDS), PACKED):
        mask = mk.ModularMask.bidirectional_within(2, [1])
        q, k, v = (heads(11)[0].transpose(0, 1) if layout.packed else heads(11) for _ in range(3))
        aligner = mk.DuplexAligner(4, 2, fusion="concat", scope="causal")
        torch.nn.init.normal_(aligner.weight)
        with silence():
            cp = md.ContextParallel(group, layout, mask)
            out = cp.attention(q, k, v, key_map=cp.aligner_map(aligner, k))
            axis = 0 if layout.packed else 2
            assert cp.shard(q, axis) is q and cp.unshard(out, axis) is out
        want = mk.moda_attention(q, k, v, layout=layout, mask=mask, key_map=aligner(k, layout))
        torch.testing.assert_close(out, want)


def test_groups_of_one(two: Ranks) -> None:
    two.run(job_alone)


def job_masks() -> None:
    """Layers with masks of their own over the same shards; and is_causal where no mask was given."""
    layout = mk.segment_modalities(IDS)
    x = heads(11)
    cp = md.ContextParallel(world(), layout)
    mine = cp.shard(x, 2)
    sliding = mk.ModularMask(mk.ModularMask.causal(2).rules, window=3)
    for options in ({}, {"mask": sliding}, {"is_causal": True}, {"mask": mk.ModularMask.self_only(2)}):
        want = mk.moda_attention(x, x, x, layout=layout, **options)
        torch.testing.assert_close(cp.unshard(cp.attention(mine, mine, mine, **options), 2), want)

    packed = cp.over(PACKED, sliding)
    assert packed.plan.runs == cp.plan.runs
    q = mine[0].transpose(0, 1)
    want = mk.moda_attention(*[x[0].transpose(0, 1)] * 3, layout=PACKED, mask=sliding)
    torch.testing.assert_close(packed.unshard(packed.attention(q, q, q), 0), want)


def test_masks_of_layers(four: Ranks) -> None:
    four.run(job_masks)


def job_ulysses_maps() -> None:
    """Every kind of map: the aligner, maps of shards, and maps made from all keys, of released weights too."""
    for layout in (mk.segment_modalities(IDS), PACKED):
        q, k, v = (torch.randn(11, 4, 3, generator=generator(i), dtype=torch.float64) for i in range(3))
        if not layout.packed:
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        dim = 0 if layout.packed else 2
        cp = md.ContextParallel(world(), layout, balance="none")
        mine = [cp.shard(x, dim) for x in (q, k, v)]
        ratio, weight = (torch.randn(*n, generator=generator(7), dtype=torch.float64) for n in ((3,), (3, 3)))
        released = mk.released_key_map(k, v, layout, ratio, weight)
        want = mk.moda_attention(q, k, v, layout=layout, key_map=released)
        for got in (
            md.ulysses_attention(*mine, world(), layout=layout, key_map=released),
            cp.attention(*mine, key_map=released),
        ):
            torch.testing.assert_close(cp.unshard(got, dim), want)
        for scope in ("sequence", "causal"):
            aligner = mk.DuplexAligner(3, 2, fusion="concat", scope=scope, dtype=torch.float64)
            torch.nn.init.normal_(aligner.weight, generator=generator(8))
            want = mk.moda_attention(q, k, v, layout=layout, key_map=aligner(k, layout))
            for key_map in (aligner, cp.aligner_map(aligner, mine[1]), aligner(k, layout)):
                got = md.ulysses_attention(*mine, world(), layout=layout, key_map=key_map)
                torch.testing.assert_close(cp.unshard(got, dim), want)


def test_maps_under_ulysses(four: Ranks) -> None:
    four.run(job_ulysses_maps)


def job_ulysses_errors() -> list[tuple[str, str]]:
    import torch.distributed as dist

    layout = mk.segment_modalities(IDS)
    cp = md.ContextParallel(world(), layout, balance="none")
    x, odd = (cp.shard(heads(11, n), 2) for n in (4, 3))
    work = md.ContextParallel(world(), layout, mk.ModularMask.causal(2))
    other = work.aligner_map(mk.DuplexAligner(4, 2), work.shard(heads(11, 4), 2))
    md.ulysses_attention(x, x, x, world(), layout=layout)
    with silence():
        found = errors_of([
            lambda: md.ulysses_attention(odd, odd, odd, world(), layout=layout),
            lambda: md.ulysses_attention(x, odd, odd, world(), layout=layout, enable_gqa=True),
            lambda: md.ulysses_attention(heads(11, 4), x, x, world(), layout=layout),
            lambda: md.ulysses_attention(x, x, x, world(), layout=layout, key_map=torch.nn.Identity()),  # type: ignore[arg-type]
            lambda: md.ulysses_attention(x, x, x, world(), layout=layout, pair_bias=torch.zeros(1, 4, 3, 3)),
            lambda: md.ulysses_attention(x, x, x, world(), layout=layout, dropout_p=0.5),
            lambda: md.ulysses_attention(x, x, x, world(), layout=layout, key_map=other),
        ])  # fmt: skip
    ids = IDS.clone()
    ids[0, 0] = dist.get_rank() % 2
    return found + errors_of(
        [lambda: md.ulysses_attention(x, x, x, world(), layout=mk.segment_modalities(ids, num_modalities=2))]
    )


ULYSSES = [
    ("ValueError", ["query", "4 ranks divide", "3 heads", "ContextParallel"]),
    ("ValueError", ["key", "4 ranks divide", "3 heads"]),
    ("ValueError", ["query", "this rank's shard"]),
    ("TypeError", ["key_map", "DuplexAligner"]),
    ("ValueError", ["pair_bias"]),
    ("NotImplementedError", ["dropout_p"]),
    ("ValueError", ["key_map", 'balance="none"']),
    ("ValueError", ["layout", "the same on all 4 ranks"]),
]


def test_ulysses_refuses(four: Ranks) -> None:
    for rank, found in enumerate(four.run(job_ulysses_errors)):
        assert len(found) == len(ULYSSES)
        for (kind, message), (error, parts) in zip(found, ULYSSES, strict=True):
            assert kind == error and all(part in message for part in parts), (rank, kind, message, parts)


def job_unshard() -> None:
    """Differentiable: each rank's gradient is the sum over ranks, as what is differentiated is the sum of losses."""
    import torch.distributed as dist

    cp = md.ContextParallel(world(), PACKED)
    x = torch.randn(11, 3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 3, 2, dtype=torch.float64)
    whole = cp.unshard(cp.shard(x, 0), 0)
    assert torch.equal(whole, x)
    (whole * weight * (dist.get_rank() + 1)).sum().backward()
    assert x.grad is not None
    dist.all_reduce(x.grad)
    size = dist.get_world_size()
    torch.testing.assert_close(x.grad, weight * (size * (size + 1) / 2))
    integers = cp.shard(torch.arange(22).view(2, 11), -1)
    assert torch.equal(cp.unshard(integers, 1), torch.arange(22).view(2, 11))


def test_unshard(four: Ranks) -> None:
    four.run(job_unshard)


# A process that is gone


def job_gone(how: str) -> float:
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _set_pg_timeout

    layout = mk.segment_modalities(IDS)
    cp = md.ContextParallel(world(), layout)
    x = cp.shard(heads(11), 2)
    _set_pg_timeout(timedelta(seconds=3))  # not before: processes may take longer to find each other
    if dist.get_rank() == 1 and how == "dies":
        os._exit(1)
    if dist.get_rank() == 1:
        raise ValueError("of its own")
    begin = time.monotonic()
    try:
        cp.attention(x, x, x)
    except RuntimeError as error:
        assert "a process has died" in str(error) and "rank 0 of 2" in str(error), error
        return time.monotonic() - begin
    raise AssertionError("no error")


@pytest.mark.parametrize("how", ["dies", "raises"])
def test_a_process_that_is_gone_is_an_error_everywhere(how: str) -> None:
    ranks = Ranks(2)
    try:
        (good, message), (_, (kind, _, _)) = ranks.answers(job_gone, how)
        assert good, message
        assert kind == ("died" if how == "dies" else "ValueError")
    finally:
        ranks.close()
