"""Enabled models on several processes: context parallelism, and heads under transformers' own tensor parallelism.

`context_parallel`: the text model gets all tokens and makes masks and positions of them as ever; before the first
decoder layer each process keeps its own tokens, behind the last one all get all of them again. What is between (memory,
projections, experts, attention) is shared among the processes.
"""

import weakref
from typing import Any, NamedTuple

from torch import Tensor, nn

from moda_kernels import distributed as md
from moda_kernels.alignment.maps import align_keys
from moda_kernels.attention import moda_attention
from moda_kernels.distributed.groups import group_of
from moda_kernels.integrations.transformers.asked import AskedMask
from moda_kernels.integrations.transformers.attention import (
    ALIGNER,
    ARGUMENT,
    PARALLEL,
    SETTINGS,
    LayerSettings,
    Tokens,
    back,
    flat,
    narrowed,
    spread,
    with_counts,
)
from moda_kernels.integrations.transformers.hooks import MODEL
from moda_kernels.integrations.transformers.model import _text_model, _unwrapped
from moda_kernels.runtime import checks
from moda_kernels.tokens.layout import ModalityLayout
from moda_kernels.tokens.mask import ModularMask
from moda_kernels.tokens.pseudo import PseudoAttention

#: Arguments of a decoder layer that have a row for each token, and the axis of these rows, counted from the end.
_BY_TOKEN = {"position_embeddings": -2, "position_ids": -1, "cache_position": -1}


