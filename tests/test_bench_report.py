"""What benchmarks write down and what is made of it: records, comparisons, pictures, the README's table, targets."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moda_kernels import __main__ as command_line
from moda_kernels.commands import bench
from moda_kernels.commands.bench import clock, plots, results, runner, tables
from moda_kernels.commands.bench.cases import Case
from moda_kernels.commands.bench.peers import PEERS

Record = dict[str, Any]


@pytest.fixture(autouse=True)
def small_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine can do at best takes seconds to measure."""
    monkeypatch.setitem(clock.PRODUCT, "cpu", 32)
    monkeypatch.setitem(clock.COPY_BYTES, "cpu", 4096)


@pytest.fixture(scope="module")
def measured() -> list[Record]:
    """A small run of every mode."""
    peers = tuple(PEERS[name] for name in ("moda-cpu", "moda-cpu-aligned", "sdpa-bool", "sdpa", "eager-moda"))
    options = runner.Options(rounds=2, seconds=0.05, commit="0123abc")
    matches = [
        runner.Match(Case(layout, length, torch.float32, mode, head_dim=16, seed=3), peers)
        for layout, length, mode in (
            ("llava-next", 96, "forward"),
            ("llava-next", 96, "training"),
            ("llava-next", 128, "forward"),
            ("causal", 96, "forward"),
            ("causal", 96, "decode"),
        )
    ]
    return [record for records in runner.run(matches, options) for record in records]


def slower(records: list[Record], factor: float, contestant: str = "moda-cpu") -> list[Record]:
    changed = copy.deepcopy(records)
    for record in changed:
        if record["contestant"] == contestant and "ms" in record:
            for name in ("median", "p10", "p90"):
                record["ms"][name] *= factor
    return changed


def test_records_say_what_was_run_and_where(measured: list[Record]) -> None:
    assert json.loads(json.dumps(measured)) == measured
    for record in measured:
        assert record["schema"] == results.SCHEMA and record["device"] == "cpu"
        assert (record["dtype"], record["query_heads"], record["key_heads"]) == ("float32", 8, 2)
        assert {"density", "tiles", "visible_pairs", "segments", "seed"} <= set(record["workload"])
        assert set(record["peaks"]) == {"gemm_tflops", "copy_gb_per_s"}
        here = record["environment"]
        needed = {"device", "driver", "cuda", "cpu", "cores", "threads", "python", "torch", "triton", "moda_kernels"}
        assert needed | {"commit", "dirty", "native_extension"} <= set(here)
        assert here["torch"] == torch.__version__ and len(here["load_average"]) == 3 and here["commit"]
        if record["status"] not in ("ok", "control"):
            continue
        ms = record["ms"]
        assert 0 < ms["p10"] <= ms["median"] <= ms["p90"] and 1 <= ms["samples"] <= 2
        peer = PEERS[record["contestant"]]
        assert (record["setup"] or {}).get("what", "") == peer.prepares
        if record["status"] == "control":
            assert record["relative_time"] is None and record["useful_gflops"] is None and "verified" not in record
        elif record["pass"] != "decode":
            assert record["verified"]["good"] and record["verified"]["rows"] == record["workload"]["length"]
            work = {"forward": 1, "backward": 2.5, "forward+backward": 3.5}[record["pass"]]
            flops = 4 * 8 * 16 * record["workload"]["visible_pairs"] * work
            assert record["useful_gflops"] == pytest.approx(flops / ms["median"] / 1e6)
            share = record["useful_gflops"] / 1e3 / record["peaks"]["gemm_tflops"]
            assert record["share_of_gemm"] == pytest.approx(share) and record["relative_to"] == "moda-cpu"
        else:
            assert record["cache_gb_per_s"] == pytest.approx(2 * 2 * 16 * 96 * 4 / ms["median"] / 1e6)
    statuses = {(r["workload"]["name"], r["pass"], r["contestant"]): r["status"] for r in measured}
    assert statuses["llava-next", "forward", "sdpa"] == "control"
    assert statuses["causal", "forward", "sdpa"] == statuses["causal", "decode", "sdpa"] == "ok"
    assert statuses["causal", "decode", "eager-moda"] == "absent"


