"""Masks that are read from the call are the matrix that transformers makes of it; and `attn_implementation`."""

import random
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
from torch.utils._python_dispatch import TorchDispatchMode
from vlm import transformers

from moda_kernels.integrations.transformers import disable, enable, modality_ids
from moda_kernels.integrations.transformers.asked import AskedMask, asked

masking = pytest.importorskip("transformers.masking_utils")
IMPLEMENTATION = "moda"


def matrix(mask: AskedMask) -> Tensor:
    """bool ``[B, rows, columns]`` of a mask in rules."""
    batch, _, rows, columns = mask.shape
    layout, rules = mask.made()
    if not layout.packed:
        return rules.visible(layout, rows, mask.query_start())
    visible = rules.visible(layout)
    places = torch.arange(batch * columns).view(batch, columns)
    return torch.stack([visible[place][:, place] for place in places])


def runs(rng: random.Random, length: int, last: int = 10**9) -> list[int]:
    """Numbers of blocks in runs, -1 between them."""
    made: list[int] = []
    number = 0
    while len(made) < length:
        made += [-1] * rng.randint(0, 3) + [min(number, last)] * rng.randint(1, 5)
        number += 1
    return made[:length]


@pytest.mark.parametrize("seed", range(60))
def test_rules_are_the_matrix(seed: int) -> None:
    """Random compositions of transformers' own overlays, with padding anywhere, behind a cache's offsets."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    batch, past, new = rng.randint(1, 3), rng.choice([0, 0, 3, 9]), rng.randint(1, 17)
    first = rng.randint(0, past)
    total = past + new
    room = rng.choice([0, 0, 4])  # of a static cache
    padding = None
    if rng.random() < 0.6:
        padding = torch.rand(batch, total) < rng.choice([0.5, 0.9])
        if rng.random() < 0.5:
            padding = padding.sort(dim=1).values  # on the left alone
    kind = rng.choice(["causal", "window", "chunk"])
    function = masking.causal_mask_function
    window = rng.randint(1, 6)
    if kind == "window":
        function = masking.sliding_window_causal_mask_function(window)
    elif kind == "chunk":
        left = torch.zeros(batch, dtype=torch.int64)
        if padding is not None:
            left = (padding.cumsum(-1) == 0).sum(-1)
        function = masking.chunked_causal_mask_function(window, left)
    if kind != "chunk" and rng.random() < 0.6:
        last = rng.choice([0, 10**9])
        blocks = torch.tensor([runs(rng, total + room, last) for _ in range(batch)])
        if padding is not None and last:  # a hole would part a block, which only one block for all can be
            whole = torch.nn.functional.pad(padding, (0, room))
            blocks = torch.where(whole, blocks, -1)
            for row in blocks:
                again = {int(b) for b in row.unique() if b >= 0 and int((row == b).nonzero().diff(dim=0).gt(1).sum())}
                row[torch.tensor([int(b) in again for b in row])] = -1
        overlay = masking.blockwise_overlay(blocks)
        if kind == "window" and rng.random() < 0.5:  # as Gemma 3 composes them
            function = masking.or_masks(masking.causal_mask_function, overlay)
            function = masking.and_masks(function, masking.sliding_window_overlay(window))
        else:
            function = masking.or_masks(function, overlay)
    offset = past if rng.random() < 0.7 else torch.tensor(past)
    arguments: dict[str, Any] = {
        "batch_size": batch, "q_length": new, "kv_length": total + room - first, "q_offset": offset,
        "kv_offset": first, "mask_function": function, "attention_mask": padding,
    }  # fmt: skip
    expected = masking.sdpa_mask(**arguments, allow_is_causal_skip=False)[:, 0]
    mask = asked(**arguments)
    assert isinstance(mask, AskedMask)
    rows = torch.ones(batch, new, dtype=torch.bool) if padding is None else padding[:, past:]
    assert torch.equal(matrix(mask)[rows], expected[rows])


@pytest.mark.parametrize("blocks", ["none", "runs", "one"])
@pytest.mark.parametrize("kind", ["causal", "window", "chunk"])
def test_packed_rows_are_documents_one_by_one(kind: str, blocks: str) -> None:
    rng = random.Random(3)
    lengths, window = [[5, 1, 7], [6, 6, 1]], 3
    positions = torch.tensor([[p for n in row for p in range(n)] for row in lengths])
    said = torch.tensor([runs(rng, 13, 0 if blocks == "one" else 99) for _ in lengths])
    config, embeds = tiny.config("llama"), torch.zeros(2, 13, 1)
    config.sliding_window = config.attention_chunk_size = window
    config._attn_implementation = IMPLEMENTATION
    make = {
        "causal": masking.create_causal_mask, "window": masking.create_sliding_window_causal_mask,
        "chunk": masking.create_chunked_causal_mask,
    }[kind]  # fmt: skip
    more = {} if blocks == "none" or kind == "chunk" else {"block_sequence_ids": said}
    mask = make(config, embeds, None, None, positions, **more)
    assert isinstance(mask, AskedMask)
    got = matrix(mask)
    config._attn_implementation = "eager"
    expected = torch.zeros_like(got)
    for row, parts in enumerate(lengths):
        begin = 0
        for n in parts:
            part = slice(begin, begin + n)
            own = {name: t[row : row + 1, part] for name, t in more.items()}
            alone = make(config, embeds[:1, part], None, None, **own)
            expected[row, part, part] = True if alone is None else alone[0, 0] == 0
            begin += n
    assert torch.equal(got, expected)


def not_known(call: Callable[[], Any], *parts: str) -> None:
    with pytest.raises(NotImplementedError) as error:
        call()
    for part in parts:
        assert part in str(error.value), str(error.value)


def test_functions_that_nobody_knows() -> None:
    def diagonal(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q == k

    arguments = {"batch_size": 1, "q_length": 4, "kv_length": 4, "config": tiny.config("llama")}
    causal = masking.causal_mask_function
    named = ["diagonal", "'llama'", "full layers", "attn_implementation"]
    not_known(lambda: asked(**arguments, mask_function=masking.or_masks(causal, diagonal)), *named)
    between = masking.or_masks(causal, masking.blockwise_overlay(torch.tensor([[0, 1, 0, 1]])))
    mask = asked(**arguments, mask_function=between)
    not_known(mask.made, "several blocks", "block_sequence_ids")
    windows = masking.and_masks(masking.blockwise_overlay(torch.zeros(1, 4)), masking.sliding_window_overlay(2))
    not_known(lambda: asked(**arguments, mask_function=masking.or_masks(causal, windows)), "window")
    model = tiny.model("gemma3_text", use_bidirectional_attention=True)
    model.set_attn_implementation(IMPLEMENTATION)
    not_known(lambda: model(**tiny.inputs()), "gemma3_text", "modeling_gemma3")


class Largest(TorchDispatchMode):
    """The largest tensor that an operator makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            self.elements = max(self.elements, t.numel() if isinstance(t, Tensor) else 0)
        return out


