"""Two CUDA devices in a torch without CUDA, for the host's half of what runs on GPUs: everything but the kernels.

Tensors are torch's fake ones (`FakeTensorMode`), which have a device, a shape and no numbers: whoever asks for one
raises. `fake_cuda_guard.cpp` stands for the CUDA runtime's current device. In place of a kernel's launch is a
line in `Recorder.launches`, in place of a call of the native CUDA half one in `Recorder.native`; both check that all
memory is on the device that is current (for native calls: named).
"""

import ctypes
import importlib.util
import inspect
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

SOURCE = Path(__file__).parent / "fake_cuda_guard.cpp"
#: Operators whose result, or the size of it, the host has to wait for.
WAITS = {
    "_local_scalar_dense", "_unique", "_unique2", "bincount", "equal", "is_nonzero", "item", "masked_select", "nonzero",
    "repeat_interleave.Tensor", "repeat_interleave.self_Tensor", "unique_consecutive", "unique_dim",
}  # fmt: skip


def build(folder: Path) -> str | None:
    """The guard as a shared library in a folder; why not, where it can't be built."""
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if compiler is None:
        return "there is no C++ compiler"
    if sys.platform != "linux":
        return f"torch's libraries are linked to as on Linux, not as on {sys.platform}"
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    if not (root / "include" / "c10" / "core" / "DeviceGuard.h").exists():
        return f"torch in {root} comes without its headers"
    command = [
        compiler, "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{root / 'include'}", str(SOURCE),
        f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root / 'lib'}", "-o", str(library(folder)),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{' '.join(command)}: {done.stderr[-2000:]}" if done.returncode else None


def library(folder: Path) -> Path:
    return folder / "fake_cuda_guard.so"


class Launch(NamedTuple):
    """A kernel's launch: its name, the device that was current, the grid, its arguments by name, and whether Triton's
    launcher was left out, which chooses the compiled variant."""

    kernel: str
    device: int
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    kept: bool


class Call(NamedTuple):
    """A call of the native CUDA half."""

    function: str
    device: int


class Recorder(TorchDispatchMode):
    """Runs operators of this package as they run on a GPU, and keeps what happens.

    Attributes:
        launches, native: see there. operators: names of torch's operators, views left out.
        faults: what must not happen: copies between devices, numbers read, tensors on another CUDA device.
    """

    def __init__(self, device: int) -> None:
        super().__init__()
        self.device = device
        self.launches: list[Launch] = []
        self.native: list[Call] = []
        self.operators: list[str] = []
        self.faults: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        if op.namespace == "moda_kernels":
            with self:
                return op._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *arguments, **named)
        name = op._schema.name.partition("::")[2]
        if name in WAITS or op._name.partition("::")[2] in WAITS:
            self.fault(f"{op} waits for the device")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in arguments[1]
        ):
            self.fault(f"{op} by a mask waits for how many are chosen")
        result = op(*arguments, **named)
        if not op.is_view:
            self.operators.append(name)
        given = list(tensors((arguments, named, result)))
        kinds = {t.device.type for t in given}
        scalars = [t for t in given if t.device.type == "cpu" and t.dim() == 0]
        if len(kinds) > 1 and ("copy" in name or len(scalars) < sum(t.device.type == "cpu" for t in given)):
            behind = name == "_to_copy" and named.get("non_blocking") and result.device.type == "cpu"
            if not behind:
                self.fault(f"{op} copies between {sorted(str(t.device) for t in given)}")
        for t in given:
            if t.device.type == "cuda" and t.device.index != self.device:
                self.fault(f"{op} on {t.device}")
        return result

    def fault(self, what: str) -> None:
        frames = [f for f in inspect.stack() if "moda_kernels" in f.filename and "/tests/" not in f.filename]
        place = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.function}" for f in frames[:3])
        self.faults.append(f"{what} ({place})")

    def __enter__(self) -> "Recorder":
        _recorders.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _recorders.pop()


_recorders: list[Recorder] = []


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors(each)


