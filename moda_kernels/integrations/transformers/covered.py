"""Which models `enable` is known to leave as they are, by ``config.model_type``; every other one is refused by name.

MODA's layers attend by rules of their own in place of the mask that the model builds, so a model is only taken where
its mask is known to be these rules. Each type here has been compared, fresh and tiny: with padding, windows, images and
a cache (`tests/test_transformers_covered.py` does it again). A type that isn't here may be right; nobody has looked.
"""

from typing import Any

from torch import nn


def _names(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


#: Decoders whose layers are all attention, causal or within a sliding window.
DECODERS = _names(
    "afmoe apertus arcee aria_text biogpt bitnet cohere cohere2 cohere2_moe cwm ernie4_5 ernie4_5_moe exaone4",
    "exaone_moe flex_olmo gemma gemma3_text glm glm4 glm4_moe glm4v_moe_text glm4v_text granite granitemoe",
    "granitemoeshared helium hyperclovax jais2 llama minimax_m2 ministral3 mistral mixtral nanochat olmo olmo2",
    "olmo3 olmoe opt phi qwen2 qwen2_5_vl_text qwen2_vl_text qwen3 qwen3_moe qwen3_vl_moe_text qwen3_vl_text",
    "seed_oss smollm3 solar_open starcoder2 ",
)
#: Models around a decoder that hand it the padding mask and nothing else; Gemma 3 is known with its images.
AROUND = _names(
    "aria aya_vision cohere2_vision deepseek_vl exaone4_5 gemma3 glm46v glm4v glm4v_moe got_ocr2 idefics2 idefics3",
    "internvl janus lighton_ocr llava llava_next llava_next_video llava_onevision mistral3 ovis2 qianfan_ocr",
    "qwen2_5_vl qwen2_vl qwen3_vl qwen3_vl_moe smolvlm video_llava vipllava ",
)
#: What is known to be otherwise.
OTHERWISE = {
    "paligemma": "image and prompt see themselves whole and the answer is causal, which no rule says yet",
    "llama4": "its layers attend within chunks, which no rule says yet",
    "llama4_text": "its layers attend within chunks, which no rule says yet",
    "gemma3n": "some of its layers take the keys of others",
    "gemma3n_text": "some of its layers take the keys of others",
    "gemma4": "images see themselves whole in its sliding layers only, and some layers take the keys of others",
    "gemma4_text": "some of its layers take the keys of others",
    "kosmos-2": "attention of its decoder's kind also stands outside the decoder",
    "gemma2": "its scores are capped (softcap), which MODA doesn't do",
    "vaultgemma": "its scores are capped (softcap), which MODA doesn't do",
    "gpt_oss": "it has attention sinks of its own, which MODA doesn't read",
    "qwen2_moe": "its layers don't say which of them have a sliding window",
    "mllama": "its decoder also attends to images by cross-attention",
    "mllama_text_model": "it also attends to images by cross-attention",
    "molmo2": "all images of a prompt see each other, which no rule says yet",
    "git": "images see themselves whole before a causal text",
    "pi0": "its mask counts blocks",
    "diffusion_gemma": "its mask has a canvas that sees itself whole",
    "minimax_m3_vl": "its layers choose the keys they see",
    "inkling_mm_model": "its masks are not plain causal ones",
}
_INSTEAD = "around a model's own SDPA calls: mk.replace_sdpa"


def refuse_unknown(base: Any, text: Any) -> None:
    """Raise for a model that isn't known to stay as it is.

    Args:
        base: the whole model. text: its decoder.

    Raises:
        NotImplementedError: with the name and, where it is known, the reason.
    """
    from transformers import PreTrainedModel

    around = [part for part in base.modules() if isinstance(part, PreTrainedModel) and _holds(part, text)]
    for part in around:
        kind = part.config.model_type
        if kind in (text.config.model_type, *AROUND) and kind not in OTHERWISE:
            continue
        reason = OTHERWISE.get(kind, "whether its masks are plain causal or sliding ones is not known")
        raise NotImplementedError(
            f"enable: {type(part).__name__} (model_type {kind!r}): {reason}. Known around a decoder: "
            f"{', '.join(sorted(AROUND))}; {_INSTEAD}"
        )
    config, name = text.config, f"{type(text).__name__} (model_type {text.config.model_type!r})"
    if config.model_type not in DECODERS:
        reason = OTHERWISE.get(config.model_type, "whether its masks are plain causal or sliding ones is not known")
        raise NotImplementedError(
            f"enable: {name}: {reason}. Known decoders: {', '.join(sorted(DECODERS))}; {_INSTEAD}"
        )
    others = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if others:
        raise NotImplementedError(f"enable: {name} has layers of the types {', '.join(others)}; {_INSTEAD}")
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        raise NotImplementedError(f"enable: {name} is configured to be bidirectional, not causal; {_INSTEAD}")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise NotImplementedError(f"enable: {name} caps its scores (attn_logit_softcapping), which MODA doesn't do")


def _holds(part: nn.Module, text: nn.Module) -> bool:
    return part is not text and any(inner is text for inner in part.modules())
