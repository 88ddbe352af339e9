"""Weights that were trained under compression: which model they are of, and whether they are still the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from asymkv.files import sha256, sha256_file
from asymkv.fingerprint import fingerprint
from asymkv.longbench import models

FINAL = "final_model"  # where scripts/train.py leaves its weights, in its output folder
CONFIG, ADAPTER, RUN = "config.json", "adapter_config.json", "run.json"
WEIGHTS = ("*.safetensors", "*.bin", CONFIG, ADAPTER)
# What the weights of one model have in common, whatever they were trained on.
SHAPE = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder of weights, or of a LoRA adapter.

    Args:
        folder: where they lie.
        adapter: whether they need a model to be added to.
        sha256: of their files.
        base: what the model that they were trained from is known by, where ``scripts/train.py`` wrote it.
    """

    folder: Path
    adapter: bool
    sha256: str
    base: dict[str, Any] | None

    @classmethod
    def find(cls, path: str | Path) -> Checkpoint:
        """The weights in a folder, or in an output folder of ``scripts/train.py``.

        Raises:
            ValueError: for a folder that holds none.
        """
        folder = next((f for f in (Path(path), Path(path) / FINAL) if _holds_weights(f)), None)
        if folder is None:
            raise ValueError(f"{path} holds no weights: {CONFIG} or {ADAPTER} is missing, in it and in its folder "
                             f"{FINAL}/")
        files = sorted({file for pattern in WEIGHTS for file in folder.glob(pattern)})
        digest = sha256(json.dumps([[file.name, sha256_file(file)] for file in files]).encode())
        return cls(folder, (folder / ADAPTER).is_file(), digest, _recorded_base(folder))

    def check_shape(self, spec: models.ModelSpec) -> None:
        """Raises ValueError where weights of their own are of another family or size than the model; names both."""
        if self.adapter:
            return
        own, wanted = (AutoConfig.from_pretrained(p) for p in (str(self.folder), models.checkpoint_path(spec)))
        other = {name: (getattr(own, name, None), getattr(wanted, name, None)) for name in SHAPE}
        other = {name: pair for name, pair in other.items() if pair[0] != pair[1]}
        if other:
            raise ValueError(f"the checkpoint at {self.folder} is not of model {spec.path!r}; (checkpoint, model): "
                             f"{other}")

    def check_base(self, spec: models.ModelSpec, found: dict[str, Any]) -> None:
        """Raises ValueError unless the checkpoint was trained from the model that is ``found``; names both.

        Args:
            spec: the model, for the message.
            found: its fingerprint in any dtype.
        """
        if self.base is not None:
            if self.base["weights_sha256"] != found["weights_sha256"]:
                raise ValueError(f"the checkpoint at {self.folder} was trained from {self.base.get('name')!r} with "
                                 f"weights {self.base['weights_sha256'][:16]}, not from {spec.path!r}, whose are "
                                 f"{found['weights_sha256'][:16]}")
            return
        if not self.adapter:
            return
        told = json.loads((self.folder / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
        known = {_last(name) for name in (spec.name, spec.path, models.checkpoint_path(spec), found["name"]) if name}
        if told and _last(told) not in known:
            raise ValueError(f"the adapter at {self.folder} is of {told!r}, not of {spec.path!r} (no {RUN} of "
                             f"scripts/train.py lies beside it, so that only names can be compared: {sorted(known)})")


def load_weights(spec: models.ModelSpec, checkpoint: str | None, dtype: str, device: str) -> PreTrainedModel:
    """The model, or a checkpoint of it: a folder of weights, or of a LoRA adapter, which is merged.

    Raises:
        ValueError: for a folder that holds neither, or what is of another model.
    """
    kind = models.parse_dtype(dtype)
    if checkpoint is None:
        return models.load_model(spec, dtype=kind, device=device)
    found = Checkpoint.find(checkpoint)
    if not found.adapter:
        found.check_shape(spec)
        return models.load_model(dataclasses.replace(spec, path=str(found.folder)), dtype=kind, device=device)
    base = models.load_model(spec, dtype=kind, device=device)
    found.check_base(spec, fingerprint(base, any_dtype=True))
    return _with_adapter(base, found, spec)


def _with_adapter(base: PreTrainedModel, found: Checkpoint, spec: models.ModelSpec) -> PreTrainedModel:
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    try:
        model = PeftModel.from_pretrained(base, str(found.folder))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the adapter at {found.folder} does not fit model {spec.path!r}: {error}") from error
    # Weights of layers that the model does not have would be left out without a word.
    saved, taken = ({n for n in table if "lora_" in n} for table in (
        load_peft_weights(str(found.folder), device="cpu"), get_peft_model_state_dict(model)))  # fmt: skip
    if saved != taken:
        raise ValueError(f"the adapter at {found.folder} does not fit model {spec.path!r}: {len(saved - taken)} of its "
                         f"weights have no place there, such as {sorted(saved - taken)[:1]}, and "
                         f"{len(taken - saved)} places stay empty, such as {sorted(taken - saved)[:1]}")
    return model.merge_and_unload().eval()


def _holds_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (CONFIG, ADAPTER))


def _recorded_base(folder: Path) -> dict[str, Any] | None:
    """The model that ``scripts/train.py`` says it began with, beside its final weights or above them."""
    for path in (folder / RUN, *([folder.parent / RUN] if folder.name == FINAL else [])):
        if path.is_file():
            base = json.loads(path.read_text(encoding="utf-8")).get("model")
            return base if isinstance(base, dict) and "weights_sha256" in base else None
    return None


def _last(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].lower()
