"""Tables for people: of one case while it runs, of a whole result file, and of two result files side by side."""

from collections.abc import Sequence

from moda_kernels.commands.bench import results
from moda_kernels.commands.bench.results import Record

#: Printed once, below the tables.
LEGEND = """\
x time: median time divided by that of the first contestant of the table. GFLOP/s: useful ones, visible pairs only;
% GEMM: of the rate of a large matrix product in this dtype, measured in this run; % copy: of a large copy's bandwidth.
Above 100, the peak was measured a second time and is still lower: the machine is busy with other things, or a cache
holds what the copy does not. setup: layout, plan or mask, made
once for all layers, not part of ms. peak: memory of setup and call above the inputs. A control computes something
else: it is not checked, and has no ratio. All others were checked against float64 first: every query row up to 1,024
tokens, of longer sequences rows at segment boundaries and rows anywhere, with the gradients that they cause."""
#: Names of passes where space is short.
SHORT = {"forward": "fwd", "backward": "bwd", "forward+backward": "fwd+bwd", "decode": "decode"}
#: Two medians closer than this are the same.
NOISE = 0.03


def case_tables(records: Sequence[Record]) -> str:
    """One case as plain text, a table per pass."""
    passes = list(dict.fromkeys(record["pass"] for record in records))
    return "\n\n".join(_table([r for r in records if r["pass"] == measured]) for measured in passes)


def piece_table(records: Sequence[Record]) -> str:
    """The pieces of one case as plain text."""
    first = records[0]
    rows = [("piece", "ms", "p10", "p90", "")]
    for record in records:
        if "ms" in record:
            note = "captured graph" if record["graph"] else record["reason"] or ""
            rows.append((record["pass"], *_times(record), note))
        else:
            rows.append((record["pass"], "", "", "", f"{record['status']}: {record['reason']}"))
    workload = first["workload"]
    title = (
        f"{workload['name']}, L = {workload['length']}, {first['dtype']} ({first['key_heads']} key heads, "
        f"D = {first['head_dim']})"
    )
    return "\n".join([title, *aligned(rows)])


def _table(records: Sequence[Record]) -> str:
    first = records[0]
    workload = first["workload"]
    tiles = workload.get("tiles")
    partial = f", {tiles['partial_share']:.1%} of tiles partial" if tiles else ""
    title = (
        f"{workload['name']}, L = {workload['length']}, {first['dtype']}, {first['pass']} "
        f"({workload['documents']} documents, {workload['segments']} segments, {workload['images']} images, "
        f"density {workload['density']:.3f}{partial}; "
        f"heads {first['query_heads']}/{first['key_heads']}, D = {first['head_dim']})"
    )
    decode = first["pass"] == "decode"
    rates = ("cache GB/s", "% copy") if decode else ("GFLOP/s", "% GEMM")
    rows: list[tuple[str, ...]] = [("contestant", "ms", "p10", "p90", "x time", *rates, "setup ms", "peak MiB", "")]
    # Who is absent is told once, below all tables (`missing`).
    rows += [_row(record, decode) for record in records if record["status"] != "absent"]
    return "\n".join([title, *aligned(rows)])


def _row(record: Record, decode: bool) -> tuple[str, ...]:
    name = record["contestant"]
    if "ms" not in record:
        return (name, *[""] * 8, f"{record['status']}: {record['reason']}")
    memory, setup = record["memory"] or {}, record["setup"]
    rate, share = (record.get(n) for n in (("cache_gb_per_s", "share_of_copy") if decode else _RATES))
    return (
        name,
        *_times(record),
        "" if record["relative_time"] is None else f"{record['relative_time']:.2f}",
        "" if rate is None else f"{rate:.1f}",
        "" if share is None else f"{100 * share:.0f}",
        "" if setup is None else f"{setup['ms']['median']:.4g}",
        f"{memory['call_peak'] / 2**20:.1f}" if "call_peak" in memory else "",
        "control" if record["status"] == "control" else memory.get("error", ""),
    )


_UNITS = {"cache_gb_per_s": "B/s", "useful_gflops": "FLOP/s"}
_RATES = ("useful_gflops", "share_of_gemm")


