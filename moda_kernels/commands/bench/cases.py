"""A case is what contestants are compared on: a workload, a dtype, heads, a device, and what is run on them."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from moda_kernels.commands.bench.layouts import MODALITIES, Workload, make_workload

#: What a case runs, and which passes are timed in one run of it.
MODES = {
    "forward": ("forward",),
    "training": ("backward", "forward+backward"),
    "decode": ("decode",),
}
#: FLOPs of a pass, in those of a forward (the backward has five products to its two).
WORK = {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5, "decode": 1.0}


@dataclass(frozen=True)
class Case:
    """One case. Cheap to make, hash and send to another process: workload and tensors are made on demand.

    Attributes:
        layout, length, seed: of the workload.
        mode: in :data:`MODES`; "decode" is one query, the last token, against all keys.
        device: "cpu" or "cuda".
    """

    layout: str
    length: int
    dtype: torch.dtype
    mode: str = "forward"
    query_heads: int = 8
    key_heads: int = 2
    head_dim: int = 64
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {self.mode!r}")
        if not can(self.layout, self.mode):
            raise ValueError(f"mode: expected decoding of one sequence, got it of {self.layout!r}")

    @functools.cached_property
    def workload(self) -> Workload:
        return make_workload(self.layout, self.length, self.seed, self.device)

    @property
    def passes(self) -> tuple[str, ...]:
        return MODES[self.mode]

    @property
    def backward(self) -> bool:
        """It needs gradients."""
        return self.mode == "training"

    @property
    def queries(self) -> int:
        """Query rows."""
        return 1 if self.mode == "decode" else self.length

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @functools.cached_property
    def visible_pairs(self) -> int:
        """(query, key) pairs of this case's queries."""
        return self.workload.visible_pairs if self.queries == self.length else self.workload.pairs(self.queries)

    @property
    def plain(self) -> bool:
        """`is_causal`, or no mask at all, says who sees whom here: kernels without masks of their own can take part."""
        if self.mode == "decode":  # the last token of a text sees everything
            return self.visible_pairs == self.length
        return self.workload.causal or self.workload.full

    @property
    def is_causal(self) -> bool:
        """What a kernel that knows nothing else is to be told."""
        return self.mode != "decode" and not self.workload.full

    def useful_flops(self, measured: str) -> float:
        """Of a pass, of the visible pairs only: 4·Hq·D each in the forward, 2.5 times that in the backward."""
        return 4.0 * self.query_heads * self.head_dim * self.visible_pairs * WORK[measured]

    @property
    def cache_bytes(self) -> int:
        """Keys and values that a decoding step has to read."""
        return 2 * self.key_heads * self.head_dim * self.visible_pairs * self.dtype.itemsize

    def tensors(self) -> dict[str, Tensor]:
        """query ``[1, Hq, Lq, D]``, key, value ``[1, Hkv, L, D]`` and the upstream gradient "dout", in the case's
        dtype, on its device; "weight" ``[M, D, 2D]``, float32, is the parameter of the contestants that align keys."""
        g = torch.Generator(self.device).manual_seed(self.seed + 1)
        dim = self.head_dim
        of_query, of_key = (1, self.query_heads, self.queries, dim), (1, self.key_heads, self.length, dim)
        shapes = {"query": of_query, "key": of_key, "value": of_key, "dout": of_query}
        made = {
            name: torch.randn(shape, generator=g, device=self.device).to(self.dtype) for name, shape in shapes.items()
        }
        noise = torch.randn(MODALITIES, dim, 2 * dim, generator=g, device=self.device)
        made["weight"] = torch.eye(dim, 2 * dim, device=self.device) + 0.5 * dim**-0.5 * noise
        return made

    def __str__(self) -> str:
        return f"{self.layout}, L = {self.length}, {self.dtype_name}, {self.mode}"


def can(layout: str, mode: str) -> bool:
    """Whether a layout has a mode: packed documents have no last token to decode."""
    return not (layout == "packed" and mode == "decode")
