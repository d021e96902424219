"""The benchmark suite: that its sequences are what they say, that peers are right and wrong contestants are caught."""

import dataclasses
import functools
import itertools
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moda_kernels import reference
from moda_kernels.commands.bench import clock, memory, oracle, pieces, plans, runner, tables
from moda_kernels.commands.bench.cases import MODES, Case, can
from moda_kernels.commands.bench.layouts import IMAGE, LAYOUTS, TILE, make_workload
from moda_kernels.commands.bench.peers import PEERS, Contestant, Peer, RefusedError, eager, flex
from moda_kernels.commands.bench.peers.base import too_large
from moda_kernels.commands.bench.peers.sdpa import pinned

#: The seed's sequences begin with more than one token of text: rows of a single token's Gram matrix can be so small
#: that the gradient of their norm loses digits in any arithmetic, and which has lost more is then chance.
CASE = Case("qwen2-vl-8", 96, torch.float32, head_dim=16, seed=3)
OPTIONS = runner.Options(rounds=3, seconds=0.1)
BOTH = (PEERS["moda-cpu"], PEERS["sdpa-bool"])


@pytest.fixture(autouse=True)
def small_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine can do at best takes seconds to measure."""
    monkeypatch.setitem(clock.PRODUCT, "cpu", 32)
    monkeypatch.setitem(clock.COPY_BYTES, "cpu", 4096)


class Wrong(Peer):
    """SDPA with one pair too many, or with a gradient that is off."""

    def __init__(self, name: str, in_gradient: bool) -> None:
        self.name, self.in_gradient = name, in_gradient

    def setup(self, case: Case) -> Tensor:
        seen = PEERS["sdpa-bool"].setup(case)
        if not self.in_gradient:
            seen[..., 0, -1] = ~seen[..., 0, -1]
        return seen

    def attend(self, state: Tensor, tensors: dict[str, Tensor], case: Case) -> Tensor:
        if self.in_gradient and case.backward:
            key = tensors["key"]
            tensors = tensors | {"key": key.detach() + 1.001 * (key - key.detach())}
        return PEERS["sdpa-bool"].attend(state, tensors, case)


class Broken(Peer):
    name = "broken"

    def attend(self, state: Any, tensors: dict[str, Tensor], case: Case) -> Tensor:
        raise RuntimeError("no such kernel\nand more")


class BreaksLater(Peer):
    """Right when it is checked, then it raises."""

    name = "breaks-later"

    def setup(self, case: Case) -> list[Any]:
        return [PEERS["sdpa-bool"].setup(case), 0]

    def attend(self, state: list[Any], tensors: dict[str, Tensor], case: Case) -> Tensor:
        state[1] += 1
        if state[1] > 2:
            raise RuntimeError("out of memory")
        return PEERS["sdpa-bool"].attend(state[0], tensors, case)


def records_of(case: Case, *peers: Peer, said: list[str] | None = None, **more: Any) -> dict[tuple[str, str], Any]:
    said = [] if said is None else said
    found = runner.run([runner.Match(case, peers, **more)], OPTIONS, said.append)
    return {(r["pass"], r["contestant"]): r for records in found for r in records}


def verdict(peer: Peer, case: Case) -> oracle.Verdict:
    contestant = Contestant(peer, case)
    contestant.setup()
    return oracle.verify(contestant, contestant.call())


# Sequences


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("length", [64, 257, 1024])
def test_workloads_have_their_length_and_their_counted_density(name: str, length: int) -> None:
    workload = make_workload(name, length)
    assert workload.length == length
    seen = workload.mask.visible(workload.layout)
    assert workload.visible_pairs == int(seen.sum())
    assert workload.pairs(None if workload.packed else 1) == int(seen.sum() if workload.packed else seen[:, -1].sum())
    described = workload.describe()
    assert described["text_tokens"] + described["image_tokens"] == length
    if workload.cu_seqlens is not None:
        assert workload.cu_seqlens[0] == 0 and workload.cu_seqlens[-1] == length
    again = make_workload(name, length)
    assert torch.equal(workload.ids, again.ids) and len(workload.layout.segments()) <= workload.max_segments


@pytest.mark.parametrize("name", ["llava-next", "video", "packed", "causal"])
def test_shares_of_partial_tiles_are_those_of_the_mask_written_out(name: str) -> None:
    workload = make_workload(name, 700)
    bounds = [0, 700] if workload.cu_seqlens is None else workload.cu_seqlens.tolist()
    whole = workload.mask.visible(workload.layout).view(700, 700)
    visited = partial = 0
    for a, b in itertools.pairwise(bounds):
        for q in range(a, b, TILE[0]):
            for k in range(a, b, TILE[1]):
                tile = whole[q : min(q + TILE[0], b), k : min(k + TILE[1], b)]
                complete = k + TILE[1] <= b  # a short tile of keys is never full: there are rows to mask
                visited += bool(tile.any())
                partial += bool(tile.any()) and not (bool(tile.all()) and complete)
    assert workload.tiles == {"size": list(TILE), "visited": visited, "partial_share": partial / visited}


def images(name: str, length: int) -> list[int]:
    segments = make_workload(name, length).layout.segments()
    return segments[segments[:, 3] == IMAGE][:, 2].tolist()


def test_images_have_the_stated_sizes() -> None:
    assert images("llava-1.5", 1024) == images("llava-1.5", 32768) == [576]
    assert images("llava-next", 8192) == [2880]
    assert sum(images("llava-next", 1024)) <= 0.9 * 1024
    assert len(images("qwen2-vl-8", 32768)) == 8 and all(256 <= n <= 4096 for n in images("qwen2-vl-8", 32768))
    assert 1 <= len(images("qwen2-vl", 32768)) <= 8
    assert len(images("interleaved", 1024)) == 8 and len(images("interleaved", 32768)) == 32
    assert images("video", 8192) == [196] * 37 and images("video", 32768) == [196] * 128


def test_frames_side_by_side_are_segments_of_their_own() -> None:
    video = make_workload("video", 8192)
    assert video.items is not None and video.describe()["segments"] == 37 + 2


def test_packed_has_documents_of_varied_length_with_images() -> None:
    described = make_workload("packed", 8192).describe()
    assert described["documents"] >= 8 and described["images"] >= 4
    lengths = make_workload("packed", 8192).layout.cu_seqlens.diff()
    assert lengths.max() > 2 * lengths.min()
    assert described["density"] < 0.2


def test_the_controls_have_the_known_densities() -> None:
    causal, full = make_workload("causal", 200), make_workload("full", 200)
    assert causal.visible_pairs == 200 * 201 // 2 and not bool((causal.ids == IMAGE).any())
    assert full.density == 1 and causal.causal and full.full and not full.causal


def test_seeds_differ() -> None:
    one, other = make_workload("interleaved", 512, seed=0), make_workload("interleaved", 512, seed=1)
    assert not torch.equal(one.ids, other.ids)


def test_bad_workloads_are_refused() -> None:
    with pytest.raises(ValueError, match="llava-next"):
        make_workload("images", 512)
    with pytest.raises(ValueError, match="at least 64"):
        make_workload("causal", 10)
    with pytest.raises(ValueError, match="decoding of one sequence"):
        Case("packed", 128, torch.float32, "decode")
    with pytest.raises(ValueError, match="training, decode, got 'backward'"):
        Case("causal", 128, torch.float32, "backward")


def test_work_is_counted_in_visible_pairs() -> None:
    training, decode = (dataclasses.replace(CASE, mode=mode) for mode in ("training", "decode"))
    forward = 4 * 8 * 16 * CASE.workload.visible_pairs
    assert CASE.useful_flops("forward") == forward
    assert training.useful_flops("backward") == 2.5 * forward
    assert training.useful_flops("forward+backward") == 3.5 * forward
    assert decode.visible_pairs == 96 and decode.cache_bytes == 2 * 2 * 16 * 96 * 4


# Peers


@pytest.mark.parametrize("scope", ["sequence", "causal"])
@pytest.mark.parametrize("layout", ["interleaved", "packed", "causal"])
def test_the_oracle_aligns_keys_as_the_reference_does(layout: str, scope: str) -> None:
    workload = make_workload(layout, 128)
    g = torch.Generator().manual_seed(0)
    key = torch.randn(1, 2, 128, 8, generator=g, dtype=torch.float64)
    aligner = reference.DuplexAligner(8, 2, fusion="concat", scope=scope, dtype=torch.float64)
    weight = torch.randn(2, 8, 16, generator=g, dtype=torch.float64)
    with torch.no_grad():
        aligner.weight.copy_(weight)
        own = key[0].transpose(0, 1) if workload.packed else key
        right = aligner.fused_keys(own, workload.layout)
    right = right.transpose(0, 1)[None] if workload.packed else right
    torch.testing.assert_close(oracle.align(key, weight, workload.layout, scope), right)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_contestant_that_needs_no_compiler_is_right(layout: str) -> None:
    peers = [peer for peer in PEERS.values() if not peer.compiles]
    for mode in (mode for mode in MODES if can(layout, mode)):
        case = dataclasses.replace(CASE, layout=layout, mode=mode)
        for peer in peers:
            record, _ = runner._admit(peer, case)
            assert record["status"] in ("ok", "control", "absent"), (peer.name, mode, record["reason"])
            if peer.name in ("moda-cpu", "sdpa-bool", "sdpa"):
                assert record["status"] != "absent", record["reason"]


def test_the_triton_peers_are_right_in_the_interpreter() -> None:
    case = Case("llava-next", 64, torch.float32, "training", query_heads=2, key_heads=1, head_dim=16, seed=3)
    statuses = {name: runner._admit(PEERS[name], case)[0] for name in ("moda-triton", "moda-triton-aligned")}
    for name, record in statuses.items():
        if record["status"] == "absent":
            pytest.skip(record["reason"])
        assert record["status"] == "ok", (name, record["reason"])


def test_flex_is_right_before_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    monkeypatch.setattr(flex, "_compiled", lambda mode: (flex_attention, create_block_mask))
    for layout, mode in (("video", "forward"), ("packed", "forward"), ("llava-next", "decode")):
        for name in ("flex", "flex-build", "flex-ours", "flex-ours-build"):
            found = verdict(PEERS[name], Case(layout, 200, torch.float32, mode, head_dim=16))
            assert found.good, found.reason


def test_contestants_that_compile_are_right_as_they_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by torch.compile, and run without the compiler behind it, which takes a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for module in (flex, eager):
        module._compiled.cache_clear()
    try:
        for name in ("flex", "eager-moda-compiled"):
            found = verdict(PEERS[name], dataclasses.replace(CASE, layout="llava-next"))
            assert found.good, found.reason
    finally:
        for module in (flex, eager):
            module._compiled.cache_clear()


def test_eager_moda_is_the_reference_in_float64() -> None:
    case = Case("interleaved", 150, torch.float64, "training", head_dim=8)
    contestant = Contestant(PEERS["eager-moda"], case)
    contestant.setup()
    q, k, v = (case.tensors()[name].requires_grad_() for name in ("query", "key", "value"))
    aligner = reference.DuplexAligner(8, 2, fusion="concat", scope="sequence", dtype=torch.float64)
    with torch.no_grad():
        aligner.weight.copy_(case.tensors()["weight"])
    w = case.workload
    out = reference.moda_attention(q, k, v, enable_gqa=True, layout=w.layout, mask=w.mask, key_map=aligner(k, w.layout))
    assert isinstance(out, Tensor)
    grads = torch.autograd.grad(out, (q, k, v, aligner.weight), case.tensors()["dout"])
    for found, right in zip(contestant.call(), (out.detach(), *grads), strict=True):
        # The weight of the case is float32, and so is its gradient.
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)


def test_flash_attention_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = dataclasses.replace(CASE, layout="causal")
    peer = PEERS["flash-attention-3"]
    assert "cannot be imported" in str(peer.why_not(case))
    module = types.ModuleType("flash_attn_interface")

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, None]:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2), None

    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    assert peer.why_not(case) == "a CUDA kernel"
    assert verdict(peer, case).good


def test_kernels_that_torch_refuses_are_absent_with_torchs_words() -> None:
    q = torch.randn(1, 2, 8, 8)
    with pytest.raises(RefusedError, match=r"No (viable|available)"), pinned("cudnn"):
        F.scaled_dot_product_attention(q, q, q)
    with pytest.raises(RuntimeError, match="another"), pinned("math"):
        raise RuntimeError("another fault")

    class Refusing(Peer):
        name = "refusing"

        def attend(self, state: Any, tensors: dict[str, Tensor], case: Case) -> Tensor:
            raise RefusedError("not on Tuesdays")

    record, contestant = runner._admit(Refusing(), CASE)
    assert (record["status"], record["reason"], contestant) == ("absent", "not on Tuesdays", None)


def test_an_absent_backend_is_reported_with_its_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    from moda_kernels.commands.bench.peers import moda

    peer = moda.Moda("moda-quantum", "quantum")
    assert peer.why_not(CASE) == "this moda_kernels has no backend 'quantum'"

    class Quantum:
        name = "quantum"

        def why_absent(self) -> list[str]:
            return ["no qubits", "too warm"]

    monkeypatch.setitem(moda.BACKENDS, "quantum", Quantum())
    assert peer.why_not(CASE) == "no qubits; too warm"


def test_scores_that_do_not_fit_are_not_written_out() -> None:
    assert too_large(CASE, 8) is None
    assert "GiB" in str(too_large(dataclasses.replace(CASE, length=2**20), 8))


# Verification


def test_wrong_contestants_are_left_out_and_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    time = runner._time
    monkeypatch.setattr(runner, "_time", lambda ready, options: timed.extend(ready) or time(ready, options))
    said: list[str] = []
    peers = (*BOTH, Wrong("wrong-mask", in_gradient=False), Wrong("wrong-gradient", in_gradient=True), Broken())
    records = records_of(CASE, *peers, said=said) | records_of(dataclasses.replace(CASE, mode="training"), *peers)

    for measured in ("forward", "backward", "forward+backward"):
        wrong, broken = records[measured, "wrong-mask"], records[measured, "broken"]
        assert wrong["status"] == "wrong" and "out: error" in wrong["reason"] and "ms" not in wrong
        assert broken["status"] == "failed" and broken["reason"] == "RuntimeError: no such kernel"
        bad = records[measured, "wrong-gradient"]
        assert bad["status"] == ("ok" if measured == "forward" else "wrong")
        assert measured == "forward" or ("d key" in bad["reason"] and "d value" not in bad["reason"])
    assert set(timed) == {"moda-cpu", "sdpa-bool", "wrong-gradient"} and timed.count("wrong-gradient") == 1
    assert sum("wrong-mask is left out" in line for line in said) == 1
    shown = tables.case_tables([r for (measured, _), r in records.items() if measured == "forward"])
    assert "wrong: out: error" in shown


def test_a_contestant_that_raises_while_it_is_timed_is_left_out() -> None:
    said: list[str] = []
    records = records_of(CASE, BreaksLater(), *BOTH, said=said)
    assert records["forward", "breaks-later"]["status"] == "failed"
    assert records["forward", "breaks-later"]["reason"] == "RuntimeError: out of memory"
    assert "ms" not in records["forward", "breaks-later"] and "failed while it was timed" in said[-1]
    assert records["forward", "moda-cpu"]["relative_time"] == 1


@pytest.mark.parametrize("seed", [4, 5])
def test_ill_conditioned_gradients_of_aligned_keys_are_judged_in_several_orders(seed: int) -> None:
    """Seeds with a Gram row of almost no length: there eager's own error changes fourfold with its order of sums."""
    case = Case("qwen2-vl-8", 128, torch.float32, "training", head_dim=16, seed=seed)
    good = verdict(PEERS["moda-cpu-aligned-causal"], case)
    assert good.good, good.reason