def test_both_passes_of_a_training_step_are_of_the_same_samples(measured: list[Record]) -> None:
    for name in ("moda-cpu", "sdpa-bool"):
        times = {r["pass"]: r["ms"] for r in measured if r["contestant"] == name and r["workload"]["length"] == 96}
        assert times["backward"]["p10"] < times["forward+backward"]["p10"]
        assert times["backward"]["samples"] == times["forward+backward"]["samples"]


def test_files_are_read_as_they_were_written(measured: list[Record], tmp_path: Path) -> None:
    path = tmp_path / "results" / "here.jsonl"
    results.append(path, measured[:3])
    results.append(path, measured[3:])
    assert results.read(path) == measured
    path.write_text('{"schema": 99, "environment": {}}\n')
    with pytest.raises(ValueError, match=r"line 1: expected a JSON object of schema 1 to 2, got"):
        results.read(path)


def test_tables_show_every_contestant_that_ran(measured: list[Record]) -> None:
    case = [r for r in measured if r["workload"]["name"] == "causal" and r["workload"]["length"] == 96]
    shown = tables.case_tables(case)
    assert "causal, L = 96, float32, forward" in shown and "cache GB/s" in shown
    assert shown.count("\nmoda-cpu ") == 2 and shown.count("\neager-moda ") == 1  # not in decoding
    (absent,) = tables.missing([r for r in case if r["pass"] == "decode"])
    assert absent == "eager-moda: it aligns and attends over whole sequences"
    lines = tables.overview(measured)
    assert len(lines) == 6 and lines[0].startswith("llava-next 96 float32 fwd: moda-cpu ")


def test_comparisons_tell_noise_from_change(measured: list[Record]) -> None:
    same = tables.comparison(measured, measured)
    assert "SLOWER" not in same and "faster" not in same and "; 0 only in the old, 0 only in the new" in same
    worse = [line for line in tables.comparison(measured, slower(measured, 50)).splitlines() if "SLOWER" in line]
    assert len(worse) == 6 and all(line.startswith("moda-cpu,") and "50.00" in line for line in worse)
    better = tables.comparison(measured, slower(measured, 0.02, "sdpa-bool"))
    assert better.count("faster") == 6
    elsewhere = copy.deepcopy(measured)
    for record in elsewhere:
        record["environment"]["device"] = "another GPU"
    assert "Not like with like: device was" in tables.comparison(measured, elsewhere)
    assert "no measurement in common" in tables.comparison(measured, [])


