"""Fits a gate to collected rows, all heads at once, and says how well it finds what KVzip keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from asymkv.checks import check_integer, check_number
from asymkv.files import sha256
from asymkv.gates.gate import features, log_score

# Scores below it (a quarter of all, in SmolLM2) count as alike: how little such rows are worth is not worth learning.
LEAST_SCORE = 5e-4
# Rows that every method keeps as they are; their scores are far above the others'.
SINKS = 4
RATIOS = (0.5, 0.25, 0.1)


@dataclass(frozen=True)
class Rows:
    """Rows of one passage; N = layers x KV heads.

    Args:
        name: of the passage.
        x: ``[N, n, F]`` bf16, what a gate looks at.
        score: ``[N, n]`` fp32, KVzip's.
        heads: layers and KV heads.
        tokens: of the passage, stored or not.
    """

    name: str
    x: Tensor
    score: Tensor
    heads: tuple[int, int]
    tokens: int


@dataclass(frozen=True)
class Fit:
    """How a gate is fitted.

    Args:
        hidden: hidden units of each head's network.
        steps: of AdamW, under one cycle of the learning rate.
        batch: rows of every head in a step.
        rate: the highest learning rate.
        decay: weight decay.
        seed: of initial weights and batches.
    """

    hidden: int = 32
    steps: int = 1500
    batch: int = 512
    rate: float = 3e-3
    decay: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "steps", "batch"):
            check_integer(name, getattr(self, name), 1)
        check_number("rate", self.rate, 1e-8, 1.0)
        check_number("decay", self.decay, 0.0)


def read_rows(path: Path) -> Rows:
    """A collected passage, but for its sinks and what KVzip keeps unjudged (the words of a chat template before it).

    Raises:
        ValueError: for a damaged file.
    """
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and the collection makes it again") from None
    use = (found["positions"] >= SINKS) & (found["scores"] > 0).flatten(0, 1).any(0)
    x = features(found["keys"][:, :, use], found["values"][:, :, use]).bfloat16()
    heads = (x.shape[0], x.shape[1])
    # Collections that are older than the count have some of the rows, so that the last position is hardly less.
    tokens = int(found["tokens"] if "tokens" in found else found["positions"].max() + 1)
    return Rows(path.stem, x.flatten(0, 1), found["scores"][:, :, use].flatten(0, 1), heads, tokens)


def split(files: Sequence[Path], held_out: int) -> tuple[list[Path], list[Path]]:
    """Files to train on and those held out: one passage of ``held_out``, by the digests of their names.

    A passage that several folders hold is on one side only.

    Raises:
        ValueError: if there are too few for both.
    """
    check_integer("held_out", held_out, 2)
    names = sorted({path.stem for path in files}, key=lambda name: sha256(name.encode()))
    if len(names) < held_out:
        raise ValueError(f"{len(names)} passages are too few to hold out one of {held_out}; collect more")
    measured = set(names[::held_out])
    return [f for f in files if f.stem not in measured], [f for f in files if f.stem in measured]


def target_of(score: Tensor) -> Tensor:
    """What is fitted: the logarithm of the score."""
    return score.clamp(min=LEAST_SCORE).log()


class Trainer:
    """One fit, step by step.

    Args:
        rows: passages to train on.
        settings: how.
    """

    def __init__(self, rows: Sequence[Rows], settings: Fit) -> None:
        self.settings = settings
        self.x = torch.cat([r.x for r in rows], 1)
        self.target = torch.cat([target_of(r.score) for r in rows], 1)
        self.tokens = torch.cat([torch.full((r.x.shape[1],), r.tokens) for r in rows])
        self.heads = rows[0].heads
        self.draw = torch.Generator().manual_seed(settings.seed)
        lengths = torch.tensor([min(r.tokens for r in rows), max(r.tokens for r in rows)]).float()
        self.fixed = {**_moments(rows), "lengths": lengths.expand(len(self.x), 2)}
        self.learnt = self._start()
        self.optimizer = torch.optim.AdamW(list(self.learnt.values()), lr=settings.rate, weight_decay=settings.decay)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, settings.rate, total_steps=settings.steps + 1
        )

    def _start(self) -> dict[str, Tensor]:
        """Random first layers; the second ones begin at each head's mean, and lengths say nothing."""
        count, _, size = self.x.shape
        hidden = self.settings.hidden
        weight_in = torch.randn(count, size, hidden, generator=self.draw) / size**0.5
        weight_out = torch.randn(count, hidden, generator=self.draw) / hidden**0.5
        start = {"weight_in": weight_in, "bias_in": torch.zeros(count, hidden), "weight_out": weight_out,
                 "bias_out": self.target.mean(1), "weight_length": torch.zeros(count, hidden)}  # fmt: skip
        return {name: nn.Parameter(x) for name, x in start.items()}

    def step(self) -> float:
        """One step on random rows; the mean squared error of the log score before it."""
        picked = torch.randint(self.x.shape[1], (self.settings.batch,), generator=self.draw)
        found = log_score({**self.fixed, **self.learnt}, self.x[:, picked].float(), self.tokens[picked])
        loss = (found - self.target[:, picked]).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    def weights(self) -> dict[str, Tensor]:
        """The gate's tensors, ``[L, H_kv, ...]``."""
        found = {**self.fixed, **{name: x.detach() for name, x in self.learnt.items()}}
        return {name: x.clone().unflatten(0, self.heads) for name, x in found.items()}


