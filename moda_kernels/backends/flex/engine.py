"""FlexAttention as it is called: compiled once for all layouts and lengths, or, for tests, uncompiled.

What differs from call to call is tensors, what code depends on is a `Form`. Each form has compiled code of its own (a
code object of its own, so that torch's limit of recompilations never throws one form out for another), made for any
batch size and length; only sizes of 1 are others.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import math
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor

from moda_kernels.runtime.operators import operator
from moda_kernels.tokens.blocks import BlockLists, Readings, block_mask

#: Rooms of tables on the CPU (see `_roomy`): the smallest of a batch and of tokens, and by how much the next is larger.
ROOM_BATCH, ROOM_TOKENS, ROOM_STEP = 4, 65536, 4
#: Rows of queries at once where lse is made apart.
LSE_ROWS = 256


class Bias(NamedTuple):
    """What is added by modalities.

    Attributes:
        table: ``[N, Hq, M, M]``. (One for each, so that gradients are not all summed into few numbers.)
        row_sequence, row_modality, key_modality: int32 ``[B, Lq or Lk]``, none negative.
    """

    table: Tensor
    row_sequence: Tensor
    row_modality: Tensor
    key_modality: Tensor


class Terms(NamedTuple):
    """All that FlexAttention reads beside query, key and value; a batch of one where packed.

    Attributes:
        read, lists: who sees whom, of one softmax.
        bias: or None.
        attn_mask: ``[B, Hq, Lq, Lk]`` without the axes of size 1; or None.
    """

    read: Readings
    lists: BlockLists
    bias: Bias | None
    attn_mask: Tensor | None

    def rows(self, cut: slice, form: "Form") -> "Terms":
        """Of some query rows alone, without the lists, which uncompiled code doesn't read."""
        low, high = (tuple(x[..., cut] for x in of) for of in self.read[:2])
        bias, mask = self.bias, self.attn_mask
        if bias is not None:
            bias = bias._replace(row_sequence=bias.row_sequence[:, cut], row_modality=bias.row_modality[:, cut])
        if mask is not None and form.mask_axes[2]:
            mask = mask[(slice(None),) * sum(form.mask_axes[:2]) + (cut,)]
        return Terms(self.read._replace(low=low, high=high), self.lists, bias, mask)


@dataclass(frozen=True)
class Form:
    """What code depends on, beside the kinds of the tensors.

    Attributes:
        mask_axes: which of B, Hq, Lq, Lk `Terms.attn_mask` has, at least one; () where there is none.
        scale: > 0.
        softcap: in text (or None): a float that a score_mod closes over is an input to compilers, which none may have.
        block_size: of the block mask. options: of the kernels, sorted.
        lse: whether the engine is asked for it.
    """

    mask_axes: tuple[bool, ...]
    scale: float
    softcap: str | None
    block_size: tuple[int, int]
    options: tuple[tuple[str, Any], ...]
    lse: bool


#: Set by `uncompiled`.
_uncompiled = False


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Within the block FlexAttention runs uncompiled, in L×L memory: any float dtype, gradients on the CPU too."""
    global _uncompiled
    before, _uncompiled = _uncompiled, True
    try:
        yield
    finally:
        _uncompiled = before


def is_uncompiled() -> bool:
    return _uncompiled


def run(query: Tensor, key: Tensor, value: Tensor, terms: Terms, form: Form) -> tuple[Tensor, Tensor | None]:
    """One softmax: output ``[B, Hq, Lq, E]`` and lse ``[B, Hq, Lq]`` (None where it was not asked for).

    Args:
        query, key, value: finite in padding, too: the engine multiplies what it hides by 0, and NaN by 0 is NaN.
    """
    compiling = torch.compiler.is_compiling()
    if _uncompiled and not compiling:
        return _direct(query, key, value, terms, form)
    if query.device.type != "cpu":
        return (_called if compiling else _run_compiled)(query, key, value, terms, form)
    # The engine has no lse on the CPU: it is made apart, some rows at a time.
    out, _ = (_called_alone if compiling else _run_compiled)(
        query, key, value, _roomy(terms), dataclasses.replace(form, lse=False)
    )
    if not form.lse:
        return out, None
    cuts = [slice(i, i + LSE_ROWS) for i in range(0, query.shape[2], LSE_ROWS)]
    return out, torch.cat(
        [_direct(query[:, :, cut], key, value[..., :1], terms.rows(cut, form), form)[1] for cut in cuts], -1
    )


def _called_alone(query: Tensor, key: Tensor, value: Tensor, terms: Terms, form: Form) -> tuple[Tensor, None]:
    """In a caller's graph on the CPU, where the engine's C++ template can't have what makes its tables, nor what
    becomes of its output, as parts of its kernel: both go through an operator that a compiler doesn't look into."""
    leaves, structure = pytree.tree_flatten(terms)
    settled = iter(_op_settle([x for x in leaves if x is not None]))
    leaves = [x if x is None else next(settled) for x in leaves]
    out, _ = _called(query, key, value, pytree.tree_unflatten(leaves, structure), form)
    return _op_settle([out])[0], None


