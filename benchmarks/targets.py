"""What the Triton kernels are meant to reach on an H100 or H200, against a result file: met, or how far off.

    python -m benchmarks.targets FILE

Ratios of times are a peer's over ours, in one process, interleaved; 32 query and 8 key heads of 128, bfloat16.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moda_kernels.commands.bench import results
from moda_kernels.commands.bench.results import Record

OURS = "moda-triton"
MODALITY_LAYOUTS = ("llava-next", "qwen2-vl-8")
#: Against (peer, ours beside it), on layouts, by pass: what plain Triton should reach, and what is aimed at.
RATIOS = (
    ("sdpa-cudnn", "", ("causal",), {"forward": (0.55, 0.95), "backward": (0.5, 0.9)}),
    ("sdpa-flash", "", ("causal",), {"forward": (1.05, 1.7), "backward": (0.95, 1.5)}),
    ("sdpa-bool", "", MODALITY_LAYOUTS, {"forward": (5, 9), "backward": (4.5, 9)}),
    ("flex", "", MODALITY_LAYOUTS, {"forward": (1.1, 1.5), "backward": (1.3, 1.9)}),
    ("flex-build", "-build", MODALITY_LAYOUTS, {"forward": (1.5, 3), "backward": (1.5, 3)}),
    ("eager-moda", "-aligned", ("llava-next",), {"forward": (8, 17), "forward+backward": (5, 8)}),
)
#: Own modality mask over own causal mask, in visible FLOP/s.
MASK_SHARE = (0.85, 0.95)
LISTS_MS, ALIGNMENT_SHARE, DECODE_SHARE, MEMORY_RATIO = 0.05, 0.06, 0.75, 1.05
DECODE_BYTES = 128e6
#: Shorter sequences have no targets.
SHORTEST = 8192


@dataclass(frozen=True)
class Target:
    """One figure: what it is of, what it is, and what it should be (at least, or where `most` at most)."""

    name: str
    value: float
    plain: float
    aim: float | None = None
    most: bool = False

    @property
    def met(self) -> bool:
        return self.value <= self.plain if self.most else self.value >= self.plain

    def __str__(self) -> str:
        sign = "<=" if self.most else ">="
        aim = "" if self.aim is None else f", aim {self.aim:g}"
        verdict = "met  " if self.met else "SHORT"
        return f"{verdict} {self.name}: {self.value:.3g} ({sign} {self.plain:g}{aim})"


def targets(records: Sequence[Record], ours: str = OURS, shortest: int = SHORTEST) -> Iterator[Target]:
    """Those that the records have figures for."""
    found: dict[tuple[str, int, str, str], Record] = {}
    together: dict[tuple[str, int, str, int | None], dict[str, float]] = {}
    for r in records:
        if "ms" in r and r["status"] == "ok" and r["workload"]["length"] >= shortest:
            case = (r["workload"]["name"], r["workload"]["length"], r["pass"])
            found.setdefault((*case, r["contestant"]), r)
            together.setdefault((*case, r["run"]), {})[r["contestant"]] = float(r["ms"]["median"])
    lengths = sorted({length for _, length, _, _ in found})
    for peer, suffix, layouts, wanted in RATIOS:
        for (layout, length, measured, _), ms in together.items():
            # Only what was interleaved is set side by side.
            if layout in layouts and measured in wanted and peer in ms and ours + suffix in ms:
                ratio = ms[peer] / ms[ours + suffix]
                yield Target(f"{peer} / ours, {layout} {length} {measured}", ratio, *wanted[measured])
    for layout in MODALITY_LAYOUTS:
        for length in lengths:
            for measured in ("forward", "backward"):
                masked, causal = (found.get((n, length, measured, ours)) for n in (layout, "causal"))
                if masked and causal:
                    share = masked["useful_gflops"] / causal["useful_gflops"]
                    yield Target(f"visible FLOP/s, {layout} / causal, {length} {measured}", share, *MASK_SHARE)
    yield from _around(found, ours)


def _around(found: dict[tuple[str, int, str, str], Record], ours: str) -> Iterator[Target]:
    """Of layouts, alignment, decoding and memory."""
    for (layout, length, measured, contestant), r in found.items():
        where = f"{layout} {length}"
        if measured == "segmentation + tiles" and length == 32768:
            how = "graph" if r["graph"] else "NOT in a graph"
            yield Target(f"segmentation + tiles, ms ({how}), {where}", r["ms"]["median"], LISTS_MS, most=True)
        if measured == "alignment (sequence)" and length == 8192:
            forward = found.get((layout, length, "forward", ours))
            if forward:
                share = r["ms"]["median"] / forward["ms"]["median"]
                yield Target(f"alignment / forward, {where}", share, ALIGNMENT_SHARE, most=True)
        if measured == "decode" and contestant == ours:
            cached = r["cache_gb_per_s"] * r["ms"]["median"] * 1e6
            if cached >= DECODE_BYTES:
                yield Target(f"decode, share of copy bandwidth, {where}", r["share_of_copy"], DECODE_SHARE)
        if contestant == ours and layout == "causal" and measured in ("forward", "backward"):
            flash = found.get((layout, length, measured, "sdpa-flash"))
            own, theirs = ((x or {}).get("memory") or {} for x in (r, flash))
            if own.get("call_peak") and theirs.get("call_peak"):
                ratio = (own["call_peak"] - own["setup_held"]) / theirs["call_peak"]
                yield Target(f"peak memory without layout / flash, {where} {measured}", ratio, MEMORY_RATIO, most=True)


def main(arguments: Sequence[str]) -> int:
    (path,) = arguments
    for target in targets(results.read(Path(path))):
        print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