@pytest.mark.parametrize("kind", ["llama", "gemma3", "paligemma", "llama4"])
def test_nothing_of_queries_times_keys_is_made(kind: str) -> None:
    model, length = tiny.model(kind), 400
    if kind == "llama4":  # the whole model of transformers 5.24 fails where no images are given
        model = model.language_model
    ids = torch.randint(20, 90, (1, length))
    ids[:, 10:60] = vlm.IMAGE
    x = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    x["attention_mask"][:, :3] = 0
    whole = kind in ("gemma3", "paligemma")
    if whole:
        x["token_type_ids"] = (ids == vlm.IMAGE).long()
    model.set_attn_implementation({"text_config": IMPLEMENTATION} if whole else IMPLEMENTATION)
    cache = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=length + 4)
    with torch.no_grad(), Largest() as largest:
        model(**x, use_cache=False)
        model(**x, past_key_values=cache)
    assert largest.elements < length * length


# attn_implementation="moda"


def test_models_are_made_and_loaded_with_it(tmp_path: Path) -> None:
    model, x = vlm.make("llava"), vlm.inputs("llava")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**x).logits
        real = x["attention_mask"] > 0
        loaded = type(model).from_pretrained(tmp_path, attn_implementation=IMPLEMENTATION)
        made = transformers.AutoModelForImageTextToText.from_config(model.config, attn_implementation=IMPLEMENTATION)
        made.load_state_dict(model.state_dict())
        for other in (loaded, made.eval()):
            assert other.get_decoder().config._attn_implementation == IMPLEMENTATION
            torch.testing.assert_close(other(**x).logits[real], expected[real], rtol=0, atol=1e-5)
            for name in ("eager", "sdpa", IMPLEMENTATION):  # without aligners nothing is lost
                other.set_attn_implementation(name)
                torch.testing.assert_close(other(**x).logits[real], expected[real], rtol=0, atol=1e-5)
            enable(other)
            torch.testing.assert_close(other(**x).logits[real], expected[real], rtol=0, atol=1e-5)
            disable(other)


def test_a_model_without_aligners_may_be_switched() -> None:
    model, x = enable(vlm.make("llava"), layers=[]), vlm.inputs("llava")
    outs = []
    for name in (IMPLEMENTATION, "eager", "sdpa"):
        model.set_attn_implementation({"text_config": name})
        with torch.no_grad():
            outs.append(model(**x).logits[x["attention_mask"] > 0])
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=0, atol=1e-5)


