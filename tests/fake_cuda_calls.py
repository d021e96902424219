"""The host's half of calls on CUDA, on fake devices (`fake_cuda.py`): `test_fake_cuda.py` runs this in a process of its
own. Tensors are on cuda:1 while cuda:0 is current; nothing is copied between devices, no number is read, and every
kernel is launched where its tensors are."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import torch
from fake_cuda import Recorder
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import moda_kernels as mk
from moda_kernels.backends.triton import operators
from moda_kernels.backends.triton.plan import Facts
from moda_kernels.runtime import gpu, native
from moda_kernels.runtime.later import Later
from moda_kernels.testing import CASES, Case
from moda_kernels.tokens.layout import ModalityLayout
from moda_kernels.tokens.walks import KeyWalk, QueryWalk

MODE = fake_cuda.install(Path(os.environ["FAKE_CUDA"]))
gpu.why_absent.cache_clear()  # somebody may have asked before there were devices
EXTENSION = native._extension
DEVICE = torch.device("cuda:1")
MASK = mk.ModularMask.bidirectional_within(2, [1])


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators' functions are called at once, as eager calls do, although a mode is on; and there is a native half."""
    monkeypatch.setattr(operators, "runs_at_once", lambda *_: True)
    monkeypatch.setattr(native, "_extension", None if EXTENSION is None else fake_cuda.FakeNative(EXTENSION))
    native._cuda_fault.cache_clear()


