"""How a model is known again: what is measured or compressed on one must not be used on another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from asymkv.models import get_adapter
from asymkv.offload import weight_of

SAMPLES = 1024  # values that are looked at of each weight


def fingerprint(model: PreTrainedModel, *, any_dtype: bool = False) -> dict[str, Any]:
    """What a file is bound to: family, shape, name and revision, and a hash of some of the weights.

    Every weight of the first, the middle and the last decoder layer is sampled, adapters (LoRA) included, so that a
    fine-tuned model is another one whichever projections it was tuned in. Biases count where one is not zero: a
    checkpoint has one hash in the classes that store none (Llama) and in those that do (Qwen2).

    Args:
        model: the model.
        any_dtype: hash the weights' signs, which a model keeps in whatever dtype it is loaded.
    """
    digest = hashlib.sha256()
    for name, weight in _weights(model):
        digest.update(name.encode())
        values = weight.reshape(-1)[:: max(weight.numel() // SAMPLES, 1)].float()
        digest.update((values.signbit() if any_dtype else values).cpu().numpy().tobytes())
    return {
        "model_type": model.config.model_type,
        "layers": model.config.num_hidden_layers,
        "hidden_size": model.config.hidden_size,
        "weights_sha256": digest.hexdigest(),
        "name": model.config._name_or_path,
        "revision": getattr(model.config, "_commit_hash", None),
    }


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Weights, and biases that do something, of three decoder layers with their names within the layer."""
    attention = get_adapter(model.config.model_type).attention_class()
    found = [name.rpartition(".")[0] for name, module in model.named_modules() if isinstance(module, attention)]
    for index in dict.fromkeys((0, len(found) // 2, len(found) - 1)):
        for name, module in model.get_submodule(found[index]).named_modules():
            if isinstance(module._parameters.get("weight"), nn.Parameter):
                yield f"{index}.{name}", weight_of(module).detach()
            if isinstance(module._parameters.get("bias"), nn.Parameter):
                bias = weight_of(module, "bias").detach()
                if bool(bias.count_nonzero()):
                    yield f"{index}.{name}.bias", bias