@pytest.mark.parametrize("layout", ["qwen2-vl-8", "packed"])
def test_long_sequences_are_verified_on_rows_and_short_twins(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "ALL_ROWS", 128)
    monkeypatch.setattr(oracle, "SAMPLED_ROWS", 20)
    case = Case(layout, 300, torch.float32, "training", head_dim=16, seed=3)
    good = verdict(PEERS["moda-cpu-aligned-causal"], case)
    assert good.good and 20 <= good.rows <= 40
    names = {"out", "d query", "d key", "d value", "d weight"}
    assert {c.name for c in good.comparisons} == names | {f"{name} (128 tokens)" for name in names}
    # The first row is a segment's boundary, so the pair that is wrong is among the rows.
    assert not verdict(Wrong("wrong-mask", in_gradient=False), case).good
    reason = verdict(Wrong("wrong-gradient", in_gradient=True), case).reason
    assert "d key: error" in reason and "d key (128 tokens): error" in reason

    class Compiles(Wrong):
        compiles = True

    alone = verdict(Compiles("compiles", in_gradient=True), case).reason
    assert "d key: error" in alone and "128" not in alone


def test_nan_in_a_row_that_is_not_compared_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "ALL_ROWS", 128)
    contestant = Contestant(PEERS["moda-cpu"], Case("causal", 512, torch.float32, head_dim=16))
    contestant.setup()
    (out,) = contestant.call()
    unseen = next(row for row in range(512) if row not in oracle._rows_to_check(contestant.case).tolist())
    out[0, 0, unseen, 0] = float("nan")
    assert "NaN" in oracle.verify(contestant, (out,)).reason


