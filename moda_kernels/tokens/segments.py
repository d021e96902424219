"""Modality ids to segments: `segment_modalities`, which makes a layout, and its operators."""

from typing import Any

import torch
from torch import Tensor

from moda_kernels.runtime import checks, native
from moda_kernels.runtime.lasting import lasting
from moda_kernels.runtime.operators import operator
from moda_kernels.tokens.layout import STEPS_EXPECTED, ModalityLayout, abridged, bad_bounds, cu_seqlens_argument

#: Ids that reach this are more likely token ids than modalities or roles.
MANY_MODALITIES = 256


@lasting
def segment_modalities(
    modality_ids: Tensor,
    *,
    num_modalities: int | None = None,
    item_ids: Tensor | None = None,
    roles: Tensor | None = None,
    num_roles: int | None = None,
    steps: Tensor | None = None,
    chunks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_segments: int | None = None,
) -> ModalityLayout:
    """Cut sequences into segments: the longest runs of one modality (and role, and item) in one sequence.

    Args:
        modality_ids: integer ``[B, L]`` (a batch) or ``[T]`` (packed documents, with ``cu_seqlens``): 0…M-1, or -1 for
            padding, which may stand anywhere, ends a run and belongs to no segment.
        num_modalities: M. Default: the largest id + 1, from 1 to 256; reading it waits for a CUDA device.
        item_ids: integer, shape and device of ``modality_ids``; tokens with different items are in different segments
            (two images side by side).
        roles: integer, as ``item_ids``: the row and column of the mask's rules that a token uses, 0…R-1 wherever there
            is a modality. Default: the modality.
        num_roles: R. Default: M without roles, else the largest role + 1; reading it waits for a CUDA device.
        steps: integer, as ``item_ids``: frames, scales, blocks, turns, for BEFORE and UPTO; they never fall along the
            tokens of one role of a sequence. Default: 0.
        chunks: integer, as ``item_ids``: runs of the same number >= 0 are chunks (padding inside ends none), tokens
            with a number below 0 are in none. Default: none.
        cu_seqlens: int32 or int64 ``[N + 1]``, from 0 to T, non-decreasing: the first token of each document.
        max_segments: an upper bound of the number of segments, so that nothing waits for a CUDA device. Default: their
            number.

    Returns:
        A :class:`ModalityLayout` on the device of ``modality_ids``. Given ``num_modalities``, ``max_segments`` and
        (with roles) ``num_roles``, making it on CUDA neither synchronises nor breaks a graph capture.

    Raises:
        TypeError: an argument that is not an integer tensor, or not an int.
        ValueError: wrong shapes or devices; on the CPU also ids outside -1…M-1, roles outside 0…R-1, steps that fall,
            bad ``cu_seqlens``, more segments than ``max_segments``. On CUDA values are looked at in
            :meth:`ModalityLayout.check` only: until then an id or a role out of range counts as padding, and too many
            segments and steps that fall poison outputs with NaN.
    """
    given = {"item_ids": item_ids, "roles": roles, "steps": steps, "chunks": chunks}
    cu_seqlens = _check_arguments(modality_ids, given, cu_seqlens)
    on_cpu = checks.looks_at_values(modality_ids.device)
    if modality_ids.dtype in (torch.int8, torch.uint8):
        modality_ids = modality_ids.int()  # -1 and M are to be compared with
    num_modalities = _number_of("num_modalities", num_modalities, modality_ids)
    if roles is None:
        if num_roles not in (None, num_modalities):
            raise checks.wrong_value("num_roles", f"{num_modalities}, as num_modalities, without roles", num_roles)
        num_roles = num_modalities
    else:
        roles = roles.int() if roles.dtype in (torch.int8, torch.uint8) else roles
        num_roles = _number_of("num_roles", num_roles, roles)
    if max_segments is not None:
        checks.integer("max_segments", max_segments, 0)

    in_range = (modality_ids >= -1) & (modality_ids < num_modalities)
    stray = torch.zeros_like(in_range)
    if roles is not None:
        stray = (modality_ids >= 0) & ((roles < 0) | (roles >= num_roles))
    faults = None
    if not on_cpu:
        faults = torch.stack(((~in_range).sum(), bad_bounds(cu_seqlens, modality_ids.numel()), stray.sum())).int()
        # In bounds whatever came, so that nothing below can read or write elsewhere.
        cu_seqlens = cu_seqlens.clamp(0, modality_ids.numel()).cummax(0).values
    elif not bool(in_range.all()):
        bad = int(modality_ids[~in_range][0])
        raise checks.wrong_value("modality_ids", f"ids from -1 (padding) to {num_modalities - 1}", f"the id {bad}")
    elif bad_bounds(cu_seqlens, modality_ids.numel()):
        expected = f"non-decreasing offsets from 0 to the {modality_ids.numel()} tokens"
        raise checks.wrong_value("cu_seqlens", expected, f"{abridged(cu_seqlens)}")
    elif roles is not None and bool(stray.any()):
        bad = int(roles[stray][0])
        raise checks.wrong_value(
            "roles", f"roles from 0 to {num_roles - 1} where there is a modality", f"the role {bad}"
        )

    modality = torch.where(in_range & ~stray, modality_ids, -1).int().flatten()
    items = None if item_ids is None else item_ids.long().flatten().contiguous()
    if roles is not None:
        items = _runs(*(x for x in (items, roles.flatten()) if x is not None))
    cu_seqlens = cu_seqlens.to(torch.int32, copy=True).contiguous()
    segment, position, sequence, prefix, num_segments = _op_segment_tokens(modality, items, cu_seqlens, num_modalities)

    if max_segments is None or on_cpu:
        segments = int(num_segments)
        if torch.compiler.is_compiling():  # one of room, so that a tracer needn't ask whether there are any
            segments += 1
            torch._check(segments >= 1)
        if max_segments is None:
            max_segments = segments
        elif segments > max_segments:
            raise checks.wrong_value("max_segments", f"at least the {segments} segments there are", max_segments)
    # A token past the last document (possible on CUDA only) has become padding.
    modality = torch.where(segment >= 0, modality, -1) if faults is not None else modality
    role = modality if roles is None else torch.where(modality >= 0, roles.flatten(), -1).int()
    if steps is None and chunks is None:
        step, chunk, falls = torch.zeros_like(modality), torch.full_like(modality, -1), torch.zeros_like(num_segments)
    else:
        given_facts = (None if fact is None else fact.long().flatten().contiguous() for fact in (steps, chunks))
        step, chunk, falls = _op_token_facts(modality, role, sequence, *given_facts, num_roles)
        if on_cpu and falls:
            raise checks.wrong_value("steps", STEPS_EXPECTED, f"{int(falls)} that fall, or are no int32")
    if faults is not None:
        faults = torch.cat((faults, falls))
    shape = modality_ids.shape
    return ModalityLayout(
        modality=modality.view(shape),
        segment=segment.view(shape),
        position=position.view(shape),
        sequence=sequence.view(shape),
        role=role.view(shape),
        step=step.view(shape),
        chunk=chunk.view(shape),
        counts=prefix[cu_seqlens[1:]] - prefix[cu_seqlens[:-1]],
        cu_seqlens=cu_seqlens,
        num_modalities=num_modalities,
        num_roles=num_roles,
        own_roles=roles is not None,
        own_chunks=chunks is not None,
        max_segments=max_segments,
        num_segments=num_segments,
        prefix=prefix,
        table=_op_segment_table(modality, segment, sequence, max_segments),
        faults=faults,
    )


