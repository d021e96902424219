"""`enable` and `disable`: prepare a model for MODA, and take it back."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moda_kernels.alignment.aligner import DuplexAligner
from moda_kernels.alignment.maps import FUSIONS
from moda_kernels.alignment.released import ReleasedAligner
from moda_kernels.integrations.transformers import cache as caches
from moda_kernels.integrations.transformers import hooks
from moda_kernels.integrations.transformers.attention import ALIGNER, CONFIG, NAME, SETTINGS, LayerSettings, register
from moda_kernels.integrations.transformers.families import FAMILIES, UNKNOWN, refuse_unknown
from moda_kernels.integrations.transformers.hooks import MODEL, ModelSettings
from moda_kernels.runtime import checks
from moda_kernels.runtime.sharded import Heads
from moda_kernels.tokens.mask import ModularMask
from moda_kernels.tokens.pseudo import PseudoAttention

#: The oldest transformers with everything this needs.
OLDEST = (5, 22)
_HANDLES = "moda_handles"


def enable(
    model: Any,
    *,
    fusion: str = "add",
    scope: str = "causal",
    renorm: bool = False,
    mask: ModularMask | None = None,
    pseudo: PseudoAttention | None = None,
    layers: Iterable[int] | None = None,
    num_modalities: int | None = None,
    weights: str | Path | Mapping[str, Tensor] | None = None,
) -> Any:
    """Put MODA into a model of transformers, in place: its text layers align keys and attend by rules.

    The models of `families.py` say themselves which token is what: 0 text, 1 image, 2 video (where there are any).
    Plain decoders, and calls with ``inputs_embeds``, run within ``with modality_ids(ids):``. A saved model is loaded by
    ``from_pretrained`` without its aligners and refuses to run until it is enabled. Each attention layer of the text
    model gets an aligner, ``….self_attn.moda_aligner``: in ``state_dict``, ``parameters`` and ``save_pretrained``; for
    PEFT name it in ``modules_to_save``. Fresh aligners leave the model's outputs as they are. The vision tower stays
    as it is. Padding of the attention mask is seen by nobody. Packed rows (``position_ids`` that start again, without
    an attention mask; or ``cu_seq_lens_q``) are their documents one by one. Gram matrices of rotated keys know absolute
    positions: a forward with padding on the left needs the ``position_ids`` that `generate` makes.

    With the defaults `generate` (greedy, sampled, beams, assisted; dynamic, static, sliding caches) gives what a full
    pass over the same tokens gives. Not so for whole models with ``scope="sequence"`` or ``fusion="released"``, with
    ``PseudoAttention(length=None)``, and with rules SEGMENT or ALL that reach over the end of the prompt: there new
    tokens change what older ones gave in earlier layers, which no cache can repair. Each attention call still equals a
    full pass over the keys in its cache.

    Args:
        model: a `PreTrainedModel` (or a PEFT model around one), on any device.
        fusion, scope, renorm: as in :class:`moda_kernels.DuplexAligner`; "released" with ``scope="sequence"`` is the
            authors' variant (see :func:`load_released`).
        mask: who sees whom. Default: what the model itself asks for, call by call. A layer's sliding window, where it
            is shorter than the mask's, takes its place and hides everything so far back.
        pseudo: pseudo-attention for the layers with aligners. Its tensors are not saved with the model.
        layers: indices of the text layers that get aligners (and ``pseudo``, ``mask``). Default: all. The others attend
            as before.
        num_modalities: M. Default: the family's, 2 for other models.
        weights: for a model whose config says that it has aligners: the folder (or a state dict) with their parameters.
            Default: the folder that the model was loaded from; fresh ones where it was made of a config.

    Returns:
        The model.

    Raises:
        ImportError: no transformers, or one older than 5.22.
        NotImplementedError: a model that isn't known to stay as it is, by name and with the line of `families.py` to
            add.
        TypeError, ValueError: not such a model, enabled already, unknown layers, a mask for another M, options other
            than those that its aligners were saved with, or no saved parameters found.
    """
    require_transformers()
    base = _unwrapped(model)
    if fusion == "released" and scope != "sequence":
        raise checks.wrong_value("scope", "'sequence' with fusion='released'", scope)
    checks.choice("fusion", fusion, (*FUSIONS, "released"))
    if fusion == "released" and renorm:
        raise checks.wrong_value("renorm", "False with fusion='released'", renorm)
    text, outer = _text_model(base)
    if hasattr(text, MODEL):
        raise checks.wrong_value("model", "one that is not enabled (call disable(model) first)", type(model).__name__)
    refuse_unknown(base, text)
    attentions = _attention_layers(text)
    family = FAMILIES.get(outer.config.model_type, UNKNOWN)
    m = family.num_modalities if num_modalities is None else checks.integer("num_modalities", num_modalities, 1)
    if m < family.num_modalities and family is not UNKNOWN:
        raise checks.wrong_value("num_modalities", f"at least the {family.num_modalities} of this family", m)
    if mask is not None and not isinstance(mask, ModularMask):
        raise checks.wrong_type("mask", "a ModularMask", mask)
    if mask is not None and mask.num_roles != m:
        raise checks.wrong_value("mask", f"{m} x {m} rules", f"{mask.num_roles} x {mask.num_roles}")
    if pseudo is not None and not isinstance(pseudo, PseudoAttention):
        raise checks.wrong_type("pseudo", "a PseudoAttention", pseudo)
    chosen = _chosen(layers, attentions)
    saved = {"fusion": fusion, "scope": scope, "num_modalities": m, "layers": sorted(chosen)}
    saved |= {"renorm": renorm} if renorm else {}
    known = getattr(base.config, CONFIG, None)
    if known is not None and known != saved:
        different = [f"{name}={known.get(name)!r}" for name in saved | known if known.get(name) != saved.get(name)]
        raise ValueError(
            f"enable: expected the options that the model was saved with ({', '.join(different)}), got others "
            f"(to start afresh: del model.config.{CONFIG})"
        )
    parameters = None if known is None and weights is None else _saved_parameters(base, weights)

    aligners: dict[int, nn.Module] = {}
    for index in chosen:
        module = attentions[index]
        like = next(p for p in module.parameters() if p.is_floating_point())
        options: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        if fusion == "released":
            aligners[index] = ReleasedAligner(module.head_dim, **options)
        else:
            aligners[index] = DuplexAligner(module.head_dim, m, fusion=fusion, scope=scope, renorm=renorm, **options)
        if parameters is not None:
            _fill(aligners[index], index, parameters)

    heads = _heads(base)
    if heads is not None and isinstance(getattr(base, "_tp_plan", None), dict):
        name = next(name for name, part in base.named_modules() if part is text)
        base._tp_plan[f"{name}.layers.*.self_attn.{ALIGNER}".removeprefix(".")] = "replicated_with_grad_allreduce"
    for index, module in attentions.items():
        own = index in aligners
        if own:
            module.add_module(ALIGNER, aligners[index])
            aligners[index].train(module.training)
        setattr(module, SETTINGS, LayerSettings(mask if own else None, pseudo if own else None, heads))
    handles = [text.register_forward_pre_hook(hooks.before_text_model, with_kwargs=True)]
    if outer is not text:
        setattr(outer, MODEL, ModelSettings.of(outer, family, m, outer.config))
        handles.append(outer.register_forward_pre_hook(hooks.before_model, with_kwargs=True))
    setattr(text, MODEL, ModelSettings.of(text, family, m, outer.config))
    setattr(text, _HANDLES, (handles, text.config._attn_implementation))
    register()
    caches.prepare()
    text.set_attn_implementation(NAME)
    for config in (base.config, text.config):
        setattr(config, CONFIG, saved)
    for config, value in _asking(base, text):
        config.attn_implementation = value
    return model


def disable(model: Any) -> Any:
    """Take MODA out of a model again, aligners included: it is as before :func:`enable`.

    Raises:
        ValueError: a model that is not enabled.
    """
    base = _unwrapped(model)
    text, outer = _text_model(base)
    if not hasattr(text, MODEL):
        raise checks.wrong_value("model", "an enabled model", type(model).__name__)
    handles, implementation = getattr(text, _HANDLES)
    for handle in handles:
        handle.remove()
    for part in {text, outer}:
        delattr(part, MODEL)
    delattr(text, _HANDLES)
    for module in _attention_layers(text).values():
        delattr(module, SETTINGS)
        if hasattr(module, ALIGNER):
            delattr(module, ALIGNER)
    if implementation == NAME:  # it was loaded as an enabled model, or made of such a one's config
        implementation = text.get_correct_attn_implementation(None, is_init_check=True)
    text.set_attn_implementation(implementation)
    for config in (base.config, text.config):
        vars(config).pop(CONFIG, None)
    for config, _ in _asking(base, text):
        vars(config).pop("attn_implementation", None)
    return model


def _asking(base: Any, text: Any) -> list[tuple[Any, Any]]:
    """Configs, and what they say when they are saved: transformers then loads the text part with attention that only an
    enabled model has, so that a model without its aligners is an error and not another model."""
    parts = [name for name in base.config.sub_configs if getattr(base.config, name, None) is text.config]
    return [(text.config, NAME), *((base.config, {name: NAME}) for name in parts)]


# Parts of a model


def _heads(model: Any) -> Heads | None:
    """How transformers' tensor parallelism spreads the heads of a model; None: it doesn't."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or (getattr(model, "_tp_size", None) or 1) == 1:
        return None
    mesh = mesh["tp"] if mesh.ndim > 1 else mesh
    return Heads(mesh, mesh.size() > 1, 0)