def _times(record: Record) -> tuple[str, str, str]:
    ms = record["ms"]
    return f"{ms['median']:.4g}", f"{ms['p10']:.4g}", f"{ms['p90']:.4g}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width: the first to the left, the last as it comes, the rest to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = []
    for first, *middle, last in rows:
        columns = [cell.rjust(width) for cell, width in zip(middle, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *columns, last]).rstrip())
    return lines


def missing(records: Sequence[Record]) -> list[str]:
    """Which contestants never ran, each with all its reasons."""
    reasons: dict[str, dict[str, None]] = {}
    ran = {r["contestant"] for r in records if "ms" in r}
    for record in records:
        if record["contestant"] not in ran:
            status = "" if record["status"] == "absent" else f"{record['status']}: "
            reasons.setdefault(record["contestant"], {})[f"{status}{record['reason']}"] = None
    return [f"{name}: {'; '.join(found)}" for name, found in reasons.items()]


def peaks(records: Sequence[Record]) -> list[str]:
    """What the machine did at best, one line a dtype."""
    found = {
        (r["environment"]["device"], r["dtype"]): r["peaks"] for r in records if r.get("peaks") and "environment" in r
    }
    return [
        f"{device}, {dtype}: matrix product {p['gemm_tflops']:.4g} TFLOP/s, copy {p['copy_gb_per_s']:.4g} GB/s"
        for (device, dtype), p in found.items()
    ]


def comparison(old: Sequence[Record], new: Sequence[Record]) -> str:
    """What became faster and slower between two runs: the cases that both have, one line each."""
    before = {results.key(r): r for r in old if "ms" in r}
    after = {results.key(r): r for r in new if "ms" in r}
    common = [k for k in after if k in before]
    lines = []
    for name in ("device", "torch", "triton", "threads"):
        was, now = ({str(r["environment"].get(name)) for r in records} for records in (old, new))
        if was != now:
            lines.append(f"Not like with like: {name} was {', '.join(sorted(was))}, is {', '.join(sorted(now))}.")
    if not common:
        return "\n".join([*lines, "The two have no measurement in common."])
    rows = [("contestant, case", "old ms", "new ms", "new/old", "")]
    for k in common:
        a, b = before[k]["ms"], after[k]["ms"]
        ratio = b["median"] / a["median"]
        apart = b["p10"] > a["p90"] or b["p90"] < a["p10"]  # else within what one run already scatters
        verdict = "" if not apart or abs(ratio - 1) < NOISE else "SLOWER" if ratio > 1 else "faster"
        layout, length, dtype, measured, *_, contestant = k
        name = f"{contestant}, {layout} {length} {dtype} {SHORT.get(measured, measured)}"
        rows.append((name, f"{a['median']:.4g}", f"{b['median']:.4g}", f"{ratio:.2f}", verdict))
    gone = len(before) - len(common)
    more = len(after) - len(common)
    lines += [*aligned(rows), f"{len(common)} compared; {gone} only in the old, {more} only in the new."]
    return "\n".join(lines)


def overview(records: Sequence[Record]) -> list[str]:
    """A result file in few characters: a line per case and pass with the milliseconds and the useful rate of the first
    contestant (decoding: bytes of the cache), and the times of the others divided by its."""
    cases: dict[tuple[str, int, str, str, int], list[Record]] = {}
    lines = []
    for r in records:
        if "ms" in r and r["status"] == "ok":
            w = r["workload"]
            if "relative_time" in r:
                cases.setdefault((w["name"], w["length"], r["dtype"], r["pass"], r["run"]), []).append(r)
            else:
                graph = " in a graph" if r["graph"] else ""
                lines.append(f"{w['name']} {w['length']} {r['pass']}: {r['ms']['median']:.3g} ms{graph}")
    for (name, length, dtype, measured, _), found in cases.items():
        first, *others = found
        rate = "cache_gb_per_s" if measured == "decode" else "useful_gflops"
        family = first["contestant"] + "-"
        times = [
            f"{r['contestant'].replace(family, '+')} {r['ms']['median'] / first['ms']['median']:.2f}" for r in others
        ]
        amount, prefix = (first[rate] / 1e3, "T") if first[rate] >= 1e4 else (first[rate], "G")
        own = f"{first['contestant']} {first['ms']['median']:.3g} ms, {amount:.3g} {prefix}{_UNITS[rate]}"
        lines.append(f"{name} {length} {dtype} {SHORT[measured]}: {'; '.join([own, *times])}")
    return lines
