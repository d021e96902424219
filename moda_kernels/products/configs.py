"""Block sizes, warps and stages of the Gram and projection kernels, with the reason beside each entry. Tables as in
`runtime/launch.py`; `runtime/aot.py` compiles what stands here."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from moda_kernels.runtime.architectures import Target
from moda_kernels.runtime.launch import Launch

C = TypeVar("C", bound=Launch)


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


GramTable = Mapping[Target, Mapping[int, Mapping[int, GramConfig]]]
ProjectTable = Mapping[Target, Mapping[int, Mapping[int, ProjectConfig]]]


def _on_cdna(table: Mapping[int, Mapping[int, C]]) -> Mapping[int, Mapping[int, C]]:
    """CDNA has 64 KB for tiles, so one stage, and the most registers with 4 wavefronts."""
    return {
        bits: {limit: replace(config, num_warps=4, num_stages=1) for limit, config in by_size.items()}
        for bits, by_size in table.items()
    }


# Gram sums read their tokens once where a tile holds all D x D of them: up to 128, in 64 registers of each of 256
# threads. float32 is multiplied without tensor cores, from registers: smaller tiles.
_GRAM_32 = {64: GramConfig(4, 2, 32, 64, 64), 256: GramConfig(8, 2, 32, 64, 64)}
_GRAM_16 = {64: GramConfig(4, 3, 64, 64, 64), 256: GramConfig(8, 3, 64, 128, 128)}
# sm_80 would not fetch a tile early that is both factors of its product: it loads it twice, the second time from L2.
_GRAM_16_TWICE = {limit: replace(config, load_once=False) for limit, config in _GRAM_16.items()}
GRAM: GramTable = {
    80: {16: _GRAM_16_TWICE, 32: _GRAM_32},
    86: {16: _GRAM_16_TWICE, 32: _GRAM_32},
    90: {16: _GRAM_16, 32: _GRAM_32},
    100: {16: _GRAM_16, 32: _GRAM_32},
    120: {16: _GRAM_16_TWICE, 32: _GRAM_32},
    "gfx942": _on_cdna({16: _GRAM_16, 32: _GRAM_32}),
}

# The norm needs whole rows, so columns of y are fewer; two parts of u are multiplied.
_UNIT_GRAM = {
    16: {64: GramConfig(4, 2, 64, 64, 64), 128: GramConfig(8, 2, 64, 128, 64), 256: GramConfig(8, 2, 64, 256, 32)},
    32: {64: GramConfig(4, 2, 32, 64, 64), 128: GramConfig(8, 2, 32, 128, 32), 256: GramConfig(8, 2, 32, 256, 16)},
}
_UNIT_GRAM_99_KB = {**_UNIT_GRAM, 16: {**_UNIT_GRAM[16], 256: GramConfig(8, 2, 32, 256, 32)}}
UNIT_GRAM: GramTable = {
    80: _UNIT_GRAM,
    86: _UNIT_GRAM_99_KB,
    90: _UNIT_GRAM,
    100: _UNIT_GRAM,
    120: {**_UNIT_GRAM, 16: {**_UNIT_GRAM[16], 256: GramConfig(8, 1, 32, 256, 32)}},
    "gfx942": _on_cdna(_UNIT_GRAM),
}

# A matrix stays in shared memory in two parts, 64 of its columns: 64 KB at 256. No spills with these.
_PROJECT = {
    16: {64: ProjectConfig(4, 3, 64, 64), 128: ProjectConfig(4, 3, 64, 64), 256: ProjectConfig(4, 2, 64, 64)},
    32: {64: ProjectConfig(4, 2, 32, 64), 128: ProjectConfig(8, 2, 32, 64), 256: ProjectConfig(8, 2, 32, 32)},
}
# Scaling float16's columns of 256 numbers takes more registers than 4 warps of sm_100 have.
_WIDER_PROJECT = {**_PROJECT[16], 256: ProjectConfig(8, 2, 64, 64)}
# 99 KB of shared memory; and with 64 columns of 32 bits ptxas keeps to 48 registers and spills.
_PROJECT_99_KB = {
    16: {**_PROJECT[16], 256: ProjectConfig(8, 2, 64, 32)},
    32: {64: ProjectConfig(4, 2, 32, 64), 128: ProjectConfig(8, 2, 32, 32), 256: ProjectConfig(8, 2, 32, 32)},
}
PROJECT: ProjectTable = {
    80: _PROJECT,
    86: _PROJECT_99_KB,
    90: _PROJECT,
    100: {**_PROJECT, 16: _WIDER_PROJECT},
    120: {**_PROJECT_99_KB, 32: {**_PROJECT_99_KB[32], 256: ProjectConfig(8, 2, 32, 16)}},
    "gfx942": _on_cdna(_PROJECT),
}

# Two matrices, each in two parts, and five products: at 128 narrower than 8 warps of sm_90's 128 rows need all 255
# registers; at 256 anything larger than this leaves the registers.
_WIDE_UNIT_PROJECT = ProjectConfig(8, 1, 32, 32)
_UNIT_PROJECT_32 = {64: ProjectConfig(4, 2, 32, 64), 128: ProjectConfig(8, 2, 32, 32), 256: ProjectConfig(8, 2, 32, 16)}
_UNIT_PROJECT_80 = {
    16: {64: ProjectConfig(4, 2, 64, 64), 128: ProjectConfig(8, 2, 64, 32), 256: _WIDE_UNIT_PROJECT},
    32: {**_UNIT_PROJECT_32, 256: ProjectConfig(8, 1, 32, 16)},  # a second stage leaves the registers
}
UNIT_PROJECT: ProjectTable = {
    80: _UNIT_PROJECT_80,
    86: _UNIT_PROJECT_80,
    120: {**_UNIT_PROJECT_80, 16: {**_UNIT_PROJECT_80[16], 256: ProjectConfig(8, 1, 32, 16)}},
    "gfx942": {
        16: {64: ProjectConfig(4, 1, 64, 64), 128: ProjectConfig(4, 1, 64, 32), 256: ProjectConfig(4, 1, 32, 16)},
        32: {64: ProjectConfig(4, 1, 32, 64), 128: ProjectConfig(4, 1, 32, 32), 256: ProjectConfig(4, 1, 32, 16)},
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
