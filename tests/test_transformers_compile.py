"""`torch.compile(fullgraph=True)` of whole models, enabled or with "moda" alone: one graph, any length; and export."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
import vlm
from torch import Tensor
from vlm import transformers

import moda_kernels as mk
from moda_kernels.integrations.transformers import enable, modality_ids
from moda_kernels.integrations.transformers.asked import AskedMask

CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(autouse=True)
def whole() -> Iterator[None]:
    torch._dynamo.reset()
    with mk.use_backend("reference"):
        yield


class Counting:
    """A compiler that counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: torch.fx.GraphModule, example: Any, **options: Any) -> Callable[..., Any]:
        self.graphs += any(node.op.startswith("call") for node in module.graph.nodes)
        run: Callable[..., Any] = module.forward
        return run

    def __deepcopy__(self, memo: Any) -> "Counting":
        return self  # `generate` copies its settings


def compiled(model: Any) -> tuple[Any, Counting]:
    counting = Counting()
    return torch.compile(model, fullgraph=True, backend=counting), counting


def rows(model: Any, length: int) -> dict[str, Tensor]:
    torch.manual_seed(length)
    ids = torch.randint(20, 90, (2, length))
    image = 7
    ids[0, 3:8] = ids[1, 9:12] = image
    made = {"input_ids": ids}
    if model.config.model_type in ("gemma3", "gemma4"):
        made["token_type_ids" if model.config.model_type == "gemma3" else "mm_token_type_ids"] = (ids == image).long()
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "enabled", "backend"),
    [
        *(
            pytest.param(
                kind, enabled, "reference", marks=() if enabled and kind != "mistral3" else pytest.mark.exhaustive
            )
            for kind, enabled in itertools.product(("llava", "gemma3", "mistral3"), (True, False))
        ),
        ("llava", True, "cpu"),
        ("mistral3", False, "cpu"),
    ],
)
def test_any_length_in_two_graphs(kind: str, enabled: bool, backend: str) -> None:
    model = tiny.model(kind, **({} if kind == "gemma3" else {"num_hidden_layers": 1}))  # (its two are of two kinds)
    if enabled:
        vlm.randomised(enable(model))
    else:
        model.set_attn_implementation("moda")
    model(**rows(model, 13))  # transformers' own lock asks for one eager call
    whole, counting = compiled(model)
    with torch.no_grad(), mk.use_backend(backend):
        for length in (14, 17, 20, 16, 31, 23, 40, 18, 25, 50):
            x = rows(model, length)
            torch.testing.assert_close(whole(**x, use_cache=False).logits, model(**x, use_cache=False).logits, **CLOSE)
    assert counting.graphs <= 2


@pytest.mark.slow
def test_a_text_model_alone() -> None:
    text = vlm.randomised(enable(vlm.make("qwen2_vl"))).model.language_model
    whole, counting = compiled(text)
    for length in (8, 12, 13, 20, 9):
        embeds, ids = torch.randn(2, length, 32), torch.zeros(2, length, dtype=torch.int64)
        ids[:, 3:6] = 1
        with modality_ids(ids):
            expected = text(inputs_embeds=embeds, use_cache=False).last_hidden_state
            got = whole(inputs_embeds=embeds, use_cache=False).last_hidden_state
        torch.testing.assert_close(got, expected, **CLOSE)
    assert counting.graphs <= 2


@pytest.mark.slow
@pytest.mark.skipif(
    torch.__version__.startswith("2.11."),
    reason="torch 2.11 can't trace the masked_scatter of these models' training, with eager attention or SDPA neither",
)
@pytest.mark.parametrize(
    ("family", "backend"), [("llava", "cpu"), pytest.param("gemma3", "reference", marks=pytest.mark.exhaustive)]
)
def test_training_with_padding(family: str, backend: str) -> None:
    model, x = vlm.randomised(enable(vlm.make(family))).train(), vlm.inputs(family)
    labels = torch.where(x["attention_mask"] > 0, x["input_ids"], -100)
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, whole):
        model.zero_grad()
        with mk.use_backend(backend):
            loss = run(**x, labels=labels, use_cache=False).loss
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), grads))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert any("moda_aligner" in name for name in results[0][1])


