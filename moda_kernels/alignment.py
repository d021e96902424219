"""Duplex alignment (MODA Eq. 5-6): keys into the space of the other modalities.

`DuplexAligner` and `released_key_map` make maps (`keymap.py`, `causal.py`) from Gram matrices; `align_keys` applies
them; `modality_gram` and `gram_affinity` are for those who want the matrices themselves.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from moda_kernels import checks, ops
from moda_kernels.causal import CausalMap
from moda_kernels.decoding import DecodeState, KeptKeys, LayerState, layer_of
from moda_kernels.grouped import compute_dtype, released_unit
from moda_kernels.keymap import KeyMap, ModalityMap, fused_matrix, normed, sum_of_others
from moda_kernels.layout import ModalityLayout, segment_modalities

FUSIONS = ("add", "linear", "concat")
NORMS = ("row", "frobenius")
SCOPES = ("sequence", "causal")


def as_layout(layout: ModalityLayout | Tensor, num_modalities: int | None = None) -> ModalityLayout:
    """A layout as it is, or made from modality ids ``[B, L]``."""
    if isinstance(layout, ModalityLayout):
        return layout
    if not isinstance(layout, Tensor):
        raise checks.wrong_type("layout", "a ModalityLayout or a tensor of modality ids [B, L]", layout)
    if layout.dim() != 2:
        raise checks.wrong_value(
            "layout", "a ModalityLayout, or modality ids [B, L] (packed: call segment_modalities)", layout
        )
    return segment_modalities(layout, num_modalities=num_modalities)


def token_major(name: str, x: Tensor, layout: ModalityLayout) -> Tensor:
    """``[B, H, L, D]`` or packed ``[T, H, D]``, checked against the layout → the view ``[B, L, H, D]``, or itself."""
    checks.float_tensor(name, x)
    checks.same_device(name, x, layout.device, "the layout")
    if layout.packed:
        if x.dim() != 3 or x.shape[0] != layout.num_tokens:
            raise checks.wrong_value(name, f"[T, H, D] with T = {layout.num_tokens}, as the packed layout", x)
        return x
    batch, length = layout.modality.shape
    if x.dim() != 4 or x.shape[0] != batch or x.shape[2] != length:
        raise checks.wrong_value(name, f"[B, H, L, D] with B = {batch} and L = {length}, as the layout", x)
    return x.transpose(1, 2)


def to_tokens(name: str, x: Tensor, layout: ModalityLayout) -> Tensor:
    """The same → ``[tokens, H, D]``."""
    return token_major(name, x, layout).flatten(0, -3)


def from_tokens(x: Tensor, layout: ModalityLayout) -> Tensor:
    """``[B, L, H, D]`` or ``[tokens, H, D]`` → the layout's own shape."""
    return x if layout.packed else x.view(*layout.modality.shape, *x.shape[-2:]).transpose(1, 2)


