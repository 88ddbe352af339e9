"""The training loop: one process or many (accelerate), exact resume, validation under compression."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

from asymkv.checks import check_integer, check_number
from asymkv.distill import checkpoints
from asymkv.distill.losses import IGNORED, cross_entropy_sum, next_tokens
from asymkv.distill.student import Student
from asymkv.distill.text import BlockOrder, digest
from asymkv.files import write_atomic
from asymkv.fingerprint import fingerprint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainSettings:
    """Names and defaults of the public code.

    Args:
        num_train_epochs: passes over the text, unless ``max_steps`` is given.
        max_steps: updates.
        train_batch_size, eval_batch_size: blocks of one process at a time.
        gradient_accumulation_steps: batches of an update.
        learning_rate, weight_decay: of AdamW.
        warmup_steps: the rate rises linearly for so many updates, then falls linearly to 0.
        max_grad_norm: gradients are scaled down to this norm; 0 = not.
        seed: of the order of the text.
        logging_steps, save_steps: updates between log lines, and between checkpoints (0 = only at the end).
        eval_steps: updates between validations, with one before the first update and one at the end; None = after
            every epoch; 0 = never.
        keep_checkpoints: how many stay.
    """

    num_train_epochs: int = 3
    max_steps: int | None = None
    train_batch_size: int = 4
    eval_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    warmup_steps: int = 500
    max_grad_norm: float = 1.0
    seed: int = 42
    logging_steps: int = 100
    save_steps: int = 1000
    eval_steps: int | None = None
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in ("num_train_epochs", "train_batch_size", "eval_batch_size", "gradient_accumulation_steps",
                     "logging_steps", "keep_checkpoints", "max_steps"):  # fmt: skip
            if name != "max_steps" or self.max_steps is not None:
                check_integer(name, getattr(self, name), 1)
        for name in ("warmup_steps", "seed", "save_steps", "eval_steps"):
            if name != "eval_steps" or self.eval_steps is not None:
                check_integer(name, getattr(self, name), 0)
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            check_number(name, getattr(self, name), 0)


class Trainer:
    """Trains a student on blocks of tokens.

    Args:
        student: what is trained.
        train: ``[N, S]`` blocks.
        validation: ``[M, S]`` blocks, or None.
        output_dir: checkpoints and ``log.jsonl``.
        settings: see there.
        accelerator: None = one that finds out where it runs.

    Raises:
        ValueError: for too little text.
    """

    def __init__(
        self,
        student: Student,
        train: Tensor,
        validation: Tensor | None,
        output_dir: str | Path,
        settings: TrainSettings | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.accelerator = accelerator or Accelerator()
        self.settings = settings or TrainSettings()
        self.output = Path(output_dir)
        self.train_blocks, self.validation = train, validation
        self.order = BlockOrder(
            len(train), self.settings.train_batch_size, self.accelerator.num_processes, self.settings.seed
        )
        s = self.settings
        epoch = max(self.order.per_epoch // s.gradient_accumulation_steps, 1)
        self.updates_per_epoch = epoch
        self.total = s.max_steps if s.max_steps is not None else s.num_train_epochs * epoch
        self.student = student
        self.origin = fingerprint(student.lm)["weights_sha256"]  # before training changes them
        student.move_teacher(self.accelerator.device)
        optimizer = torch.optim.AdamW(list(student.trainable().values()), lr=s.learning_rate,
                                      weight_decay=s.weight_decay)  # fmt: skip
        self.schedule = get_linear_schedule_with_warmup(optimizer, s.warmup_steps, self.total)
        self.wrapped, self.optimizer = self.accelerator.prepare(student, optimizer)
        self.step = 0
        self.origin_checkpoint: Path | None = None  # what this run goes on from

    # -- training ----------------------------------------------------------------------------------------------------
    def fit(self, progress: Callable[..., Any] = tqdm) -> dict[str, float]:
        """Trains to the end from wherever it stands, with a checkpoint there.

        Returns:
            The last validation, or nothing.

        Raises:
            ValueError: for a run from the beginning in a folder that holds another one's checkpoints.
            FloatingPointError: for a loss, a gradient, a weight or a perplexity that is not finite; the checkpoints
                that there are, each of weights whose loss was finite, stay.
        """
        self._begin()
        bar = progress(total=self.total, initial=self.step, disable=not self.accelerator.is_main_process, desc="train")
        found: dict[str, float] = {}
        s = self.settings
        if self.step == 0 and self.validation is not None and s.eval_steps != 0:
            self.log({"step": 0, **self._validate()})  # what training is to be compared with
        while self.step < self.total:
            seen = self._update()
            self.step += 1
            bar.update()
            if self.step % s.logging_steps == 0 or self.step == self.total:
                bar.set_postfix({k: f"{v:.4f}" for k, v in seen.items()})
                self.log({"step": self.step, "learning_rate": self.schedule.get_last_lr()[0], **seen})
            if self.validation is not None and self._is_due(s.eval_steps, self.updates_per_epoch):
                found = self._validate()
                self.log({"step": self.step, **found})
            if self._is_due(s.save_steps, 0):
                self.save()
        bar.close()
        return found

    def _begin(self) -> None:
        """Makes the folder this run's own, and its log one that ends where the run stands."""
        if self.step == 0 and self.origin_checkpoint is None:
            checkpoints.refuse_others(self.output)
        self.accelerator.wait_for_everyone()  # before the first process writes what the others look for
        path = self.output / "log.jsonl"
        if self.accelerator.is_main_process and path.exists():
            write_atomic(path, "".join(line + "\n" for line in _until(path.read_text(encoding="utf-8"), self.step)))

    def _is_due(self, every: int | None, otherwise: int) -> bool:
        """Whether something that happens every so many updates does now; at the end it does, unless never."""
        if every == 0 and otherwise:
            return False
        every = otherwise if every is None else every
        return self.step == self.total or bool(every) and self.step % every == 0

    def _update(self) -> dict[str, float]:
        """One update of the weights; the mean of what its batches lost."""
        number = self.settings.gradient_accumulation_steps
        sums: dict[str, float] = {}
        for part in range(number):
            at = self.order.batch_of(self.step * number + part, self.accelerator.process_index)
            ids = self.train_blocks[at].to(self.accelerator.device)
            with nullcontext() if part == number - 1 else self.accelerator.no_sync(self.wrapped):
                losses = self.wrapped(ids)
                means = {name: float(self.accelerator.gather(x.detach()).mean()) for name, x in losses.items()}
                self._check_finite(means["loss"], f"loss of blocks {at}")
                self.accelerator.backward(losses["loss"] / number)
            sums = {name: sums.get(name, 0.0) + x / number for name, x in means.items()}
        self._step_weights()
        if self.step == 0 and self.student.compactions == 0 and self.student.config.options.compresses:
            logger.warning("no cache was compacted: blocks of %d tokens stay below the budget", ids.shape[1])
        return sums

    def _step_weights(self) -> None:
        parameters = list(self.student.trainable().values())
        norm = self.accelerator.clip_grad_norm_(parameters, self.settings.max_grad_norm or math.inf)
        if self.accelerator.scaler is None:  # fp16's scaler skips such steps by itself
            self._check_finite(float(norm), "norm of the gradient")
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def _check_finite(self, value: float, what: str) -> None:
        if math.isfinite(value):
            return
        mine = checkpoints.found(self.output)
        last = mine[-1] if mine else self.origin_checkpoint
        good = (f"the last good checkpoint is {last}" if last is not None else
                f"there is no checkpoint yet (save_steps={self.settings.save_steps}): begin anew, with a smaller "
                f"learning_rate than {self.settings.learning_rate:g} or a smaller save_steps")  # fmt: skip
        raise FloatingPointError(f"{what} is {value} at update {min(self.step + 1, self.total)} of {self.total}; "
                                 f"stopped, {good}")

    @torch.no_grad()
    def _check_weights(self) -> None:
        """Raises FloatingPointError unless the weights are finite, and so is their loss on the next update's blocks.

        What an update wrote is otherwise first looked at by the update behind it, when a checkpoint has been made.
        """
        number = self.settings.gradient_accumulation_steps
        for part in range(number):
            at = self.order.batch_of(self.step * number + part, self.accelerator.process_index)
            loss = self.student(self.train_blocks[at].to(self.accelerator.device))["loss"]
            self._check_finite(float(self.accelerator.gather(loss).mean()), f"loss of blocks {at}")
        for name, p in self.student.trainable().items():
            self._check_finite(float(p.abs().amax()), f"largest weight of {name}")

    # -- validation --------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Perplexity of the validation text, on the real compressed cache and on the full one."""
        return {"perplexity": self._perplexity(True), "perplexity_full": self._perplexity(False)}

    def _validate(self) -> dict[str, float]:
        """The validation of a run: diverged weights end it."""
        found = self.evaluate()
        for name, value in found.items():
            self._check_finite(value, f"validation {name}")
        return found

    def _perplexity(self, compressed: bool) -> float:
        blocks = self.validation
        assert blocks is not None
        size, rank = self.settings.eval_batch_size, self.accelerator.process_index
        sums = torch.zeros(2, dtype=torch.double, device=self.accelerator.device)
        for ids in list(blocks.split(size))[rank :: self.accelerator.num_processes]:
            ids = ids.to(self.accelerator.device)
            targets = next_tokens(ids)
            logits = self.student.lm(ids, use_cache=compressed).logits
            sums += torch.stack([cross_entropy_sum(logits, targets).double(), (targets != IGNORED).sum().double()])
        total = self.accelerator.reduce(sums, "sum")
        return float((total[0] / total[1]).exp())

    # -- state -------------------------------------------------------------------------------------------------------
    def identity(self) -> dict[str, Any]:
        """What a checkpoint belongs to; everything that changes a bit of what follows."""
        return {
            "model_type": self.student.lm.config.model_type,
            "first_weights": self.origin,
            "trainable": {name: list(p.shape) for name, p in self.student.trainable().items()},
            "compression": self.student.config.to_dict(),
            "distillation": asdict(self.student.settings),
            "training": {k: v for k, v in asdict(self.settings).items() if k not in RUNTIME},
            "total": self.total,
            "text": digest(self.train_blocks),
            "processes": self.accelerator.num_processes,
            "precision": str(self.accelerator.mixed_precision),
        }

    def save(self) -> Path | None:
        """Writes a checkpoint; only the first process does, with everybody's random states.

        Raises:
            FloatingPointError: for weights that have diverged; nothing is written.
        """
        self._check_weights()
        states = gather_object([checkpoints.rng_state()])
        path = None
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            path = checkpoints.write(self.output, self.step, {
                "identity": self.identity(),
                "weights": {name: p.detach().cpu() for name, p in self.student.trainable().items()},
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "rng": states,
            }, self.settings.keep_checkpoints)  # fmt: skip
        self.accelerator.wait_for_everyone()
        return path

    def resume(self, path: str | Path | None = None) -> int:
        """Goes on from a checkpoint as if nothing had happened; None = the newest of the output folder, if any.

        Newer checkpoints of the output folder are set aside: what is made from here on is not what they were.

        Returns:
            The updates that are done.

        Raises:
            ValueError: for a damaged checkpoint, one of another run, or one from elsewhere where the output folder
                holds some.
        """
        known = checkpoints.found(self.output)
        if path is None and not known:
            return 0
        source = Path(path) if path is not None else known[-1]
        state = checkpoints.read(source)
        checkpoints.check_same(state["identity"], self.identity())
        if source.resolve().parent != self.output.resolve():
            checkpoints.refuse_others(self.output)
        self.accelerator.wait_for_everyone()  # everybody has read and looked
        if self.accelerator.is_main_process:
            checkpoints.set_aside(self.output, state["step"])
        self.accelerator.wait_for_everyone()
        with torch.no_grad():
            for name, p in self.student.trainable().items():
                p.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        checkpoints.set_rng_state(state["rng"][self.accelerator.process_index])
        self.step, self.origin_checkpoint = state["step"], source
        return self.step

    def log(self, entry: dict[str, Any]) -> None:
        """Adds a line to ``log.jsonl``."""
        if self.accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            with (self.output / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


def _until(log: str, step: int) -> Iterator[str]:
    """Lines of a log that a run which stands at ``step`` will not write again; the rest of a torn line is none."""
    for line in log.splitlines():
        try:
            known = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if 0 <= known <= step and step:
            yield line


# Settings that change nothing of what is computed.
RUNTIME = ("logging_steps", "save_steps", "eval_steps", "eval_batch_size", "keep_checkpoints", "max_steps",
           "num_train_epochs")  # fmt: skip
