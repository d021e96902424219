"""What transformers calls: an attention function and a mask function of one name, and the hooks that bring them the
modalities.

The hooks put a `Tokens` object among the arguments of the text model, which hands it on to every attention layer (also
to those that gradient checkpointing runs again). Padding is in its layout, so the mask function passes the 2-D padding
mask through and no mask of queries × keys is ever made.
"""

import functools
import inspect
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moda_kernels.alignment.memory import DecodeState
from moda_kernels.alignment.released import ReleasedAligner
from moda_kernels.attention import moda_attention
from moda_kernels.integrations.transformers import cache as caches
from moda_kernels.integrations.transformers import ids as modalities
from moda_kernels.runtime import checks
from moda_kernels.tokens.layout import ModalityLayout
from moda_kernels.tokens.mask import ModularMask
from moda_kernels.tokens.pseudo import PseudoAttention
from moda_kernels.tokens.segments import segment_modalities

#: Under which both functions are registered.
NAME = "moda"
#: Where an attention layer keeps its aligner (a module: `state_dict`, optimisers and PEFT see it) and its settings.
ALIGNER, SETTINGS = "moda_aligner", "moda_settings"
#: The argument that carries `Tokens` to the layers.
ARGUMENT = "moda_tokens"
#: What transformers calls the cache among a model's arguments: from 5.24 on, and before it.
CACHE_ARGUMENTS = ("cache", "past_key_values")


@dataclass(frozen=True)
class ModelSettings:
    """On the text model and on the model around it, which sees ``input_ids``."""

    family: modalities.Family
    num_modalities: int
    config: Any


@dataclass(frozen=True)
class LayerSettings:
    """On each attention layer of the text model.

    Attributes:
        mask: before the layer's own sliding window is added. unmarked: in calls that mark no images (see `Family`).
    """

    mask: ModularMask
    unmarked: ModularMask
    pseudo: PseudoAttention | None


@dataclass(frozen=True, eq=False)
class Tokens:
    """What the tokens of one forward call are: a layout, or with a cache its state; and if it marks images."""

    layout: ModalityLayout | None
    state: DecodeState | None
    marks: bool


def register() -> None:
    """Make both functions known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_mask)


def padding_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The mask function: the 2-D padding mask as it is. (The modular mask is made of rules, by layer.)"""
    return attention_mask


@torch.compiler.disable
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function of an enabled model.

    Args:
        module: the attention layer, prepared by `enable`.
        query: ``[B, Hq, n, D]``. key, value: ``[B, Hkv, L, D]``, the cache's, after the rotary embedding.
        attention_mask: None or 2-D: in the layout already; 4-D: on top of the modular mask.

    Returns:
        ``[B, n, Hq, D]``, and None for the weights.

    Raises:
        ValueError: a layer that `enable` has not prepared. NotImplementedError: soft caps, sinks, dropout.
    """
    settings: LayerSettings | None = getattr(module, SETTINGS, None)
    if settings is None:
        raise ValueError(
            f"attn_implementation: expected {NAME!r} for the text model that enable() has prepared, got it for "
            f"{type(module).__name__}. A plain string in set_attn_implementation switches the vision tower as well; "
            f'call enable(model) alone, or name the part: set_attn_implementation({{"text_config": {NAME!r}}}). '
            "A model that was saved with aligners is loaded without them: enable(model) brings them back"
        )
    tokens: Tokens | None = others.get(ARGUMENT)
    if tokens is None:
        raise checks.wrong_value(
            "modality ids", f"{type(module).__name__} to get them from its enabled text model's call", "none"
        )
    for name, value_of in (("softcap", softcap), ("s_aux", s_aux)):
        if value_of is not None:
            raise NotImplementedError(f"{name} of {type(module).__name__}: MODA has none; disable(model)")
    mask = settings.mask if tokens.marks else settings.unmarked
    if sliding_window is not None:
        own = mask.window is not None and mask.window <= sliding_window
        mask = mask if own else ModularMask(mask.rules, sliding_window, "all")
    where: dict[str, Any] = {"layout": tokens.layout}
    if tokens.state is not None:
        where = {"state": tokens.state[module.layer_idx]}  # type: ignore[index]
    aligner = getattr(module, ALIGNER, None)
    key_map = None
    if isinstance(aligner, nn.Module):
        released = {"value": value} if is_released(aligner) else {}
        key_map = aligner(key, **where, **released)
    out = moda_attention(
        query,
        key,
        value,
        attention_mask if attention_mask is not None and attention_mask.dim() == 4 else None,
        dropout,
        scale=scaling,
        enable_gqa=True,
        mask=mask,
        key_map=key_map,
        pseudo=settings.pseudo if key_map is not None else None,
        **where,
    )
    return out.transpose(1, 2).contiguous(), None


def is_released(aligner: nn.Module) -> bool:
    """Also where PEFT has wrapped it."""
    return any(isinstance(part, ReleasedAligner) for part in aligner.modules())


# Hooks

_found: ContextVar[tuple[Tensor | None, Tensor | None]] = ContextVar("moda_kernels_found", default=(None, None))
MODEL = "moda_model_settings"


@torch.compiler.disable
def before_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the model that sees ``input_ids``: look at them and at marks, since the text model gets embeddings."""
    settings: ModelSettings = getattr(module, MODEL)
    arguments = _named(module, args, kwargs)
    _found.set((settings.family.find(settings.config, arguments), arguments.get(settings.family.marks or "")))


