"""`replace_sdpa` in models that nobody rewrote: torch's transformer layers, a ViT block, direct SDPA calls."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moda_kernels as mk

IDS = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 0, 0, 1, -1, -1]])
LAYOUT = mk.segment_modalities(IDS)
MASK = mk.ModularMask.bidirectional_within(2, [1])
B, L, D, HEADS = 2, 6, 16, 4


def qkv(*shape: int, count: int = 3) -> list[Tensor]:
    return [torch.randn(*shape or (B, HEADS, L, 8)) for _ in range(count)]


def dense(mask: mk.ModularMask = MASK) -> Tensor:
    """The mask for unchanged models: bool [B, 1, L, L], padding rows opened (nobody looks at their output)."""
    seen = mask.visible(LAYOUT)
    return (seen | ~seen.any(-1, keepdim=True))[:, None]


def test_direct_calls() -> None:
    q, k, v = qkv()
    pseudo, bias = mk.PseudoAttention(0.1, 0.2), torch.randn(1, HEADS, 2, 2)
    expected = mk.moda_attention(q, k, v, layout=LAYOUT, mask=MASK, pseudo=pseudo, pair_bias=bias, scale=0.3)
    with mk.replace_sdpa(layout=LAYOUT, mask=MASK, pseudo=pseudo, pair_bias=bias) as replaced:
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, scale=0.3), expected)
        assert torch.equal(
            torch.nn.functional.scaled_dot_product_attention(q, k, v, None, 0.0, False, scale=0.3), expected
        )
        assert torch.equal(F.scaled_dot_product_attention(query=q, key=k, value=v, scale=0.3), expected)
    assert replaced.replaced == 3
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), mk.moda_attention(q, k, v))
    assert replaced.replaced == 3


def test_what_the_model_passes_stays() -> None:
    q, k, v = qkv()
    attn_mask = torch.rand(B, 1, L, L) < 0.8
    with mk.replace_sdpa(layout=LAYOUT, mask=MASK):
        masked = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        grouped = F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)
        with pytest.raises(NotImplementedError, match="dropout_p"):
            F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    assert torch.equal(masked, mk.moda_attention(q, k, v, attn_mask, layout=LAYOUT, mask=MASK))
    expected = mk.moda_attention(q, k[:, :2], v[:, :2], enable_gqa=True, layout=LAYOUT, mask=MASK)
    assert torch.equal(grouped, expected)


def test_is_causal() -> None:
    q, k, v = qkv()
    with mk.replace_sdpa(layout=LAYOUT):
        causal, full = (F.scaled_dot_product_attention(q, k, v, is_causal=c) for c in (True, False))
    assert torch.equal(causal, mk.moda_attention(q, k, v, layout=LAYOUT, is_causal=True))
    assert torch.equal(full, mk.moda_attention(q, k, v, layout=LAYOUT))
    with mk.replace_sdpa(layout=LAYOUT, mask=MASK):  # the mask takes its place
        both = [F.scaled_dot_product_attention(q, k, v, is_causal=c) for c in (True, False)]
    for out in both:
        assert torch.equal(out, mk.moda_attention(q, k, v, layout=LAYOUT, mask=MASK))


@pytest.mark.parametrize(
    ("q_shape", "shape"),
    [
        ((B, HEADS, L, 8), (B, HEADS, L + 1, 8)),
        ((B, HEADS, L, 8), (B, HEADS, L - 1, 8)),
        ((1, HEADS, L, 8), (1, HEADS, L, 8)),
        ((HEADS, L, 8), (HEADS, L, 8)),
        ((B, 1, HEADS, L, 8), (B, 1, HEADS, L, 8)),
    ],
)
def test_calls_that_do_not_fit_pass(q_shape: tuple[int, ...], shape: tuple[int, ...]) -> None:
    q, k, v = torch.randn(q_shape), torch.randn(shape), torch.randn(shape)
    with mk.replace_sdpa(layout=LAYOUT, mask=MASK) as replaced:
        out = F.scaled_dot_product_attention(q, k, v, scale=0.2)
        other = F.softmax(q, -1)
    assert replaced.replaced == 0
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, scale=0.2))
    assert torch.equal(other, F.softmax(q, -1))


def test_errors_of_calls_that_pass_are_those_of_torch() -> None:
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 3, 3, 4)
    with pytest.raises(RuntimeError) as theirs:
        F.scaled_dot_product_attention(q, k, k)
    with pytest.raises(RuntimeError) as ours, mk.replace_sdpa(layout=LAYOUT):
        F.scaled_dot_product_attention(q, k, k)
    assert str(ours.value) == str(theirs.value)


def test_fewer_queries_are_the_last_columns() -> None:
    q, k, v = qkv()
    with mk.replace_sdpa(layout=LAYOUT, mask=MASK):
        out = F.scaled_dot_product_attention(q[:, :, -2:], k, v)
    torch.testing.assert_close(out, mk.moda_attention(q, k, v, layout=LAYOUT, mask=MASK)[:, :, -2:])


def test_packed() -> None:
    layout = mk.segment_modalities(torch.tensor([0, 1, 1, 0, 0, 1, 1]), cu_seqlens=torch.tensor([0, 4, 7]))
    q, k, v = torch.randn(1, 4, 7, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    aligner = mk.DuplexAligner(8, 2, fusion="linear")
    nn.init.normal_(aligner.ratio)
    with mk.replace_sdpa(layout=layout, mask=MASK, key_map=aligner) as replaced:
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        F.scaled_dot_product_attention(q[:, :2].expand(2, -1, -1, -1), k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1))
    assert replaced.replaced == 1 and out.shape == q.shape
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    key_map = aligner(packed[1], layout)
    expected = mk.moda_attention(*packed, layout=layout, mask=MASK, key_map=key_map, enable_gqa=True)
    assert torch.equal(out[0].transpose(0, 1), expected)


def test_aligner_maps_the_keys_of_each_call() -> None:
    aligner = mk.DuplexAligner(8, 2, fusion="concat")
    nn.init.normal_(aligner.weight)
    inputs = [qkv(), qkv()]
    with mk.replace_sdpa(layout=LAYOUT, mask=MASK, key_map=aligner):
        outs = [F.scaled_dot_product_attention(*x) for x in inputs]
        outs[0].sum().backward()
    assert aligner.weight.grad is not None and bool(aligner.weight.grad.any())
    for (q, k, v), out in zip(inputs, outs, strict=True):
        expected = mk.moda_attention(q, k, v, layout=LAYOUT, mask=MASK, key_map=aligner(k, LAYOUT))
        assert torch.equal(out, expected)
    # A function, or a finished map.
    q, k, v = inputs[0]
    for key_map in (lambda key, layout: aligner(key, layout), aligner(k, LAYOUT)):
        with mk.replace_sdpa(layout=LAYOUT, mask=MASK, key_map=key_map):
            assert torch.equal(F.scaled_dot_product_attention(q, k, v), outs[0])


def test_layout_from_ids() -> None:
    q, k, v = qkv()
    with mk.replace_sdpa(layout=IDS, mask=MASK):
        assert torch.equal(
            F.scaled_dot_product_attention(q, k, v), mk.moda_attention(q, k, v, layout=LAYOUT, mask=MASK)
        )
    # With as many modalities as the mask has, whatever the ids.
    mode = mk.replace_sdpa(layout=torch.zeros(1, 3).long(), mask=mk.ModularMask.full(3))
    assert mode.layout.num_modalities == 3


# Blocks


def test_nested_blocks() -> None:
    q, k, v = qkv()
    other = mk.segment_modalities(torch.zeros(B, L + 2, dtype=torch.long))
    longer = qkv(B, HEADS, L + 2, 8)
    causal = mk.ModularMask.causal(2)
    with mk.replace_sdpa(layout=LAYOUT, mask=causal) as outer:
        with mk.replace_sdpa(layout=other, mask=mk.ModularMask.causal(1)) as middle:
            first = F.scaled_dot_product_attention(q, k, v)  # fits the outer one only
            second = F.scaled_dot_product_attention(*longer)
        with mk.replace_sdpa(layout=LAYOUT, mask=MASK) as inner:
            third = F.scaled_dot_product_attention(q, k, v)  # fits both: the inner one's
        fourth = F.scaled_dot_product_attention(q, k, v)
    assert (outer.replaced, middle.replaced, inner.replaced) == (2, 1, 1)
    assert torch.equal(first, mk.moda_attention(q, k, v, layout=LAYOUT, mask=causal))
    assert torch.equal(fourth, first)
    assert torch.equal(second, mk.moda_attention(*longer, layout=other, is_causal=True))
    assert torch.equal(third, mk.moda_attention(q, k, v, layout=LAYOUT, mask=MASK))


def test_nested_blocks_around_multihead_attention() -> None:
    x = torch.randn(B, L, D)
    attention = nn.MultiheadAttention(D, HEADS, batch_first=True)
    other = mk.segment_modalities(torch.zeros(B, L + 2, dtype=torch.long))
    for around, within, counts in ((LAYOUT, other, (1, 0)), (other, LAYOUT, (0, 1)), (LAYOUT, LAYOUT, (0, 1))):
        with mk.replace_sdpa(layout=around) as outer, mk.replace_sdpa(layout=within) as inner:
            attention(x, x, x, need_weights=False)
        assert (outer.replaced, inner.replaced) == counts


def test_an_exception_ends_the_block() -> None:
    q, k, v = qkv()
    before = F.multi_head_attention_forward
    with pytest.raises(KeyError), mk.replace_sdpa(layout=LAYOUT, mask=MASK):
        raise KeyError
    with pytest.raises(ValueError, match="enable_gqa"), mk.replace_sdpa(layout=LAYOUT, mask=MASK):
        F.scaled_dot_product_attention(q, k[:, :2], v[:, :2])
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), mk.moda_attention(q, k, v))
    assert F.multi_head_attention_forward is before


def test_a_block_can_be_used_again() -> None:
    q, k, v = qkv()
    mode = mk.replace_sdpa(layout=LAYOUT, mask=MASK)
    for _ in range(2):
        with mode:
            F.scaled_dot_product_attention(q, k, v)
    assert mode.replaced == 2


def test_calls_of_the_package_inside() -> None:
    """moda_attention with a layout of its own is not replaced once more."""
    q, k, v = qkv()
    causal = mk.ModularMask.causal(2)
    with mk.replace_sdpa(layout=LAYOUT, mask=MASK) as replaced:
        out = mk.moda_attention(q, k, v, layout=LAYOUT, mask=causal)
    assert replaced.replaced == 0
    assert torch.equal(out, mk.moda_attention(q, k, v, layout=LAYOUT, mask=causal))


def test_unknown_option() -> None:
    with pytest.raises(TypeError, match=r"replace_sdpa: expected options from mask, .*got scale, window"):
        mk.replace_sdpa(layout=LAYOUT, window=3, scale=1.0)
    with pytest.raises(TypeError, match=r"layout: expected a ModalityLayout.*got None"):
        mk.replace_sdpa(layout=None)  # type: ignore[arg-type]


# torch's layers


@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(batch_first: bool, train: bool, no_grad: bool) -> None:
    attention = nn.MultiheadAttention(D, HEADS, batch_first=batch_first).train(train)
    x = torch.randn(B, L, D)
    args = [x if batch_first else x.transpose(0, 1)] * 3
    with torch.set_grad_enabled(not no_grad):
        with mk.replace_sdpa(layout=LAYOUT, mask=MASK) as replaced:
            out, weights = attention(*args, need_weights=False)
        mask = ~dense().expand(-1, HEADS, -1, -1).flatten(0, 1)
        expected, _ = attention(*args, need_weights=False, attn_mask=mask)
    assert replaced.replaced == 1 and weights is None
    out, expected = (y if batch_first else y.transpose(0, 1) for y in (out, expected))
    torch.testing.assert_close(out[IDS >= 0], expected[IDS >= 0])


def test_multihead_attention_with_weights_is_left_alone() -> None:
    attention, x = nn.MultiheadAttention(D, HEADS, batch_first=True), torch.randn(B, L, D)
    with mk.replace_sdpa(layout=LAYOUT, mask=MASK) as replaced:
        out, weights = attention(x, x, x)
    assert replaced.replaced == 0
    torch.testing.assert_close((out, weights), attention(x, x, x))


def test_multihead_attention_with_key_padding_mask() -> None:
    attention, x = nn.MultiheadAttention(D, HEADS, batch_first=True), torch.randn(B, L, D)
    with mk.replace_sdpa(layout=LAYOUT, mask=MASK) as replaced:
        out, _ = attention(x, x, x, key_padding_mask=IDS < 0, need_weights=False)
        plain, _ = attention(x, x, x, need_weights=False)
    assert replaced.replaced == 2
    torch.testing.assert_close(out, plain)


@pytest.mark.parametrize("padding_mask", [False, True])
@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.parametrize("train", [True, False])
def test_transformer_encoder(train: bool, no_grad: bool, padding_mask: bool) -> None:
    layer = nn.TransformerEncoderLayer(D, HEADS, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).train(train)
    x = torch.randn(B, L, D)
    options: dict[str, Any] = {"src_key_padding_mask": IDS < 0} if padding_mask else {}
    with torch.set_grad_enabled(not no_grad):
        with mk.replace_sdpa(layout=LAYOUT, mask=MASK) as replaced:
            out = model(x, **options)
        expected = model(x, mask=~dense().expand(-1, HEADS, -1, -1).flatten(0, 1))
    assert replaced.replaced == 2
    torch.testing.assert_close(out[IDS >= 0], expected[IDS >= 0])
    if not no_grad:
        grads = [torch.autograd.grad(y[IDS >= 0].square().sum(), tuple(model.parameters())) for y in (out, expected)]
        torch.testing.assert_close(*grads)


class ViTBlock(nn.Module):
    """A block as vision models write it: fused qkv, SDPA by name with dropout only in training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
        self.drop = 0.0

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.drop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        x = x + self.proj(y.transpose(1, 2).reshape(b, n, d))
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize("mask", [MASK, mk.ModularMask.fusion(2, [0]), mk.ModularMask.full(2)])
def test_vit_block(mask: mk.ModularMask) -> None:
    block, x = ViTBlock(), torch.randn(B, L, D)
    with mk.replace_sdpa(layout=LAYOUT, mask=mask) as replaced:
        out = block(x)
    expected = block(x, dense(mask))
    assert replaced.replaced == 1
    torch.testing.assert_close(out[IDS >= 0], expected[IDS >= 0])
    grads = [torch.autograd.grad(y[IDS >= 0].square().sum(), tuple(block.parameters())) for y in (out, expected)]
    torch.testing.assert_close(*grads)


def test_fresh_aligners_change_nothing() -> None:
    block, x = ViTBlock(), torch.randn(B, L, D)
    with mk.replace_sdpa(layout=LAYOUT, key_map=mk.DuplexAligner(D // HEADS, 2, fusion="concat", scope="causal")):
        mapped = block(x)
    with mk.replace_sdpa(layout=LAYOUT):
        torch.testing.assert_close(mapped, block(x))


def test_low_precision_and_autocast() -> None:
    block, x = ViTBlock(), torch.randn(B, L, D)
    with mk.replace_sdpa(layout=LAYOUT, mask=MASK) as replaced, torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    assert replaced.replaced == 1
    exact = block(x, dense())
    assert float((out - exact)[IDS >= 0].detach().abs().max()) < 0.05 * float(exact.abs().max())
    with mk.replace_sdpa(layout=LAYOUT, mask=MASK):
        low = block.to(torch.bfloat16)(x.bfloat16())
    assert low.dtype == torch.bfloat16 and math.isfinite(float(low.sum()))
