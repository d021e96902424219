"""`enable` and what is around it: saving and loading, PEFT, other models, the authors' released weights, wrong use."""

import copy
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vlm
from torch import Tensor
from vlm import transformers

import moda_kernels as mk
from moda_kernels.integrations.transformers import disable, enable, load_released, modality_ids
from moda_kernels.integrations.transformers.attention import NAME

D = 8  # head size of the tiny models


def logits(model: Any, x: dict[str, Tensor], **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**x, **more).logits


def aligners(model: Any) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if "moda_aligner" in name}


def test_keys_that_keep_their_lengths() -> None:
    made = {}
    for renorm in (False, True):
        torch.manual_seed(0)
        model = vlm.randomised(enable(vlm.make("llava"), renorm=renorm))
        kept = [module.renorm for module in model.modules() if isinstance(module, mk.DuplexAligner)]
        assert kept and all(of == renorm for of in kept)
        assert model.config.moda.get("renorm", False) == renorm
        made[renorm] = logits(model, vlm.inputs("llava"))
        # A model's config says what its aligners are.
        saved = dict(model.config.moda)
        disable(model)
        model.config.moda = saved
        with pytest.raises(ValueError, match="renorm"):
            enable(model, renorm=not renorm)
    assert not torch.allclose(made[False], made[True])
    with pytest.raises(ValueError, match="renorm"):
        enable(vlm.make("llava"), fusion="released", scope="sequence", renorm=True)


# Saving and loading

LOAD = """
import sys
from pathlib import Path
import torch, transformers
from moda_kernels import testing
from moda_kernels.integrations.transformers import enable

def logits():
    with torch.no_grad():
        return testing.Result({"logits": model(**x).logits})

for folder in Path(sys.argv[1]).iterdir():
    kind, x, options, parameters, expected = torch.load(folder / "case")
    model = getattr(transformers, kind).from_pretrained(folder / "model").eval()
    enable(model, **options)
    loaded = model.state_dict()
    assert loaded.keys() == parameters.keys(), folder
    assert all(torch.equal(loaded[name], t) for name, t in parameters.items()), folder
    # Sums come in another order where a process has other threads: not the same bits, but as exact.
    got = logits()
    model.double()
    (compared,) = testing.compare(got, logits(), testing.Result({"logits": expected}), torch.float32)
    assert compared.good, compared
    print(folder.name)
"""


@pytest.mark.slow
def test_saved_loaded_in_a_new_process_and_enabled_again(tmp_path: Path) -> None:
    options: dict[str, dict[str, Any]] = {
        "llava": {"fusion": "concat"}, "gemma3": {"scope": "sequence"}, "qwen2_vl": {"layers": [1]},
    }  # fmt: skip
    for family, own in options.items():
        model, x = vlm.randomised(enable(vlm.make(family), **own)), vlm.inputs(family)
        folder = tmp_path / family
        model.save_pretrained(folder / "model", **({"max_shard_size": "20KB"} if family == "gemma3" else {}))
        assert (folder / "model" / "model.safetensors.index.json").exists() == (family == "gemma3")
        torch.save((type(model).__name__, x, own, model.state_dict(), logits(model, x)), folder / "case")
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == set(options)


def test_saved_with_other_options(tmp_path: Path, refused: Callable[..., None]) -> None:
    model = vlm.randomised(enable(vlm.make("llava"), fusion="linear"))
    model.save_pretrained(tmp_path)
    state = {name: t.clone() for name, t in aligners(model).items()}
    loaded = type(model).from_pretrained(tmp_path)
    refused(lambda: enable(loaded), ValueError, ["fusion='linear'", "del model.config.moda"])
    loaded.config._name_or_path = "somewhere/else"
    refused(lambda: enable(loaded, fusion="linear"), ValueError, ["weights", "somewhere/else"])
    refused(lambda: enable(loaded, fusion="linear", weights={}), ValueError, ["weights", "moda_aligner.ratio"])
    assert not aligners(loaded)
    for weights in (tmp_path, str(tmp_path), state):
        enable(loaded, fusion="linear", weights=weights)
        assert all(torch.equal(aligners(loaded)[name], t) for name, t in state.items())
        disable(loaded)
        loaded.config.moda = dict(model.config.moda)
    del loaded.config.moda
    assert float(aligners(enable(loaded))[next(n for n in state if "ratio" in n)].abs().max()) == 0


