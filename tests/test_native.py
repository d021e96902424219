"""The native extension: C++, CUDA and the PyTorch twins all say what the definitions say.

Each property test runs for every implementation that this machine can run: the twins ("torch"), the C++ code ("cpu"),
the CUDA kernels on a GPU ("cuda"), and the same kernels compiled for the CPU ("emulated", see `csrc/emulation.h`),
which shows on any machine that their logic is right.
"""

import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import sysconfig
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import test_walks
import torch
from torch import Tensor

from moda_kernels import ModularMask, segment_modalities
from moda_kernels.runtime import native
from moda_kernels.testing import generator, random_ids, random_layout, random_mask, random_steps
from moda_kernels.tokens import intervals, segments, tiles, walks
from moda_kernels.tokens.intervals import ends_of
from moda_kernels.tokens.layout import ModalityLayout, QueryRows

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

CSRC = Path(__file__).parents[1] / "csrc"
CPU_FILES = ("cpu.cpp", "cpu_intervals.cpp", "cpu_walks.cpp", "plan.cpp")
CUDA_FILES = ("cuda_segmentation.cu", "cuda_intervals.cu", "cuda_walks.cu")
#: Where the twins are; the others: in `segments`.
TWINS = {"mask_intervals": intervals, "query_walk": walks, "key_walk": walks}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Implementation:
    """Takes and returns CPU tensors, wherever it works."""

    name: str
    examples: int
    device: torch.device = CPU
    extension: types.ModuleType | None = None

    def __call__(self, function: str, *args: Any) -> tuple[Tensor, ...]:
        with pytest.MonkeyPatch.context() as patch:
            if self.extension is not None:
                patch.setattr(native, "_extension", self.extension)
                patch.setattr(native, "_queue", lambda device: (0, 0))
            module = native
            if self.name == "torch":
                module, function = TWINS.get(function, segments), function + "_torch"
            made = getattr(module, function)(*(a.to(self.device) if isinstance(a, Tensor) else a for a in args))
        return tuple(t.cpu() for t in (made if isinstance(made, tuple) else (made,)))


