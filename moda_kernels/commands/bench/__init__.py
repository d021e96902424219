"""`python -m moda_kernels bench`: this package beside SDPA, FlexAttention, FlashAttention and eager MODA, right here.

Every contestant is checked against a float64 oracle before it is timed; who is wrong, or can't run here, is left out
with the reason. Writes a result file (JSON lines) and a picture, prints tables. In the code `layouts.py` has the
sequences, `cases.py` the inputs, `peers/` one adapter per contestant, `plans.py` what is run, `oracle.py` the check,
`runner.py` the timing on the clocks of `clock.py`, `memory.py` the peak memory, `pieces.py` the parts around attention,
`results.py` what is written down, `tables.py` and `plots.py` what is made of it.
"""

import argparse
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from moda_kernels.commands.bench import pieces, plans, plots, results, runner, tables
from moda_kernels.commands.bench.cases import MODES, Case, can
from moda_kernels.commands.bench.layouts import LAYOUTS, SHORTEST
from moda_kernels.commands.bench.peers import PEERS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
#: Seconds of timing per case.
SECONDS = {"quick": 1.0, "cpu": 4.0, "gpu": 2.0}


#: For people who run it; the module's docstring is for those who read it.
HELP = """\
Times this package beside what you may use today, on this machine: PyTorch's scaled_dot_product_attention (SDPA) in each
of its forms, FlexAttention, FlashAttention where it is installed, and MODA written out in PyTorch. Everybody is checked
against float64 first; who is wrong or can't run here is left out, with the reason. Without options it takes about
eleven minutes on a CPU and five on a GPU; --quick a minute. Prints tables, writes a result file and a picture."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench`."""
    parser.description, parser.formatter_class = HELP, argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(
        textwrap.fill(f"{what}: {', '.join(names)}", 110, subsequent_indent="  ", break_on_hyphens=False)
        for what, names in (("layouts", LAYOUTS), ("contestants", PEERS))
    )
    what = parser.add_argument_group("what is run", "Lists are comma-separated, and every combination is run.")
    what.add_argument("--quick", action="store_true", help="a minute: short sequences, nothing that compiles")
    what.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    what.add_argument("--layouts", type=_names("layout", list(LAYOUTS)), help="sequences by name, listed below")
    what.add_argument("--lengths", type=_numbers, help="tokens, for example 1024,8192")
    what.add_argument("--dtypes", type=_names("dtype", list(DTYPES)), help=", ".join(DTYPES))
    what.add_argument("--modes", type=_names("mode", list(MODES)), help=", ".join(MODES))
    what.add_argument("--contestants", type=_names("contestant", list(PEERS)), help="by name, listed below")
    what.add_argument("--heads", type=_numbers, metavar="Hq,Hkv", help="of queries and keys; 8,2, on CUDA 32,8")
    what.add_argument("--head-dim", type=int, help="default: 64; on CUDA 128")
    what.add_argument("--seed", type=int, default=0, help="of layouts, inputs and order (default: 0)")
    what.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    what.add_argument("--no-pieces", action="store_true", help="leave segmentation, tiles and alignment out")
    what.add_argument("--tiny", action="store_true", help="64 tokens on the CPU: does it run at all?")
    how = parser.add_argument_group("how long")
    how.add_argument("--rounds", type=int, default=30, help="samples of a contestant at most (default: 30)")
    how.add_argument("--seconds", type=float, help="of timing per case (default: 1 to 4)")
    how.add_argument("--limit", type=float, default=float("inf"), help="begin no case after so many seconds")
    how.add_argument("--threads", type=int, help="of torch; default: torch's own")
    files = parser.add_argument_group("files")
    files.add_argument("--out", type=Path, default=Path("moda-bench.jsonl"), help="result file (default: %(default)s)")
    files.add_argument("--plot", type=Path, help="picture (default: the result file's name with .png)")
    files.add_argument("--compare", type=Path, metavar="OLD", help="an older result file to set beside this run")
    files.add_argument("--read", type=Path, metavar="FILE", help="run nothing: tables and picture of a result file")
    files.add_argument("--commit", help="of the code, for the result file, where its folder has no git")


def run(arguments: argparse.Namespace) -> int:
    """Run, print, write, draw. Exit code 0; 1 as `exit_code`; 2 for a bad request."""
    plot = arguments.plot or arguments.out.with_suffix(".png")
    try:
        old = results.read(arguments.compare) if arguments.compare else None
        given = results.read(arguments.read) if arguments.read else None
        if plot.suffix not in plots.FORMATS:
            raise ValueError(f"--plot: expected a {', '.join(plots.FORMATS)} file, got {plot}")
        device = _device(arguments)
        matches, parts = ([], []) if given is not None else _plan(arguments, device)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if given is None:
        given = _measure(arguments, device, matches, parts)
    else:
        _show(given)
    if old is not None:
        print(f"\nAgainst {arguments.compare}:\n{tables.comparison(old, given)}")
    if arguments.read is None or arguments.plot is not None:
        _draw(given, plot)
    return exit_code(given)


def exit_code(records: Sequence[results.Record]) -> int:
    """1 where something of this package was wrong or failed; what others do is reported, and no fault of a run."""
    ours = [record for record in records if record["contestant"].startswith("moda")]
    return int(any(record["status"] in ("wrong", "failed") for record in ours))


