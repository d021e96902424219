"""DTensors sharded over heads (tensor parallelism): heads know nothing of each other, so each rank computes its own,
and nothing is sent but the gradients of what all heads share.

Layouts are plain tensors, the same on every rank. What is given per query head or for all heads is whole on every rank
too, and so is its gradient.
"""

import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moda_kernels.runtime import checks, collectives

_PLACEMENTS = "each Replicate(), or one of them Shard(1), the heads"


def is_dtensor(x: object) -> bool:
    """Whether a value is a DTensor. (Its module takes long to import; who has one has imported it.)"""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, getattr(module, "DTensor", ()))


@dataclass(frozen=True, eq=False)
class Heads:
    """How a call's heads lie on a mesh.

    Attributes:
        mesh: a DeviceMesh. sharded: whether heads are, else every rank has them all.
        dim: the dimension of the mesh over which they are.
    """

    mesh: Any
    sharded: bool
    dim: int

    @property
    def ranks(self) -> int:
        """Over how many the heads are spread."""
        return int(self.mesh.size(self.dim)) if self.sharded else 1

    def local(self, x: Any) -> Tensor:
        """The part of a DTensor that is here."""
        out: Tensor = x.to_local()
        return out

    def whole(self, x: Tensor, axis: int) -> Tensor:
        """The DTensor of which this is the part, heads along an axis."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        placements: list[Any] = [Replicate()] * self.mesh.ndim
        if self.sharded:
            placements[self.dim] = Shard(axis)
        out: Tensor = DTensor.from_local(x, self.mesh, placements, run_check=False)
        return out

    def shared(self, x: Any) -> Any:
        """What all heads use: its gradient is the sum over the ranks."""
        if is_dtensor(x):
            x = x.to_local()
        if not isinstance(x, Tensor) or not self.sharded:
            return x
        return collectives.sum_gradients(x, self.mesh.get_group(self.dim))

    def own(self, name: str, x: Any, axis: int, every: int) -> Any:
        """Of what is given per head or for all (`every` of them), this rank's heads.

        Raises:
            ValueError: a DTensor that is sharded otherwise.
        """
        if is_dtensor(x):
            placements = [p for p in x.placements if not p.is_replicate()]
            if placements:
                here = x.device_mesh == self.mesh and self.sharded and x.placements[self.dim].is_shard(axis % x.dim())
                if len(placements) > 1 or not here:
                    raise checks.wrong_value(name, f"Replicate() or Shard({axis % x.dim()}), as the heads", x)
                return x.to_local()
        x = self.shared(x)
        if not isinstance(x, Tensor) or not self.sharded:
            return x
        if x.dim() < (-axis if axis < 0 else axis + 1) or x.shape[axis] != every:
            return x
        size, rank = self.mesh.size(self.dim), self.mesh.get_local_rank(self.dim)
        return x.narrow(axis, rank * every // size, every // size)


def heads_of(**tensors: Any) -> Heads | None:
    """How the heads (axis 1) of some tensors lie on a mesh; None: they are plain tensors.

    Raises:
        TypeError: DTensors and plain tensors. ValueError: DTensors that lie differently, are sharded over something
            else than heads, or whose heads the ranks don't divide.
    """
    names = [name for name, x in tensors.items() if is_dtensor(x)]
    if not names:
        return None
    first = tensors[names[0]]
    for name, x in tensors.items():
        if not is_dtensor(x):
            raise checks.wrong_type(
                name, f"a DTensor, as {names[0]} (or plain torch.Tensors all: to_local()), beside "
                f"{checks.describe(first)}", x,
            )  # fmt: skip
        if x.device_mesh != first.device_mesh or tuple(x.placements) != tuple(first.placements):
            expected = f"on {first.device_mesh} as {tuple(first.placements)}, like {names[0]}"
            raise checks.wrong_value(name, expected, f"on {x.device_mesh} as {tuple(x.placements)}")
    placements = list(first.placements)
    sharded = [i for i, p in enumerate(placements) if not p.is_replicate()]
    if len(sharded) > 1 or not all(placements[i].is_shard(1) for i in sharded):
        raise checks.wrong_value(names[0], f"placements {_PLACEMENTS} (redistribute it)", f"{tuple(placements)}")
    dim = sharded[0] if sharded else 0
    size = first.device_mesh.size(dim)
    for name, x in tensors.items():
        if sharded and (x.dim() < 2 or x.shape[1] % size):
            expected = f"a number of heads that the {size} ranks of the mesh divide"
            raise checks.wrong_value(name, expected, f"{x.shape[1] if x.dim() > 1 else 0} heads")
    return Heads(first.device_mesh, bool(sharded), dim)
