"""The masks of real models (docs/masks.md) against dense ones made by the models' own code, or where that isn't
installed from its published formula: who sees whom, attention and gradients."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import moda_kernels as mk
from moda_kernels import backends
from moda_kernels.call import AttentionCall
from moda_kernels.testing import generator

HIDDEN, PAST, SEGMENT, ALL, BEFORE, UPTO, CHUNK = (
    mk.Visibility.HIDDEN, mk.Visibility.PAST, mk.Visibility.SEGMENT, mk.Visibility.ALL, mk.Visibility.BEFORE,
    mk.Visibility.UPTO, mk.Visibility.CHUNK,
)  # fmt: skip
M = mk.ModularMask


class Known(NamedTuple):
    """A model's mask: in rules, and as its own code makes it, bool [B, L, L] (what padding sees doesn't count)."""

    layout: mk.ModalityLayout
    mask: M
    dense: Tensor


def drawn(g: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=g))


def text_and_images(g: torch.Generator, images: int = 2, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Ids [B, L] of text (0) and images (1) with text between, left-padded, and the attention mask."""
    rows = []
    for _ in range(batch):
        row: list[int] = []
        for _ in range(images):
            row += [0] * drawn(g, 1, 4) + [1] * drawn(g, 1, 6)
        rows.append(row + [0] * drawn(g, 1, 5))
    length = max(map(len, rows))
    ids = torch.tensor([[-1] * (length - len(row)) + row for row in rows])
    return ids, (ids >= 0).long()


def arguments(config: Any, attention_mask: Tensor) -> dict[str, Any]:
    """What transformers' functions of masks want."""
    config._attn_implementation = "eager"
    embeds = torch.zeros(*attention_mask.shape, 4)
    return {"config": config, "inputs_embeds": embeds, "attention_mask": attention_mask, "past_key_values": None,
            "position_ids": None}  # fmt: skip


def theirs(made: Tensor) -> Tensor:
    """An eager mask of transformers, [B, 1, L, L]: 0 where a key is seen."""
    return made[:, 0] == 0


def tiny_text(**more: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=9, **more)


def gemma(family: str) -> tuple[Any, Any]:
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    config = tiny_text()
    config.sliding_window, config.layer_types = 4, ["full_attention", "sliding_attention"]
    return module, config


# Models of transformers


def causal_vlm(g: torch.Generator) -> Known:
    utils = pytest.importorskip("transformers.masking_utils")
    ids, attention_mask = text_and_images(g)
    dense = theirs(utils.create_causal_mask(**arguments(tiny_text(), attention_mask)))
    return Known(mk.segment_modalities(ids, num_modalities=2), M.causal(2), dense)


def paligemma(g: torch.Generator) -> Known:
    module = pytest.importorskip("transformers.models.paligemma.modeling_paligemma")
    ids, attention_mask = text_and_images(g, images=1)
    token_type_ids = (torch.arange(ids.shape[1]) >= ids.shape[1] - drawn(g, 1, 4)).long().expand(ids.shape)
    made = module.PaliGemmaForConditionalGeneration.create_masks_for_generate(
        **arguments(tiny_text(), attention_mask), token_type_ids=token_type_ids
    )
    layout = mk.segment_modalities(ids, num_modalities=2, roles=token_type_ids, num_roles=2)
    return Known(layout, M([[ALL, HIDDEN], [PAST, PAST]]), theirs(made))


def of_vision_model(g: torch.Generator, family: str, kind: str) -> tuple[Tensor, Tensor]:
    module, config = gemma(family)
    ids, attention_mask = text_and_images(g)
    blocks = module.get_block_sequence_ids_for_mask(ids.clamp(min=0), torch.device("cpu"))
    # By place: the cache's name has changed (transformers 5.24).
    made = module.create_masks_for_vision_model(*arguments(config, attention_mask).values(), blocks)
    return ids, theirs(made[kind])


def gemma3_full(g: torch.Generator) -> Known:
    ids, dense = of_vision_model(g, "gemma3", "full_attention")
    return Known(mk.segment_modalities(ids, num_modalities=2), M.bidirectional_within(2, [1]), dense)


def gemma3_sliding(g: torch.Generator, family: str = "gemma3") -> Known:
    ids, dense = of_vision_model(g, family, "sliding_attention")
    mask = M(M.bidirectional_within(2, [1]).rules, window=4, window_on="all")
    return Known(mk.segment_modalities(ids, num_modalities=2), mask, dense)


def gemma4_full(g: torch.Generator) -> Known:
    ids, dense = of_vision_model(g, "gemma4", "full_attention")
    return Known(mk.segment_modalities(ids, num_modalities=2), M.causal(2), dense)


