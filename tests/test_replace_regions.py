"""`replace_sdpa` where code runs elsewhere or later than it stands (checkpointing, threads, compilers), and which calls
of a model are meant."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import moda_kernels as mk

IDS = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 0, 0, 1, -1, -1]])
LAYOUT = mk.segment_modalities(IDS)
MASK = mk.ModularMask.bidirectional_within(2, [1])
OTHER = mk.ModularMask.fusion(2, [0])
B, L, D, HEADS = 2, 6, 16, 4


class Block(nn.Module):
    """Attention with a norm after it, so that something is saved behind the SDPA call."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.norm = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D), nn.LayerNorm(D)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        q, k, v = (
            part(y).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part, y in ((self.q, x), (self.k, memory), (self.v, memory))
        )
        return x + self.norm(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Two blocks, each checkpointed on request."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor, **checkpointing: bool) -> Tensor:
        for block in (self.first, self.second):
            x = checkpoint(block, x, **checkpointing) if checkpointing else block(x)
        return x


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No mode, and torch.compile as it was."""
    stance = torch._dynamo.eval_frame._stance
    yield
    assert torch.overrides._get_current_function_mode_stack() == []
    assert torch._dynamo.eval_frame._stance == stance


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(B, L, D, requires_grad=True)


def grads(model: nn.Module, x: Tensor, loss: Tensor, **backward: Any) -> list[Tensor]:
    x.grad = None
    model.zero_grad()
    loss.square().sum().backward(**backward)
    return [t.grad.clone() for t in (x, *model.parameters()) if t.grad is not None]


def expected(model: nn.Module, x: Tensor, mask: mk.ModularMask | None = MASK) -> tuple[Tensor, list[Tensor]]:
    """Without checkpointing."""
    if mask is None:
        out = model(x)
    else:
        with mk.replace_sdpa(layout=LAYOUT, mask=mask):
            out = model(x)
    return out, grads(model, x, out)


KINDS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "to the end": {"use_reentrant": False, "early_stop": False},
}


@pytest.mark.parametrize("within", [True, False], ids=["backward inside", "backward outside"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing(model: Model, x: Tensor, kind: str, within: bool) -> None:
    out, gradients = expected(model, x)
    with mk.replace_sdpa(layout=LAYOUT, mask=MASK) as replaced:
        again = model(x, **KINDS[kind])
        got = grads(model, x, again) if within else []
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(got if within else grads(model, x, again), gradients)
    assert replaced.replaced == 2  # what is made again doesn't count


def test_backward_twice_through_a_checkpoint(model: Model, x: Tensor) -> None:
    _, gradients = expected(model, x)
    with mk.replace_sdpa(layout=LAYOUT, mask=MASK), set_checkpoint_early_stop(False):
        out = model(x, use_reentrant=False)
    for _ in range(2):
        torch.testing.assert_close(grads(model, x, out, retain_graph=True), gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_within_checkpoints(model: Model, x: Tensor, kind: str) -> None:
    out, gradients = expected(model, x)
    with mk.replace_sdpa(layout=LAYOUT, mask=MASK):
        again = checkpoint(lambda y: model(y, **KINDS[kind]), x, **KINDS[kind])
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(grads(model, x, again), gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_was_begun_outside_stays_outside(model: Model, x: Tensor, kind: str) -> None:
    with mk.replace_sdpa(layout=LAYOUT, mask=MASK):  # the first block of the process may be this one
        pass
    _, gradients = expected(model, x, None)
    out = model(x, **KINDS[kind])
    with mk.replace_sdpa(layout=LAYOUT, mask=MASK) as replaced:
        torch.testing.assert_close(grads(model, x, out), gradients)
    assert replaced.replaced == 0


@pytest.mark.parametrize("kind", KINDS)
def test_another_block_around_the_backward_pass(model: Model, x: Tensor, kind: str) -> None:
    _, gradients = expected(model, x)
    with mk.replace_sdpa(layout=LAYOUT, mask=MASK):
        out = model(x, **KINDS[kind])
    with mk.replace_sdpa(layout=LAYOUT, mask=OTHER) as other:
        torch.testing.assert_close(grads(model, x, out), gradients)
    assert other.replaced == 0


@pytest.mark.parametrize("kind", KINDS)
def test_nested_blocks_and_checkpointing(model: Model, x: Tensor, kind: str) -> None:
    """The inner block names one module, the outer one takes the rest."""

    def run(**checkpointing: bool) -> Tensor:
        second = mk.replace_sdpa(layout=LAYOUT, mask=OTHER, within=model.second)
        with mk.replace_sdpa(layout=LAYOUT, mask=MASK) as outer, second as inner:
            out = model(x, **checkpointing)
        assert (outer.replaced, inner.replaced) == (1, 1)
        return out

    out = run()
    gradients = grads(model, x, out)
    assert not torch.allclose(out, expected(model, x)[0])
    again = run(**KINDS[kind])
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(grads(model, x, again), gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_within_a_checkpoint(model: Model, x: Tensor, kind: str) -> None:
    def run(y: Tensor) -> Tensor:
        with mk.replace_sdpa(layout=LAYOUT, mask=MASK):
            return model(y)

    _, gradients = expected(model, x)
    with mk.replace_sdpa(layout=LAYOUT, mask=OTHER):  # hidden by the inner one, then and now
        out = checkpoint(run, x, **KINDS[kind])
        torch.testing.assert_close(grads(model, x, out), gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_while_activations_are_made_again(x: Tensor, kind: str) -> None:
    calls = 0

    def fails_the_second_time(y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyError("again")
        return (y * y).sum()

    with mk.replace_sdpa(layout=LAYOUT, mask=MASK):
        out = checkpoint(fails_the_second_time, x, **KINDS[kind])
        with pytest.raises(KeyError, match="again"):
            out.backward()
        assert len(torch.overrides._get_current_function_mode_stack()) == 1


class OwnCheckpoint(torch.autograd.Function):
    """Somebody else's."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.function(x)
        return None, torch.autograd.grad(out, x, grad)[0]


def test_checkpointing_of_others_is_refused(model: Model, x: Tensor) -> None:
    refused = pytest.raises(NotImplementedError, match=r"replace_sdpa: .*autograd.Function OwnCheckpoint")
    plain = grads(model, x, model(x))[0]
    with mk.replace_sdpa(layout=LAYOUT, mask=MASK) as replaced:
        with refused:
            OwnCheckpoint.apply(model, x)
        with torch.no_grad():  # nobody asks for gradients
            out = OwnCheckpoint.apply(model, x.detach())
    assert replaced.replaced == 2 and torch.equal(out, expected(model, x)[0])
    for options in ({"layout": IDS[:1]}, {"layout": LAYOUT, "within": nn.Linear(1, 1)}):
        with mk.replace_sdpa(mask=MASK, **options) as replaced:
            torch.testing.assert_close(grads(model, x, OwnCheckpoint.apply(model, x))[0], plain)
        assert replaced.replaced == 0


class WithSetup(torch.autograd.Function):
    """Its forward gets no context."""

    @staticmethod
    def forward(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        x = x.detach()  # from here on nothing shows that a gradient is wanted
        return function(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.function, x = inputs
        ctx.save_for_backward(x)

    backward = OwnCheckpoint.backward


class UnderAutocast(OwnCheckpoint):
    """Wrapped, as mixed precision asks for."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return OwnCheckpoint.forward(ctx, function, x)


@pytest.mark.parametrize("function", [WithSetup, UnderAutocast])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_functions_of_any_form_are_seen(
    model: Model, x: Tensor, function: type[torch.autograd.Function], checkpointed: bool
) -> None:
    """Whatever their forward gets, and whoever calls it."""
    refused = pytest.raises(NotImplementedError, match=rf"replace_sdpa: .*autograd.Function {function.__name__}")
    with mk.replace_sdpa(layout=LAYOUT, mask=MASK) as replaced:
        with refused:
            if checkpointed:
                checkpoint(lambda y: function.apply(model, y), x, use_reentrant=True)
            else:
                function.apply(model, x)
        assert replaced.replaced == 0
        with torch.inference_mode():  # nobody can ask for gradients
            function.apply(model, x.detach())
    assert replaced.replaced == 2


def test_no_gradient_and_no_function(model: Model, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of gradients are off only where an autograd.Function runs; one that isn't found is refused as well."""
    with mk.replace_sdpa(layout=LAYOUT, mask=MASK) as replaced:
        with torch.no_grad():
            right = model(x)
        with torch.inference_mode():
            assert torch.equal(model(x), right)
        assert replaced.replaced == 4
        monkeypatch.setattr("moda_kernels.replace._running_functions", lambda: iter(()))
        with pytest.raises(NotImplementedError, match="of an unknown name"):
            OwnCheckpoint.apply(model, x)
    assert replaced.replaced == 4


# Threads


def in_thread(function: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_pass_on_another_thread(model: Model, x: Tensor, kind: str) -> None:
    """As on a GPU, where autograd has threads of its own."""
    _, gradients = expected(model, x)
    with mk.replace_sdpa(layout=LAYOUT, mask=MASK):
        out = model(x, **KINDS[kind])
        inside, out = in_thread(lambda: grads(model, x, out)), model(x, **KINDS[kind])
    torch.testing.assert_close(inside, gradients)
    torch.testing.assert_close(in_thread(lambda: grads(model, x, out)), gradients)


def test_threads_that_are_started_in_the_block(model: Model, x: Tensor) -> None:
    out, _ = expected(model, x)
    plain, begin = model(x), threading.Event()
    results: dict[str, Tensor] = {}
    with mk.replace_sdpa(layout=LAYOUT, mask=MASK) as replaced:
        assert torch.equal(in_thread(lambda: model(x)), out)
        with mk.replace_sdpa(layout=LAYOUT, mask=OTHER):
            assert torch.equal(in_thread(lambda: model(x)), expected(model, x, OTHER)[0])
        late = threading.Thread(target=lambda: begin.wait() and results.update(late=model(x)))
        late.start()
    begin.set()
    late.join()
    assert torch.equal(results["late"], out) and replaced.replaced == 4
    assert torch.equal(in_thread(lambda: model(x)), plain)


@pytest.mark.parametrize("before", [True, False], ids=["pool from before", "pool of the block"])
def test_thread_pools(model: Model, x: Tensor, before: bool) -> None:
    out, _ = expected(model, x)
    plain, pool = model(x), ThreadPoolExecutor(1)
    if before:
        pool.submit(int).result()
    with mk.replace_sdpa(layout=LAYOUT, mask=MASK):
        assert torch.equal(pool.submit(model, x).result(), out)
    assert torch.equal(pool.submit(model, x).result(), plain)
    pool.shutdown()


def test_blocks_on_several_threads_at_once(model: Model, x: Tensor) -> None:
    both = threading.Barrier(2)

    def run(mask: mk.ModularMask) -> Tensor:
        with mk.replace_sdpa(layout=LAYOUT, mask=mask):
            both.wait()
            out = model(x)
            both.wait()
        return out

    with ThreadPoolExecutor(2) as pool:
        outs = [future.result() for future in [pool.submit(run, mask) for mask in (MASK, OTHER)]]
    for mask, out in zip((MASK, OTHER), outs, strict=True):
        assert torch.equal(out, expected(model, x, mask)[0])


def test_data_parallel_is_refused() -> None:
    def worker() -> None:
        raise AssertionError

    worker.__module__ = "torch.nn.parallel.parallel_apply"
    with mk.replace_sdpa(layout=LAYOUT), pytest.raises(NotImplementedError, match=r"DataParallel.*DistributedData"):
        threading.Thread(target=worker).start()


# Compilers


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_compiled_functions(model: Model, x: Tensor, kind: str | None) -> None:
    torch._dynamo.reset()
    out, gradients = expected(model, x)
    compiled = torch.compile(lambda y: model(y, **KINDS[kind] if kind else {}), backend="aot_eager")
    with mk.replace_sdpa(layout=LAYOUT, mask=MASK) as replaced:
        again = compiled(x)
    assert replaced.replaced == 2
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(grads(model, x, again), gradients)


def test_a_block_within_a_compiled_function(model: Model, x: Tensor) -> None:
    torch._dynamo.reset()

    @torch.compile(backend="eager")
    def run(y: Tensor) -> Tensor:
        y = y + 1
        with mk.replace_sdpa(layout=LAYOUT, mask=MASK):
            return model(y)

    with pytest.raises(NotImplementedError, match=r"replace_sdpa: .*torch\.compile"):
        run(x)


# Which calls are meant


def test_attention_to_a_memory_as_long_as_the_target(x: Tensor) -> None:
    layer = nn.TransformerDecoderLayer(D, HEADS, 32, dropout=0.0, batch_first=True)
    memory = torch.randn(B, L, D)
    seen = MASK.visible(LAYOUT)
    seen = ~(seen | ~seen.any(-1, keepdim=True)).repeat_interleave(HEADS, 0)
    for made in (nn.TransformerDecoder(layer, 2), layer):
        with mk.replace_sdpa(layout=LAYOUT, mask=MASK) as replaced:
            out = made(x, memory)
        assert replaced.replaced == (1 if made is layer else 2)
        torch.testing.assert_close(out[IDS >= 0], made(x, memory, tgt_mask=seen)[IDS >= 0])


@pytest.mark.parametrize("batch_first", [True, False])
def test_values_of_their_own(x: Tensor, batch_first: bool) -> None:
    """Query and key with positions added, as in DETR: self-attention."""
    attention = nn.MultiheadAttention(D, HEADS, batch_first=batch_first)
    placed, values = x + torch.randn(L, D), x
    if not batch_first:
        placed, values = placed.transpose(0, 1), values.transpose(0, 1)
    with mk.replace_sdpa(layout=LAYOUT, mask=MASK) as replaced:
        attention(placed, placed, values, need_weights=False)
        attention(placed, values, values, need_weights=False)
    assert replaced.replaced == 1
    with mk.replace_sdpa(layout=LAYOUT, mask=MASK, within=attention) as replaced:
        attention(placed, values, values, need_weights=False)
    assert replaced.replaced == 1


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_within_modules(model: Model, x: Tensor, kind: str | None) -> None:
    memory = torch.randn(B, L, D)

    def run() -> Tensor:
        y = checkpoint(model.first, x, **KINDS[kind]) if kind else model.first(x)
        return checkpoint(model.second, y, memory, **KINDS[kind]) if kind else model.second(y, memory)

    with mk.replace_sdpa(layout=LAYOUT, mask=MASK):
        first = model.first(x)
    out = model.second(first, memory)
    gradients = grads(model, x, out)
    for within in (model.first, [model.first.norm, model.first], iter([model.first])):
        with mk.replace_sdpa(layout=LAYOUT, mask=MASK, within=within) as replaced:
            again = run()
            with pytest.raises(RuntimeError):
                model.first(torch.randn(B, L, D + 1))  # leaves it by an exception
            model.second(x)
        assert replaced.replaced == 1
        torch.testing.assert_close(again, out)
        torch.testing.assert_close(grads(model, x, again), gradients)
    assert not model.first._forward_hooks and not model.first._forward_pre_hooks


def test_within_on_another_thread(model: Model, x: Tensor) -> None:
    """What one thread calls says nothing about another; a thread that it begins belongs to it."""

    def begins_a_thread(*_: Any) -> None:
        in_thread(lambda: model.second(x))

    with mk.replace_sdpa(layout=LAYOUT, mask=MASK, within=model.first) as replaced:
        hook = model.first.norm.register_forward_pre_hook(begins_a_thread)
        model.first(x)
        hook.remove()
        in_thread(lambda: model.first(x))
    assert replaced.replaced == 3  # the call, what it began, and one by a thread


@pytest.mark.parametrize("within", [None, 3, [], [3], "first"])
def test_within_what(model: Model, within: Any) -> None:
    if within is None:
        assert mk.replace_sdpa(layout=LAYOUT, within=None).within is None
        return
    with pytest.raises(TypeError, match="within: expected modules"):
        mk.replace_sdpa(layout=LAYOUT, within=within)


@pytest.mark.parametrize("mask", [None, MASK])
def test_causal_calls_with_fewer_queries_are_the_first_columns(mask: mk.ModularMask | None) -> None:
    q, k, v = (torch.randn(B, HEADS, L, 8) for _ in range(3))
    with mk.replace_sdpa(layout=LAYOUT, mask=mask):
        out = F.scaled_dot_product_attention(q[:, :, :4], k, v, is_causal=True)
        whole = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, whole[:, :, :4])
    if mask is None:
        torch.testing.assert_close(out[:1], F.scaled_dot_product_attention(q[:1, :, :4], k[:1], v[:1], is_causal=True))


def test_more_queries_than_keys_pass() -> None:
    q, k, v = torch.randn(B, HEADS, L + 2, 8), torch.randn(B, HEADS, L, 8), torch.randn(B, HEADS, L, 8)
    with mk.replace_sdpa(layout=LAYOUT, mask=MASK) as replaced:
        out = F.scaled_dot_product_attention(q, k, v)
    assert replaced.replaced == 0
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))