@torch.compiler.disable
def after_model(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    _found.set((None, None))


@torch.compiler.disable
def before_text_model(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the text model: make `Tokens` of what is known and hand them on."""
    settings: ModelSettings = getattr(module, MODEL)
    implementation = module.config._attn_implementation  # type: ignore[union-attr]
    if implementation != NAME:
        raise checks.wrong_value(
            "attn_implementation",
            f"{NAME!r} for the text part of an enabled model (set_attn_implementation with "
            f'{{"text_config": {NAME!r}}}, or {NAME!r} for a plain decoder); to do without MODA call disable(model)',
            repr(implementation),
        )
    arguments = _named(module, args, kwargs)
    source = arguments.get("inputs_embeds")
    source = arguments.get("input_ids") if source is None else source
    if not isinstance(source, Tensor) or arguments.get(ARGUMENT) is not None:
        return args, kwargs  # the model says itself what it misses
    batch, new = source.shape[:2]
    _refuse_packing(module, arguments)

    state = None
    # Layers that are checkpointed go without a cache, whoever asks for one.
    checkpointed = module.training and any(getattr(part, "gradient_checkpointing", False) for part in module.modules())
    if not checkpointed:
        name, cache = _cache_of(module, arguments)
        use_cache = arguments.get("use_cache")
        use_cache = getattr(module.config, "use_cache", False) if use_cache is None else use_cache
        if cache is None and use_cache:
            from transformers import DynamicCache

            cache = arguments[name] = DynamicCache(config=module.config)
        if cache is not None:
            state = caches.state_of(
                name, cache, settings.num_modalities, getattr(module.config, "sliding_window", None)
            )
    past = 0 if state is None else state.length

    told = modalities.told(batch, new, past, source.device)
    if told is None:
        found = _found.get()[0]
        found = settings.family.find(settings.config, arguments) if found is None else found
        if found is None:
            raise checks.wrong_value(
                "modality ids",
                "input_ids of a family that enable() knows "
                f"({', '.join(modalities.FAMILIES)}), or `with modality_ids(ids):` around the call",
                f"a call of {type(module).__name__} that says nothing of modalities",
            )
        told = modalities.Told(found.to(source.device), None)
    if told.ids.shape != (batch, new):
        raise checks.wrong_value("modality ids", f"shape {(batch, new)}, one for each new token", told.ids)
    ids = _without_padding(told.ids, arguments.get("attention_mask"), past)
    items, marks = told.items, _found.get()[1]
    if marks is not None and items is None:
        items = modalities.marked(marks, ids, past)
    if state is not None:
        state.append(ids, item_ids=items)
        tokens = Tokens(None, state, marks is not None)
    else:
        layout = segment_modalities(ids, num_modalities=settings.num_modalities, item_ids=items)
        tokens = Tokens(layout, None, marks is not None)
    return (), arguments | {ARGUMENT: tokens}


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    if not args:
        return dict(kwargs)
    names = [name for name in inspect.signature(module.forward).parameters if name not in ("args", "kwargs")]
    return dict(zip(names, args, strict=False)) | kwargs


def _without_padding(ids: Tensor, attention_mask: Any, past: int) -> Tensor:
    """-1 where the attention mask (2-D, of all tokens or of the new ones; by kind of layer the same) hides a token."""
    if isinstance(attention_mask, dict):
        attention_mask = next(iter(attention_mask.values()), None)
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return ids
    new, width = ids.shape[1], attention_mask.shape[1]
    begin = past if width >= past + new else width - new
    shown = attention_mask[:, begin : begin + new]
    if begin < 0 or begin not in (0, past) or shown.shape != ids.shape:
        expected = f"[B, {past + new}] or [B, {new}], of all tokens or of the new ones, with B = {ids.shape[0]}"
        raise checks.wrong_value("attention_mask", expected, attention_mask)
    return torch.where(shown.to(ids.device) > 0, ids, -1)


def _cache_of(module: nn.Module, arguments: dict[str, Any]) -> tuple[str, Any]:
    """What a model calls its cache, and the cache of a call, whichever name it came by."""
    given = (arguments[name] for name in CACHE_ARGUMENTS if arguments.get(name) is not None)
    kind: Any = type(module)
    return _cache_argument(kind), next(given, None)


@functools.cache
def _cache_argument(kind: Any) -> str:
    parameters = inspect.signature(kind.forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in parameters), CACHE_ARGUMENTS[-1])


def _refuse_packing(module: nn.Module, arguments: dict[str, Any]) -> None:
    """Several documents in one row, told by positions that start again, as transformers would find them."""
    positions = arguments.get("position_ids")
    plain = arguments.get("attention_mask") is None and _cache_of(module, arguments)[1] is None
    if not isinstance(positions, Tensor) or not plain or (positions.dim() == 3 and positions.shape[0] != 4):
        return
    text = positions[0] if positions.dim() == 3 else positions
    if text.shape[-1] > 1 and bool((text.diff(dim=-1) != 1).any()):
        raise NotImplementedError(
            "position_ids that start again within a row (packed documents): give each document a row, or an "
            "attention_mask where positions only skip padding"
        )