# Timing


def test_samples_are_interleaved_and_slow_entries_sit_out_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    done: list[str] = []

    def take(name: str, seconds: float) -> list[float]:
        nonlocal now
        now += seconds
        done.append(name)
        return [seconds]

    monkeypatch.setattr(runner.time, "perf_counter", lambda: now)
    fast = runner._Entry(lambda: take("fast", 1), most=12, budget=100)
    slow = runner._Entry(lambda: take("slow", 10), most=12, budget=60)
    runner._rounds([fast, slow], runner.random.Random(0))
    assert fast.samples == [[1]] * 12 and slow.samples == [[10]] * 6
    assert done[:2] == ["fast", "slow"]  # the warm-up
    slots = [i for i, name in enumerate(done[2:]) if name == "slow"]
    assert max(b - a for a, b in itertools.pairwise(slots)) <= 5


def test_training_samples_are_cut_between_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(clock.time, "perf_counter", lambda: float(next(ticks)) ** 2)
    assert clock.HostClock().spans(lambda mark: mark()) == [1, 3]
    assert clock.HostClock().wall(lambda: None) == 7  # from 3² to 4²
    entry = runner._Entry(lambda: [], 1, 1.0, samples=[[1.0, 3.0], [2.0, 4.0]])
    assert runner._seconds_of(entry, "backward") == [3, 4]
    assert runner._seconds_of(entry, "forward+backward") == [4, 6]


