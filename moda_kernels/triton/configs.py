"""Block sizes, warps and stages of every kernel, in one table per architecture, with the reason beside each entry.

A kernel kind has a frozen dataclass (a `Launch` with its block sizes) and a table: architecture → bits of the numbers
that its dots multiply → the largest head size that an entry is for → entry. `aot.py` compiles what stands here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

C = TypeVar("C")

#: Architectures with a table of their own; any other GPU takes the entries of the last one that isn't newer.
ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Launch:
    """What every kernel is launched with."""

    num_warps: int
    num_stages: int


def architecture(device: torch.device) -> int:
    """The table to look in for a device; the interpreter, which has no limits, takes sm_90's."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return max((a for a in ARCHITECTURES if a <= 10 * major + minor and major < 12), default=ARCHITECTURES[0])


def float32_dots() -> str:
    """`input_precision` of float32 products: IEEE unless torch's own switch allows TF32."""
    matmul = torch.backends.cuda.matmul
    # Since torch 2.9 there are two interfaces, and after the newer one has been used the older one raises.
    precision = getattr(matmul, "fp32_precision", None)
    if precision == "none":
        precision = getattr(torch.backends, "fp32_precision", "none")
    allowed = matmul.allow_tf32 if precision is None else precision == "tf32"
    return "tf32" if allowed else "ieee"