def _number_of(name: str, number: int | None, ids: Tensor) -> int:
    """M or R: as given, or the largest id + 1."""
    if number is None:
        number = max(1, int(ids.max()) + 1) if ids.numel() else 1
        if number > MANY_MODALITIES:
            kind = "modality" if name == "num_modalities" else "role"
            expected = f"to be given where ids reach {MANY_MODALITIES} (there is something for every {kind})"
            raise checks.wrong_value(name, expected, f"ids up to {number - 1}: are they token ids?")
    return checks.integer(name, number, 1)


def _runs(*facts: Tensor) -> Tensor:
    """int64 ``[T]``: a number that changes wherever one of the facts does."""
    changes = torch.stack([fact[1:] != fact[:-1] for fact in facts]).any(0)
    return torch.nn.functional.pad(changes.cumsum(0), (min(facts[0].numel(), 1), 0))


def _falls(step: Tensor, role: Tensor, sequence: Tensor, num_roles: int) -> Tensor:
    """How many tokens have a lower step than the token of their role before them; int64, of no axes."""
    kind = torch.where(role >= 0, sequence.long() * num_roles + role, -1)
    order = torch.argsort(kind, stable=True)
    kind, step = kind[order], step[order]
    return ((kind[1:] == kind[:-1]) & (kind[1:] >= 0) & (step[1:] < step[:-1])).sum()


