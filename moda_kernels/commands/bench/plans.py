"""Which cases are run: one plan for a taste, one for a CPU, one for a GPU, or every combination of what is asked for.

A plan is in the order of importance: a run that has to stop early has the main table.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from moda_kernels.commands.bench.cases import Case
from moda_kernels.commands.bench.peers import PEERS, Peer
from moda_kernels.commands.bench.runner import Match

CPU_SHAPE: dict[str, Any] = {"query_heads": 8, "key_heads": 2, "head_dim": 64}
CUDA_SHAPE: dict[str, Any] = {"query_heads": 32, "key_heads": 8, "head_dim": 128}
#: Compiling takes longer than all else: these take part where a plan names them.
SLOW_STARTERS = ("flex", "flex-build", "flex-ours", "flex-ours-build", "flex-autotune", "eager-moda-compiled")


def peers(*names: str, device: str, without: Sequence[str] = ()) -> tuple[Peer, ...]:
    """Peers by name; none: all that could run on a device, but for `without`."""
    if names:
        return tuple(PEERS[name] for name in names)
    other = "moda-triton" if device == "cpu" else "moda-cpu"
    return tuple(peer for name, peer in PEERS.items() if not name.startswith(other) and name not in without)


def quick(device: str) -> list[Match]:
    """A minute or less: short sequences, nothing that compiles."""
    shape = CPU_SHAPE if device == "cpu" else CUDA_SHAPE
    dtype, length = (torch.float32, 1024) if device == "cpu" else (torch.bfloat16, 4096)
    contestants = peers(device=device, without=SLOW_STARTERS)
    return [
        Match(Case(layout, length, dtype, mode, device=device, **shape), contestants)
        for mode in ("forward", "training")
        for layout in ("llava-next", "qwen2-vl-8", "packed", "causal")
    ]


def cpu() -> list[Match]:
    """About eleven minutes on two cores: everyone on one layout, the main contestants on all, a longer and a shorter
    length, bfloat16, decoding."""
    both = ("forward", "training")
    some = ("llava-next", "qwen2-vl-8", "packed", "causal")
    others = ("llava-1.5", "qwen2-vl", "qwen2-vl-8", "interleaved", "video", "packed", "causal", "full")
    main = peers("moda-cpu", "sdpa-bool", "sdpa", device="cpu")
    with_flex = peers("moda-cpu", "sdpa-bool", "flex", "flex-ours", "sdpa", device="cpu")
    aligned = peers("moda-cpu-aligned", "eager-moda", device="cpu")

    def case(layout: str, length: int, mode: str, dtype: torch.dtype = torch.float32) -> Case:
        return Case(layout, length, dtype, mode, **CPU_SHAPE)

    return [
        Match(case("llava-next", 4096, "forward"), peers(device="cpu")),
        Match(case("llava-next", 4096, "training"), peers(device="cpu", without=SLOW_STARTERS)),
        *(Match(case(n, 4096, "forward"), with_flex + aligned * (n == "qwen2-vl-8")) for n in others),
        *(Match(case(n, 4096, "training"), main) for n in some[1:]),
        *(Match(case(n, 8192, "forward"), with_flex, memory=True) for n in some),
        *(Match(case(n, 16384, "decode"), main) for n in ("causal", "llava-next")),
        *(Match(case(n, 8192, "training"), main, memory=True) for n in ("llava-next", "packed", "causal")),
        *(
            Match(case(n, 1024, mode), peers(device="cpu", without=SLOW_STARTERS))
            for n, mode in itertools.product(some, both)
        ),
        *(Match(case(n, 4096, mode, torch.bfloat16), main) for n in ("llava-next", "packed") for mode in both),
    ]


def gpu(dtype: torch.dtype = torch.bfloat16) -> list[Match]:
    """The main table: 32 query and 8 key heads of 128, 2k to 32k tokens, in about five minutes on an H100."""
    main = ("causal", "llava-next", "qwen2-vl-8", "packed")
    both = ("forward", "training")
    plain = peers(device="cuda", without=(*SLOW_STARTERS, "moda-reference", "sdpa-math", "eager-moda", "sdpa-additive"))
    flexes = [PEERS[name] for name in ("flex", "flex-ours", "flex-build", "flex-ours-build")]
    at_8k = {
        "causal": (*plain, PEERS["flex"], PEERS["flex-ours"]),
        "llava-next": (*plain, PEERS["eager-moda"], *flexes),
        "qwen2-vl-8": (*plain, *flexes),
        "packed": plain,
    }

    def case(layout: str, length: int, mode: str) -> Case:
        return Case(layout, length, dtype, mode, device="cuda", **CUDA_SHAPE)

    return [
        *(Match(case(n, 8192, mode), at_8k[n], memory=True) for n, mode in itertools.product(main, both)),
        *(Match(case(n, 32768, "decode"), plain) for n in ("causal", "llava-next")),
        *(Match(case(n, 32768, mode), plain, memory=n == "causal") for n, mode in itertools.product(main, both)),
        *(Match(case(n, 2048, mode), plain) for n, mode in itertools.product(main, both)),
        *(Match(case(n, 16384, mode), plain) for n, mode in itertools.product(main, both)),
        *(
            Match(
                case("qwen2-vl-8", 16384, mode),
                peers("moda-triton", "moda-triton-build", *(peer.name for peer in flexes), device="cuda"),
            )
            for mode in both
        ),
        *(
            Match(
                case("llava-next", 8192, mode),
                peers("moda-triton", "moda-triton-aligned", "eager-moda-compiled", device="cuda"),
            )
            for mode in both
        ),
        *(Match(case("qwen2-vl-8", 8192, mode), peers("moda-triton", "flex-autotune", device="cuda")) for mode in both),
    ]


def tiny() -> list[Match]:
    """A matter of seconds on the CPU: every contestant that needs no compiler, every mode, so small that only its way
    is tried."""
    contestants = tuple(peer for peer in PEERS.values() if not peer.compiles)
    cases = [("llava-next", "forward"), ("packed", "training"), ("causal", "training"), ("causal", "decode")]
    return [
        Match(Case(layout, 64, torch.float32, mode, query_heads=4, key_heads=2, head_dim=16), contestants)
        for layout, mode in cases
    ]