def test_copied_and_pickled_models_are_enabled(tmp_path: Path) -> None:
    model, x = vlm.randomised(enable(vlm.make("llava"))), vlm.inputs("llava")
    torch.save(model, tmp_path / "model.pt")  # before a call: transformers' own hooks can't be pickled afterwards
    expected = logits(model, x)
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False), x), expected)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied, x), expected)
    disable(copied)
    assert not torch.allclose(logits(copied, x), expected, atol=1e-4)
    assert torch.equal(logits(model, x), expected)


@pytest.mark.parametrize("kind", ["LlavaModel", "LlamaModel"])
def test_models_without_a_head(kind: str) -> None:
    model = vlm.make("llava").model if kind == "LlavaModel" else vlm.llama().model
    x = vlm.inputs("llava") if kind == "LlavaModel" else {"input_ids": torch.randint(20, 99, (1, 5))}
    assert type(model).__name__ == kind
    with torch.no_grad():
        expected = model(**x).last_hidden_state
        enable(model)
        if kind == "LlavaModel":
            real = x["attention_mask"] > 0
            torch.testing.assert_close(model(**x).last_hidden_state[real], expected[real], rtol=0, atol=1e-5)
        else:
            with modality_ids(torch.tensor([[0, 1, 1, 0, 0]])):
                torch.testing.assert_close(model(**x).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_a_disabled_model_is_saved_without(tmp_path: Path) -> None:
    model = disable(enable(vlm.make("llava")))
    model.save_pretrained(tmp_path)
    assert "moda" not in (tmp_path / "config.json").read_text().replace("multimodal", "")


# The vision tower, layers, devices of attention


@pytest.mark.parametrize("family", vlm.FAMILIES)
def test_the_vision_tower_is_left_alone(family: str) -> None:
    model = vlm.make(family)
    vision = model.model.vision_tower if hasattr(model.model, "vision_tower") else model.model.visual
    before = {name: p.clone() for name, p in vision.named_parameters()}
    kind = vision.config._attn_implementation
    enable(model)
    assert vision.config._attn_implementation == kind != NAME
    assert model.model.language_model.config._attn_implementation == NAME
    assert {name for name, _ in vision.named_parameters()} == set(before)
    disable(model)
    assert model.model.language_model.config._attn_implementation == "sdpa"


def test_a_string_switches_the_vision_tower_too() -> None:
    """Where it is SDPA."""
    model, x = enable(vlm.make("llava")), vlm.inputs("llava")
    expected = logits(model, x)
    model.set_attn_implementation(NAME)
    assert torch.equal(logits(model, x), expected)
    model.set_attn_implementation({"text_config": NAME, "vision_config": "sdpa"})
    assert torch.equal(logits(model, x), expected)


def test_layers_and_masks_of_their_own() -> None:
    """The mask and pseudo scores belong to the chosen layers; the others attend as the model does."""
    model, x = vlm.make("gemma3"), vlm.inputs("gemma3")
    plain = logits(model, x)
    enable(model, layers=[], mask=mk.ModularMask.self_only(2), pseudo=mk.PseudoAttention(length=99))
    real = x["attention_mask"] > 0
    torch.testing.assert_close(logits(model, x)[real], plain[real], rtol=0, atol=1e-5)
    assert not aligners(model)
    enable(disable(model), layers=[1], mask=mk.ModularMask.self_only(2, causal=True))
    assert len(aligners(model)) == 1
    assert not torch.allclose(logits(model, x)[real], plain[real], atol=1e-4)


def test_windows_of_a_mask_and_of_a_layer() -> None:
    """The tiny Gemma 3 has a sliding layer of 6 tokens and a full one."""
    x = vlm.inputs("gemma3")
    rules = mk.ModularMask.bidirectional_within(2, [1]).rules
    outs = {}
    for window, on in ((4, "past"), (4, "all"), (6, "all"), (9, "past"), (None, "past")):
        outs[window, on] = logits(enable(vlm.make("gemma3"), mask=mk.ModularMask(rules, window, on)), x)
    torch.testing.assert_close(outs[4, "past"], outs[4, "all"])  # no image is longer
    assert not torch.allclose(outs[4, "all"], outs[6, "all"]) and not torch.allclose(
        outs[9, "past"], outs[None, "past"]
    )
    last = logits(enable(vlm.make("gemma3"), mask=mk.ModularMask(rules, 9, "all")), x)
    assert not torch.allclose(last, outs[None, "past"])  # in the full layer


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("window", [2, 3, 6])
def test_windows_that_cut_images(window: int, cache: bool) -> None:
    """Gemma 3's sliding layers hide what lies so far back within an image, too."""
    x = vlm.inputs("gemma3") | {"use_cache": cache}
    model = vlm.make("gemma3")
    for layer in model.get_decoder().layers:
        if layer.self_attn.sliding_window is not None:
            layer.self_attn.sliding_window = window
    model.get_decoder().config.sliding_window = window
    real, before = x["attention_mask"] > 0, logits(model, x)
    torch.testing.assert_close(logits(enable(model), x)[real], before[real], rtol=0, atol=1e-5)


def test_images_see_themselves_whole_in_gemma3_only() -> None:
    for family, whole in (("gemma3", True), ("llava", False)):
        model, x = enable(vlm.make(family)), vlm.inputs(family)
        image = (x["input_ids"][0] == vlm.IMAGE).nonzero()[:, 0]
        captured = {}
        model.model.language_model.layers[1].register_forward_hook(lambda m, a, out, c=captured: c.update(out=out))
        values = []
        for noise in (0.0, 1.0):

            def disturb(module: Any, args: Any, kwargs: Any, noise: float = noise, last: int = int(image[-1])) -> Any:
                embeds = kwargs["inputs_embeds"].clone()
                embeds[0, last] += noise
                return args, kwargs | {"inputs_embeds": embeds}

            hook = model.model.language_model.register_forward_pre_hook(disturb, with_kwargs=True)
            with torch.no_grad():
                model(**x)
            hook.remove()
            values.append((captured["out"] if isinstance(captured["out"], Tensor) else captured["out"][0])[0, image[0]])
        assert torch.equal(*values) != whole


def test_a_mask_of_four_axes_comes_on_top() -> None:
    model, x = vlm.make("llava"), vlm.inputs("llava")
    length = x["input_ids"].shape[1]
    shown = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
    shown[:, :, 10:, 5:8] = False
    x["attention_mask"] = shown
    expected = logits(model, x)
    torch.testing.assert_close(logits(enable(model), x), expected, rtol=0, atol=1e-5)


# PEFT


def test_lora_and_aligners_with_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, x = enable(vlm.make("llava"), fusion="linear"), vlm.inputs("llava")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["moda_aligner"])
    wrapped = peft.get_peft_model(model, config)
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in trained) and sum("moda_aligner" in name for name in trained) == 4
    optimiser = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        optimiser.zero_grad()
        wrapped(**x, labels=x["input_ids"]).loss.backward()
        optimiser.step()
    wrapped.eval()
    expected = logits(wrapped, x)
    made = wrapped.generate(**x, max_new_tokens=3, do_sample=False)
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(enable(vlm.make("llava"), fusion="linear"), tmp_path).eval()
    assert torch.equal(logits(again, x), expected)
    assert torch.equal(again.generate(**x, max_new_tokens=3, do_sample=False), made)
    disable(again)


