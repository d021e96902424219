"""MODA in models of Hugging Face transformers: :func:`enable` a model, train it, `generate()` with it.

`model.py` prepares a model and takes it back, `families.py` is the table of models, `asked.py` reads the mask that a
model asks for, `hooks.py` and `ids.py` find out which token is of which modality, `attention.py` is what transformers
calls in each layer, `cache.py` keeps a `DecodeState` beside the KV cache, `packing.py` packs documents into rows,
`released.py` loads the authors' weights.

Where transformers is installed, importing this makes known to it ``attn_implementation="moda"``: a model's own mask on
our backends, for any model whose mask rules can say, without aligners (which `enable` adds).
"""

import contextlib

from moda_kernels.integrations.transformers.attention import register
from moda_kernels.integrations.transformers.ids import modality_ids
from moda_kernels.integrations.transformers.model import disable, enable, require_transformers
from moda_kernels.integrations.transformers.packing import PackingCollator
from moda_kernels.integrations.transformers.parallel import context_parallel
from moda_kernels.integrations.transformers.released import load_released

__all__ = ["PackingCollator", "context_parallel", "disable", "enable", "load_released", "modality_ids"]

with contextlib.suppress(ImportError):  # none, or an old one: enable() says so
    require_transformers()
    register()
