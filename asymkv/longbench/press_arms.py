"""Presses of kvpress as arms: how they are written down, and what they may store.

kvpress wants an older transformers than this library. Nothing here imports it: an arm is described and checked in any
environment, and applied in the worker of ``asymkv.longbench.peers``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from asymkv.budgets import parse_bytes
from asymkv.longbench.arms import ArmError, BaseArm, StoredTooMuchError, full_cache_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from asymkv.longbench.pressed import PressedCache

# A press may keep more than its ratio: whole chunks, sinks and windows, rounding. One that keeps everything is broken.
SLACK_SHARE, SLACK_ROWS = 0.05, 24


class PressError(ArmError):
    """A press does not exist, cannot be built, or fails on a prompt."""


@dataclasses.dataclass(frozen=True)
class PressSpec:
    """A press by its class's name in kvpress.

    Args:
        name: of the class.
        arguments: of its constructor, without ratio and base.
        base: the press that this one wraps.
    """

    name: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    base: PressSpec | None = None

    @classmethod
    def parse(cls, text: str) -> PressSpec:
        """Reads ``SnapKVPress`` or ``AdaKVPress(SnapKVPress)``."""
        found = re.fullmatch(r"(\w+)(?:\((.+)\))?", text.strip())
        if found is None:
            raise PressError(f"a press is written Name or Name(Base), found {text!r}")
        name, base = found.groups()
        return cls(name, {}, None if base is None else cls.parse(base))

    @classmethod
    def from_mapping(cls, table: Mapping[str, Any]) -> PressSpec:
        """Reads ``{press: Name, base: {press: ...}, argument: value, ...}``."""
        if not isinstance(table, Mapping) or not isinstance(table.get("press"), str):
            raise PressError(f"a press is a mapping with press: <class name>, found {table!r}")
        base = table.get("base")
        rest = {key: value for key, value in table.items() if key not in ("press", "base")}
        return cls(table["press"], rest, None if base is None else cls.from_mapping(base))

    def to_mapping(self) -> dict[str, Any]:
        """What ``from_mapping`` reads."""
        base = {} if self.base is None else {"base": self.base.to_mapping()}
        return {"press": self.name, **base, **self.arguments}

    @property
    def label(self) -> str:
        """``AdaKVPress(SnapKVPress)``."""
        return self.name if self.base is None else f"{self.name}({self.base.label})"


@dataclasses.dataclass(frozen=True)
class PressArm(BaseArm):
    """A press at one ratio or budget, or (without a press) the stock cache in the press's environment.

    Args:
        name: folder and label.
        press: which press.
        ratio: share of rows kept; kvpress's ``compression_ratio`` is 1 - ratio.
        budget: rows per KV head instead, or bytes of the whole cache (``"2MiB"``). A press keeps a share of the rows,
            and what it only hides it still stores.
        bare: always False: a prompt without its context needs no press.
    """

    name: str
    press: PressSpec | None = None
    ratio: float | None = None
    budget: int | str | None = None
    bare: bool = False

    def __post_init__(self) -> None:
        if self.press is not None and (self.ratio is None) == (self.budget is None):
            raise ValueError(f"{self.name}: a press takes a ratio, or a budget in rows or bytes")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"{self.name}: ratio must be in (0, 1], found {self.ratio}")
        if isinstance(self.budget, str):
            parse_bytes(self.budget)
        elif self.budget is not None and (not isinstance(self.budget, int) or self.budget < 1):
            raise ValueError(f"{self.name}: a press takes its budget in rows per KV head (an integer >= 1) or bytes "
                             f"('2MiB'), found {self.budget!r}")  # fmt: skip

    @property
    def compresses(self) -> bool:
        return self.press is not None

    @property
    def goes_on(self) -> bool:
        """A press works in one prefill, and leaves all that follows as it is."""
        return not self.compresses

    def share(self, tokens: int, token_bytes: float = 1.0) -> float:
        """Share of a prompt's rows that are kept; ``token_bytes``: of a token's rows in all layers and heads."""
        if self.ratio is not None:
            return self.ratio
        if self.budget is None:
            return 1.0
        rows = parse_bytes(self.budget) / token_bytes if isinstance(self.budget, str) else self.budget
        return min(1.0, rows / tokens)

    def applied(self, model: PreTrainedModel) -> contextlib.AbstractContextManager[Any]:
        from asymkv.longbench.pressed import pressed

        return pressed(model, lambda tokens: self._build(tokens, full_cache_bytes(model, 1)))

    def _build(self, tokens: int, token_bytes: int) -> Any:
        if self.press is None:
            return None
        from asymkv.longbench.presses import build

        return build(self.press, 1 - self.share(tokens, token_bytes))

    def prefill_key(self) -> str | None:
        """What presses must agree in to share a prefill, in the worker; None: nobody shares this one's."""
        if self.press is None:
            return None
        from asymkv.longbench.presses import prefill_key

        return prefill_key(self.press)

    def settings(self) -> dict[str, Any]:
        press = {} if self.press is None else self.press.to_mapping()
        return {**press, "ratio": self.ratio, "budget": self.budget}

    def stored(self, cache: PressedCache, model: PreTrainedModel) -> dict[str, Any]:
        """Real rows and buffers; ``nominal_ratio`` is the share of rows that attention still sees."""
        rows, seen, tokens = cache.rows(), cache.rows_in_view(), cache.tokens_seen
        return {
            "tokens_seen": tokens,
            "rows_min": min(rows),
            "rows_max": max(rows),
            "stored_bytes": cache.nbytes,
            "full_bytes": full_cache_bytes(model, tokens),
            "kept_ratio": sum(rows) / (len(rows) * tokens),
            "nominal_ratio": sum(seen) / (len(seen) * tokens),
            "peak_rows": cache.peak_rows,
            "peak_bytes": cache.peak_nbytes,
            "compactions": int(self.compresses),
            "backend": f"kvpress {self.press.label}" if self.press else "transformers",
        }

    def check(self, cache: PressedCache, tokens: int, extra: int) -> None:
        seen = cache.rows_in_view()
        mean = sum(seen) / len(seen)
        if not self.compresses:
            if mean != tokens + extra:
                raise StoredTooMuchError(f"{self.name} holds {mean:g} rows after {tokens + extra} tokens")
            return
        rows = cache.rows()
        share = self.share(tokens, cache.nbytes * len(rows) / max(sum(rows), 1))
        allowed = share * tokens * (1 + SLACK_SHARE) + SLACK_ROWS
        if mean > min(allowed, tokens) + extra:
            raise StoredTooMuchError(
                f"{self.name} shows attention {mean:g} rows per KV head after {tokens} prompt tokens; a share of "
                f"{share:g} allows {allowed:g} and {extra} rows since"
            )
