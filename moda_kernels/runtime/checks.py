"""Argument checks shared by every public function: one wording, one place.

Every message names the argument, what was expected and what came.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

INTEGER_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)

_PLAIN = (Tensor, torch.nn.Parameter)
#: Other kinds of tensors: what to give in their place.
_INSTEAD = {
    "NestedTensor": "documents of different lengths: a packed layout, made with cu_seqlens",
    "MaskedTensor": "its data, with modality -1 for what is hidden",
    "DTensor": "the part that is here: to_local()",
    "AsyncCollectiveTensor": "what it waits for: wait()",
    "CausalBias": "it is understood as attn_mask only",
}


def describe(value: Any) -> str:
    """Short description of a value for an error message."""
    if isinstance(value, Tensor):
        kind = "a tensor" if type(value) in _PLAIN else f"a {type(value).__name__}"
        # Sequences of different lengths have no shape.
        shown = "a nested tensor" if value.is_nested else f"{kind} of shape {tuple(value.shape)}"
        strided = "" if value.layout == torch.strided else f"{value.layout}, "
        return f"{shown}, {strided}{value.dtype}, {value.device}"
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:79] + '…'} ({type(value).__name__})"


def wrong_value(name: str, expected: str, got: Any) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {got if isinstance(got, str) else describe(got)}")


def wrong_type(name: str, expected: str, got: Any) -> TypeError:
    return TypeError(f"{name}: expected {expected}, got {describe(got)}")


def tensor(name: str, value: object) -> Tensor:
    """A tensor whose numbers lie in memory as its shape and strides say; another kind would be read as if they did."""
    if not isinstance(value, Tensor):
        raise wrong_type(name, "a tensor", value)
    kind = type(value)
    # These two stand for plain tensors while torch.compile and torch.export trace.
    if kind not in _PLAIN and not isinstance(value, FakeTensor | FunctionalTensor):
        instead = _INSTEAD.get(kind.__name__)
        raise wrong_type(name, "a plain torch.Tensor" + (f" ({instead})" if instead else ""), value)
    if value.is_nested:
        raise wrong_type(name, f"a plain torch.Tensor ({_INSTEAD['NestedTensor']})", value)
    if value.layout != torch.strided or value.is_quantized:
        raise wrong_type(name, "a dense tensor", value)
    if not torch.compiler.is_compiling() and torch._C._is_tracing():
        raise NotImplementedError(
            f"{name}: expected a call outside torch.jit.trace, which would keep what one layout has led to for all "
            "others (use torch.compile or torch.export), got a traced tensor"
        )
    return value


def is_causal_bias(value: object) -> bool:
    """Whether a value is torch's CausalBias. (Its module takes long to import; who has one has imported it.)"""
    module = None if type(value) in _PLAIN else sys.modules.get("torch.nn.attention.bias")
    return module is not None and isinstance(value, module.CausalBias)


def integer_tensor(name: str, value: object) -> Tensor:
    checked = tensor(name, value)
    if checked.dtype not in INTEGER_DTYPES:
        raise wrong_type(name, "an integer tensor", value)
    return checked


def float_tensor(name: str, value: object) -> Tensor:
    checked = tensor(name, value)
    if not checked.is_floating_point():
        raise wrong_type(name, "a floating-point tensor", value)
    return checked


def integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    # torch.SymInt is what a traced length is: it must pass, a bool must not.
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise wrong_type(name, "an int", value)
    number: int = value  # type: ignore[assignment]
    if number < minimum or (maximum is not None and number > maximum):
        bound = f">= {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise wrong_value(name, f"an int {bound}", value)
    return number


def shape(name: str, value: Tensor, expected: Sequence[int], axes: str) -> None:
    if tuple(value.shape) != tuple(expected):
        raise wrong_value(name, f"shape {axes} = {tuple(expected)}", value)


def same_device(name: str, value: Tensor, device: torch.device, like: str) -> None:
    if value.device != device:
        raise wrong_value(name, f"a tensor on {device}, where {like} is", value)
    has_numbers(name, value)


def has_numbers(name: str, value: Tensor) -> None:
    """A tensor on the meta device has a shape alone."""
    if value.device.type == "meta":
        raise wrong_value(name, "a tensor with numbers (for shapes alone: torch.compile or torch.export)", value)


def looks_at_values(device: torch.device) -> bool:
    """Whether numbers inside tensors are looked at: on the CPU, and not while a compiler traces, which has none."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def choice(name: str, value: object, options: Iterable[str]) -> str:
    options = tuple(options)
    if not isinstance(value, str) or value not in options:
        raise wrong_value(name, "one of " + ", ".join(map(repr, options)), describe(value))
    return value


def modality_indices(name: str, values: Iterable[int], num_modalities: int) -> tuple[int, ...]:
    """Sorted, distinct modality indices."""
    if isinstance(values, int) or not isinstance(values, Iterable):
        raise wrong_type(name, "an iterable of modality indices", values)
    return tuple(sorted({integer(f"{name} (an entry)", v, 0, num_modalities - 1) for v in values}))