@pytest.fixture(params=["native", "torch"])
def half(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the extension's CUDA half, or without the extension."""
    if request.param == "torch":
        monkeypatch.setattr(native, "_extension", None)
    elif EXTENSION is None:
        pytest.skip("there is no native extension to stand for its CUDA half")
    return str(request.param)


@contextmanager
def recorded(device: torch.device = DEVICE) -> Iterator[Recorder]:
    """What happens within, on fake tensors; fails if anything did that must not."""
    before = torch.cuda.current_device()
    with MODE, Recorder(device.index) as recorder:
        yield recorder
    assert not recorder.faults, "\n".join(dict.fromkeys(recorder.faults))
    assert torch.cuda.current_device() == before
    for launch in recorder.launches:
        for name, t in named_tensors(launch.arguments):
            wanted = torch.int32 if name in INTEGERS else torch.float32 if name in FLOATS else None
            assert wanted is None or t.dtype == wanted, f"{launch.kernel}: {name} is {t.dtype}"
            assert name not in INTEGERS or t.is_contiguous(), f"{launch.kernel}: {name} has strides {t.stride()}"


#: What kernels read as int32, side by side; and what they read as float32, whatever the inputs are.
INTEGERS = {
    *Facts._fields, *QueryWalk._fields, *KeyWalk._fields, "counts", "fault", "p_tiles", "p_modalities", "p_order",
    "p_pieces", "p_groups", "p_row_modality", "row_modality",
}  # fmt: skip
FLOATS = {
    "lse", "delta", "norm", "row_sums", "sums", "tops", "dbias", "base", "decay", "weights", "p_partial"
}  # fmt: skip


def named_tensors(arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, tuple):
            yield from named_tensors(value._asdict())  # type: ignore[attr-defined]


@contextmanager
def moved_in_mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors of the CPU that are moved to a fake device become fake ones."""
    to, layout_to = Tensor.to, ModalityLayout.to

    def moved(self: Tensor, *arguments: Any, **named: Any) -> Tensor:
        if DEVICE in arguments and not isinstance(self, FakeTensor):
            with MODE:
                return to(MODE.from_tensor(self), *arguments, **named)
        return to(self, *arguments, **named)

    def layout_moved(self: ModalityLayout, device: Any) -> ModalityLayout:
        with MODE:
            return layout_to(self, device)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "to", moved)
        patch.setattr(ModalityLayout, "to", layout_moved)
        yield


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=DEVICE, requires_grad=grad)


def heads(rows: int, keys: int, dim: int = 64, batch: int = 2, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, four query heads on two key heads."""
    sizes = ((4, rows), (2, keys), (2, keys))
    q, k, v = (normal(batch, h, length, dim, grad=grad) for h, length in sizes)
    return q, k, v


def segmented(length: int, batch: int = 2, **more: Any) -> ModalityLayout:
    ids = torch.zeros(batch, length, dtype=torch.long, device=DEVICE)
    return mk.segment_modalities(ids, num_modalities=2, max_segments=16, **more)


def kernels(recorder: Recorder) -> list[str]:
    return [launch.kernel for launch in recorder.launches]


# Every case of the package


@pytest.mark.parametrize("case", [case for case in CASES if case.softcap is None], ids=str)
def test_case(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, in bfloat16, on a layout that was moved to the device; as operators run it, and twice as
    layers do, the second time with launches that were kept: they say the same."""
    fake = native._extension
    with moved_in_mode(monkeypatch):
        monkeypatch.setattr(native, "_extension", EXTENSION)
        inputs = case.build(torch.bfloat16, DEVICE, length=63)
        monkeypatch.setattr(native, "_extension", fake)
    said = []
    for at_once in (False, True, True):
        monkeypatch.setattr(operators, "runs_at_once", lambda *_, at_once=at_once: at_once)
        with recorded() as recorder, mk.use_backend("triton"):
            tensors = {n: t.detach().requires_grad_(n != "attn_mask") for n, t in inputs.tensors.items()}
            out, lse = inputs.call(tensors)
            leaves = [t for t in tensors.values() if t.requires_grad]
            grads = torch.autograd.grad((out, lse), leaves, (torch.randn_like(out), torch.randn_like(lse)))
        assert all(g.device == t.device and g.shape == t.shape for g, t in zip(grads, leaves, strict=True))
        names = kernels(recorder)
        assert names.count("attention_forward") == names.count("attention_backward_keys") == 1
        said.append(descriptions(recorder))
    assert said[0] == said[1] == said[2]
    # Where queries stand may be anything that a tensor says.
    anew = case.queries == "tensor" or (case.packed and case.queries is not None)
    assert anew or all(launch.kept for launch in recorder.launches if launch.kernel.startswith("attention_"))


def descriptions(recorder: Recorder) -> list[Any]:
    """Of all launches, but for what differs between two equal calls."""
    return [(each.kernel, each.grid, described(each.arguments)) for each in recorder.launches]


def described(value: Any) -> Any:
    """An argument without its place in memory."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, dict):
        return {name: described(each) for name, each in value.items()}
    return tuple(map(described, value)) if isinstance(value, tuple) else value


# From ids to gradients


def test_a_layer(half: str) -> None:
    with recorded() as recorder:
        q, k, v = heads(300, 300, grad=True)
        layout = segmented(300)
        aligner = mk.DuplexAligner(64, 2, device=DEVICE)
        out = mk.moda_attention(
            q, k, v, layout=layout, mask=MASK, key_map=aligner(k, layout), pseudo=mk.PseudoAttention(), enable_gqa=True
        )
        torch.autograd.grad(out.float().sum(), (q, k, v, *aligner.parameters()))
    names = kernels(recorder)
    assert names.count("attention_forward") == 1 and "_segment_gram_kernel" in names
    native_calls = {"segment_tokens", "segment_table", "mask_intervals", "query_walk", "key_walk"}
    assert {call.function for call in recorder.native} == (native_calls if half == "native" else set())


def test_the_other_device() -> None:
    """The first device, while the second is current."""
    with torch.cuda.device(1), recorded(torch.device("cuda:0")) as recorder:
        q, k, v = (torch.randn(1, 2, 40, 16, device="cuda:0", requires_grad=True) for _ in range(3))
        ids = torch.zeros(1, 40, dtype=torch.long, device="cuda:0")
        layout = mk.segment_modalities(ids, num_modalities=2, max_segments=3)
        key_map = mk.DuplexAligner(16, 2, scope="causal", device="cuda:0")(k, layout)
        out = mk.moda_attention(q, k, v, layout=layout, is_causal=True, key_map=key_map)
        torch.autograd.grad(out.sum(), (q, k, v))
    assert {launch.device for launch in recorder.launches} == {0}


@pytest.mark.parametrize("window_on", ["past", "all"])
def test_windows(half: str, window_on: str) -> None:
    with recorded():
        q, k, v = heads(130, 130, grad=True)
        mask = mk.ModularMask(MASK.rules, window=20, window_on=window_on)
        out = mk.moda_attention(q, k, v, layout=segmented(130), mask=mask, pseudo=mk.PseudoAttention(), enable_gqa=True)
        torch.autograd.grad(out.float().sum(), (q, k, v))


def test_roles_steps_chunks(half: str) -> None:
    v_ = mk.Visibility
    rules = ((v_.PAST | v_.SEGMENT, v_.UPTO, v_.CHUNK), (v_.BEFORE | v_.SEGMENT, v_.ALL, v_.HIDDEN), (v_.CHUNK,) * 3)
    with recorded():
        q, k, v = heads(100, 100, grad=True)
        zeros = torch.zeros(2, 100, dtype=torch.long, device=DEVICE)
        layout = segmented(100, roles=zeros, num_roles=3, steps=zeros, chunks=zeros, item_ids=zeros)
        aligner = mk.DuplexAligner(64, 2, scope="causal", source_roles=(0, 2), device=DEVICE)
        out = mk.moda_attention(
            q, k, v, layout=layout, mask=mk.ModularMask(rules), key_map=aligner(k, layout), duplex="split",
            enable_gqa=True, branch_weights=(normal(4, dtype=torch.float32, grad=True), 0.5), backend="triton",
        )  # fmt: skip
        torch.autograd.grad(out.float().sum(), (q, k, v))


@pytest.mark.parametrize("scope", ["sequence", "causal"])
def test_packed(half: str, scope: str) -> None:
    with recorded():
        bounds = torch.zeros(4, dtype=torch.int32, device=DEVICE)
        ids = torch.zeros(200, dtype=torch.long, device=DEVICE)
        layout = mk.segment_modalities(ids, num_modalities=2, max_segments=9, cu_seqlens=bounds)
        q, k, v = (normal(200, h, 64, grad=True) for h in (4, 2, 2))
        aligner = mk.DuplexAligner(64, 2, fusion="concat", scope=scope, device=DEVICE)
        bias = normal(3, 4, 2, 2, dtype=torch.float32, grad=True)
        out = mk.moda_attention(
            q, k, v, layout=layout, mask=MASK, key_map=aligner(k, layout), pair_bias=bias, enable_gqa=True
        )
        torch.autograd.grad(out.float().sum(), (q, k, v, bias, *aligner.parameters()))


@pytest.mark.parametrize("fusion", ["add", "linear", "concat"])
@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("scope", ["sequence", "causal"])
def test_aligned_keys(fusion: str, renorm: bool, scope: str) -> None:
    """Written, and for the sequence scope folded where keys are many."""
    with recorded():
        q, k, v = heads(1100, 1100, grad=True)
        layout = segmented(1100)
        aligner = mk.DuplexAligner(64, 2, fusion=fusion, scope=scope, renorm=renorm, device=DEVICE)
        fused = mk.align_keys(k, aligner(k, layout), layout)
        torch.autograd.grad(fused.float().sum(), (k, *aligner.parameters()))
        out = mk.moda_attention(q, k, v, layout=layout, mask=MASK, key_map=aligner(k, layout), enable_gqa=True)
        torch.autograd.grad(out.float().sum(), (q, k, v, *aligner.parameters()))


def test_a_loose_bound_of_segments_costs_no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2,000 segments that there may be, the blocks of the 40 that there are, as soon as the device has said so.
    (Until then, one block for every 128 that there may be.)"""

    def launches(known: int | None, bound: int) -> list[str]:
        monkeypatch.setattr(Later, "value", property(lambda self: known))
        with recorded() as recorder:
            ids = torch.zeros(1, 4096, dtype=torch.long, device=DEVICE)
            layout = mk.segment_modalities(ids, num_modalities=2, max_segments=bound)
            key = normal(1, 2, 4096, 64, grad=True)
            aligner = mk.DuplexAligner(64, 2, scope="causal", device=DEVICE)
            fused = mk.align_keys(key, aligner(key, layout), layout)
            torch.autograd.grad(fused.float().sum(), (key, *aligner.parameters()))
        return [name for name in kernels(recorder) if name.startswith("_segment")]

    forward, blocks = ["_segment_gram_kernel", "_segment_project_kernel"], -(-2000 // 128)
    assert launches(None, 40)[:2] == launches(40, 2000)[:2] == forward
    assert len(launches(40, 2000)) <= len(launches(None, 40)) + 2  # its block is computed again in the backward
    assert launches(None, 2000)[: 2 * blocks] == forward * blocks


def test_what_an_aligner_costs_a_layer() -> None:
    """Of the scope "causal", once its layout is known: torch's operators (views and kernels left out)."""
    with recorded() as recorder:
        layout, counts = segmented(1100), []
        for _ in range(2):
            key, aligner = normal(2, 2, 1100, 64, grad=True), mk.DuplexAligner(64, 2, scope="causal", device=DEVICE)
            recorder.operators.clear()
            fused = mk.align_keys(key, aligner(key, layout), layout)
            forward = [name for name in recorder.operators if name != "device"]
            grad = torch.ones_like(fused)
            recorder.operators.clear()
            torch.autograd.grad(fused, (key, *aligner.parameters()), grad)
            counts.append((len(forward), sum(name != "device" for name in recorder.operators)))
    assert counts[1][0] <= 28 and counts[1][1] <= 20, counts


def test_products_and_affinity() -> None:
    with recorded() as recorder:
        _, k, v = heads(150, 150, grad=True)
        layout = segmented(150)
        for by in ("modality", "segment"):
            torch.autograd.grad(mk.modality_gram(k, v, layout, by=by).sum(), (k, v))
        bias = mk.gram_affinity(mk.modality_gram(k, k, layout)).repeat_interleave(2, 1)
        q = normal(2, 4, 150, 64, grad=True)
        out = mk.moda_attention(q, k, v, layout=layout, pair_bias=bias, enable_gqa=True)
        torch.autograd.grad(out.float().sum(), (q, k, v))
        ratio, weight = normal(64, dtype=torch.float32, grad=True), normal(64, 64, dtype=torch.float32, grad=True)
        key_map = mk.released_key_map(k, v, layout, ratio, weight)
        torch.autograd.grad(mk.align_keys(k, key_map, layout).float().sum(), (k, v, ratio, weight))
    assert "_segment_project_kernel" in kernels(recorder)


@pytest.mark.parametrize("length", [None, 40, float("inf")])
@pytest.mark.parametrize("duplex", ["joint", "split"])
def test_pseudo(length: Any, duplex: str) -> None:
    with recorded():
        q, k, v = heads(100, 100, grad=True)
        layout, base, decay = segmented(100), normal(4, dtype=torch.float32, grad=True), normal(4, grad=True)
        for pseudo in (mk.PseudoAttention(base, decay, length), mk.PseudoAttention(0.5, 0.25, length)):
            out = mk.moda_attention(q, k, v, layout=layout, mask=MASK, pseudo=pseudo, duplex=duplex, enable_gqa=True)
            torch.autograd.grad(out.float().sum(), (q, k, v))


def test_attn_masks() -> None:
    with recorded():
        q, k, v = heads(100, 100, grad=True)
        layout = segmented(100)
        for mask in (normal(100, 100), torch.ones(2, 1, 1, 100, dtype=torch.bool, device=DEVICE)):
            out = mk.moda_attention(q, k, v, mask, layout=layout, enable_gqa=True, is_causal=True)
            torch.autograd.grad(out.float().sum(), (q, k, v))


def test_who_attends_to_whom() -> None:
    with recorded():
        q, k, _ = heads(100, 100)
        layout = segmented(100)
        mk.attention_share(q, k, layout=layout, mask=MASK, enable_gqa=True)


def test_modality_ids_alone_wait_no_more_than_they_must() -> None:
    """Given the number of modalities and a bound of segments a layout is made without waiting, a copy to the device
    included; without them it says that it waits."""
    with MODE, Recorder(1) as recorder:
        segmented(100)
        assert not recorder.faults
        with pytest.raises(Exception, match=r"local_scalar_dense|item"):
            mk.segment_modalities(torch.zeros(2, 100, dtype=torch.long, device=DEVICE), num_modalities=2)
    assert recorder.faults


# Decoding


STEPS: dict[str, Callable[[int], dict[str, Any]]] = {
    "plain": lambda n: {},
    "chunks": lambda n: {"chunks": torch.zeros(2, n, dtype=torch.long, device=DEVICE)},
}


@pytest.mark.parametrize("scope", ["sequence", "causal"])
@pytest.mark.parametrize(("cache", "given"), [("growing", "plain"), ("static", "chunks"), ("sliding", "plain")])
def test_decoding(scope: str, given: str, cache: str) -> None:
    mask = mk.ModularMask(MASK.rules, window=300, window_on="all")
    with recorded() as recorder, torch.no_grad():
        state = mk.DecodeState(2)
        aligner = mk.DuplexAligner(64, 2, scope=scope, device=DEVICE)
        total = 0
        for new in (320, 1, 3):
            state.append(torch.zeros(2, new, dtype=torch.long, device=DEVICE), **STEPS[given](new))
            total += new
            columns = {"growing": total, "static": 400, "sliding": min(total, 320 if new == 320 else 310)}[cache]
            q, k, v = heads(new, columns)
            key_map = aligner(k, state=state[0])
            mk.moda_attention(
                q, k, v, state=state, mask=mask, key_map=key_map, enable_gqa=True, backend="triton",
                pseudo=mk.PseudoAttention(length=500),
            )  # fmt: skip
        state.reorder(torch.zeros(2, dtype=torch.long, device=DEVICE))
        state.crop(total - 2)
    assert "attention_decode" in kernels(recorder)


@pytest.mark.parametrize("scope", ["sequence", "causal"])
@pytest.mark.parametrize("given", STEPS)
def test_decoding_packed(scope: str, given: str) -> None:
    with recorded() as recorder, torch.no_grad():
        state = mk.DecodeState(2)
        aligner = mk.DuplexAligner(64, 2, scope=scope, device=DEVICE)
        total = 0
        for new in (900, 2):
            bounds = torch.zeros(3, dtype=torch.int32, device=DEVICE)
            more = {name: fact[0] for name, fact in STEPS[given](new).items()}
            state.append(torch.zeros(new, dtype=torch.long, device=DEVICE), cu_seqlens=bounds, **more)
            total += new
            q, k, v = normal(new, 4, 64), normal(total, 2, 64), normal(total, 2, 64)
            for layer in range(2):
                before = len(recorder.launches)
                key_map = aligner(k, state=state[layer])
                mk.moda_attention(
                    q, k, v, state=state[layer], is_causal=True, key_map=key_map, enable_gqa=True, backend="triton"
                )
                of_layer = [each for each in recorder.launches[before:] if each.kernel.startswith("attention_")]
                assert all(each.kept == (layer > 0) for each in of_layer)
    assert "attention_decode" in kernels(recorder)


# What layers share


@pytest.mark.parametrize("scope", [None, "sequence"])
def test_decoding_layers_share_their_launches(scope: str | None) -> None:
    said = []
    with torch.no_grad():
        for layer in range(3):
            with recorded() as recorder:
                if layer == 0:
                    layout = segmented(600)
                q, k, v = heads(2, 600)
                key_map = None if scope is None else mk.DuplexAligner(64, 2, scope=scope, device=DEVICE)(k, layout)
                mk.moda_attention(
                    q, k, v, layout=layout, mask=MASK, key_map=key_map, duplex="split", enable_gqa=True,
                    pseudo=mk.PseudoAttention(), backend="triton",
                )  # fmt: skip
            said.append(descriptions(recorder))
            own = [launch for launch in recorder.launches if launch.kernel.startswith("attention_decode")]
            assert len(own) == (2 if scope is None else 3) and all(launch.kept == (layer > 0) for launch in own)
    assert said[0] == said[1] == said[2]


def test_nothing_is_kept_for_other_addresses_and_shapes() -> None:
    """Rows that begin beside multiples of 16 bytes are another variant of the kernel; so are other strides."""

    def launch(layout: ModalityLayout, q: Tensor, k: Tensor, **more: Any) -> fake_cuda.Launch:
        with recorded() as recorder:
            mk.moda_attention(q, k, k, layout=layout, is_causal=True, enable_gqa=True, **more)
        (of_call,) = (each for each in recorder.launches if each.kernel == "attention_forward")
        return of_call

    with MODE:
        layout = segmented(100)
        q, k, _ = heads(100, 100)
        beside = normal(2, 4, 100, 65)[..., 1:]  # rows of 65 numbers, the first at 2 bytes
        turned = normal(2, 100, 4, 64).transpose(1, 2)
        room = normal(2, 4, 100, 80)
    with torch.no_grad():
        first, again = launch(layout, q, k), launch(layout, q, k)
        assert not first.kept and again.kept
        for other in (beside, turned):
            first = launch(layout, other, k)
            assert not first.kept and first.arguments["s_qt"] == other.stride(2) // first.arguments["UNIT"]
            assert launch(layout, other, k).kept
        assert launch(layout, q, k).kept
        first, again = launch(layout, room[..., :64], k), launch(layout, room[..., 1:65], k)
        assert not first.kept and not again.kept and first.arguments["s_qt"] == again.arguments["s_qt"]
        assert all(launch(layout, room[..., at : at + 64], k).kept for at in (0, 1, 8))
        for more in ({"scale": 0.5}, {"duplex": "split"}, {"pseudo": mk.PseudoAttention(length=9)}):
            assert not launch(layout, q, k, **more).kept
        assert not launch(layout, q.float(), k.float()).kept
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            assert launch(layout, q.float(), k.float()).arguments["PRECISION"] == "tf32"
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False


# One compile for all lengths


def test_no_length_compiles_anew() -> None:
    dim = 96  # of no other test here: what was compiled for them is there already
    lengths = (1000, 77, 1, 16, 2, 15, 17, 31, 33, 48, 63, 64, 65, 100, 127, 128, 129, 255, 256, 2048)
    for extra in ("", "bias and split", "mask"):
        fake_cuda.COMPILED.clear()
        with recorded():
            for length in lengths:
                q, k, v = heads(length, length, dim, grad=True)
                given: dict[str, Any] = {"is_causal": True}
                if extra == "bias and split":
                    given = {"pair_bias": normal(2, 4, 2, 2, dtype=torch.float32, grad=True), "duplex": "split"}
                elif extra == "mask":
                    given = {"attn_mask": torch.ones(2, 1, length, length, dtype=torch.bool, device=DEVICE)}
                out = mk.moda_attention(q, k, v, layout=segmented(length), enable_gqa=True, **given)
                torch.autograd.grad(out.float().sum(), (q, k, v))
        names = [name for name, _ in fake_cuda.COMPILED]
        assert len(names) == len(set(names)) == 4, names
    fake_cuda.COMPILED.clear()
    with recorded(), torch.no_grad():
        for length in (1000, 1001, 1024):
            q, k, v = heads(1, length, dim)
            mk.moda_attention(q, k, v, layout=segmented(length), is_causal=True, enable_gqa=True, backend="triton")
    names = [name for name, _ in fake_cuda.COMPILED]
    assert len(names) == len(set(names)), names


# The recorder itself


FAULTS: dict[str, Callable[[Tensor], Any]] = {
    "copies between": lambda x: x.to("cpu"),
    "a tensor of numbers": lambda x: torch.tensor([1, 2], device=x.device),
    "a number set": lambda x: x.__setitem__(0, 1),
    "by a mask": lambda x: x.__setitem__(x > 0, torch.zeros((), device=x.device)),
    "on cuda:0": lambda x: torch.zeros(2, device="cuda:0"),
    "waits for the device": lambda x: torch.equal(x, x),
}


@pytest.mark.parametrize("what", FAULTS)
def test_the_recorder_sees(what: str) -> None:
    with MODE, Recorder(1) as recorder:
        x = torch.zeros(3, device=DEVICE)
        assert not recorder.faults
        try:
            FAULTS[what](x)
        except Exception as error:
            assert "DataDependent" in str(type(error)), error
    assert recorder.faults
