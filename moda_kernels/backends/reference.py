"""The specification as a backend: runs everything, everywhere, in O(L²) memory."""

import torch
from torch import Tensor

from moda_kernels import reference
from moda_kernels.call import AttentionCall


class ReferenceBackend:
    name = "reference"

    def serves(self, device: torch.device) -> bool:
        return True

    def why_absent(self) -> list[str]:
        return []

    def why_not(self, call: AttentionCall) -> list[str]:
        return []

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        out, lse = reference.attend(call)
        return call.poisoned(out), call.poisoned(lse)
