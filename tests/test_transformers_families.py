"""Every family that `enable` takes is itself in every use (`families.py`), and `docs/models.md` says so."""

import families
import pytest

#: Every use in the gate; of the others one each, and all with `-m exhaustive`.
FIRST = (
    "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "gemma3", "gemma4",
    "paligemma", "molmo2", "idefics3", "smolvlm", "internvl", "mistral3", "llama4",
)  # fmt: skip
_REST = [kind for kind in families.KINDS if kind not in FIRST]
_USES = list(families.USES)


@pytest.mark.parametrize("use", _USES)
@pytest.mark.parametrize("kind", FIRST)
def test_first_families(kind: str, use: str) -> None:
    families.check(kind, use)


@pytest.mark.parametrize(("kind", "use"), [(kind, _USES[i % len(_USES)]) for i, kind in enumerate(_REST)])
def test_other_families(kind: str, use: str) -> None:
    families.check(kind, use)


@pytest.mark.exhaustive
@pytest.mark.parametrize("use", _USES)
@pytest.mark.parametrize("kind", _REST)
def test_other_families_whole(kind: str, use: str) -> None:
    families.check(kind, use)


def test_the_table_is_current() -> None:
    done = dict.fromkeys(families.USES, True)
    assert families.rows_of_table() == {kind: families.row(kind, done) for kind in families.KINDS}
