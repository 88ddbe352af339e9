"""What methods want measured of a model beforehand: head scores and bases, made where the user's cache lacks them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

from asymkv import head_scores
from asymkv.analysis.head_entropy import entropy_scores
from asymkv.analysis.retrieval_heads import retrieval_scores
from asymkv.analysis.zack_basis import calibrate
from asymkv.budgets.scored import ScoredHeads
from asymkv.config import CompressionConfig
from asymkv.dimensions.basis import MANIFEST, UNFINISHED, default_folder
from asymkv.texts import samples_of

SAMPLES, TOKENS = 8, 2048  # of the text, each
logger = logging.getLogger(__name__)


def prepare(
    model: PreTrainedModel, tokenizer: Any, configs: Iterable[CompressionConfig], text: Callable[[], str]
) -> list[str]:
    """Measures what settings would look for in the user's cache folder and not find, and saves it there.

    Scores and bases that a setting names by a file are left to whoever named it, and so are gates: fitting one takes
    a collection (``scripts/train_gate.py``).

    Args:
        model: the model, unpatched.
        tokenizer: its tokenizer.
        configs: the settings.
        text: gives the text to measure on; called only where one is needed.

    Returns:
        What was made: "induction", "entropy", "zack".
    """
    configs, bound = list(configs), head_scores.model_of(model)
    size = min(TOKENS, model.config.max_position_embeddings)
    wanted = {_first_kind(config) for config in configs}
    made = []
    if "induction" in wanted and not head_scores.default_path(bound, "induction").is_file():
        with tqdm(total=model.config.num_hidden_layers, unit="layer", desc="induction, echo") as bar:
            special = tokenizer.all_special_ids
            for scores in retrieval_scores(model, special_ids=special, progress=lambda _: bar.update()).values():
                scores.save()
        made.append("induction")
    if "entropy" in wanted and not head_scores.default_path(bound, "entropy").is_file():
        samples = samples_of(text(), tokenizer, size, SAMPLES)
        with tqdm(total=len(samples) * model.config.num_hidden_layers, unit="layer", desc="entropy") as bar:
            entropy_scores(model, samples, progress=lambda _: bar.update()).save()
        made.append("entropy")
    rows = [config.row_dimensions for config in configs if config.row_dimensions is not None]
    folder = default_folder(bound)
    if any(each.basis is None for each in rows) and not (folder / MANIFEST).is_file():
        samples = samples_of(text(), tokenizer, size, SAMPLES)
        with tqdm(total=len(samples), unit="sample", desc="zack") as bar:
            calibrate(model, samples, folder=folder, progress=lambda done: bar.update(done - bar.n)).save(folder)
        (folder / UNFINISHED).unlink(missing_ok=True)
        made.append("zack")
    return made


def _first_kind(config: CompressionConfig) -> str | None:
    """The head scores that a setting cannot do without and takes from the user's cache folder."""
    split = config.head_split
    return split.kinds[0] if isinstance(split, ScoredHeads) and split.file is None else None
