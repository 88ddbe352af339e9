"""Settings of a compressed cache: one frozen, validated object."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from asymkv.budgets import HEAD_BUDGETS, LAYER_BUDGETS, HeadBudgets, LayerBudgets, make_split, validate_budget
from asymkv.checks import check_integer
from asymkv.dimensions import Zack, make_dimensions
from asymkv.paths import config_path, config_root

if TYPE_CHECKING:
    import torch

    from asymkv.methods.base import Method

POSITION_POLICIES = ("original", "compact", "cardinality")
DEFAULT_BUDGET = 2048
OFTEN = 64  # tokens between compactions; see CompressionConfig.keeps_low_keys
WHOLE_PROMPT = "prompt"


class _Default(int):
    """An integer default that a method may replace by its own; an explicit equal value is not one."""


class _DefaultName(str):
    """The same for a name."""


@dataclasses.dataclass(frozen=True, init=False)
class CompressionConfig:
    """What to compress, how, and to how much.

    Args:
        method: a name in ``asymkv.methods.METHODS``.
        budget: rows per KV head (int), or the bytes of the whole cache of one sequence as a string (``"512MiB"``); what
            backend "flash" builds over merged rows, 24 bytes for each cardinality of a head, comes on top of those.
        ratio: share of rows **kept**, in (0, 1]: ``floor(ratio * prompt tokens)`` of each row of the batch, raised to
            ``sink_size + window_size + 1`` where smaller. Without budget and ratio: budget 2048.
        sink_size: first tokens of a sequence, kept exact.
        window_size: last tokens of a sequence, never given up at a compaction; kept exact, but for methods that add the
            values of leaving rows to kept ones (CaM, D2O, value_merge).
        chunk_size: own tokens per prefill chunk; "prompt" = the whole prompt at once; None = the method's own.
        decode_interval: compact every so many own generated tokens; 0 = never in decode.
        head_budgets: how a layer's budget is split over its KV heads (name or mapping with ``kind``).
        layer_budgets: how the budget is split over layers (name or mapping with ``kind``).
        position_policy: rotary positions after a compaction: "original" (unchanged), "compact" (rank of the row in
            its head) or "cardinality" (running sum of cardinalities); None = the method's own. In 16 bits, rows that
            move less than 64 tokens apart (chunk_size, decode_interval) keep the low halves of their keys too.
        backend: attention backend, or "auto".
        dimensions: dimensions of keys and values that rows are stored in (name or mapping with ``kind``, see
            ``asymkv.dimensions``); None = all.
        method_options: parameters of the method; an unknown key raises.

    Raises:
        ValueError: for a bad value or an unknown key; names the value found and those allowed.
    """

    method: str
    budget: int | str | None
    ratio: float | None
    sink_size: int
    window_size: int
    chunk_size: int | str | None
    decode_interval: int
    head_budgets: str | Mapping[str, Any]
    layer_budgets: str | Mapping[str, Any]
    position_policy: str | None
    backend: str
    dimensions: str | Mapping[str, Any] | None
    options: Method

    def __init__(
        self,
        method: str = "asymkv",
        *,
        budget: int | str | None = None,
        ratio: float | None = None,
        sink_size: int = _Default(4),
        window_size: int = _Default(32),
        chunk_size: int | str | None = None,
        decode_interval: int = _Default(128),
        head_budgets: str | Mapping[str, Any] = _DefaultName("uniform"),
        layer_budgets: str | Mapping[str, Any] = _DefaultName("uniform"),
        position_policy: str | None = None,
        backend: str = "auto",
        dimensions: str | Mapping[str, Any] | None = None,
        **method_options: Any,
    ) -> None:
        from asymkv.methods import METHODS
        from asymkv.methods.base import Method

        values = {k: v for k, v in locals().items() if k in _FIELDS}
        given = [k for k, v in values.items() if v is not None and not isinstance(v, (_Default, _DefaultName))]
        object.__setattr__(self, "_given", given)
        options = method_options.pop("options", None)  # as dataclasses.replace hands it over
        if options is not None:
            if not isinstance(options, Method):
                raise ValueError(f"options: give a method's own settings as keyword arguments of their own; found "
                                 f"options={options!r}")
            same = type(options) is METHODS.get(method)
            method_options = {**(options.to_dict() if same else {}), **method_options}
        values["options"] = _make_method(method, method_options)
        for name, default in values["options"].defaults().items():
            if values[name] is None or isinstance(values[name], (_Default, _DefaultName)):
                values[name] = default
        if budget is None and ratio is None and values["budget"] is None:
            values["budget"] = DEFAULT_BUDGET
        if ratio is not None and budget is None:
            values["budget"] = None
        for name, value in values.items():
            object.__setattr__(self, name, _plain(value))
        self._validate()

    def __getattr__(self, name: str) -> Any:
        """The method's own settings, as if they were this object's."""
        options = vars(self).get("options")
        if options is None or name not in options.to_dict():
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(options, name)

    def __hash__(self) -> int:
        return hash((self.method, self.budget, self.ratio))

    def _validate(self) -> None:
        from asymkv.ops import BACKENDS

        if self.budget is not None and self.ratio is not None:
            raise ValueError(f"give budget or ratio, not both; found budget={self.budget!r}, ratio={self.ratio!r}")
        for name in ("sink_size", "window_size", "decode_interval"):
            check_integer(name, getattr(self, name), 0)
        if self.chunk_size not in (None, WHOLE_PROMPT):
            check_integer("chunk_size", self.chunk_size, 1)
        number = isinstance(self.ratio, (int, float)) and not isinstance(self.ratio, bool)
        if self.ratio is not None and not (number and 0 < self.ratio <= 1):
            what = "rows" if self.options.compresses or self.dimensions is None else "dimensions"
            raise ValueError(f"ratio is the share of {what} kept, in (0, 1]; found {self.ratio!r}")
        if self.position_policy not in (None, *POSITION_POLICIES):
            raise ValueError(f"position_policy {self.position_policy!r}; allowed: {[None, *POSITION_POLICIES]}")
        if self.backend not in ("auto", *BACKENDS):
            raise ValueError(f"unknown backend {self.backend!r}; allowed: {['auto', *BACKENDS]}")
        validate_budget(self.budget, self.minimum_rows)
        heads = make_split("head_budgets", self.head_budgets, HEAD_BUDGETS)
        layers = make_split("layer_budgets", self.layer_budgets, LAYER_BUDGETS)
        object.__setattr__(self, "_splits", (heads, layers))
        self.options.validate(self)
        _check_splits(self, heads, layers)
        rows = make_dimensions(self.dimensions)
        object.__setattr__(self, "_dimensions", rows and rows.settled(self))

    @property
    def minimum_rows(self) -> int:
        """Rows that a head must hold: sinks, window and one row for all the rest."""
        return self.sink_size + self.window_size + 1

    @property
    def chunk(self) -> int | None:
        """Own tokens per prefill chunk; None = the whole prompt at once."""
        if isinstance(self.chunk_size, str):
            return None
        return self.chunk_size if self.chunk_size is not None else self.options.chunk_size

    @property
    def head_split(self) -> HeadBudgets:
        """How a layer's budget is split over its heads."""
        return self._splits[0]

    @property
    def layer_split(self) -> LayerBudgets:
        """How the cache's budget is split over its layers."""
        return self._splits[1]

    @property
    def row_dimensions(self) -> Zack | None:
        """The dimensions that rows are stored in; None = all."""
        return self._dimensions

    @property
    def positions(self) -> str:
        """The position policy in force."""
        return self.position_policy or self.options.position_policy

    def keeps_low_keys(self, dtype: torch.dtype) -> bool:
        """Whether rows carry what their keys lose by rounding: 16-bit keys that turn at compactions less than
        ``OFTEN`` tokens apart. A step below half a unit in the last place would otherwise leave a key where it was,
        every time.
        """
        apart = [n for n in (self.decode_interval, self.chunk) if n]
        moves = self.options.compresses and self.positions != "original"
        return moves and dtype.itemsize == 2 and min(apart, default=OFTEN) < OFTEN

    @property
    def given(self) -> tuple[str, ...]:
        """General settings that somebody gave, not this class or the method."""
        return tuple(self._given)

    def to_dict(self) -> dict[str, Any]:
        """All settings, method options included, such that ``CompressionConfig(**d)`` equals this."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "options"}
        return {**fields, **self.options.to_dict()}

    def describe(self) -> str:
        """One line for ``print(model)``."""
        size = f"ratio={self.ratio}" if self.ratio is not None else f"budget={self.budget}"
        rows = self.row_dimensions
        kept = "" if rows is None else f"dimensions={_kind(self.dimensions)} {rows.describe()}, "
        return f"method={self.method}, {size}, {kept}backend={self.backend}"

    def replace(self, **overrides: Any) -> CompressionConfig:
        """A copy with some settings changed; giving a budget drops the ratio, and the other way round.

        What the method set because nobody did is set anew: it may follow the settings that change.
        """
        base = {name: getattr(self, name) for name in self.given}
        if overrides.get("method", self.method) == self.method:
            base.update(self.options.to_dict())
        for name, other in (("budget", "ratio"), ("ratio", "budget")):
            if overrides.get(name) is not None:
                base[other] = None
        return CompressionConfig(**{**base, **overrides})

    @classmethod
    def named(cls, name: str, **overrides: Any) -> CompressionConfig:
        """Settings of a registered method, or what :meth:`load` takes.

        Raises:
            ValueError: for a name that is neither a method nor a settings file; lists both.
        """
        from asymkv.methods import METHODS

        if name in METHODS:
            return cls(name, **overrides)
        shipped = _shipped()
        if name not in shipped and not Path(name).is_file():
            near = difflib.get_close_matches(name, {*METHODS, *shipped}, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"unknown method {name!r}{hint}; methods: {sorted(METHODS)}; shipped settings: {shipped}; "
                             "or the path of a yaml file")  # fmt: skip
        return cls.load(name, **overrides)

    @classmethod
    def load(cls, name_or_path: str | Path, **overrides: Any) -> CompressionConfig:
        """Settings from a yaml file, a shipped one by its name (``"asymkv"``), or of a method added to ``METHODS``.

        Raises:
            ValueError: for an unknown name (lists the shipped ones), a file that is no mapping, or an unknown key.
        """
        from asymkv.methods import METHODS

        path = Path(name_or_path)
        if not path.is_file():
            try:
                path = config_path(f"methods/{name_or_path}.yaml")
            except FileNotFoundError:
                if name_or_path in METHODS:
                    return cls(str(name_or_path), **overrides)
                raise ValueError(f"no settings file {str(name_or_path)!r}; shipped names: {_shipped()}") from None
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"{path.name} must hold a mapping of settings; found {type(data).__name__}")
        for name, other in (("budget", "ratio"), ("ratio", "budget")):
            if overrides.get(name) is not None:
                data.pop(other, None)
        return cls(**{**data, **overrides})


_FIELDS = frozenset(f.name for f in dataclasses.fields(CompressionConfig)) - {"options"}


def _shipped() -> list[str]:
    """Names of the shipped settings."""
    return sorted(path.stem for path in (config_root() / "methods").glob("*.yaml"))


def _plain(value: Any) -> Any:
    """A setting without the mark that says that nobody gave it; paths as text."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return {_Default: int, _DefaultName: str}.get(type(value), str if isinstance(value, Path) else lambda x: x)(value)


