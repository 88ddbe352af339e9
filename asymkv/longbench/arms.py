"""The arms of a comparison: what each one does to the cache, and what it may store at most."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from asymkv.budgets import parse_bytes
from asymkv.checks import PromptRefusedError
from asymkv.provenance import files_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from asymkv.cache import CompressedCache
    from asymkv.config import CompressionConfig

FULL = "full"
# The full cache on a prompt whose context is empty: the floor of context retention.
NONE = "none"
# Before the class of a press of kvpress.
PRESS_PREFIX = "kvpress:"


class ArmError(RuntimeError):
    """An arm cannot be measured; the others of a run can."""


class StoredTooMuchError(ArmError):
    """A compressed arm holds more than its budget allows, so its results would be another method's."""


@contextlib.contextmanager
def named_refusal(arm: BaseArm, dataset: str, item: str) -> Iterator[None]:
    """Raises a method's refusal of a prompt as the arm's, with the row or window that it refused."""
    try:
        yield
    except PromptRefusedError as error:
        raise ArmError(f"{arm.name} refuses {dataset}, {item!r}: {error}") from error


class BaseArm(abc.ABC):
    """One column of a comparison: what is done to the model's cache, and what may be left of it.

    While an arm is applied, the model fills, compresses and continues caches of the arm's own kind, so that measuring
    takes the same calls for every arm.
    """

    name: str
    bare: bool

    @property
    @abc.abstractmethod
    def compresses(self) -> bool:
        """Whether this is anything but the full cache."""

    @property
    def goes_on(self) -> bool:
        """Whether a further prompt to a filled cache is compressed as the first one was, as a conversation needs it."""
        return True

    @abc.abstractmethod
    def applied(self, model: PreTrainedModel) -> contextlib.AbstractContextManager[Any]:
        """The model under this arm, unpatched again afterwards."""

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that the arm's numbers depend on, for a run's record."""

    def files(self, model: PreTrainedModel) -> dict[str, str]:
        """Sha256 of what was measured of the model beforehand and the settings lead to, by what it is."""
        return {}

    @abc.abstractmethod
    def stored(self, cache: Any, model: PreTrainedModel) -> dict[str, Any]:
        """Rows and bytes that the cache of one sequence holds, and held at most; plain json types."""

    @abc.abstractmethod
    def check(self, cache: Any, tokens: int, extra: int) -> None:
        """Raises where the cache of one sequence holds more than the arm allows.

        Args:
            cache: of one sequence.
            tokens: prompt tokens that were compressed.
            extra: rows that may have come since.
        """

    def in_force(self) -> dict[str, Any]:
        """What settings that were left open came to."""
        return {}

    def uncompacted(self, fed: int) -> int:
        """Of ``fed`` tokens that followed the prompt one by one, how many may still be there uncompressed."""
        return fed


@dataclasses.dataclass(frozen=True)
class Arm(BaseArm):
    """An arm of this library.

    Args:
        name: folder and label.
        config: the cache's settings.
        bare: whether the row's context is left out of the prompt.
    """

    name: str
    config: CompressionConfig
    bare: bool = False

    @property
    def ratio(self) -> float | None:
        """Share of rows kept, where the budget is one."""
        return self.config.ratio

    @property
    def compresses(self) -> bool:
        return self.config.options.compresses

    def applied(self, model: PreTrainedModel) -> contextlib.AbstractContextManager[Any]:
        import asymkv

        return asymkv.replace(model.config.model_type, self.config, model=model)

    def settings(self) -> dict[str, Any]:
        return self.config.to_dict()

    def files(self, model: PreTrainedModel) -> dict[str, str]:
        return files_of(self.config, model)

    def stored(self, cache: CompressedCache, model: PreTrainedModel) -> dict[str, Any]:
        counts, tokens, stats = stored_rows(cache), int(cache.tokens_seen[0]), cache.stats()
        return {
            "tokens_seen": tokens,
            "rows_min": min(counts),
            "rows_max": max(counts),
            "stored_bytes": cache.nbytes,
            "full_bytes": full_cache_bytes(model, tokens),
            "kept_ratio": sum(counts) / (len(counts) * tokens),
            "peak_rows": int(stats["peak_rows"]),
            "peak_bytes": int(stats["peak_nbytes"]),
            "compactions": int(stats["compactions"]),
            "backend": str(stats["backend"]),
        }

    def check(self, cache: CompressedCache, tokens: int, extra: int) -> None:
        check_stored(self, cache, tokens, extra)

    def in_force(self) -> dict[str, Any]:
        config = self.config
        return {"chunk_tokens": config.chunk, "positions": config.positions, "compresses": self.compresses}

    def uncompacted(self, fed: int) -> int:
        interval = self.config.decode_interval
        return min(fed, interval) if interval and self.compresses else fed


def full_cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of keys and values of ``tokens`` tokens in a plain cache, in the model's dtype."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * tokens * model.dtype.itemsize


def parse_settings(assignments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Reads ``key=value`` (all compressed arms, under the name ``""``) and ``arm.key=value``; values are yaml."""
    parsed: dict[str, dict[str, Any]] = {"": {}}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"settings are written key=value or arm.key=value, found {text!r}")
        arm, _, key = name.rpartition(".")
        parsed.setdefault(arm, {})[key] = yaml.safe_load(value)
    return parsed