def require_transformers() -> None:
    """Raise an ImportError where there is no transformers, or an old one."""
    advice = 'pip install "moda_kernels[transformers]"'
    try:
        import transformers
    except ImportError:
        raise ImportError(f"moda_kernels.integrations.transformers needs transformers: {advice}") from None
    numbers = re.findall(r"\d+", transformers.__version__)
    if tuple(map(int, numbers[:2])) < OLDEST:
        needed = "{}.{}".format(*OLDEST)
        raise ImportError(f"transformers: expected {needed} or newer, got {transformers.__version__}: {advice}")


def _unwrapped(model: Any) -> Any:
    from transformers import PreTrainedModel

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner = getattr(inner, "_orig_mod", inner)  # torch.compile's
    if not isinstance(inner, PreTrainedModel):
        raise checks.wrong_type("model", "a transformers PreTrainedModel", model)
    return inner


def _text_model(model: Any) -> tuple[Any, Any]:
    """The text decoder, and the innermost model around it (which sees ``input_ids``; may be itself)."""
    from transformers import PreTrainedModel

    text = model.get_decoder()
    if not isinstance(text, PreTrainedModel):
        raise checks.wrong_value("model", "a model with a text decoder (get_decoder)", type(model).__name__)
    around = [part for part in model.modules() if isinstance(part, PreTrainedModel) and part is not text]
    around = [part for part in around if any(inner is text for inner in part.modules())]
    return text, (around[-1] if around else text)


