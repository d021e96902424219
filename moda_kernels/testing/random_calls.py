"""Random calls of `moda_attention`, every option at once.

A number, the seed, decides all of a call: tokens, masks, aligner, memory order, which tensors want a gradient, even
what stands in padding. `fuzz.py` runs and judges them.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from moda_kernels.alignment.aligner import SCOPES, DuplexAligner
from moda_kernels.alignment.maps import FUSIONS, NORMS
from moda_kernels.alignment.released import released_key_map
from moda_kernels.runtime import checks
from moda_kernels.testing import dense
from moda_kernels.testing.cases import PADDING, Inputs, Result, generator, random_ids
from moda_kernels.testing.oracle import run
from moda_kernels.tokens.layout import ModalityLayout
from moda_kernels.tokens.mask import ModularMask, Visibility
from moda_kernels.tokens.pseudo import PseudoAttention
from moda_kernels.tokens.segments import segment_modalities

T = TypeVar("T")

#: What a backend takes, with the more telling ones more often. (In float64 nothing hides behind rounding.)
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "reference": (torch.float64,),
    "cpu": (torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "flex": (torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.float32, torch.float16),
}

_MORE_IDS = ("item_ids", "roles", "steps", "chunks")


@dataclass(frozen=True)
class Call:
    """One call, as plain facts.

    Attributes:
        tensors: every float tensor that may want a gradient, by name. fixed: those that don't.
        mask: None: full, or causal with ``is_causal``. attn_mask: bools or a CausalBias; floats are in ``tensors``.
        aligner: arguments of `DuplexAligner`, {"fusion": "released"}, or None.
        pseudo: of `PseudoAttention`; base and decay are in ``tensors`` where they are tensors.
        weights: of the branches; "weight_self" and "weight_cross" of ``tensors`` where there are such.
        options: further arguments, the same for all backends.
        raw_ids: the layout is given as modality ids. lse_gradient: a gradient flows into lse too.
    """

    seed: int
    dtype: torch.dtype
    tokens: dense.Tokens
    tensors: dict[str, Tensor]
    fixed: frozenset[str]
    mask: ModularMask | None
    attn_mask: Any
    aligner: dict[str, Any] | None
    pseudo: dict[str, Any] | None
    weights: tuple[float, float] | None
    options: dict[str, Any] = field(default_factory=dict)
    raw_ids: bool = False
    lse_gradient: bool = True

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in self.tensors.items())
        shown = {"mask": self.mask, "aligner": self.aligner, "pseudo": self.pseudo, "attn_mask": self.attn_mask}
        shown |= {"weights": self.weights, "fixed": sorted(self.fixed)} | self.options
        said = [f"{name}={_brief(value)}" for name, value in shown.items() if value is not None and value != []]
        kind = "packed" if self.tokens.packed else "batch"
        kind += "".join(f" {name}" for name in _MORE_IDS if getattr(self.tokens, name) is not None)
        return f"{self.dtype}, {kind} {list(self.tokens.modality_ids.shape)}; {shapes}; {', '.join(said)}"

    def layout(self) -> ModalityLayout:
        t = self.tokens
        return segment_modalities(
            t.modality_ids, num_modalities=t.num_modalities, item_ids=t.item_ids, roles=t.roles, num_roles=t.num_roles,
            steps=t.steps, chunks=t.chunks, cu_seqlens=t.cu_seqlens, max_segments=t.modality_ids.numel(),
        )  # fmt: skip

    def inputs(self, makers: Any = None) -> Inputs:
        """For `run`, `oracle` and `eager`.

        Args:
            makers: of key maps, `moda_kernels.reference` or another module. Default: the package's own.
        """
        layout = self.layout()
        fused = self.aligner is not None and self.aligner["fusion"] != "released"
        return Inputs(
            self.tensors,
            lambda tensors: self._arguments(tensors, layout, makers),
            fixed=self.fixed,
            lse_gradient=self.lse_gradient,
            normed=fused,
            may_be_unused=True,
        )

    def _arguments(self, tensors: dict[str, Tensor], layout: ModalityLayout, makers: Any) -> dict[str, Any]:
        made: dict[str, Any] = dict(self.options)
        made["layout"] = self.tokens.modality_ids if self.raw_ids else layout
        for name, value in (("mask", self.mask), ("attn_mask", tensors.get("attn_mask", self.attn_mask))):
            if value is not None:
                made[name] = value
        if "pair_bias" in tensors:
            made["pair_bias"] = tensors["pair_bias"]
        if self.pseudo is not None:
            made["pseudo"] = PseudoAttention(**self._pseudo(tensors))
        if self.weights is not None:
            made["branch_weights"] = self._weights(tensors)
        if self.aligner is not None:
            made["key_map"] = self._key_map(tensors, layout, makers)
        return made

    def _pseudo(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        assert self.pseudo is not None
        return self.pseudo | {name: tensors[name] for name in ("base", "decay") if name in tensors}

    def _weights(self, tensors: dict[str, Tensor]) -> tuple[float | Tensor, float | Tensor]:
        assert self.weights is not None
        names = ("weight_self", "weight_cross")
        mine, cross = (tensors.get(name, weight) for name, weight in zip(names, self.weights, strict=True))
        return mine, cross

    def _key_map(self, tensors: dict[str, Tensor], layout: ModalityLayout, makers: Any) -> Any:
        key = tensors["key"]
        assert self.aligner is not None
        if self.aligner["fusion"] == "released":
            make = released_key_map if makers is None else makers.released_key_map
            return make(key, tensors["value"], layout, tensors["ratio"], tensors["weight"])
        kind = DuplexAligner if makers is None else makers.DuplexAligner
        aligner = kind(key.shape[-1], self.tokens.num_modalities, **self.aligner, device=key.device)
        for name in {"ratio", "weight"} & set(tensors):
            delattr(aligner, name)  # a parameter would be a leaf of its own
            setattr(aligner, name, tensors[name])
        return aligner(key, layout)

    def dense(self, arithmetic: dense.Exact = dense.EXACT) -> Result:
        """The call by the dense oracle, forward and backward, under the same random gradients as `run`."""
        inputs = self.inputs()

        def attend(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            r, options = self.tokens.num_roles or self.tokens.num_modalities, dict(self.options)
            options.pop("enable_gqa", None)
            causal, split = options.pop("is_causal", False), options.pop("duplex", "joint") == "split"
            attn_mask = tensors.get("attn_mask", self.attn_mask)
            if checks.is_causal_bias(attn_mask):
                rows, keys = attn_mask.seq_len_q, attn_mask.seq_len_kv
                offset = keys - rows if attn_mask.variant.name == "LOWER_RIGHT" else 0
                attn_mask = torch.ones(rows, keys, dtype=torch.bool, device=tensors["key"].device).tril(offset)
            return dense.attend(
                self.tokens,
                tensors,
                rules=[[dense.PAST if causal else dense.ALL] * r] * r if self.mask is None else self.mask.rules,
                window=None if self.mask is None else self.mask.window,
                window_on="past" if self.mask is None else self.mask.window_on,
                attn_mask=attn_mask,
                aligner=self.aligner,
                pseudo=None if self.pseudo is None else {"base": 0.0, "decay": 1.0} | self._pseudo(tensors),
                split=split,
                weights=(1.0, 1.0) if self.weights is None else self._weights(tensors),
                arithmetic=arithmetic,
                **options,
            )

        return run(inputs, self.dtype, compute=torch.float64, attend=attend)


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}" if value.numel() > 8 else str(value.tolist())
    if isinstance(value, ModularMask):
        return f"{[[int(rule) for rule in row] for row in value.rules]} window {value.window} on {value.window_on}"
    return str(value)


# Drawing


class _Dice:
    """A random generator with the questions that a draw asks."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.g, self.dtype, self.device = generator(seed), dtype, device

    def of(self, *options: T) -> T:
        return options[int(torch.randint(len(options), (), generator=self.g))]

    def chance(self, probability: float) -> bool:
        return float(torch.rand((), generator=self.g)) < probability

    def number(self, least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=self.g))

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(shape, generator=self.g)).to(self.device, self.dtype)

    def placed(self, x: Tensor, token_axis: int) -> Tensor:
        """The same numbers in another order in memory."""
        way = self.of("as it is", "tokens first", "part of more", "columns apart", "one for all")
        if way == "tokens first":
            return x.transpose(1, token_axis).contiguous().transpose(1, token_axis)
        if way == "part of more":  # an offset, gaps between rows
            more = torch.nn.functional.pad(x, (3, 2), value=math.nan)
            return more[..., 3 : 3 + x.shape[-1]]
        if way == "columns apart":
            return torch.stack((x, torch.full_like(x, math.nan)), -1)[..., 0]
        if way == "one for all" and x.dim() == 4 and x.shape[0]:
            return x[:1].expand(x.shape)
        return x


