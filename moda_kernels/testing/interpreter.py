"""Triton's interpreter, which runs the kernels on the CPU, as the tests need it: in less of its time, and with every
NumPy. These are corrections of Triton itself; where it has changed beyond them it is left as it is.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from moda_kernels.runtime import gpu


@functools.cache
def prepare() -> None:
    """Correct the interpreter, if kernels run in it in this process."""
    if gpu.why_absent() or not gpu.interpreted():
        return
    from triton.runtime import interpreter

    if hasattr(interpreter, "InterpretedFunction") and hasattr(interpreter, "InterpreterError"):
        _look_up_once(interpreter)
    if hasattr(interpreter, "_patch_lang_tensor"):
        _index_by_one_number(interpreter)
    if hasattr(interpreter, "_get_np_dtype"):
        _name_dtypes_once(interpreter)


@contextlib.contextmanager
def unchecked_integers() -> Iterator[None]:
    """Within the block the interpreter doesn't do all integer arithmetic a second time in 64 bits, to see whether 32
    were enough: a third of its time. For calls too small to overflow anything."""
    from triton.runtime import interpreter

    builder: Any = getattr(interpreter, "interpreter_builder", None)
    options: Any = getattr(builder, "options", None)
    if not hasattr(options, "sanitize_overflow"):
        yield
        return
    builder.options = dataclasses.replace(options, sanitize_overflow=False)
    try:
        yield
    finally:
        builder.options = options


def _look_up_once(interpreter: Any) -> None:
    """A launch replaces what `triton.language` has in it, and looks all of it up again whenever a kernel calls a
    function. Once is enough for all functions of a module."""
    function = interpreter.InterpretedFunction
    call, modules = function.__call__, set()

    def call_again(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in modules:
            modules.add(self.fn.__module__)
            return call(self, *args, **kwargs)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    function.__call__ = call_again


def _index_by_one_number(interpreter: Any) -> None:
    """Triton 3.6 makes an index of an array of one number, which NumPy 2.5 refuses."""
    patch = interpreter._patch_lang_tensor

    def patch_and_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_index


def _name_dtypes_once(interpreter: Any) -> None:
    """The NumPy type of a Triton type is looked up in a table that is made for each operation anew."""
    look_up, known = interpreter._get_np_dtype, {}

    def recall(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = look_up(dtype)
        return known[name]

    interpreter._get_np_dtype = recall
