"""Serving: a LLaVA with aligners answers requests by `generate` with a static cache, which is used again and again.

    python examples/serve_vlm.py
    python examples/serve_vlm.py --model FOLDER      # what finetune_vlm.py --save FOLDER wrote

A batch holds prompts of different lengths (padding on their left), with one photograph, with two, and with none. With
the default aligners (scope "causal") what is decoded step by step is what one pass over the whole text gives, and the
kind of cache makes no difference: both are checked. Where transformers compiles the steps of a static cache (on a GPU
it does so by itself), all of them run in one graph. The model and the photographs are those of `finetune_vlm.py`.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from finetune_vlm import IMAGE, IMAGE_TOKENS, QUESTION, START, WORDS, Crops, make_model, quickly
from torch import Tensor

from moda_kernels.integrations import transformers as moda

PAD, NEW, ROOM = WORDS - 1, 4, 48
PICTURE = [IMAGE] * IMAGE_TOKENS


def load(folder: Path | None) -> Any:
    """A saved model with its aligners; or one that is trained here, for a moment."""
    if folder is None:
        return quickly(make_model(), steps=20).eval()
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    return moda.enable(model, **aligners_of(model)).eval()


def aligners_of(model: Any) -> dict[str, Any]:
    """The options that a model's aligners were saved with."""
    return {name: model.config.moda[name] for name in ("fusion", "scope")}


def batch_of(crops: Tensor) -> dict[str, Tensor]:
    """Requests about four crops ``[4, 3, S, S]``, and one about nothing."""
    prompts = [
        [START, *PICTURE, QUESTION],
        [START, *PICTURE, QUESTION, QUESTION],
        [START, *PICTURE, START, *PICTURE, QUESTION],
        [START, QUESTION],
    ]
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": crops}


@torch.no_grad()
def one_pass(model: Any, batch: dict[str, Tensor], sequences: Tensor) -> Tensor:
    """The tokens that a pass over all tokens would have generated."""
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, NEW), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = batch | {"input_ids": sequences, "attention_mask": mask, "position_ids": positions}
    scores = model(**given, use_cache=False).logits[:, -NEW - 1 : -1].clone()
    scores[..., [IMAGE, PAD]] = -torch.inf
    best: Tensor = scores.argmax(-1)
    return best


def serve(model: Any, batches: int = 3) -> list[Tensor]:
    """The tokens generated for each batch of requests."""
    device = next(model.parameters()).device
    cache = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=ROOM)
    options: dict[str, Any] = {
        "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "suppress_tokens": [IMAGE, PAD],
        "pad_token_id": PAD,
    }  # fmt: skip
    answers = []
    for number in range(batches):
        batch = {name: x.to(device) for name, x in batch_of(Crops(1, seed=number)[0]["pixel_values"]).items()}
        begin = time.perf_counter()
        sequences = model.generate(**batch, past_key_values=cache, **options)
        seconds = time.perf_counter() - begin
        cache.reset()  # the next requests start from nothing
        if not torch.equal(sequences, model.generate(**batch, **options)):
            raise SystemExit("a static and a growing cache have given different tokens")
        answers.append(sequences[:, -NEW:])
        if not torch.equal(answers[-1], one_pass(model, batch, sequences)):
            raise SystemExit("tokens differ from those of one pass over the whole text")
        print(f"batch {number}: {answers[-1].tolist()}, {answers[-1].numel() / seconds:.0f} tokens/s")
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a saved model (default: train one for a moment)")
    parser.add_argument("--batches", type=int, default=3, help="default: %(default)s")
    options = parser.parse_args()
    serve(load(options.model), options.batches)


if __name__ == "__main__":
    main()
