"""A collator that packs documents into one row, with their pictures: no padding, and nothing dropped."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moda_kernels.runtime import checks

#: The label of tokens that no loss is made of.
IGNORED = -100
_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k")


class PackingCollator:
    """Puts documents one after the other into one row ``[1, T]``, which an enabled model (or one with
    ``attn_implementation="moda"``) runs as if each were alone. ::

        Trainer(model, args, data_collator=PackingCollator(model), train_dataset=documents)

    A document is what a processor gives for one: ``input_ids`` and whatever else its model takes. transformers' own
    `DataCollatorWithFlattening` keeps ids, labels and positions alone; here

    - what has a number for each token (labels, kinds of tokens, …) is joined as the ids are, with padding left out,
    - pictures and what is said of them are joined along their first axis, in the order of the documents,
    - ``position_ids`` start again with each document. Where the model counts in three directions (Qwen-VL, GLM-4V), its
      own `get_rope_index` is asked document by document.

    Args:
        model: whose positions these are. Default: they are counted from 0, which is right for all models without
            `get_rope_index`.
        bounds: also give ``cu_seq_lens_q`` and ``cu_seq_lens_k`` (int32 ``[documents + 1]``), and the longest
            document's length as ``max_length_q`` and ``max_length_k``.

    The first token of a document has no label, as nothing before it could say it. Where there are no labels the ids
    are taken.
    """

    def __init__(self, model: Any = None, *, bounds: bool = False) -> None:
        self.bounds = bounds
        self._rope_index: Any = None
        if model is not None:
            parts = model.modules() if isinstance(model, torch.nn.Module) else ()
            self._rope_index = next((part.get_rope_index for part in parts if hasattr(part, "get_rope_index")), None)

    def __call__(self, documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch, ready for the model.

        Raises:
            ValueError: no documents; one without ``input_ids``, or of several rows; documents that don't have the same
                entries for tokens, or pictures that can't be joined.
        """
        if not documents:
            raise checks.wrong_value("documents", "at least one", "none")
        rows = [_document(document, number) for number, document in enumerate(documents)]
        lengths = [row["input_ids"].shape[-1] for row, _ in rows]
        made: dict[str, Any] = {}
        for name in {name: None for row, _ in rows for name in row}:
            missing = [number for number, (row, _) in enumerate(rows) if name not in row]
            if missing:
                raise checks.wrong_value("documents", f"{name} in all of them", f"none in document {missing[0]}")
            made[name] = torch.cat([row[name] for row, _ in rows], -1)[None]
        for name in {name: None for _, whole in rows for name in whole}:
            made[name] = _joined(name, [whole[name] for _, whole in rows if name in whole])
        made["position_ids"] = self._positions(rows, lengths)
        if self.bounds:
            ends = torch.tensor([0, *lengths]).cumsum(0).int()
            made |= dict.fromkeys(_BOUNDS, ends) | dict.fromkeys(("max_length_q", "max_length_k"), max(lengths))
        return made

    def _positions(self, rows: list[tuple[dict[str, Tensor], dict[str, Tensor]]], lengths: list[int]) -> Tensor:
        """``[1, T]``, or ``[4, 1, T]``: of text, and in three directions."""
        text = torch.cat([torch.arange(n) for n in lengths])[None]
        if self._rope_index is None:
            return text
        names = inspect.signature(self._rope_index).parameters
        found = []
        for row, whole in rows:
            given = {name: t[None] for name, t in row.items() if name in names}
            given |= {name: t for name, t in whole.items() if name in names}
            if "mm_token_type_ids" in names and "mm_token_type_ids" not in given:
                given["mm_token_type_ids"] = torch.zeros_like(given["input_ids"])
            found.append(self._rope_index(**given)[0])
        return torch.cat((text[None], torch.cat(found, -1).to(text)))


def _document(document: Mapping[str, Any], number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is said of each token, without padding and the axis of rows; and everything else."""
    if "input_ids" not in document:
        raise checks.wrong_value("documents", "input_ids in all of them", f"none in document {number}")
    ids = torch.as_tensor(document["input_ids"])
    if ids.dim() > 2 or (ids.dim() == 2 and ids.shape[0] != 1):
        raise checks.wrong_value("documents", "input_ids [L] or [1, L], of one document", ids)
    length = ids.shape[-1]
    row: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    for name, value in document.items():
        t = torch.as_tensor(value)
        if name == "position_ids":
            continue
        if t.shape in ((length,), (1, length)) and not t.is_floating_point():
            row[name] = t.reshape(length)
        else:
            whole[name] = t
    shown = row.pop("attention_mask", None)
    row.setdefault("labels", row["input_ids"])
    if shown is not None:
        row = {name: t[shown > 0] for name, t in row.items()}
    row["labels"] = row["labels"].clone()
    row["labels"][:1] = IGNORED
    return row, whole


def _joined(name: str, parts: list[Tensor]) -> Tensor:
    """Along the first axis. (Pictures of unequal numbers of patches, ``[N, patches, …]``, get zeros, which no model
    reads.)"""
    parts = [part[None] if part.dim() == 0 else part for part in parts]
    if parts[0].dim() == 5 and all(part.dim() == 5 for part in parts):
        most = max(part.shape[1] for part in parts)
        parts = [F.pad(part, (0, 0, 0, 0, 0, 0, 0, most - part.shape[1])) for part in parts]
    if any(part.shape[1:] != parts[0].shape[1:] for part in parts):
        raise checks.wrong_value(
            "documents", f"{name} of one shape, but for the first axis", f"{[tuple(part.shape) for part in parts]}"
        )
    return torch.cat(parts)