def _attention_layers(text: nn.Module) -> dict[int, Any]:
    """The self-attention layers of the text decoder by index."""
    found: dict[int, Any] = {
        int(module.layer_idx): module  # type: ignore[arg-type]
        for module in text.modules()
        if all(hasattr(module, name) for name in ("layer_idx", "head_dim", "scaling", "q_proj"))
    }
    if not any(map(_makes_keys, found.values())):
        raise checks.wrong_value(
            "model", "attention layers of transformers' AttentionInterface (layer_idx, head_dim, k_proj)", f"{text!r}"
        )
    return dict(sorted(found.items()))


def _makes_keys(module: nn.Module) -> bool:
    """Whether a layer attends to keys of its own tokens: not to an image's, and not to another layer's."""
    return hasattr(module, "k_proj") and "CrossAttention" not in type(module).__name__


def _chosen(layers: Iterable[int] | None, attentions: Mapping[int, nn.Module]) -> list[int]:
    if layers is None:
        return [index for index, module in attentions.items() if _makes_keys(module)]
    if isinstance(layers, int) or not isinstance(layers, Iterable):
        raise checks.wrong_type("layers", "an iterable of layer indices", layers)
    wanted = sorted(set(layers))
    known = [index for index, module in attentions.items() if _makes_keys(module)]
    unknown = [index for index in wanted if index not in known]
    if unknown:
        raise checks.wrong_value("layers", f"indices of {known}", f"{unknown}")
    return wanted


# Saved parameters


def _saved_parameters(model: Any, weights: str | Path | Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
    """Those of aligners, from where the model was saved."""
    if isinstance(weights, Mapping):
        return weights
    if weights is None and not model.config._name_or_path:
        return None  # made of an enabled model's config, not loaded
    folder = Path(model.config._name_or_path if weights is None else weights)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({folder / file for name, file in names.items() if ALIGNER in name})
    else:
        files = [folder / "model.safetensors"]
    if not files or not all(file.exists() for file in files):
        raise checks.wrong_value(
            "weights",
            "a folder with the parameters of aligners (or a state dict), because the model's config says in "
            f"{CONFIG!r} that it has some (to start afresh: del model.config.{CONFIG})",
            f"{str(folder)!r}",
        )
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys() if ALIGNER in name}  # noqa: SIM118
    return found


@torch.no_grad()
def _fill(aligner: nn.Module, index: int, parameters: Mapping[str, Tensor]) -> None:
    """Bit for bit, in the dtype in which it was saved. Prefixes of names depend on who saved them."""
    for name, parameter in aligner.named_parameters():
        end = f"layers.{index}.self_attn.{ALIGNER}.{name}"
        saved = next((t for full, t in parameters.items() if full.endswith(end)), None)
        if saved is None or saved.shape != parameter.shape:
            expected = f"….{end} of shape {tuple(parameter.shape)}"
            raise checks.wrong_value("weights", expected, "none" if saved is None else saved)
        parameter.data = saved.to(parameter.device)
