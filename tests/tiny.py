"""Tiny, randomly initialised models of any family of transformers, made from the default config of its type.

Sizes are cut by the names that configs give them; where a type has layers with a sliding window, the first one slides.
No pictures: their tokens are in the ids, which is all that masks know. (Models with pictures: `vlm.py`.)
"""

from typing import Any

import torch
from vlm import IMAGE, transformers

#: Window of sliding layers, and tokens of the inputs.
WINDOW, LENGTH = 5, 24
_SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "depth": 1, "embed_dim": 32, "num_heads": 2,
    "image_size": 16, "patch_size": 4, "out_hidden_size": 32, "projection_dim": 32, "num_position_embeddings": 16,
    "n_embd": 32, "n_layer": 2, "n_head": 4, "ffn_dim": 48, "word_embed_proj_dim": 32, "text_hidden_size": 32,
    "hidden_dim": 32, "shared_expert_intermediate_size": 16, "query_pre_attn_scalar": 8, "first_k_dense_replace": 0,
    "num_dense_layers": 0, "deepstack_visual_indexes": [0], "mrope_section": [2, 1, 1],
}  # fmt: skip
#: By layer; the type makes them for the new number of layers.
_BY_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types", "moe_layers")
#: Of positions in three directions, where the default config leaves them to be guessed.
_SECTIONS = {
    "qwen2_vl": [2, 1, 1], "qwen2_5_vl": [2, 1, 1], "glm4v": [2, 1, 1], "glm46v": [2, 1, 1], "glm4v_moe": [1, 1, 0],
}  # fmt: skip


#: What a type needs beside, of its text part ("") or of another part.
_MORE: dict[str, dict[str, dict[str, Any]]] = {
    "gemma4": {"": {"per_layer_config": {"01": {"head_dim": 16}}, "hidden_size_per_layer_input": 4,
                    "vocab_size_per_layer_input": 99}},
    "gemma4_text": {"": {"per_layer_config": {"01": {"head_dim": 16}}, "hidden_size_per_layer_input": 4,
                         "vocab_size_per_layer_input": 99}},
    "molmo2": {"": {"rope_scaling_layers": [0, 1]}, "vision_config": {"image_size": [16, 16]},
               "adapter_config": {"vision_feature_layer": [1, 0]}},
    "llama4": {"": {"attention_chunk_size": 7, "layer_types": ["chunked_attention", "full_attention"]}},
    "llama4_text": {"": {"attention_chunk_size": 7, "layer_types": ["chunked_attention", "full_attention"]}},
    "chameleon": {"": {"vocabulary_map": {"<image>": 7}},
                  "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}},
    "emu3": {"whole": {"vocabulary_map": {"<image>": 7}},
             "vq_config": {"base_channels": 32, "hidden_size": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}},
    "voxtral": {"whole": {"audio_token_id": 7}},
    "qwen3_5_text": {"": {"layer_types": ["linear_attention", "full_attention"]}},
    "qwen3_5": {"": {"layer_types": ["linear_attention", "full_attention"]}},
    "gemma2": {"": {"attn_logit_softcapping": 1.5}},
    "vaultgemma": {"": {"attn_logit_softcapping": 1.5}},
    "gpt_oss": {"": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}},
}  # fmt: skip


def _cut(given: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in given.items():
        if name in _BY_LAYER:
            continue
        if isinstance(value, dict):
            made[name] = _cut(value) if name.endswith(("config", "parameters", "scaling")) else value
        elif name in _SIZES and value is not None:
            made[name] = _SIZES[name]
        elif name in ("image_token_id", "image_token_index", "image_patch_id"):
            made[name] = IMAGE
        elif isinstance(value, int) and name.endswith(("token_id", "token_index")):
            made[name] = 10 + len(made) % 10
        else:
            made[name] = value
    kinds = given.get("layer_types") or ()
    if given.get("sliding_window") or "use_sliding_window" in given:
        made["sliding_window"] = WINDOW
        if "use_sliding_window" in given:
            made |= {"use_sliding_window": True, "max_window_layers": 0}
        if kinds:
            made["layer_types"] = ["sliding_attention", "full_attention"]
    return made


def config(model_type: str, **changes: Any) -> Any:
    """Args: changes: of its text part."""
    like = transformers.AutoConfig.for_model(model_type)
    made = _cut(like.to_dict())
    for name in ("model_type", "transformers_version", "architectures"):
        made.pop(name, None)
    text = made.get("text_config") if isinstance(made.get("text_config"), dict) else made
    assert text is not None
    if model_type in _SECTIONS:
        parameters = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": _SECTIONS[model_type]}
        text["rope_parameters"] = (text.get("rope_parameters") or {}) | parameters
    more = _MORE.get(model_type, {})
    text |= more.get("", {}) | changes
    made |= more.get("whole", {})
    for name, part in more.items():
        if name.endswith("config"):
            made[name] = made[name] | part
    return type(like)(**made)


def automatic(made: Any) -> Any:
    """The model of a config: with pictures where the type has any, else with a head, else without."""
    for auto in (
        transformers.AutoModelForImageTextToText, transformers.AutoModelForMultimodalLM,
        transformers.AutoModelForCausalLM,
    ):  # fmt: skip
        if type(made) in auto._model_mapping:
            return auto.from_config(made).eval()
    return transformers.AutoModel.from_config(made).eval()


def model(model_type: str, **changes: Any) -> Any:
    """In evaluation mode, with parameters large enough for attention to matter."""
    torch.manual_seed(0)
    built = automatic(config(model_type, **changes))
    for parameter in built.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.25)
        elif parameter.numel() > 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return built


def inputs() -> dict[str, torch.Tensor]:
    """Two rows with images of 4 and 3 tokens side by side and apart; the first has padding on its left."""
    torch.manual_seed(1)
    ids = torch.randint(20, 90, (2, LENGTH))
    ids[:, 7:11] = ids[1, 13:16] = IMAGE
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
