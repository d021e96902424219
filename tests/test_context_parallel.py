"""Context, Ulysses and tensor parallelism on 2 and 4 processes (gloo) against one, by the error criterion: outputs, lse
and all gradients; a parameter's is this rank's share, or whole under tensor parallelism, and never None.

As a program it runs every case in every way; the tests are a part of that."""

import dataclasses
import itertools
from typing import Any

import torch
from ranks import Ranks, world
from torch import Tensor

import moda_kernels as mk
from moda_kernels import distributed as md
from moda_kernels.commands.bench.layouts import LAYOUTS, make_workload
from moda_kernels.testing import CASES, Case, Inputs, Result, generator
from moda_kernels.testing.oracle import judged

#: Of `testing.cases`, all that make sense of shards.
SHARDED = {case.name: case for case in CASES if case.queries is None and case.fusion != "released"}
BALANCES = ("work", "head_tail", "none")
DATA = ("query", "key", "value")


# Run by every rank


class Way:
    """How a call is spread over the ranks, and what comes of it.

    Attributes:
        rows: how columns are. heads: of a mesh of two processes or more, the dimension over which heads are; or None.
    """

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        layout, mask = arguments["layout"], arguments.get("mask")
        size = dist.get_world_size()
        self.name, self.heads, group = name, None, world()
        if name.startswith("tensor"):
            tensor = size if name == "tensor" else 2
            mesh = init_device_mesh("cpu", (tensor, size // tensor), mesh_dim_names=("tp", "cp"))
            self.heads, group = mesh["tp"], mesh["cp"]
        self.rows = md.ContextParallel(group, layout, mask, name if name in BALANCES else "none")
        self.packed = self.rows.layout.packed
        self.summed = group if self.heads is None else group.get_group()

    def part(self, x: Tensor, axis: int, heads: int) -> Tensor:
        """Of a tensor that every rank has whole, what is here."""
        x = self.rows.shard(x, axis)
        if self.heads is not None:
            each = x.shape[heads] // self.heads.size()
            x = x.narrow(heads, self.heads.get_local_rank() * each, each)
        return x

    def whole(self, x: Tensor, axis: int) -> Tensor:
        return self.rows.unshard(x if self.heads is None else x.full_tensor(), axis)  # type: ignore[attr-defined]

    def attend(self, case: Case, tensors: dict[str, Tensor], arguments: dict[str, Any]) -> Any:
        """What a model would call: this rank's rows and their lse."""
        q, k, v = (self.part(tensors[name], 0 if self.packed else 2, 1) for name in DATA)
        if self.heads is not None:
            from torch.distributed.tensor import DTensor, Shard

            q, k, v = (DTensor.from_local(x, self.heads, [Shard(1)]) for x in (q, k, v))
        given = {name: x for name, x in arguments.items() if name not in ("layout", "key_map", "mask")}
        aligner = None
        if case.fusion is not None:
            aligner = mk.DuplexAligner(
                k.shape[-1], self.rows.layout.num_modalities, fusion=case.fusion, norm=case.norm, scope=case.scope,
                aligned=case.aligned, renorm=case.renorm, source_roles=case.source_roles,
            )  # fmt: skip
            for name in {"ratio", "weight"} & set(tensors):
                delattr(aligner, name)
                setattr(aligner, name, tensors[name])
        if self.name == "ulysses":
            return md.ulysses_attention(
                q, k, v, world(), key_map=aligner, layout=self.rows.layout, mask=arguments.get("mask"), return_lse=True,
                **given,
            )  # fmt: skip
        if self.name == "tensor":
            layout = self.rows.layout
            given |= {"layout": layout, "mask": arguments.get("mask")}
            given["key_map"] = None if aligner is None else aligner(k, layout)
            return mk.moda_attention(q, k, v, return_lse=True, **given)
        if isinstance(given.get("attn_mask"), Tensor) and given["attn_mask"].shape[-2] > 1:
            given["attn_mask"] = self.rows.shard(given["attn_mask"], -2)
        given["key_map"] = None if aligner is None else self.rows.aligner_map(aligner, k)
        return self.rows.attention(q, k, v, return_lse=True, **given)


def judge(case: Case, inputs: Inputs, dtype: torch.dtype, how: str, judging: int) -> list[str]:
    """What is wrong with a case; every rank runs it, and one looks."""
    import torch.distributed as dist

    leaves = {name: x.detach().requires_grad_() for name, x in inputs.tensors.items()}
    arguments = inputs.arguments(leaves)
    way = Way(how, arguments)
    row, column = (0, 1) if way.packed else (2, 2)
    out, lse = way.attend(case, leaves, arguments)
    g = generator(2)
    shape = [*inputs.tensors["query"].shape[:-1], inputs.tensors["value"].shape[-1]]
    lse_shape = [shape[1], shape[0]] if way.packed else shape[:-1]
    lse_shape += [2] if case.duplex == "split" else []
    upstream = [torch.randn(n, generator=g).to(dtype).to(x.dtype) for n, x in ((shape, out), (lse_shape, lse))]
    mine = [way.part(upstream[0], row, 1), way.part(upstream[1], column, 0 if way.packed else 1)]
    local = [x if way.heads is None else x.to_local() for x in (out, lse)]
    grads = torch.autograd.grad(local, tuple(leaves.values()), mine)
    found = {"out": way.whole(out.detach(), row), "lse": way.whole(lse.detach(), column)}
    for name, grad in zip(leaves, grads, strict=True):
        total = grad.double()
        dist.all_reduce(total, group=None if name in DATA else way.summed)
        found[f"d {name}"] = total.to(dtype)
    if judging != dist.get_rank():
        return []
    compared = judged(Result(found), inputs, dtype, "auto", seed=0)
    return [f"{case} {dtype} {how}: {c}" for c in compared if not c.good]


@dataclasses.dataclass(frozen=True)
class OfLayout(Case):
    """A case over a layout of the benchmarks (``like``), of at least 101 tokens."""

    like: str = "llava-1.5"

    def layout(self, length: int, seed: int = 0) -> mk.ModalityLayout:
        return make_workload(self.like, max(length, 101), seed).layout

    def build(self, dtype: torch.dtype = torch.float32, device: Any = "cpu", **sizes: int) -> Inputs:
        mask = LAYOUTS[self.like][1]
        return Case.build(dataclasses.replace(self, mask=lambda m: mask), dtype, device, **sizes)


def _options(i: int) -> dict[str, Any]:
    """Fusions and scopes in turn, with everything else that has a gradient."""
    fusion, scope = ("concat", "add", "linear")[i % 3], ("causal", "sequence")[i % 2]
    return {
        "fusion": fusion, "scope": scope, "bias": "own", "pseudo": {"length": None}, "group": 2,
        "duplex": ("joint", "split")[i % 4 // 2], "weights": i % 4 // 2 == 1,
    }  # fmt: skip


BENCH = {
    name: OfLayout(name, packed=name == "packed", padding=("none",), like=name, **_options(i))
    for i, name in enumerate(LAYOUTS)
}
MORE = {
    case.name: case
    for case in (
        # Fewer tokens than ranks, one, and none on some.
        Case("three_tokens", length=3, padding=("none", "middle"), fusion="concat", scope="causal", bias="own"),
        Case("one_token", length=1, padding=("none",), fusion="add", pseudo={"length": None}, bias="shared"),
        Case("one_token_split", length=1, padding=("none",), duplex="split", weights=True, fusion="linear"),
        Case("few_packed", length=2, packed=True, fusion="linear", scope="causal", weights=True, duplex="split"),
        Case("chunks_causal", chunks=True, fusion="concat", scope="causal", padding=("middle", "left"), longest=7),
        Case("packed_chunks", packed=True, chunks=True, fusion="add", scope="causal", longest=9, modalities=3),
        Case("renorm_packed", packed=True, fusion="concat", renorm=True, scope="sequence", source_roles=(0,), roles=2),
        Case("all_hidden", lambda r: mk.ModularMask(((mk.Visibility.HIDDEN,) * r,) * r), bias="own", fusion="add"),
        Case(
            "window_packed", lambda r: mk.ModularMask(mk.ModularMask.causal(r).rules, window=9), packed=True,
            pseudo={"length": None}, fusion="linear", scope="causal", duplex="split", weights=True,
        ),
        Case(
            "window_hidden", lambda r: mk.ModularMask(mk.ModularMask.self_only(r, causal=True).rules, 9, "all"),
            padding=("none", "middle"), modalities=3, longest=3, bias="own",
        ),
    )
}  # fmt: skip
EVERYTHING = SHARDED | BENCH | MORE


def judge_all(
    names: list[str], dtypes: list[torch.dtype], ways: tuple[str, ...], key_heads: int | None = None
) -> list[str]:
    import torch.distributed as dist

    wrong: list[str] = []
    for number, (name, dtype, way) in enumerate(itertools.product(names, dtypes, ways)):
        case = EVERYTHING[name]
        case = case if key_heads is None else dataclasses.replace(case, key_heads=key_heads)
        try:
            wrong += judge(case, case.build(dtype), dtype, way, number % dist.get_world_size())
        except Exception as error:
            raise AssertionError(f"{name} {dtype} {way}") from error
    return wrong


def check(ranks: Ranks, *arguments: Any) -> None:
    wrong = list(itertools.chain(*ranks.run(judge_all, *arguments)))
    assert not wrong, "\n".join(wrong)


ONE_IN_THREE = list(EVERYTHING)[::3]


def test_context_parallel(four: Ranks) -> None:
    check(four, list(EVERYTHING), [torch.float64], ("work",))


def test_context_parallel_in_float32(two: Ranks) -> None:
    check(two, ONE_IN_THREE, [torch.float32], ("work",))


def test_other_balances(four: Ranks) -> None:
    check(four, [*MORE, "llava-next", "packed"], [torch.float64], ("head_tail", "none"))


def test_ulysses(four: Ranks) -> None:
    check(four, list(EVERYTHING)[1::3], [torch.float64], ("ulysses",), 4)


def test_tensor_parallel(two: Ranks) -> None:
    check(two, list(EVERYTHING)[2::3], [torch.float64], ("tensor",), 2)


def test_tensor_times_context(four: Ranks) -> None:
    check(four, list(EVERYTHING)[::4], [torch.float64], ("tensor, context",), 2)


if __name__ == "__main__":  # every way of everything, which takes many minutes
    for size, dtype in itertools.product((2, 4), (torch.float64, torch.float32)):
        ranks = Ranks(size)
        for how in (*BALANCES, "ulysses", "tensor", "tensor, context"):
            check(ranks, list(EVERYTHING), [dtype], (how,), None if how in BALANCES else size)
            print(f"{how} on {size} processes in {dtype}: {len(EVERYTHING)} cases are right", flush=True)
        ranks.close()
