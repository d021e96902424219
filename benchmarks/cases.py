"""A case is what contestants are compared on: a workload, a dtype, heads, and forward or forward and backward."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.layouts import MODALITIES, Workload, make_workload

PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """One case. Cheap to make, hash and send to another process: workload and tensors are made on demand.

    Attributes:
        layout, length, seed: of the workload.
        backward: gradients too.
    """

    layout: str
    length: int
    dtype: torch.dtype
    backward: bool = False
    query_heads: int = 8
    key_heads: int = 2
    head_dim: int = 64
    seed: int = 0

    @functools.cached_property
    def workload(self) -> Workload:
        return make_workload(self.layout, self.length, self.seed)

    @property
    def measured(self) -> str:
        """One of :data:`PASSES`."""
        return PASSES[self.backward]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def useful_flops(self) -> float:
        """Of the visible pairs only: 4·Hq·D each in the forward, 2.5 times that in the backward."""
        forward = 4.0 * self.query_heads * self.head_dim * self.workload.visible_pairs
        return forward * 3.5 if self.backward else forward

    def tensors(self) -> dict[str, Tensor]:
        """query, key, value ``[1, H, L, D]`` and the upstream gradient "dout", in the case's dtype; "weight"
        ``[M, D, 2D]``, float32, is the parameter of the contestants that align keys."""
        g = torch.Generator().manual_seed(self.seed + 1)
        q_shape, k_shape = ((1, heads, self.length, self.head_dim) for heads in (self.query_heads, self.key_heads))
        shapes = {"query": q_shape, "key": k_shape, "value": k_shape, "dout": q_shape}
        made = {name: torch.randn(shape, generator=g).to(self.dtype) for name, shape in shapes.items()}
        noise = torch.randn(MODALITIES, self.head_dim, 2 * self.head_dim, generator=g)
        made["weight"] = torch.eye(self.head_dim, 2 * self.head_dim) + 0.5 * self.head_dim**-0.5 * noise
        return made

    def __str__(self) -> str:
        return f"{self.layout}, L = {self.length}, {self.dtype_name}, {self.measured}"