@pytest.mark.slow
@pytest.mark.parametrize("enabled", [True, False])
def test_packed_rows(enabled: bool) -> None:
    model = vlm.llama()
    if enabled:
        vlm.randomised(enable(model))
    else:
        model.set_attn_implementation("moda")
    ids, kinds = torch.randint(20, 90, (1, 18)), (torch.arange(18) % 5 < 2).long()[None]
    whole, _ = compiled(model)
    for lengths in ([18], [5, 13], [7, 2, 9]):
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        with modality_ids(kinds):
            expected = model(ids, position_ids=positions, use_cache=False).logits
            got = whole(input_ids=ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(got, expected, **CLOSE)


def test_what_would_look_beyond_documents_is_refused() -> None:
    model = enable(vlm.llama(), scope="sequence")
    whole, _ = compiled(model)
    positions = torch.arange(9)[None]
    with modality_ids(torch.zeros(1, 9).long()), pytest.raises(Exception, match="leave position_ids out"):
        whole(input_ids=torch.randint(20, 90, (1, 9)), position_ids=positions, use_cache=False)


@pytest.mark.parametrize("kind", ["causal", "window", "chunk", "blocks", "cut blocks"])
@pytest.mark.parametrize("padded", [False, True])
def test_facts_found_in_a_trace_are_those_that_are_read(kind: str, padded: bool) -> None:
    """The matrix of a mask that is made within a graph."""
    masking = pytest.importorskip("transformers.masking_utils")
    config = tiny.config("gemma3_text")
    config._attn_implementation = "moda"
    if kind == "chunk":
        config.layer_types, config.attention_chunk_size = ["chunked_attention", "full_attention"], 4
    blocks = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, 1, 1, 2, 2, -1, -1]] * 2)
    mask = torch.ones(2, 13, dtype=torch.int64)
    mask[0, :3] = 0
    positions = torch.arange(13).expand(2, -1)

    def make() -> Tensor:
        arguments = (config, torch.zeros(2, 13, 1), mask if padded else None, None, None if padded else positions)
        if kind == "window":
            made = masking.create_sliding_window_causal_mask(*arguments)
        elif kind == "chunk":
            made = masking.create_chunked_causal_mask(*arguments)
        elif kind == "blocks":
            made = masking.create_causal_mask(*arguments, block_sequence_ids=blocks)
        elif kind == "cut blocks":
            overlays = masking.blockwise_overlay(blocks), masking.sliding_window_overlay(config.sliding_window)
            made = masking.create_causal_mask(*arguments, or_mask_function=overlays[0], and_mask_function=overlays[1])
        else:
            made = masking.create_causal_mask(*arguments)
        assert isinstance(made, AskedMask)
        layout, rules = made.made()
        return rules.visible(layout)

    got = torch.compile(make, fullgraph=True, backend="eager")()
    assert torch.equal(got, make())


@pytest.mark.parametrize(("enabled", "backend"), [(True, "reference"), (True, "cpu"), (False, "reference")])
def test_decoding_with_a_static_cache(enabled: bool, backend: str) -> None:
    """One graph for the first step and one for all others, beyond `undo` and up to the cache's last column."""
    model, steps = tiny.model("llama", num_hidden_layers=1), range(8, 51)
    if enabled:
        vlm.randomised(enable(model))
    else:
        model.set_attn_implementation("moda")
    ids = torch.randint(20, 90, (2, steps.stop))
    kinds = (torch.arange(steps.start) % 5 < 2).long().expand(2, -1)
    cache = transformers.StaticCache(config=model.config, max_cache_len=steps.stop)
    whole, counting = compiled(model)
    with torch.no_grad(), modality_ids(kinds, rest=0), mk.use_backend(backend):
        expected = model(ids, use_cache=False).logits
        model(ids[:, : steps.start], past_key_values=cache)
        for i in steps:
            step = whole(input_ids=ids[:, i : i + 1], past_key_values=cache).logits
            torch.testing.assert_close(step[:, 0], expected[:, i], **CLOSE)
    assert counting.graphs <= 2


@pytest.mark.slow
def test_generate_compiles_itself() -> None:
    """`cache_implementation="static"` with a compile config, as on a GPU: the steps after the prompt are compiled, in
    one graph each for the first and for all others."""
    model = vlm.randomised(enable(tiny.model("llava", num_hidden_layers=1)))
    x = tiny.inputs()
    options = {"min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False, "suppress_tokens": [vlm.IMAGE]}
    expected = model.generate(**x, **options)
    counting = Counting()
    compile_config = transformers.CompileConfig(fullgraph=True, backend=counting)
    compile_config._compile_all_devices = True
    made = model.generate(**x, **options, cache_implementation="static", compile_config=compile_config)
    assert torch.equal(made, expected)
    assert 1 <= counting.graphs <= 2


def test_export_of_a_text_layer() -> None:
    model = vlm.llama()
    model.set_attn_implementation("moda")
    layer, config = model.model.layers[0], model.config
    masking = pytest.importorskip("transformers.masking_utils")

    class Layer(torch.nn.Module):
        """With its mask."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.rotary = layer, model.model.rotary_emb

        def forward(self, x: Tensor, shown: Tensor) -> Tensor:
            positions = torch.arange(x.shape[1])[None]
            mask = masking.create_causal_mask(config, x, shown, None, positions)
            out = self.layer(x, attention_mask=mask, position_embeddings=self.rotary(x, positions))
            made: Tensor = out if isinstance(out, Tensor) else out[0]
            return made

    module, shown = Layer().eval(), torch.ones(2, 9, dtype=torch.int64)
    shown[0, :3] = 0
    length = torch.export.Dim("length", min=4, max=64)
    program = torch.export.export(
        module, (torch.randn(2, 9, 32), shown), dynamic_shapes={"x": {1: length}, "shown": {1: length}}, strict=True
    )
    for n in (9, 14):
        x, shown = torch.randn(2, n, 32), torch.ones(2, n, dtype=torch.int64)
        shown[0, :3] = 0
        torch.testing.assert_close(program.module()(x, shown), module(x, shown), **CLOSE)