def test_the_cuda_clock_empties_the_cache_before_it_starts_and_times_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """With events, streams and memory that only take notes, as the device would get them."""
    notes: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0

        def record(self) -> None:
            notes.append("event")
            self.at = len(notes)

        def synchronize(self) -> None:
            assert notes[-1] == "event"

        def elapsed_time(self, end: "Event") -> float:
            return 1000.0 * (end.at - self.at)

    class Cache:
        def zero_(self) -> None:
            notes.append("flush")

    properties = types.SimpleNamespace(L2_cache_size=100)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: notes.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: notes.append("sleep"), raising=False)
    sizes = []
    monkeypatch.setattr(clock.torch, "empty", lambda size, **_: sizes.append(size) or Cache())
    timer = clock.CudaClock()
    assert sizes == [200]
    notes.clear()

    def work(mark: Any) -> None:
        notes.append("forward")
        mark()
        notes.extend(["backward", "backward"])

    assert timer.spans(work) == [2, 3]  # a note each for the work, and one for the event
    assert notes == ["flush", "sleep", "event", "forward", "event", "backward", "backward", "event"]
    notes.clear()
    timer.wall(lambda: notes.append("work"))
    assert notes == ["wait", "work", "wait"]


def test_a_case_is_not_begun_after_the_limit() -> None:
    said: list[str] = []
    matches = [runner.Match(CASE, BOTH)] * 3
    assert not list(runner.run(matches, dataclasses.replace(OPTIONS, limit=-1), said.append))
    assert said == ["3 of 3 cases are left out: -1 s are over"]