class FakeKernel:
    """A compiled kernel that takes a launch down."""

    function = 0
    packed_metadata = ()

    def __init__(self, source: Any) -> None:
        self.name, self.arg_names = source.fn.__name__, source.fn.arg_names
        self.signature = dict(source.signature)

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, stream: int, *rest: Any, kept: bool = False) -> None:
        arguments = dict(zip(self.arg_names, rest[5:], strict=True))
        recorder, current = _recorders[-1], torch.cuda.current_device()
        recorder.launches.append(Launch(self.name, current, (x, y, z), arguments, kept))
        if current != recorder.device or stream != STREAM + current:
            recorder.fault(f"{self.name} is launched on cuda:{current}, stream {stream - STREAM}")
        for name, value in arguments.items():
            for t in tensors(value):
                if t.device != torch.device("cuda", current):
                    recorder.fault(f"{self.name}: {name} is on {t.device}")
        if not (1 <= x < 2**31 and 1 <= y < 2**16 and 1 <= z < 2**16):
            recorder.fault(f"{self.name}: a grid of {x} x {y} x {z}")

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, stream: int | None = None) -> None:
            stream = STREAM + torch.cuda.current_device() if stream is None else stream
            self.run(*grid, stream, 0, (), None, None, None, *arguments, kept=True)

        return launch


class FakeDriver:
    """Triton's driver."""

    def get_current_device(self) -> int:
        return torch.cuda.current_device()

    def get_current_stream(self, device: int) -> int:
        return STREAM + device

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())


#: A device's stream is this and its number.
STREAM = 7000
#: Variants of a kernel that were compiled: name and signature.
COMPILED: list[tuple[str, dict[str, Any]]] = []


class FakeNative:
    """The native extension with a CUDA half that only takes down what it is told."""

    WITH_CUDA = True

    def __init__(self, real: types.ModuleType) -> None:
        self._real = real

    def cuda_probe(self, index: int) -> str:
        return ""

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        if name.endswith("_workspace"):
            return lambda *_: 128
        if not callable(real):
            return real

        def call(*arguments: Any, **named: Any) -> None:
            recorder, index = _recorders[-1], named.get("device", -1)
            recorder.native.append(Call(name, index))
            if index != recorder.device or named.get("stream") != STREAM + index:
                recorder.fault(f"native.{name} on device {index}, stream {named.get('stream', 0) - STREAM}")
            for key, value in named.items():
                for address in value if isinstance(value, list | tuple) else (value,):
                    if address > 2**56 and (address >> 56) - 1 != recorder.device:
                        recorder.fault(f"native.{name}: {key} is on cuda:{(address >> 56) - 1}")

        return call


_addresses: dict[int, tuple[Any, int]] = {}


def _address(tensor: Tensor) -> int:
    """Of a fake tensor's first number; its highest byte says the device."""
    storage = tensor.untyped_storage()
    index = tensor.device.index if tensor.device.type == "cuda" else 62
    kept = _addresses.setdefault(storage._cdata, (storage, (index + 1) << 56 | (len(_addresses) + 1) << 34))
    return kept[1] + tensor.storage_offset() * tensor.element_size()


def install(folder: Path) -> FakeTensorMode:
    """Make this process believe in two devices. For a process of its own: it can't be undone."""
    guard = ctypes.CDLL(str(library(folder)), mode=ctypes.RTLD_GLOBAL)
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # before torch.cuda is changed: it imports the compiler

    def exchange(index: int) -> int:
        before = int(guard.fake_cuda_current())
        if index >= 0:
            guard.fake_cuda_set(index)
        return before

    def properties(device: Any = None) -> Any:
        return types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="a fake device")

    def current_stream(device: Any = None) -> Any:
        index = torch.cuda.current_device() if device is None or device.index is None else device.index
        return types.SimpleNamespace(cuda_stream=STREAM + index, device_index=index)

    cuda: Any = torch.cuda
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.current_device = guard.fake_cuda_current
    cuda._exchange_device = cuda._maybe_exchange_device = exchange
    cuda.device_count = lambda: 2
    cuda.get_device_properties = properties
    cuda.current_stream = current_stream
    cuda.is_current_stream_capturing = lambda: False
    FakeTensor.data_ptr = _address  # type: ignore[method-assign, assignment]
    FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[method-assign, assignment]

    import triton.compiler
    from triton.runtime import driver

    driver.set_active(FakeDriver())

    def compiled(source: Any, *_: Any, **__: Any) -> FakeKernel:
        COMPILED.append((source.fn.__name__, dict(source.signature)))
        return FakeKernel(source)

    triton.compiler.compile = compiled
    return mode
