"""Which token of a forward call is of which modality: found for the families that say it, told by the user for others.

A family says it by placeholder tokens (`config.image_token_id`) and some by an argument besides (`mm_token_type_ids`).
Modality 0 is text. Everything else goes through :func:`modality_ids`.
"""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moda_kernels.runtime import checks


@dataclass(frozen=True)
class Family:
    """How a model says what its tokens are.

    Attributes:
        placeholders: from names in its config, of token ids, to modalities.
        argument: the forward argument that holds modalities (0 text, …), used where there are no ``input_ids``.
        whole: modalities whose segments see themselves whole in this model, image by image, in calls that mark them.
        marks: the forward argument that marks them, by 1.
    """

    placeholders: Mapping[str, int]
    argument: str | None = None
    whole: tuple[int, ...] = ()
    marks: str | None = None

    @property
    def num_modalities(self) -> int:
        return 1 + max(self.placeholders.values(), default=1)

    def find(self, config: Any, arguments: Mapping[str, Any]) -> Tensor | None:
        """int64 ``[B, n]`` of the tokens of a forward call, or None where nothing says it."""
        tokens = arguments.get("input_ids")
        if isinstance(tokens, Tensor) and self.placeholders:
            found = torch.zeros_like(tokens, dtype=torch.int64)
            for name, modality in self.placeholders.items():
                found = torch.where(tokens == getattr(config, name), modality, found)
            return found
        given = arguments.get(self.argument) if self.argument else None
        return given.long() if isinstance(given, Tensor) else None


_LLAVA = Family({"image_token_id": 1})
_QWEN = Family({"image_token_id": 1, "video_token_id": 2}, "mm_token_type_ids")

#: By ``config.model_type``.
FAMILIES = {
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "gemma3": Family({"image_token_id": 1}, "token_type_ids", whole=(1,), marks="token_type_ids"),
    "qwen2_vl": _QWEN,
    "qwen3_vl": _QWEN,
}
#: Any other model: only :func:`modality_ids` says what its tokens are.
UNKNOWN = Family({})


class Told(NamedTuple):
    ids: Tensor
    items: Tensor | None
    rest: int | None = None


def marked(marks: Tensor, ids: Tensor, past: int) -> Tensor:
    """Item ids ``[B, n]`` with which a segment is what a model that marks images lets see itself whole: a run of marks.

    Args:
        marks: ``[B, past + n]``, 1 where an image is, from the first token on. ids: ``[B, n]``, of the new tokens.

    Raises:
        ValueError: another shape, marks where no image is.
    """
    total = past + ids.shape[1]
    if marks.shape != (ids.shape[0], total):
        raise checks.wrong_value("token_type_ids", f"shape {(ids.shape[0], total)}, from the first token on", marks)
    here, column = marks.to(ids.device) == 1, torch.arange(total, device=ids.device)
    new = here[:, past:]
    if bool((new & (ids != 1) & (ids >= 0)).any()):
        raise checks.wrong_value("token_type_ids", "1 only where the token is an image's", marks)
    return torch.where(new | (ids != 1), 0, column[past:] + 1)


_told: ContextVar[Told | None] = ContextVar("moda_kernels_modality_ids", default=None)


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
    token = _told.set(Told(ids, item_ids, rest))
    try:
        yield
    finally:
        _told.reset(token)


def told(batch: int, new: int, past: int, device: torch.device) -> Told | None:
    """What :func:`modality_ids` says about ``new`` tokens of each row, after ``past`` others; int64 ``[B, n]``."""
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
