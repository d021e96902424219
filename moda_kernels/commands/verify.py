"""`python -m moda_kernels verify`: is attention right on this machine? The parity suite's essence, within a minute.

Every feature (masks, split softmax, pseudo scores, biases, each fusion and scope of the alignment, packed documents, …)
is run forward and backward on each backend and device that is here, in several dtypes, and judged as the tests do:
against float64 on the same rounded inputs, the error may be twice that of the same maths in eager PyTorch, or of
torch's own SDPA where that is larger (the cpu backend is made of it, and its error isn't ours). Prints each feature's
largest error as a share of what is allowed; the exit code is 0 only if nothing is over it.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moda_kernels import backends, testing
from moda_kernels.commands import doctor
from moda_kernels.runtime import gpu

#: Features and the names of their cases in `testing.CASES` (how they begin).
FEATURES = {
    "masks": ("joint",),
    "roles, steps, chunks": ("roles", "steps", "chunks", "window_on_all"),
    "grouped-query heads": ("joint_gqa",),
    "value size, scale": ("joint_scale", "joint_value"),
    "split": ("split",),
    "pseudo scores": ("pseudo", "sink"),
    "capped scores": ("softcap",),
    "pair bias": ("bias",),
    "attn_mask": ("attn_mask",),
    **{
        f"{fusion}, {scope} scope": (f"key_map_{fusion}_{scope}",)
        for fusion in ("add", "linear", "concat")
        for scope in ("sequence", "causal")
    },
    "frobenius, one aligned": ("key_map_frobenius", "key_map_one"),
    "keys keep their lengths": ("key_map_renorm",),
    "released weights": ("key_map_released", "packed_released"),
    "fewer queries": ("queries",),
    "packed documents": ("packed",),
    "all at once": ("everything",),
}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: On a GPU those of training; float64 is for the CPU, where it shows errors that rounding hides.
ON = {"cpu": ("float32", "bfloat16", "float64"), "cuda": ("bfloat16", "float16", "float32")}
#: Tokens of the longest sequence and head size: odd ones first, then, as time allows, real ones.
SIZES = {"cpu": ((63, 16), (200, 64)), "cuda": ((63, 64), (257, 128), (1000, 128))}
#: Triton's interpreter is three orders of magnitude slower, and wrong in bfloat16.
INTERPRETED = ((40, 16),)
EXPLANATION = """The largest error of outputs, lse and all gradients as a share of what is allowed: below 1 is right.
Allowed is twice the error of the same maths in eager PyTorch in that dtype (or of torch's own SDPA, where that is
larger; it is what the cpu backend is made of), both against float64 on the same inputs."""


@dataclass
class Outcome:
    """What became of one feature on one backend and device in one dtype.

    Attributes:
        worst: largest error over what is allowed, and of which tensor of which case.
        faults: what is over it, or raised. refused: reasons why cases can't run there. ran: cases that were judged.
    """

    worst: float = 0.0
    where: str = ""
    ran: int = 0
    faults: list[str] = field(default_factory=list)
    refused: dict[str, None] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        if self.faults:
            return "WRONG"
        if self.ran:
            return f"{self.worst:.2f}"
        return "refused" if self.refused else "not run"


#: A feature, and backend, device and dtype.
Cell = tuple[str, tuple[str, str, str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `verify`."""
    parser.add_argument("--backends", type=_names, help="comma-separated (default: all that are here)")
    parser.add_argument("--features", type=_names, help=f"separated by semicolons, of: {'; '.join(FEATURES)}")
    parser.add_argument("--dtypes", type=_names, help=f"comma-separated, of: {', '.join(DTYPES)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="only there (default: everywhere)")
    parser.add_argument("--seconds", type=float, default=60.0, help="begin no case after so many (default: 60)")
    parser.add_argument("--quick", action="store_true", help="one case a feature, small sizes only")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default: 0)")
    parser.add_argument("--out", type=Path, help="also write the outcome as JSON lines")


def run(arguments: argparse.Namespace) -> int:
    """Verify. Exit code 0 if all that ran is right; 1 if something is wrong; 2 for a bad request or if nothing ran."""
    problem = _problem(arguments)
    if problem:
        print(problem, file=sys.stderr)
        return 2
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    features = list(arguments.features or FEATURES)
    columns, absent = _columns(arguments.backends, arguments.dtypes, device, only=arguments.device is not None)
    outcomes: dict[Cell, Outcome] = {(f, c): Outcome() for f in features for c in columns}
    begin = time.perf_counter()
    left = 0
    # An engine that compiles for each feature comes last: the others take seconds.
    slow = [column for column in columns if column[0] == "flex"]
    rest = [column for column in columns if column not in slow]
    work = (_work(features, some, arguments.quick) for some in (rest, slow))
    for feature, case, column, size in itertools.chain(*work):
        if time.perf_counter() - begin > arguments.seconds:
            left += 1
        else:
            _judge(outcomes[feature, column], case, column, size, arguments.seed)
    print(_table(outcomes, features, columns))
    print(f"\n{EXPLANATION}")
    for reason in absent:
        print(f"Not here: {reason}")
    _print_details(outcomes)
    if left:
        print(f"{left} runs left out: {arguments.seconds:.0f} s were over (--seconds)")
    if arguments.out is not None:
        _write(arguments.out, outcomes)
    wrong = any(outcome.faults for outcome in outcomes.values())
    ran = sum(outcome.ran for outcome in outcomes.values())
    seconds = time.perf_counter() - begin
    print(f"\n{'WRONG: see above.' if wrong else 'Right.' if ran else 'Nothing ran.'} {ran} runs in {seconds:.0f} s.")
    return 1 if wrong else 0 if ran else 2


