"""Masks to look at: the table of rules, and who sees whom in one sequence, as text and as a drawing."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from moda_kernels.runtime import checks
from moda_kernels.tokens import drawing
from moda_kernels.tokens.drawing import Drawing
from moda_kernels.tokens.intervals import Visibility, visible_keys
from moda_kernels.tokens.layout import ModalityLayout

if TYPE_CHECKING:
    from moda_kernels.tokens.mask import ModularMask

_ALL, _SOME, _NONE, _PADDING = "■", "□", "·", " "
_NAMES = "0123456789abcdefghijklmnopqrstuvwxyz"


def rule_name(rule: Visibility) -> str:
    """``PAST|SEGMENT``; "-" for hidden."""
    return "|".join(str(flag.name) for flag in Visibility if flag & rule) or "-"


def _title(mask: "ModularMask") -> str:
    window = "" if mask.window is None else f", a window of {mask.window} on {mask.window_on}"
    return f"ModularMask: query role × key role{window}"


def rule_table(mask: "ModularMask") -> str:
    """A line for each query role, a column for each key role."""
    roles = [str(r) for r in range(mask.num_roles)]
    rows = [["", *roles], *([a, *map(rule_name, row)] for a, row in zip(roles, mask.rules, strict=True))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_title(mask)]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def rule_html(mask: "ModularMask") -> str:
    """The same as an HTML table."""
    roles = range(mask.num_roles)
    head = "".join(f"<th>{role}</th>" for role in roles)
    rows = "".join(
        f"<tr><th>{role}</th>{''.join(f'<td>{rule_name(rule)}</td>' for rule in row)}</tr>"
        for role, row in zip(roles, mask.rules, strict=True)
    )
    return f"<table><caption>{_title(mask)}</caption><tr><th></th>{head}</tr>{rows}</table>"


@dataclass(frozen=True)
class _Cells:
    """One sequence in groups of tokens, a cell per pair of groups.

    Attributes:
        group: tokens of a group. names: per fact (modality; role, step, chunk where there are any) a letter per group.
        modality, role: per group, of its first token that is there; -1 for padding.
        seen: per cell the part of its pairs that is seen; -1 where there are none.
    """

    group: int
    names: dict[str, str]
    modality: list[int]
    role: list[int] | None
    seen: list[list[float]]


def _cells(mask: "ModularMask", layout: ModalityLayout, sequence: int, width: int) -> _Cells:
    mask.check_layout(layout)
    checks.integer("width", width, 1)
    if layout.num_sequences == 0:
        raise checks.wrong_value("layout", "at least one sequence", layout)
    checks.integer("sequence", sequence, 0, layout.num_sequences - 1)
    begin, end = layout.cu_seqlens[sequence : sequence + 2].tolist()
    seen = visible_keys(layout, layout.queries(), mask)
    seen = (seen[begin:end, begin:end] if layout.packed else seen[sequence]).cpu()
    real = layout.modality.flatten()[begin:end].cpu() >= 0
    group = max(1, -(-(end - begin) // width))

    facts = {"modality": layout.modality}
    facts |= {"role": layout.role} if layout.own_roles else {}
    facts |= {"step": layout.step} if bool((layout.step != 0).any()) else {}
    facts |= {"chunk": layout.chunk} if bool((layout.chunk >= 0).any()) else {}
    own = {name: fact.flatten()[begin:end].cpu() for name, fact in facts.items()}
    names = {name: _shared(_names(fact, real, name), group) for name, fact in own.items()}

    starts = range(0, end - begin, group)
    pairs = (real[:, None] & real[None, :]).double()
    parts = [
        [_part(seen[i : i + group, j : j + group], pairs[i : i + group, j : j + group]) for j in starts] for i in starts
    ]

    def of_groups(fact: Tensor) -> list[int]:
        return [next((int(x) for x, r in zip(fact[i : i + group], real[i : i + group], strict=True) if r), -1)
                for i in starts]  # fmt: skip

    role = of_groups(own["role"]) if "role" in own else None
    return _Cells(group, names, of_groups(own["modality"]), role, parts)


def _part(seen: Tensor, pairs: Tensor) -> float:
    count = float(pairs.sum())
    return float((seen * pairs).sum()) / count if count else -1.0


def picture(mask: "ModularMask", layout: ModalityLayout, sequence: int = 0, width: int = 40) -> str:
    """See `ModularMask.show`."""
    cells = _cells(mask, layout, sequence, width)
    label = max(map(len, cells.names))
    lines = [f"{name.ljust(label)}  {' '.join(text)}".rstrip() for name, text in cells.names.items()]
    of_row = cells.names["role" if cells.role is not None else "modality"]
    for name, row in zip(of_row, cells.seen, strict=True):
        marks = (_PADDING if part < 0 else _ALL if part == 1 else _SOME if part > 0 else _NONE for part in row)
        lines.append(f"{name.rjust(label)}  {' '.join(marks)}".rstrip())
    if cells.group > 1:
        lines.append(f"({cells.group} tokens a mark: {_ALL} all, {_SOME} some, {_NONE} none)")
    return "\n".join(lines)


def draw(mask: "ModularMask", layout: ModalityLayout, sequence: int = 0, width: int = 64) -> Drawing:
    """See `ModularMask.draw`."""
    cells = _cells(mask, layout, sequence, width)
    strips = [(cells.modality, drawing.MODALITIES)]
    if cells.role is not None:
        strips.append((cells.role, drawing.ROLES))
    cell = drawing.CELL if len(cells.modality) <= 40 else 8
    return drawing.grid(cells.seen, cells.modality, strips, cell)


def _names(fact: Tensor, real: Tensor, name: str) -> str:
    """A letter for each token: its number, or (of steps and chunks) which of those in the sequence it is."""
    values = fact.tolist()
    if name in ("step", "chunk"):
        known = sorted({v for v, r in zip(values, real.tolist(), strict=True) if r and (name == "step" or v >= 0)})
        values = [known.index(v) if v in known else -1 for v in values]
    letters = [_PADDING if not r else "-" if v < 0 else _NAMES[v] if v < len(_NAMES) else "+"
               for v, r in zip(values, real.tolist(), strict=True)]  # fmt: skip
    return "".join(letters)


def _shared(text: str, group: int) -> str:
    """One letter for each group: that of its tokens, "*" where they differ."""
    parts = (text[i : i + group] for i in range(0, len(text), group))
    return "".join(part[0] if len({*part}) == 1 else "*" for part in parts)