def draw(seed: int, backend: str = "reference", device: torch.device | str = "cpu") -> Call:
    """The call of a seed, of a dtype and with options that a backend doesn't refuse."""
    device = torch.device(device)
    dtype = DTYPES[backend][seed % len(DTYPES[backend])]
    dice = _Dice(seed, dtype, device)
    m = dice.of(1, 2, 2, 2, 3, 3, 4, 7)
    aligner = _draw_aligner(dice, m) if dice.chance(0.4) else None
    # An interpreter takes its time by heads and sequences.
    slow = backend == "triton" and device.type == "cpu"
    tokens = _draw_tokens(dice, m, most=18 if aligner else 48, fewest=slow)
    if dice.chance(0.5):
        tokens = _with_more_ids(dice, tokens)
        if aligner is not None and aligner["fusion"] != "released" and dice.chance(0.3):
            roles = range(tokens.num_roles or m)
            aligner["source_roles"] = tuple(role for role in roles if dice.chance(0.6)) or None
    sequences, keys = len(tokens.bounds) - 1, tokens.bounds[-1] if tokens.packed else tokens.modality_ids.shape[1]
    key_heads = dice.of(1, 1, 1, 2) if slow else dice.of(1, 1, 2, 3)
    group = dice.of(1, 1, 1, 2, 3) if slow and key_heads == 1 else 1 if slow else dice.of(1, 1, 2, 3)
    heads, dim = key_heads * group, dice.of(1, 3, 4, 8, 16, 20)
    released = aligner is not None and aligner["fusion"] == "released"
    value_dim = dim if released or dice.chance(0.6) else dice.of(1, 5, 8, 24)
    options: dict[str, Any] = {}
    rows, columns = _draw_queries(dice, tokens, keys, options)

    std = dice.of(0.3, 1.0, 1.0, 3.0)
    tensors: dict[str, Tensor] = {}
    poison = dice.of(None, None, math.nan, math.inf)
    ids = tokens.modality_ids.flatten()
    for name, count, h, d, of_token in (
        ("query", rows, heads, dim, ids[columns]),
        ("key", keys, key_heads, dim, ids),
        ("value", keys, key_heads, value_dim, ids),
    ):
        x = dice.normal(*((count, h, d) if tokens.packed else (sequences, count, h, d)), std=std)
        if poison is not None:
            x = torch.where((of_token < 0).view(*x.shape[:-2], 1, 1), poison, x)
        x = x if tokens.packed else x.transpose(1, 2)
        # One for all rows of the batch would have one row's padding elsewhere.
        placed = dice.placed(x, 0 if tokens.packed else 2)
        tensors[name] = placed if poison is None or 0 not in placed.stride() else x
    if group > 1 or dice.chance(0.2):
        options["enable_gqa"] = True
    options["scale"] = scale = dice.of(None, None, None, 0.3, 0, -0.5, -0.1, 2.0, 1e-3)
    if scale is None:
        del options["scale"]

    mask = None
    if dice.chance(0.8):
        mask = _draw_mask(dice, tokens.num_roles or m)
    if mask is None and dice.chance(0.5):
        options["is_causal"] = True
    attn_mask = None
    if not tokens.packed and dice.chance(0.3):
        attn_mask = _draw_attn_mask(dice, (sequences, heads, rows, keys), backend)
        if isinstance(attn_mask, Tensor) and not checks.is_causal_bias(attn_mask) and attn_mask.is_floating_point():
            tensors["attn_mask"], attn_mask = attn_mask, None
    if dice.chance(0.3) and not (backend == "cpu" and scale == 0):
        bias = dice.normal(dice.of(1, sequences), dice.of(1, heads), m, m)
        if backend != "cpu" and dice.chance(0.2):
            bias = torch.where((torch.rand(bias.shape, generator=dice.g) < 0.3).to(device), -math.inf, bias)
        tensors["pair_bias"] = bias.transpose(2, 3) if dice.chance(0.3) else bias
    pseudo = _draw_pseudo(dice, heads, tensors) if dice.chance(0.4) else None
    weights = None
    if dice.chance(0.3):
        options["duplex"] = "split"
        if dice.chance(0.6):
            weights = (dice.of(1.0, 0.5, -2.0, 0.0), dice.of(1.0, 0.5, -2.0, 0.0))
            for name in ("weight_self", "weight_cross"):
                if dice.chance(0.6):
                    tensors[name] = dice.normal(heads)
    if aligner is not None:
        tensors |= _draw_parameters(dice, aligner["fusion"], m, dim)
    fixed = _draw_fixed(dice, tensors, backend)
    return Call(
        seed, dtype, tokens, tensors, fixed, mask, attn_mask, aligner, pseudo, weights, options,
        raw_ids=not tokens.packed and all(getattr(tokens, name) is None for name in _MORE_IDS)
        and mask is not None and aligner is None and dice.chance(0.3),
        lse_gradient=dice.chance(0.7),
    )  # fmt: skip