# Any other model


def test_ids_of_a_plain_decoder() -> None:
    model, ids = vlm.llama(), torch.randint(20, 99, (2, 9))
    plain, generated = logits(model, {"input_ids": ids}), model.generate(ids, max_new_tokens=4, do_sample=False)
    kinds = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 0, 0], [0, 1, 0, 1, 0, 0, 0, 2, 0]])
    enable(model, num_modalities=3)
    with modality_ids(kinds):
        torch.testing.assert_close(logits(model, {"input_ids": ids}), plain, rtol=0, atol=1e-5)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), generated)
    vlm.randomised(model)
    options = {"min_new_tokens": 4, "max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    embeds = model.get_input_embeddings()(ids)
    mask = torch.ones_like(ids)
    with modality_ids(kinds):
        made = model.generate(inputs_embeds=embeds, attention_mask=mask, do_sample=False, **options)
        beams = model.generate(ids, num_beams=2, do_sample=False, **options)
    whole = torch.cat((ids, made.sequences), 1)
    with modality_ids(torch.nn.functional.pad(kinds, (0, 4))):
        full = logits(model, {"input_ids": whole}, use_cache=False)
        logits(model, {"input_ids": beams.sequences}, use_cache=False)
    torch.testing.assert_close(torch.stack(made.logits, 1), full[:, 8:-1], rtol=0, atol=1e-5)
    assert not torch.allclose(full[:, :9], plain, atol=1e-3)


def test_embeddings_of_a_family() -> None:
    model, x = vlm.randomised(enable(vlm.make("llava"))), vlm.inputs("llava", images=False)
    x["input_ids"][:, 5:8] = vlm.IMAGE
    expected = logits(model, x)
    embeds = {"inputs_embeds": model.get_input_embeddings()(x["input_ids"]), "attention_mask": x["attention_mask"]}
    with modality_ids((x["input_ids"] == vlm.IMAGE).int()):
        assert torch.equal(logits(model, embeds), expected)
    # Where the family has an argument for it.
    model, x = vlm.randomised(enable(vlm.make("qwen2_vl"))), vlm.inputs("qwen2_vl", images=False)
    kinds = torch.zeros_like(x["input_ids"])
    kinds[:, 5:8] = 1
    embeds = {"inputs_embeds": model.get_input_embeddings()(x["input_ids"]), "attention_mask": x["attention_mask"]}
    positions = {"position_ids": torch.arange(kinds.shape[1]).expand(3, 2, -1)}
    with modality_ids(kinds):
        expected = logits(model, embeds | positions)
    assert torch.equal(logits(model, embeds | positions | {"mm_token_type_ids": kinds}), expected)


def test_items_cut_segments() -> None:
    mask = mk.ModularMask([[mk.Visibility.PAST, mk.Visibility.PAST], [mk.Visibility.PAST, mk.Visibility.SEGMENT]])
    model, ids = enable(vlm.llama(), mask=mask), torch.randint(20, 99, (1, 6))
    kinds, items = torch.tensor([[0, 1, 1, 1, 1, 0]]), torch.tensor([[0, 0, 0, 1, 1, 0]])
    outs = []
    for item_ids in (None, items):
        with modality_ids(kinds, item_ids=item_ids):
            outs.append(logits(model, {"input_ids": ids}))
    assert not torch.allclose(*outs, atol=1e-5)


# The authors' weights


def released(layers: int = 2, prefix: str = "model.") -> dict[str, Tensor]:
    """Random numbers under the names and shapes of the release."""
    torch.manual_seed(4)
    made = {f"{prefix}embed_tokens.weight": torch.randn(3, 3)}
    for i in range(layers):
        at = f"{prefix}layers.{i}.self_attn"
        for part in "vt":
            made |= {f"{at}.ratio_{part}": torch.randn(1, 1, D), f"{at}.pfuser_{part}": torch.randn(D, D)}
    return made


@pytest.mark.parametrize("family", ["llava_next", "llama"])
def test_released_weights(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = vlm.llama() if family == "llama" else vlm.make(family)
    weights = released(prefix="model." if family == "llama" else "language_model.model.")
    done = load_released(model, weights)
    assert len(done.used) == 4 and len(done.ignored) == 4 and all("_t" in name for name in done.ignored)
    assert "ratio_t" in caplog.text and "ignored" in caplog.text
    ids = torch.randint(20, 99, (2, 9))
    kinds = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0, 0], [-1, -1, 0, 0, 0, 1, 1, 0, 0]])
    ids[1, :2] = vlm.PAD
    captured = []
    module = model.get_decoder().layers[0].self_attn
    module.register_forward_hook(lambda m, a, k, out: captured.append((k, out[0])), with_kwargs=True)
    with modality_ids(kinds):
        logits(model, {"input_ids": ids, "attention_mask": (ids != vlm.PAD).long()})
    # The layer by hand, from the release's numbers.
    arguments, got = captured[0]
    x = arguments["hidden_states"]
    q, k, v = (
        getattr(module, f"{n}_proj")(x).unflatten(-1, (-1, D)).transpose(1, 2) for n in ("q", "k", "v")
    )  # fmt: skip
    rope = sys.modules[type(module).__module__].apply_rotary_pos_emb
    q, k = rope(q, k, *arguments["position_embeddings"])
    layout = mk.segment_modalities(kinds)
    name = next(n for n in weights if n.endswith("layers.0.self_attn.ratio_v"))
    ratio, weight = weights[name], weights[name.replace("ratio_v", "pfuser_v")]
    key_map = mk.released_key_map(k, v, layout, ratio, weight)
    out = mk.moda_attention(q, k, v, layout=layout, is_causal=True, key_map=key_map, enable_gqa=True)
    expected = module.o_proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_released_weights_that_do_not_fit(refused: Callable[..., None]) -> None:
    model = vlm.make("llava_next")
    for changed, parts in (
        (released(1), ["state_dict", "layers.1"]),
        (released(3), ["state_dict", "2 layers", "layers.2"]),
        (released() | {"model.layers.0.self_attn.ratio_v": torch.zeros(3)}, ["ratio_v", "(8,)"]),
        (released() | {"model.layers.0.self_attn.pfuser_v.bias": torch.zeros(D)}, ["state_dict", "bias"]),
        ({}, ["state_dict", "ratio_v"]),
    ):
        refused(lambda w=changed: load_released(model, w), ValueError, parts)
    assert not aligners(model)
    linear = {name.replace("pfuser_v", "pfuser_v.weight"): t for name, t in released().items()}
    assert len(load_released(model, linear).used) == 4


