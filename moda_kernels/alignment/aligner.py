"""Duplex alignment (MODA Eq. 5-6): keys into the space of the other modalities.

`DuplexAligner` and `released_key_map` make maps (`maps.py`, `causal.py`) from Gram matrices; `align_keys` applies
them; `modality_gram` and `gram_affinity` are for those who want the matrices themselves.
"""

import copy
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from moda_kernels import products
from moda_kernels.alignment.causal import CausalMap, rest_before
from moda_kernels.alignment.maps import (
    FUSIONS,
    NORMS,
    KeptKeys,
    KeyMap,
    ModalityMap,
    fused_matrix,
    normed,
    renormed,
    sum_of_others,
    token_major,
)
from moda_kernels.alignment.memory import DecodeState, LayerState, layer_of
from moda_kernels.alignment.pieces import After, Pieces, counting_groups, mapped_modalities, pieces_of
from moda_kernels.runtime import checks, sharded
from moda_kernels.tokens.layout import ModalityLayout
from moda_kernels.tokens.segments import as_layout

SCOPES = ("sequence", "causal")


class Parallel(Protocol):
    """What knows the keys of other ranks: `moda_kernels.distributed.ContextParallel`."""

    @property
    def local_layout(self) -> ModalityLayout:
        """Of this rank's keys."""

    def map_for(self, aligner: "DuplexAligner", tokens: Tensor) -> KeyMap:
        """The map of this rank's keys ``[B, n, Hkv, D]``, packed ``[n, Hkv, D]``, which have been checked."""


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
            "causal": over earlier tokens only (for training with a causal loss, and for decoding), and of those in
            chunks over those of a token's own chunk only: answers to one prompt don't know each other.
        aligned: the modalities whose keys are mapped. Default: all.
        source_roles: the roles whose tokens count in the sums, so that noised copies, say, stay out. Default: all.
        renorm: a mapped key keeps its length: k' is multiplied by ‖k‖ / ‖k'‖. For models with QK-norm,
            whose attention longer keys would sharpen. Such a map does not fold into the query.

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
        source_roles: Iterable[int] | None = None,
        renorm: bool = False,
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
        self.source_roles = None if source_roles is None else _roles(source_roles)
        if not isinstance(renorm, bool):
            raise checks.wrong_type("renorm", "a bool", renorm)
        self.renorm = renorm
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
            identity = torch.eye(self.head_dim, self.weight.shape[-1], device=self.weight.device)
            self.weight.copy_(identity.expand_as(self.weight))

    def forward(
        self,
        key: Tensor,
        layout: ModalityLayout | Tensor | None = None,
        *,
        state: DecodeState | LayerState | None = None,
        parallel: "Parallel | None" = None,
    ) -> KeyMap:
        """The map for these keys.

        Args:
            key: ``[B, Hkv, L, D]``, packed ``[T, Hkv, D]``, after rotary embedding, any float dtype; or a DTensor of
                this shape, sharded over heads.
            layout: their layout (or modality ids ``[B, L]``).
            state: while decoding, ``state[i]`` of layer i in place of a layout (a whole :class:`DecodeState` stands
                for its layer 0). ``key`` is then what the cache holds, not aligned; only new tokens' keys are read.
            parallel: a :class:`moda_kernels.distributed.ContextParallel` in place of a layout: ``key`` is this rank's
                shard, and the sums are those over all ranks (`aligner_map` says the same).

        Returns:
            A :class:`KeyMap`, differentiable in key and the parameters.

        Raises:
            ValueError, TypeError: keys, layout or state that don't fit each other or the aligner; a second call for the
                same tokens of a state; a cache that no longer holds keys that sums are to be made of.
        """
        heads = sharded.heads_of(key=key)
        if heads is not None:
            return self._of_heads(heads).forward(heads.local(key), layout, state=state, parallel=parallel)
        memory = None if state is None else layer_of(state)
        if parallel is not None:
            if layout is not None or memory is not None:
                name = "layout" if memory is None else "state"
                raise checks.wrong_value(name, "None together with parallel, which knows the layout", layout or state)
            layout = parallel.local_layout
        elif memory is not None:
            layout = memory.layout_for(key, layout)
        elif layout is None:
            raise checks.wrong_value("layout", "a ModalityLayout, modality ids, or state", None)
        layout = as_layout(layout, self.num_modalities)
        if layout.num_modalities != self.num_modalities:
            raise checks.wrong_value(
                "layout", f"{self.num_modalities} modalities, as the aligner", layout.num_modalities
            )
        if self.source_roles and self.source_roles[-1] >= layout.num_roles:
            expected = f"more than {self.source_roles[-1]} roles, as the aligner's source_roles"
            raise checks.wrong_value("layout", expected, layout.num_roles)
        tokens = token_major("key", key, layout)
        if tokens.shape[-1] != self.head_dim:
            raise checks.wrong_value("key", f"head size {self.head_dim}, as the aligner", key)
        for name, parameter in self.named_parameters():
            checks.same_device(f"the aligner's {name}", parameter, key.device, "key")
        if parallel is not None:
            return parallel.map_for(self, tokens)
        if memory is not None:
            return self._decode(key, layout, memory)
        if self.scope == "causal":
            return self.causal_map(tokens, pieces_of(layout, self.aligned, self.source_roles))
        grouping = counting_groups(layout, self.source_roles)
        gram = products.segment_gram(tokens, tokens, grouping).unflatten(0, tuple(layout.counts.shape))
        return self.sequence_map(gram, layout, mapped_modalities(layout, self.aligned, self.source_roles))

    def _of_heads(self, heads: sharded.Heads) -> "DuplexAligner":
        """This one for the heads that are here: all ranks' gradients come together in the parameters."""
        twin = copy.copy(self)
        own = twin.__dict__
        own["_parameters"] = {name: heads.shared(getattr(self, name)) for name in ("ratio", "weight")}
        for name in own["_parameters"]:
            own.pop(name, None)
        return twin

    def _decode(self, key: Tensor, layout: ModalityLayout, memory: LayerState) -> KeyMap:
        """The map from what is remembered and the new keys."""
        causal, sources = self.scope == "causal", self.source_roles
        begin, end = memory.begin(causal)
        new, part = memory.new_tokens("key", key, begin, end)
        if causal and end < memory.history.length:  # cropped: these are aligned already
            memory.add_keys(new, begin, end, sources, causal)
            begin, end = memory.begin(causal)
            new, part = memory.new_tokens("key", key, begin, end)
        if not causal:
            gram = memory.add_keys(new, begin, end, sources, causal)
            mapped = mapped_modalities(memory.history.layout(), self.aligned, sources)
            return self.sequence_map(gram, layout, mapped)
        before, after = memory.before(), memory.after(part, begin, end, self.aligned, sources)
        if before is not None and not part.packed and end - begin == 1:
            fused = self._align_one(new, part, before, after)
        else:
            fused = self.causal_map(new, pieces_of(part, self.aligned, sources, after), before).align(new, part)
        kept = memory.keep(fused, begin, key)
        memory.add_keys(new, begin, end, sources, causal)
        return KeptKeys(kept, layout)

    # For those who make the sums themselves.

    def causal_map(self, tokens: Tensor, pieces: Pieces, before: Tensor | None = None) -> CausalMap:
        """The map of the causal scope for keys ``[T, Hkv, D]`` or ``[B, L, Hkv, D]`` of these pieces, after tokens with
        the sums `before` (see `CausalMap`)."""
        return CausalMap(
            tokens, pieces.layout, pieces, self.ratio, self.weight, self.fusion, self.norm, self.renorm, before=before
        )

    def _align_one(self, tokens: Tensor, layout: ModalityLayout, before: Tensor, after: After) -> Tensor:
        """The causal map of one new token per sequence ``[B, Hkv, D]``, applied: in few small operations, because they
        are done for every token and layer."""

        def facts() -> tuple[Tensor, Tensor]:
            modality = layout.modality[:, 0].long().clamp(min=0)
            return torch.arange(modality.numel(), device=modality.device), modality

        rows, modality = layout.remember("one token", facts)
        with torch.autocast(tokens.device.type, enabled=False):
            rest = normed(rest_before(before, rows, modality, after.continues), self.norm)
            ratio, weight = (None if p is None else p.to(before.dtype)[modality] for p in (self.ratio, self.weight))
            matrix = fused_matrix(rest, ratio, weight, self.fusion)
            wide = tokens.to(before.dtype)
            fused = (wide[:, :, None] @ matrix)[:, :, 0]
            if self.renorm:
                fused = renormed(fused, wide)
        return torch.where(after.mapped[:, None, None], fused.to(tokens.dtype), tokens)

    def sequence_map(self, gram: Tensor, layout: ModalityLayout, mapped: Tensor) -> ModalityMap:
        """The map from Gram sums ``[N, M, Hkv, D, D]`` over whole sequences, for keys of a layout; mapped: bool
        ``[N, M]``, whose keys."""
        with torch.autocast(gram.device.type, enabled=False):
            ratio, weight = (None if p is None else p.to(gram.dtype) for p in (self.ratio, self.weight))
            matrix = fused_matrix(normed(sum_of_others(gram), self.norm), ratio, weight, self.fusion)
        identity = torch.eye(self.head_dim, dtype=gram.dtype, device=gram.device)
        matrix = torch.where(mapped[..., None, None, None], matrix, identity)
        return ModalityMap(matrix, mapped, None, layout, self.renorm)

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, num_modalities={self.num_modalities}, fusion={self.fusion!r}, "
            f"norm={self.norm!r}, scope={self.scope!r}, aligned={self.aligned}, source_roles={self.source_roles}, "
            f"renorm={self.renorm}"
        )


def _roles(roles: Iterable[int]) -> tuple[int, ...]:
    if not isinstance(roles, Iterable):
        raise checks.wrong_type("source_roles", "an iterable of roles", roles)
    found = tuple(sorted({checks.integer("source_roles (an entry)", role, 0) for role in roles}))
    if not found:
        raise checks.wrong_value("source_roles", "at least one role (None: all)", "none")
    return found
