"""What `runtime/aot.py` compiles of the attention kernels: every configuration, and every feature in one of them.

Nothing that varies with lengths is specialised; strides come in units of 16 elements, as they do for head sizes that
are multiples of it. Groups have 4 heads.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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
from moda_kernels.backends.triton.launch_decode import TURN_COLUMNS
from moda_kernels.backends.triton.plan import Facts
from moda_kernels.runtime.aot import Build
from moda_kernels.runtime.launch import ARCHITECTURES, Launch, find, padded
from moda_kernels.tokens.walks import CHAINS, KeyWalk, QueryWalk

KERNELS: Mapping[str, tuple[Any, Any, Any]] = {
    "forward": (attention_forward, ForwardTensors, QueryWalk),
    "folded": (attention_forward, ForwardTensors, QueryWalk),
    "query": (attention_backward_query, QueryTensors, QueryWalk),
    "keys": (attention_backward_keys, KeyTensors, KeyWalk),
}
TABLES = {
    "forward": configs.FORWARD,
    "folded": configs.FOLDED,
    "query": configs.BACKWARD_QUERY,
    "keys": configs.BACKWARD_KEYS,
}
#: Bytes of stack that are accepted. sm_90's forward has none up to head size 128. The backward's keys side has two
#: accumulators of 64 registers a thread; what is left over lies in the loop over partial tiles, which are few.
STACK = {
    ("forward", 80): 64, ("forward", 90): 0, ("forward", 100): 0,
    ("folded", 80): 64, ("folded", 90): 0, ("folded", 100): 0,
    ("query", 80): 64, ("query", 90): 16, ("query", 100): 16,
    ("keys", 80): 64, ("keys", 90): 8, ("keys", 100): 64,
}  # fmt: skip

#: And with head sizes beyond 128, where accumulators alone take half of the registers.
WIDE_STACK = 64
#: And with several walks, each with two loops of its own.
MANY_STACK = 128

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
    "fault": ("fault",),
    "map": ("matrix", "matrix_rest"),
}


def attention_build(
    kind: str,
    capability: int,
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
        "UNIT": 16 if head_dim % 16 == 0 else 1, "GROUP": GROUP, "BLOCK_Q": config.block_q, "BLOCK_K": config.block_k,
        "PART": config.part, "SPLIT": split, "MASK": int("mask" in features), "PRECISION": "ieee", "CHAINS": CHAINS,
        "PASSES": passes, "FIRST_PASSES": passes // 2 if split else passes, "INTERVALS": intervals,
        "AFFINE": passes == 1,
    }  # fmt: skip
    name = " ".join(
        (f"attention_{kind}", dtype, str(head_dim), *features, *[f"passes={passes}"] * (passes != 1),
         *["intervals=2"] * (intervals == 2))
    )  # fmt: skip
    allowance = max(
        STACK[kind, capability] if padded(head_dim) <= 128 else WIDE_STACK,
        MANY_STACK if passes != 1 or intervals > 1 else 0,
    )
    if kind == "forward" and passes == intervals == 1 and dtype != "fp32":
        allowance = 0  # the walk of most masks
    return _build(name, kernel, capability, config, types, constants, allowance, gate)


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
    return made


def _build(
    name: str, kernel: Any, capability: int, config: Launch, types: Mapping[str, Any], constants: Mapping[str, Any],
    allowance: int, gate: bool,
) -> Build:  # fmt: skip
    """With the plain arguments that the kernel has beside these."""
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    plain = (key for key in kernel.arg_names if key not in constants and key not in types)
    kinds = {key: "*i32" if key.startswith("p_") else "fp32" if key == "scale" else "i32" for key in plain}
    return Build(
        name, kernel, capability, {**types, **kinds}, constants, config, stack_allowance=allowance, gate=gate
    )  # fmt: skip


def builds() -> Iterator[Build]:
    """Every configuration at its largest head size; then features and head sizes that need masks."""
    for kind, table in TABLES.items():
        more: Mapping[str, Any] = {"features": ("map",), "passes": 2} if kind == "folded" else {}
        for capability, by_bits in table.items():
            for bits, by_size in by_bits.items():
                for size, config in by_size.items():
                    # float32's configurations are the same everywhere.
                    gate = bits == 16 or capability == 90
                    dtype = "bf16" if bits == 16 else "fp32"
                    yield attention_build(kind, capability, config, size, dtype, gate=gate, **more)
    for capability in ARCHITECTURES:
        for kind in ("forward", "query", "keys"):
            config = find(TABLES[kind], capability, 16, 128)
            variants: list[tuple[tuple[str, ...], int]] = [
                (("bias",), 2), (("bias",), 0), (("split",), 2), (("split", "bias"), 4), (("mask",), 1), ((), 2),
            ]  # fmt: skip
            if kind == "forward":
                variants += [(("pseudo",), 1), (("fault",), 1), (("split", "pseudo"), 2)]
            for features, passes in variants:
                masked = find(configs.MASKED, capability, 16, 128)
                chosen = masked if kind == "forward" and "mask" in features else config
                yield attention_build(kind, capability, chosen, 128, "bf16", features, passes)
            for passes in (1, 0):
                yield attention_build(kind, capability, config, 128, "bf16", (), passes, intervals=2)
            for size in (40, 80, 96):
                narrow = find(TABLES[kind], capability, 16, padded(size))
                yield attention_build(kind, capability, narrow, size)
            yield attention_build(kind, capability, config, 128, "fp16")
        folded = find(configs.FOLDED, capability, 16, 128)
        for features, passes in ((("map", "bias"), 2), (("map", "split"), 4)):
            yield attention_build("folded", capability, folded, 128, "bf16", features, passes)
        yield _row_sums(capability)
    yield from _decode_builds()


def _row_sums(capability: int) -> Build:
    """A thread's work is a row."""
    types = {"tensors": pointers(RowTensors, "bf16"), "extras": _extras(("pseudo",), "bf16")}
    constants = {"E": 128, "BLOCK_E": 128, "UNIT": 16, "BLOCK_Q": 128, "SPLIT": False}
    config = Launch(num_warps=8, num_stages=3)
    return _build("attention_row_sums", attention_row_sums, capability, config, types, constants, 0, capability == 90)


