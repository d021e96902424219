"""What transformers calls in each layer of a model whose attention is "moda": rules in place of a matrix.

Who sees whom is in the `AskedMask` that the model's own code asked for (`asked.py`). What an enabled model adds, the
`Tokens` of `hooks.py` bring: modalities, for the layer's aligner, and the state beside a KV cache.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moda_kernels.alignment.maps import KeyMap, ModalityMap, align_keys
from moda_kernels.alignment.memory import DecodeState
from moda_kernels.alignment.released import ReleasedAligner
from moda_kernels.attention import moda_attention, own_pseudo
from moda_kernels.integrations.transformers.asked import AskedMask, asked, documents_of
from moda_kernels.runtime import checks
from moda_kernels.runtime.sharded import Heads
from moda_kernels.tokens.layout import ModalityLayout
from moda_kernels.tokens.mask import ModularMask
from moda_kernels.tokens.pseudo import PseudoAttention

#: Under which attention and mask function are registered.
NAME = "moda"
#: Where an attention layer keeps its aligner (a module: `state_dict`, optimisers and PEFT see it) and its settings.
ALIGNER, SETTINGS = "moda_aligner", "moda_settings"
#: The argument that carries `Tokens` to the layers.
ARGUMENT = "moda_tokens"
#: The entry of a model's config (and of its text part's) that says what its aligners are, saved with it.
CONFIG = "moda"
#: The argument with which `context_parallel` tells the layers of the other processes.
PARALLEL = "moda_parallel"
#: How packed documents are told beside (or instead of) positions that start again.
BOUNDS = "cu_seq_lens_q"


@dataclass(frozen=True)
class LayerSettings:
    """On each attention layer of an enabled text model.

    Attributes:
        mask: the caller's, before the layer's own sliding window is added; None: the model's own.
        heads: where they lie under tensor parallelism; None: all of them are here.
    """

    mask: ModularMask | None
    pseudo: PseudoAttention | None
    heads: Heads | None = None


class Made(Protocol):
    """What tokens are made of: `hooks.Call`."""

    def made(self) -> tuple[ModalityLayout | None, DecodeState | None, Tensor | None]: ...


class Tokens:
    """What the tokens of one forward call are.

    Attributes:
        layout: by modality; None with a cache. Packed documents: a packed layout of all rows (while a graph is being
            traced, which can't count documents, a batch in which they are chunks).
        state: beside a cache, else None.
        documents: int64 ``[B, L]`` of packed rows, else None.
    """

    def __init__(self, call: Made) -> None:
        self._call: Made | None = call
        self.layout: ModalityLayout | None = None
        self.state: DecodeState | None = None
        self.documents: Tensor | None = None

    def ready(self) -> "Tokens":
        """Itself, made at the first call."""
        if self._call is not None:
            self.layout, self.state, self.documents = self._call.made()
            self._call = None
        return self


def register() -> None:
    """Make both functions known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, asked)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: AskedMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function.

    Args:
        module: the attention layer; of an enabled model, or of any other.
        query: ``[B, Hq, n, D]``. key, value: ``[B, Hkv, L, D]``, the cache's, after the rotary embedding.
        attention_mask: what the model asked for. A matrix, or none, where it asked for no causal mask (an encoder, or a
            mask of four axes from the caller): then this is exactly SDPA.
        sliding_window: not looked at: it is in the mask. softcap: as `moda_attention`'s.
        s_aux: ``[Hq]``, a sink for each head.

    Returns:
        ``[B, n, Hq, D]``, and None for the weights.

    Raises:
        ValueError: an enabled layer that isn't told its tokens, a model without the aligners that it was saved with.
        NotImplementedError: dropout, what the backend asked for can't run.
    """
    settings: LayerSettings | None = getattr(module, SETTINGS, None)
    tokens: Tokens | None = others.pop(ARGUMENT, None)
    tokens = None if tokens is None else tokens.ready()
    aligner = getattr(module, ALIGNER, None)
    if settings is None and hasattr(getattr(module, "config", None), CONFIG):
        raise ValueError(
            f"attn_implementation={NAME!r}: expected the aligners that config.{CONFIG} tells of, got "
            f"{type(module).__name__} without any. A model that was saved with aligners is loaded without them: "
            f"enable(model) brings them back (to do without: disable(enable(model)))"
        )
    adds = isinstance(aligner, nn.Module) or (settings is not None and settings.mask is not None)
    if not isinstance(attention_mask, AskedMask) and not adds and s_aux is None and softcap is None:
        return _plain(module, query, key, value, attention_mask, dropout, scaling, others)
    if adds and attention_mask is None and others.get("is_causal"):
        raise NotImplementedError(
            "a mask that was taken away and called causal, as accelerate's ParallelismConfig(cp_size=…) does: "
            "moda_kernels.integrations.transformers.context_parallel(model) keeps it"
        )
    if adds and tokens is None:
        raise checks.wrong_value(
            "modality ids", f"{type(module).__name__} to get them from its enabled text model's call", "none"
        )
    pseudo = None if s_aux is None else PseudoAttention.sink(s_aux)
    parallel = others.pop(PARALLEL, None)
    if parallel is not None:
        pseudo = _pseudo(module, settings, aligner, pseudo, query.shape[1])
        options: dict[str, Any] = {
            "dropout_p": dropout, "scale": scaling, "enable_gqa": True, "pseudo": pseudo, "softcap": softcap,
        }  # fmt: skip
        return parallel.attend(module, query, key, value, options), None
    if isinstance(attention_mask, AskedMask) and attention_mask.shape[3] != key.shape[2]:
        raise checks.wrong_value("attention_mask", f"a mask of the layer's {key.shape[2]} keys", attention_mask)
    bounds = others.get(BOUNDS)
    if tokens is not None and tokens.documents is not None:
        if isinstance(attention_mask, AskedMask):
            attention_mask = attention_mask.of_documents(tokens.documents)
    elif isinstance(bounds, Tensor) and isinstance(attention_mask, AskedMask):
        attention_mask = attention_mask.of_documents(_documents(attention_mask, bounds, key.shape[2]))

    key_map = None
    where: dict[str, Any] = {}
    if tokens is not None:
        where = {"layout": tokens.layout}
        if tokens.state is not None:
            where = {"state": tokens.state[module.layer_idx]}  # type: ignore[index]
    packed = tokens is not None and tokens.layout is not None and tokens.layout.packed
    mapped, valued = (flat(key), flat(value)) if packed else (key, value)
    if isinstance(aligner, nn.Module):
        released = {"value": valued} if is_released(aligner) else {}
        key_map = aligner(spread(settings, mapped), **where, **released)
        pseudo = _pseudo(module, settings, aligner, pseudo, query.shape[1])
    if tokens is not None and tokens.documents is not None and not packed:
        _check_traced(module, settings, key_map)
    options = {
        "dropout_p": dropout, "scale": scaling, "enable_gqa": True, "pseudo": pseudo, "softcap": softcap,
    }  # fmt: skip
    own = settings is not None and settings.mask is not None
    plain = isinstance(attention_mask, AskedMask) and attention_mask.plain
    if tokens is not None and (own or (plain and key_map is not None)):
        # By modality: the caller's rules, or nothing but causal ones, where a map may be folded into the query.
        modalities = tokens.state.num_modalities if tokens.state is not None else tokens.layout.num_modalities  # type: ignore[union-attr]
        mask = settings.mask if own else ModularMask.causal(modalities)  # type: ignore[union-attr]
        if isinstance(attention_mask, AskedMask):
            mask = narrowed(mask, attention_mask)  # type: ignore[arg-type]
        extra = attention_mask if isinstance(attention_mask, Tensor) else None
        q = flat(query) if packed else query
        out = moda_attention(q, mapped, valued, extra, **options, mask=mask, key_map=key_map, **where)
        return back(out, query), None
    if key_map is not None and tokens is not None:
        key = _aligned(mapped, key_map, tokens, key)
    if not isinstance(attention_mask, AskedMask):
        return _by_matrix(query, key, value, attention_mask, options), None
    counted = pseudo is not None and pseudo.length is None and tokens is not None
    layout, mask = attention_mask.made(by_document=counted)
    if counted and not layout.packed:
        layout = with_counts(layout, tokens)  # type: ignore[arg-type]
    if layout.packed:
        out = moda_attention(flat(query), flat(key), flat(value), **options, layout=layout, mask=mask)
        return back(out, query), None
    start = attention_mask.query_start()
    out = moda_attention(query, key, value, **options, layout=layout, mask=mask, query_start=start)
    return out.transpose(1, 2).contiguous(), None


def spread(settings: LayerSettings | None, key: Tensor) -> Tensor:
    """Keys for an aligner: under tensor parallelism a DTensor, so that all processes' gradients come together in it."""
    return key if settings is None or settings.heads is None else settings.heads.whole(key, 1)


