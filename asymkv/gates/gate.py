"""Gates: per KV head a small network from a row's own key and value to the logarithm of its worth, and their files."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from asymkv.files import replace_file
from asymkv.head_scores import check_model, model_of
from asymkv.paths import cache_dir, config_root
from asymkv.provenance import note

FORMAT = "asymkv-gate-1"
ENTRY = "asymkv_gate"  # of the file's metadata
SHIPPED = "gates"  # folder of the shipped settings
Weights = Mapping[str, Tensor]
# Of one head, by the number of features F and of hidden units H.
SHAPES = {"mean": "F", "scale": "F", "weight_in": "FH", "bias_in": "H", "weight_out": "H", "bias_out": ""}
# What a gate has besides if it was taught how long contexts are; R: tokens of the shortest and of the longest.
LENGTH_SHAPES = {"weight_length": "H", "lengths": "R"}
LENGTH_UNIT = 2048  # tokens of a context whose length changes nothing


def features(keys: Tensor, values: Tensor) -> Tensor:
    """What a gate looks at: ``[..., 2 D]`` in fp32 or fp64 of ``keys [..., D]`` before RoPE and ``values [..., D]``."""
    dtype = torch.promote_types(keys.dtype, torch.float32)
    return torch.cat((keys.to(dtype), values.to(dtype)), dim=-1)


def log_score(weights: Weights, x: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Logarithm of the worth of rows: ``w_out . silu((x - mean) / scale @ w_in + b_in + l w_length) + b_out``.

    ``l`` is the logarithm of the context's tokens over ``LENGTH_UNIT``, never beyond what the gate was taught: the
    longer a context, the lower are the highest probabilities of a replay, in some heads more than in others.

    Args:
        weights: ``SHAPES`` and perhaps ``LENGTH_SHAPES`` behind the dimensions of the heads, ``[..., H_kv]``.
        x: ``[..., H_kv, T, F]``, from :func:`features`.
        tokens: of the contexts that the rows belong to, broadcastable to ``[..., H_kv, T]``; only gates with
            ``LENGTH_SHAPES`` look at it, and need it.

    Returns:
        ``[..., H_kv, T]``.

    Raises:
        ValueError: if ``tokens`` are needed.
    """
    w = {name: each.to(x) for name, each in weights.items()}
    hidden = (x - w["mean"][..., None, :]) / w["scale"][..., None, :] @ w["weight_in"] + w["bias_in"][..., None, :]
    if "weight_length" in w:
        if tokens is None:
            raise ValueError("this gate was taught how long contexts are: give 'tokens', those of the context")
        least, most = w["lengths"].unbind(-1)
        length = (tokens.to(x).maximum(least[..., None]).minimum(most[..., None]) / LENGTH_UNIT).log()
        hidden = hidden + length[..., None] * w["weight_length"][..., None, :]
    return (F.silu(hidden) @ w["weight_out"][..., None])[..., 0] + w["bias_out"][..., None]