def _decode_builds() -> Iterator[Build]:
    """Every configuration with the smallest and the largest tile, and features in the one for head size 128."""
    every = ("bias", "mask", "turned", "intervals=2")
    for capability, by_bits in configs.DECODE.items():
        for bits, by_size in by_bits.items():
            dtype = "bf16" if bits == 16 else "fp32"
            for size, config in by_size.items():
                for block_r in (16, 32):
                    yield _decode_build(capability, config, size, dtype, block_r, gate=bits == 16 or capability == 90)
        config = find(configs.DECODE, capability, 16, 128)
        for features in (*((feature,) for feature in every), every):
            yield _decode_build(capability, config, 128, "bf16", 16, features)
        yield _decode_build(capability, config, 80, "bf16", 32, every)
        yield _decode_build(capability, config, 128, "fp16", 32, every)
        yield from _around_decode(capability)


def _decode_build(
    capability: int, config: DecodeConfig, size: int, dtype: str, block_r: int, features: tuple[str, ...] = (),
    gate: bool = False,
) -> Build:  # fmt: skip
    """A build of the kernel over keys."""
    types = {
        "tensors": pointers(DecodeTensors, dtype, () if "turned" in features else ("turned",)),
        "extras": _extras(features, dtype), "facts": _integers(Facts),
    }  # fmt: skip
    constants: dict[str, Any] = {
        "UNIT": 16, "D": size, "E": size, "BLOCK_D": padded(size), "BLOCK_E": padded(size), "GROUP": GROUP,
        "BLOCK_R": block_r, "BLOCK_K": config.block_k, "INTERVALS": 2 if "intervals=2" in features else 1,
        "MASK": int("mask" in features), "PRECISION": "ieee",
    }  # fmt: skip
    name = " ".join(("attention_decode", dtype, f"{block_r}x{size}", *features))
    # For float32 the compiler prefers two programs per multiprocessor to the last registers: a few spills.
    allowance = 48 if dtype == "fp32" else 0
    return _build(name, attention_decode, capability, config, types, constants, allowance, gate)


def _around_decode(capability: int) -> Iterator[Build]:
    """The kernels before and after it."""
    gate = capability == 90
    for dtype, sizes in (("bf16", (128, 256)), ("fp32", (256,))):
        for size in sizes:
            types: dict[str, Any] = dict.fromkeys(("p_q", "p_matrix", "p_turned"), f"*{dtype}")
            constants: dict[str, Any] = {
                "UNIT": 16, "D": size, "BLOCK_D": padded(size), "GROUP": GROUP, "BLOCK_R": 32,
                "BLOCK_C": TURN_COLUMNS[16 if dtype == "bf16" else 32], "PRECISION": "ieee",
            }  # fmt: skip
            if dtype == "fp32":
                constants["p_matrix_rest"] = None
            else:
                types["p_matrix_rest"] = f"*{dtype}"
            name, allowance = f"attention_decode_turn {dtype} {size}", 48 if dtype == "fp32" else 0
            yield _build(name, attention_decode_turn, capability, Launch(4, 3), types, constants, allowance, gate)
    for split in (False, True):
        features = ("pseudo", "fault", "split") if split else ()
        types = {"tensors": pointers(CombineTensors, "bf16"), "extras": _extras(features, "bf16")}
        constants = {"UNIT": 16, "E": 128, "BLOCK_E": 128, "GROUP": GROUP, "BLOCK_R": 32, "SPLIT": split}
        name = "attention_decode_combine" + (" split" if split else "")
        yield _build(
            name, attention_decode_combine, capability, Launch(4, 3), types, constants, 0, gate and split
        )  # fmt: skip