_op_settle = operator(
    "_settle(Tensor[] tables) -> Tensor[]",
    lambda tables: [x.clone(memory_format=torch.contiguous_format) for x in tables],
    lambda tables: [x.new_empty(x.shape) for x in tables],
)


def _called(query: Tensor, key: Tensor, value: Tensor, terms: Terms, form: Form) -> tuple[Tensor, Tensor | None]:
    """FlexAttention's public function, for compilers."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    lengths = query.shape[2], key.shape[2]
    mod, tables = _score_mod(terms, form)
    score_mod = None
    if tables or form.softcap is not None:

        def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return mod(score, b, h, q, k, *tables)

    result: Any = flex_attention(
        query, key, value,
        score_mod=score_mod,
        block_mask=block_mask(terms.read, terms.lists, lengths, form.block_size),
        scale=form.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=dict(form.options) or None,  # type: ignore[arg-type]
        return_aux=AuxRequest(lse=True) if form.lse else None,  # type: ignore[arg-type]
    )  # fmt: skip
    return (result[0], result[1].lse) if form.lse else (result, None)


def _score_mod(terms: Terms, form: Form) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """From a score and its place to the score that takes part; and the tables that it takes as arguments, since these
    alone have gradients."""
    bias, cap = terms.bias, None if form.softcap is None else float(form.softcap)

    def mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, *tables: Tensor) -> Tensor:
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        if bias is not None:
            modalities = bias.row_modality[b, q], bias.key_modality[b, k]
            score = score + tables[0][(bias.row_sequence[b, q], h, *modalities)]
        if form.mask_axes:
            added = tables[-1][tuple(x for x, own in zip((b, h, q, k), form.mask_axes, strict=True) if own)]
            score = torch.where(added, score, -math.inf) if added.dtype == torch.bool else score + added
        return score

    tables = (None if bias is None else bias.table, terms.attn_mask)
    return mod, tuple(x for x in tables if x is not None)


# Uncompiled


def _direct(query: Tensor, key: Tensor, value: Tensor, terms: Terms, form: Form) -> tuple[Tensor, Tensor]:
    """The operator under FlexAttention, called as it is: its public function compiles, and refuses gradients on the CPU
    before any arithmetic."""
    from torch._higher_order_ops.flex_attention import flex_attention

    lengths = query.shape[2], key.shape[2]
    mod, tables = _score_mod(terms, form)
    mask = block_mask(terms.read, terms.lists, lengths, form.block_size).as_tuple()
    options = {"OUTPUT_LOGSUMEXP": True, "OUTPUT_MAX": False}
    out, lse, *_ = flex_attention(query, key, value, mod, mask, form.scale, options, tables, ())
    return out, lse * math.log(2)


def why_not_uncompiled() -> str | None:
    """Why this torch's operator can't be called as `_direct` does; None if it can."""
    expected = [
        "query", "key", "value", "score_mod", "block_mask", "scale", "kernel_options", "score_mod_other_buffers",
        "mask_mod_other_buffers",
    ]  # fmt: skip
    try:
        from torch._higher_order_ops.flex_attention import FlexAttentionHOP
    except ImportError:
        found = None
    else:
        found = [name for name in inspect.signature(FlexAttentionHOP.__call__).parameters if name != "self"]
    if found == expected:
        return None
    return f"FlexAttention uncompiled: torch {torch.__version__} has another operator than 2.11 to 2.14"


# Compiled


def _run_compiled(query: Tensor, key: Tensor, value: Tensor, terms: Terms, form: Form) -> tuple[Tensor, Tensor | None]:
    if ("BACKEND", "FLASH") not in form.options:  # it wants them as they are
        terms = terms._replace(lists=BlockLists(*map(_two_at_least, terms.lists)))
    query, key, value, terms = pytree.tree_map(lambda x: x if x is None else _own(x), (query, key, value, terms))
    for x in (query, key, value):
        _sized(x, (0, 2), (1, 3))
    for x in terms.lists:
        _sized(x, range(x.dim()), ())
    tables = [x for x in pytree.tree_leaves((terms.read, terms.bias, terms.attn_mask)) if x is not None]
    on_cpu = query.device.type == "cpu"  # where tables have sizes that do not vary
    for x in tables:
        _sized(x, () if on_cpu else range(x.dim()), tuple(range(x.dim())) if on_cpu else ())
    given, structure = pytree.tree_flatten((query, key, value, terms))
    kinds = tuple(None if x is None else (x.dtype, x.requires_grad, *(n == 1 for n in x.shape)) for x in given)
    heads = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
    shapes = tuple(x.shape for x in tables) if on_cpu else ()
    return _compiled((form, query.device, kinds, heads, shapes, torch.is_grad_enabled(), structure))(given)


@functools.cache
def _compiled(kind: tuple[Any, ...]) -> Callable[[list[Tensor | None]], tuple[Tensor, Tensor | None]]:
    form: Form = kind[0]
    structure: pytree.TreeSpec = kind[-1]

    def body(tensors: list[Any]) -> tuple[Tensor, Tensor | None]:
        query, key, value, terms = pytree.tree_unflatten(tensors, structure)
        _same_sizes(query, key, value, terms)
        return _called(query, key, value, terms, form)

    own: Any = types.FunctionType(body.__code__.replace(), body.__globals__, body.__name__, None, body.__closure__)
    compiled: Callable[[list[Tensor | None]], tuple[Tensor, Tensor | None]]
    compiled = torch.compile(own, fullgraph=True, dynamic=True)
    return compiled


def _roomy(terms: Terms) -> Terms:
    """Terms with what the engine looks up by row and key in larger tables, of few sizes, which compilers know.

    FlexAttention's C++ template gives names of its own to sizes, and they may be those that a table's sizes have (seen:
    a table of biases, read with another's strides, without a word; "ks1", found in "ks13", that doesn't compile).
    """

    def roomy(x: Tensor) -> Tensor:
        more = []
        for size, least in ((x.shape[-1], ROOM_TOKENS), (x.shape[-2], ROOM_BATCH)):
            room = least
            while room < size:
                room *= ROOM_STEP
            more += [0, room - size]
        return F.pad(x, more)

    read, bias = terms.read, terms.bias
    low, high, place = (tuple(map(roomy, of)) for of in read[:3])
    read = Readings(low, high, place, None if read.of_pass is None else roomy(read.of_pass))
    if bias is not None:
        sequences, room = bias.table.shape[0], ROOM_BATCH
        while room < sequences:
            room *= ROOM_STEP
        table = F.pad(bias.table, (0, 0) * 3 + (0, room - sequences))
        bias = Bias(table, *(roomy(x) for x in bias[1:]))
    return terms._replace(read=read, bias=bias)


def _same_sizes(query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> None:
    """Tell the compiler which sizes are one: fewer names, fewer guards."""
    batch, of_q, of_k = query.shape[0], query.shape[2], key.shape[2]
    for x in (key, value):
        torch._check(x.shape[0] == batch)
        torch._check(x.shape[2] == of_k)
    if query.device.type == "cpu":
        return
    rows, keys = (*terms.read.low, *terms.read.high), terms.read.place
    if terms.read.of_pass is not None:
        keys = (*keys, terms.read.of_pass)
    if terms.bias is not None:
        rows = (*rows, terms.bias.row_sequence, terms.bias.row_modality)
        keys = (*keys, terms.bias.key_modality)
    for of, length in ((rows, of_q), (keys, of_k)):
        for x in of:
            torch._check(x.shape[-2] == batch)
            torch._check(x.shape[-1] == length)


def _own(x: Tensor) -> Tensor:
    """A tensor of one's own that is no view: what a compiler is told of a tensor stays on it, and it tells views apart
    by what they are views of."""
    return (x.clone() if x.is_leaf else x) if x.requires_grad else x.detach()


def _two_at_least(x: Tensor) -> Tensor:
    """A list of at least two tiles either way: compilers make other code for a size of 1."""
    more = [n for size in reversed(x.shape[2:]) for n in (0, max(2 - size, 0))]
    return F.pad(x, more) if any(more) else x


def _sized(x: Tensor, varying: Iterable[int], fixed: tuple[int, ...]) -> None:
    """Tell the compiler which sizes vary (each for itself, whichever happen to be equal), and which don't."""
    for axis in varying:
        if x.shape[axis] > 1:
            torch._dynamo.maybe_mark_dynamic(x, axis)
    for axis in fixed:
        torch._dynamo.mark_static(x, axis)


