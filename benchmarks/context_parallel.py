"""Context parallelism, planned and not run: per layout and number of ranks, how even the work is, how many bytes a
layer moves and how many keys and values a rank holds, beside torch's head-tail shards with an all-gather of all keys.

    python -m benchmarks.context_parallel [--length 131072] [--out FILE]

The layouts are the bench's (of packed documents a rank sees only some keys), and two more masks of that kind: a sliding
window, and modalities that don't see each other. Any machine gives the same numbers. FILE gets one JSON line a case.
"""

import argparse
from pathlib import Path
from typing import Any

from moda_kernels.commands.bench import results
from moda_kernels.commands.bench.layouts import LAYOUTS, MODALITIES, make_workload
from moda_kernels.distributed import Plan, plan_shards
from moda_kernels.tokens.layout import ModalityLayout
from moda_kernels.tokens.mask import ModularMask

RANKS = (2, 4, 8, 16, 32, 64)
#: Of the layer whose bytes are counted: key heads, head size, bytes of a number.
KEY_HEADS, HEAD_DIM, WIDTH = 8, 128, 2
MIB = 1 << 20
WINDOW = 4096


def cases(length: int) -> dict[str, tuple[ModalityLayout, ModularMask]]:
    made = {name: (make_workload(name, length).layout, LAYOUTS[name][1]) for name in LAYOUTS}
    window = ModularMask(ModularMask.causal(MODALITIES).rules, WINDOW, "all")
    made[f"causal, window {WINDOW}"] = made["causal"][0], window
    made["interleaved, self only"] = made["interleaved"][0], ModularMask.self_only(MODALITIES, causal=True)
    return made


def facts(plan: Plan) -> dict[str, Any]:
    """Bytes of keys and values of one layer, forward (the backward moves as many gradients back)."""
    column = KEY_HEADS * 2 * HEAD_DIM * WIDTH
    received, held = plan.received, plan.held
    return {
        "imbalance": plan.imbalance,
        "spread": 1 - float(plan.work.min()) / max(float(plan.work.max()), 1.0),
        "runs": max(map(len, plan.runs)),
        "moved_bytes_most": max(received) * column,
        "moved_bytes_mean": sum(received) * column / plan.ranks,
        "held_bytes_most": max(held) * column,
        "all_gather": plan.gathers,
    }


def planned(name: str, layout: ModalityLayout, mask: ModularMask, ranks: int) -> dict[str, Any]:
    ours = facts(plan_shards(layout, mask, ranks))
    head_tail = plan_shards(layout, mask, ranks, "head_tail")
    whole = layout.modality.shape[-1] * KEY_HEADS * 2 * HEAD_DIM * WIDTH
    return {
        "layout": name,
        "length": layout.modality.shape[-1],
        "ranks": ranks,
        "work": ours,
        "head_tail": {
            "imbalance": head_tail.imbalance,
            "spread": 1 - float(head_tail.work.min()) / max(float(head_tail.work.max()), 1.0),
            "moved_bytes": whole * (ranks - 1) / ranks,
            "held_bytes": whole,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1 << 17, help="tokens (default: 2^17)")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="default: 2 to 64")
    parser.add_argument("--out", type=Path, help="file to append JSON lines to")
    options = parser.parse_args()
    if options.length < 1024:
        parser.error(f"argument --length: expected at least 1024, got {options.length}")
    if min(options.ranks) < 1:
        parser.error(f"argument --ranks: expected numbers from 1 on, got {options.ranks}")
    print(
        f"{options.length} tokens, keys and values of {KEY_HEADS} heads of {HEAD_DIM} in {WIDTH} bytes; MiB per layer"
    )
    print(
        f"{'':26}{'ranks':>6}{'imbalance':>12}{'head-tail':>11}{'runs':>6}{'moved':>9}{'gathered':>10}{'held':>8}{'of':>8}"
    )
    for name, (layout, mask) in cases(options.length).items():
        for ranks in options.ranks:
            record = planned(name, layout, mask, ranks)
            ours, torchs = record["work"], record["head_tail"]
            print(
                f"{name:26}{ranks:6}{ours['imbalance']:11.1%}{torchs['imbalance']:12.1%}{ours['runs']:6}"
                f"{ours['moved_bytes_mean'] / MIB:9.0f}{torchs['moved_bytes'] / MIB:10.0f}"
                f"{ours['held_bytes_most'] / MIB:8.0f}{torchs['held_bytes'] / MIB:8.0f}"
            )
            if options.out is not None:
                results.append(
                    options.out, [{"schema": results.SCHEMA, "benchmark": "context parallel, planned", **record}]
                )


if __name__ == "__main__":
    main()