def _chunks(chunks: Tensor, modality: Tensor, sequence: Tensor) -> Tensor:
    """int32 ``[T]``, see `ModalityLayout.chunk`."""
    tokens = torch.arange(modality.numel(), device=modality.device)
    real = modality >= 0
    if not modality.numel():
        return modality.clone()
    # The non-padding token before each one.
    before = torch.nn.functional.pad(torch.where(real, tokens, -1).cummax(0).values, (1, 0), value=-1)[:-1]
    place = before.clamp(min=0)
    goes_on = (before >= 0) & (sequence[place] == sequence) & (chunks[place] == chunks)
    begins = torch.where(real & ~goes_on, tokens, -1).cummax(0).values
    return torch.where(real & (chunks >= 0), begins, -1).int()


def segment_tokens_torch(
    modality: Tensor, items: Tensor | None, cu_seqlens: Tensor, num_modalities: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The PyTorch twin of `native.segment_tokens`.

    Args:
        modality: int32 ``[T]``, -1…M-1.
        items: int64 ``[T]`` or None.
        cu_seqlens: int32 ``[N + 1]``, within 0…T and non-decreasing; tokens outside of it are padding.

    Returns:
        segment, position, sequence (int32 ``[T]``), prefix (int32 ``[T + 1, M]``), num_segments (int32 ``[1]``).
    """
    tokens = torch.arange(modality.numel(), dtype=torch.int32, device=modality.device)
    sequence = torch.searchsorted(cu_seqlens[1:], tokens, right=True).int()
    real = (modality >= 0) & (tokens >= cu_seqlens[:1]) & (tokens < cu_seqlens[-1:])
    one_hot = modality[:, None] == torch.arange(num_modalities, device=modality.device)
    prefix = torch.zeros(modality.numel() + 1, num_modalities, dtype=torch.int32, device=modality.device)
    torch.cumsum(one_hot & real[:, None], 0, dtype=torch.int32, out=prefix[1:])

    same = torch.zeros_like(real)
    same[1:] = real[:-1] & (modality[1:] == modality[:-1]) & (sequence[1:] == sequence[:-1])
    if items is not None:
        same[1:] &= items[1:] == items[:-1]
    begins = real & ~same
    started = torch.cumsum(begins, 0, dtype=torch.int32)
    segment = torch.where(real, started - 1, -1)
    seen = prefix.sum(1, dtype=torch.int32)
    # min(): a token past the last document has no sequence start of its own.
    first = cu_seqlens[sequence.clamp(max=cu_seqlens.numel() - 1)]
    position = torch.where(real, seen[:-1] - seen[first], -1)
    sequence = sequence.clamp(max=max(cu_seqlens.numel() - 2, 0))
    num_segments = begins.sum(dtype=torch.int32).view(1)
    return segment, position, sequence, prefix, num_segments


def segment_table_torch(modality: Tensor, segment: Tensor, sequence: Tensor, max_segments: int) -> Tensor:
    """The PyTorch twin of `native.segment_table`: int32 ``[max_segments, 4]``, see `ModalityLayout.table`."""
    tokens = torch.arange(modality.numel(), dtype=torch.int32, device=modality.device)
    # One row more takes what belongs to no segment, or to one too many.
    row = torch.where((segment >= 0) & (segment < max_segments), segment, max_segments).long()
    table = torch.zeros(max_segments + 1, 4, dtype=torch.int32, device=modality.device)
    table[:, 0].scatter_(0, row, sequence)
    table[:, 1].fill_(modality.numel()).scatter_reduce_(0, row, tokens, "amin")
    table[:, 2].scatter_add_(0, row, torch.ones_like(tokens))
    table[:, 3].scatter_(0, row, modality)
    return torch.where(table[:, 2:3] > 0, table, 0)[:max_segments].contiguous()


def token_facts_torch(
    modality: Tensor, role: Tensor, sequence: Tensor, steps: Tensor | None, chunks: Tensor | None, num_roles: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The PyTorch twin of `native.token_facts`.

    Args:
        modality, role, sequence: int32 ``[T]``. steps, chunks: int64 ``[T]`` or None.

    Returns:
        step, chunk (int32 ``[T]``, see `ModalityLayout`), and how many steps fall or are no int32 (int32 ``[1]``).
    """
    step, chunk = torch.zeros_like(modality), torch.full_like(modality, -1)
    falls = torch.zeros(1, dtype=torch.int32, device=modality.device)
    if steps is not None:
        real = modality >= 0
        step = torch.where(real, steps, 0).clamp(-(2**31), 2**31 - 1).int()
        falls = (_falls(step, role, sequence, num_roles) + (real & (step != steps)).sum()).int().view(1)
    if chunks is not None:
        chunk = _chunks(chunks, modality, sequence)
    return step, chunk, falls


def _token_facts(modality: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    made = (
        native.token_facts if modality.device.type == "cpu" and native.runs_on(modality.device) else token_facts_torch
    )
    return made(modality, *arguments)


def _token_facts_fake(modality: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(modality), torch.empty_like(modality), modality.new_empty(1)


def _segment_tokens(
    modality: Tensor, items: Tensor | None, cu_seqlens: Tensor, num_modalities: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    segment_tokens = native.segment_tokens if native.runs_on(modality.device) else segment_tokens_torch
    return segment_tokens(modality, items, cu_seqlens, num_modalities)


def _segment_tokens_fake(
    modality: Tensor, items: Tensor | None, cu_seqlens: Tensor, num_modalities: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens = modality.numel()
    per_token = (torch.empty_like(modality) for _ in range(3))
    return *per_token, modality.new_empty(tokens + 1, num_modalities), modality.new_empty(1)  # type: ignore[return-value]


def _segment_table(modality: Tensor, segment: Tensor, sequence: Tensor, max_segments: int) -> Tensor:
    segment_table = native.segment_table if native.runs_on(modality.device) else segment_table_torch
    return segment_table(modality, segment, sequence, max_segments)


def _segment_table_fake(modality: Tensor, segment: Tensor, sequence: Tensor, max_segments: int) -> Tensor:
    return modality.new_empty(max_segments, 4)


_op_segment_tokens = operator(
    "_segment_tokens(Tensor modality, Tensor? items, Tensor cu_seqlens, int num_modalities)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _segment_tokens,
    _segment_tokens_fake,
)


_op_token_facts = operator(
    "_token_facts(Tensor modality, Tensor role, Tensor sequence, Tensor? steps, Tensor? chunks, int num_roles)"
    " -> (Tensor, Tensor, Tensor)",
    _token_facts,
    _token_facts_fake,
)


_op_segment_table = operator(
    "_segment_table(Tensor modality, Tensor segment, Tensor sequence, SymInt max_segments) -> Tensor",
    _segment_table,
    _segment_table_fake,
)


def _check_arguments(modality_ids: Tensor, given: dict[str, Tensor | None], cu_seqlens: Tensor | None) -> Tensor:
    """Shapes, dtypes and devices; returns cu_seqlens, made for a batch."""
    checks.has_numbers("modality_ids", checks.integer_tensor("modality_ids", modality_ids))
    for name, fact in given.items():
        if fact is not None:
            checks.integer_tensor(name, fact)
            checks.shape(name, fact, modality_ids.shape, "of modality_ids")
            checks.same_device(name, fact, modality_ids.device, "modality_ids")
    if cu_seqlens is None:
        if modality_ids.dim() != 2:
            raise checks.wrong_value("modality_ids", "[B, L], or [T] together with cu_seqlens", modality_ids)
        rows, length = modality_ids.shape
        return torch.arange(rows + 1, dtype=torch.int32, device=modality_ids.device) * length
    if modality_ids.dim() != 1:
        raise checks.wrong_value("modality_ids", "[T] together with cu_seqlens", modality_ids)
    return cu_seqlens_argument("cu_seqlens", cu_seqlens, modality_ids.device)


def as_layout(layout: ModalityLayout | Tensor, num_modalities: int | None = None) -> ModalityLayout:
    """A layout as it is, or made from modality ids ``[B, L]``."""
    if isinstance(layout, ModalityLayout):
        return layout
    if not isinstance(layout, Tensor):
        raise checks.wrong_type("layout", "a ModalityLayout or a tensor of modality ids [B, L]", layout)
    if layout.dim() != 2:
        raise checks.wrong_value(
            "layout", "a ModalityLayout, or modality ids [B, L] (packed: call segment_modalities)", layout
        )
    return segment_modalities(layout, num_modalities=num_modalities)
