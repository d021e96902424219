"""Duplex alignment of shards: Gram sums over all ranks, without any key leaving its own.

Sequence scope: each rank sums over its keys, and for sequences that lie on several ranks these sums are added up.
Causal scope: what a run of columns must know of the earlier ones is, for the sequence (and the chunk) in which it
begins, one sum per modality over each earlier run that ends in it; those are all-gathered, and within its run each rank
goes on as if it decoded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moda_kernels import products
from moda_kernels.alignment.aligner import DuplexAligner
from moda_kernels.alignment.maps import KeyMap
from moda_kernels.alignment.pieces import After, counting, counting_groups, mapped_modalities, mapped_tokens, pieces_of
from moda_kernels.distributed.plan import Plan, Run, Runs
from moda_kernels.distributed.shards import Part, part_of
from moda_kernels.products.twin import compute_dtype
from moda_kernels.runtime import collectives
from moda_kernels.runtime.collectives import Group
from moda_kernels.tokens.layout import ModalityLayout


@dataclass(frozen=True, eq=False)
class ShardMap(KeyMap):
    """The map of one rank's keys, made from the keys of all.

    Attributes:
        parts: columns (first, last + 1 of the rank's) and the map of each part, in order.
        layout: of the rank's keys. runs: the columns of all ranks.
        used: what a rank without such keys uses no less: the aligner's parameters, and what came from the others.
    """

    parts: list[tuple[int, int, KeyMap]]
    layout: ModalityLayout
    heads: int
    dim: int
    used: tuple[Tensor, ...]
    runs: tuple[Runs, ...]

    @property
    def num_heads(self) -> int:
        return self.heads

    @property
    def head_dim(self) -> int:
        return self.dim

    def align(self, key: Tensor, layout: ModalityLayout) -> Tensor:
        axis = key.dim() - 3
        aligned = [each.align(key.narrow(axis, start, stop - start), each.layout) for start, stop, each in self.parts]
        whole = key if not aligned else aligned[0] if len(aligned) == 1 else torch.cat(aligned, axis)
        return collectives.attached(whole, *self.used)


def sequence_map(aligner: DuplexAligner, tokens: Tensor, local: Part, plan: Plan, group: Group) -> ShardMap:
    """Args: tokens: this rank's keys ``[B, n, Hkv, D]``, packed ``[n, Hkv, D]``. local: their layout."""
    layout, sources = local.layout, aligner.source_roles
    grouping = counting_groups(layout, sources)
    gram = products.segment_gram(tokens, tokens, grouping).unflatten(0, tuple(layout.counts.shape))
    first, last = local.sequences
    split = _split_sequences(plan)
    used = []
    here = [n for n in split if first <= n < last]
    if len(here) == last - first == len(split):
        gram = collectives.sum_over_ranks(gram, group)
    elif split:
        places = torch.tensor(here, dtype=torch.long, device=gram.device)
        slots = torch.tensor([split.index(n) for n in here], dtype=torch.long, device=gram.device)
        sums = gram.new_zeros(len(split), *gram.shape[1:]).index_copy(0, slots, gram[places - first])
        sums = collectives.sum_over_ranks(sums, group)
        used.append(sums)
        gram = gram.index_copy(0, places - first, sums[slots])
    found = aligner.sequence_map(gram, layout, _mapped(aligner, plan, local))
    return _shard_map(aligner, tokens, layout, plan, [(0, tokens.shape[-3], found)], *used)


def _mapped(aligner: DuplexAligner, plan: Plan, local: Part) -> Tensor:
    """bool ``[N, M]`` of the local sequences: whose keys are mapped, which the whole sequence decides."""
    mapped = mapped_modalities(plan.layout, aligner.aligned, aligner.source_roles)
    return mapped[slice(*local.sequences)].to(local.layout.device)


def _split_sequences(plan: Plan) -> list[int]:
    """The sequences that lie on several ranks, in order."""

    def make() -> list[int]:
        whole = plan.layout
        if not whole.packed:
            several = sum(map(bool, plan.runs)) > 1
            return list(range(whole.num_sequences)) if several else []
        ranks: dict[int, set[int]] = {}
        for rank, runs in enumerate(plan.runs):
            for run in runs:
                for n in whole.sequence[slice(*run)].unique().tolist():
                    ranks.setdefault(n, set()).add(rank)
        return sorted(n for n, found in ranks.items() if len(found) > 1)

    return plan.layout.remember(("split sequences", plan.runs), make)


@dataclass(frozen=True, eq=False)
class Stretch:
    """Columns of one run that are mapped by themselves: those of the document in which the run begins, or the rest.

    Attributes:
        rows: the first and last + 1 of the rank's rows. run: which of all runs, in the order of columns.
        part: their layout. goes_on: whether sums over earlier runs belong to it.
    """

    rows: tuple[int, int]
    run: int
    part: Part
    goes_on: bool


@dataclass(frozen=True, eq=False)
class Chain:
    """What the causal scope has to know of all runs, in the order of columns.

    Attributes:
        plan: theirs.
        runs: each run and its rank.
        slots: of each run its place among what the ranks gather, `per_rank` from each.
        sums: S and C of the sums that are handed on: of a batch S are its rows, of packed documents the one in which a
            run ends or begins; C are the modalities of tokens in no chunk and, where there are chunks, those of the
            chunk in progress.
        before: by the number of a run of this rank that goes on with what others have begun, the slots of those, and
            bool ``[those, S, C, 1, 1, 1]``, which of their sums belong before it.
        anything: whether there is any such run on any rank.
        stretches: of this rank. rows: of this rank, of each of its runs (by its number).
    """

    plan: Plan
    runs: list[tuple[Run, int]]
    slots: list[int]
    per_rank: int
    sums: tuple[int, int]
    before: dict[int, tuple[list[int], Tensor]]
    anything: bool
    stretches: list[Stretch]
    rows: dict[int, tuple[int, int]]

    def groups(self, number: int, sources: tuple[int, ...] | None, device: torch.device) -> products.Grouping:
        """The tokens of a run by the sums that it hands on (s·C + c)."""
        whole = self.plan.layout
        run, _ = self.runs[number]

        def make() -> products.Grouping:
            columns = slice(*run)
            facts = (whole.modality, whole.chunk, counting(whole, sources).view(whole.modality.shape), whole.sequence)
            modality, chunk, counts, sequence = (fact[..., columns].view(-1, run[1] - run[0]) for fact in facts)
            slot = modality.long().clamp(min=0)
            if whole.own_chunks:
                in_progress = chunk == _chunk_at(whole, run, last=True)[:, None]
                counts = counts & ((chunk < 0) | in_progress)
                slot = slot + torch.where(chunk >= 0, whole.num_modalities, 0)
            if whole.packed:
                counts = counts & (sequence == sequence[:, -1:])
            total, each = self.sums
            group = torch.where(counts & (modality >= 0), torch.arange(total)[:, None] * each + slot, -1)
            return products.group_tokens(group.flatten().to(device), total * each)

        return whole.remember(("handed on", run, sources, device), make)


def chain_of(plan: Plan, rank: int, device: torch.device) -> Chain:
    """Args: rank: whose stretches. device: of their layouts."""
    whole = plan.layout
    runs = sorted((run, r) for r, mine in enumerate(plan.runs) for run in mine)
    per_rank = max(map(len, plan.runs))
    slots = [r * per_rank + plan.runs[r].index(run) for run, r in runs]
    m, sequences = whole.num_modalities, 1 if whole.packed else whole.num_sequences
    names = torch.zeros(len(runs), len(runs), sequences, m * (2 if whole.own_chunks else 1), dtype=torch.bool)
    ends = [_chunk_at(whole, run, last=True) for run, _ in runs]
    for i, (run, _) in enumerate(runs):
        begins = _chunk_at(whole, run, last=False)
        for j, ((_, end), _) in enumerate(runs[:i]):
            if whole.packed and whole.sequence[end - 1] != whole.sequence[run[0]]:
                continue
            names[i, j, :, :m] = True
            if whole.own_chunks:
                names[i, j, :, m:] = ((ends[j] == begins) & (begins >= 0))[:, None]
    stretches: list[Stretch] = []
    rows: dict[int, tuple[int, int]] = {}
    at = 0
    for number, ((start, stop), owner) in enumerate(runs):
        if owner != rank:
            continue
        rows[number] = at, at + stop - start
        goes_on = bool(names[number].any())
        cut = stop
        if whole.packed and goes_on:
            cut = min(stop, int(whole.cu_seqlens[int(whole.sequence[start]) + 1]))
        for first, last, carries in ((start, cut, goes_on), (cut, stop, False)):
            if first < last:
                part = part_of(whole, torch.arange(first, last), device)
                stretches.append(Stretch((at, at + last - first), number, part, carries))
                at += last - first
    before: dict[int, tuple[list[int], Tensor]] = {}
    for number in rows:
        known = [j for j in range(number) if bool(names[number, j].any())]
        if known:
            before[number] = [slots[j] for j in known], names[number, known][..., None, None, None].to(device)
    anything = bool(names.any())
    return Chain(plan, runs, slots, per_rank, (names.shape[2], names.shape[3]), before, anything, stretches, rows)


def _chunk_at(whole: ModalityLayout, run: Run, last: bool) -> Tensor:
    """Of each row of a batch (packed: of all tokens) the chunk of the first or last token of a run that is no padding;
    below 0: none, or none is there."""
    modality, chunk = (x[..., slice(*run)].view(-1, run[1] - run[0]) for x in (whole.modality, whole.chunk))
    if whole.packed and last:  # (of the last document alone)
        own = whole.sequence[slice(*run)]
        modality = torch.where(own == own[-1], modality, -1)
    elif whole.packed:
        own = whole.sequence[slice(*run)]
        modality = torch.where(own == own[0], modality, -1)
    real = (modality >= 0).int()
    place = (real.flip(1).argmax(1) * -1 + real.shape[1] - 1) if last else real.argmax(1)
    return torch.where(real.any(1), chunk.gather(1, place[:, None])[:, 0], -1)


def causal_map(aligner: DuplexAligner, tokens: Tensor, layout: ModalityLayout, chain: Chain, group: Group) -> ShardMap:
    """Args: tokens: this rank's keys ``[B, n, Hkv, D]``, packed ``[n, Hkv, D]``. layout: theirs."""
    handed_on = _handed_on(aligner, tokens, chain, group) if chain.anything else None
    parts: list[tuple[int, int, KeyMap]] = []
    for stretch in chain.stretches:
        start, stop = stretch.rows
        after = _after(chain.plan.layout, stretch, aligner.aligned, aligner.source_roles)
        pieces = pieces_of(stretch.part.layout, aligner.aligned, aligner.source_roles, after)
        source = tokens.narrow(-3, start, stop - start)
        known = None
        if stretch.goes_on and handed_on is not None:
            slots, names = chain.before[stretch.run]
            known = handed_on[slots].masked_fill(~names, 0).sum(0)
        parts.append((start, stop, aligner.causal_map(source, pieces, known)))
    return _shard_map(aligner, tokens, layout, chain.plan, parts, *(() if handed_on is None else (handed_on,)))


def _after(whole: ModalityLayout, stretch: Stretch, aligned: tuple[int, ...], sources: tuple[int, ...] | None) -> After:
    layout, columns = stretch.part.layout, stretch.part.columns

    def make() -> After:
        mapped = whole.remember(("mapped tokens", aligned, sources), lambda: mapped_tokens(whole, aligned, sources))
        mapped = mapped.view(whole.modality.shape)[..., columns].flatten()
        continues = None
        if whole.own_chunks:
            length = whole.modality.shape[-1]
            begin = torch.arange(whole.num_tokens // length)[:, None] * length + columns[0]
            chunk = whole.chunk[..., columns].view(-1, len(columns))
            continues = ((chunk >= 0) & (chunk < begin)).flatten().to(layout.device)
        return After(mapped.to(layout.device), continues)

    return layout.remember(("after", aligned, sources), make)


def _handed_on(aligner: DuplexAligner, tokens: Tensor, chain: Chain, group: Group) -> Tensor:
    """Gram sums ``[slots, S, C, Hkv, D, D]`` that each run of each rank hands on to those behind it."""
    heads, dim = tokens.shape[-2:]
    sequences, each = chain.sums
    mine = []
    for number, (start, stop) in chain.rows.items():
        x = tokens.narrow(-3, start, stop - start)
        mine.append(products.segment_gram(x, x, chain.groups(number, aligner.source_roles, tokens.device)))
    missing = chain.per_rank - len(mine)
    mine += [tokens.new_zeros(sequences * each, heads, dim, dim, dtype=compute_dtype(tokens))] * missing
    everything = collectives.gather_rows(collectives.attached(torch.stack(mine), tokens), group)
    out: Tensor = everything.unflatten(1, (sequences, each))
    return out


def _shard_map(
    aligner: DuplexAligner,
    tokens: Tensor,
    layout: ModalityLayout,
    plan: Plan,
    parts: list[tuple[int, int, KeyMap]],
    *used: Tensor,
) -> ShardMap:
    parameters = (p for p in (aligner.ratio, aligner.weight) if p is not None)
    return ShardMap(parts, layout, tokens.shape[-2], tokens.shape[-1], (*parameters, *used), plan.runs)