class DuplexAligner(nn.Module):
    """Maps the keys of each modality into the space of the others (MODA Eq. 5-6: the V-Aligner and T-Aligner).

    A fresh aligner changes nothing (ρ = 0, W = I or [I 0]), so a pretrained model can be given one.

    Args:
        head_dim: D.
        num_modalities: M.
        fusion: how mapped keys k̂ and keys meet. "add": k + ρ ⊙ k̂; "linear": (k + ρ ⊙ k̂) Wᵀ; "concat": [k ; k̂] Wᵀ
            (the paper's best, table 1c).
        norm: "row" (each row of the Gram matrix by its L2 norm, as released) or "frobenius".
        scope: "sequence": Gram sums over the whole sequence (the paper; under a causal mask it lets keys look ahead);
            "causal": over earlier tokens only (for training with a causal loss, and for decoding).
        aligned: the modalities whose keys are mapped. Default: all.

    Attributes:
        ratio: ρ ``[M, D]`` (add, linear). weight: W ``[M, D, D]`` (linear) or ``[M, D, 2D]`` (concat).

    Raises:
        ValueError, TypeError: for arguments other than these.
    """

    ratio: nn.Parameter | None
    weight: nn.Parameter | None

    def __init__(
        self,
        head_dim: int,
        num_modalities: int,
        *,
        fusion: str = "add",
        norm: str = "row",
        scope: str = "sequence",
        aligned: Iterable[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = checks.integer("head_dim", head_dim, 1)
        self.num_modalities = checks.integer("num_modalities", num_modalities, 1)
        self.fusion = checks.choice("fusion", fusion, FUSIONS)
        self.norm = checks.choice("norm", norm, NORMS)
        self.scope = checks.choice("scope", scope, SCOPES)
        everything = range(num_modalities) if aligned is None else aligned
        self.aligned = checks.modality_indices("aligned", everything, num_modalities)
        self.register_parameter("ratio", None)
        self.register_parameter("weight", None)
        if fusion != "concat":
            self.ratio = nn.Parameter(torch.empty(num_modalities, head_dim, device=device, dtype=dtype))
        if fusion != "add":
            width = head_dim if fusion == "linear" else 2 * head_dim
            self.weight = nn.Parameter(torch.empty(num_modalities, head_dim, width, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """To the start at which the aligner changes nothing."""
        if self.ratio is not None:
            self.ratio.zero_()
        if self.weight is not None:
            identity = torch.eye(self.head_dim, self.weight.shape[-1])
            self.weight.copy_(identity.expand_as(self.weight))

    def forward(
        self,
        key: Tensor,
        layout: ModalityLayout | Tensor | None = None,
        *,
        state: DecodeState | LayerState | None = None,
    ) -> KeyMap:
        """The map for these keys.

        Args:
            key: ``[B, Hkv, L, D]``, packed ``[T, Hkv, D]``, after rotary embedding, any float dtype.
            layout: their layout (or modality ids ``[B, L]``).
            state: while decoding, ``state[i]`` of layer i in place of a layout (a whole :class:`DecodeState` stands
                for its layer 0). ``key`` is then what the cache holds, not aligned; only new tokens' keys are read.

        Returns:
            A :class:`KeyMap`, differentiable in key and the parameters.

        Raises:
            ValueError, TypeError: keys, layout or state that don't fit each other or the aligner; a second call for the
                same tokens of a state; a cache that no longer holds keys that sums are to be made of.
        """
        memory = None if state is None else layer_of(state)
        if memory is not None:
            layout = memory.layout_for(key, layout)
        elif layout is None:
            raise checks.wrong_value("layout", "a ModalityLayout, modality ids, or state", None)
        layout = as_layout(layout, self.num_modalities)
        if layout.num_modalities != self.num_modalities:
            raise checks.wrong_value(
                "layout", f"{self.num_modalities} modalities, as the aligner", layout.num_modalities
            )
        tokens = token_major("key", key, layout)
        if tokens.shape[-1] != self.head_dim:
            raise checks.wrong_value("key", f"head size {self.head_dim}, as the aligner", key)
        for name, parameter in self.named_parameters():
            checks.same_device(f"the aligner's {name}", parameter, key.device, "key")
        if memory is not None:
            return self._decode(key, layout, memory)
        if self.scope == "causal":
            return self._causal_map(tokens, layout)
        gram = ops.segment_gram(tokens, tokens, layout.grouping("modality"))
        return self._sequence_map(gram.unflatten(0, tuple(layout.counts.shape)), layout)

    def _decode(self, key: Tensor, layout: ModalityLayout, memory: LayerState) -> KeyMap:
        """The map from what is remembered and the new keys."""
        causal, m = self.scope == "causal", self.num_modalities
        begin, end = memory.begin(causal)
        new, part = memory.new_tokens("key", key, begin, end)
        if causal and end < memory.state.length:  # cropped: these are aligned already
            memory.add(new, new, part.groups("modality"), m, end)
            begin, end = memory.begin(causal)
            new, part = memory.new_tokens("key", key, begin, end)
        if not causal:
            return self._sequence_map(memory.add(new, new, part.groups("modality"), m, end), layout)
        before, counts = memory.gram, layout.counts - part.counts
        if before is not None and not part.packed and end - begin == 1:
            fused = self._align_one(new, part, before, counts)
        else:
            fused = self._causal_map(new, part, before, counts).align(new, part)
        kept = memory.keep(fused, begin, key)
        memory.add(new, new, part.groups("modality"), m, end)
        return KeptKeys(kept, layout)

    def _causal_map(
        self, tokens: Tensor, layout: ModalityLayout, before: Tensor | None = None, counts: Tensor | None = None
    ) -> CausalMap:
        return CausalMap(
            tokens, layout, self.ratio, self.weight, self.fusion, self.norm, self.aligned,
            before=before, before_counts=counts,
        )  # fmt: skip

    def _align_one(self, tokens: Tensor, layout: ModalityLayout, before: Tensor, counts: Tensor) -> Tensor:
        """The causal map of one new token per sequence ``[B, Hkv, D]``, applied: in few small operations, because they
        are done for every token and layer."""

        def facts() -> tuple[Tensor, Tensor, Tensor]:
            modality = layout.modality[:, 0].long().clamp(min=0)
            rows = torch.arange(modality.numel(), device=modality.device)
            aligned = layout.chosen(self.aligned)
            alone = counts.sum(1) == counts[rows, modality]
            return rows, modality, (layout.modality[:, 0] >= 0) & aligned[modality] & ~alone

        rows, modality, mapped = layout.remember(("one token", self.aligned), facts)
        with torch.autocast(tokens.device.type, enabled=False):
            rest = normed(sum_of_others(before)[rows, modality], self.norm)
            ratio, weight = (None if p is None else p.to(before.dtype)[modality] for p in (self.ratio, self.weight))
            matrix = fused_matrix(rest, ratio, weight, self.fusion)
            fused = (tokens.to(before.dtype)[:, :, None] @ matrix)[:, :, 0].to(tokens.dtype)
        return torch.where(mapped[:, None, None], fused, tokens)

    def _sequence_map(self, gram: Tensor, layout: ModalityLayout) -> ModalityMap:
        """The map from Gram sums ``[N, M, Hkv, D, D]`` over whole sequences."""
        with torch.autocast(gram.device.type, enabled=False):
            ratio, weight = (None if p is None else p.to(gram.dtype) for p in (self.ratio, self.weight))
            matrix = fused_matrix(normed(sum_of_others(gram), self.norm), ratio, weight, self.fusion)
        mapped = (layout.counts.sum(1, keepdim=True) > layout.counts) & layout.chosen(self.aligned)
        identity = torch.eye(self.head_dim, dtype=gram.dtype, device=gram.device)
        return ModalityMap(torch.where(mapped[..., None, None, None], matrix, identity), mapped, None, layout)

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, num_modalities={self.num_modalities}, fusion={self.fusion!r}, "
            f"norm={self.norm!r}, scope={self.scope!r}, aligned={self.aligned}"
        )


def align_keys(key: Tensor, key_map: KeyMap, layout: ModalityLayout | Tensor) -> Tensor:
    """The fused keys k', written out (MODA Eq. 6).

    Args:
        key: ``[B, Hkv, L, D]``, packed ``[T, Hkv, D]``.
        key_map: from a :class:`DuplexAligner` or :func:`released_key_map`, made with the same layout.
        layout: the keys' layout (or modality ids ``[B, L]``).

    Returns:
        Keys of the same shape and dtype; those that are not mapped are returned bit for bit.

    Raises:
        ValueError, TypeError: keys, map and layout that don't fit each other.
    """
    if not isinstance(key_map, KeyMap):
        raise checks.wrong_type("key_map", "a KeyMap (call the aligner on the keys)", key_map)
    layout = as_layout(layout, key_map.num_modalities)
    tokens = token_major("key", key, layout)
    key_map.check(layout, *tokens.shape[-2:])
    if isinstance(key_map, KeptKeys):
        return key_map.keys.to(key.dtype)
    return from_tokens(key_map.align(tokens, layout), layout)


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
            gram = ops.segment_gram(keys, values, _text_grouping(layout, text), unit=True)
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


def _text_grouping(layout: ModalityLayout, text: int) -> ops.Grouping:
    """The tokens of one modality, by sequence."""

    def make() -> ops.Grouping:
        of_text = layout.modality.flatten() == text
        return ops.group_tokens(torch.where(of_text, layout.sequence.flatten().long(), -1), layout.num_sequences)

    return layout.remember(("grouping", "sequence", text), make)


def modality_gram(x: Tensor, y: Tensor, layout: ModalityLayout | Tensor, by: str = "modality") -> Tensor:
    """Gram matrices Σ x_tᵀ y_t per modality or segment and head (MODA Eq. 5).

    Args:
        x: ``[B, H, L, D]``, packed ``[T, H, D]``. y: the same with size E (pass x twice for the Gram basis).
        layout: their layout (or modality ids ``[B, L]``).
        by: "modality" or "segment".

    Returns:
        ``[N, M, H, D, E]``, or ``[S, H, D, E]`` with S the layout's ``max_segments``; float32, float64 for float64.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that don't fit.
    """
    layout = as_layout(layout)
    checks.choice("by", by, ("modality", "segment"))
    xs = token_major("x", x, layout)
    ys = xs if y is x else token_major("y", y, layout)
    heads = (layout.num_tokens, xs.shape[-2])
    checks.shape("y", ys[..., 0].flatten(0, -2), heads, "of x but for its last axis (tokens, heads)")
    gram = ops.segment_gram(xs, ys, layout.grouping(by))
    return gram.unflatten(0, tuple(layout.counts.shape)) if by == "modality" else gram


def gram_affinity(gram: Tensor, norm: str = "row") -> Tensor:
    """How alike the modalities' normed Gram matrices are (the paper's conditional mask, "Attn." of table 1d).

    Args:
        gram: ``[N, M, H, D, E]``, from :func:`modality_gram` by modality.
        norm: as in :class:`DuplexAligner`.

    Returns:
        ``[N, H, M, M]`` cosines ⟨Ĝ[a], Ĝ[b]⟩ / (‖Ĝ[a]‖ ‖Ĝ[b]‖), 0 where a Gram is 0. For use as ``pair_bias`` repeat to
        query heads and multiply by a learned strength; it looks ahead as the sequence scope does.

    Raises:
        ValueError, TypeError: another rank or norm.
    """
    checks.float_tensor("gram", gram)
    checks.choice("norm", norm, NORMS)
    if gram.dim() != 5:
        raise checks.wrong_value("gram", "[N, M, H, D, E]", gram)
    with torch.autocast(gram.device.type, enabled=False):
        flat = normed(gram.to(compute_dtype(gram)), norm).flatten(-2)
        flat = normed(flat[..., None, :], "frobenius")[..., 0, :].transpose(1, 2)
        return flat @ flat.transpose(-1, -2)