EMULATED = pytest.param("emulated", marks=pytest.mark.slow)
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(scope="module", params=["torch", "cpu", EMULATED, ON_GPU])
def implementation(request: pytest.FixtureRequest) -> Implementation:
    if request.param == "emulated":
        return Implementation("emulated", 25, extension=request.getfixturevalue("emulated"))
    device = torch.device("cuda" if request.param == "cuda" else "cpu")
    if request.param != "torch" and not native.runs_on(device):
        pytest.skip(f"native extension: {native.why_not(device.type)}")
    return Implementation(request.param, 50, device)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> types.ModuleType:
    """The CUDA files compiled by the C++ compiler, as an extension module."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if not CSRC.is_dir() or compiler is None or importlib.util.find_spec("pybind11") is None:
        pytest.skip("needs the sources (csrc/), a C++ compiler and pybind11")
    import pybind11

    folder = tmp_path_factory.mktemp("emulated")
    # Fortified jumps (the default of some distributions) take a change of stack for a fault.
    flags = ["-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    flags += ["-DMODA_EMULATE_CUDA", "-DMODA_WITH_CUDA"]
    includes = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    builds = []
    for name in ("bindings.cpp", *CPU_FILES, *CUDA_FILES):  # side by side, as most of the time goes to the bindings
        command = [compiler, *flags, "-DMODA_MODULE=_emulated", *includes, "-c", "-x", "c++", CSRC / name]
        builds.append(subprocess.Popen([*command, "-o", folder / f"{name}.o"], stderr=subprocess.PIPE, text=True))
    for build in builds:
        errors = build.communicate()[1]
        assert build.returncode == 0, errors
    library = folder / "_emulated.so"
    subprocess.run([compiler, "-shared", *sorted(folder.glob("*.o")), "-o", library], check=True)
    spec = importlib.util.spec_from_file_location("_emulated", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Segmentation


@dataclass(frozen=True)
class Tokens:
    modality: Tensor
    items: Tensor | None
    cu_seqlens: Tensor
    num_modalities: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.modality, self.items, self.cu_seqlens, self.num_modalities


def runs(draw: st.DrawFn, total: int, values: st.SearchStrategy[int], longest: int) -> list[int]:
    """`total` values in runs, as tokens come."""
    out: list[int] = []
    while len(out) < total:
        out += [draw(values)] * draw(st.integers(1, longest))
    return out[:total]


@st.composite
def tokens(draw: st.DrawFn, min_tokens: int = 0) -> Tokens:
    """A batch or packed documents: padding anywhere, empty documents, items or none."""
    num_modalities = draw(st.sampled_from([1, 2, 3, 5, 16]))
    if draw(st.booleans()):
        lengths = [draw(st.integers(0, 70))] * draw(st.integers(0, 4))
    else:
        lengths = draw(st.lists(st.integers(0, 40) | st.sampled_from([0, 1, 32, 150]), max_size=6))
    if sum(lengths) < min_tokens:
        lengths = [*lengths, min_tokens]
    total, longest = sum(lengths), draw(st.sampled_from([1, 4, 40]))
    ids = runs(draw, total, st.integers(-1, num_modalities - 1), longest)
    items = runs(draw, total, st.sampled_from([0, 1, 2**40]), 10) if draw(st.booleans()) else None
    return Tokens(
        torch.tensor(ids, dtype=torch.int32),
        None if items is None else torch.tensor(items, dtype=torch.int64),
        torch.tensor([0, *lengths]).cumsum(0).int(),
        num_modalities,
    )


def segments_by_definition(case: Tokens) -> tuple[list[int], list[int], list[int], list[list[int]], list[list[int]]]:
    """Segment, position, sequence, prefix and table, token by token (the definition in the README)."""
    ids = case.modality.tolist()
    items = [0] * len(ids) if case.items is None else case.items.tolist()
    bounds = case.cu_seqlens.tolist()
    segment, position, sequence = ([-1] * len(ids) for _ in range(3))
    prefix, table = [[0] * case.num_modalities], []
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        seen, previous = 0, None
        for t in range(start, end):
            sequence[t] = n
            prefix.append(prefix[-1][:])
            kind = (ids[t], items[t])
            if ids[t] >= 0:
                if kind != previous:
                    table.append([n, t, 0, ids[t]])
                segment[t], position[t] = len(table) - 1, seen
                table[-1][2] += 1
                prefix[-1][ids[t]] += 1
                seen += 1
            previous = kind
    return segment, position, sequence, prefix, table


def test_segments_as_defined(implementation: Implementation) -> None:
    @settings(max_examples=implementation.examples)
    @given(tokens(), st.integers(-2, 3))
    def check(case: Tokens, spare: int) -> None:
        made = implementation("segment_tokens", *case.arguments)
        *expected, table = segments_by_definition(case)
        assert [t.tolist() for t in made[:4]] == expected
        assert made[4].tolist() == [len(table)]
        max_segments = max(0, len(table) + spare)
        rows = implementation("segment_table", case.modality, made[0], made[2], max_segments)[0].tolist()
        assert rows == (table + [[0] * 4] * max_segments)[:max_segments]

    check()


def test_token_facts_as_the_twin_says(implementation: Implementation) -> None:
    """The twin is tested against the definition in test_intervals.py."""
    if implementation.name in ("emulated", "cuda"):
        pytest.skip("the CPU alone has it; elsewhere it is PyTorch")
    for seed in range(2 * implementation.examples):
        g = generator(seed)
        made = random_layout(g)
        modality, role, sequence = (x.flatten() for x in (made.modality, made.role, made.sequence))
        given = [torch.randint(low, 3, modality.shape, generator=g) for low in (-3, -1)]
        given[0][torch.rand(modality.shape, generator=g) < 0.1] = 2**40  # no int32, and falls
        given = [None if seed % 3 == i else x for i, x in enumerate(given)]
        arguments = (modality, role, sequence, *given, made.num_roles)
        for output, expected in zip(
            implementation("token_facts", *arguments), segments.token_facts_torch(*arguments), strict=True
        ):
            assert output.dtype == expected.dtype and torch.equal(output, expected)


# Intervals


def intervals_arguments(made: ModalityLayout, rows: QueryRows, mask: ModularMask, **options: bool) -> tuple[Any, ...]:
    """What `mask_intervals` asks its operator for."""
    found: list[tuple[Any, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "_op_mask_intervals", lambda *args: found.append(args) or (args[0], args[0]))
        intervals.mask_intervals(made, rows, mask, **options)
    return found[0]


def intervals_case(seed: int, most: int = 40) -> tuple[Any, ...]:
    """Arguments of `mask_intervals`, of any layout and mask; many passes in some."""
    g = generator(seed)
    made = random_layout(g, most=most)
    mask = random_mask(g, made.num_roles)
    rows = made.queries()
    if not made.packed and seed % 2:
        rows = made.queries(
            made.modality.shape[1] // 2, int(torch.randint(made.modality.shape[1] // 2 + 1, (), generator=g))
        )
    arguments = intervals_arguments(made, rows, mask, split=seed % 3 == 1, by_modality=seed % 3 == 2)
    if seed % 5 == 0 and arguments[11]:  # more passes than a launch takes
        arguments = (
            *arguments[:10],
            *(part * (70 // len(arguments[11]) + 1) for part in arguments[10:13]),
            *arguments[13:],
        )
    return arguments


def test_intervals_are_the_same_everywhere(implementation: Implementation) -> None:
    """The twin is tested against the definition in test_intervals.py."""
    for seed in range(4 * implementation.examples):
        arguments = intervals_case(seed)
        made = implementation("mask_intervals", *arguments)
        for output, expected in zip(made, intervals.mask_intervals_torch(*arguments), strict=True):
            assert output.dtype == expected.dtype and torch.equal(output, expected), seed


def test_intervals_over_many_blocks(implementation: Implementation) -> None:
    """Steps are looked for in tokens that several blocks of a kernel count."""
    for seed in range(4):
        g = generator(seed)
        ids = random_ids(5000, 3, g, longest=400, padding="middle")
        bounds = torch.tensor([0, 2100, 2100, 4999, 5000]).int()
        sequence = torch.searchsorted(bounds[1:], torch.arange(5000).int(), right=True)
        roles = random_ids(5000, 2, g, longest=30)
        made = segment_modalities(
            ids, num_modalities=3, cu_seqlens=bounds, roles=roles, steps=random_steps(sequence * 2 + roles, g, 300)
        )
        arguments = intervals_arguments(made, made.queries(), ModularMask(((8, 16), (16 | 1, 8 | 2)), 50))
        found = implementation("mask_intervals", *arguments)
        for output, expected in zip(found, intervals.mask_intervals_torch(*arguments), strict=True):
            assert torch.equal(output, expected)


def test_intervals_with_bad_values_stay_inside(implementation: Implementation) -> None:
    """Steps that fall, chunks and segments that are not there: what comes out is anybody's guess, but it comes."""
    for seed in range(10):
        arguments = list(intervals_case(seed))
        tokens = arguments[0].numel()
        g = generator(seed)
        arguments[4] = torch.randint(-9, 9, (tokens,), generator=g, dtype=torch.int32)
        arguments[8] = arguments[8][: arguments[8].shape[0] // 2]  # fewer rows of the table than segments
        limits, positions = implementation("mask_intervals", *arguments)
        low, high = ends_of(limits, len(positions))
        assert bool((high >= -2).all()) and bool((low >= -1).all())


def many_tokens(rows: int, packed: bool, num_modalities: int) -> Tokens:
    """Runs of 1 to 400 tokens, in rows of 4096 or in documents of up to 10,000 tokens with items."""
    total = 4096 * rows

    def in_runs(values: Tensor) -> Tensor:
        return values.repeat_interleave(torch.randint(1, 401, values.shape))[:total]

    runs = total // 100
    ids = in_runs(torch.randint(-1, num_modalities, (runs,))).int()
    if not packed:
        return Tokens(ids, None, torch.arange(0, total + 1, 4096, dtype=torch.int32), num_modalities)
    bounds = torch.randint(0, 10_001, (rows,)).cumsum(0).clamp(max=total)
    bounds[0], bounds[-1] = 0, total
    return Tokens(ids, in_runs(torch.arange(runs)), bounds.int(), num_modalities)


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("num_modalities", [3, 40])
def test_many_tokens(implementation: Implementation, packed: bool, num_modalities: int) -> None:
    if implementation.name == "torch":
        pytest.skip("the twin is what the others are compared with")
    # Over 2^18 tokens a warp of the kernels goes on from one 32 tokens to the next. Over 30 modalities it shares them
    # with another.
    rows = 4 if num_modalities > 3 else 65 if implementation.name == "emulated" else 256
    case, twin = many_tokens(rows, packed, num_modalities), Implementation("torch", 0)
    made, expected = (i("segment_tokens", *case.arguments) for i in (implementation, twin))
    assert all(map(torch.equal, made, expected))
    of_table = (case.modality, expected[0], expected[2], int(expected[4]) + 5)
    table, expected_table = (i("segment_table", *of_table)[0] for i in (implementation, twin))
    assert torch.equal(table, expected_table)


# Tile lists


# Walks


def test_walks_are_those_of_the_twins(implementation: Implementation) -> None:
    """What walks have to be is in `test_walks.py`."""
    if implementation.name == "torch":
        pytest.skip("the twin is what the others are compared with")
    twin, compared = Implementation("torch", 0), 0
    for seed in range(2 * implementation.examples):
        case = test_walks.random_case(seed)
        blocks = list(test_walks.BLOCKS[seed % 5])
        capacities, lengths = walks.tile_sizes(case.q_shape, case.k_shape, case.cu_q, *blocks)
        if not all(capacities):
            continue  # the operators don't call them
        compared += 1
        common = (case.cu_q, case.cu_k, capacities, lengths, blocks)
        for function, arguments in (
            ("query_walk", (case.limits, case.positions, case.real, *common, seed % 4 == 1)),
            ("key_walk", (case.limits, case.positions, *common, 1 + seed % 4)),
        ):
            made, expected = (i(function, *arguments) for i in (implementation, twin))
            for which, (one, two) in enumerate(zip(made, expected, strict=True)):
                assert torch.equal(one, two), f"seed {seed}, {function}, output {which}"
    assert compared > implementation.examples


def test_walks_of_nonsense_stay_inside(implementation: Implementation) -> None:
    """On CUDA nobody looks at values: whatever they are, what comes out indexes what is there."""
    g = torch.Generator().manual_seed(0)
    bounds, rows, blocks = torch.tensor([0, 0, 70, 71, 200], dtype=torch.int32), 200, [16, 8]
    capacities = [rows // 16 + 4, rows // 8 + 4]
    for most in (5, 300, 2**31 - 1):
        limits = torch.randint(-most, most, (7, rows), generator=g).int()
        positions = torch.randint(-most, most, (2, rows), generator=g).int()
        common = (bounds, bounds, capacities, [-1, -1], blocks)
        real = torch.rand(rows, generator=g) < 0.9
        for affine in (False, True):
            _, order, runs, lists = implementation("query_walk", limits, positions, real, *common, affine)
            assert order.sort().values.tolist() == list(range(capacities[0]))
            assert runs.min() >= 0 and runs.max() < lists.shape[1] and lists.min() >= 0 and lists.max() < rows
            assert (runs[..., ::2] <= runs[..., 1::2]).all()
        _, order, runs, lists = implementation("key_walk", limits, positions, *common, 3)
        assert order.sort().values.tolist() == list(range(capacities[1]))
        assert runs.min() >= 0 and runs.max() < lists.shape[1] and lists.min() >= 0 and lists.max() < rows
        assert (runs[..., ::2] <= runs[..., 1::2]).all()


def test_walks_of_many_tiles(implementation: Implementation) -> None:
    """More tiles than a block of the kernels has threads: scans and sorts go on from one stretch to the next."""
    if implementation.name == "torch":
        pytest.skip("the twin is what the others are compared with")
    g = torch.Generator().manual_seed(0)
    total, twin = 4_500, Implementation("torch", 0)
    bounds = torch.cat(
        (torch.zeros(1), torch.randint(0, total, (40,), generator=g).sort().values, torch.tensor([total]))
    )
    bounds = bounds.int()
    sequence = torch.repeat_interleave(torch.arange(41), bounds.diff().long())
    role = torch.repeat_interleave(torch.randint(-1, 3, (total,), generator=g), 7)[:total]
    position = torch.arange(total) - bounds[sequence]
    positions = torch.stack([torch.where(role == r, position, -1) for r in range(2)]).int()
    near = torch.stack((position - 1 - role * 30, position + role * 9))
    limits = torch.stack((near, torch.stack((torch.full_like(position, -1), position // (4 + role) - 40))))
    limits = torch.where((limits[:, :1] < limits[:, 1:]) & (role >= 0), limits, torch.tensor([2**31 - 1, -2])[:, None])
    limits = test_walks.stored(limits.clamp(min=-2).expand(2, 2, 2, total))
    common = (bounds, bounds, [total // 3 + 41, total // 4 + 41], [-1, -1], [3, 4])
    for function, arguments in (
        ("query_walk", (limits, positions, role >= 0, *common, False)),
        ("query_walk", (limits, positions, role >= 0, *common, True)),
        ("key_walk", (limits, positions, *common, 2)),
    ):
        made, expected = (i(function, *arguments) for i in (implementation, twin))
        assert all(map(torch.equal, made, expected)), function


# The door


def test_the_extension_says_what_it_is() -> None:
    if not native.runs_on(CPU):
        pytest.skip(f"native extension: {native.why_not('cpu')}")
    assert native.why_not("cpu") is None
    assert "file" in native.build_info()


def test_strided_arguments_are_taken(implementation: Implementation) -> None:
    wide = torch.randint(-1, 2, (40, 2), dtype=torch.int32)
    bounds = torch.tensor([0, 15, 40], dtype=torch.int32)
    made, expected = (
        implementation("segment_tokens", ids, None, bounds, 2) for ids in (wide[:, 0], wide[:, 0].clone())
    )
    assert all(map(torch.equal, made, expected))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"modality": torch.zeros(3, dtype=torch.int64)}, TypeError, "modality: expected a tensor of torch.int32, got"),
        ({"items": torch.zeros(2, dtype=torch.int64)}, ValueError, r"items: expected shape .* = \(3,\), got"),
        (
            {"cu_seqlens": torch.zeros(2, dtype=torch.int32, device="meta")},
            ValueError,
            "cu_seqlens: expected a tensor on",
        ),
    ],
)
def test_wrong_arguments(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    if not native.runs_on(CPU):
        pytest.skip(f"native extension: {native.why_not('cpu')}")
    ids, bounds = torch.zeros(3, dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    arguments: dict[str, Any] = {"modality": ids, "items": None, "cu_seqlens": bounds, "num_modalities": 1}
    with pytest.raises(error, match=message):
        native.segment_tokens(**arguments | change)


def test_switched_off() -> None:
    script = (
        "import torch; from moda_kernels import segment_modalities; from moda_kernels.runtime import native\n"
        "assert not native.runs_on(torch.device('cpu')) and native.build_info() == {}\n"
        "assert 'MODA_KERNELS_NATIVE' in native.why_not('cpu')\n"
        "assert segment_modalities(torch.tensor([[0, 1, 1]])).max_segments == 2"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"MODA_KERNELS_NATIVE": "0"})


# CUDA


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_cuda_compiles(architecture: str, tmp_path: Path) -> None:
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    if nvcc is None or not CSRC.is_dir():
        pytest.skip("needs nvcc and the sources (csrc/)")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    if architecture not in known:
        pytest.skip(f"this nvcc does not know {architecture}")
    flags = ["-std=c++17", "-O3", f"-arch={architecture}", "-Werror=all-warnings", "-cubin"]
    done = subprocess.run([nvcc, *flags, *(CSRC / f for f in CUDA_FILES)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def on_cuda() -> torch.device:
    device = torch.device("cuda", torch.cuda.current_device())
    if not native.runs_on(device):
        pytest.skip(f"native extension: {native.why_not('cuda')}")
    return device


def everything(ids: Tensor) -> list[Tensor]:
    """A layout and its walks, without anything that waits for a device."""
    made = segment_modalities(
        ids, num_modalities=3, max_segments=ids.numel(), roles=ids.clamp(min=0), num_roles=3,
        steps=torch.arange(ids.shape[1], device=ids.device).expand(ids.shape), chunks=ids,
    )  # fmt: skip
    mask = ModularMask(((16, 8, 1), (32, 2, 16), (1, 0, 8 | 32)), 100)
    sets = intervals.mask_intervals(made, made.queries(), mask)
    made = segment_modalities(ids, num_modalities=3, max_segments=ids.numel())
    walked = tiles.mask_tiles(made, ModularMask.bidirectional_within(3, [1]), 128, 64)
    assert walked.queries is not None and walked.keys is not None
    fields = [made.segment, made.position, made.sequence, made.prefix, made.num_segments, made.table]
    fields += [*walked[:2], *walked.queries, *walked.keys]
    return [*fields, *sets]


def multimodal(rows: int, length: int) -> Tensor:
    return torch.randint(-1, 3, (rows, length // 64)).repeat_interleave(64, 1)


@pytest.mark.gpu
def test_cuda_does_not_synchronise(on_cuda: torch.device) -> None:
    ids = multimodal(2, 4096)
    there = ids.to(on_cuda)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = everything(there)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(made, everything(ids), strict=True))


@pytest.mark.gpu
def test_cuda_graph(on_cuda: torch.device) -> None:
    there = multimodal(2, 4096).to(on_cuda)
    everything(there)  # as a capture wants it: what is loaded or tuned once has been
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = everything(there)
    for _ in range(3):
        ids = multimodal(2, 4096)
        there.copy_(ids)
        graph.replay()
        assert all(torch.equal(a.cpu(), b) for a, b in zip(made, everything(ids), strict=True))


@pytest.mark.gpu
def test_cuda_uses_the_current_stream(on_cuda: torch.device) -> None:
    ids = multimodal(16, 65536)
    stream = torch.cuda.Stream(on_cuda)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what runs elsewhere would read ids that are not there yet
        made = everything(ids.pin_memory().to(on_cuda, non_blocking=True))
    stream.synchronize()
    assert all(torch.equal(a.cpu(), b) for a, b in zip(made, everything(ids), strict=True))


@pytest.mark.gpu
def test_probe_of_a_device_that_is_not_there(on_cuda: torch.device) -> None:
    assert "invalid device" in native._loaded().cuda_probe(10_000)
    everything(multimodal(1, 64).to(on_cuda))  # nothing was left behind that this could be blamed for
