"""Which token of a forward call is of which modality: found for the families that say it, told by the user for others.

Families say it themselves (`families.py`). Everything else goes through :func:`modality_ids`.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from moda_kernels.integrations.transformers.families import FAMILIES, UNKNOWN, Family
from moda_kernels.runtime import checks

__all__ = ["FAMILIES", "UNKNOWN", "Family", "Told", "modality_ids", "told"]


class Told(NamedTuple):
    ids: Tensor
    items: Tensor | None
    rest: int | None = None


_told: ContextVar[Told | None] = ContextVar("moda_kernels_modality_ids", default=None)
#: The same for code that is being compiled, which can't read context variables: the newest block of any thread.
_told_last: list[Told] = []


@contextlib.contextmanager
def modality_ids(ids: Tensor, *, item_ids: Tensor | None = None, rest: int | None = None) -> Iterator[None]:
    """Within the block, say what the tokens of an enabled model's calls are.

    For models of other families than those that :func:`enable` knows, and for calls with ``inputs_embeds``. ::

        with modality_ids(ids):
            model.generate(inputs_embeds=embeds, attention_mask=attention_mask)

    Args:
        ids: integer ``[B, L]``, a modality (0: text) of each token of the call, or of the prompt; -1 is padding, as is
            what the attention mask hides. Tokens that are generated after the prompt are text. For beams the rows are
            repeated as ``generate`` repeats them.
        item_ids: as in :func:`moda_kernels.segment_modalities`.
        rest: the modality of tokens behind these, for calls that bring more than the prompt (assisted generation,
            generation without a cache). Default: more tokens than ids are an error.

    Raises:
        TypeError, ValueError: not integers, another shape. In the model's call: tokens of another number than ids.
    """
    if rest is not None:
        checks.integer("rest", rest, 0)
    if checks.integer_tensor("ids", ids).dim() != 2:
        raise checks.wrong_value("ids", "[B, L]", ids)
    if item_ids is not None:
        checks.shape("item_ids", checks.integer_tensor("item_ids", item_ids), ids.shape, "of ids")
    said = Told(ids, item_ids, rest)
    token = _told.set(said)
    _told_last.append(said)
    try:
        yield
    finally:
        _told_last[:] = [other for other in _told_last if other is not said]
        _told.reset(token)


def told(batch: int, new: int, past: int, device: torch.device) -> Told | None:
    """What :func:`modality_ids` says about ``new`` tokens of each row, after ``past`` others; int64 ``[B, n]``."""
    if torch.compiler.is_compiling():
        said = _told_last[-1] if _told_last else None
    else:
        said = _told.get()
    if said is None:
        return None
    rows, length = said.ids.shape
    if past:
        text = torch.zeros(batch, new, dtype=torch.int64, device=device)
        return Told(text + (said.rest or 0), None if said.items is None else text)
    more = new - length
    if more < 0 or (more > 0 and said.rest is None) or batch % max(rows, 1) or (rows == 0) != (batch == 0):
        raise checks.wrong_value("modality_ids", f"ids of the {batch} x {new} tokens of the model's call", said.ids)

    def repeated(x: Tensor) -> Tensor:
        return x.to(device, torch.int64).repeat_interleave(batch // max(rows, 1), 0)

    ids = torch.nn.functional.pad(repeated(said.ids), (0, more), value=said.rest or 0)
    return Told(ids, None if said.items is None else torch.nn.functional.pad(repeated(said.items), (0, more)))
