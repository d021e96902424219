"""The README's table of CPU results, made from result files only: ``python -m benchmarks.readme`` writes it.

A test fails where the README and the result files disagree.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.results import ROOT, Record

RESULTS = ROOT / "benchmarks" / "results" / "attention-cpu.jsonl"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
#: Columns: what stands against ours, and what the README calls it.
PEERS = {"sdpa-bool": "SDPA, bool mask", "sdpa-additive": "SDPA, float mask", "flex": "FlexAttention"}
OURS, CONTROL = "moda-cpu", "sdpa-causal"
PASSES = {"forward": "fwd", "forward+backward": "fwd+bwd"}

Key = tuple[str, int, str, str]


def read(path: Path = RESULTS) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def render(records: Iterable[Record]) -> str:
    """Markdown: one row per case, times divided by ours (more than 1: ours is faster)."""
    cases: dict[Key, dict[str, Record]] = {}
    machines = set()
    for record in records:
        w = record["workload"]
        key = (w["name"], w["length"], record["dtype"], record["pass"])
        cases.setdefault(key, {})[record["contestant"]] = record
        e = record["environment"]
        machines.add(
            f"{e['cpu']} ({e['cpu_capability']}), {e['threads']} threads on {e['cores']} cores, torch {e['torch']}, "
            f"Python {e['python']}, {e['date'][:10]}"
        )
    shape = next(iter(next(iter(cases.values())).values()))
    head = [
        "layout",
        "L",
        "dtype",
        "pass",
        "ours, ms (p10–p90)",
        *PEERS.values(),
        "SDPA, causal",
        "peak MiB, ours / bool",
    ]
    rows = [head, ["---", "--:", "---", "---", *["--:"] * (len(head) - 4)]]
    rows += [_row(key, case) for key, case in cases.items() if "ms" in case.get(OURS, {})]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    note = (
        f"{shape['query_heads']} query and {shape['key_heads']} key heads, D = {shape['head_dim']}; median times of "
        "the others divided by ours, so more than 1 means that ours is faster. SDPA's causal column is given where "
        "the mask is causal. Masks, layouts and plans are made outside the timing. FlexAttention has no CPU backward."
    )
    return "\n".join([note, "", *lines, "", f"Machine: {'; '.join(sorted(machines))}."])


def _row(key: Key, case: dict[str, Record]) -> list[str]:
    name, length, dtype, measured = key
    ours = case[OURS]
    ms = ours["ms"]

    def ratio(peer: str) -> str:
        record = case.get(peer, {})
        comparable = "ms" in record and record["status"] != "control"
        return f"{record['ms']['median'] / ms['median']:.2f}×" if comparable else ""

    def peak(peer: str) -> float | None:
        return (case.get(peer, {}).get("memory") or {}).get("call_peak")

    memory = ""
    if peak(OURS) and peak("sdpa-bool"):
        memory = f"{peak(OURS) / 2**20:.0f} / {peak('sdpa-bool') / 2**20:.0f}"
    times = "{} ({}–{})".format(*(_ms(ms[which]) for which in ("median", "p10", "p90")))
    return [name, f"{length}", dtype, PASSES[measured], times, *map(ratio, PEERS), ratio(CONTROL), memory]


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def updated(readme: str, table: str) -> str:
    """The README with the table between its markers."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> int:
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text(encoding="utf-8"), render(read())), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
