"""Operators and autograd over kernels: the only door to them.

Each file holds opaque `torch.library` operators (private; what a compiler sees of a kernel) and, above them, public
`torch.autograd.Function`s: `grouped.py` the two products of duplex alignment, `attention.py` attention on the Triton
kernels. `library.py` says how operators are defined.
"""

from moda_kernels.grouped import Grouping
from moda_kernels.ops.attention import AttentionPlan, ModaAttention
from moda_kernels.ops.grouped import SegmentGram, SegmentProject, group_tokens, segment_gram, segment_project

__all__ = [
    "AttentionPlan",
    "Grouping",
    "ModaAttention",
    "SegmentGram",
    "SegmentProject",
    "group_tokens",
    "segment_gram",
    "segment_project",
]
