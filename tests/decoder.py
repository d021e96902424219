"""What drives the decoding tests: one layer beside its cache, step by step, held to full passes."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import moda_kernels as mk

NEAR = {"rtol": 1e-10, "atol": 1e-12}
#: Head size, modalities, roles.
D, M, R = 8, 3, 3


class Decoder:
    """One attention layer and its cache, and a full pass over the raw keys to compare with."""

    def __init__(
        self,
        kind: str,
        *,
        batch: int = 2,
        undo: int = 2,
        columns: Callable[[int, int], int] = lambda length, new: length,
        dtype: torch.dtype = torch.float64,
        renorm: bool = False,
        told: bool = False,
        **options: Any,
    ) -> None:
        """`told`: tokens have roles, steps and chunks, drawn with each step."""
        self.kind, self.columns, self.options = kind, columns, {"is_causal": True} | options
        if "mask" in options:
            self.options["is_causal"] = False
        self.told = told
        self.state = mk.DecodeState(M, num_roles=R if told else None, undo=undo)
        self.ratio, self.weight = torch.randn(D, dtype=dtype), torch.randn(D, D, dtype=dtype)
        self.aligner = mk.DuplexAligner(
            D,
            M,
            fusion="concat",
            scope="sequence" if kind == "released" else kind,
            dtype=dtype,
            renorm=renorm,
            source_roles=(0, 2) if told else None,
        )
        with torch.no_grad():
            for parameter in self.aligner.parameters():
                parameter += 0.5 * torch.randn_like(parameter)
        self.aligner.requires_grad_(False)
        self.ids = torch.zeros(batch, 0, dtype=torch.long)
        self.facts = dict.fromkeys(("roles", "steps", "chunks") if told else (), self.ids)
        self.qkv = [torch.zeros(batch, heads, 0, D, dtype=dtype) for heads in (4, 2, 2)]
        self.gone = 0  # keys before this column are not to be looked at

    def map(self, key: Tensor, value: Tensor, **where: Any) -> mk.KeyMap:
        if self.kind == "released":
            return mk.released_key_map(key, value, where.pop("layout", None), self.ratio, self.weight, **where)
        return self.aligner(key, **where)

    def full(self) -> Tensor:
        roles = R if self.told else None
        layout = mk.segment_modalities(self.ids, num_modalities=M, num_roles=roles, **self.facts)
        query, key, value = self.qkv
        key_map = self.map(key, value, layout=layout)
        return mk.moda_attention(query, key, value, layout=layout, key_map=key_map, enable_gqa=True, **self.options)

    def cached(self, new: int) -> tuple[Tensor, Tensor]:
        """What a cache gives; what it does not hold any more is NaN, what it never had, too."""
        length = self.ids.shape[1]
        columns = self.columns(length, new)
        _, key, value = self.qkv
        if columns > length:
            return tuple(torch.nn.functional.pad(x, (0, 0, 0, columns - length), value=math.nan) for x in (key, value))
        return key[:, :, length - columns :], value[:, :, length - columns :]

    def step(self, ids: Tensor) -> None:
        """Decode, and compare."""
        new = ids.shape[1]
        self.ids = torch.cat((self.ids, ids), 1)
        for i, x in enumerate(self.qkv):
            self.qkv[i] = torch.cat((x, torch.randn(len(ids), x.shape[1], new, D, dtype=x.dtype)), 2)
        told = drawn(self.facts, ids) if self.told else {}
        self.facts = {name: torch.cat((fact, told[name]), 1) for name, fact in self.facts.items()}
        self.state.append(ids, **told)
        self.check(new)

    def check(self, new: int) -> None:
        key, value = self.cached(new)
        key_map = self.map(self.hidden(key, new), value, state=self.state[0])
        query = self.qkv[0][:, :, -new:]
        out = mk.moda_attention(
            query, key, value, state=self.state, key_map=key_map, enable_gqa=True, **self.options
        )  # fmt: skip
        near = NEAR if out.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(out, self.full()[:, :, -new:], **near)

    def hidden(self, key: Tensor, new: int) -> Tensor:
        """The cache's keys with NaN where they are not to be read."""
        old = key.shape[2] - new - max(key.shape[2] - self.ids.shape[1], 0)
        hidden = key.clone()
        hidden[:, :, : min(old, self.gone)] = math.nan
        return hidden

    def reorder(self, beam_idx: Tensor) -> None:
        self.state.reorder(beam_idx)
        self.ids, self.qkv = self.ids[beam_idx], [x[beam_idx] for x in self.qkv]
        self.facts = {name: fact[beam_idx] for name, fact in self.facts.items()}

    def crop(self, length: int) -> None:
        self.state.crop(length)
        self.ids, self.qkv = self.ids[:, :length], [x[:, :, :length] for x in self.qkv]
        self.facts = {name: fact[:, :length] for name, fact in self.facts.items()}


def drawn(facts: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """Roles, steps and chunks of new tokens, which go on with those before or not."""
    roles, chunks = torch.randint(R, ids.shape), torch.randint(-1, 3, ids.shape)
    before = facts["chunks"][:, -1:] if facts["chunks"].shape[1] else chunks[:, :1]
    for column in range(ids.shape[1]):
        goes_on = torch.rand(len(ids)) < 0.7
        chunks[:, column] = torch.where(goes_on, before[:, 0], chunks[:, column])
        before = chunks[:, column : column + 1]
    least = facts["steps"].amax(1, keepdim=True) if facts["steps"].shape[1] else torch.zeros(len(ids), 1).long()
    return {"roles": roles, "steps": least + torch.randint(2, ids.shape).cumsum(1), "chunks": chunks}


def prompt(length: int = 10, batch: int = 2) -> Tensor:
    ids = torch.randint(M, (batch, -(-length // 3))).repeat_interleave(3, 1)[:, :length]
    ids[0, :2] = -1
    return ids


def token(batch: int = 2) -> Tensor:
    return torch.randint(-1, M, (batch, 1))
