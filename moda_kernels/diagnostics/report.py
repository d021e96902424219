"""Is alignment doing anything in a model? One call that looks at every layer, and at what another document would do."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda_kernels import attention
from moda_kernels.alignment.aligner import DuplexAligner
from moda_kernels.alignment.gram import modality_gram
from moda_kernels.alignment.maps import KeyMap, align_keys, from_tokens, normed, sum_of_others, to_tokens
from moda_kernels.alignment.released import ReleasedAligner
from moda_kernels.call import AttentionCall
from moda_kernels.diagnostics.another import keys_of_another_document
from moda_kernels.diagnostics.pictures import draw_report
from moda_kernels.diagnostics.shares import ModalDisparity, disparity_of, mean_by_modality
from moda_kernels.products.twin import compute_dtype
from moda_kernels.runtime import checks
from moda_kernels.tokens.layout import ModalityLayout
from moda_kernels.tokens.segments import as_layout

LEGEND = """\
own/cross: log2 of attention per visible key to the own and to other modalities; (control): with another document's Gram
sums; rows to: attention of the chosen rows; entropy: theirs, in bits; length: of aligned keys, of what it was; effect:
change of the output by alignment; of doc.: by taking another document's sums; rank: directions of the Gram matrix that
count"""


@dataclass(frozen=True)
class LayerReport:
    """One attention layer, means over documents and heads. M modalities; NaN where something is undefined.

    Attributes:
        name: of its aligner within the model.
        share: float ``[M, M]``, attention from query modality to key modality.
        signed: float ``[M]``, log₂ of the attention per visible key to the own modality over that to the others: above
            0 a modality prefers itself. control: the same with the Gram sums of another document. disparity: ``[M]``,
            the paper's |own - cross| / max(own, cross).
        chosen: float ``[M]``, attention of the chosen rows to each modality. entropy: of their attention, in bits.
        length: float ``[M]``, ‖k'‖ / ‖k‖.
        effect: ‖o' - o‖ / ‖o‖ of the layer's outputs with and without alignment. of_document: ‖o' - o*‖ / ‖o‖, o* with
            the Gram sums of another document. If the first is large and the second small, the map has learnt something
            about keys, and nothing from the document that they are in.
        spectrum: float ``[M, D]``, singular values of the normed Gram matrix that a modality's keys are mapped by (of
            the whole sequence, under either scope), falling. rank: ``[M]``, how many of them count: the exponential of
            the entropy of their shares.
    """

    name: str
    share: Tensor
    signed: Tensor
    control: Tensor
    disparity: Tensor
    chosen: Tensor
    entropy: float
    length: Tensor
    effect: float
    of_document: float
    spectrum: Tensor
    rank: Tensor


@dataclass(frozen=True)
class AlignmentReport:
    """What `alignment_report` found; ``print`` it, or ``draw`` it.

    Attributes:
        layers: in the order of their calls. modalities: names.
        loss: of the model "as it is", with the Gram sums of "another document", with "no alignment"; empty without one.
        no_control: why there is no control, or None.
    """

    layers: list[LayerReport]
    modalities: tuple[str, ...]
    loss: dict[str, float] = field(default_factory=dict)
    no_control: str | None = None

    def draw(self, path: str | Path) -> Path:
        """A picture, layer by layer; its path. Needs matplotlib.

        Raises:
            ImportError: no matplotlib.
        """
        return draw_report(self, path)

    def __str__(self) -> str:
        head = [("", "layer")]
        for title in ("own/cross", "(control)", "disparity", "rows to", "length"):
            head += [(title if i == 0 else "", name) for i, name in enumerate(self.modalities)]
        head += [("entropy", ""), ("effect", ""), ("of doc.", "")]
        head += [("rank" if i == 0 else "", name) for i, name in enumerate(self.modalities)]
        rows = [[cell[line] for cell in head] for line in (0, 1)]
        for short, layer in zip(_short([layer.name for layer in self.layers]), self.layers, strict=True):
            numbers = [*layer.signed, *layer.control, *layer.disparity, *layer.chosen, *layer.length]
            numbers += [layer.entropy, layer.effect, layer.of_document, *layer.rank]
            rows.append([short, *(f"{float(x):.3g}" for x in numbers)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = "\n".join(
            "  ".join(
                cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )
        said = [table, LEGEND]
        said += [f"loss, {how}: {loss:.4f}" for how, loss in self.loss.items()]
        said += [f"no control: {self.no_control}"] * (self.no_control is not None)
        return "\n".join(said)


class _Seen(NamedTuple):
    """An aligner's call, and the attention that its map, or the keys that it made, went into right after."""

    name: str
    aligner: Any
    key: Tensor
    layout: ModalityLayout
    key_map: KeyMap
    call: AttentionCall


