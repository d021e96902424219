"""`replace_sdpa`: MODA attention in models that nobody rewrote, through the SDPA calls that they make.

A mode of torch belongs to one thread and ends with its block, but a block's calls don't: checkpointing makes some of
them again while gradients are computed, on threads of autograd's, and models start threads of their own. So each region
that runs elsewhere, or later, takes the blocks along in which it was begun (`_carrying`).
"""

import functools
import inspect
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint as checkpointing
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.overrides import TorchFunctionMode

from moda_kernels.alignment.maps import KeyMap
from moda_kernels.attention import moda_attention
from moda_kernels.runtime import checks
from moda_kernels.tokens.layout import ModalityLayout
from moda_kernels.tokens.segments import as_layout

KeyMapMaker = Callable[[Tensor, ModalityLayout], KeyMap]
_OPTIONS = ("mask", "key_map", "pair_bias", "pseudo", "duplex", "branch_weights", "backend")


class replace_sdpa(TorchFunctionMode):  # noqa: N801 - used as a function in a with statement
    """Within the block, SDPA calls whose keys fit the layout become :func:`moda_attention`; all others pass untouched.

    ::

        with mk.replace_sdpa(layout=layout, mask=mk.ModularMask.bidirectional_within(2, [1])):
            model(x)

    A call fits where its key and value are ``[B, H, L, D]`` with the layout's B and L (packed: ``[1, H, T, D]``), and
    its queries are no more than its keys. What the model passes to SDPA stays in force (attn_mask, dropout_p, scale,
    enable_gqa), but ``mask`` here takes the place of the call's ``is_causal``. Fewer queries than keys are the last
    columns; with ``is_causal`` they are the first ones, as in torch. ``torch.nn.MultiheadAttention`` and the layers
    made of it are covered (need_weights must be False: with weights they don't call SDPA).

    A bare SDPA call doesn't say whether its keys are the tokens of its queries. Where a model also attends to a memory
    that is as long as the layout (cross-attention), name the modules that are meant: ``within=model.encoder``.
    ``MultiheadAttention`` says it: where its query is not its key, it is left alone, unless ``within`` names it.

    Whatever is begun in the block belongs to it: what ``torch.utils.checkpoint`` (both kinds) computes again in the
    backward pass, threads that are started and work that is submitted to a ``ThreadPoolExecutor``. Work that was begun
    outside stays outside, also where its backward pass runs in the block. Functions under ``torch.compile`` run
    uncompiled, since torch forgets modes where it compiles checkpointing. (Transforms of ``torch.func`` are replaced
    in, but not within an ``autograd.Function`` there: torch turns modes off in it.)

    Args:
        layout: a ModalityLayout, or modality ids ``[B, L]``.
        within: modules; only calls that their ``forward`` makes are meant. Default: all calls.
        mask, pair_bias, pseudo, duplex, branch_weights, backend: as in :func:`moda_attention`.
        key_map: as there, or a function (key, layout) -> KeyMap, such as a :class:`DuplexAligner`, called with the keys
            of each call.

    Attributes:
        replaced: how many calls have become moda_attention. Those that checkpointing makes again don't count.

    Raises:
        TypeError: an unknown option, ``within`` that isn't modules. Inside the block: what :func:`moda_attention`
            raises. NotImplementedError: a block within a compiled function. Inside the block:
            ``torch.nn.DataParallel`` on several devices; calls within an ``autograd.Function`` (other checkpointing
            than torch's).
    """

    def __init__(
        self, *, layout: ModalityLayout | Tensor, within: nn.Module | Iterable[nn.Module] | None = None, **options: Any
    ) -> None:
        super().__init__()
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:
            raise TypeError(f"replace_sdpa: expected options from {', '.join(_OPTIONS)}, got {', '.join(unknown)}")
        self.layout = as_layout(layout, getattr(options.get("mask"), "num_roles", None))
        self.within = None if within is None else _modules(within)
        self.options = options
        self.replaced = 0

    def __enter__(self) -> "replace_sdpa":
        if get_eval_frame_callback() is not None:  # (the compiler can't look into this, and so comes here to ask)
            raise NotImplementedError(
                "replace_sdpa: a block within a function under torch.compile; enter it around the call of that function"
            )
        _follow()
        _eager.begin()
        self._begin(_Entry(self, counts=True))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._end()
        _eager.end()

    def _begin(self, entry: "_Entry") -> None:
        entry.watch()
        _thread.entries.append(entry)
        super().__enter__()

    def _end(self) -> None:
        super().__exit__(None, None, None)
        entry = _thread.entries.pop()
        if entry is not None:
            entry.unwatch()

    def __torch_function__(
        self, func: Callable[..., Any], kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._sdpa(*args, **kwargs)
        if func is F.multi_head_attention_forward and (self.within is not None or _same_memory(*args[:2])):
            return self._multi_head_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _fits(self, query: Any, key: Any, value: Any) -> bool:
        if not all(isinstance(t, Tensor) and t.dim() == 4 for t in (query, key, value)):
            return False
        shape = (1, self.layout.num_tokens) if self.layout.packed else tuple(self.layout.modality.shape)
        return all((t.shape[0], t.shape[2]) == shape for t in (key, value)) and (
            query.shape[0] == shape[0] and query.shape[2] <= shape[1]
        )

    def _sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        entry = next((entry for entry in _entries() if entry.mode is self), None)
        outside = entry is None or (self.within is not None and not entry.inside)
        if entry is None or outside or not self._fits(query, key, value):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        _refuse_own_gradients()
        options = dict(self.options)
        if self.layout.packed:
            query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
        if callable(options.get("key_map")) and not isinstance(options["key_map"], KeyMap):
            options["key_map"] = options["key_map"](key, self.layout)
        if is_causal and not self.layout.packed and query.shape[2] < key.shape[2]:
            options["query_start"] = 0
        is_causal = is_causal and options.get("mask") is None
        entry.mode.replaced += entry.counts
        out = moda_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, layout=self.layout, **options
        )
        assert isinstance(out, Tensor)
        return out.transpose(0, 1)[None] if self.layout.packed else out

    def _multi_head_attention(self, *args: Any, **kwargs: Any) -> Any:
        # A mode doesn't see calls made inside a function that it is asked about, and this Python function hides its
        # SDPA call so. Run a copy of it whose SDPA is ours and which doesn't ask again.
        function = F.multi_head_attention_forward
        names = {"scaled_dot_product_attention": self._sdpa, "has_torch_function": lambda _: False}
        copy = types.FunctionType(
            function.__code__,
            {**function.__globals__, **names},
            argdefs=function.__defaults__,
            closure=function.__closure__,
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        return copy(*args, **kwargs)


def _modules(within: nn.Module | Iterable[nn.Module]) -> list[nn.Module]:
    found = [within] if isinstance(within, nn.Module) else list(within) if isinstance(within, Iterable) else []
    if not found or not all(isinstance(module, nn.Module) for module in found):
        raise checks.wrong_type("within", "modules whose forward makes the calls that are meant", within)
    return found


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Two views of the same numbers: MultiheadAttention transposes its arguments one by one."""

    def place(x: Tensor) -> tuple[Any, ...]:
        return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()

    return place(a) == place(b)


# Which blocks the running code belongs to


@dataclass(eq=False)
class _Entry:
    """A block that this thread is in.

    Attributes:
        counts: not where calls are made again.
        task: the backward pass that it was entered in, -1 for none.
        inside: how many of the modules that are meant are being called.
    """

    mode: replace_sdpa
    counts: bool
    inside: int = 0
    task: int = -1
    thread: int = 0
    handles: tuple[Any, ...] = ()

    def watch(self) -> None:
        self.task, self.thread = torch._C._current_graph_task_id(), threading.get_ident()
        self.handles = tuple(
            handle
            for module in self.mode.within or ()
            for handle in (
                module.register_forward_pre_hook(functools.partial(self._step, 1)),
                module.register_forward_hook(functools.partial(self._step, -1), always_call=True),
            )
        )

    def unwatch(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _step(self, by: int, *call: Any) -> None:
        if threading.get_ident() == self.thread:
            self.inside += by


class _Thread(threading.local):
    """Entries of this thread; None where code begins that brought its own blocks along."""

    def __init__(self) -> None:
        self.entries: list[_Entry | None] = []


_thread = _Thread()


def _entries() -> list[_Entry]:
    """Of the running code, innermost first. A backward pass belongs to no block that was entered outside it."""
    task = torch._C._current_graph_task_id()
    found: list[_Entry] = []
    for entry in reversed(_thread.entries):
        if entry is None:
            break
        if entry.task == task:
            found.append(entry)
    return found


def _carrying(function: Callable[..., Any], again: bool = False) -> Callable[..., Any]:
    """The function, within the blocks of the running code whenever and wherever it is called, and in no others.

    Args:
        again: its calls have been made, and counted.
    """
    blocks = [(entry.mode, entry.counts and not again, entry.inside) for entry in reversed(_entries())]

    def carrying(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            stack.enter_context(_nowhere())
            if again and blocks:
                _eager.begin()
                stack.callback(_eager.end)
            for mode, counts, inside in blocks:
                mode._begin(_Entry(mode, counts, inside))
                stack.callback(mode._end)
            return function(*args, **kwargs)

    return carrying


@contextmanager
def _nowhere() -> Iterator[None]:
    """Code that belongs to none of this thread's blocks."""
    _thread.entries.append(None)
    try:
        yield
    finally:
        _thread.entries.pop()


def _refuse_own_gradients() -> None:
    """A call within an autograd.Function gets its gradient from there: derived for plain attention, or from calls
    made again where no block reaches."""
    if torch.is_grad_enabled() or torch._C._is_fwd_grad_enabled():
        return  # either is off while such a function is running
    found = list(_running_functions())
    # Not found: one whose forward is no Python function, or who else has switched both off.
    unknown = not found and not torch.is_inference_mode_enabled()
    for name, wanted in [("of an unknown name", True)] if unknown else found:
        if wanted:
            raise NotImplementedError(
                f"replace_sdpa: an SDPA call within the autograd.Function {name}, which has gradients of its own; to "
                "compute activations again use torch.utils.checkpoint, and leave others' checkpointing out with within="
            )


def _running_functions() -> Iterator[tuple[str, bool]]:
    """The autograd.Functions whose forward is running, innermost first, and whether their gradients may be wanted."""
    forwards = {getattr(f, "__code__", None): f.__qualname__.rpartition(".")[0] for f in _forwards_without_context()}
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if code in forwards:
            # It says of no argument whether its gradient is wanted, and may have other tensors in their names by now.
            arguments = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount + 1]]
            given = any(isinstance(x, Tensor) and x.requires_grad for x in arguments)
            yield forwards[code], given or not torch.is_inference_mode_enabled()
        elif code.co_argcount:
            context = frame.f_locals.get(code.co_varnames[0])
            if isinstance(context, _Context):
                function = type(context)._forward_cls  # type: ignore[attr-defined]
                yield function.__name__, any(context.needs_input_grad) and not issubclass(function, _CARRIED)
        frame = frame.f_back


