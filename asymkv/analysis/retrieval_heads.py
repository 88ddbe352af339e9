"""Which heads look things up: induction and echo scores on repeated random tokens (arXiv 2407.15891, section 3).

A block of random tokens is read several times over. At a token that was seen before, an *echo* head looks at its
earlier occurrences, an *induction* head at what followed them. Nothing but random tokens is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from asymkv.analysis.watch import kv_heads, watch
from asymkv.head_scores import HeadScores, model_of

BLOCK, REPEATS = 2500, 4  # of the vendor's code
BLOCK_ELEMENTS = 1 << 22  # logits in memory at a time: 16 MiB in fp32

logger = logging.getLogger(__name__)


def retrieval_scores(
    model: PreTrainedModel,
    *,
    block: int = BLOCK,
    repeats: int = REPEATS,
    seed: int = 0,
    special_ids: Iterable[int] = (),
    progress: Callable[[int], object] | None = None,
) -> dict[str, HeadScores]:
    """Induction and echo score of every KV head: the most that a query head of its group has.

    Args:
        model: a causal LM of a known family, unpatched or patched.
        block: random tokens in a block; fewer where the model's window is too short for all repeats.
        repeats: times that the block is read, at least 2.
        seed: of the tokens.
        special_ids: tokens that are not drawn.
        progress: called with each layer's index.

    Returns:
        ``{"induction": ..., "echo": ...}``: mean attention, over all tokens that were seen before, on what followed
        earlier occurrences and on those themselves.

    Raises:
        ValueError: for a block or repeats that give nothing to find.
    """
    bos = model.config.bos_token_id
    block = fit_block(model, block, repeats, prefix=bos is not None)
    tokens = random_block(model.config.vocab_size, block, seed, [*special_ids, *([] if bos is None else [bos])])
    ids = torch.cat([torch.tensor([] if bos is None else [bos], dtype=torch.long), tokens.repeat(repeats)])
    found: dict[str, list[list[float]]] = {"induction": [], "echo": []}

    def look(layer: int, q: Tensor, k: Tensor, scale: float) -> None:
        pair = pattern_scores(q, k, scale, block, offset=len(ids) - block * repeats)
        for rows, per_head in zip(found.values(), pair, strict=True):
            rows.append(per_head.view(kv_heads(model), -1).amax(1).tolist())
        if progress is not None:
            progress(layer)

    watch(model, ids, look)
    measured = {"block": block, "repeats": repeats, "seed": seed, "bos": bos, "group": "max",
                "dtype": str(model.dtype).removeprefix("torch.")}  # fmt: skip
    bound = model_of(model)
    return {kind: HeadScores(kind, rows, bound, measured) for kind, rows in found.items()}


def fit_block(model: PreTrainedModel, block: int, repeats: int, *, prefix: bool) -> int:
    """The block's length that fits the model's window, with a warning where that is less than was asked for.

    Raises:
        ValueError: for less than two repeats, or less than two tokens in a block.
    """
    if repeats < 2 or block < 2:
        raise ValueError(f"a block of at least 2 tokens must be read at least twice; found block={block}, "
                         f"repeats={repeats}")
    window = getattr(model.config, "max_position_embeddings", None)
    most = block if window is None else (window - prefix) // repeats
    if most < 2:
        raise ValueError(f"{repeats} repeats of a block do not fit the model's window of {window} tokens")
    if most < block:
        logger.warning("%d x %d tokens exceed the model's window of %d: the block is cut to %d tokens", repeats, block,
                       window, most)  # fmt: skip
    return min(block, most)


def random_block(vocab: int, length: int, seed: int, excluded: Iterable[int] = ()) -> Tensor:
    """``[length]`` random token ids without ``excluded``; all different where the vocabulary has enough."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.ones(vocab, dtype=torch.bool)
    allowed[[i for i in excluded if 0 <= i < vocab]] = False
    ids = allowed.nonzero().squeeze(-1)
    if len(ids) >= length:
        return ids[torch.randperm(len(ids), generator=generator)[:length]]
    return ids[torch.randint(len(ids), (length,), generator=generator)]


def pattern_scores(q: Tensor, k: Tensor, scale: float, block: int, offset: int) -> tuple[Tensor, Tensor]:
    """Induction and echo score of each query head, ``[H]`` fp32, on repeats of a block.

    Args:
        q: ``[H, S, D]`` and ``k [H_kv, S, D]``, after RoPE.
        scale: factor of the logits.
        block: length of the block that repeats.
        offset: tokens before the first block.
    """
    heads, length, _ = q.shape
    group = heads // k.shape[0]
    size = max(1, BLOCK_ELEMENTS // length)
    sums = torch.zeros(2, heads)
    first = offset + block
    for head in range(heads):
        keys = k[head // group].float()
        for begin in range(first, length, size):
            end = min(begin + size, length)
            sums[:, head] += _masses(q[head, begin:end].float() * scale, keys[:end], begin, block, offset).cpu()
    sums /= max(length - first, 1)
    return sums[0], sums[1]


def _masses(q: Tensor, keys: Tensor, begin: int, block: int, offset: int) -> Tensor:
    """``[2]``: attention of queries ``q [Q, D]`` at ``begin ...`` on induction and echo targets, summed."""
    at = torch.arange(begin, begin + len(q), device=q.device)[:, None]
    logits = q @ keys.T
    column = torch.arange(len(keys), device=q.device)
    logits.masked_fill_(column > at, -torch.inf)
    earlier = offset + (at - offset) % block + block * torch.arange((len(keys) - offset) // block + 1, device=q.device)
    seen = earlier < at
    earlier = torch.where(seen, earlier, 0)
    lse = logits.logsumexp(-1, keepdim=True)

    def mass(target: Tensor) -> Tensor:
        return torch.where(seen, (logits.gather(1, target) - lse).exp(), 0).sum()

    return torch.stack([mass(torch.where(seen, earlier + 1, 0)), mass(earlier)])
