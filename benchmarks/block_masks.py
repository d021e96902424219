"""FlexAttention's block masks, ours and its own: how long they take to make.

    python -m benchmarks.block_masks [--device cuda] [--out FILE] [--note TEXT]

Ours from modality ids, the layout included, for FlexAttention on its own (``ModularMask.to_block_mask``).
``create_block_mask`` with the shortest ``mask_mod`` of the same mask, and with the general one that reads a layout's
tensors; both as they are and compiled (the compilation not counted). Contestants take turns; before anything is timed
their lists are compared, tile by tile. FILE gets one JSON line a contestant and length.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from benchmarks.tiles import Call, described, flex, interleaved
from moda_kernels.commands.bench import results
from moda_kernels.commands.bench.layouts import Workload, make_workload
from moda_kernels.tokens import blocks

LENGTHS = (4096, 8192, 32768)
#: An L x L tensor of int64 and a few of bools: longer ones are left to the compiler.
EAGER_LIMIT = 16384
TILE = 128


def contestants(workload: Workload, device: str) -> dict[str, Call]:
    layout, mask, length = workload.layout, workload.mask, workload.length
    general = blocks.mask_mod(blocks.readings(blocks.sight(layout, layout.queries(), mask)))

    def own(compiled: bool) -> Call:
        create = torch.compile(create_block_mask) if compiled else create_block_mask
        return lambda: create(general, 1, None, length, length, device=device, BLOCK_SIZE=TILE)

    made: dict[str, Call] = {
        "ours, from modality ids": lambda: mask.to_block_mask(workload.segment(), block_size=TILE),
        "ours, from a layout": lambda: mask.to_block_mask(layout, block_size=TILE),
    }
    for compiled in (False, True):
        if compiled or length <= EAGER_LIMIT:
            how = ", compiled" if compiled else ""
            made[f"create_block_mask, shortest mask_mod{how}"] = flex(workload, compiled, device)
            made[f"create_block_mask, general mask_mod{how}"] = own(compiled)
    return made


def tiles(mask: BlockMask) -> list[tuple[list[int], list[int]]]:
    """Of each tile of queries the tiles of keys that it meets in part and whole, sorted."""
    parts: Any = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    counts, listed, whole_counts, whole_listed = (x[0, 0].tolist() for x in parts)
    return [(sorted(listed[i][: counts[i]]), sorted(whole_listed[i][: whole_counts[i]])) for i in range(len(counts))]


def compare(calls: dict[str, Call]) -> None:
    made = {who: tiles(call()) for who, call in calls.items()}
    first = next(iter(made.values()))
    for who, found in made.items():
        if found != first:
            raise SystemExit(f"{who}: other tiles than ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--runs", type=int, default=20, help="of each (default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--layout", choices=["interleaved", "llava-next"], default="interleaved")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each contestant and length, at most about")
    parser.add_argument("--note", default="", help="what else the machine does, for the result file")
    parser.add_argument("--out", type=Path, help="file to append JSON lines to")
    options = parser.parse_args()
    torch.manual_seed(0)
    environment = results.environment(options.device)
    print(", ".join(f"{key} {environment[key]}" for key in ("device", "threads", "torch", "load_average")))
    for length in options.lengths:
        workload = make_workload(options.layout, length, device=options.device)
        calls = contestants(workload, options.device)
        compare(calls)
        times = interleaved(calls, options.runs, options.seconds, options.device)
        records = [
            described("block masks", workload, [TILE, TILE], who, times[who], options.note, environment)
            for who in calls
        ]
        for record in records:
            title = f"{options.layout}, {length}, {record['contestant']}"
            print(f"{title:70}" + "{median:10.2f} ms ({p10:.2f}-{p90:.2f})".format(**record["ms"]), flush=True)
        if options.out is not None:
            results.append(options.out, records)


if __name__ == "__main__":
    main()