def _forwards_without_context() -> Iterator[Callable[..., Any]]:
    """Of all autograd.Functions that there are, those with a `setup_context`; wrapped ones as they were written."""
    kinds = [torch.autograd.Function]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        if kind.setup_context is not torch.autograd.Function.setup_context:
            yield inspect.unwrap(kind.forward)


#: What a forward gets that asks for a context, and the function that takes its block along (`_follow`).
_Context = torch.autograd.function.BackwardCFunction
_CARRIED = checkpointing.CheckpointFunction


class _Eager:
    """torch.compile rests while any thread is in a block: where it compiles checkpointing it forgets modes."""

    def __init__(self) -> None:
        self._lock, self._blocks = threading.Lock(), 0
        self._stance: Any = None

    @torch.compiler.disable
    def begin(self) -> None:
        with self._lock:
            if not self._blocks:
                self._stance = torch.compiler.set_stance("force_eager")
            self._blocks += 1

    @torch.compiler.disable
    def end(self) -> None:
        with self._lock:
            self._blocks -= 1
            if not self._blocks:
                self._stance.__exit__(None, None, None)


_eager = _Eager()


@functools.cache
def _follow() -> None:
    """From the first block on, have torch's checkpointing, threads and thread pools carry blocks along."""
    frame, reentrant = checkpointing._CheckpointFrame, checkpointing.CheckpointFunction
    new_frame, forward = frame.__init__, reentrant.forward
    start, submit = threading.Thread.start, ThreadPoolExecutor.submit

    def frame_carries(self: Any, recompute_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        new_frame(self, _carrying(recompute_fn, again=True), *args, **kwargs)

    def forward_carries(ctx: Any, run_function: Callable[..., Any], *args: Any) -> Any:
        out = forward(ctx, run_function, *args)
        ctx.run_function = _carrying(run_function, again=True)
        return out

    def start_carries(self: Any) -> None:
        if _entries():
            if getattr(getattr(self, "_target", None), "__module__", "") == "torch.nn.parallel.parallel_apply":
                raise NotImplementedError(
                    "replace_sdpa: torch.nn.DataParallel splits the batch, and the layout is of all of it; use "
                    "DistributedDataParallel, in each process with the layout of its own rows"
                )
            self.run = _carrying(self.run)
        start(self)

    def submit_carries(self: Any, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if _entries():
            fn = _carrying(fn)
        with _nowhere():  # a new thread of the pool serves others too
            return submit(self, fn, *args, **kwargs)

    replacements: list[tuple[Any, str, Any]] = [
        (frame, "__init__", frame_carries),
        (reentrant, "forward", staticmethod(forward_carries)),
        (threading.Thread, "start", start_carries),
        (ThreadPoolExecutor, "submit", submit_carries),
    ]
    for owner, name, replacement in replacements:
        functools.update_wrapper(getattr(replacement, "__func__", replacement), getattr(owner, name))
        setattr(owner, name, replacement)
