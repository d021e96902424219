"""MODA in models of Hugging Face transformers: :func:`enable` a model, train it, `generate()` with it.

`model.py` prepares a model and takes it back, `ids.py` finds out which token is of which modality, `attention.py` is
what transformers calls in each layer, `cache.py` keeps a `DecodeState` beside the KV cache, `released.py` loads the
authors' weights. transformers itself is imported when a model is enabled.
"""

from moda_kernels.integrations.transformers.ids import modality_ids
from moda_kernels.integrations.transformers.model import disable, enable
from moda_kernels.integrations.transformers.released import load_released

__all__ = ["disable", "enable", "load_released", "modality_ids"]
