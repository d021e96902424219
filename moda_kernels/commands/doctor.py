"""`python -m moda_kernels doctor`: what is installed, what runs here, why the rest doesn't, and a small self-check."""

import argparse
import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F

import moda_kernels
from moda_kernels import backends
from moda_kernels.backends.cpu import routes
from moda_kernels.backends.flex import options
from moda_kernels.call import AttentionCall
from moda_kernels.runtime import backend_name, native
from moda_kernels.runtime import self_check as trials
from moda_kernels.tokens.mask import ModularMask
from moda_kernels.tokens.segments import segment_modalities

#: Distributions beside torch, and what they are for.
PACKAGES = {
    "numpy": "",
    "triton": "kernels for CUDA GPUs",
    "matplotlib": "plots, the demo",
    "scikit-learn": "the demo",
}
VARIABLES = {
    backend_name.ENVIRONMENT: "names a backend for the whole process",
    options.ENVIRONMENT: "options of FlexAttention, as JSON",
    trials.ENVIRONMENT: "1 tries Triton kernels before they are trusted, 0 doesn't",
    routes.ENVIRONMENT: "how the CPU computes in 16 bits: measure, features, own or float32",
    "MODA_KERNELS_AUTOTUNE": "1 searches for the Triton kernels' fastest configurations",
    "MODA_KERNELS_NATIVE": "0 switches the native extension off",
}
#: Largest error of the self-check in float32; GPUs may multiply it in TensorFloat-32.
LIMIT = {"cpu": 1e-5, "cuda": 5e-3}

Rows = list[tuple[str, str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`doctor` has no options."""


def run(arguments: argparse.Namespace) -> int:
    """Print the report. Exit code 0 if attention runs here, and rightly."""
    print(f"moda_kernels {moda_kernels.__version__}")
    for title, rows in (
        ("Installed", installed()),
        ("Machine", machine()),
        ("Native extension", native_extension()),
        ("Backends", backends_here()),
        ("16 bits on the CPU", cpu_routes()),
        ("Environment", environment()),
    ):
        _section(title, rows)
    rows, well = self_check()
    _section("Self-check (a small attention call against dense SDPA in float64)", rows)
    print("\nAttention runs here." if well else "\nAttention does not run here as it should: see the reasons above.")
    return 0 if well else 1


def installed() -> Rows:
    rows = [("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")]
    rows.append(("torch", torch.__version__ + (f", CUDA {torch.version.cuda}" if torch.version.cuda else ", no CUDA")))
    for name, purpose in PACKAGES.items():
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            rows.append((name, f"not installed ({purpose})" if purpose else "not installed"))
    return rows


def machine() -> Rows:
    cores = os.cpu_count()
    capability = torch.backends.cpu.get_cpu_capability()
    rows = [("cpu", cpu_model()), ("", f"{cores} logical cores, {torch.get_num_threads()} torch threads, {capability}")]
    if not torch.backends.cuda.is_built():
        return [*rows, ("cuda", "no: this torch is built without CUDA")]
    if not torch.cuda.is_available():
        return [*rows, ("cuda", "no: torch finds no CUDA device")]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        memory = f"{p.total_memory / 2**30:.0f} GiB"
        rows.append((f"cuda:{i}", f"{p.name}, capability {p.major}.{p.minor}, {memory}"))
    return [*rows, ("driver", driver())]


def cpu_model(info: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, from the system where it says so."""
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def driver(info: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The NVIDIA driver's version line, where the system tells."""
    return info.read_text().splitlines()[0].removeprefix("NVRM version:").strip() if info.exists() else "unknown"


def cpu_routes() -> Rows:
    """Which numbers of 16 bits the backend "cpu" makes float32 first, and why."""
    rows = []
    for dtype in routes.DTYPES:
        made = routes.choice(dtype, os.environ.get(routes.ENVIRONMENT) or "measure")
        wide = [kind for kind, route in made.routes.items() if route == routes.FLOAT32]
        said = "as it is" if not wide else f"in float32: {'all' if len(wide) == len(routes.KINDS) else '; '.join(wide)}"
        rows += [(str(dtype).removeprefix("torch."), said), ("", made.why)]
    return rows


def native_extension() -> Rows:
    rows = [(kind, _yes_or(native.why_not(kind))) for kind in ("cpu", "cuda")]
    return rows + list(native.build_info().items())


def backends_here() -> Rows:
    rows = [(name, _yes_or("; ".join(backend.why_absent()))) for name, backend in backends.BACKENDS.items()]
    rows += [("auto", f"takes {taken(device, 'auto')} on {device}") for device in devices()]
    for device in devices():
        tried = "tries each kind of Triton kernel once" if trials.wanted(torch.device(device)) else "tries nothing"
        rows.append(("self-check", f"{tried} on {device} ({trials.architecture(torch.device(device))})"))
    return rows


def environment() -> Rows:
    return [(name, os.environ.get(name) or f"not set ({purpose})") for name, purpose in VARIABLES.items()]


def devices() -> list[str]:
    return ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def taken(device: str, name: str | None = None) -> str:
    """The backend that a plain call on a device goes to; "nothing" where none can run it."""
    name = backends.named_backend(name)
    call = sample_call(device)
    able = [b.name for b in backends.asked(name, call.query.device) if not (b.why_absent() or b.why_not(call))]
    return able[0] if able else "nothing"


def sample_call(device: str) -> AttentionCall:
    """Two sequences of text, image, text with grouped-query heads; images see themselves whole."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 72, 32, generator=generator).to(device) for heads in (4, 2, 2))
    ids = torch.zeros(2, 72, dtype=torch.int32)
    ids[0, 5:37] = ids[1, 20:68] = 1
    layout = segment_modalities(ids.to(device), num_modalities=2)
    mask = ModularMask.bidirectional_within(2, [1])
    return AttentionCall.make(query, key, value, enable_gqa=True, layout=layout, mask=mask)


def self_check() -> tuple[Rows, bool]:
    """One small call per device on the backend that a user's call would take.

    Returns:
        The lines of the report; whether attention runs on at least one device, and is right wherever it runs.
    """
    rows: Rows = []
    outcomes = []
    for device in devices():
        try:
            call = sample_call(device)
            backend = backends.choose(call, None)
            name, (out, _) = backend.name, backend.attend(call)
        except (NotImplementedError, ValueError) as error:  # nothing can run it, or the environment names no backend
            rows.append((device, f"no: {error}"))
            continue
        q, k, v = (x.double() for x in (call.query, call.key, call.value))
        seen = call.mask.visible(call.layout)[:, None]
        truth = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        error_size = float((out.double() - truth).abs().max())
        right = error_size <= LIMIT[device]
        outcomes.append(right)
        verdict = "ok" if right else f"WRONG, expected at most {LIMIT[device]:.0e}"
        rows.append((device, f"{name} backend, largest error {error_size:.1e}: {verdict}"))
    return rows, bool(outcomes) and all(outcomes)


def _yes_or(reason: str | None) -> str:
    return f"no: {reason}" if reason else "runs here"


def _section(title: str, rows: Rows, say: Callable[[str], None] = print) -> None:
    width = max(22, *(len(name) for name, _ in rows))
    say(f"\n{title}")
    for name, text in rows:
        say(f"  {name:<{width}} {text}")