def alignment_report(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    rows: Tensor | None = None,
    modalities: Sequence[str] | None = None,
    loss: Callable[[Any], Tensor] | None = None,
) -> AlignmentReport:
    """Run a model with aligners three times without gradients, and report what alignment does in each layer. ::

        enable(model)  # of transformers; or a model of your own
        report = alignment_report(model, {**batch, "labels": labels, "use_cache": False}, modalities=["text", "image"])
        print(report)
        report.draw("alignment.png")

    The passes are: as it is; with the Gram sums of another document (the control, see
    :func:`keys_of_another_document`); and with aligners that change nothing. Put the model into evaluation mode.

    Args:
        model: has `DuplexAligner` (or released aligners) in it, whose maps go into `moda_attention`.
        inputs: its keyword arguments, best of several documents that differ: the control needs two.
        rows: bool, of the shape of the modality ids: rows whose attention is looked at alone, such as those before an
            answer. Default: each sequence's last token.
        modalities: M names. Default: their numbers.
        loss: from the model's output to its loss. Default: ``output.loss``, if there is one.

    Raises:
        ValueError: no aligner in the model, or none that was called; a call beside a KV cache (``use_cache=False``);
            rows or names that don't fit.
    """
    aligners = {module: name for name, module in model.named_modules() if isinstance(module, _ALIGNERS)}
    if not aligners:
        raise checks.wrong_value("model", "a module with DuplexAligner in it (transformers: enable(model))", "none")
    seen: list[_Seen] = []
    with torch.no_grad(), _watched(aligners, seen, _as_it_is):
        losses = {"as it is": _loss(model(**inputs), loss)}
    if not seen:
        raise checks.wrong_value("model", "aligners whose maps go into moda_attention", "none that did")
    no_control = None
    try:
        for one in seen:
            keys_of_another_document(one.key, one.layout)
    except ValueError as error:
        no_control = str(error)
    with torch.no_grad():
        if no_control is None:
            with _watched(aligners, None, _of_another):
                losses["another document"] = _loss(model(**inputs), loss)
        if not any(isinstance(aligner, ReleasedAligner) for aligner in aligners):
            with _watched(aligners, None, _identity):
                losses["no alignment"] = _loss(model(**inputs), loss)
        layers = [_layer(one, rows, no_control is None) for one in seen]
    size = len(layers[0].signed)
    names = tuple(modalities) if modalities is not None else tuple(str(m) for m in range(size))
    if len(names) != size:
        raise checks.wrong_value("modalities", f"{size} names", f"{len(names)}")
    found = {how: value for how, value in losses.items() if value is not None}
    return AlignmentReport(layers, names, found, no_control)


_ALIGNERS = (DuplexAligner, ReleasedAligner)
_Change = Callable[[Any, Tensor, dict[str, Any]], KeyMap | None]


@contextmanager
def _watched(aligners: Mapping[Any, str], seen: list[_Seen] | None, change: _Change) -> Iterator[None]:
    """A pass of the model, written down in `seen`; every aligner's map is what `change` makes of its arguments."""
    newest: list[tuple[str, Any, Tensor, ModalityLayout, KeyMap]] = []

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: KeyMap) -> KeyMap:
        named = dict(zip(("key", "layout"), args, strict=False)) | kwargs
        if named.get("state") is not None:
            raise checks.wrong_value(
                "inputs", "a call without a KV cache, such as use_cache=False", "one beside a cache"
            )
        key = named.pop("key")
        named["layout"] = as_layout(named["layout"], getattr(module, "num_modalities", None))
        newest[:] = [(aligners[module], module, key, named["layout"], made)]
        changed = change(module, key, named)
        return made if changed is None else changed

    def watch(call: AttentionCall) -> None:
        if newest and seen is not None:
            name, module, key, layout, made = newest.pop()
            if call.key_map is made or (call.key_map is None and _holds(call, align_keys(key, made, layout), layout)):
                seen.append(_Seen(name, module, key, layout, made, call))

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in aligners]
    if seen is not None:
        attention.watchers.append(watch)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if seen is not None:
            attention.watchers.remove(watch)


def _holds(call: AttentionCall, fused: Tensor, layout: ModalityLayout) -> bool:
    """Whether a call attends to keys that were aligned before."""
    same = call.layout.num_tokens == layout.num_tokens and call.key.shape[-1] == fused.shape[-1]
    return same and torch.equal(to_tokens("key", call.key, call.layout), to_tokens("key", fused, layout))


