"""The tables of results in docs/performance.md, and the few rows in the README, made from result files only:
`python -m benchmarks.readme` writes them.

One table for each CPU and GPU model that there are results of; the README has rows of the first, which is the newest. A
test fails where a page and the result files disagree.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from moda_kernels.commands.bench import pieces, results
from moda_kernels.commands.bench.results import Record

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "performance.md"
#: Rows of the README: layout, length, dtype, pass, the peer, and what the layout is to somebody who doesn't know it.
HIGHLIGHTS = (
    ("llava-next", 8192, "float32", "forward+backward", "sdpa-bool", "a page of images and text, images whole"),
    ("packed", 8192, "float32", "forward", "sdpa-bool", "many short documents in one row"),
    ("llava-next", 4096, "float32", "forward", "eager-moda", "the same page, keys aligned"),
    ("causal", 8192, "float32", "forward", "sdpa", "plain causal attention"),
    ("causal", 16384, "float32", "decode", "sdpa-bool", "one new token beside a long cache"),
)
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
OURS = {"cpu": "moda-cpu", "cuda": "moda-triton"}
#: Columns: what stands against ours, and what the README calls it. Left out where nothing in the file has it.
PEERS = {
    "sdpa-bool": "SDPA, bool mask",
    "sdpa-additive": "SDPA, float mask",
    "flex": "FlexAttention, its own mask",
    "flex-ours": "FlexAttention, our mask",
    "flex-build": "FlexAttention + its mask build",
    "flex-ours-build": "FlexAttention + our mask build",
    "eager-moda": "eager MODA",
    "eager-moda-compiled": "eager MODA, compiled",
    "sdpa-causal": "SDPA, causal",  # the name of schema 1
    "sdpa": "SDPA, no mask",
    "sdpa-flash": "SDPA flash",
    "sdpa-cudnn": "SDPA cuDNN",
    "flash-attention-2": "FlashAttention-2",
    "flash-attention-3": "FlashAttention-3",
    "flash-attention-4": "FlashAttention-4",
}
#: Where peers do what others of ours do: align keys, or make the layout in the call.
AGAINST = {
    "eager-moda": "-aligned",
    "eager-moda-compiled": "-aligned",
    "flex-build": "-build",
    "flex-ours-build": "-build",
}
PASSES = {"forward": "fwd", "backward": "bwd", "forward+backward": "fwd+bwd", "decode": "decode"}
#: On the CPU the backward alone stays in the result file: the table is long enough.
LEFT_OUT = {"cpu": ("backward",), "cuda": ()}
NO_GPU = "GPU figures are not measured yet."

#: Layout, length, dtype, pass, and the number of the case in its run: only what was interleaved is set side by side.
Key = tuple[str, int, str, str, int | None]


def read(folder: Path = RESULTS) -> dict[Path, list[Record]]:
    """The records of each file of attention results, those of the newest code on a CPU first."""
    files = sorted(folder.glob("attention-*.jsonl"), key=lambda path: (path.stem != "attention-cpu", path.stem))
    return {path: results.read(path) for path in files}


def render(files: Mapping[Path, Sequence[Record]]) -> str:
    """Markdown: a section per file, one row per case, times divided by ours (more than 1: ours is faster)."""
    parts, on_gpu = [], False
    for path, records in files.items():
        device = records[0]["device"]
        on_gpu = on_gpu or device == "cuda"
        name = records[0]["environment"]["device"]
        parts.append(f"**{name}**\n\n{_section(records, device)}")
        picture = path.with_suffix(".png")
        if picture.exists():
            parts.append(f"![Useful GFLOP/s on {name}](../{picture.relative_to(ROOT)})")
    if not on_gpu:
        parts.append(NO_GPU)
    return "\n\n".join(parts)


def _section(records: Sequence[Record], device: str) -> str:
    attention = [r for r in records if r["pass"] in PASSES and r["pass"] not in LEFT_OUT[device]]
    cases: dict[Key, dict[str, Record]] = {}
    for record in attention:
        w = record["workload"]
        key = (w["name"], w["length"], record["dtype"], record["pass"], record["run"])
        cases.setdefault(key, {})[record["contestant"]] = record
    ours = OURS[device]
    shown = {key: case for key, case in cases.items() if "ms" in case.get(ours, {})}
    if not shown:
        return f"`{ours}` has no result in this file."
    # Aligned keys and layouts made in the call are in the table as what their peers are set against.
    columns = [peer for peer in PEERS if any(_ratio(case, peer, ours) for case in shown.values())]
    memory = any(_peak(case, ours) for case in shown.values())
    head = ["layout", "L", "dtype", "pass", "ours, ms (p10–p90)"]
    head += ["of GEMM peak"] * any("share_of_gemm" in case[ours] for case in shown.values())
    head += [PEERS[peer] for peer in columns] + ["peak MiB, ours / bool"] * memory
    rows = [head, ["---", "--:", "---", "---", *["--:"] * (len(head) - 4)]]
    for key, case in shown.items():
        row = _start(key, case[ours])
        if "of GEMM peak" in head:
            share = case[ours].get("share_of_gemm")
            row.append("" if share is None else f"{share:.0%}")
        row += [_ratio(case, peer, ours) for peer in columns]
        rows.append(row + [_memory(case, ours)] * memory)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    parts = [_note(attention[0], columns), "\n".join(lines), _pieces(records), _machines(records)]
    return "\n\n".join(part for part in parts if part)


def _note(shape: Record, columns: Sequence[str]) -> str:
    note = (
        f"{shape['query_heads']} query and {shape['key_heads']} key heads, D = {shape['head_dim']}; median times of "
        "the others divided by ours, so more than 1 means that ours is faster. Masks, layouts and plans are made "
        "outside the timing"
    )
    if "flex-build" in columns:
        note += (
            ", except where FlexAttention builds its mask in each call, against ours with its layout made in each call"
        )
    note += "."
    if "eager-moda" in columns:
        note += " Eager MODA aligns keys; it stands against ours with alignment."
    if shape["device"] == "cpu":
        note += " FlexAttention has no CPU backward."
    return note


def _start(key: Key, ours: Record) -> list[str]:
    name, length, dtype, measured, _ = key
    times = "{} ({}–{})".format(*(_ms(ours["ms"][which]) for which in ("median", "p10", "p90")))
    return [name, f"{length}", dtype, PASSES[measured], times]


def _ratio(case: dict[str, Record], peer: str, ours: str) -> str:
    """A peer's time over ours, where both are right."""
    own, record = case.get(ours + AGAINST.get(peer, ""), {}), case.get(peer, {})
    if "ms" not in own or "ms" not in record or record["status"] == "control":
        return ""
    return f"{record['ms']['median'] / own['ms']['median']:.2f}×"


