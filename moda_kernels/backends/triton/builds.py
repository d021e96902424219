"""What `runtime/aot.py` compiles of the attention kernels: every configuration, and every feature in one of them.

Nothing that varies with lengths is specialised; strides come in units of 16 elements, as they do for head sizes that
are multiples of it. Groups have 4 heads.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from moda_kernels.backends.triton import configs
from moda_kernels.backends.triton.configs import AttentionConfig, DecodeConfig
from moda_kernels.backends.triton.kernels.backward_keys import KeyTensors, attention_backward_keys
from moda_kernels.backends.triton.kernels.backward_query import (
    QueryTensors,
    RowTensors,
    attention_backward_query,
    attention_row_sums,
)
from moda_kernels.backends.triton.kernels.decode import (
    CombineTensors,
    DecodeTensors,
    attention_decode,
    attention_decode_combine,
    attention_decode_turn,
)
from moda_kernels.backends.triton.kernels.forward import ForwardTensors, attention_forward
from moda_kernels.backends.triton.kernels.primitives import Extras
from moda_kernels.backends.triton.launch import unit_of
from moda_kernels.backends.triton.launch_decode import TURN_COLUMNS
from moda_kernels.backends.triton.plan import Facts
from moda_kernels.runtime import architectures
from moda_kernels.runtime.aot import Build
from moda_kernels.runtime.architectures import KNOWN, Target, table_of
from moda_kernels.runtime.launch import Launch, find, padded
from moda_kernels.tokens.walks import CHAINS, KeyWalk, QueryWalk

KERNELS: Mapping[str, tuple[Any, Any, Any]] = {
    "forward": (attention_forward, ForwardTensors, QueryWalk),
    "masked": (attention_forward, ForwardTensors, QueryWalk),
    "folded": (attention_forward, ForwardTensors, QueryWalk),
    "query": (attention_backward_query, QueryTensors, QueryWalk),
    "keys": (attention_backward_keys, KeyTensors, KeyWalk),
}
TABLES = {
    "forward": configs.FORWARD,
    "masked": configs.MASKED,
    "folded": configs.FOLDED,
    "query": configs.BACKWARD_QUERY,
    "keys": configs.BACKWARD_KEYS,
}
#: Bytes of stack that are accepted. sm_90's forward has none up to head size 128. The backward's keys side has two
#: accumulators of 64 registers a thread; what is left over lies in the loop over partial tiles, which are few.
STACK: Mapping[tuple[str, Target], int] = {
    ("forward", 80): 64, ("forward", 90): 0, ("forward", 100): 0,
    ("folded", 80): 64, ("folded", 90): 0, ("folded", 100): 0,
    ("query", 80): 64, ("query", 86): 16, ("query", 90): 16, ("query", 100): 16,
    ("keys", 80): 64, ("keys", 90): 8, ("keys", 100): 64, ("keys", 120): 8,
}  # fmt: skip

#: And with head sizes beyond 128, where accumulators alone take half of the registers.
WIDE_STACK = 64
#: And with several walks, each with two loops of its own; with a bias and the weights of two softmaxes, too, sm_90's
#: keys' side loads ten numbers again in loops of 680 instructions (narrower tiles take half as many again).
MANY_STACK, MOST_STACK = 128, 192
#: Of sm_120 ptxas fetches a constant of the row sums from the stack.
ROW_SUMS_STACK: Mapping[tuple[Target, int], int] = {(120, 128): 8}

#: The gate compiles every configuration in 16 bits of these architectures. Of the others, whose kernels differ little,
#: it compiles a sample: kind, bits and head size. `--all` compiles everything.
WHOLE: tuple[Target, ...] = (80, 90, 100)
SAMPLE: Mapping[Target, set[tuple[str, int, int]]] = {
    86: {("keys", 16, 128), ("query", 16, 256), ("decode", 16, 64)},
    89: {("keys", 16, 128)},
    103: {("forward", 16, 128)},
    120: {("forward", 16, 128), ("keys", 16, 128), ("query", 32, 256)},
    "gfx90a": {("forward", 16, 64)},
    "gfx942": {("forward", 16, 128), ("query", 16, 128), ("keys", 16, 128), ("decode", 16, 128)},
    "gfx950": {("keys", 16, 64)},
}
#: Of a kind of kernel beside its configuration.
ALWAYS: Mapping[str, dict[str, Any]] = {
    "folded": {"features": ("map",), "passes": 2}, "masked": {"features": ("mask",)},
}  # fmt: skip

GROUP = 4
#: Members of NamedTuples that are not of the inputs' type.
_FLOATS = ("lse", "dlse", "delta", "norm", "row_sums", "sums", "tops", "dbias", "bias", "base", "decay", "weights")
_INTEGERS = ("counts", "fault")
#: Pointers of `Extras` that a feature brings; without it they are None.
_FEATURES = {
    "pseudo": ("base", "decay", "counts"),
    "bias": ("bias",),
    "split": ("weights",),
    "mask": ("mask",),
    "float mask": ("mask",),
    "fault": ("fault",),
    "map": ("matrix", "matrix_rest"),
}


def attention_build(
    kind: str,
    target: Target,
    config: AttentionConfig,
    head_dim: int,
    dtype: str = "bf16",
    features: tuple[str, ...] = (),
    passes: int = 1,
    intervals: int = 1,
    gate: bool = False,
) -> Build:
    """A build of an attention kernel.

    Args:
        kind: of `KERNELS`. features: of `_FEATURES`. passes: as unrolled; 0 is the loop for many.
    """
    kernel, tensors, walk = KERNELS[kind]
    split = "split" in features
    left_out = [name for name, feature in (("dbias", "bias"), ("parts", "split")) if feature not in features]
    types = {
        "tensors": pointers(tensors, dtype, left_out), "extras": _extras(features, dtype),
        "facts": _integers(Facts), "walk": _integers(walk),
    }  # fmt: skip
    constants: dict[str, Any] = {
        "D": head_dim, "E": head_dim, "BLOCK_D": padded(head_dim), "BLOCK_E": padded(head_dim),
        "UNIT": _unit(head_dim), "GROUP": GROUP, "BLOCK_Q": config.block_q, "BLOCK_K": config.block_k,
        "PART": config.part, "SPLIT": split, "MASK": _mask_kind(features), "PRECISION": "ieee", "CHAINS": CHAINS,
        "PASSES": passes, "FIRST_PASSES": passes // 2 if split else passes, "INTERVALS": intervals,
        "AFFINE": passes == 1,
    }  # fmt: skip
    name = " ".join(
        (f"attention_{'forward' if kind == 'masked' else kind}", dtype, str(head_dim), *features,
         *[f"passes={passes}"] * (passes != 1),
         *["intervals=2"] * (intervals == 2))
    )  # fmt: skip
    allowance = max(
        STACK.get((kind, table_of(target)), 0) if padded(head_dim) <= 128 else WIDE_STACK,
        MANY_STACK if passes != 1 or intervals > 1 else 0,
    )
    if (kind, table_of(target), split, "bias" in features) == ("keys", 90, True, True):
        allowance = MOST_STACK
    if kind in ("forward", "masked") and passes == intervals == 1 and dtype != "fp32":
        allowance = 0  # the walk of most masks
    return _build(name, kernel, target, config, types, constants, allowance, gate)


def _unit(head_dim: int) -> int:
    """Of tensors with such rows, one after the other."""
    return unit_of(torch.empty(2, head_dim, device="meta"))


def _mask_kind(features: Sequence[str]) -> int:
    return 1 if "mask" in features else 2 if "float mask" in features else 0


def _integers(kind: Any) -> Any:
    return kind(*["*i32"] * len(kind._fields))


def pointers(kind: Any, dtype: str, left_out: Sequence[str] = ()) -> Any:
    """The types of a NamedTuple of pointers; None for those left out."""

    def of(name: str) -> str | None:
        if name in left_out:
            return None
        if name == "mask":
            return "*u8"
        return "*i32" if name in _INTEGERS else "*fp32" if name in _FLOATS else f"*{dtype}"

    return kind(*map(of, kind._fields))


def _extras(features: tuple[str, ...], dtype: str) -> Extras:
    given = {name for feature in features if feature in _FEATURES for name in _FEATURES[feature]}
    made: Extras = pointers(Extras, dtype, tuple(name for name in Extras._fields if name not in given))
    return made._replace(mask=f"*{dtype}") if "float mask" in features else made


def _build(
    name: str, kernel: Any, target: Target, config: Launch, types: Mapping[str, Any], constants: Mapping[str, Any],
    allowance: int, gate: bool,
) -> Build:  # fmt: skip
    """With the plain arguments that the kernel has beside these."""
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    plain = (key for key in kernel.arg_names if key not in constants and key not in types)
    kinds = {key: "*i32" if key.startswith("p_") else "fp32" if key == "scale" else "i32" for key in plain}
    return Build(
        name, kernel, target, {**types, **kinds}, constants, config, stack_allowance=allowance, gate=gate
    )  # fmt: skip


def builds() -> Iterator[Build]:
    """Every configuration at its largest head size for every architecture; then, for those with a table of their own,
    features and head sizes that need masks."""
    for kind, table in TABLES.items():
        for target, known in KNOWN.items():
            for bits, by_size in table[known.table].items():
                for size, config in by_size.items():
                    gate = kind != "masked" and _in_gate(kind, target, bits, size)
                    dtype = "bf16" if bits == 16 else "fp32"
                    yield attention_build(kind, target, config, size, dtype, gate=gate, **ALWAYS.get(kind, {}))
    for kind, table in configs.MANY.items():
        for target, known in KNOWN.items():
            config = table[known.table][16][128]
            if target not in architectures.TABLES and config != TABLES[kind][known.table][16][128]:
                yield attention_build(kind, target, config, 128, passes=0, intervals=2)
    for target in architectures.TABLES:
        for kind in ("forward", "query", "keys"):
            config = find(TABLES[kind], target, 16, 128)
            of_many = find(configs.MANY[kind], target, 16, 128)
            variants: list[tuple[tuple[str, ...], int]] = [
                (("bias",), 2), (("bias",), 0), (("split",), 2), (("split", "bias"), 4), ((), 2),
            ]  # fmt: skip
            if kind == "forward":
                variants += [(("pseudo",), 1), (("fault",), 1), (("split", "pseudo"), 2)]
            else:
                variants += [(("mask",), 1), (("float mask",), 1)]
            of_masked = find(configs.MASKED_KEYS, target, 16, 128) if kind == "keys" else config
            for features, passes in variants:
                masked = _mask_kind(features) > 0
                chosen = of_masked if masked else config if passes else of_many
                gate = masked and target == 90  # whose products wait for each other easily then
                yield attention_build(kind, target, chosen, 128, "bf16", features, passes, gate=gate)
            yield attention_build(kind, target, config, 128, intervals=2)
            yield attention_build(kind, target, of_many, 128, passes=0, intervals=2)
            for size in (40, 72, 96):
                narrow = find(TABLES[kind], target, 16, padded(size))
                yield attention_build(kind, target, narrow, size)
            yield attention_build(kind, target, config, 128, "fp16")
        yield attention_build("masked", target, find(configs.MASKED, target, 16, 128), 128, features=("float mask",))
        folded = find(configs.FOLDED, target, 16, 128)
        for features, passes in ((("map", "bias"), 2), (("map", "split"), 4)):
            yield attention_build("folded", target, folded, 128, "bf16", features, passes)
    for target, known in KNOWN.items():
        for size, query in configs.BACKWARD_QUERY[known.table][16].items():
            yield _row_sums(target, query, size)
    yield from _decode_builds()


def _in_gate(kind: str, target: Target, bits: int, size: int) -> bool:
    """float32's configurations hardly differ between architectures."""
    if target in WHOLE:
        return bits == 16 or target == 90
    return (kind, bits, size) in SAMPLE[target]


