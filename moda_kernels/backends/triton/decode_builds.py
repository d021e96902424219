"""What `aot.py` compiles of the decode kernels."""

from collections.abc import Iterator
from typing import Any

from moda_kernels.backends.triton import configs
from moda_kernels.backends.triton.configs import DecodeConfig
from moda_kernels.backends.triton.kernels.decode import (
    attention_decode,
    attention_decode_combine,
    attention_decode_turn,
)
from moda_kernels.backends.triton.launch_decode import TURN_COLUMNS
from moda_kernels.runtime.aot import Build
from moda_kernels.runtime.launch import Launch, find, padded


def builds() -> Iterator[Build]:
    """Every configuration with the smallest and the largest tile, and features in the one for head size 128."""
    every = ("bias", "mask", "turned")
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
        yield from _around(capability)


def _decode_build(
    capability: int, config: DecodeConfig, size: int, dtype: str, block_r: int, features: tuple[str, ...] = (),
    gate: bool = False,
) -> Build:  # fmt: skip
    """A build of the kernel over keys, for a group of 4 heads."""
    constants: dict[str, Any] = {
        "D": size, "E": size, "BLOCK_D": padded(size), "BLOCK_E": padded(size), "GROUP": 4, "BLOCK_R": block_r,
        "BLOCK_K": config.block_k, "MASK": int("mask" in features), "PRECISION": "ieee",
    }  # fmt: skip
    constants |= {f"p_{name}": None for name in ("bias", "mask", "turned") if name not in features}
    name = " ".join(("attention_decode", dtype, f"{block_r}x{size}", *features))
    return _described(name, attention_decode, capability, config, constants, dtype, gate)


def _around(capability: int) -> Iterator[Build]:
    """The kernels before and after it."""
    gate = capability == 90
    for dtype, sizes in (("bf16", (128, 256)), ("fp32", (256,))):
        for size in sizes:
            constants: dict[str, Any] = {
                "D": size, "BLOCK_D": padded(size), "GROUP": 4, "BLOCK_R": 32,
                "BLOCK_C": TURN_COLUMNS[16 if dtype == "bf16" else 32], "PRECISION": "ieee",
            }  # fmt: skip
            constants |= {"p_matrix_rest": None} if dtype == "fp32" else {}
            name, launch = f"attention_decode_turn {dtype} {size}", Launch(4, 3)
            yield _described(name, attention_decode_turn, capability, launch, constants, dtype, gate)
    for split in (False, True):
        constants = {"E": 128, "BLOCK_E": 128, "GROUP": 4, "BLOCK_R": 32, "SPLIT": split}
        constants |= {} if split else dict.fromkeys(("p_base", "p_decay", "p_count", "p_fault", "p_weights"))
        name = "attention_decode_combine" + (" split" if split else "")
        yield _described(name, attention_decode_combine, capability, Launch(4, 3), constants, "bf16", gate and split)


def _described(
    name: str, kernel: Any, capability: int, config: Launch, constants: dict[str, Any], dtype: str, gate: bool
) -> Build:
    inputs = ("p_q", "p_turned", "p_k", "p_v", "p_out", "p_matrix", "p_matrix_rest")
    floats = ("p_sums", "p_tops", "p_bias", "p_base", "p_decay", "p_weights", "p_lse")

    def kind(argument: str) -> str:
        if argument in inputs:
            return f"*{dtype}"
        if argument == "p_mask":
            return "*u8"
        if argument.startswith("p_"):
            return "*fp32" if argument in floats else "*i32"
        return "fp32" if argument == "scale" else "i32"

    types = {argument: kind(argument) for argument in kernel.arg_names if argument not in constants}
    strides = tuple(a for a in types if a[:2] == "s_" and a[2] in "qkvo" and a[3] in "bht")
    # For float32 the compiler prefers two programs per multiprocessor to the last registers: a few spills.
    allowance = 48 if dtype == "fp32" else 0
    return Build(name, kernel, capability, types, constants, config, strides, allowance, gate)
