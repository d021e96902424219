"""The families of models that `enable` takes, as data: one line each. (`tests/test_transformers_families.py` runs every
line; `docs/models.md` is its table.)

A line says where a model tells which of its tokens is what. Its mask it tells itself, call by call (`asked.py`), and a
type is only here where the model's layers have been compared with its own eager attention. A type that isn't here may
be right; nobody has looked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """How a model says what its tokens are. Modality 0 is text.

    Attributes:
        placeholders: from names in its config, of token ids, to modalities.
        argument: the forward argument that holds modalities (0 text, …), used where there are no ``input_ids``.
    """

    placeholders: Mapping[str, int]
    argument: str | None = None

    @property
    def num_modalities(self) -> int:
        return 1 + max(self.placeholders.values(), default=1)

    def find(self, config: Any, arguments: Mapping[str, Any]) -> Tensor | None:
        """int64 ``[B, n]`` of the tokens of a forward call, or None where nothing says it."""
        tokens = arguments.get("input_ids")
        if isinstance(tokens, Tensor) and self.placeholders:
            found = torch.zeros_like(tokens, dtype=torch.int64)
            for name, modality in self.placeholders.items():
                found = torch.where(tokens == token_of(config, name), modality, found)
            return found
        given = arguments.get(self.argument) if self.argument else None
        return given.long() if isinstance(given, Tensor) else None


def token_of(config: Any, name: str) -> int:
    """A token id by its name; older configs call it an index."""
    value = getattr(config, name, None)
    return int(getattr(config, name.replace("_id", "_index")) if value is None else value)


_IMAGE = Family({"image_token_id": 1})
_VIDEO = Family({"image_token_id": 1, "video_token_id": 2})
_MARKED = Family({"image_token_id": 1, "video_token_id": 2}, "mm_token_type_ids")
_AUDIO = Family({"audio_token_id": 1})

#: By ``config.model_type`` of the model around the decoder.
FAMILIES: dict[str, Family] = {
    "aria": _IMAGE,
    "aya_vision": _IMAGE,
    "chameleon": _IMAGE,
    "cohere2_vision": _IMAGE,
    "deepseek_vl": _IMAGE,
    "emu3": _IMAGE,
    "exaone4_5": _VIDEO,
    "gemma3": Family({"image_token_id": 1}, "token_type_ids"),
    "gemma4": Family({"image_token_id": 1, "video_token_id": 2, "audio_token_id": 3}, "mm_token_type_ids"),
    "glm46v": _MARKED,
    "glm4v": _MARKED,
    "glm4v_moe": _MARKED,
    "got_ocr2": _IMAGE,
    "granite_speech": _AUDIO,
    "idefics2": _IMAGE,
    "idefics3": _IMAGE,
    "internvl": _IMAGE,
    "janus": _IMAGE,
    "lighton_ocr": _IMAGE,
    "llama4": _IMAGE,
    "llava": _IMAGE,
    "llava_next": _IMAGE,
    "llava_next_video": _VIDEO,
    "llava_onevision": _VIDEO,
    "mistral3": _IMAGE,
    "mllama": _IMAGE,
    "molmo2": Family({"image_patch_id": 1}, "mm_token_type_ids"),
    "ovis2": _IMAGE,
    "paligemma": _IMAGE,
    "qianfan_ocr": _IMAGE,
    "qwen2_5_vl": _MARKED,
    "qwen2_vl": _MARKED,
    "qwen3_5": _MARKED,
    "qwen3_vl": _MARKED,
    "qwen3_vl_moe": _MARKED,
    "smolvlm": _IMAGE,
    "video_llava": _VIDEO,
    "vipllava": _IMAGE,
    "voxtral": _AUDIO,
}
#: Any other model: only `modality_ids` says what its tokens are.
UNKNOWN = Family({})


def _names(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


#: Decoders whose layers were compared with their own eager attention.
DECODERS = _names(
    "afmoe apertus arcee aria_text biogpt bitnet cohere cohere2 cohere2_moe cwm ernie4_5 ernie4_5_moe exaone4",
    "exaone_moe flex_olmo gemma gemma2 gemma3_text glm glm4 glm4_moe glm4v_moe_text glm4v_text granite granitemoe",
    "granitemoeshared helium hyperclovax jais2 llama minimax_m2 ministral3 mistral mixtral nanochat olmo olmo2",
    "olmo3 olmoe opt phi qwen2 qwen2_5_vl_text qwen2_vl_text qwen3 qwen3_moe qwen3_vl_moe_text qwen3_vl_text",
    "seed_oss smollm3 solar_open starcoder2 gemma4_text molmo2_text llama4_text qwen3_5_text emu3_text_model",
    "mllama_text_model gpt_oss chameleon vaultgemma",
)
#: What is known to be otherwise.
OTHERWISE = {
    "gemma3n": "some of its layers take the keys of others",
    "gemma3n_text": "some of its layers take the keys of others",
    "kosmos-2": "attention of its decoder's kind also stands outside the decoder",
    "qwen2_moe": "its layers don't say which of them have a sliding window",
    "git": "images see themselves whole before a causal text",
    "pi0": "its mask counts blocks",
    "diffusion_gemma": "its mask has a canvas that sees itself whole",
    "minimax_m3_vl": "its layers choose the keys they see",
    "inkling_mm_model": "its masks are not plain causal ones",
}
_INSTEAD = "around a model's own SDPA calls: mk.replace_sdpa"
_ADD = "To try it, add its line: moda_kernels.integrations.transformers.families."


def refuse_unknown(base: Any, text: Any) -> None:
    """Raise for a model that isn't known to stay as it is.

    Args:
        base: the whole model. text: its decoder.

    Raises:
        NotImplementedError: with the name and, where it is known, the reason; or which line to add.
    """
    from transformers import PreTrainedModel

    around = [part for part in base.modules() if isinstance(part, PreTrainedModel) and _holds(part, text)]
    for part in around:
        kind = part.config.model_type
        if kind in (text.config.model_type, *FAMILIES) and kind not in OTHERWISE:
            continue
        name = f"enable: {type(part).__name__} (model_type {kind!r})"
        if kind in OTHERWISE:
            raise NotImplementedError(f"{name}: {OTHERWISE[kind]}; {_INSTEAD}")
        raise NotImplementedError(
            f"{name}: whether it stays as it is is not known. {_ADD}FAMILIES[{kind!r}] = "
            f'Family({{"image_token_id": 1}}). Known around a decoder: {", ".join(sorted(FAMILIES))}; {_INSTEAD}'
        )
    config, name = text.config, f"enable: {type(text).__name__} (model_type {text.config.model_type!r})"
    if config.model_type in OTHERWISE:
        raise NotImplementedError(f"{name}: {OTHERWISE[config.model_type]}; {_INSTEAD}")
    if config.model_type not in DECODERS:
        raise NotImplementedError(
            f"{name}: whether it stays as it is is not known. {_ADD}DECODERS |= {{{config.model_type!r}}}. "
            f"Known decoders: {', '.join(sorted(DECODERS))}; {_INSTEAD}"
        )
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYERS)
    if others:
        raise NotImplementedError(f"{name} has layers of the types {', '.join(others)}; {_INSTEAD}")
    # (PaliGemma's decoder says so, too, and its prefix is told call by call.)
    everything = getattr(config, "use_bidirectional_attention", False) in (True, "all") and config.model_type != "gemma"
    if not getattr(config, "is_causal", True) or everything:
        raise NotImplementedError(f"{name} is configured to be bidirectional, not causal; {_INSTEAD}")


_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "linear_attention"}


def _holds(part: nn.Module, text: nn.Module) -> bool:
    return part is not text and any(inner is text for inner in part.modules())
