"""Kernels compiled without a GPU: every build of the gate, within its architecture's limits, and a report that would
show where one is not. Compiling takes a process of its own: here Triton is in its interpreter."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from moda_kernels.runtime import gpu

pytest.importorskip("triton")

import triton
from triton.backends import backends

from moda_kernels.backends.triton import configs as attention_configs
from moda_kernels.backends.triton.builds import WHOLE
from moda_kernels.products import configs
from moda_kernels.runtime import aot
from moda_kernels.runtime.architectures import KNOWN, TABLES, Target
from moda_kernels.runtime.launch import Launch, find, padded


def compiler(*arguments: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=timeout
    )


#: Parts of names; each build of the gate has one of them.
PARTS = ("attention_forward", "attention_folded", "attention_query", "attention_keys", "decode", "_gram", "_project",
         "sum")  # fmt: skip


def compiled(target: Target) -> bool:
    """Whether the Triton at hand can compile for an architecture."""
    return isinstance(target, int) or "amd" in backends


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_the_builds_of_the_gate_compile(part: str) -> None:
    done = compiler("-m", "moda_kernels.runtime.aot", "--json", "--only", part)
    assert done.returncode == 0, done.stdout + done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    gate = [build for build in aot.builds() if build.gate and part in build.name and compiled(build.target)]
    assert [(r["name"], r["target"]) for r in reports] == [(b.name, b.target) for b in gate] and gate
    for report in reports:
        print(report)
        assert report["faults"] == []
        amd = isinstance(report["target"], str)
        assert 0 < report["registers"] <= (512 if amd else 255)
        assert report["shared"] <= KNOWN[report["target"]].shared
        products = report["wgmma"] + report["mma_sync"] + report["tcgen05"] + report["mfma"]
        if "16 " in report["name"]:
            assert products > 0, f"{report['name']} is not on tensor cores"
        elif "fp32" in report["name"] and not amd:  # whose matrix instructions for 32 bits are exact
            assert products == 0, f"{report['name']} is not IEEE"
        if (
            "bf16 128" in report["name"]
            and report["target"] == 90
            and "unit" not in report["name"]
            and part != "decode"
        ):
            assert report["wgmma"] > 0 and report["mma_sync"] == 0, report
    if importlib.util.find_spec("benchmarks") is None:
        return  # the tests stand alone, without the source tree
    recorded = importlib.import_module("benchmarks.builds")
    version, rows = recorded.read(recorded.PATH.read_text())
    if version == triton.__version__:
        for report in reports:
            row = rows.get((str(report["target"]), report["name"]))
            assert row == recorded.row_of(report), f"not as {recorded.PATH.name} has it: see {recorded.__file__}"


def test_every_build_of_the_gate_has_a_part() -> None:
    for build in aot.builds():
        assert sum(part in build.name for part in PARTS) == 1, build.name


def test_every_configuration_is_in_the_gate() -> None:
    """float32's entries, and those of the Gram products, are the same on every architecture."""
    of = attention_configs
    for table in (of.FORWARD, of.FOLDED, of.BACKWARD_QUERY, of.BACKWARD_KEYS):
        in_gate = {(b.target, b.config) for b in aot.builds() if b.gate}
        for target in WHOLE:
            assert {(target, c) for c in table[target][16].values()} <= in_gate
        assert {(90, c) for c in table[90].get(32, {}).values()} <= in_gate


def test_what_is_launched_is_compiled() -> None:
    """Every configuration of every table, for every architecture that takes it; a sample of each in the gate."""
    of = attention_configs
    builds = list(aot.builds())
    everything = {(b.target, b.config) for b in builds}
    attention = (of.FORWARD, of.MASKED, of.FOLDED, *of.MANY.values(), of.BACKWARD_QUERY, of.BACKWARD_KEYS,
                 of.MASKED_KEYS, of.DECODE)  # fmt: skip
    for table in (*attention, configs.GRAM, configs.UNIT_GRAM, configs.PROJECT, configs.UNIT_PROJECT):
        assert set(table) == set(TABLES)
        for target, known in KNOWN.items():
            by_bits: Mapping[int, Mapping[int, Launch]] = table[known.table]
            assert {(target, c) for by_size in by_bits.values() for c in by_size.values()} <= everything
    assert {b.target for b in builds if b.gate} == set(KNOWN)