def test_a_timed_setup_leaves_the_contestants_own_alone() -> None:
    contestant = Contestant(PEERS["moda-cpu"], CASE)
    contestant.setup()
    first = contestant._state
    contestant.setup_again()
    assert contestant._state is first and first is not None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_shows_the_dense_mask() -> None:
    case = Case("causal", 2048, torch.float32, head_dim=16, query_heads=1, key_heads=1)
    dense, ours = (memory.measure(PEERS[name], case) for name in ("sdpa-bool", "moda-cpu"))
    assert "error" not in dense and "error" not in ours
    pairs = case.length**2
    assert 0.9 * pairs <= dense["setup_held"] <= 1.5 * pairs
    assert dense["call_peak"] >= 4.5 * pairs  # the bool mask, and SDPA's own float copy of it
    assert ours["call_peak"] < dense["call_peak"] / 4


def test_a_contestant_that_dies_is_reported() -> None:
    found = memory.measure(PEERS["moda-cpu"], Case("causal", 10, torch.float32))
    assert found["error"].startswith("ValueError")


# Pieces and plans


@pytest.fixture
def environment() -> Iterator[dict[str, Any]]:
    yield {"device": "here"}


def test_pieces_are_checked_and_timed(environment: dict[str, Any]) -> None:
    for layout in ("video", "packed"):
        records = pieces.run_case(Case(layout, 150, torch.float32, head_dim=16), OPTIONS, environment)
        assert [r["pass"] for r in records] == list(pieces.PIECES)
        assert all(r["status"] == "ok" and r["ms"]["median"] > 0 and not r["graph"] for r in records), records