def test_the_vision_tower_is_exactly_sdpa() -> None:
    model, x = vlm.make("llava"), vlm.inputs("llava")
    features = []
    for name in ("sdpa", IMPLEMENTATION):
        model.set_attn_implementation(name)
        assert model.model.vision_tower.config._attn_implementation == name
        with torch.no_grad():
            features.append(model.model.vision_tower(x["pixel_values"]).last_hidden_state)
    assert torch.equal(*features)


@pytest.mark.slow
def test_before_the_integration_is_imported_nobody_knows_the_name(tmp_path: Path) -> None:
    vlm.make("llava").save_pretrained(tmp_path)
    script = (
        "import transformers; transformers.LlavaForConditionalGeneration.from_pretrained("
        f"{str(tmp_path)!r}, attn_implementation='moda')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0 and "moda" in done.stderr
    done = subprocess.run(
        [sys.executable, "-c", "import moda_kernels.integrations.transformers; " + script], capture_output=True
    )
    assert done.returncode == 0


# Packed rows


@pytest.mark.parametrize("how", ["positions", "bounds", "both"])
@pytest.mark.parametrize("enabled", [False, True])
def test_what_the_collator_of_transformers_gives(how: str, enabled: bool) -> None:
    model = vlm.llama()
    if enabled:
        vlm.randomised(enable(model))
    else:
        model.set_attn_implementation(IMPLEMENTATION)
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=how != "positions")
    documents = [torch.randint(20, 99, (n,)).tolist() for n in (4, 1, 7)]
    x = dict(collator([{"input_ids": ids} for ids in documents]))
    if how == "bounds":
        del x["position_ids"]
        if not enabled:  # nobody is there to make them
            x["position_ids"] = torch.arange(12)[None]
    labels = x.pop("labels")
    kinds = (torch.arange(12) % 5 < 2).long()[None]
    with modality_ids(kinds):
        got = model(**x, use_cache=False).logits
        loss = model(**x, labels=labels, use_cache=False).loss
    alone = []
    for ids, kind in zip(documents, kinds[0].split([4, 1, 7]), strict=True):
        with modality_ids(kind[None]):
            alone.append(model(torch.tensor([ids]), use_cache=False).logits)
    torch.testing.assert_close(got, torch.cat(alone, 1), rtol=0, atol=1e-5)
    assert bool(loss.isfinite())


def test_bounds_that_do_not_fit(refused: Callable[..., None]) -> None:
    model, ids = vlm.llama(), torch.randint(20, 99, (1, 6))
    model.set_attn_implementation(IMPLEMENTATION)
    bounds = {"cu_seq_lens_q": torch.tensor([0, 2, 5], dtype=torch.int32)}
    refused(lambda: model(ids, use_cache=False, **bounds), ValueError, ["cu_seq_lens_q", "6"])
    bounds = {"cu_seq_lens_q": torch.tensor([0, 2, 6], dtype=torch.int32)}
    refused(lambda: model(ids.expand(2, -1), use_cache=False, **bounds), ValueError, ["cu_seq_lens_q", "one row"])
    enable(model)
    with modality_ids(torch.zeros(1, 6).long()):
        refused(
            lambda: model(ids, position_ids=torch.tensor([[0, 1, 0, 1, 2, 3]]), use_cache=True), ValueError,
            ["use_cache"],
        )  # fmt: skip


@pytest.mark.parametrize("options", [{"scope": "sequence"}, {"mask": "own"}, {"pseudo": "own"}], ids=str)
def test_packed_rows_with_options(options: dict[str, Any]) -> None:
    """Sums over sequences, rules of the caller's and pseudo scores are per document, too."""
    import moda_kernels as mk

    V = mk.Visibility
    values = {
        "mask": mk.ModularMask([[V.PAST, V.ALL], [V.PAST, V.PAST | V.SEGMENT]]), "pseudo": mk.PseudoAttention(0.3, 0.1),
    }  # fmt: skip
    options = {name: values.get(name, value) if value == "own" else value for name, value in options.items()}
    for kind in ("llama", "gemma3_text"):
        model = vlm.randomised(enable(tiny.model(kind), **options)).double()
        lengths = [8, 3, 9]
        ids, kinds = torch.randint(20, 90, (1, 20)), (torch.arange(20) % 6 < 3).long()[None]
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        with modality_ids(kinds):
            got = model(ids, position_ids=positions, use_cache=False).logits
        alone = []
        for part, kind_of in zip(ids.split(lengths, 1), kinds.split(lengths, 1), strict=True):
            with modality_ids(kind_of):
                alone.append(model(part, use_cache=False).logits)
        torch.testing.assert_close(got, torch.cat(alone, 1), rtol=0, atol=1e-8)
