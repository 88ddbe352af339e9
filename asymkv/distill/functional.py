"""The cache as a function: rows are tensors of the graph, so that a loss reaches what was kept and what was merged.

Decisions (scores, choices, assignments, counts) are made without a gradient by the method's own code; keys and values
are gathered and combined by PyTorch's operators. Legend as in ``asymkv.view``: B batch, H_kv KV heads, T rows, D size.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from asymkv.budgets.heads import Judged
from asymkv.cache import CompressedCache
from asymkv.layer import FLOAT_TYPES, CompressedLayer
from asymkv.observations import attention_mass
from asymkv.ops import differentiable_attention, row_bias
from asymkv.plan import CompactionPlan
from asymkv.view import RowView

if TYPE_CHECKING:
    from asymkv.budgets.heads import HeadBudgets, Rows
    from asymkv.config import CompressionConfig
    from asymkv.methods.base import Method
    from asymkv.rope import Rope

SERVED = frozenset({"queries", "attention"})
COLUMNS = ("keys", "values", "cardinality", "positions")


def check_differentiable(config: CompressionConfig) -> None:
    """Raises ValueError for settings whose decisions need more than the differentiable cache has."""
    missing = sorted(config.options.needs - SERVED)
    if missing:
        raise ValueError(f"method {config.method!r} cannot be trained through: it needs {missing}; allowed are methods "
                         f"that judge rows by {sorted(SERVED)}, chunk by chunk")
    if config.positions != "original":
        raise ValueError(f"training needs position_policy 'original'; found {config.positions!r}")


class DifferentiableLayer(CompressedLayer):
    """One layer's rows as dense tensors ``[B, H_kv, T, ...]``, by ascending position; nothing is changed in place."""

    columns: dict[str, Tensor]
    statistics: dict[str, Tensor]
    length: Tensor  # [B, H_kv] int64

    @property
    def kv_heads(self) -> int:
        return self.length.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the rows; those that the graph keeps are not counted."""
        return sum(x.numel() * x.element_size() for x in (*self.columns.values(), *self.statistics.values()))

    def heads_of(self, row: int) -> list[int]:
        """See :meth:`CompressedLayer.heads_of`."""
        return self.length[row].tolist() if self.is_initialized else [0]

    def append_packed(
        self, keys: Tensor, values: Tensor, positions: Tensor, counts: list[int], arrived: list[int] | None = None
    ) -> None:
        """Adds ``[B, H_kv, t, D]`` rows of cardinality 1.

        Raises:
            ValueError: for padding: training takes full blocks of text.
        """
        if values.dtype not in FLOAT_TYPES or min(counts) < keys.shape[2]:
            raise ValueError(f"training takes blocks without padding, of {[str(t) for t in FLOAT_TYPES]}; found "
                             f"{counts} tokens in {keys.shape[2]} columns of {values.dtype}")
        at = positions.int()[:, None].expand(keys.shape[:3])
        keys, values = keys.to(values.dtype).contiguous(), values.contiguous()  # as compiled statistics want them
        new = {"keys": keys, "values": values, "cardinality": torch.ones_like(at), "positions": at}
        if not self.is_initialized:
            self.columns, self.statistics = new, {}
            self.length = torch.full(keys.shape[:2], keys.shape[2], device=keys.device)
            self.tokens, self.is_initialized = list(counts), True
            return
        present = torch.cat([self._valid(), torch.ones_like(at, dtype=torch.bool)], dim=2)
        joined = {name: torch.cat([self.columns[name], rows], dim=2) for name, rows in new.items()}
        spare = [0, 0, 0, keys.shape[2]]  # statistics of new rows are 0
        kept = {n: torch.nn.functional.pad(x, spare if x.ndim == 4 else spare[2:]) for n, x in self.statistics.items()}
        self._keep(present, joined, kept)
        self.tokens = [n + c for n, c in zip(self.tokens, counts, strict=True)]

    def attend(
        self, query: Tensor, query_positions: Tensor | None, counts: list[int], scale: float, backend: str
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`CompressedLayer.attend`; in the dtype of the rows, whatever autocast says."""
        flat = self.columns["cardinality"].flatten(0, 1)
        at = self.columns["positions"]
        if query_positions is None:
            query_positions = torch.full((at.shape[0], 1), int(at.max()), device=at.device)
        # Rounded from fp64, as the cache's: a processor's fp32 logarithms differ by where a number stands in a tensor.
        bias = row_bias(flat.double().log().float(), self._valid().flatten(0, 1), at, query_positions, self.kv_heads)
        keys, values = self.columns["keys"], self.columns["values"]
        with torch.autocast(query.device.type, enabled=False):
            return differentiable_attention(backend)(query.to(keys.dtype), keys, values, bias, scale)

    def view(self, rope: Rope, scale: float, *, prompt: bool = True) -> RowView:
        """See :meth:`CompressedLayer.view`; keys and values are part of the graph."""
        rows: dict[str, Any] = dict(self.columns)
        return RowView(
            **rows, rotary_positions=self.columns["positions"].long(), valid=self._valid(), lengths=self.length,
            budget=self.length, tokens=torch.tensor(self.tokens, device=self.length.device), prompt=prompt,
            scale=scale, rope=rope, statistics=dict(self.statistics), layer=self.index, memory=self.memory,
            output_weight=self.output_weight, learned=self.learned,
        )  # fmt: skip

    def compact(self, method: Method, view: RowView, limit: list[Rows | None], heads: HeadBudgets) -> None:
        """See :meth:`CompressedLayer.compact`: what goes is decided without a gradient."""
        with torch.autocast(view.keys.device.type, enabled=False):
            self.with_budget(view, limit)
            with torch.no_grad():
                cost, free = method.judge(view)
                chosen = heads.choose(Judged(cost, free, view.lengths, view.budget, view.layer))
            self.carry_out(method.carry_out(view, chosen), view)

    def carry_out(self, plan: CompactionPlan, view: RowView) -> None:
        """See :func:`asymkv.plan.execute`: the same result, differentiable in the view's keys and values."""
        plan.validate(view)
        stays = merge_groups(plan, view)
        self._keep(stays, {name: getattr(view, name) for name in COLUMNS}, dict(view.statistics))

    def accumulate_mass(self, view: RowView) -> None:
        """See :meth:`CompressedLayer.accumulate_mass`."""
        with torch.no_grad(), torch.autocast(view.keys.device.type, enabled=False):
            mass = attention_mass(view)
            self.statistics = {**self.statistics, "mass": self.statistics.get("mass", 0) + mass}
        view.statistics["mass"] = self.statistics["mass"]

    def fork(self) -> DifferentiableLayer:
        """A copy that shares the tensors, which nobody changes in place."""
        out = copy.copy(self)
        out.tokens, out.memory = list(self.tokens), dict(self.memory)
        return out

    def detach(self) -> None:
        """Cuts the graph behind the rows."""
        if self.is_initialized:
            self.columns = {name: x.detach() for name, x in self.columns.items()}

    def _valid(self) -> Tensor:
        width = self.columns["positions"].shape[2]
        return torch.arange(width, device=self.length.device) < self.length[..., None]

    def _keep(self, stays: Tensor, columns: dict[str, Tensor], statistics: dict[str, Tensor]) -> None:
        """Takes the marked rows, in their order, as the layer's own."""
        self.length = stays.sum(-1)
        if bool(stays.all()):
            self.columns, self.statistics = columns, statistics
            return
        order = (~stays).to(torch.uint8).argsort(dim=-1, stable=True)[..., : int(self.length.max())]
        self.columns = {name: _gather(x, order) for name, x in columns.items()}
        self.statistics = {name: _gather(x, order) for name, x in statistics.items()}