def gemma4_sliding(g: torch.Generator) -> Known:
    return gemma3_sliding(g, "gemma4")


def molmo2(g: torch.Generator) -> Known:
    module = pytest.importorskip("transformers.models.molmo2.modeling_molmo2")
    ids, attention_mask = text_and_images(g, images=3)
    made = module.Molmo2ForConditionalGeneration.create_masks_for_generate(
        **arguments(tiny_text(), attention_mask), mm_token_type_ids=ids.clamp(min=0)
    )
    return Known(mk.segment_modalities(ids, num_modalities=2), M([[PAST, PAST], [PAST, PAST | ALL]]), theirs(made))


def git(g: torch.Generator) -> Known:
    """The image comes first; block_sequence_ids as in GitModel.forward."""
    utils = pytest.importorskip("transformers.masking_utils")
    ids = torch.tensor([[1] * 5 + [0] * drawn(g, 1, 6)] * 2)
    blocks = torch.where(ids == 1, 0, -1)
    made = utils.create_causal_mask(**arguments(tiny_text(), torch.ones_like(ids)), block_sequence_ids=blocks)
    return Known(mk.segment_modalities(ids, num_modalities=2), M([[PAST, PAST], [HIDDEN, SEGMENT]]), theirs(made))


def pi0_transformers(g: torch.Generator) -> Known:
    """Block ids as in PI0Model.forward: what the language model holds and the state, then the actions."""
    utils = pytest.importorskip("transformers.masking_utils")
    before, actions = drawn(g, 2, 8), drawn(g, 2, 6)
    ids = torch.tensor([[0] * before + [2] * (actions + 1)] * 2)
    blocks = torch.cat((torch.zeros(before + 1), torch.ones(actions))).long().expand(ids.shape)
    made = utils.create_causal_mask(**arguments(tiny_text(), torch.ones_like(ids)), block_sequence_ids=blocks)
    layout = mk.segment_modalities(ids, num_modalities=3, roles=torch.zeros_like(ids), steps=blocks)
    return Known(layout, M([[UPTO]]), theirs(made))


