"""A small LLaVA with MODA learns to tell crops of two photographs, trained by transformers' Trainer on any processes.

    python examples/finetune_vlm.py                                              # one process
    torchrun --nproc-per-node 4 examples/finetune_vlm.py                         # each process its own rows
    torchrun --nproc-per-node 2 examples/finetune_vlm.py --mode fsdp             # and parameters sharded (FSDP2)
    torchrun --nproc-per-node 4 examples/finetune_vlm.py --mode context          # each row shared by all processes
    python examples/finetune_vlm.py --compare                                    # all of these: their losses agree

A row packs four documents, each a crop (16 image tokens), a question and an answer; a step trains on four rows, however
many processes there are, so that the losses are the same. Without a GPU processes talk through gloo; it takes seconds.
Needs scikit-learn (for its two photographs), transformers and accelerate.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler

import moda_kernels as mk
from moda_kernels.integrations import transformers as moda

IMAGE, START, QUESTION, ANSWERS, WORDS = 0, 1, 2, (3, 4), 8
SIDE, PATCH = 32, 8
IMAGE_TOKENS = (SIDE // PATCH) ** 2
DOCUMENTS, ROWS = 4, 4
IGNORED = -100


class Crops(Dataset[dict[str, Tensor]]):
    """Rows of packed documents about crops of scikit-learn's two photographs, a temple and a flower."""

    def __init__(self, rows: int, seed: int = 0) -> None:
        photographs = [torch.tensor(x).permute(2, 0, 1) / 127.5 - 1 for x in load_sample_images().images]
        g = torch.Generator().manual_seed(seed)
        self.rows = [self._row(photographs, g) for _ in range(rows)]

    @staticmethod
    def _row(photographs: list[Tensor], g: torch.Generator) -> dict[str, Tensor]:
        crops, ids, labels, positions = [], [], [], []
        for _ in range(DOCUMENTS):
            which = int(torch.randint(2, (), generator=g))
            size = 3 * SIDE  # a crop of 96 × 96, seen at a third of its resolution
            top, left = (int(torch.randint(n - size, (), generator=g)) for n in photographs[which].shape[1:])
            crops.append(photographs[which][:, top : top + size : 3, left : left + size : 3])
            ids += [START, *[IMAGE] * IMAGE_TOKENS, QUESTION, ANSWERS[which]]
            labels += [IGNORED] * (IMAGE_TOKENS + 2) + [ANSWERS[which]]
            positions += range(IMAGE_TOKENS + 3)
        tokens = torch.tensor([ids, labels, positions])
        return {
            "input_ids": tokens[0],
            "labels": tokens[1],
            "position_ids": tokens[2],
            "pixel_values": torch.stack(crops),
        }

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One row a batch: documents, told by positions that start again, are packed already."""
    (row,) = rows
    return {name: x if name == "pixel_values" else x[None] for name, x in row.items()}


def make_model() -> Any:
    """A LLaVA of some thousand weights, with duplex alignment in its text layers."""
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, vocab_size=WORDS, pad_token_id=WORDS - 1, bos_token_id=START,
        eos_token_id=WORDS - 2,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-1
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.model.vision_tower.requires_grad_(False)
    return moda.enable(model, fusion="concat", scope="causal")


def quickly(model: Any, steps: int, lr: float = 1e-2) -> Any:
    """The model after some steps of a row each, without a Trainer. (For the other examples.)"""
    optimizer = torch.optim.AdamW(mk.parameter_groups(model.train(), lr=lr))
    device = next(model.parameters()).device
    for row in Crops(steps).rows:
        optimizer.zero_grad()
        model(**{name: x.to(device) for name, x in collate([row]).items()}, use_cache=False).loss.backward()
        optimizer.step()
    return model


class Trainer(transformers.Trainer):
    """With aligners' weights at a rate of their own; and where processes share rows, the same rows for all of them."""

    shared_rows = False

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            groups = mk.parameter_groups(self.model if model is None else model, lr=self.args.learning_rate)
            self.optimizer = torch.optim.AdamW(groups)
        return self.optimizer

    def _get_train_sampler(self, *args: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def get_train_dataloader(self) -> Any:
        if not self.shared_rows:
            return super().get_train_dataloader()
        return DataLoader(self.train_dataset, batch_size=1, sampler=self._get_train_sampler(), collate_fn=collate)  # type: ignore[arg-type]


def train(mode: str, steps: int, lr: float, save: Path | None = None) -> list[float]:
    """The losses of each step; the model, with its aligners, is saved where it is asked for."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    apart = 1 if mode == "context" else processes
    if ROWS % apart:
        raise SystemExit(f"expected a number of processes that divides {ROWS}, got {apart}")
    sharded: dict[str, Any] = {}
    if mode == "fsdp":
        sharded = {
            "fsdp": "full_shard",
            "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
        }
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=1, gradient_accumulation_steps=ROWS // apart,
            learning_rate=lr, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[], seed=0,
            remove_unused_columns=False, disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
            ddp_backend="gloo" if processes > 1 and not torch.cuda.is_available() else None, **sharded,
        )  # fmt: skip
        model = make_model()
        trainer = Trainer(model=model, args=arguments, train_dataset=Crops(ROWS * steps), data_collator=collate)
        if mode == "context" and processes > 1:
            trainer.shared_rows = True
            moda.context_parallel(model)  # all processes
        trainer.train()
        if mode == "fsdp" and processes > 1 and not all(hasattr(p, "full_tensor") for p in trainer.model.parameters()):
            raise SystemExit("parameters were not sharded")
        if save is not None:
            trainer.save_model(str(save))
        return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def compare(steps: int, lr: float) -> None:
    """Every way of training in processes of its own; stop where their losses differ."""
    losses = {}
    for mode, processes in (("data", 1), ("data", 2), ("data", 4), ("fsdp", 2), ("context", 2), ("context", 4)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = command if processes > 1 else [sys.executable]
        options = ["--mode", mode, "--steps", str(steps), "--lr", str(lr)]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "losses.json"
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run([*command, __file__, *options, "--out", str(out)], check=True, env=environment)
            losses[mode, processes] = json.loads(out.read_text())
        shown = " ".join(f"{loss:.4f}" for loss in losses[mode, processes])
        print(f"{mode:8} {processes} processes: {shown}", flush=True)
    first = losses["data", 1]
    for (mode, processes), found in losses.items():
        worst = max(abs(a - b) for a, b in zip(found, first, strict=True))
        if worst > 1e-3:
            raise SystemExit(f"{mode} on {processes} processes: losses differ by {worst:.2g} from those of one process")
    print("all losses agree")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=["data", "fsdp", "context"], default="data")
    parser.add_argument("--steps", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-2, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="file for the losses")
    parser.add_argument("--save", type=Path, help="folder for the model")
    parser.add_argument(
        "--compare", action="store_true", help="run every mode on 1, 2 and 4 processes and compare them"
    )
    options = parser.parse_args()
    if options.compare:
        compare(options.steps, options.lr)
        return
    losses = train(options.mode, options.steps, options.lr, options.save)
    if int(os.environ.get("RANK", "0")) == 0:
        print("losses: " + " ".join(f"{loss:.4f}" for loss in losses))
        if options.out is not None:
            options.out.write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
