"""Attention shares and disparities against a softmax written out, and the plot of them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moda_kernels as mk
from moda_kernels.diagnostics import keys_of_another_document
from moda_kernels.testing import generator, random_ids

DOUBLE = torch.float64


def inputs(ids: Tensor, heads: int = 2, key_heads: int = 2) -> tuple[Tensor, Tensor]:
    b, length = ids.shape
    g = generator(1)
    q, k = (torch.randn(b, h, length, 4, generator=g, dtype=DOUBLE) for h in (heads, key_heads))
    return q, k


def masses_by_hand(q: Tensor, k: Tensor, ids: Tensor, seen: Tensor, extra: Tensor | None = None) -> Tensor:
    """Attention probabilities [B, Hq, L, L]; extra: P_i [B, L], the mass of pseudo scores."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    weight = torch.where(seen[:, None], torch.exp(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5), 0)
    total = weight.sum(-1) + (0 if extra is None else extra[:, None])
    return torch.where(total[..., None] > 0, weight / total[..., None], 0)


def share_by_hand(p: Tensor, ids: Tensor, m: int) -> Tensor:
    """Mean over queries of modality a of their mass on keys of modality b, one entry at a time."""
    b, heads = p.shape[:2]
    share = torch.full((b, heads, m, m), math.nan, dtype=DOUBLE)
    for n in range(b):
        for h in range(heads):
            for a in range(m):
                rows = p[n, h, ids[n] == a]
                for c in range(m):
                    if len(rows):
                        share[n, h, a, c] = torch.stack([row[ids[n] == c].sum() for row in rows]).mean()
    return share


@pytest.mark.parametrize("mask", [None, mk.ModularMask.bidirectional_within(3, [1]), mk.ModularMask.cross_only(3)])
@pytest.mark.parametrize("key_heads", [1, 2])
def test_share(mask: mk.ModularMask | None, key_heads: int) -> None:
    g = generator(0)
    ids = torch.stack([random_ids(13, 3, g, longest=4, padding=p) for p in ("none", "middle", "left")])
    q, k = inputs(ids, 2, key_heads)
    seen = (mask or mk.ModularMask.full(3)).visible(mk.segment_modalities(ids, num_modalities=3))
    layout = mk.segment_modalities(ids, num_modalities=3)
    got = mk.attention_share(q, k, layout, mask, enable_gqa=key_heads != 2)
    expected = share_by_hand(masses_by_hand(q, k, ids, seen), ids, 3)
    assert got.dtype == DOUBLE
    torch.testing.assert_close(got, expected, equal_nan=True)
    low = mk.attention_share(q.bfloat16(), k.bfloat16(), layout, mask, enable_gqa=key_heads != 2)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), expected, equal_nan=True, rtol=0.05, atol=0.02)


def test_share_from_ids() -> None:
    ids = torch.tensor([[0, 1, 1, -1, 0]])
    q, k = inputs(ids)
    torch.testing.assert_close(
        mk.attention_share(q, k, ids, is_causal=True),
        mk.attention_share(q, k, mk.segment_modalities(ids), mk.ModularMask.causal(2)),
    )


@pytest.mark.parametrize("duplex", ["joint", "split"])
def test_rows_add_up(duplex: str) -> None:
    ids = torch.tensor([[0, 1, 1, 0, 1, 0]])
    q, k = inputs(ids)
    total = mk.attention_share(q, k, ids, duplex=duplex).sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, 1.0 if duplex == "joint" else 2.0))


def test_pseudo_scores_take_mass() -> None:
    ids = torch.tensor([[0, 0, 1, 1, 0, -1]])
    q, k = inputs(ids)
    layout, mask = mk.segment_modalities(ids), mk.ModularMask.causal(2)
    seen = mask.visible(layout)
    counts = 5 - seen.sum(-1)
    mass = [math.fsum(math.exp(0.3 - 0.5 * j) for j in range(c)) for c in counts[0].tolist()]
    scores = torch.tensor(mass, dtype=DOUBLE)
    got = mk.attention_share(q, k, layout, mask, pseudo=mk.PseudoAttention(0.3, 0.5))
    torch.testing.assert_close(got, share_by_hand(masses_by_hand(q, k, ids, seen, scores[None]), ids, 2))
    assert bool((got.sum(-1) < 1).all())


def test_absent_modality_is_nan() -> None:
    ids = torch.tensor([[0, 0, 2], [-1, -1, -1]])
    q, k = inputs(ids)
    share = mk.attention_share(q, k, mk.segment_modalities(ids, num_modalities=3))
    assert torch.isnan(share[0, :, 1]).all() and torch.isnan(share[1]).all()
    assert bool((share[0, :, 0, 1] == 0).all()) and bool(torch.isfinite(share[0, :, [0, 2]]).all())


def test_blind_rows_give_nothing_but_count() -> None:
    """A query that sees nothing gives no mass; the mean is over all queries of the modality."""
    ids = torch.tensor([[0, 0, 1]])
    q, k = inputs(ids)
    share = mk.attention_share(q, k, ids, mk.ModularMask([[0, 0], [0, 4]]))
    torch.testing.assert_close(share[0, 0], torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=DOUBLE))