class Handle:
    """Takes context parallelism out of a model again: `remove`."""

    def __init__(self, hooks: list[Any]) -> None:
        self._hooks = hooks

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def context_parallel(model: Any, mesh_or_group: Any = None, *, balance: str = "work") -> Handle:
    """Let an enabled model's text layers run on shards of the tokens, each process its own.

    Every process of the group calls the model with the same inputs and gets the same outputs: training goes on as if
    the group were one process. Losses are alike on all of them, so their mean's gradient is the mean of the processes'
    gradients: DistributedDataParallel, FSDP2 and transformers' Trainer over these processes need nothing else (but a
    data loader that gives all of them the same batches). Padding, packed rows, sliding layers, images and aligners are
    as without it. What a layer hands out (``output_hidden_states``) is a shard.

    Args:
        model: enabled (or a PEFT model around one).
        mesh_or_group: a ``ProcessGroup`` or a ``DeviceMesh`` of one dimension; None: all processes.
        balance: as in :class:`moda_kernels.distributed.ContextParallel`.

    Returns:
        A handle; ``remove()`` takes it out again.

    Raises:
        ValueError: a model that is not enabled, no process group. NotImplementedError: while running, a KV cache
            (``use_cache=False``; generate without it), several rows of packed documents, released weights.
    """
    group = group_of("mesh_or_group", mesh_or_group)
    text, _ = _text_model(_unwrapped(model))
    if not hasattr(text, MODEL):
        raise checks.wrong_value("model", "an enabled model (enable(model))", type(model).__name__)
    layers = getattr(text, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise checks.wrong_value("model", "a text model with decoder layers (layers)", type(text).__name__)
    shards = _Shards(group, balance)
    hooks: list[Any] = []
    for layer in layers:
        first = layer is layers[0]

        def before(_: nn.Module, args: Any, kwargs: Any, first: bool = first) -> Any:
            return shards.before_layer(args, kwargs, first)

        hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
    hooks.append(layers[-1].register_forward_hook(shards.behind_layers, with_kwargs=True))
    return Handle(hooks)


class _Shards:
    """The hooks of `context_parallel`."""

    def __init__(self, group: Any, balance: str) -> None:
        self.group, self.balance = group, balance
        self._calls: weakref.WeakKeyDictionary[Tokens, Parallel] = weakref.WeakKeyDictionary()

    def before_layer(self, args: tuple[Any, ...], kwargs: dict[str, Any], first: bool) -> tuple[Any, dict[str, Any]]:
        tokens: Tokens | None = kwargs.get(ARGUMENT)
        if tokens is None:
            return args, kwargs  # the attention says what it misses
        if tokens not in self._calls:
            self._calls[tokens] = Parallel(self.group, self.balance, tokens, kwargs.get("attention_mask"))
        parallel = self._calls[tokens]
        kwargs = dict(kwargs)
        for name, axis in _BY_TOKEN.items():
            if name in kwargs:
                kwargs[name] = parallel.part(kwargs[name], axis)
        if first:
            hidden = args[0] if args else kwargs["hidden_states"]
            hidden = parallel.part(hidden, 1)
            args = (hidden, *args[1:])
            kwargs.pop("hidden_states", None)
        return args, kwargs | {PARALLEL: Layer(parallel, kwargs.get("attention_mask"))}

    def behind_layers(self, _: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        layer: Layer | None = kwargs.get(PARALLEL)
        if layer is None:
            return output
        parallel = layer.parallel
        if isinstance(output, tuple):
            return (parallel.cp.unshard(output[0], 1), *output[1:])
        return parallel.cp.unshard(output, 1)


class Layer(NamedTuple):
    """What an attention layer is told, and its mask (which others on the way may drop)."""

    parallel: "Parallel"
    mask: Any

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        return self.parallel.attend(module, query, key, value, self.mask, options)


class Parallel:
    """One call of a model whose layers run on shards."""

    def __init__(self, group: Any, balance: str, tokens: Tokens, mask: Any) -> None:
        if tokens.state is not None or tokens.layout is None:
            raise NotImplementedError("a KV cache under context_parallel: call with use_cache=False")
        if tokens.documents is not None and tokens.documents.shape[0] != 1:
            rows = tokens.documents.shape[0]
            raise NotImplementedError(f"packed documents in {rows} rows under context_parallel: pack them into one row")
        self.tokens, self.layout = tokens, tokens.layout
        self._layouts: dict[int, tuple[ModalityLayout, ModalityLayout]] = {}
        of_mask, rules = self._asked(mask, None)
        self.cp = md.ContextParallel(group, of_mask, rules, balance)
        self._over: dict[Any, md.ContextParallel] = {}
        self._by_modality = self.over(self.layout, ModularMask.causal(self.layout.num_roles))

    def part(self, x: Any, axis: int) -> Any:
        """This process's rows of a tensor, or of those in a tuple."""
        if isinstance(x, tuple | list):
            return type(x)(self.part(each, axis) for each in x)
        return self.cp.shard(x, axis) if isinstance(x, Tensor) else x

    def over(self, layout: ModalityLayout, mask: ModularMask) -> md.ContextParallel:
        key = (id(layout), mask)
        if key not in self._over:
            self._over[key] = self.cp.over(layout, mask)  # which keeps the layout
        return self._over[key]

    def _asked(self, mask: Any, pseudo: PseudoAttention | None) -> tuple[ModalityLayout, ModularMask]:
        """Layout and rules of what a layer's own code asked for."""
        if isinstance(mask, Tensor) or mask is None:
            got = "none" if mask is None else "a mask of four axes"
            raise NotImplementedError(f"attention_mask under context_parallel: expected one in rules, got {got}")
        assert isinstance(mask, AskedMask)
        if self.tokens.documents is not None:
            mask = mask.of_documents(self.tokens.documents)
        counted = pseudo is not None and pseudo.length is None
        layout, rules = mask.made(by_document=counted)
        if counted and not layout.packed:
            if id(layout) not in self._layouts:
                self._layouts[id(layout)] = layout, with_counts(layout, self.tokens)
            layout = self._layouts[id(layout)][1]
        return layout, rules

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: dict[str, Any]
    ) -> Tensor:
        """This process's rows ``[B, n, Hq, D]``. (See `attention`.) Where somebody has brought all rows of some heads
        here (DeepSpeed's Ulysses, which wraps what is registered), all rows of these."""
        settings: LayerSettings | None = getattr(module, SETTINGS, None)
        aligner = getattr(module, ALIGNER, None)
        whole = self._inside(query)
        by_modality = self._by_modality
        packed = self.layout.packed
        mapped = flat(key) if packed else key
        if isinstance(aligner, nn.Module):
            spread_keys = spread(settings, mapped)
            if whole:
                mapped = align_keys(mapped, aligner(spread_keys, self.layout), self.layout)
            else:
                key_map = by_modality.aligner_map(aligner, spread_keys)
                mapped = align_keys(mapped, key_map, by_modality.local_layout)
        if settings is not None and settings.mask is not None:
            layout = self.layout
            rules = narrowed(settings.mask, mask) if isinstance(mask, AskedMask) else settings.mask
        else:
            layout, rules = self._asked(mask, options["pseudo"])
        q, v = (flat(x) if packed else x for x in (query, value))
        if layout.packed != packed:
            q, mapped, v = (_packed(x) if layout.packed else _batch(x) for x in (q, mapped, v))
        if whole:
            return back(moda_attention(q, mapped, v, **options, layout=layout, mask=rules), query)
        out = self.over(layout, rules).attention(q, mapped, v, **options)
        assert isinstance(out, Tensor)
        return back(out, query)

    def _inside(self, query: Tensor) -> bool:
        """Whether these are all rows of some heads."""
        rows, total = query.shape[2], self.layout.num_tokens if self.layout.packed else self.layout.modality.shape[1]
        if rows == self.cp.plan.rows[self.cp.rank]:
            return False
        if rows != total or self.cp.balance != "none":
            expected = f"this process's {self.cp.plan.rows[self.cp.rank]} tokens"
            raise checks.wrong_value(
                "query", f"{expected} (or all of them, by DeepSpeed's Ulysses, with balance='none')", query
            )
        return True


def _packed(x: Tensor) -> Tensor:
    """``[1, H, n, D]`` → ``[n, H, D]``."""
    return x[0].transpose(0, 1)


def _batch(x: Tensor) -> Tensor:
    """``[n, H, D]`` → ``[1, H, n, D]``."""
    return x.transpose(0, 1)[None]
