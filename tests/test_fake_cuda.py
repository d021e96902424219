"""The host's half of calls on CUDA, without a GPU: `fake_cuda_calls.py`, in a process that believes in two devices.

No number is read, nothing is copied between devices, and kernels are launched, and native functions called, on the
device of their tensors while another one is current."""

import os
import subprocess
import sys
from pathlib import Path

import fake_cuda
import pytest
import torch

from moda_kernels.runtime import gpu

if torch.version.cuda is not None:
    pytest.skip("torch is built with CUDA, whose own devices can't be replaced", allow_module_level=True)
if gpu.why_absent():
    pytest.skip("; ".join(gpu.why_absent()), allow_module_level=True)

MAIN = """
import os, sys, pytest
code = pytest.main(["-q", "-p", "no:cacheprovider", "--tb=short", *sys.argv[1:]])
sys.stdout.flush()
os._exit(code)  # threads of devices that are none would not end
"""


def test_the_host_neither_waits_nor_mistakes_the_device(tmp_path: Path) -> None:
    why_not = fake_cuda.build(tmp_path)
    if why_not is not None:
        pytest.skip(f"the device guard can't be built: {why_not}")
    environment = {
        **os.environ, "FAKE_CUDA": str(tmp_path), "LD_PRELOAD": str(fake_cuda.library(tmp_path)),
        "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "triton"), "OMP_NUM_THREADS": "1",
        "MODA_KERNELS_SELF_CHECK": "0",  # it reads numbers, of which there are none
    }  # fmt: skip
    for name in ("MODA_KERNELS_BACKEND", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
        environment.pop(name, None)
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", MAIN, str(tests / "fake_cuda_calls.py")],
        cwd=tests.parent, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
