"""Enabled models on several processes: context parallelism and transformers' tensor parallelism against one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
import vlm
from ranks import Ranks, world
from torch import Tensor

import moda_kernels as mk
from moda_kernels.distributed import ulysses
from moda_kernels.integrations import transformers as moda

transformers = vlm.transformers


def made(family: str, **options: Any) -> Any:
    model = vlm.llama() if family == "llama" else vlm.make(family)
    return vlm.randomised(moda.enable(model, **options)).double().train()


def inputs(family: str) -> dict[str, Tensor]:
    if family == "llama":  # documents packed into one row
        ids = torch.randint(3, 99, (1, 23), generator=torch.Generator().manual_seed(4))
        positions = torch.cat((torch.arange(9), torch.arange(14)))[None]
        return {"input_ids": ids, "position_ids": positions}
    made = vlm.inputs(family)
    return {name: x.double() if x.is_floating_point() else x for name, x in made.items()} | vlm.positions(made)


def logits_and_gradients(model: Any, given: dict[str, Tensor], told: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    if told is None:
        out = model(**given, use_cache=False).logits
    else:
        with moda.modality_ids(told):
            out = model(**given, use_cache=False).logits
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    if "attention_mask" in given:
        weight = weight * given["attention_mask"][..., None]
    (out * weight).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def job_context(family: str, options: dict[str, Any], balance: str) -> None:
    import torch.distributed as dist

    given = inputs(family)
    told = (given["input_ids"] % 3 == 0).long() if family == "llama" else None
    out, grads = logits_and_gradients(made(family, **options), given, told)
    model = made(family, **options)
    handle = moda.context_parallel(model, world(), balance=balance)
    got, shares = logits_and_gradients(model, given, told)
    torch.testing.assert_close(got, out, rtol=1e-6, atol=1e-6)
    assert shares.keys() == grads.keys()
    for name, grad in grads.items():
        total = shares[name]
        dist.all_reduce(total)
        # (Gemma norms in float32.)
        error, largest = (total / dist.get_world_size() - grad).abs().max(), grad.abs().max()
        assert error <= 1e-6 * largest + 1e-12, f"{name}: {error} of {largest}"
    if told is None:
        with pytest.raises(NotImplementedError, match="use_cache=False"):
            model.eval()(**given, use_cache=True)
        handle.remove()
        model.eval()(**given, use_cache=True)


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl", "llama"])
def test_context_parallel(family: str, four: Ranks) -> None:
    scope = "sequence" if family == "qwen2_vl" else "causal"
    four.run(job_context, family, {"fusion": "concat", "scope": scope}, "work")


def job_heads_outside() -> None:
    """Somebody else's all-to-all of heads around what is registered, which drops the mask (DeepSpeed's Ulysses does
    both): whole rows of some heads arrive."""
    import torch.distributed as dist
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    size = dist.get_world_size()
    ids = torch.randint(3, 99, (1, 24), generator=torch.Generator().manual_seed(4))
    given, told = {"input_ids": ids}, (ids % 3 == 0).long()
    out, grads = logits_and_gradients(made("llama", fusion="concat"), given, told)
    plain = ALL_ATTENTION_FUNCTIONS["moda"]
    rows = [24 // size] * size

    def wrapped(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
        inside = (ulysses.to_heads(x, rows, 2, world()) for x in (query, key, value))
        got, _ = plain(module, *inside, None, **more)
        return ulysses.to_rows(got, rows, 1, world(), 2), None

    model = made("llama", fusion="concat")
    moda.context_parallel(model, world(), balance="none")
    ALL_ATTENTION_FUNCTIONS["moda"] = wrapped
    try:
        got, shares = logits_and_gradients(model, given, told)
    finally:
        ALL_ATTENTION_FUNCTIONS["moda"] = plain
    torch.testing.assert_close(got, out, rtol=1e-9, atol=1e-9)
    for name, grad in grads.items():
        dist.all_reduce(shares[name])
        torch.testing.assert_close(shares[name] / size, grad, rtol=1e-7, atol=1e-9)


def test_behind_an_all_to_all_of_heads(two: Ranks) -> None:
    two.run(job_heads_outside)


def test_a_mask_that_was_taken_away_is_missed() -> None:
    hooks = pytest.importorskip("accelerate.big_modeling")
    model = made("llama", mask=mk.ModularMask.bidirectional_within(2, [1]))
    hooks._attach_context_parallel_hooks(model)
    ids = torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(NotImplementedError, match=r"context_parallel\(model\)"), moda.modality_ids(ids):
        model(input_ids=ids, use_cache=False)


def job_tensor(folder: str, options: dict[str, Any]) -> None:
    """from_pretrained with a tensor-parallel plan, then enable: training and generating as one process does."""
    import torch.distributed as dist

    given = inputs("llava")
    alone = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float64)
    moda.enable(alone, **options)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder,
        dtype=torch.float64,
        distributed_config=transformers.distributed.DistributedConfig(tp_size=dist.get_world_size()),
    )
    moda.enable(model, **options)
    plan = model.tp_plan
    assert [style for name, style in plan.items() if name.endswith("moda_aligner")] == [
        "replicated_with_grad_allreduce"
    ]
    for each in (alone, model):
        vlm.randomised(each)
    out, grads = logits_and_gradients(alone.train(), given, None)
    got, shares = logits_and_gradients(model.train(), given, None)
    torch.testing.assert_close(got, out, rtol=1e-6, atol=1e-6)
    aligners = [name for name in grads if "moda_aligner" in name]
    assert len(aligners) == 2
    for name in grads:
        share = shares[name].full_tensor() if hasattr(shares[name], "full_tensor") else shares[name]
        error, largest = (share - grads[name]).abs().max(), grads[name].abs().max()
        assert error <= 1e-6 * largest + 1e-12, f"{name}: {error} of {largest}"
    want = alone.eval().generate(**given, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.eval().generate(**given, max_new_tokens=5, do_sample=False), want)


def test_tensor_parallel_from_pretrained(two: Ranks, tmp_path: Path) -> None:
    vlm.make("llava").save_pretrained(tmp_path)
    two.run(job_tensor, str(tmp_path), {"fusion": "concat"})
