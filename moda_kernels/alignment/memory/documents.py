"""Where the tokens of packed documents stand when each document has grown at its end."""

import torch
from torch import Tensor


def bounds_of(lengths: Tensor) -> Tensor:
    """``[N]`` → ``[N + 1]``, int32."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


def merged(part: Tensor, count: int, whole: Tensor, end: int) -> Tensor:
    """Where a part's `count` tokens stand in the whole, int64: at the begin (0) or the end (1) of each document; both
    given by their cu_seqlens."""
    rows = torch.arange(count, device=part.device)
    document = torch.searchsorted(part[1:], rows.int(), right=True)
    return whole[document + end].long() + rows - part[document + end]


def scattered(old: Tensor, new: Tensor, old_rows: Tensor, new_rows: Tensor) -> Tensor:
    """Two parts put together along axis 0; each row comes from one of them."""
    source = torch.cat((old, new))
    order = torch.empty_like(torch.cat((old_rows, new_rows)))
    order[torch.cat((old_rows, new_rows))] = torch.arange(order.numel(), device=order.device)
    return source.index_select(0, order)
