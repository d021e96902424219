"""The Gram products of duplex alignment: kernels beside their PyTorch twin, operators and gradients above both.

`operators.py` is the only door: opaque `torch.library` operators (what a compiler sees of a kernel) and, above them,
public `torch.autograd.Function`s.
"""

from moda_kernels.products.operators import SegmentGram, SegmentProject, group_tokens, segment_gram, segment_project
from moda_kernels.products.twin import Grouping

__all__ = ["Grouping", "SegmentGram", "SegmentProject", "group_tokens", "segment_gram", "segment_project"]