def test_packed_and_fewer_queries() -> None:
    ids = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    layout = mk.segment_modalities(ids, cu_seqlens=torch.tensor([0, 3, 3, 8]))
    q, k = (torch.randn(8, 2, 4, dtype=DOUBLE) for _ in range(2))
    got = mk.attention_share(q, k, layout, mk.ModularMask.causal(2))
    assert got.shape == (3, 2, 2, 2) and torch.isnan(got[1]).all()
    for n, rows in ((0, slice(0, 3)), (2, slice(3, 8))):
        one = [x[rows].transpose(0, 1)[None] for x in (q, k)]
        torch.testing.assert_close(
            got[n : n + 1], mk.attention_share(*one, ids[None, rows], mk.ModularMask.causal(2)), equal_nan=True
        )
    # The last two tokens of the last document only.
    cu_q = torch.tensor([0, 0, 0, 2], dtype=torch.int32)
    last = mk.attention_share(q[6:], k, layout, mk.ModularMask.causal(2), cu_seqlens_q=cu_q)
    assert torch.isnan(last[:2]).all()
    batch_q, batch_k = (x[3:].transpose(0, 1)[None] for x in (q, k))
    expected = mk.attention_share(batch_q[:, :, 3:], batch_k, ids[None, 3:], mk.ModularMask.causal(2))
    torch.testing.assert_close(last[2:], expected)
    moved = mk.attention_share(batch_q[:, :, 1:3], batch_k, ids[None, 3:], query_start=1)
    p = masses_by_hand(batch_q, batch_k, ids[None, 3:], torch.ones(1, 5, 5, dtype=torch.bool))
    kept = torch.where(torch.tensor([False, True, True, False, False]), ids[None, 3:], 7)
    by_row = torch.stack([p[..., ids[3:] == b].sum(-1) for b in range(2)], -1)
    expected = torch.stack([by_row[:, :, kept[0] == a].mean(2) for a in range(2)], 2)
    torch.testing.assert_close(moved, expected)


# Disparity


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mask", [mk.ModularMask.full(2), mk.ModularMask.bidirectional_within(2, [1])])
def test_disparity(mask: mk.ModularMask, packed: bool) -> None:
    ids = torch.tensor([[0, 0, 1, 1, 1, 0, -1, 1]])
    q, k = inputs(ids)
    layout = mk.segment_modalities(ids)
    seen = mask.visible(layout)[0]
    p = masses_by_hand(q, k, ids, seen[None])[0]
    own, cross = torch.full((2, 2), math.nan, dtype=DOUBLE), torch.full((2, 2), math.nan, dtype=DOUBLE)
    for h in range(2):
        for a in range(2):
            for kind, table in ((True, own), (False, cross)):
                rows = []
                for i in range(8):
                    visible = seen[i] & (ids[0] >= 0)
                    keys = visible & ((ids[0] == a) == kind)
                    others = visible & ~keys
                    if ids[0, i] == a and keys.any() and others.any():
                        rows.append(p[h, i, keys].sum() / keys.sum())
                table[h, a] = torch.stack(rows).mean()
    options: dict[str, Any] = {"layout": layout, "mask": mask}
    if packed:
        options["layout"] = mk.segment_modalities(ids[0], cu_seqlens=torch.tensor([0, 8]))
        q, k = (x[0].transpose(0, 1) for x in (q, k))
    got = mk.modal_disparity(q, k, **options)
    torch.testing.assert_close(got.own[0], own)
    torch.testing.assert_close(got.cross[0], cross)
    torch.testing.assert_close(got.difference[0], (own - cross).abs() / torch.maximum(own, cross))


def test_disparity_of_uniform_attention_is_zero() -> None:
    """However many tokens each modality has, and whatever the mask: the figure is per visible key."""
    ids = torch.tensor([[0, 0, 0, 0, 0, 1, 1]])
    q, k = torch.zeros(1, 1, 7, 4, dtype=DOUBLE), torch.randn(1, 1, 7, 4, dtype=DOUBLE)
    for more in ({}, {"is_causal": True}):
        got = mk.modal_disparity(q, k, ids, **more)
        visible = [True, True] if not more else [False, True]  # nothing stands before the first modality
        assert torch.isnan(got.difference[0, 0]).tolist() == [not v for v in visible]
        if not more:
            torch.testing.assert_close(got.own[0, 0], torch.full((2,), 1 / 7, dtype=DOUBLE))
        expected = torch.where(torch.tensor(visible), 0.0, math.nan).double()
        torch.testing.assert_close(got.difference[0, 0], expected, equal_nan=True)
    interleaved = torch.tensor([[0] * 4 + [1] * 4 + [0] * 4])
    q = torch.zeros(1, 1, 12, 4, dtype=DOUBLE)
    got = mk.modal_disparity(q, q, interleaved, mk.ModularMask.causal(2))
    torch.testing.assert_close(got.difference, torch.zeros(1, 1, 2, dtype=DOUBLE))