def _draw_tokens(dice: _Dice, m: int, most: int, fewest: bool) -> dense.Tokens:
    packed = dice.chance(0.4)
    sequences = dice.of(1, 1, 2, 2, 3) if fewest else dice.of(1, 2, 2, 3, 4)
    sequences = sequences if dice.chance(0.97) else 0

    def length() -> int:
        return min(dice.of(0, 1, 2, 3, 7, 16, 17, 31, 33, most, most, most), most)

    lengths = [length() for _ in range(sequences)]
    if not packed:
        lengths = lengths[:1] * sequences
    kinds = [dice.of("none", "none", *PADDING) for _ in lengths]
    rows = [
        random_ids(n, m, dice.g, longest=dice.of(1, 1, 3, 6, 16), padding=kind) if n else torch.zeros(0).long()
        for n, kind in zip(lengths, kinds, strict=True)
    ]
    flat = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long)
    total = flat.numel()
    items = None
    if dice.chance(0.3):
        items = torch.randint(-1, 2, (total,), generator=dice.g).repeat_interleave(dice.of(1, 3))[:total]
    kind = dice.of(torch.int64, torch.int64, torch.int32)
    shape = (total,) if packed else (sequences, lengths[0] if lengths else 0)
    return dense.Tokens(
        modality_ids=flat.view(shape).to(dice.device, kind),
        num_modalities=m,
        item_ids=None if items is None else items.view(shape).to(dice.device),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(dice.device, torch.int32) if packed else None,
    )


