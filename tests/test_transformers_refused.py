"""Models that `enable` refuses by name, before any call; attention that is taken away; models without aligners."""

import contextlib
import copy
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import vlm
from torch import Tensor
from vlm import transformers

import moda_kernels as mk
from moda_kernels.integrations.transformers import attention as integration
from moda_kernels.integrations.transformers import disable, enable, modality_ids
from moda_kernels.integrations.transformers.families import DECODERS, FAMILIES


def not_known(call: Callable[[], Any], *parts: str) -> None:
    with pytest.raises(NotImplementedError) as error:
        call()
    for part in parts:
        assert part in str(error.value), str(error.value)


# Refused


@pytest.mark.slow
def test_every_other_type_is_refused_by_name() -> None:
    """Of all types with pictures and of all decoders, as many as can be built of a config that is cut small."""
    auto = transformers.models.auto.modeling_auto
    kinds = {*auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    seen = set()
    for kind in sorted(kinds - FAMILIES.keys() - DECODERS):
        try:
            with torch.device("meta"):
                config = tiny.config(kind)
                made = tiny.automatic(config)
        except Exception:  # what can't be built in this way is not looked at
            continue
        before = made.config.to_dict()
        with pytest.raises((NotImplementedError, ValueError, TypeError)) as error:
            enable(made)
        text = str(error.value)
        assert any(name in text for name in (type(made).__name__, kind, "decoder")), (kind, text)
        assert made.config.to_dict() == before
        seen.add(kind)
    assert seen >= {
        "whisper",
        "bert",
        "nemotron_h",
        "inkling_text",
    }


@pytest.mark.parametrize(
    ("kind", "changes", "parts"),
    [
        ("qwen2_moe", {}, ["Qwen2Moe", "sliding window"]),
        ("gemma3_text", {"use_bidirectional_attention": True}, ["Gemma3", "bidirectional"]),
        ("llama", {"is_causal": False}, ["Llama", "bidirectional"]),
    ],
)
def test_refused(kind: str, changes: dict[str, Any], parts: list[str]) -> None:
    model = tiny.model(kind, **changes)
    not_known(lambda: enable(model), "enable: ", *parts)
    assert model.get_decoder().config._attn_implementation != integration.NAME
    assert not any("moda_aligner" in name for name in model.state_dict())


def text_config(kind: str, **sizes: Any) -> Any:
    return type(transformers.AutoConfig.for_model(kind))(**vlm.TEXT | sizes)


def test_gemma3n_and_kosmos_are_refused() -> None:
    """They were taken, and broke at the first call."""
    t = transformers
    sizes = {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
    small = {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 99}
    for model in (
        t.Gemma3nForCausalLM(text_config("gemma3n_text", **sizes, **small, num_kv_shared_layers=0, laurel_rank=4)),
    ):
        not_known(lambda m=model: enable(m), type(model).__name__, "keys of others")
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"embed_dim": 16, "ffn_dim": 16, "layers": 1, "attention_heads": 2, "vocab_size": 99}
    kosmos = t.Kosmos2Config(text_config=text, vision_config=vision, latent_query_num=2)
    not_known(lambda: enable(t.Kosmos2ForConditionalGeneration(kosmos)), "Kosmos2", "outside")


# Gemma 3 marks its images


def logits(model: Any, x: dict[str, Tensor], **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**x, **more).logits


@pytest.mark.parametrize("marks", ["as the processor does", "absent", "zero", "the second image only", "half an image"])
def test_gemma3_sees_the_images_whole_that_a_call_marks(marks: str) -> None:
    model, x = vlm.make("gemma3"), vlm.inputs("gemma3")
    x = {name: torch.cat((t, t)) if name == "pixel_values" else t for name, t in x.items()}
    x["input_ids"][1, 7:11] = vlm.IMAGE  # two images, apart from each other
    images = (x["input_ids"] == vlm.IMAGE).long()
    x["token_type_ids"] = images.clone()
    if marks == "zero":
        x["token_type_ids"][:] = 0
    elif marks == "the second image only":
        x["token_type_ids"][0] = 0
    elif marks == "half an image":
        x["token_type_ids"][1, 7:9] = 0
    elif marks == "absent":
        del x["token_type_ids"]
    real = x["attention_mask"] > 0
    plain = [logits(model, x, use_cache=cache)[real] for cache in (False, True)]
    labels = torch.where(real, x["input_ids"], -100)
    loss = model.train()(**x, labels=labels).loss.detach()
    enable(model)
    torch.testing.assert_close(model(**x, labels=labels).loss.detach(), loss)
    model.eval()
    for cache, before in zip((False, True), plain, strict=True):
        torch.testing.assert_close(logits(model, x, use_cache=cache)[real], before, rtol=0, atol=1e-5)
    with modality_ids(images):
        torch.testing.assert_close(logits(model, x)[real], plain[0], rtol=0, atol=1e-5)
    if marks != "as the processor does":
        del x["pixel_values"]  # images matter where they are marked
        x["token_type_ids"] = images
        assert not torch.allclose(logits(model, x)[real], plain[0], atol=1e-3)


# Attention that was taken away, and models without their aligners


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl"])
def test_attention_that_was_switched_off_is_no_plain_model(family: str, refused: Callable[..., None]) -> None:
    model, x = vlm.randomised(enable(vlm.make(family))), vlm.inputs(family)
    expected = logits(model, x)
    for implementation in ("sdpa", "eager", {"text_config": "sdpa"}):
        model.set_attn_implementation(implementation)
        refused(lambda: model(**x), ValueError, ["attn_implementation", "'moda'", "disable(model)"])
    model.set_attn_implementation({"text_config": "moda", "vision_config": "sdpa"})
    torch.testing.assert_close(logits(model, x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl", "llama"])
def test_a_loaded_model_does_not_run_without_its_aligners(
    family: str, tmp_path: Path, refused: Callable[..., None]
) -> None:
    model = enable(vlm.llama() if family == "llama" else vlm.make(family))
    vlm.randomised(model)
    x = {"input_ids": torch.arange(20, 26)[None]} if family == "llama" else vlm.inputs(family)
    ids = modality_ids(torch.tensor([[0, 1, 1, 0, 0, 1]])) if family == "llama" else contextlib.nullcontext()
    with ids:
        expected = logits(model, x)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    refused(lambda: loaded(**x), ValueError, ["attn_implementation", "saved with aligners", "enable(model)"])
    enable(loaded)
    ids = modality_ids(torch.tensor([[0, 1, 1, 0, 0, 1]])) if family == "llama" else contextlib.nullcontext()
    with ids:
        torch.testing.assert_close(logits(loaded, x), expected, rtol=0, atol=1e-5)
    # Disabled, and saved again, it is a plain model.
    disable(loaded).save_pretrained(tmp_path / "plain")
    assert loaded.get_decoder().config._attn_implementation == "sdpa"
    plain = type(model).from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(plain, x), logits(loaded, x))


@pytest.mark.slow
def test_a_model_with_aligners_where_this_package_is_not_imported(tmp_path: Path) -> None:
    """transformers doesn't know the attention, and says so."""
    enable(vlm.make("llava")).save_pretrained(tmp_path)
    script = f"import transformers; transformers.LlavaForConditionalGeneration.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0 and 'attn_implementation="moda"' in done.stderr


def test_a_model_made_of_an_enabled_ones_config(refused: Callable[..., None]) -> None:
    model, x = vlm.randomised(enable(vlm.make("llava"))), vlm.inputs("llava")
    expected = logits(model, x)
    other = type(model)(model.config).eval()
    refused(lambda: other(**x), ValueError, ["enable(model)"])
    refused(lambda: enable(other, fusion="concat"), ValueError, ["fusion='add'"])
    enable(other)
    assert not any(bool(p.any()) for name, p in other.named_parameters() if "moda_aligner" in name)
    logits(other, x)
    assert torch.equal(logits(model, x), expected)
    disable(copy.deepcopy(other))
    disable(other)
    refused(lambda: model(**x), ValueError, ["attn_implementation"])  # they share a config
    disable(model)


# What a backend hasn't got


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_capped_scores_are_refused_before_any_work(backend: str) -> None:
    absent = mk.backends.BACKENDS[backend].why_absent()
    if absent:
        pytest.skip("; ".join(absent))
    model = enable(tiny.model("gemma2"))
    ids = torch.randint(20, 90, (1, 9))
    told = modality_ids(torch.zeros(1, 9).long())
    with mk.use_backend(backend), told, pytest.raises(NotImplementedError, match=f"{backend}: it has no softcap"):
        model(ids)
    small = torch.zeros(1, 1, 4, 8)
    for given in ({}, {"pair_bias": torch.full((1, 1, 2, 2), math.nan)}):
        with pytest.raises(NotImplementedError, match="softcap"):
            mk.moda_attention(small, small, small, layout=ids[:, :4] % 2, softcap=3.0, backend=backend, **given)