def test_disparity_of_absent_modalities_is_nan() -> None:
    ids = torch.tensor([[0, 0, -1], [0, 1, 1]])
    q, k = inputs(ids)
    got = mk.modal_disparity(q, k, mk.segment_modalities(ids, num_modalities=3))
    assert torch.isnan(got.cross[0]).all() and torch.isnan(got.difference[0]).all()
    assert torch.isnan(got.own[0, :, 1:]).all() and torch.isnan(got.own[:, :, 2]).all()
    assert bool(torch.isfinite(got.difference[1, :, :2]).all())
    blind = mk.modal_disparity(q, k, mk.segment_modalities(ids), mk.ModularMask.self_only(2))
    assert torch.isnan(blind.cross).all() and torch.isnan(blind.difference).all()


def test_errors() -> None:
    ids = torch.tensor([[0, 1, 1]])
    q, k = inputs(ids)
    with pytest.raises(ValueError, match=r"mask: expected 2 x 2 rules.*got 3 x 3"):
        mk.attention_share(q, k, mk.segment_modalities(ids), mk.ModularMask.full(3))
    with pytest.raises(TypeError, match=r"mask: expected a ModularMask, got 'full'"):
        mk.attention_share(q, k, ids, "full")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"key: expected a floating-point tensor.*int32"):
        mk.attention_share(q, k.int(), ids)
    with pytest.raises(TypeError, match="no_such"):
        mk.attention_share(q, k, ids, no_such=1)
    with pytest.raises((TypeError, ValueError), match="return_lse"):
        mk.attention_share(q, k, ids, return_lse=True)


# Plot


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    shares = [torch.rand(2, 3, 2, 2), torch.rand(2, 3, 2, 2)]
    shares[0][1, :, 1] = math.nan
    path = mk.plot_attention_share(shares, tmp_path / "s.png", modalities=["text", "image"], titles=["first", "last"])
    assert path == tmp_path / "s.png" and path.read_bytes().startswith(b"\x89PNG")
    again = mk.plot_attention_share(torch.stack(shares), str(tmp_path / "t.png"))
    assert again.read_bytes().startswith(b"\x89PNG")
    nothing = mk.plot_attention_share([torch.full((1, 1, 2, 2), math.nan)], tmp_path / "n.png")
    assert nothing.stat().st_size > 0


@pytest.mark.parametrize(
    ("shares", "names", "message"),
    [
        (torch.zeros(1, 2, 2), None, r"shares: expected \[N, Hq, M, M\] per layer, got .*\(2, 2\)"),
        ([torch.zeros(1, 1, 2, 3)], None, r"shares: expected \[N, Hq, M, M\] per layer, got .*\(1, 1, 2, 3\)"),
        ([torch.zeros(1, 1, 2, 2)], ["text"], r"modalities.*: expected 2 .*got .*text"),
        ([torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 3, 3)], None, r"shares: expected .*got .*2, 3"),
        ([], None, r"shares: expected .*got"),
    ],
)
def test_plot_errors(shares: Any, names: list[str] | None, message: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=message):
        mk.plot_attention_share(shares, tmp_path / "x.png", modalities=names)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("packed", [False, True])
def test_keys_of_another_document(packed: bool) -> None:
    """Token r of a modality stands for token r of that modality in the next sequence that has it, again from the start
    where there are fewer; padding for itself."""
    rows = [[0, 1, 1, -1, 0, 1], [1, 0, 0, 0, -1, -1], [0, 0, -1, 0, 2, 2], [2, 1, 0, -1, 1, 1]]
    ids = torch.tensor(rows)
    key = torch.randn(4, 2, 6, 3, dtype=DOUBLE, requires_grad=True)
    layout = mk.segment_modalities(ids)
    given = key
    if packed:
        cu_seqlens = torch.arange(0, 25, 6, dtype=torch.int32)
        layout = mk.segment_modalities(ids.flatten(), cu_seqlens=cu_seqlens)
        given = key.transpose(1, 2).reshape(24, 2, 3)
    found = keys_of_another_document(given, layout)
    assert found.shape == given.shape
    if packed:
        found = found.view(4, 6, 2, 3).transpose(1, 2)
    for n, row in enumerate(rows):
        for t, m in enumerate(row):
            if m < 0:
                lender, place = n, t
            else:
                lender = next(x % 4 for x in range(n + 1, n + 5) if m in rows[x % 4])
                places = [i for i, other in enumerate(rows[lender]) if other == m]
                place = places[row[:t].count(m) % len(places)]
            assert torch.equal(found[n, :, t], key[lender, :, place]), (n, t)
    found.sum().backward()
    assert key.grad is not None


def test_keys_of_another_document_need_one() -> None:
    key = torch.randn(2, 1, 3, 4)
    with pytest.raises(ValueError, match="modality 1 in two sequences"):
        keys_of_another_document(key, torch.tensor([[0, 1, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match="layout"):
        keys_of_another_document(key, torch.tensor([[0, 1, 0, 1], [0, 0, 0, 1]]))
    everything_hidden = torch.full((2, 3), -1)
    assert torch.equal(keys_of_another_document(key, everything_hidden), key)