def _with_more_ids(dice: _Dice, tokens: dense.Tokens) -> dense.Tokens:
    """Roles, steps and chunks, each in its own runs; at padding anything."""
    ids, bounds = tokens.modality_ids.flatten().cpu().long(), list(pairwise(tokens.bounds))
    padding = ids < 0

    def runs(least: int, most: int) -> Tensor:
        drawn = [random_ids(end - begin, most - least + 1, dice.g, longest=dice.of(1, 3, 9)) for begin, end in bounds]
        return torch.cat([*drawn, torch.zeros(0, dtype=torch.long)]) + least

    def placed(x: Tensor) -> Tensor:
        return torch.where(padding, dice.of(-1, 0, 99), x).view(tokens.modality_ids.shape).to(dice.device)

    made: dict[str, Any] = {}
    role = ids
    if dice.chance(0.6):
        copies = dice.of(0, 2)  # a clean and a noised copy of each modality; or roles of any kind
        r = copies * tokens.num_modalities if copies else dice.number(1, 4)
        role = ids + tokens.num_modalities * runs(0, 1) if copies else runs(0, r - 1)
        made |= {"roles": placed(role), "num_roles": r}
    if dice.chance(0.6):
        step = torch.zeros_like(ids)
        grows = (torch.rand(ids.shape, generator=dice.g) < dice.of(0.1, 0.5)).long() * dice.of(1, 3)
        for begin, end in bounds:
            for of_role in set(role[begin:end].tolist()):  # each role in its own time
                mine = role[begin:end] == of_role
                step[begin:end][mine] = grows[begin:end][mine].cumsum(0) + dice.of(0, 0, -2, 1)
        made["steps"] = placed(step)
    if dice.chance(0.6):
        made["chunks"] = placed(runs(dice.of(-1, -1, 0), 2))
    return dataclasses.replace(tokens, **made)


def _draw_mask(dice: _Dice, roles: int) -> ModularMask:
    """Any union of rules, or those that people write."""
    past, segment, everything, before, upto, chunk = (2**i for i in range(6))
    usual = (0, past, segment, before, upto, chunk, past | segment, segment | before, chunk | before, everything)
    options = dice.of(usual, usual, tuple(range(64)))
    rules = tuple(tuple(Visibility(dice.of(*options)) for _ in range(roles)) for _ in range(roles))
    window = dice.of(None, None, 1, 3, 10)
    return ModularMask(rules, window, "past" if window is None else dice.of("past", "past", "all"))


