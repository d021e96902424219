"""Models of transformers with MODA: what `enable` leaves as it was, and decoding that equals full recompute."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
import vlm
from torch import Tensor
from vlm import FAMILIES, transformers

import moda_kernels as mk
from moda_kernels.integrations.transformers import attention as integration
from moda_kernels.integrations.transformers import disable, enable, modality_ids

EXACT = {"rtol": 0, "atol": 1e-5}
NEW = 5
GENERATE: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 2},
    "sampled": {"do_sample": True},
    "static": {"do_sample": False, "cache_implementation": "static"},
    "sampled beams, static": {"do_sample": True, "num_beams": 2, "cache_implementation": "static"},
    "without a cache": {"do_sample": False, "use_cache": False},
}


def generate(model: Any, x: dict[str, Tensor], **options: Any) -> Any:
    torch.manual_seed(3)
    return model.generate(
        **x, min_new_tokens=NEW, max_new_tokens=NEW, suppress_tokens=[vlm.IMAGE, vlm.VIDEO],
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip


def logits(model: Any, x: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**x, **vlm.positions(x), use_cache=False).logits


# Fresh aligners


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_aligners_change_nothing(family: str, images: bool) -> None:
    model, x = vlm.make(family), vlm.inputs(family, images)
    before, tokens = logits(model, x), {name: generate(model, x, **o).sequences for name, o in GENERATE.items()}
    names = set(model.state_dict())
    assert enable(model) is model
    added = set(model.state_dict()) - names
    assert len(added) == 2 and all(".self_attn.moda_aligner." in name for name in added)
    real = x["attention_mask"] > 0
    torch.testing.assert_close(logits(model, x)[real], before[real], **EXACT)
    for name, options in GENERATE.items():
        assert torch.equal(generate(model, x, **options).sequences, tokens[name]), name
    disable(model)
    assert set(model.state_dict()) == names and torch.equal(logits(model, x), before)


@pytest.mark.parametrize("fusion", ["linear", "concat"])
def test_fresh_fusions_change_nothing(fusion: str) -> None:
    model, x = vlm.make("llava"), vlm.inputs("llava")
    before = logits(model, x)
    enable(model, fusion=fusion, scope="sequence", layers=[1])
    assert [name for name in model.state_dict() if "layers.0" in name and "moda" in name] == []
    real = x["attention_mask"] > 0
    torch.testing.assert_close(logits(model, x)[real], before[real], **EXACT)


# Decoding is a full recompute


def check_logits(model: Any, x: dict[str, Tensor], made: Any) -> None:
    """What `generate` saw, token by token, against one full pass without a cache."""
    full = logits(model, vlm.continued(x, made.sequences))
    prompt = x["input_ids"].shape[1]
    for i, step in enumerate(made.logits):
        torch.testing.assert_close(step, full[:, prompt - 1 + i], **EXACT)


PSEUDO = {
    "none": None,
    "fixed": mk.PseudoAttention(0.3, 0.1, 200),
    "infinite": mk.PseudoAttention(0.3, 0.1, float("inf")),
}


@pytest.mark.parametrize("pseudo", PSEUDO)
@pytest.mark.parametrize("fusion", ["add", "concat"])
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_is_a_full_recompute(family: str, fusion: str, pseudo: str) -> None:
    model, x = vlm.make(family), vlm.inputs(family)
    plain = logits(model, x)
    vlm.randomised(enable(model, fusion=fusion, pseudo=PSEUDO[pseudo]))
    assert not torch.allclose(logits(model, x), plain, atol=1e-3), "the aligners do nothing"
    for name in ("greedy", "static", "sampled"):
        check_logits(model, x, generate(model, x, **GENERATE[name]))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_beams_score_as_a_full_recompute(family: str, cache: str) -> None:
    model, x = vlm.randomised(enable(vlm.make(family))), vlm.inputs(family)
    options = {"num_beams": 3, "num_return_sequences": 3, "do_sample": False, "output_scores": True}
    made = generate(model, x, **options, **({"cache_implementation": "static"} if cache == "static" else {}))
    prompt, indices = x["input_ids"].shape[1], torch.tensor([0, 0, 0, 1, 1, 1])
    text = {n: t for n, t in x.items() if t.shape[0] == 2}
    for row, (sequence, score) in enumerate(zip(made.sequences, made.sequences_scores, strict=True)):
        own = {n: t[indices[row]][None] for n, t in text.items()}
        if indices[row] == 0:
            own |= {n: t for n, t in x.items() if n not in text}
        log = logits(model, vlm.continued(own, sequence[None]))[0].log_softmax(-1)
        # min_new_tokens keeps the end token from being drawn, in transformers by -inf before the softmax is taken.
        total = sum(float(log[t - 1, sequence[t]]) for t in range(prompt, len(sequence)))
        assert float(score) * NEW == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_and_crops(family: str, static: bool) -> None:
    """A cache by hand: several tokens at once, some taken back, others in their place."""
    model, x = vlm.randomised(enable(vlm.make(family))), vlm.inputs(family)
    extra = torch.randint(30, 99, (2, 12))
    room = x["input_ids"].shape[1] + 12
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    if static:
        cache = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=room)
    elif family == "gemma3":
        cache.activate_past_recording()
    have = x["input_ids"]
    with torch.no_grad():
        model(**x, **vlm.positions(x), past_key_values=cache)
        for new, back in ((1, 0), (4, 2), (1, 0), (3, 3), (2, 0)):
            part, extra = extra[:, :new], extra[:, new:]
            have = torch.cat((have, part), 1)
            now = vlm.continued(x, have)
            step: dict[str, Any] = {"input_ids": part, "attention_mask": now["attention_mask"]}
            step |= {name: t[:, -new:] for name, t in vlm.positions(now).items()}
            if family.startswith("qwen"):
                positions = model.model.compute_3d_position_ids(
                    **{n: now.get(n) for n in ("input_ids", "image_grid_thw", "attention_mask", "mm_token_type_ids")},
                    inputs_embeds=None,
                )
                step["position_ids"] = positions[..., -new:]
            out = model(**step, past_key_values=cache).logits
            torch.testing.assert_close(out, logits(model, now)[:, -new:], **EXACT)
            if back and not static:
                cache.crop(-back)
                have = have[:, :-back]
            elif not static and family == "gemma3":
                cache.crop(0)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_assisted_generation(family: str) -> None:
    """Candidates come several at once, with the prompt the first time, and some are taken back; in Gemma 3 from a
    sliding cache, too."""
    model, x = vlm.randomised(enable(vlm.make(family))), vlm.inputs(family, images=False)
    one = {n: t[1:] for n, t in x.items()}
    one["input_ids"][:, 1:7] = torch.tensor([20, 25, 22, 20, 25, 22])
    options = {"min_new_tokens": 14, "max_new_tokens": 14, "do_sample": False, "suppress_tokens": [vlm.IMAGE]}
    assert torch.equal(model.generate(**one, prompt_lookup_num_tokens=3, **options), model.generate(**one, **options))


def test_an_assistant_with_aligners_of_its_own() -> None:
    model, assistant = (vlm.randomised(enable(vlm.llama(seed))) for seed in (0, 1))
    ids, kinds = torch.randint(20, 99, (1, 9)), torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1, 0]])
    options = {"min_new_tokens": 12, "max_new_tokens": 12, "do_sample": False}
    with modality_ids(kinds, rest=0):
        expected = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, assistant_model=assistant, **options), expected)
        assert torch.equal(model.generate(ids, use_cache=False, **options), expected)


def test_prefill_in_chunks() -> None:
    model, x = vlm.randomised(enable(vlm.make("llava"))), vlm.inputs("llava", images=False)
    options = {"min_new_tokens": NEW, "max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(model.generate(**x, prefill_chunk_size=6, **options), model.generate(**x, **options))


def test_a_copied_cache_takes_its_state_along() -> None:
    """A prompt that is used twice."""
    model, x = vlm.randomised(enable(vlm.make("llava"))), vlm.inputs("llava")
    with torch.no_grad():
        cache = model(**x, **vlm.positions(x)).past_key_values
        assert type(cache).__name__ == "DynamicCache" and isinstance(cache, transformers.DynamicCache)
        for token in (30, 31):
            new = torch.full((2, 1), token)
            whole = vlm.continued(x, torch.cat((x["input_ids"], new), 1))
            step = {"input_ids": new, "attention_mask": whole["attention_mask"]}
            step |= {name: t[:, -1:] for name, t in vlm.positions(whole).items()}
            out = model(**step, past_key_values=copy.deepcopy(cache)).logits
            torch.testing.assert_close(out, logits(model, whole)[:, -1:], **EXACT)


def test_a_cache_can_be_used_again() -> None:
    model, x = vlm.randomised(enable(vlm.make("llava"))), vlm.inputs("llava")
    cache = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=40)
    for _ in range(2):
        made = generate(model, x, do_sample=False, past_key_values=cache)
        check_logits(model, x, made)
        cache.reset()


# What can't decode exactly as a whole model does so in each call


@pytest.mark.parametrize(
    "options",
    [{"scope": "sequence"}, {"scope": "sequence", "fusion": "released"}, {"pseudo": mk.PseudoAttention(0.3, 0.1)}],
    ids=["sequence", "released", "pseudo"],
)
@pytest.mark.parametrize("cache", ["greedy", "static", "beams"])
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_each_call_is_a_full_pass_over_its_keys(
    family: str, cache: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = vlm.randomised(enable(vlm.make(family), **options)), vlm.inputs(family)
    calls = 0

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
        nonlocal calls
        out, _ = integration.attention(module, query, key, value, mask, **more)
        state = more[integration.ARGUMENT].state
        if state is None:
            return out, None
        layout = state.layout(key.shape[2])
        if key.shape[2] < state.length:  # the sliding layer's cache, whose keys are gone
            return out, None
        released = {"value": value} if options.get("fusion") == "released" else {}
        key_map = module.moda_aligner(key, layout, **released)
        tokens, rules = mask.made()  # the model's own mask; and how many tokens there are
        tokens = dataclasses.replace(tokens, counts=layout.counts.sum(1, keepdim=True, dtype=torch.int32))
        full = mk.moda_attention(
            query, mk.align_keys(key, key_map, layout), value, layout=tokens, mask=rules, enable_gqa=True,
            pseudo=module.moda_settings.pseudo, scale=more["scaling"],
            query_start=min(state.length, key.shape[2]) - query.shape[2],
        )  # fmt: skip
        torch.testing.assert_close(out, full.transpose(1, 2), **EXACT)
        calls += 1
        return out, None

    transformers.AttentionInterface.register(integration.NAME, attention)
    try:
        made = generate(model, x, **GENERATE[cache])
        assert calls >= NEW + 1
        if cache == "greedy":  # and the whole model differs: this is what the documentation warns of
            full = logits(model, vlm.continued(x, made.sequences))
            steps = torch.stack(made.logits, 1)
            assert not torch.allclose(steps, full[:, x["input_ids"].shape[1] - 1 : -1], atol=1e-5)
    finally:
        transformers.AttentionInterface.register(integration.NAME, integration.attention)


# Training


@pytest.mark.parametrize("family", FAMILIES)
def test_training(family: str) -> None:
    """Backward, gradient checkpointing of both kinds and a step of an optimiser."""
    model, x = vlm.randomised(enable(vlm.make(family))), vlm.inputs(family)
    labels = torch.where(x["attention_mask"] > 0, x["input_ids"], -100)
    text = [p for n, p in model.named_parameters() if "moda" in n or "q_proj" in n or "embed_tokens" in n]
    results = []
    for checkpointing in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model.train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable(checkpointing)
            if checkpointing["use_reentrant"]:
                model.enable_input_require_grads()
        model.zero_grad()
        loss = model(**x, labels=labels).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in text if p.grad is not None)])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
    aligners = [p for n, p in model.named_parameters() if "moda_aligner" in n]
    assert len(aligners) == 2 and all(bool((p.grad != 0).any()) for p in aligners)
    torch.optim.SGD(model.parameters(), 0.1).step()
    with torch.no_grad():
        assert model(**x, labels=labels).loss < results[0][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_training_with_a_cache_in_the_output(family: str) -> None:
    """`use_cache` is on by default, also where gradients flow."""
    model, x = vlm.randomised(enable(vlm.make(family))), vlm.inputs(family)
    grads = []
    for use_cache in (True, False):
        model.zero_grad()
        out = model(**x, use_cache=use_cache)
        out.logits[:, -1].square().sum().backward()
        grads.append([p.grad.clone() for n, p in model.named_parameters() if "moda" in n])
    torch.testing.assert_close(*grads)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.exhaustive] if f != "qwen2_vl" else []) for f in FAMILIES]
)
def test_compile(family: str) -> None:
    """Vision towers too, with breaks where transformers has them. (Whole graphs: `test_transformers_compile.py`.)"""
    model, x = vlm.randomised(enable(vlm.make(family))), vlm.inputs(family)
    expected = logits(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    if family == "llava":  # with a cache
        with torch.no_grad():
            torch.testing.assert_close(compiled(**x, **vlm.positions(x)).logits, expected, **EXACT)
    else:
        torch.testing.assert_close(logits(compiled, x), expected, **EXACT)


def test_autocast() -> None:
    model, x = vlm.randomised(enable(vlm.make("llava"))), vlm.inputs("llava")
    expected = logits(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**x, labels=x["input_ids"]).loss
        made = generate(model, x, do_sample=False)
        low = logits(model, x)
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for n, p in model.named_parameters() if "moda_aligner" in n)
    torch.testing.assert_close(low.float(), expected, rtol=0, atol=0.05)
    assert made.sequences.shape[1] == x["input_ids"].shape[1] + NEW


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, x = vlm.make("qwen2_vl").to(dtype), vlm.inputs("qwen2_vl")
    model = vlm.randomised(enable(model))
    assert all(p.dtype == dtype for n, p in model.named_parameters() if "moda" in n)
    made = generate(model, x, do_sample=False)
    full = logits(model, vlm.continued(x, made.sequences))[:, x["input_ids"].shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(made.logits, 1).float(), full.float(), rtol=0, atol=0.03)
