"""MODA attention (MOdular Duplex Attention, arXiv 2507.04635) for multimodal models, in the place of torch SDPA."""

from importlib.metadata import PackageNotFoundError, version

from moda_kernels import reference
from moda_kernels.alignment.aligner import DuplexAligner
from moda_kernels.alignment.gram import gram_affinity, modality_gram
from moda_kernels.alignment.maps import KeyMap, align_keys
from moda_kernels.alignment.memory import DecodeState
from moda_kernels.alignment.released import released_key_map
from moda_kernels.alignment.training import parameter_groups
from moda_kernels.attention import moda_attention
from moda_kernels.backends import use_backend
from moda_kernels.backends.triton.operators import ModaAttention
from moda_kernels.diagnostics import ModalDisparity, attention_share, modal_disparity, plot_attention_share
from moda_kernels.products import SegmentGram, SegmentProject
from moda_kernels.replace import replace_sdpa
from moda_kernels.runtime import mkl_race
from moda_kernels.tokens.layout import ModalityLayout
from moda_kernels.tokens.mask import ModularMask, Visibility
from moda_kernels.tokens.pseudo import PseudoAttention
from moda_kernels.tokens.segments import segment_modalities

mkl_race.choose_kernels()

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
    "parameter_groups",
    "plot_attention_share",
    "reference",
    "released_key_map",
    "replace_sdpa",
    "segment_modalities",
    "use_backend",
]
