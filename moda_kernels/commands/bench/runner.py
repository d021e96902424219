"""The runner: verifies each contestant, leaves the wrong ones out, and times the rest, interleaved in one process.

In every round the contestants run in another random order, so that whatever else the machine does meets all of them
alike. A slow contestant sits out rounds, evenly, to stay within its share of the case's time.
"""

import gc
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from moda_kernels.commands.bench import clock, memory, results
from moda_kernels.commands.bench.cases import Case
from moda_kernels.commands.bench.oracle import Verdict, verify
from moda_kernels.commands.bench.peers import Contestant, Peer, RefusedError
from moda_kernels.commands.bench.results import Record

#: Setups are timed this often at most, in this share of the time.
SETUP_SAMPLES, SETUP_SHARE = 5, 0.15
#: Everything is timed at least this often, whatever it takes.
FEWEST_SAMPLES = 3


@dataclass(frozen=True)
class Match:
    """A case and who takes part in it. memory: measure their peak memory too."""

    case: Case
    peers: tuple[Peer, ...]
    memory: bool = False


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        rounds: samples of a contestant at most. seconds: of timing per case, shared equally among the contestants.
        limit: seconds after which no other case is begun.
        seed: of the order.
        commit: of the code, where its folder doesn't know.
    """

    rounds: int = 30
    seconds: float = 5.0
    limit: float = float("inf")
    seed: int = 0
    commit: str | None = None


@dataclass
class _Entry:
    """One thing to time, a call or a setup: `most` samples at most, in about `budget` seconds.

    Attributes:
        take: takes one sample, the seconds of each part. samples: what has been taken.
        fault: why it was given up.
    """

    take: Callable[[], Sequence[float]]
    most: int
    budget: float
    samples: list[Sequence[float]] = field(default_factory=list)
    fault: str | None = None


def run(
    matches: Sequence[Match], options: Options, tell: Callable[[str], None] = lambda _: None
) -> Iterator[list[Record]]:
    """The records of each case, case by case."""
    environments: dict[str, Record] = {}
    begin = time.perf_counter()
    for number, match in enumerate(matches):
        if time.perf_counter() - begin > options.limit:
            tell(f"{len(matches) - number} of {len(matches)} cases are left out: {options.limit:.0f} s are over")
            return
        device = match.case.device
        if device not in environments:
            environments[device] = results.environment(device, options.commit)
        tell(f"[{time.perf_counter() - begin:.0f} s] {match.case}")
        yield run_case(match, options, environments[device], tell, number)


def run_case(
    match: Match,
    options: Options,
    environment: Record,
    tell: Callable[[str], None] = lambda _: None,
    number: int = 0,
) -> list[Record]:
    """One record per pass and contestant of a case, in the order of the peers. `number` is that of the case in its run:
    only records that share it were interleaved."""
    case = match.case
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    common = {
        "schema": results.SCHEMA,
        "device": case.device,
        "run": number,
        "workload": case.workload.describe() | {"seed": case.seed},
        "dtype": case.dtype_name,
        "query_heads": case.query_heads,
        "key_heads": case.key_heads,
        "head_dim": case.head_dim,
    }
    admitted: dict[str, Record] = {}
    ready: dict[str, Contestant] = {}
    for peer in match.peers:
        admitted[peer.name], contestant = _admit(peer, case)
        if contestant is not None:
            ready[peer.name] = contestant
        elif admitted[peer.name]["status"] != "absent":
            tell(f"  {peer.name} is left out ({admitted[peer.name]['status']}): {admitted[peer.name]['reason']}")
    timed = _time(ready, options)
    ready.clear()
    for name, (calls, _) in timed.items():
        if calls.fault is not None:
            admitted[name] |= {"status": "failed", "reason": calls.fault}
            tell(f"  {name} is left out (failed while it was timed): {calls.fault}")
    first = next((name for name in timed if admitted[name]["status"] == "ok"), None)
    peak_memory = {
        peer.name: memory.measure(peer, case)
        for peer in match.peers
        if match.memory and admitted[peer.name]["status"] in ("ok", "control")
        # On the CPU it is measured in a process of its own, which would compile all over again.
        if not (peer.compiles and case.device == "cpu")
    }
    last = {
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "load_at_start": load,
        "environment": environment,
    }
    right = [calls for name, (calls, _) in timed.items() if admitted[name]["status"] == "ok"]
    common["peaks"] = peaks = clock.peaks(case.device, case.dtype, _reached(case, right))
    records = []
    for measured in case.passes:
        reference = _seconds_of(timed[first][0], measured) if first else []
        for peer in match.peers:
            record = common | {"pass": measured} | admitted[peer.name]
            if record["status"] in ("ok", "control"):
                calls, setups = timed[peer.name]
                record |= _figures(case, measured, record, _seconds_of(calls, measured), reference, peaks)
                record["relative_to"] = first if record["status"] == "ok" else None
                setup = [sample[0] for sample in setups.samples] if setups else []
                record["setup"] = {"what": peer.prepares, "ms": results.spread(setup)} if setup else None
                record["memory"] = peak_memory.get(peer.name)
            records.append(record | last)
    return records


def _seconds_of(entry: _Entry, measured: str) -> list[float]:
    """A pass's seconds in each sample of a call."""
    if measured == "backward":
        return [sample[1] for sample in entry.samples]
    return [sum(sample) for sample in entry.samples]


