"""The benchmark suite: that its sequences are what they say, that wrong contestants are caught, what it writes down."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.cases import PASSES, Case
from benchmarks.layouts import IMAGE, LAYOUTS, TEXT, make_workload
from benchmarks.peers import PEERS, Contestant, Peer
from torch import Tensor

from benchmarks import __main__ as command_line
from benchmarks import memory, results, runner, verify
from moda_kernels import reference

QUICK = runner.Options(
    layouts=("three-images",),
    lengths=(96,),
    dtypes=(torch.float32,),
    peers=(PEERS["moda-cpu"], PEERS["sdpa-bool"]),
    head_dim=16,
    rounds=3,
    seconds=0.1,
    memory=False,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More only wait for each other on inputs as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Wrong(Peer):
    """SDPA with one pair too many, or with a gradient that is off."""

    def __init__(self, name: str, in_gradient: bool) -> None:
        self.name, self.in_gradient = name, in_gradient

    def setup(self, case: Case) -> Tensor:
        seen = PEERS["sdpa-bool"].setup(case)
        if not self.in_gradient:
            seen[..., 0, 1] = True
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


def records_of(options: runner.Options) -> dict[tuple[str, str], dict[str, Any]]:
    return {(r["pass"], r["contestant"]): r for records in runner.run(options) for r in records}


# Sequences


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("length", [64, 257, 1024])
def test_workloads_have_their_length_and_their_counted_density(name: str, length: int) -> None:
    workload = make_workload(name, length)
    assert workload.length == length
    assert workload.visible_pairs == int(workload.mask.visible(workload.layout).sum())
    assert workload.describe()["text_tokens"] + workload.describe()["image_tokens"] == length
    if workload.cu_seqlens is not None:
        assert workload.cu_seqlens[0] == 0 and workload.cu_seqlens[-1] == length
    again = make_workload(name, length)
    assert torch.equal(workload.ids, again.ids)


def images(name: str, length: int) -> list[int]:
    segments = make_workload(name, length).layout.segments()
    return segments[segments[:, 3] == IMAGE][:, 2].tolist()


def test_images_have_the_stated_sizes() -> None:
    assert images("image-text", 8192) == images("image-text", 4096) == [2880]
    assert images("image-text", 1024) == [720]
    assert images("three-images", 8192) == [2880, 576, 1152]
    assert images("three-images", 1024) == [360, 72, 144]


def test_interleaved_has_hundreds_of_short_segments() -> None:
    segments = make_workload("interleaved", 8192).layout.segments()[:-1]  # the last one is cut off
    text, image = (segments[segments[:, 3] == m][:, 2] for m in (TEXT, IMAGE))
    assert len(segments) > 200
    assert text.min() >= 5 and text.max() <= 60
    assert image.min() >= 16 and image.max() <= 64


def test_packed_has_documents_of_varied_length_with_images() -> None:
    described = make_workload("packed", 8192).describe()
    assert described["documents"] >= 8 and described["images"] >= 4
    lengths = make_workload("packed", 8192).layout.cu_seqlens.diff()
    assert lengths.max() > 2 * lengths.min()
    assert described["density"] < 0.2


def test_the_controls_have_the_known_densities() -> None:
    causal, full = make_workload("causal", 200), make_workload("full", 200)
    assert causal.visible_pairs == 200 * 201 // 2 and not bool((causal.ids == IMAGE).any())
    assert full.density == 1


def test_seeds_differ() -> None:
    one, other = make_workload("interleaved", 512, seed=0), make_workload("interleaved", 512, seed=1)
    assert not torch.equal(one.ids, other.ids)


def test_bad_workloads_are_refused() -> None:
    with pytest.raises(ValueError, match="image-text"):
        make_workload("images", 512)
    with pytest.raises(ValueError, match="at least 64"):
        make_workload("causal", 10)


# Verification


@pytest.mark.parametrize("layout", ["interleaved", "packed", "causal"])
@pytest.mark.parametrize("scope", ["sequence", "causal"])
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
    torch.testing.assert_close(verify.align(key, weight, workload.layout, scope), right)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_contestant_that_needs_no_compiler_is_right(layout: str) -> None:
    peers = tuple(peer for peer in PEERS.values() if not peer.compiles)
    options = dataclasses.replace(QUICK, layouts=(layout,), peers=peers, rounds=1)
    for record in records_of(options).values():
        assert record["status"] in ("ok", "control", "absent"), record["reason"]


def test_wrong_contestants_are_left_out_and_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    time = runner._time
    monkeypatch.setattr(runner, "_time", lambda ready, options: timed.extend(ready) or time(ready, options))
    said: list[str] = []
    mask, gradient = Wrong("wrong-mask", in_gradient=False), Wrong("wrong-gradient", in_gradient=True)
    options = dataclasses.replace(QUICK, peers=(*QUICK.peers, mask, gradient, Broken()))
    records = {(r["pass"], r["contestant"]): r for rs in runner.run(options, said.append) for r in rs}

    for measured in PASSES:
        wrong, broken = records[measured, "wrong-mask"], records[measured, "broken"]
        assert wrong["status"] == "wrong" and "out: error" in wrong["reason"] and "ms" not in wrong
        assert broken["status"] == "failed" and broken["reason"] == "RuntimeError: no such kernel"
    assert records["forward", "wrong-gradient"]["status"] == "ok"
    bad = records["forward+backward", "wrong-gradient"]
    assert bad["status"] == "wrong" and "d key" in bad["reason"] and "d value" not in bad["reason"]
    assert set(timed) == {"moda-cpu", "sdpa-bool", "wrong-gradient"} and timed.count("wrong-gradient") == 1
    assert sum("wrong-mask is left out" in line for line in said) == 2
    shown = results.table([r for (measured, _), r in records.items() if measured == "forward"])
    assert "wrong: out: error" in shown


@pytest.mark.parametrize("layout", ["three-images", "packed"])
def test_long_sequences_are_verified_on_rows_and_short_twins(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "ALL_ROWS", 128)
    monkeypatch.setattr(verify, "GRADIENT_LENGTH", 100)
    monkeypatch.setattr(verify, "SAMPLED_ROWS", 20)
    case = Case(layout, 300, torch.float32, backward=True, head_dim=16)

    def verdict(peer: Peer) -> verify.Verdict:
        contestant = Contestant(peer, case)
        contestant.setup()
        return verify.verify(contestant, contestant.call())

    good = verdict(PEERS["moda-cpu-aligned-causal"])
    assert good.good and 20 <= good.rows <= 40
    assert {c.name for c in good.comparisons} == {"out", "d query", "d key", "d value", "d weight"}
    # The first row is a segment's boundary, so the pair too many is among the rows.
    assert not verdict(Wrong("wrong-mask", in_gradient=False)).good
    assert "d key" in verdict(Wrong("wrong-gradient", in_gradient=True)).reason


def test_nan_in_a_row_that_is_not_compared_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "ALL_ROWS", 128)
    contestant = Contestant(PEERS["moda-cpu"], Case("causal", 512, torch.float32, head_dim=16))
    contestant.setup()
    (out,) = contestant.call()
    unseen = next(row for row in range(512) if row not in verify._rows_to_check(contestant.case).tolist())
    out[0, 0, unseen, 0] = float("nan")
    assert "NaN" in verify.verify(contestant, (out,)).reason


# Results


def test_controls_are_timed_but_neither_verified_nor_compared() -> None:
    options = dataclasses.replace(QUICK, peers=(*QUICK.peers, PEERS["sdpa-causal"]), passes=("forward",))
    control = records_of(options)["forward", "sdpa-causal"]
    assert control["status"] == "control" and control["ms"]["samples"] >= 1
    assert control["relative_time"] is None and control["useful_gflops"] is None and "verified" not in control
    contestant = records_of(dataclasses.replace(options, layouts=("causal",)))["forward", "sdpa-causal"]
    assert contestant["status"] == "ok" and contestant["relative_time"] > 0


def test_records_say_what_was_run_and_where() -> None:
    for (measured, name), record in records_of(QUICK).items():
        assert json.loads(json.dumps(record)) == record
        assert record["schema"] == results.SCHEMA
        assert record["workload"]["name"] == "three-images" and record["workload"]["length"] == 96
        assert (record["dtype"], record["query_heads"], record["key_heads"]) == ("float32", 8, 2)
        ms = record["ms"]
        assert 0 < ms["p10"] <= ms["median"] <= ms["p90"] and 1 <= ms["samples"] <= 3
        assert record["setup"]["what"] == PEERS[name].prepares and record["setup"]["ms"]["samples"] >= 1
        flops = 4 * 8 * 16 * record["workload"]["visible_pairs"] * (3.5 if measured == "forward+backward" else 1)
        assert record["useful_gflops"] == pytest.approx(flops / ms["median"] / 1e6)
        assert record["relative_to"] == "moda-cpu"
        assert record["verified"]["good"] and record["verified"]["rows"] == 96
        here = record["environment"]
        assert {"cpu", "cores", "threads", "python", "torch", "numpy", "moda_kernels", "commit", "dirty"} <= set(here)
        assert here["torch"] == torch.__version__ and len(here["load_average"]) == 3


def test_samples_are_interleaved_and_slow_entries_sit_out_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0

    def take(name: str, seconds: float) -> None:
        nonlocal clock
        clock += seconds
        done.append(name)

    done: list[str] = []
    monkeypatch.setattr(runner.time, "perf_counter", lambda: clock)
    fast = runner._Entry(lambda: take("fast", 1), most=12, budget=100)
    slow = runner._Entry(lambda: take("slow", 10), most=12, budget=60)
    runner._rounds([fast, slow], runner.random.Random(0))
    assert fast.seconds == [1] * 12 and slow.seconds == [10] * 6
    assert done[:2] == ["fast", "slow"]  # the warm-up
    slots = [i for i, name in enumerate(done[2:]) if name == "slow"]
    assert max(b - a for a, b in itertools.pairwise(slots)) <= 5


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


def test_command_line_writes_json_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "here.jsonl"
    options = [
        "--layouts",
        "full",
        "--lengths",
        "64",
        "--dtypes",
        "bfloat16",
        "--passes",
        "forward",
        "--seconds",
        "0.1",
    ]
    options += ["--contestants", "moda-cpu,sdpa-bool,sdpa-full", "--no-memory", "--rounds", "2", "--out", str(out)]
    assert command_line.main(options) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["contestant"] for r in records] == ["moda-cpu", "sdpa-bool", "sdpa-full"]
    assert all(r["status"] == "ok" and r["dtype"] == "bfloat16" for r in records)
    printed = capsys.readouterr().out
    assert "full, L = 64, bfloat16, forward" in printed and "sdpa-bool" in printed


def test_command_line_names_what_it_knows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line.main(["--contestants", "moda-cpu,flash"])
    assert "unknown contestant flash; known: moda-cpu" in capsys.readouterr().err
