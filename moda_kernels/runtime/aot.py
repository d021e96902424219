"""Kernels compiled without a GPU, and what the compiler made of them: registers, stack, spills, shared memory.

Each kernel module named in `MODULES` has a function `builds()` that yields a `Build` for every configuration that it
ships. `python -m moda_kernels.runtime.aot` compiles those marked for the gate (`--all`: all of them), prints a table
and exits with 1 where a build needs more than its architecture has or than it is allowed.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moda_kernels.runtime.architectures import KNOWN, Target
from moda_kernels.runtime.launch import Launch

#: The modules whose builds are compiled.
MODULES = (
    "moda_kernels.products.kernels",
    "moda_kernels.backends.triton.builds",
)
#: What ptxas remarks (C7510, C7515) where each product of sm_90 waits for the one before.
SERIALIZED = "wgmma.mma_async instructions are serialized"


@dataclass(frozen=True)
class Build:
    """One kernel in one configuration for one architecture.

    Attributes:
        name: what it is, for the table: "segment_gram bf16 128x128".
        kernel: the `@triton.jit` function.
        target: one of `KNOWN` in `architectures.py`.
        types: Triton's type of each argument that is no constant: "*bf16", "*fp32", "i32", "fp32"; of a NamedTuple of
            pointers, such a NamedTuple of types, None for members that are None.
        constants: every `tl.constexpr`, and arguments specialised to a number (a stride of 1) or None.
        config: the launch.
        divisible_by_16: integer arguments that are multiples of 16, as strides usually are; pointers always are.
        stack_allowance: bytes of stack that are accepted.
        gate: compiled by the tests too, not only with `--all`.
    """

    name: str
    kernel: Any
    target: Target
    types: Mapping[str, Any]
    constants: Mapping[str, Any]
    config: Launch
    divisible_by_16: tuple[str, ...] = ()
    stack_allowance: int = 0
    gate: bool = False

    def compile(self) -> "Report":
        return compile_kernel(self.kernel, self.types, self.constants, self.config, self.target, self.divisible_by_16)

    def faults(self, report: "Report") -> list[str]:
        """What is wrong with a report; empty where it may ship."""
        found = []
        if report.shared > KNOWN[self.target].shared:
            found.append(f"{report.shared} bytes of shared memory, {name_of(self.target)} has no more than "
                         f"{KNOWN[self.target].shared}")  # fmt: skip
        if report.stack > self.stack_allowance:
            found.append(f"{report.stack} bytes of stack, {self.stack_allowance} allowed")
        if report.serialized:
            found.append("ptxas serialises its wgmma")
        return found


def name_of(target: Target) -> str:
    return target if isinstance(target, str) else f"sm_{target}"


@dataclass(frozen=True)
class Report:
    """What the compiler made of a kernel.

    Attributes:
        registers: per thread. stack: bytes per thread. shared: bytes per block.
        spill_stores, spill_loads: instructions that write or read the stack.
        wgmma, mma_sync, tcgen05, mfma: matrix instructions, of sm_90, any NVIDIA GPU, sm_100, and AMD's.
        serialized: whether ptxas made each wgmma wait for the one before.
        seconds: that compiling took (little where Triton's cache had it).
    """

    registers: int
    stack: int
    shared: int
    spill_stores: int
    spill_loads: int
    wgmma: int
    mma_sync: int
    tcgen05: int
    mfma: int
    serialized: bool
    seconds: float


def compile_kernel(
    fn: Any,
    types: Mapping[str, Any],
    constants: Mapping[str, Any],
    config: Launch,
    target: Target,
    divisible_by_16: Iterable[str] = (),
) -> Report:
    """Compile a kernel for an architecture, and look at the result. Arguments: as the attributes of `Build`.

    Raises:
        RuntimeError: Triton is in its interpreter (TRITON_INTERPRET=1), which compiles nothing.
        ValueError: `types` and `constants` don't name exactly the kernel's arguments.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(fn, triton.JITFunction):
        raise RuntimeError("kernels are compiled only in a process without TRITON_INTERPRET=1")
    if sorted([*types, *constants]) != sorted(fn.arg_names):
        wrong = sorted({*types, *constants} ^ {*fn.arg_names}) or sorted({*types} & {*constants})
        raise ValueError(f"{fn.__name__}: types and constants differ from the kernel's arguments in {wrong}")
    source = ASTSource(fn, *_described(fn.arg_names, types, constants, set(divisible_by_16)))
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    begin = time.perf_counter()
    amd = isinstance(target, str)
    of = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", target, 32)
    made = triton.compile(source, target=of, options=options)
    seconds = round(time.perf_counter() - begin, 2)
    return _amd_report(made, seconds) if amd else _nvidia_report(made, seconds)


def _nvidia_report(compiled: Any, seconds: float) -> Report:
    usage, code = _cuobjdump(compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {usage!r}")
    ptx = compiled.asm["ptx"]
    return Report(
        registers=int(found[1]),
        stack=int(found[2]),
        shared=compiled.metadata.shared,
        spill_stores=len(re.findall(r"\bSTL\b", code)),
        spill_loads=len(re.findall(r"\bLDL\b", code)),
        wgmma=ptx.count("wgmma.mma_async"),
        mma_sync=ptx.count("mma.sync"),
        tcgen05=ptx.count("tcgen05.mma"),
        mfma=0,
        serialized="wgmma.mma_async" in ptx and SERIALIZED in _ptxas_remarks(ptx),
        seconds=seconds,
    )


def _amd_report(compiled: Any, seconds: float) -> Report:
    code = compiled.asm["amdgcn"]

    def fact(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)", code, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"the code object says nothing of {name}")
        return int(found[1])

    return Report(
        registers=fact("vgpr_count"),
        stack=fact("private_segment_fixed_size"),
        shared=compiled.metadata.shared,
        spill_stores=len(re.findall(r"\bscratch_store", code)),
        spill_loads=len(re.findall(r"\bscratch_load", code)),
        wgmma=0,
        mma_sync=0,
        tcgen05=0,
        mfma=len(re.findall(r"\bv_mfma", code)),
        serialized=False,
        seconds=seconds,
    )


def _described(
    names: list[str], types: Mapping[str, Any], constants: Mapping[str, Any], divisible_by_16: set[str]
) -> tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """A kernel's signature, constants and attributes by place: that of an argument, or of a member of one."""
    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(names):
        kind = types.get(name)
        members = {(i, j): of for j, of in enumerate(kind)} if isinstance(kind, tuple) else {(i,): kind}
        if isinstance(kind, tuple):
            signature[name] = type(kind)(*("constexpr" if of is None else of for of in kind))
            constexprs |= {place: None for place, of in members.items() if of is None}
        else:
            signature[name] = "constexpr" if kind is None else kind
            constexprs |= {(i,): constants[name]} if kind is None else {}
        for place, of in members.items():
            if of is not None and (of.startswith("*") or name in divisible_by_16):
                attributes[place] = [["tt.divisibility", 16]]
    return signature, constexprs, attributes


def _ptxas_remarks(ptx: str) -> str:
    """What ptxas says of sm_90's code; Triton keeps none of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [str(_tool("ptxas")), "-v", "--gpu-name=sm_90a", str(path), "-o", str(path.with_suffix(".cubin"))]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


def _tool(name: str) -> Path:
    """A tool of Triton's own package."""
    import triton.backends.nvidia

    return Path(triton.backends.nvidia.__file__).parent / "bin" / name


def _cuobjdump(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code of a cubin."""
    tool = _tool("cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, code = (
            subprocess.run([tool, option, path], check=True, capture_output=True, text=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    return usage, code


def _has_amd() -> bool:
    """Whether this Triton compiles for AMD GPUs, as pip's does."""
    from triton.backends import backends

    return "amd" in backends


def builds() -> Iterator[Build]:
    """Every build of every kernel."""
    for name in MODULES:
        yield from importlib.import_module(name).builds()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moda_kernels.runtime.aot", description=__doc__)
    parser.add_argument("--all", action="store_true", help="every build, not only those of the gate")
    parser.add_argument("--json", action="store_true", help="one JSON object per build in place of the table")
    parser.add_argument("--only", default="", metavar="TEXT", help="builds whose name contains this")
    parser.add_argument("--target", help="builds for this architecture, as 90 or gfx942")
    chosen = parser.parse_args(arguments)
    failed = 0
    if not chosen.json:
        print(f"{'build':<52} {'for':>6} regs stack shared  spills wgmma mma tcgen05 mfma")
    for build in builds():
        if chosen.only not in build.name or chosen.target not in (None, str(build.target)):
            continue
        if not (chosen.all or build.gate) or (isinstance(build.target, str) and not _has_amd()):
            continue
        report = build.compile()
        faults = build.faults(report)
        failed += bool(faults)
        if chosen.json:
            line = {"name": build.name, "target": build.target, **asdict(build.config), **asdict(report)}
            print(json.dumps({**line, "faults": faults}), flush=True)
            continue
        spills = f"{report.spill_stores}/{report.spill_loads}"
        print(
            f"{build.name:<52} {build.target:>6} {report.registers:>4} {report.stack:>5} {report.shared:>6} "
            f"{spills:>7} {report.wgmma:>5} {report.mma_sync:>3} {report.tcgen05:>7} "
            f"{report.mfma:>4}  {'; '.join(faults)}".rstrip(),
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
