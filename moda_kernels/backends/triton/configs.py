"""Block sizes, warps and stages of the attention kernels, with the reason beside each entry. Tables as in
`runtime/launch.py`; `runtime/aot.py` compiles what stands here."""

from collections.abc import Mapping
from dataclasses import dataclass

from moda_kernels.runtime.architectures import Target
from moda_kernels.runtime.launch import Launch


@dataclass(frozen=True)
class AttentionConfig(Launch):
    """Rows of a tile of queries and of a tile of keys, and how many rows of the tiles that it walks (keys; queries on
    the backward's keys' side) a program takes at a time where it compares positions: masks take registers."""

    block_q: int
    block_k: int
    part: int = 32

    def numbers(self) -> list[int]:
        """As operators take them, see `launch.py`."""
        return [self.block_q, self.block_k, self.num_warps, self.num_stages, self.part]


@dataclass(frozen=True)
class DecodeConfig(Launch):
    """Keys of a tile where few query rows meet many keys; the tile of queries is as large as they are, 16 or 32."""

    block_k: int

    def numbers(self) -> list[int]:
        """As operators take them, see `launch_decode.py`."""
        return [self.block_k, self.num_warps, self.num_stages]


# Attention. 16 bits: what keeps accumulators in registers decides. sm_90: a side that stays in place needs 128 rows for
# 8 warps, or products are computed twice; a loop whose first loads wait for a list entry uses a stage for it. sm_80 has
# no asynchronous products, so scores and weights take registers beside the accumulator. sm_100 reads accumulators from
# tensor memory into registers, so parts are 16 keys where 32 spill: at 64 beyond 128 registers, which let two programs
# share a multiprocessor, at 256 beyond 255. 32 bits: exact products have no tensor cores; small tiles keep operands in
# registers. Sizes are the larger of both head sizes, as blocks.
AttentionTable = Mapping[Target, Mapping[int, Mapping[int, AttentionConfig]]]
_A = AttentionConfig

# sm_86 and 89 (RTX 30 and 40, A10, A40, L4, L40S) and sm_120 (RTX 50) multiply as sm_80 does and have 99 KB of shared
# memory in place of 163: fewer rows or stages where sm_80's do not fit. CDNA 3 (and 2, 4) has 64 KB, so one stage; with
# 4 wavefronts a thread has 512 registers, with 8 it has 256; there are matrix instructions for 32 bits, too.
_FORWARD_32 = {64: _A(4, 2, 32, 32), 128: _A(8, 1, 32, 32), 256: _A(8, 1, 16, 16, 16)}
_FORWARD_80 = {64: _A(8, 3, 128, 64), 128: _A(8, 3, 128, 64), 256: _A(8, 2, 64, 32)}
_FORWARD_CDNA = {
    16: {64: _A(4, 1, 128, 64), 128: _A(4, 1, 128, 64), 256: _A(4, 1, 64, 32)},
    32: {64: _A(4, 1, 64, 32), 128: _A(4, 1, 64, 32), 256: _A(4, 1, 32, 16, 16)},
}
FORWARD: AttentionTable = {
    80: {16: _FORWARD_80, 32: _FORWARD_32},
    86: {16: _FORWARD_80, 32: _FORWARD_32},
    90: {16: {64: _A(8, 3, 128, 128), 128: _A(8, 3, 128, 64), 256: _A(8, 2, 128, 32)}, 32: _FORWARD_32},
    100: {16: {64: _A(8, 3, 128, 64, 16), 128: _A(8, 3, 128, 64), 256: _A(8, 2, 128, 32, 16)}, 32: _FORWARD_32},
    120: {16: _FORWARD_80, 32: _FORWARD_32},
    "gfx942": _FORWARD_CDNA,
}