def test_pictures_are_of_the_records_given(measured: list[Record], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for suffix in plots.FORMATS:
        path = tmp_path / f"picture{suffix}"
        rates = [r for r in measured if r.get("useful_gflops") and r["pass"] in plots.PASSES]
        at_96 = [r for r in rates if r["workload"]["length"] == 96]
        over_lengths = [r for r in rates if r["pass"] == "forward" and r["workload"]["name"] == "llava-next"]
        assert plots.draw(measured, path) == len(at_96) + len(over_lengths)
        assert path.stat().st_size > 5000
    with pytest.raises(ValueError, match="got none"):
        plots.draw([r for r in measured if "ms" not in r], tmp_path / "empty.png")


def test_a_contestant_looks_the_same_in_every_picture_and_like_no_other() -> None:
    looks = [plots.look(name) for name in PEERS]
    assert len(set(looks)) == len(PEERS) and looks == [plots.look(name) for name in PEERS]


def test_one_length_shows_the_parts_around_attention_in_place_of_a_line_of_one_point(
    measured: list[Record], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    one = [r for r in measured if r["workload"]["length"] == 96]
    parts = [
        one[0] | {"pass": name, "contestant": "moda", "ms": {"median": time}, "useful_gflops": None}
        for name, time in (("block mask, ours", 1.0), ("block mask, create_block_mask", 300.0))
    ]
    without, path = tmp_path / "without.png", tmp_path / "with.png"
    bars = plots.draw(one, without)
    assert plots.draw(one + parts, path) == bars + 2

    def height(png: Path) -> int:
        return int.from_bytes(png.read_bytes()[20:24], "big")

    panels = len({r["pass"] for r in one if r.get("useful_gflops") and r["pass"] in plots.PASSES})
    assert height(path) == height(without) * (panels + 1) // panels


def test_a_peak_that_was_passed_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([{"gemm_tflops": 1.0, "copy_gb_per_s": 8.0}, {"gemm_tflops": 3.0, "copy_gb_per_s": 5.0}])
    monkeypatch.setattr(clock, "_peaks", lambda *_: next(found))
    monkeypatch.setattr(clock, "_PEAKS", {})
    assert clock.peaks("cpu", torch.float32) == {"gemm_tflops": 1.0, "copy_gb_per_s": 8.0}
    assert clock.peaks("cpu", torch.float32, {"gemm_tflops": 0.9}) == {"gemm_tflops": 1.0, "copy_gb_per_s": 8.0}
    assert clock.peaks("cpu", torch.float32, {"gemm_tflops": 1.2}) == {"gemm_tflops": 3.0, "copy_gb_per_s": 8.0}
    assert clock.peaks("cpu", torch.float32)["gemm_tflops"] == 3.0


def test_without_matplotlib_there_is_no_picture_but_a_reason(
    measured: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "old.jsonl"
    results.append(file, measured)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert command_line.main(["bench", "--read", str(file), "--plot", str(tmp_path / "new.png")]) == 0
    printed = capsys.readouterr().out
    assert "No picture: drawing needs matplotlib" in printed and "causal, L = 96, float32, decode" in printed
    assert not (tmp_path / "new.png").exists()


# The command


def test_the_command_writes_tables_results_and_a_picture_and_compares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "here.jsonl"
    options = ["bench", "--device", "cpu", "--layouts", "full,packed", "--lengths", "64", "--dtypes", "bfloat16"]
    options += ["--modes", "forward,decode", "--seconds", "0.1", "--contestants", "moda-cpu,sdpa-bool,sdpa-cudnn"]
    options += ["--no-memory", "--rounds", "2", "--heads", "4,2", "--head-dim", "16", "--out", str(out)]
    assert command_line.main(options) == 0
    records = results.read(out)
    attention = [r for r in records if "relative_time" in r]
    assert {(r["workload"]["name"], r["pass"]) for r in attention} == {
        ("full", "forward"), ("full", "decode"), ("packed", "forward"),
    }  # fmt: skip
    assert all(r["status"] == "ok" and r["dtype"] == "bfloat16" and r["query_heads"] == 4 for r in attention)
    assert {r["pass"] for r in records} >= {"segmentation", "tiles", "alignment (causal)"}
    assert out.with_suffix(".png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert "full, L = 64, bfloat16, forward" in printed and "sdpa-cudnn: a CUDA kernel" in printed
    results.append(tmp_path / "old.jsonl", records)
    assert command_line.main([*options, "--no-pieces", "--compare", str(tmp_path / "old.jsonl")]) == 0
    pieces = len({results.key(r) for r in records if "ms" in r}) - 6
    assert f"6 compared; {pieces} only in the old, 0 only in the new." in capsys.readouterr().out
    assert len(results.read(out)) < len(records), "a run begins its result file anew"


def test_only_this_packages_faults_fail_a_run(measured: list[Record]) -> None:
    assert bench.exit_code(measured) == 0
    for contestant, code in (("flex", 0), ("moda-triton", 1), ("moda", 1)):
        for status in ("wrong", "failed"):
            assert bench.exit_code([*measured, {"contestant": contestant, "status": status}]) == code
    assert bench.exit_code([{"contestant": "moda-triton", "status": "absent"}]) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--compare", "/nonexistent"], "/nonexistent"),
        (["--plot", "picture.txt"], "expected a .png"),
        (["--heads", "3,2"], "expected Hq,Hkv"),
        (["--lengths", "32,128"], "--lengths: expected at least 64, got 32"),
        (["--layouts", "packed", "--modes", "decode"], "nothing to run"),
        (["--device", "cuda"], "no CUDA device"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is one")
    out = tmp_path / "never.jsonl"
    assert command_line.main(["bench", "--device", "cpu", *options, "--out", str(out)]) == 2
    assert said in capsys.readouterr().err and not out.exists()


def test_the_command_names_what_it_knows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line.main(["bench", "--contestants", "moda-cpu,flash"])
    assert "unknown contestant flash; known: moda-triton, moda-cpu" in capsys.readouterr().err


# The source tree's part


def as_gpu(records: list[Record], name: str) -> list[Record]:
    """The records as a GPU's: invented, to see what is made of them."""
    changed = copy.deepcopy(records)
    for record in changed:
        record["device"] = "cuda"
        record["contestant"] = record["contestant"].replace("moda-cpu", "moda-triton")
        record["environment"] |= {"device": name, "driver": "1.2", "cuda": "13.0", "triton": "3.6.0"}
    return changed


def test_readme_tables_are_per_machine_and_set_like_against_like(measured: list[Record]) -> None:
    readme = pytest.importorskip("benchmarks.readme", reason="the tests stand alone, without the source tree")
    by = {(r["workload"]["name"], r["workload"]["length"], r["pass"], r["contestant"]): r for r in measured}
    cpu = readme.render({Path("cpu.jsonl"): measured})
    machine = measured[0]["environment"]["device"]
    assert cpu.startswith(f"**{machine}**") and cpu.endswith("GPU figures are not measured yet.")
    row = next(line for line in cpu.splitlines() if line.startswith("| llava-next | 96 | float32 | fwd |"))
    eager, ours = (by["llava-next", 96, "forward", name] for name in ("eager-moda", "moda-cpu-aligned"))
    assert f"{eager['ms']['median'] / ours['ms']['median']:.2f}×" in row, (
        "eager MODA aligns keys: against ours that does"
    )
    assert "bwd" not in [cell.strip() for cell in cpu.replace("\n", "|").split("|")]
    both = readme.render({Path("cpu.jsonl"): measured, Path("h.jsonl"): as_gpu(measured, "NVIDIA H100")})
    assert "**NVIDIA H100**" in both and "not measured yet" not in both and "1.2, CUDA 13.0" in both
    assert "| bwd |" in both.partition("**NVIDIA H100**")[2]


def test_targets_are_met_or_short(measured: list[Record]) -> None:
    targets = pytest.importorskip("benchmarks.targets", reason="the tests stand alone, without the source tree")
    found = as_gpu(measured, "NVIDIA H100")
    ours, dense, eager = ("moda-triton", "sdpa-bool", "eager-moda")
    for record in found:
        times = {ours: 1.0, "moda-triton-aligned": 2.0, dense: 6.0, eager: 10.0, "sdpa": 1.0}
        if "ms" in record:
            record["ms"]["median"] = times[record["contestant"]]
    said = {str(target) for target in targets.targets(found, shortest=0)}
    assert "met   sdpa-bool / ours, llava-next 96 forward: 6 (>= 5, aim 9)" in said
    assert "SHORT eager-moda / ours, llava-next 96 forward: 5 (>= 8, aim 17)" in said
    assert any(line.startswith("met   visible FLOP/s, llava-next / causal, 96 forward") for line in said) or any(
        line.startswith("SHORT visible FLOP/s, llava-next / causal, 96 forward") for line in said
    )
    assert not list(targets.targets(found)), "short sequences have no targets"
    piece = found[0] | {"pass": "segmentation + tiles", "contestant": "moda", "graph": True}
    piece["workload"] = found[0]["workload"] | {"length": 32768}
    (lists,) = targets.targets([piece | {"ms": {"median": 0.04}}])
    assert lists.met and "graph" in lists.name and "<= 0.05" in str(lists)


def test_only_a_whole_plan_goes_to_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = pytest.importorskip("benchmarks.__main__", reason="the tests stand alone, without the source tree")
    asked: list[Any] = []
    monkeypatch.setattr(bench, "run", lambda arguments: asked.append(arguments.out) or 0)
    for options in (
        ["--device", "cpu"],
        ["--quick"],
        ["--layouts", "full"],
        ["--device", "cpu", "--out", "here.jsonl"],
    ):
        assert suite.main(options) == 0
    committed, *others = asked
    assert committed == suite.RESULTS / "attention-cpu.jsonl"
    assert others == [Path("moda-bench.jsonl"), Path("moda-bench.jsonl"), Path("here.jsonl")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert suite.result_file(None).name == "attention-h100-80gb-hbm3.jsonl"
    assert suite.result_file("cpu") == committed