def llama4(g: torch.Generator) -> Known:
    utils = pytest.importorskip("transformers.masking_utils")
    ids, attention_mask = text_and_images(g)
    size = drawn(g, 2, 5)
    config = tiny_text(attention_chunk_size=size)
    config.layer_types = ["chunked_attention"] * 2
    dense = theirs(utils.create_chunked_causal_mask(**arguments(config, attention_mask)))
    position = (attention_mask.cumsum(1) - 1).clamp(min=0)
    layout = mk.segment_modalities(ids, num_modalities=2, chunks=position // size)
    return Known(layout, M([[CHUNK] * 2] * 2), dense)


def diffusion_gemma(g: torch.Generator) -> Known:
    """A prompt as the encoder sees it, then a canvas that sees the prompt and itself."""
    module = pytest.importorskip("transformers.models.diffusion_gemma.modeling_diffusion_gemma")
    transformers = pytest.importorskip("transformers")
    ids, attention_mask = text_and_images(g, images=1)
    (batch, prompt), canvas = ids.shape, drawn(g, 1, 5)
    config = tiny_text()
    config.layer_types = ["full_attention"] * 2
    config.use_bidirectional_attention, config.canvas_length = "vision", canvas
    of_prompt = module.DiffusionGemmaEncoderModel.create_masks_for_generate(
        **arguments(config, attention_mask), mm_token_type_ids=ids.clamp(min=0)
    )
    cache = transformers.DynamicCache()
    for layer in range(2):
        cache.update(torch.zeros(batch, 2, prompt, 4), torch.zeros(batch, 2, prompt, 4), layer)
    whole = torch.cat((attention_mask, torch.ones(batch, canvas, dtype=torch.long)), 1)
    of_canvas = module.DiffusionGemmaDecoderModel.create_diffusion_decoder_attention_mask(
        config, torch.zeros(batch, canvas, 4), cache, whole
    )
    dense = torch.zeros(batch, prompt + canvas, prompt + canvas, dtype=torch.bool)
    dense[:, :prompt, :prompt] = theirs(of_prompt["full_attention"] if isinstance(of_prompt, dict) else of_prompt)
    dense[:, prompt:] = theirs(of_canvas["full_attention"])
    every = torch.cat((ids, torch.full((batch, canvas), 2)), 1)
    rules = [[PAST, PAST, HIDDEN], [PAST, PAST | SEGMENT, HIDDEN], [ALL, ALL, ALL]]
    return Known(mk.segment_modalities(every, num_modalities=3), M(rules), dense)


def packing(g: torch.Generator) -> Known:
    """Documents in one row, told apart by position ids that begin anew."""
    utils = pytest.importorskip("transformers.masking_utils")
    lengths = [drawn(g, 1, 7) for _ in range(3)]
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    ids = torch.randint(2, position_ids.shape, generator=g)
    given = arguments(tiny_text(), torch.ones_like(ids)) | {"position_ids": position_ids, "attention_mask": None}
    dense = theirs(utils.create_causal_mask(**given))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return Known(mk.segment_modalities(ids[0], num_modalities=2, cu_seqlens=cu_seqlens), M.causal(2), dense)


# Models by their published formulas


def show_o2(g: torch.Generator) -> Known:
    """Omni-attention: causal, and everything within an image, those being generated too."""
    ids, _ = text_and_images(g)
    image = torch.where(ids == 1, (ids.diff(dim=1, prepend=ids[:, :1] * 0) != 0).cumsum(1), -1)
    row, column = torch.arange(ids.shape[1])[:, None], torch.arange(ids.shape[1])
    dense = (row >= column) | ((image[:, :, None] == image[:, None, :]) & (image >= 0)[:, :, None])
    return Known(mk.segment_modalities(ids, num_modalities=2), M.bidirectional_within(2, [1]), dense)


def bagel(g: torch.Generator) -> Known:
    """BAGEL, data/data_utils.py, create_sparse_mask, over splits of modes causal, full and noise."""
    modes = ["causal", "noise", "full", "causal", "full", "noise", "noise", "causal"]
    splits = [(mode, drawn(g, 1, 5)) for mode in modes]
    full_and_noise, noise, role, item, modality = [], [], [], [], []
    for number, (mode, length) in enumerate(splits):
        full_and_noise += [-1 if mode == "causal" else number] * length
        noise += [number if mode == "noise" else -1] * length
        role += [("causal", "full", "noise").index(mode)] * length
        modality += [0 if mode == "causal" else 1] * length
        item += [number] * length
    either, noised = torch.tensor(full_and_noise), torch.tensor(noise)
    q, kv = torch.arange(len(role))[:, None], torch.arange(len(role))
    allowed = (q >= kv) | ((either[q] == either[kv]) & (either[q] >= 0))
    dense = allowed & ~((noised[kv] >= 0) & (noised[q] != noised[kv]))
    layout = mk.segment_modalities(
        torch.tensor([modality]), roles=torch.tensor([role]), num_roles=3, item_ids=torch.tensor([item])
    )
    mask = M([[PAST, PAST, HIDDEN], [PAST, PAST | SEGMENT, HIDDEN], [PAST, PAST, SEGMENT]])
    return Known(layout, mask, dense[None])


def pi0_openpi(g: torch.Generator) -> Known:
    """π0's make_att_2d_masks: cumulative block ids, and padding."""
    length = drawn(g, 6, 20)
    mask_ar = torch.randint(2, (2, length), generator=g)
    padding = torch.rand(2, length, generator=g) < 0.85
    blocks = mask_ar.cumsum(1)
    dense = (blocks[:, None, :] <= blocks[:, :, None]) & (padding[:, None, :] & padding[:, :, None])
    ids = torch.where(padding, torch.randint(3, (2, length), generator=g), -1)
    layout = mk.segment_modalities(ids, num_modalities=3, roles=torch.zeros_like(ids), steps=blocks)
    return Known(layout, M([[UPTO]]), dense)


def var(g: torch.Generator) -> Known:
    """VAR: scale by scale, a token sees its own scale whole and all before."""
    scale = torch.cat([torch.full((n * n,), i) for i, n in enumerate((1, 2, 3, 4)[: drawn(g, 2, 4)])])[None]
    dense = scale[:, :, None] >= scale[:, None, :]
    return Known(mk.segment_modalities(torch.zeros_like(scale), steps=scale), M([[UPTO]]), dense)


def frame_causal_video(g: torch.Generator) -> Known:
    """Frames (or chunks of frames) in order behind a text that sees itself causally."""
    text, tokens, frames = drawn(g, 1, 5), drawn(g, 1, 4), drawn(g, 2, 5)
    frame = torch.cat((torch.full((text,), -1), torch.arange(frames).repeat_interleave(tokens)))
    row, column = torch.arange(frame.numel())[:, None], torch.arange(frame.numel())
    dense = torch.where(frame[:, None] < 0, row >= column, frame[:, None] >= frame)[None]
    ids = (frame >= 0).long()[None]
    layout = mk.segment_modalities(ids, num_modalities=2, steps=frame.clamp(min=0)[None])
    return Known(layout, M([[PAST, HIDDEN], [ALL, UPTO]]), dense)


def block_diffusion(g: torch.Generator) -> Known:
    """BD3-LM, models/dit.py, block_diff_mask: a noised copy, then the clean text."""
    block_size, n = drawn(g, 1, 4), drawn(g, 3, 9)
    q, kv = torch.arange(2 * n)[:, None], torch.arange(2 * n)[None, :]
    clean_q, clean_kv = q >= n, kv >= n
    block_q = torch.where(clean_q, (q - n) // block_size, q // block_size)
    block_kv = torch.where(clean_kv, (kv - n) // block_size, kv // block_size)
    diagonal = (block_q == block_kv) & (clean_q == clean_kv)
    offset = (block_q > block_kv) & clean_kv & ~clean_q
    causal = (block_q >= block_kv) & clean_kv & clean_q
    blocks = (torch.arange(n) // block_size).repeat(2)[None]
    roles = torch.tensor([[0] * n + [1] * n])
    layout = mk.segment_modalities(torch.zeros_like(roles), roles=roles, steps=blocks, item_ids=blocks)
    return Known(layout, M([[SEGMENT, BEFORE], [HIDDEN, UPTO]]), (diagonal | offset | causal)[None])


def shared_prompt(g: torch.Generator) -> Known:
    """Several answers to one prompt: causal, and an answer sees no other."""
    prompt, answers = drawn(g, 1, 6), [drawn(g, 1, 5) for _ in range(3)]
    answer = torch.cat([torch.full((prompt,), -1), *(torch.full((n,), i) for i, n in enumerate(answers))])
    row, column = torch.arange(answer.numel())[:, None], torch.arange(answer.numel())
    dense = ((row >= column) & ((answer < 0) | (answer[:, None] == answer)))[None]
    ids = torch.randint(2, answer.shape, generator=g)[None]
    layout = mk.segment_modalities(
        ids, num_modalities=2, roles=(answer >= 0).long()[None], num_roles=2, chunks=answer[None]
    )
    return Known(layout, M([[PAST, HIDDEN], [PAST, CHUNK]]), dense)


def zorro(g: torch.Generator) -> Known:
    """Each modality sees itself, the fusion tokens see all."""
    ids = torch.randint(3, (2, drawn(g, 3, 14)), generator=g).sort(1).values
    dense = (ids[:, :, None] == ids[:, None, :]) | (ids == 2)[:, :, None]
    return Known(mk.segment_modalities(ids, num_modalities=3), M.fusion(3, [2]), dense)


MODELS: tuple[Callable[[torch.Generator], Known], ...] = (
    causal_vlm, paligemma, gemma3_full, gemma3_sliding, gemma4_full, gemma4_sliding, molmo2, git, pi0_transformers,
    llama4, diffusion_gemma, packing, show_o2, bagel, pi0_openpi, var, frame_causal_video, block_diffusion,
    shared_prompt, zorro,
)  # fmt: skip


def real_pairs(layout: mk.ModalityLayout) -> Tensor:
    real = (layout.modality >= 0).view(-1, layout.modality.shape[-1])
    return real[:, :, None] & real[:, None, :]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_who_sees_whom(model: Callable[[torch.Generator], Known], seed: int) -> None:
    layout, mask, dense = model(generator(seed))
    seen = mask.visible(layout)
    seen = seen[None] if layout.packed else seen
    assert torch.equal(seen, dense & real_pairs(layout))
    assert bool(seen.any())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_attention_and_gradients(model: Callable[[torch.Generator], Known], backend: str) -> None:
    g = generator(7)
    layout, mask, dense = model(g)
    batch, length = dense.shape[:2]
    q, k, v = (torch.randn(batch, 2, length, 8, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3))
    ours = [x[0].transpose(0, 1) if layout.packed else x for x in (q, k, v)]
    reasons = backends.BACKENDS[backend].why_not(AttentionCall.make(*ours, layout=layout, mask=mask))
    if reasons:
        pytest.skip("; ".join(reasons))
    out = mk.moda_attention(*ours, layout=layout, mask=mask, backend=backend)
    assert isinstance(out, Tensor)
    out = out.transpose(0, 1)[None] if layout.packed else out

    allowed = (dense & real_pairs(layout))[:, None]
    scores = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~allowed, -math.inf)
    some = allowed.any(-1, keepdim=True)
    weights = torch.where(some, torch.where(some, scores, 0).softmax(-1), 0)
    expected = weights @ v
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    upstream = torch.randn(out.shape, generator=g, dtype=torch.float64)
    mine = torch.autograd.grad(out, (q, k, v), upstream)
    torch.testing.assert_close(mine, torch.autograd.grad(expected, (q, k, v), upstream), rtol=0, atol=1e-11)