@dataclass(frozen=True)
class Gate:
    """The networks of all layers and KV heads.

    Args:
        weights: ``SHAPES``, and ``LENGTH_SHAPES`` or none of those, each behind ``[L, H_kv]``.
        model: what they were trained for, from :func:`asymkv.head_scores.model_of`.
        trained: how they were trained, and what they reach on passages held out: anything that json holds.
    """

    weights: dict[str, Tensor]
    model: dict[str, Any]
    trained: dict[str, Any] = field(default_factory=dict)
    _layers: dict[int, dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        shapes = {**SHAPES, **LENGTH_SHAPES} if "weight_length" in self.weights else SHAPES
        if set(self.weights) != set(shapes):
            raise ValueError(f"a gate has the tensors {sorted(shapes)}; found {sorted(self.weights)}")
        heads = (self.model["layers"], self.model["kv_heads"])
        sizes = dict(zip("FHR", (*self.weights["weight_in"].shape[-2:], 2), strict=True))
        for name, axes in shapes.items():
            wanted = (*heads, *(sizes[axis] for axis in axes))
            if tuple(self.weights[name].shape) != wanted:
                raise ValueError(f"{name} of the gate must be {list(wanted)}; found {list(self.weights[name].shape)}")
            if not bool(self.weights[name].isfinite().all()):
                raise ValueError(f"{name} of the gate holds numbers that are not finite; train it again")

    @property
    def size(self) -> int:
        """Features of a row."""
        return self.weights["mean"].shape[-1]

    def layer(self, index: int) -> dict[str, Tensor]:
        """The weights of one layer, ``[H_kv, ...]``: one dict, so that all caches share what is moved and widened."""
        if index not in self._layers:
            self._layers[index] = {name: each[index] for name, each in self.weights.items()}
        return self._layers[index]

    def score(self, keys: Tensor, values: Tensor, tokens: int | None = None) -> Tensor:
        """Logarithm of the worth of each row, ``[L, H_kv, T]`` fp32.

        Args:
            keys: ``[L, H_kv, T, D]`` before RoPE.
            values: ``[L, H_kv, T, D]``.
            tokens: of the context, for a gate that was taught how long contexts are.
        """
        return log_score(self.weights, features(keys, values), None if tokens is None else torch.tensor(tokens))

    @functools.cached_property
    def weights_sha256(self) -> str:
        """Of the tensors alone, whatever the file says beside them."""
        return _checksum({}, self.weights)

    def save(self, path: str | Path | None = None) -> Path:
        """Writes the file, whole or not at all; None: to where the method looks for it. Large weights become bf16.

        Returns:
            The path.
        """
        target = default_path(self.model) if path is None else Path(path)
        dtypes = {"weight_in": torch.bfloat16}
        stored = {n: x.to(dtypes.get(n, torch.float32)).contiguous() for n, x in self.weights.items()}
        content = {"format": FORMAT, "model": self.model, "trained": self.trained}
        entry = json.dumps({**content, "sha256": _checksum(content, stored)})
        replace_file(target, lambda path: save_file(stored, path, {ENTRY: entry}))
        return target


def default_path(model: dict[str, Any]) -> Path:
    """Where the gate of a model (as :func:`model_of` names it) lies in the user's cache folder."""
    return cache_dir() / "gates" / f"{model['weights_sha256'][:16]}.safetensors"


def find(model: PreTrainedModel) -> Path:
    """The gate of a model: the user's own, else the shipped one.

    Raises:
        ValueError: if there is none; says how to make one.
    """
    found = model_of(model)
    own = default_path(found)
    if own.is_file():
        return own
    for path in sorted((config_root() / SHIPPED).glob("*.safetensors")):
        if not check_model(_content(path)["model"], found):
            return path
    name = model.config._name_or_path or "MODEL"
    raise ValueError(f"no gate of {name!r}, neither shipped nor at {own}; python scripts/train_gate.py --model {name} "
                     "--data-dir DIR --texts FILE --work FOLDER trains one, or give its file as option 'file' of gate, "
                     "'gate_file' of kvzip and echo")


def resolve(source: str | None, model: PreTrainedModel) -> Gate:
    """The gate of a model.

    Args:
        source: its file, a folder of ``<first 16 digits of the weights' hash>.safetensors``, or None: the user's own,
            else the shipped one.
        model: the model.

    Raises:
        ValueError: for a gate that is missing, damaged, of another model, or for rows of another size.
    """
    path = find(model) if source is None else Path(source)
    path = path / default_path(model_of(model)).name if path.is_dir() else path
    gate = load(path, model)
    heads = model.config.num_attention_heads
    head_dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // heads
    if gate.size != 2 * head_dim:
        raise ValueError(f"{path} is for keys and values of {gate.size // 2} dimensions; the model's have {head_dim}")
    return gate


def load(path: str | Path, model: PreTrainedModel | None = None) -> Gate:
    """Reads a gate's file.

    Args:
        path: the file.
        model: the model that it must belong to; None: not checked.

    Raises:
        ValueError: for a file that is missing, damaged, of another format, or of another model.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; the option 'file' ('gate_file' of kvzip and echo) takes a gate that "
                         "scripts/train_gate.py wrote")
    gate = _read(path, path.stat().st_mtime_ns)
    differing = {} if model is None else check_model(gate.model, model_of(model))
    if differing:
        raise ValueError(f"{path} holds a gate of {gate.model.get('name')!r}, not of "
                         f"{model.config._name_or_path!r}: (file, given) {differing}")  # type: ignore[union-attr]
    note("gate", gate.weights_sha256)
    return gate


@functools.lru_cache(maxsize=4)
def _read(path: Path, changed: int) -> Gate:
    """A gate, read once for as long as the file stays as it is (``changed``): every new cache asks for it."""
    content = _content(path)
    found = content.pop("sha256", None)
    with safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if found != _checksum(content, weights):
        raise ValueError(f"{path} is damaged: its checksum is {found}, its content's {_checksum(content, weights)}")
    return Gate(weights, content["model"], content["trained"])


def _content(path: Path) -> dict[str, Any]:
    """What the file says of itself."""
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {}).get(ENTRY, "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != FORMAT:
        raise ValueError(f"{path}: unknown format {found!r}; expected {FORMAT!r}")
    return content


def _checksum(content: dict[str, Any], weights: Weights) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name in sorted(weights):
        digest.update(f"{name} {list(weights[name].shape)} {weights[name].dtype}".encode())
        digest.update(weights[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