def _peak(case: dict[str, Record], name: str) -> float | None:
    return (case.get(name, {}).get("memory") or {}).get("call_peak")


def _memory(case: dict[str, Record], ours: str) -> str:
    own, dense = _peak(case, ours), _peak(case, "sdpa-bool")
    return f"{own / 2**20:.0f} / {dense / 2**20:.0f}" if own and dense else ""


def _pieces(records: Sequence[Record]) -> str:
    """The parts around attention, if they were measured."""
    found = [r for r in records if r["pass"] in pieces.PIECES and "ms" in r]
    if not found:
        return ""
    cases: dict[tuple[str, int, str], dict[str, Record]] = {}
    for r in found:
        cases.setdefault((r["workload"]["name"], r["workload"]["length"], r["dtype"]), {})[r["pass"]] = r
    names = [piece for piece in pieces.PIECES if any(piece in case for case in cases.values())]
    rows = [
        ["layout", "L", "dtype", *(f"{piece}, ms" for piece in names)],
        ["---", "--:", "---", *["--:"] * len(names)],
    ]
    for (layout, length, dtype), case in cases.items():
        times = [_ms(case[p]["ms"]["median"]) if p in case else "" for p in names]
        rows.append([layout, f"{length}", dtype, *times])
    return "The parts around attention:\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _machines(records: Sequence[Record]) -> str:
    machines = {}
    for record in records:
        e = record["environment"]
        if record["device"] == "cuda":
            said = f"{e['device']}, {e['driver']}, CUDA {e['cuda']}, torch {e['torch']}, Triton {e['triton']}"
        else:
            said = (
                f"{e['cpu']} ({e['cpu_capability']}), {e['threads']} threads on {e['cores']} cores, torch {e['torch']}"
            )
        best = record.get("peaks")
        if best:
            said += (
                f" (matrix product in {record['dtype']} {best['gemm_tflops']:.3g} TFLOP/s, "
                f"copy {best['copy_gb_per_s']:.3g} GB/s)"
            )
        elif record["pass"] in pieces.PIECES:
            continue
        of = f", commit {e['commit'][:7]}" if e["commit"] else ""
        machines[f"{said}, Python {e['python']}, {e['date'][:10]}{of}"] = None
    return f"Machine: {'; '.join(sorted(machines))}."


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def highlights(files: Mapping[Path, Sequence[Record]]) -> str:
    """Markdown: a few rows of the first CPU's results, where ours is slower among them."""
    records = next((records for records in files.values() if records[0]["device"] == "cpu"), [])
    rows = [["sequence", "tokens", "pass", "against", "factor"], ["---", "--:", "---", "---", "--:"]]
    shown = []
    for layout, length, dtype, measured, peer, said in HIGHLIGHTS:
        cases: dict[int | None, dict[str, Record]] = {}
        for r in records:
            if (r["workload"]["name"], r["workload"]["length"], r["dtype"], r["pass"]) == (
                layout,
                length,
                dtype,
                measured,
            ):
                cases.setdefault(r["run"], {})[r["contestant"]] = r
        ratio = next((found for case in cases.values() if (found := _ratio(case, peer, OURS["cpu"]))), "")
        if ratio:
            rows.append([said, f"{length:,}", PASSES[measured], PEERS[peer], ratio])
            shown += [r for case in cases.values() for r in case.values()]
    if not shown:
        return "Not measured yet."
    shape = shown[0]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    heads = f"{shape['query_heads']} query and {shape['key_heads']} key heads of {shape['head_dim']}, {shape['dtype']}"
    return f"{table}\n\n{heads}. {_machines(shown)}"


def updated(text: str, table: str) -> str:
    """A page with the table between its markers."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def pages() -> dict[Path, str]:
    """What the pages with results have to say."""
    files = read()
    made = {PAGE: render(files), README: highlights(files)}
    return {path: updated(path.read_text(encoding="utf-8"), table) for path, table in made.items()}


def main() -> int:
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
