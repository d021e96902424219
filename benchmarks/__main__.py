"""Command line: `python -m benchmarks`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import results, runner
from benchmarks.cases import PASSES
from benchmarks.layouts import LAYOUTS
from benchmarks.peers import PEERS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def _names(what: str, known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A parser of comma-separated names."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {what} {', '.join(unknown)}; known: {', '.join(known)}")
        return names

    return parse


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    lists = "comma-separated; default: %(default)s"
    made.add_argument("--layouts", type=_names("layout", list(LAYOUTS)), default=",".join(LAYOUTS), help=lists)
    made.add_argument("--lengths", type=_lengths, default="1024,4096,8192,16384", help=lists)
    made.add_argument("--dtypes", type=_names("dtype", list(DTYPES)), default="float32,bfloat16", help=lists)
    made.add_argument("--passes", type=_names("pass", PASSES), default=",".join(PASSES), help=lists)
    made.add_argument("--contestants", type=_names("contestant", list(PEERS)), default=",".join(PEERS), help=lists)
    made.add_argument("--heads", type=_lengths, default="8,2", metavar="Hq,Hkv", help="default: %(default)s")
    made.add_argument("--head-dim", type=int, default=64, help="default: %(default)s")
    made.add_argument("--rounds", type=int, default=30, help="samples of a contestant at most; default: %(default)s")
    made.add_argument("--seconds", type=float, default=30.0, help="of timing per case; default: %(default)s")
    made.add_argument("--threads", type=int, help="of torch; default: torch's own")
    made.add_argument("--seed", type=int, default=0, help="of layouts, inputs and order; default: %(default)s")
    made.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    made.add_argument("--out", type=Path, help="result file; JSON lines are appended")
    made.add_argument(
        "--quick", action="store_true", help="1,024 tokens, float32, 3 seconds a case, nothing that compiles, no memory"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parser().parse_args(arguments)
    if len(asked.heads) != 2:
        parser().error("--heads: expected Hq,Hkv")
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    peers = [PEERS[name] for name in asked.contestants]
    if asked.quick:
        peers = [peer for peer in peers if not peer.compiles]
    options = runner.Options(
        layouts=asked.layouts,
        lengths=(1024,) if asked.quick else asked.lengths,
        dtypes=(torch.float32,) if asked.quick else tuple(DTYPES[name] for name in asked.dtypes),
        passes=asked.passes,
        peers=tuple(peers),
        query_heads=asked.heads[0],
        key_heads=asked.heads[1],
        head_dim=asked.head_dim,
        rounds=asked.rounds,
        seconds=3.0 if asked.quick else asked.seconds,
        memory=not (asked.quick or asked.no_memory),
        seed=asked.seed,
    )
    wrong = False
    for records in runner.show(runner.run(options, lambda line: print(line, file=sys.stderr, flush=True))):
        wrong = wrong or any(record["status"] in ("wrong", "failed") for record in records)
        if asked.out is not None:
            results.append(asked.out, records)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
