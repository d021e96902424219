"""What is asked of every family of transformers that `enable` takes: its own eager attention, in every use.

`check(kind, use)` runs one use of a tiny random model of a type. `python tests/families.py` runs all of them and writes
the table of `docs/models.md`. Pictures stand in the ids alone, which is all that masks know. (Models with real pixels:
`vlm.py`.)
"""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import vlm
from torch import Tensor

from moda_kernels.integrations.transformers import disable, enable, modality_ids
from moda_kernels.integrations.transformers.families import DECODERS, FAMILIES

Inputs = dict[str, Tensor]
#: Rows of the inputs: padding on the left and an image longer than the windows; text alone; images apart and side by
#: side.
PADDING, LONG, SHORT = 4, 9, 4
NEW = 4
TABLE = Path(__file__).parents[1] / "docs" / "models.md"


def inputs(model: Any) -> Inputs:
    torch.manual_seed(1)
    ids = torch.randint(20, 90, (3, tiny.LENGTH))
    image = placeholder(model)
    ids[0, :PADDING] = 0
    ids[0, PADDING + 2 : PADDING + 2 + LONG] = image
    for begin in (3, 3 + SHORT, 16):
        ids[2, begin : begin + SHORT - 1] = image
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    made = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    return made | marks(model, ids)


def placeholder(model: Any) -> int:
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        return vlm.IMAGE
    from moda_kernels.integrations.transformers.families import token_of

    return token_of(model.config, next(iter(family.placeholders)))


def marks(model: Any, ids: Tensor) -> Inputs:
    """What the model is told of its tokens, as its processor would: images, or (PaliGemma) where the answer begins."""
    takes = inspect.signature(model.forward).parameters
    image = (ids == placeholder(model)).long()
    if model.config.model_type == "paligemma":
        answer = torch.zeros_like(ids)
        answer[:, ids.shape[1] * 3 // 4 :] = 1
        return {"token_type_ids": answer}
    names = ("token_type_ids", "mm_token_type_ids")
    return {name: image for name in names if name in takes}


def text_of(x: Inputs) -> Inputs:
    """The row without images, alone."""
    return {name: t[1:2] for name, t in x.items()}


def logits(model: Any, x: Inputs, **more: Any) -> Tensor:
    out: Tensor = model(**x, use_cache=False, **more).logits
    return out


def close(got: Tensor, expected: Tensor, what: str) -> None:
    """To 1e-5 of the largest number, or of 1."""
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * scale, msg=lambda m: f"{what}: {m}")


