"""MODA attention (MOdular Duplex Attention, arXiv 2507.04635) for multimodal models, in the place of torch SDPA."""

from importlib.metadata import PackageNotFoundError, version

from moda_kernels import mkl, reference
from moda_kernels.alignment import DuplexAligner, align_keys, gram_affinity, modality_gram, released_key_map
from moda_kernels.attention import moda_attention
from moda_kernels.backends import use_backend
from moda_kernels.decoding import DecodeState
from moda_kernels.diagnostics import ModalDisparity, attention_share, modal_disparity, plot_attention_share
from moda_kernels.keymap import KeyMap
from moda_kernels.layout import ModalityLayout, segment_modalities
from moda_kernels.mask import ModularMask, Visibility
from moda_kernels.ops import ModaAttention, SegmentGram, SegmentProject
from moda_kernels.pseudo import PseudoAttention
from moda_kernels.replace import replace_sdpa

mkl.choose_kernels()

try:
    __version__ = version("moda_kernels")
except PackageNotFoundError:  # used from a source tree
    __version__ = "0+source"

__all__ = [
    "DecodeState",
    "DuplexAligner",
    "KeyMap",
    "ModaAttention",
    "ModalDisparity",
    "ModalityLayout",
    "ModularMask",
    "PseudoAttention",
    "SegmentGram",
    "SegmentProject",
    "Visibility",
    "align_keys",
    "attention_share",
    "gram_affinity",
    "modal_disparity",
    "modality_gram",
    "moda_attention",
    "plot_attention_share",
    "reference",
    "released_key_map",
    "replace_sdpa",
    "segment_modalities",
    "use_backend",
]
