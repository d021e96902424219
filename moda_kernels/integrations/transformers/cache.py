"""A `DecodeState` that lives on a transformers cache and follows what `generate()` does to it.

The cache's class is exchanged for a subclass of the same name, so that beams, crops and resets reach the state, and so
that a copy of the cache takes its state along.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from moda_kernels.alignment.memory import DecodeState
from moda_kernels.runtime import checks


class _Remembers:
    """The methods of `transformers.Cache` that change which tokens it holds."""

    moda_state: DecodeState

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.moda_state.reorder(beam_idx)

    def crop(self, tokens: int) -> None:
        super().crop(tokens)  # type: ignore[misc]
        # Negative: so many are to go. Older versions also take the number that stays.
        length = self.moda_state.length
        self.moda_state.crop(max(length + tokens, 0) if tokens <= 0 else tokens)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.moda_state.length:
            rows = self.moda_state.layout().num_sequences
            self.moda_state.reorder(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.moda_state.reorder(indices)

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        old = self.moda_state
        self.moda_state = DecodeState(old.num_modalities, num_roles=old.num_roles, undo=old.undo)


@functools.cache
def _remembering(kind: Any) -> Any:
    # The name stays, because generate() looks at names.
    return type(kind.__name__, (_Remembers, kind), {"__module__": kind.__module__})


#: The class of a cache that grows; made before a graph is traced, in which classes can't be.
_growing: list[Any] = []


def prepare() -> None:
    from transformers import DynamicCache

    _growing[:] = [_remembering(DynamicCache)]


def new(config: Any) -> Any:
    """A cache that grows."""
    return _growing[0](config=config)


#: How many tokens assisted generation may take back cheaply.
UNDO = 32


def state_of(name: str, cache: Any, num_modalities: int, window: int | None = None) -> DecodeState:
    """The state beside a cache; a new one for an empty cache that has none.

    Args:
        name: of the argument that the cache came by.
        window: of the model's sliding layers.

    Raises:
        TypeError: another kind of cache. ValueError: one that already holds tokens.
    """
    # (Torch 2.11 can trace neither `from transformers import`: see `asked`.)
    from transformers.cache_utils import Cache, EncoderDecoderCache

    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise checks.wrong_type(name, "a transformers Cache of one decoder", cache)
    if not hasattr(cache, "moda_state"):
        if int(cache.get_seq_length()) > 0:
            raise checks.wrong_value(
                name,
                "a cache that an enabled model has filled from its first token (start from an empty one)",
                f"one with {int(cache.get_seq_length())} tokens of unknown modality",
            )
        if not isinstance(cache, _Remembers):
            kind: Any = type(cache)
            cache.__class__ = _remembering(kind)
        cache.moda_state = DecodeState(num_modalities, undo=UNDO if window is None else min(UNDO, max(window - 1, 0)))
    state: DecodeState = cache.moda_state
    held = cache.get_seq_length()
    if isinstance(held, int) and held != state.length:  # a number on the host: nothing waits
        if held > state.length:
            raise checks.wrong_value(name, f"{state.length} tokens, as the enabled model saw", f"{held}")
        state.crop(held)  # a call that failed half-way
    return state
