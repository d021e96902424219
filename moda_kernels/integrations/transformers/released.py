"""The authors' released weights (repository KwaiVGI/MODA) on a LLaVA-NeXT or Llama model of transformers."""

import logging
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moda_kernels.integrations.transformers.attention import ALIGNER
from moda_kernels.integrations.transformers.model import _attention_layers, _text_model, _unwrapped, enable
from moda_kernels.runtime import checks

log = logging.getLogger("moda_kernels")

_NAME = re.compile(r"layers\.(\d+)\.self_attn\.(ratio_v|pfuser_v|ratio_t|pfuser_t)(?:\.(weight|bias))?$")
_OURS = {"ratio_v": "ratio", "pfuser_v": "weight"}


class Loaded(NamedTuple):
    """What :func:`load_released` did, by the names of the release.

    Attributes:
        used: names whose numbers are now in the model.
        ignored: names of parameters that do nothing in the release.
    """

    used: tuple[str, ...]
    ignored: tuple[str, ...]


def load_released(model: Any, state_dict: Mapping[str, Tensor]) -> Loaded:
    """Enable a model with the released variant of duplex alignment and fill it with the release's parameters.

    Per layer these are ``….layers.<i>.self_attn.ratio_v`` ``[D]`` (or ``[1, 1, D]``) and ``pfuser_v`` ``[D, D]`` (or
    ``pfuser_v.weight``). ``ratio_t`` and ``pfuser_t`` exist in the release and do nothing there: they are ignored, and
    the log says so. Everything else in the state dict is left alone: load the language model and the vision tower
    with transformers. Tested with random numbers under the release's names and shapes; the real 8B weights have not
    been tried.

    The variant's sums run over whole sequences: each attention call equals a full pass over the keys of its cache, but
    whole models do not decode exactly (see :func:`enable`).

    Args:
        model: a LLaVA-NeXT or LLaVA model, or a plain Llama (then call it within ``modality_ids``: 0 text, 1 vision).
        state_dict: the release's parameters by name, with any prefix.

    Returns:
        :class:`Loaded`.

    Raises:
        ValueError: a layer without ``ratio_v`` or ``pfuser_v``, other layers than the model's, other shapes, a bias; as
            :func:`enable`. The model is then as it was.
    """
    layers = _attention_layers(_text_model(_unwrapped(model))[0])
    found: dict[tuple[int, str], str] = {}
    ignored = []
    for name in state_dict:
        match = _NAME.search(name)
        if match is None:
            continue
        index, kind, end = int(match[1]), match[2], match[3]
        if kind.endswith("_t"):
            ignored.append(name)
        elif end == "bias":
            raise checks.wrong_value("state_dict", "a pfuser_v without bias, as released", name)
        elif index not in layers:
            raise checks.wrong_value("state_dict", f"parameters of the model's {len(layers)} layers", name)
        else:
            found[index, kind] = name
    missing = [f"layers.{i}.self_attn.{kind}" for i in layers for kind in _OURS if (i, kind) not in found]
    if missing:
        raise checks.wrong_value("state_dict", "ratio_v and pfuser_v of every layer", f"none for {missing[0]}")
    for (index, kind), name in found.items():
        dim = layers[index].head_dim
        shapes = [(dim,), (1, 1, dim)] if kind == "ratio_v" else [(dim, dim)]
        if tuple(state_dict[name].shape) not in shapes:
            raise checks.wrong_value(name, f"shape {' or '.join(map(str, shapes))}", state_dict[name])

    enable(model, fusion="released", scope="sequence")
    with torch.no_grad():
        for (index, kind), name in found.items():
            parameter = getattr(getattr(layers[index], ALIGNER), _OURS[kind])
            parameter.copy_(state_dict[name].view_as(parameter))
    if ignored:
        log.warning("load_released: %d parameters do nothing in the release and are ignored: %s", len(ignored), ignored)
    return Loaded(tuple(found.values()), tuple(ignored))