def close_as_a_whole(got: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Each gradient to 1e-5 in the 2-norm (what is nothing but rounding: to 1e-7 of all of them, as eager attention
    takes its softmax in float32)."""
    total = sum(float(t.norm()) for t in expected.values())
    for name, t in expected.items():
        error, size = float((got[name] - t).norm()), float(t.norm())
        assert error <= 1e-5 * size + 1e-7 * total, f"{what}, {name}: off by {error} of {size}"


class Told:
    """Decoders without a model around them are told what their tokens are."""

    def __init__(self, model: Any) -> None:
        self.needed = model.config.model_type not in FAMILIES

    def __call__(self, x: Inputs) -> Any:
        import contextlib

        ids = (x["input_ids"] == vlm.IMAGE).long()
        return modality_ids(ids, rest=0) if self.needed else contextlib.nullcontext()


def against_eager(
    model: Any, x: Inputs, run: Callable[[], Any], compare: Callable[[Any, Any, str], None], own: str = "eager"
) -> None:
    """The model's own (eager) attention; ours alone; and, enabled, with fresh aligners."""
    model.set_attn_implementation(own)
    expected = run()
    model.set_attn_implementation("moda")
    compare(run(), expected, "moda alone")
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    enable(model)
    with Told(model)(x):
        compare(run(), expected, "enabled")
    disable(model)


def precise(model: Any) -> Any:
    """In float64, so that no rounding is taken for a fault, but where a model's experts know none."""
    if model.config.model_type in SINGLE:
        return model
    for part in model.modules():
        if hasattr(part, "config") and hasattr(part.config, "_experts_implementation"):
            part.config._experts_implementation = "eager"
    return model.double()


# Uses


def forward(model: Any, x: Inputs) -> None:
    real = x["attention_mask"] > 0
    with torch.no_grad():
        against_eager(model, x, lambda: logits(model, x)[real], close)
        plain = {name: t for name, t in x.items() if name not in ("attention_mask", "position_ids")}
        against_eager(model, plain, lambda: logits(model, plain), close)


def gradients(model: Any, x: Inputs) -> None:
    real = x["attention_mask"] > 0

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        out = logits(model, x)[real]
        torch.manual_seed(5)
        (out * torch.randn_like(out)).sum().backward()
        return {
            n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and "moda_aligner" not in n
        }

    def compare(got: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
        assert got.keys() == expected.keys() and expected
        close_as_a_whole(got, expected, what)

    if precise(model).dtype == torch.float32:
        against_eager(model, x, run, compare)
        return
    if model._supports_sdpa:  # eager attention in float64 makes NaN of rows that see nothing
        against_eager(model, x, run, compare, "sdpa")
    real = torch.ones_like(real)
    x = {name: t for name, t in x.items() if name not in ("attention_mask", "position_ids")}
    against_eager(model, x, run, compare)


def generated(**options: Any) -> Callable[[Any, Inputs], None]:
    def run(model: Any, x: Inputs) -> None:
        x = {name: t for name, t in x.items() if name != "position_ids"}
        if model.config.model_type == "paligemma":
            x["token_type_ids"] = torch.zeros_like(x["token_type_ids"])  # the processor's prompts have no answer
        banned = {"suppress_tokens": [placeholder(model)]} if model.config.model_type in FAMILIES else {}

        def tokens() -> Tensor:
            made: Tensor = model.generate(**x, max_new_tokens=NEW, do_sample=False, **banned, **options)
            return made

        def compare(got: Tensor, expected: Tensor, what: str) -> None:
            assert torch.equal(got, expected), f"{what}: {got.tolist()} for {expected.tolist()}"

        against_eager(model, x, tokens, compare)

    return run


@torch.no_grad()
def decoding(model: Any, x: Inputs) -> None:
    """Random aligners: a prompt and token after token are a full pass."""
    enable(precise(model))
    vlm.randomised(model)
    told, prompt = Told(model), tiny.LENGTH - 4
    if model.config.model_type == "paligemma":
        x["token_type_ids"] = (torch.arange(tiny.LENGTH) >= prompt).long().expand(3, -1)
    with told(x):
        full = logits(model, x)
    cache, begin = None, 0
    for end in range(prompt, tiny.LENGTH + 1):
        step = {name: t[:, begin:end] for name, t in x.items() if begin == 0 or "token_type" not in name}
        step["attention_mask"] = x["attention_mask"][:, :end]
        with told({"input_ids": x["input_ids"][:, :prompt]}):
            out = model(**step, past_key_values=cache, use_cache=True)
        close(out.logits[:, -1], full[:, end - 1], f"token {end - 1}")
        cache, begin = out.past_key_values, end


def packed(model: Any, x: Inputs) -> None:
    """Documents in a row are documents one by one, forward and all gradients, with random aligners."""
    enable(precise(model))
    vlm.randomised(model)
    ids = torch.cat((x["input_ids"][0, PADDING:14], x["input_ids"][1, :5], x["input_ids"][2, 2:13]))[None]
    lengths = (10, 5, 11)
    documents = list(ids.split(lengths, 1))
    marked = [marks(model, part) for part in documents]
    results = []
    for together in (False, True):
        model.zero_grad()
        row: Inputs = {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
        row |= {name: torch.cat([m[name] for m in marked], 1) for name in marked[0]}
        parts = [{"input_ids": part} | m for part, m in zip(documents, marked, strict=True)]
        parts = [part | {"position_ids": torch.arange(part["input_ids"].shape[1])[None]} for part in parts]
        outs = []
        for part in [row] if together else parts:
            with Told(model)(part):
                outs.append(logits(model, part))
        out = torch.cat(outs, 1)
        torch.manual_seed(5)
        (out * torch.randn_like(out)).sum().backward()
        results.append((out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (alone, grads), (row_out, row_grads) = results
    close(row_out, alone, "logits")
    assert grads.keys() == row_grads.keys() and any("moda_aligner" in name for name in grads)
    close_as_a_whole(row_grads, grads, "packed")


#: Types whose experts are multiplied in float32 at most.
SINGLE = {"aria", "gpt_oss"}
USES: dict[str, Callable[[Any, Inputs], None]] = {
    "forward": forward,
    "gradients": gradients,
    "greedy": generated(),
    "beams": generated(num_beams=2),
    "static cache": generated(cache_implementation="static"),
    "packed rows": packed,
    "aligners decode": decoding,
}
#: What can't be asked of a type, and why.
EXCEPT = {(kind, "packed rows"): "linear attention" for kind in ("qwen3_5", "qwen3_5_text")}
#: Decoders that have no model of their own run within the one around them.
INNER = {
    "emu3_text_model", "glm4v_moe_text", "glm4v_text", "mllama_text_model", "molmo2_text", "qwen2_5_vl_text",
    "qwen2_vl_text", "qwen3_vl_moe_text", "qwen3_vl_text",
}  # fmt: skip
KINDS = (*sorted(FAMILIES), *sorted(DECODERS - INNER - FAMILIES.keys()))


def check(kind: str, use: str) -> None:
    """Raise where a type isn't what it is asked to be. (What is excepted has to be refused by name.)"""
    model = tiny.model(kind)
    reason = EXCEPT.get((kind, use))
    if reason is None:
        USES[use](model, inputs(model))
        return
    with pytest.raises(NotImplementedError, match=reason):
        USES[use](model, inputs(model))


# The table

#: Columns of the table, and the use that proves them: rows of the inputs are padded on the left, with and without
#: images, with several, and one that is longer than the windows.
COLUMNS = {
    "forward": "forward", "left padding": "forward", "mixed batches": "forward", "several images": "forward",
    "images longer than windows": "forward", "gradients": "gradients", "greedy": "greedy", "beams": "beams",
    "static cache": "static cache", "packed rows": "packed rows",
    "aligners: prefill + decode = full": "aligners decode",
}  # fmt: skip
BEGIN, END = "<!-- table: python tests/families.py -->", "<!-- end of table -->"


def row(kind: str, done: dict[str, bool]) -> str:
    cells = []
    for use in COLUMNS.values():
        cells.append("refused" if (kind, use) in EXCEPT else "yes" if done[use] else "no")
    return f"| {kind} | {' | '.join(cells)} |"


def rows_of_table() -> dict[str, str]:
    """By type, the lines of the page's table."""
    table = TABLE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]
    return {line.split("|")[1].strip(): line for line in table}


def main() -> None:
    """Run all types (or those that are named, and print why they fail), and write the table."""
    lines = {}
    for kind in sys.argv[1:] or KINDS:
        done = {}
        for use in USES:
            try:
                check(kind, use)
            except Exception as error:
                print(kind, use, type(error).__name__, str(error)[:300].replace("\n", " "))
            else:
                done[use] = True
        lines[kind] = row(kind, {use: done.get(use, False) for use in USES})
        print(lines[kind], flush=True)
    if sys.argv[1:]:
        return
    head = [f"| model_type | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    before, rest = TABLE.read_text(encoding="utf-8").split(BEGIN)
    table = "\n".join([BEGIN, *head, *lines.values(), END])
    TABLE.write_text(before + table + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
