"""Whether a contestant is right, asked before it is timed.

The oracle is dense attention in float64 on the same, already rounded, inputs: the reference backend for all rows of
short sequences, dense SDPA for a sample of rows (segment boundaries, and rows anywhere) of long ones, so that memory
stays small. Gradients of a long case are checked twice: at full size under an upstream gradient that is zero outside
the sampled rows, which makes every gradient depend on those rows alone, and whole on a short sequence of the same
layout and dtype. A contestant may be off by twice as much as dense SDPA in the case's dtype, plus two units in the
last place of the largest number (`moda_kernels.testing.compare`). Keys are aligned here from the definition, by one
small matrix after the other.
"""

import dataclasses
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moda_kernels import ModalityLayout, moda_attention
from moda_kernels.commands.bench.cases import Case
from moda_kernels.commands.bench.peers import Contestant, Peer
from moda_kernels.commands.bench.peers.sdpa import pinned
from moda_kernels.products.twin import compute_dtype
from moda_kernels.testing import Comparison, Result, compare, head_orders, reordered

#: Up to this length every row is checked, and gradients whole.
ALL_ROWS = 1024
#: Beyond it: about so many rows at segment boundaries, and as many anywhere.
SAMPLED_ROWS = 48


@dataclass(frozen=True)
class Verdict:
    """What the oracle says: good or not, the comparisons, and how many query rows they cover."""

    comparisons: tuple[Comparison, ...]
    rows: int
    all_finite: bool

    @property
    def good(self) -> bool:
        return self.all_finite and all(c.good for c in self.comparisons)

    @property
    def reason(self) -> str:
        """What is wrong."""
        wrong = [str(c) for c in self.comparisons if not c.good]
        return "; ".join(wrong if self.all_finite else ["infinities or NaN in the results", *wrong])


def verify(contestant: Contestant, results: tuple[Tensor, ...]) -> Verdict:
    """The verdict on what a contestant's call gave."""
    case = contestant.case
    judge = _judge(case)
    if not judge.sampled or not case.backward:
        return judge.verdict(contestant, results)
    # The call as it is timed has to be finite; the one under the sampled gradient has to be right.
    finite = all(bool(torch.isfinite(t).all()) for t in results)
    verdict = judge.verdict(contestant, contestant.call(rows=judge.rows))
    comparisons, finite = verdict.comparisons, finite and verdict.all_finite
    if not contestant.peer.compiles:  # which would take longer than all timing
        short = _verdict_on(contestant.peer, dataclasses.replace(case, length=ALL_ROWS))
        twins = (dataclasses.replace(c, name=f"{c.name} ({ALL_ROWS} tokens)") for c in short.comparisons)
        comparisons, finite = (*comparisons, *twins), finite and short.all_finite
    return Verdict(comparisons, verdict.rows, finite)


@functools.lru_cache(maxsize=64)
def _verdict_on(peer: Peer, case: Case) -> Verdict:
    contestant = Contestant(peer, case)
    contestant.setup()
    return _judge(case).verdict(contestant, contestant.call())


@functools.lru_cache(maxsize=2)
def _judge(case: Case) -> "Judge":
    """Kept for all contestants of a case and of its short twin."""
    return Judge(case)


