"""What `aot.py` compiles of the attention kernels: every configuration, and every feature in one of them.

Strides are multiples of 16, as they are for head sizes that are; lengths are not.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from moda_kernels.backends.triton import configs
from moda_kernels.backends.triton.configs import AttentionConfig
from moda_kernels.backends.triton.kernels.backward_keys import attention_backward_keys
from moda_kernels.backends.triton.kernels.backward_query import attention_backward_query, attention_row_sums
from moda_kernels.backends.triton.kernels.forward import attention_forward
from moda_kernels.backends.triton.kernels.intervals import _key_positions, _row_limits
from moda_kernels.runtime.aot import Build
from moda_kernels.runtime.launch import ARCHITECTURES, Launch, find, padded

KERNELS = {
    "forward": attention_forward,
    "folded": attention_forward,
    "query": attention_backward_query,
    "keys": attention_backward_keys,
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
    ("keys", 80): 64, ("keys", 90): 64, ("keys", 100): 64,
}  # fmt: skip

#: And with head sizes beyond 128, where accumulators alone take half of the registers.
WIDE_STACK = 64
#: And in split attention, which keeps more between its two softmaxes (sm_90: 8 bytes, sm_80: 104 with a bias).
SPLIT_STACK = 128

#: Pointers to numbers of the inputs' type; other floats are float32, all else int32.
_INPUTS = ("p_q", "p_k", "p_v", "p_out", "p_parts", "p_dout", "p_dq", "p_dk", "p_dv", "p_matrix",
           "p_matrix_rest")  # fmt: skip
_FLOATS = ("p_lse", "p_dlse", "p_bias", "p_base", "p_decay", "p_weights", "p_delta", "p_limit", "p_sums", "p_dbias")
#: Arguments that a feature brings; without it they are None.
_FEATURES = {
    "pseudo": ("p_base", "p_decay", "p_count"),
    "bias": ("p_bias",),
    "split": ("p_weights",),
    "mask": ("p_mask",),
    "fault": ("p_fault",),
    "map": ("p_matrix", "p_matrix_rest"),
}


def attention_build(
    kind: str,
    capability: int,
    config: AttentionConfig,
    head_dim: int,
    dtype: str = "bf16",
    features: tuple[str, ...] = (),
    passes: int = 1,
    gate: bool = False,
) -> Build:
    """A build of an attention kernel.

    Args:
        kind: of `KERNELS`. features: of `_FEATURES`. passes: as unrolled; 0 is the loop for many.
    """
    kernel = KERNELS[kind]
    split = "split" in features
    given = {name for feature in features for name in _FEATURES[feature]}
    constants: dict[str, Any] = {name: None for names in _FEATURES.values() for name in names if name not in given}
    constants |= {
        "D": head_dim, "E": head_dim, "BLOCK_D": padded(head_dim), "BLOCK_E": padded(head_dim),
        "BLOCK_Q": config.block_q, "BLOCK_K": config.block_k, "SPLIT": split, "MASK": int("mask" in features),
        "PRECISION": "ieee", "PASSES": passes, "FIRST_PASSES": passes // 2 if split else passes,
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = {name: _type(name, dtype) for name in kernel.arg_names if name not in constants}
    return Build(
        name=" ".join((f"attention_{kind}", dtype, str(head_dim), *features, *[f"passes={passes}"] * (passes != 1))),
        kernel=kernel,
        capability=capability,
        types=types,
        constants=constants,
        config=config,
        divisible_by_16=tuple(name for name in types if name[:2] == "s_" and name[2] in "qkvodge" and name[3] in "bht"),
        stack_allowance=max(
            STACK[kind, capability] if padded(head_dim) <= 128 else WIDE_STACK, SPLIT_STACK if split else 0
        ),
        gate=gate,
    )


def _type(name: str, dtype: str) -> str:
    if name in _INPUTS:
        return f"*{dtype}"
    if name == "p_mask":
        return "*u8"
    if name in _FLOATS:
        return "*fp32"
    if name.startswith("p_"):
        return "*i64" if name == "p_columns" else "*i32"
    return "fp32" if name == "scale" else "i32"


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
                (("bias",), 2), (("bias",), 0), (("split",), 2), (("split", "bias"), 4), (("mask",), 1),
            ]  # fmt: skip
            if kind == "forward":
                variants += [(("pseudo",), 1), (("fault",), 1), (("split", "pseudo"), 2)]
            for features, passes in variants:
                masked = find(configs.MASKED, capability, 16, 128)
                chosen = masked if kind == "forward" and "mask" in features else config
                yield attention_build(kind, capability, chosen, 128, "bf16", features, passes)
            for size in (40, 80, 96):
                narrow = find(TABLES[kind], capability, 16, padded(size))
                yield attention_build(kind, capability, narrow, size)
            yield attention_build(kind, capability, config, 128, "fp16")
        folded = find(configs.FOLDED, capability, 16, 128)
        for features, passes in ((("map", "bias"), 2), (("map", "split"), 4)):
            yield attention_build("folded", capability, folded, 128, "bf16", features, passes)
        yield from _small(capability)


def _small(capability: int) -> Iterator[Build]:
    """The kernels around the products: a thread's work is a row."""
    launch = Launch(num_warps=8, num_stages=3)
    constants: dict[str, Any] = {"E": 128, "BLOCK_E": 128, "BLOCK_Q": 128, "SPLIT": False, "p_weights": None}
    for kernel, given in (
        (attention_row_sums, constants),
        (_row_limits, {"BLOCK": 256}),
        (_key_positions, {"BLOCK": 256}),
    ):
        types = {name: _type(name, "bf16") for name in kernel.arg_names if name not in given}
        yield Build(
            name=kernel.__name__.strip("_"), kernel=kernel, capability=capability, types=types, constants=given,
            config=launch, gate=capability == 90,
        )  # fmt: skip
