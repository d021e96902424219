"""`DecodeState`: what MODA remembers beside a KV cache, so that a new token costs one token's work (spec: "Decoding").

The cache holds raw keys. Beside it, for each layer, stand running Gram sums per modality and, with the causal scope,
the aligned keys: those never change once made. Aligned keys are not put into the cache in place of raw ones, because
after a crop sums are made again from raw keys (never subtracted), and because one rule for all scopes is easier to live
with; the price is half a cache more for each causal layer. Layouts are segmented anew for each append: linear integer
work once for all layers, which is little beside one layer's attention over the same tokens.
"""

from moda_kernels.alignment.memory.layer import LayerState
from moda_kernels.alignment.memory.state import DecodeState, layer_of

__all__ = ["DecodeState", "LayerState", "layer_of"]
