"""`replace_sdpa`: MODA attention in models that nobody rewrote, through the SDPA calls that they make."""

import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moda_kernels.alignment.maps import KeyMap
from moda_kernels.attention import moda_attention
from moda_kernels.tokens.layout import ModalityLayout
from moda_kernels.tokens.segments import as_layout

KeyMapMaker = Callable[[Tensor, ModalityLayout], KeyMap]
_OPTIONS = ("mask", "key_map", "pair_bias", "pseudo", "duplex", "branch_weights", "backend")


class replace_sdpa(TorchFunctionMode):  # noqa: N801 - used as a function in a with statement
    """Within the block, SDPA calls whose keys fit the layout become :func:`moda_attention`; all others pass untouched.

    ::

        with mk.replace_sdpa(layout=layout, mask=mk.ModularMask.bidirectional_within(2, [1])):
            model(x)

    A call fits where its key and value are ``[B, H, L, D]`` with the layout's B and L (packed: ``[1, H, T, D]``). What
    the model passes to SDPA stays in force (attn_mask, dropout_p, scale, enable_gqa), but ``mask`` here takes the place
    of the call's ``is_causal``. ``torch.nn.MultiheadAttention`` and the layers made of it are covered (need_weights
    must be False: with weights they don't call SDPA).

    Args:
        layout: a ModalityLayout, or modality ids ``[B, L]``.
        mask, pair_bias, pseudo, duplex, branch_weights, backend: as in :func:`moda_attention`.
        key_map: as there, or a function (key, layout) -> KeyMap, such as a :class:`DuplexAligner`, called with the keys
            of each call.

    Attributes:
        replaced: how many calls have become moda_attention.

    Raises:
        TypeError: an unknown option. Inside the block: what :func:`moda_attention` raises.
    """

    def __init__(self, *, layout: ModalityLayout | Tensor, **options: Any) -> None:
        super().__init__()
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:
            raise TypeError(f"replace_sdpa: expected options from {', '.join(_OPTIONS)}, got {', '.join(unknown)}")
        self.layout = as_layout(layout, getattr(options.get("mask"), "num_modalities", None))
        self.options = options
        self.replaced = 0

    def __torch_function__(
        self, func: Callable[..., Any], kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._sdpa(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _fits(self, query: Any, key: Any, value: Any) -> bool:
        if not all(isinstance(t, Tensor) and t.dim() == 4 for t in (query, key, value)):
            return False
        shape = (1, self.layout.num_tokens) if self.layout.packed else tuple(self.layout.modality.shape)
        return all((t.shape[0], t.shape[2]) == shape for t in (key, value))

    def _sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not self._fits(query, key, value):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        options = dict(self.options)
        if self.layout.packed:
            query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
        if callable(options.get("key_map")) and not isinstance(options["key_map"], KeyMap):
            options["key_map"] = options["key_map"](key, self.layout)
        is_causal = is_causal and options.get("mask") is None
        self.replaced += 1
        out = moda_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, layout=self.layout, **options
        )
        assert isinstance(out, Tensor)
        return out.transpose(0, 1)[None] if self.layout.packed else out

    def _multi_head_attention(self, *args: Any, **kwargs: Any) -> Any:
        # A mode doesn't see calls made inside a function that it is asked about, and this Python function hides its
        # SDPA call so. Run a copy of it whose SDPA is ours and which doesn't ask again.
        function = F.multi_head_attention_forward
        names = {"scaled_dot_product_attention": self._sdpa, "has_torch_function": lambda _: False}
        copy = types.FunctionType(
            function.__code__,
            {**function.__globals__, **names},
            argdefs=function.__defaults__,
            closure=function.__closure__,
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        return copy(*args, **kwargs)
