"""Inputs that tests and benchmarks share: random layouts and masks, and cases of attention.

A *case* is one combination of `moda_attention`'s features. It builds inputs with every differentiable tensor by name,
so that whoever runs it (`oracle.py`) compares outputs, lse and all gradients.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from moda_kernels.alignment.aligner import DuplexAligner
from moda_kernels.alignment.released import released_key_map
from moda_kernels.attention import moda_attention
from moda_kernels.tokens.layout import ModalityLayout
from moda_kernels.tokens.mask import ModularMask, Visibility
from moda_kernels.tokens.pseudo import PseudoAttention
from moda_kernels.tokens.segments import segment_modalities

PADDING = ("none", "left", "right", "middle", "all")


# Random inputs


def generator(seed: int) -> torch.Generator:
    """A generator on the CPU: the same numbers whatever device they are moved to."""
    return torch.Generator().manual_seed(seed)


def _choose(options: list[Any] | tuple[Any, ...], g: torch.Generator) -> Any:
    return options[int(torch.randint(len(options), (), generator=g))]


def random_ids(
    length: int, num_modalities: int, g: torch.Generator, *, longest: int = 8, padding: str = "none"
) -> Tensor:
    """Modality ids ``[length]`` of one sequence: runs of 1 to ``longest`` tokens.

    Args:
        longest: 1 interleaves the modalities token by token.
        padding: "none", "left", "right", "middle" (holes anywhere) or "all".
    """
    ids = torch.randint(num_modalities, (length,), generator=g)
    runs = torch.randint(1, longest + 1, (length,), generator=g)
    ids = ids.repeat_interleave(runs)[:length]
    column = torch.arange(length)
    hidden = length // 3
    if padding == "left":
        ids = torch.where(column < hidden, -1, ids)
    elif padding == "right":
        ids = torch.where(column >= length - hidden, -1, ids)
    elif padding == "middle":
        ids = torch.where(torch.rand(length, generator=g) < 0.3, -1, ids)
    elif padding == "all":
        ids = torch.full_like(ids, -1)
    elif padding != "none":
        raise ValueError(f"padding: expected one of {', '.join(PADDING)}, got {padding!r}")
    return ids


def _runs(low: int, high: int, count: int, longest: int, g: torch.Generator) -> Tensor:
    """Numbers ``[count]`` from low to high - 1, in runs of up to ``longest``."""
    values = torch.randint(low, high, (count,), generator=g)
    return values.repeat_interleave(torch.randint(1, longest + 1, (count,), generator=g))[:count]


def random_steps(kinds: Tensor, g: torch.Generator, most: int = 5) -> Tensor:
    """Steps, of the shape of ``kinds``, that rise from 0 to ``most`` among the tokens of each kind."""
    flat = kinds.flatten()
    steps = torch.randint(most + 1, flat.shape, generator=g)
    for kind in flat.unique():
        steps[flat == kind] = steps[flat == kind].sort().values
    return steps.view(kinds.shape)


def random_layout(
    g: torch.Generator,
    *,
    num_modalities: int | None = None,
    packed: bool | None = None,
    most: int = 40,
    plain: bool = False,
) -> ModalityLayout:
    """A layout of any kind: batch or packed, no or all padding, long or short segments, empty sequences, no sequences;
    with roles, steps and chunks or without.

    Args:
        num_modalities, packed: default: drawn too.
        most: upper bound of a sequence's length.
        plain: no roles, steps or chunks.
    """
    m = int(torch.randint(1, 4, (), generator=g)) if num_modalities is None else num_modalities
    packed = _choose((False, True), g) if packed is None else packed
    sequences = int(torch.randint(0, 4, (), generator=g))
    lengths = [int(torch.randint(0, most + 1, (), generator=g)) for _ in range(sequences)]
    if not packed:
        lengths = lengths[:1] * sequences
    rows = [
        random_ids(n, m, g, longest=_choose((1, 3, 16), g), padding=_choose(PADDING, g)) if n else torch.zeros(0).long()
        for n in lengths
    ]
    flat = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    shape = (flat.numel(),) if packed else (sequences, lengths[0] if lengths else 0)
    given: dict[str, Any] = {}
    num_roles = None
    if _choose((False, True), g):
        given["item_ids"] = torch.randint(2, flat.shape, generator=g).repeat_interleave(3)[: flat.numel()]
    if not plain and _choose((False, True), g):
        num_roles = _choose((1, 2, 3), g)
        given["roles"] = _runs(0, num_roles, flat.numel(), 5, g)
    if not plain and _choose((False, True), g):
        sequence = torch.searchsorted(bounds[1:], torch.arange(flat.numel()).int(), right=True)
        given["steps"] = random_steps(sequence * 8 + given.get("roles", flat.clamp(min=0)), g)
    if not plain and _choose((False, True), g):
        given["chunks"] = _runs(-1, 3, flat.numel(), 9, g)
    return segment_modalities(
        flat.view(shape),
        num_modalities=m,
        num_roles=num_roles,
        cu_seqlens=bounds if packed else None,
        **{name: fact.view(shape) for name, fact in given.items()},
    )


def random_mask(g: torch.Generator, num_roles: int, window: bool = True, plain: bool = False) -> ModularMask:
    """A mask of any rules, in half the cases (if ``window``) with a window, of one kind or the other.

    Args:
        plain: of PAST, SEGMENT and ALL alone, and the window on PAST.
    """
    usual = (Visibility.HIDDEN, Visibility.PAST, Visibility.SEGMENT, Visibility.PAST | Visibility.SEGMENT)
    of_steps = (Visibility.BEFORE, Visibility.UPTO, Visibility.CHUNK | Visibility.BEFORE, Visibility.UPTO)
    every = tuple(map(Visibility, range(8 if plain else 64)))
    options = _choose((usual, every) if plain else (usual, usual[:3] + of_steps, every), g)
    rules = tuple(tuple(_choose(options, g) for _ in range(num_roles)) for _ in range(num_roles))
    size = _choose((None, 1, 3, 10), g) if window else None
    return ModularMask(rules, size, "all" if size and not plain and _choose((False, True), g) else "past")


# Cases


@dataclass(frozen=True)
class Inputs:
    """Inputs of one call.

    Attributes:
        tensors: every differentiable tensor, by name; query, key and value among them.
        arguments: from such tensors to the keyword arguments of `moda_attention` other than query, key and value (maps
            of keys are made anew from the tensors, so that gradients reach the aligner's parameters).
        fixed: tensors that want no gradient after all.
        lse_gradient: whether a gradient flows into lse.
        normed: a Gram matrix is normed on the way (see `oracle.eager`).
        may_be_unused: a tensor that the output doesn't depend on has a gradient of 0; else that is an error.
    """

    tensors: dict[str, Tensor]
    arguments: Callable[[dict[str, Tensor]], dict[str, Any]]
    fixed: frozenset[str] = frozenset()
    lse_gradient: bool = True
    normed: bool = False
    may_be_unused: bool = False

    def call(self, tensors: dict[str, Tensor], **more: Any) -> Any:
        """`moda_attention` on these tensors, with lse."""
        q, k, v = (tensors[name] for name in ("query", "key", "value"))
        return moda_attention(q, k, v, return_lse=True, **self.arguments(tensors), **more)


@dataclass(frozen=True)
class Result:
    """Outputs and gradients of one call: "out", "lse" and "d <name>" of every differentiable tensor."""

    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One combination of features of `moda_attention`; the defaults are plain joint attention over a batch.

    Attributes:
        name: of the case.
        mask: from the number of roles to a mask. None: no mask argument.
        packed: packed documents of several lengths in place of a batch. padding, longest: as in `random_ids`.
        roles: R, roles that cut across the modalities; None: the modalities. steps, chunks: whether tokens have any.
        modalities, key_heads, group: M, Hkv, and query heads per key head.
        queries: fewer queries: None (as many as keys), "default" (the last columns), "int" or "tensor" (query_start);
            packed: "default" (cu_seqlens_q).
        pseudo: arguments of PseudoAttention; base and decay become tensors [Hq] where they are None.
        bias: "own" ([N, Hq, M, M]) or "shared" ([1, 1, M, M]).
        fusion, scope, norm, aligned, renorm, source_roles: the aligner's; fusion "released" is the released map.
        attn_mask: "bool", "float" (differentiable) or "fixed" (a float mask without gradient). weights: branch weights
            as tensors. value_dim: relative to the head size.
    """

    name: str
    mask: Callable[[int], ModularMask] | None = ModularMask.causal
    packed: bool = False
    padding: tuple[str, ...] = ("right", "none")
    longest: int = 16
    modalities: int = 2
    roles: int | None = None
    steps: bool = False
    chunks: bool = False
    key_heads: int = 2
    group: int = 1
    length: int | None = None
    queries: str | None = None
    duplex: str = "joint"
    pseudo: dict[str, Any] | None = None
    bias: str | None = None
    fusion: str | None = None
    scope: str = "sequence"
    norm: str = "row"
    aligned: tuple[int, ...] | None = None
    renorm: bool = False
    source_roles: tuple[int, ...] | None = None
    attn_mask: str | None = None
    weights: bool = False
    value_dim: float = 1
    scale: float | None = None
    softcap: float | None = None
    is_causal: bool = False

    def __repr__(self) -> str:
        return self.name

    def layout(self, length: int, seed: int = 0) -> ModalityLayout:
        """The keys' layout: one sequence per entry of ``padding``, of about ``length`` tokens."""
        g = generator(seed)
        length = length if self.length is None else self.length
        lengths = [length] * len(self.padding)
        if self.packed:  # with an empty document and one of a single token
            lengths = [length, 0, 1, max(length // 2, 1)]
        paddings = (*self.padding, *self.padding)[: len(lengths)] if not self.packed else (*self.padding, "none") * 2
        rows = [
            random_ids(n, self.modalities, g, longest=self.longest, padding=p)
            for n, p in zip(lengths, paddings, strict=False)
        ]
        ids = torch.cat(rows) if self.packed else torch.stack(rows)
        given: dict[str, Any] = {}
        kinds = ids.clamp(min=0)
        if self.roles is not None:
            kinds = given["roles"] = _runs(0, self.roles, ids.numel(), self.longest, g).view(ids.shape)
        if self.steps:
            sequence = torch.arange(len(rows)).repeat_interleave(torch.tensor(lengths)).view(ids.shape)
            given["steps"] = random_steps(sequence * 8 + kinds, g)
        if self.chunks:
            given["chunks"] = _runs(-1, 3, ids.numel(), 2 * self.longest, g).view(ids.shape)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int() if self.packed else None
        return segment_modalities(
            ids, num_modalities=self.modalities, num_roles=self.roles, cu_seqlens=cu_seqlens, **given
        )

    def build(
        self,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        length: int = 63,
        head_dim: int = 16,
        seed: int = 0,
    ) -> Inputs:
        """Inputs of this case.

        Args:
            dtype: all tensors are rounded to it.
            length: tokens of the longest sequence. head_dim: D.
        """
        layout, g = self.layout(length, seed), generator(seed + 1)
        heads, m, n = self.key_heads * self.group, self.modalities, layout.num_sequences
        value_dim = int(head_dim * self.value_dim)
        arguments: dict[str, Any] = {"scale": self.scale, "duplex": self.duplex, "enable_gqa": self.group > 1}
        tensors: dict[str, Tensor] = {}

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return std * torch.randn(*shape, generator=g)

        rows = self._queries(layout, arguments, g)
        for name, count, h, d in (
            ("query", rows, heads, head_dim),
            ("key", layout.modality.shape[-1], self.key_heads, head_dim),
            ("value", layout.modality.shape[-1], self.key_heads, value_dim),
        ):
            tensors[name] = normal(count, h, d) if layout.packed else normal(n, h, count, d)
        if self.mask is not None:
            arguments["mask"] = self.mask(self.roles or m)
        if self.is_causal:
            arguments["is_causal"] = True
        if self.softcap is not None:
            arguments["softcap"] = self.softcap
        if self.attn_mask == "float":
            tensors["attn_mask"] = normal(n, 1, rows, layout.modality.shape[-1])
        elif self.attn_mask == "fixed":
            arguments["attn_mask"] = normal(rows, layout.modality.shape[-1]).to(dtype)
        elif self.attn_mask == "bool":
            arguments["attn_mask"] = torch.rand(heads, rows, layout.modality.shape[-1], generator=g) < 0.7
        if self.bias is not None:
            tensors["pair_bias"] = normal(n, heads, m, m) if self.bias == "own" else normal(1, 1, m, m)
        if self.pseudo is not None:
            for name in ("base", "decay"):
                if self.pseudo.get(name, None) is None:
                    tensors[name] = normal(heads) if name == "base" else normal(heads).abs() * 0.3 + 0.01
        if self.weights:
            tensors |= {"weight_self": normal(heads), "weight_cross": normal(heads)}
        if self.fusion is not None:
            tensors |= self._parameters(head_dim, normal)
        tensors = {name: t.to(device, dtype) for name, t in tensors.items()}
        layout = layout.to(device)
        fixed = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in arguments.items()}
        normed = self.fusion not in (None, "released")
        return Inputs(tensors, lambda t: self._arguments(t, layout, dict(fixed)), normed=normed)

    def _queries(self, layout: ModalityLayout, arguments: dict[str, Any], g: torch.Generator) -> int:
        """Query rows (packed: of all documents); puts into ``arguments`` what says where they stand."""
        keys = layout.modality.shape[-1]
        if self.queries is None:
            return keys
        if layout.packed:
            lengths = (layout.cu_seqlens.diff() + 1) // 2
            arguments["cu_seqlens_q"] = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int()
            return int(lengths.sum())
        rows = max(keys // 3, 1)
        if self.queries == "int":
            arguments["query_start"] = (keys - rows) // 2
        elif self.queries == "tensor":
            spare = keys - rows + 1
            arguments["query_start"] = torch.randint(spare, (layout.num_sequences,), generator=g, dtype=torch.int32)
        return rows

    def _parameters(self, dim: int, normal: Callable[..., Tensor]) -> dict[str, Tensor]:
        m, made = self.modalities, {}
        per_modality = () if self.fusion == "released" else (m,)
        if self.fusion != "concat":
            made["ratio"] = normal(*per_modality, dim)
        if self.fusion != "add":
            width = 2 * dim if self.fusion == "concat" else dim
            made["weight"] = normal(*per_modality, dim, width, std=dim**-0.5)
        return made

    def _arguments(self, tensors: dict[str, Tensor], layout: ModalityLayout, made: dict[str, Any]) -> dict[str, Any]:
        made["layout"] = layout
        for name in ("pair_bias", "attn_mask"):
            if name in tensors:
                made[name] = tensors[name]
        if self.pseudo is not None:
            own: dict[str, Any] = {name: tensors[name] for name in ("base", "decay") if name in tensors}
            made["pseudo"] = PseudoAttention(**(self.pseudo | own))
        if self.weights:
            made["branch_weights"] = (tensors["weight_self"], tensors["weight_cross"])
        if self.fusion == "released":
            made["key_map"] = released_key_map(
                tensors["key"], tensors["value"], layout, tensors["ratio"], tensors["weight"]
            )
        elif self.fusion is not None:
            aligner = DuplexAligner(
                tensors["key"].shape[-1],
                self.modalities,
                fusion=self.fusion,
                norm=self.norm,
                scope=self.scope,
                aligned=self.aligned,
                renorm=self.renorm,
                source_roles=self.source_roles,
                device=tensors["key"].device,
            )
            parameters: dict[str, Tensor] = {name: tensors[name] for name in ("ratio", "weight") if name in tensors}
            made["key_map"] = functional_call(aligner, parameters, (tensors["key"], layout))
        return made


def _within(m: int) -> ModularMask:
    return ModularMask.bidirectional_within(m, [m - 1])


def _ruled(m: int) -> ModularMask:
    """Every kind of rule at once, some rows that see nothing."""
    kinds = (Visibility.PAST | Visibility.SEGMENT, Visibility.ALL, Visibility.HIDDEN, Visibility.SEGMENT)
    return ModularMask(tuple(tuple(kinds[(2 * a + b) % len(kinds)] for b in range(m)) for a in range(m)))


def _windowed(m: int) -> ModularMask:
    return ModularMask(_within(m).rules, window=5)


def _stepped(r: int) -> ModularMask:
    """Rules of steps and chunks, whose prefixes stand apart from what is at the row."""
    v = Visibility
    kinds = (v.UPTO, v.CHUNK | v.BEFORE, v.SEGMENT | v.BEFORE, v.PAST | v.UPTO, v.CHUNK)
    return ModularMask(tuple(tuple(kinds[(a + 2 * b) % len(kinds)] for b in range(r)) for a in range(r)), window=6)


def _clipped(r: int) -> ModularMask:
    return ModularMask(_stepped(r).rules, 11, "all")


def _diffusion(r: int) -> ModularMask:
    """Noised and clean copies, in blocks."""
    v = Visibility
    return ModularMask(((v.SEGMENT, v.BEFORE), (v.HIDDEN, v.UPTO)))


def _pseudo(length: int | float | None = None, **fixed: float) -> dict[str, Any]:
    return {"length": length, **fixed}


_ALIGNERS = [
    Case(f"key_map_{fusion}_{scope}", _within, fusion=fusion, scope=scope, longest=6)
    for fusion in ("add", "linear", "concat")
    for scope in ("sequence", "causal")
]

CASES: tuple[Case, ...] = (
    # Masks, layouts
    Case("joint_full", None, padding=("none", "none")),
    Case("joint_is_causal", None, is_causal=True),
    Case("joint_causal", padding=("left", "middle", "right")),
    Case("joint_bidirectional", _within),
    Case("joint_interleaved", _within, longest=1, modalities=3),
    Case("joint_rules", _ruled, padding=("middle", "none"), modalities=3),
    Case("joint_windowed", _windowed, padding=("middle", "none"), longest=12),
    Case("joint_window_one", lambda m: ModularMask(ModularMask.causal(m).rules, window=1)),
    Case("joint_self_only", ModularMask.self_only, modalities=3),
    Case("joint_cross_only_causal", lambda m: ModularMask.cross_only(m, causal=True)),
    Case("joint_fusion", lambda m: ModularMask.fusion(m, [0], causal=True), modalities=3),
    Case("joint_many_modalities", ModularMask.self_only, modalities=6, bias="own", padding=("middle", "none")),
    Case("joint_negative_scale", _within, scale=-0.7),
    Case("joint_negative_scale_causal", scale=-0.7, padding=("none", "left")),
    Case("joint_no_scale", scale=0.0),
    Case("joint_one_modality", modalities=1, padding=("none",)),
    Case("joint_length_one", length=1, padding=("none", "none")),
    Case("joint_length_100", _within, length=100),
    Case("joint_all_padding", padding=("all", "none"), pseudo=_pseudo()),
    Case("joint_scale", scale=0.7),
    Case("joint_value_size", _within, value_dim=2),
    Case("joint_gqa", _within, key_heads=2, group=3),
    # Capped scores
    Case("softcap", _within, softcap=0.9, group=2),
    Case("softcap_split", duplex="split", softcap=2.0, scale=-0.7, bias="own", pseudo=_pseudo(), attn_mask="float"),
    # Roles, steps, chunks, a window on everything
    Case("roles", _within, roles=2, modalities=3, padding=("middle", "none"), longest=6),
    Case("steps", _stepped, steps=True, chunks=True, padding=("left", "middle", "none"), modalities=3, longest=5),
    Case("steps_diffusion", _diffusion, roles=2, steps=True, modalities=1, longest=9, group=2),
    Case("steps_roles_split", _stepped, roles=3, steps=True, chunks=True, duplex="split", pseudo=_pseudo(), bias="own"),
    Case("steps_packed", _clipped, packed=True, roles=3, steps=True, chunks=True, queries="default", longest=6),
    Case("chunks", lambda m: ModularMask(((Visibility.CHUNK,) * m,) * m), chunks=True, pseudo=_pseudo(20)),
    Case("window_on_all", _clipped, steps=True, chunks=True, queries="tensor", longest=9, padding=("none", "middle")),
    Case("window_on_all_within", lambda m: ModularMask(_within(m).rules, 4, "all"), longest=12),
    Case("roles_key_map", _stepped, roles=2, steps=True, chunks=True, fusion="linear", scope="causal", longest=5),
    # Split
    Case("split_full", ModularMask.full, duplex="split"),
    Case("split_causal", duplex="split", padding=("left", "middle"), modalities=3),
    Case("split_weights", _within, duplex="split", weights=True, key_heads=1, group=2),
    Case("split_everything", _windowed, duplex="split", weights=True, pseudo=_pseudo(), bias="own", attn_mask="float"),
    # Pseudo-attention
    Case("pseudo_sequence", _within, pseudo=_pseudo()),
    Case("pseudo_numbers", pseudo=_pseudo(base=0.5, decay=0.25)),
    Case("pseudo_no_decay", pseudo=_pseudo(decay=0.0)),
    Case("pseudo_fixed", _within, pseudo=_pseudo(40)),
    Case("pseudo_infinite", _ruled, pseudo=_pseudo(math.inf)),
    Case("sink", _ruled, pseudo=_pseudo(math.inf, decay=64.0), padding=("left", "none")),
    Case("pseudo_split", _ruled, duplex="split", pseudo=_pseudo(), modalities=3),
    Case("pseudo_split_fixed", duplex="split", pseudo=_pseudo(30)),
    Case("pseudo_split_infinite", duplex="split", pseudo=_pseudo(math.inf)),
    # Biases
    Case("bias_own", _within, bias="own", padding=("middle", "left"), modalities=3),
    Case("bias_shared", _within, bias="shared", group=2),
    Case("attn_mask_bool", _within, attn_mask="bool"),
    Case("attn_mask_float", _within, attn_mask="float", pseudo=_pseudo()),
    Case("attn_mask_fixed", _within, attn_mask="fixed", duplex="split", group=2),
    # Key maps
    *_ALIGNERS,
    Case("key_map_frobenius", fusion="add", norm="frobenius", modalities=3, group=2),
    Case("key_map_frobenius_causal", fusion="concat", norm="frobenius", scope="causal", modalities=3, group=2),
    Case("key_map_one_aligned", fusion="linear", aligned=(1,), duplex="split"),
    Case("key_map_renorm", fusion="concat", renorm=True, modalities=3, group=2, padding=("right", "middle")),
    Case("key_map_renorm_causal", fusion="add", scope="causal", renorm=True, longest=6),
    Case("roles_source", roles=2, fusion="add", source_roles=(1,), longest=5, padding=("middle", "none")),
    Case(
        "packed_chunks_source", packed=True, roles=2, chunks=True, modalities=3, fusion="concat", scope="causal",
        source_roles=(0,), longest=4,
    ),
    Case("key_map_released", fusion="released", padding=("right", "middle")),
    # Fewer queries than keys
    Case("queries_last", _within, queries="default", padding=("left", "none"), group=2),
    Case("queries_int", _windowed, queries="int", pseudo=_pseudo()),
    Case("queries_tensor", _within, queries="tensor", duplex="split", padding=("middle", "none")),
    Case("queries_mapped", _within, queries="default", fusion="concat", scope="causal", bias="own"),
    # Packed documents
    Case("packed_causal", packed=True),
    Case("packed_bidirectional", _within, packed=True, padding=("middle", "right"), longest=6, group=2),
    Case("packed_split", _ruled, packed=True, duplex="split", weights=True, pseudo=_pseudo(), modalities=3),
    Case("packed_queries", _within, packed=True, queries="default", pseudo=_pseudo(math.inf), bias="own"),
    Case("packed_key_map", _within, packed=True, fusion="add", pseudo=_pseudo(20), longest=6),
    Case("packed_key_map_causal", packed=True, fusion="linear", scope="causal", bias="shared", longest=6),
    Case("packed_released", packed=True, fusion="released", value_dim=1),
    # All of it
    Case(
        "everything", _windowed, modalities=3, group=2, fusion="concat", scope="causal", bias="own", attn_mask="bool",
        pseudo=_pseudo(), queries="tensor", duplex="split", weights=True, scale=0.3, value_dim=0.5,
        padding=("left", "middle", "all"), longest=5,
    ),
)  # fmt: skip