class Judge:
    """Knows the right answers of one case.

    Attributes:
        rows: the query rows that are compared. sampled: they are not all.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.rows = _rows_to_check(case).to(case.device)
        self.sampled = len(self.rows) < case.queries
        self._tensors = case.tensors()
        self._answers: dict[str | None, tuple[Result, list[Result]]] = {}

    def verdict(self, contestant: Contestant, results: tuple[Tensor, ...]) -> Verdict:
        """The verdict on what `contestant.call` gave, where rows are sampled under a gradient for these rows only."""
        found = contestant.named(results)
        finite = all(bool(torch.isfinite(t).all()) for t in found.values())
        exact, eager = self._answer(contestant.peer.alignment)
        found = {name: self._picked(t) if name in ("out", "d query") else t for name, t in found.items()}
        return Verdict(tuple(compare(Result(found), exact, eager, self.case.dtype)), len(self.rows), finite)

    def _picked(self, t: Tensor) -> Tensor:
        """These rows of something per query."""
        return t[:, :, self.rows] if self.sampled else t

    def _answer(self, alignment: str | None) -> tuple[Result, list[Result]]:
        """Exact (float64) and eager (in the case's dtype) results of these rows, made once; eager ones of aligned keys
        in several orders of the sums, for the reason that `testing.eager` gives."""
        if alignment not in self._answers:
            orders = [None] if alignment is None else [None, *head_orders(self._tensors["key"].shape[-1])]
            self._answers[alignment] = (
                self._dense(torch.float64, alignment),
                [self._dense(self.case.dtype, alignment, order) for order in orders],
            )
        return self._answers[alignment]

    def _dense(self, dtype: torch.dtype, alignment: str | None, order: Tensor | None = None) -> Result:
        """The answer, summed with the head dimension in another order."""
        case, layout = self.case, self.case.workload.layout
        names = ("query", "key", "value") + (() if alignment is None else ("weight",))
        narrow = self._tensors | {"query": self._picked(self._tensors["query"])}
        if order is not None:
            narrow = {name: reordered(name, t, order.to(t.device)) for name, t in narrow.items()}
        tensors = {name: narrow[name].to(dtype if name != "weight" else _wide(dtype)) for name in names}
        for t in tensors.values():
            t.requires_grad_(case.backward)
        q, k, v = (tensors[name] for name in names[:3])
        with torch.set_grad_enabled(case.backward):
            if alignment is not None:
                k = align(k, tensors["weight"], layout, alignment)
            if dtype == torch.float64 and not self.sampled and case.mode != "decode":
                out = self._reference(q, k, v)
            else:
                rows = self.rows if case.mode != "decode" else torch.tensor([case.length - 1], device=case.device)
                seen = _visible_rows(case, rows)
                # On CUDA torch's choice depends on the version; on the CPU there is only one that is quick.
                with pinned("math" if case.device == "cuda" else None):
                    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1])
        named = {"out": out.detach()}
        if case.backward:
            dout = self._picked(self._tensors["dout"]).to(dtype)
            grads = torch.autograd.grad(out, tuple(tensors.values()), dout, materialize_grads=True)
            back = None if order is None else torch.argsort(order)
            for name, grad in zip(names, grads, strict=True):
                named[f"d {name}"] = grad if back is None else reordered(name, grad, back.to(grad.device))
        return Result(named)

    def _reference(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        workload = self.case.workload
        if workload.packed:
            q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
        gqa = self.case.query_heads != self.case.key_heads
        out = moda_attention(q, k, v, enable_gqa=gqa, layout=workload.layout, mask=workload.mask, backend="reference")
        assert isinstance(out, Tensor)
        return out.transpose(0, 1)[None] if workload.packed else out


def align(key: Tensor, weight: Tensor, layout: ModalityLayout, scope: str) -> Tensor:
    """Keys ``[1, H, L, D]`` aligned by concatenation (spec: "Duplex alignment"), in the key's dtype.

    Args:
        weight: ``[M, D, 2D]``.
        scope: "sequence" or "causal".
    """
    wide = key.to(compute_dtype(key))
    m, dim = layout.num_modalities, key.shape[-1]
    nothing = wide.new_zeros(key.shape[1], dim, dim)
    segments = layout.segments().tolist()
    grams: dict[int, list[Tensor]] = {}  # per sequence and modality, so far
    whole: dict[int, list[Tensor]] = {}
    pieces = []

    def add(sums: dict[int, list[Tensor]], sequence: int, modality: int, tokens: Tensor) -> None:
        row = sums.setdefault(sequence, [nothing] * m)
        row[modality] = row[modality] + tokens.transpose(-1, -2) @ tokens

    for sequence, start, length, modality in segments:
        add(whole, sequence, modality, wide[0, :, start : start + length])
    for sequence, start, length, modality in segments:
        tokens = wide[0, :, start : start + length]
        sums = whole if scope == "sequence" else grams
        others = [gram for b, gram in enumerate(sums.get(sequence, [nothing] * m)) if b != modality]
        rest = torch.stack(others).sum(0)
        if bool((rest == 0).all()):  # no token of another modality: the keys stay
            pieces.append(tokens)
        else:
            mapped = tokens @ (rest / rest.norm(dim=-1, keepdim=True))
            pieces.append(torch.cat((tokens, mapped), -1) @ weight[modality].T)
        add(grams, sequence, modality, tokens)
    return torch.cat(pieces, 1)[None].to(key.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of parameters and sums beside tensors of this one."""
    return compute_dtype(torch.empty((), dtype=dtype))


def _rows_to_check(case: Case) -> Tensor:
    """Columns of the query rows that are compared (decoding: row 0, the only one)."""
    if case.queries <= ALL_ROWS:
        return torch.arange(case.queries)
    g = torch.Generator().manual_seed(case.seed + 2)
    segments = case.workload.layout.segments()
    ends = torch.cat((segments[:, 1], segments[:, 1] + segments[:, 2] - 1)).long()
    ends = ends[torch.randperm(len(ends), generator=g)[:SAMPLED_ROWS]]
    anywhere = torch.randint(case.length, (SAMPLED_ROWS,), generator=g)
    # Twice the same row would count its gradient twice.
    found: Tensor = torch.cat((ends, anywhere)).unique()
    return found


def _visible_rows(case: Case, rows: Tensor) -> Tensor:
    """The mask of these rows, bool ``[rows, L]``."""
    layout = case.workload.layout
    queries = layout.queries()
    column = queries.columns.flatten()[rows]
    picked = dataclasses.replace(queries, shape=(len(rows),), columns=column)
    if layout.packed:
        return case.workload.mask.visible_to(layout, picked)
    picked = dataclasses.replace(picked, shape=(1, len(rows)), columns=column[None])
    return case.workload.mask.visible_to(layout, picked)[0]
