"""Wrong arguments of the aligner and its maps: every message names the argument, what was expected and what came."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import moda_kernels as mk

D = 4


def batch(*rows: list[int], m: int) -> mk.ModalityLayout:
    return mk.segment_modalities(torch.tensor(rows), num_modalities=m)


def packed(ids: list[int], bounds: list[int], m: int) -> mk.ModalityLayout:
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    return mk.segment_modalities(torch.tensor(ids), num_modalities=m, cu_seqlens=cu_seqlens)


BATCH, KEY = batch([0, 1, 1, 0], m=2), torch.randn(1, 2, 4, D)
TWO_ROWS = batch([0, 1, 1, 0], [0, 0, 1, 1], m=2)
LONGER, OF_THREE = batch([0, 1, 1, 0, 1], m=2), batch([0, 1, 1, 0], m=3)
MODULE, CAUSAL = mk.DuplexAligner(D, 2), mk.DuplexAligner(D, 2, scope="causal")
KEY_MAP = MODULE(KEY, BATCH)


def attend(key_map: object, layout: mk.ModalityLayout = BATCH, key: Tensor = KEY) -> Tensor:
    return mk.moda_attention(key, key, key, layout=layout, key_map=key_map)


ERRORS: dict[str, tuple[Callable[[], object], type[Exception], list[str]]] = {
    "fusion": (lambda: mk.DuplexAligner(D, 2, fusion="sum"), ValueError, ["fusion", "'add'", "'concat'", "got 'sum'"]),
    "fusion type": (lambda: mk.DuplexAligner(D, 2, fusion=3), ValueError, ["fusion", "'linear'", "3"]),
    "norm": (lambda: mk.DuplexAligner(D, 2, norm="l2"), ValueError, ["norm", "'row'", "'frobenius'", "got 'l2'"]),
    "scope": (lambda: mk.DuplexAligner(D, 2, scope="past"), ValueError, ["scope", "'causal'", "got 'past'"]),
    "aligned range": (lambda: mk.DuplexAligner(D, 2, aligned=[2]), ValueError, ["aligned", "0 to 1", "2"]),
    "aligned negative": (lambda: mk.DuplexAligner(D, 2, aligned=[-1]), ValueError, ["aligned", "0 to 1", "-1"]),
    "renorm": (lambda: mk.DuplexAligner(D, 2, renorm=1), TypeError, ["renorm", "a bool", "1"]),
    "aligned type": (lambda: mk.DuplexAligner(D, 2, aligned=1), TypeError, ["aligned", "iterable", "1"]),
    "aligned entry": (lambda: mk.DuplexAligner(D, 2, aligned=["v"]), TypeError, ["aligned", "int", "'v'"]),
    "head_dim": (lambda: mk.DuplexAligner(0, 2), ValueError, ["head_dim", ">= 1", "0"]),
    "head_dim type": (lambda: mk.DuplexAligner(4.0, 2), TypeError, ["head_dim", "int", "4.0"]),
    "num_modalities": (lambda: mk.DuplexAligner(D, 0), ValueError, ["num_modalities", ">= 1", "0"]),
    "num_modalities type": (lambda: mk.DuplexAligner(D, True), TypeError, ["num_modalities", "int", "True"]),
    "head size of the key": (lambda: MODULE(torch.randn(1, 2, 4, 5), BATCH), ValueError, ["key", "4", "5"]),
    "length of the key": (lambda: MODULE(torch.randn(1, 2, 5, D), BATCH), ValueError, ["key", "L = 4", "5"]),
    "rank of the key": (lambda: MODULE(torch.randn(4, 2, D), BATCH), ValueError, ["key", "[B, H, L, D]", "(4, 2, 4)"]),
    "packed key": (
        lambda: MODULE(KEY, packed([0, 1, 1, 0], [0, 4], 2)),
        ValueError,
        ["key", "[T, H, D]", "(1, 2, 4, 4)"],
    ),
    "integer key": (lambda: MODULE(KEY.int(), BATCH), TypeError, ["key", "floating-point", "int32"]),
    "no key": (lambda: MODULE(None, BATCH), TypeError, ["key", "tensor", "None"]),
    "device": (lambda: MODULE(KEY.to("meta"), BATCH), ValueError, ["key", "cpu", "meta"]),
    "modalities of the layout": (lambda: MODULE(KEY, OF_THREE), ValueError, ["layout", "2 modalities", "3"]),
    "layout type": (lambda: MODULE(KEY, [[0, 1, 1, 0]]), TypeError, ["layout", "ModalityLayout", "list"]),
    "packed ids": (lambda: MODULE(KEY, torch.zeros(4, dtype=torch.int32)), ValueError, ["layout", "[B, L]", "(4,)"]),
    "key_map type": (lambda: mk.align_keys(KEY, MODULE, BATCH), TypeError, ["key_map", "KeyMap", "DuplexAligner"]),
    "key_map type, attention": (lambda: attend(MODULE), TypeError, ["key_map", "KeyMap", "DuplexAligner"]),
    "key_map heads": (lambda: mk.align_keys(KEY[:, :1], KEY_MAP, BATCH), ValueError, ["key_map", "1 key heads", "2"]),
    "key_map heads, attention": (lambda: attend(KEY_MAP, key=KEY[:, :1]), ValueError, ["key_map", "1 key heads", "2"]),
    "key_map head size": (lambda: attend(KEY_MAP, key=torch.randn(1, 2, 4, 6)), ValueError, ["key_map", "6", "4"]),
    "key_map rows": (lambda: attend(KEY_MAP, TWO_ROWS, torch.randn(2, 2, 4, D)), ValueError, ["key_map", "2 x 4", "1"]),
    "key_map modalities": (lambda: attend(KEY_MAP, OF_THREE), ValueError, ["key_map", "3 modalities", "2"]),
    "causal key_map, length": (
        lambda: mk.align_keys(torch.randn(1, 2, 5, D), CAUSAL(KEY, BATCH), LONGER),
        ValueError,
        ["key_map", "1 x 5", "batch of 1 x 4"],
    ),
    "causal key_map, length, attention": (
        lambda: attend(CAUSAL(KEY, BATCH), LONGER, torch.randn(1, 2, 5, D)),
        ValueError,
        ["key_map", "1 x 5", "batch of 1 x 4"],
    ),
    "causal key_map, packing": (
        lambda: attend(CAUSAL(KEY, BATCH), packed([0, 1, 1, 0], [0, 4], 2), KEY[0].transpose(0, 1)),
        ValueError,
        ["key_map", "packed", "batch of 1 x 4"],
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str, refused: Callable[..., None]) -> None:
    refused(*ERRORS[name])