def _figures(
    case: Case, measured: str, record: Record, seconds: list[float], reference: list[float], peaks: Mapping[str, float]
) -> Record:
    """What follows from a contestant's times, in one pass. Rates and ratios only where it does what was asked for."""
    ms = results.spread(seconds)
    figures: Record = {"ms": ms, "useful_gflops": None, "share_of_gemm": None, "relative_time": None}
    if record["status"] != "ok":
        return figures
    rates = _rates(case, measured, ms["median"])
    figures |= {
        "useful_gflops": 1e3 * rates["gemm_tflops"],
        "share_of_gemm": rates["gemm_tflops"] / peaks["gemm_tflops"],
        "relative_time": ms["median"] / results.spread(reference)["median"],
    }
    if measured == "decode":
        rate = rates["copy_gb_per_s"]
        figures |= {"cache_gb_per_s": rate, "share_of_copy": rate / peaks["copy_gb_per_s"]}
    return figures


def _rates(case: Case, measured: str, ms: float) -> dict[str, float]:
    """What a pass comes to, under the names of the peaks that it is held against."""
    rates = {"gemm_tflops": case.useful_flops(measured) / ms / 1e9}
    return rates | ({"copy_gb_per_s": case.cache_bytes / ms / 1e6} if measured == "decode" else {})


def _reached(case: Case, entries: Sequence[_Entry]) -> dict[str, float]:
    """The best of those rates over the contestants and passes of a case."""
    rates = [
        _rates(case, measured, results.spread(_seconds_of(entry, measured))["median"])
        for entry in entries
        for measured in case.passes
    ]
    return {name: max(r.get(name, 0.0) for r in rates) for name in {name for r in rates for name in r}}


def _admit(peer: Peer, case: Case) -> tuple[Record, Contestant | None]:
    """Its record so far, and the contestant if it may be timed."""
    record: Record = {"contestant": peer.name, "alignment": peer.alignment, "status": "ok", "reason": None}
    try:
        reason = peer.why_not(case)
        if reason is not None:
            return record | {"status": "absent", "reason": reason}, None
        contestant = Contestant(peer, case)
        wall = clock.clock_for(case.device).wall
        record["first_setup_ms"] = wall(contestant.setup) * 1e3
        outcome: list[tuple[torch.Tensor, ...]] = []
        record["first_call_ms"] = wall(lambda: outcome.append(contestant.call())) * 1e3
        if not peer.answers(case):
            return record | {"status": "control", "reason": "computes something else: neither checked nor compared"}, (
                contestant
            )
        verdict = verify(contestant, outcome[0])
    except RefusedError as error:
        return record | {"status": "absent", "reason": str(error)}, None
    except Exception as error:  # whatever a contestant raises is its own fault, and no reason to stop the others
        return record | {"status": "failed", "reason": _fault(error)}, None
    record["verified"] = _written(verdict)
    if not verdict.good:
        return record | {"status": "wrong", "reason": verdict.reason}, None
    return record, contestant


def _fault(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]


def _written(verdict: Verdict) -> Record:
    tensors = {c.name: {"error": c.error, "allowed": c.allowed} for c in verdict.comparisons}
    return {"good": verdict.good, "rows": verdict.rows, "tensors": tensors}


def _time(ready: dict[str, Contestant], options: Options) -> dict[str, tuple[_Entry, _Entry | None]]:
    """The timed calls and setups of every contestant."""
    call_budget = options.seconds * (1 - SETUP_SHARE) / max(len(ready), 1)
    setup_budget = options.seconds * SETUP_SHARE / max(len(ready), 1)
    calls, setups = {}, {}
    for name, contestant in ready.items():
        timer = clock.clock_for(contestant.case.device)
        calls[name] = _Entry(lambda c=contestant, t=timer: t.spans(c.call), options.rounds, call_budget)  # type: ignore[misc]
        if contestant.peer.prepares:
            setups[name] = _Entry(
                lambda c=contestant, t=timer: [t.wall(c.setup_again)],  # type: ignore[misc]
                min(SETUP_SAMPLES, options.rounds),
                setup_budget,
            )
    gc.collect()
    gc.disable()
    try:
        _rounds([*calls.values(), *setups.values()], random.Random(options.seed))
    finally:
        gc.enable()
    return {name: (entry, setups.get(name)) for name, entry in calls.items()}


def _rounds(entries: list[_Entry], order: random.Random) -> None:
    """Interleaved samples, after a warm-up that tells how many fit into each entry's budget."""
    planned = []
    for entry in entries:
        begin = time.perf_counter()
        _take(entry)
        entry.samples.clear()
        fitting = int(entry.budget / max(time.perf_counter() - begin, 1e-9))
        planned.append(min(entry.most, max(fitting, FEWEST_SAMPLES)))
    rounds = max(planned, default=0)
    for r in range(rounds):
        taking_part = [e for e, n in zip(entries, planned, strict=True) if (r + 1) * n // rounds > r * n // rounds]
        order.shuffle(taking_part)
        for entry in taking_part:
            _take(entry)


def _take(entry: _Entry) -> None:
    """One sample; an entry that raises is given up."""
    if entry.fault is None:
        try:
            entry.samples.append(entry.take())
        except Exception as error:  # recorded: the others go on
            entry.fault = _fault(error)