# What there is


@functools.cache
@torch.compiler.assume_constant_result
def why_absent() -> tuple[str, ...]:
    """Every reason why compiled FlexAttention can't run in this process."""
    try:
        from torch._dynamo import eval_frame
        from torch.nn.attention.flex_attention import AuxRequest  # noqa: F401
    except ImportError as error:
        return (f"torch {torch.__version__} has no FlexAttention that gives lse ({error})",)
    if not eval_frame.is_dynamo_supported():
        return ("torch.compile does not run in this process",)
    return ()


@functools.cache
@torch.compiler.assume_constant_result
def compiles_on_cpu() -> bool:
    """Whether FlexAttention's C++ template serves this CPU."""
    return bool(torch.cpu._is_avx2_supported()) and sys.platform == "linux" and not torch.xpu.is_available()


@torch.compiler.assume_constant_result
def why_not_flash(device: torch.device) -> list[str]:
    """Every reason why FlexAttention's FLASH engine can't run on a device."""
    reasons = []
    try:
        found = importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:
        found = False
    if not found:
        reasons.append("BACKEND='FLASH' of FlexAttention needs flash-attn-4: pip install flash-attn-4")
    if device.type != "cuda" or torch.version.hip is not None:
        reasons.append("BACKEND='FLASH' of FlexAttention runs on CUDA")
    return reasons