def _moments(rows: Sequence[Rows]) -> dict[str, Tensor]:
    """Mean and deviation of every feature of every head, ``[N, F]``; a feature that never moves is left as it is."""
    count = sum(r.x.shape[1] for r in rows)
    mean = sum((r.x.double().sum(1) for r in rows), start=torch.zeros(())) / count
    square = sum(((r.x.double() - mean[:, None]).square().sum(1) for r in rows), start=torch.zeros(())) / count
    deviation = square.sqrt()
    return {"mean": mean.float(), "scale": torch.where(deviation > 0, deviation, 1).float()}


def fit(
    train: Sequence[Rows],
    held_out: Sequence[Rows],
    settings: Fit,
    *,
    report_every: int = 250,
    progress: Callable[[int, dict[str, Any]], None] = lambda step, found: None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fits a gate.

    Args:
        train: passages to train on.
        held_out: passages that it is measured on.
        settings: how.
        report_every: steps between measurements.
        progress: told the steps done and, where it was measured, what :func:`measure` says.

    Returns:
        The gate's tensors, and the last measurement with the settings.

    Raises:
        ValueError: without passages.
    """
    if not train or not held_out:
        raise ValueError(f"a fit needs passages to train on and to measure on; found {len(train)} and {len(held_out)}")
    trainer = Trainer(train, settings)
    found: dict[str, Any] = {}
    for step in range(1, settings.steps + 1):
        trainer.step()
        due = step % report_every == 0 or step == settings.steps
        found = measure(trainer.weights(), held_out) if due else found
        progress(step, found if due else {})
    counts = {"passages": len(train), "rows_per_head": trainer.x.shape[1], "held_out": len(held_out)}
    return trainer.weights(), {"fit": {**asdict(settings), "least_score": LEAST_SCORE}, **counts, **found}


@torch.no_grad()
def measure(weights: dict[str, Tensor], rows: Sequence[Rows], ratios: Sequence[float] = RATIOS) -> dict[str, Any]:
    """How far a gate agrees with KVzip, in the mean over passages.

    Returns:
        ``error``: mean squared error of the log score; ``error_of_means``: of each head's mean in its place;
        ``overlap``: by ratio, share of KVzip's best rows of the cache that are among the gate's; ``mass``: sum of the
        scores kept, over the best possible.
    """
    flat = {name: x.flatten(0, 1) for name, x in weights.items()}
    out: dict[str, Any] = {name: dict.fromkeys(map(str, ratios), 0.0) for name in ("overlap", "mass")}
    error = of_means = 0.0
    for each in rows:
        found = log_score(flat, each.x.float(), torch.tensor(each.tokens))
        target = target_of(each.score)
        error += (found - target).square().mean().item() / len(rows)
        of_means += (target - target.mean(1, keepdim=True)).square().mean().item() / len(rows)
        score, guess = each.score.flatten(), found.flatten()
        for ratio in ratios:
            count = max(1, int(ratio * score.numel()))
            best = torch.zeros_like(score, dtype=torch.bool).index_fill_(0, score.topk(count).indices, True)
            kept = guess.topk(count).indices
            out["overlap"][str(ratio)] += best[kept].float().mean().item() / len(rows)
            out["mass"][str(ratio)] += (score[kept].sum() / score[best].sum().clamp(min=1e-30)).item() / len(rows)
    return {"error": error, "error_of_means": of_means, **out}