def _as_it_is(module: Any, key: Tensor, others: dict[str, Any]) -> None:
    return None


def _of_another(module: Any, key: Tensor, others: dict[str, Any]) -> KeyMap:
    """The map from another document's keys (and, of released weights, values)."""
    layout = others["layout"]
    changed = {name: keys_of_another_document(x, layout) for name, x in others.items() if name == "value"}
    made: KeyMap = module.forward(keys_of_another_document(key, layout), **{**others, **changed})
    return made


def _identity(module: Any, key: Tensor, others: dict[str, Any]) -> KeyMap:
    """The map of an aligner that knows nothing."""
    fresh = copy.deepcopy(module)
    fresh.reset_parameters()
    made: KeyMap = fresh.forward(key, **others)
    return made


def _loss(output: Any, loss: Callable[[Any], Tensor] | None) -> float | None:
    value = loss(output) if loss is not None else getattr(output, "loss", None)
    return None if value is None else float(value)


class _Attention:
    """A call that was seen, again with other keys or values, all of them as ``[tokens, H, …]``."""

    def __init__(self, one: _Seen) -> None:
        self.call, self.layout = one.call, one.layout
        self.query = one.call.query
        if self.query.shape[:-1] != one.call.value.shape[:1] + self.query.shape[1:2] + one.call.value.shape[2:-1]:
            raise checks.wrong_value("inputs", "as many queries as keys: no KV cache", self.query)
        call = one.call
        self.options: dict[str, Any] = {
            "scale": call.scale,
            "enable_gqa": True,
            "duplex": "split" if call.split else "joint",
            "branch_weights": call.branch_weights if call.split else None,
        }
        self.scores: dict[str, Any] = {
            name: getattr(call, name) for name in ("attn_mask", "pair_bias", "pseudo", "softcap")
        }

    def __call__(self, key: Tensor, value: Tensor) -> Tensor:
        """The output, float32 or more: ``[tokens, Hq, E]``."""
        return self._run(self.query, key, value, self.scores)[0]

    def with_lse(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """And lse, ``[tokens, Hq]``."""
        return self._run(self.query, key, value, self.scores)

    def even(self, value: Tensor) -> Tensor:
        """With equal weights on all keys that are seen, ``[tokens, 1, E]``."""
        one_head = value[:, :1]
        nothing = torch.zeros_like(one_head[..., :1])
        query = from_tokens(nothing, self.call.layout)
        return self._run(query, nothing, one_head, {})[0]

    def _run(self, query: Tensor, key: Tensor, value: Tensor, scores: dict[str, Any]) -> tuple[Tensor, Tensor]:
        layout = self.call.layout
        options = self.options | scores if scores else {}
        out, lse = attention.moda_attention(
            query,
            from_tokens(key, layout),
            from_tokens(value.to(key.dtype), layout),
            layout=layout,
            mask=self.call.mask,
            return_lse=True,
            **options,
        )
        lse = lse if options.get("duplex") != "split" else lse[..., 0]
        lse = lse.transpose(0, 1) if layout.packed else lse.transpose(1, 2).flatten(0, 1)
        return to_tokens("out", out, layout).to(compute_dtype(out)), lse


def _layer(one: _Seen, rows: Tensor | None, control: bool) -> LayerReport:
    layout, made, call = one.layout, one.key_map, one.call
    again = _Attention(one)
    key, value = to_tokens("key", one.key, layout), to_tokens("value", call.value, call.layout)
    fused = to_tokens("key", align_keys(one.key, made, layout), layout)
    of, size, queries = layout.modality.flatten(), layout.num_modalities, layout.queries()
    one_hot = F.one_hot(of.clamp(min=0).long(), size)[:, None].expand(-1, key.shape[1], -1).to(key.dtype)

    def shaped(x: Tensor) -> Tensor:
        """``[tokens, H, X]`` → ``[B or 1, H, L, X]``."""
        return x.transpose(0, 1)[None] if layout.packed else from_tokens(x, layout)

    seen = call.mask.count_visible(call.layout, call.queries).sum(-1).flatten()  # [tokens]
    visible = shaped((again.even(one_hot) * seen[:, None, None]).round())[:, 0]

    def preference(keys: Tensor) -> tuple[Tensor, ModalDisparity]:
        mass = again(keys, one_hot)
        return mass, disparity_of(shaped(mass), visible, layout, queries)

    mass, found = preference(fused)
    share = mean_by_modality(shaped(mass), torch.ones_like(shaped(mass)[..., 0], dtype=torch.bool), layout, queries)
    with_it, without = again(fused, value), again(key, value)
    other, of_document = torch.full((size,), math.nan), math.nan
    if control:
        arguments = {"value": call.value} if isinstance(one.aligner, ReleasedAligner) else {}
        another = _of_another(one.aligner, one.key, {"layout": layout, **arguments})
        borrowed = to_tokens("key", align_keys(one.key, another, layout), layout)
        signed = preference(borrowed)[1]
        other = _mean_of_finite((signed.own / signed.cross).log2())
        of_document = float((with_it - again(borrowed, value)).norm() / without.norm())
    chosen = _last_tokens(layout) if rows is None else rows
    if chosen.dtype != torch.bool or chosen.shape != layout.modality.shape:
        raise checks.wrong_value("rows", f"bool of shape {tuple(layout.modality.shape)}", chosen)
    at = chosen.flatten().to(mass.device)
    lengths = fused.float().norm(dim=-1) / key.float().norm(dim=-1)
    values, rank = _spectrum(one)
    return LayerReport(
        one.name,
        share.nanmean((0, 1)).cpu(),
        _mean_of_finite((found.own / found.cross).log2()),
        other,
        found.difference.nanmean((0, 1)).cpu(),
        mass[at].mean((0, 1)).cpu(),
        float(_entropy(again, fused, mass)[at].mean()),
        torch.stack([lengths[of == m].mean() for m in range(size)]).cpu(),
        float((with_it - without).norm() / without.norm()),
        of_document,
        values,
        rank,
    )


def _entropy(again: _Attention, fused: Tensor, mass: Tensor) -> Tensor:
    """Of every row's attention, in bits, ``[tokens, Hq]``; NaN where scores are capped or a mask is added, or of two
    softmaxes.

    It needs no row of weights: with scores s and p = e^s / Z, -Σ p log p = mass · log Z - Σ p s, and Σ p s is the
    query times attention with value = key.
    """
    call = again.call
    if call.split or call.attn_mask is not None or call.softcap is not None:
        return torch.full_like(mass[..., 0], math.nan)
    out, lse = again.with_lse(fused, fused)
    expected = call.scale * (to_tokens("query", call.query, call.layout).to(out.dtype) * out).sum(-1)
    if call.pair_bias is not None:
        own = call.layout.modality.flatten().clamp(min=0).long()
        sequence = call.layout.sequence.flatten().clamp(min=0).long() * (call.pair_bias.shape[0] > 1)
        expected = expected + (mass * call.pair_bias.expand(-1, mass.shape[1], -1, -1)[sequence, :, own]).sum(-1)
    return (mass.sum(-1) * torch.where(mass.sum(-1) > 0, lse, 0) - expected) / math.log(2)


def _spectrum(one: _Seen) -> tuple[Tensor, Tensor]:
    """Singular values ``[M, D]`` of the normed Gram sums that keys are mapped by, mean over heads and sequences with
    any; and how many of them count ``[M]``."""
    key = one.key.to(compute_dtype(one.key))
    rest = normed(sum_of_others(modality_gram(key, key, one.layout)), getattr(one.aligner, "norm", "row"))
    values = torch.linalg.svdvals(rest).transpose(0, 1).flatten(1, 2)  # [M, N·H, D]
    there = (values > 0).any(-1, keepdim=True)
    mean = torch.where(there, values, 0).sum(1) / there.sum(1)
    part = mean / mean.sum(-1, keepdim=True)
    return mean.cpu(), (-part * part.clamp(min=1e-30).log()).sum(-1).exp().cpu()


def _mean_of_finite(x: Tensor) -> Tensor:
    """``[N, H, M]`` → ``[M]``: a head that gives a modality nothing at all would make every mean infinite."""
    mean: Tensor = torch.where(x.isfinite(), x, math.nan).nanmean((0, 1)).cpu()
    return mean


def _short(names: Sequence[str]) -> list[str]:
    """Names of modules without the parts that all begin and end with."""
    parts = [name.split(".") for name in names]
    if len(parts) < 2 or len({len(part) for part in parts}) > 1:
        return list(names)
    differ = [i for i, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
    return [".".join(part[differ[0] : differ[-1] + 1]) for part in parts] if differ else list(names)


def _last_tokens(layout: ModalityLayout) -> Tensor:
    """bool, of the layout's shape: each sequence's last token that is no padding."""
    position, sequence = layout.position.flatten().long(), layout.sequence.flatten().long()
    counts = layout.counts.sum(1).to(position.device)
    last = (position >= 0) & (position == counts[sequence.clamp(min=0)] - 1)
    return last.view(layout.modality.shape)
