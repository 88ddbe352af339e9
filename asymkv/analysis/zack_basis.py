"""Calibration of ZACK's bases (arXiv 2408.04107): directions of queries and keys, and of values and W_O.

Only Gram matrices are kept, in fp64: no token is stored, and samples may be as many as one likes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from asymkv.analysis.watch import kv_heads, watch_inputs
from asymkv.dimensions.basis import UNFINISHED, Basis, Directions
from asymkv.files import replace_file, sha256
from asymkv.head_scores import check_model, model_of
from asymkv.models import get_adapter
from asymkv.rope import Rope, apply_rope

FORMAT = "asymkv-zack-sums-3"
CONTENT = "content"  # entry of the file's header: whose sums they are, with their checksum
# Gram matrices that are summed up, each [L, H_kv, D, D]: queries and keys together; queries; keys, each times the
# attention that it receives; values; outputs of attention.
GRAMS = ("joint", "queries", "attended", "values", "outputs")
QUERIES = 512  # at a time, of which attention is computed
SAVE_SECONDS = 60.0  # of work at most that a kill loses; an interruption loses none


def calibrate(
    model: PreTrainedModel,
    samples: Sequence[Tensor],
    *,
    folder: str | Path | None = None,
    progress: Callable[[int], object] | None = None,
) -> Basis:
    """Bases of every KV head, from what the model's layers compute on samples of text.

    Joint ones: of the rows of all query heads of a group, after RoPE, and of the keys, once for every query head; of
    the values and the group's slices of the output projection. Attention's: of those queries, and the keys by the
    attention that they receive; of attention's outputs, and the output projection. Nothing is centred: the rows that
    attention rests on (sinks) lie far from the mean, and would cost most of the dimensions.

    Args:
        model: a causal LM of a known family.
        samples: token ids ``[S]`` each.
        folder: where an interrupted calibration leaves its sums, and goes on from them; None: nowhere.
        progress: called with the number of samples done, after each.

    Raises:
        ValueError: for fewer tokens than a head has dimensions, states that are not finite, or sums of another
            calibration in the folder.
    """
    sums = Sums.resume(model, samples, folder)
    _check_tokens(model, samples)
    saved = time.monotonic()
    try:
        while sums.samples < len(samples):
            sums.add(model, samples[sums.samples])
            if progress is not None:
                progress(sums.samples)
            if folder is not None and time.monotonic() - saved > SAVE_SECONDS:
                sums.save(folder)
                saved = time.monotonic()
        return sums.basis(model, samples)
    except BaseException:  # an interruption too: what was summed up is worth keeping
        if folder is not None and sums.samples:
            sums.save(folder)
        raise


class Sums:
    """Gram matrices of a calibration on its way.

    Args:
        grams: by ``GRAMS``, ``[L, H_kv, D, D]`` fp64 each.
        model: what they are of, from :func:`asymkv.head_scores.model_of`.
        settings: and what it reads.
        samples: how many are in.
    """

    def __init__(
        self, grams: dict[str, Tensor], model: dict[str, Any], settings: dict[str, Any], samples: int = 0
    ) -> None:
        # One attribute: an interruption must not find some sums of more samples than others, or than are counted.
        self.total = (grams, samples)
        self.model = model
        self.settings = settings

    @property
    def grams(self) -> dict[str, Tensor]:
        return self.total[0]

    @property
    def samples(self) -> int:
        return self.total[1]

    @classmethod
    def resume(cls, model: PreTrainedModel, samples: Sequence[Tensor], folder: str | Path | None) -> Sums:
        """The sums that a folder holds, or empty ones."""
        settings = {"samples_sha256": sha256(json.dumps([s.tolist() for s in samples]).encode()),
                    "dtype": str(model.dtype).removeprefix("torch.")}  # fmt: skip
        if folder is None or not (Path(folder) / UNFINISHED).is_file():
            heads = model.config.num_attention_heads
            size = getattr(model.config, "head_dim", None) or model.config.hidden_size // heads
            shape = (model.config.num_hidden_layers, kv_heads(model), size, size)
            empty = {name: torch.zeros(shape, dtype=torch.double) for name in GRAMS}
            return cls(empty, model_of(model), settings)
        path = Path(folder) / UNFINISHED
        content, tensors = _read(path, model)
        if content["settings"] != settings:
            raise ValueError(f"{path} is of other samples or another dtype, {content['samples']} of them done; finish "
                             "that calibration, remove the file, or choose another folder")
        return cls(tensors, content["model"], settings, content["samples"])

    def save(self, folder: str | Path) -> None:
        """Writes the sums, one file of them and what they are; finished ones are removed by the caller."""
        tensors, samples = self.total
        content = {"format": FORMAT, "model": self.model, "settings": self.settings, "samples": samples}
        header = {CONTENT: json.dumps({**content, "sha256": _digest(content, tensors)})}
        replace_file(Path(folder) / UNFINISHED, lambda path: save_file(tensors, path, metadata=header))

    def add(self, model: PreTrainedModel, ids: Tensor) -> None:
        """Reads one sample; all of it counts, or nothing."""
        adapter = get_adapter(model.config.model_type)
        cos, sin = Rope(adapter.rotary(model)).tables(torch.arange(len(ids), device=model.device)[None], model.dtype)
        own = {name: torch.zeros_like(gram) for name, gram in self.grams.items()}

        def look(module: Any, hidden: Tensor) -> None:
            q, k, v = adapter.project(module, hidden)
            tables = cos[:, None].to(q.device), sin[:, None].to(q.device)
            found = grams_of(apply_rope(q, *tables)[0], apply_rope(k, *tables)[0], v[0], adapter.scale(module))
            for name, gram in found.items():
                own[name][module.layer_idx] = gram.cpu()

        watch_inputs(model, ids, look)
        if not all(bool(gram.isfinite().all()) for gram in own.values()):
            raise ValueError(f"queries, keys or values of sample {self.samples} are not finite; nothing of it counts")
        self.total = {name: gram + own[name] for name, gram in self.grams.items()}, self.samples + 1

    def basis(self, model: PreTrainedModel, samples: Sequence[Tensor]) -> Basis:
        """The bases, the output projections added."""
        measured = {"samples": len(samples), "tokens": sum(len(s) for s in samples), **self.settings}
        grams, projection = self.grams, output_grams(model)
        joint = Directions.joint(grams["joint"], grams["values"] + projection)
        attention = Directions.attention(grams["queries"], grams["attended"], projection, grams["outputs"])
        return Basis(joint, attention, self.model, measured)


def _read(path: Path, model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file of sums is, and the sums.

    Raises:
        ValueError: for one that is damaged, of another format, or of another model.
    """
    try:
        with safe_open(path, "pt") as file:
            content = json.loads((file.metadata() or {}).get(CONTENT, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}; remove it to begin anew") from None
    if content.get("format") != FORMAT:
        raise ValueError(f"{path} is no unfinished calibration of format {FORMAT!r}; found {content.get('format')!r}: "
                         "remove it to begin anew")
    if content.pop("sha256", None) != _digest(content, tensors):
        raise ValueError(f"{path} is damaged: it does not hold what was written; remove it to begin anew")
    other = check_model(content["model"], model_of(model))
    if other:
        raise ValueError(f"{path} holds an unfinished calibration of {content['model'].get('name')!r}; "
                         f"(saved, given): {other}")
    return content, tensors


def _digest(content: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    told = json.dumps(content, sort_keys=True).encode()
    return sha256(told + b"".join(tensors[name].contiguous().numpy().tobytes() for name in sorted(tensors)))


def gram(rows: Tensor) -> Tensor:
    """``X^T X`` of ``rows [..., n, D]``, in fp64: squares of half types leave their range."""
    rows = rows.double()
    return rows.transpose(-1, -2) @ rows


def joint_gram(queries: Tensor, keys: Tensor) -> Tensor:
    """Of ``queries [H, S, D]`` and ``keys [H_kv, S, D]``, the latter once for every query head: ``[H_kv, D, D]``."""
    group = len(queries) // len(keys)
    return gram(queries.reshape(len(keys), -1, queries.shape[-1])) + group * gram(keys)


def grams_of(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> dict[str, Tensor]:
    """The ``GRAMS`` of one sample in one layer, ``[H_kv, D, D]`` fp64 each.

    Args:
        queries: ``[H, S, D]`` after RoPE, keys ``[H_kv, S, D]`` likewise, values ``[H_kv, S, D]``.
        scale: factor of the logits.
    """
    grouped = queries.reshape(len(keys), -1, *queries.shape[1:])  # [H_kv, G, S, D]
    query, key, value = scale * grouped.float(), keys.float()[:, None], values.float()[:, None]
    received, outputs = torch.zeros_like(key[..., 0]), torch.zeros_like(gram(keys[:, :0]))
    for first in range(0, keys.shape[1], QUERIES):
        last = min(first + QUERIES, keys.shape[1])
        logits = query[:, :, first:last] @ key[:, :, :last].mT
        later = torch.ones(last - first, last - first, dtype=torch.bool, device=keys.device).triu(1)
        logits[..., first:].masked_fill_(later, -torch.inf)
        weights = logits.softmax(-1)
        received[..., :last] += weights.sum((1, 2))[:, None]
        outputs += gram((weights @ value[:, :, :last]).flatten(1, 2))
    attended = keys.double() * received.double().sqrt().mT
    return {
        "joint": joint_gram(queries, keys), "queries": gram(grouped.flatten(1, 2)),
        "attended": gram(attended), "values": gram(values), "outputs": outputs,
    }  # fmt: skip


def output_grams(model: PreTrainedModel) -> Tensor:
    """``[L, H_kv, D, D]`` fp64: ``W_O^T W_O`` of the slices of each group's heads."""
    adapter = get_adapter(model.config.model_type)
    found: dict[int, Tensor] = {}
    modules: Any = [m for m in model.modules() if isinstance(m, adapter.attention_class())]
    for module in modules:
        weight = adapter.output_weight(module).detach()
        if not weight.is_floating_point():
            raise ValueError(f"the output projection's weight must be in floating point; found {weight.dtype}")
        by_head = weight.double().T.unflatten(0, (kv_heads(model), -1, module.head_dim))  # [H_kv, G, D, hidden]
        found[module.layer_idx] = gram(by_head.transpose(2, 3).flatten(1, 2)).cpu()
    return torch.stack([found[i] for i in range(len(found))])


def _check_tokens(model: PreTrainedModel, samples: Sequence[Tensor]) -> None:
    tokens = sum(len(s) for s in samples)
    size = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    if tokens < size:
        raise ValueError(f"a basis of {size} dimensions needs at least as many tokens; found {tokens} in "
                         f"{len(samples)} samples")