def _row_sums(target: Target, query: AttentionConfig, size: int) -> Build:
    """A thread's work is a row of the tiles that dq goes through."""
    types = {"tensors": pointers(RowTensors, "bf16"), "extras": _extras(("pseudo",), "bf16")}
    constants = {"E": size, "BLOCK_E": size, "UNIT": _unit(size), "BLOCK_Q": query.block_q, "SPLIT": False}
    gate = target == 90 and size > 64
    name = f"attention_row_sums {size}"
    allowance = ROW_SUMS_STACK.get((target, size), 0)
    return _build(name, attention_row_sums, target, configs.ROW_SUMS, types, constants, allowance, gate)


def _decode_builds() -> Iterator[Build]:
    """Every configuration with the smallest and the largest tile, and features in the one for head size 128."""
    every = ("bias", "mask", "turned", "intervals=2")
    for target, known in KNOWN.items():
        for bits, by_size in configs.DECODE[known.table].items():
            dtype = "bf16" if bits == 16 else "fp32"
            for size, config in by_size.items():
                for block_r in (16, 32):
                    gate = _in_gate("decode", target, bits, size) and (target == 90 or block_r == 16)
                    yield _decode_build(target, config, size, dtype, block_r, gate=gate)
        if target != known.table:
            continue
        config = find(configs.DECODE, target, 16, 128)
        for features in (*((feature,) for feature in every), ("float mask",), every):
            yield _decode_build(target, config, 128, "bf16", 16, features)
        yield _decode_build(target, config, 80, "bf16", 32, every)
        yield _decode_build(target, config, 128, "fp16", 32, every)
        yield from _around_decode(target)


