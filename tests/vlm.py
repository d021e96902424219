"""Tiny, randomly initialised models of the families that `enable` knows, and inputs for them."""

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5.0")

#: Token ids.
PAD, BOS, IMAGE, VIDEO = 0, 1, 7, 8
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 99, "max_position_embeddings": 256, "pad_token_id": PAD,
    "bos_token_id": BOS, "eos_token_id": 2,
}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
QWEN = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 9, "vision_end_token_id": 10}
QWEN_VISION = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


def _llava() -> Any:
    t = transformers
    vision, text = t.CLIPVisionConfig(**VISION), t.LlamaConfig(**TEXT)
    config = t.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-1)
    return t.LlavaForConditionalGeneration(config)


def _llava_next() -> Any:
    t = transformers
    config = t.LlavaNextConfig(
        vision_config=t.CLIPVisionConfig(**VISION), text_config=t.LlamaConfig(**TEXT), image_token_id=IMAGE,
        vision_feature_layer=-1, image_grid_pinpoints=[[16, 16]],
    )  # fmt: skip
    return t.LlavaNextForConditionalGeneration(config)


def _gemma3() -> Any:
    t = transformers
    text = t.Gemma3TextConfig(
        **TEXT, head_dim=8, query_pre_attn_scalar=8, sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    config = t.Gemma3Config(
        vision_config=t.SiglipVisionConfig(**VISION), text_config=text, image_token_id=IMAGE, boi_token_id=8,
        eoi_token_id=9, mm_tokens_per_image=4,
    )  # fmt: skip
    model = t.Gemma3ForConditionalGeneration(config)
    # transformers starts it at 0, and images would all be nothing.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)
    return model


def _qwen2_vl() -> Any:
    t = transformers
    vision = QWEN_VISION | {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    return t.Qwen2VLForConditionalGeneration(t.Qwen2VLConfig(vision_config=vision, text_config=TEXT | ROPE, **QWEN))


def _qwen3_vl() -> Any:
    t = transformers
    sizes = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_position_embeddings": 16}
    vision = QWEN_VISION | sizes | {"deepstack_visual_indexes": [0]}
    config = t.Qwen3VLConfig(vision_config=vision, text_config=TEXT | ROPE | {"head_dim": 8}, **QWEN)
    return t.Qwen3VLForConditionalGeneration(config)


_MAKERS = {
    "llava": _llava, "llava_next": _llava_next, "gemma3": _gemma3, "qwen2_vl": _qwen2_vl, "qwen3_vl": _qwen3_vl,
}  # fmt: skip
FAMILIES = tuple(_MAKERS)
#: Tokens of one image.
IMAGE_TOKENS = {"llava": 16, "llava_next": 36, "gemma3": 4, "qwen2_vl": 4, "qwen3_vl": 4}


def make(family: str, seed: int = 0) -> Any:
    """A model in evaluation mode, always with the same parameters."""
    torch.manual_seed(seed)
    return _MAKERS[family]().eval()


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)).eval()


def inputs(family: str, images: bool = True) -> dict[str, Tensor]:
    """A batch of two prompts: one with an image and padding on the left, one without either."""
    n = IMAGE_TOKENS[family]
    torch.manual_seed(1)
    first = [PAD] * 3 + [BOS] + [IMAGE if images else 50] * n + [20, 21, 22]
    ids = torch.tensor([first, [BOS, 20, 30, 31] + [41] * n + [20, 25, 22]])
    made: dict[str, Tensor] = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    if family == "gemma3":
        made["token_type_ids"] = (ids == IMAGE).long()
    if family.startswith("qwen"):
        made["mm_token_type_ids"] = (ids == IMAGE).int()
    if not images:
        return made
    if family == "llava_next":
        made |= {"pixel_values": torch.randn(1, 2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]])}
    elif family.startswith("qwen"):
        made |= {"pixel_values": torch.randn(16, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    else:
        made["pixel_values"] = torch.randn(1, 3, 16, 16)
    return made


def continued(made: dict[str, Tensor], sequences: Tensor) -> dict[str, Tensor]:
    """The inputs of a full pass over a prompt and what was generated after it."""
    new = sequences.shape[1] - made["input_ids"].shape[1]
    longer = dict(made) | {"input_ids": sequences}
    for name, value in (("attention_mask", 1), ("token_type_ids", 0), ("mm_token_type_ids", 0)):
        if name in made:
            longer[name] = torch.nn.functional.pad(made[name], (0, new), value=value)
    return longer


def positions(made: dict[str, Tensor]) -> dict[str, Tensor]:
    """The positions that `generate` gives to padded rows. A bare forward counts padding too: after the rotary embedding
    plain attention doesn't notice, but Gram matrices of keys do. (Qwen's models count right by themselves.)"""
    if "image_grid_thw" in made or "mm_token_type_ids" in made:
        return {}
    return {"position_ids": (made["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def randomised(model: Any) -> Any:
    """With aligners that do something."""
    torch.manual_seed(2)
    changed = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "moda_aligner" in name:
                parameter += torch.randn_like(parameter)
                changed += 1
    assert changed
    return model
