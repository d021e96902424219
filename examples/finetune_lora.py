"""LoRA and aligners together: PEFT trains low-rank updates of a LLaVA's projections, and its aligners whole.

    python examples/finetune_lora.py --out adapter

`modules_to_save=["moda_aligner"]` is all that PEFT has to be told: aligners are then trained, and saved with the
adapter. What was saved is put into the plain model again, and has to answer as the trained one does. The model and the
photographs are those of `finetune_vlm.py`; it takes seconds. Needs scikit-learn, transformers, accelerate and peft
(`pip install moda_kernels[examples]`).
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from finetune_vlm import ROWS, Crops, Trainer, collate, make_model

try:
    import peft
except ImportError:
    raise SystemExit("examples/finetune_lora.py needs PEFT: pip install peft") from None


def with_lora(model: Any, rank: int = 4) -> Any:
    """A model with aligners, of which only these and low-rank updates of its text layers are trained."""
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|up_proj|down_proj)",
        modules_to_save=["moda_aligner"],
    )
    return peft.get_peft_model(model, config)


def train(model: Any, steps: int, lr: float) -> list[float]:
    """The losses of each step."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=1, gradient_accumulation_steps=ROWS, learning_rate=lr,
            lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[], seed=0,
            remove_unused_columns=False, disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=Crops(ROWS * steps), data_collator=collate)
        trainer.train()
        return [record["loss"] for record in trainer.state.log_history if "loss" in record]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of some rows that were not trained on."""
    device = next(model.parameters()).device
    row = {name: x.to(device) for name, x in collate([Crops(1, seed=1)[0]]).items()}
    out: torch.Tensor = model.eval()(**row, use_cache=False).logits
    return out


def run(steps: int, lr: float, out: Path) -> list[float]:
    """Train, save, load again and compare."""
    model = with_lora(make_model())
    trained, whole = model.get_nb_trainable_parameters()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if not any("moda_aligner" in name for name in names):
        raise SystemExit("the aligners would not be trained")
    print(f"trained: {trained} of {whole} numbers, {sum('moda_aligner' in name for name in names)} tensors of aligners")
    losses = train(model, steps, lr)
    model.save_pretrained(out)
    again = peft.PeftModel.from_pretrained(make_model(), out)
    torch.testing.assert_close(logits(again.to(next(model.parameters()).device)), logits(model))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=2e-2, help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("adapter"), help="folder for the adapter (default: %(default)s)"
    )
    options = parser.parse_args()
    losses = run(options.steps, options.lr, options.out)
    print("losses: " + " ".join(f"{loss:.4f}" for loss in losses))
    print(f"saved in {options.out}, and the same when loaded")


if __name__ == "__main__":
    main()