# With an attn_mask its entries and their addresses take registers too: narrower tiles.
_MASKED_16 = {128: _A(8, 2, 64, 32), 256: _A(8, 2, 64, 32)}
MASKED: AttentionTable = {
    80: {16: _MASKED_16, 32: _FORWARD_32},
    86: {16: _MASKED_16, 32: _FORWARD_32},
    90: {16: {128: _A(8, 2, 128, 32), 256: _A(8, 2, 64, 32)}, 32: _FORWARD_32},
    100: {16: _MASKED_16, 32: _FORWARD_32},
    120: {16: _MASKED_16, 32: _FORWARD_32},
    "gfx942": {16: {128: _A(4, 1, 64, 32), 256: _A(4, 1, 64, 32)}, 32: _FORWARD_CDNA[32]},
}

# With a key map: the turned query stays in registers, where the query itself is read from shared memory. No entries for
# 256 and for 32 bits: the product with the matrix leaves the registers, so such maps are written.
FOLDED: AttentionTable = {
    80: {16: {64: _A(8, 3, 128, 64), 128: _A(8, 2, 128, 64)}},
    86: {16: {64: _A(8, 3, 128, 64), 128: _A(8, 2, 64, 64)}},
    90: {16: {64: _A(8, 3, 128, 64), 128: _A(8, 2, 128, 64)}},
    100: {16: {64: _A(8, 3, 128, 64), 128: _A(8, 3, 128, 64)}},
    120: {16: {64: _A(8, 3, 128, 64), 128: _A(8, 2, 64, 64)}},
    "gfx942": {16: {64: _A(4, 1, 128, 64), 128: _A(4, 1, 64, 64)}},
}

_QUERY_32 = {64: _A(4, 2, 32, 32), 128: _A(8, 1, 32, 32), 256: _A(8, 1, 32, 32)}
_QUERY_99_KB = {64: _A(8, 3, 128, 64), 128: _A(4, 2, 64, 64), 256: _A(8, 1, 64, 32)}
_QUERY_32_99_KB = {64: _A(4, 2, 32, 32), 128: _A(8, 1, 32, 32), 256: _A(8, 1, 16, 16, 16)}
BACKWARD_QUERY: AttentionTable = {
    80: {16: {64: _A(8, 3, 128, 64), 128: _A(4, 2, 64, 64), 256: _A(8, 2, 64, 32)}, 32: _QUERY_32},
    86: {16: _QUERY_99_KB, 32: _QUERY_32_99_KB},
    90: {16: {64: _A(8, 3, 128, 64), 128: _A(8, 3, 128, 64), 256: _A(8, 2, 128, 16, 16)}, 32: _QUERY_32},
    100: {16: {64: _A(8, 3, 128, 64), 128: _A(8, 2, 128, 64), 256: _A(8, 2, 64, 32)}, 32: _QUERY_32},
    120: {16: _QUERY_99_KB, 32: _QUERY_32_99_KB},
    "gfx942": {
        16: {64: _A(4, 1, 128, 64), 128: _A(4, 1, 128, 32), 256: _A(4, 1, 64, 32)},
        32: {64: _A(4, 1, 64, 32), 128: _A(4, 1, 64, 32), 256: _A(4, 1, 32, 16, 16)},
    },
}

# Two accumulators: at 256 they fill the registers whatever the tile, and 32 rows are below what wgmma takes.
_KEYS_32 = {64: _A(8, 1, 32, 32), 128: _A(8, 1, 32, 32), 256: _A(8, 1, 16, 16, 16)}
_KEYS_99_KB = {64: _A(8, 3, 64, 128, 16), 128: _A(8, 2, 64, 64), 256: _A(8, 2, 32, 32)}
BACKWARD_KEYS: AttentionTable = {
    80: {16: {64: _A(8, 3, 64, 128, 16), 128: _A(8, 2, 128, 64), 256: _A(8, 2, 32, 32)}, 32: _KEYS_32},
    86: {16: _KEYS_99_KB, 32: _KEYS_32},
    90: {16: {64: _A(8, 3, 64, 128), 128: _A(8, 2, 64, 128), 256: _A(8, 2, 32, 32)}, 32: _KEYS_32},
    100: {16: {64: _A(8, 2, 64, 128), 128: _A(8, 2, 64, 128), 256: _A(8, 2, 32, 32)}, 32: _KEYS_32},
    120: {16: _KEYS_99_KB, 32: _KEYS_32},
    "gfx942": {
        16: {64: _A(4, 1, 64, 64), 128: _A(4, 1, 32, 64), 256: _A(4, 1, 16, 32, 16)},
        32: {64: _A(4, 1, 32, 32), 128: _A(4, 1, 32, 32), 256: _A(4, 1, 16, 16, 16)},
    },
}

