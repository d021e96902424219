"""Keeps a race of torch's CPU builds out of our results (pytorch issue 188792).

oneMKL 2024 chooses the kernel of each vector function (exp, log, …) at its first call. When that call comes from
several threads at once, one of them can run a low-accuracy kernel for its share: float64 results that are off by 1e-9,
once per process. So the functions that this package uses are called once by one thread, at import.
"""

import torch


def choose_kernels() -> None:
    """Have MKL choose its kernels now."""
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype, device="cpu")
        for function in (torch.exp, torch.expm1, torch.log, torch.log1p, torch.sqrt):
            function(one)