def make_arms(
    names: Sequence[str],
    *,
    budget: int | str | None = None,
    ratio: float | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[BaseArm]:
    """Builds the arms of a run.

    Args:
        names: registered methods, shipped settings or paths of yaml files, ``full``, ``none``, and presses of kvpress
            (``kvpress:SnapKVPress``, ``kvpress:AdaKVPress(SnapKVPress)``; their arms are named ``kvpress_SnapKVPress``,
            ``kvpress_AdaKVPress_SnapKVPress``).
        budget: rows per KV head, or bytes of the whole cache, for the arms that compress.
        ratio: share of rows kept, for the arms that compress.
        settings: further settings by arm, those under ``""`` for every arm of this library that compresses.
    """
    by_arm = {name: dict(values) for name, values in (settings or {}).items()}
    common = {key: value for key, value in (("budget", budget), ("ratio", ratio)) if value is not None}
    common |= by_arm.pop("", {})
    size = {"budget": budget, "ratio": ratio}
    arms: list[BaseArm] = []
    for name in names:
        if name.startswith(PRESS_PREFIX):
            arms.append(_make_press_arm(name, size, by_arm))
        else:
            arms.append(_make_arm(name, common, by_arm.pop(Path(name).stem, {})))
    labels = [arm.name for arm in arms]
    if len(set(labels)) != len(labels):
        raise ValueError(f"arms must have different names, got {labels}")
    if by_arm:
        raise ValueError(f"settings for unknown arms {sorted(by_arm)}; arms of this run: {labels}")
    return arms


def _make_press_arm(name: str, size: Mapping[str, Any], by_arm: dict[str, dict[str, Any]]) -> BaseArm:
    from asymkv.longbench.press_arms import PressArm, PressSpec

    spec = PressSpec.parse(name.removeprefix(PRESS_PREFIX))
    label = "kvpress_" + spec.label.replace("(", "_").replace(")", "")
    return PressArm(label, dataclasses.replace(spec, arguments=by_arm.pop(label, {})), **size)


def _make_arm(name: str, common: Mapping[str, Any], own: Mapping[str, Any]) -> Arm:
    from asymkv.config import CompressionConfig
    from asymkv.methods import METHODS

    if name in (FULL, NONE):
        return Arm(name, CompressionConfig(method=FULL, **own), bare=name == NONE)
    label = name if name in METHODS else Path(name).stem
    return Arm(label, CompressionConfig.named(name, **{**common, **own}))


def allowed_rows(config: CompressionConfig, tokens: int) -> int | None:
    """Rows per KV head that a sequence of ``tokens`` prompt tokens may keep; None for a budget in bytes.

    Computed from the settings alone, so that it checks the cache and does not repeat what the cache says of itself.
    """
    if config.ratio is not None:
        kept = math.floor(Fraction(str(config.ratio)) * tokens)
        return max(kept, config.sink_size + config.window_size + 1)
    return config.budget if isinstance(config.budget, int) else None


def check_stored(arm: Arm, cache: CompressedCache, tokens: int, extra: int) -> None:
    """Raises where the cache of one sequence holds more than the arm's settings allow.

    A head may hold more than the mean where budgets are split unevenly over layers or heads; the mean may not exceed
    the budget in any case. An uncompressed arm must hold exactly its tokens.

    Args:
        arm: the arm that filled the cache.
        cache: of one sequence.
        tokens: prompt tokens that were fed.
        extra: rows that may have come since the last compaction.
    """
    counts = stored_rows(cache)
    if not arm.config.options.compresses:
        if set(counts) != {tokens + extra}:
            raise StoredTooMuchError(f"{arm.name} holds {set(counts)} rows after {tokens + extra} tokens")
        return
    allowed = allowed_rows(arm.config, tokens)
    if allowed is None:
        limit = parse_bytes(str(arm.config.budget))
        if cache.nbytes > limit and not extra:
            raise StoredTooMuchError(f"{arm.name} stores {cache.nbytes} bytes, its budget is {limit}")
        return
    if tokens <= allowed:
        return
    if "replay" in arm.config.options.needs:
        # The released AsymKV code compacts before a chunk, so that the last chunk stays whole.
        extra += min(arm.config.chunk or tokens, tokens)
    uniform = arm.config.head_budgets == "uniform" and arm.config.layer_budgets == "uniform"
    found = max(counts) if uniform else sum(counts) / len(counts)
    rounding = 0 if arm.config.layer_split.exact else 1
    if found > allowed + extra + rounding:
        raise StoredTooMuchError(
            f"{arm.name} holds {found:g} rows per KV head after {tokens} prompt tokens; its settings "
            f"({arm.config.describe()}) allow {allowed} and {extra} rows since the last compaction"
        )


def stored_rows(cache: CompressedCache) -> list[int]:
    """Rows of every (layer, KV head) of a cache of one sequence."""
    return [int(count) for layer in range(len(cache.layers)) for count in cache.num_rows(layer)[0]]