# With an attn_mask every tile is taken in parts, and of sm_90 those of 32 rows spill.
MASKED_KEYS: AttentionTable = {
    **BACKWARD_KEYS, 90: {**BACKWARD_KEYS[90], 16: {**BACKWARD_KEYS[90][16], 128: _A(8, 2, 64, 128, 16)}},
}  # fmt: skip

# With more walks than a kernel unrolls a loop goes over them, around the loops over tiles: of sm_100 the compiler then
# keeps accumulators in registers between those, and 160 to 740 bytes spill. So fewer keys at a time; one stage where
# two accumulators are left over.
_MANY_100 = {kind: {**table[100], 16: {**table[100][16], 128: few}} for kind, table, few in (
    ("forward", FORWARD, _A(8, 3, 128, 32)), ("query", BACKWARD_QUERY, _A(8, 2, 128, 32)),
    ("keys", BACKWARD_KEYS, _A(8, 1, 64, 64)),
)}  # fmt: skip
MANY: Mapping[str, AttentionTable] = {
    "forward": {**FORWARD, 100: _MANY_100["forward"]},
    "query": {**BACKWARD_QUERY, 100: _MANY_100["query"]},
    "keys": {**BACKWARD_KEYS, 100: _MANY_100["keys"]},
}

# Few query rows against many keys: memory decides, so what counts is how many bytes are on their way. Which keys are
# read at all depends on their positions, which are loaded first: of five stages three go to that, and two tiles of
# keys and values are fetched ahead, 64 KB. 4 warps would run out of registers with a mask or a bias. A larger head
# size takes fewer keys. 32 bits: products without tensor cores, from registers.
DecodeTable = Mapping[Target, Mapping[int, Mapping[int, DecodeConfig]]]
_DECODE_16 = {64: DecodeConfig(8, 5, 128), 128: DecodeConfig(8, 5, 64), 256: DecodeConfig(8, 3, 32)}
_DECODE_32 = {64: DecodeConfig(4, 2, 32), 128: DecodeConfig(8, 2, 32), 256: DecodeConfig(8, 1, 16)}
_DECODE_CDNA = {
    16: {64: DecodeConfig(4, 2, 64), 128: DecodeConfig(4, 2, 32), 256: DecodeConfig(4, 1, 32)},
    32: {64: DecodeConfig(4, 2, 32), 128: DecodeConfig(4, 1, 32), 256: DecodeConfig(4, 1, 16)},
}
# Of sm_86 ptxas wants more programs at a time: with 32 keys of 128 numbers it spills.
_DECODE_99_KB = {16: _DECODE_16, 32: {**_DECODE_32, 128: DecodeConfig(8, 2, 16)}}
DECODE: DecodeTable = {
    80: {16: _DECODE_16, 32: _DECODE_32},
    86: _DECODE_99_KB,
    90: {16: _DECODE_16, 32: _DECODE_32},
    100: {16: _DECODE_16, 32: _DECODE_32},
    120: _DECODE_99_KB,
    "gfx942": _DECODE_CDNA,
}

#: The kernels around them: sums over the rows of a tile in the backward, and what turns queries and joins shares in
#: decoding. Memory decides.
ROW_SUMS = Launch(num_warps=8, num_stages=3)
AROUND_DECODE = Launch(num_warps=4, num_stages=3)

#: In the interpreter time goes by operations, and shapes of a few dozen tokens should still make several tiles.
INTERPRETED = {"forward": _A(1, 1, 32, 32, 16), "query": _A(1, 1, 16, 32, 16), "keys": _A(1, 1, 32, 32, 16)}
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
