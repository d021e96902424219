"""Whether a contestant is right, asked before it is timed.

The oracle is dense attention in float64 on the same, already rounded, inputs: the reference backend for all rows of
short sequences, and for a sample of rows of long ones, so that memory stays small. A contestant may be off by twice as
much as dense SDPA in the case's dtype, plus two units in the last place of the largest number
(`moda_kernels.testing.compare`). Keys are aligned here from the definition, by one small matrix after the other.
"""

import dataclasses
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.peers import Contestant, Peer
from moda_kernels import ModalityLayout, moda_attention
from moda_kernels.testing import Comparison, Result, compare

#: Up to this length every row is checked.
ALL_ROWS = 2048
#: Beyond it: about so many rows at segment boundaries, and as many anywhere.
SAMPLED_ROWS = 48
#: Gradients are checked on sequences of at most this length.
GRADIENT_LENGTH = 1024


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
    """The verdict on what a contestant's call gave. Gradients of a long case are checked on a shorter one of the same
    layout and dtype."""
    case = contestant.case
    verdict = _judge(case).verdict(contestant, results)
    if case.backward and case.length > GRADIENT_LENGTH:
        short = _verdict_on(contestant.peer, dataclasses.replace(case, length=GRADIENT_LENGTH))
        gradients = tuple(c for c in short.comparisons if c.name != "out")
        verdict = Verdict(verdict.comparisons + gradients, verdict.rows, verdict.all_finite and short.all_finite)
    return verdict


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
        rows: the query rows that are compared.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.rows = _rows_to_check(case)
        self._gradients = case.backward and case.length <= GRADIENT_LENGTH
        self._tensors = case.tensors()
        self._answers: dict[str | None, tuple[Result, Result]] = {}

    def verdict(self, contestant: Contestant, results: tuple[Tensor, ...]) -> Verdict:
        """The verdict on what `contestant.call` gave."""
        found = contestant.named(results)
        finite = all(bool(torch.isfinite(t).all()) for t in found.values())
        exact, eager = self._answer(contestant.peer.alignment)
        found["out"] = found["out"][:, :, self.rows]
        return Verdict(tuple(compare(Result(found), exact, eager, self.case.dtype)), len(self.rows), finite)

    def _answer(self, alignment: str | None) -> tuple[Result, Result]:
        """Exact (float64) and eager (in the case's dtype) results of these rows, made once."""
        if alignment not in self._answers:
            self._answers[alignment] = (
                self._dense(torch.float64, alignment),
                self._dense(self.case.dtype, alignment),
            )
        return self._answers[alignment]

    def _dense(self, dtype: torch.dtype, alignment: str | None) -> Result:
        case, layout = self.case, self.case.workload.layout
        names = ("query", "key", "value") + (() if alignment is None else ("weight",))
        tensors = {name: self._tensors[name].to(dtype if name != "weight" else _wide(dtype)) for name in names}
        for t in tensors.values():
            t.requires_grad_(self._gradients)
        q, k, v = (tensors[name] for name in names[:3])
        with torch.set_grad_enabled(self._gradients):
            if alignment is not None:
                k = align(k, tensors["weight"], layout, alignment)
            if dtype == torch.float64 and len(self.rows) == case.length:
                out = self._reference(q, k, v)
            else:
                seen = _visible_rows(case, self.rows)
                out = F.scaled_dot_product_attention(q[:, :, self.rows], k, v, attn_mask=seen, enable_gqa=True)
        named = {"out": out.detach()}
        if self._gradients:
            grads = torch.autograd.grad(
                out, tuple(tensors.values()), self._tensors["dout"].to(dtype), materialize_grads=True
            )
            named |= {f"d {name}": grad for name, grad in zip(names, grads, strict=True)}
        return Result(named)

    def _reference(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        workload = self.case.workload
        if workload.packed:
            q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
        out = moda_attention(q, k, v, enable_gqa=True, layout=workload.layout, mask=workload.mask, backend="reference")
        assert isinstance(out, Tensor)
        return out.transpose(0, 1)[None] if workload.packed else out


def align(key: Tensor, weight: Tensor, layout: ModalityLayout, scope: str) -> Tensor:
    """Keys ``[1, H, L, D]`` aligned by concatenation (spec: "Duplex alignment"), in the key's dtype.

    Args:
        weight: ``[M, D, 2D]``.
        scope: "sequence" or "causal".
    """
    wide = key.to(_wide(key.dtype))
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
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows_to_check(case: Case) -> Tensor:
    if case.length <= ALL_ROWS:
        return torch.arange(case.length)
    g = torch.Generator().manual_seed(case.seed + 2)
    segments = case.workload.layout.segments()
    ends = torch.cat((segments[:, 1], segments[:, 1] + segments[:, 2] - 1)).long()
    ends = ends[torch.randperm(len(ends), generator=g)[:SAMPLED_ROWS]]
    anywhere = torch.randint(case.length, (SAMPLED_ROWS,), generator=g)
    return torch.cat((ends, anywhere)).sort().values


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
