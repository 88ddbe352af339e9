"""How many rows may be kept, and how they are split over layers and heads."""

from asymkv.budgets import heads, layers
from asymkv.budgets.heads import HeadBudgets
from asymkv.budgets.layers import LayerBudgets
from asymkv.budgets.pooled import PooledHeads, PooledLayers
from asymkv.budgets.rows import (
    SLACK_ROWS,
    SLACK_SHARE,
    CacheShape,
    capacity_for,
    parse_bytes,
    resolve_rows,
    rows_for_bytes,
    validate_budget,
)
from asymkv.budgets.scored import SCORED_HEADS
from asymkv.budgets.split import make_split

HEAD_BUDGETS: dict[str, type[HeadBudgets]] = {**heads.HEAD_BUDGETS, **SCORED_HEADS, "pooled": PooledHeads}
LAYER_BUDGETS: dict[str, type[LayerBudgets]] = {**layers.LAYER_BUDGETS, "pooled": PooledLayers}

__all__ = [
    "HEAD_BUDGETS", "LAYER_BUDGETS", "SLACK_ROWS", "SLACK_SHARE", "CacheShape", "HeadBudgets", "LayerBudgets",
    "capacity_for", "make_split", "parse_bytes", "resolve_rows", "rows_for_bytes", "validate_budget",
]  # fmt: skip