def test_a_wrong_piece_is_not_timed(monkeypatch: pytest.MonkeyPatch, environment: dict[str, Any]) -> None:
    true_tiles, true_align = pieces.mask_tiles, pieces.align_keys

    def wrong_tiles(*arguments: Any) -> Any:
        made = true_tiles(*arguments)
        assert made.keys is not None
        return made._replace(keys=made.keys._replace(runs=made.keys.runs + 1))

    def without_a_tile(true: Any, *arguments: Any) -> Any:
        made = true(*arguments)
        made.kv_num_blocks[0, 0, -1] -= 1
        return made

    monkeypatch.setattr(pieces, "mask_tiles", wrong_tiles)
    monkeypatch.setattr(pieces, "align_keys", lambda *arguments: true_align(*arguments) * 1.01)
    for maker in ("_block_mask", "_their_block_mask"):
        monkeypatch.setattr(pieces, maker, functools.partial(without_a_tile, getattr(pieces, maker)))
    found = {r["pass"]: r for r in pieces.run_case(CASE, OPTIONS, environment)}
    assert found["tiles"]["reason"] == "other runs of keys than PyTorch's"
    for name in pieces.PIECES[1:]:
        assert found[name]["status"] == "wrong" and "ms" not in found[name]
    assert found["segmentation"]["status"] == "ok"


def test_plans_name_cases_that_exist_and_begin_with_what_matters() -> None:
    for plan in (plans.cpu(), plans.quick("cpu"), plans.tiny(), plans.gpu(), plans.quick("cuda")):
        for match in plan:
            assert match.case.layout in LAYOUTS and match.case.mode in MODES and match.peers
    first = plans.gpu()[0]
    assert (first.case.length, first.case.query_heads, first.case.key_heads, first.case.head_dim) == (8192, 32, 8, 128)
    assert first.peers[0].name == "moda-triton" and first.case.dtype == torch.bfloat16
    main = {(m.case.layout, m.case.length) for m in plans.gpu() if m.case.mode == "training"}
    assert {(n, length) for n in ("causal", "llava-next", "qwen2-vl-8", "packed") for length in (2048, 32768)} <= main
    decode = [m.case for m in plans.gpu() if m.case.mode == "decode"]
    assert all(2 * 8 * 128 * 2 * case.length >= 128e6 for case in decode) and decode