def _check_splits(config: CompressionConfig, heads: HeadBudgets, layers: LayerBudgets) -> None:
    """Splits need a method that judges rows, and one of them must decide over the heads."""
    uneven = {"head_budgets": type(heads) is not HeadBudgets, "layer_budgets": type(layers) is not LayerBudgets}
    named = [name for name, found in uneven.items() if found]
    if named and not config.options.splits_budget:
        raise ValueError(f"method {config.method!r} with these settings decides for itself what every head keeps; "
                         f"{', '.join(named)} must be 'uniform'")
    if layers.joint and uneven["head_budgets"]:
        raise ValueError(f"layer_budgets={config.layer_budgets!r} splits over heads too; head_budgets must be "
                         f"'uniform', found {config.head_budgets!r}")
    if heads.fixed and (layers.deferred or heads.spans_layers and uneven["layer_budgets"]):
        raise ValueError(f"head_budgets={_kind(config.head_budgets)!r} knows every head's rows beforehand; "
                         f"layer_budgets must be 'uniform', found {_kind(config.layer_budgets)!r}")
    heads.check(config)


def _kind(setting: str | Mapping[str, Any] | None) -> Any:
    """The name of a split: its other settings may be long tables."""
    return setting.get("kind") if isinstance(setting, Mapping) else setting


def setting_names(method: str) -> set[str]:
    """Names of all settings of a registered method: the general ones, and its own."""
    from asymkv.methods import get_method

    return {*_FIELDS, *_parameters(get_method(method))}


def _parameters(method: type[Method]) -> list[str]:
    return list(inspect.signature(method).parameters)


def _make_method(name: str, options: dict[str, Any]) -> Method:
    from asymkv.methods import get_method

    cls = get_method(name)
    known = _parameters(cls)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"unknown settings {unknown}; allowed: {sorted(_FIELDS)}, and for method {name!r}: {sorted(known)}"
        )
    return cls(**options)
