"""The demo's model: a small decoder over text and image patches whose attention is `moda_attention`.

All variants are this one class with the same initial weights; a `Variant` says which mask its attention gets and how
its keys are aligned. A fresh aligner changes nothing, so variants of one mask start as the same function.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda_kernels.alignment.aligner import DuplexAligner
from moda_kernels.alignment.maps import KeyMap
from moda_kernels.attention import moda_attention
from moda_kernels.commands.demo.data import IMAGE, MODALITIES, PIXELS, WORDS, Batch
from moda_kernels.diagnostics import keys_of_another_document
from moda_kernels.tokens.mask import ModularMask
from moda_kernels.tokens.pseudo import PseudoAttention

WIDTH, HEADS, KEY_HEADS, HEAD_DIM = 64, 4, 2, 16
POSITIONS = 64
CAUSAL = ModularMask.causal(len(MODALITIES))
IMAGES_WHOLE = ModularMask.bidirectional_within(len(MODALITIES), [IMAGE])


@dataclass(frozen=True)
class Variant:
    """What the attention of one trained model is like.

    Attributes:
        name: in tables. label: what else there is to say, for readers.
        mask: who sees whom.
        gram: whose Gram sums align keys: "own" (MODA), "another" document's, or "none" (the aligner's weights alone);
            None: no alignment at all.
        fusion, norm, renorm, scope: of the aligner. rate: of its weights' learning rate, a part of the others'.
        pseudo: learned pseudo scores, over 64 tokens. pair_bias: a learned bias per pair of modalities.
    """

    name: str
    label: str
    mask: ModularMask = CAUSAL
    gram: str | None = None
    fusion: str = "concat"
    norm: str = "row"
    renorm: bool = False
    scope: str = "causal"
    rate: float = 1.0
    pseudo: bool = False
    pair_bias: bool = False


PLAIN = Variant("plain", "causal attention")
MODA = Variant(
    "MODA", "the same, keys aligned through the Gram matrix of earlier tokens of the other modality", gram="own"
)
CONTROL = Variant("control", "MODA, but with the Gram matrix of another document", gram="another")
MASK_ALONE = Variant("mask alone", "the patches of an image see each other both ways (modular mask)", IMAGES_WHOLE)
MASK_AND_MODA = Variant("mask and MODA", "that mask, and aligned keys", IMAGES_WHOLE, "own")


@dataclass(frozen=True, eq=False)
class LayerTrace:
    """What one layer's attention was called with: for attention shares and maps."""

    query: Tensor
    key: Tensor
    key_map: KeyMap | None
    pair_bias: Tensor | None
    pseudo: PseudoAttention | None


class Attention(nn.Module):
    """Grouped-query attention over packed documents."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        self.project = nn.Linear(WIDTH, (HEADS + 2 * KEY_HEADS) * HEAD_DIM, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)
        v, modalities = variant, len(MODALITIES)
        self.aligner = None
        if v.gram is not None:
            fusion = "linear" if v.gram == "none" else v.fusion
            self.aligner = DuplexAligner(
                HEAD_DIM, modalities, fusion=fusion, norm=v.norm, scope=v.scope, renorm=v.renorm
            )
            if v.gram == "none" and self.aligner.ratio is not None:
                self.aligner.ratio.requires_grad_(False)  # at 0: k' = k Wᵀ
        self.pair_bias = nn.Parameter(torch.zeros(1, HEADS, modalities, modalities)) if v.pair_bias else None
        self.base = nn.Parameter(torch.zeros(HEADS)) if v.pseudo else None
        self.decay = nn.Parameter(torch.full((HEADS,), 0.5)) if v.pseudo else None

    def forward(self, x: Tensor, batch: Batch, backend: str | None, trace: list[LayerTrace] | None) -> Tensor:
        heads = self.project(x).unflatten(-1, (-1, HEAD_DIM))
        query, key, value = heads.split((HEADS, KEY_HEADS, KEY_HEADS), dim=1)
        # Queries and keys of one length: the Gram matrices of the keys then have one scale throughout training.
        query, key = (F.rms_norm(x, (HEAD_DIM,)) for x in (query, key))
        layout, key_map, pseudo = batch.layout, None, None
        if self.aligner is not None:
            source = keys_of_another_document(key, layout) if self.variant.gram == "another" else key
            key_map = self.aligner(source, layout)
        if self.base is not None and self.decay is not None:
            pseudo = PseudoAttention(self.base, self.decay.clamp(min=1e-3), length=POSITIONS)
        if trace is not None:
            trace.append(LayerTrace(query, key, key_map, self.pair_bias, pseudo))
        out = moda_attention(
            query,
            key,
            value,
            enable_gqa=True,
            layout=layout,
            mask=self.variant.mask,
            key_map=key_map,
            pair_bias=self.pair_bias,
            pseudo=pseudo,
            backend=backend,
        )
        mixed: Tensor = self.out(out.flatten(1))
        return mixed


class Layer(nn.Module):
    """Attention and a feed-forward network, each on normed input and added."""

    def __init__(self, variant: Variant, layers: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.attention = Attention(variant)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        # What is added to x starts small.
        for last in (self.attention.out, self.mlp[-1]):
            assert isinstance(last, nn.Linear)
            nn.init.normal_(last.weight, std=1 / math.sqrt(layers * last.in_features))

    def forward(self, x: Tensor, batch: Batch, backend: str | None, trace: list[LayerTrace] | None) -> Tensor:
        x = x + self.attention(self.norms[0](x), batch, backend, trace)
        added: Tensor = self.mlp(self.norms[1](x))
        return x + added


class Decoder(nn.Module):
    """Predicts the next word of documents with images.

    Args:
        seed: of the initial weights, which are the same for all variants. layers: how many.
    """

    def __init__(self, seed: int, variant: Variant, layers: int) -> None:
        super().__init__()
        self.variant = variant
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.words = nn.Embedding(len(WORDS), WIDTH)
            self.patches = nn.Linear(PIXELS, WIDTH)
            self.positions = nn.Embedding(POSITIONS, WIDTH)
            self.layers = nn.ModuleList([Layer(variant, layers) for _ in range(layers)])
            self.norm = nn.LayerNorm(WIDTH)
            for table in (self.words, self.positions):
                nn.init.normal_(table.weight, std=0.5)
            self.head = nn.Linear(WIDTH, len(WORDS))

    def forward(self, batch: Batch, backend: str | None = None, trace: list[LayerTrace] | None = None) -> Tensor:
        """Scores of the words that may come next, ``[P, words]``, at the tokens ``batch.source``.

        Args:
            trace: gets one `LayerTrace` per layer.
        """
        image = (batch.layout.modality == IMAGE)[:, None]
        x = torch.where(image, self.patches(batch.pixels), self.words(batch.words))
        x = x + self.positions(batch.layout.position.long())
        for layer in self.layers:
            x = layer(x, batch, backend, trace)
        scores: Tensor = self.head(self.norm(x[batch.source]))
        return scores