def padded(size: int) -> int:
    """A head size as `tl.dot` takes it: a power of two of at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def find(table: Mapping[int, Mapping[int, Mapping[int, C]]], capability: int, bits: int, size: int) -> C:
    """The entry for an architecture, the bits of a number and a head size."""
    rows = table[capability][bits]
    return rows[min(limit for limit in rows if limit >= size)]


@dataclass(frozen=True)
class GramConfig(Launch):
    """Rows of a step, the tile [block_d, block_e] of the sums that a program keeps, and whether it loads x once where y
    is x."""

    block_t: int
    block_d: int
    block_e: int
    load_once: bool = True


@dataclass(frozen=True)
class ProjectConfig(Launch):
    """Rows of a step, and the columns of the matrix that a program keeps."""

    block_t: int
    block_e: int


@dataclass(frozen=True)
class AttentionConfig(Launch):
    """Rows of a tile of queries and of a tile of keys."""

    block_q: int
    block_k: int

    def numbers(self) -> list[int]:
        """As operators take them, see `attention.py`."""
        return [self.block_q, self.block_k, self.num_warps, self.num_stages]


@dataclass(frozen=True)
class DecodeConfig(Launch):
    """Keys of a tile where few query rows meet many keys; the tile of queries is as large as they are, 16 or 32."""

    block_k: int

    def numbers(self) -> list[int]:
        """As operators take them, see `decode.py`."""
        return [self.block_k, self.num_warps, self.num_stages]


GramTable = Mapping[int, Mapping[int, Mapping[int, GramConfig]]]
ProjectTable = Mapping[int, Mapping[int, Mapping[int, ProjectConfig]]]

# Gram sums read their tokens once where a tile holds all D x D of them: up to 128, in 64 registers of each of 256
# threads. float32 is multiplied without tensor cores, from registers: smaller tiles.
_GRAM_32 = {64: GramConfig(4, 2, 32, 64, 64), 256: GramConfig(8, 2, 32, 64, 64)}
_GRAM_16 = {64: GramConfig(4, 3, 64, 64, 64), 256: GramConfig(8, 3, 64, 128, 128)}
# sm_80 would not fetch a tile early that is both factors of its product: it loads it twice, the second time from L2.
_GRAM_16_TWICE = {limit: replace(config, load_once=False) for limit, config in _GRAM_16.items()}
GRAM: GramTable = {
    80: {16: _GRAM_16_TWICE, 32: _GRAM_32},
    90: {16: _GRAM_16, 32: _GRAM_32},
    100: {16: _GRAM_16, 32: _GRAM_32},
}

# The norm needs whole rows, so columns of y are fewer; two parts of u are multiplied.
_UNIT_GRAM = {
    16: {64: GramConfig(4, 2, 64, 64, 64), 128: GramConfig(8, 2, 64, 128, 64), 256: GramConfig(8, 2, 64, 256, 32)},
    32: {64: GramConfig(4, 2, 32, 64, 64), 128: GramConfig(8, 2, 32, 128, 32), 256: GramConfig(8, 2, 32, 256, 16)},
}
UNIT_GRAM: GramTable = {80: _UNIT_GRAM, 90: _UNIT_GRAM, 100: _UNIT_GRAM}

# A matrix stays in shared memory in two parts, 64 of its columns: 64 KB at 256. No spills with these.
_PROJECT = {
    16: {64: ProjectConfig(4, 3, 64, 64), 128: ProjectConfig(4, 3, 64, 64), 256: ProjectConfig(4, 2, 64, 64)},
    32: {64: ProjectConfig(4, 2, 32, 64), 128: ProjectConfig(8, 2, 32, 64), 256: ProjectConfig(8, 2, 32, 32)},
}
# Scaling float16's columns of 256 numbers takes more registers than 4 warps of sm_100 have.
_WIDER_PROJECT = {**_PROJECT[16], 256: ProjectConfig(8, 2, 64, 64)}
PROJECT: ProjectTable = {80: _PROJECT, 90: _PROJECT, 100: {**_PROJECT, 16: _WIDER_PROJECT}}

# Two matrices, each in two parts, and five products: at 128 narrower than 8 warps of sm_90's 128 rows need all 255
# registers; at 256 anything larger than this leaves the registers.
_WIDE_UNIT_PROJECT = ProjectConfig(8, 1, 32, 32)
_UNIT_PROJECT_32 = {64: ProjectConfig(4, 2, 32, 64), 128: ProjectConfig(8, 2, 32, 32), 256: ProjectConfig(8, 2, 32, 16)}
UNIT_PROJECT: ProjectTable = {
    80: {
        16: {64: ProjectConfig(4, 2, 64, 64), 128: ProjectConfig(8, 2, 64, 32), 256: _WIDE_UNIT_PROJECT},
        32: {**_UNIT_PROJECT_32, 256: ProjectConfig(8, 1, 32, 16)},  # a second stage leaves the registers
    },
    90: {
        16: {64: ProjectConfig(4, 2, 64, 64), 128: ProjectConfig(8, 2, 128, 64), 256: _WIDE_UNIT_PROJECT},
        32: _UNIT_PROJECT_32,
    },
    100: {
        16: {64: ProjectConfig(4, 2, 64, 64), 128: ProjectConfig(8, 2, 64, 64), 256: _WIDE_UNIT_PROJECT},
        32: _UNIT_PROJECT_32,
    },
}


# Attention. 16 bits: what keeps accumulators in registers decides. sm_90: a side that stays in place needs 128 rows for
# 8 warps, or products are computed twice; a loop whose first loads wait for a list entry uses a stage for it. sm_80 has
# no asynchronous products, so scores and weights take registers beside the accumulator. 32 bits: exact products have no
# tensor cores; small tiles keep operands in registers. Sizes are the larger of both head sizes, as blocks.
AttentionTable = Mapping[int, Mapping[int, Mapping[int, AttentionConfig]]]
_A = AttentionConfig

_FORWARD_32 = {64: _A(4, 2, 32, 32), 128: _A(8, 1, 32, 32), 256: _A(8, 1, 16, 16)}
FORWARD: AttentionTable = {
    80: {16: {64: _A(8, 3, 128, 64), 128: _A(8, 3, 128, 64), 256: _A(8, 2, 64, 32)}, 32: _FORWARD_32},
    90: {16: {64: _A(8, 3, 128, 128), 128: _A(8, 3, 128, 64), 256: _A(8, 2, 128, 32)}, 32: _FORWARD_32},
    100: {16: {64: _A(8, 3, 128, 64), 128: _A(8, 3, 128, 64), 256: _A(8, 2, 128, 32)}, 32: _FORWARD_32},
}

# With an attn_mask its entries and their addresses take registers too: narrower tiles.
MASKED: AttentionTable = {
    80: {16: {128: _A(8, 2, 64, 32), 256: _A(8, 2, 64, 32)}, 32: _FORWARD_32},
    90: {16: {128: _A(8, 2, 128, 32), 256: _A(8, 2, 64, 32)}, 32: _FORWARD_32},
    100: {16: {128: _A(8, 2, 64, 32), 256: _A(8, 2, 64, 32)}, 32: _FORWARD_32},
}

# With a key map: the turned query stays in registers, where the query itself is read from shared memory. No entries for
# 256 and for 32 bits: the product with the matrix leaves the registers, so such maps are written.
FOLDED: AttentionTable = {
    80: {16: {64: _A(8, 3, 128, 64), 128: _A(8, 3, 128, 64)}},
    90: {16: {64: _A(8, 3, 128, 64), 128: _A(8, 2, 128, 64)}},
    100: {16: {64: _A(8, 3, 128, 64), 128: _A(8, 3, 128, 64)}},
}

_QUERY_32 = {64: _A(4, 2, 32, 32), 128: _A(4, 2, 32, 32), 256: _A(8, 1, 32, 32)}
BACKWARD_QUERY: AttentionTable = {
    80: {16: {64: _A(8, 3, 128, 64), 128: _A(4, 2, 64, 64), 256: _A(8, 2, 64, 32)}, 32: _QUERY_32},
    90: {16: {64: _A(8, 3, 128, 64), 128: _A(8, 3, 128, 64), 256: _A(8, 2, 128, 16)}, 32: _QUERY_32},
    100: {16: {64: _A(8, 3, 128, 64), 128: _A(8, 2, 128, 64), 256: _A(8, 2, 64, 32)}, 32: _QUERY_32},
}

# Two accumulators: at 256 they fill the registers whatever the tile, and 32 rows are below what wgmma takes.
_KEYS_32 = {64: _A(8, 1, 32, 32), 128: _A(8, 1, 32, 32), 256: _A(8, 1, 16, 16)}
BACKWARD_KEYS: AttentionTable = {
    80: {16: {64: _A(8, 3, 64, 128), 128: _A(8, 2, 128, 64), 256: _A(8, 2, 32, 32)}, 32: _KEYS_32},
    90: {16: {64: _A(8, 3, 64, 128), 128: _A(8, 3, 64, 128), 256: _A(8, 2, 32, 32)}, 32: _KEYS_32},
    100: {16: {64: _A(8, 2, 64, 128), 128: _A(8, 2, 64, 128), 256: _A(8, 2, 32, 32)}, 32: _KEYS_32},
}

# Few query rows against many keys: memory decides, so what counts is how many bytes are on their way. Which keys are
# read at all depends on their positions, which are loaded first: of five stages three go to that, and two tiles of
# keys and values are fetched ahead, 64 KB. 4 warps would run out of registers with a mask or a bias. A larger head
# size takes fewer keys. 32 bits: products without tensor cores, from registers.
DecodeTable = Mapping[int, Mapping[int, Mapping[int, DecodeConfig]]]
_DECODE_16 = {64: DecodeConfig(8, 5, 128), 128: DecodeConfig(8, 5, 64), 256: DecodeConfig(8, 3, 32)}
_DECODE_32 = {64: DecodeConfig(4, 2, 32), 128: DecodeConfig(8, 2, 32), 256: DecodeConfig(8, 1, 16)}
DECODE: DecodeTable = {capability: {16: _DECODE_16, 32: _DECODE_32} for capability in ARCHITECTURES}

#: In the interpreter time goes by operations, and shapes of a few dozen tokens should still make several tiles.
INTERPRETED = {"forward": _A(1, 1, 32, 16), "query": _A(1, 1, 16, 32), "keys": _A(1, 1, 32, 32)}
INTERPRETED_DECODE = DecodeConfig(1, 1, 16)

#: What MODA_KERNELS_AUTOTUNE=1 tries beside the table's own entry.
CANDIDATES = {
    "forward": [
        _A(w, s, q, k) for s in (2, 3, 4)
        for q, k, w in ((128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 64, 4), (128, 32, 8), (64, 128, 4))
    ],
    "query": [
        _A(w, s, q, k) for s in (2, 3)
        for q, k, w in ((128, 64, 8), (128, 32, 8), (64, 64, 4), (64, 128, 4), (128, 128, 8))
    ],
    "keys": [
        _A(w, s, q, k) for s in (2, 3)
        for q, k, w in ((64, 128, 8), (32, 128, 8), (64, 64, 4), (64, 64, 8), (128, 64, 8), (128, 128, 8))
    ],
}  # fmt: skip