def merge_groups(plan: CompactionPlan, view: RowView) -> Tensor:
    """Merges the rows of each group into its last one, in the view; what stays, ``[B, H_kv, T]`` bool."""
    group = plan.destination.clamp(min=0)
    present = (plan.destination >= 0) & view.valid
    index = torch.arange(group.shape[-1], device=group.device).expand_as(group)

    def total(x: Tensor) -> Tensor:
        """Sum over each row's group."""
        x = torch.where(present if x.ndim == 3 else present[..., None], x, 0)
        at = group if x.ndim == 3 else group[..., None].expand_as(x)
        return torch.zeros_like(x).scatter_add(2, at, x).gather(2, at)

    last = torch.full_like(group, -1).scatter_reduce(2, group, torch.where(present, index, -1), "amax").gather(2, group)
    several = (total(present.long()) > 1) & present
    if bool(several.any()):
        dtype = torch.promote_types(view.keys.dtype, torch.float32)
        n = view.cardinality.to(dtype)[..., None]
        given = n if plan.key_weight is None else plan.key_weight.to(dtype).reshape(*group.shape, -1)
        whole = total(given)
        weight = torch.where(whole > 0, given / torch.where(whole > 0, whole, 1), n / total(n).clamp(min=1))
        key = view.rope.rotate(total(weight * view.unrotate(view.keys)), view.rotary_positions)
        value = total(n * view.values.to(dtype)) / total(n).clamp(min=1)
        view.keys = torch.where(several[..., None], key.to(view.keys.dtype), view.keys)
        view.values = torch.where(several[..., None], value.to(view.values.dtype), view.values)
        view.statistics = {name: torch.where(_like(several, x), total(x), x) for name, x in view.statistics.items()}
        view.cardinality = torch.where(several, total(view.cardinality), view.cardinality)
    return present & (index == last)


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask if x.ndim == 3 else mask[..., None]


def _gather(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(2, order if x.ndim == 3 else order[..., None].expand(*order.shape, x.shape[-1]))


class DifferentiableCache(CompressedCache):
    """A :class:`CompressedCache` of differentiable layers, for blocks of text of equal length.

    Raises:
        ValueError: for a method that cannot be trained through.
    """

    layers: list[DifferentiableLayer]  # type: ignore[assignment]

    def __init__(self, config: CompressionConfig, **shape: Any) -> None:
        check_differentiable(config)
        super().__init__(config, **shape)
        self.layers = [DifferentiableLayer(i, config.positions) for i in range(len(self.layers))]

    def measure(self, layer: CompressedLayer) -> None:
        """Sizes are those of the real cache; nothing is measured here."""

    def detached(self) -> DifferentiableCache:
        """A fork that no gradient flows back from."""
        out = self.fork()
        for layer in out.layers:
            layer.detach()
        return out

    def fork(self) -> DifferentiableCache:
        """See :meth:`CompressedCache.fork`; tensors are shared."""
        return super().fork()  # type: ignore[return-value]