# Wrong use


def test_no_modality_ids(refused: Callable[..., None]) -> None:
    model, ids = enable(vlm.llama()), torch.randint(20, 99, (1, 5))
    refused(lambda: model(ids), ValueError, ["modality ids", "with modality_ids"])
    vlms = enable(vlm.make("llava"))
    embeds = vlms.get_input_embeddings()(ids)
    refused(lambda: vlms(inputs_embeds=embeds), ValueError, ["modality ids", "LlamaModel"])
    logits(vlms, {"input_ids": ids})
    # What one call found is not there for the next.
    refused(lambda: vlms.model.language_model(inputs_embeds=embeds), ValueError, ["modality ids"])


def test_ids_and_keys_of_different_length(refused: Callable[..., None]) -> None:
    model, ids = enable(vlm.llama()), torch.randint(20, 99, (2, 5))
    for shape in ((2, 4), (2, 6), (3, 5)):
        with modality_ids(torch.zeros(shape).long()):
            refused(lambda: model(ids), ValueError, ["modality_ids", "2 x 5"])
    mask = torch.ones(2, 3)
    with modality_ids(torch.zeros(2, 5).long()):
        refused(lambda: model(ids, attention_mask=mask), ValueError, ["attention_mask"])
        with pytest.raises(ValueError, match="the id 7"), modality_ids(torch.full((2, 5), 7)):
            model(ids)
    refused(lambda: modality_ids(torch.zeros(3).long()).__enter__(), ValueError, ["ids", "[B, L]"])
    refused(lambda: modality_ids(torch.zeros(3, 3)).__enter__(), TypeError, ["ids"])