def _decode_build(
    target: Target, config: DecodeConfig, size: int, dtype: str, block_r: int, features: tuple[str, ...] = (),
    gate: bool = False,
) -> Build:  # fmt: skip
    """A build of the kernel over keys."""
    types = {
        "tensors": pointers(DecodeTensors, dtype, () if "turned" in features else ("turned",)),
        "extras": _extras(features, dtype), "facts": _integers(Facts),
    }  # fmt: skip
    constants: dict[str, Any] = {
        "UNIT": _unit(size), "D": size, "E": size, "BLOCK_D": padded(size), "BLOCK_E": padded(size), "GROUP": GROUP,
        "BLOCK_R": block_r, "BLOCK_K": config.block_k, "INTERVALS": 2 if "intervals=2" in features else 1,
        "MASK": _mask_kind(features), "PRECISION": "ieee",
    }  # fmt: skip
    name = " ".join(("attention_decode", dtype, f"{block_r}x{size}", *features))
    # For float32 the compiler prefers two programs per multiprocessor to the last registers: a few spills.
    allowance = 48 if dtype == "fp32" else 0
    return _build(name, attention_decode, target, config, types, constants, allowance, gate)


def _around_decode(target: Target) -> Iterator[Build]:
    """The kernels before and after it."""
    gate = target == 90
    for dtype, sizes in (("bf16", (128, 256)), ("fp32", (256,))):
        for size in sizes:
            types: dict[str, Any] = dict.fromkeys(("p_q", "p_matrix", "p_turned"), f"*{dtype}")
            constants: dict[str, Any] = {
                "UNIT": _unit(size), "D": size, "BLOCK_D": padded(size), "GROUP": GROUP, "BLOCK_R": 32,
                "BLOCK_C": TURN_COLUMNS[16 if dtype == "bf16" else 32], "PRECISION": "ieee",
            }  # fmt: skip
            if dtype == "fp32":
                constants["p_matrix_rest"] = None
            else:
                types["p_matrix_rest"] = f"*{dtype}"
            name, allowance = f"attention_decode_turn {dtype} {size}", 48 if dtype == "fp32" else 0
            yield _build(name, attention_decode_turn, target, configs.AROUND_DECODE, types, constants, allowance, gate)
    for split in (False, True):
        features = ("pseudo", "fault", "split") if split else ()
        types = {"tensors": pointers(CombineTensors, "bf16"), "extras": _extras(features, "bf16")}
        constants = {"UNIT": _unit(128), "E": 128, "BLOCK_E": 128, "GROUP": GROUP, "BLOCK_R": 32, "SPLIT": split}
        name = "attention_decode_combine" + (" split" if split else "")
        yield _build(
            name, attention_decode_combine, target, configs.AROUND_DECODE, types, constants, 0, gate and split
        )  # fmt: skip