def _pseudo(
    module: nn.Module, settings: LayerSettings | None, aligner: Any, own: PseudoAttention | None, heads: int
) -> PseudoAttention | None:
    """The pseudo scores of a layer, of its `heads` that are here: its own sinks, or those that `enable` was given."""
    if not isinstance(aligner, nn.Module) or settings is None or settings.pseudo is None:
        return own
    if own is not None:
        raise NotImplementedError(f"pseudo: {type(module).__name__} has attention sinks of its own; leave it out")
    if settings.heads is None:
        return settings.pseudo
    return own_pseudo(settings.pseudo, settings.heads, heads * settings.heads.ranks)


def is_released(aligner: nn.Module) -> bool:
    """Also where PEFT has wrapped it."""
    return any(isinstance(part, ReleasedAligner) for part in aligner.modules())


def _plain(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, dropout: float, scaling: float | None,
    others: dict[str, Any],
) -> tuple[Tensor, None]:  # fmt: skip
    """Exactly SDPA, as transformers calls it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out, _ = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **others)
    return out, None


def _by_matrix(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
    """A mask of four axes from the caller, and nothing else."""
    batch, length = key.shape[0], key.shape[2]
    if mask is None:
        raise checks.wrong_value("attention_mask", "a mask for a layer that the model's own code asked for", "none")
    ids = torch.zeros(batch, length, dtype=torch.int64, device=key.device)
    out: Tensor = moda_attention(query, key, value, mask, **options, layout=ids)
    return out.transpose(1, 2).contiguous()


def narrowed(mask: ModularMask, asked_mask: AskedMask) -> ModularMask:
    """The caller's rules within a layer's window."""
    window = asked_mask.facts.window
    if asked_mask.facts.chunk is not None:
        raise NotImplementedError("mask: a layer that attends within chunks knows its own mask only; name other layers")
    if window is None or (mask.window is not None and mask.window <= window):
        return mask
    return ModularMask(mask.rules, window, "all")


def _check_traced(module: nn.Module, settings: LayerSettings | None, key_map: KeyMap | None) -> None:
    """Where documents are chunks of their row: what would look beyond them."""
    if settings is None:
        return
    whole = isinstance(key_map, ModalityMap) or (settings.pseudo is not None and settings.pseudo.length is None)
    if whole or settings.mask is not None:
        raise NotImplementedError(
            f"{type(module).__name__}: position_ids (which may tell of packed documents) in a compiled call, together "
            "with scope='sequence', PseudoAttention(length=None) or a mask of your own: leave position_ids out, or run "
            "the call uncompiled"
        )


def _documents(mask: AskedMask, bounds: Tensor, columns: int) -> Tensor:
    """Found once for all layers."""
    if mask.bounds is None or mask.bounds[0] is not bounds:
        if mask.shape[0] != 1 or mask.shape[2] != columns:
            raise checks.wrong_value(BOUNDS, "one row of packed documents, without a cache", mask)
        mask.bounds = (bounds, documents_of(bounds.to(mask.device), columns, BOUNDS))
    return mask.bounds[1]


def _aligned(mapped: Tensor, key_map: KeyMap, tokens: Tokens, key: Tensor) -> Tensor:
    """Aligned keys in the shape of the cache's."""
    if tokens.layout is not None:
        made = align_keys(mapped, key_map, tokens.layout)
        return made.unflatten(0, (key.shape[0], key.shape[2])).transpose(1, 2) if tokens.layout.packed else made
    assert tokens.state is not None
    return align_keys(mapped, key_map, tokens.state.layout(key.shape[2]))


def with_counts(layout: ModalityLayout, tokens: Tokens) -> ModalityLayout:
    """With as many tokens as a sequence has, where the mask's columns are fewer (a sliding cache) or hold padding."""
    known = tokens.layout if tokens.state is None else tokens.state.layout()
    assert known is not None
    return dataclasses.replace(layout, counts=known.counts.sum(1, keepdim=True, dtype=torch.int32))


def flat(x: Tensor) -> Tensor:
    """``[B, H, L, D]`` → ``[B·L, H, D]``."""
    return x.transpose(1, 2).flatten(0, 1)


def back(out: Tensor, query: Tensor) -> Tensor:
    """``[B, n, Hq, D]``, of an output in the query's shape or a flat one."""
    if out.dim() == 3:
        rows: Tensor = out.unflatten(0, (query.shape[0], query.shape[2]))
        return rows
    return out.transpose(1, 2).contiguous()
