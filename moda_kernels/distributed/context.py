"""`ContextParallel`: one long sequence on several processes, each with some of its columns.

What a rank does per layer: it maps its keys (`maps.py`), gets the keys and values that its rows see (`route.py`), and
attends once for each run of its columns. Who has which columns is planned once per layout (`plan.py`).
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from moda_kernels import backends
from moda_kernels.alignment.aligner import DuplexAligner
from moda_kernels.alignment.maps import KeyMap, ModalityMap, align_keys
from moda_kernels.attention import own_pseudo, own_weights
from moda_kernels.call import AttentionCall
from moda_kernels.distributed import maps
from moda_kernels.distributed.groups import check_same, group_of
from moda_kernels.distributed.plan import BALANCES, Plan, checked_mask, count, indices, plan_for, plan_shards
from moda_kernels.distributed.route import Route, route_for
from moda_kernels.distributed.shards import part_of
from moda_kernels.runtime import checks, collectives, sharded
from moda_kernels.runtime.lasting import lasting
from moda_kernels.tokens.layout import ModalityLayout, remembered
from moda_kernels.tokens.mask import ModularMask
from moda_kernels.tokens.pseudo import PseudoAttention
from moda_kernels.tokens.segments import as_layout

T = TypeVar("T")


class ContextParallel:
    """Context parallelism: every process of a group holds some columns of a sequence (or of packed documents). ::

        cp = ContextParallel(mesh["cp"], layout, mask)
        q, k, v = (cp.shard(x, dim=2) for x in (query, key, value))     # or: made from a shard of the tokens
        out = cp.attention(q, k, v, key_map=cp.aligner_map(aligner, k))  # this rank's rows
        whole = cp.unshard(out, dim=2)

    Exact and differentiable, with every option of :func:`moda_kernels.moda_attention`. What is differentiated is the
    sum of the processes' losses: a parameter's gradient is this rank's share (summed over ranks: the gradient), never
    None. Every rank has to run every forward and backward, also one that holds no tokens or has no loss of its own.

    Making one compares a checksum of layout, mask and balance over the ranks and waits for the device; one serves all
    layers of a step.

    Args:
        mesh_or_group: a ``ProcessGroup``, or a ``DeviceMesh`` of one dimension (``mesh["cp"]``); None: all processes.
        layout: of the whole sequence, the same on all ranks (or modality ids ``[B, L]``).
        mask: who sees whom. Default: full. Shards are balanced for it.
        balance: "work": as many columns as the others (give or take one) and as many visible pairs, in about two runs;
            "head_tail": one piece from the front and one from the back, as torch's ``context_parallel``;
            "none": one run of columns each.

    Attributes:
        layout: of the whole sequence. local_layout: of this rank's columns.
        plan: the :class:`Plan`. work: int64 ``[ranks]``, visible pairs per rank.
        rank, size: of this process in the group, and the group's.

    Raises:
        ValueError, TypeError: no process group, one that this process isn't in, layouts that differ between the ranks
            (on every rank), or a mask for another layout.
    """

    def __init__(
        self,
        mesh_or_group: Any,
        layout: ModalityLayout | Tensor,
        mask: ModularMask | None = None,
        balance: str = "work",
    ) -> None:
        self.group = group_of("mesh_or_group", mesh_or_group)
        self.rank, self.size = self.group.rank(), self.group.size()
        if mask is not None and not isinstance(mask, ModularMask):
            raise checks.wrong_type("mask", "a ModularMask", mask)
        self.layout = as_layout(layout, None if mask is None else mask.num_roles).check()
        self.balance = checks.choice("balance", balance, BALANCES)
        self._given = mask
        self.mask = checked_mask(mask, self.layout)
        check_same("layout, mask and balance", self.layout, (repr(self.mask), balance), self.group)
        self._hold(plan_shards(self.layout, self.mask, self.size, balance))

    @lasting
    def _hold(self, plan: Plan) -> None:
        self.plan = plan
        self._local = part_of(plan.layout, indices(plan.runs[self.rank]), self.layout.device)
        self._derived: dict[Any, Any] = {}

    def over(self, layout: ModalityLayout, mask: ModularMask | None = None) -> "ContextParallel":
        """The same shards with another layout of the same columns (other roles, documents where this one has one row,
        …) and its mask; made without a word to the other ranks.

        Raises:
            ValueError, TypeError: as when one is made; a layout of other columns.
        """
        if not isinstance(layout, ModalityLayout):
            raise checks.wrong_type("layout", "a ModalityLayout", layout)
        total = self.plan.layout.modality.shape[-1]
        if layout.modality.shape[-1] != total or layout.device != self.layout.device:
            raise checks.wrong_value("layout", f"one of the same {total} columns on {self.layout.device}", repr(layout))
        made = copy.copy(self)
        made.layout, made._given, made.mask = layout.check(), mask, checked_mask(mask, layout)
        here = layout if layout.device.type == "cpu" else layout.to("cpu")
        made._hold(plan_for(here, made.mask, self.plan.runs))
        return made

    @property
    def local_layout(self) -> ModalityLayout:
        return self._local.layout

    @property
    def work(self) -> Tensor:
        return self.plan.work

    def __repr__(self) -> str:
        runs = ", ".join(f"{start}–{stop - 1}" for start, stop in self.plan.runs[self.rank])
        return f"ContextParallel(rank {self.rank} of {self.size}: columns {runs or 'none'}; {self.layout!r})"

    # Shards

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of a tensor that every rank has whole.

        Args:
            x: of any dtype. dim: the axis of the layout's columns (of size L; packed: T).

        Raises:
            ValueError, TypeError: another size there.
        """
        total = self.plan.layout.modality.shape[-1]
        if sharded.is_dtensor(x):
            return self._of_dtensor(self.shard, x, dim)
        dim = self._axis("x", x, dim, total, f"the layout's {total} columns")
        if self.size == 1:
            return x
        runs = self.plan.runs[self.rank]
        parts = [x.narrow(dim, start, stop - start) for start, stop in runs] or [x.narrow(dim, 0, 0)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def unshard(self, x: Tensor, dim: int) -> Tensor:
        """The whole, on every rank, from each rank's shard. Its gradient on this rank is the sum of those of all ranks
        for this rank's columns.

        Raises:
            ValueError, TypeError: no shard.
        """
        mine = self.plan.rows[self.rank]
        if sharded.is_dtensor(x):
            return self._of_dtensor(self.unshard, x, dim)
        dim = self._axis("x", x, dim, mine, f"this rank's {mine} columns of the layout (ContextParallel.shard)")
        if self.size == 1:
            return x
        rows = x.movedim(dim, 0)
        padded = max(self.plan.rows)
        flat = rows.reshape(mine, -1) if mine else rows.flatten(1)
        flat = torch.nn.functional.pad(flat, (0, 0, 0, padded - mine)) if padded > mine else flat
        whole = collectives.gather_rows(flat, self.group).index_select(0, self._remember("order", self._order))
        out: Tensor = whole.unflatten(1, rows.shape[1:]).movedim(0, dim)
        return out

    @staticmethod
    def _of_dtensor(what: Callable[[Tensor, int], Tensor], x: Any, dim: int) -> Tensor:
        """Of a DTensor that is sharded over something else than columns."""
        from torch.distributed.tensor import DTensor

        if isinstance(dim, int) and any(p.is_partial() or p.is_shard(dim % x.dim()) for p in x.placements):
            raise checks.wrong_value("x", f"a DTensor whose axis {dim} is not sharded", f"{tuple(x.placements)}")
        out: Tensor = DTensor.from_local(what(x.to_local(), dim), x.device_mesh, x.placements, run_check=False)
        return out

    def _order(self) -> Tensor:
        """Where each column stands in what all ranks' padded shards make."""
        padded = max(self.plan.rows)
        order = torch.zeros(self.plan.layout.modality.shape[-1], dtype=torch.long)
        for rank, runs in enumerate(self.plan.runs):
            order[indices(runs)] = rank * padded + torch.arange(count(runs))
        return order.to(self.layout.device)

    @staticmethod
    def _axis(name: str, x: Tensor, dim: int, expected: int, what: str) -> int:
        checks.tensor(name, x)
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise checks.wrong_type("dim", "an int", dim)
        if not -x.dim() <= dim < x.dim():
            raise checks.wrong_value("dim", f"an axis of {name}", f"{dim} for {checks.describe(x)}")
        if x.shape[dim] != expected:
            raise checks.wrong_value(name, f"{what} along axis {dim}", x)
        return dim % x.dim()

    # Layers

    def aligner_map(self, aligner: DuplexAligner | torch.nn.Module, key: Tensor) -> KeyMap:
        """The map of this rank's keys, with Gram sums over the keys of all ranks.

        Args:
            aligner: of any fusion, norm and scope (or what PEFT has put around it).
            key: this rank's shard ``[B, Hkv, n, D]``, packed ``[n, Hkv, D]``.

        Returns:
            A :class:`KeyMap` for `attention` (and for :func:`align_keys` with `local_layout`).

        Raises:
            ValueError, TypeError: as the aligner. NotImplementedError: an aligner of released weights.
        """
        if not isinstance(aligner, torch.nn.Module):
            raise checks.wrong_type("aligner", "a DuplexAligner", aligner)
        if any(type(part).__name__ == "ReleasedAligner" for part in aligner.modules()):
            raise NotImplementedError("aligner: released weights need keys and values of all ranks; use DuplexAligner")
        made: KeyMap = aligner(key, parallel=self)
        return made

    def map_for(self, aligner: DuplexAligner, tokens: Tensor) -> KeyMap:
        """For `DuplexAligner`."""
        if aligner.scope == "sequence":
            return maps.sequence_map(aligner, tokens, self._local, self.plan, self.group)
        chain = self._remember("chain", lambda: maps.chain_of(self.plan, self.rank, self.layout.device))
        return maps.causal_map(aligner, tokens, self.local_layout, chain, self.group)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        *,
        layout: ModalityLayout | None = None,
        mask: ModularMask | None = None,
        key_map: KeyMap | None = None,
        pair_bias: Tensor | None = None,
        softcap: float | None = None,
        pseudo: PseudoAttention | None = None,
        duplex: str = "joint",
        branch_weights: tuple[float | Tensor, float | Tensor] | None = None,
        query_start: None = None,
        cu_seqlens_q: None = None,
        state: None = None,
        return_lse: bool = False,
        backend: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """:func:`moda_kernels.moda_attention` of the whole sequence, this rank's rows of it.

        Args:
            query, key, value: this rank's shards ``[B, H, n, D]``, packed ``[n, H, D]``; or DTensors of these, sharded
                over heads on another dimension of the mesh.
            attn_mask: this rank's rows against all columns: broadcast to ``[B, Hq, n, L]``.
            layout: None, or the layout that this was made with.
            mask: of this layer, where it differs from that which the shards are balanced for (a sliding layer).
            key_map: from `aligner_map`; or one of the sequence scope (or of released weights) made from all keys, where
                somebody has them.
            pair_bias, pseudo, branch_weights: of the whole, the same on every rank.
            query_start, cu_seqlens_q, state: None; decoding is not sharded.
            The others: as there.

        Returns:
            ``[B, Hq, n, E]``, packed ``[n, Hq, E]``; with ``return_lse`` also lse of these rows.

        Raises:
            ValueError, TypeError, NotImplementedError: as there, before anything is sent; tensors that are no shards.
            RuntimeError: a process has died, or did not take part within the group's timeout.
        """
        heads = sharded.heads_of(query=query, key=key, value=value)
        if heads is not None:
            every = query.shape[1]
            out, lse = self.attention(
                heads.local(query),
                heads.local(key),
                heads.local(value),
                heads.own("attn_mask", attn_mask, -3, every),
                dropout_p,
                is_causal,
                scale,
                enable_gqa,
                layout=layout,
                mask=mask,
                key_map=key_map,
                pair_bias=heads.own("pair_bias", pair_bias, 1, every),
                softcap=softcap,
                pseudo=own_pseudo(pseudo, heads, every),
                duplex=duplex,
                branch_weights=own_weights(branch_weights, heads, every),
                query_start=query_start,
                cu_seqlens_q=cu_seqlens_q,
                state=state,
                return_lse=True,
                backend=backend,
            )
            out = heads.whole(out, 1)
            return (out, heads.whole(lse, 0 if query.dim() == 3 else 1)) if return_lse else out
        refused = {"query_start": query_start, "cu_seqlens_q": cu_seqlens_q, "state": state}
        for name, given in refused.items():
            if given is not None:
                raise checks.wrong_value(name, "None (the rows are this rank's shard; decode without shards)", given)
        if layout is not None and layout is not self.layout:
            raise checks.wrong_value("layout", "None, or the layout that ContextParallel was made with", layout)
        mask = self._mask_of(mask, is_causal)
        if checks.is_causal_bias(attn_mask):
            expected = "None, bools or floats (the mask of ContextParallel says what is causal)"
            raise checks.wrong_value("attn_mask", expected, attn_mask)
        if isinstance(key_map, ModalityMap) and key_map.layout is not self.local_layout:
            key_map = self._of_shard(key_map)
        elif key_map is not None and not isinstance(key_map, maps.ShardMap):
            raise checks.wrong_type("key_map", "a KeyMap from ContextParallel.aligner_map", key_map)
        elif isinstance(key_map, maps.ShardMap) and key_map.runs != self.plan.runs:
            raise checks.wrong_value("key_map", "a map from aligner_map of the same shards", "one of other shards")
        dim = 0 if self.layout.packed else 2
        mine = self.plan.rows[self.rank]
        for name, x in (("query", query), ("key", key), ("value", value)):
            if isinstance(x, Tensor) and x.dim() == (3 if self.layout.packed else 4) and x.shape[dim] != mine:
                axes = "[n, H, D]" if self.layout.packed else "[B, H, n, D]"
                expected = f"this rank's shard {axes} with n = {mine} of the layout's columns (ContextParallel.shard)"
                raise checks.wrong_value(name, expected, x)
        options: dict[str, Any] = {
            "dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa, "mask": mask, "pseudo": pseudo,
            "duplex": duplex, "branch_weights": branch_weights, "softcap": softcap,
        }  # fmt: skip
        self._check_sequences("pair_bias", pair_bias)
        bias = None if pair_bias is None else self._local.of_sequences(pair_bias)
        call = AttentionCall.make(
            query, key, value, layout=self.local_layout, key_map=key_map, pair_bias=bias, **options
        )
        self._check_attn_mask(attn_mask, call.query)
        backends.choose(call, backend)  # what it refuses is refused before anything is sent
        key = call.key if key_map is None else align_keys(call.key, key_map, self.local_layout)
        route = self._route(mask)
        held_key, held_value = route.bring([key, call.value], dim, self.group)
        outs: list[Tensor] = []
        lses: list[Tensor] = []
        for each in route.calls:
            start, stop = each.rows
            low, high = each.keys
            part = AttentionCall.make(
                call.query.narrow(dim, start, stop - start),
                held_key.narrow(dim, low, high - low),
                held_value.narrow(dim, low, high - low),
                self._of_call(attn_mask, each.rows, each.part.columns),
                layout=each.part.layout,
                pair_bias=None if pair_bias is None else each.part.of_sequences(pair_bias),
                query_start=each.query_start,
                cu_seqlens_q=each.cu_seqlens_q,
                **options,
            )
            part = dataclasses.replace(part, queries=each.queries)
            out, lse = backends.choose(part, backend).attend(part)
            outs.append(out)
            lses.append(lse)
        if not outs:
            out, lse = self._nothing(call)
        else:
            out = outs[0] if len(outs) == 1 else torch.cat(outs, dim)
            at = 1 if self.layout.packed else 2
            lse = lses[0] if len(lses) == 1 else torch.cat(lses, at)
        used: list[object] = [query, attn_mask, pair_bias, *(branch_weights or ())]
        # What is held is used by every call, and may be large: zeros of it only where there is none.
        used += [] if outs else [held_key, held_value]
        used += [] if pseudo is None else [pseudo.base, pseudo.decay]
        out = collectives.attached(out, *used)
        return (out, collectives.attached(lse, *used)) if return_lse else out

    def _of_shard(self, key_map: ModalityMap) -> KeyMap:
        """A map by sequences and modalities that was made from all keys."""
        key_map.check(self.layout, key_map.num_heads, key_map.head_dim)
        unit, of = key_map.unit_matrix, self._local.sequences
        return dataclasses.replace(
            key_map,
            matrix=key_map.matrix[slice(*of)],
            mapped=key_map.mapped[slice(*of)],
            unit_matrix=None if unit is None else unit[slice(*of)],
            layout=self.local_layout,
        )

    def _mask_of(self, mask: ModularMask | None, is_causal: bool) -> ModularMask:
        if is_causal and (mask is not None or self._given is not None):
            raise ValueError("is_causal and mask: expected one of them, got both (the mask says what is causal)")
        if is_causal:
            return ModularMask.causal(self.layout.num_roles)
        return self.mask if mask is None else checked_mask(mask, self.layout)

    def _check_sequences(self, name: str, pair_bias: Tensor | None) -> None:
        if pair_bias is None:
            return
        checks.float_tensor(name, pair_bias)
        n = self.layout.num_sequences
        if pair_bias.dim() != 4 or pair_bias.shape[0] not in (1, n):
            raise checks.wrong_value(name, f"[N or 1, Hq or 1, M, M] with N = {n} of the whole layout", pair_bias)

    def _check_attn_mask(self, attn_mask: Tensor | None, query: Tensor) -> None:
        if attn_mask is None:
            return
        checks.tensor("attn_mask", attn_mask)
        if self.layout.packed:
            raise checks.wrong_value("attn_mask", "None with a packed layout", attn_mask)
        if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
            raise checks.wrong_type("attn_mask", "a bool or floating-point tensor", attn_mask)
        full = (*query.shape[:3], self.layout.modality.shape[1])
        sizes = zip(reversed(attn_mask.shape), reversed(full), strict=False)
        if attn_mask.dim() > 4 or not all(size in (1, most) for size, most in sizes):
            raise checks.wrong_value(
                "attn_mask", f"this rank's rows against all columns, broadcast to [B, Hq, n, L] = {full}", attn_mask
            )
        checks.same_device("attn_mask", attn_mask, self.layout.device, "the layout")

    @staticmethod
    def _of_call(attn_mask: Tensor | None, rows: tuple[int, int], columns: Tensor) -> Tensor | None:
        if attn_mask is None:
            return None
        if attn_mask.dim() > 1 and attn_mask.shape[-2] > 1:
            attn_mask = attn_mask.narrow(-2, rows[0], rows[1] - rows[0])
        if attn_mask.dim() and attn_mask.shape[-1] > 1:
            attn_mask = attn_mask.index_select(-1, columns.to(attn_mask.device))
        return attn_mask

    def _nothing(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Output and lse of no rows."""
        out = call.query.new_zeros(*call.query.shape[:-1], call.value.shape[-1])
        wide = torch.float64 if out.dtype == torch.float64 else torch.float32
        lse = out[..., 0].to(wide)
        lse = lse.transpose(0, 1) if self.layout.packed else lse
        return out, torch.stack((lse, lse), -1) if call.split else lse

    def _route(self, mask: ModularMask) -> Route:
        def make() -> Route:
            plan = self.plan_of(mask)
            return route_for(plan, self.rank, self.layout.device)

        return self._remember(("route", mask), make)

    def plan_of(self, mask: ModularMask) -> Plan:
        """The plan of these shards for the mask of a layer."""
        if mask == self.mask:
            return self.plan
        return self._remember(("plan", mask), lambda: plan_for(self.plan.layout, mask, self.plan.runs))

    def _remember(self, name: Any, make: Callable[[], T]) -> T:
        return remembered(self._derived, name, make)
