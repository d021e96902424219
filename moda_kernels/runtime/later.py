"""Numbers that a device has and the host would like to know, read once they are there: nothing ever waits for them."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class Later:
    """The number in a tensor of one element: known at once on the CPU; on CUDA copied behind what the device has still
    to do, and known when that is done; unknown within a graph capture, a trace or a transform.

    What depends on it may cost more or less, and must not come out different.
    """

    def __init__(self, number: Tensor) -> None:
        self._host: Tensor | None = None
        self._event: Any = None
        if (
            torch.compiler.is_compiling()
            or isinstance(number, FakeTensor)
            or torch._C._functorch.is_functorch_wrapped_tensor(number)
        ):
            return
        if number.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return
            self._host = number.detach().to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(number.device))
        elif number.device.type == "cpu":
            self._host = number.detach()

    def __deepcopy__(self, memo: Any) -> "Later":
        return self

    @property
    def value(self) -> int | None:
        """None: not known yet."""
        if self._event is not None and self._event.query():
            self._event = None
        return None if self._host is None or self._event is not None else int(self._host)
