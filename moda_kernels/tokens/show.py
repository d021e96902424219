"""Masks as text: the table of rules, and a small picture of who sees whom in one sequence."""

from torch import Tensor

from moda_kernels.runtime import checks
from moda_kernels.tokens.intervals import Rules, Visibility, visible_keys
from moda_kernels.tokens.layout import ModalityLayout

_ALL, _SOME, _NONE, _PADDING = "■", "□", "·", " "
_NAMES = "0123456789abcdefghijklmnopqrstuvwxyz"


def rule_name(rule: Visibility) -> str:
    """``PAST|SEGMENT``; "-" for hidden."""
    return "|".join(str(flag.name) for flag in Visibility if flag & rule) or "-"


def rule_table(mask: Rules) -> str:
    """A line for each query role, a column for each key role."""
    roles = [str(r) for r in range(len(mask.rules))]
    rows = [["", *roles], *([a, *map(rule_name, row)] for a, row in zip(roles, mask.rules, strict=True))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    window = "" if mask.window is None else f", a window of {mask.window} on {mask.window_on}"
    lines = [f"ModularMask: query role × key role{window}"]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def picture(mask: Rules, layout: ModalityLayout, sequence: int = 0, width: int = 40) -> str:
    """See `ModularMask.show`."""
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
    cells = -(-(end - begin) // group)

    facts = {"modality": layout.modality}
    facts |= {"role": layout.role} if layout.own_roles else {}
    facts |= {"step": layout.step} if bool((layout.step != 0).any()) else {}
    facts |= {"chunk": layout.chunk} if bool((layout.chunk >= 0).any()) else {}
    named = {name: _names(fact.flatten()[begin:end].cpu(), real, name) for name, fact in facts.items()}
    label = max(map(len, named)) if named else 0
    lines = [f"{name.ljust(label)}  {' '.join(_shared(text, group))}".rstrip() for name, text in named.items()]
    of_row = _shared(named["role" if layout.own_roles else "modality"], group)

    both = real[:, None] & real[None, :]
    for row in range(cells):
        rows = slice(row * group, (row + 1) * group)
        marks = []
        for column in range(cells):
            columns = slice(column * group, (column + 1) * group)
            pairs = seen[rows, columns][both[rows, columns]]
            some, every = bool(pairs.any()), bool(pairs.all())
            marks.append(_PADDING if not pairs.numel() else _ALL if every else _SOME if some else _NONE)
        lines.append(f"{of_row[row].rjust(label)}  {' '.join(marks)}".rstrip())
    if group > 1:
        lines.append(f"({group} tokens a mark: {_ALL} all, {_SOME} some, {_NONE} none)")
    return "\n".join(lines)


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
