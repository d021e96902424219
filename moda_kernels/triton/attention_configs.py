from typing import NamedTuple
import torch


class Choice(NamedTuple):
    forward: tuple[int, int, int, int]
    query: tuple[int, int, int, int]
    keys: tuple[int, int, int, int]


def choose(dtype: torch.dtype, head_dim: int, value_dim: int, device: torch.device) -> Choice:
    return Choice((32, 16, 4, 1), (32, 16, 4, 1), (16, 32, 4, 1))
