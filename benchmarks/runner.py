"""The runner: verifies each contestant, leaves the wrong ones out, and times the rest, interleaved in one process.

In every round the contestants run in another random order, so that whatever else the machine does meets all of them
alike. A slow contestant sits out rounds, evenly, to stay within its share of the case's time.
"""

import gc
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from benchmarks import memory, results
from benchmarks.cases import PASSES, Case
from benchmarks.layouts import LAYOUTS
from benchmarks.peers import PEERS, Contestant, Peer
from benchmarks.results import Record
from benchmarks.verify import Verdict, verify

#: Setups are timed this often at most, in this share of the time.
SETUP_SAMPLES, SETUP_SHARE = 5, 0.15
#: Everything is timed at least this often, whatever it takes.
FEWEST_SAMPLES = 3


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        rounds: samples of a contestant at most. seconds: of timing per case, shared equally among the contestants.
        memory: measure peak memory too.
    """

    layouts: tuple[str, ...] = tuple(LAYOUTS)
    lengths: tuple[int, ...] = (1024, 4096, 8192, 16384)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    passes: tuple[str, ...] = PASSES
    peers: tuple[Peer, ...] = field(default_factory=lambda: tuple(PEERS.values()))
    query_heads: int = 8
    key_heads: int = 2
    head_dim: int = 64
    rounds: int = 30
    seconds: float = 30.0
    memory: bool = True
    seed: int = 0

    def cases(self) -> Iterator[Case]:
        """Every combination. Cases of one length follow one another, so that code compiled for it is used again."""
        for length in self.lengths:
            for dtype in self.dtypes:
                for layout in self.layouts:
                    for measured in self.passes:
                        yield Case(
                            layout=layout,
                            length=length,
                            dtype=dtype,
                            backward=measured == PASSES[1],
                            query_heads=self.query_heads,
                            key_heads=self.key_heads,
                            head_dim=self.head_dim,
                            seed=self.seed,
                        )


@dataclass
class _Entry:
    """One thing to time, a call or a setup: `most` samples at most, in about `budget` seconds."""

    work: Callable[[], object]
    most: int
    budget: float
    seconds: list[float] = field(default_factory=list)


def run(options: Options, tell: Callable[[str], None] = lambda _: None) -> Iterator[list[Record]]:
    """The records of each case, case by case."""
    environment = results.environment()
    for case in options.cases():
        tell(str(case))
        yield run_case(case, options, environment, tell)


def run_case(
    case: Case, options: Options, environment: Record, tell: Callable[[str], None] = lambda _: None
) -> list[Record]:
    """One record per contestant of a case, in the order of ``options.peers``."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    common = {
        "schema": results.SCHEMA,
        "workload": case.workload.describe() | {"seed": case.seed},
        "dtype": case.dtype_name,
        "pass": case.measured,
        "query_heads": case.query_heads,
        "key_heads": case.key_heads,
        "head_dim": case.head_dim,
    }
    records, ready = {}, {}
    for peer in options.peers:
        record, contestant = _admit(peer, case)
        records[peer.name] = common | record
        if contestant is not None:
            ready[peer.name] = contestant
        elif record["status"] != "absent":
            tell(f"  {peer.name} is left out ({record['status']}): {record['reason']}")
    timed = _time(ready, options)
    ready.clear()
    first = next((name for name in timed if records[name]["status"] == "ok"), None)
    for peer in options.peers:
        if peer.name not in timed:
            continue
        calls, setups = timed[peer.name]
        exact = records[peer.name]["status"] == "ok"
        ms = results.spread(calls)
        records[peer.name] |= {
            "ms": ms,
            "useful_gflops": case.useful_flops / ms["median"] / 1e6 if exact else None,
            "relative_to": first if exact else None,
            "relative_time": ms["median"] / results.spread(timed[first][0])["median"] if exact and first else None,
            "setup": {"what": peer.prepares, "ms": results.spread(setups)} if setups else None,
            "memory": memory.measure(peer, case) if options.memory else None,
        }
    last = {
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "load_at_start": load,
        "environment": environment,
    }
    return [record | last for record in records.values()]


def _admit(peer: Peer, case: Case) -> tuple[Record, Contestant | None]:
    """Its record so far, and the contestant if it may be timed."""
    record: Record = {"contestant": peer.name, "alignment": peer.alignment, "status": "ok", "reason": None}
    reason = peer.why_not(case)
    if reason is not None:
        return record | {"status": "absent", "reason": reason}, None
    try:
        contestant = Contestant(peer, case)
        record["first_setup_ms"] = _seconds(contestant.setup) * 1e3
        outcome: list[tuple[torch.Tensor, ...]] = []
        record["first_call_ms"] = _seconds(lambda: outcome.append(contestant.call())) * 1e3
        if not peer.answers(case):
            return record | {"status": "control", "reason": "computes something else: neither checked nor compared"}, (
                contestant
            )
        verdict = verify(contestant, outcome[0])
    except Exception as error:  # whatever a contestant raises is its own fault, and no reason to stop the others
        first_line = str(error).strip().split("\n")[0]
        return record | {"status": "failed", "reason": f"{type(error).__name__}: {first_line}"}, None
    record["verified"] = _written(verdict)
    if not verdict.good:
        return record | {"status": "wrong", "reason": verdict.reason}, None
    return record, contestant


def _written(verdict: Verdict) -> Record:
    tensors = {c.name: {"error": c.error, "allowed": c.allowed} for c in verdict.comparisons}
    return {"good": verdict.good, "rows": verdict.rows, "tensors": tensors}


def _time(ready: dict[str, Contestant], options: Options) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of the calls and of the setups of every contestant."""
    call_budget = options.seconds * (1 - SETUP_SHARE) / max(len(ready), 1)
    setup_budget = options.seconds * SETUP_SHARE / max(len(ready), 1)
    calls = {name: _Entry(c.call, options.rounds, call_budget) for name, c in ready.items()}
    most = min(SETUP_SAMPLES, options.rounds)
    setups = {name: _Entry(c.setup, most, setup_budget) for name, c in ready.items() if c.peer.prepares}
    gc.collect()
    gc.disable()
    try:
        _rounds([*calls.values(), *setups.values()], random.Random(options.seed))
    finally:
        gc.enable()
    return {name: (entry.seconds, setups[name].seconds if name in setups else []) for name, entry in calls.items()}


def _rounds(entries: list[_Entry], order: random.Random) -> None:
    """Interleaved samples, after a warm-up that tells how many fit into each entry's budget."""
    samples = []
    for entry in entries:
        fitting = int(entry.budget / max(_seconds(entry.work), 1e-9))
        samples.append(min(entry.most, max(fitting, FEWEST_SAMPLES)))
    rounds = max(samples, default=0)
    for r in range(rounds):
        taking_part = [e for e, n in zip(entries, samples, strict=True) if (r + 1) * n // rounds > r * n // rounds]
        order.shuffle(taking_part)
        for entry in taking_part:
            entry.seconds.append(_seconds(entry.work))


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def show(cases: Iterable[list[Record]]) -> Iterator[list[Record]]:
    """Print each case's table as it comes."""
    for records in cases:
        print(results.table(records), end="\n\n", flush=True)
        yield records
    print(results.LEGEND, flush=True)
