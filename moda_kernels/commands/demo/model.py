"""The demo's model: a small decoder over text and image patches whose attention is `moda_attention`.

All variants are this one class with the same weights; a `Variant` says which mask its attention gets and whether keys
are aligned. A fresh aligner changes nothing, so "mask alone" and "MODA" start as the same function.
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
from moda_kernels.tokens.mask import ModularMask

LAYERS, WIDTH, HEADS, KEY_HEADS, HEAD_DIM = 2, 64, 4, 2, 16
POSITIONS = 64


@dataclass(frozen=True)
class Variant:
    """What the attention of one trained model is like."""

    name: str
    mask: ModularMask
    aligned: bool


VARIANTS = (
    Variant("plain", ModularMask.causal(len(MODALITIES)), aligned=False),
    Variant("mask alone", ModularMask.bidirectional_within(len(MODALITIES), [IMAGE]), aligned=False),
    Variant("MODA", ModularMask.bidirectional_within(len(MODALITIES), [IMAGE]), aligned=True),
)


@dataclass(frozen=True, eq=False)
class LayerTrace:
    """What one layer's attention was called with: for attention shares and maps."""

    query: Tensor
    key: Tensor
    key_map: KeyMap | None


class Attention(nn.Module):
    """Grouped-query attention over packed documents."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, (HEADS + 2 * KEY_HEADS) * HEAD_DIM, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)
        self.aligner = DuplexAligner(HEAD_DIM, len(MODALITIES), fusion="concat", scope="causal")

    def forward(
        self, x: Tensor, batch: Batch, variant: Variant, backend: str | None, trace: list[LayerTrace] | None
    ) -> Tensor:
        heads = self.project(x).unflatten(-1, (-1, HEAD_DIM))
        query, key, value = heads.split((HEADS, KEY_HEADS, KEY_HEADS), dim=1)
        # Queries and keys of one length: the Gram matrices of the keys then have one scale throughout training.
        query, key = (F.rms_norm(x, (HEAD_DIM,)) for x in (query, key))
        key_map = self.aligner(key, batch.layout) if variant.aligned else None
        if trace is not None:
            trace.append(LayerTrace(query, key, key_map))
        out = moda_attention(
            query,
            key,
            value,
            enable_gqa=True,
            layout=batch.layout,
            mask=variant.mask,
            key_map=key_map,
            backend=backend,
        )
        mixed: Tensor = self.out(out.flatten(1))
        return mixed


class Layer(nn.Module):
    """Attention and a feed-forward network, each on normed input and added."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        # What is added to x starts small.
        for last in (self.attention.out, self.mlp[-1]):
            assert isinstance(last, nn.Linear)
            nn.init.normal_(last.weight, std=1 / math.sqrt(LAYERS * last.in_features))

    def forward(
        self, x: Tensor, batch: Batch, variant: Variant, backend: str | None, trace: list[LayerTrace] | None
    ) -> Tensor:
        x = x + self.attention(self.norms[0](x), batch, variant, backend, trace)
        added: Tensor = self.mlp(self.norms[1](x))
        return x + added


class Decoder(nn.Module):
    """Predicts the next word of documents with images.

    Args:
        seed: of the initial weights.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.words = nn.Embedding(len(WORDS), WIDTH)
            self.patches = nn.Linear(PIXELS, WIDTH)
            self.positions = nn.Embedding(POSITIONS, WIDTH)
            self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])
            self.norm = nn.LayerNorm(WIDTH)
            for table in (self.words, self.positions):
                nn.init.normal_(table.weight, std=0.5)
            self.head = nn.Linear(WIDTH, len(WORDS))

    def forward(
        self, batch: Batch, variant: Variant, backend: str | None = None, trace: list[LayerTrace] | None = None
    ) -> Tensor:
        """Scores of the words that may come next, ``[P, words]``, at the tokens ``batch.source``.

        Args:
            trace: gets one `LayerTrace` per layer.
        """
        image = (batch.layout.modality == IMAGE)[:, None]
        x = torch.where(image, self.patches(batch.pixels), self.words(batch.words))
        x = x + self.positions(batch.layout.position.long())
        for layer in self.layers:
            x = layer(x, batch, variant, backend, trace)
        scores: Tensor = self.head(self.norm(x[batch.source]))
        return scores

    def used_parameters(self, variant: Variant) -> int:
        """Numbers that the variant trains: the aligners' only where keys are aligned."""
        return sum(p.numel() for name, p in self.named_parameters() if variant.aligned or "aligner" not in name)