def _draw_queries(dice: _Dice, tokens: dense.Tokens, keys: int, options: dict[str, Any]) -> tuple[int, Tensor]:
    """The number of query rows (of a sequence; packed: of all) and the tokens they stand in; ``options`` says where."""
    sequences = len(tokens.bounds) - 1
    if not dice.chance(0.35):
        return keys, torch.arange(tokens.bounds[-1], device=dice.device)
    if tokens.packed:
        lengths = [end - begin for begin, end in zip(tokens.bounds, tokens.bounds[1:], strict=False)]
        counts = [dice.of(0, 1, n // 2, n, dice.number(0, n)) if n else 0 for n in lengths]
        counts = [min(count, n) for count, n in zip(counts, lengths, strict=True)]
        options["cu_seqlens_q"] = torch.tensor([0, *counts]).cumsum(0).to(dice.device, torch.int32)
        ends = zip(tokens.bounds[1:], counts, strict=True)
        columns = [t for end, count in ends for t in range(end - count, end)]
        return sum(counts), torch.tensor(columns, dtype=torch.long, device=dice.device)
    rows = min(dice.of(1, 1, keys // 2, keys, dice.number(0, keys)), keys)
    starts = [keys - rows] * sequences
    way = dice.of("default", "int", "tensor")
    if way == "int":
        starts = [dice.number(0, keys - rows)] * sequences
        options["query_start"] = starts[0] if starts else 0
    elif way == "tensor":
        starts = [dice.number(0, keys - rows) for _ in range(sequences)]
        options["query_start"] = torch.tensor(starts, dtype=torch.int32, device=dice.device)
    columns = [n * keys + start + i for n, start in enumerate(starts) for i in range(rows)]
    return rows, torch.tensor(columns, dtype=torch.long, device=dice.device)


def _draw_attn_mask(dice: _Dice, full: tuple[int, int, int, int], backend: str) -> Any:
    """What torch's SDPA takes: bool or float, of any shape that broadcasts; or a CausalBias."""
    if dice.chance(0.2) and backend != "triton" and full[2] and full[3]:
        return dice.of(causal_upper_left, causal_lower_right)(full[2], full[3])
    shape = tuple(n if dice.chance(0.7) else 1 for n in full)[dice.of(0, 0, 1, 2) :]
    if dice.chance(0.5):
        return (torch.rand(shape, generator=dice.g) < dice.of(0.3, 0.8)).to(dice.device)
    mask = dice.normal(*shape)
    if dice.chance(0.5):
        mask = torch.where((torch.rand(shape, generator=dice.g) < 0.3).to(dice.device), -math.inf, mask)
    return mask


def _draw_pseudo(dice: _Dice, heads: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    length = dice.of(None, None, dice.number(0, 60), math.inf)
    pseudo: dict[str, Any] = {"base": dice.of(0.0, -1.5, 2.0), "decay": dice.of(1.0, 0.05, 0.0), "length": length}
    if length == math.inf and pseudo["decay"] == 0:
        pseudo["decay"] = 0.3
    for name in ("base", "decay"):
        if dice.chance(0.5):
            drawn = dice.normal(heads)
            tensors[name] = drawn if name == "base" else drawn.abs() * 0.3 + 0.01
    return pseudo


def _draw_aligner(dice: _Dice, m: int) -> dict[str, Any]:
    if dice.chance(0.2):
        return {"fusion": "released"}
    aligned = None if dice.chance(0.7) else tuple(i for i in range(m) if dice.chance(0.5))
    return {"fusion": dice.of(*FUSIONS), "norm": dice.of(*NORMS), "scope": dice.of(*SCOPES), "aligned": aligned,
            "renorm": dice.chance(0.25)}  # fmt: skip


def _draw_parameters(dice: _Dice, fusion: str, m: int, dim: int) -> dict[str, Tensor]:
    made = {}
    if fusion != "concat":
        shape = dice.of((dim,), (1, 1, dim)) if fusion == "released" else (m, dim)
        made["ratio"] = dice.normal(*shape)
    if fusion != "add":
        width = 2 * dim if fusion == "concat" else dim
        made["weight"] = dice.normal(*(() if fusion == "released" else (m,)), dim, width, std=dim**-0.5)
    return made


def _draw_fixed(dice: _Dice, tensors: dict[str, Tensor], backend: str) -> frozenset[str]:
    wanted = dice.of("all", "all", "all", "some", "none")
    fixed = {name for name in tensors if wanted == "none" or (wanted == "some" and dice.chance(0.5))}
    if backend in ("cpu", "triton"):  # they have no gradient for it
        fixed |= {"attn_mask"} & set(tensors)
    return frozenset(fixed)