def _device(arguments: argparse.Namespace) -> str:
    if arguments.tiny:
        return "cpu"
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device (see python -m moda_kernels doctor)")
    return str(device)


def _plan(arguments: argparse.Namespace, device: str) -> tuple[list[runner.Match], list[Case]]:
    """What is to be run: attention, and the pieces around it."""
    shape: dict[str, Any] = dict(plans.CPU_SHAPE if device == "cpu" else plans.CUDA_SHAPE)
    if arguments.heads:
        if len(arguments.heads) != 2 or arguments.heads[0] % arguments.heads[1]:
            raise ValueError(f"--heads: expected Hq,Hkv with Hq a multiple of Hkv, got {arguments.heads}")
        shape |= {"query_heads": arguments.heads[0], "key_heads": arguments.heads[1]}
    if arguments.head_dim:
        shape["head_dim"] = arguments.head_dim
    short = [length for length in arguments.lengths or () if length < SHORTEST]
    if short:
        raise ValueError(f"--lengths: expected at least {SHORTEST}, got {', '.join(map(str, short))}")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    contestants = plans.peers(*(arguments.contestants or ()), device=device)
    if any((arguments.layouts, arguments.lengths, arguments.dtypes, arguments.modes)):
        matches = [
            runner.Match(
                Case(layout, length, DTYPES[name], mode, seed=arguments.seed, device=device, **shape), contestants, True
            )
            for length in arguments.lengths or (4096,)
            for name in arguments.dtypes or (str(dtype).removeprefix("torch."),)
            for layout in arguments.layouts or LAYOUTS
            for mode in arguments.modes or ("forward", "training")
            if can(layout, mode)
        ]
        named = list(dict.fromkeys((m.case.layout, m.case.length, m.case.dtype) for m in matches))
    else:
        matches = plans.quick(device) if arguments.quick else plans.cpu() if device == "cpu" else plans.gpu(dtype)
        if arguments.tiny:
            matches = plans.tiny()
        if arguments.contestants:
            chosen = set(arguments.contestants)
            matches = [runner.Match(m.case, tuple(p for p in m.peers if p.name in chosen), m.memory) for m in matches]
        lengths = (1024,) if arguments.quick else (64,) if arguments.tiny else (8192, 32768)
        named = [(layout, length, dtype) for length in lengths for layout in ("llava-next", "qwen2-vl-8")]
    if arguments.no_memory or arguments.tiny:
        matches = [runner.Match(m.case, m.peers) for m in matches]
    parts = [Case(layout, length, kind, seed=arguments.seed, device=device, **shape) for layout, length, kind in named]
    matches = [m for m in matches if m.peers]
    if not matches:
        raise ValueError("nothing to run: no contestant in any case (packed documents aren't decoded)")
    return matches, [] if arguments.no_pieces else parts


def _measure(
    arguments: argparse.Namespace, device: str, matches: list[runner.Match], parts: list[Case]
) -> list[results.Record]:
    """Run it all, table by table, into a new result file."""
    plan = "quick" if arguments.quick or arguments.tiny else "gpu" if device == "cuda" else "cpu"
    seconds = arguments.seconds or (0.05 if arguments.tiny else SECONDS[plan])
    options = runner.Options(arguments.rounds, seconds, arguments.limit, arguments.seed, arguments.commit)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("", encoding="utf-8")
    everything: list[results.Record] = []

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    # The pieces first: they take seconds, and a run that is stopped by its limit has them.
    quick = runner.Options(arguments.rounds, min(seconds, 2.0), arguments.limit, arguments.seed, arguments.commit)
    for records in pieces.run(parts, quick, tell):
        print(tables.piece_table(records), end="\n\n", flush=True)
        results.append(arguments.out, records)
        everything += records
    for records in runner.run(matches, options, tell):
        print(tables.case_tables(records), end="\n\n", flush=True)
        results.append(arguments.out, records)
        everything += records
    _show_end(everything)
    print(f"Results: {arguments.out}")
    return everything


def _show(records: list[results.Record]) -> None:
    """The tables of a result file."""
    cases: dict[tuple[object, ...], list[results.Record]] = {}
    for record in records:
        w = record["workload"]
        of_pieces = record["pass"] in pieces.PIECES
        # A plan may come back to a case with other contestants: another run.
        key = (w["name"], w["length"], record["dtype"], record["pass"] * (not of_pieces), record["run"])
        cases.setdefault(key, []).append(record)
    for found in cases.values():
        of_pieces = found[0]["pass"] in pieces.PIECES
        print((tables.piece_table if of_pieces else tables.case_tables)(found), end="\n\n")
    _show_end(records)


def _show_end(records: list[results.Record]) -> None:
    print(tables.LEGEND)
    for line in tables.peaks(records):
        print(f"Peak here: {line}")
    absent = tables.missing(records)
    if absent:
        print("Not here:\n" + "\n".join(f"  {line}" for line in absent))


def _draw(records: list[results.Record], path: Path) -> None:
    reason = plots.why_not()
    if reason is None:
        try:
            plots.draw(records, path)
        except ValueError as error:
            reason = str(error)
    print(f"Picture: {path}" if reason is None else f"No picture: {reason}")


def _names(what: str, known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A parser of comma-separated names."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {what} {', '.join(unknown)}; known: {', '.join(known)}")
        return names

    return parse


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))