def test_every_kernel_is_in_the_gate_and_on_every_architecture() -> None:
    builds = list(aot.builds())
    kernels = {build.kernel for build in builds}
    assert {build.kernel for build in builds if build.gate} == kernels
    for kernel in kernels:
        assert set(TABLES) <= {build.target for build in builds if build.kernel is kernel}
    assert len({(build.name, build.target) for build in builds}) == len(builds), "a name is given twice"


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", KNOWN)
def test_every_build_compiles(target: Target) -> None:
    if not compiled(target):
        pytest.skip("this Triton has no backend for AMD GPUs")
    done = compiler("-m", "moda_kernels.runtime.aot", "--all", "--target", str(target), timeout=7200)
    assert done.returncode == 0, done.stdout + done.stderr


def test_faults() -> None:
    build = next(iter(aot.builds()))
    fine = aot.Report(128, 0, 1024, 0, 0, 4, 0, 0, 0, False, 1.0)
    assert build.faults(fine) == []
    limit = KNOWN[build.target].shared
    assert build.faults(dataclasses.replace(fine, shared=limit)) == []
    assert f"{limit + 1} bytes of shared memory" in build.faults(dataclasses.replace(fine, shared=limit + 1))[0]
    spilled = dataclasses.replace(fine, stack=40)
    assert "40 bytes of stack, 0 allowed" in build.faults(spilled)[0]
    assert dataclasses.replace(build, stack_allowance=40).faults(spilled) == []
    assert build.faults(dataclasses.replace(fine, serialized=True)) == ["ptxas serialises its wgmma"]


KERNEL = """
import sys
import triton, triton.language as tl
from moda_kernels.runtime.aot import Build, compile_kernel
from moda_kernels.runtime.launch import Launch
@triton.jit
def product(p_x, p_out, stride, B: tl.constexpr):
    o = tl.arange(0, B)
    b_x = tl.load(p_x + o[:, None] * stride + o[None, :])
    tl.store(p_out + o[:, None] * stride + o[None, :], tl.dot(b_x, b_x))
types = {"p_x": "*bf16", "p_out": "*fp32", "stride": "i32"}
for size in (64, 256):
    build = Build("product", product, 90, types, {"B": size}, Launch(4, 2), ("stride",))
    print(build.faults(build.compile()))
try:
    compile_kernel(product, types, {}, Launch(4, 2), 90)
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_kernel_that_is_too_large_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "product.py"
    path.write_text(KERNEL)
    done = compiler(str(path))
    small, large, wrong = done.stdout.splitlines() or [done.stderr]
    assert small == "[]"
    assert "bytes of stack, 0 allowed" in large and "ptxas serialises its wgmma" in large
    assert wrong == "product: types and constants differ from the kernel's arguments in ['B']"


@pytest.mark.skipif(not gpu.interpreted(), reason="needs Triton's interpreter")
def test_the_interpreter_compiles_nothing() -> None:
    build = next(iter(aot.builds()))
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        aot.compile_kernel(build.kernel, build.types, build.constants, Launch(4, 2), 90)


def test_tables_cover_every_head_size() -> None:
    for table in (configs.GRAM, configs.UNIT_GRAM, configs.PROJECT, configs.UNIT_PROJECT):
        for architecture in TABLES:
            for bits in (16, 32):
                for size in (1, 16, 40, 72, 80, 96, 128, 192, 256):
                    config = find(table, architecture, bits, padded(size))
                    assert config.num_warps in (4, 8)
