"""Groups of processes: what users may give for one, and that all of its ranks mean the same."""

import hashlib
from typing import Any

import torch

from moda_kernels.runtime import checks, collectives
from moda_kernels.runtime.collectives import Group
from moda_kernels.tokens.layout import ModalityLayout

_EXPECTED = "a ProcessGroup or a DeviceMesh of one dimension"


def group_of(name: str, mesh_or_group: Any) -> Group:
    """The process group that is meant.

    Raises:
        ValueError: no process group, one that this process isn't in, a mesh of several dimensions. TypeError: neither.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        expected = f"{_EXPECTED} (torch.distributed.init_process_group makes the first one)"
        raise checks.wrong_value(name, expected, "no process group: torch.distributed is not initialised")
    if mesh_or_group is None:
        return dist.group.WORLD
    if isinstance(mesh_or_group, dist.ProcessGroup):
        return mesh_or_group
    if mesh_or_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise checks.wrong_value(name, f"{_EXPECTED} that this process is in", "a group of other processes")
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh_or_group, DeviceMesh):
        raise checks.wrong_type(name, _EXPECTED, mesh_or_group)
    if mesh_or_group.ndim != 1:
        names = mesh_or_group.mesh_dim_names or ()
        example = f'mesh["{names[0]}"]' if names else 'mesh["…"]'
        got = f"{mesh_or_group.ndim} dimensions {names}"
        raise checks.wrong_value(name, f"{_EXPECTED} (one of a larger mesh: {example})", got)
    if mesh_or_group.get_coordinate() is None:
        raise checks.wrong_value(name, f"{_EXPECTED} that this process is in", "a mesh of other processes")
    return mesh_or_group.get_group()


def check_same(what: str, layout: ModalityLayout, more: tuple[str, ...], group: Group) -> None:
    """Compare a checksum of a layout (and some words) over the ranks.

    Raises:
        ValueError: on every rank, where they differ.
    """
    if group.size() == 1:
        return
    digest = hashlib.blake2b(digest_size=8)
    numbers = (layout.num_modalities, layout.num_roles, layout.own_roles, layout.own_chunks)
    digest.update(repr((tuple(layout.modality.shape), numbers, more)).encode())
    for name in ("modality", "segment", "role", "step", "chunk", "cu_seqlens"):
        digest.update(getattr(layout, name).cpu().contiguous().numpy().tobytes())
    number = int.from_bytes(digest.digest(), "little", signed=True)
    found = collectives.all_gather(torch.tensor([number], device=layout.device), group).tolist()
    if len(set(found)) > 1:
        usual = max(set(found), key=found.count)
        others = [rank for rank, number in enumerate(found) if number != usual]
        raise checks.wrong_value("layout", f"{what}, the same on all {group.size()} ranks", f"others on ranks {others}")
