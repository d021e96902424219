"""Key maps of the released weights (spec: \"Duplex alignment\", release variant)."""

import torch
from torch import Tensor, nn

from moda_kernels import products
from moda_kernels.alignment.maps import KeyMap, ModalityMap, normed, token_major
from moda_kernels.alignment.memory import DecodeState, LayerState, layer_of
from moda_kernels.products.twin import compute_dtype, released_unit
from moda_kernels.runtime import checks
from moda_kernels.tokens.layout import ModalityLayout
from moda_kernels.tokens.segments import as_layout


def released_key_map(
    key: Tensor,
    value: Tensor,
    layout: ModalityLayout | Tensor | None,
    ratio: Tensor,
    weight: Tensor,
    *,
    vision: int = 1,
    text: int = 0,
    state: DecodeState | LayerState | None = None,
) -> KeyMap:
    """The alignment of the authors' released weights (spec: "Release variant"): vision keys only, through the text's
    normed Gram of unit keys against *values*; k' = (k + r ⊙ (u Ĝ)) Wᵀ.

    Args:
        key, value: ``[B, Hkv, L, D]``, packed ``[T, Hkv, D]``, of equal shape; keys after the rotary embedding.
        layout: their layout (or modality ids ``[B, L]``).
        ratio: the release's ``ratio_v``, ``[D]`` or ``[1, 1, D]``. weight: its ``pfuser_v``, ``[D, D]``.
        vision, text: the two modalities.
        state: while decoding, as in :meth:`DuplexAligner.forward`; ``layout`` may then be None.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices other than these; with ``state`` as the aligner.
    """
    memory = None if state is None else layer_of(state)
    if memory is not None:
        layout = memory.layout_for(key, layout)
    elif layout is None:
        raise checks.wrong_value("layout", "a ModalityLayout, modality ids, or state", None)
    layout = as_layout(layout)
    keys, values = token_major("key", key, layout), token_major("value", value, layout)
    checks.shape("value", values, keys.shape, "of key (tokens, heads, head size)")
    dim, modalities = keys.shape[-1], layout.num_modalities
    for name, modality in (("vision", vision), ("text", text)):
        checks.integer(name, modality, 0)
    if vision == text:
        raise checks.wrong_value("vision", "another modality than text", vision)
    checks.float_tensor("ratio", ratio)
    if tuple(ratio.shape) not in ((dim,), (1, 1, dim)):
        raise checks.wrong_value("ratio", f"[D] = ({dim},) or [1, 1, D]", ratio)
    checks.shape("weight", checks.float_tensor("weight", weight), (dim, dim), "[D, D]")
    for name, parameter in (("ratio", ratio), ("weight", weight)):
        checks.same_device(name, parameter, key.device, "key")

    dtype = compute_dtype(key, value)
    identity = torch.eye(dim, dtype=dtype, device=key.device)
    of_vision = layout.chosen((vision,))
    with torch.autocast(key.device.type, enabled=False):
        if memory is None:
            gram = products.segment_gram(keys, values, _text_grouping(layout, text), unit=True)
        else:
            begin, end = memory.begin(causal=False)
            new_values, _ = memory.new_tokens("value", value, begin, end)
            new_keys, summed = memory.new_tokens("key", key, begin, end)
            # Padding may hold anything.
            wide = torch.where((summed.modality.flatten() >= 0)[:, None, None], new_keys.to(dtype), 0)
            text_group = torch.where(summed.modality.flatten() == text, summed.sequence.flatten().long(), -1)
            gram = memory.add(released_unit(wide), new_values.to(dtype), text_group, 1, end)[:, 0]
        turned = weight.to(dtype).T
        unit = (normed(gram.to(dtype), "row") * ratio.to(dtype).flatten()) @ turned
    # A layout without the modality `text` has no text tokens: nothing is mapped.
    has_text = layout.counts[:, text] > 0 if text < modalities else torch.zeros_like(layout.counts[:, 0]) > 0
    mapped = has_text[:, None] & of_vision
    where = mapped[..., None, None, None]
    matrix = torch.where(where, turned, identity).expand(-1, -1, keys.shape[-2], -1, -1)
    return ModalityMap(matrix, mapped, torch.where(where, unit[:, None], 0), layout)


def _text_grouping(layout: ModalityLayout, text: int) -> products.Grouping:
    """The tokens of one modality, by sequence."""

    def make() -> products.Grouping:
        of_text = layout.modality.flatten() == text
        return products.group_tokens(torch.where(of_text, layout.sequence.flatten().long(), -1), layout.num_sequences)

    return layout.remember(("grouping", "sequence", text), make)


class ReleasedAligner(nn.Module):
    """The alignment of the authors' released weights: ``ratio`` is their ratio_v ``[D]``, ``weight`` their pfuser_v
    ``[D, D]``. Fresh ones change nothing."""

    def __init__(self, head_dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.ratio = nn.Parameter(torch.zeros(head_dim, device=device, dtype=dtype))
        self.weight = nn.Parameter(torch.eye(head_dim, device=device, dtype=dtype))

    def forward(
        self, key: Tensor, layout: ModalityLayout | None = None, *, value: Tensor, state: LayerState | None = None
    ) -> KeyMap:
        return released_key_map(key, value, layout, self.ratio, self.weight, state=state)