def test_caches_from_elsewhere(refused: Callable[..., None]) -> None:
    model, x = vlm.make("llava"), vlm.inputs("llava")
    with torch.no_grad():
        cache = model(**x).past_key_values
    enable(model)
    new = {"input_ids": torch.full((2, 1), 30)}
    # transformers 5.24 gave the argument another name, and takes the old one as well.
    name = (
        {"cache", "past_key_values"} & set(inspect.signature(type(model.model.language_model).forward).parameters)
    ).pop()
    refused(lambda: model(**new, past_key_values=cache), ValueError, [name, "unknown modality"])
    both = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    refused(lambda: model(**x, past_key_values=both), TypeError, [name])


def test_dropout_is_refused() -> None:
    model, x = vlm.make("llava"), vlm.inputs("llava")
    model.model.language_model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(NotImplementedError, match="dropout_p"):
        enable(model).train()(**x)


def test_enable_twice_and_other_arguments(refused: Callable[..., None]) -> None:
    model = vlm.make("llava")
    refused(lambda: disable(model), ValueError, ["model", "enabled"])
    refused(lambda: enable(torch.nn.Linear(2, 2)), TypeError, ["model"])
    refused(lambda: enable(model, fusion="sum"), ValueError, ["fusion"])
    refused(lambda: enable(model, scope="all"), ValueError, ["scope"])
    refused(lambda: enable(model, fusion="released"), ValueError, ["scope", "sequence"])
    refused(lambda: enable(model, mask="causal"), TypeError, ["mask"])
    refused(lambda: enable(model, mask=mk.ModularMask.causal(3)), ValueError, ["mask", "2 x 2"])
    refused(lambda: enable(model, pseudo=3), TypeError, ["pseudo"])
    refused(lambda: enable(model, layers=[0, 5]), ValueError, ["layers", "[5]"])
    refused(lambda: enable(model, layers=1), TypeError, ["layers"])
    refused(lambda: enable(model, num_modalities=1), ValueError, ["num_modalities"])
    assert not aligners(model) and not hasattr(model.config, "moda")
    enable(model)
    refused(lambda: enable(model), ValueError, ["model", "disable"])


@pytest.mark.parametrize("version", ["5.21.1", "4.57.1"])
def test_transformers_too_old(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vlm.make("llava")
    # transformers exchanges its own module while it loads models.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    with pytest.raises(ImportError, match=rf"expected 5.22 or newer, got {version}.*pip install"):
        enable(model)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vlm.make("llava")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers: pip install"):
        enable(model)
