"""MODA in a model of one's own: PyTorch alone, from patches and words to a trained decoder that generates.

    python examples/own_model.py

A row is an image of 16 patches, a question and an answer: which of scikit-learn's two photographs the crop is from, and
in which half of it. What to copy from here is `Block.forward`: segment the tokens once, let an aligner make a map of
the keys, and call `moda_attention` in the place of `scaled_dot_product_attention`. With a `DecodeState` the same block
decodes token by token, and gives what a full pass gives.
"""

import argparse
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import moda_kernels as mk

SIDE, PATCH = 32, 8
PATCHES = (SIDE // PATCH) ** 2
#: Words: a question, which photograph, which half.
QUESTION, PHOTOGRAPHS, HALVES, WORDS = 0, (1, 2), (3, 4), 5
TEXT, IMAGE = 0, 1
WIDTH, HEADS, KEY_HEADS, LAYERS = 64, 4, 2, 2


@dataclass
class Cache:
    """What a model keeps while it generates: keys and values of each layer, raw, and the state beside them."""

    state: mk.DecodeState
    keys: list[Tensor]
    values: list[Tensor]

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer == len(self.keys):
            self.keys.append(key)
            self.values.append(value)
        else:
            self.keys[layer] = torch.cat((self.keys[layer], key), 2)
            self.values[layer] = torch.cat((self.values[layer], value), 2)
        return self.keys[layer], self.values[layer]


class Block(nn.Module):
    """A decoder layer whose attention is MODA's."""

    def __init__(self) -> None:
        super().__init__()
        size = WIDTH // HEADS
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key, self.value = (nn.Linear(WIDTH, KEY_HEADS * size) for _ in range(2))
        self.aligner = mk.DuplexAligner(size, 2, fusion="concat", scope="causal")
        self.feed = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, layer: int, layout: mk.ModalityLayout, cache: Cache | None) -> Tensor:
        h = self.norms[0](x)
        q, k, v = (f(h).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for f in (self.query, self.key, self.value))
        # An image sees itself whole, all else what came before.
        mask = mk.ModularMask.bidirectional_within(2, [IMAGE])
        if cache is None:
            key_map = self.aligner(k, layout)
            a = mk.moda_attention(q, k, v, layout=layout, mask=mask, key_map=key_map, enable_gqa=True)
        else:
            k, v = cache.update(layer, k, v)
            state = cache.state[layer]
            key_map = self.aligner(k, state=state)
            a = mk.moda_attention(q, k, v, state=state, mask=mask, key_map=key_map, enable_gqa=True)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        fed: Tensor = x + self.feed(self.norms[1](x))
        return fed


class Model(nn.Module):
    """Patches and words in, scores of the next word out."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(3 * PATCH * PATCH, WIDTH)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(PATCHES + 8, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, images: Tensor | None, words: Tensor, cache: Cache | None = None) -> Tensor:
        """Scores after each new word.

        Args:
            images: ``[B, 3, S, S]``, before the words; None: there was one, and the cache has it.
            words: integer ``[B, n]``.
        """
        x = self.words(words)
        ids = torch.full_like(words, TEXT)
        if images is not None:
            cut = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
            x = torch.cat((self.patches(cut), x), 1)
            ids = F.pad(ids, (PATCHES, 0), value=IMAGE)
        begin = 0 if cache is None else cache.state.length
        x = x + self.places[begin : begin + x.shape[1]]
        # Once for all layers.
        layout = mk.segment_modalities(ids, num_modalities=2) if cache is None else cache.state.append(ids)
        for i, block in enumerate(self.blocks):
            x = block(x, i, layout, cache)
        scores: Tensor = self.head(x[:, -words.shape[1] :])
        return scores

    @torch.no_grad()
    def generate(self, images: Tensor, words: Tensor, count: int) -> Tensor:
        """Words ``[B, n + count]``."""
        cache = Cache(mk.DecodeState(num_modalities=2), [], [])
        new, given = words, images
        for _ in range(count):
            new = self(given, new, cache)[:, -1:].argmax(-1)
            words, given = torch.cat((words, new), 1), None  # type: ignore[assignment]
        return words


def crops(count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images ``[count, 3, S, S]`` and words ``[count, 3]`` about them."""
    photographs = [torch.tensor(x).permute(2, 0, 1) / 127.5 - 1 for x in load_sample_images().images]
    images, words = [], []
    for _ in range(count):
        which, half = torch.randint(2, (2,), generator=g).tolist()
        _, height, width = photographs[which].shape
        size = 3 * SIDE  # a crop of 96 × 96, seen at a third of its resolution
        top = int(torch.randint(height // 2 - size, (), generator=g)) + half * (height // 2)
        left = int(torch.randint(width - size, (), generator=g))
        images.append(photographs[which][:, top : top + size : 3, left : left + size : 3])
        words.append([QUESTION, PHOTOGRAPHS[which], HALVES[half]])
    return torch.stack(images), torch.tensor(words)


def train(steps: int, lr: float = 3e-3) -> tuple[Model, list[float]]:
    """A model and its losses."""
    torch.manual_seed(0)
    model, g = Model(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(mk.parameter_groups(model, lr=lr), weight_decay=0.01)
    losses = []
    for _ in range(steps):
        images, words = crops(16, g)
        scores = model(images, words[:, :-1])
        loss = F.cross_entropy(scores.flatten(0, 1), words[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def check(model: Model) -> float:
    """The share of right answers about new crops; what is generated has to be what a full pass says."""
    images, words = crops(64, torch.Generator().manual_seed(1))
    made = model.eval().generate(images, words[:, :1], 2)
    with torch.no_grad():
        full = model(images, made[:, :-1]).argmax(-1)
    if not torch.equal(made[:, 1:], full):
        raise SystemExit("what was generated is not what a full pass gives")
    return float((made[:, 1:] == words[:, 1:]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="default: %(default)s")
    options = parser.parse_args()
    model, losses = train(options.steps)
    print("loss: " + " ".join(f"{loss:.3f}" for loss in losses[:: max(options.steps // 10, 1)]))
    print(f"right answers about new crops: {check(model):.0%}")


if __name__ == "__main__":
    main()