def _problem(arguments: argparse.Namespace) -> str | None:
    """What is wrong with a request; None if nothing."""
    for option, given, known in (
        ("--backends", arguments.backends, backends.BACKENDS),
        ("--features", arguments.features, FEATURES),
        ("--dtypes", arguments.dtypes, DTYPES),
    ):
        unknown = [name for name in given or () if name not in known]
        if unknown:
            between = "; " if known is FEATURES else ", "  # as they are given: features have commas in their names
            return f"{option}: expected names of {between.join(known)}, got {between.join(unknown)}"
    if arguments.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: torch finds no CUDA device (see python -m moda_kernels doctor)"
    return None


def _columns(
    named: Sequence[str] | None, dtypes: Sequence[str] | None, device: str, only: bool
) -> tuple[list[tuple[str, str, str]], list[str]]:
    """(backend, device, dtype) to be run (on this device only), and why the other backends are not here."""
    columns, absent = [], []
    for name in named or backends.BACKENDS:
        reasons = backends.BACKENDS[name].why_absent()
        absent += [f"{name}: {reason}" for reason in reasons]
        if reasons or (name == "reference" and named is None):
            continue  # the reference would be judged by itself: only for those who ask
        # The CPU backend runs on the CPU whatever else there is; it says so itself for other devices.
        where = "cpu" if name == "cpu" else device
        if only and where != device:
            continue
        columns += [(name, where, dtype) for dtype in dtypes or ON[where]]
    return columns, absent


def _work(
    features: Sequence[str], columns: Sequence[tuple[str, str, str]], quick: bool
) -> Iterator[tuple[str, testing.Case, tuple[str, str, str], tuple[int, int]]]:
    """All runs, one case of each feature first, so that whoever stops early has seen something of all."""
    cases = {feature: cases_of(feature) for feature in features}
    for step in range(1 if quick else len(SIZES["cuda"])):
        for number in range(1 if quick else max(map(len, cases.values()))):
            for feature, own in cases.items():
                for column in columns if number < len(own) else ():
                    sizes = INTERPRETED if column[0] == "triton" and gpu.interpreted() else SIZES[column[1]]
                    if step < len(sizes):
                        yield feature, own[number], column, sizes[step]


def cases_of(feature: str) -> list[testing.Case]:
    """A feature's cases; each case belongs to the feature that says most of its name."""

    def said(case: testing.Case, of: str) -> int:
        return max((len(start) for start in FEATURES[of] if case.name.startswith(start)), default=0)

    return [case for case in testing.CASES if said(case, feature) == max(said(case, f) for f in FEATURES) > 0]


def _judge(
    outcome: Outcome, case: testing.Case, column: tuple[str, str, str], size: tuple[int, int], seed: int
) -> None:
    """One run, noted down."""
    backend, device, dtype_name = column
    dtype = DTYPES[dtype_name]
    if case.scale is not None:
        # Written for a head size of 16. Larger scores have larger errors, torch's own SDPA's too: keep their size.
        case = dataclasses.replace(case, scale=case.scale * (16 / size[1]) ** 0.5)
    options: dict[str, Any] = {"device": device, "seed": seed, "length": size[0], "head_dim": size[1]}
    name = f"{case.name}, {size[0]} tokens, D = {size[1]}"
    try:
        compared = testing.judge(case, dtype, backend, **options)
    except NotImplementedError as error:
        outcome.refused[str(error).partition("can't run this call: ")[2] or str(error)] = None
        return
    except Exception as error:  # a kernel may fail in any way: all the others are still of interest
        outcome.faults.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return
    outcome.ran += 1
    outcome.faults += [f"{name}: {comparison}" for comparison in compared if not comparison.good]
    for comparison in compared:
        share = comparison.error / comparison.allowed if comparison.allowed else float(comparison.error > 0)
        if share > outcome.worst:
            outcome.worst, outcome.where = share, f"{comparison.name} of {name}"


def _table(outcomes: dict[Cell, Outcome], features: Sequence[str], columns: Sequence[tuple[str, str, str]]) -> str:
    heads = [f"{backend} {device} {dtype}" for backend, device, dtype in columns]
    width = max(map(len, features))
    lines = [" " * width + "".join(f"  {head}" for head in heads)]
    for feature in features:
        cells = [outcomes[feature, column].shown.rjust(len(head)) for column, head in zip(columns, heads, strict=True)]
        lines.append(feature.ljust(width) + "".join(f"  {cell}" for cell in cells))
    where = doctor.cpu_model()
    if any(device == "cuda" for _, device, _ in columns):
        where = torch.cuda.get_device_name()
    return "\n".join([f"{where}, torch {torch.__version__}", "", *lines])


def _print_details(outcomes: dict[Cell, Outcome]) -> None:
    refused: dict[str, list[str]] = {}
    for (feature, column), outcome in outcomes.items():
        for fault in outcome.faults:
            print(f"WRONG, {feature} on {' '.join(column)}: {fault}")
        for reason in outcome.refused:
            refused.setdefault(reason, []).append(feature)
    for reason, features in refused.items():
        print(f"Refused ({', '.join(dict.fromkeys(features))}): {reason}")


def _write(path: Path, outcomes: dict[Cell, Outcome]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for (feature, (backend, device, dtype)), outcome in outcomes.items():
            record = {
                "feature": feature, "backend": backend, "device": device, "dtype": dtype, "ran": outcome.ran,
                "worst_share": outcome.worst, "where": outcome.where, "faults": outcome.faults,
                "refused": list(outcome.refused),
            }  # fmt: skip
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _names(text: str) -> tuple[str, ...]:
    # Features may have commas in their names: semicolons separate too.
    if text in FEATURES:
        return (text,)
    return tuple(part.strip() for part in text.split(";" if ";" in text else ",") if part.strip())
