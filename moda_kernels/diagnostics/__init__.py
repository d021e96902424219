"""Who attends to whom, and is alignment doing anything: numbers made with attention, and pictures of them."""

from moda_kernels.diagnostics.another import keys_of_another_document
from moda_kernels.diagnostics.pictures import plot_attention_share
from moda_kernels.diagnostics.report import AlignmentReport, LayerReport, alignment_report
from moda_kernels.diagnostics.shares import ModalDisparity, attention_share, modal_disparity

__all__ = [
    "AlignmentReport",
    "LayerReport",
    "ModalDisparity",
    "alignment_report",
    "attention_share",
    "keys_of_another_document",
    "modal_disparity",
    "plot_attention_share",
]
