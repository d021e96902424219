"""The hooks of an enabled model, which bring `Tokens` to its attention layers.

Before the model that sees ``input_ids`` runs, they are looked at, since the text model gets embeddings; before the text
model, a layout (or with a KV cache, a `DecodeState`) is made of what is known, and handed on among the arguments that
the model passes to every layer (also to those that gradient checkpointing runs again).
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moda_kernels.alignment.memory import DecodeState
from moda_kernels.integrations.transformers import cache as caches
from moda_kernels.integrations.transformers import ids as modalities
from moda_kernels.integrations.transformers.asked import AskedMask, bounds_of, documents_of
from moda_kernels.integrations.transformers.attention import ALIGNER, ARGUMENT, BOUNDS, NAME, SETTINGS, Tokens
from moda_kernels.runtime import checks
from moda_kernels.tokens.layout import ModalityLayout
from moda_kernels.tokens.segments import segment_modalities

#: What transformers calls the cache among a model's arguments: from 5.24 on, and before it.
CACHE_ARGUMENTS = ("cache", "past_key_values")
#: Settings of a text model and of the model around it.
MODEL = "moda_model_settings"
#: The argument with which the model around tells the text model what it found.
FOUND = "moda_modality_ids"


@dataclass(frozen=True)
class ModelSettings:
    """On the text model and on the model around it, which sees ``input_ids``.

    Attributes:
        names: of the arguments of its forward. cache_name: what it calls its cache.
    """

    family: modalities.Family
    num_modalities: int
    config: Any
    names: tuple[str, ...]
    cache_name: str

    @classmethod
    def of(cls, module: nn.Module, family: modalities.Family, num_modalities: int, config: Any) -> "ModelSettings":
        names = tuple(name for name in inspect.signature(module.forward).parameters if name not in ("args", "kwargs"))
        cache = next((name for name in CACHE_ARGUMENTS if name in names), CACHE_ARGUMENTS[-1])
        return cls(family, num_modalities, config, names, cache)

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a call by name."""
        return dict(zip(self.names, args, strict=False)) | kwargs

    @staticmethod
    def cache(arguments: dict[str, Any]) -> Any:
        """The cache of a call, whichever name it came by."""
        for name in CACHE_ARGUMENTS:
            if arguments.get(name) is not None:
                return arguments[name]
        return None


def before_model(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the model that sees ``input_ids``."""
    settings: ModelSettings = getattr(module, MODEL)
    arguments = settings.named(args, kwargs)
    found = settings.family.find(settings.config, arguments)
    return (), arguments if found is None else arguments | {FOUND: found}


def before_text_model(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the text model."""
    settings: ModelSettings = getattr(module, MODEL)
    implementation = module.config._attn_implementation  # type: ignore[union-attr]
    if implementation != NAME:
        if not _adds_something(module):
            kwargs.pop(FOUND, None)
            return args, kwargs
        raise checks.wrong_value(
            "attn_implementation",
            f"{NAME!r} for the text part of an enabled model (set_attn_implementation with "
            f'{{"text_config": {NAME!r}}}, or {NAME!r} for a plain decoder); to do without MODA call disable(model)',
            repr(implementation),
        )
    arguments = settings.named(args, kwargs)
    found = arguments.pop(FOUND, None)
    source = arguments.get("inputs_embeds")
    source = arguments.get("input_ids") if source is None else source
    if not isinstance(source, Tensor) or arguments.get(ARGUMENT) is not None:
        return (), arguments  # the model says itself what it misses
    documents = _documents(module, arguments, source)

    state = None
    # Layers that are checkpointed go without a cache, whoever asks for one.
    checkpointed = module.training and any(getattr(part, "gradient_checkpointing", False) for part in module.modules())
    if documents is None and not checkpointed:
        name, cache = settings.cache_name, settings.cache(arguments)
        use_cache = arguments.get("use_cache")
        use_cache = getattr(module.config, "use_cache", False) if use_cache is None else use_cache
        if cache is None and use_cache:
            cache = arguments[name] = caches.new(module.config)
        if cache is not None:
            state = caches.state_of(
                name, cache, settings.num_modalities, getattr(module.config, "sliding_window", None)
            )
    call = Call(settings, type(module).__name__, source, found, arguments, documents, state)
    tokens = Tokens(call)
    if not torch.compiler.is_compiling():  # what can't be is refused before any layer has run
        tokens.ready()
    return (), arguments | {ARGUMENT: tokens}


@dataclass(frozen=True, eq=False)
class Call:
    """What a call of the text model says of its tokens. (Made into tensors by the first layer where a graph is traced:
    torch.compile takes the hooks of the module that it is given for functions of their own.)

    Attributes:
        name: of the text model. source: what has the shape of the new tokens. found: modalities, by the model around.
        documents: as `Tokens.documents`, found already.
    """

    settings: ModelSettings
    name: str
    source: Tensor
    found: Tensor | None
    arguments: dict[str, Any]
    documents: Tensor | None
    state: DecodeState | None

    def made(self) -> tuple[ModalityLayout | None, DecodeState | None, Tensor | None]:
        """Of `Tokens`."""
        settings, state, device = self.settings, self.state, self.source.device
        batch, new = self.source.shape[:2]
        past = 0 if state is None else state.length
        told = modalities.told(batch, new, past, device)
        if told is None:
            found = settings.family.find(settings.config, self.arguments) if self.found is None else self.found
            if found is None:
                raise checks.wrong_value(
                    "modality ids",
                    "input_ids of a family that enable() knows "
                    f"({', '.join(sorted(modalities.FAMILIES))}), or `with modality_ids(ids):` around the call",
                    f"a call of {self.name} that says nothing of modalities",
                )
            told = modalities.Told(found.to(device), None)
        if told.ids.shape != (batch, new):
            raise checks.wrong_value("modality ids", f"shape {(batch, new)}, one for each new token", told.ids)
        ids = _without_padding(told.ids, self.arguments.get("attention_mask"), past)
        if state is not None:
            state.append(ids, item_ids=told.items)
            return None, state, None
        more: dict[str, Any] = {"item_ids": told.items, "num_modalities": settings.num_modalities}
        documents = self.documents
        if documents is not None and torch.compiler.is_compiling():
            more["chunks"] = documents
        elif documents is not None:
            ids, more["cu_seqlens"] = ids.flatten(), bounds_of(documents)
            more["item_ids"] = None if told.items is None else told.items.flatten()
        return segment_modalities(ids, **more), None, documents


def _adds_something(module: nn.Module) -> bool:
    """Whether a text model without MODA's attention would be another model."""
    layers = [part for part in module.modules() if hasattr(part, SETTINGS)]
    return any(hasattr(part, ALIGNER) or getattr(part, SETTINGS).mask is not None for part in layers)


def _without_padding(ids: Tensor, attention_mask: Any, past: int) -> Tensor:
    """-1 where the attention mask (2-D, of all tokens or of the new ones; by kind of layer the same) hides a token."""
    if isinstance(attention_mask, dict):
        attention_mask = next((mask for mask in attention_mask.values() if mask is not None), None)
    if isinstance(attention_mask, AskedMask):
        attention_mask = attention_mask.told
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return ids
    new, width = ids.shape[1], attention_mask.shape[1]
    begin = past if width >= past + new else width - new
    shown = attention_mask[:, begin : begin + new]
    if begin < 0 or begin not in (0, past) or shown.shape != ids.shape:
        expected = f"[B, {past + new}] or [B, {new}], of all tokens or of the new ones, with B = {ids.shape[0]}"
        raise checks.wrong_value("attention_mask", expected, attention_mask)
    return torch.where(shown.to(ids.device) > 0, ids, -1)


def _documents(module: nn.Module, arguments: dict[str, Any], source: Tensor) -> Tensor | None:
    """int64 ``[B, new]``: the documents of packed rows, told by positions that start again (where transformers looks
    for them: without a padding mask and a cache) or by `cu_seq_lens_q`; None: rows are documents."""
    cache = ModelSettings.cache(arguments)
    mask, positions, bounds = (arguments.get(n) for n in ("attention_mask", "position_ids", BOUNDS))
    documents: Tensor | None = None
    if all(said is None for said in (mask, positions, bounds)):
        return None
    batch, new = source.shape[:2]
    if isinstance(bounds, Tensor):
        if batch != 1 or cache is not None:
            raise checks.wrong_value(BOUNDS, "one row of packed documents, without a cache", f"{batch} rows")
        documents = documents_of(bounds, new, BOUNDS)
        if positions is None:
            column = torch.arange(new, device=bounds.device)
            arguments["position_ids"] = column[None] - bounds.long()[documents]
    elif isinstance(mask, dict | AskedMask):  # the model around has found them
        masks = mask.values() if isinstance(mask, dict) else [mask]
        documents = next((m.facts.documents for m in masks if isinstance(m, AskedMask)), None)
        if documents is not None and not torch.compiler.is_compiling() and not bool((documents > 0).any()):
            documents = None
    elif mask is None and cache is None and isinstance(positions, Tensor) and new > 1:
        if positions.dim() == 3 and positions.shape[0] != 4:
            return None  # three directions; with a fourth, the first one is of text
        text = positions[0] if positions.dim() == 3 else positions
        starts = torch.nn.functional.pad((text.diff(dim=-1) != 1).long(), (1, 0))
        if torch.compiler.is_compiling() or bool(starts.any()):
            documents = starts.cumsum(-1).expand(batch, -1)
    if documents is not None:
        if "linear_attention" in (getattr(module.config, "layer_types", None) or ()):
            raise NotImplementedError(
                f"packed documents: {type(module).__name__} has layers of linear attention, which carry one document "
                "into the next; give each document a row"
            )
        if arguments.get("use_cache") and not torch.compiler.is_compiling():
            raise checks.wrong_value("use_cache", "False with packed documents, which no cache can continue", True)
        arguments["use_cache"] = False
    return documents
